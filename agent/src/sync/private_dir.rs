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

use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use cortex_shared::ids::WorkspaceId;

mod incoming;

pub use self::incoming::{Draft, Incoming};
use super::ground::Ground;
use super::scan::Clock;
use crate::root_dir::{DirHandle, Disk, FileHandle, Meta};

/// How long displaced files are kept.
const TRASH_AGE: Duration = Duration::from_secs(24 * 3600);
/// How much of them is kept for that long: the oldest go first.
const TRASH_BYTES: u64 = 1 << 30;
/// How long those are kept that are too large for it, as long as they leave half of the free room.
const LARGE_AGE: Duration = Duration::from_secs(3600);
const PROBE: &[u8] = b"probe";
/// What begins the names of files in the stage that have never stood in the tree.
const PART: &[u8] = b"part-";
const TRASH: &[u8] = b"trash";

/// An open private directory. Owned by the engine of its workspace.
pub struct PrivateDir {
    path: PathBuf,
    stage: DirHandle,
    trash: DirHandle,
    probe: FileHandle,
    tick_ns: i64,
    /// See [`tells_changes_apart`].
    told_apart: bool,
    wall_ms: Arc<dyn Fn() -> i64 + Send + Sync>,
    next_name: AtomicU64,
}

impl PrivateDir {
    /// Finds or makes the private directory of the workspace at `root_path`, and empties its stage.
    ///
    /// # Errors
    /// If there is no place on the root's file system where it can be.
    pub(super) fn open(
        ground: &Ground,
        workspace: WorkspaceId,
        state_folder: &Path,
        root_path: &Path,
        root: &DirHandle,
    ) -> io::Result<Self> {
        in_candidates(&*ground.disk, workspace, state_folder, root_path, root, |path, top| {
            Self::open_in(ground, path, top)
        })
    }

    fn open_in(ground: &Ground, path: &Path, top: &DirHandle) -> io::Result<Self> {
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
            tick_ns: top.file_system()?.tick_ns,
            told_apart: tells_changes_apart(&probe)?,
            probe,
            wall_ms: ground.wall_ms.clone(),
            next_name: AtomicU64::new(0),
        };
        for name in private.stage.names()? {
            if name.starts_with(PART) {
                private.stage.remove_file(&name)?;
            } else {
                match private.discard(&name) {
                    // Where files cannot change places, what a staged one displaces goes to the trash under
                    // its name first.
                    Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                        private.discard_anew(&name)?;
                    }
                    result => result?,
                }
            }
        }
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

    /// A name that is in use neither in the stage nor in the trash; tells when it was made. What is
    /// displaced by a staged file goes to the trash under its name, after a crash as well.
    pub fn stage_name(&self) -> Vec<u8> {
        trash_name(self.now_ms(), self.next_name.fetch_add(1, Ordering::Relaxed))
    }

    /// As [`Self::stage_name`], for a large file that is not whole yet: what a crash leaves of it is
    /// nobody's and is removed. It has to get another name before it takes its place in the tree.
    pub fn part_name(&self) -> Vec<u8> {
        [PART, &self.stage_name()].concat()
    }

    /// The name of a file in the stage once it is whole.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn whole(&self, stage_name: &[u8]) -> io::Result<Vec<u8>> {
        if !stage_name.starts_with(PART) {
            return Ok(stage_name.to_vec());
        }
        let name = self.stage_name();
        self.stage.rename_new(stage_name, &self.stage, &name)?;
        Ok(name)
    }

    fn now_ms(&self) -> u64 {
        (self.wall_ms)().max(0).unsigned_abs()
    }

    /// Moves something from the stage to the trash, under its name.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn discard(&self, stage_name: &[u8]) -> io::Result<()> {
        self.stage.rename_new(stage_name, &self.trash, stage_name)
    }

    /// As [`Self::discard`], under a name that is free there.
    fn discard_anew(&self, stage_name: &[u8]) -> io::Result<()> {
        loop {
            match self.stage.rename_new(stage_name, &self.trash, &self.stage_name()) {
                // Of this process, too, if it has opened the directory twice in this millisecond.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                result => return result,
            }
        }
    }

    /// Reads the file system's clock.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn clock(&self) -> io::Result<Clock> {
        self.probe.write_all_at(b"x", 0)?;
        let meta = self.probe.meta()?;
        Ok(Clock { now_ns: meta.mtime_ns.max(meta.ctime_ns), tick_ns: self.tick_ns })
    }

    /// The same for files that are read between two looks at their times: where changes are told apart,
    /// one after the first look has another time, and none is too young to be believed. What we have put
    /// in its place ourselves nobody has looked at before.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn clock_of_readers(&self) -> io::Result<Clock> {
        let clock = self.clock()?;
        Ok(if self.told_apart { Clock { tick_ns: 0, ..clock } } else { clock })
    }

    /// Removes what has been in the trash for a day, and of what takes more than a GiB the oldest. A
    /// file that is too large for that costs no other its place; it is kept for an hour. One that cannot be
    /// looked at or removed stays, and keeps no other.
    ///
    /// # Errors
    /// If the trash cannot be read.
    pub fn empty_trash(&self) -> io::Result<()> {
        let (now, free) = (self.now_ms(), self.trash.file_system()?.free_bytes);
        let mut kept = Kept::new(free);
        // The names begin with the time: newest first.
        for name in self.trash.names()?.into_iter().rev() {
            let bytes = match self.trash.allocated(&name) {
                Ok(bytes) => bytes,
                Err(error) => {
                    stays(&name, &error);
                    continue;
                }
            };
            let made_ms = name
                .split(|&b| b == b'-')
                .next()
                .and_then(|digits| std::str::from_utf8(digits).ok())
                .and_then(|digits| digits.parse().ok())
                .unwrap_or(0);
            if !kept.takes(bytes, Duration::from_millis(now.saturating_sub(made_ms))) {
                self.trash.remove_file(&name).unwrap_or_else(|error| stays(&name, &error));
            }
        }
        Ok(())
    }
}

