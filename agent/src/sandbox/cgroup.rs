//! Control groups: limits that count a whole command, where this machine lets the agent set them.
//!
//! | | needs | entered |
//! |---|---|---|
//! | version 2 | memory and pids in a group delegated to the agent (systemd: `Delegate=yes`) or the root of a container's own hierarchy | by the clone that creates the command: no cost |
//! | version 1 | root | by writing the process id, before it is known which command it will be |
//!
//! In version 2 the kernel ends all of a command at once if it runs out of memory; in version 1,
//! one process after another.
//!
//! Without either, resource limits of each process are what there is, and the node's report says
//! so. The agent owns the groups it creates: one a command, removed with it. What a crash of the
//! agent leaves is empty, and removed by the next start that finds no other agent at work there:
//! each holds a shared lock on the directory that its groups are in.

use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};
use rustix::process::{Pid, Signal, kill_process};

use super::remedy::Refusal;
use super::spec::Limits;

const PREFIX: &str = "cortex-command-";
/// Where the agent itself lives below its delegated group: a group with limits for its children
/// may hold no processes of its own.
const AGENT_GROUP: &str = "cortex-agent";

/// The groups of an agent's commands.
#[derive(Debug, Default)]
pub(super) struct ControlGroups {
    place: Place,
    /// Locked for as long as this agent may have groups there.
    _in_use: Vec<OwnedFd>,
}

/// Where the agent may create groups.
#[derive(Debug, Default)]
enum Place {
    /// Nowhere.
    #[default]
    None,
    /// Below this directory.
    V2(PathBuf),
    /// Below these, one for each controller.
    V1 { memory: PathBuf, processes: PathBuf },
}

impl ControlGroups {
    /// Finds out by trying. Moves the agent to a group of its own where that is necessary.
    pub(super) fn prepare() -> Self {
        match OwnGroups::of_this_process() {
            Ok(own) => Self::at(own.v2().or_else(|| own.v1()).unwrap_or_default()),
            Err(error) => {
                tracing::debug!(%error, "no control groups");
                Self::default()
            }
        }
    }

    fn at(place: Place) -> Self {
        let in_use = place.parents().into_iter().filter_map(|parent| {
            let lock = lock_and_clean(parent);
            lock.inspect_err(|error| tracing::debug!(?parent, %error, "leftovers stay")).ok()
        });
        Self { _in_use: in_use.collect(), place }
    }

    /// What [`ControlGroups::prepare`] would probably find, without changing anything.
    pub(super) fn likely_version() -> &'static str {
        match OwnGroups::of_this_process() {
            Ok(places) if places.v2_delegated().is_some() => "v2",
            Ok(places) if places.v1().is_some() => "v1",
            Ok(_) | Err(_) => "none",
        }
    }

    /// Why a command is refused that must have a group.
    pub(super) fn required_and_missing() -> Refusal {
        Refusal {
            what: "control group",
            why: "this node's owner requires one for each command, and the agent may create none"
                .to_owned(),
            remedy:
                "delegate a control group to the agent (systemd: Delegate=yes in its unit), or \
                     take require_cgroup out of its settings"
                    .to_owned(),
        }
    }

    /// "v2", "v1" or "none".
    pub(super) fn version(&self) -> &'static str {
        match self.place {
            Place::None => "none",
            Place::V2(_) => "v2",
            Place::V1 { .. } => "v1",
        }
    }

    /// A group for one command; none where there can be none. What the command may use is set by
    /// [`Group::limit`], before it runs.
    pub(super) fn new_group(&self) -> io::Result<Option<Group>> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("{PREFIX}{}-{number}", std::process::id());
        let mut group = Group::default();
        match &self.place {
            Place::None => return Ok(None),
            Place::V2(parent) => {
                group.kind = Kind::V2;
                let directory = group.create(parent.join(&name))?;
                group.entrance.push(File::open(&directory)?.into());
            }
            Place::V1 { memory, processes } => {
                group.kind = Kind::V1;
                for parent in [memory, processes] {
                    let directory = parent.join(&name);
                    if !group.directories.contains(&directory) {
                        let directory = group.create(directory)?;
                        group.entrance.push(entrance(&directory)?);
                    }
                }
            }
        }
        Ok(Some(group))
    }
}

