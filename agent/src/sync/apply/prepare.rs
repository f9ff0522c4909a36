//! Before a batch takes its places: attributes, what is about to be displaced, and the disk.

use std::io;

use cortex_shared::entry::Entry;

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

    /// Gives a staged file its attributes, before it takes its place: a crash must not leave a file
    /// that looks like an edit.
    pub(super) fn prepare(
        &self,
        staged: &Staged,
    ) -> io::Result<(Option<FileHandle>, Option<Print>)> {
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

pub(super) fn set_mode(file: &FileHandle, mode: u32, executable: bool) -> io::Result<()> {
    // Whoever may read may execute.
    let mode = if executable { mode | ((mode & 0o444) >> 2) | 0o100 } else { mode & !0o111 };
    file.set_mode(mode)
}
