//! Resource limits of the command's process, inherited by everything it starts.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use super::spec::{Context as _, Limits, SetupError, Step};

/// Most signals that wait for a process: they are counted for the user, who may be the agent's.
const SIGNALS: u64 = 4096;
/// Most locked memory of a process.
const LOCKED_BYTES: u64 = 8 * 1024 * 1024;

/// Sets all limits, hard and soft alike, so that the command cannot raise them. A limit that the
/// agent itself runs under is never exceeded.
///
/// Processes are counted only where the command has a user namespace of its own. Without one the
/// count is over everything the user runs on this machine, and a limit would stop the command
/// because of somebody else's processes.
pub(super) fn apply(limits: &Limits, count_processes: bool) -> Result<(), SetupError> {
    let processes = if count_processes { limits.processes } else { u64::MAX };
    for (name, resource, wanted) in [
        // Counted over the sandbox's user namespace, since Linux 5.14.
        ("processes", Resource::Nproc, processes),
        ("open files", Resource::Nofile, limits.open_files),
        ("file size", Resource::Fsize, limits.file_bytes),
        // Data rather than address space: Go, Java and many others reserve far more addresses
        // than they use.
        ("memory", Resource::Data, limits.memory_bytes),
        // Not 0: a core_pattern that is a pipe would still start its program, on the host and as
        // root. The kernel takes 1 as the word not to.
        ("core size", Resource::Core, 1),
        ("locked memory", Resource::Memlock, LOCKED_BYTES),
        ("waiting signals", Resource::Sigpending, SIGNALS),
        ("message queues", Resource::Msgqueue, 0),
        ("real-time priority", Resource::Rtprio, 0),
    ] {
        let own = getrlimit(resource).maximum;
        let wanted = match (resource, own) {
            // Descriptors on their way through sockets are counted for the user, and refused to
            // whoever has the lower limit: that must be the command.
            (Resource::Nofile, Some(own)) => wanted.min(own / 2),
            _ => wanted,
        };
        // Even where the agent has none at all: only root may raise it, and to the kernel it is no more.
        if resource == Resource::Core
            && setrlimit(resource, Rlimit { current: Some(1), maximum: Some(1) }).is_ok()
        {
            continue;
        }
        let hard = own.map_or(wanted, |own| own.min(wanted));
        setrlimit(resource, Rlimit { current: Some(hard), maximum: Some(hard) })
            .step(Step::Limits, format_args!("limit {name} to {hard}"))?;
    }
    Ok(())
}