impl Place {
    fn parents(&self) -> Vec<&Path> {
        match self {
            Self::None => Vec::new(),
            Self::V2(parent) => vec![parent],
            Self::V1 { memory, processes } if memory == processes => vec![memory],
            Self::V1 { memory, processes } => vec![memory, processes],
        }
    }
}

/// Takes this agent's share of the lock on `parent`, and removes what crashed agents left there if
/// it is the only one.
///
/// A group is empty for a moment between its creation and its first process: only the lock tells
/// another agent's new group from one that was left behind. Nothing waits, as anybody may lock a
/// directory that he can read.
fn lock_and_clean(parent: &Path) -> io::Result<OwnedFd> {
    let directory: OwnedFd = File::open(parent)?.into();
    if flock(&directory, FlockOperation::NonBlockingLockExclusive).is_ok() {
        for entry in std::fs::read_dir(parent)?.flatten() {
            if entry.file_name().to_string_lossy().starts_with(PREFIX) {
                std::fs::remove_dir(entry.path()).ok();
            }
        }
    }
    flock(&directory, FlockOperation::NonBlockingLockShared)?;
    Ok(directory)
}

fn entrance(directory: &Path) -> io::Result<OwnedFd> {
    File::options().write(true).open(directory.join("cgroup.procs")).map(OwnedFd::from)
}

fn write(path: &Path, text: &str) -> io::Result<()> {
    // A control file is written by one call; it is never created.
    File::options().write(true).open(path)?.write_all(text.as_bytes())
}

/// The group of one command. Dropping it removes it.
#[derive(Debug, Default)]
pub struct Group {
    directories: Vec<PathBuf>,
    entrance: Vec<OwnedFd>,
    kind: Kind,
}

/// How a group is entered and limited.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Kind {
    /// There is none.
    #[default]
    None,
    V1,
    V2,
}

impl Group {
    fn create(&mut self, directory: PathBuf) -> io::Result<PathBuf> {
        std::fs::create_dir(&directory)?;
        self.directories.push(directory.clone());
        Ok(directory)
    }

    /// Whether a command's first process is created in it.
    pub(super) fn is_born_into(&self) -> bool {
        self.kind == Kind::V2
    }

    /// Whether there is one.
    #[must_use]
    pub fn exists(&self) -> bool {
        self.kind != Kind::None
    }

    /// Sets what the command may use.
    pub(super) fn limit(&self, limits: &Limits) -> io::Result<()> {
        let memory = limits.memory_bytes.to_string();
        // The monitor and pid 1 are not the command's.
        let processes = (limits.processes + 2).to_string();
        match (self.kind, self.directories.as_slice()) {
            (Kind::V2, [directory]) => {
                write(&directory.join("memory.max"), &memory)?;
                write(&directory.join("pids.max"), &processes)?;
                // Not there on a kernel without swap accounting.
                write(&directory.join("memory.swap.max"), "0").ok();
                // A command that lost one process for want of memory is not worth continuing, and
                // what is left of it could go on eating.
                write(&directory.join("memory.oom.group"), "1")?;
                // The agent's own group has the usual 100: it stays responsive beside a command
                // that takes every processor. Not there without the cpu controller.
                write(&directory.join("cpu.weight"), "50").ok();
            }
            (Kind::V1, [memory_group, rest @ ..]) => {
                write(&memory_group.join("memory.limit_in_bytes"), &memory)?;
                write(&memory_group.join("memory.memsw.limit_in_bytes"), &memory).ok();
                // Where one hierarchy has both, it is one directory.
                let processes_group = rest.first().unwrap_or(memory_group);
                write(&processes_group.join("pids.max"), &processes)?;
            }
            _ => {}
        }
        Ok(())
    }

    /// What the stage enters it by: a directory for version 2, files to write to for version 1.
    pub(super) fn entrance(&self) -> &[OwnedFd] {
        &self.entrance
    }

