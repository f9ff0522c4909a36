//! The stage: what runs in the re-executed process before the command.
//!
//! It has one thread and an empty environment, so after a copy of the process every ordinary Rust
//! function may be used, which a copy of the many-threaded agent could not. The process that the
//! agent started becomes the *monitor*: it creates pid 1 of the sandbox ([`super::init`]), gives it
//! its identity and waits for it, nothing else. What comes later of the agent, the command and
//! orders, goes straight to pid 1, which prepares all it can before the command is known.
//!
//! How it ends: the agent closing its socket (or dying) reaches pid 1 as end-of-file, which ends
//! pid 1; the kernel then ends every process of the sandbox and only afterwards lets the monitor's
//! wait return. If the monitor is killed, pid 1 gets its parent-death signal. Nothing here is
//! persisted, so a crash loses the command and nothing more.

use std::fs::File;
use std::io::Write as _;
use std::os::fd::{AsFd, OwnedFd};
use std::process::ExitCode;

use rustix::process::{WaitOptions, waitpid};

use super::spec::{
    Action, Confinement, Context as _, ControlGroup, MAPPER_NAME, Preparation, Report, STAGE_NAME,
    SetupError, Spec, Step, StrictSpec,
};
use super::syscalls::{self, Cloned};
use super::{channel, init, mapping, namespaces, permissive};

/// Whether this process was started as the sandbox stage. To be asked before any thread exists.
#[must_use]
pub fn stage_requested() -> bool {
    std::env::args_os().next().is_some_and(|name| name == STAGE_NAME || name == MAPPER_NAME)
}

/// Runs the stage. The exit code tells nothing; the agent is told everything over the socket.
#[must_use]
pub fn stage_main() -> ExitCode {
    if std::env::args_os().next().is_some_and(|name| name == MAPPER_NAME) {
        return mapping::main();
    }
    let Ok(control) = take_control_socket() else {
        // Somebody started this by hand: there is nobody to report to.
        return ExitCode::from(125);
    };
    report_panics_to(&control);
    match run(&control) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            channel::send(&control, &Report::Refused(error)).ok();
            ExitCode::from(125)
        }
    }
}

/// What the agent sent: the specification and the descriptors that belong to it.
pub(super) struct Job {
    pub(super) spec: Spec,
    pub(super) stdout: OwnedFd,
    pub(super) stderr: OwnedFd,
    pub(super) stdin: Option<OwnedFd>,
    pub(super) script: Option<OwnedFd>,
    /// The workspace, where the agent has mounted it.
    pub(super) workspace: Option<OwnedFd>,
    /// The library, likewise.
    pub(super) library: Option<OwnedFd>,
    /// The command's side of its terminal, once that is open.
    pub(super) terminal: Option<OwnedFd>,
}

impl Job {
    /// Waits for it, and tells the agent that it has come; `None` if the agent wants nothing any
    /// more.
    pub(super) fn receive(control: &OwnedFd) -> Result<Option<Self>, SetupError> {
        let step = Step::Specification;
        let Some((spec, fds)) =
            channel::receive_document::<Spec>(control).step(step, "receive the specification")?
        else {
            return Ok(None);
        };
        channel::send(control, &Report::Taken).step(step, "confirm the specification")?;
        let mut fds = fds.into_iter();
        let mut next = |what: &str| {
            fds.next().ok_or_else(|| SetupError::new(step, format!("{what} did not come")))
        };
        let (stdout, stderr) = (next("standard output")?, next("standard error")?);
        let stdin = if spec.stdin { Some(next("standard input")?) } else { None };
        let has_script = matches!(spec.action, Action::Script);
        let script = if has_script { Some(next("the script")?) } else { None };
        let mounted = spec.workspace.as_ref().is_some_and(|workspace| workspace.mounted);
        let workspace = if mounted { Some(next("the workspace")?) } else { None };
        let mounted = spec.library.as_ref().is_some_and(|library| library.mounted);
        let library = if mounted { Some(next("the library")?) } else { None };
        Ok(Some(Self { spec, stdout, stderr, stdin, script, workspace, library, terminal: None }))
    }
}

