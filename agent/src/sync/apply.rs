//! Changing the tree here.
//!
//! In batches: staged files get their attributes and are synced; then each takes its place by a
//! rename that replaces nothing unseen; then the touched directories are synced; then the index is
//! told, in one transaction. A crash in between leaves every path with its old or its new content
//! and at worst makes the next scan find what the index was not told yet.
//!
//! What is displaced is looked at after it has been displaced, when nobody can reach it by name any
//! more. If it is not what the plan was made for, it is somebody's newer work: it is put back, and
//! the plan for that path is dropped. Otherwise it goes to the trash.

mod late;
mod left_out;
#[cfg(test)]
mod tests;

pub use late::{LateWrites, rescue_late_writes};

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use cortex_shared::chunk::Cutter;
use cortex_shared::crash::crash_point;
use cortex_shared::entry::{Entry, File, same};
use cortex_shared::wire_path::WirePath;
use rustix::io::Errno;

use super::case;
use super::index::{Displaced, Index, IndexError, Seen, Stamp};
use super::plan::LocalChange;
use super::private_dir::PrivateDir;
use super::problem::{Code, Finding};
use super::scan::{Clock, Scope};
use crate::root_dir::{DirHandle, FileHandle, FileKind, Meta, RootDir};

/// Up to so many files or directories are synced one by one; for more the whole file system is.
const SYNC_ONE_BY_ONE: usize = 32;

/// A change, with what shall stand at its path if that has to be a new file or link.
#[derive(Debug)]
pub struct Staged {
    /// The change.
    pub change: LocalChange,
    /// Name in the stage.
    pub stage_name: Option<Vec<u8>>,
}

/// Whether a change needs a new file or link in the stage.
#[must_use]
pub fn needs_stage(change: &LocalChange) -> bool {
    match (&change.from, &change.to) {
        (Some(Entry::File(from)), Some(Entry::File(to))) => {
            change.aside.is_some() || from.content != to.content
        }
        (_, Some(Entry::File(_) | Entry::Link { .. })) => true,
        (_, Some(Entry::Dir) | None) => false,
    }
}

/// What an applier needs.
pub struct Applier<'a> {
    /// The tree.
    pub root: &'a RootDir,
    /// The stage and the trash.
    pub private: &'a PrivateDir,
    /// To be told.
    pub index: &'a mut Index,
    /// Whom new files belong to; `None` leaves them to the user the agent runs as.
    pub owner: Option<(u32, u32)>,
}

/// What became of a batch.
#[derive(Debug, Default)]
pub struct Report {
    /// Changes that were made.
    pub applied: usize,
    /// Files that went to the trash by them.
    pub displaced: usize,
    /// Directories that are gone at the hub and stay here, since they still hold what is not synced.
    pub kept: usize,
    /// Where something else was found than the plan was made for.
    pub dirty: BTreeSet<Option<WirePath>>,
    /// What people should know.
    pub findings: Vec<Finding>,
}

impl Report {
    /// The scopes to be scanned before planning again.
    pub fn scopes(&self) -> impl Iterator<Item = Scope> + '_ {
        self.dirty.iter().cloned().map(Scope::Children)
    }
}

enum Placed {
    Done,
    /// Not what the plan was made for.
    Surprise,
    /// The same, and somebody's newest work lies in the trash: the next look there puts it back,
    /// since it is not what was noted under its name.
    ToBeRescued,
    /// A directory that still holds what is not synced: it stays, and nothing more is to be done.
    Kept,
    /// Its directory does not exist: it could not be made, which has been said, or somebody has just
    /// removed it, which the kernel tells. Looking again at once would find nothing new.
    Blocked,
}

/// What a file or link of ours looked like when nobody else could reach it. If it looks otherwise
/// later, somebody has worked on it since.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Print {
    kind: FileKind,
    dev: u64,
    ino: u64,
    size: u64,
    mtime_ns: i64,
    /// A change of it leaves all the others as they are.
    executable: bool,
}

