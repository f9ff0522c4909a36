//! Changing the library: promoting, removing, restoring.

use cortex_shared::clock::unix_ms;
use cortex_shared::crash::crash_point;
use cortex_shared::entry::Entry;
use cortex_shared::ids::CommitId;
use cortex_shared::library::{MAX_SKILL_ENTRIES, link_target, linked_skill, version_path};
use cortex_shared::wire_path::WirePath;
use serde_json::json;

use super::Skills;
use super::check::{Content, create, digest_of, end_directory, may_replace};
use super::error::{SkillError, Surprise};
use crate::store::workspace::{Author, Commit, KnownRules, Op, RejectReason, StoreError, Subtree};
use crate::store::{Actor, NewAudit, SkillOrigin, SkillVersion, Workspace};
use crate::sync::adopt::Adopted;
use crate::sync::{SyncError, WorkspaceHub};

/// How often a directory is looked at anew that changed meanwhile.
const ATTEMPTS: u32 = 3;

/// What is to be promoted.
#[derive(Clone, Debug)]
pub struct Promotion {
    /// The workspace.
    pub workspace: Workspace,
    /// The directory in it.
    pub path: WirePath,
    /// The skill's name.
    pub skill: String,
    /// The version that is known to be current, 0 for none; see `check::may_replace`.
    pub expected: Option<u64>,
    /// Who wants it.
    pub by: Actor,
}

/// What a promotion came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Promoted {
    /// The current version of the skill.
    pub version: SkillVersion,
    /// It was current before, and had the same content.
    pub unchanged: bool,
    /// The target of the link that stands at the path.
    pub link: Vec<u8>,
}

impl Skills {
    /// Makes a directory of a workspace the next version of a skill, and puts a link in its place. If the
    /// directory is the current version already, byte by byte, only the link is put there; and if the link
    /// stands there already, nothing is done.
    ///
    /// # Errors
    /// See [`SkillError`].
    pub async fn promote(&self, promotion: Promotion) -> Result<Promoted, SkillError> {
        let source = self.content.workspace(promotion.workspace.id).await?;
        let _order = self.order.lock().await;
        self.settle(self.store.skills(None).await?).await?;
        for _ in 0..ATTEMPTS {
            if let Some(promoted) = self.try_promote(&promotion, &source).await? {
                return Ok(promoted);
            }
        }
        Err(SkillError::PathChanged { path: promotion.path })
    }

    /// Promotes, unless the directory changed meanwhile (`None`).
    async fn try_promote(
        &self,
        promotion: &Promotion,
        source: &WorkspaceHub,
    ) -> Result<Option<Promoted>, SkillError> {
        let Promotion { workspace, path, skill, expected, by } = promotion;
        let (newest, current) = self.newest(skill).await?;
        let link = link_target(path, skill);
        let origin = SkillOrigin { workspace: workspace.id, path: path.clone() };
        let Some(tree) = read(source, path).await? else {
            let stands = source.entry(path.clone()).await?;
            return match (stands, current) {
                (Some(Entry::Link { target }), Some(version))
                    if linked_skill(path, &target).as_ref() == Some(skill)
                        && expected.is_none_or(|expected| expected == version.version) =>
                {
                    Ok(Some(Promoted { version, unchanged: true, link }))
                }
                _ => Err(SkillError::NotADirectory { path: path.clone() }),
            };
        };
        let content = Content::check(path.clone(), tree.digest, tree.entries)?;
        let unchanged = current.as_ref().is_some_and(|current| current.digest == content.digest);
        if !unchanged || expected.is_some() {
            may_replace(skill, current.as_ref(), *expected, &origin)?;
        }
        let library = self.library().await?;
        if !unchanged && library.adopt(source, content.chunks()).await? == Adopted::Lost {
            return Err(SkillError::ContentLost { what: path.to_string() });
        }
        crash_point("skill.adopted");

        // From here on nobody changes the workspace, so what is true of it stays true.
        let _still = source.hold_still().await;
        if read(source, path).await?.map(|tree| tree.digest) != Some(content.digest) {
            return Ok(None);
        }
        if let (true, Some(version)) = (unchanged, &current) {
            self.store.record_audit(audit(by, version, Some(workspace), true)).await?;
            put_link(source, &content, skill, by).await?;
            let version = version.clone();
            return Ok(Some(Promoted { version, unchanged: true, link }));
        }
        let version = SkillVersion {
            id: CommitId::new(),
            skill: skill.clone(),
            version: newest + 1,
            origin,
            restored_from: None,
            digest: content.digest,
            entries: content.entries.len() as u64,
            content_bytes: content.bytes,
            by: by.clone(),
            at_ms: unix_ms(),
            pending: true,
            ended_at_ms: None,
        };
        self.put_version(&library, &version, &content, current.as_ref()).await?;
        put_link(source, &content, skill, by).await?;
        crash_point("skill.linked");
        let version = self.finish(version, Some(workspace)).await?;
        Ok(Some(Promoted { version, unchanged: false, link }))
    }

