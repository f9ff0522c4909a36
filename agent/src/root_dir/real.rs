//! The file systems of the kernel.

use std::any::Any;
use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt as _, FileExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use cortex_shared::wire_path::WirePath;
use rustix::fs::{
    AtFlags, FileType, FlockOperation, Mode, OFlags, RenameFlags, ResolveFlags, StatxFlags,
    Timespec, Timestamps, XattrFlags,
};
use rustix::io::Errno;

use super::{
    DirHandle, DirIdentity, Directory, Disk, FileHandle, FileKind, FileSystem, Lock, Meta, Names,
    OpenFile,
};

const DIR_FLAGS: OFlags =
    OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);
/// The attribute that carries a token.
const TOKEN: &CStr = c"user.cortex.replica";
/// Longest token that is read; ours are shorter.
const MAX_TOKEN_BYTES: usize = 64;
const IDENTITY: StatxFlags = StatxFlags::INO.union(StatxFlags::BTIME);

/// The file systems of the kernel.
#[must_use]
pub fn real_disk() -> Arc<dyn Disk> {
    Arc::new(RealDisk)
}

#[derive(Debug)]
struct RealDisk;

impl Disk for RealDisk {
    fn open(&self, path: &Path) -> io::Result<DirHandle> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(DirHandle::new(RealDir(rustix::fs::open(path, flags, Mode::empty())?)))
    }

    fn make(&self, path: &Path, mode: u32) -> io::Result<()> {
        std::fs::DirBuilder::new().mode(mode).create(path)
    }

    fn make_all(&self, path: &Path, mode: u32) -> io::Result<()> {
        std::fs::DirBuilder::new().recursive(true).mode(mode).create(path)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        std::fs::remove_dir(path)
    }

    fn real_path(&self, path: &Path) -> io::Result<PathBuf> {
        std::fs::canonicalize(path)
    }
}

#[derive(Debug)]
struct RealDir(OwnedFd);

/// What a call with two directories gets of another disk.
fn real(directory: &dyn Directory) -> io::Result<&OwnedFd> {
    let real = directory.as_any().downcast_ref::<RealDir>();
    Ok(&real.ok_or(io::ErrorKind::CrossesDevices)?.0)
}

impl Directory for RealDir {
    fn as_any(&self) -> &dyn Any {
        self
    }

    fn meta(&self) -> io::Result<Meta> {
        Ok(meta_of(&rustix::fs::fstat(&self.0)?))
    }

    fn identity(&self) -> io::Result<DirIdentity> {
        Ok(identity_of(&rustix::fs::statx(&self.0, c"", AtFlags::EMPTY_PATH, IDENTITY)?))
    }

    fn identity_of(&self, name: &[u8]) -> io::Result<DirIdentity> {
        Ok(identity_of(&rustix::fs::statx(&self.0, name, AtFlags::SYMLINK_NOFOLLOW, IDENTITY)?))
    }

    fn mount(&self) -> io::Result<(u64, u64)> {
        let stat = rustix::fs::statx(&self.0, c"", AtFlags::EMPTY_PATH, StatxFlags::MNT_ID)?;
        Ok(mount_of(&stat))
    }

    fn mount_of(&self, name: &[u8]) -> io::Result<(u64, u64)> {
        let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
        Ok(mount_of(&rustix::fs::statx(&self.0, name, flags, StatxFlags::MNT_ID)?))
    }

    fn file_system(&self) -> io::Result<FileSystem> {
        let space = rustix::fs::fstatvfs(&self.0)?;
        Ok(FileSystem {
            free_bytes: space.f_bavail.saturating_mul(space.f_frsize),
            tick_ns: tick_ns(&self.0)?,
        })
    }

    fn lock(&self, lock: Lock) -> io::Result<bool> {
        let operation = match lock {
            Lock::Alone => FlockOperation::NonBlockingLockExclusive,
            Lock::Shared => FlockOperation::NonBlockingLockShared,
        };
        match rustix::fs::flock(&self.0, operation) {
            Ok(()) => Ok(true),
            Err(Errno::WOULDBLOCK) => Ok(false),
            Err(errno) => Err(errno.into()),
        }
    }

    fn token(&self) -> io::Result<Option<Vec<u8>>> {
        let mut buffer = [0; MAX_TOKEN_BYTES];
        match rustix::fs::fgetxattr(&self.0, TOKEN, &mut buffer) {
            Ok(length) => Ok(Some(buffer[..length].to_vec())),
            Err(Errno::NODATA | Errno::OPNOTSUPP | Errno::RANGE) => Ok(None),
            Err(errno) => Err(errno.into()),
        }
    }

