//! The system call filter: three filters, because one has to answer with one error number.
//!
//! It denies a list and allows the rest: the command is arbitrary bash, so an allow list would be
//! a guess at all programs of the world. The list is what reaches kernel code that a command has
//! no business in: namespaces and mounts, other processes' memory and limits, keys, tracing,
//! modules, exotic sockets, terminals' input queues, set-user-id bits. Another architecture's
//! system calls end the process, since the numbers would mean other calls; those of a kernel newer
//! than this list do not exist.

use seccompiler::BpfProgram;

use super::bpf::{self, Condition, Half, Rule, Rules, Test};
use super::spec::{SetupError, Step};

/// Answered with ENOSYS, so that programs fall back to an older call: those whose arguments are
/// behind a pointer, where a filter cannot look; io_uring, which does everything at once; and its
/// predecessor, of whose requests there is one number for the whole machine.
const NOT_THERE: &[i64] = &[
    libc::SYS_clone3,
    libc::SYS_openat2,
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_io_setup,
];

/// Answered with EPERM whatever the arguments.
const DENIED: &[i64] = &[
    // Mounts and roots.
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_move_mount,
    libc::SYS_open_tree,
    OPEN_TREE_ATTR,
    libc::SYS_fsopen,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fspick,
    libc::SYS_mount_setattr,
    libc::SYS_setns,
    // Other processes.
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_process_madvise,
    libc::SYS_kcmp,
    libc::SYS_pidfd_getfd,
    libc::SYS_perf_event_open,
    // The kernel as a whole.
    libc::SYS_bpf,
    libc::SYS_kexec_load,
    KEXEC_FILE_LOAD,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_reboot,
    libc::SYS_syslog,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_acct,
    libc::SYS_quotactl,
    libc::SYS_quotactl_fd,
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_clock_adjtime,
    libc::SYS_adjtimex,
    libc::SYS_vhangup,
    libc::SYS_lookup_dcookie,
    libc::SYS_nfsservctl,
    libc::SYS_sethostname,
    libc::SYS_setdomainname,
    // Keys, memory, file handles.
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_keyctl,
    libc::SYS_userfaultfd,
    libc::SYS_migrate_pages,
    libc::SYS_move_pages,
    libc::SYS_open_by_handle_at,
    libc::SYS_name_to_handle_at,
    libc::SYS_fanotify_init,
    libc::SYS_fanotify_mark,
];

#[cfg(target_arch = "x86_64")]
const DENIED_HERE: &[i64] = &[
    libc::SYS_iopl,
    libc::SYS_ioperm,
    libc::SYS_modify_ldt,
    libc::SYS_uselib,
    libc::SYS_ustat,
    libc::SYS_sysfs,
    libc::SYS__sysctl,
];
#[cfg(target_arch = "aarch64")]
const DENIED_HERE: &[i64] = &[];

// Newer than the constants of the C library, or absent there on one architecture. Numbers from 424
// on are the same everywhere.
const OPEN_TREE_ATTR: i64 = 467;
const FCHMODAT2: i64 = 452;
#[cfg(target_arch = "x86_64")]
const KEXEC_FILE_LOAD: i64 = 320;
#[cfg(target_arch = "aarch64")]
const KEXEC_FILE_LOAD: i64 = 294;

const SET_ID_BITS: u32 = 0o6000;
/// The resource; C libraries differ in its type.
const CORE: u32 = 4;
const HALVES: [Half; 2] = [Half::Lower, Half::Upper];
const NAMESPACE_FLAGS: i32 = libc::CLONE_NEWNS
    | libc::CLONE_NEWCGROUP
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUSER
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWNET;
/// For `unshare` only: for `clone` these bits are a signal.
const CLONE_NEWTIME: u32 = 0x80;
/// Terminal requests that put words into somebody's mouth: input queue, selection, console; and
/// line disciplines, each a driver of its own.
const TERMINAL_REQUESTS: [u32; 4] = [0x5412, 0x541C, 0x541D, 0x5423];
/// Requests of btrfs that make or remove subvolumes, by their type and number. A snapshot shows the
/// whole subvolume that a directory lies in: before Linux 6.7 any directory's, for whoever owns that.
const SUBVOLUME_REQUESTS: [u32; 6] = [0x9401, 0x940E, 0x940F, 0x9417, 0x9418, 0x943F];
const REQUEST_TYPE_AND_NUMBER: u32 = 0xFFFF;
/// All requests of bcachefs: it has the same ones.
const BCACHEFS_REQUESTS: u32 = 0xBC00;
const REQUEST_TYPE: u32 = 0xFF00;
/// Huge pages are set aside for the programs of the machine, and no group counts them as memory.
const HUGE_PAGES: [(i64, u8, i32); 3] = [
    (libc::SYS_mmap, 3, libc::MAP_HUGETLB),
    (libc::SYS_memfd_create, 1, libc::MFD_HUGETLB.cast_signed()),
    (libc::SYS_shmget, 2, libc::SHM_HUGETLB),
];

