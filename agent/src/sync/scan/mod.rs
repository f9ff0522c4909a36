//! Looking at the tree here: a sorted walk joined with the index.
//!
//! The walk and the index come in the same order, so memory does not grow with the number of files.
//! Links are never followed, other file systems never entered, sockets, pipes and devices passed
//! over. A file whose stamp is unchanged is not read. What cannot be read is unknown, never absent.
//! Runs on a blocking thread and writes what it finds in batches; after a crash the next scan finds
//! the rest.

mod hash;
mod listing;
#[cfg(test)]
mod tests;

use cortex_shared::chunk::Recipe;
use cortex_shared::entry::{Entry, MAX_LINK_TARGET_BYTES};
use cortex_shared::wire_path::WirePath;
use std::collections::{HashMap, VecDeque};
use std::io;
use std::sync::Mutex;
use std::thread;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::ignore::Ignore;
use super::index::{Index, IndexError, IndexRow, Seen, Stamp};
use super::problem::{Code, Finding};
use crate::root_dir::{DirHandle, DirIdentity, FileKind, Meta, RootDir};
use hash::{Hashed, Job, Outcome, Pool};
use listing::{Listed, Lister, Part, Parts, Rules};

/// Rows written in one transaction.
const BATCH_ROWS: usize = 512;
/// Rows read from the index at once.
const PAGE_ROWS: u32 = 1024;
/// Most findings of one scan that are told.
const MAX_FINDINGS: usize = 200;
/// Most files and most directories of one scan that are named for another look.
const MAX_REVISITS: usize = 256;

const DAY_NS: i64 = 24 * 3600 * 1_000_000_000;

/// The file system's own clock: times of files are compared with nothing else.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    /// What the file system took for now when the scan began, in nanoseconds.
    pub now_ns: i64,
    /// The shortest time in which two changes surely get different times, in nanoseconds.
    pub tick_ns: i64,
}

impl Clock {
    /// Whether a file was changed so recently that another change could look the same.
    #[must_use]
    pub fn is_racy(&self, meta: &Meta) -> bool {
        // The other time is whatever somebody says, next year as well.
        meta.ctime_ns.saturating_add(self.tick_ns) > self.now_ns
    }

    /// Whether a write from now on, within a day, could leave the modification time as it is: one of the last
    /// tick, or one still to come, which somebody has set (other members' clocks go ahead as well).
    #[must_use]
    pub fn may_hide_a_write(&self, mtime_ns: i64) -> bool {
        let ahead = mtime_ns.saturating_sub(self.now_ns);
        self.tick_ns > 0 && ahead > -self.tick_ns && ahead <= DAY_NS
    }
}

/// What to look at.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Scope {
    /// A directory (the root for `None`) and everything below it.
    Tree(Option<WirePath>),
    /// What is directly in a directory, and everything below directories that are new there.
    Children(Option<WirePath>),
}

impl Scope {
    /// The directory.
    #[must_use]
    pub fn directory(&self) -> Option<&WirePath> {
        match self {
            Self::Tree(directory) | Self::Children(directory) => directory.as_ref(),
        }
    }

    /// Whether a scan of this scope looks at `path` (below new directories it looks further).
    #[must_use]
    pub fn covers(&self, path: &WirePath) -> bool {
        match self {
            Self::Tree(None) => true,
            Self::Tree(Some(directory)) => path == directory || path.is_below(directory),
            Self::Children(directory) => path.parent() == *directory,
        }
    }
}

/// A file that was changing whenever it was read.
#[derive(Clone, Copy, Debug)]
pub struct HotFile {
    /// It is left alone until then: reading it over and over would only delay everything else.
    pub until: Instant,
    /// It has been changing for so long that its unchanged beginning is taken instead, if it has one.
    pub prefix: bool,
}

/// Who watches directories between scans.
pub trait Directories {
    /// A directory (the root for `None`) is about to be listed.
    fn enter(&mut self, directory: Option<&WirePath>, handle: &DirHandle);

    /// Whether exactly this directory is looked after under this name. If not, it is read whole,
    /// even if one of this name is known: changes below it would have made no hint.
    fn looks_after(&self, directory: &WirePath, identity: DirIdentity) -> bool;
}

/// What a scan needs.
pub struct Scanner<'a> {
    /// The tree.
    pub root: &'a RootDir,
    /// What is known of it.
    pub index: &'a mut Index,
    /// What is left out.
    pub ignore: &'a Ignore,
    /// The file system's clock.
    pub clock: Clock,
    /// Files that are being written.
    pub hot: &'a HashMap<WirePath, HotFile>,
    /// Told of each directory before it is listed, so that it can be watched from then on.
    pub directories: &'a mut (dyn Directories + Send),
    /// Ends the scan early.
    pub cancel: &'a CancellationToken,
}

