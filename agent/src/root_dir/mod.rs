//! A directory handle that nothing can leave.
//!
//! Every file access below a workspace root goes through [`RootDir`] and [`DirHandle`]. A path is
//! resolved once, by the kernel, to a handle of the parent directory, without following a single
//! symbolic link; after that only (handle, name) pairs are used. So a component that somebody swaps
//! for a link between two calls leads to an error, never out of the root. There are no path strings
//! below the root and no check that happens before its use.
//!
//! What is behind the handles is a [`Disk`]: the kernel's file systems ([`real_disk`]), or one in
//! memory that forgets what was not synced, for the simulation of workspaces.
//!
//! Nothing here has state of its own; a crash loses what the caller has not synced.

mod exact;
mod real;
mod root;
#[cfg(test)]
mod tests;

use std::any::Any;
use std::fmt::{self, Debug};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use cortex_shared::wire_path::{WirePath, check_name};

pub use exact::{exact, folds_case};
pub use real::real_disk;
pub use root::{Parents, RootDir};

/// What kind of thing a name stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileKind {
    /// A regular file.
    File,
    /// A directory.
    Dir,
    /// A symbolic link.
    Link,
    /// A socket, pipe or device: never read, never synced.
    Other,
}

/// What `lstat` tells about a name, or `fstat` about an open file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Meta {
    /// Kind of the file.
    pub kind: FileKind,
    /// File system.
    pub dev: u64,
    /// Number of the file within its file system.
    pub ino: u64,
    /// Length in bytes.
    pub size: u64,
    /// Modification time, nanoseconds since the Unix epoch.
    pub mtime_ns: i64,
    /// Time of the last change of content or attributes, nanoseconds since the Unix epoch.
    pub ctime_ns: i64,
    /// Permission bits (the lower twelve).
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Number of names of this file.
    pub links: u64,
}

impl Meta {
    /// Whether the owner may execute it.
    #[must_use]
    pub fn executable(&self) -> bool {
        self.mode & 0o100 != 0
    }
}

/// Identity of a directory that survives a restart of the machine: used to notice that another one
/// stands where the root of a workspace stood.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DirIdentity {
    /// Number of the directory within its file system.
    pub ino: u64,
    /// Birth time in nanoseconds since the Unix epoch, 0 where the file system has none.
    pub born_ns: i64,
}

/// What a file system is like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileSystem {
    /// Bytes that users may still take.
    pub free_bytes: u64,
    /// How far apart two changes of a file have to be to surely get different times, in nanoseconds.
    pub tick_ns: i64,
}

/// How a directory is locked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lock {
    /// For oneself alone.
    Alone,
    /// Together with others who lock it so.
    Shared,
}

/// Where directories are found by ordinary paths.
pub trait Disk: Send + Sync + Debug {
    /// Opens a directory by an ordinary path, following links: for roots, which their owner names.
    ///
    /// # Errors
    /// Those of the file system.
    fn open(&self, path: &Path) -> io::Result<DirHandle>;

    /// Makes a directory; its parent must exist.
    ///
    /// # Errors
    /// Those of the file system; `AlreadyExists` if something stands there.
    fn make(&self, path: &Path, mode: u32) -> io::Result<()>;

    /// Makes a directory and those above it, as far as they do not exist.
    ///
    /// # Errors
    /// Those of the file system.
    fn make_all(&self, path: &Path, mode: u32) -> io::Result<()>;

    /// Removes an empty directory.
    ///
    /// # Errors
    /// Those of the file system.
    fn remove(&self, path: &Path) -> io::Result<()>;

    /// The path of something that exists, without links.
    ///
    /// # Errors
    /// Those of the file system.
    fn real_path(&self, path: &Path) -> io::Result<PathBuf>;
}

