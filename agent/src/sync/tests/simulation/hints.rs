//! What the kernel of a simulated disk tells of changes, and what becomes of it on the way: it comes late,
//! twice, not at all, or there is too much of it.
//!
//! Modelled after inotify as the `notify` crate presents it: a watch is of a directory, whatever it is
//! called by now; the path that is told is the one by which it was watched last, and what is renamed or
//! removed takes the watches below its old path with it.

use std::collections::{BTreeMap, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::time::Duration;

use notify::event::{
    AccessKind, AccessMode, CreateKind, DataChange, EventKind, Flag, MetadataKind, ModifyKind,
    RemoveKind, RenameMode,
};
use notify::{ErrorKind, Event};
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::disk::SimDisk;
use crate::sync::watch::{Handler, Kernel, Kernels};

/// What the way of hints is like. One in so many for each; 0 for never.
#[derive(Clone, Copy, Debug)]
pub(super) struct Way {
    /// No watcher is given at all.
    pub(super) none: bool,
    /// The one who reads them stands still for up to a minute.
    pub(super) stalls: u32,
    pub(super) twice: u32,
    pub(super) lost: u32,
    /// So many wait to be read; of more it is only told that there were more.
    pub(super) room: usize,
    /// So many directories can be watched.
    pub(super) directories: usize,
}

impl Way {
    /// Drawn from a seed.
    pub(super) fn draw(random: &mut StdRng) -> Self {
        Self {
            none: random.random_range(0..4) == 0,
            stalls: [0, 0, 30][random.random_range(0..3)],
            twice: [0, 5][random.random_range(0..2)],
            lost: [0, 0, 30][random.random_range(0..3)],
            room: [16_384, 16_384, 6][random.random_range(0..3)],
            directories: [10_000, 10_000, 3][random.random_range(0..3)],
        }
    }
}

/// What happened to a name in a directory, or to the directory itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Deed {
    From { cookie: usize },
    To { cookie: usize },
    Made { folder: bool },
    Removed { folder: bool },
    Written,
    Closed,
    Attributes,
}

#[derive(Clone, Debug)]
struct Told {
    at: Instant,
    directory: usize,
    name: Option<Vec<u8>>,
    deed: Deed,
}

/// One watcher of a disk.
pub(super) struct Watching {
    way: Way,
    calm: bool,
    random: StdRng,
    /// As `notify` keeps them: the watched directories by path, and the path each was watched by last.
    by_path: BTreeMap<PathBuf, usize>,
    paths: BTreeMap<usize, PathBuf>,
    handler: Handler,
    queue: VecDeque<Told>,
    overflow: bool,
    again: Vec<(Instant, Event)>,
    stalled_until: Instant,
    last_from: Option<(usize, PathBuf)>,
    added: Arc<Notify>,
    alive: Weak<()>,
}

impl Watching {
    fn is_watched(&self, directory: usize) -> bool {
        self.paths.contains_key(&directory)
    }

    /// All directories that are watched, by their number.
    pub(super) fn watched(&self) -> Vec<usize> {
        self.paths.keys().copied().collect()
    }

    /// Something happened.
    pub(super) fn tell(&mut self, directory: usize, name: Option<&[u8]>, deed: Deed) {
        if !self.is_watched(directory) {
            return;
        }
        let now = Instant::now();
        if self.one_in(self.way.lost) {
            return;
        }
        if self.one_in(self.way.stalls) {
            self.stalled_until = now + Duration::from_millis(self.random.random_range(0..60_000));
        }
        if self.queue.len() >= self.way.room {
            self.overflow = true;
        } else {
            let delay = Duration::from_micros(self.random.random_range(0..5000));
            let before = self.queue.back().map_or(now, |told| told.at);
            let at = (now + delay).max(before).max(self.stalled_until);
            self.queue.push_back(Told { at, directory, name: name.map(<[u8]>::to_vec), deed });
        }
        self.added.notify_one();
    }

    fn one_in(&mut self, rate: u32) -> bool {
        rate > 0 && !self.calm && self.random.random_range(0..rate) == 0
    }

    fn next_due(&self) -> Option<Instant> {
        let again = self.again.iter().map(|(at, _)| *at).min();
        self.queue.front().map(|told| told.at).into_iter().chain(again).min()
    }

    /// Hands over what has arrived.
    pub(super) fn deliver(&mut self) {
        let now = Instant::now();
        let mut gone = Vec::new();
        while self.queue.front().is_some_and(|told| told.at <= now) {
            let Some(told) = self.queue.pop_front() else { break };
            for event in self.events_of(&told, &mut gone) {
                if self.one_in(self.way.twice) {
                    let delay = Duration::from_millis(self.random.random_range(0..30_000));
                    self.again.push((now + delay, event.clone()));
                }
                (self.handler)(Ok(event));
            }
        }
        for path in gone {
            self.forget(&path);
        }
        if self.overflow && self.queue.is_empty() {
            self.overflow = false;
            (self.handler)(Ok(Event::new(EventKind::Other).set_flag(Flag::Rescan)));
        }
        for (_, event) in self.again.extract_if(.., |(at, _)| *at <= now) {
            (self.handler)(Ok(event));
        }
    }