/// What a scan found besides what it wrote to the index.
#[derive(Debug, Default)]
pub struct Report {
    /// Paths whose row was written.
    pub changed: u64,
    /// Files that were changing while they were read, for another look later.
    pub unstable: Vec<WirePath>,
    /// Where files were changed just before they were read, for another look after a tick.
    pub racy: Vec<Scope>,
    /// What people should know.
    pub findings: Vec<Finding>,
    /// It was cancelled before its end: absence of anything has not been concluded.
    pub cancelled: bool,
}

/// Why a scan failed as a whole.
#[derive(Debug, thiserror::Error)]
pub enum ScanError {
    /// The index refused.
    #[error(transparent)]
    Index(#[from] IndexError),
    /// The directory to look at cannot be read.
    #[error("cannot read the root directory")]
    Root(#[source] io::Error),
}

impl Scanner<'_> {
    /// Looks at `scope`, or further up if its directory is not known or gone, and brings the index up to date;
    /// reads files on threads of its own, or by itself.
    ///
    /// # Errors
    /// If the index fails or the root cannot be read. Anything else concerns single paths and is in
    /// the report.
    pub fn scan(self, scope: &Scope, threads: bool) -> Result<Report, ScanError> {
        let Self { root, index, ignore, clock, hot, directories, cancel } = self;
        let mount = root.top().mount().map_err(ScanError::Root)?;
        let opened = match scope.directory() {
            None => Some(root.open_dir(None).map_err(ScanError::Root)?),
            Some(path) if is_known(index, path)? => root.open_dir(Some(path)).ok(),
            Some(_) => None,
        };
        let Some(handle) = opened else {
            // It vanished since, or is new: what happened is seen from further up. What is below a directory is
            // never known without it, or it would be taken for what keeps the directory alive.
            let above = Scope::Children(scope.directory().and_then(WirePath::parent));
            let scanner = Self { root, index, ignore, clock, hot, directories, cancel };
            return scanner.scan(&above, threads);
        };
        let directory = scope.directory().cloned();
        let directories = Mutex::new(directories);
        let rules = Rules { directories: &directories, ignore, mount, cancel };
        let deep = matches!(scope, Scope::Tree(_));
        let lister = Lister::new(rules, directory.clone(), handle, deep);
        Pool::run(clock, cancel, threads, |pool| {
            thread::scope(|scope| {
                // A single directory is not worth a thread.
                let ahead = threads && deep;
                let parts = if ahead { lister.ahead(scope) } else { Parts::Here(lister) };
                let (writes, report) = Default::default();
                let mut walk = Walk { index, rules, clock, hot, pool, parts, writes, report };
                walk.run(directory.as_ref(), deep)?;
                Ok(walk.report)
            })
        })
    }
}

/// Whether a directory is known to stand at a path.
fn is_known(index: &Index, path: &WirePath) -> Result<bool, IndexError> {
    let found = index.get(path)?;
    Ok(found.is_some_and(|found| !found.row.unknown && found.row.local == Some(Entry::Dir)))
}

enum Write {
    Seen(WirePath, Seen),
    AbsentBelow(WirePath),
}

/// Rows of the index in the order of the walk.
struct Cursor {
    page: VecDeque<IndexRow>,
    /// Where the next page is read: below this directory, after the last row. `None` if there is
    /// none, since the rows given are all.
    more: Option<Option<WirePath>>,
    last: Option<WirePath>,
}

impl Cursor {
    fn tree(directory: Option<&WirePath>) -> Self {
        Self { page: VecDeque::new(), more: Some(directory.cloned()), last: None }
    }

    fn rows(rows: Vec<IndexRow>) -> Self {
        Self { page: rows.into(), more: None, last: None }
    }

    fn peek(&mut self, index: &Index) -> Result<Option<&IndexRow>, IndexError> {
        if self.page.is_empty()
            && let Some(directory) = &self.more
        {
            self.page = index.below(directory.as_ref(), self.last.as_ref(), PAGE_ROWS)?.into();
            match self.page.back() {
                Some(row) => self.last = Some(row.row.path.clone()),
                None => self.more = None,
            }
        }
        Ok(self.page.front())
    }