/// A directory of a [`Disk`]. Names have been checked by [`DirHandle`], which documents each call.
#[allow(missing_docs)]
pub trait Directory: Send + Sync + Debug {
    /// For an implementation to find itself in the other directory of a rename.
    fn as_any(&self) -> &dyn Any;
    fn meta(&self) -> io::Result<Meta>;
    fn identity(&self) -> io::Result<DirIdentity>;
    fn identity_of(&self, name: &[u8]) -> io::Result<DirIdentity>;
    fn mount(&self) -> io::Result<(u64, u64)>;
    fn mount_of(&self, name: &[u8]) -> io::Result<(u64, u64)>;
    fn file_system(&self) -> io::Result<FileSystem>;
    fn lock(&self, lock: Lock) -> io::Result<bool>;
    fn token(&self) -> io::Result<Option<Vec<u8>>>;
    fn set_token(&self, token: &[u8]) -> io::Result<()>;
    fn set_mode(&self, mode: u32) -> io::Result<()>;
    fn lstat(&self, name: &[u8]) -> io::Result<Meta>;
    /// Some file systems take names for one in single directories only. Asks by one that differs in all
    /// its letters before the directory is read, which may be large.
    fn other_spelling(&self, name: &[u8]) -> io::Result<bool> {
        let number = |name: &[u8]| match self.lstat(name) {
            Ok(meta) => Ok(Some((meta.dev, meta.ino))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        };
        let (found, other) = (number(name)?, exact::flipped(name));
        if found.is_none() || other == name || number(&other)? != found {
            return Ok(false);
        }
        for listed in self.iter()? {
            if listed? == name {
                return Ok(false);
            }
        }
        // It may have been removed before it was listed.
        Ok(number(name)? == found)
    }
    fn allocated(&self, name: &[u8]) -> io::Result<u64>;
    fn iter(&self) -> io::Result<Names>;
    fn open_dir(&self, name: &[u8]) -> io::Result<DirHandle>;
    /// Opens a directory further below in one step; `ENOSYS` if it has to be done by steps.
    fn open_below(&self, path: &WirePath) -> io::Result<DirHandle>;
    fn open_file(&self, name: &[u8], write: bool) -> io::Result<FileHandle>;
    fn create_new(&self, name: &[u8], mode: u32) -> io::Result<FileHandle>;
    fn rename_new(&self, name: &[u8], target: &dyn Directory, new_name: &[u8]) -> io::Result<()>;
    fn exchange(&self, name: &[u8], other: &dyn Directory, other_name: &[u8]) -> io::Result<()>;
    fn make_dir(&self, name: &[u8], mode: u32) -> io::Result<()>;
    fn make_link(&self, name: &[u8], target: &[u8]) -> io::Result<()>;
    fn read_link(&self, name: &[u8]) -> io::Result<Vec<u8>>;
    fn remove_file(&self, name: &[u8]) -> io::Result<()>;
    fn remove_dir(&self, name: &[u8]) -> io::Result<()>;
    fn set_owner(&self, name: &[u8], uid: u32, gid: u32) -> io::Result<()>;
    fn sync(&self) -> io::Result<()>;
    fn sync_file_system(&self) -> io::Result<()>;
}

/// An open regular file of a [`Disk`]; [`FileHandle`] documents each call.
#[allow(missing_docs)]
pub trait OpenFile: Send + Sync + Debug {
    /// For an implementation to find itself in the source of a copy.
    fn as_any(&self) -> &dyn Any;
    fn meta(&self) -> io::Result<Meta>;
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize>;
    fn write_all_at(&self, data: &[u8], offset: u64) -> io::Result<()>;
    fn set_len(&self, len: u64) -> io::Result<()>;
    fn set_mode(&self, mode: u32) -> io::Result<()>;
    fn set_mtime(&self, mtime_ns: i64) -> io::Result<()>;
    fn sync(&self) -> io::Result<()>;
    fn write_back(&self) -> io::Result<()>;
    fn copy_from(&self, source: &dyn OpenFile, offset: u64, len: usize) -> io::Result<usize>;
}

/// An open directory. Cheap to clone; all operations take a single name within it.
#[derive(Clone, Debug)]
pub struct DirHandle(Arc<dyn Directory>);

fn checked(name: &[u8]) -> io::Result<&[u8]> {
    check_name(name).map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
    Ok(name)
}

impl DirHandle {
    /// Opens a directory of this machine.
    #[cfg(test)]
    pub(crate) fn open_ambient(path: &Path) -> io::Result<Self> {
        real_disk().open(path)
    }

    /// A handle of a directory.
    pub fn new(directory: impl Directory + 'static) -> Self {
        Self(Arc::new(directory))
    }

    /// What this directory itself is.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn meta(&self) -> io::Result<Meta> {
        self.0.meta()
    }

    /// See [`DirIdentity`].
    ///
    /// # Errors
    /// Those of the file system.
    pub fn identity(&self) -> io::Result<DirIdentity> {
        self.0.identity()
    }

    /// Whether both are clones of one handle.
    #[must_use]
    pub fn is_same_handle(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// What the directory `name` is, without opening it or following a link.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn identity_of(&self, name: &[u8]) -> io::Result<DirIdentity> {
        self.0.identity_of(checked(name)?)
    }