    fn events_of(&mut self, told: &Told, gone: &mut Vec<PathBuf>) -> Vec<Event> {
        // Of one that nobody watches any more nothing is told.
        let Some(path) = self.paths.get(&told.directory) else { return Vec::new() };
        let path = match &told.name {
            Some(name) => path.join(std::ffi::OsStr::new(&*String::from_utf8_lossy(name))),
            None => path.clone(),
        };
        let leaves = matches!(told.deed, Deed::From { .. } | Deed::Removed { .. });
        if leaves && told.name.is_some() | matches!(told.deed, Deed::Removed { .. }) {
            gone.push(path.clone());
        }
        let kind = match told.deed {
            Deed::From { cookie } => {
                if told.name.is_some() {
                    self.last_from = Some((cookie, path.clone()));
                }
                EventKind::Modify(ModifyKind::Name(RenameMode::From))
            }
            Deed::To { .. } => EventKind::Modify(ModifyKind::Name(RenameMode::To)),
            Deed::Made { folder: true } => EventKind::Create(CreateKind::Folder),
            Deed::Made { folder: false } => EventKind::Create(CreateKind::File),
            Deed::Removed { folder: true } => EventKind::Remove(RemoveKind::Folder),
            Deed::Removed { folder: false } => EventKind::Remove(RemoveKind::File),
            Deed::Written => EventKind::Modify(ModifyKind::Data(DataChange::Any)),
            Deed::Closed => EventKind::Access(AccessKind::Close(AccessMode::Write)),
            Deed::Attributes => EventKind::Modify(ModifyKind::Metadata(MetadataKind::Any)),
        };
        let mut events = vec![Event::new(kind).add_path(path.clone())];
        if let Deed::To { cookie } = told.deed
            && let Some((_, from)) = self.last_from.take_if(|(other, _)| *other == cookie)
        {
            let both = EventKind::Modify(ModifyKind::Name(RenameMode::Both));
            events.push(Event::new(both).add_path(from).add_path(path));
        }
        events
    }

    /// What stood at a path is watched no more, nor what stands below it.
    fn forget(&mut self, path: &Path) {
        let Some(directory) = self.by_path.remove(path) else { return };
        self.paths.remove(&directory);
        let below: Vec<_> = self.paths.extract_if(.., |_, other| other.starts_with(path)).collect();
        for (_, path) in below {
            self.by_path.remove(&path);
        }
    }

    /// What is on its way arrives, and nothing is lost from now on.
    pub(super) fn calm(&mut self) {
        self.calm = true;
        let now = Instant::now();
        self.stalled_until = now;
        self.queue.iter_mut().for_each(|told| told.at = now);
        self.again.iter_mut().for_each(|(at, _)| *at = now);
        self.added.notify_one();
    }

    /// The storm goes on.
    pub(super) fn stir(&mut self) {
        self.calm = false;
    }

    /// Whether somebody still listens.
    pub(super) fn is_alive(&self) -> bool {
        self.alive.strong_count() > 0
    }
}

/// The watcher in the hands of an engine; ends with it.
struct SimKernel {
    disk: SimDisk,
    _alive: Arc<()>,
    _stop: DropGuard,
}

impl Kernel for SimKernel {
    fn watch(&mut self, directory: &Path) -> notify::Result<()> {
        // Found by its path, like any program finds it, and by whoever is faster.
        let found = self.disk.directory_at(directory);
        self.disk.with_watching(|watching| {
            let Some(watching) = watching else { return Ok(()) };
            let id = found.map_err(|error| {
                if error.kind() == std::io::ErrorKind::NotFound {
                    notify::Error::path_not_found()
                } else {
                    notify::Error::io(error)
                }
            })?;
            if !watching.is_watched(id) && watching.paths.len() >= watching.way.directories {
                return Err(notify::Error::new(ErrorKind::MaxFilesWatch));
            }
            watching.by_path.insert(directory.to_owned(), id);
            watching.paths.insert(id, directory.to_owned());
            Ok(())
        })
    }
}

/// What the kernel of a disk gives the engine that runs on it now.
pub(super) fn kernels(disk: SimDisk, way: Way, seed: u64) -> Kernels {
    Kernels::new(move |handler| {
        if way.none {
            return Err(notify::Error::new(ErrorKind::MaxFilesWatch));
        }
        let (added, stop, alive) =
            (Arc::new(Notify::new()), CancellationToken::new(), Arc::new(()));
        disk.set_watching(Watching {
            way,
            calm: false,
            random: StdRng::seed_from_u64(seed),
            by_path: BTreeMap::new(),
            paths: BTreeMap::new(),
            handler,
            queue: VecDeque::new(),
            overflow: false,
            again: Vec::new(),
            stalled_until: Instant::now(),
            last_from: None,
            added: added.clone(),
            alive: Arc::downgrade(&alive),
        });
        tokio::spawn(deliver(disk.clone(), added, stop.clone()));
        let disk = disk.clone();
        Ok(Box::new(SimKernel { disk, _alive: alive, _stop: stop.drop_guard() }))
    })
}

/// Hands hints over when they are due and nobody touches the disk.
async fn deliver(disk: SimDisk, added: Arc<Notify>, stop: CancellationToken) {
    while !stop.is_cancelled() {
        let next = disk.with_watching(|watching| {
            watching.and_then(|watching| {
                watching.deliver();
                watching.next_due()
            })
        });
        let due = async {
            match next {
                Some(at) => tokio::time::sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            () = stop.cancelled() => {}
            () = added.notified() => {}
            () = due => {}
        }
    }
}