    fn next(&mut self, index: &Index) -> Result<Option<IndexRow>, IndexError> {
        self.peek(index)?;
        Ok(self.page.pop_front())
    }
}

struct Walk<'a, 'b> {
    index: &'b mut Index,
    rules: Rules<'b>,
    clock: Clock,
    hot: &'b HashMap<WirePath, HotFile>,
    pool: &'b mut Pool<'a>,
    parts: Parts<'b>,
    writes: Vec<Write>,
    report: Report,
}

impl Walk<'_, '_> {
    fn run(&mut self, directory: Option<&WirePath>, deep: bool) -> Result<(), ScanError> {
        let mut cursor = match deep {
            true => Cursor::tree(directory),
            false => Cursor::rows(self.index.children(directory)?),
        };
        if let Err(error) = self.walk(directory, &mut cursor, deep)? {
            let Some(path) = directory else { return Err(ScanError::Root(error)) };
            self.unreadable(path, &error);
        }
        let (mut hashed, report) = (Vec::new(), &mut self.report);
        self.pool.finish(|result| hashed.push(result));
        report.cancelled = self.rules.cancel.is_cancelled();
        for result in hashed {
            self.take(result);
        }
        self.flush()?;
        Ok(())
    }

    /// Walks one directory, whose parts come next. The inner error is that of listing it; nothing has
    /// been concluded then.
    fn walk(
        &mut self,
        directory: Option<&WirePath>,
        cursor: &mut Cursor,
        deep: bool,
    ) -> Result<Result<(), io::Error>, ScanError> {
        loop {
            let (handle, entries) = match self.parts.next() {
                Some(Part::Entries(handle, entries)) => (handle, entries),
                Some(Part::Failed(error)) => return Ok(Err(error)),
                Some(Part::End) => break,
                None if self.rules.cancel.is_cancelled() => return Ok(Ok(())),
                // Whoever lists has panicked: nothing is known of the rest.
                None => {
                    let error = io::Error::other("the listing ended before its end");
                    return Err(ScanError::Root(error));
                }
            };
            for entry in entries {
                if self.rules.cancel.is_cancelled() {
                    return Ok(Ok(()));
                }
                self.meet(directory, entry, &handle, cursor, deep)?;
                if self.writes.len() >= BATCH_ROWS {
                    self.flush()?;
                }
            }
        }
        if !self.rules.cancel.is_cancelled() {
            self.absent_rest(directory, cursor, deep)?;
        }
        Ok(Ok(()))
    }

    /// Brings an entry together with its row.
    fn meet(
        &mut self,
        directory: Option<&WirePath>,
        entry: Listed,
        handle: &DirHandle,
        cursor: &mut Cursor,
        deep: bool,
    ) -> Result<(), ScanError> {
        let path = match &entry.path {
            Ok(path) => path.clone(),
            Err(error) => {
                self.find(Finding {
                    path: directory.cloned(),
                    code: Code::PathTooLong,
                    message: format!("{}: {error}", entry.name.escape_ascii()),
                });
                return Ok(());
            }
        };
        self.absent_before(&path, cursor, deep)?;
        let row = match cursor.peek(self.index)? {
            Some(found) if found.row.path == path => cursor.next(self.index)?,
            _ => None,
        };
        self.visit(path, entry, row, handle, cursor, deep)
    }

