//! A disk in memory as engines and users reach it: directories and open files.

use std::any::Any;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use cortex_shared::wire_path::WirePath;
use rustix::io::Errno;

use super::super::hints::Deed;
use super::{Body, Entries, SimDisk, USER, fail};
use crate::root_dir::{
    DirHandle, DirIdentity, Directory, Disk, FileHandle, FileSystem, Lock, Meta, Names, OpenFile,
};

impl Disk for SimDisk {
    fn open(&self, path: &Path) -> io::Result<DirHandle> {
        let id = self.find(path)?;
        self.state().names(id)?;
        Ok(self.directory(id))
    }

    fn make(&self, path: &Path, mode: u32) -> io::Result<()> {
        self.make_path(path, mode, false)
    }

    fn make_all(&self, path: &Path, mode: u32) -> io::Result<()> {
        // The index is a real file beside it.
        if self.who != USER {
            std::fs::create_dir_all(path)?;
        }
        self.make_path(path, mode, true)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        let parent = self.find(path.parent().ok_or(Errno::INVAL)?)?;
        let name = path.file_name().ok_or(Errno::INVAL)?.as_encoded_bytes();
        self.enter(true)?.remove(parent, name, true)
    }

    fn real_path(&self, path: &Path) -> io::Result<PathBuf> {
        self.find(path)?;
        Ok(path.to_owned())
    }
}

#[derive(Debug)]
pub(super) struct SimDir {
    pub(super) disk: SimDisk,
    pub(super) id: usize,
}

fn same_disk<'a>(directory: &'a dyn Directory, disk: &SimDisk) -> io::Result<&'a SimDir> {
    match directory.as_any().downcast_ref::<SimDir>() {
        Some(other) if Arc::ptr_eq(&other.disk.state, &disk.state) => Ok(other),
        _ => fail(Errno::XDEV),
    }
}

impl Directory for SimDir {
    fn as_any(&self) -> &dyn Any {
        self
    }

    fn meta(&self) -> io::Result<Meta> {
        Ok(self.disk.enter(false)?.meta(self.id))
    }

    fn identity(&self) -> io::Result<DirIdentity> {
        Ok(self.disk.enter(false)?.identity(self.id))
    }

    fn identity_of(&self, name: &[u8]) -> io::Result<DirIdentity> {
        let state = self.disk.enter(false)?;
        Ok(state.identity(state.child(self.id, name)?))
    }

    fn mount(&self) -> io::Result<(u64, u64)> {
        Ok((1, self.disk.enter(false)?.inodes[self.id].mount))
    }

    fn mount_of(&self, name: &[u8]) -> io::Result<(u64, u64)> {
        let state = self.disk.enter(false)?;
        Ok((1, state.inodes[state.child(self.id, name)?].mount))
    }

    fn file_system(&self) -> io::Result<FileSystem> {
        let grain = self.disk.enter(false)?.kind.grain_ns;
        Ok(FileSystem { free_bytes: 1 << 40, tick_ns: grain.max(10_000_000) })
    }

    fn lock(&self, _: Lock) -> io::Result<bool> {
        Ok(true)
    }

    fn token(&self) -> io::Result<Option<Vec<u8>>> {
        Ok(self.disk.enter(false)?.inodes[self.id].token.clone())
    }

    fn set_token(&self, token: &[u8]) -> io::Result<()> {
        self.disk.enter(true)?.inodes[self.id].token = Some(token.to_vec());
        Ok(())
    }

    fn set_mode(&self, mode: u32) -> io::Result<()> {
        self.disk.enter(true)?.set_mode(self.id, mode);
        Ok(())
    }

    fn lstat(&self, name: &[u8]) -> io::Result<Meta> {
        let state = self.disk.enter(false)?;
        Ok(state.meta(state.child(self.id, name)?))
    }

    fn allocated(&self, name: &[u8]) -> io::Result<u64> {
        Ok(self.lstat(name)?.size)
    }

    fn iter(&self) -> io::Result<Names> {
        let names = self.disk.enter(false)?.names(self.id)?.clone();
        Ok(Names::new(names.into_keys().map(Ok)))
    }

    fn open_dir(&self, name: &[u8]) -> io::Result<DirHandle> {
        let state = self.disk.enter(false)?;
        let id = state.child(self.id, name)?;
        match &state.inodes[id].body {
            Body::Dir(_) => {}
            Body::Link(_) => return fail(Errno::LOOP),
            Body::File(_) => return fail(Errno::NOTDIR),
        }
        drop(state);
        Ok(self.disk.directory(id))
    }

    fn open_below(&self, _: &WirePath) -> io::Result<DirHandle> {
        fail(Errno::NOSYS)
    }

    fn open_file(&self, name: &[u8], writes: bool) -> io::Result<FileHandle> {
        let state = self.disk.enter(false)?;
        let id = state.child(self.id, name)?;
        match &state.inodes[id].body {
            Body::File(_) => {}
            Body::Link(_) => return fail(Errno::LOOP),
            Body::Dir(_) => return Err(io::ErrorKind::InvalidInput.into()),
        }
        drop(state);
        Ok(FileHandle::new(SimFile { disk: self.disk.clone(), id, writes }))
    }

    fn create_new(&self, name: &[u8], mode: u32) -> io::Result<FileHandle> {
        let body = Body::File(Vec::new());
        let id = self.disk.enter(true)?.add(self.id, name, body, mode & !0o022)?;
        Ok(FileHandle::new(SimFile { disk: self.disk.clone(), id, writes: true }))
    }

