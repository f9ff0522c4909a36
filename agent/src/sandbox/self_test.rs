//! What a probe tries once it is confined like any command: acts that must fail, and a few that
//! must not.
//!
//! Setting a restriction and reading it back shows that the kernel took it, not that it enforces
//! it. So this reaches for what must be out of reach, by the acts that an escape would begin with,
//! and none that would do harm if it succeeded. It needs no program on the machine.

use std::io;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixStream};
use std::path::Path;

use rustix::fs::{CWD, FileType, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{FsOpenFlags, MountFlags};
use rustix::net::{AddressFamily, SocketType};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, Resource, Rlimit};

use super::spec::{HOME_INSIDE, ProbeFacts, SetupError, Step, WORKSPACE_INSIDE};
use super::{landlock, syscalls};

/// Of the host, and nothing for commands.
const HIDDEN: [&str; 9] = [
    "/etc/shadow",
    "/etc/ssh",
    "/root",
    "/sys",
    "/run",
    "/boot",
    "/var/lib",
    "/var/log",
    "/dev/kmsg",
];
/// Pid 1 of the sandbox knows the specification, which is nobody's business.
const UNREADABLE: [&str; 3] = ["/proc/1/environ", "/proc/1/mem", "/proc/1/fd"];
const UNWRITABLE: [&str; 5] = [
    "/proc/sys/kernel/core_pattern",
    "/proc/sys/kernel/modprobe",
    "/proc/sysrq-trigger",
    "/proc/self/exe",
    "/usr/bin/env",
];
const NO_NEW_FILES: [&str; 5] = ["/", "/usr", "/etc", "/dev", "/proc"];
/// Kinds of sockets that reach kernel code or machines a command has no business with: packets,
/// keys, the hypervisor, the kernel's cryptography.
const FAMILIES: [i32; 4] = [libc::AF_PACKET, libc::AF_KEY, libc::AF_VSOCK, libc::AF_ALG];

/// Tries everything; the first thing that is not as it must be is the error.
pub(super) fn run(facts: &ProbeFacts) -> Result<(), SetupError> {
    possible()?;
    files(facts)?;
    processes(facts)?;
    sockets(facts)?;
    privileges()
}

fn possible() -> Result<(), SetupError> {
    for directory in [WORKSPACE_INSIDE, HOME_INSIDE, "/tmp", "/dev/shm"] {
        let create = create_in(directory);
        must(create, format_args!("create a file in {directory}"))?;
    }
    must(open("/dev/null", OFlags::WRONLY), "write to /dev/null")?;
    must(open("/proc/self/status", OFlags::RDONLY), "read its own status")?;
    must(open("/usr", OFlags::RDONLY | OFlags::DIRECTORY), "read /usr")?;
    let socket = rustix::net::socket(AddressFamily::INET, SocketType::STREAM, None);
    must(socket, "create a TCP socket")
}

fn files(facts: &ProbeFacts) -> Result<(), SetupError> {
    // The places of the private directories inside may have namesakes outside.
    let own = |path: &&Path| {
        ![WORKSPACE_INSIDE, HOME_INSIDE, "/tmp"].iter().any(|own| Path::new(own).starts_with(path))
    };
    let agents = facts.hidden.iter().map(AsRef::as_ref).filter(own);
    for path in HIDDEN.iter().map(Path::new).chain(agents) {
        must_not(open(path, OFlags::PATH), format_args!("see {}", path.display()))?;
    }
    for path in UNREADABLE {
        must_not(open(path, OFlags::RDONLY), format_args!("read {path}"))?;
    }
    for path in UNWRITABLE {
        must_not(open(path, OFlags::WRONLY), format_args!("write {path}"))?;
    }
    for directory in NO_NEW_FILES {
        must_not(create_in(directory), format_args!("create a file in {directory}"))?;
    }
    let node = Path::new("/tmp").join("node");
    let device = rustix::fs::makedev(8, 0);
    let mode = Mode::from_raw_mode(0o600);
    let made = rustix::fs::mknodat(CWD, &node, FileType::BlockDevice, mode, device);
    must_not(made, "create a block device")?;
    let set_id = Mode::from_raw_mode(0o4755);
    must_not(rustix::fs::chmod("/tmp", set_id), "set a set-user-id bit")?;
    must_not(rustix::fs::chmod("/tmp", set_id | Mode::SGID), "set a set-group-id bit")
}

