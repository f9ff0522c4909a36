//! What the hub remembers of one workspace: its versions, and which content it has.
//!
//! [`WorkspaceStore`] says it in words of the domain; [`sqlite`] is the engine for one machine, and
//! `contract` the test that every engine passes. The content itself lies in pack files beside the
//! database (`sync::pack_files`): the store only knows which pack holds which chunk.
//!
//! The rules of a workspace, which every engine keeps:
//!
//! * The tree has no orphans: an entry's parent is a directory of the tree. A directory goes only
//!   when it is empty.
//! * A file's entry exists only while every chunk of its content is present.
//! * Each accepted change takes the next number (`seq`) inside the transaction that makes it durable,
//!   and nobody hears of it earlier. So a number is never given twice, and a parent's is below that
//!   of its children.
//! * Content is let go only when no entry names it and nobody has sent it, asked for it, named it or
//!   ceased to name it for a while.
//! * What is answered with `Ok` is durable.

pub mod model;
pub mod sqlite;

#[cfg(test)]
pub(crate) mod contract;

use std::collections::HashSet;

use cortex_shared::entry::Digest;
use cortex_shared::ids::{CommitId, NodeId, WorkspaceEpoch};
use futures_util::future::BoxFuture;
use tokio::sync::watch;

use super::database::DatabaseError;

pub use model::{
    Change, ChangesPage, Commit, CommitResult, Conflict, Found, Head, InvalidOp, Op, PackAdded,
    PackRecord, RejectReason, Rejection, Summary,
};

/// Why the store did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The caller works with versions of another history.
    #[error("workspace epoch {asked} is not the current {current}")]
    WrongEpoch {
        /// The caller's.
        asked: WorkspaceEpoch,
        /// The store's.
        current: WorkspaceEpoch,
    },
    /// Another node has used this commit id.
    #[error("commit id {commit} belongs to another node")]
    ForeignCommit {
        /// The id.
        commit: CommitId,
    },
    /// A version that does not exist yet.
    #[error("version {asked} is beyond the head {head}")]
    BeyondHead {
        /// The version that was named.
        asked: u64,
        /// The newest one.
        head: u64,
    },
    /// The database.
    #[error(transparent)]
    Database(#[from] DatabaseError),
}

impl From<rusqlite::Error> for StoreError {
    fn from(error: rusqlite::Error) -> Self {
        Self::Database(error.into())
    }
}

impl StoreError {
    /// Whether there was no space left.
    #[must_use]
    pub fn is_disk_full(&self) -> bool {
        matches!(self, Self::Database(error) if error.is_disk_full())
    }
}

/// Where a search for useless packs goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CollectionSlice(i64);

/// The answer of a store, which may take as long as a disk does.
pub type Answer<'a, T> = BoxFuture<'a, Result<T, StoreError>>;

/// The versions of one workspace and the whereabouts of its content.
///
/// A call whose caller goes away runs to its end once it has been accepted.
pub trait WorkspaceStore: Send + Sync + 'static {
    /// The newest durable version, now and whenever it moves. Only the latest value is kept.
    fn watch_head(&self) -> watch::Receiver<Head>;

    /// Compares the newest version that a member was told of with this history. If it was never one
    /// of it, versions have been lost, and a new epoch begins, durably. Returns the head; the member
    /// has to merge anew if that has another epoch than `known`.
    fn check_history(&self, known: Head) -> Answer<'_, Head>;

    /// Makes a new version of the same tree, so that members ask what there is to do.
    fn repeat_head(&self) -> Answer<'_, ()>;

    /// Head and size of the workspace.
    fn summary(&self) -> Answer<'_, Summary>;

    /// For each chunk, whether it is present. A "yes" keeps the chunk from being collected for at
    /// least 72 hours.
    fn have(&self, chunks: Vec<Digest>) -> Answer<'_, Vec<bool>>;

    /// Whether a pack is recorded.
    fn has_pack(&self, pack: Digest) -> Answer<'_, bool>;

    /// Chunks that were lost and have not come back, at most 8,192 of them.
    fn wanted(&self) -> Answer<'_, Vec<Digest>>;

    /// Ceases to want chunks that no entry names any more.
    fn drop_wanted(&self) -> Answer<'_, ()>;

    /// Records a pack whose file is durable, and its chunks. If some of them were wanted, the head
    /// moves, so that members that wait for them try again.
    fn add_pack(&self, pack: PackRecord) -> Answer<'_, PackAdded>;

    /// Forgets packs whose files are gone, with the chunks that were only there. Those are wanted from
    /// then on, and the head moves, so that members ask for it.
    fn forget_packs(&self, packs: Vec<Digest>) -> Answer<'_, ()>;

    /// Some packs that nothing needs: no entry names any of their chunks, and none was touched since.
    /// With the slice to ask for next, if there is more to look at.
    fn useless_packs(
        &self,
        slice: Option<CollectionSlice>,
        untouched_since_ms: i64,
    ) -> Answer<'_, (Vec<Digest>, Option<CollectionSlice>)>;

    /// Forgets useless packs, but for those of which something has been touched by now; returns the
    /// forgotten ones, whose files may go.
    fn drop_packs(&self, packs: Vec<Digest>, untouched_since_ms: i64) -> Answer<'_, Vec<Digest>>;

    /// Forgets some of the recipes that nothing names any more; returns how many, 0 once there are
    /// none.
    fn drop_recipes(&self) -> Answer<'_, usize>;

    /// All recorded packs.
    fn packs(&self) -> Answer<'_, HashSet<Digest>>;

    /// The packs that hold these chunks.
    fn packs_of(&self, chunks: Vec<Digest>) -> Answer<'_, Found>;

    /// Applies operations one after another, each by compare-and-set; those that are not rejected
    /// become visible together. A repetition of a commit that changed something returns its first
    /// result, for at least a week.
    fn commit(&self, commit: Commit) -> Answer<'_, CommitResult>;

    /// The changes after a version, in order, up to about `budget_bytes` of paths and content but at
    /// least one. Who reads on from [`ChangesPage::last_seq`] until it reaches the head has the tree
    /// of that head, however much it moved meanwhile.
    fn changes(&self, after_seq: u64, budget_bytes: usize) -> Answer<'_, ChangesPage>;

    /// The version a member has applied completely; 0 if it never said so in this epoch.
    fn applied(&self, node: NodeId) -> Answer<'_, u64>;

    /// Notes that a member has applied everything up to a version. Never goes back.
    fn ack_applied(&self, node: NodeId, epoch: WorkspaceEpoch, seq: u64) -> Answer<'_, ()>;

    /// The conflict copies that still exist, oldest first, at most 10,000.
    fn conflicts(&self) -> Answer<'_, Vec<Conflict>>;
}
