//! Room on the hub's disk.
//!
//! Content is taken only while a reserve stays free, so that a hub that is full of content still writes
//! its databases: deletions above all, which are what makes room; new names only while half of it is free.
//! Should something else fill the disk to its end, there is the ballast: a file that is given up for the
//! databases' sake, and put back once there is room again. A crash loses nothing here; a ballast that is
//! missing is made anew.

use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{FallocateFlags, fallocate, statvfs};

use super::pack_files::PackFileError;

/// Name of the ballast.
const BALLAST: &str = "ballast";
/// Size of the ballast on a disk of any size: some thousand commits.
const BALLAST_BYTES: u64 = 64 << 20;
/// Largest reserve, unless another one was asked for: a hundredth of a large disk is more than the
/// databases ever need.
const MAX_RESERVE_BYTES: u64 = 2 << 30;

/// The disk that content lies on.
#[derive(Debug)]
pub(super) struct Space {
    folder: PathBuf,
    reserve_bytes: Option<u64>,
    /// Whether content is being turned away, so that this is logged once.
    full: AtomicBool,
}

/// What a disk has.
#[derive(Clone, Copy, Debug)]
struct Room {
    total: u64,
    free: u64,
}

impl Space {
    /// The disk of this folder, which exists.
    pub(super) fn new(folder: &Path, reserve_bytes: Option<u64>) -> Self {
        Self { folder: folder.to_owned(), reserve_bytes, full: AtomicBool::new(false) }
    }

    /// Whether content of this size may come. A disk that cannot be asked is not full.
    pub(super) fn has_room_for(&self, bytes: usize) -> bool {
        let room = match self.room() {
            Ok(room) => room,
            Err(error) => {
                tracing::warn!(%error, "free space is not known");
                return true;
            }
        };
        let reserve = self.reserve(room);
        let fits = room.free >= reserve.saturating_add(bytes as u64);
        if self.full.swap(!fits, Ordering::Relaxed) == fits {
            if fits {
                tracing::info!(free = room.free, "there is room for content again");
            } else {
                tracing::error!(
                    free = room.free,
                    reserve,
                    "the disk is full: no content is taken until there is room; deletions still are"
                );
            }
        }
        fits
    }

    /// Whether names may come: half of the reserve is for deletions, and for the other databases.
    pub(super) fn has_room_for_names(&self) -> bool {
        let Ok(room) = self.room() else { return true };
        room.free >= self.reserve(room) / 2
    }

    fn reserve(&self, room: Room) -> u64 {
        self.reserve_bytes.unwrap_or((room.total / 100).min(MAX_RESERVE_BYTES))
    }

    /// Gives the ballast up; whether there was one.
    pub(super) fn give_up_ballast(&self) -> bool {
        let given_up = fs::remove_file(self.folder.join(BALLAST)).is_ok();
        if given_up {
            tracing::error!(
                "the disk is full to its end: the ballast was given up for the databases"
            );
        }
        given_up
    }

    /// Makes the ballast if it is missing and there is room for it beside the reserve.
    ///
    /// # Errors
    /// Those of the file system.
    pub(super) fn keep_ballast(&self) -> Result<(), PackFileError> {
        let path = self.folder.join(BALLAST);
        let failed = |error: io::Error| PackFileError::new("write", &path, error);
        let room = self.room().map_err(failed)?;
        let bytes = BALLAST_BYTES.min(room.total / 100);
        if fs::metadata(&path).is_ok_and(|meta| meta.len() >= bytes)
            || !self.has_room_for(usize::try_from(bytes).unwrap_or(usize::MAX))
        {
            return Ok(());
        }
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(failed)?;
        // A file system that cannot reserve has no ballast: zeros written there might take no room.
        match fallocate(&file, FallocateFlags::empty(), 0, bytes) {
            Err(rustix::io::Errno::OPNOTSUPP) => fs::remove_file(&path).map_err(failed),
            allocated => allocated.map_err(|error| failed(error.into())),
        }
    }

    fn room(&self) -> io::Result<Room> {
        let room = statvfs(&self.folder)?;
        Ok(Room {
            total: room.f_blocks.saturating_mul(room.f_frsize),
            free: room.f_bavail.saturating_mul(room.f_frsize),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_is_taken_while_the_reserve_stays_free() {
        let folder = tempfile::tempdir().unwrap();
        for (reserve, fits) in [(0, true), (u64::MAX, false)] {
            assert_eq!(Space::new(folder.path(), Some(reserve)).has_room_for(1), fits);
        }
    }

    #[test]
    fn the_ballast_is_given_up_once_and_put_back_when_there_is_room() {
        let folder = tempfile::tempdir().unwrap();
        let space = Space::new(folder.path(), Some(0));
        space.keep_ballast().unwrap();
        let path = folder.path().join(BALLAST);
        // Not all file systems can have one; then there is nothing to give up either.
        let had = path.exists();
        assert_eq!(space.give_up_ballast(), had);
        assert!(!space.give_up_ballast());
        Space::new(folder.path(), Some(u64::MAX)).keep_ballast().unwrap();
        assert!(!path.exists(), "none without room");
        space.keep_ballast().unwrap();
        assert_eq!(path.exists(), had);
    }
}
