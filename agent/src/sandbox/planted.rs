//! Names that programs on the host obey and that a command brought into a workspace.
//!
//! What existed before is protected by [`super::protect`]. What did not exist cannot be, without
//! leaving empty files behind; so it is noticed afterwards and said.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags};

use super::mounts::open_below;
use super::protect::{GIT_ACTIVE, OBEYED};

/// The names that a workspace did not have before a command.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Absent {
    root: PathBuf,
    names: Vec<PathBuf>,
}

impl Absent {
    /// Looks at a workspace before a command.
    pub(super) fn in_workspace(root: &Path) -> Self {
        let git = Path::new(".git");
        let names = std::iter::once(git.to_owned())
            .chain(GIT_ACTIVE.iter().map(|name| git.join(name)))
            .chain(OBEYED.iter().map(PathBuf::from));
        let mut absent = Self { root: root.to_owned(), names: names.collect() };
        let present = absent.present();
        absent.names.retain(|name| !present.contains(name));
        if !present.iter().any(|name| name == git) {
            // The new directory stands for all in it.
            absent.names.retain(|name| name == git || !name.starts_with(git));
        }
        absent
    }

    /// Those that exist now. Looks at the disk, so not to be called where waiting is forbidden.
    #[must_use]
    pub fn present(&self) -> Vec<PathBuf> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let Ok(root) = rustix::fs::openat(CWD, &self.root, flags, Mode::empty()) else {
            return Vec::new();
        };
        self.names.iter().filter(|name| exists(&root, name)).cloned().collect()
    }
}

/// Whether there is anything of that name, a link included, without following one on the way.
fn exists(root: &OwnedFd, name: &Path) -> bool {
    let parent = match name.parent() {
        Some(parent) if parent != Path::new("") => open_below(root, parent),
        _ => open_below(root, "."),
    };
    let Ok(parent) = parent else { return false };
    name.file_name().is_some_and(|name| {
        rustix::fs::statat(parent, name, rustix::fs::AtFlags::SYMLINK_NOFOLLOW).is_ok()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_absent_and_appeared_is_found() {
        let workspace = tempfile::TempDir::new().unwrap();
        let path = |name: &str| workspace.path().join(name);
        std::fs::create_dir_all(path(".git/hooks")).unwrap();
        std::fs::write(path(".envrc"), "").unwrap();
        let absent = Absent::in_workspace(workspace.path());
        assert_eq!(absent.present(), [] as [PathBuf; 0]);
        std::fs::write(path(".git/commondir"), "").unwrap();
        std::fs::write(path(".git/index"), "").unwrap();
        std::os::unix::fs::symlink("/nowhere", path(".bashrc")).unwrap();
        assert_eq!(absent.present(), [Path::new(".git/commondir"), Path::new(".bashrc")]);
    }

    #[test]
    fn a_new_git_directory_is_named_once() {
        let workspace = tempfile::TempDir::new().unwrap();
        let absent = Absent::in_workspace(workspace.path());
        std::fs::create_dir_all(workspace.path().join(".git/hooks")).unwrap();
        assert_eq!(absent.present(), [Path::new(".git")]);
    }
}
