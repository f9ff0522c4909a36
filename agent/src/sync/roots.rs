//! Which directories are roots of workspaces, so that no two of them share files.
//!
//! Two workspaces, one inside the other, would copy each other's files to members that were never
//! meant to have them. Within one agent the table [`Roots`] says who is where. Between agents only
//! the directories themselves are common: each agent locks its root for itself alone, and the
//! directories above it together with others. So neither a root inside another's nor one around it
//! can be locked. Locks and places end with the guard, or with the process.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::root_dir::{DirHandle, Disk, Lock, real_disk};

/// Directories above a root that are locked: deeper ones protect nothing more in practice.
const MAX_ANCESTORS: usize = 64;
const STICKY: u32 = 0o1000;

/// The roots of one agent's running workspaces, by real path. Clones share the table.
#[derive(Clone, Debug, Default)]
pub struct Roots(Arc<Mutex<BTreeMap<PathBuf, String>>>);

/// Why a root cannot be had.
#[derive(Debug, thiserror::Error)]
pub(super) enum RootTaken {
    #[error(
        "{} overlaps with workspace {other:?} in {}: two workspaces must not share files; detach one \
         of them and attach it in another directory", path.display(), root.display()
    )]
    Overlaps { path: PathBuf, other: String, root: PathBuf },
    #[error("another agent works in {}; stop it or choose another directory", path.display())]
    Locked { path: PathBuf },
    #[error(
        "another agent works in {}, which {} is a part of; stop it or choose another directory",
        above.display(), path.display()
    )]
    LockedAbove { path: PathBuf, above: PathBuf },
    #[error(
        "another agent works in a directory below {}; stop it or choose another directory",
        path.display()
    )]
    LockedBelow { path: PathBuf },
    #[error("cannot use the root directory {}: {source}", path.display())]
    Io { path: PathBuf, source: io::Error },
}

/// A root that is held for one workspace.
#[derive(Debug)]
pub(super) struct HeldRoot {
    roots: Roots,
    path: PathBuf,
    /// Locked together with others.
    _above: Vec<DirHandle>,
}

impl Drop for HeldRoot {
    fn drop(&mut self) {
        self.roots.table().remove(&self.path);
    }
}

impl Roots {
    fn table(&self) -> MutexGuard<'_, BTreeMap<PathBuf, String>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The running workspace whose root is, contains, or is inside `path`, and that root.
    #[must_use]
    pub fn overlapping(&self, path: &Path) -> Option<(String, PathBuf)> {
        let path = real_path(path);
        self.table()
            .iter()
            .find(|(root, _)| overlap(root, &path))
            .map(|(root, name)| (name.clone(), root.clone()))
    }

    /// Takes the root of a workspace, which is open as `top`. The lock on `top` itself lasts as long
    /// as that handle. Blocking.
    pub(super) fn hold(
        &self,
        disk: &dyn Disk,
        workspace: &str,
        root: &Path,
        top: &DirHandle,
    ) -> Result<HeldRoot, RootTaken> {
        let path = || root.to_owned();
        let real = disk.real_path(root).map_err(|source| RootTaken::Io { path: path(), source })?;
        {
            let mut table = self.table();
            let taken = table.iter().find(|(other, _)| overlap(other, &real));
            if let Some((root, other)) = taken {
                let (other, root) = (other.clone(), root.clone());
                return Err(RootTaken::Overlaps { path: path(), other, root });
            }
            table.insert(real.clone(), workspace.to_owned());
        }
        // Gives the place back if a lock cannot be had.
        let mut held = HeldRoot { roots: self.clone(), path: real.clone(), _above: Vec::new() };
        for above in real.ancestors().skip(1).take(MAX_ANCESTORS) {
            match lock_above(disk, above) {
                Ok(Some(handle)) => held._above.push(handle),
                Ok(None) => {}
                Err(()) => {
                    return Err(RootTaken::LockedAbove { path: path(), above: above.to_owned() });
                }
            }
        }
        match top.lock(Lock::Alone) {
            Ok(true) => Ok(held),
            Ok(false) => {
                // Where others may be let in, nobody has it for himself: they are further down.
                match top.lock(Lock::Shared) {
                    Ok(true) => Err(RootTaken::LockedBelow { path: path() }),
                    _ => Err(RootTaken::Locked { path: path() }),
                }
            }
            Err(error) => {
                // Some network file systems lock nothing.
                tracing::warn!(?root, %error, "cannot lock the root");
                Ok(held)
            }
        }
    }
}