    /// Ends what is left in it: of a permissive command, whose processes nobody else finds if it has
    /// ended the process that watched over them. Waits a moment until they are gone.
    pub fn end_all(&self) {
        const ROUNDS: usize = 200;
        for directory in &self.directories {
            for _ in 0..ROUNDS {
                let members = std::fs::read_to_string(directory.join("cgroup.procs"));
                let members: Vec<Pid> = members
                    .iter()
                    .flat_map(|list| list.lines())
                    .filter_map(|line| Pid::from_raw(line.parse().ok()?))
                    .collect();
                if members.is_empty() {
                    break;
                }
                // All at once where the kernel can (5.14, version 2); else faster than they fork.
                if write(&directory.join("cgroup.kill"), "1").is_err() {
                    for member in members {
                        kill_process(member, Signal::KILL).ok();
                    }
                }
                std::thread::sleep(Duration::from_millis(10));
            }
        }
    }

    /// Whether the kernel ended a process of it for want of memory.
    #[must_use]
    pub fn ran_out_of_memory(&self) -> bool {
        self.directories
            .iter()
            .flat_map(|directory| {
                ["memory.events", "memory.oom_control"].map(|name| directory.join(name))
            })
            .filter_map(|path| std::fs::read_to_string(path).ok())
            .any(|text| {
                text.lines()
                    .filter_map(|line| line.strip_prefix("oom_kill "))
                    .any(|count| count.trim() != "0")
            })
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.entrance.clear();
        for directory in &self.directories {
            if let Err(error) = std::fs::remove_dir(directory) {
                // The next start of the agent removes it.
                tracing::debug!(?directory, %error, "a control group stays behind");
            }
        }
    }
}

/// The groups that this process is in, as directories.
struct OwnGroups {
    v2: Option<OwnGroup>,
    memory: Option<OwnGroup>,
    processes: Option<OwnGroup>,
}

struct OwnGroup {
    directory: PathBuf,
    /// It is the root of the hierarchy, as far as this process can see.
    is_root: bool,
}

impl OwnGroups {
    fn of_this_process() -> io::Result<Self> {
        let groups = std::fs::read_to_string("/proc/self/cgroup")?;
        let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
        Ok(Self::from_tables(&groups, &mounts))
    }

    fn from_tables(groups: &str, mounts: &str) -> Self {
        // Group lines are NUMBER:CONTROLLERS:PATH; version 2 has no controllers.
        let path_of = |wanted: &str| {
            groups.lines().find_map(|line| {
                let (controllers, path) = line.split_once(':')?.1.split_once(':')?;
                controllers.split(',').any(|controller| controller == wanted).then_some(path)
            })
        };
        // Mount lines are ID PARENT DEVICE ROOT POINT OPTIONS… - TYPE SOURCE SUPEROPTIONS.
        let mount_of = |kind: &str, controller: &str| {
            mounts.lines().find_map(|line| {
                let (mount, filesystem) = line.split_once(" - ")?;
                let mut fields = mount.split(' ').skip(3);
                let (root, point) = (fields.next()?, fields.next()?);
                let mut words = filesystem.split(' ');
                let options = words.clone().nth(2)?;
                let fits = words.next()? == kind
                    && (controller.is_empty() || options.split(',').any(|word| word == controller));
                fits.then_some((root, point))
            })
        };
        let place = |kind: &str, controller: &str| {
            let (root, point) = mount_of(kind, controller)?;
            let path = path_of(controller)?;
            let below = path.strip_prefix(root.trim_end_matches('/')).unwrap_or("");
            let below = below.trim_start_matches('/');
            Some(OwnGroup { directory: Path::new(point).join(below), is_root: below.is_empty() })
        };
        Self {
            v2: place("cgroup2", ""),
            memory: place("cgroup", "memory"),
            processes: place("cgroup", "pids"),
        }
    }

    /// The version 2 group that this process may divide, with the controllers it has.
    fn v2_delegated(&self) -> Option<(&OwnGroup, String)> {
        let place = self.v2.as_ref()?;
        let controllers =
            std::fs::read_to_string(place.directory.join("cgroup.controllers")).ok()?;
        let has = |name| controllers.split_whitespace().any(|controller| controller == name);
        let ours = place.is_root || is_delegated(&place.directory);
        (has("memory") && has("pids") && ours).then_some((place, controllers))
    }

