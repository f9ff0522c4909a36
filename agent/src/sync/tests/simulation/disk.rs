//! A disk in memory with two layers: what programs see, and what survives power loss.
//!
//! Names change in a journal, as on ext4: whatever is synced carries everything of the journal that
//! came before it; a power loss keeps a beginning of the rest. The content and attributes of a file
//! survive only if the file was synced: otherwise the old ones, or none, may be found. The clock may
//! be coarse, file numbers are used again, and between any two calls of an engine a user may do
//! something ([`SimDisk::set_intruder`]), or its process may end ([`SimDisk::set_fuse`]).

mod handles;

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use rustix::io::Errno;
use tokio::time::Instant;

use super::hints::{Deed, Watching};
use crate::root_dir::{DirHandle, DirIdentity, FileKind, Meta};
use handles::SimDir;

/// The process of an engine ended here.
pub(super) struct Crash;

/// A user's process lives on whatever becomes of the engine's.
const USER: u64 = u64::MAX;
const TOP: usize = 0;
/// How long what nobody syncs is in memory alone.
const IN_MEMORY: Duration = Duration::from_secs(60);
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
    /// How often the machine was started.
    boot: u64,
    written_back: Instant,
    fuse: Option<u64>,
    /// One in so many calls of an engine fails; 0 for none.
    error_rate: u32,
    /// After so many more calls of an engine one fails.
    failure: Option<u64>,
    /// Two names can change places in one step, for an engine.
    exchanges: bool,
    begun: Instant,
    steps: i64,
    random: StdRng,
    /// Changes that an engine made.
    changes: u64,
    /// How often an engine waited for the disk.
    syncs: u64,
    /// Whom the kernel tells of changes.
    watching: Option<Watching>,
    calm: bool,
    renames: usize,
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
            boot: 1,
            written_back: Instant::now(),
            fuse: None,
            error_rate: 0,
            failure: None,
            exchanges: true,
            begun: Instant::now(),
            steps: 0,
            random: StdRng::seed_from_u64(seed),
            changes: 0,
            syncs: 0,
            watching: None,
            calm: false,
            renames: 0,
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

    /// After so many more calls of the engine one fails.
    pub(super) fn set_failure(&self, calls: u64) {
        self.state().failure = Some(calls);
    }

    /// It is of a file system where no two names change places in one step.
    pub(super) fn forbid_exchanges(&self) {
        self.state().exchanges = false;
    }

    /// Whether it has failed.
    pub(super) fn has_failed(&self) -> bool {
        self.state().failure.is_none()
    }

    /// Between two calls of the engine, a user does something: on average after so many of them.
    pub(super) fn set_intruder(&self, every: u32, intruder: Intruder) {
        *self.intruder.lock().unwrap_or_else(PoisonError::into_inner) = Some((every, intruder));
    }

    /// Nobody intrudes any more, nothing fails, no process ends and all hints arrive.
    pub(super) fn calm(&self) {
        let mut state = self.state();
        (state.fuse, state.failure, state.error_rate, state.calm) = (None, None, 0, true);
        if let Some(watching) = &mut state.watching {
            watching.calm();
        }
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

    /// The kernel tells a new engine of changes from now on.
    pub(super) fn set_watching(&self, watching: Watching) {
        let mut state = self.state();
        let calm = state.calm;
        let watching = state.watching.insert(watching);
        if calm {
            watching.calm();
        }
    }

    /// What there is of it, if the engine that asked for it is still the one that runs.
    pub(super) fn with_watching<T>(&self, f: impl FnOnce(Option<&mut Watching>) -> T) -> T {
        let mut state = self.state();
        let (life, who) = (state.life, self.who);
        f(state.watching.as_mut().filter(|watching| life == who && watching.is_alive()))
    }

    /// Hints go astray again.
    pub(super) fn stir(&self) {
        let mut state = self.state();
        state.calm = false;
        if let Some(watching) = &mut state.watching {
            watching.stir();
        }
    }

    /// The number of the directory at a path.
    pub(super) fn directory_at(&self, path: &Path) -> io::Result<usize> {
        let id = self.find(path)?;
        self.state().names(id)?;
        Ok(id)
    }

    /// What the disk is like.
    pub(super) fn kind(&self) -> Kind {
        self.state().kind
    }

    /// One step of its clock.
    pub(super) fn tick(&self) -> Duration {
        Duration::from_nanos(self.kind().grain_ns.unsigned_abs())
    }

    /// Whether names that differ only in case are one.
    pub(super) fn folds_case(&self) -> bool {
        self.state().kind.folds_case
    }

    /// How many changes engines have made.
    pub(super) fn changes(&self) -> u64 {
        self.state().changes
    }

    /// How often engines have waited until something was on the disk for good.
    pub(super) fn syncs(&self) -> u64 {
        self.state().syncs
    }

    /// As [`Self::enter`], for who waits until something is on the disk for good.
    fn enter_to_sync(&self) -> io::Result<MutexGuard<'_, State>> {
        let mut state = self.enter(true)?;
        state.syncs += u64::from(self.who != USER);
        Ok(state)
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

    /// The kernel leaves nothing in memory alone for long.
    pub(super) fn write_back_in_time(&self) {
        let mut state = self.state();
        if state.written_back.elapsed() >= IN_MEMORY {
            state.written_back = Instant::now();
            state.write_back();
        }
    }

    /// Which start of the machine this is.
    pub(super) fn boot(&self) -> u64 {
        self.state().boot
    }

    /// The power fails: what was not synced is lost in part.
    pub(super) fn lose_power(&self) {
        let mut state = self.state();
        state.dead = true;
        state.boot += 1;
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
        if let Some(watching) = &mut state.watching {
            watching.deliver();
        }
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
        let fails = state.failure == Some(0);
        state.failure = state.failure.and_then(|left| left.checked_sub(1));
        let rate = state.error_rate;
        if fails || rate > 0 && state.random.random_range(0..rate) == 0 {
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
        self.tell(id, Some(name), Deed::Made { folder: self.names(new).is_ok() });
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
        self.tell(id, Some(&name), Deed::Removed { folder: directory });
        if directory {
            self.tell(child, None, Deed::Removed { folder: true });
        }
        self.inodes[child].links = 0;
        self.free_numbers.push(self.inodes[child].ino);
        Ok(())
    }

    /// Has the kernel tell of something.
    fn tell(&mut self, directory: usize, name: Option<&[u8]>, deed: Deed) {
        if let Some(watching) = &mut self.watching {
            watching.tell(directory, name, deed);
        }
    }

    /// Has the kernel tell what happens to a file, wherever it has a name.
    fn tell_of(&mut self, id: usize, deed: Deed) {
        let Some(watching) = &mut self.watching else { return };
        for directory in watching.watched() {
            let Body::Dir(names) = &self.inodes[directory].body else { continue };
            if let Some((name, _)) = names.iter().find(|(_, child)| **child == id) {
                watching.tell(directory, Some(name), deed);
            }
        }
        watching.tell(id, None, deed);
    }

    /// Has the kernel tell of a rename.
    fn tell_rename(&mut self, from: (usize, &[u8]), to: (usize, &[u8]), moved: usize) {
        self.renames += 1;
        let cookie = self.renames;
        self.tell(from.0, Some(from.1), Deed::From { cookie });
        self.tell(to.0, Some(to.1), Deed::To { cookie });
        self.tell(moved, None, Deed::From { cookie });
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

    fn set_mode(&mut self, id: usize, mode: u32) {
        let now = self.now();
        let inode = &mut self.inodes[id];
        (inode.mode, inode.ctime_ns) = (mode, now);
        self.tell_of(id, Deed::Attributes);
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
