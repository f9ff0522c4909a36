//! The system call filter: two filters, because one can answer with one error number only.
//!
//! It denies a list and allows the rest: the command is arbitrary bash, so an allow list would be
//! a guess at all programs of the world. The list is what reaches kernel code that a command has
//! no business in: namespaces and mounts, other processes' memory, keys, tracing, modules, exotic
//! sockets, terminals' input queues, set-user-id bits. Another architecture's system calls end the
//! process, since the numbers would mean other calls.

use std::collections::BTreeMap;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch, sock_filter,
};

use super::spec::{SetupError, Step};

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

/// Answered with ENOSYS, so that programs fall back to an older call: those whose arguments are
/// behind a pointer, where a filter cannot look, and io_uring, which does everything at once.
const NOT_THERE: &[i64] = &[
    libc::SYS_clone3,
    libc::SYS_openat2,
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
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
#[cfg(not(target_arch = "x86_64"))]
const DENIED_HERE: &[i64] = &[];

// Newer than the constants of the C library, or absent there on one architecture. Numbers from 424
// on are the same everywhere.
const OPEN_TREE_ATTR: i64 = 467;
const FCHMODAT2: i64 = 452;
#[cfg(target_arch = "x86_64")]
const KEXEC_FILE_LOAD: i64 = 320;
#[cfg(target_arch = "aarch64")]
const KEXEC_FILE_LOAD: i64 = 294;

const SET_ID_BITS: [u64; 2] = [0o4000, 0o2000];
const NAMESPACE_FLAGS: [i32; 7] = [
    libc::CLONE_NEWNS,
    libc::CLONE_NEWCGROUP,
    libc::CLONE_NEWUTS,
    libc::CLONE_NEWIPC,
    libc::CLONE_NEWUSER,
    libc::CLONE_NEWPID,
    libc::CLONE_NEWNET,
];
const CLONE_NEWTIME: u64 = 0x80;
/// Terminal requests that put words into somebody's mouth: input queue, selection, console; and
/// line disciplines, each a driver of its own.
const TERMINAL_REQUESTS: [u64; 4] = [0x5412, 0x541C, 0x541D, 0x5423];

/// The filters, ready to be installed.
pub(super) fn compile() -> Result<Vec<BpfProgram>, SetupError> {
    let arch = TargetArch::try_from(std::env::consts::ARCH)
        .map_err(|_| failed(format_args!("no filter for {}", std::env::consts::ARCH)))?;
    let denied = program(denied_rules()?, libc::EPERM, arch)?;
    let absent = NOT_THERE.iter().map(|number| (*number, Vec::new())).collect();
    let mut absent = program(absent, libc::ENOSYS, arch)?;
    if arch == TargetArch::x86_64 {
        absent = refuse_x32().into_iter().chain(absent).collect();
    }
    Ok(vec![absent, denied])
}

/// Installs the filters. Afterwards, this process can do no more than the command.
pub(super) fn install(filters: &[BpfProgram]) -> Result<(), SetupError> {
    filters.iter().try_for_each(|filter| seccompiler::apply_filter(filter).map_err(failed))
}

fn failed(error: impl std::fmt::Display) -> SetupError {
    SetupError::new(Step::Seccomp, format!("set up the system call filter: {error}"))
}

fn program(rules: Rules, errno: i32, arch: TargetArch) -> Result<BpfProgram, SetupError> {
    let action = SeccompAction::Errno(errno.cast_unsigned());
    SeccompFilter::new(rules, SeccompAction::Allow, action, arch)
        .and_then(BpfProgram::try_from)
        .map_err(failed)
}

/// The second interface of x86-64 has the same architecture value and other numbers, marked by
/// one bit; a list of the ordinary numbers would not see it.
fn refuse_x32() -> [sock_filter; 3] {
    const LOAD_WORD: u16 = 0x20;
    const JUMP_IF_AT_LEAST: u16 = 0x35;
    const RETURN: u16 = 0x06;
    const X32_BIT: u32 = 0x4000_0000;
    let errno = libc::SECCOMP_RET_ERRNO | libc::ENOSYS.cast_unsigned();
    [
        sock_filter { code: LOAD_WORD, jt: 0, jf: 0, k: 0 },
        sock_filter { code: JUMP_IF_AT_LEAST, jt: 0, jf: 1, k: X32_BIT },
        sock_filter { code: RETURN, jt: 0, jf: 0, k: errno },
    ]
}

fn denied_rules() -> Result<Rules, SetupError> {
    let mut rules: Rules =
        DENIED.iter().chain(DENIED_HERE).map(|number| (*number, Vec::new())).collect();
    let mut deny = |number: i64, conditions: &[SeccompCondition]| {
        let rule = SeccompRule::new(conditions.to_vec()).map_err(failed)?;
        rules.entry(number).or_default().push(rule);
        Ok::<(), SetupError>(())
    };

    for flag in NAMESPACE_FLAGS.map(|flag| u64::from(flag.cast_unsigned())) {
        deny(libc::SYS_clone, &[has_bits(0, flag)?])?;
        deny(libc::SYS_unshare, &[has_bits(0, flag)?])?;
    }
    deny(libc::SYS_unshare, &[has_bits(0, CLONE_NEWTIME)?])?;

    for request in TERMINAL_REQUESTS {
        // The kernel looks at 32 bits only, and so must the filter.
        deny(libc::SYS_ioctl, &[is(1, request)?])?;
    }

    // Only the default personality, asking for it, and switching address randomisation off.
    deny(
        libc::SYS_personality,
        &[is_not(0, 0)?, is_not(0, 0xffff_ffff)?, is_not(0, 0x0004_0000)?],
    )?;

    let families = [libc::AF_UNIX, libc::AF_INET, libc::AF_INET6, libc::AF_NETLINK]
        .map(|family| is_not(0, u64::from(family.cast_unsigned())));
    let families = families.into_iter().collect::<Result<Vec<_>, _>>()?;
    deny(libc::SYS_socket, &families)?;
    let netlink = u64::from(libc::AF_NETLINK.cast_unsigned());
    deny(libc::SYS_socket, &[is(0, netlink)?, is_not(2, 0)?])?;
    for family in [libc::AF_INET, libc::AF_INET6] {
        // The default, ICMP (for ping), TCP, UDP and ICMPv6; others load rarely used drivers.
        let mut conditions = vec![is(0, u64::from(family.cast_unsigned()))?];
        for protocol in [0, 1, 6, 17, 58] {
            conditions.push(is_not(2, protocol)?);
        }
        deny(libc::SYS_socket, &conditions)?;
    }
    deny(libc::SYS_socketpair, &[is_not(0, u64::from(libc::AF_UNIX.cast_unsigned()))?])?;

    for bit in SET_ID_BITS {
        for (number, mode) in set_id_calls() {
            deny(number, &[has_bits(mode, bit)?])?;
        }
        for (number, flags) in open_calls() {
            for creating in [libc::O_CREAT, libc::O_TMPFILE] {
                let creating = u64::from(creating.cast_unsigned());
                deny(number, &[has_bits(flags, creating)?, has_bits(flags + 1, bit)?])?;
            }
        }
    }
    for kind in [libc::S_IFCHR, libc::S_IFBLK] {
        for (number, mode) in mknod_calls() {
            let mask = SeccompCmpOp::MaskedEq(u64::from(libc::S_IFMT));
            deny(number, &[condition(mode, mask, u64::from(kind))?])?;
        }
    }
    Ok(rules)
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

fn has_bits(argument: u8, bits: u64) -> Result<SeccompCondition, SetupError> {
    condition(argument, SeccompCmpOp::MaskedEq(bits), bits)
}

fn is(argument: u8, value: u64) -> Result<SeccompCondition, SetupError> {
    condition(argument, SeccompCmpOp::Eq, value)
}

fn is_not(argument: u8, value: u64) -> Result<SeccompCondition, SetupError> {
    condition(argument, SeccompCmpOp::Ne, value)
}

/// All arguments looked at here are 32 bits wide for the kernel.
fn condition(
    argument: u8,
    operator: SeccompCmpOp,
    value: u64,
) -> Result<SeccompCondition, SetupError> {
    SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operator, value).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_fit_the_kernel_and_differ_in_their_answer() {
        let filters = compile().unwrap();
        assert_eq!(filters.len(), 2);
        for filter in &filters {
            assert!(filter.len() < 4096, "{}", filter.len());
        }
    }
}
