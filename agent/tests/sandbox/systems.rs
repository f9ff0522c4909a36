//! Systems that cannot make a sandbox, imitated for real: strict commands are refused with the
//! step, the kernel's answer and what helps, and have not run.
//!
//! Containers and old kernels answer system calls with an error; so does a filter around the agent.
//! Other systems are made from mounts in a private mount namespace.

use cortex_agent::exec::{CommandRequest, CommandVerdict};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch};
use tempfile::TempDir;

use crate::support::{apart, in_workspace, launcher, run, script, succeeds_outside};

/// The call that is answered with an error, the step that is named, and a word of the remedy.
const FILTERED: [(i64, i32, &str, &str); 7] = [
    (libc::SYS_clone3, libc::ENOSYS, "namespaces", "seccomp"),
    (libc::SYS_fsopen, libc::EPERM, "file system", "seccomp profile"),
    (libc::SYS_mount_setattr, libc::ENOSYS, "file system", "5.13"),
    (libc::SYS_pivot_root, libc::EPERM, "file system", "AppArmor"),
    (libc::SYS_landlock_create_ruleset, libc::ENOSYS, "Landlock", "CONFIG_SECURITY_LANDLOCK"),
    (libc::SYS_landlock_create_ruleset, libc::EOPNOTSUPP, "Landlock", "lsm="),
    (libc::SYS_seccomp, libc::EINVAL, "system call filter", "CONFIG_SECCOMP_FILTER"),
];

#[tokio::test]
async fn what_a_system_does_not_offer_is_named_with_its_remedy_and_nothing_runs() {
    for (call, errno, step, remedy) in FILTERED {
        let (call, errno) = (call.to_string(), errno.to_string());
        let variables =
            [("CALL", call.as_str()), ("ERRNO", &errno), ("STEP", step), ("REMEDY", remedy)];
        let (succeeded, text) = apart(&[], "systems::apart_filtered", &variables).await;
        assert!(succeeded, "call {call}, error {errno}: {text}");
    }
}

fn variable(name: &str) -> String {
    std::env::var(name).unwrap()
}

#[test]
#[ignore = "run by the test above"]
fn apart_filtered() {
    let (call, errno) = (variable("CALL").parse().unwrap(), variable("ERRNO").parse().unwrap());
    on_a_system_that_answers(call, errno, expect_refusal());
}

/// Does something after one system call has lost its effect, for this process and all it starts.
fn on_a_system_that_answers(call: i64, errno: u32, act: impl Future<Output = ()>) {
    let rules = [(call, Vec::new())].into_iter().collect();
    let arch = TargetArch::try_from(std::env::consts::ARCH).unwrap();
    let action = SeccompAction::Errno(errno);
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, action, arch).unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let ran = runtime.block_on(run(script("true")));
    assert!(ran.succeeded(), "not even without the filter: {ran:?}");
    // What was made for the next command was made by the better system.
    runtime.block_on(launcher().close());
    seccompiler::apply_filter_all_threads(&BpfProgram::try_from(filter).unwrap()).unwrap();
    runtime.block_on(act);
}

#[tokio::test]
async fn a_kernel_that_agrees_and_does_not_enforce_gets_no_strict_command() {
    let (succeeded, text) = apart(&[], "systems::apart_unenforced", &[]).await;
    assert!(succeeded, "{text}");
}

#[test]
#[ignore = "run by the test above"]
fn apart_unenforced() {
    // Error number 0 is success, and nothing was done.
    on_a_system_that_answers(libc::SYS_landlock_restrict_self, 0, async {
        let found = launcher().probe(&[], false).await;
        if found.landlock_abi < 6 {
            eprintln!("skipped: this kernel's Landlock has no effect that others do not have too");
            return;
        }
        assert_eq!(found.missing.first().map(|piece| piece.what), Some("self-test"), "{found:?}");
        let workspace = TempDir::new().unwrap();
        let ran = run(in_workspace("touch marker", workspace.path())).await;
        assert_eq!(ran.exit.exit_code, 126, "{ran:?}");
        assert_eq!(ran.exit.hint.as_ref(), Some(&found.missing[0].remedy));
        assert!(!workspace.path().join("marker").exists(), "the command has run");
    });
}

async fn expect_refusal() {
    let workspace = TempDir::new().unwrap();
    let ran = run(in_workspace("touch marker", workspace.path())).await;
    assert_eq!((ran.exit.verdict, ran.exit.exit_code), (CommandVerdict::Refused, 126), "{ran:?}");
    let reason = ran.exit.reason.as_ref().unwrap();
    assert!(reason.starts_with(&variable("STEP")), "{reason}");
    let hint = ran.exit.hint.as_ref().unwrap();
    assert!(hint.contains(&variable("REMEDY")), "{hint}");
    assert!(!workspace.path().join("marker").exists(), "the command has run");
    let found = launcher().probe(&[], false).await;
    assert!(!found.strict_available(), "{found:?}");
    assert_eq!(&found.missing[0].remedy, hint, "the probe says something else");
}

