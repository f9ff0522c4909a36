//! From a failed step and an error number to what it means and what helps.

use super::spec::{SetupError, Step};

/// What a refusal is about if a command could do what it must not.
pub(super) const SELF_TEST: &str = "self-test";

/// Why a command was refused, for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// The part of the sandbox that could not be set up.
    pub what: &'static str,
    /// What was attempted and what the kernel said.
    pub why: String,
    /// What helps.
    pub remedy: String,
}

impl From<&SetupError> for Refusal {
    fn from(error: &SetupError) -> Self {
        Self { what: name(error.step), why: error.detail.clone(), remedy: remedy(error).to_owned() }
    }
}

fn name(step: Step) -> &'static str {
    match step {
        Step::Specification => "specification",
        Step::Workspace => "workspace",
        Step::ProtectedNames => "protected names",
        Step::MappedWorkspace => "id-mapped workspace",
        Step::Namespaces => "namespaces",
        Step::IdentityMap => "user namespace",
        Step::Identity => "user of the command",
        Step::FileSystem => "file system",
        Step::Proc => "private /proc",
        Step::Loopback => "private network",
        Step::Process => "process of the command",
        Step::Terminal => "terminal",
        Step::ControlGroup => "control group",
        Step::WorkingDirectory => "working directory",
        Step::Limits => "resource limits",
        Step::Capabilities => "capabilities",
        Step::Landlock => "Landlock",
        Step::Seccomp => "system call filter",
        Step::Verification => "verification",
        Step::SelfTest => SELF_TEST,
        Step::Internal => "sandbox stage",
    }
}

fn remedy(error: &SetupError) -> &'static str {
    match (error.step, error.errno) {
        (Step::Namespaces, Some(libc::ENOSPC)) => {
            "raise the limits of namespaces: sysctl user.max_user_namespaces (and the other \
             user.max_*_namespaces), which are 0 or used up"
        }
        (
            Step::Namespaces | Step::IdentityMap | Step::FileSystem | Step::Loopback,
            Some(libc::EPERM | libc::EACCES),
        ) => {
            "allow user namespaces to the agent: sysctl kernel.unprivileged_userns_clone=1 on \
             older Debian, an AppArmor profile with `userns,` or sysctl \
             kernel.apparmor_restrict_unprivileged_userns=0 on Ubuntu, a seccomp profile that \
             permits clone and mount in a container; or run the agent as root"
        }
        (Step::Namespaces, Some(libc::EINVAL | libc::ENOSYS)) => {
            "use a kernel built with all namespaces (CONFIG_USER_NS, PID_NS, NET_NS, IPC_NS, \
             UTS_NS, CGROUPS) of version 5.13 or later; in a container, a seccomp profile that \
             permits clone3 as well (docker and podman: --security-opt seccomp=FILE)"
        }
        (Step::FileSystem | Step::Process, Some(libc::ENOSYS)) => {
            "use a kernel of version 5.13 or later; in a container, a seccomp profile that permits \
             open_tree, move_mount, mount_setattr and clone3"
        }
        (Step::Proc, _) => {
            "in a container, unmask /proc (podman and docker: --security-opt \
             systempaths=unconfined): the kernel permits a private /proc only where the outer one \
             is completely visible"
        }
        (Step::MappedWorkspace, _) => {
            "keep the workspace on a file system with id-mapped mounts (ext4, xfs, btrfs, tmpfs; in \
             a container a volume, not the image's own layers), or run the agent as the user who \
             owns it instead of root"
        }
        (Step::Landlock, Some(libc::EOPNOTSUPP)) => {
            "switch Landlock on at boot: add landlock to the kernel's lsm= parameter"
        }
        (Step::Landlock, Some(libc::ENOSYS)) => {
            "use a kernel of version 5.13 or later, built with CONFIG_SECURITY_LANDLOCK"
        }
        (Step::Landlock, _) => "use a newer kernel, or a request that needs less of it",
        (Step::Seccomp, _) => "use a kernel built with CONFIG_SECCOMP_FILTER",
        (Step::Workspace, _) => {
            "check that the workspace's directory exists, is readable by the agent and was not \
             replaced"
        }
        (Step::ProtectedNames, _) => {
            "change what git, editors and shells obey in a workspace while no command runs there, \
             and look at what stands there now before you use it"
        }
        (Step::SelfTest | Step::Verification, _) => {
            "use another kernel: this one accepts what the sandbox asks of it and does not enforce \
             it; please report it with the output of `cortex-agent doctor`"
        }
        (Step::WorkingDirectory, _) => "name a directory that exists in the workspace",
        (Step::ControlGroup, _) => {
            "delegate a control group to the agent (systemd: Delegate=yes in its unit)"
        }
        (Step::Terminal, Some(libc::ENOSPC)) => {
            "close terminals on this machine, or raise sysctl kernel.pty.max"
        }
        (Step::Process, Some(libc::EAGAIN))
        | (Step::Namespaces, Some(libc::EAGAIN | libc::ENOMEM)) => {
            "free processes or memory on this machine, and try again"
        }
        _ => "run `cortex-agent doctor` on this node, and report what it prints",
    }
}
