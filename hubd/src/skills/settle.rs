//! Finishing or undoing what was begun: after a crash, and after an error in the middle.

use cortex_shared::ids::CommitId;
use cortex_shared::library::MAX_SKILL_ENTRIES;
use cortex_shared::wire_path::WirePath;

use super::Skills;
use super::change::{commit, place_of, put_link, take_away};
use super::check::{Content, end_directory};
use super::error::SkillError;
use crate::store::SkillVersion;
use crate::sync::WorkspaceHub;

impl Skills {
    /// Brings the trees in step with the record. Whoever calls holds the order, or is alone.
    pub(super) async fn settle(&self, known: Vec<SkillVersion>) -> Result<(), SkillError> {
        for version in known.iter().filter(|version| version.pending) {
            self.settle_pending(version).await?;
        }
        // Of each skill that has none that is current, or is about to be, the last one.
        for (index, version) in known.iter().enumerate() {
            let next = known.get(index + 1).filter(|next| next.skill == version.skill);
            if next.is_none() && !version.pending && version.ended_at_ms.is_some() {
                self.settle_removed(version).await?;
            }
        }
        Ok(())
    }

    async fn settle_pending(&self, version: &SkillVersion) -> Result<(), SkillError> {
        let library = self.library().await?;
        let (_, place) = place_of(version)?;
        if library.entry(place).await?.is_none() {
            tracing::warn!(
                skill = version.skill,
                version = version.version,
                "a version that was begun and did not come to be is forgotten"
            );
            return Ok(self.store.abandon_skill(version.id).await?);
        }
        let workspace = self.members.membership.get(version.origin.workspace);
        if let (Some(workspace), None) = (&workspace, version.restored_from) {
            let source = self.content.workspace(workspace.id).await?;
            let _still = source.hold_still().await;
            self.settle_link(version, &source).await?;
        }
        tracing::info!(
            skill = version.skill,
            version = version.version,
            "a version that was begun is finished"
        );
        self.finish(version.clone(), workspace.as_ref()).await?;
        Ok(())
    }

    /// Puts the link where the directory still is what was promoted. One that changed stays: nothing of it
    /// is lost, and it can be promoted again.
    async fn settle_link(
        &self,
        version: &SkillVersion,
        source: &WorkspaceHub,
    ) -> Result<(), SkillError> {
        let at: &WirePath = &version.origin.path;
        let Some(tree) = source.subtree(at.clone(), MAX_SKILL_ENTRIES).await.ok().flatten() else {
            return Ok(());
        };
        if tree.digest == version.digest {
            let content = Content {
                digest: tree.digest,
                at: at.clone(),
                entries: tree.entries,
                bytes: version.content_bytes,
            };
            put_link(source, &content, &version.skill, &version.by).await?;
        }
        Ok(())
    }

    /// Takes a skill out of the tree that the record says was removed.
    async fn settle_removed(&self, version: &SkillVersion) -> Result<(), SkillError> {
        let library = self.library().await?;
        let (top, place) = place_of(version)?;
        let mut ops = take_away(&library, &place).await?;
        if ops.is_empty() {
            return Ok(());
        }
        ops.push(end_directory(top, None));
        library.commit_whole(commit(&library, CommitId::new(), &version.by, ops)).await?;
        Ok(())
    }
}
