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
//! * What is replaced or deleted is kept as an old version for as long as the workspace's settings say.
//! * Content is let go only when no entry and no kept version names it, and nobody has sent it, asked for it, named it or
//!   ceased to name it for a while.
//! * What a member deletes is judged as [`cortex_shared::mass_delete`] says, whatever the member says of
//!   it; too many deletions are rejected as [`RejectReason::Held`] while all else of the commit is applied.
//! * A member that went by other rules of what is left out than the tree has changes nothing but the
//!   rules ([`RejectReason::Rules`]): it would delete, or send, what is left out by now.
//! * What is answered with `Ok` is durable.

pub mod model;
pub mod past;
pub mod sqlite;

#[cfg(test)]
pub(crate) mod contract;

use std::collections::{HashMap, HashSet};

use cortex_shared::entry::{Digest, Entry};
use cortex_shared::ids::{CommitId, NodeId, WorkspaceEpoch};
use cortex_shared::wire_path::WirePath;
use futures_util::future::BoxFuture;
use tokio::sync::watch;

use super::database::DatabaseError;

pub use model::{
    Change, ChangesPage, Commit, CommitResult, Conflict, Found, Head, HeldMember, InvalidOp,
    KnownRules, Op, PackAdded, PackRecord, RejectReason, Rejection, SparsePack, Subtree, Summary,
    UnusedPacks,
};
pub use past::{
    Author, LogEntry, LogFilter, LogPage, LoggedChange, RestorePlan, Usage, WorkspaceSettings,
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
    /// A version of which not everything is kept any more.
    #[error("version {asked} is no longer kept; the oldest is {oldest}")]
    VersionForgotten {
        /// The version that was named.
        asked: u64,
        /// The oldest one that is kept as a whole.
        oldest: u64,
    },
    /// Of what was to be done as a whole, this could not be; so nothing was.
    #[error("refused as a whole: {path}: {reason:?}")]
    NotWhole {
        /// The first path of those that were in the way.
        path: String,
        /// Why.
        reason: RejectReason,
    },
    /// A path has no earlier version.
    #[error("there is no earlier version of {path}")]
    NothingBefore {
        /// The path.
        path: String,
    },
    /// More paths than one restoration brings back.
    #[error("more than {limit} paths at once")]
    TooMuch {
        /// How many it would be at most.
        limit: usize,
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

    /// Whether the newest version that a member was told of can have been one of this history. If it was
    /// never one of it, versions have been lost.
    fn is_known(&self, known: Head) -> Answer<'_, bool>;

    /// Begins a new epoch, durably, if this version was never one of this history. Returns the head; the member
    /// has to merge anew if that has another epoch than `known`.
    ///
    /// # Errors
    /// [`StoreError::BeyondHead`] if so many versions cannot have been lost.
    fn restart_if_lost(&self, known: Head) -> Answer<'_, Head>;

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

    /// Some packs that are useless, as a whole or for the greater part: chunks that neither an entry
    /// nor a kept version names, and that were not touched since. With the slice to ask for next, if
    /// there is more to look at.
    fn unused_packs(
        &self,
        slice: Option<CollectionSlice>,
        untouched_since_ms: i64,
    ) -> Answer<'_, (UnusedPacks, Option<CollectionSlice>)>;

    /// Forgets useless packs, but for those of which something has been touched by now; returns the
    /// forgotten ones, whose files may go.
    fn drop_packs(&self, packs: Vec<Digest>, untouched_since_ms: i64) -> Answer<'_, Vec<Digest>>;

    /// Records a pack whose file is durable, made of what is used of others, and forgets those. If of
    /// what it leaves out something has been touched by now, nothing is changed, and the answer is
    /// false.
    fn replace_packs(
        &self,
        old: Vec<Digest>,
        new: PackRecord,
        untouched_since_ms: i64,
    ) -> Answer<'_, bool>;

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

    /// Lets so many losses of a member go (see [`cortex_shared::mass_delete`]) that would be held
    /// otherwise, whatever was held of it so far; and has it told so. The word holds for a day, and for
    /// ten minutes from the time the member was told or made use of it.
    fn allow_deletions(&self, node: NodeId, losses: u64) -> Answer<'_, ()>;

    /// Whether a member is to be told of that word. Says so for a minute, or until the member makes use
    /// of it.
    fn take_word(&self, node: NodeId) -> Answer<'_, bool>;

    /// The members whose deletions were held within the last ten minutes.
    fn held_members(&self) -> Answer<'_, Vec<HeldMember>>;
    /// As [`Self::commit`], but all of it or nothing: [`StoreError::NotWhole`].
    fn commit_whole(&self, commit: Commit) -> Answer<'_, CommitResult>;

    /// The directory at a path with everything below it, at most `limit` entries
    /// ([`StoreError::TooMuch`]); `None` if no directory stands there.
    fn subtree(&self, path: WirePath, limit: usize) -> Answer<'_, Option<Subtree>>;

    /// The changes after a version, in order, up to about `budget_bytes` of paths and content but at
    /// least one. Not all deletions are known before [`ChangesPage::log_floor`]. Who reads on from [`ChangesPage::last_seq`] until it reaches the head has the tree
    /// of that head, however much it moved meanwhile.
    fn changes(&self, after_seq: u64, budget_bytes: usize) -> Answer<'_, ChangesPage>;

    /// The version a member has applied completely; 0 if it never said so in this epoch.
    fn applied(&self, node: NodeId) -> Answer<'_, u64>;

    /// The same of every member that said so in this epoch, however many there are.
    fn applied_by_all(&self) -> Answer<'_, HashMap<NodeId, u64>>;

    /// Notes that a member has applied everything up to a version. Never goes back.
    fn ack_applied(&self, node: NodeId, epoch: WorkspaceEpoch, seq: u64) -> Answer<'_, ()>;

    /// The conflict copies that still exist, oldest first, at most 10,000.
    fn conflicts(&self) -> Answer<'_, Vec<Conflict>>;

    /// Ceases to list conflict copies, which stay files like any other.
    fn forget_conflicts(&self, copies: Vec<WirePath>) -> Answer<'_, ()>;

    /// What stands at a path.
    fn entry(&self, path: WirePath) -> Answer<'_, Option<Entry>>;

    /// Changes of the past, newest first: those that led to what stands now, and those of which the
    /// old version is kept.
    fn log(&self, filter: LogFilter) -> Answer<'_, LogPage>;

    /// What would bring a path and everything below it (the whole tree for `None`) back to what it was
    /// at a version. What came later than that stays. Without a version: to what it was before its last
    /// change; for a directory that was deleted, before its deletion began.
    fn restore_plan(&self, path: Option<WirePath>, version: Option<u64>)
    -> Answer<'_, RestorePlan>;

    /// How much of the past is kept, and how much may be stored.
    fn settings(&self) -> Answer<'_, WorkspaceSettings>;

    /// Changes that.
    fn set_settings(&self, settings: WorkspaceSettings) -> Answer<'_, ()>;

    /// What is stored, and how far back.
    fn usage(&self) -> Answer<'_, Usage>;

    /// Lets go of some of the old versions and records of deletions whose time is over; returns how
    /// many, 0 once there are none.
    fn trim(&self, now_ms: i64) -> Answer<'_, usize>;
}
