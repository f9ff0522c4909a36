//! Before a batch takes its places: attributes, what is about to be displaced, and the disk.

use std::io;

use cortex_shared::entry::Entry;

use super::attributes::{Attributes, keeps_mode};
use super::record::Print;
use super::{Applier, ApplyError, Staged};
use crate::root_dir::FileHandle;
use crate::sync::index::Displaced;
use crate::sync::plan::LocalChange;
use crate::sync::scan::Clock;

/// A change whose file has its attributes.
pub(super) struct Prepared {
    pub(super) staged: Staged,
    /// Open, if it is to be synced by itself.
    pub(super) file: Option<FileHandle>,
    pub(super) print: Option<Print>,
    /// What is about to be displaced, under its future name in the trash.
    pub(super) displaces: Option<Displaced>,
}

impl Applier<'_> {
    /// What a change is about to displace, as far as the index knows it. The clock is read once.
    pub(super) fn displaces(
        &self,
        staged: &Staged,
        clock: &mut Option<Clock>,
    ) -> Result<Option<Displaced>, ApplyError> {
        let change = &staged.change;
        let is_displaced = match (&change.from, &change.to, &change.aside) {
            // What stands in the place of a link by then may be a file.
            (Some(Entry::File(_) | Entry::Link { .. }), Some(Entry::File(_)), None) => {
                staged.stage_name.is_some()
            }
            (Some(Entry::File(_) | Entry::Link { .. }), _, None) => true,
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

    /// Gives what is staged its attributes, as far as it has none yet. The file stays open if it is to
    /// be synced by itself: many open files at once would meet the limit of the process.
    pub(super) fn prepare(
        &self,
        staged: &Staged,
        one_by_one: bool,
    ) -> io::Result<(Option<FileHandle>, Option<Print>)> {
        let Some(stage_name) = &staged.stage_name else { return Ok((None, None)) };
        let stage = self.private.stage();
        if !one_by_one && let Some(print) = staged.print {
            return Ok((None, Some(print)));
        }
        let Some(Entry::File(entry)) = &staged.change.to else {
            if let Some((uid, gid)) = self.owner {
                stage.set_owner(stage_name, uid, gid)?;
            }
            return Ok((None, Some(Print::of(&stage.lstat(stage_name)?))));
        };
        let file = stage.open_for_writing(stage_name)?;
        let print = match staged.print {
            Some(print) => print,
            None => {
                let mode = self.mode_there(&staged.change)?;
                Attributes::of(entry, self.owner).give(stage, stage_name, &file, mode)?
            }
        };
        Ok((Some(file).filter(|_| one_by_one), Some(print)))
    }

    /// The permission bits of the file that a change replaces.
    fn mode_there(&self, change: &LocalChange) -> io::Result<Option<u32>> {
        if !keeps_mode(change) {
            return Ok(None);
        }
        let (parent, leaf) = self.root.parent_of(&change.path)?;
        Ok(parent.try_lstat(leaf)?.map(|meta| meta.mode & 0o777))
    }

    pub(super) fn sync_files(
        &self,
        ready: &[Prepared],
        one_by_one: bool,
    ) -> Result<(), ApplyError> {
        let result = if one_by_one {
            ready.iter().filter_map(|one| one.file.as_ref()).try_for_each(FileHandle::sync)
        } else {
            self.private.stage().sync_file_system()
        };
        result.map_err(ApplyError::Durability)
    }
}