    fn rename_new(&self, name: &[u8], target: &dyn Directory, new_name: &[u8]) -> io::Result<()> {
        let target = same_disk(target, &self.disk)?;
        let mut state = self.disk.enter(true)?;
        let child = state.child(self.id, name)?;
        if state.spelled(target.id, new_name)?.is_some() {
            return fail(Errno::EXIST);
        }
        if state.holds(child, target.id) {
            return fail(Errno::INVAL);
        }
        let old = state.spelled(self.id, name)?.unwrap_or_default();
        state.rename(&[(self.id, &old, None), (target.id, new_name, Some(child))]);
        state.tell_rename((self.id, &old), (target.id, new_name), child);
        Ok(())
    }

    fn exchange(&self, name: &[u8], other: &dyn Directory, other_name: &[u8]) -> io::Result<()> {
        let other = same_disk(other, &self.disk)?;
        let mut state = self.disk.enter(true)?;
        if self.disk.who != USER && !state.exchanges {
            return fail(Errno::INVAL);
        }
        let (one, two) = (state.child(self.id, name)?, state.child(other.id, other_name)?);
        if state.holds(one, other.id) || state.holds(two, self.id) {
            return fail(Errno::INVAL);
        }
        let name = state.spelled(self.id, name)?.unwrap_or_default();
        let other_name = state.spelled(other.id, other_name)?.unwrap_or_default();
        state.rename(&[(self.id, &name, Some(two)), (other.id, &other_name, Some(one))]);
        let (here, there) = ((self.id, &*name), (other.id, &*other_name));
        state.tell_rename(here, there, one);
        state.tell_rename(there, here, two);
        Ok(())
    }

    fn make_dir(&self, name: &[u8], mode: u32) -> io::Result<()> {
        self.disk.enter(true)?.add(self.id, name, Body::Dir(Entries::new()), mode & !0o022)?;
        Ok(())
    }

    fn make_link(&self, name: &[u8], target: &[u8]) -> io::Result<()> {
        self.disk.enter(true)?.add(self.id, name, Body::Link(target.to_vec()), 0o777)?;
        Ok(())
    }

    fn read_link(&self, name: &[u8]) -> io::Result<Vec<u8>> {
        let state = self.disk.enter(false)?;
        match &state.inodes[state.child(self.id, name)?].body {
            Body::Link(target) => Ok(target.clone()),
            _ => fail(Errno::INVAL),
        }
    }

    fn remove_file(&self, name: &[u8]) -> io::Result<()> {
        self.disk.enter(true)?.remove(self.id, name, false)
    }

    fn remove_dir(&self, name: &[u8]) -> io::Result<()> {
        self.disk.enter(true)?.remove(self.id, name, true)
    }

    fn set_owner(&self, _: &[u8], _: u32, _: u32) -> io::Result<()> {
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        self.disk.enter_to_sync()?.journal.clear();
        Ok(())
    }

    fn sync_file_system(&self) -> io::Result<()> {
        self.disk.enter_to_sync()?.write_back();
        Ok(())
    }
}

#[derive(Debug)]
struct SimFile {
    disk: SimDisk,
    id: usize,
    writes: bool,
}

impl Drop for SimFile {
    fn drop(&mut self) {
        if self.writes {
            self.disk.state().tell_of(self.id, Deed::Closed);
        }
    }
}

impl SimFile {
    fn change(&self, change: impl FnOnce(&mut Vec<u8>)) -> io::Result<()> {
        let mut state = self.disk.enter(true)?;
        let now = state.now();
        let inode = &mut state.inodes[self.id];
        if let Body::File(data) = &mut inode.body {
            change(data);
        }
        (inode.mtime_ns, inode.ctime_ns) = (now, now);
        state.tell_of(self.id, Deed::Written);
        Ok(())
    }
}

impl OpenFile for SimFile {
    fn as_any(&self) -> &dyn Any {
        self
    }

    fn meta(&self) -> io::Result<Meta> {
        Ok(self.disk.enter(false)?.meta(self.id))
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let state = self.disk.enter(false)?;
        let Body::File(data) = &state.inodes[self.id].body else { return fail(Errno::ISDIR) };
        let from = usize::try_from(offset).unwrap_or(usize::MAX).min(data.len());
        let read = buffer.len().min(data.len() - from);
        buffer[..read].copy_from_slice(&data[from..from + read]);
        Ok(read)
    }

    fn write_all_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        let offset = usize::try_from(offset).map_err(|_| Errno::FBIG)?;
        self.change(|old| {
            old.resize(old.len().max(offset + data.len()), 0);
            old[offset..offset + data.len()].copy_from_slice(data);
        })
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let len = usize::try_from(len).map_err(|_| Errno::FBIG)?;
        self.change(|data| data.resize(len, 0))
    }

    fn set_mode(&self, mode: u32) -> io::Result<()> {
        self.disk.enter(true)?.set_mode(self.id, mode);
        Ok(())
    }

    fn set_mtime(&self, mtime_ns: i64) -> io::Result<()> {
        let mut state = self.disk.enter(true)?;
        let now = state.now();
        let grain = state.kind.grain_ns;
        let inode = &mut state.inodes[self.id];
        (inode.mtime_ns, inode.ctime_ns) = (mtime_ns - mtime_ns.rem_euclid(grain), now);
        state.tell_of(self.id, Deed::Attributes);
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        self.disk.enter_to_sync()?.sync_file(self.id);
        Ok(())
    }

    fn write_back(&self) -> io::Result<()> {
        // Nothing may count on it.
        self.disk.enter(false).map(drop)
    }

    fn copy_from(&self, source: &dyn OpenFile, offset: u64, len: usize) -> io::Result<usize> {
        let mut buffer = vec![0; len.min(64 * 1024)];
        let read = source.read_at(&mut buffer, offset)?;
        self.write_all_at(&buffer[..read], offset)?;
        Ok(read)
    }
}
