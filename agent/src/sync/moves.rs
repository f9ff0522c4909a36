//! Renaming here what was renamed elsewhere, instead of copying and deleting it.
//!
//! A rename destroys nothing: what somebody has written meanwhile travels along, and the look at the
//! new place that follows sees it. A crash between the rename and the index leaves what the next
//! scan finds.

use std::collections::BTreeMap;
use std::io;

use cortex_shared::entry::Entry;
use cortex_shared::wire_path::WirePath;

use super::apply::{ApplyError, make_owned};
use super::core::Core;
use super::index::{IndexError, IndexRow, Seen, Stamp};
use super::plan::{Move, MoveFinder};
use super::scan::Scope;
use crate::root_dir::{DirHandle, FileKind};

/// Rows read at once.
const PAGE_ROWS: u32 = 4096;
/// Single files that are renamed in one go; more of them are found again in the next sweep.
const MAX_MOVES: usize = 20_000;

/// What was renamed.
#[derive(Debug, Default)]
pub(super) struct Moved {
    pub(super) paths: usize,
    pub(super) dirty: Vec<Scope>,
}

/// Renames what the hub's changes allow to be renamed. Blocking.
pub(super) fn apply_moves(core: &mut Core) -> Result<Moved, ApplyError> {
    let moved = Moved::default();
    if !core.index.has_gone_there()? {
        return Ok(moved);
    }
    let mut finder = MoveFinder::default();
    let mut after = None;
    loop {
        let window = core.index.window(after.as_ref(), PAGE_ROWS)?;
        window.rows.iter().skip(window.context).for_each(|row| finder.add(row));
        match window.rows.last() {
            Some(last) if window.truncated => after = Some(last.path.clone()),
            _ => break,
        }
    }
    let mut mover = Mover { core, touched: BTreeMap::new(), made: Vec::new(), moved };
    let mut done = Vec::new();
    for change in finder.finish().into_iter().take(MAX_MOVES) {
        match mover.rename(&change) {
            Ok(true) => done.push(change),
            Ok(false) => {}
            // Whatever is in the way: the plan that follows copies, or says what is wrong.
            Err(error) => tracing::debug!(?change, %error, "not renamed"),
        }
    }
    mover.touched.values().try_for_each(DirHandle::sync).map_err(ApplyError::Durability)?;
    mover.record(done)?;
    Ok(mover.moved)
}

struct Mover<'a> {
    core: &'a mut Core,
    touched: BTreeMap<Option<WirePath>, DirHandle>,
    /// Directories that were made on the way.
    made: Vec<WirePath>,
    moved: Moved,
}

#[derive(Debug, thiserror::Error)]
enum MoveError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error(transparent)]
    Index(#[from] IndexError),
}

impl Mover<'_> {
    /// Renames; false if something is not as it was planned for.
    fn rename(&mut self, change: &Move) -> Result<bool, MoveError> {
        let (from, leaf) = self.core.root.parent_of(&change.from)?;
        let meta = from.lstat(leaf)?;
        let expected = if change.directory {
            meta.kind == FileKind::Dir
        } else {
            let found = self.core.index.get(&change.from)?;
            let stamp = found.and_then(|found| found.stamp);
            stamp.is_some_and(|stamp| stamp == Stamp::new(&meta, stamp.racy))
        };
        if !expected {
            return Ok(false);
        }
        self.make_parents(&change.to)?;
        let (to, new_leaf) = self.core.root.parent_of(&change.to)?;
        from.rename_new(leaf, &to, new_leaf)?;
        self.touched.insert(change.from.parent(), from);
        self.touched.insert(change.to.parent(), to);
        Ok(true)
    }

    /// Makes the directories above a path that are new at the hub.
    fn make_parents(&mut self, path: &WirePath) -> Result<(), MoveError> {
        let mut above: Vec<WirePath> = path.ancestors().collect();
        above.reverse();
        for directory in above {
            let (parent, leaf) = self.core.root.parent_of(&directory)?;
            if parent.try_lstat(leaf)?.is_some() {
                continue;
            }
            let row = self.core.index.get(&directory)?.map(|found| found.row);
            let wanted = row.is_some_and(|row| {
                row.remote == Some(Entry::Dir) && row.base.is_none() && row.local.is_none()
            });
            if !wanted {
                return Err(io::Error::from(io::ErrorKind::NotFound).into());
            }
            make_owned(&parent, leaf, self.core.owner)?;
            self.touched.insert(directory.parent(), parent);
            self.made.push(directory);
        }
        Ok(())
    }

    fn record(&mut self, done: Vec<Move>) -> Result<(), ApplyError> {
        let clock = self.core.private.clock().map_err(ApplyError::Durability)?;
        let mut seen: Vec<(WirePath, Seen)> = Vec::new();
        for directory in self.made.drain(..) {
            seen.push((directory, Seen::Entry(Entry::Dir, None)));
        }
        for change in done {
            let Some(top) = self.core.index.get(&change.from)? else { continue };
            if change.directory {
                let mut after = None;
                let mut below = Vec::new();
                loop {
                    let page =
                        self.core.index.below(Some(&change.from), after.as_ref(), PAGE_ROWS)?;
                    let Some(last) = page.last() else { break };
                    after = Some(last.row.path.clone());
                    below.extend(page);
                }
                for found in std::iter::once(top).chain(below) {
                    self.moved.paths += 1;
                    seen.extend(relocated(&change, found));
                }
                self.moved.dirty.push(Scope::Tree(Some(change.to)));
            } else {
                let now = self.core.root.parent_of(&change.to);
                let meta = now.and_then(|(parent, leaf)| parent.lstat(leaf));
                let place = match (meta, top.stamp, top.row.local) {
                    (Ok(meta), Some(stamp), Some(entry)) if stamp.fits_renamed(&meta) => {
                        let racy = stamp.racy || clock.is_racy(&meta);
                        Seen::Entry(entry, Some(Stamp::new(&meta, racy)))
                    }
                    // Somebody was there already.
                    _ => Seen::Unknown,
                };
                self.moved.paths += 1;
                self.moved.dirty.push(Scope::Children(change.to.parent()));
                seen.push((change.from, Seen::Absent));
                seen.push((change.to, place));
            }
        }
        self.core.index.batch(|writer| {
            seen.into_iter().try_for_each(|(path, seen)| writer.set_local(&path, seen))
        })?;
        Ok(())
    }
}

/// What is seen of a row once the directory above it has another name. Nothing in it was touched, so
/// that stamps stay valid.
fn relocated(change: &Move, found: IndexRow) -> Vec<(WirePath, Seen)> {
    let IndexRow { row, stamp } = found;
    let rest = &row.path.as_bytes()[change.from.as_bytes().len()..];
    let new = [change.to.as_bytes(), rest].concat();
    let here = match row.local {
        Some(entry) => WirePath::new(new).ok().map(|path| (path, Seen::Entry(entry, stamp))),
        None => None,
    };
    here.into_iter().chain(std::iter::once((row.path, Seen::Absent))).collect()
}
