//! What goes into a workspace's store and comes out of it.

use cortex_shared::chunk::ChunkRef;
use cortex_shared::entry::{Digest, Entry, InvalidEntry};
use cortex_shared::ids::{CommitId, NodeId, WorkspaceEpoch};
use cortex_shared::wire_path::{InvalidPath, WirePath};

use super::Author;

/// The newest version of a workspace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    /// Which history `seq` counts in.
    pub epoch: WorkspaceEpoch,
    /// Number of the last accepted change, 0 if there was none.
    pub seq: u64,
    /// Digest of the root directory; [`Digest::ZERO`] at seq 0.
    pub root: Digest,
}

/// Head and size of a workspace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Summary {
    /// The newest version.
    pub head: Head,
    /// Files, links and directories, without the root.
    pub entries: u64,
    /// Sum of the files' sizes.
    pub content_bytes: u64,
}

/// One change of one path, already checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Op {
    /// Where.
    pub path: WirePath,
    /// Identity of the entry the member saw here; `None` if it saw none.
    pub expected: Option<Digest>,
    /// The new entry; `None` to delete.
    pub new: Option<Entry>,
    /// If this path is a conflict copy: the path that kept its name.
    pub conflict_of: Option<WirePath>,
}

/// Why an operation is not even looked at. Kept within a commit, since the others may be valid.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InvalidOp {
    /// Its path, or the path it is a conflict copy of.
    #[error("invalid path: {0}")]
    Path(#[from] InvalidPath),
    /// Its new entry.
    #[error("invalid entry: {0}")]
    Entry(#[from] InvalidEntry),
    /// A digest that is not 32 bytes, or an entry of no known kind.
    #[error("malformed")]
    Malformed,
}

/// Which version of a workspace's rules a member went by: the content of its
/// [`cortex_shared::wire_path::RULES_NAME`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KnownRules {
    /// It does not say, or need not: an operator, or an older program.
    Unsaid,
    /// This content.
    Content(Digest),
    /// There were none.
    Nothing,
}

/// A batch of operations.
#[derive(Clone, Debug)]
pub struct Commit {
    /// The idempotency key.
    pub id: CommitId,
    /// Who commits.
    pub author: Author,
    /// The history the member works in.
    pub epoch: WorkspaceEpoch,
    /// The rules of what is left out that the member went by.
    pub rules: KnownRules,
    /// What to do, in this order.
    pub ops: Vec<Result<Op, InvalidOp>>,
}

impl Commit {
    /// Conflict copies among what is to be done, each with its index and the path that kept its name.
    pub fn copies(&self) -> impl Iterator<Item = (u32, (WirePath, WirePath))> {
        (0_u32..).zip(&self.ops).filter_map(|(index, op)| {
            let op = op.as_ref().ok().filter(|op| op.new.is_some())?;
            Some((index, (op.conflict_of.clone()?, op.path.clone())))
        })
    }
}

/// Why an operation was not applied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum RejectReason {
    /// The entry at the path is not the expected one.
    Conflict = 1,
    /// The parent is not a directory of the tree.
    NoParent = 2,
    /// A directory to be deleted or replaced still has children.
    NotEmpty = 3,
    /// Chunks of the content are not present.
    MissingChunks = 4,
    /// A path, link, recipe or digest that cannot be.
    Invalid = 5,
    /// A deletion, one of so many that an operator has to allow them.
    Held = 6,
    /// The workspace has other rules of what is left out than the member went by.
    Rules = 7,
}

/// An operation that was not applied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rejection {
    /// Its place in the request.
    pub index: u32,
    /// Why.
    pub reason: RejectReason,
    /// The entry at its path. Left out although there is one (then `current_seq` is not 0) where
    /// all of them would make the answer too large for a message.
    pub current: Option<Entry>,
    /// Version of the entry at its path, 0 if there is none.
    pub current_seq: u64,
    /// Chunks that are not present; at least one if that is the reason, but not necessarily all.
    pub missing: Vec<Digest>,
}

/// What became of a commit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CommitResult {
    /// Version after the commit.
    pub seq: u64,
    /// Root digest after the commit.
    pub root: Digest,
    /// The operations that were not applied, in order.
    pub rejected: Vec<Rejection>,
    /// For each other operation its number, in order; 0 where nothing had to change.
    pub seqs: Vec<u64>,
}

/// A pack whose file is durable.
#[derive(Clone, Debug)]
pub struct PackRecord {
    /// Its name.
    pub hash: Digest,
    /// Its size on disk.
    pub bytes: u64,
    /// What it holds.
    pub chunks: Vec<ChunkRef>,
}

/// Whether a pack was new.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PackAdded {
    /// It is recorded now.
    New,
    /// It was recorded before.
    Known,
}

/// Where chunks are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// Packs, each once, in the order of the first chunk that needs it, with the chunks it was found
    /// for.
    pub packs: Vec<(Digest, Vec<Digest>)>,
    /// Chunks that are not present.
    pub missing: Vec<Digest>,
}

/// A directory with everything below it, as it was at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Subtree {
    /// Its digest, which is equal for equal directories wherever they stand.
    pub digest: Digest,
    /// What is below it, in the order of a walk, by paths from the root of the workspace.
    pub entries: Vec<(WirePath, Entry)>,
}

/// One change of the tree, as a member reads it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// Its number.
    pub seq: u64,
    /// Where.
    pub path: WirePath,
    /// What stands there now; `None` if it was deleted.
    pub entry: Option<Entry>,
}

/// Some changes, all read at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChangesPage {
    /// In the order of their numbers.
    pub changes: Vec<Change>,
    /// Read on after this one. Equals the head's seq on the last page.
    pub last_seq: u64,
    /// The newest version at that moment.
    pub head: Head,
    /// Deletions up to this one are no longer recorded, but for those of paths that came again: who
    /// knows an older version has to read everything, from 0, and to miss what is not there.
    pub log_floor: u64,
}

/// A pack of which less than half is used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SparsePack {
    /// Its name.
    pub hash: Digest,
    /// What of it is used.
    pub used: Vec<Digest>,
}

/// Packs that take more room than they are worth.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UnusedPacks {
    /// Those that nothing needs.
    pub useless: Vec<Digest>,
    /// Those that are used for less than half.
    pub sparse: Vec<SparsePack>,
}

/// A conflict copy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Conflict {
    /// The path that kept its name.
    pub path: WirePath,
    /// The copy beside it.
    pub copy: WirePath,
    /// Who committed the copy.
    pub author: Author,
    /// When, in milliseconds since the Unix epoch by the hub's clock.
    pub at_ms: i64,
}

/// A member whose deletions are held because they are so many.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeldMember {
    /// Which.
    pub node: NodeId,
    /// How many losses there were in the commit that was refused last.
    pub losses: u64,
    /// When that was, in milliseconds since the Unix epoch by the hub's clock.
    pub at_ms: i64,
}
