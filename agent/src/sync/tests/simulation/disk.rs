//! A disk in memory with two layers: what programs see, and what survives power loss.
//!
//! Names change in a journal, as on ext4: whatever is synced carries everything of the journal that
//! came before it; a power loss keeps a beginning of the rest. The content and attributes of a file
//! survive only if the file was synced: otherwise the old ones, or none, may be found. The clock may
//! be coarse, file numbers are used again, and between any two calls of an engine a user may do
//! something ([`SimDisk::set_intruder`]), or its process may end ([`SimDisk::set_fuse`]).

use std::any::Any;
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cortex_shared::wire_path::WirePath;
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use rustix::io::Errno;
use tokio::time::Instant;

use crate::root_dir::{
    DirHandle, DirIdentity, Directory, Disk, FileHandle, FileKind, FileSystem, Lock, Meta, Names,
    OpenFile,
};

/// The process of an engine ended here.
pub(super) struct Crash;

/// A user's process lives on whatever becomes of the engine's.
const USER: u64 = u64::MAX;
const TOP: usize = 0;
/// Changes of names that may be lost together.
const MAX_JOURNAL: usize = 200;

type Entries = BTreeMap<Vec<u8>, usize>;

#[derive(Clone, Debug)]
enum Body {
    Dir(Entries),
    File(Vec<u8>),
    Link(Vec<u8>),
}

#[derive(Clone, Debug)]
struct Inode {
    ino: u64,
    body: Body,
    mode: u32,
    mtime_ns: i64,
    ctime_ns: i64,
    born_ns: i64,
    mount: u64,
    links: u64,
    token: Option<Vec<u8>>,
    /// Content, mode and time as they were synced.
    synced: Option<(Vec<u8>, u32, i64)>,
}

/// What a disk is like.
#[derive(Clone, Copy, Debug)]
pub(super) struct Kind {
    /// The clock goes in steps of so many nanoseconds.
    pub(super) grain_ns: i64,
    /// Numbers of removed files are given to new ones.
    pub(super) reuses_numbers: bool,
    /// Names that differ only in case are one.
    pub(super) folds_case: bool,
}

type Intruder = Box<dyn FnMut(&SimDisk, &mut StdRng) + Send>;

struct State {
    kind: Kind,
    inodes: Vec<Inode>,
    /// What the directories held, oldest first, since the journal was written.
    journal: Vec<Vec<(usize, Entries)>>,
    free_numbers: Vec<u64>,
    next_number: u64,
    /// Which run of the engine's process this is.
    life: u64,
    dead: bool,
    fuse: Option<u64>,
    /// One in so many calls of an engine fails; 0 for none.
    error_rate: u32,
    begun: Instant,
    steps: i64,
    random: StdRng,
    /// Changes that an engine made.
    changes: u64,
}

/// See the module. Cheap to clone.
#[derive(Clone)]
pub(super) struct SimDisk {
    state: Arc<Mutex<State>>,
    intruder: Arc<Mutex<Option<(u32, Intruder)>>>,
    who: u64,
}

impl std::fmt::Debug for SimDisk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SimDisk").field("who", &self.who).finish_non_exhaustive()
    }
}

fn fail<T>(errno: Errno) -> io::Result<T> {
    Err(errno.into())
}

