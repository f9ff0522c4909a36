//! The hub as the sync engine sees it: an ordered log of changes and a store of chunks.
//!
//! A trait, so that the engine runs against a hub in memory as well; [`super::tonic_hub`] speaks the
//! protocol. Every call may fail at any time and may be repeated: operations compare and set, packs
//! are named by their content.

use std::future::Future;
use std::time::Duration;

use bytes::Bytes;
use cortex_shared::entry::{Digest, Entry};
use cortex_shared::ids::{CommitId, WorkspaceEpoch, WorkspaceId};
use cortex_shared::wire_path::WirePath;
use futures_util::stream::BoxStream;

use super::index::Cursor;

/// Most hashes in one question, as the protocol says.
pub const MAX_HASHES: usize = 8192;
/// A line on which nothing has moved for so long is given up: it is dead though it looks open.
pub const STALL_LIMIT: Duration = Duration::from_secs(30);
/// Fewer bytes than that within the limit are nothing: pings of the connection itself move, too.
pub const STALL_BYTES: u64 = 1024;

/// Why the hub did not do something.
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    /// It cannot be reached, or the line broke. Try again later.
    #[error("hub is unreachable: {message}")]
    Unavailable {
        /// What happened.
        message: String,
    },
    /// It has no room for more content; everything else it does.
    #[error("{message}")]
    Full {
        /// What is full, for people.
        message: String,
    },
    /// It answered no. Trying the same again at once is useless.
    #[error("hub refused: {message} ({code})")]
    Refused {
        /// Stable code of the refusal, empty if it gave none.
        code: String,
        /// Text for people.
        message: String,
    },
    /// It said something that makes no sense.
    #[error("hub broke the protocol: {what}")]
    Protocol {
        /// What.
        what: String,
    },
}

impl HubError {
    /// A violation of the protocol.
    pub fn protocol(what: impl ToString) -> Self {
        Self::Protocol { what: what.to_string() }
    }

    /// Whether the hub has another history than the one it was asked about: ask for its head.
    #[must_use]
    pub fn is_other_history(&self) -> bool {
        matches!(self, Self::Refused { code, .. } if code == "epoch_changed" || code == "beyond_head")
    }

    pub(super) fn stalled() -> Self {
        Self::Unavailable { message: format!("no progress for {} s", STALL_LIMIT.as_secs()) }
    }
}

/// The newest version of a workspace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    /// Its history.
    pub epoch: WorkspaceEpoch,
    /// Its last change.
    pub seq: u64,
    /// Digest of the root directory.
    pub root: Digest,
}

/// What the hub says when it is asked for its head.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Contact {
    /// The newest version.
    pub head: Head,
    /// Chunks that the hub had and has lost: who has them sends them again.
    pub wanted: Vec<Digest>,
    /// An operator lets the deletions go that are held here. Said until one is sent, for a minute.
    pub confirm_deletes: bool,
}

/// One answer to the question for chunks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fetched {
    /// A pack that holds some of them.
    Pack(Bytes),
    /// Some that the hub does not have.
    Missing(Vec<Digest>),
}

/// An operation of a commit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CommitOp {
    /// Where.
    pub path: WirePath,
    /// Identity of what is there; `None` if nothing is.
    pub expected: Option<Digest>,
    /// What shall be there.
    pub new: Option<Entry>,
    /// See [`super::plan::PushOp::conflict_of`].
    pub conflict_of: Option<WirePath>,
}

/// Why an operation was not applied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RejectReason {
    /// Something else is there.
    Conflict,
    /// The parent is not a directory.
    NoParent,
    /// The directory has children.
    NotEmpty,
    /// The hub lacks chunks.
    MissingChunks,
    /// It will never be applied.
    Invalid,
    /// The workspace has other rules of what is left out than the member went by.
    Rules,
    /// A deletion, one of so many that an operator has to allow them.
    Held,
}

