//! Names in a workspace that other programs on the host would execute or obey: a command may read
//! them, not change them.
//!
//! A command that plants a git hook or an editor task has escaped as soon as a person uses git or
//! the editor there. `.git` itself is pinned by a mount, so that it cannot be moved away and
//! replaced; its hooks and configuration are read-only. Names that do not exist are not created as
//! mount points, which would leave empty files behind; [`super::planted`] finds what appeared.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{Dir, FileType};

use super::mounts::{Detached, open_below};
use super::spec::{Context as _, SetupError, Step, WORKSPACE_INSIDE};
use super::syscalls::READ_ONLY;

/// Parts of a git directory that make git run programs, or look elsewhere for such parts.
pub(super) const GIT_ACTIVE: [&str; 4] = ["hooks", "config", "config.worktree", "commondir"];

/// Other names at the top of a workspace that programs outside obey.
pub(crate) const OBEYED: [&str; 15] = [
    ".vscode",
    ".idea",
    ".claude",
    ".codex",
    ".agents",
    ".cursor",
    ".mcp.json",
    ".envrc",
    ".bashrc",
    ".bash_profile",
    ".bash_login",
    ".profile",
    ".zshrc",
    ".zshenv",
    ".zprofile",
];

/// Most submodules of which hooks and configuration are protected.
const MAX_MODULES: usize = 256;

/// Pins what exists of the protected names in the workspace below `root`.
pub(super) fn pin(root: &OwnedFd) -> Result<(), SetupError> {
    let workspace = Path::new(WORKSPACE_INSIDE.trim_start_matches('/'));
    let git = workspace.join(".git");
    match kind_of(root, &git)? {
        Some(FileType::Directory) => {
            cover(root, &git, 0)?;
            pin_git_directory(root, &git)?;
            for module in modules(root, &git.join("modules"))? {
                pin_git_directory(root, &module)?;
            }
        }
        // A worktree's or submodule's `.git` is a file that names the directory.
        Some(FileType::RegularFile) => cover(root, &git, READ_ONLY)?,
        _ => {}
    }
    for name in OBEYED {
        pin_if_present(root, &workspace.join(name))?;
    }
    Ok(())
}

fn pin_git_directory(root: &OwnedFd, directory: &Path) -> Result<(), SetupError> {
    GIT_ACTIVE.iter().try_for_each(|name| pin_if_present(root, &directory.join(name)))
}

fn pin_if_present(root: &OwnedFd, path: &Path) -> Result<(), SetupError> {
    match kind_of(root, path)? {
        Some(FileType::Directory | FileType::RegularFile) => cover(root, path, READ_ONLY),
        _ => Ok(()),
    }
}

/// The git directories of submodules, which may be nested in directories of their own name.
fn modules(root: &OwnedFd, directory: &Path) -> Result<Vec<PathBuf>, SetupError> {
    let mut found = Vec::new();
    let mut pending = vec![directory.to_owned()];
    while let Some(directory) = pending.pop() {
        if kind_of(root, &directory)? != Some(FileType::Directory) {
            continue;
        }
        for name in names_in(root, &directory)? {
            let path = directory.join(name);
            match kind_of(root, &path.join("HEAD"))? {
                Some(_) => {
                    pending.push(path.join("modules"));
                    found.push(path);
                }
                None => pending.push(path),
            }
            if found.len() + pending.len() > MAX_MODULES {
                return Err(SetupError::new(
                    Step::Workspace,
                    format!("{directory:?} holds more than {MAX_MODULES} submodules"),
                ));
            }
        }
    }
    Ok(found)
}

fn names_in(root: &OwnedFd, directory: &Path) -> Result<Vec<PathBuf>, SetupError> {
    use std::os::unix::ffi::OsStrExt as _;
    let attempt = format!("list {directory:?}");
    let read = || -> rustix::io::Result<Vec<PathBuf>> {
        let place = open_below(root, directory)?;
        let flags = rustix::fs::OFlags::DIRECTORY | rustix::fs::OFlags::CLOEXEC;
        let handle = rustix::fs::openat(&place, ".", flags, rustix::fs::Mode::empty())?;
        Dir::new(handle)?
            .filter_map(|entry| {
                entry
                    .map(|entry| {
                        let name = std::ffi::OsStr::from_bytes(entry.file_name().to_bytes());
                        (name != "." && name != "..").then(|| PathBuf::from(name))
                    })
                    .transpose()
            })
            .take(MAX_MODULES + 1)
            .collect()
    };
    match read() {
        Err(rustix::io::Errno::ACCESS) => Ok(Vec::new()),
        result => result.step(Step::Workspace, attempt),
    }
}

/// What stands at a path, without following any link; `None` if nothing can be reached there.
fn kind_of(root: &OwnedFd, path: &Path) -> Result<Option<FileType>, SetupError> {
    use rustix::io::Errno;
    match open_below(root, path).and_then(|place| rustix::fs::fstat(&place)) {
        Ok(found) => Ok(Some(FileType::from_raw_mode(found.st_mode))),
        // Neither can the command reach what its own user cannot look at.
        Err(Errno::NOENT | Errno::NOTDIR | Errno::ACCESS | Errno::LOOP) => Ok(None),
        Err(error) => Err(error).step(Step::Workspace, format_args!("look at {path:?}")),
    }
}

/// Mounts a path over itself: it can then be neither renamed nor removed, and is read-only where
/// `attributes` says so.
fn cover(root: &OwnedFd, path: &Path, attributes: u64) -> Result<(), SetupError> {
    let attempt = format!("protect {path:?}");
    let place = open_below(root, path).step(Step::Workspace, &attempt)?;
    Detached::copy_at(&place, path, attributes)?.attach_at(&place, &attempt)
}