impl SimDisk {
    /// An empty disk, seen by its user.
    pub(super) fn new(kind: Kind, seed: u64) -> Self {
        let top = Inode {
            ino: 2,
            body: Body::Dir(Entries::new()),
            mode: 0o755,
            mtime_ns: 0,
            ctime_ns: 0,
            born_ns: 1,
            mount: 1,
            links: 2,
            token: None,
            synced: None,
        };
        let state = State {
            kind,
            inodes: vec![top],
            journal: Vec::new(),
            free_numbers: Vec::new(),
            next_number: 3,
            life: 0,
            dead: false,
            fuse: None,
            error_rate: 0,
            begun: Instant::now(),
            steps: 0,
            random: StdRng::seed_from_u64(seed),
            changes: 0,
        };
        Self { state: Arc::new(Mutex::new(state)), intruder: Arc::default(), who: USER }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The disk as a new process of the engine sees it.
    pub(super) fn engine(&self) -> Self {
        let mut state = self.state();
        state.life += 1;
        (state.dead, state.fuse) = (false, None);
        let who = state.life;
        drop(state);
        Self { who, ..self.clone() }
    }

    /// The engine's process ends after so many more changes.
    pub(super) fn set_fuse(&self, changes: u64) {
        self.state().fuse = Some(changes);
    }

    /// One in so many calls of the engine fails from now on; none for 0.
    pub(super) fn set_error_rate(&self, rate: u32) {
        self.state().error_rate = rate;
    }

    /// Between two calls of the engine, a user does something: on average after so many of them.
    pub(super) fn set_intruder(&self, every: u32, intruder: Intruder) {
        *self.intruder.lock().unwrap_or_else(PoisonError::into_inner) = Some((every, intruder));
    }

    /// Nobody intrudes any more, nothing fails and no process ends.
    pub(super) fn calm(&self) {
        let mut state = self.state();
        (state.fuse, state.error_rate) = (None, 0);
        drop(state);
        *self.intruder.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Whether the engine's process has ended by its fuse.
    pub(super) fn is_dead(&self) -> bool {
        self.state().dead
    }

    /// Ends the engine's process.
    pub(super) fn kill(&self) {
        self.state().dead = true;
    }

    /// Whether names that differ only in case are one.
    pub(super) fn folds_case(&self) -> bool {
        self.state().kind.folds_case
    }

    /// How many changes engines have made.
    pub(super) fn changes(&self) -> u64 {
        self.state().changes
    }

    /// Mounts another file system at a directory, as it is.
    pub(super) fn mount(&self, path: &Path) {
        let id = self.find(path).unwrap();
        self.state().inodes[id].mount = 2;
    }

    /// Writes everything back, as a machine does that is shut down or has been idle for a while.
    pub(super) fn write_back(&self) {
        self.state().write_back();
    }

    /// The power fails: what was not synced is lost in part.
    pub(super) fn lose_power(&self) {
        let mut state = self.state();
        state.dead = true;
        let changes = state.journal.len();
        let kept = state.random.random_range(0..=changes);
        // What the directories held before the first change that is lost.
        let lost: Vec<_> = state.journal.drain(kept..).collect();
        for change in lost.into_iter().rev() {
            for (id, names) in change {
                state.inodes[id].body = Body::Dir(names);
            }
        }
        state.journal.clear();
        for id in 0..state.inodes.len() {
            if !matches!(state.inodes[id].body, Body::File(_)) {
                continue;
            }
            let chance = state.random.random_range(0..3);
            let inode = &mut state.inodes[id];
            let now = match &inode.body {
                Body::File(data) => (data.clone(), inode.mode, inode.mtime_ns),
                Body::Dir(_) | Body::Link(_) => continue,
            };
            let found = match (chance, inode.synced.clone()) {
                (0, _) => now,
                (_, Some(synced)) => synced,
                (1, None) => (Vec::new(), now.1, now.2),
                (_, None) => (now.0[..now.0.len() / 2].to_vec(), now.1, now.2),
            };
            inode.body = Body::File(found.0.clone());
            (inode.mode, inode.mtime_ns) = (found.1, found.2);
            inode.synced = Some(found);
        }
    }

    /// Before a call: whoever is faster; then the end of the process, or a failure.
    fn enter(&self, changes: bool) -> io::Result<MutexGuard<'_, State>> {
        if self.who == USER {
            return Ok(self.state());
        }
        let mut state = self.state();
        if state.dead || state.life != self.who {
            drop(state);
            std::panic::resume_unwind(Box::new(Crash));
        }
        let mut slot = self.intruder.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((every, _)) = &*slot
            && state.random.random_range(0..*every) == 0
        {
            let mut random = StdRng::seed_from_u64(state.random.random());
            drop(state);
            let user = Self { who: USER, ..self.clone() };
            if let Some((_, intruder)) = &mut *slot {
                intruder(&user, &mut random);
            }
            state = self.state();
        }
        drop(slot);
        // It takes its time, up to two milliseconds.
        let taken = state.random.random_range(0..20_000);
        state.steps += taken;
        if changes {
            state.changes += 1;
            if let Some(left) = &mut state.fuse {
                if *left == 0 {
                    state.dead = true;
                    drop(state);
                    std::panic::resume_unwind(Box::new(Crash));
                }
                *left -= 1;
            }
        }
        let rate = state.error_rate;
        if rate > 0 && state.random.random_range(0..rate) == 0 {
            return fail(if changes { Errno::NOSPC } else { Errno::IO });
        }
        Ok(state)
    }

    fn directory(&self, id: usize) -> DirHandle {
        DirHandle::new(SimDir { disk: self.clone(), id })
    }

    fn find(&self, path: &Path) -> io::Result<usize> {
        let state = self.enter(false)?;
        let mut id = TOP;
        for part in path.iter().filter(|part| *part != "/") {
            id = state.child(id, part.as_encoded_bytes())?;
        }
        Ok(id)
    }

    fn make_path(&self, path: &Path, mode: u32, all: bool) -> io::Result<()> {
        let mut state = self.enter(true)?;
        let mut id = TOP;
        let parts: Vec<_> = path.iter().filter(|part| *part != "/").collect();
        for (number, part) in parts.iter().enumerate() {
            let (name, last) = (part.as_encoded_bytes(), number + 1 == parts.len());
            id = match state.child(id, name) {
                Ok(_) if last && !all => return fail(Errno::EXIST),
                Ok(child) => child,
                Err(_) if last || all => state.add(id, name, Body::Dir(Entries::new()), mode)?,
                Err(error) => return Err(error),
            };
        }
        Ok(())
    }
}

impl State {
    fn now(&mut self) -> i64 {
        self.steps += 1;
        let elapsed = i64::try_from(self.begun.elapsed().as_nanos()).unwrap_or(i64::MAX / 2);
        let now = 1_700_000_000_000_000_000 + elapsed + self.steps * 100;
        now - now % self.kind.grain_ns
    }