impl Print {
    fn of(meta: &Meta) -> Self {
        let Meta { kind, dev, ino, size, mtime_ns, .. } = *meta;
        Self { kind, dev, ino, size, mtime_ns, executable: meta.executable() }
    }
}

/// A change whose file has its attributes.
struct Prepared {
    staged: Staged,
    /// Open, if it is to be synced by itself.
    file: Option<FileHandle>,
    print: Option<Print>,
    /// What is about to be displaced, under its future name in the trash.
    displaces: Option<Displaced>,
}

/// A change that has been made, and the prints of what it left at its path and aside.
struct Made {
    change: LocalChange,
    print: Option<Print>,
    aside: Option<Print>,
}

/// Directories to be synced once, at the end of a batch.
#[derive(Default)]
struct Touched {
    directories: BTreeMap<Option<WirePath>, DirHandle>,
    too_many: bool,
}

impl Touched {
    fn add(&mut self, directory: Option<WirePath>, handle: &DirHandle) {
        if self.directories.len() < SYNC_ONE_BY_ONE {
            self.directories.entry(directory).or_insert_with(|| handle.clone());
        } else if !self.directories.contains_key(&directory) {
            self.too_many = true;
        }
    }

    fn sync(&self, root: &RootDir) -> io::Result<()> {
        if self.too_many {
            return root.top().sync_file_system();
        }
        self.directories.values().try_for_each(DirHandle::sync)
    }
}

