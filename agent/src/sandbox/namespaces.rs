//! Namespaces: one clone into all of them, identity maps, and the proof that they are new.

use std::fs::File;
use std::io::Write as _;

use rustix::process::Pid;

use super::spec::{Context as _, Identity, Network, SetupError, Step};

/// The namespaces of a sandbox by their names in `/proc/PID/ns`.
const KINDS: [&str; 7] = ["user", "mnt", "pid", "ipc", "uts", "cgroup", "net"];

/// The flags of the one clone that creates pid 1.
pub(super) fn clone_flags(network: Network) -> u64 {
    let always = libc::CLONE_NEWUSER
        | libc::CLONE_NEWNS
        | libc::CLONE_NEWPID
        | libc::CLONE_NEWIPC
        | libc::CLONE_NEWUTS
        | libc::CLONE_NEWCGROUP;
    let flags = match network {
        Network::None => always | libc::CLONE_NEWNET,
        Network::Full => always,
    };
    u64::from(flags.cast_unsigned())
}

/// Which namespaces a process is in.
pub(super) struct Inodes {
    links: Vec<(&'static str, std::path::PathBuf)>,
}

impl Inodes {
    /// Those of the caller; without the network one where that is shared by intention.
    pub(super) fn of_this_process(network: Network) -> Result<Self, SetupError> {
        let links = KINDS
            .into_iter()
            .filter(|kind| *kind != "net" || network == Network::None)
            .map(|kind| {
                std::fs::read_link(format!("/proc/self/ns/{kind}"))
                    .map(|link| (kind, link))
                    .step(Step::Verification, format_args!("look at the {kind} namespace"))
            })
            .collect::<Result<_, _>>()?;
        Ok(Self { links })
    }

    /// Fails unless the caller is in none of these.
    pub(super) fn verify_left(&self) -> Result<(), SetupError> {
        for (kind, outer) in &self.links {
            let inner = std::fs::read_link(format!("/proc/self/ns/{kind}"))
                .step(Step::Verification, format_args!("look at the {kind} namespace"))?;
            if inner == *outer {
                return Err(SetupError::new(
                    Step::Verification,
                    format!("the {kind} namespace is still that of the host"),
                ));
            }
        }
        Ok(())
    }
}

/// What the kernel counts for a user over all his namespaces, of which a command gets a part: the
/// agent's user needs some for workspaces.
const SHARED: [&str; 2] = ["max_inotify_instances", "max_inotify_watches"];
/// The part that one command gets.
const PART: u64 = 8;

/// Limits in the user namespace of a command on what it would take from others.
pub(super) struct Quotas {
    values: Vec<(&'static str, u64)>,
}

impl Quotas {
    /// To be called outside, where the limits are known.
    pub(super) fn of_this_user() -> Self {
        let values = SHARED.into_iter().filter_map(|name| {
            let text = std::fs::read_to_string(quota_path(name)).ok()?;
            Some((name, (text.trim().parse::<u64>().ok()? / PART).max(1)))
        });
        Self { values: values.collect() }
    }

    /// To be called inside, with all rights there and before `/proc` becomes the command's.
    ///
    /// They keep neighbours from harm and are no wall: where the system lets nobody write them (a
    /// container's `/proc` is often read-only), commands run all the same.
    pub(super) fn apply(&self) {
        for (name, value) in &self.values {
            std::fs::write(quota_path(name), value.to_string()).ok();
        }
    }
}

fn quota_path(name: &str) -> String {
    format!("/proc/sys/user/{name}")
}

/// Maps the one identity of the command into the user namespace of `pid`.
pub(super) fn map_identity(pid: Pid, identity: Identity) -> Result<(), SetupError> {
    if !identity.assumed {
        // An unprivileged process may map its own group only once nobody inside can drop groups.
        write_proc(pid, "setgroups", "deny")?;
    }
    write_proc(pid, "uid_map", &format!("{0} {0} 1\n", identity.uid))?;
    write_proc(pid, "gid_map", &format!("{0} {0} 1\n", identity.gid))
}

fn write_proc(pid: Pid, name: &str, text: &str) -> Result<(), SetupError> {
    let path = format!("/proc/{}/{name}", pid.as_raw_nonzero());
    File::options()
        .write(true)
        .open(&path)
        .and_then(|mut file| file.write_all(text.as_bytes()))
        .step(Step::IdentityMap, format_args!("write {name}"))
}