/// Runs a test in a private mount namespace that `prepare` has changed; its `$1` is a directory.
async fn in_a_system(prepare: &str, step: &str, remedy: &str, test: &str) {
    if !succeeds_outside("unshare -m true", std::path::Path::new("/")) {
        eprintln!("skipped: {step}: only root can make such a system here");
        return;
    }
    let folder = TempDir::new().unwrap();
    let place = folder.path().to_str().unwrap();
    let script = format!("set -e; mount --make-rprivate /; {prepare}; shift; exec \"$@\"");
    let before = ["unshare", "-m", "sh", "-c", &script, "sh", place];
    let variables = [("STEP", step), ("REMEDY", remedy), ("PLACE", place)];
    let (succeeded, text) = apart(&before, test, &variables).await;
    for line in text.lines().filter(|line| line.starts_with("skipped:")) {
        eprintln!("{line}");
    }
    assert!(succeeded, "{step}: {text}");
}

#[tokio::test]
async fn without_proc_nothing_runs() {
    let (step, remedy) = ("cannot read which ids exist", "mount /proc");
    in_a_system("umount -l /proc", step, remedy, "systems::apart_without_proc").await;
}

#[tokio::test]
#[ignore = "run by the test above"]
async fn apart_without_proc() {
    assert!(!std::path::Path::new("/proc/self").exists());
    let workspace = TempDir::new().unwrap();
    let ran = run(in_workspace("touch marker", workspace.path())).await;
    assert_eq!((ran.exit.verdict, ran.exit.exit_code), (CommandVerdict::Refused, 126), "{ran:?}");
    assert!(ran.exit.hint.is_some(), "{ran:?}");
    assert!(!workspace.path().join("marker").exists(), "the command has run");
}

#[tokio::test]
async fn a_masked_proc_as_in_a_container_is_named() {
    let mask = "mount -t tmpfs none /proc/sys";
    in_a_system(mask, "private /proc", "unmask /proc", "systems::apart_refused").await;
}

#[tokio::test]
#[ignore = "run by the test above"]
async fn apart_refused() {
    expect_refusal().await;
}

/// Where root's workspace cannot be mapped to the command's user, running the command as root or
/// giving the files away would both be worse than not running it.
#[tokio::test]
async fn a_workspace_that_cannot_be_mapped_is_refused_with_what_helps() {
    for (kind, options) in
        [("overlay", "-o lowerdir=$1/lower,upperdir=$1/upper,workdir=$1/work"), ("ramfs", "")]
    {
        let prepare = format!(
            "mount -t tmpfs none $1; mkdir $1/lower $1/upper $1/work $1/ws; \
             mount -t {kind} {options} none $1/ws || {{ echo skipped: no {kind} >&2; exit 0; }}"
        );
        let (step, test) = ("id-mapped workspace", "systems::apart_unmappable");
        in_a_system(&prepare, step, "id-mapped mounts", test).await;
    }
}

#[tokio::test]
#[ignore = "run by the test above"]
async fn apart_unmappable() {
    let root = std::path::PathBuf::from(variable("PLACE")).join("ws/root");
    std::fs::create_dir(&root).unwrap();
    let ran = run(in_workspace("touch marker", &root)).await;
    assert_eq!((ran.exit.verdict, ran.exit.exit_code), (CommandVerdict::Refused, 126), "{ran:?}");
    assert!(ran.exit.reason.as_ref().unwrap().starts_with(&variable("STEP")), "{ran:?}");
    assert!(ran.exit.hint.as_ref().unwrap().contains(&variable("REMEDY")), "{ran:?}");
    assert!(!root.join("marker").exists(), "the command has run");
    // What belongs to the command's user already needs no mapping.
    let ran = run(script("id -u; id -g")).await;
    let ids: Vec<u32> = ran.stdout.lines().map(|line| line.parse().unwrap()).collect();
    std::os::unix::fs::chown(&root, Some(ids[0]), Some(ids[1])).unwrap();
    let ran = run(in_workspace("touch marker", &root)).await;
    assert!(ran.succeeded() && root.join("marker").exists(), "{ran:?}");
}

#[tokio::test]
async fn an_owner_who_requires_control_groups_gets_them_or_a_refusal() {
    let workspace = TempDir::new().unwrap();
    let request = CommandRequest {
        require_control_group: true,
        ..in_workspace("touch marker", workspace.path())
    };
    let ran = run(request).await;
    let marker = workspace.path().join("marker");
    if launcher().control_groups() == "none" {
        assert_eq!(ran.exit.exit_code, 126, "{ran:?}");
        assert!(ran.exit.hint.unwrap().contains("Delegate=yes"));
        assert!(!marker.exists(), "the command has run");
    } else {
        assert!(ran.succeeded() && marker.exists(), "{ran:?}");
    }
}