fn stays(name: &[u8], error: &io::Error) {
    if error.kind() != io::ErrorKind::NotFound {
        tracing::warn!(name = %name.escape_ascii(), %error, "a file stays in the trash");
    }
}

/// Room in the trash.
struct Kept {
    room: u64,
    /// For what does not fit there.
    spare: u64,
}

impl Kept {
    fn new(free_bytes: u64) -> Self {
        Self { room: TRASH_BYTES, spare: free_bytes / 2 }
    }

    /// Whether a file is kept; the newest has to ask first.
    fn takes(&mut self, bytes: u64, age: Duration) -> bool {
        let (place, limit) = if bytes <= self.room {
            (&mut self.room, TRASH_AGE)
        } else {
            (&mut self.spare, LARGE_AGE)
        };
        let kept = age <= limit && bytes <= *place;
        if kept {
            *place -= bytes;
        }
        kept
    }
}

/// A name for the trash that tells when it was made.
fn trash_name(now_ms: u64, number: impl std::fmt::Display) -> Vec<u8> {
    format!("{now_ms:015}-{}-{number}", std::process::id()).into_bytes()
}

/// Opens the private directory at the first place that is on the root's file system, and takes what
/// `open` makes of it.
fn in_candidates<T>(
    disk: &dyn Disk,
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
        let top = open_top(disk, &path, mount);
        match top.and_then(|top| top.map(|top| open(&path, &top)).transpose()) {
            Ok(Some(opened)) => return Ok(opened),
            Ok(None) => {}
            // Whatever else fails here may work the next time, and there may be files in it.
            Err(error)
                if !matches!(
                    error.kind(),
                    io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem
                ) =>
            {
                return Err(error);
            }
            Err(error) => last_error = error,
        }
    }
    Err(last_error)
}