    /// Takes a skill out of the library; returns the version that was current. What it was is kept for a
    /// while.
    ///
    /// # Errors
    /// See [`SkillError`].
    pub async fn remove(
        &self,
        skill: &str,
        expected: Option<u64>,
        by: &Actor,
    ) -> Result<SkillVersion, SkillError> {
        let _order = self.order.lock().await;
        self.settle(self.store.skills(None).await?).await?;
        let Some(current) = self.newest(skill).await?.1 else {
            return Err(SkillError::NoSuchSkill { skill: skill.to_owned() });
        };
        if let Some(expected) = expected.filter(|expected| *expected != current.version) {
            return Err(Surprise::Version { current: Box::new(current), expected }.into());
        }
        let now_ms = unix_ms();
        let detail = json!({ "version": current.version });
        let audit = by.audit(now_ms, "skill.removed", skill, detail);
        // The record decides; the tree follows, after a crash as well.
        self.store.remove_skill(current.id, now_ms, audit).await?;
        crash_point("skill.removed");
        self.settle(self.store.skills(Some(skill.to_owned())).await?).await?;
        Ok(current)
    }

    /// Makes an earlier version the next one: the one before the current one, or the last one of a skill
    /// that was removed, if none is named.
    ///
    /// # Errors
    /// See [`SkillError`].
    pub async fn restore(
        &self,
        skill: &str,
        wanted: Option<u64>,
        expected: Option<u64>,
        by: &Actor,
    ) -> Result<SkillVersion, SkillError> {
        let _order = self.order.lock().await;
        self.settle(self.store.skills(None).await?).await?;
        let versions = self.versions(Some(skill)).await?;
        let (newest, current) = self.newest(skill).await?;
        if newest == 0 {
            return Err(SkillError::NoSuchSkill { skill: skill.to_owned() });
        }
        let is = current.as_ref().map_or(0, |current| current.version);
        if let Some(expected) = expected.filter(|expected| *expected != is) {
            return Err(match current {
                Some(current) => Surprise::Version { current: Box::new(current), expected },
                None => Surprise::None { skill: skill.to_owned(), expected },
            }
            .into());
        }
        let chosen = match wanted {
            Some(wanted) if wanted == is => {
                return Err(SkillError::IsCurrent { skill: skill.to_owned(), version: wanted });
            }
            Some(wanted) => versions.iter().find(|version| version.version == wanted),
            None => versions.iter().rev().find(|version| version.version != is),
        };
        let Some(old) = chosen else {
            let version = wanted.unwrap_or_default();
            return Err(SkillError::NoSuchVersion { skill: skill.to_owned(), version });
        };
        let library = self.library().await?;
        let content = past(&library, old).await?;
        let version = SkillVersion {
            id: CommitId::new(),
            version: newest + 1,
            restored_from: Some(old.version),
            by: by.clone(),
            at_ms: unix_ms(),
            pending: true,
            ended_at_ms: None,
            ..old.clone()
        };
        self.put_version(&library, &version, &content, current.as_ref()).await?;
        self.finish(version, None).await
    }

    /// The newest number of a skill, 0 if there never was one, and what is current.
    async fn newest(&self, skill: &str) -> Result<(u64, Option<SkillVersion>), SkillError> {
        let versions = self.versions(Some(skill)).await?;
        let newest = versions.last().map_or(0, |version| version.version);
        Ok((newest, versions.into_iter().find(SkillVersion::is_current)))
    }

    /// Records a version as pending, and puts it into the library's tree in the place of the current one.
    /// If that is refused, nothing is left of it.
    async fn put_version(
        &self,
        library: &WorkspaceHub,
        version: &SkillVersion,
        content: &Content,
        current: Option<&SkillVersion>,
    ) -> Result<(), SkillError> {
        let mut ops = Vec::new();
        let (top, place) = place_of(version)?;
        if library.entry(top.clone()).await?.is_none() {
            ops.push(create(top, Entry::Dir));
        }
        ops.extend(content.put_at(&place)?);
        if let Some(current) = current {
            ops.extend(take_away(library, &place_of(current)?.1).await?);
        }
        self.store.begin_skill(version.clone()).await?;
        crash_point("skill.begun");
        match library.commit_whole(commit(library, version.id, &version.by, ops)).await {
            Ok(_) => {
                crash_point("skill.in_library");
                Ok(())
            }
            Err(SyncError::Store(StoreError::NotWhole {
                reason: RejectReason::MissingChunks,
                ..
            })) => {
                self.store.abandon_skill(version.id).await?;
                Err(SkillError::ContentLost {
                    what: format!("{}@{}", version.skill, version.version),
                })
            }
            // It may be there or not: whoever comes next looks.
            Err(error) => Err(error.into()),
        }
    }

