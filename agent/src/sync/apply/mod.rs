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

mod attributes;
mod displace;
mod late;
mod left_out;
mod place;
mod prepare;
mod record;
#[cfg(test)]
mod tests;

pub use attributes::Attributes;
pub use late::{LateWrites, rescue_late_writes};
pub(super) use place::make_owned;
pub use record::Print;

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use cortex_shared::crash::crash_point;
use cortex_shared::entry::Entry;
use cortex_shared::wire_path::WirePath;
use rustix::io::Errno;

use super::case;
use super::index::{Index, IndexError};
use super::plan::LocalChange;
use super::private_dir::PrivateDir;
use super::problem::{Code, Finding};
use super::scan::Scope;
use crate::root_dir::{DirHandle, Parents, RootDir};
use place::Placed;
use prepare::Prepared;
use record::Made;

/// Up to so many files or directories are synced one by one; for more the whole file system is.
const SYNC_ONE_BY_ONE: usize = 32;

/// A change, with what shall stand at its path if that has to be a new file or link.
#[derive(Debug)]
pub struct Staged {
    /// The change.
    pub change: LocalChange,
    /// Name in the stage.
    pub stage_name: Option<Vec<u8>>,
    /// What that looks like, if it has its attributes already.
    pub print: Option<Print>,
}

impl Staged {
    /// A change with what came for it into the stage.
    #[must_use]
    pub fn new(change: LocalChange, stage_name: Option<Vec<u8>>) -> Self {
        Self { change, stage_name, print: None }
    }
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

/// The directories of a batch, which are synced once, at its end.
struct Touched {
    parents: Parents,
    directories: BTreeMap<Option<WirePath>, DirHandle>,
    too_many: bool,
}

impl Touched {
    fn new(parents: Parents) -> Self {
        Self { parents, directories: BTreeMap::new(), too_many: false }
    }

    /// The directory in which a change is about to be made.
    fn parent_of<'a>(&mut self, change: &'a LocalChange) -> io::Result<(DirHandle, &'a [u8])> {
        // What is taken away has to be where the plan says: somebody may have moved the directory since the
        // change before. What is new is looked at under its path afterwards.
        if change.from.is_some() || change.to == Some(Entry::Dir) {
            self.parents.forget();
        }
        let (parent, leaf) = self.parents.of(&change.path)?;
        if !self.too_many {
            self.add(change.path.parent(), &parent);
        }
        Ok((parent, leaf))
    }

    fn add(&mut self, directory: Option<WirePath>, handle: &DirHandle) {
        if let Some(known) = self.directories.get(&directory) {
            // Another one may stand there by now, and both were changed.
            let is_same = known.is_same_handle(handle)
                || matches!((known.identity(), handle.identity()), (Ok(a), Ok(b)) if a == b);
            self.too_many |= !is_same;
        } else if self.directories.len() < SYNC_ONE_BY_ONE {
            self.directories.insert(directory, handle.clone());
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

    /// Makes staged files durable and notes what they will displace. What failed is in `ready`, too.
    fn make_ready(
        &mut self,
        batch: Vec<Staged>,
        ready: &mut Vec<Prepared>,
        report: &mut Report,
    ) -> Result<(), ApplyError> {
        let one_by_one = batch.iter().filter(|s| s.stage_name.is_some()).count() <= SYNC_ONE_BY_ONE;
        for staged in batch {
            match self.prepare(&staged, one_by_one) {
                Ok((file, print)) => ready.push(Prepared { staged, file, print, displaces: None }),
                Err(error) => self.give_up(staged, &error, report),
            }
        }
        let mut clock = None;
        for one in ready.iter_mut() {
            one.displaces = self.displaces(&one.staged, &mut clock)?;
        }
        crash_point("sync.apply.staged");
        self.sync_files(ready, one_by_one)?;
        crash_point("sync.apply.synced");
        // Before it happens: a crash must not leave a file in the trash that nobody looks after.
        if ready.iter().any(|one| one.displaces.is_some()) {
            self.index.batch(|writer| {
                let mut notes = ready.iter().filter_map(|one| one.displaces.as_ref());
                notes.try_for_each(|file| writer.note_displaced(file))
            })?;
        }
        Ok(())
    }

    /// Makes the changes and makes them durable. Also returns the names in the trash under which
    /// nothing was displaced.
    fn make(
        &mut self,
        batch: Vec<Staged>,
        report: &mut Report,
    ) -> Result<(Vec<Made>, Vec<Vec<u8>>), ApplyError> {
        let mut ready = Vec::with_capacity(batch.len());
        if let Err(error) = self.make_ready(batch, &mut ready, report) {
            // Nothing took its place, and whoever tries again has it anew.
            ready.iter().for_each(|one| self.remove_staged(&one.staged));
            return Err(error);
        }
        let mut touched = Touched::new(self.root.parents());
        let mut made = Vec::with_capacity(ready.len());
        let mut untouched = Vec::new();
        for Prepared { staged, file, print, displaces } in ready {
            drop(file);
            let (mut stood, name) = (None, displaces.map(|file| file.name));
            let placed = self.place_anyway(&staged, &mut touched, &mut stood, name.as_deref());
            crash_point("sync.apply.placed");
            if concerns_directory(&staged.change) {
                touched.parents.forget();
            }
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

fn concerns_directory(change: &LocalChange) -> bool {
    [&change.from, &change.to].into_iter().any(|entry| *entry == Some(Entry::Dir))
}

fn exists(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::AlreadyExists
}

fn vanished(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
        || Errno::from_io_error(error) == Some(Errno::LOOP)
}
