//! Listing directories in the order of the tree, if that is to be fast on a thread of its own, ahead of
//! the walk that compares what is there with the index.
//!
//! A directory comes in parts, each followed by what is below the directories in it. A directory is
//! watched before it is listed, and an entry is looked at after that: what happens to it later makes a
//! hint.

use std::collections::VecDeque;
use std::io;
use std::sync::mpsc::{Receiver, sync_channel};
use std::sync::{Mutex, PoisonError};
use std::thread::Scope;
use std::vec::IntoIter;

use cortex_shared::wire_path::{InvalidPath, WirePath};
use tokio_util::sync::CancellationToken;

use super::Directories;
use crate::root_dir::{DirHandle, DirIdentity, FileKind, Meta};
use crate::sync::ignore::Ignore;

/// Most entries of one part.
const PART_ENTRIES: usize = 256;
/// Entries that are handed to the walk at once: to wake it for each directory would cost more than many
/// are worth.
const BATCH_ENTRIES: usize = 1024;
/// What a directory counts for at least, since each is open: 32 of them make a batch.
const DIRECTORY_WEIGHT: usize = 32;
/// Batches that wait for the walk. With one on either side this bounds memory to some 5000 entries, and
/// open directories to 128 and the depth of the tree.
const BATCHES_AHEAD: usize = 2;

/// A name in a directory.
pub(super) struct Listed {
    pub(super) name: Vec<u8>,
    pub(super) path: Result<WirePath, InvalidPath>,
    pub(super) meta: io::Result<Meta>,
    /// Another file system is mounted there.
    pub(super) mounted: bool,
    /// The parts of this directory follow.
    pub(super) entered: bool,
}

/// What comes of a directory.
pub(super) enum Part {
    /// Some of its names, in their order.
    Entries(DirHandle, Vec<Listed>),
    /// There are no more.
    End,
    /// It cannot be listed.
    Failed(io::Error),
}

/// [`Directories`] that listing and walk share.
pub(super) trait SharedDirectories: Sync {
    fn enter(&self, directory: Option<&WirePath>, handle: &DirHandle);
    fn looks_after(&self, directory: &WirePath, identity: DirIdentity) -> bool;
}

impl SharedDirectories for Mutex<&mut (dyn Directories + Send)> {
    fn enter(&self, directory: Option<&WirePath>, handle: &DirHandle) {
        self.lock().unwrap_or_else(PoisonError::into_inner).enter(directory, handle);
    }

    fn looks_after(&self, directory: &WirePath, identity: DirIdentity) -> bool {
        let directories = self.lock().unwrap_or_else(PoisonError::into_inner);
        directories.looks_after(directory, identity)
    }
}

/// What a listing needs to know. Cheap to copy.
#[derive(Clone, Copy)]
pub(super) struct Rules<'a> {
    pub(super) directories: &'a dyn SharedDirectories,
    pub(super) ignore: &'a Ignore,
    /// The file system that is not left.
    pub(super) mount: (u64, u64),
    pub(super) cancel: &'a CancellationToken,
}

struct Frame {
    directory: Option<WirePath>,
    handle: DirHandle,
    names: IntoIter<Vec<u8>>,
    /// Directories of the last part.
    below: VecDeque<WirePath>,
}

/// Lists a directory, and all directories below it if it is to go deep.
pub(super) struct Lister<'a> {
    rules: Rules<'a>,
    deep: bool,
    next: Option<(Option<WirePath>, DirHandle)>,
    frames: Vec<Frame>,
}

impl<'a> Lister<'a> {
    pub(super) fn new(
        rules: Rules<'a>,
        directory: Option<WirePath>,
        handle: DirHandle,
        deep: bool,
    ) -> Self {
        Self { rules, deep, next: Some((directory, handle)), frames: Vec::new() }
    }

