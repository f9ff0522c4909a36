//! Directories below a root.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use cortex_shared::wire_path::WirePath;
use rustix::io::Errno;

use super::{DirHandle, real_disk};

/// The root of a tree whose contents are not trusted.
#[derive(Clone, Debug)]
pub struct RootDir {
    top: DirHandle,
    /// Whether a path cannot be opened at once (`openat2` came with Linux 5.6, and containers may
    /// filter it): learned once.
    step_by_step: Arc<AtomicBool>,
}

impl RootDir {
    /// Opens a root of this machine.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn open(path: &Path) -> io::Result<Self> {
        Ok(Self::new(real_disk().open(path)?))
    }

    /// Takes an open directory as a root.
    #[must_use]
    pub fn new(top: DirHandle) -> Self {
        Self { top, step_by_step: Arc::new(AtomicBool::new(false)) }
    }

    /// The root directory itself.
    #[must_use]
    pub fn top(&self) -> &DirHandle {
        &self.top
    }

    /// Opens a directory below the root, or the root for `None`.
    ///
    /// # Errors
    /// Those of the file system; `NotFound` or `NotADirectory` if a component is missing, and an
    /// error if one is a link.
    pub fn open_dir(&self, path: Option<&WirePath>) -> io::Result<DirHandle> {
        let Some(path) = path else { return Ok(self.top.clone()) };
        if !self.step_by_step.load(Ordering::Relaxed) {
            match self.top.0.open_below(path) {
                Err(error)
                    if matches!(Errno::from_io_error(&error), Some(Errno::NOSYS | Errno::PERM)) =>
                {
                    self.step_by_step.store(true, Ordering::Relaxed);
                }
                result => return result,
            }
        }
        self.open_by_steps(path)
    }

    pub(super) fn open_by_steps(&self, path: &WirePath) -> io::Result<DirHandle> {
        path.components().try_fold(self.top.clone(), |dir, name| dir.open_dir(name))
    }

    /// The directory that holds `path`, and the name of `path` in it.
    ///
    /// # Errors
    /// As [`RootDir::open_dir`].
    pub fn parent_of<'a>(&self, path: &'a WirePath) -> io::Result<(DirHandle, &'a [u8])> {
        Ok((self.open_dir(path.parent().as_ref())?, path.name()))
    }

    /// See [`Parents`].
    #[must_use]
    pub fn parents(&self) -> Parents {
        Parents { root: self.clone(), last: None }
    }
}

/// Parents of paths that are worked on one after the other: for those that follow one another in one
/// directory it is looked for once. If that is moved meanwhile, it is still the one that is worked in: this
/// is for work whose result is looked at under its path afterwards.
#[derive(Debug)]
pub struct Parents {
    root: RootDir,
    last: Option<(Option<WirePath>, DirHandle)>,
}

impl Parents {
    /// As [`RootDir::parent_of`].
    ///
    /// # Errors
    /// As [`RootDir::open_dir`].
    pub fn of<'a>(&mut self, path: &'a WirePath) -> io::Result<(DirHandle, &'a [u8])> {
        let parent = path.parent();
        let last = self.last.take_if(|(last, _)| *last == parent);
        let (_, handle) = match last {
            Some(last) => self.last.insert(last),
            None => {
                let handle = self.root.open_dir(parent.as_ref())?;
                self.last.insert((parent, handle))
            }
        };
        Ok((handle.clone(), path.name()))
    }

    /// Looks for the next parent anew: another directory may stand at its path now.
    pub fn forget(&mut self) {
        self.last = None;
    }
}
