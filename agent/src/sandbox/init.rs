//! Pid 1 of a sandbox: builds it from within, starts the command, reaps, and takes the whole
//! sandbox with it when it ends.
//!
//! What does not depend on the command is done before the command is known. From then until it
//! comes, nothing of anybody else is in the sandbox, and pid 1 waits for the agent alone.
//!
//! It owns nothing the command could use: it is unreadable to the command (not dumpable), holds no
//! capability once the command is started, has none of the command's descriptors, and cannot be
//! signalled from inside (it handles no signal, and Landlock keeps the command's signals in).

use std::fs::File;
use std::io::Read as _;
use std::os::fd::{AsFd as _, OwnedFd};

use rustix::process::{DumpableBehavior, Signal};

use super::protect::Watch;
use super::spec::{Context as _, Identity, Network, Report, SetupError, Step, StrictSpec};
use super::stage::Job;
use super::syscalls::{self, Cloned};
use super::{channel, filesystem, namespaces, payload, privileges, reaper, seccomp, terminal};

/// What pid 1 is given.
pub(super) struct Sandbox<'a> {
    pub(super) strict: &'a StrictSpec,
    pub(super) control: &'a OwnedFd,
    /// One byte when the identity maps are written; end-of-file if they never will be.
    pub(super) mapped: File,
    /// The namespaces of the host.
    pub(super) outer: namespaces::Inodes,
    /// What the command may take of what is the agent's user's, too.
    pub(super) quotas: namespaces::Quotas,
}

/// Runs pid 1. Never returns into the code of the process it is a copy of.
pub(super) fn main(mut sandbox: Sandbox<'_>) -> ! {
    let mut byte = [0];
    if !matches!(sandbox.mapped.read(&mut byte), Ok(1)) {
        // The monitor has already reported why.
        syscalls::exit_now(125);
    }
    let control = sandbox.control;
    if let Err(error) = run(&sandbox) {
        channel::send(control, &Report::Refused(error)).ok();
        syscalls::exit_now(125);
    }
    syscalls::exit_now(0)
}

fn run(sandbox: &Sandbox<'_>) -> Result<(), SetupError> {
    let Sandbox { strict, control, outer, quotas, .. } = sandbox;
    take_identity(strict.identity)?;
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)
        .step(Step::Process, "make pid 1 unreadable")?;
    // Set after the change of identity, which would clear it.
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))
        .step(Step::Process, "tie pid 1 to its monitor")?;
    syscalls::set_host_name(c"cortex").step(Step::Namespaces, "set the host name")?;
    quotas.apply();
    let root = filesystem::prepare(strict)?;
    if strict.network == Network::None {
        syscalls::loopback_up().step(Step::Loopback, "bring up the private loopback")?;
    }
    let filters = seccomp::compile();
    let children = syscalls::signal_descriptor(Signal::CHILD)
        .step(Step::Process, "watch for ending processes")?;
    let (executed, report_failure) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)
        .step(Step::Process, "create a pipe")?;

    let Some(mut job) = Job::receive(control)? else { return Ok(()) };
    let pinned = root.complete(job.workspace.take(), job.library.take(), &job.spec)?;
    let watch = Watch::begin(pinned)?;
    if let Some(size) = job.spec.terminal {
        job.terminal = Some(terminal::open(size, control)?);
    }
    match syscalls::fork_process().step(Step::Process, "start the command's process")? {
        Cloned::Child => {
            drop((executed, children, watch));
            let confine = payload::Confine::Strict { strict, outer, filters: &filters };
            payload::main(job, confine, report_failure)
        }
        Cloned::Parent(pid) => {
            // End-of-file on the command's output must not have to wait for us.
            drop((job, report_failure));
            let result = privileges::drop_all().and_then(|()| {
                reaper::supervise(control, &children, executed.as_fd(), pid, watch.as_ref())
            });
            // From here on the command may have run.
            if let Err(error) = result {
                channel::send(control, &Report::Failed(error)).ok();
            }
            Ok(())
        }
    }
}

/// Becomes the command's user. Capabilities in the sandbox's own user namespace are kept: they are
/// needed to build it, and dropped afterwards.
fn take_identity(identity: Identity) -> Result<(), SetupError> {
    if !identity.assumed {
        return Ok(());
    }
    let uid = rustix::process::Uid::from_raw(identity.uid);
    let gid = rustix::process::Gid::from_raw(identity.gid);
    let change = || -> rustix::io::Result<()> {
        rustix::thread::set_keep_capabilities(true)?;
        rustix::thread::set_thread_groups(&[])?;
        rustix::thread::set_thread_res_gid(gid, gid, gid)?;
        rustix::thread::set_thread_res_uid(uid, uid, uid)?;
        let mut sets = rustix::thread::capabilities(None)?;
        sets.effective = sets.permitted;
        rustix::thread::set_capabilities(None, sets)
    };
    change().step(Step::Identity, format_args!("become user {}", identity.uid))
}
