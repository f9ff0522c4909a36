//! Directories of file systems that take names for one that differ only in case.
//!
//! Where `A` is found as `a`, a path says less than it seems: what is written to `D/x` would land in `d`,
//! and who looks whether `A` is still there is told of `a`. Here every name is compared with those that
//! really stand in the directory, so that what stands under another spelling is not found. Making
//! something there fails nevertheless, with `EEXIST`: [`DirHandle::other_spelling`] tells why.

use std::any::Any;
use std::collections::HashSet;
use std::io;
use std::sync::{Mutex, PoisonError};

use cortex_shared::wire_path::{PRIVATE_NAME, WirePath};
use rustix::io::Errno;

use super::{DirHandle, DirIdentity, Directory, FileHandle, FileSystem, Lock, Meta, Names};

/// The names in a directory, as they were when it was changed last.
#[derive(Debug)]
struct Spelled {
    mtime_ns: i64,
    ctime_ns: i64,
    names: HashSet<Vec<u8>>,
}

/// A directory in which only exact names are found.
#[derive(Debug)]
struct ExactDir {
    inner: DirHandle,
    spelled: Mutex<Option<Spelled>>,
}

/// How often a name is looked for in another spelling while it is being changed.
const ATTEMPTS: usize = 10;

/// Whether a directory takes names for one that differ only in case. Asks for a name that stands there in
/// another spelling; in an empty directory it makes one for a moment, and removes one that was left there
/// by a process that ended in that moment. Somebody may work in the directory meanwhile.
///
/// # Errors
/// Those of the file system, but for a directory that nothing may be made in: that is not found out.
pub fn folds_case(top: &DirHandle) -> io::Result<bool> {
    let mut names = top.names()?;
    // A private directory is never empty, so that one stays.
    if let Ok(at) = names.binary_search_by(|name| name.as_slice().cmp(PRIVATE_NAME))
        && top.remove_dir(PRIVATE_NAME).is_ok()
    {
        names.remove(at);
    }
    for name in &names {
        let other = flipped(name);
        if other != *name
            && names.binary_search(&other).is_err()
            && let Some(folds) = is_found_as(top, name, &other)?
        {
            return Ok(folds);
        }
    }
    match top.make_dir(PRIVATE_NAME, 0o700) {
        Ok(()) => {}
        // Somebody has just made it.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            let ask = |_| is_found_as(top, PRIVATE_NAME, &flipped(PRIVATE_NAME)).transpose();
            // Whoever has made it puts something into it just now.
            let found = (0..ATTEMPTS).find_map(ask).transpose()?;
            return found.ok_or(error);
        }
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem
            ) =>
        {
            return Ok(false);
        }
        // Taken for "no" it would be believed until the next start.
        Err(error) => return Err(error),
    }
    let found = top.try_lstat(&flipped(PRIVATE_NAME));
    match top.remove_dir(PRIVATE_NAME) {
        // Somebody has put something there, and keeps it.
        Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => {}
        removed => removed?,
    }
    Ok(found?.is_some())
}

/// Whether what stands under a name is found under another spelling as well; `None` if it was removed,
/// replaced or changed while that was looked up, which proves nothing.
fn is_found_as(top: &DirHandle, name: &[u8], other: &[u8]) -> io::Result<Option<bool>> {
    let before = top.try_lstat(name)?;
    let found = top.try_lstat(other)?;
    let after = top.try_lstat(name)?;
    Ok(match (before, found) {
        _ if before.is_none() || before != after => None,
        (_, None) => Some(false),
        (before, found) if before == found => Some(true),
        _ => None,
    })
}

/// The name with its letters in the other case.
pub(super) fn flipped(name: &[u8]) -> Vec<u8> {
    let flip = |byte: &u8| match byte {
        b'a'..=b'z' => byte.to_ascii_uppercase(),
        byte => byte.to_ascii_lowercase(),
    };
    name.iter().map(flip).collect()
}

/// The same directory, in which only exact names are found, and so in all below it.
#[must_use]
pub fn exact(directory: DirHandle) -> DirHandle {
    DirHandle::new(ExactDir { inner: directory, spelled: Mutex::default() })
}

impl ExactDir {
    fn is_spelled(&self, name: &[u8]) -> io::Result<bool> {
        let meta = self.inner.meta()?;
        let mut spelled = self.spelled.lock().unwrap_or_else(PoisonError::into_inner);
        let is_known = spelled.as_ref().is_some_and(|spelled| {
            (spelled.mtime_ns, spelled.ctime_ns) == (meta.mtime_ns, meta.ctime_ns)
                && spelled.names.contains(name)
        });
        if is_known {
            return Ok(true);
        }
        // Also if nothing seems to have changed: where the clock is coarse (2 s on vfat), what is made right
        // after a look leaves the directory's times as they were.
        let names: HashSet<_> = self.inner.iter()?.collect::<io::Result<_>>()?;
        let is_spelled = names.contains(name);
        let Meta { mtime_ns, ctime_ns, .. } = meta;
        *spelled = Some(Spelled { mtime_ns, ctime_ns, names });
        Ok(is_spelled)
    }

