//! The process of the command, from its birth to `exec`.
//!
//! Order matters: the working directory before Landlock, capabilities before the filter, the proof
//! last. A failure is written to the pipe that `exec` would close, and the command has not run.

use std::io::Write as _;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::Command;

use rustix::fs::Mode;
use seccompiler::BpfProgram;

use super::spec::{
    Action, Context as _, MAX_INLINE_SCRIPT_BYTES, Report, SetupError, Spec, Step, StrictSpec,
    WORKSPACE_INSIDE,
};
use super::stage::Job;
use super::{
    landlock, limits, memory_file, namespaces, privileges, seccomp, self_test, syscalls, terminal,
};

/// How the command's process is confined.
pub(super) enum Confine<'a> {
    /// By everything there is.
    Strict {
        /// What is particular to the sandbox.
        strict: &'a StrictSpec,
        /// The namespaces it must not be in.
        outer: &'a namespaces::Inodes,
        /// The system call filter.
        filters: &'a [BpfProgram],
    },
    /// By limits only.
    Permissive,
}

/// Becomes the command, or reports why not and ends.
pub(super) fn main(job: Job, confine: Confine<'_>, report_failure: OwnedFd) -> ! {
    let Err(report) = become_command(job, &confine);
    if let Ok(message) = serde_json::to_vec(&report) {
        std::fs::File::from(report_failure).write_all(&message).ok();
    }
    syscalls::exit_now(125)
}

fn become_command(job: Job, confine: &Confine<'_>) -> Result<std::convert::Infallible, Report> {
    let Job { spec, script, stdin, stdout, stderr, terminal, .. } = job;
    match terminal {
        Some(terminal) => lead_session().and_then(|()| terminal::take(&terminal)),
        None => lead_session().and_then(|()| take_pipes(stdin, &stdout, &stderr)),
    }
    .and_then(|()| set_process_state())
    .map_err(Report::Refused)?;
    drop((stdout, stderr));
    change_directory(&spec, confine).map_err(Report::Refused)?;
    let mut command = command_line(&spec, script.as_ref()).map_err(Report::Refused)?;
    limits::apply(&spec.limits, matches!(confine, Confine::Strict { .. }))
        .map_err(Report::Refused)?;
    if let Confine::Strict { strict, outer, filters } = confine {
        confine_strictly(strict, outer, filters).map_err(Report::Refused)?;
    } else {
        syscalls::close_on_exec_from(3)
            .step(Step::Process, "close descriptors")
            .map_err(Report::Refused)?;
    }
    if let Some(script) = &script {
        // The script is read by path through this descriptor, so it alone survives `exec`.
        rustix::io::fcntl_setfd(script, rustix::io::FdFlags::empty())
            .step(Step::Process, "keep the script open")
            .map_err(Report::Refused)?;
    }
    if let Action::Probe(facts) = &spec.action {
        self_test::run(facts).map_err(Report::Refused)?;
        // A probe ends here, with everything set up, verified and tried.
        syscalls::exit_now(0)
    }
    let Some(command) = &mut command else {
        let error = SetupError::new(Step::Internal, "there is nothing to execute");
        return Err(Report::Refused(error));
    };
    let error = command.exec();
    Err(Report::NotExecuted {
        errno: error.raw_os_error().unwrap_or(libc::EINVAL),
        program: command.get_program().to_string_lossy().chars().take(200).collect(),
    })
}

fn lead_session() -> Result<(), SetupError> {
    rustix::process::setsid().map(drop).step(Step::Process, "start a session")
}

fn take_pipes(
    stdin: Option<OwnedFd>,
    stdout: &OwnedFd,
    stderr: &OwnedFd,
) -> Result<(), SetupError> {
    // Without a pipe, standard input stays the stage's `/dev/null`.
    stdin
        .map_or(Ok(()), rustix::stdio::dup2_stdin)
        .and_then(|()| rustix::stdio::dup2_stdout(stdout))
        .and_then(|()| rustix::stdio::dup2_stderr(stderr))
        .step(Step::Process, "take standard input and output")
}

/// Nothing odd is inherited.
fn set_process_state() -> Result<(), SetupError> {
    syscalls::reset_signals().step(Step::Process, "reset signals")?;
    rustix::process::umask(Mode::from_raw_mode(0o022));
    Ok(())
}

fn change_directory(spec: &Spec, confine: &Confine<'_>) -> Result<(), SetupError> {
    let base = match (confine, &spec.workspace) {
        (Confine::Strict { .. }, _) => Path::new(WORKSPACE_INSIDE),
        (Confine::Permissive, Some(workspace)) => &workspace.path,
        (Confine::Permissive, None) => Path::new("/"),
    };
    let directory = base.join(&spec.cwd);
    rustix::process::chdir(&directory)
        .step(Step::WorkingDirectory, format_args!("change to the working directory {directory:?}"))
}

/// The program with its arguments and environment; none for a probe.
fn command_line(spec: &Spec, script: Option<&OwnedFd>) -> Result<Option<Command>, SetupError> {
    let mut command = match (&spec.action, script) {
        (Action::Probe(_), _) => return Ok(None),
        (Action::Program(arguments), _) => {
            let mut arguments = arguments.iter().map(|bytes| std::ffi::OsStr::from_bytes(bytes));
            let program = arguments
                .next()
                .ok_or_else(|| SetupError::new(Step::Specification, "no program is named"))?;
            let mut command = Command::new(program);
            command.args(arguments);
            command
        }
        (Action::Script, Some(script)) => {
            let size =
                rustix::fs::fstat(script).step(Step::Specification, "measure the script")?.st_size;
            let mut command = Command::new("/bin/bash");
            command.arg0("bash");
            if u64::try_from(size).is_ok_and(|size| size <= MAX_INLINE_SCRIPT_BYTES) {
                let text = memory_file::read_sealed(script, MAX_INLINE_SCRIPT_BYTES)
                    .step(Step::Specification, "read the script")?;
                // One that begins with `-` or `+` is no option either.
                command.args(["-c", "--"]).arg(std::ffi::OsString::from_vec(text));
            } else {
                command.arg(format!("/proc/self/fd/{}", script.as_fd().as_raw_fd()));
            }
            command
        }
        (Action::Script, None) => {
            return Err(SetupError::new(Step::Specification, "the script is missing"));
        }
    };
    command.env_clear();
    for (name, value) in &spec.env {
        command.env(std::ffi::OsStr::from_bytes(name), std::ffi::OsStr::from_bytes(value));
    }
    Ok(Some(command))
}

fn confine_strictly(
    strict: &StrictSpec,
    outer: &namespaces::Inodes,
    filters: &[BpfProgram],
) -> Result<(), SetupError> {
    privileges::lock()?;
    landlock::restrict(strict)?;
    privileges::drop_all()?;
    syscalls::close_on_exec_from(3).step(Step::Process, "close descriptors")?;
    seccomp::install(filters)?;
    privileges::verify(strict.identity, filters.len())?;
    outer.verify_left()
}
