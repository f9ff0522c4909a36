//! The workspace of a command: refused where it would show what must stay hidden, opened by the
//! identity that was checked, mapped to the command's user where the agent is root.

use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};
use rustix::mount::OpenTreeFlags;

use super::spec::{Context as _, SetupError, Step, WorkspaceSpec};
use super::syscalls::{self, MountAttributes, NO_DEV, NO_SUID, READ_ONLY};

/// Directories of the system that are no workspace, nor is anything that contains one of them.
const SYSTEM: [&str; 14] = [
    "/usr", "/etc", "/bin", "/sbin", "/lib", "/lib64", "/boot", "/dev", "/proc", "/sys", "/run",
    "/var/lib", "/var/run", "/var/log",
];
/// Directories of the system in which no workspace lies: what is in programs' and libraries' is shown to
/// every command, whatever its workspace.
const SYSTEM_INSIDE: [&str; 10] =
    ["/proc", "/sys", "/dev", "/boot", "/etc", "/usr", "/bin", "/sbin", "/lib", "/lib64"];

/// Why a directory cannot be a workspace.
#[derive(Debug, thiserror::Error)]
pub enum WorkspaceRefusal {
    /// It cannot be looked at.
    #[error("the workspace {path:?} cannot be used: {source}")]
    Unusable {
        /// The directory.
        path: PathBuf,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// It is not a directory.
    #[error("the workspace {path:?} is not a directory")]
    NotADirectory {
        /// The path.
        path: PathBuf,
    },
    /// It contains, or is inside of, something that commands must never see.
    #[error("the workspace {path:?} would show {hidden:?} to commands")]
    ShowsHidden {
        /// The directory.
        path: PathBuf,
        /// What must stay hidden.
        hidden: PathBuf,
    },
    /// It lies in a directory of the system.
    #[error("the workspace {path:?} lies in {system:?}, among the system's own files")]
    AmongTheSystems {
        /// The directory.
        path: PathBuf,
        /// Of the system.
        system: PathBuf,
    },
    /// Another file system is mounted below it.
    #[error("another file system is mounted inside the workspace, at {mount:?}")]
    MountInside {
        /// Where.
        mount: PathBuf,
    },
}

impl WorkspaceRefusal {
    /// What helps.
    #[must_use]
    pub fn hint(&self) -> &'static str {
        match self {
            Self::Unusable { .. } | Self::NotADirectory { .. } => {
                "check that the workspace's directory exists and belongs to the agent's user"
            }
            Self::ShowsHidden { .. } | Self::AmongTheSystems { .. } => {
                "attach the workspace at a directory of its own, away from system directories, \
                 home directories as a whole, and the agent's state directory"
            }
            Self::MountInside { .. } => {
                "unmount it, or attach the workspace at a directory without mount points"
            }
        }
    }
}

/// Checks a workspace, on the agent's side and outside of any sandbox.
///
/// # Errors
/// If it is no directory or would show one of `forbidden`, a system directory or a whole home.
pub(super) fn check(root: &Path, forbidden: &[PathBuf]) -> Result<WorkspaceSpec, WorkspaceRefusal> {
    let unusable = |source| WorkspaceRefusal::Unusable { path: root.to_owned(), source };
    let path = root.canonicalize().map_err(unusable)?;
    let metadata = path.symlink_metadata().map_err(unusable)?;
    if !metadata.is_dir() {
        return Err(WorkspaceRefusal::NotADirectory { path });
    }
    let hidden = |hidden: &Path| WorkspaceRefusal::ShowsHidden {
        path: path.clone(),
        hidden: hidden.to_owned(),
    };
    for system in SYSTEM.map(Path::new) {
        if system.starts_with(&path) {
            return Err(hidden(system));
        }
    }
    for system in SYSTEM_INSIDE.map(Path::new) {
        if path.starts_with(system) {
            let system = system.to_owned();
            return Err(WorkspaceRefusal::AmongTheSystems { path, system });
        }
    }
    for home in home_directories() {
        if home.starts_with(&path) {
            return Err(hidden(&home));
        }
    }
    for secret in forbidden {
        // A directory that does not exist yet is compared by the name it will have.
        let secret = canonical_as_far_as_it_exists(secret);
        let by_name = secret.starts_with(&path) || path.starts_with(&secret);
        // A bind mount gives a directory a second name, which the comparison of names misses.
        if by_name || is_among_ancestors(&path, &secret) || is_among_ancestors(&secret, &path) {
            return Err(hidden(&secret));
        }
    }
    if let Some(mount) = mount_below(&path).map_err(unusable)? {
        return Err(WorkspaceRefusal::MountInside { mount });
    }
    Ok(WorkspaceSpec {
        path,
        device: metadata.dev(),
        inode: metadata.ino(),
        owner_uid: metadata.uid(),
        owner_gid: metadata.gid(),
        mounted: false,
        pins: Vec::new(),
    })
}

/// A directory that may be a workspace: where it is and which one it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CheckedWorkspace {
    /// Its path, without links.
    pub path: PathBuf,
    /// Its file system.
    pub device: u64,
    /// Its number there.
    pub inode: u64,
}

/// Decides on a workspace as it is decided for a command that is to see it.
///
/// # Errors
/// As for a command.
pub fn check_workspace(
    root: &Path,
    forbidden: &[PathBuf],
) -> Result<CheckedWorkspace, WorkspaceRefusal> {
    let WorkspaceSpec { path, device, inode, .. } = check(root, forbidden)?;
    Ok(CheckedWorkspace { path, device, inode })
}