    /// Records a version that is in the library's tree as the current one, and has all nodes told.
    pub(super) async fn finish(
        &self,
        version: SkillVersion,
        workspace: Option<&Workspace>,
    ) -> Result<SkillVersion, SkillError> {
        let line = audit(&version.by, &version, workspace, false);
        self.store.finish_skill(version.id, unix_ms(), line).await?;
        crash_point("skill.finished");
        if self.members.membership.begin_library() {
            self.members.send_memberships_to_all().await;
        }
        Ok(SkillVersion { pending: false, ..version })
    }
}

/// The directory at a path, if it is not more than can be promoted.
async fn read(tree: &WorkspaceHub, path: &WirePath) -> Result<Option<Subtree>, SkillError> {
    match tree.subtree(path.clone(), MAX_SKILL_ENTRIES).await {
        Err(SyncError::Store(StoreError::TooMuch { limit })) => {
            let limit = limit as u64;
            Err(SkillError::TooLarge { what: "files, links and directories", limit })
        }
        result => Ok(result?),
    }
}

/// Where a version stands in the library: the skill's directory, and its own in that.
pub(super) fn place_of(version: &SkillVersion) -> Result<(WirePath, WirePath), SkillError> {
    let place = version_path(&version.skill, version.version);
    // A name that was checked when it came in has room for every number.
    let place = place.map_err(|_| SkillError::NoSuchSkill { skill: version.skill.clone() })?;
    let top = place.parent().unwrap_or_else(|| place.clone());
    Ok((top, place))
}

/// What takes a directory away as it is; nothing if there is none.
pub(super) async fn take_away(
    library: &WorkspaceHub,
    place: &WirePath,
) -> Result<Vec<Op>, SkillError> {
    let Some(Subtree { digest, entries }) = read(library, place).await? else {
        return Ok(Vec::new());
    };
    let content = Content { digest, at: place.clone(), entries, bytes: 0 };
    let mut ops = content.emptied();
    ops.push(end_directory(place.clone(), None));
    Ok(ops)
}

/// Puts the link to a skill in the place of a directory that is as it was looked at. Whoever calls holds the
/// workspace still.
pub(super) async fn put_link(
    source: &WorkspaceHub,
    content: &Content,
    skill: &str,
    by: &Actor,
) -> Result<(), SkillError> {
    let mut ops = content.emptied();
    let target = link_target(&content.at, skill).into();
    ops.push(end_directory(content.at.clone(), Some(Entry::Link { target })));
    source.commit_whole(commit(source, CommitId::new(), by, ops)).await?;
    Ok(())
}

pub(super) fn commit(tree: &WorkspaceHub, id: CommitId, by: &Actor, ops: Vec<Op>) -> Commit {
    Commit {
        id,
        author: Author::Operator(by.name.clone()),
        epoch: tree.head().borrow().epoch,
        rules: KnownRules::Unsaid,
        ops: ops.into_iter().map(Ok).collect(),
    }
}

/// A version that is not current, out of the library's past, if that has it whole.
async fn past(library: &WorkspaceHub, version: &SkillVersion) -> Result<Content, SkillError> {
    let forgotten =
        || SkillError::Forgotten { skill: version.skill.clone(), version: version.version };
    let (_, place) = place_of(version)?;
    let plan = match library.last_of(place.clone()).await {
        Err(SyncError::Store(StoreError::NothingBefore { .. })) => return Err(forgotten()),
        result => result?,
    };
    let entries: Vec<(WirePath, Entry)> = plan
        .ops
        .into_iter()
        .filter(|op| op.path.is_below(&place))
        .filter_map(|op| Some((op.path, op.new?)))
        .collect();
    if digest_of(&place, &entries) != version.digest {
        return Err(forgotten());
    }
    let bytes = version.content_bytes;
    Ok(Content { digest: version.digest, at: place, entries, bytes })
}

/// The line of the audit log about a version that was made, or was found to be there.
fn audit(
    by: &Actor,
    version: &SkillVersion,
    workspace: Option<&Workspace>,
    unchanged: bool,
) -> NewAudit {
    let action = if version.restored_from.is_some() && !unchanged {
        "skill.restored"
    } else {
        "skill.promoted"
    };
    let detail = json!({
        "version": version.version,
        "digest": version.digest.to_string(),
        "entries": version.entries,
        "content_bytes": version.content_bytes,
        "workspace_id": workspace.map_or(version.origin.workspace, |workspace| workspace.id),
        "workspace": workspace.map(|workspace| &workspace.name),
        "path": version.origin.path.to_string(),
        "restored_from": version.restored_from,
        "unchanged": unchanged,
    });
    by.audit(unix_ms(), action, version.skill.clone(), detail)
}