    /// The mount this directory lies on: a rename cannot cross two of them, even on one device.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn mount(&self) -> io::Result<(u64, u64)> {
        self.0.mount()
    }

    /// The mount that is entered with the directory `name`.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn mount_of(&self, name: &[u8]) -> io::Result<(u64, u64)> {
        self.0.mount_of(checked(name)?)
    }

    /// What the file system of this directory is like.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn file_system(&self) -> io::Result<FileSystem> {
        self.0.file_system()
    }

    /// Locks the directory for as long as it is open; false if somebody else is in the way.
    ///
    /// # Errors
    /// If the file system locks nothing.
    pub fn lock(&self, lock: Lock) -> io::Result<bool> {
        self.0.lock(lock)
    }

    /// The token that the directory carries in an attribute of its own; `None` if it carries none, or
    /// cannot. One that is longer than ours are counts as none.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn token(&self) -> io::Result<Option<Vec<u8>>> {
        self.0.token()
    }

    /// Gives the directory a token.
    ///
    /// # Errors
    /// Those of the file system; many have no such attributes.
    pub fn set_token(&self, token: &[u8]) -> io::Result<()> {
        self.0.set_token(token)
    }

    /// Sets the permission bits of this directory.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn set_mode(&self, mode: u32) -> io::Result<()> {
        self.0.set_mode(mode)
    }

    /// What `name` is, without following a link.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn lstat(&self, name: &[u8]) -> io::Result<Meta> {
        self.0.lstat(checked(name)?)
    }

    /// Like [`DirHandle::lstat`], with `None` for a name that does not exist.
    ///
    /// # Errors
    /// Those of the file system, except "not found".
    pub fn try_lstat(&self, name: &[u8]) -> io::Result<Option<Meta>> {
        match self.lstat(name) {
            Ok(meta) => Ok(Some(meta)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Whether nothing is found as `name`, and nothing can be made there, because of what stands there
    /// under another spelling (see [`exact`]).
    ///
    /// # Errors
    /// Those of the file system.
    pub fn other_spelling(&self, name: &[u8]) -> io::Result<bool> {
        self.0.other_spelling(checked(name)?)
    }

    /// How many bytes of the disk `name` takes: less than its length if it has holes.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn allocated(&self, name: &[u8]) -> io::Result<u64> {
        self.0.allocated(checked(name)?)
    }

    /// The names in this directory, sorted by their bytes, without `.` and `..`.
    ///
    /// # Errors
    /// Those of the file system, and if the directory was read only in part.
    pub fn names(&self) -> io::Result<Vec<Vec<u8>>> {
        let mut names = self.iter()?.collect::<io::Result<Vec<_>>>()?;
        names.sort_unstable();
        Ok(names)
    }

    /// The names in this directory in the order of the file system, without `.` and `..`, as they are
    /// read: for directories of any size.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn iter(&self) -> io::Result<Names> {
        self.0.iter()
    }

    /// Opens a directory in this one.
    ///
    /// # Errors
    /// Those of the file system; a link is an error.
    pub fn open_dir(&self, name: &[u8]) -> io::Result<Self> {
        self.0.open_dir(checked(name)?)
    }

    /// Opens a regular file for reading.
    ///
    /// # Errors
    /// Those of the file system; anything but a regular file is an error.
    pub fn open_file(&self, name: &[u8]) -> io::Result<FileHandle> {
        self.0.open_file(checked(name)?, false)
    }

    /// Creates a file that must not exist, for reading and writing. The process's umask applies.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn create_new(&self, name: &[u8], mode: u32) -> io::Result<FileHandle> {
        self.0.create_new(checked(name)?, mode)
    }

    /// Opens an existing regular file for writing.
    ///
    /// # Errors
    /// Those of the file system; anything but a regular file is an error.
    pub fn open_for_writing(&self, name: &[u8]) -> io::Result<FileHandle> {
        self.0.open_file(checked(name)?, true)
    }

    /// Moves `name` to `new_name` in `target`, where nothing may stand.
    ///
    /// # Errors
    /// Those of the file system; `AlreadyExists` if something stands there.
    pub fn rename_new(&self, name: &[u8], target: &Self, new_name: &[u8]) -> io::Result<()> {
        self.0.rename_new(checked(name)?, &*target.0, checked(new_name)?)
    }

    /// Exchanges `name` and `other_name` of `other` in one step: there is no instant at which either
    /// name is missing.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn exchange(&self, name: &[u8], other: &Self, other_name: &[u8]) -> io::Result<()> {
        self.0.exchange(checked(name)?, &*other.0, checked(other_name)?)
    }

    /// Makes a directory. The process's umask applies.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn make_dir(&self, name: &[u8], mode: u32) -> io::Result<()> {
        self.0.make_dir(checked(name)?, mode)
    }

    /// Makes a symbolic link.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn make_link(&self, name: &[u8], target: &[u8]) -> io::Result<()> {
        self.0.make_link(checked(name)?, target)
    }

    /// The target of a symbolic link.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn read_link(&self, name: &[u8]) -> io::Result<Vec<u8>> {
        self.0.read_link(checked(name)?)
    }

    /// Removes a file or link.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn remove_file(&self, name: &[u8]) -> io::Result<()> {
        self.0.remove_file(checked(name)?)
    }

    /// Removes an empty directory.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn remove_dir(&self, name: &[u8]) -> io::Result<()> {
        self.0.remove_dir(checked(name)?)
    }

    /// Gives `name` (a link itself, not its target) an owner and group.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn set_owner(&self, name: &[u8], uid: u32, gid: u32) -> io::Result<()> {
        self.0.set_owner(checked(name)?, uid, gid)
    }

    /// Makes creations, renames and removals in this directory survive power loss.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn sync(&self) -> io::Result<()> {
        self.0.sync()
    }

    /// Writes back everything of the file system this directory lies on.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn sync_file_system(&self) -> io::Result<()> {
        self.0.sync_file_system()
    }
}