    fn set_token(&self, token: &[u8]) -> io::Result<()> {
        Ok(rustix::fs::fsetxattr(&self.0, TOKEN, token, XattrFlags::empty())?)
    }

    fn set_mode(&self, mode: u32) -> io::Result<()> {
        Ok(rustix::fs::fchmod(&self.0, Mode::from_raw_mode(mode))?)
    }

    fn lstat(&self, name: &[u8]) -> io::Result<Meta> {
        Ok(meta_of(&rustix::fs::statat(&self.0, name, AtFlags::SYMLINK_NOFOLLOW)?))
    }

    #[allow(clippy::unnecessary_cast, clippy::cast_sign_loss)] // differs between architectures
    fn allocated(&self, name: &[u8]) -> io::Result<u64> {
        let stat = rustix::fs::statat(&self.0, name, AtFlags::SYMLINK_NOFOLLOW)?;
        Ok((stat.st_blocks as u64).saturating_mul(512))
    }

    fn iter(&self) -> io::Result<Names> {
        let entries = rustix::fs::Dir::read_from(&self.0)?;
        let named = entries.map(|entry| Ok(entry?.file_name().to_bytes().to_vec()));
        let real = |name: &io::Result<Vec<u8>>| !matches!(name.as_deref(), Ok(b"." | b".."));
        Ok(Names::new(named.filter(real)))
    }

    fn open_dir(&self, name: &[u8]) -> io::Result<DirHandle> {
        let fd = rustix::fs::openat(&self.0, name, DIR_FLAGS, Mode::empty())?;
        Ok(DirHandle::new(Self(fd)))
    }

