//! A directory handle that nothing can leave.
//!
//! Every file access below a workspace root goes through [`RootDir`] and [`DirHandle`]. A path is
//! resolved once, by the kernel, to a handle of the parent directory, without following a single
//! symbolic link; after that only (handle, name) pairs are used. So a component that somebody swaps
//! for a link between two calls leads to an error, never out of the root. There are no path strings
//! below the root and no check that happens before its use.
//!
//! Nothing here has state of its own; a crash loses what the caller has not synced.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use cortex_shared::wire_path::{WirePath, check_name};
use rustix::fs::{AtFlags, FileType, Mode, OFlags, RenameFlags, ResolveFlags, StatxFlags};
use rustix::io::Errno;

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
    // The fields of `struct stat` differ in width and sign between architectures.
    #[allow(clippy::unnecessary_cast, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    fn from_stat(stat: &rustix::fs::Stat) -> Self {
        let kind = match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => FileKind::File,
            FileType::Directory => FileKind::Dir,
            FileType::Symlink => FileKind::Link,
            _ => FileKind::Other,
        };
        let time = |seconds: i64, nanos: u64| {
            seconds.saturating_mul(1_000_000_000).saturating_add(nanos as i64)
        };
        Self {
            kind,
            dev: stat.st_dev as u64,
            ino: stat.st_ino as u64,
            size: stat.st_size as u64,
            mtime_ns: time(stat.st_mtime as i64, stat.st_mtime_nsec as u64),
            ctime_ns: time(stat.st_ctime as i64, stat.st_ctime_nsec as u64),
            mode: stat.st_mode & 0o7777,
            uid: stat.st_uid,
            gid: stat.st_gid,
            links: stat.st_nlink as u64,
        }
    }

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

impl DirIdentity {
    fn from_statx(stat: &rustix::fs::Statx) -> Self {
        let born_ns = if stat.stx_mask & StatxFlags::BTIME.bits() == 0 {
            0
        } else {
            stat.stx_btime
                .tv_sec
                .saturating_mul(1_000_000_000)
                .saturating_add(i64::from(stat.stx_btime.tv_nsec))
        };
        Self { ino: stat.stx_ino, born_ns }
    }
}

/// An open directory. Cheap to clone; all operations take a single name within it.
#[derive(Clone, Debug)]
pub struct DirHandle(Arc<OwnedFd>);

impl AsFd for DirHandle {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn checked(name: &[u8]) -> io::Result<&[u8]> {
    check_name(name).map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
    Ok(name)
}

const DIR_FLAGS: OFlags =
    OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

impl DirHandle {
    /// Opens a directory by an ordinary path, following links: for roots, which their owner names.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn open_ambient(path: &Path) -> io::Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Self(Arc::new(rustix::fs::open(path, flags, Mode::empty())?)))
    }

