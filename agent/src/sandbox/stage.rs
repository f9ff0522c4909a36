//! The stage: what runs in the re-executed process before the command.
//!
//! It has one thread and an empty environment, so after a copy of the process every ordinary Rust
//! function may be used, which a copy of the many-threaded agent could not. The process that the
//! agent started becomes the *monitor*: it prepares what needs the agent's own privileges, creates
//! pid 1 of the sandbox ([`super::init`]) and waits for it, nothing else. Orders of the agent go
//! straight to pid 1.
//!
//! How it ends: the agent closing its socket (or dying) reaches pid 1 as end-of-file, which ends
//! pid 1; the kernel then ends every process of the sandbox and only afterwards lets the monitor's
//! wait return. If the monitor is killed, pid 1 gets its parent-death signal. Nothing here is
//! persisted, so a crash loses the command and nothing more.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::{AsFd, OwnedFd};
use std::process::ExitCode;

use rustix::fs::SealFlags;
use rustix::process::{WaitOptions, waitpid};

use super::spec::{
    Action, Confinement, Context as _, ControlGroup, MAPPER_NAME, MAX_SPEC_BYTES, Report,
    STAGE_NAME, SetupError, Spec, Step, StrictSpec,
};
use super::syscalls::{self, Cloned};
use super::{channel, init, mapping, namespaces, permissive, workspace};

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
    match receive(&control).and_then(|job| run(job, &control)) {
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
    pub(super) script: Option<OwnedFd>,
    pub(super) stdin: Option<OwnedFd>,
    /// The user namespace for the mount of the workspace.
    pub(super) mapping: Option<OwnedFd>,
    /// The command's side of its terminal, once that is open.
    pub(super) terminal: Option<OwnedFd>,
    /// The control group to create the command in.
    pub(super) born_into: Option<OwnedFd>,
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

fn receive(control: &OwnedFd) -> Result<Job, SetupError> {
    let step = Step::Specification;
    let mut fds =
        channel::receive_descriptors(control).step(step, "receive the specification")?.into_iter();
    let mut next = |what: &str| {
        fds.next().ok_or_else(|| SetupError::new(step, format!("{what} did not come")))
    };
    let spec = read_sealed(&next("the specification")?, MAX_SPEC_BYTES)?;
    let spec: Spec = serde_json::from_slice(&spec)
        .map_err(|error| SetupError::new(step, format!("read the specification: {error}")))?;
    let script =
        if matches!(spec.action, Action::Script) { Some(next("the script")?) } else { None };
    let stdin = if spec.stdin { Some(next("standard input")?) } else { None };
    let mapped = spec.workspace.as_ref().is_some_and(|workspace| workspace.mapped);
    let mapping = if mapped { Some(next("the map of the workspace")?) } else { None };
    let born_into = match spec.control_group {
        ControlGroup::None => None,
        ControlGroup::BornInto => Some(next("the control group")?),
        ControlGroup::Joined(count) => {
            for _ in 0..count {
                File::from(next("the control group")?)
                    .write_all(b"0")
                    .step(Step::ControlGroup, "join the control group")?;
            }
            None
        }
    };
    Ok(Job { spec, script, stdin, mapping, terminal: None, born_into })
}

/// Reads a memory file that can no longer change.
pub(super) fn read_sealed(file: &OwnedFd, most: u64) -> Result<Vec<u8>, SetupError> {
    let step = Step::Specification;
    let seals = rustix::fs::fcntl_get_seals(file).step(step, "look at the seals")?;
    if !seals.contains(SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK) {
        return Err(SetupError::new(step, "the memory file is not sealed"));
    }
    let file = File::from(file.try_clone().step(step, "duplicate a descriptor")?);
    let mut bytes = Vec::new();
    let mut reader = file.take(most + 1);
    reader.read_to_end(&mut bytes).step(step, "read a memory file")?;
    if u64::try_from(bytes.len()).is_ok_and(|length| length <= most) {
        Ok(bytes)
    } else {
        Err(SetupError::new(step, format!("a memory file is longer than {most} bytes")))
    }
}

fn run(job: Job, control: &OwnedFd) -> Result<(), SetupError> {
    // A command that eats all memory must be the first to go, not the agent. Raising the value
    // needs no privilege, and the whole sandbox inherits it.
    std::fs::write("/proc/self/oom_score_adj", "500").ok();
    // An interrupt typed at the agent's terminal is for the agent, which ends its commands in order.
    rustix::process::setsid().step(Step::Process, "start a session")?;
    // Nothing here may keep the agent's working directory busy.
    rustix::process::chdir("/").step(Step::Process, "leave the agent's directory")?;
    match job.spec.confinement.clone() {
        Confinement::Strict(strict) => run_strict(job, &strict, control),
        Confinement::Permissive => permissive::run(job, control),
    }
}

fn run_strict(job: Job, strict: &StrictSpec, control: &OwnedFd) -> Result<(), SetupError> {
    if strict.identity.uid == 0 {
        return Err(SetupError::new(Step::Identity, "a command never runs as user 0"));
    }
    if strict.identity.assumed {
        give_pipes_to(strict, &job)?;
    }
    let workspace = workspace::prepare(&job, strict.identity)?;
    let outer = namespaces::Inodes::of_this_process(strict.network)?;
    let (mapped, mut tell_mapped) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)
        .map(|(read, write)| (File::from(read), File::from(write)))
        .step(Step::Namespaces, "create a pipe")?;
    let flags = namespaces::clone_flags(strict.network);
    // Only here can the group be entered: pid 1 has no right to it.
    let group = job.born_into.as_ref().map(AsFd::as_fd);
    match syscalls::clone_process(flags, group)
        .step(Step::Namespaces, "clone into new namespaces")?
    {
        Cloned::Child => {
            drop(tell_mapped);
            init::main(init::Sandbox { job, strict, control, mapped, workspace, outer })
        }
        Cloned::Parent(pid) => {
            drop((job, workspace, mapped));
            // Without this, end-of-file on the command's output would have to wait for us too.
            release_output()?;
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

/// The command opens `/dev/stdout` by path, for which the pipe must belong to it.
fn give_pipes_to(strict: &StrictSpec, job: &Job) -> Result<(), SetupError> {
    let uid = rustix::fs::Uid::from_raw(strict.identity.uid);
    let gid = rustix::fs::Gid::from_raw(strict.identity.gid);
    let output = [rustix::stdio::stdout(), rustix::stdio::stderr()];
    for pipe in output.into_iter().chain(job.stdin.as_ref().map(AsFd::as_fd)) {
        rustix::fs::fchown(pipe, Some(uid), Some(gid))
            .step(Step::Identity, "hand the pipes to the command's user")?;
    }
    Ok(())
}

/// Points standard output and error of this process at `/dev/null`.
pub(super) fn release_output() -> Result<(), SetupError> {
    let null = rustix::stdio::stdin();
    rustix::stdio::dup2_stdout(null)
        .and_then(|()| rustix::stdio::dup2_stderr(null))
        .step(Step::Process, "close standard output")
}
