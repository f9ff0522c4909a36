//! The agent's own directory on the file system of a workspace: where files are put together, where
//! displaced ones are kept for a while, and where the file system's clock is read.
//!
//! Files move between it and the workspace by rename, so both have to be on one mount. It is looked
//! for, in this order: in the agent's state directory, as a hidden sibling of the root, as `.cortex`
//! in the root. The last is last because tools that clean a working tree would empty it.
//!
//! Files that operators write from afar are put together in a part of their own: see [`Incoming`].
//!
//! After a crash, what lies in the stage may be a user's file that was being displaced: it is moved
//! to the trash, never deleted.

use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{DirBuilderExt as _, FileExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use cortex_shared::ids::WorkspaceId;

mod incoming;

pub use self::incoming::{Draft, Incoming};
use super::scan::Clock;
use crate::root_dir::{DirHandle, file_meta};

/// How long displaced files are kept.
const TRASH_AGE: Duration = Duration::from_secs(24 * 3600);
/// How much of them is kept: the oldest go first.
const TRASH_BYTES: u64 = 1 << 30;
const PROBE: &[u8] = b"probe";
const TRASH: &[u8] = b"trash";

/// An open private directory. Owned by the engine of its workspace.
#[derive(Debug)]
pub struct PrivateDir {
    path: PathBuf,
    stage: DirHandle,
    trash: DirHandle,
    probe: File,
    tick_ns: i64,
    next_name: AtomicU64,
}

impl PrivateDir {
    /// Finds or makes the private directory of the workspace at `root_path`, and empties its stage.
    ///
    /// # Errors
    /// If there is no place on the root's file system where it can be.
    pub fn open(
        workspace: WorkspaceId,
        state_folder: &Path,
        root_path: &Path,
        root: &DirHandle,
    ) -> io::Result<Self> {
        in_candidates(workspace, state_folder, root_path, root, |path, top| {
            Self::open_in(path, top)
        })
    }

    fn open_in(path: &Path, top: &DirHandle) -> io::Result<Self> {
        make_parts(top, &[b"stage", TRASH])?;
        let probe = match top.create_new(PROBE, 0o600) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                top.open_for_writing(PROBE)?
            }
            result => result?,
        };
        let private = Self {
            path: path.to_owned(),
            stage: top.open_dir(b"stage")?,
            trash: top.open_dir(TRASH)?,
            tick_ns: tick_ns(&probe)?,
            probe,
            next_name: AtomicU64::new(0),
        };
        for name in private.stage.names()? {
            private.discard(&name)?;
        }
        private.empty_trash()?;
        Ok(private)
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where files are put together.
    #[must_use]
    pub fn stage(&self) -> &DirHandle {
        &self.stage
    }

    /// Where displaced files go.
    #[must_use]
    pub fn trash(&self) -> &DirHandle {
        &self.trash
    }

    /// A name that is not in use in the stage.
    pub fn stage_name(&self) -> Vec<u8> {
        self.next_name.fetch_add(1, Ordering::Relaxed).to_string().into_bytes()
    }

    /// A name that is not in use in the trash; tells when it was made.
    pub fn trash_name(&self) -> Vec<u8> {
        trash_name(self.next_name.fetch_add(1, Ordering::Relaxed))
    }

    /// Moves something from the stage to the trash; returns its name there.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn discard(&self, stage_name: &[u8]) -> io::Result<Vec<u8>> {
        let name = self.trash_name();
        self.stage.rename_new(stage_name, &self.trash, &name)?;
        Ok(name)
    }

    /// Reads the file system's clock.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn clock(&self) -> io::Result<Clock> {
        self.probe.write_all_at(b"x", 0)?;
        let meta = file_meta(&self.probe)?;
        Ok(Clock { now_ns: meta.mtime_ns.max(meta.ctime_ns), tick_ns: self.tick_ns })
    }

    /// Removes what has been in the trash for a day, and the oldest of what is over a GiB.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn empty_trash(&self) -> io::Result<()> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let mut kept_bytes = 0;
        // The names begin with the time: newest first.
        for name in self.trash.names()?.into_iter().rev() {
            let Some(meta) = self.trash.try_lstat(&name)? else { continue };
            kept_bytes += meta.size;
            let made_ms = name
                .split(|&b| b == b'-')
                .next()
                .and_then(|digits| std::str::from_utf8(digits).ok())
                .and_then(|digits| digits.parse().ok())
                .unwrap_or(0);
            let old = now.saturating_sub(Duration::from_millis(made_ms)) > TRASH_AGE;
            if old || kept_bytes > TRASH_BYTES {
                self.trash.remove_file(&name)?;
            }
        }
        Ok(())
    }
}

