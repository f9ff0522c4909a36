//! The few system calls that no safe wrapper offers. Every `unsafe` block of the sandbox is here.
//!
//! These are thin: arguments are owned or borrowed Rust values, results are `io::Result`, and
//! nothing here decides anything.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd};

use rustix::process::{Pid, Signal};

/// Attributes of a mount, as `mount_setattr(2)` takes them.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct MountAttributes {
    /// `MOUNT_ATTR_*` bits to set. None are ever cleared: a flag that was locked by an outer
    /// namespace stays as it is.
    pub(super) set: u64,
    /// Makes the tree private, so that no mount event enters or leaves it.
    pub(super) private: bool,
    /// Of this mount alone; otherwise of all mounts below it too.
    pub(super) this_mount_only: bool,
}

pub(super) const READ_ONLY: u64 = 0x0000_0001;
pub(super) const NO_SUID: u64 = 0x0000_0002;
pub(super) const NO_DEV: u64 = 0x0000_0004;
pub(super) const NO_EXEC: u64 = 0x0000_0008;
const MOUNT_ATTR_IDMAP: u64 = 0x0010_0000;

#[repr(C)]
#[derive(Default)]
struct RawMountAttr {
    attr_set: u64,
    attr_clr: u64,
    propagation: u64,
    userns_fd: u64,
}

/// Sets attributes on a detached or attached mount given by its descriptor.
pub(super) fn mount_set_attributes(
    mount: BorrowedFd<'_>,
    wanted: MountAttributes,
) -> io::Result<()> {
    let attr = RawMountAttr {
        attr_set: wanted.set,
        propagation: if wanted.private { libc::MS_PRIVATE } else { 0 },
        ..RawMountAttr::default()
    };
    let flags = if wanted.this_mount_only { 0 } else { libc::AT_RECURSIVE };
    mount_setattr(mount, flags, &attr)
}

/// Gives a detached mount the id mapping of a user namespace.
pub(super) fn mount_map_ids(mount: BorrowedFd<'_>, userns: BorrowedFd<'_>) -> io::Result<()> {
    let attr = RawMountAttr {
        attr_set: MOUNT_ATTR_IDMAP,
        userns_fd: u64::try_from(userns.as_raw_fd()).map_err(io::Error::other)?,
        ..RawMountAttr::default()
    };
    mount_setattr(mount, 0, &attr)
}

fn mount_setattr(mount: BorrowedFd<'_>, flags: i32, attr: &RawMountAttr) -> io::Result<()> {
    // SAFETY: `mount` is open for the duration of the call, the path is a NUL-terminated static
    // string, and `attr` points to a live structure of exactly the size that is passed.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | flags,
            std::ptr::from_ref(attr),
            size_of::<RawMountAttr>(),
        )
    };
    check(result).map(drop)
}

/// What [`clone_process`] returns on either side.
pub(super) enum Cloned {
    /// In the new process.
    Child,
    /// In the caller.
    Parent(Pid),
}