    fn names(&self, id: usize) -> io::Result<&Entries> {
        match &self.inodes[id].body {
            Body::Dir(names) => Ok(names),
            _ => fail(Errno::NOTDIR),
        }
    }

    /// The name under which `name` stands there.
    fn spelled(&self, id: usize, name: &[u8]) -> io::Result<Option<Vec<u8>>> {
        let names = self.names(id)?;
        Ok(match self.kind.folds_case {
            false => names.get_key_value(name).map(|(name, _)| name.clone()),
            true => names.keys().find(|other| other.eq_ignore_ascii_case(name)).cloned(),
        })
    }

    fn child(&self, id: usize, name: &[u8]) -> io::Result<usize> {
        match self.spelled(id, name)? {
            Some(name) => Ok(self.names(id)?[&name]),
            None => fail(Errno::NOENT),
        }
    }

    /// Changes the names of directories as one step of the journal.
    fn rename(&mut self, changes: &[(usize, &[u8], Option<usize>)]) {
        let now = self.now();
        let mut before = Vec::new();
        for (id, name, target) in changes {
            let Body::Dir(names) = &mut self.inodes[*id].body else { continue };
            if !before.iter().any(|(other, _)| other == id) {
                before.push((*id, names.clone()));
            }
            match target {
                Some(target) => names.insert(name.to_vec(), *target),
                None => names.remove(*name),
            };
            self.inodes[*id].mtime_ns = now;
            self.inodes[*id].ctime_ns = now;
            if let Some(target) = target {
                self.inodes[*target].ctime_ns = now;
            }
        }
        self.journal.push(before);
        if self.journal.len() > MAX_JOURNAL {
            self.journal.remove(0);
        }
    }

    fn add(&mut self, id: usize, name: &[u8], body: Body, mode: u32) -> io::Result<usize> {
        if self.spelled(id, name)?.is_some() {
            return fail(Errno::EXIST);
        }
        let now = self.now();
        let ino = match self.free_numbers.pop().filter(|_| self.kind.reuses_numbers) {
            Some(number) => number,
            None => {
                self.next_number += 1;
                self.next_number
            }
        };
        let mount = self.inodes[id].mount;
        // Births are told apart by every file system that tells them at all.
        let born_ns = now + self.steps;
        self.inodes.push(Inode {
            ino,
            body,
            mode,
            mtime_ns: now,
            ctime_ns: now,
            born_ns,
            mount,
            links: 1,
            token: None,
            synced: None,
        });
        let new = self.inodes.len() - 1;
        self.rename(&[(id, name, Some(new))]);
        Ok(new)
    }

    fn remove(&mut self, id: usize, name: &[u8], directory: bool) -> io::Result<()> {
        let child = self.child(id, name)?;
        match &self.inodes[child].body {
            Body::Dir(names) if directory && names.is_empty() => {}
            Body::Dir(_) if directory => return fail(Errno::NOTEMPTY),
            Body::Dir(_) => return fail(Errno::ISDIR),
            _ if directory => return fail(Errno::NOTDIR),
            _ => {}
        }
        let name = self.spelled(id, name)?.unwrap_or_default();
        self.rename(&[(id, &name, None)]);
        self.inodes[child].links = 0;
        self.free_numbers.push(self.inodes[child].ino);
        Ok(())
    }

