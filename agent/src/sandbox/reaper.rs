//! Waiting for the command, by the process that every other process of it ends up under: pid 1 of
//! a sandbox, or the sub-reaper of a permissive command.
//!
//! Order of reports: `Started` or a failure first, `Ended` last. Orders are taken at any time; the
//! end of the control socket means that the agent is gone, and ends everything.

use std::fs::File;
use std::io::Read as _;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::RecvFlags;
use rustix::process::{Pid, Signal, WaitOptions, wait};

use super::channel;
use super::protect::Watch;
use super::spec::{Context as _, Ending, MAX_MESSAGE_BYTES, Order, Report, SetupError, Step};

/// Forwards orders to the process group of `command` and reports until it ends or everything is to
/// be ended. Returns in both cases; the caller then ends what is left.
///
/// `children` becomes readable at the end of any child; `executed` carries the failure of the
/// command's process to execute, or nothing. Where there is a `watch`, what it finds lost is an error,
/// and the caller ends everything at once.
pub(super) fn supervise(
    control: &OwnedFd,
    children: &OwnedFd,
    executed: BorrowedFd<'_>,
    command: Pid,
    watch: Option<&Watch>,
) -> Result<(), SetupError> {
    let mut reported = false;
    loop {
        let mut ready = Vec::with_capacity(5);
        ready.push(PollFd::new(control, PollFlags::IN));
        ready.push(PollFd::new(children, PollFlags::IN));
        // Once the outcome of `exec` is known, its pipe would be ready for ever.
        let outcome = if reported { PollFlags::empty() } else { PollFlags::IN };
        let executed_at = if reported { control.as_fd() } else { executed };
        ready.push(PollFd::from_borrowed_fd(executed_at, outcome));
        if let Some((renames, mounts)) = watch.map(Watch::descriptors) {
            ready.push(PollFd::from_borrowed_fd(renames, PollFlags::IN));
            // A change of mounts is no data, but an exceptional condition.
            ready.push(PollFd::from_borrowed_fd(mounts, PollFlags::PRI));
        }
        match poll(&mut ready, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error).step(Step::Internal, "wait for events"),
        }
        let is_ready = |index: usize| ready.get(index).is_some_and(|fd| !fd.revents().is_empty());
        if let Some(watch) = watch.filter(|_| is_ready(3) || is_ready(4)) {
            watch.check()?;
        }
        let [control_ready, children_ready, executed_ready] = [0, 1, 2].map(is_ready);
        if executed_ready && !reported {
            reported = true;
            if !report_start(control, executed)? {
                return Ok(());
            }
        }
        if control_ready && !obey(control, command) {
            return Ok(());
        }
        if children_ready && let Some(ending) = reap(children, command)? {
            if !reported && !report_start(control, executed)? {
                return Ok(());
            }
            channel::send(control, &Report::Ended(ending)).ok();
            return Ok(());
        }
    }
}

/// Reads how the command's start went and passes it on; false if it failed.
fn report_start(control: &OwnedFd, executed: BorrowedFd<'_>) -> Result<bool, SetupError> {
    let step = Step::Internal;
    let mut message = Vec::new();
    let most = u64::try_from(MAX_MESSAGE_BYTES).unwrap_or(u64::MAX);
    File::from(executed.try_clone_to_owned().step(step, "duplicate a descriptor")?)
        .take(most)
        .read_to_end(&mut message)
        .step(step, "learn whether the command was executed")?;
    let report = if message.is_empty() {
        Report::Started
    } else {
        serde_json::from_slice(&message)
            .map_err(|error| SetupError::new(step, format!("read a failure: {error}")))?
    };
    channel::send(control, &report).ok();
    Ok(message.is_empty())
}

/// Takes one order; false if everything is to end.
fn obey(control: &OwnedFd, command: Pid) -> bool {
    match channel::receive(control, RecvFlags::DONTWAIT) {
        Ok(Some(Order::Signal(number))) => {
            if let Some(signal) = Signal::from_named_raw(number) {
                // The group may have ended a moment ago.
                rustix::process::kill_process_group(command, signal).ok();
            }
            true
        }
        Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => true,
        Err(error) if error.kind() == std::io::ErrorKind::Interrupted => true,
        Ok(Some(Order::Kill) | None) | Err(_) => false,
    }
}

/// Reaps everything that has ended; the ending of the command if that was among it.
fn reap(children: &OwnedFd, command: Pid) -> Result<Option<Ending>, SetupError> {
    // One arrival stands for any number of children.
    let mut arrivals = [0; 1024];
    rustix::io::read(children.as_fd(), &mut arrivals).ok();
    let mut ending = None;
    loop {
        match wait(WaitOptions::NOHANG) {
            Ok(Some((pid, status))) if pid == command => {
                ending = status
                    .exit_status()
                    .map(Ending::Exited)
                    .or_else(|| status.terminating_signal().map(Ending::Signalled));
            }
            Ok(Some(_)) | Err(rustix::io::Errno::INTR) => {}
            Ok(None) | Err(rustix::io::Errno::CHILD) => return Ok(ending),
            Err(error) => return Err(error).step(Step::Internal, "reap processes"),
        }
    }
}