/// The home of root and of every user in the passwd file, as far as they are real directories.
pub(super) fn home_directories() -> Vec<PathBuf> {
    let passwd = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
    let listed = passwd.lines().filter_map(|line| line.split(':').nth(5)).map(PathBuf::from);
    let own = std::env::var_os("HOME").map(PathBuf::from);
    listed
        .chain(own)
        .chain([PathBuf::from("/root"), PathBuf::from("/home")])
        .filter(|home| home.is_absolute() && home != Path::new("/"))
        .filter_map(|home| home.canonicalize().ok())
        .collect()
}

/// Whether `directory` is, under whatever name, `of` itself or one of the directories above it.
pub(super) fn is_among_ancestors(directory: &Path, of: &Path) -> bool {
    let identity = |path: &Path| path.metadata().ok().map(|found| (found.dev(), found.ino()));
    let wanted = identity(directory);
    wanted.is_some() && of.ancestors().any(|ancestor| identity(ancestor) == wanted)
}

pub(super) fn canonical_as_far_as_it_exists(path: &Path) -> PathBuf {
    path.ancestors()
        .find_map(|ancestor| {
            let known = ancestor.canonicalize().ok()?;
            Some(known.join(path.strip_prefix(ancestor).ok()?))
        })
        .unwrap_or_else(|| path.to_owned())
}

/// A mount point strictly below `path`. It could be another name for something hidden, and it
/// would need its own decision on ids and access.
pub(super) fn mount_below(path: &Path) -> std::io::Result<Option<PathBuf>> {
    let table = std::fs::read("/proc/self/mountinfo")?;
    Ok(table
        .split(|byte| *byte == b'\n')
        .filter_map(|line| line.split(|byte| *byte == b' ').nth(4))
        .map(unescape_octal)
        .find(|mount| mount.starts_with(path) && mount != path))
}

/// Undoes the kernel's `\040` for blanks and the like.
fn unescape_octal(text: &[u8]) -> PathBuf {
    use std::os::unix::ffi::OsStringExt as _;
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((&first, after)) = rest.split_first() {
        let code = (first == b'\\')
            .then(|| after.get(..3))
            .flatten()
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        if let Some(code) = code {
            bytes.push(code);
            rest = &after[3..];
        } else {
            bytes.push(first);
            rest = after;
        }
    }
    std::ffi::OsString::from_vec(bytes).into()
}

/// A detached mount of the workspace whose owner appears as the command's user: what only a
/// process with rights over the host's mounts can make, so the agent does where it has them.
pub(super) fn mount(
    workspace: &WorkspaceSpec,
    mapping: Option<&OwnedFd>,
) -> Result<OwnedFd, SetupError> {
    let tree = clone_tree(workspace)?;
    if let Some(mapping) = mapping {
        syscalls::mount_map_ids(tree.as_fd(), mapping.as_fd())
            .step(Step::MappedWorkspace, "map the owner of the workspace to the command's user")?;
    }
    Ok(tree)
}

/// A detached mount of the library of skills, read-only; `None` if it is not there, or is a link.
pub(super) fn mount_library(path: &Path) -> Result<Option<OwnedFd>, SetupError> {
    let step = Step::FileSystem;
    let attempt = format!("open the library {path:?}");
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let directory = match rustix::fs::openat(CWD, path, flags, Mode::empty()) {
        Ok(directory) => directory,
        Err(
            rustix::io::Errno::NOENT
            | rustix::io::Errno::ACCESS
            | rustix::io::Errno::NOTDIR
            | rustix::io::Errno::LOOP,
        ) => return Ok(None),
        Err(error) => return Err(error).step(step, attempt),
    };
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH;
    let tree = rustix::mount::open_tree(&directory, "", flags)
        .step(step, "copy the mount of the library")?;
    let set = READ_ONLY | NO_SUID | NO_DEV;
    let attributes = MountAttributes { set, private: true, this_mount_only: true };
    syscalls::mount_set_attributes(tree.as_fd(), attributes)
        .step(step, "restrict the library's mount")?;
    Ok(Some(tree))
}

/// A detached, private copy of the mount of a workspace, restricted before anybody can see it.
pub(super) fn clone_tree(workspace: &WorkspaceSpec) -> Result<OwnedFd, SetupError> {
    let step = Step::Workspace;
    let attempt = format!("open the workspace {:?}", workspace.path);
    let directory = rustix::fs::openat2(
        CWD,
        &workspace.path,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
        ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS,
    )
    .step(step, &attempt)?;
    let found = rustix::fs::fstat(&directory).step(step, &attempt)?;
    if (found.st_dev, found.st_ino) != (workspace.device, workspace.inode) {
        return Err(SetupError::new(
            step,
            format!("{:?} is no longer the directory that was checked", workspace.path),
        ));
    }
    let tree = rustix::mount::open_tree(
        &directory,
        "",
        OpenTreeFlags::OPEN_TREE_CLONE
            | OpenTreeFlags::OPEN_TREE_CLOEXEC
            | OpenTreeFlags::AT_EMPTY_PATH
            | OpenTreeFlags::AT_RECURSIVE,
    )
    // From here on it is the kernel that may be unable, and no longer the workspace at fault.
    .step(Step::FileSystem, "copy the mount of the workspace")?;
    syscalls::mount_set_attributes(
        tree.as_fd(),
        MountAttributes { set: NO_SUID | NO_DEV, private: true, this_mount_only: false },
    )
    .step(Step::FileSystem, "restrict the workspace's mount")?;
    Ok(tree)
}