    /// The next part; `None` after the last one, or once it has been cancelled.
    fn next(&mut self) -> Option<Part> {
        loop {
            if self.rules.cancel.is_cancelled() {
                return None;
            }
            if let Some((directory, handle)) = self.next.take() {
                self.rules.directories.enter(directory.as_ref(), &handle);
                let names = match handle.names() {
                    Ok(names) => names.into_iter(),
                    Err(error) => return Some(Part::Failed(error)),
                };
                self.frames.push(Frame { directory, handle, names, below: VecDeque::new() });
            }
            let frame = self.frames.last_mut()?;
            if let Some(path) = frame.below.pop_front() {
                match frame.handle.open_dir(path.name()) {
                    Ok(handle) => self.next = Some((Some(path), handle)),
                    Err(error) => return Some(Part::Failed(error)),
                }
                continue;
            }
            let names = frame.names.by_ref().take(PART_ENTRIES);
            // Where a look takes long, a stop does not wait for all of them.
            let names = names.take_while(|_| !self.rules.cancel.is_cancelled());
            let (directory, handle) = (frame.directory.as_ref(), &frame.handle);
            let entries: Vec<Listed> = names
                .filter(|name| !self.rules.ignore.ignores_name(directory, name))
                .map(|name| self.rules.look_at(directory, handle, name, self.deep))
                .collect();
            if entries.is_empty() && frame.names.len() == 0 {
                self.frames.pop();
                return Some(Part::End);
            }
            let entered = entries.iter().filter(|entry| entry.entered);
            frame.below = entered.filter_map(|entry| entry.path.clone().ok()).collect();
            return Some(Part::Entries(frame.handle.clone(), entries));
        }
    }

    /// Lists on a thread of its own, which ends when nobody takes the parts any more.
    pub(super) fn ahead<'scope>(mut self, scope: &'scope Scope<'scope, '_>) -> Parts<'a>
    where
        'a: 'scope,
    {
        let (sender, receiver) = sync_channel(BATCHES_AHEAD);
        scope.spawn(move || {
            let mut more = true;
            while more {
                let (mut batch, mut entries) = (Vec::new(), 0);
                while more && entries < BATCH_ENTRIES {
                    let part = self.next();
                    more = part.is_some();
                    entries += match &part {
                        Some(Part::Entries(_, some)) => some.len().max(DIRECTORY_WEIGHT),
                        _ => 1,
                    };
                    batch.extend(part);
                }
                more &= sender.send(batch).is_ok();
            }
        });
        Parts::Ahead(receiver, Vec::new().into_iter())
    }
}

impl Rules<'_> {
    fn look_at(
        &self,
        directory: Option<&WirePath>,
        handle: &DirHandle,
        name: Vec<u8>,
        deep: bool,
    ) -> Listed {
        let path = match directory {
            Some(directory) => directory.join(&name),
            None => WirePath::new(name.clone()),
        };
        let meta = handle.lstat(&name);
        let is_dir = meta.as_ref().is_ok_and(|meta| meta.kind == FileKind::Dir);
        // What is mounted here may be gone tomorrow, with all its files.
        let mounted = is_dir && handle.mount_of(&name).is_ok_and(|mount| mount != self.mount);
        let entered = deep
            && is_dir
            && !mounted
            && path.as_ref().is_ok_and(|path| !self.ignore.ignores_entry(path, true));
        Listed { name, path, meta, mounted, entered }
    }
}

/// Where the parts come from.
pub(super) enum Parts<'a> {
    /// They are made when they are asked for.
    Here(Lister<'a>),
    /// From another thread.
    Ahead(Receiver<Vec<Part>>, IntoIter<Part>),
}

impl Parts<'_> {
    /// The next part; `None` after the last one, or once it has been cancelled.
    pub(super) fn next(&mut self) -> Option<Part> {
        match self {
            Self::Here(lister) => lister.next(),
            Self::Ahead(batches, parts) => loop {
                if let Some(part) = parts.next() {
                    return Some(part);
                }
                *parts = batches.recv().ok()?.into_iter();
            },
        }
    }
}