/// Whom `setpriority` and `ioprio_set` may concern: one process, or all of a user.
const PRIORITY_OF_PROCESS: u32 = 0;
const PRIORITY_OF_USER: u32 = 2;
const IO_PRIORITY_OF_PROCESS: u32 = 1;
const IO_PRIORITY_OF_USER: u32 = 3;
/// The first process of the sandbox, on which the end of the command depends.
const INIT: u32 = 1;

/// The filters, ready to be installed.
pub(super) fn compile() -> Vec<BpfProgram> {
    let absent = NOT_THERE.iter().map(|call| (number(*call), Vec::new())).collect();
    vec![
        bpf::program(&absent, libc::ENOSYS),
        bpf::program(&denied(), libc::EPERM),
        bpf::program(&pretended(), 0),
    ]
}

/// What is not done, and answered as if it had been: many programs set the size of their core dumps to 0,
/// and some end if they cannot. To the kernel only 1 means that no program outside is to be given the dump.
fn pretended() -> Rules {
    let [no_old_one, nor_above] =
        HALVES.map(|half| Condition { argument: 3, half, test: Test::Is(0) });
    let rules = own_core_limit().map(|rule| [rule, vec![no_old_one, nor_above]].concat());
    Rules::from([
        (number(libc::SYS_setrlimit), vec![vec![is(0, CORE)]]),
        (number(libc::SYS_prlimit64), rules.to_vec()),
    ])
}

/// Setting one's own limit of core dumps: whether there is a new one, in either half of the pointer to it.
fn own_core_limit() -> [Rule; 2] {
    HALVES.map(|half| {
        let new_one = Condition { argument: 2, half, test: Test::IsNot(0) };
        vec![is(0, 0), is(1, CORE), new_one]
    })
}

/// Installs the filters. Afterwards, this process can do no more than the command.
pub(super) fn install(filters: &[BpfProgram]) -> Result<(), SetupError> {
    filters.iter().try_for_each(|filter| {
        seccompiler::apply_filter(filter).map_err(|error| {
            SetupError::new(Step::Seccomp, format!("set up the system call filter: {error}"))
        })
    })
}

/// No architecture has negative numbers, nor any beyond 32 bits.
fn number(call: i64) -> u32 {
    u32::try_from(call).unwrap_or(u32::MAX)
}