    /// What this directory itself is.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn meta(&self) -> io::Result<Meta> {
        Ok(Meta::from_stat(&rustix::fs::fstat(&self.0)?))
    }

    /// See [`DirIdentity`].
    ///
    /// # Errors
    /// Those of the file system.
    pub fn identity(&self) -> io::Result<DirIdentity> {
        let flags = StatxFlags::INO | StatxFlags::BTIME;
        Ok(DirIdentity::from_statx(&rustix::fs::statx(&self.0, c"", AtFlags::EMPTY_PATH, flags)?))
    }

    /// What the directory `name` is, without opening it or following a link.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn identity_of(&self, name: &[u8]) -> io::Result<DirIdentity> {
        let flags = StatxFlags::INO | StatxFlags::BTIME;
        let stat = rustix::fs::statx(&self.0, checked(name)?, AtFlags::SYMLINK_NOFOLLOW, flags)?;
        Ok(DirIdentity::from_statx(&stat))
    }

    /// The mount this directory lies on: a rename cannot cross two of them, even on one device.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn mount(&self) -> io::Result<(u64, u64)> {
        let stat = rustix::fs::statx(&self.0, c"", AtFlags::EMPTY_PATH, StatxFlags::MNT_ID)?;
        Ok((self.meta()?.dev, stat.stx_mnt_id))
    }

    /// What `name` is, without following a link.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn lstat(&self, name: &[u8]) -> io::Result<Meta> {
        let stat = rustix::fs::statat(&self.0, checked(name)?, AtFlags::SYMLINK_NOFOLLOW)?;
        Ok(Meta::from_stat(&stat))
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
        Ok(Names(rustix::fs::Dir::read_from(&self.0)?))
    }

    /// Opens a directory in this one.
    ///
    /// # Errors
    /// Those of the file system; a link is an error.
    pub fn open_dir(&self, name: &[u8]) -> io::Result<Self> {
        let fd = rustix::fs::openat(&self.0, checked(name)?, DIR_FLAGS, Mode::empty())?;
        Ok(Self(Arc::new(fd)))
    }

    /// Opens a regular file for reading.
    ///
    /// # Errors
    /// Those of the file system; anything but a regular file is an error.
    pub fn open_file(&self, name: &[u8]) -> io::Result<File> {
        // NONBLOCK: opening a pipe that took the file's place must not wait for a writer.
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = File::from(rustix::fs::openat(&self.0, checked(name)?, flags, Mode::empty())?);
        if file.metadata()?.is_file() {
            Ok(file)
        } else {
            Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"))
        }
    }

    /// Creates a file that must not exist, for reading and writing. The process's umask applies.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn create_new(&self, name: &[u8], mode: u32) -> io::Result<File> {
        let flags =
            OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(&self.0, checked(name)?, flags, Mode::from_raw_mode(mode))?;
        Ok(File::from(fd))
    }

    /// Opens an existing regular file for writing.
    ///
    /// # Errors
    /// Those of the file system; anything but a regular file is an error.
    pub fn open_for_writing(&self, name: &[u8]) -> io::Result<File> {
        let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = File::from(rustix::fs::openat(&self.0, checked(name)?, flags, Mode::empty())?);
        if file.metadata()?.is_file() {
            Ok(file)
        } else {
            Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"))
        }
    }

    /// Moves `name` to `new_name` in `target`, where nothing may stand.
    ///
    /// # Errors
    /// Those of the file system; `AlreadyExists` if something stands there.
    pub fn rename_new(&self, name: &[u8], target: &Self, new_name: &[u8]) -> io::Result<()> {
        let (name, new_name) = (checked(name)?, checked(new_name)?);
        rustix::fs::renameat_with(&self.0, name, &target.0, new_name, RenameFlags::NOREPLACE)
            .map_err(io::Error::from)
    }

    /// Exchanges `name` and `other_name` of `other` in one step: there is no instant at which either
    /// name is missing.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn exchange(&self, name: &[u8], other: &Self, other_name: &[u8]) -> io::Result<()> {
        let (name, other_name) = (checked(name)?, checked(other_name)?);
        rustix::fs::renameat_with(&self.0, name, &other.0, other_name, RenameFlags::EXCHANGE)
            .map_err(io::Error::from)
    }

    /// Makes a directory. The process's umask applies.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn make_dir(&self, name: &[u8], mode: u32) -> io::Result<()> {
        Ok(rustix::fs::mkdirat(&self.0, checked(name)?, Mode::from_raw_mode(mode))?)
    }

    /// Makes a symbolic link.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn make_link(&self, name: &[u8], target: &[u8]) -> io::Result<()> {
        Ok(rustix::fs::symlinkat(target, &self.0, checked(name)?)?)
    }

    /// The target of a symbolic link.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn read_link(&self, name: &[u8]) -> io::Result<Vec<u8>> {
        Ok(rustix::fs::readlinkat(&self.0, checked(name)?, Vec::new())?.into_bytes())
    }

    /// Removes a file or link.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn remove_file(&self, name: &[u8]) -> io::Result<()> {
        Ok(rustix::fs::unlinkat(&self.0, checked(name)?, AtFlags::empty())?)
    }

    /// Removes an empty directory.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn remove_dir(&self, name: &[u8]) -> io::Result<()> {
        Ok(rustix::fs::unlinkat(&self.0, checked(name)?, AtFlags::REMOVEDIR)?)
    }

    /// Gives `name` (a link itself, not its target) an owner and group.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn set_owner(&self, name: &[u8], uid: u32, gid: u32) -> io::Result<()> {
        let (uid, gid) = (rustix::fs::Uid::from_raw(uid), rustix::fs::Gid::from_raw(gid));
        let flags = AtFlags::SYMLINK_NOFOLLOW;
        Ok(rustix::fs::chownat(&self.0, checked(name)?, Some(uid), Some(gid), flags)?)
    }

    /// Makes creations, renames and removals in this directory survive power loss.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn sync(&self) -> io::Result<()> {
        Ok(rustix::fs::fsync(&self.0)?)
    }

    /// Writes back everything of the file system this directory lies on.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn sync_file_system(&self) -> io::Result<()> {
        Ok(rustix::fs::syncfs(&self.0)?)
    }
}

/// See [`DirHandle::iter`]. An item is an error if the directory could be read only in part.
#[derive(Debug)]
pub struct Names(rustix::fs::Dir);

impl Iterator for Names {
    type Item = io::Result<Vec<u8>>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            match self.0.read()? {
                Ok(entry) => {
                    let name = entry.file_name().to_bytes();
                    if name != b"." && name != b".." {
                        return Some(Ok(name.to_vec()));
                    }
                }
                Err(errno) => return Some(Err(errno.into())),
            }
        }
    }
}

/// What an open file is.
///
/// # Errors
/// Those of the file system.
pub fn file_meta(file: &File) -> io::Result<Meta> {
    Ok(Meta::from_stat(&rustix::fs::fstat(file)?))
}

/// The root of a tree whose contents are not trusted.
#[derive(Clone, Debug)]
pub struct RootDir {
    top: DirHandle,
    /// Whether the kernel refuses `openat2` (before 5.6, or filtered by a container): learned once.
    step_by_step: Arc<AtomicBool>,
}

