//! What is recorded of a skill: its versions, and where each came from.

use cortex_shared::entry::Digest;
use cortex_shared::ids::{CommitId, WorkspaceId};
use cortex_shared::wire_path::WirePath;

use super::Actor;

/// Where a skill was promoted from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SkillOrigin {
    /// The workspace; perhaps one that is no more.
    pub workspace: WorkspaceId,
    /// The directory in it.
    pub path: WirePath,
}

/// One version of a skill.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SkillVersion {
    /// Made for it; also the idempotency key of its commits.
    pub id: CommitId,
    /// The skill's name.
    pub skill: String,
    /// Its number, from 1.
    pub version: u64,
    /// Where it, or the version it was restored from, was promoted from.
    pub origin: SkillOrigin,
    /// The version it was restored from.
    pub restored_from: Option<u64>,
    /// Digest of the directory.
    pub digest: Digest,
    /// Files, links and directories in it.
    pub entries: u64,
    /// Sum of the files' sizes.
    pub content_bytes: u64,
    /// Who made it.
    pub by: Actor,
    /// When.
    pub at_ms: i64,
    /// It is being made; see [`crate::store::Store::begin_skill`].
    pub pending: bool,
    /// When another took its place, or it was removed.
    pub ended_at_ms: Option<i64>,
}

impl SkillVersion {
    /// Whether this is what nodes have.
    #[must_use]
    pub fn is_current(&self) -> bool {
        !self.pending && self.ended_at_ms.is_none()
    }
}