/// See [`DirHandle::iter`]. An item is an error if the directory could be read only in part.
pub struct Names(Box<dyn Iterator<Item = io::Result<Vec<u8>>> + Send>);

impl Names {
    /// Names that an implementation reads.
    pub fn new(names: impl Iterator<Item = io::Result<Vec<u8>>> + Send + 'static) -> Self {
        Self(Box::new(names))
    }
}

impl Debug for Names {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Names").finish_non_exhaustive()
    }
}

impl Iterator for Names {
    type Item = io::Result<Vec<u8>>;

    fn next(&mut self) -> Option<Self::Item> {
        self.0.next()
    }
}

/// An open regular file. Cheap to clone; it has no position of its own.
#[derive(Clone, Debug)]
pub struct FileHandle(Arc<dyn OpenFile>);

impl FileHandle {
    /// A handle of a file.
    pub fn new(file: impl OpenFile + 'static) -> Self {
        Self(Arc::new(file))
    }

    /// What it is.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn meta(&self) -> io::Result<Meta> {
        self.0.meta()
    }

    /// Reads up to a buffer from an offset; 0 at the end.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        self.0.read_at(buffer, offset)
    }

    /// Fills a buffer from an offset.
    ///
    /// # Errors
    /// Those of the file system, and if the file ends before.
    pub fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let mut reader = FileReader { file: self.clone(), offset };
        reader.read_exact(buffer)
    }

    /// Writes all of the data at an offset.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn write_all_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        self.0.write_all_at(data, offset)
    }

    /// Cuts it or makes it longer, by a hole.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.set_len(len)
    }

    /// Sets the permission bits.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn set_mode(&self, mode: u32) -> io::Result<()> {
        self.0.set_mode(mode)
    }

    /// Sets the times of modification and access, in nanoseconds since the Unix epoch.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn set_mtime(&self, mtime_ns: i64) -> io::Result<()> {
        self.0.set_mtime(mtime_ns)
    }

    /// Makes its content and attributes survive power loss.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn sync(&self) -> io::Result<()> {
        self.0.sync()
    }

    /// Brings what has been written so far to the disk, so that there is less to do for
    /// [`FileHandle::sync`], which alone makes it survive.
    ///
    /// # Errors
    /// Those of the file system. After one the file is not to be believed: the next flush may not tell
    /// of it again.
    pub fn write_back(&self) -> io::Result<()> {
        self.0.write_back()
    }

    /// Copies up to `len` bytes from another file to the same place in this one, sharing blocks
    /// where the file system can. Returns how many were copied; 0 at the end of the source.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn copy_from(&self, source: &Self, offset: u64, len: usize) -> io::Result<usize> {
        self.0.copy_from(&*source.0, offset, len)
    }

    /// Reads it from its beginning.
    #[must_use]
    pub fn reader(&self) -> FileReader {
        FileReader { file: self.clone(), offset: 0 }
    }
}

/// A position in an open file.
#[derive(Debug)]
pub struct FileReader {
    file: FileHandle,
    offset: u64,
}

impl Read for FileReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.file.read_at(buffer, self.offset)?;
        self.offset += read as u64;
        Ok(read)
    }
}
