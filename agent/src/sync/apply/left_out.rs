//! Removing directories, and what is left out in them where the rules say so.

use std::io;

use cortex_shared::wire_path::WirePath;

use super::place::{PlaceError, Placed, remove_empty};
use super::{Applier, vanished};
use crate::root_dir::{DirHandle, FileKind, Meta};
use crate::sync::plan::LocalChange;

impl Applier<'_> {
    /// Removes a directory. One that is not empty holds what nobody has planned for, and stays, unless
    /// the rules let all of that be removed with it: then that goes to the trash.
    pub(super) fn remove_directory(
        &self,
        change: &LocalChange,
        parent: &DirHandle,
        leaf: &[u8],
    ) -> Result<Placed, PlaceError> {
        let placed = remove_empty(parent, leaf)?;
        if !matches!(placed, Placed::Kept) || !self.index.ignore.lets_remove_any() {
            return Ok(placed);
        }
        let directory = match parent.open_dir(leaf) {
            Err(error) if vanished(&error) => return Ok(Placed::Surprise),
            result => result?,
        };
        // All or nothing: who finds some of it gone does not know what to think of the rest.
        if !self.is_removable(&directory, &change.path, false)? {
            return Ok(Placed::Kept);
        }
        self.clear(&directory, &change.path, false)?;
        remove_empty(parent, leaf)
    }

    /// Whether everything in a directory may be removed with it. `inherited`: a rule says so of the
    /// directory itself.
    fn is_removable(
        &self,
        directory: &DirHandle,
        path: &WirePath,
        inherited: bool,
    ) -> Result<bool, PlaceError> {
        for name in directory.names()? {
            let Some(meta) = directory.try_lstat(&name)? else { continue };
            let Some(child) = self.removable(path, &name, &meta, inherited) else {
                return Ok(false);
            };
            if meta.kind == FileKind::Dir {
                let below = match directory.open_dir(&name) {
                    Err(error) if vanished(&error) => continue,
                    result => result?,
                };
                if !self.is_removable(&below, &child, true)? {
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }

    /// Moves everything in a directory to the trash that may be removed. Asks again for each name:
    /// somebody may have put something else there since.
    fn clear(
        &self,
        directory: &DirHandle,
        path: &WirePath,
        inherited: bool,
    ) -> Result<(), PlaceError> {
        for name in directory.names()? {
            let Some(meta) = directory.try_lstat(&name)? else { continue };
            let Some(child) = self.removable(path, &name, &meta, inherited) else { continue };
            let moved = if meta.kind == FileKind::Dir {
                match directory.open_dir(&name) {
                    Ok(below) => {
                        self.clear(&below, &child, true)?;
                        directory.remove_dir(&name)
                    }
                    Err(error) => Err(error),
                }
            } else {
                directory.rename_new(&name, self.private.trash(), &self.private.stage_name())
            };
            match moved {
                Err(error) if vanished(&error) => {}
                Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => {}
                result => result?,
            }
        }
        directory.sync()?;
        Ok(())
    }

    /// The path of what stands in a directory, if it may be removed with it.
    fn removable(
        &self,
        directory: &WirePath,
        name: &[u8],
        meta: &Meta,
        inherited: bool,
    ) -> Option<WirePath> {
        let ignore = &self.index.ignore;
        // A name, or a path, that cannot be sent was not made by us.
        let path = directory.join(name).ok()?;
        let removable = !ignore.ignores_name(Some(directory), name)
            && (inherited || ignore.lets_remove(&path, meta.kind == FileKind::Dir));
        removable.then_some(path)
    }
}
