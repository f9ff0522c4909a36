//! Files of a workspace, for an operator who looks at them or changes them from afar.
//!
//! | module | subject |
//! |---|---|
//! | `place` | the workspace: checked as for a command, and opened |
//! | `error` | what can go wrong, and what helps |
//! | `protected` | names that nobody changes from afar |
//! | `look` | list, read, stat |
//! | `write` | replacing a file as a whole |
//! | `tree` | making and removing |
//!
//! Everything blocks, and is called on a thread that may. All access goes through [`crate::root_dir`]:
//! nothing outside the workspace can be named, no link is followed, no pipe or device is opened. The
//! content under way is bounded by the [`Caller`], and memory does not grow with files or trees.
//!
//! No state but what is on the disk. A crash in the middle of a write leaves the old file; what had
//! arrived lies in the workspace's private directory, which the sync engine does not look at, and is
//! removed before the next write.

mod error;
mod look;
mod place;
mod protected;
#[cfg(test)]
mod tests;
mod tree;
mod write;

use bytes::Bytes;
use cortex_shared::wire_path::WirePath;

pub use self::error::FileError;
pub use self::place::Place;
pub use self::write::Expected;
use crate::root_dir::FileKind;

/// What is asked for, of a path in a workspace; `None` for its own directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// The path.
    pub path: Option<WirePath>,
    /// What to do.
    pub action: Action,
}

/// See [`Request`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// The names in a directory, sorted by their bytes.
    List {
        /// Only those after this one.
        after: Vec<u8>,
        /// At most so many.
        limit: u64,
    },
    /// The content of a regular file.
    Read {
        /// Where to begin.
        offset: u64,
        /// At most so many bytes.
        length: u64,
    },
    /// What stands there.
    Stat {
        /// The hash is wanted, however large the file is.
        hash: bool,
    },
    /// Replace or make a regular file.
    Write {
        /// What must be there.
        expected: Expected,
        /// Permission bits; `None` keeps those of the file that is replaced.
        mode: Option<u32>,
    },
    /// Remove what stands there.
    Remove {
        /// A directory with all that is in it.
        recursive: bool,
    },
    /// Make a directory.
    MakeDirectory {
        /// Also those above it; one that exists is no failure.
        parents: bool,
    },
}

impl Action {
    /// Whether it changes anything.
    #[must_use]
    pub fn is_change(&self) -> bool {
        match self {
            Self::List { .. } | Self::Read { .. } | Self::Stat { .. } => false,
            Self::Write { .. } | Self::Remove { .. } | Self::MakeDirectory { .. } => true,
        }
    }
}

/// What stands at a name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Info {
    /// The name; empty for the workspace's own directory.
    pub name: Vec<u8>,
    /// Its kind.
    pub kind: FileKind,
    /// Bytes.
    pub size: u64,
    /// Permission bits (the lower twelve).
    pub mode: u32,
    /// Modification time, nanoseconds since the Unix epoch.
    pub mtime_ns: i64,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Where a link leads.
    pub target: Vec<u8>,
    /// BLAKE3 of the content, where it is known.
    pub hash: Option<[u8; 32]>,
}

/// What became of a request.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Done {
    /// What stands there now.
    pub info: Option<Info>,
    /// Content sent or taken, in bytes, and its BLAKE3.
    pub content: Option<(u64, [u8; 32])>,
    /// There are more names.
    pub more: bool,
    /// Names removed, directories made.
    pub count: u64,
    /// The file changed while it was read.
    pub changed: bool,
}

/// A piece of what is written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Piece {
    /// Content.
    Data(Bytes),
    /// The end: so many bytes, with this BLAKE3.
    End {
        /// All bytes.
        bytes: u64,
        /// Their hash.
        hash: [u8; 32],
    },
}

/// Whoever asked. Every method blocks for as long as it takes, and fails once nobody is there.
pub trait Caller {
    /// Sends names.
    ///
    /// # Errors
    /// [`FileError::Gone`].
    fn entries(&mut self, entries: Vec<Info>) -> Result<(), FileError>;

    /// Sends content.
    ///
    /// # Errors
    /// [`FileError::Gone`].
    fn data(&mut self, data: Bytes) -> Result<(), FileError>;

    /// Says that so many bytes of what was sent are dealt with.
    ///
    /// # Errors
    /// [`FileError::Gone`].
    fn taken(&mut self, bytes: u64) -> Result<(), FileError>;

    /// The next piece of what is to be written.
    ///
    /// # Errors
    /// [`FileError::Gone`].
    fn next(&mut self) -> Result<Piece, FileError>;

    /// Whether there is anybody still.
    ///
    /// # Errors
    /// [`FileError::Gone`].
    fn is_there(&self) -> Result<(), FileError>;
}

/// Does what is asked for.
///
/// # Errors
/// See [`FileError`]; nothing was changed then, but for a removal of a tree, which may have begun.
pub fn perform(
    place: &Place,
    request: &Request,
    caller: &mut dyn Caller,
) -> Result<Done, FileError> {
    let path = request.path.as_ref();
    // What can be changed has a name, and that name is nobody's but the workspace's.
    let changed = || {
        let path = path.ok_or(FileError::TheWorkspaceItself)?;
        protected::check(path).map(|()| path)
    };
    match &request.action {
        Action::List { after, limit } => look::list(place, path, after, *limit, caller),
        Action::Read { offset, length } => look::read(place, path, *offset, *length, caller),
        Action::Stat { hash } => look::stat(place, path, *hash, caller),
        Action::Write { expected, mode } => {
            write::write(place, changed()?, expected, *mode, caller)
        }
        Action::Remove { recursive } => tree::remove(place, changed()?, *recursive, caller),
        Action::MakeDirectory { parents } => tree::make_directory(place, changed()?, *parents),
    }
}