/// An operation that was not applied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rejected {
    /// Which, counted from 0.
    pub index: usize,
    /// Why.
    pub reason: RejectReason,
    /// What is there.
    pub current: Option<Entry>,
}

/// The result of a commit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Committed {
    /// The head afterwards.
    pub seq: u64,
    /// Its root digest.
    pub root: Digest,
    /// What was not applied, in the order of the request.
    pub rejected: Vec<Rejected>,
    /// The number of each operation that was applied, in order; 0 where all was so already.
    pub seqs: Vec<u64>,
}

impl Committed {
    /// How many changes the commit made.
    #[must_use]
    pub fn changes(&self) -> u64 {
        self.seqs.iter().filter(|seq| **seq != 0).count() as u64
    }
}

/// A commit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Commit {
    /// Repeating it gives the same result.
    pub id: CommitId,
    /// The history it belongs to.
    pub epoch: WorkspaceEpoch,
    /// What it does.
    pub ops: Vec<CommitOp>,
    /// As for [`Hub::head`].
    pub known: Option<Head>,
    /// The content of the rules at the hub that the member went by, `None` without any.
    pub rules: Option<Digest>,
}

/// A change since a cursor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// Where.
    pub path: WirePath,
    /// What is there now; `None` if it was deleted.
    pub entry: Option<Entry>,
}

/// Some of the changes since a cursor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChangesPage {
    /// In the order in which they were made.
    pub changes: Vec<Change>,
    /// Ask for what comes after this.
    pub last_seq: u64,
    /// The head at the time of this page; there is no further page once `last_seq` is this.
    pub head_seq: u64,
    /// The root digest of that head.
    pub root: Digest,
    /// Not all deletions since the cursor are known to the hub any more: this and the other pages are the
    /// whole tree, and what they do not name is not there.
    pub complete: bool,
}

/// A stream of answers.
pub type Answers<T> = BoxStream<'static, Result<T, HubError>>;

/// What the engine needs of the hub. Calls may be dropped at any time.
pub trait Hub: Send + Sync + 'static {
    /// How many bytes have moved on the line, in both directions, since it was first used.
    fn moved_bytes(&self) -> u64;

    /// The newest version. `known` is the newest one that the hub ever told of: if that was never
    /// one of its history, versions have been lost, and it begins a new epoch.
    fn head(
        &self,
        workspace: WorkspaceId,
        known: Option<Head>,
    ) -> impl Future<Output = Result<Contact, HubError>> + Send;

    /// For each of at most [`MAX_HASHES`] chunks, whether the hub has it.
    fn have(
        &self,
        workspace: WorkspaceId,
        chunks: &[Digest],
    ) -> impl Future<Output = Result<Vec<bool>, HubError>> + Send;

    /// Sends packs; the answers are the names of those that are durable, in order.
    fn put_packs(
        &self,
        workspace: WorkspaceId,
        packs: BoxStream<'static, Bytes>,
    ) -> impl Future<Output = Result<Answers<Digest>, HubError>> + Send;

    /// Applies operations by compare-and-set.
    fn commit(
        &self,
        workspace: WorkspaceId,
        commit: Commit,
    ) -> impl Future<Output = Result<Committed, HubError>> + Send;

    /// The changes after a number, to the head. `known` is as for [`Self::head`].
    fn changes(
        &self,
        workspace: WorkspaceId,
        after: u64,
        known: Option<Head>,
    ) -> impl Future<Output = Result<Answers<ChangesPage>, HubError>> + Send;

    /// Packs that hold at most [`MAX_HASHES`] chunks, and which of them the hub does not have.
    fn get_packs(
        &self,
        workspace: WorkspaceId,
        chunks: &[Digest],
    ) -> impl Future<Output = Result<Answers<Fetched>, HubError>> + Send;

    /// Tells that everything up to a version is applied here, durably.
    fn ack_applied(
        &self,
        workspace: WorkspaceId,
        cursor: Cursor,
    ) -> impl Future<Output = Result<(), HubError>> + Send;
}
