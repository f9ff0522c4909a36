//! What may be a skill, and who may take the place of which version. Pure.

use std::collections::BTreeMap;

use cortex_shared::chunk::ChunkRef;
use cortex_shared::entry::{Digest, DirDigest, Entry};
use cortex_shared::library::{MAX_SKILL_BYTES, MAX_SKILL_ENTRIES};
use cortex_shared::wire_path::WirePath;

use super::error::{SkillError, Surprise};
use super::rebased;
use crate::store::workspace::Op;
use crate::store::{SkillOrigin, SkillVersion};

/// A directory that can be a version of a skill.
#[derive(Clone, Debug)]
pub(super) struct Content {
    /// Its digest.
    pub(super) digest: Digest,
    /// Where it stands.
    pub(super) at: WirePath,
    /// What is below it, in the order of a walk, by paths from the root of its tree.
    pub(super) entries: Vec<(WirePath, Entry)>,
    /// Sum of the files' sizes.
    pub(super) bytes: u64,
}

impl Content {
    /// Checks a directory.
    pub(super) fn check(
        at: WirePath,
        digest: Digest,
        entries: Vec<(WirePath, Entry)>,
    ) -> Result<Self, SkillError> {
        if entries.len() > MAX_SKILL_ENTRIES {
            let limit = MAX_SKILL_ENTRIES as u64;
            return Err(SkillError::TooLarge { what: "files, links and directories", limit });
        }
        let mut bytes = 0_u64;
        for (path, entry) in &entries {
            match entry {
                Entry::File(file) => bytes = bytes.saturating_add(file.size),
                Entry::Link { .. } => {
                    let within = below(path, &at);
                    if within.is_none_or(|within| entry.leads_outside(&within)) {
                        return Err(SkillError::LinkOutside { path: path.clone() });
                    }
                }
                Entry::Dir => {}
            }
        }
        if bytes > MAX_SKILL_BYTES {
            return Err(SkillError::TooLarge { what: "bytes", limit: MAX_SKILL_BYTES });
        }
        Ok(Self { digest, at, entries, bytes })
    }

    /// What of the content has to be present.
    pub(super) fn chunks(&self) -> impl Iterator<Item = ChunkRef> {
        self.entries.iter().flat_map(|(_, entry)| match entry {
            Entry::File(file) => file.chunks().collect(),
            Entry::Link { .. } | Entry::Dir => Vec::new(),
        })
    }

    /// What makes a new directory at `to` equal to it.
    pub(super) fn put_at(&self, to: &WirePath) -> Result<Vec<Op>, SkillError> {
        let mut ops = vec![create(to.clone(), Entry::Dir)];
        for (path, entry) in &self.entries {
            let there = rebased(path, &self.at, to)
                .ok_or_else(|| SkillError::PathTooLong { path: path.clone() })?;
            ops.push(create(there, entry.clone()));
        }
        Ok(ops)
    }

    /// What takes everything below it away, but not itself, if it is as it was.
    pub(super) fn emptied(&self) -> Vec<Op> {
        let delete = |(path, entry): &(WirePath, Entry)| Op {
            path: path.clone(),
            expected: Some(entry.identity()),
            new: None,
            conflict_of: None,
        };
        self.entries.iter().rev().map(delete).collect()
    }
}

pub(super) fn create(path: WirePath, entry: Entry) -> Op {
    Op { path, expected: None, new: Some(entry), conflict_of: None }
}

/// The operation that ends an empty directory: by something else, or by nothing.
pub(super) fn end_directory(path: WirePath, new: Option<Entry>) -> Op {
    Op { path, expected: Some(Entry::Dir.identity()), new, conflict_of: None }
}

/// The path as seen from a directory above it.
fn below(path: &WirePath, directory: &WirePath) -> Option<WirePath> {
    let rest = path.as_bytes().strip_prefix(directory.as_bytes())?.strip_prefix(b"/")?;
    WirePath::new(rest).ok()
}

/// The digest of a directory at `at` that has these entries, in the order of a walk.
pub(super) fn digest_of(at: &WirePath, entries: &[(WirePath, Entry)]) -> Digest {
    let mut directories: BTreeMap<WirePath, Vec<(&[u8], &Entry)>> = BTreeMap::new();
    directories.entry(at.clone()).or_default();
    for (path, entry) in entries {
        if entry.is_dir() {
            directories.entry(path.clone()).or_default();
        }
        if let Some(parent) = path.parent() {
            directories.entry(parent).or_default().push((path.name(), entry));
        }
    }
    let mut digests: BTreeMap<WirePath, Digest> = BTreeMap::new();
    // What is below comes after its directory.
    for (directory, mut children) in directories.into_iter().rev() {
        children.sort_by_key(|(name, _)| *name);
        let mut builder = DirDigest::new();
        for (name, entry) in children {
            let own = entry.identity();
            let below = entry.is_dir().then(|| directory.join(name).ok()).flatten();
            let digest = below.and_then(|below| digests.get(&below)).unwrap_or(&own);
            builder.child(name, entry.kind(), digest);
        }
        digests.insert(directory, builder.finish());
    }
    digests.remove(at).unwrap_or(Digest::ZERO)
}

/// Whether a promotion may take the place of what is current. Without an expectation it may where there is
/// nothing, and where the same directory was promoted before: whoever promotes another one has perhaps
/// never heard of it.
pub(super) fn may_replace(
    skill: &str,
    current: Option<&SkillVersion>,
    expected: Option<u64>,
    origin: &SkillOrigin,
) -> Result<(), Surprise> {
    match (current, expected) {
        (None, None | Some(0)) => Ok(()),
        (None, Some(expected)) => Err(Surprise::None { skill: skill.to_owned(), expected }),
        (Some(current), Some(expected)) if current.version == expected => Ok(()),
        (Some(current), Some(expected)) => {
            Err(Surprise::Version { current: Box::new(current.clone()), expected })
        }
        (Some(current), None) if current.origin == *origin => Ok(()),
        (Some(current), None) => Err(Surprise::OtherOrigin { current: Box::new(current.clone()) }),
    }
}