    fn v2(&self) -> Option<Place> {
        let (place, controllers) = self.v2_delegated()?;
        if controllers.split_whitespace().any(|controller| controller == "cpu") {
            // A weight is a courtesy: without it the limits still hold. It fails like the others
            // while processes are in the group, and is tried again below.
            write(&place.directory.join("cgroup.subtree_control"), "+cpu").ok();
        }
        let enable = || write(&place.directory.join("cgroup.subtree_control"), "+memory +pids");
        if enable().is_err() {
            // Processes are in the group itself, first of all this one.
            let own = place.directory.join(AGENT_GROUP);
            match std::fs::create_dir(&own) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return None,
                _ => {}
            }
            write(&own.join("cgroup.procs"), "0").ok()?;
            if let Err(error) = enable() {
                tracing::debug!(%error, "other processes share the agent's control group");
                write(&place.directory.join("cgroup.procs"), "0").ok();
                return None;
            }
            write(&place.directory.join("cgroup.subtree_control"), "+cpu").ok();
        }
        Some(Place::V2(place.directory.clone()))
    }

    fn v1(&self) -> Option<Place> {
        let (memory, processes) = (self.memory.as_ref()?, self.processes.as_ref()?);
        let writable = |place: &OwnGroup| {
            rustix::fs::access(&place.directory, rustix::fs::Access::WRITE_OK).is_ok()
        };
        (writable(memory) && writable(processes)).then(|| Place::V1 {
            memory: memory.directory.clone(),
            processes: processes.directory.clone(),
        })
    }
}

/// Whether systemd gave this group to the service: it marks such groups.
fn is_delegated(directory: &Path) -> bool {
    let mut value = [0; 8];
    ["user.delegate", "trusted.delegate"].iter().any(|name| {
        rustix::fs::getxattr(directory, *name, &mut value)
            .is_ok_and(|length| value.get(..length) == Some(b"1".as_slice()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_found_in_the_kernels_tables() {
        let mounts = "\
25 1 0:1 / / rw - ext4 /dev/vda rw
30 25 0:26 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
31 25 0:27 / /sys/fs/cgroup/pids rw,relatime shared:3 - cgroup cgroup rw,pids
32 25 0:28 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw
";
        let groups = "8:pids:/\n4:memory:/a/b\n0::/system.slice/x.service\n";
        let places = OwnGroups::from_tables(groups, mounts);
        let found = |place: Option<OwnGroup>| place.map(|place| (place.directory, place.is_root));
        assert_eq!(found(places.memory), Some(("/sys/fs/cgroup/memory/a/b".into(), false)));
        assert_eq!(found(places.processes), Some(("/sys/fs/cgroup/pids/".into(), true)));
        assert_eq!(
            found(places.v2),
            Some(("/sys/fs/cgroup/unified/system.slice/x.service".into(), false))
        );
        assert!(found(OwnGroups::from_tables("", "").v2).is_none());
    }

    #[test]
    fn leftovers_are_removed_by_an_agent_that_is_alone_and_by_no_other() {
        let parent = tempfile::tempdir().unwrap();
        let at = || ControlGroups::at(Place::V2(parent.path().to_owned()));
        let new_group = || {
            let group = parent.path().join(format!("{PREFIX}1-1"));
            std::fs::create_dir(&group).unwrap();
            group
        };
        let left_behind = new_group();
        let (first, second) = (at(), at());
        assert!(!left_behind.exists(), "nobody was there to use it");
        let in_use = new_group();
        drop((first, at()));
        assert!(in_use.exists(), "the group of an agent at work was removed");
        drop(second);
        drop(at());
        assert!(!in_use.exists());
    }

    #[test]
    fn the_part_above_a_containers_own_root_is_cut_off() {
        let mounts = "1 2 0:1 /docker/abc /sys/fs/cgroup rw - cgroup2 cgroup rw\n";
        let places = OwnGroups::from_tables("0::/docker/abc/sub\n", mounts);
        assert_eq!(places.v2.unwrap().directory, Path::new("/sys/fs/cgroup/sub"));
    }
}