fn denied() -> Rules {
    let mut rules: Rules =
        DENIED.iter().chain(DENIED_HERE).map(|call| (number(*call), Vec::new())).collect();
    let mut deny = |call: i64, rule: Rule| rules.entry(number(call)).or_default().push(rule);

    let namespaces = NAMESPACE_FLAGS.cast_unsigned();
    deny(libc::SYS_clone, vec![any(0, namespaces)]);
    deny(libc::SYS_unshare, vec![any(0, namespaces | CLONE_NEWTIME)]);

    for request in TERMINAL_REQUESTS {
        deny(libc::SYS_ioctl, vec![is(1, request)]);
    }
    for request in SUBVOLUME_REQUESTS {
        deny(libc::SYS_ioctl, vec![masked(1, REQUEST_TYPE_AND_NUMBER, request)]);
    }
    deny(libc::SYS_ioctl, vec![masked(1, REQUEST_TYPE, BCACHEFS_REQUESTS)]);
    for (call, flags, huge) in HUGE_PAGES {
        deny(call, vec![any(flags, huge.cast_unsigned())]);
    }

    // Only the default personality, asking for it, and switching address randomisation off.
    deny(libc::SYS_personality, vec![is_not(0, 0), is_not(0, 0xffff_ffff), is_not(0, 0x0004_0000)]);

    let [unix, inet, inet6, netlink] =
        [libc::AF_UNIX, libc::AF_INET, libc::AF_INET6, libc::AF_NETLINK].map(i32::cast_unsigned);
    deny(libc::SYS_socket, [unix, inet, inet6, netlink].map(|family| is_not(0, family)).to_vec());
    // Of netlink only what concerns routes: how programs ask for their own addresses.
    deny(libc::SYS_socket, vec![is(0, netlink), is_not(2, 0)]);
    for family in [inet, inet6] {
        // The default, ICMP (for ping), TCP, UDP and ICMPv6; others load rarely used drivers.
        let usual = [0, 1, 6, 17, 58].map(|protocol| is_not(2, protocol));
        deny(libc::SYS_socket, std::iter::once(is(0, family)).chain(usual).collect());
    }
    deny(libc::SYS_socketpair, vec![is_not(0, unix)]);

    for (call, mode) in set_id_calls() {
        deny(call, vec![any(mode, SET_ID_BITS)]);
    }
    for (call, flags) in open_calls() {
        for creating in [libc::O_CREAT, libc::O_TMPFILE].map(i32::cast_unsigned) {
            deny(call, vec![masked(flags, creating, creating), any(flags + 1, SET_ID_BITS)]);
        }
    }
    for (call, mode) in mknod_calls() {
        for kind in [libc::S_IFCHR, libc::S_IFBLK] {
            deny(call, vec![masked(mode, libc::S_IFMT, kind)]);
        }
    }

    // Limits of others: with no descriptors left, pid 1 could not tell how the command ended. The
    // C library asks for the caller's own as those of process 0.
    deny(libc::SYS_prlimit64, vec![is_not(0, 0)]);
    // Who also asks for the old one would be left without an answer (see `pretended`).
    for rule in own_core_limit() {
        for half in HALVES {
            let old_one = Condition { argument: 3, half, test: Test::IsNot(0) };
            deny(libc::SYS_prlimit64, [rule.clone(), vec![old_one]].concat());
        }
    }
    // Threads are given processors and priorities by number, pid 1 never.
    for call in [
        libc::SYS_sched_setscheduler,
        libc::SYS_sched_setparam,
        libc::SYS_sched_setattr,
        libc::SYS_sched_setaffinity,
    ] {
        deny(call, vec![is(0, INIT)]);
    }
    for (call, of_process, of_user) in [
        (libc::SYS_setpriority, PRIORITY_OF_PROCESS, PRIORITY_OF_USER),
        (libc::SYS_ioprio_set, IO_PRIORITY_OF_PROCESS, IO_PRIORITY_OF_USER),
    ] {
        deny(call, vec![is(0, of_process), is(1, INIT)]);
        deny(call, vec![is(0, of_user)]);
    }
    rules
}

/// Calls that set a mode, with the argument it is in.
fn set_id_calls() -> Vec<(i64, u8)> {
    let mut calls = vec![(libc::SYS_fchmod, 1), (libc::SYS_fchmodat, 2), (FCHMODAT2, 2)];
    #[cfg(target_arch = "x86_64")]
    calls.extend([(libc::SYS_chmod, 1), (libc::SYS_creat, 1)]);
    calls.extend(mknod_calls());
    calls
}

/// Calls that may create a file, with the argument of their flags; the mode follows it.
fn open_calls() -> Vec<(i64, u8)> {
    #[cfg_attr(not(target_arch = "x86_64"), allow(unused_mut))]
    let mut calls = vec![(libc::SYS_openat, 2)];
    #[cfg(target_arch = "x86_64")]
    calls.push((libc::SYS_open, 1));
    calls
}

fn mknod_calls() -> Vec<(i64, u8)> {
    #[cfg_attr(not(target_arch = "x86_64"), allow(unused_mut))]
    let mut calls = vec![(libc::SYS_mknodat, 2)];
    #[cfg(target_arch = "x86_64")]
    calls.push((libc::SYS_mknod, 1));
    calls
}

fn any(argument: u8, bits: u32) -> Condition {
    Condition { argument, half: Half::Lower, test: Test::Any(bits) }
}

fn masked(argument: u8, mask: u32, value: u32) -> Condition {
    Condition { argument, half: Half::Lower, test: Test::Masked { mask, value } }
}