    fn visit(
        &mut self,
        path: WirePath,
        entry: Listed,
        row: Option<IndexRow>,
        handle: &DirHandle,
        cursor: &mut Cursor,
        deep: bool,
    ) -> Result<(), ScanError> {
        let Listed { name, meta, mounted, entered, .. } = entry;
        let meta = match meta {
            Ok(meta) => meta,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                self.absent(path, row, deep);
                return Ok(());
            }
            Err(error) => {
                self.unreadable(&path, &error);
                return self.skip_below(&path, cursor);
            }
        };
        if self.rules.ignore.ignores_entry(&path, meta.kind == FileKind::Dir) {
            // What stood there before may have been something that is not left out.
            self.absent(path.clone(), row, deep);
            return self.skip_below(&path, cursor);
        }
        let local =
            row.as_ref().filter(|row| !row.row.unknown).and_then(|row| row.row.local.as_ref());
        let was_dir = row.as_ref().is_some_and(|row| matches!(row.row.local, Some(Entry::Dir)));
        if was_dir && meta.kind != FileKind::Dir && !deep {
            self.writes.push(Write::AbsentBelow(path.clone()));
        }
        match meta.kind {
            FileKind::Dir if mounted => {
                self.find(Finding::at(
                    &path,
                    Code::OtherFileSystem,
                    "another file system is mounted here",
                ));
                if row.is_some() {
                    self.writes.push(Write::Seen(path.clone(), Seen::Unknown));
                }
                self.skip_below(&path, cursor)?;
            }
            FileKind::Dir => {
                let known = local.is_some_and(Entry::is_dir);
                if !known {
                    let stamp = Stamp::new(&meta, false);
                    self.see(path.clone(), Seen::Entry(Entry::Dir, Some(stamp)));
                }
                // A directory that was unknown was not looked into either. One that was made by us,
                // or made again under its old name, is known but not watched.
                let looked_after = |it| self.rules.directories.looks_after(&path, it);
                if entered {
                    let listed = self.walk(Some(&path), cursor, true)?;
                    self.listed(&path, listed, cursor)?;
                } else if !known || !handle.identity_of(&name).is_ok_and(looked_after) {
                    let listed = self.walk_anew(&path, &name, handle)?;
                    self.listed(&path, listed, cursor)?;
                }
            }
            FileKind::File => {
                let unchanged = local.is_some_and(|entry| matches!(entry, Entry::File(_)))
                    && row
                        .as_ref()
                        .and_then(|row| row.stamp)
                        .is_some_and(|stamp| stamp.proves_unchanged(&meta));
                let hot = self.hot.get(&path);
                if !unchanged && hot.is_none_or(|hot| hot.until <= Instant::now()) {
                    let prefix = hot.is_some_and(|hot| hot.prefix);
                    let known = row.as_ref().and_then(|row| row.stamp);
                    let earlier = match row.and_then(|row| row.row.local) {
                        Some(Entry::File(file)) => file.recipe,
                        _ => Recipe::default(),
                    };
                    let mut results = Vec::new();
                    let (parent, bytes) = (handle.clone(), meta.size);
                    let job = Job { path, parent, bytes, prefix, known, earlier };
                    self.pool.submit(job, |result| results.push(result));
                    for result in results {
                        self.take(result);
                    }
                }
            }
            FileKind::Link => self.visit_link(path, &name, local, &row, handle, &meta),
            FileKind::Other => {
                self.find(Finding::at(
                    &path,
                    Code::SpecialFile,
                    "sockets, pipes and devices are not synced",
                ));
                if row.is_some() {
                    self.see(path, Seen::Unknown);
                }
            }
        }
        Ok(())
    }

    fn visit_link(
        &mut self,
        path: WirePath,
        name: &[u8],
        local: Option<&Entry>,
        row: &Option<IndexRow>,
        handle: &DirHandle,
        meta: &Meta,
    ) {
        let target = match handle.read_link(name) {
            Ok(target) if target.len() <= MAX_LINK_TARGET_BYTES => target,
            Ok(_) => {
                return self.unreadable(&path, &io::Error::other("link target is too long"));
            }
            Err(error) => return self.unreadable(&path, &error),
        };
        let entry = Entry::Link { target: target.into() };
        // A link cannot be changed in place, so the time of looking does not matter.
        let stamp = Stamp::new(meta, false);
        let known = row.as_ref().and_then(|row| row.stamp) == Some(stamp);
        if !known || local != Some(&entry) {
            self.see(path, Seen::Entry(entry, Some(stamp)));
        }
    }

    /// Walks a directory that is new here, or not watched: it is read whole, against rows of its own.
    fn walk_anew(
        &mut self,
        path: &WirePath,
        name: &[u8],
        handle: &DirHandle,
    ) -> Result<Result<(), io::Error>, ScanError> {
        let below = match handle.open_dir(name) {
            Ok(below) => below,
            Err(error) => return Ok(Err(error)),
        };
        self.flush()?;
        let lister = Lister::new(self.rules, Some(path.clone()), below, true);
        let outer = std::mem::replace(&mut self.parts, Parts::Here(lister));
        let listed = self.walk(Some(path), &mut Cursor::tree(Some(path)), true);
        self.parts = outer;
        listed
    }

    /// Takes note of a directory that could not be listed.
    fn listed(
        &mut self,
        path: &WirePath,
        listed: io::Result<()>,
        cursor: &mut Cursor,
    ) -> Result<(), ScanError> {
        let Err(error) = listed else { return Ok(()) };
        self.unreadable(path, &error);
        self.skip_below(path, cursor)
    }

    /// Rows that the walk has passed without finding their files.
    fn absent_before(
        &mut self,
        path: &WirePath,
        cursor: &mut Cursor,
        deep: bool,
    ) -> Result<(), ScanError> {
        while cursor.peek(self.index)?.is_some_and(|found| found.row.path < *path) {
            if let Some(found) = cursor.next(self.index)? {
                self.absent(found.row.path.clone(), Some(found), deep);
            }
        }
        Ok(())
    }