impl Applier<'_> {
    /// Makes the changes of a batch, in order.
    ///
    /// # Errors
    /// If the index fails, or if nothing can be made durable; single paths that fail are in the
    /// report.
    pub fn apply(mut self, batch: Vec<Staged>) -> Result<Report, ApplyError> {
        let mut report = Report::default();
        let (made, untouched) = self.make(batch, &mut report)?;
        report.applied = made.len();
        crash_point("sync.apply.durable");
        self.record(made, &untouched, &mut report)?;
        crash_point("sync.apply.recorded");
        Ok(report)
    }

    /// Makes the changes and makes them durable. Also returns the names in the trash under which
    /// nothing was displaced.
    fn make(
        &mut self,
        batch: Vec<Staged>,
        report: &mut Report,
    ) -> Result<(Vec<Made>, Vec<Vec<u8>>), ApplyError> {
        let one_by_one = batch.iter().filter(|s| s.stage_name.is_some()).count() <= SYNC_ONE_BY_ONE;
        let mut ready = Vec::with_capacity(batch.len());
        let mut clock = None;
        for staged in batch {
            match self.prepare(&staged) {
                // Many open files at once would meet the limit of the process.
                Ok((file, print)) => {
                    let file = file.filter(|_| one_by_one);
                    let displaces = self.displaces(&staged, &mut clock)?;
                    ready.push(Prepared { staged, file, print, displaces });
                }
                Err(error) => self.give_up(staged, &error, report),
            }
        }
        crash_point("sync.apply.staged");
        self.sync_files(&ready, one_by_one)?;
        crash_point("sync.apply.synced");
        // Before it happens: a crash must not leave a file in the trash that nobody looks after.
        if ready.iter().any(|one| one.displaces.is_some()) {
            self.index.batch(|writer| {
                let mut notes = ready.iter().filter_map(|one| one.displaces.as_ref());
                notes.try_for_each(|file| writer.note_displaced(file))
            })?;
        }
        let mut touched = Touched::default();
        let mut made = Vec::with_capacity(ready.len());
        let mut untouched = Vec::new();
        for Prepared { staged, file, print, displaces } in ready {
            drop(file);
            let (mut stood, name) = (None, displaces.map(|file| file.name));
            let placed = self.place_anyway(&staged, &mut touched, &mut stood, name.as_deref());
            crash_point("sync.apply.placed");
            if let Some(name) = name {
                // What failed may have failed after that.
                let done = matches!(placed, Ok(Placed::Done | Placed::ToBeRescued));
                if done || !matches!(self.private.trash().try_lstat(&name), Ok(None)) {
                    report.displaced += 1;
                } else {
                    untouched.push(name);
                }
            }
            match placed {
                Ok(Placed::Done) => {}
                // Looking again would find nothing new.
                Ok(Placed::Surprise) if self.collides(&staged.change) => {
                    self.remove_staged(&staged);
                    report.findings.push(case::finding(&staged.change.path));
                    continue;
                }
                Ok(Placed::Surprise) => {
                    report.dirty.insert(staged.change.path.parent());
                    self.remove_staged(&staged);
                    continue;
                }
                Ok(Placed::ToBeRescued) => {
                    report.dirty.insert(staged.change.path.parent());
                    continue;
                }
                Ok(Placed::Blocked) => {
                    self.remove_staged(&staged);
                    continue;
                }
                Err(error) => {
                    self.give_up(staged, &error, report);
                    continue;
                }
                Ok(Placed::Kept) => {
                    let text = "kept: it still holds files that are not synced";
                    report.findings.push(Finding::at(&staged.change.path, Code::Kept, text));
                    report.kept += 1;
                    continue;
                }
            }
            let aside = stood.filter(|_| staged.change.aside.is_some());
            made.push(Made { change: staged.change, print: print.or(stood), aside });
        }
        touched.sync(self.root).map_err(ApplyError::Durability)?;
        Ok((made, untouched))
    }

    /// Whether something stands in the way of a change whose name differs only in case.
    fn collides(&self, change: &LocalChange) -> bool {
        let Ok((parent, leaf)) = self.root.parent_of(&change.path) else { return false };
        let names = [Some(leaf), change.aside.as_ref().map(WirePath::name)];
        names.into_iter().flatten().any(|name| parent.other_spelling(name).unwrap_or(false))
    }

    /// What a change is about to displace, as far as the index knows it. The clock is read once.
    fn displaces(
        &self,
        staged: &Staged,
        clock: &mut Option<Clock>,
    ) -> Result<Option<Displaced>, ApplyError> {
        let change = &staged.change;
        let is_displaced = match (&change.from, &change.to, &change.aside) {
            (Some(Entry::File(_)), Some(Entry::File(_)), None) => staged.stage_name.is_some(),
            (Some(Entry::File(_)), _, None) => true,
            _ => false,
        };
        if !is_displaced {
            return Ok(None);
        }
        let Some(stamp) = self.index.get(&change.path)?.and_then(|found| found.stamp) else {
            return Ok(None);
        };
        let clock = match clock {
            Some(clock) => clock,
            None => clock.insert(self.private.clock_of_readers().map_err(ApplyError::Trash)?),
        };
        let held = match &change.from {
            Some(Entry::File(file)) if clock.may_hide_a_write(stamp.mtime_ns) => Some(file.content),
            _ => None,
        };
        Ok(Some(Displaced {
            name: staged.stage_name.clone().unwrap_or_else(|| self.private.stage_name()),
            path: change.path.clone(),
            size: stamp.size,
            mtime_ns: stamp.mtime_ns,
            content: held,
        }))
    }

    /// Gives a staged file its attributes, before it takes its place: a crash must not leave a file
    /// that looks like an edit.
    fn prepare(&self, staged: &Staged) -> io::Result<(Option<FileHandle>, Option<Print>)> {
        let Some(stage_name) = &staged.stage_name else { return Ok((None, None)) };
        let stage = self.private.stage();
        if let Some((uid, gid)) = self.owner {
            stage.set_owner(stage_name, uid, gid)?;
        }
        let Some(Entry::File(entry)) = &staged.change.to else {
            return Ok((None, Some(Print::of(&stage.lstat(stage_name)?))));
        };
        let file = stage.open_for_writing(stage_name)?;
        // Other permission bits than the executable one are the user's own: they stay.
        let replaced = match &staged.change {
            LocalChange { from: Some(Entry::File(_)), aside: None, path, .. } => {
                let (parent, leaf) = self.root.parent_of(path)?;
                parent.try_lstat(leaf)?.map(|meta| meta.mode & 0o777)
            }
            _ => None,
        };
        let mode = match replaced {
            Some(mode) => mode,
            None => file.meta()?.mode & 0o777,
        };
        set_mode(&file, mode, entry.executable)?;
        file.set_mtime(entry.mtime_ns)?;
        let print = Print::of(&file.meta()?);
        Ok((Some(file), Some(print)))
    }

    fn sync_files(&self, ready: &[Prepared], one_by_one: bool) -> Result<(), ApplyError> {
        let result = if one_by_one {
            ready.iter().filter_map(|one| one.file.as_ref()).try_for_each(FileHandle::sync)
        } else {
            self.private.stage().sync_file_system()
        };
        result.map_err(ApplyError::Durability)
    }

    /// As [`Self::place`], also in a directory that its owner, who we are, has made read-only: that is
    /// meant for those who edit in it, and is not kept from others by this member's mode. It is
    /// read-only again afterwards.
    fn place_anyway(
        &mut self,
        staged: &Staged,
        touched: &mut Touched,
        stood: &mut Option<Print>,
        trash_name: Option<&[u8]>,
    ) -> Result<Placed, PlaceError> {
        let result = self.place(staged, touched, stood, trash_name);
        let denied = |error: &io::Error| error.kind() == io::ErrorKind::PermissionDenied;
        if !matches!(&result, Err(PlaceError::Io(error)) if denied(error)) {
            return result;
        }
        let Ok((parent, _)) = self.root.parent_of(&staged.change.path) else { return result };
        let Ok(meta) = parent.meta() else { return result };
        if meta.mode & 0o300 == 0o300 || parent.set_mode(meta.mode | 0o300).is_err() {
            return result;
        }
        let result = self.place(staged, touched, stood, trash_name);
        parent.set_mode(meta.mode)?;
        result
    }

    /// Makes one change; tells in `stood` what was found there. What is displaced gets the name in
    /// the trash.
    fn place(
        &mut self,
        staged: &Staged,
        touched: &mut Touched,
        stood: &mut Option<Print>,
        trash_name: Option<&[u8]>,
    ) -> Result<Placed, PlaceError> {
        let change = &staged.change;
        let directory = change.path.parent();
        let (parent, leaf) = match self.root.parent_of(&change.path) {
            Ok(found) => found,
            Err(error) if vanished(&error) => return Ok(Placed::Blocked),
            Err(error) => return Err(error.into()),
        };
        touched.add(directory.clone(), &parent);
        let Some(current) = self.expected(change, &parent, leaf)? else {
            return Ok(Placed::Surprise);
        };
        crash_point("sync.apply.checked");
        // What was changed just before it was read has to be read again at its new place.
        let is_known = |current: &Current| change.aside.is_none() || !current.stamp.racy;
        *stood = current.filter(is_known).map(|current| Print::of(&current.meta));
        let mut from = change.from.as_ref();
        if let Some(aside) = &change.aside {
            // Moves whatever stands there, so nothing can be lost.
            match parent.rename_new(leaf, &parent, aside.name()) {
                Err(error) if exists(&error) || vanished(&error) => return Ok(Placed::Surprise),
                result => result?,
            }
            from = None;
        }
        match (from, &change.to) {
            (None, None) => Ok(Placed::Done),
            (Some(Entry::Dir), None) => self.remove_directory(change, &parent, leaf),
            (Some(_), None) => self.displace(change, &parent, leaf, &current, trash_name),
            (None, Some(Entry::Dir)) => self.make_directory(&parent, leaf),
            (Some(Entry::Dir), Some(Entry::Dir)) => Ok(Placed::Done),
            (Some(_), Some(Entry::Dir)) => {
                match self.displace(change, &parent, leaf, &current, trash_name)? {
                    Placed::Done => self.make_directory(&parent, leaf),
                    undone => Ok(undone),
                }
            }
            (Some(Entry::File(_)), Some(Entry::File(to))) if staged.stage_name.is_none() => {
                match set_executable(&parent, leaf, &current, to)? {
                    Some(set) => {
                        *stood = Some(Print::of(&set));
                        Ok(Placed::Done)
                    }
                    None => Ok(Placed::Surprise),
                }
            }
            (from, Some(_)) => {
                let stage_name = staged.stage_name.as_deref().ok_or(io::ErrorKind::InvalidInput)?;
                match from {
                    None => self.place_new(stage_name, &parent, leaf),
                    Some(Entry::Dir) => match self.remove_directory(change, &parent, leaf)? {
                        Placed::Done => self.place_new(stage_name, &parent, leaf),
                        Placed::Kept => Err(PlaceError::Io(io::Error::new(
                            io::ErrorKind::DirectoryNotEmpty,
                            "a directory that still holds files that are not synced is in its place",
                        ))),
                        undone => Ok(undone),
                    },
                    Some(_) => self.replace(stage_name, change, &parent, leaf, &current),
                }
            }
        }
    }

    /// What stands at the path, if that is what the plan was made for; the inner `Option` is `None`
    /// for nothing.
    fn expected(
        &self,
        change: &LocalChange,
        parent: &DirHandle,
        leaf: &[u8],
    ) -> Result<Option<Option<Current>>, PlaceError> {
        let meta = parent.try_lstat(leaf)?;
        Ok(match (&change.from, meta) {
            (None, None) => Some(None),
            (Some(Entry::Dir), Some(meta)) if meta.kind == FileKind::Dir => {
                Some(Some(Current { meta, stamp: Stamp::new(&meta, false) }))
            }
            (Some(Entry::File(_) | Entry::Link { .. }), Some(meta)) => {
                // The index may know of a newer edit than the plan does.
                let found = self.index.get(&change.path)?.filter(|found| {
                    !found.row.unknown && same(found.row.local.as_ref(), change.from.as_ref())
                });
                found
                    .and_then(|found| found.stamp)
                    .filter(|stamp| *stamp == Stamp::new(&meta, stamp.racy))
                    .map(|stamp| Some(Current { meta, stamp }))
            }
            _ => None,
        })
    }

    fn make_directory(&self, parent: &DirHandle, leaf: &[u8]) -> Result<Placed, PlaceError> {
        match parent.make_dir(leaf, 0o777) {
            Err(error) if exists(&error) => return Ok(Placed::Surprise),
            result => result?,
        }
        if let Some((uid, gid)) = self.owner {
            parent.set_owner(leaf, uid, gid)?;
        }
        Ok(Placed::Done)
    }

    fn place_new(
        &self,
        stage_name: &[u8],
        parent: &DirHandle,
        leaf: &[u8],
    ) -> Result<Placed, PlaceError> {
        match self.private.stage().rename_new(stage_name, parent, leaf) {
            Err(error) if exists(&error) || vanished(&error) => Ok(Placed::Surprise),
            result => {
                result?;
                Ok(Placed::Done)
            }
        }
    }

    /// Takes a file or link away.
    fn displace(
        &self,
        change: &LocalChange,
        parent: &DirHandle,
        leaf: &[u8],
        current: &Option<Current>,
        trash_name: Option<&[u8]>,
    ) -> Result<Placed, PlaceError> {
        let trash = self.private.trash();
        let name = trash_name.map_or_else(|| self.private.stage_name(), <[u8]>::to_vec);
        match parent.rename_new(leaf, trash, &name) {
            Err(error) if vanished(&error) => return Ok(Placed::Surprise),
            result => result?,
        }
        crash_point("sync.apply.displaced");
        match is_still(trash, &name, change, current) {
            Ok(true) => return Ok(Placed::Done),
            Ok(false) => {}
            // Whatever it is: the next look there tells.
            Err(error) => return Ok(rescued_later(change, &error)),
        }
        match trash.rename_new(&name, parent, leaf) {
            // Somebody has put yet another file there meanwhile, or taken the directory away.
            Err(error) if exists(&error) || vanished(&error) => Ok(Placed::ToBeRescued),
            Err(error) => Ok(rescued_later(change, &error)),
            Ok(()) => Ok(Placed::Surprise),
        }
    }

    /// Puts a staged file or link in the place of another in one step.
    fn replace(
        &self,
        stage_name: &[u8],
        change: &LocalChange,
        parent: &DirHandle,
        leaf: &[u8],
        current: &Option<Current>,
    ) -> Result<Placed, PlaceError> {
        let stage = self.private.stage();
        let ours = stage.lstat(stage_name)?;
        match stage.exchange(stage_name, parent, leaf) {
            Ok(()) => {}
            Err(error) if vanished(&error) => return Ok(Placed::Surprise),
            Err(error) if Errno::from_io_error(&error) == Some(Errno::INVAL) => {
                // No exchange on this file system: for an instant nothing stands there.
                return match self.displace(change, parent, leaf, current, Some(stage_name))? {
                    Placed::Done => self.place_new(stage_name, parent, leaf),
                    undone => {
                        // Still ours.
                        stage.remove_file(stage_name)?;
                        Ok(undone)
                    }
                };
            }
            Err(error) => return Err(error.into()),
        }
        crash_point("sync.apply.exchanged");
        // From here on what is in the stage is not ours to remove, whatever fails.
        self.settle_exchanged(stage_name, &ours, change, parent, leaf, current).or_else(|error| {
            if let Err(error) = self.private.discard(stage_name) {
                tracing::warn!(%error, "a displaced file lies in the stage until the next look");
            }
            Ok(rescued_later(change, &error))
        })
    }

    /// Looks at what a staged file has displaced into the stage, and puts it back or into the trash.
    fn settle_exchanged(
        &self,
        stage_name: &[u8],
        ours: &Meta,
        change: &LocalChange,
        parent: &DirHandle,
        leaf: &[u8],
        current: &Option<Current>,
    ) -> io::Result<Placed> {
        let stage = self.private.stage();
        if is_still(stage, stage_name, change, current)? {
            self.private.discard(stage_name)?;
            return Ok(Placed::Done);
        }
        stage.exchange(stage_name, parent, leaf)?;
        if stage.lstat(stage_name)?.ino != ours.ino {
            // Somebody wrote a third time, between the two exchanges. That file would be removed as
            // ours: it is kept.
            self.private.discard(stage_name)?;
            return Ok(Placed::ToBeRescued);
        }
        Ok(Placed::Surprise)
    }

    /// Tells the index what stands there now, with new stamps: our own renames changed the old ones.
    fn record(
        &mut self,
        made: Vec<Made>,
        untouched: &[Vec<u8>],
        report: &mut Report,
    ) -> Result<(), ApplyError> {
        let clock = self.private.clock().map_err(ApplyError::Durability)?;
        let root = self.root;
        self.index.batch(|writer| {
            untouched.iter().try_for_each(|name| writer.forget_displaced(name))?;
            for Made { change, print, aside: aside_print } in made {
                let parent = root.parent_of(&change.path).map(|(parent, _)| parent);
                let stamp_of = |path: &WirePath| {
                    let meta = parent.as_ref().ok()?.lstat(path.name()).ok()?;
                    Some((meta, Stamp::new(&meta, clock.is_racy(&meta))))
                };
                let mut see = |path: &WirePath, entry: Option<&Entry>, print| match entry {
                    None => writer.set_local(path, Seen::Absent),
                    Some(Entry::Dir) => writer.set_local(path, Seen::Entry(Entry::Dir, None)),
                    Some(entry) => match stamp_of(path) {
                        Some((meta, stamp)) if print == Some(Print::of(&meta)) => {
                            writer.set_local(path, Seen::Entry(entry.clone(), Some(stamp)))
                        }
                        // Somebody was there already.
                        _ => {
                            report.dirty.insert(path.parent());
                            writer.set_local(path, Seen::Unknown)
                        }
                    },
                };
                if let Some(aside) = &change.aside {
                    see(aside, change.from.as_ref(), aside_print)?;
                }
                see(&change.path, change.to.as_ref(), print)?;
            }
            Ok(())
        })?;
        Ok(())
    }

    fn give_up(&self, staged: Staged, error: &impl ToString, report: &mut Report) {
        self.remove_staged(&staged);
        report.findings.push(Finding::at(
            &staged.change.path,
            Code::ApplyFailed,
            error.to_string(),
        ));
    }

    fn remove_staged(&self, staged: &Staged) {
        if let Some(name) = &staged.stage_name
            && let Err(error) = self.private.stage().remove_file(name)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(%error, "cannot remove a staged file; the next start does");
        }
    }
}

