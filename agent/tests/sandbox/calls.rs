//! System calls that a command may not make: each is made outside, where the kernel takes it or finds
//! fault with its arguments, and inside, where it must not even get that far.

use std::path::Path;

use tempfile::TempDir;

use crate::support::{in_workspace, run, succeeds_outside};

/// No pointer, no descriptor, no flags: the kernel has something to say, and nothing happens.
const BAD: i64 = -1;

/// The name, the number, and arguments that do no harm where they are not denied.
fn calls() -> Vec<(&'static str, i64, Vec<i64>)> {
    let mut calls = vec![
        ("clone3", libc::SYS_clone3, vec![0, 0]),
        ("openat2", libc::SYS_openat2, vec![-100, 0, 0, 0]),
        ("io_uring_setup", libc::SYS_io_uring_setup, vec![0, 0]),
        ("io_uring_enter", libc::SYS_io_uring_enter, vec![BAD, 0, 0, 0, 0, 0]),
        ("io_uring_register", libc::SYS_io_uring_register, vec![BAD, 0, 0, 0]),
        ("io_setup", libc::SYS_io_setup, vec![0, 0]),
        ("mount", libc::SYS_mount, vec![0, 1, 0, 0, 0]),
        ("umount2", libc::SYS_umount2, vec![1, 0]),
        ("pivot_root", libc::SYS_pivot_root, vec![1, 1]),
        ("chroot", libc::SYS_chroot, vec![1]),
        ("move_mount", libc::SYS_move_mount, vec![BAD, 0, BAD, 0, BAD]),
        ("open_tree", libc::SYS_open_tree, vec![BAD, 0, 0xFFFF_FFFF]),
        ("fsopen", libc::SYS_fsopen, vec![1, 0]),
        ("fsconfig", libc::SYS_fsconfig, vec![BAD, 0xFFFF, 0, 0, 0]),
        ("fsmount", libc::SYS_fsmount, vec![BAD, 0xFFFF_FFFF, 0]),
        ("fspick", libc::SYS_fspick, vec![BAD, 1, 0xFFFF_FFFF]),
        ("mount_setattr", libc::SYS_mount_setattr, vec![BAD, 0, BAD, 0, 0]),
        ("setns", libc::SYS_setns, vec![BAD, 0]),
        ("unshare", libc::SYS_unshare, vec![i64::from(libc::CLONE_NEWUSER)]),
        ("unshare of time", libc::SYS_unshare, vec![0x80]),
        ("ptrace", libc::SYS_ptrace, vec![0, 0, 0, 0]),
        ("process_vm_readv", libc::SYS_process_vm_readv, vec![0, 0, 0, 0, 0, 0]),
        ("process_vm_writev", libc::SYS_process_vm_writev, vec![0, 0, 0, 0, 0, 0]),
        ("process_madvise", libc::SYS_process_madvise, vec![BAD, 0, 0, 0, 0]),
        ("kcmp", libc::SYS_kcmp, vec![0, 0, 0, 0, 0]),
        ("pidfd_getfd", libc::SYS_pidfd_getfd, vec![BAD, 0, 0]),
        ("perf_event_open", libc::SYS_perf_event_open, vec![1, 0, 0, 0, 0]),
        ("bpf", libc::SYS_bpf, vec![0xFFFF, 0, 0]),
        ("kexec_load", libc::SYS_kexec_load, vec![0, 0, 0, BAD]),
        ("init_module", libc::SYS_init_module, vec![1, 0, 0]),
        ("finit_module", libc::SYS_finit_module, vec![BAD, 0, 0]),
        ("delete_module", libc::SYS_delete_module, vec![1, 0]),
        ("reboot", libc::SYS_reboot, vec![0, 0, 0, 0]),
        ("syslog", libc::SYS_syslog, vec![3, 0, 0]),
        ("swapon", libc::SYS_swapon, vec![1, 0]),
        ("swapoff", libc::SYS_swapoff, vec![1]),
        ("acct", libc::SYS_acct, vec![1]),
        ("quotactl", libc::SYS_quotactl, vec![BAD, 0, 0, 0]),
        ("settimeofday", libc::SYS_settimeofday, vec![1, 0]),
        ("clock_settime", libc::SYS_clock_settime, vec![0, 1]),
        ("clock_adjtime", libc::SYS_clock_adjtime, vec![0, 1]),
        ("adjtimex", libc::SYS_adjtimex, vec![1]),
        ("sethostname", libc::SYS_sethostname, vec![0, BAD]),
        ("setdomainname", libc::SYS_setdomainname, vec![0, BAD]),
        ("add_key", libc::SYS_add_key, vec![0, 0, 0, 0, 0]),
        ("request_key", libc::SYS_request_key, vec![0, 0, 0, 0]),
        ("keyctl", libc::SYS_keyctl, vec![0, -3, 0]),
        ("userfaultfd", libc::SYS_userfaultfd, vec![1]),
        ("migrate_pages", libc::SYS_migrate_pages, vec![0, 0, 0, 0]),
        ("move_pages", libc::SYS_move_pages, vec![0, 0, 0, 0, 0, 0]),
        ("open_by_handle_at", libc::SYS_open_by_handle_at, vec![BAD, 0, 0]),
        ("name_to_handle_at", libc::SYS_name_to_handle_at, vec![BAD, 0, 0, 0, 0]),
        ("fanotify_init", libc::SYS_fanotify_init, vec![0x200, 0]),
        ("fanotify_mark", libc::SYS_fanotify_mark, vec![BAD, 0, 0, BAD, 0]),
        ("personality", libc::SYS_personality, vec![0x0100_0000]),
        ("ioctl TIOCSTI", libc::SYS_ioctl, vec![0, 0x5412, 0]),
        ("ioctl TIOCSTI by 64 bits", libc::SYS_ioctl, vec![0, 0x7_0000_5412, 0]),
        ("ioctl TIOCLINUX", libc::SYS_ioctl, vec![0, 0x541C, 0]),
        ("ioctl TIOCCONS", libc::SYS_ioctl, vec![1, 0x541D, 0]),
        ("ioctl TIOCSETD", libc::SYS_ioctl, vec![0, 0x5423, 0]),
        ("ioctl for a snapshot of btrfs", libc::SYS_ioctl, vec![BAD, 0x5000_9417, 0]),
        ("ioctl for a subvolume of bcachefs", libc::SYS_ioctl, vec![BAD, 0x4020_BC10, 0]),
        ("huge pages", libc::SYS_mmap, vec![0, 0, 3, 0x4_0022, BAD, 0]),
        ("huge pages of a file in memory", libc::SYS_memfd_create, vec![0, 4]),
        ("huge pages of a segment", libc::SYS_shmget, vec![0, 0, 0o4000]),
        ("socket of packets", libc::SYS_socket, vec![17, 77, 0]),
        ("socket of the hypervisor", libc::SYS_socket, vec![40, 77, 0]),
        ("socket of the kernel's cryptography", libc::SYS_socket, vec![38, 77, 0]),
        ("socket of the kernel's events", libc::SYS_socket, vec![16, 3, 15]),
        ("socket of SCTP", libc::SYS_socket, vec![2, 1, 132]),
        ("pair of sockets", libc::SYS_socketpair, vec![2, 1, 0, 0]),
        ("limits of a process by its number", libc::SYS_prlimit64, vec![1, 77, 0, 0]),
        ("processors of pid 1", libc::SYS_sched_setaffinity, vec![1, 8, 0]),
        ("scheduler of pid 1", libc::SYS_sched_setscheduler, vec![1, 0, 0]),
        ("scheduler's parameters of pid 1", libc::SYS_sched_setparam, vec![1, 0]),
        ("scheduler's attributes of pid 1", libc::SYS_sched_setattr, vec![1, 0, 0]),
        ("priority of pid 1", libc::SYS_setpriority, vec![0, 1, 0]),
        ("priority of a user", libc::SYS_setpriority, vec![2, 0x7FFF_0000, 0]),
        ("disk priority of pid 1", libc::SYS_ioprio_set, vec![1, 1, 0xFFFF]),
        ("disk priority of a user", libc::SYS_ioprio_set, vec![3, 0x7FFF_0000, 0xFFFF]),
    ];
    #[cfg(target_arch = "x86_64")]
    calls.extend([
        ("kexec_file_load", libc::SYS_kexec_file_load, vec![BAD, BAD, 0, 0, BAD]),
        ("iopl", libc::SYS_iopl, vec![4]),
        ("ioperm", libc::SYS_ioperm, vec![BAD, BAD, 0]),
        ("modify_ldt", libc::SYS_modify_ldt, vec![0, 0, 0]),
        ("ustat", libc::SYS_ustat, vec![BAD, 0]),
        ("sysfs", libc::SYS_sysfs, vec![3, 0, 0]),
    ]);
    calls
}