    fn open_below(&self, path: &WirePath) -> io::Result<DirHandle> {
        let resolve =
            ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        let mut attempts = 0;
        loop {
            match rustix::fs::openat2(&self.0, path.as_bytes(), DIR_FLAGS, Mode::empty(), resolve) {
                Ok(fd) => return Ok(DirHandle::new(Self(fd))),
                // A rename elsewhere raced with the resolution: the kernel asks to try again.
                Err(Errno::AGAIN) if attempts < 16 => attempts += 1,
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    fn open_file(&self, name: &[u8], write: bool) -> io::Result<FileHandle> {
        let access = if write { OFlags::RDWR } else { OFlags::RDONLY };
        // NONBLOCK: opening a pipe that took the file's place must not wait for a writer.
        let flags = access | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = File::from(rustix::fs::openat(&self.0, name, flags, Mode::empty())?);
        if file.metadata()?.is_file() {
            Ok(FileHandle::new(RealFile(file)))
        } else {
            Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"))
        }
    }

    fn create_new(&self, name: &[u8], mode: u32) -> io::Result<FileHandle> {
        let flags =
            OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(&self.0, name, flags, Mode::from_raw_mode(mode))?;
        Ok(FileHandle::new(RealFile(File::from(fd))))
    }

    fn rename_new(&self, name: &[u8], target: &dyn Directory, new_name: &[u8]) -> io::Result<()> {
        let flags = RenameFlags::NOREPLACE;
        Ok(rustix::fs::renameat_with(&self.0, name, real(target)?, new_name, flags)?)
    }

    fn exchange(&self, name: &[u8], other: &dyn Directory, other_name: &[u8]) -> io::Result<()> {
        let flags = RenameFlags::EXCHANGE;
        Ok(rustix::fs::renameat_with(&self.0, name, real(other)?, other_name, flags)?)
    }

    fn make_dir(&self, name: &[u8], mode: u32) -> io::Result<()> {
        Ok(rustix::fs::mkdirat(&self.0, name, Mode::from_raw_mode(mode))?)
    }

    fn make_link(&self, name: &[u8], target: &[u8]) -> io::Result<()> {
        Ok(rustix::fs::symlinkat(target, &self.0, name)?)
    }

    fn read_link(&self, name: &[u8]) -> io::Result<Vec<u8>> {
        Ok(rustix::fs::readlinkat(&self.0, name, Vec::new())?.into_bytes())
    }

    fn remove_file(&self, name: &[u8]) -> io::Result<()> {
        Ok(rustix::fs::unlinkat(&self.0, name, AtFlags::empty())?)
    }

    fn remove_dir(&self, name: &[u8]) -> io::Result<()> {
        Ok(rustix::fs::unlinkat(&self.0, name, AtFlags::REMOVEDIR)?)
    }

    fn set_owner(&self, name: &[u8], uid: u32, gid: u32) -> io::Result<()> {
        let (uid, gid) = (rustix::fs::Uid::from_raw(uid), rustix::fs::Gid::from_raw(gid));
        let flags = AtFlags::SYMLINK_NOFOLLOW;
        Ok(rustix::fs::chownat(&self.0, name, Some(uid), Some(gid), flags)?)
    }

    fn sync(&self) -> io::Result<()> {
        Ok(rustix::fs::fsync(&self.0)?)
    }

    fn sync_file_system(&self) -> io::Result<()> {
        Ok(rustix::fs::syncfs(&self.0)?)
    }
}

#[derive(Debug)]
struct RealFile(File);

impl OpenFile for RealFile {
    fn as_any(&self) -> &dyn Any {
        self
    }

    fn meta(&self) -> io::Result<Meta> {
        Ok(meta_of(&rustix::fs::fstat(&self.0)?))
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        loop {
            match self.0.read_at(buffer, offset) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => return result,
            }
        }
    }

    fn write_all_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        self.0.write_all_at(data, offset)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.set_len(len)
    }

    fn set_mode(&self, mode: u32) -> io::Result<()> {
        Ok(rustix::fs::fchmod(&self.0, Mode::from_raw_mode(mode))?)
    }

    fn set_mtime(&self, mtime_ns: i64) -> io::Result<()> {
        let time = Timespec {
            tv_sec: mtime_ns.div_euclid(1_000_000_000),
            tv_nsec: mtime_ns.rem_euclid(1_000_000_000) as _,
        };
        let times = Timestamps { last_access: time, last_modification: time };
        Ok(rustix::fs::futimens(&self.0, &times)?)
    }

    fn sync(&self) -> io::Result<()> {
        self.0.sync_all()
    }

    fn write_back(&self) -> io::Result<()> {
        self.0.sync_data()
    }

    fn copy_from(&self, source: &dyn OpenFile, offset: u64, len: usize) -> io::Result<usize> {
        if let Some(source) = source.as_any().downcast_ref::<Self>() {
            let (mut from, mut to) = (offset, offset);
            match rustix::fs::copy_file_range(
                &source.0,
                Some(&mut from),
                &self.0,
                Some(&mut to),
                len,
            ) {
                // Not between these two, or not by this kernel.
                Err(Errno::XDEV | Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP | Errno::PERM) => {
                }
                result => return Ok(result?),
            }
        }
        let mut buffer = vec![0; len.min(256 * 1024)];
        let read = source.read_at(&mut buffer, offset)?;
        self.write_all_at(&buffer[..read], offset)?;
        Ok(read)
    }
}

// The fields of `struct stat` differ in width and sign between architectures.
#[allow(clippy::unnecessary_cast, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
fn meta_of(stat: &rustix::fs::Stat) -> Meta {
    let kind = match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => FileKind::File,
        FileType::Directory => FileKind::Dir,
        FileType::Symlink => FileKind::Link,
        _ => FileKind::Other,
    };
    let time = |seconds: i64, nanos: u64| {
        seconds.saturating_mul(1_000_000_000).saturating_add(nanos as i64)
    };
    Meta {
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

fn identity_of(stat: &rustix::fs::Statx) -> DirIdentity {
    let born_ns = if stat.stx_mask & StatxFlags::BTIME.bits() == 0 {
        0
    } else {
        stat.stx_btime
            .tv_sec
            .saturating_mul(1_000_000_000)
            .saturating_add(i64::from(stat.stx_btime.tv_nsec))
    };
    DirIdentity { ino: stat.stx_ino, born_ns }
}

fn mount_of(stat: &rustix::fs::Statx) -> (u64, u64) {
    let device = u64::from(stat.stx_dev_major) << 32 | u64::from(stat.stx_dev_minor);
    (device, stat.stx_mnt_id)
}

/// How far apart two changes of a file have to be to surely get different times.
fn tick_ns(file: &OwnedFd) -> io::Result<i64> {
    // ext, xfs, btrfs, tmpfs, overlay, f2fs, zfs, bcachefs: the kernel's tick, at most 10 ms.
    const FINE: [i64; 8] = [
        0xef53,
        0x5846_5342,
        0x9123_683e,
        0x0102_1994,
        0x794c_7630,
        0xf2f5_2010,
        0x2fc1_2fc1,
        0xca45_1a4e,
    ];
    #[allow(clippy::unnecessary_cast)] // its width differs between architectures
    let kind = rustix::fs::fstatfs(file)?.f_type as i64;
    // Unknown ones may be FAT, whose times are even seconds, or on the other side of a network.
    Ok(if FINE.contains(&kind) { 10_000_000 } else { 2_000_000_000 })
}