/// A name for the trash that tells when it was made.
fn trash_name(number: impl std::fmt::Display) -> Vec<u8> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    format!("{:015}-{}-{number}", now.as_millis(), std::process::id()).into_bytes()
}

/// Opens the private directory at the first place that is on the root's file system, and takes what
/// `open` makes of it.
fn in_candidates<T>(
    workspace: WorkspaceId,
    state_folder: &Path,
    root_path: &Path,
    root: &DirHandle,
    open: impl Fn(&Path, &DirHandle) -> io::Result<T>,
) -> io::Result<T> {
    let mount = root.mount()?;
    let mut candidates = vec![state_folder.join("files")];
    if let (Some(parent), Some(name)) = (root_path.parent(), root_path.file_name()) {
        let name = String::from_utf8_lossy(name.as_bytes()).chars().take(64).collect::<String>();
        candidates.push(parent.join(format!(".{name}.cortex-{workspace}")));
    }
    candidates.push(root_path.join(".cortex"));
    let mut last_error = io::Error::from(io::ErrorKind::NotFound);
    for path in candidates {
        match open_top(&path, mount).and_then(|top| top.map(|top| open(&path, &top)).transpose()) {
            Ok(Some(opened)) => return Ok(opened),
            Ok(None) => {}
            Err(error) => last_error = error,
        }
    }
    Err(last_error)
}

/// Finds or makes a private directory; `None` if it would be on another mount.
fn open_top(path: &Path, mount: (u64, u64)) -> io::Result<Option<DirHandle>> {
    let made = match std::fs::DirBuilder::new().mode(0o700).create(path) {
        Ok(()) => true,
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => false,
        Err(error) => return Err(error),
    };
    let top = DirHandle::open_ambient(path)?;
    if top.mount()? != mount {
        if made {
            std::fs::remove_dir(path)?;
        }
        return Ok(None);
    }
    Ok(Some(top))
}

fn make_parts(top: &DirHandle, names: &[&[u8]]) -> io::Result<()> {
    for name in names {
        match top.make_dir(name, 0o700) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

/// How far apart two changes of a file have to be to surely get different times.
fn tick_ns(file: &File) -> io::Result<i64> {
    // ext, xfs, btrfs, tmpfs, overlay, f2fs, zfs, bcachefs: the kernel's tick, at most 10 ms.
    const FINE: [i64; 8] = [
        0xef53,
        0x5846_5342,
        0x9123_683e,
        0x0102_1994,
        0x794c_7630,
        0xf2f5_2010,
        0x2fc1_2fc1,
        0xca45_1a4e,
    ];
    #[allow(clippy::unnecessary_cast)] // its width differs between architectures
    let kind = rustix::fs::fstatfs(file)?.f_type as i64;
    // Unknown ones may be FAT, whose times are even seconds, or on the other side of a network.
    Ok(if FINE.contains(&kind) { 10_000_000 } else { 2_000_000_000 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leftovers_of_a_crash_are_kept_in_the_trash() {
        let folder = tempfile::tempdir().unwrap();
        let (state, root) = (folder.path().join("state"), folder.path().join("root"));
        std::fs::create_dir(&state).unwrap();
        std::fs::create_dir(&root).unwrap();
        let handle = DirHandle::open_ambient(&root).unwrap();
        let open = || PrivateDir::open(WorkspaceId::new(), &state, &root, &handle).unwrap();
        let private = open();
        assert_eq!(private.path(), state.join("files"));
        std::fs::write(private.path().join("stage/7"), b"somebody's").unwrap();
        std::fs::write(private.path().join("trash/000000000000001-1-1"), b"old").unwrap();
        let private = open();
        assert!(private.stage().names().unwrap().is_empty());
        assert_eq!(private.trash().names().unwrap().len(), 1);
        let first = private.clock().unwrap().now_ns;
        assert!(private.clock().unwrap().now_ns >= first);
    }

    #[test]
    #[allow(clippy::print_stderr)] // a skipped test says so
    fn a_state_directory_on_another_mount_is_not_used() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("root");
        std::fs::create_dir(&root).unwrap();
        let handle = DirHandle::open_ambient(&root).unwrap();
        let shm = Path::new("/dev/shm");
        if DirHandle::open_ambient(shm).and_then(|d| d.mount()).ok() == handle.mount().ok() {
            eprintln!("skipped: no second file system to try");
            return;
        }
        let Ok(state) = tempfile::tempdir_in(shm) else {
            eprintln!("skipped: cannot write to /dev/shm");
            return;
        };
        let workspace = WorkspaceId::new();
        let private = PrivateDir::open(workspace, state.path(), &root, &handle).unwrap();
        assert_eq!(private.path(), folder.path().join(format!(".root.cortex-{workspace}")));
        assert_eq!(std::fs::read_dir(state.path()).unwrap().count(), 0);
    }
}