#[repr(C, align(8))]
#[derive(Default)]
struct CloneArgs {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

/// Copies this process, as `fork` does, into the namespaces that `flags` (`CLONE_NEW*`) ask for
/// and, where given, into a version 2 control group from its first instruction.
///
/// To be called by a process with one thread only; the stage is one by construction, and this
/// refuses otherwise. Memory is copied, so the child may allocate and run any code.
pub(super) fn clone_process(flags: u64, cgroup: Option<BorrowedFd<'_>>) -> io::Result<Cloned> {
    if std::fs::read_dir("/proc/self/task")?.count() != 1 {
        return Err(io::Error::other("the sandbox stage has more than one thread"));
    }
    let mut arguments = CloneArgs {
        flags,
        exit_signal: u64::try_from(libc::SIGCHLD).map_err(io::Error::other)?,
        ..CloneArgs::default()
    };
    if let Some(cgroup) = cgroup {
        const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
        arguments.flags |= CLONE_INTO_CGROUP;
        arguments.cgroup = u64::try_from(cgroup.as_raw_fd()).map_err(io::Error::other)?;
    }
    fork_with(&arguments)
}

/// Copies this process into the same namespaces. As [`clone_process`], without looking at
/// `/proc`: pid 1 of a sandbox calls this where the outer one is gone.
pub(super) fn fork_process() -> io::Result<Cloned> {
    fork_with(&CloneArgs {
        exit_signal: u64::try_from(libc::SIGCHLD).map_err(io::Error::other)?,
        ..CloneArgs::default()
    })
}

fn fork_with(arguments: &CloneArgs) -> io::Result<Cloned> {
    // SAFETY: without CLONE_VM and with a zero stack this behaves as `fork`: the child runs on a
    // copy of this stack and memory. The process has a single thread, so no lock (of the
    // allocator or anything else) can be held by a thread that the child lacks. `arguments`
    // lives across the call and its size is passed with it.
    let result = unsafe {
        libc::syscall(libc::SYS_clone3, std::ptr::from_ref(arguments), size_of::<CloneArgs>())
    };
    match check(result)? {
        0 => Ok(Cloned::Child),
        pid => i32::try_from(pid)
            .ok()
            .and_then(Pid::from_raw)
            .map(Cloned::Parent)
            .ok_or_else(|| io::Error::other("clone3 returned no process id")),
    }
}

/// Moves this process into new namespaces (`CLONE_NEW*`).
pub(super) fn unshare(flags: i32) -> io::Result<()> {
    // SAFETY: the call takes an integer, and touches no memory of this process.
    check(i64::from(unsafe { libc::unshare(flags) })).map(drop)
}

/// Closes every descriptor from `first` on.
pub(super) fn close_from(first: u32) -> io::Result<()> {
    close_range(first, 0)
}

/// Marks every descriptor from `first` on to be closed by `exec`.
pub(super) fn close_on_exec_from(first: u32) -> io::Result<()> {
    const CLOSE_RANGE_CLOEXEC: u32 = 4;
    close_range(first, CLOSE_RANGE_CLOEXEC)
}

fn close_range(first: u32, flags: u32) -> io::Result<()> {
    // SAFETY: the call takes integers only. Callers own no `OwnedFd` in the range that they use
    // afterwards: `close_from` runs before the stage opens anything, and the other form closes
    // nothing in this process.
    let result = unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, flags) };
    check(result).map(drop)
}