fn processes(facts: &ProbeFacts) -> Result<(), SetupError> {
    // The lowest numbers exist inside as well.
    if let Some(agent) = Pid::from_raw(facts.agent).filter(|_| facts.agent > 2) {
        must_not(rustix::process::test_kill_process(agent), "signal the agent")?;
        let directory = format!("/proc/{}", facts.agent);
        must_not(open(&directory, OFlags::PATH), "see the agent in /proc")?;
    }
    // The same user's, and in the same namespaces: only Landlock keeps the command from it.
    if syscalls::landlock_abi().is_ok_and(|abi| abi >= landlock::ABI_WITH_SCOPES) {
        must_not(rustix::process::test_kill_process(Pid::INIT), "signal pid 1 of its sandbox")?;
    }
    let stolen = rustix::process::pidfd_open(Pid::INIT, PidfdFlags::empty())
        .and_then(|init| rustix::process::pidfd_getfd(&init, 0, PidfdGetfdFlags::empty()));
    must_not(stolen, "take a descriptor of another process")
}

fn sockets(facts: &ProbeFacts) -> Result<(), SetupError> {
    let connected = SocketAddr::from_abstract_name(&facts.abstract_socket)
        .and_then(|address| UnixStream::connect_addr(&address));
    must_not(connected, "reach an abstract socket outside")?;
    for family in FAMILIES {
        let family = AddressFamily::from_raw(family.try_into().unwrap_or_default());
        let socket = rustix::net::socket(family, SocketType::RAW, None);
        must_not(socket, format_args!("create a socket of family {}", family.as_raw()))?;
    }
    let raw =
        rustix::net::socket(AddressFamily::INET, SocketType::RAW, Some(rustix::net::ipproto::ICMP));
    must_not(raw, "create a raw socket")
}

fn privileges() -> Result<(), SetupError> {
    for (flag, what) in [
        (libc::CLONE_NEWUSER, "user"),
        (libc::CLONE_NEWNS, "mount"),
        (libc::CLONE_NEWNET, "network"),
    ] {
        must_not(syscalls::unshare(flag), format_args!("create a {what} namespace"))?;
    }
    must_not(rustix::mount::fsopen("tmpfs", FsOpenFlags::empty()), "prepare a mount")?;
    must_not(rustix::mount::mount("none", "/tmp", "tmpfs", MountFlags::empty(), None), "mount")?;
    must_not(rustix::process::chroot("/tmp"), "change its root")?;
    must_not(rustix::system::sethostname(b"cortex"), "set the host name")?;
    must_not(rustix::thread::set_thread_uid(rustix::process::Uid::ROOT), "become user 0")?;
    let limit = rustix::process::getrlimit(Resource::Nofile).maximum.unwrap_or(0);
    let more = Rlimit { current: Some(limit), maximum: Some(limit.saturating_add(1)) };
    must_not(rustix::process::setrlimit(Resource::Nofile, more), "raise its limits")
}

fn open(path: impl rustix::path::Arg, flags: OFlags) -> Result<std::os::fd::OwnedFd, Errno> {
    rustix::fs::openat(CWD, path, flags | OFlags::CLOEXEC, Mode::empty())
}

fn create_in(directory: &str) -> Result<std::os::fd::OwnedFd, Errno> {
    let path = Path::new(directory).join("cortex-self-test");
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
    rustix::fs::openat(CWD, path, flags, Mode::from_raw_mode(0o600))
}

fn must<T, E: Into<io::Error>>(
    result: Result<T, E>,
    what: impl std::fmt::Display,
) -> Result<(), SetupError> {
    result.map(drop).map_err(|error| {
        let error: io::Error = error.into();
        SetupError::new(Step::SelfTest, format!("a command cannot {what}: {error}"))
    })
}

fn must_not<T, E>(result: Result<T, E>, what: impl std::fmt::Display) -> Result<(), SetupError> {
    match result {
        Ok(_) => Err(SetupError::new(Step::SelfTest, format!("a command can {what}"))),
        Err(_) => Ok(()),
    }
}
