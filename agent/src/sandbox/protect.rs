//! Names in a workspace that other programs on the host would execute or obey: a command may read
//! them, not change them.
//!
//! A command that plants a git hook or an editor task has escaped as soon as a person uses git or
//! the editor there. What [`super::survey`] found is pinned by mounts over itself: it can then be
//! neither moved nor replaced from inside, nor changed where that is forbidden, and the same holds
//! for every directory on the way to it. Names that do not exist are not created as mount points,
//! which would leave empty files behind; [`super::planted`] finds what appeared.
//!
//! A mount does not bind programs outside. If one of them replaces a pinned file, the kernel takes
//! the mount away; if one moves it, the mount goes with it: either way the command could have the
//! name. Pid 1 is told of both by the kernel ([`Watch`]) and ends the command.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Mode, OFlags, ResolveFlags, StatxAttributes, StatxFlags};
use rustix::io::Errno;
use rustix::process::Signal;

use super::mounts::Detached;
use super::spec::{Context as _, Pin, SetupError, Step, WORKSPACE_INSIDE};
use super::survey::{Hold, Seen, Survey};
use super::syscalls::{self, READ_ONLY};

/// What is to be pinned of what was found: all that is there.
pub(super) fn pins(survey: &Survey) -> Vec<Pin> {
    survey
        .names
        .iter()
        .filter(|(_, found)| found.seen != Seen::Nothing)
        .map(|(name, found)| Pin {
            name: name.as_os_str().as_bytes().to_vec(),
            read_only: found.hold == Hold::ReadOnly,
        })
        .collect()
}

/// Pins names in the workspace below `root`; those above come first. Gives the paths of those that
/// are there, as they are inside.
pub(super) fn pin(root: &OwnedFd, pins: &[Pin]) -> Result<Vec<PathBuf>, SetupError> {
    let mut pinned = Vec::new();
    for Pin { name, read_only } in pins {
        let inside = Path::new(WORKSPACE_INSIDE).join(OsStr::from_bytes(name));
        if cover(root, &inside, if *read_only { READ_ONLY } else { 0 })? {
            pinned.push(inside);
        }
    }
    Ok(pinned)
}

/// Mounts a file, link or directory over itself; false if nothing can be reached there.
fn cover(root: &OwnedFd, inside: &Path, attributes: u64) -> Result<bool, SetupError> {
    let attempt = format!("protect {inside:?}");
    let name = inside.strip_prefix("/").unwrap_or(inside);
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let place = match rustix::fs::openat2(root, name, flags, Mode::empty(), resolve) {
        Ok(place) => place,
        // Neither can the command reach what its own user cannot look at.
        Err(Errno::NOENT | Errno::NOTDIR | Errno::ACCESS | Errno::LOOP) => return Ok(false),
        Err(error) => return Err(error).step(Step::Workspace, attempt),
    };
    Detached::copy_at(&place, inside, attributes)?.attach_at(&place, &attempt)?;
    Ok(true)
}

/// Tells pid 1 when a pin is lost. The command has the moment between the loss and its own end.
pub(super) struct Watch {
    pins: Vec<PathBuf>,
    /// Ready when a mount of this sandbox was taken away.
    mounts: File,
    /// Ready when something was renamed in a directory that holds a pin, which moves a mount along
    /// and is no change of mounts.
    renames: OwnedFd,
    _directories: Vec<OwnedFd>,
}

impl Watch {
    /// Begins to watch; fails if a pin is lost already. None where there is nothing to be watched.
    pub(super) fn begin(pins: Vec<PathBuf>) -> Result<Option<Self>, SetupError> {
        if pins.is_empty() {
            return Ok(None);
        }
        let step = Step::ProtectedNames;
        let renames = syscalls::signal_descriptor(Signal::IO).step(step, "watch for renames")?;
        let mounts = File::open("/proc/self/mountinfo").step(step, "watch the mounts")?;
        let parents: BTreeSet<_> = pins.iter().filter_map(|pin| pin.parent()).collect();
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        // Where a kernel cannot tell of renames (or the command's user may not list the directory),
        // what was moved is still missed when the old file is removed, and after the command.
        let directories = parents
            .into_iter()
            .filter_map(|parent| {
                let directory = rustix::fs::openat(CWD, parent, flags, Mode::empty()).ok()?;
                syscalls::signal_renames(directory.as_fd()).ok()?;
                Some(directory)
            })
            .collect();
        let watch = Self { pins, mounts, renames, _directories: directories };
        watch.check()?;
        Ok(Some(watch))
    }

    /// What to wait on: readable signals, and an exceptional condition.
    pub(super) fn descriptors(&self) -> (BorrowedFd<'_>, BorrowedFd<'_>) {
        (self.renames.as_fd(), self.mounts.as_fd())
    }

    /// Takes the signals that have come, and fails if a pin is lost.
    pub(super) fn check(&self) -> Result<(), SetupError> {
        let mut arrivals = [0; 256];
        rustix::io::read(&self.renames, &mut arrivals).ok();
        // Every path is looked up anew, as the command itself would.
        match self.pins.iter().find(|pin| !is_mount(pin)) {
            None => Ok(()),
            Some(lost) => Err(SetupError::new(
                Step::ProtectedNames,
                format!("somebody outside replaced, moved or removed {}", lost.display()),
            )),
        }
    }
}

fn is_mount(path: &Path) -> bool {
    let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
    rustix::fs::statx(CWD, path, flags, StatxFlags::TYPE)
        .is_ok_and(|found| found.stx_attributes.contains(StatxAttributes::MOUNT_ROOT))
}