    /// Fails unless a name is found exactly so, or not at all.
    fn check(&self, name: &[u8]) -> io::Result<()> {
        match self.inner.0.lstat(name) {
            Ok(_) if !self.is_spelled(name)? => Err(Errno::NOENT.into()),
            result => result.map(drop),
        }
    }
}

impl Directory for ExactDir {
    fn as_any(&self) -> &dyn Any {
        self.inner.0.as_any()
    }

    fn meta(&self) -> io::Result<Meta> {
        self.inner.0.meta()
    }

    fn identity(&self) -> io::Result<DirIdentity> {
        self.inner.0.identity()
    }

    fn identity_of(&self, name: &[u8]) -> io::Result<DirIdentity> {
        self.check(name)?;
        self.inner.0.identity_of(name)
    }

    fn mount(&self) -> io::Result<(u64, u64)> {
        self.inner.0.mount()
    }

    fn mount_of(&self, name: &[u8]) -> io::Result<(u64, u64)> {
        self.check(name)?;
        self.inner.0.mount_of(name)
    }

    fn file_system(&self) -> io::Result<FileSystem> {
        self.inner.0.file_system()
    }

    fn lock(&self, lock: Lock) -> io::Result<bool> {
        self.inner.0.lock(lock)
    }

    fn token(&self) -> io::Result<Option<Vec<u8>>> {
        self.inner.0.token()
    }

    fn set_token(&self, token: &[u8]) -> io::Result<()> {
        self.inner.0.set_token(token)
    }

    fn set_mode(&self, mode: u32) -> io::Result<()> {
        self.inner.0.set_mode(mode)
    }

    fn lstat(&self, name: &[u8]) -> io::Result<Meta> {
        let meta = self.inner.0.lstat(name)?;
        if self.is_spelled(name)? { Ok(meta) } else { Err(Errno::NOENT.into()) }
    }

    fn other_spelling(&self, name: &[u8]) -> io::Result<bool> {
        Ok(self.inner.try_lstat(name)?.is_some() && !self.is_spelled(name)?)
    }

    fn allocated(&self, name: &[u8]) -> io::Result<u64> {
        self.check(name)?;
        self.inner.0.allocated(name)
    }

    fn iter(&self) -> io::Result<Names> {
        // Whoever lists it goes on with what he was told.
        *self.spelled.lock().unwrap_or_else(PoisonError::into_inner) = None;
        self.inner.0.iter()
    }

    fn open_dir(&self, name: &[u8]) -> io::Result<DirHandle> {
        self.check(name)?;
        self.inner.0.open_dir(name).map(exact)
    }

    fn open_below(&self, _: &WirePath) -> io::Result<DirHandle> {
        Err(Errno::NOSYS.into())
    }

    fn open_file(&self, name: &[u8], write: bool) -> io::Result<FileHandle> {
        self.check(name)?;
        self.inner.0.open_file(name, write)
    }

    fn create_new(&self, name: &[u8], mode: u32) -> io::Result<FileHandle> {
        self.inner.0.create_new(name, mode)
    }

    fn rename_new(&self, name: &[u8], target: &dyn Directory, new_name: &[u8]) -> io::Result<()> {
        self.check(name)?;
        self.inner.0.rename_new(name, target, new_name)
    }

    fn exchange(&self, name: &[u8], other: &dyn Directory, other_name: &[u8]) -> io::Result<()> {
        self.check(name)?;
        self.inner.0.exchange(name, other, other_name)
    }

    fn make_dir(&self, name: &[u8], mode: u32) -> io::Result<()> {
        self.inner.0.make_dir(name, mode)
    }

    fn make_link(&self, name: &[u8], target: &[u8]) -> io::Result<()> {
        self.inner.0.make_link(name, target)
    }

    fn read_link(&self, name: &[u8]) -> io::Result<Vec<u8>> {
        self.check(name)?;
        self.inner.0.read_link(name)
    }

    fn remove_file(&self, name: &[u8]) -> io::Result<()> {
        self.check(name)?;
        self.inner.0.remove_file(name)
    }

    fn remove_dir(&self, name: &[u8]) -> io::Result<()> {
        self.check(name)?;
        self.inner.0.remove_dir(name)
    }

    fn set_owner(&self, name: &[u8], uid: u32, gid: u32) -> io::Result<()> {
        self.check(name)?;
        self.inner.0.set_owner(name, uid, gid)
    }

    fn sync(&self) -> io::Result<()> {
        self.inner.0.sync()
    }

    fn sync_file_system(&self) -> io::Result<()> {
        self.inner.0.sync_file_system()
    }
}