/// Why a batch failed as a whole.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// The index refused.
    #[error(transparent)]
    Index(#[from] IndexError),
    /// What was written cannot be made to survive power loss, so nothing may be claimed of it.
    #[error("cannot make changes durable")]
    Durability(#[source] io::Error),
    /// The trash cannot be read.
    #[error("cannot look into the trash")]
    Trash(#[source] io::Error),
}

#[derive(Debug, thiserror::Error)]
enum PlaceError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error(transparent)]
    Index(#[from] IndexError),
}

impl From<io::ErrorKind> for PlaceError {
    fn from(kind: io::ErrorKind) -> Self {
        Self::Io(kind.into())
    }
}

#[derive(Clone, Copy)]
struct Current {
    meta: Meta,
    stamp: Stamp,
}

fn exists(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::AlreadyExists
}

fn vanished(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
        || Errno::from_io_error(error) == Some(Errno::LOOP)
}

/// What was displaced lies aside, and something failed before it was known what it is.
fn rescued_later(change: &LocalChange, error: &io::Error) -> Placed {
    tracing::warn!(path = %change.path, %error, "a displaced file is looked at later");
    Placed::ToBeRescued
}

/// Removes a directory if it is empty.
fn remove_empty(parent: &DirHandle, leaf: &[u8]) -> Result<Placed, PlaceError> {
    match parent.remove_dir(leaf) {
        Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => Ok(Placed::Kept),
        Err(error) if vanished(&error) => Ok(Placed::Surprise),
        result => {
            result?;
            Ok(Placed::Done)
        }
    }
}

/// Whether what has been displaced is what stood there when it was planned.
fn is_still(
    directory: &DirHandle,
    name: &[u8],
    change: &LocalChange,
    current: &Option<Current>,
) -> io::Result<bool> {
    let meta = directory.lstat(name)?;
    let Some(current) = current else { return Ok(false) };
    if !current.stamp.fits_renamed(&meta) || current.meta.kind != meta.kind {
        return Ok(false);
    }
    match &change.from {
        // The stamp alone proves nothing here.
        Some(Entry::File(file)) if current.stamp.racy => {
            let cut = Cutter::new().cut(directory.open_file(name)?.reader(), |_, _| {
                Ok::<_, std::convert::Infallible>(())
            });
            Ok(cut.is_ok_and(|cut| cut.content == file.content))
        }
        _ => Ok(true),
    }
}

fn set_mode(file: &FileHandle, mode: u32, executable: bool) -> io::Result<()> {
    // Whoever may read may execute.
    let mode = if executable { mode | ((mode & 0o444) >> 2) | 0o100 } else { mode & !0o111 };
    file.set_mode(mode)
}

/// Sets whether a file may be executed; what it looks like then, or `None` if it is another one.
fn set_executable(
    parent: &DirHandle,
    leaf: &[u8],
    current: &Option<Current>,
    to: &File,
) -> Result<Option<Meta>, PlaceError> {
    let file = parent.open_file(leaf)?;
    let meta = file.meta()?;
    if current.is_none_or(|current| current.meta != meta) {
        return Ok(None);
    }
    set_mode(&file, meta.mode & 0o777, to.executable)?;
    // As the file system shows it, which may be another way than it was set.
    let set = file.meta()?;
    file.sync()?;
    Ok(Some(set))
}