    fn meta(&self, id: usize) -> Meta {
        let inode = &self.inodes[id];
        let (kind, size) = match &inode.body {
            Body::Dir(_) => (FileKind::Dir, 0),
            Body::File(data) => (FileKind::File, data.len() as u64),
            Body::Link(target) => (FileKind::Link, target.len() as u64),
        };
        Meta {
            kind,
            dev: 1,
            ino: inode.ino,
            size,
            mtime_ns: inode.mtime_ns,
            ctime_ns: inode.ctime_ns,
            mode: inode.mode,
            uid: 0,
            gid: 0,
            links: inode.links,
        }
    }

    fn identity(&self, id: usize) -> DirIdentity {
        DirIdentity { ino: self.inodes[id].ino, born_ns: self.inodes[id].born_ns }
    }

    fn sync_file(&mut self, id: usize) {
        let inode = &mut self.inodes[id];
        if let Body::File(data) = &inode.body {
            inode.synced = Some((data.clone(), inode.mode, inode.mtime_ns));
        }
        self.journal.clear();
    }

    fn write_back(&mut self) {
        for id in 0..self.inodes.len() {
            self.sync_file(id);
        }
        self.journal.clear();
    }

    /// Whether `id` is `below` or a directory above it.
    fn holds(&self, id: usize, below: usize) -> bool {
        id == below
            || match &self.inodes[id].body {
                Body::Dir(names) => names.values().any(|child| self.holds(*child, below)),
                _ => false,
            }
    }
}

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
struct SimDir {
    disk: SimDisk,
    id: usize,
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
        let mut state = self.disk.enter(true)?;
        let now = state.now();
        let inode = &mut state.inodes[self.id];
        (inode.mode, inode.ctime_ns) = (mode, now);
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

    fn open_file(&self, name: &[u8], _: bool) -> io::Result<FileHandle> {
        let state = self.disk.enter(false)?;
        let id = state.child(self.id, name)?;
        match &state.inodes[id].body {
            Body::File(_) => {}
            Body::Link(_) => return fail(Errno::LOOP),
            Body::Dir(_) => return Err(io::ErrorKind::InvalidInput.into()),
        }
        drop(state);
        Ok(FileHandle::new(SimFile { disk: self.disk.clone(), id }))
    }

    fn create_new(&self, name: &[u8], mode: u32) -> io::Result<FileHandle> {
        let body = Body::File(Vec::new());
        let id = self.disk.enter(true)?.add(self.id, name, body, mode & !0o022)?;
        Ok(FileHandle::new(SimFile { disk: self.disk.clone(), id }))
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
        Ok(())
    }

    fn exchange(&self, name: &[u8], other: &dyn Directory, other_name: &[u8]) -> io::Result<()> {
        let other = same_disk(other, &self.disk)?;
        let mut state = self.disk.enter(true)?;
        let (one, two) = (state.child(self.id, name)?, state.child(other.id, other_name)?);
        if state.holds(one, other.id) || state.holds(two, self.id) {
            return fail(Errno::INVAL);
        }
        let name = state.spelled(self.id, name)?.unwrap_or_default();
        let other_name = state.spelled(other.id, other_name)?.unwrap_or_default();
        state.rename(&[(self.id, &name, Some(two)), (other.id, &other_name, Some(one))]);
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
        self.disk.enter(true)?.journal.clear();
        Ok(())
    }

    fn sync_file_system(&self) -> io::Result<()> {
        self.disk.enter(true)?.write_back();
        Ok(())
    }
}

#[derive(Debug)]
struct SimFile {
    disk: SimDisk,
    id: usize,
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
        let mut state = self.disk.enter(true)?;
        let now = state.now();
        let inode = &mut state.inodes[self.id];
        (inode.mode, inode.ctime_ns) = (mode, now);
        Ok(())
    }

    fn set_mtime(&self, mtime_ns: i64) -> io::Result<()> {
        let mut state = self.disk.enter(true)?;
        let now = state.now();
        let grain = state.kind.grain_ns;
        let inode = &mut state.inodes[self.id];
        (inode.mtime_ns, inode.ctime_ns) = (mtime_ns - mtime_ns.rem_euclid(grain), now);
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        self.disk.enter(true)?.sync_file(self.id);
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