/// Makes each call in a process of its own, and prints its name and its error number.
fn script(calls: &[(&'static str, i64, Vec<i64>)]) -> String {
    let lines: Vec<_> = calls
        .iter()
        .map(|(name, number, arguments)| {
            let arguments: Vec<_> = arguments.iter().map(i64::to_string).collect();
            format!("[\"{name}\", {number}, {}],", arguments.join(", "))
        })
        .collect();
    format!(
        "for my $call ({}) {{ my ($name, @call) = @$call; my $pid = fork; if (!$pid) {{ \
         my $result = syscall($call[0], @call[1..$#call]); exit($result == -1 ? $! + 0 : 0) }} \
         waitpid $pid, 0; print \"$name=\" . ($? >> 8) . \"\\n\" }}",
        lines.join("")
    )
}

#[tokio::test]
async fn calls_into_kernel_code_that_a_command_has_no_business_in_are_denied() {
    if !succeeds_outside("perl -e 1", Path::new("/")) {
        eprintln!("skipped: no perl to make system calls with");
        return;
    }
    let workspace = TempDir::new().unwrap();
    let calls = calls();
    std::fs::write(workspace.path().join("calls.pl"), script(&calls)).unwrap();
    let outside = std::process::Command::new("perl")
        .arg(workspace.path().join("calls.pl"))
        .stdin(std::process::Stdio::null())
        .output()
        .unwrap();
    let outside = String::from_utf8(outside.stdout).unwrap();
    let inside = run(in_workspace("perl calls.pl", workspace.path())).await;
    assert!(inside.succeeded(), "{inside:?}");
    assert_eq!(inside.stdout.lines().count(), calls.len(), "{inside:?}");
    let denied = |errno: &str| ["1", "38"].contains(&errno);
    let mut shown = 0;
    for (outside, inside) in outside.lines().zip(inside.stdout.lines()) {
        let ((name, outside), (_, inside)) =
            (outside.split_once('=').unwrap(), inside.split_once('=').unwrap());
        assert!(denied(inside), "{name} got as far as error {inside} inside");
        if denied(outside) {
            eprintln!("skipped: {name}: denied outside as well");
        } else {
            shown += 1;
        }
    }
    assert!(shown > calls.len() / 2, "only {shown} of {} show anything", calls.len());
}

#[cfg(target_arch = "x86_64")]
#[tokio::test]
async fn a_call_by_the_numbers_of_another_architecture_ends_the_process() {
    let workspace = TempDir::new().unwrap();
    let source = "int main(void) { long r; __asm__ volatile(\"int $0x80\" : \"=a\"(r) : \"a\"(20)); \
                  return r > 0 ? 0 : 1; }";
    std::fs::write(workspace.path().join("old.c"), source).unwrap();
    if !succeeds_outside("gcc -o old old.c && ./old", workspace.path()) {
        eprintln!("skipped: no gcc here, or the kernel has no 32-bit calls");
        return;
    }
    let ran = run(in_workspace("./old; echo $?", workspace.path())).await;
    assert_eq!(ran.stdout, format!("{}\n", 128 + libc::SIGSYS), "{ran:?}");
}

/// With pid 1's limits lowered, it could not tell how the command ended.
#[tokio::test]
async fn a_command_cannot_take_the_descriptors_of_its_pid_1() {
    let text = "prlimit --pid 1 --nofile=1:1 2>/dev/null; (true &); sleep 0.1; echo done; exit 5";
    let ran = run(crate::support::script(text)).await;
    assert_eq!((ran.exit.exit_code, ran.stdout.as_str()), (5, "done\n"), "{ran:?}");
}
