//! What a file gets besides its content, while nobody else can reach it: a crash must not leave a file
//! that looks like an edit.

use std::io;

use cortex_shared::entry::{Entry, File};

use super::record::Print;
use crate::root_dir::{DirHandle, FileHandle};
use crate::sync::plan::LocalChange;

/// Owner, permission and time of a file that is put together.
#[derive(Clone, Copy, Debug)]
pub struct Attributes {
    owner: Option<(u32, u32)>,
    executable: bool,
    mtime_ns: i64,
}

impl Attributes {
    /// Those of `file`, for a member whose new files belong to `owner` (`None`: to the user the agent runs
    /// as).
    #[must_use]
    pub fn of(file: &File, owner: Option<(u32, u32)>) -> Self {
        Self { owner, executable: file.executable, mtime_ns: file.mtime_ns }
    }

    /// The file that a change puts where none stands, if its attributes depend on nothing there.
    #[must_use]
    pub fn of_new(change: &LocalChange, owner: Option<(u32, u32)>) -> Option<Self> {
        match &change.to {
            Some(Entry::File(file)) if !keeps_mode(change) => Some(Self::of(file, owner)),
            _ => None,
        }
    }

    /// Gives them to the file `name` in the stage, which is open as `file` and has all its content; tells
    /// what it looks like then. `mode` are the permission bits that it is to have apart from the
    /// executable ones, if not those it was made with.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn give(
        &self,
        stage: &DirHandle,
        name: &[u8],
        file: &FileHandle,
        mode: Option<u32>,
    ) -> io::Result<Print> {
        let made = file.meta()?;
        if let Some((uid, gid)) = self.owner.filter(|owner| *owner != (made.uid, made.gid)) {
            stage.set_owner(name, uid, gid)?;
        }
        let mode = with_executable(mode.unwrap_or(made.mode & 0o777), self.executable);
        if mode != made.mode {
            file.set_mode(mode)?;
        }
        file.set_mtime(self.mtime_ns)?;
        Ok(Print::of(&file.meta()?))
    }
}

/// Whether a change keeps the permission bits of the file that stands there: those other than the
/// executable one are the user's own.
pub(super) fn keeps_mode(change: &LocalChange) -> bool {
    matches!(change.from, Some(Entry::File(_))) && change.aside.is_none()
}

/// Permission bits with or without the right to execute: whoever may read may execute.
pub(super) fn with_executable(mode: u32, executable: bool) -> u32 {
    if executable { mode | ((mode & 0o444) >> 2) | 0o100 } else { mode & !0o111 }
}
