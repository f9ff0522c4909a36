//! A command without isolation: as the agent's own user, seeing what the agent sees. What still
//! holds are limits, an environment of its own, and that nothing of it outlives it.
//!
//! The monitor is the sub-reaper of everything the command starts: whatever detaches itself ends
//! up as its child, and is found and ended there. Weaker than pid 1 of a sandbox in one point: if
//! this monitor is killed, only the command itself dies with it.

use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{Mode, OFlags};
use rustix::process::{Pid, Signal, WaitOptions, wait};

use super::spec::{Context as _, Report, SetupError, Step};
use super::stage::Job;
use super::syscalls::{self, Cloned};
use super::{channel, payload, reaper, terminal};

/// Runs the command to its end, and ends what it left behind.
pub(super) fn run(
    mut job: Job,
    group: Option<OwnedFd>,
    control: &OwnedFd,
) -> Result<(), SetupError> {
    let step = Step::Process;
    rustix::process::set_child_subreaper(Some(rustix::process::getpid()))
        .step(step, "become the sub-reaper")?;
    if let Some(size) = job.spec.terminal {
        job.terminal = Some(terminal::open(size, control)?);
    }
    let children =
        syscalls::signal_descriptor(Signal::CHILD).step(step, "watch for ending processes")?;
    let (executed, report_failure) =
        rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).step(step, "create a pipe")?;
    let entrance = group.as_ref().map(AsFd::as_fd);
    match syscalls::clone_process(0, entrance).step(step, "start the command's process")? {
        Cloned::Child => {
            drop((executed, children, group));
            rustix::process::set_parent_process_death_signal(Some(Signal::KILL)).ok();
            payload::main(job, payload::Confine::Permissive, report_failure)
        }
        Cloned::Parent(pid) => {
            // End-of-file on the command's output must not have to wait for us.
            drop((job, report_failure));
            let result = reaper::supervise(control, &children, executed.as_fd(), pid, None);
            // From here on the command may have run.
            if let Err(error) = result {
                channel::send(control, &Report::Failed(error)).ok();
            }
            if let Some(group) = group {
                end_group(&group);
            }
            end_descendants();
            Ok(())
        }
    }
}

/// Kills a whole control group at once, against which not even the fastest forking helps. Kernels
/// before 5.14 cannot; the descendants are ended one by one in any case.
fn end_group(group: &OwnedFd) {
    let flags = OFlags::WRONLY | OFlags::CLOEXEC;
    if let Ok(file) = rustix::fs::openat(group, "cgroup.kill", flags, Mode::empty()) {
        rustix::io::write(&file, b"1").ok();
    }
}

/// Kills every descendant. Each round kills what it sees; a process that was just being started
/// becomes our child when its parent dies, and is seen in the next round.
fn end_descendants() {
    loop {
        for pid in descendants() {
            rustix::process::kill_process(pid, Signal::KILL).ok();
        }
        loop {
            match wait(WaitOptions::empty()) {
                // Other children may have come in the meantime.
                Ok(_) => break,
                Err(rustix::io::Errno::INTR) => {}
                Err(_) => return,
            }
        }
    }
}

fn descendants() -> Vec<Pid> {
    let mut found = Vec::new();
    let mut pending = vec![rustix::process::getpid()];
    while let Some(pid) = pending.pop() {
        let children = children_of(pid);
        found.extend(&children);
        pending.extend(children);
    }
    found
}

fn children_of(pid: Pid) -> Vec<Pid> {
    let Ok(threads) = std::fs::read_dir(format!("/proc/{}/task", pid.as_raw_nonzero())) else {
        return Vec::new();
    };
    threads
        .flatten()
        .filter_map(|thread| std::fs::read_to_string(thread.path().join("children")).ok())
        .flat_map(|list| {
            list.split_whitespace()
                .filter_map(|pid| Pid::from_raw(pid.parse().ok()?))
                .collect::<Vec<_>>()
        })
        .collect()
}