fn take_control_socket() -> std::io::Result<OwnedFd> {
    syscalls::close_from(3)?;
    let stdin = syscalls::take_inherited(0)?;
    if rustix::net::sockopt::socket_type(&stdin)? != rustix::net::SocketType::SEQPACKET {
        return Err(std::io::Error::other("standard input is not the control socket"));
    }
    let control = rustix::io::fcntl_dupfd_cloexec(&stdin, 3)?;
    let null = File::options().read(true).write(true).open("/dev/null")?;
    let mut stdin = stdin;
    rustix::io::dup2(&null, &mut stdin)?;
    // Descriptor 0 stays open for the rest of this process's life.
    std::mem::forget(stdin);
    Ok(control)
}

/// A panic must not write into the command's standard error, nor unwind a copy of this process
/// into the original's caller.
fn report_panics_to(control: &OwnedFd) {
    let Ok(control) = control.try_clone() else { return };
    std::panic::set_hook(Box::new(move |panic| {
        let error = SetupError::new(Step::Internal, panic.to_string());
        channel::send(&control, &Report::Refused(error)).ok();
        syscalls::exit_now(125);
    }));
}

fn run(control: &OwnedFd) -> Result<(), SetupError> {
    let step = Step::Specification;
    let prepared = channel::receive_document::<Preparation>(control)
        .step(step, "receive what the sandbox is made of")?;
    let Some((preparation, fds)) = prepared else { return Ok(()) };
    let group = enter_groups(preparation.control_group, fds)?;
    // A command that eats all memory must be the first to go, not the agent. Raising the value
    // needs no privilege, and the whole sandbox inherits it.
    std::fs::write("/proc/self/oom_score_adj", "500").ok();
    // An interrupt typed at the agent's terminal is for the agent, which ends its commands in order.
    rustix::process::setsid().step(Step::Process, "start a session")?;
    // Nothing here may keep the agent's working directory busy.
    rustix::process::chdir("/").step(Step::Process, "leave the agent's directory")?;
    match preparation.confinement {
        Confinement::Strict(strict) => run_strict(&strict, group, control),
        Confinement::Permissive => match Job::receive(control)? {
            Some(job) => permissive::run(job, group, control),
            None => Ok(()),
        },
    }
}

/// Enters the groups that can only be entered by this process itself; gives the one that the
/// command is to be created in.
fn enter_groups(groups: ControlGroup, fds: Vec<OwnedFd>) -> Result<Option<OwnedFd>, SetupError> {
    let step = Step::ControlGroup;
    let missing = || SetupError::new(step, "the control group did not come");
    let mut fds = fds.into_iter();
    match groups {
        ControlGroup::None => Ok(None),
        ControlGroup::BornInto => fds.next().map(Some).ok_or_else(missing),
        ControlGroup::Joined(count) => {
            for _ in 0..count {
                let mut group = File::from(fds.next().ok_or_else(missing)?);
                group.write_all(b"0").step(step, "join the control group")?;
            }
            Ok(None)
        }
    }
}

fn run_strict(
    strict: &StrictSpec,
    group: Option<OwnedFd>,
    control: &OwnedFd,
) -> Result<(), SetupError> {
    if strict.identity.uid == 0 {
        return Err(SetupError::new(Step::Identity, "a command never runs as user 0"));
    }
    let outer = namespaces::Inodes::of_this_process(strict.network)?;
    let quotas = namespaces::Quotas::of_this_user();
    let (mapped, mut tell_mapped) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)
        .map(|(read, write)| (File::from(read), File::from(write)))
        .step(Step::Namespaces, "create a pipe")?;
    let flags = namespaces::clone_flags(strict.network);
    // Only here can the group be entered: pid 1 has no right to it.
    match syscalls::clone_process(flags, group.as_ref().map(AsFd::as_fd))
        .step(Step::Namespaces, "clone into new namespaces")?
    {
        Cloned::Child => {
            drop((tell_mapped, group));
            init::main(init::Sandbox { strict, control, mapped, outer, quotas })
        }
        Cloned::Parent(pid) => {
            drop((mapped, group));
            let result = namespaces::map_identity(pid, strict.identity).and_then(|()| {
                tell_mapped.write_all(b"m").step(Step::IdentityMap, "tell pid 1 of its identity")
            });
            // Closing the pipe unwritten ends a pid 1 that never got its identity.
            drop(tell_mapped);
            rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable)
                .step(Step::Process, "make the monitor unreadable")?;
            while let Err(rustix::io::Errno::INTR) = waitpid(Some(pid), WaitOptions::empty()) {}
            result
        }
    }
}