/// Finds or makes a private directory; `None` if it would be on another mount.
fn open_top(disk: &dyn Disk, path: &Path, mount: (u64, u64)) -> io::Result<Option<DirHandle>> {
    let made = match disk.make(path, 0o700) {
        Ok(()) => true,
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => false,
        Err(error) => return Err(error),
    };
    let top = disk.open(path)?;
    if top.mount()? != mount {
        if made {
            disk.remove(path)?;
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

/// Whether a change gets another time than the one before whenever somebody has looked at the file in
/// between, however short the time: since Linux 6.13 it does on ext4, xfs, btrfs and tmpfs, whose times
/// are as fine as that takes ("multigrain timestamps"). Then no time is ever too young to be believed.
/// Elsewhere all of this happens within one tick, or two.
fn tells_changes_apart(probe: &FileHandle) -> io::Result<bool> {
    const CHANGES: usize = 16;
    let mut last = None;
    for _ in 0..CHANGES {
        probe.write_all_at(b"x", 0)?;
        let Meta { mtime_ns, ctime_ns, .. } = probe.meta()?;
        if last.is_some_and(|(mtime, ctime)| mtime == mtime_ns || ctime == ctime_ns) {
            return Ok(false);
        }
        last = Some((mtime_ns, ctime_ns));
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[allow(clippy::print_stderr)]
    fn where_changes_are_told_apart_no_two_have_the_same_time() {
        let folder = tempfile::tempdir().unwrap();
        let top = crate::root_dir::DirHandle::open_ambient(folder.path()).unwrap();
        let probe = top.create_new(b"probe", 0o600).unwrap();
        if !tells_changes_apart(&probe).unwrap() {
            eprintln!("skipped: this kernel or file system has times as coarse as its tick");
            return;
        }
        let times: std::collections::HashSet<_> = (0..10_000)
            .map(|_| {
                probe.write_all_at(b"x", 0).unwrap();
                probe.meta().unwrap().ctime_ns
            })
            .collect();
        assert_eq!(times.len(), 10_000);
    }

    #[test]
    fn leftovers_of_a_crash_are_kept_in_the_trash() {
        let folder = tempfile::tempdir().unwrap();
        let (state, root) = (folder.path().join("state"), folder.path().join("root"));
        std::fs::create_dir(&state).unwrap();
        std::fs::create_dir(&root).unwrap();
        let handle = DirHandle::open_ambient(&root).unwrap();
        let ground = Ground::real();
        let open =
            || PrivateDir::open(&ground, WorkspaceId::new(), &state, &root, &handle).unwrap();
        let private = open();
        assert_eq!(private.path(), state.join("files"));
        let left = String::from_utf8(private.stage_name()).unwrap();
        std::fs::write(private.path().join("stage").join(&left), b"somebody's").unwrap();
        std::fs::write(private.path().join("trash/000000000000001-1-1"), b"old").unwrap();
        let part = String::from_utf8(private.part_name()).unwrap();
        std::fs::write(private.path().join("stage").join(&part), b"half of a large file").unwrap();
        let private = open();
        assert!(private.stage().names().unwrap().is_empty());
        let trash = private.trash().names().unwrap();
        assert_eq!(trash.len(), 2, "what may be somebody's, and what nobody has looked at yet");
        private.empty_trash().unwrap();
        assert_eq!(private.trash().names().unwrap(), trash[1..]);
        // The process ended between the two steps of a replacement: one name for what was displaced, and
        // for what was to take its place.
        let name = String::from_utf8(private.stage_name()).unwrap();
        std::fs::write(private.path().join("stage").join(&name), b"ours").unwrap();
        std::fs::write(private.path().join("trash").join(&name), b"displaced").unwrap();
        let private = open();
        assert!(private.stage().names().unwrap().is_empty());
        let in_trash = |name: &[u8]| {
            let name = std::str::from_utf8(name).unwrap();
            std::fs::read_to_string(private.path().join("trash").join(name)).unwrap()
        };
        let kept: Vec<_> = private.trash().names().unwrap().iter().map(|n| in_trash(n)).collect();
        assert!(kept.contains(&"ours".to_owned()), "{kept:?}");
        assert_eq!(in_trash(name.as_bytes()), "displaced", "it is looked for under its name");
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
        let private =
            PrivateDir::open(&Ground::real(), workspace, state.path(), &root, &handle).unwrap();
        assert_eq!(private.path(), folder.path().join(format!(".root.cortex-{workspace}")));
        assert_eq!(std::fs::read_dir(state.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_large_file_in_the_trash_costs_no_other_its_place() {
        let (mib, gib, hour) = (1 << 20, 1 << 30, Duration::from_secs(3600));
        let mut kept = Kept::new(10 * gib);
        // From the newest to the oldest.
        for (bytes, age, expected) in [
            (3 * gib, hour / 2, true),
            (3 * gib, hour / 2, false),
            (600 * mib, hour / 2, true),
            (100 * mib, 2 * hour, true),
            (3 * gib, 2 * hour, false),
            (600 * mib, 3 * hour, false),
            (mib, 23 * hour, true),
            (mib, 25 * hour, false),
        ] {
            assert_eq!(kept.takes(bytes, age), expected, "{bytes} {age:?}");
        }
    }
}