impl RootDir {
    /// Opens the root. Its own path may hold links: its owner chose it.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn open(path: &Path) -> io::Result<Self> {
        Ok(Self::new(DirHandle::open_ambient(path)?))
    }

    /// Takes an open directory as a root.
    #[must_use]
    pub fn new(top: DirHandle) -> Self {
        Self { top, step_by_step: Arc::new(AtomicBool::new(false)) }
    }

    /// The root directory itself.
    #[must_use]
    pub fn top(&self) -> &DirHandle {
        &self.top
    }

    /// Opens a directory below the root, or the root for `None`.
    ///
    /// # Errors
    /// Those of the file system; `NotFound` or `NotADirectory` if a component is missing, and an
    /// error if one is a link.
    pub fn open_dir(&self, path: Option<&WirePath>) -> io::Result<DirHandle> {
        let Some(path) = path else { return Ok(self.top.clone()) };
        if !self.step_by_step.load(Ordering::Relaxed) {
            match self.open_at_once(path) {
                Err(error)
                    if matches!(Errno::from_io_error(&error), Some(Errno::NOSYS | Errno::PERM)) =>
                {
                    self.step_by_step.store(true, Ordering::Relaxed);
                }
                result => return result,
            }
        }
        self.open_by_steps(path)
    }

    fn open_at_once(&self, path: &WirePath) -> io::Result<DirHandle> {
        let resolve =
            ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        let mut attempts = 0;
        loop {
            match rustix::fs::openat2(&self.top, path.as_bytes(), DIR_FLAGS, Mode::empty(), resolve)
            {
                Ok(fd) => return Ok(DirHandle(Arc::new(fd))),
                // A rename elsewhere raced with the resolution: the kernel asks to try again.
                Err(Errno::AGAIN) if attempts < 16 => attempts += 1,
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    fn open_by_steps(&self, path: &WirePath) -> io::Result<DirHandle> {
        path.components().try_fold(self.top.clone(), |dir, name| dir.open_dir(name))
    }

    /// The directory that holds `path`, and the name of `path` in it.
    ///
    /// # Errors
    /// As [`RootDir::open_dir`].
    pub fn parent_of<'a>(&self, path: &'a WirePath) -> io::Result<(DirHandle, &'a [u8])> {
        Ok((self.open_dir(path.parent().as_ref())?, path.name()))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn path(text: &str) -> WirePath {
        WirePath::new(text).unwrap()
    }

    #[test]
    fn no_way_of_opening_follows_a_link_out_of_the_root() {
        let outside = tempfile::tempdir().unwrap();
        std::fs::create_dir(outside.path().join("dir")).unwrap();
        std::fs::write(outside.path().join("dir/secret"), b"s").unwrap();
        let inside = tempfile::tempdir().unwrap();
        symlink(outside.path(), inside.path().join("link")).unwrap();
        std::fs::create_dir(inside.path().join("real")).unwrap();
        symlink("../real", inside.path().join("real/up")).unwrap();
        symlink(outside.path().join("dir/secret"), inside.path().join("file")).unwrap();
        let root = RootDir::open(inside.path()).unwrap();
        // Positive control: the very same directories open where no link is in the way.
        assert!(std::fs::metadata(inside.path().join("link/dir")).unwrap().is_dir());
        root.open_dir(Some(&path("real"))).unwrap();
        for hostile in ["link", "link/dir", "real/up", "real/up/real"] {
            assert!(root.open_at_once(&path(hostile)).is_err(), "{hostile}");
            assert!(root.open_by_steps(&path(hostile)).is_err(), "{hostile}");
        }
        assert!(root.top().open_file(b"file").is_err());
        assert!(root.top().open_for_writing(b"file").is_err());
        assert!(root.top().open_file(b"../secret").is_err());
        assert!(root.top().lstat(b"..").is_err());
        assert_eq!(root.top().lstat(b"file").unwrap().kind, FileKind::Link);
    }

    #[test]
    fn both_ways_of_opening_agree() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(folder.path().join("a/b/c")).unwrap();
        let root = RootDir::open(folder.path()).unwrap();
        let deep = path("a/b/c");
        let at_once = root.open_at_once(&deep).unwrap().meta().unwrap();
        assert_eq!(at_once, root.open_by_steps(&deep).unwrap().meta().unwrap());
        assert_eq!(root.open_dir(Some(&path("a/x"))).unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn renames_replace_nothing_and_exchange_swaps() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("a"), b"A").unwrap();
        std::fs::write(folder.path().join("b"), b"B").unwrap();
        let top = RootDir::open(folder.path()).unwrap().top().clone();
        assert_eq!(
            top.rename_new(b"a", &top, b"b").unwrap_err().kind(),
            io::ErrorKind::AlreadyExists
        );
        top.exchange(b"a", &top, b"b").unwrap();
        assert_eq!(std::fs::read(folder.path().join("a")).unwrap(), b"B");
        assert_eq!(top.names().unwrap(), [b"a".to_vec(), b"b".to_vec()]);
    }
}
