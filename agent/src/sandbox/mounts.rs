//! Mounts by descriptor. A tree is taken once, restricted while still detached, and attached to a
//! place given by descriptor: there is no moment in which it is visible with more rights, and no
//! path that is resolved twice.

use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;

use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags};
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags};

use super::spec::{Context as _, SetupError, Step};
use super::syscalls::{self, MountAttributes};

/// A mount that is attached nowhere yet.
pub(super) struct Detached {
    fd: OwnedFd,
    is_directory: bool,
}

impl Detached {
    /// A copy of what is mounted at a path of the current root, with everything below it; `None`
    /// if there is nothing. The attributes are `MOUNT_ATTR_*` bits to add.
    pub(super) fn copy_of(path: &Path, attributes: u64) -> Result<Option<Self>, SetupError> {
        Self::copy_resolved(path, attributes, ResolveFlags::NO_MAGICLINKS)
    }

    /// The same where no link may be on the way: with one, it is an error.
    pub(super) fn copy_of_exactly(
        path: &Path,
        attributes: u64,
    ) -> Result<Option<Self>, SetupError> {
        Self::copy_resolved(path, attributes, ResolveFlags::NO_SYMLINKS)
    }

    fn copy_resolved(
        path: &Path,
        attributes: u64,
        resolve: ResolveFlags,
    ) -> Result<Option<Self>, SetupError> {
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let found = rustix::fs::openat2(CWD, path, flags, Mode::empty(), resolve);
        match found {
            Ok(place) => Self::copy_at(&place, path, attributes).map(Some),
            // Not there, or not for this user to see.
            Err(
                rustix::io::Errno::NOENT | rustix::io::Errno::ACCESS | rustix::io::Errno::NOTDIR,
            ) => Ok(None),
            Err(error) => Err(error).step(Step::FileSystem, format_args!("open {path:?}")),
        }
    }

    /// A copy of what an `O_PATH` descriptor names. `name` is for messages.
    pub(super) fn copy_at(
        place: &OwnedFd,
        name: &Path,
        attributes: u64,
    ) -> Result<Self, SetupError> {
        let step = Step::FileSystem;
        let tree = rustix::mount::open_tree(
            place,
            "",
            OpenTreeFlags::OPEN_TREE_CLONE
                | OpenTreeFlags::OPEN_TREE_CLOEXEC
                | OpenTreeFlags::AT_EMPTY_PATH
                | OpenTreeFlags::AT_RECURSIVE,
        )
        .step(step, format_args!("copy the mount of {name:?}"))?;
        syscalls::mount_set_attributes(
            tree.as_fd(),
            MountAttributes { set: attributes, private: true, this_mount_only: false },
        )
        .step(step, format_args!("restrict the mount of {name:?}"))?;
        Self::from_descriptor(tree)
    }

    /// A detached mount that was made elsewhere.
    pub(super) fn from_descriptor(fd: OwnedFd) -> Result<Self, SetupError> {
        let found = rustix::fs::fstat(&fd).step(Step::FileSystem, "look at a mount")?;
        let is_directory = FileType::from_raw_mode(found.st_mode) == FileType::Directory;
        Ok(Self { fd, is_directory })
    }

    /// A new file system of the given type.
    pub(super) fn new(
        kind: &str,
        options: &[(&str, &str)],
        attributes: MountAttrFlags,
    ) -> Result<Self, SetupError> {
        let make = || -> rustix::io::Result<OwnedFd> {
            let context = rustix::mount::fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)?;
            for (key, value) in options {
                rustix::mount::fsconfig_set_string(&context, *key, *value)?;
            }
            rustix::mount::fsconfig_create(&context)?;
            rustix::mount::fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)
        };
        let step = if kind == "proc" { Step::Proc } else { Step::FileSystem };
        let fd = make().step(step, format_args!("mount a private {kind}"))?;
        Ok(Self { fd, is_directory: true })
    }

    /// Attaches it over the current root's `path`, which must exist, and gives the descriptor.
    pub(super) fn attach_over(self, path: &str) -> Result<OwnedFd, SetupError> {
        rustix::mount::move_mount(&self.fd, "", CWD, path, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
            .step(Step::FileSystem, format_args!("attach the new root to {path}"))?;
        Ok(self.fd)
    }

    /// Attaches it below `root`, creating the place for it.
    pub(super) fn attach(self, root: &OwnedFd, path: &str) -> Result<(), SetupError> {
        let step = Step::FileSystem;
        let attempt = format_args!("attach /{path}").to_string();
        if self.is_directory {
            make_directories(root, path)?;
        } else {
            if let Some((parent, _)) = path.rsplit_once('/') {
                make_directories(root, parent)?;
            }
            let flags = OFlags::CREATE | OFlags::WRONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
            match rustix::fs::openat(root, path, flags, Mode::from_raw_mode(0o644)) {
                // An existing file, such as one of /proc, is covered as it is.
                Ok(_)
                | Err(
                    rustix::io::Errno::ROFS | rustix::io::Errno::ACCESS | rustix::io::Errno::PERM,
                ) => {}
                Err(error) => return Err(error).step(step, attempt),
            }
        }
        let place = open_below(root, path).step(step, &attempt)?;
        self.attach_at(&place, &attempt)
    }

    /// Attaches it at exactly the file or directory that `place` names.
    pub(super) fn attach_at(self, place: &OwnedFd, attempt: &str) -> Result<(), SetupError> {
        rustix::mount::move_mount(
            &self.fd,
            "",
            place,
            "",
            MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH,
        )
        .step(Step::FileSystem, attempt)
    }
}

/// Opens a place below `root` without following any symbolic link.
pub(super) fn open_below(root: &OwnedFd, path: impl AsRef<Path>) -> rustix::io::Result<OwnedFd> {
    rustix::fs::openat2(
        root,
        path.as_ref(),
        OFlags::PATH | OFlags::CLOEXEC,
        Mode::empty(),
        ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS,
    )
}

/// Creates a directory and those above it, all of which may exist.
pub(super) fn make_directories(root: &OwnedFd, path: &str) -> Result<(), SetupError> {
    let ends = path.match_indices('/').map(|(at, _)| at).chain([path.len()]);
    for end in ends {
        match rustix::fs::mkdirat(root, &path[..end], Mode::from_raw_mode(0o755)) {
            Ok(()) | Err(rustix::io::Errno::EXIST) => {}
            Err(error) => {
                return Err(error).step(Step::FileSystem, format_args!("create /{}", &path[..end]));
            }
        }
    }
    Ok(())
}