/// Takes a descriptor that this process was started with.
///
/// Returns an error if it is not open.
pub(super) fn take_inherited(fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: F_GETFD takes no pointer; it only reports whether the number is open.
    check(i64::from(unsafe { libc::fcntl(fd, libc::F_GETFD) }))?;
    // SAFETY: the descriptor is open, and the stage takes each number once, at its start, before
    // anything else in this process could have claimed it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Gives every signal its default action and blocks none.
pub(super) fn reset_signals() -> io::Result<()> {
    for signal in 1..=64 {
        if signal == libc::SIGKILL || signal == libc::SIGSTOP || signal == 32 || signal == 33 {
            continue;
        }
        // SAFETY: SIG_DFL is a valid disposition for every signal; EINVAL for a number this
        // kernel lacks is harmless.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
    set_signal_mask(libc::SIG_SETMASK, None)
}

/// Blocks `signal` and returns a descriptor that becomes readable when it arrives.
pub(super) fn signal_descriptor(signal: Signal) -> io::Result<OwnedFd> {
    set_signal_mask(libc::SIG_BLOCK, Some(signal))?;
    let set = signal_set(Some(signal));
    // SAFETY: `set` is initialised and lives across the call; -1 asks for a new descriptor.
    let fd = unsafe { libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
    check(i64::from(fd))?;
    // SAFETY: the kernel has just returned this descriptor to us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Has the kernel send this process SIGIO whenever something is renamed in a directory, moved out of
/// it or removed, as long as the descriptor is open. Unlike an inotify instance this counts towards
/// no limit of the user.
pub(super) fn signal_renames(directory: BorrowedFd<'_>) -> io::Result<()> {
    // Only within the directory; what leaves it is deleted as far as it is concerned.
    const DN_RENAME: u32 = 0x10;
    const DN_DELETE: u32 = 0x8;
    const DN_MULTISHOT: u32 = 0x8000_0000;
    let events = DN_RENAME | DN_DELETE | DN_MULTISHOT;
    // SAFETY: F_NOTIFY takes an integer; the descriptor is open for the duration of the call.
    let result = unsafe { libc::fcntl(directory.as_raw_fd(), libc::F_NOTIFY, events) };
    check(i64::from(result)).map(drop)
}

fn signal_set(signal: Option<Signal>) -> libc::sigset_t {
    let mut set = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: sigemptyset initialises the whole set it is given, so it may be assumed initialised
    // afterwards; sigaddset gets an initialised set and a valid signal number.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        if let Some(signal) = signal {
            libc::sigaddset(set.as_mut_ptr(), signal.as_raw());
        }
        set.assume_init()
    }
}

fn set_signal_mask(how: i32, signal: Option<Signal>) -> io::Result<()> {
    let set = signal_set(signal);
    // SAFETY: `set` is initialised; the old mask is not asked for.
    check(i64::from(unsafe { libc::sigprocmask(how, &raw const set, std::ptr::null_mut()) }))
        .map(drop)
}

/// Brings up the loopback interface of this network namespace.
pub(super) fn loopback_up() -> io::Result<()> {
    let socket = rustix::net::socket(
        rustix::net::AddressFamily::INET,
        rustix::net::SocketType::DGRAM,
        None,
    )?;
    // SAFETY: an all-zero `ifreq` is a valid value of this plain C structure.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(c"lo".to_bytes_with_nul()) {
        *to = libc::c_char::try_from(*from).map_err(io::Error::other)?;
    }
    let fd = socket.as_fd().as_raw_fd();
    // SAFETY: SIOCGIFFLAGS reads the name from, and writes the flags to, the live `ifreq` behind
    // the pointer.
    check(i64::from(unsafe { libc::ioctl(fd, libc::SIOCGIFFLAGS, &raw mut request) }))?;
    // SAFETY: the kernel has just filled in this member of the union.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    request.ifr_ifru.ifru_flags =
        flags | libc::c_short::try_from(libc::IFF_UP).map_err(io::Error::other)?;
    // SAFETY: as above; SIOCSIFFLAGS only reads the structure.
    check(i64::from(unsafe { libc::ioctl(fd, libc::SIOCSIFFLAGS, &raw const request) })).map(drop)
}

/// Sets the host name of this UTS namespace.
pub(super) fn set_host_name(name: &CStr) -> io::Result<()> {
    // SAFETY: the pointer and length describe a live buffer.
    check(i64::from(unsafe { libc::sethostname(name.as_ptr(), name.count_bytes()) })).map(drop)
}

/// Ends this process at once, without unwinding or running exit handlers: what a forked copy of
/// the stage must do, since the handlers belong to the original.
pub(super) fn exit_now(code: i32) -> ! {
    // SAFETY: `_exit` takes an integer and never returns.
    unsafe { libc::_exit(code) }
}

/// The version of the Landlock interface of this kernel.
pub(super) fn landlock_abi() -> io::Result<i64> {
    const LANDLOCK_CREATE_RULESET_VERSION: u32 = 1;
    // SAFETY: with this flag the kernel takes no structure and returns a number.
    check(unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            std::ptr::null::<u8>(),
            0_usize,
            LANDLOCK_CREATE_RULESET_VERSION,
        )
    })
}

fn check(result: i64) -> io::Result<i64> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}