    fn absent_rest(
        &mut self,
        directory: Option<&WirePath>,
        cursor: &mut Cursor,
        deep: bool,
    ) -> Result<(), ScanError> {
        let inside = |found: &IndexRow| directory.is_none_or(|d| found.row.path.is_below(d));
        while cursor.peek(self.index)?.is_some_and(inside) {
            if let Some(found) = cursor.next(self.index)? {
                self.absent(found.row.path.clone(), Some(found), deep);
            }
            if self.writes.len() >= BATCH_ROWS {
                self.flush()?;
            }
        }
        Ok(())
    }

    fn absent(&mut self, path: WirePath, row: Option<IndexRow>, deep: bool) {
        let Some(row) = row else { return };
        // What is left out now but was not before is no deletion.
        let was_dir = matches!(row.row.local, Some(Entry::Dir));
        if self.rules.ignore.ignores(&path, was_dir) {
            return;
        }
        if row.row.local.is_some() || row.row.unknown {
            self.see(path.clone(), Seen::Absent);
        }
        if was_dir && !deep {
            self.writes.push(Write::AbsentBelow(path));
        }
    }

    fn skip_below(&mut self, directory: &WirePath, cursor: &mut Cursor) -> Result<(), ScanError> {
        while cursor.peek(self.index)?.is_some_and(|found| found.row.path.is_below(directory)) {
            cursor.next(self.index)?;
        }
        Ok(())
    }

    fn take(&mut self, Hashed { path, outcome, known }: Hashed) {
        match outcome {
            Outcome::Stable(entry, stamp) => {
                // One whose time is still to come would be looked at for ever.
                let clock = self.clock;
                let ahead = stamp.ctime_ns > clock.now_ns.saturating_add(clock.tick_ns);
                if stamp.racy && !(ahead && known == Some(stamp)) {
                    revisit(&mut self.report.racy, path.parent());
                }
                self.see(path, Seen::Entry(entry, Some(stamp)));
            }
            Outcome::Prefix(entry, stamp) => {
                self.unstable(path.clone());
                self.see(path, Seen::Entry(entry, Some(stamp)));
            }
            // Whether it is gone for good is for the next look to tell.
            Outcome::Vanished => self.unstable(path),
            Outcome::Unstable => {
                self.unstable(path.clone());
                self.see(path, Seen::Unknown);
            }
            Outcome::Unreadable(_) if self.rules.cancel.is_cancelled() => {}
            Outcome::Unreadable(error) => self.unreadable(&path, &error),
            Outcome::TooLarge => {
                self.find(Finding::at(&path, Code::TooLarge, "the file is too large to be synced"));
                self.see(path, Seen::Unknown);
            }
        }
    }

    fn unstable(&mut self, path: WirePath) {
        // Beyond that the next full scan is soon enough.
        if self.report.unstable.len() < MAX_REVISITS {
            self.report.unstable.push(path);
        }
    }

    fn unreadable(&mut self, path: &WirePath, error: &io::Error) {
        self.find(Finding::at(path, Code::Unreadable, error));
        self.see(path.clone(), Seen::Unknown);
    }

    fn find(&mut self, finding: Finding) {
        if self.report.findings.len() < MAX_FINDINGS {
            self.report.findings.push(finding);
        }
    }

    fn see(&mut self, path: WirePath, seen: Seen) {
        self.report.changed += 1;
        self.writes.push(Write::Seen(path, seen));
    }

    fn flush(&mut self) -> Result<(), IndexError> {
        if self.writes.is_empty() {
            return Ok(());
        }
        let writes = std::mem::take(&mut self.writes);
        self.index.batch(|writer| {
            for write in writes {
                match write {
                    Write::Seen(path, seen) => writer.set_local(&path, seen)?,
                    Write::AbsentBelow(path) => writer.set_absent_below(&path)?,
                }
            }
            Ok(())
        })
    }
}

/// Adds a directory to be looked at again; too many of them become everything.
fn revisit(list: &mut Vec<Scope>, directory: Option<WirePath>) {
    let scope = Scope::Children(directory);
    if list.last() == Some(&scope) || list.first() == Some(&Scope::Tree(None)) {
        return;
    }
    if list.len() == MAX_REVISITS {
        list.clear();
        list.push(Scope::Tree(None));
    } else {
        list.push(scope);
    }
}

#[cfg(test)]
mod revisit_tests {
    use super::*;

    #[test]
    fn too_many_directories_to_be_looked_at_again_become_everything() {
        let mut list = Vec::new();
        for number in 0..=MAX_REVISITS {
            revisit(&mut list, WirePath::new(format!("d{number}")).ok());
        }
        revisit(&mut list, None);
        assert_eq!(list, [Scope::Tree(None)]);
    }
}
