//! Displacing what stands in the way, and looking at it once nobody can reach it by name any more.

use std::io;

use cortex_shared::chunk::Cutter;
use cortex_shared::crash::crash_point;
use cortex_shared::entry::Entry;
use rustix::io::Errno;

use super::place::{Current, PlaceError, Placed};
use super::record::Print;
use super::{Applier, exists, vanished};
use crate::root_dir::{DirHandle, Meta};
use crate::sync::plan::LocalChange;

impl Applier<'_> {
    /// Takes a file or link away.
    pub(super) fn displace(
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
    pub(super) fn replace(
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
        if Print::of(&stage.lstat(stage_name)?) != Print::of(ours) {
            // Somebody wrote a third time, between the two exchanges: another file, or into ours. It
            // would be removed as ours: it is kept.
            self.private.discard(stage_name)?;
            return Ok(Placed::ToBeRescued);
        }
        Ok(Placed::Surprise)
    }
}

/// What was displaced lies aside, and something failed before it was known what it is.
fn rescued_later(change: &LocalChange, error: &io::Error) -> Placed {
    tracing::warn!(path = %change.path, %error, "a displaced file is looked at later");
    Placed::ToBeRescued
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