fn is(argument: u8, value: u32) -> Condition {
    Condition { argument, half: Half::Lower, test: Test::Is(value) }
}

fn is_not(argument: u8, value: u32) -> Condition {
    Condition { argument, half: Half::Lower, test: Test::IsNot(value) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Calls denied whatever their arguments, by their numbers on x86-64 and on aarch64 in the
    /// kernel's own tables: what this is compiled for is looked up in one column, and the other is
    /// for whoever compiles there.
    const TABLE: [(&str, Option<u32>, Option<u32>); 65] = [
        ("clone3", Some(435), Some(435)),
        ("openat2", Some(437), Some(437)),
        ("io_uring_setup", Some(425), Some(425)),
        ("io_uring_enter", Some(426), Some(426)),
        ("io_uring_register", Some(427), Some(427)),
        ("io_setup", Some(206), Some(0)),
        ("mount", Some(165), Some(40)),
        ("umount2", Some(166), Some(39)),
        ("pivot_root", Some(155), Some(41)),
        ("chroot", Some(161), Some(51)),
        ("move_mount", Some(429), Some(429)),
        ("open_tree", Some(428), Some(428)),
        ("fsopen", Some(430), Some(430)),
        ("fsconfig", Some(431), Some(431)),
        ("fsmount", Some(432), Some(432)),
        ("fspick", Some(433), Some(433)),
        ("mount_setattr", Some(442), Some(442)),
        ("setns", Some(308), Some(268)),
        ("ptrace", Some(101), Some(117)),
        ("process_vm_readv", Some(310), Some(270)),
        ("process_vm_writev", Some(311), Some(271)),
        ("process_madvise", Some(440), Some(440)),
        ("kcmp", Some(312), Some(272)),
        ("pidfd_getfd", Some(438), Some(438)),
        ("perf_event_open", Some(298), Some(241)),
        ("bpf", Some(321), Some(280)),
        ("kexec_load", Some(246), Some(104)),
        ("init_module", Some(175), Some(105)),
        ("finit_module", Some(313), Some(273)),
        ("delete_module", Some(176), Some(106)),
        ("reboot", Some(169), Some(142)),
        ("syslog", Some(103), Some(116)),
        ("swapon", Some(167), Some(224)),
        ("swapoff", Some(168), Some(225)),
        ("acct", Some(163), Some(89)),
        ("quotactl", Some(179), Some(60)),
        ("quotactl_fd", Some(443), Some(443)),
        ("settimeofday", Some(164), Some(170)),
        ("clock_settime", Some(227), Some(112)),
        ("clock_adjtime", Some(305), Some(266)),
        ("adjtimex", Some(159), Some(171)),
        ("vhangup", Some(153), Some(58)),
        ("lookup_dcookie", Some(212), Some(18)),
        ("nfsservctl", Some(180), Some(42)),
        ("sethostname", Some(170), Some(161)),
        ("setdomainname", Some(171), Some(162)),
        ("add_key", Some(248), Some(217)),
        ("request_key", Some(249), Some(218)),
        ("keyctl", Some(250), Some(219)),
        ("userfaultfd", Some(323), Some(282)),
        ("migrate_pages", Some(256), Some(238)),
        ("move_pages", Some(279), Some(239)),
        ("open_by_handle_at", Some(304), Some(265)),
        ("name_to_handle_at", Some(303), Some(264)),
        ("fanotify_init", Some(300), Some(262)),
        ("fanotify_mark", Some(301), Some(263)),
        ("iopl", Some(172), None),
        ("ioperm", Some(173), None),
        ("modify_ldt", Some(154), None),
        ("uselib", Some(134), None),
        ("ustat", Some(136), None),
        ("sysfs", Some(139), None),
        ("_sysctl", Some(156), None),
        ("open_tree_attr", Some(467), Some(467)),
        ("kexec_file_load", Some(320), Some(294)),
    ];

    fn here(x86_64: Option<u32>, aarch64: Option<u32>) -> Option<u32> {
        if cfg!(target_arch = "x86_64") { x86_64 } else { aarch64 }
    }

    #[test]
    fn every_call_of_the_kernels_tables_is_denied_by_its_number_and_no_other() {
        let filters = compile();
        let denied = |number| {
            let allowed =
                |filter| bpf::tests::here(filter, number, [0; 6]) == libc::SECCOMP_RET_ALLOW;
            !filters.iter().all(|filter| allowed(filter))
        };
        let table: Vec<u32> =
            TABLE.iter().filter_map(|(_, x86_64, aarch64)| here(*x86_64, *aarch64)).collect();
        for (name, x86_64, aarch64) in TABLE {
            if let Some(number) = here(x86_64, aarch64) {
                assert!(denied(number), "{name} ({number}) is not denied");
            }
        }
        // With arguments of zero: those that look at them allow an own limit, and deny an odd kind
        // of socket.
        let by_arguments = [libc::SYS_socket, libc::SYS_socketpair].map(number);
        for number in (0..bpf::FIRST_UNKNOWN).filter(|number| !by_arguments.contains(number)) {
            assert_eq!(denied(number), table.contains(&number), "call {number}");
        }
    }

    #[test]
    fn arguments_decide_by_the_half_that_the_kernel_looks_at() {
        let filters = compile();
        let high = 7_u64 << 32;
        for (call, arguments, wanted) in [
            (libc::SYS_ioctl, [0, 0x5412, 0], false),
            (libc::SYS_ioctl, [0, high | 0x5412, 0], false),
            (libc::SYS_ioctl, [0, 0x5401, 0], true),
            (libc::SYS_unshare, [0x1000_0000, 0, 0], false),
            (libc::SYS_unshare, [high | 0x1000_0000, 0, 0], false),
            (libc::SYS_clone, [0x4000_0000 | 17, 0, 0], false),
            (libc::SYS_clone, [0x3d_0f00, 0, 0], true),
            (libc::SYS_fchmodat, [0, 0, 0o4755], false),
            (libc::SYS_fchmodat, [0, 0, 0o2755], false),
            (libc::SYS_fchmodat, [0, 0, 0o1755], true),
            (libc::SYS_prlimit64, [0, 7, 0], true),
            (libc::SYS_prlimit64, [1, 7, 0], false),
            (libc::SYS_prlimit64, [high, 7, 0], true),
            (libc::SYS_prlimit64, [0, 7, 8], true),
            // Its own limit of core dumps, looked at and set.
            (libc::SYS_prlimit64, [0, 4, 0], true),
            (libc::SYS_prlimit64, [0, 4, 8], false),
            (libc::SYS_prlimit64, [0, 4, high], false),
            (libc::SYS_prlimit64, [0, high | 4, 8], false),
            (libc::SYS_setrlimit, [4, 8, 0], false),
            (libc::SYS_setrlimit, [high | 4, 8, 0], false),
            (libc::SYS_setrlimit, [7, 8, 0], true),
            (libc::SYS_ioctl, [3, 0x5000_9417, 8], false),
            (libc::SYS_ioctl, [3, high | 0x5000_9417, 8], false),
            (libc::SYS_ioctl, [3, 0x4020_BC10, 8], false),
            // Sharing the blocks of a file with a copy of it.
            (libc::SYS_ioctl, [3, 0x4004_9409, 8], true),
            (libc::SYS_memfd_create, [8, 4, 0], false),
            (libc::SYS_memfd_create, [8, 1, 0], true),
            (libc::SYS_sched_setaffinity, [1, 8, 0], false),
            (libc::SYS_sched_setaffinity, [5, 8, 0], true),
            (libc::SYS_socket, [1, 1, 0], true),
            (libc::SYS_socket, [2, 1, 6], true),
            (libc::SYS_socket, [2, 1, 132], false),
            (libc::SYS_socket, [16, 3, 0], true),
            (libc::SYS_socket, [16, 3, 9], false),
            (libc::SYS_socket, [40, 1, 0], false),
            (libc::SYS_personality, [0xffff_ffff, 0, 0], true),
            (libc::SYS_personality, [0x0100_0000, 0, 0], false),
            (libc::SYS_mknodat, [0, 0, 0o020_644], false),
            (libc::SYS_mknodat, [0, 0, 0o010_644], true),
        ] {
            let mut all = [0; 6];
            all[..3].copy_from_slice(&arguments);
            let allowed = filters.iter().all(|filter| {
                bpf::tests::here(filter, number(call), all) == libc::SECCOMP_RET_ALLOW
            });
            assert_eq!(allowed, wanted, "call {call} with {arguments:x?}");
        }
    }
}