/// Locks a directory above a root together with others; `None` if it need not or cannot be. The
/// error means that somebody has it for himself.
fn lock_above(disk: &dyn Disk, directory: &Path) -> Result<Option<DirHandle>, ()> {
    // Nobody syncs the whole machine, and a directory that everybody may write to, like /tmp, is
    // cleaned up by programs that pass over what is locked.
    let Ok(handle) = disk.open(directory) else { return Ok(None) };
    let shared = handle.meta().is_ok_and(|meta| meta.mode & STICKY == 0);
    if directory.parent().is_none() || !shared {
        return Ok(None);
    }
    match handle.lock(Lock::Shared) {
        Ok(true) => Ok(Some(handle)),
        Ok(false) => Err(()),
        Err(_) => Ok(None),
    }
}

/// Whether one of two directories is, or contains, the other. Both have to be real paths.
#[must_use]
pub fn overlap(one: &Path, other: &Path) -> bool {
    one.starts_with(other) || other.starts_with(one)
}

/// A path without links, as far as it exists.
#[must_use]
pub fn real_path(path: &Path) -> PathBuf {
    real_path_on(&*real_disk(), path)
}

/// As [`real_path`], on any disk.
pub(super) fn real_path_on(disk: &dyn Disk, path: &Path) -> PathBuf {
    for ancestor in path.ancestors() {
        if let Ok(real) = disk.real_path(ancestor) {
            return match path.strip_prefix(ancestor) {
                Ok(rest) if !rest.as_os_str().is_empty() => real.join(rest),
                _ => real,
            };
        }
    }
    path.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn directory(folder: &Path, name: &str) -> (PathBuf, DirHandle) {
        let path = folder.join(name);
        std::fs::create_dir_all(&path).unwrap();
        let handle = DirHandle::open_ambient(&path).unwrap();
        (path, handle)
    }

    #[test]
    fn of_two_roots_that_overlap_the_second_is_refused_within_one_agent() {
        let folder = tempfile::tempdir().unwrap();
        let roots = Roots::default();
        let (outer, outer_top) = directory(folder.path(), "outer");
        let (inner, inner_top) = directory(folder.path(), "outer/a/inner");
        let (beside, beside_top) = directory(folder.path(), "outer-not");
        let link = folder.path().join("link");
        std::os::unix::fs::symlink(&inner, &link).unwrap();
        let held = roots.hold(&*real_disk(), "one", &outer, &outer_top).unwrap();
        for path in [&inner, &link, &outer] {
            let error = roots.hold(&*real_disk(), "two", path, &inner_top).unwrap_err();
            assert!(matches!(error, RootTaken::Overlaps { .. }), "{error}");
            assert_eq!(roots.overlapping(path).unwrap().0, "one");
        }
        assert_eq!(roots.overlapping(&outer.join("not/there/yet")).unwrap().0, "one");
        let _beside = roots.hold(&*real_disk(), "three", &beside, &beside_top).unwrap();
        drop(held);
        drop(outer_top);
        let _held = roots.hold(&*real_disk(), "two", &link, &inner_top).unwrap();
    }

    #[test]
    fn of_two_roots_that_overlap_the_second_is_refused_between_agents() {
        let folder = tempfile::tempdir().unwrap();
        let (outer, outer_top) = directory(folder.path(), "outer");
        let (inner, inner_top) = directory(folder.path(), "outer/a/inner");
        let (one, two) = (Roots::default(), Roots::default());
        let held = one.hold(&*real_disk(), "w", &outer, &outer_top).unwrap();
        let error = two.hold(&*real_disk(), "w", &inner, &inner_top).unwrap_err();
        assert!(matches!(error, RootTaken::LockedAbove { .. }), "{error}");
        let again = DirHandle::open_ambient(&outer).unwrap();
        let error = two.hold(&*real_disk(), "w", &outer, &again).unwrap_err();
        assert!(matches!(error, RootTaken::Locked { .. }), "{error}");
        drop((held, outer_top, again));
        let _held = two.hold(&*real_disk(), "w", &inner, &inner_top).unwrap();
        let outer_top = DirHandle::open_ambient(&outer).unwrap();
        let error = one.hold(&*real_disk(), "w", &outer, &outer_top).unwrap_err();
        assert!(matches!(error, RootTaken::LockedBelow { .. }), "{error}");
        // Side by side below one directory they do not disturb each other.
        let (beside, beside_top) = directory(folder.path(), "outer/a/beside");
        let _beside = one.hold(&*real_disk(), "w", &beside, &beside_top).unwrap();
    }
}
