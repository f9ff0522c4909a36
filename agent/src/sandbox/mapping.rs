//! User namespaces that say how the ids of a workspace appear to a command: `owner` on disk is the
//! command's own user inside.
//!
//! An id-mapped mount takes such a namespace, and making one takes a process. So each is made once,
//! by a short-lived process of the stage's program, and kept by the agent as a descriptor: nobody is
//! in it, and it gives whoever holds it no rights. Lost with the agent, and made again.

use std::collections::HashMap;
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::{Mutex, PoisonError};

use super::spec::{Context as _, Identity, MAPPER_NAME, SetupError, Step};
use super::syscalls;

/// More owners of workspaces than one node has; beyond that, the oldest knowledge goes.
const MAX_KEPT: usize = 64;

/// The namespaces made so far.
#[derive(Debug, Default)]
pub(super) struct Mappings {
    kept: Mutex<HashMap<(u32, u32, Identity), OwnedFd>>,
}

impl Mappings {
    /// A namespace that maps `owner` (user and group) to `identity`. Blocks for the time of a
    /// process, the first time.
    pub(super) fn namespace(
        &self,
        stage: &Path,
        owner: (u32, u32),
        identity: Identity,
    ) -> Result<OwnedFd, SetupError> {
        let key = (owner.0, owner.1, identity);
        // Making one twice does no harm, but waiting for the other is as quick.
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let namespace = match kept.get(&key) {
            Some(namespace) => namespace,
            None => {
                if kept.len() >= MAX_KEPT {
                    kept.clear();
                }
                let made = make(stage, owner, identity)?;
                kept.entry(key).or_insert(made)
            }
        };
        namespace.try_clone().step(Step::MappedWorkspace, "duplicate a descriptor")
    }
}

fn make(stage: &Path, owner: (u32, u32), identity: Identity) -> Result<OwnedFd, SetupError> {
    use std::os::unix::process::CommandExt as _;
    let mut child = Command::new(stage)
        .arg0(MAPPER_NAME)
        .env_clear()
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .step(Step::Namespaces, "start a process for a user namespace")?;
    let namespace = open(&mut child, owner, identity);
    // Its input ends, and so does it.
    drop(child.stdin.take());
    child.wait().step(Step::Namespaces, "wait for the process of a user namespace")?;
    namespace
}

/// Fills in the maps of the child's namespace, and opens it.
fn open(child: &mut Child, owner: (u32, u32), identity: Identity) -> Result<OwnedFd, SetupError> {
    let step = Step::Namespaces;
    let mut answer = [0; 4];
    let stdout = child.stdout.as_mut().ok_or_else(|| SetupError::new(step, "it has no output"))?;
    stdout.read_exact(&mut answer).step(step, "hear of a user namespace")?;
    match i32::from_ne_bytes(answer) {
        0 => {}
        errno => {
            return Err(std::io::Error::from_raw_os_error(errno))
                .step(step, "create a user namespace for the workspace");
        }
    }
    let path = |name: &str| format!("/proc/{}/{name}", child.id());
    for (name, from, to) in [("uid_map", owner.0, identity.uid), ("gid_map", owner.1, identity.gid)]
    {
        File::options()
            .write(true)
            .open(path(name))
            .and_then(|mut file| file.write_all(format!("{from} {to} 1\n").as_bytes()))
            .step(Step::IdentityMap, format_args!("write {name} for the workspace"))?;
    }
    File::open(path("ns/user")).map(OwnedFd::from).step(step, "open a user namespace")
}

/// The process that is in a new namespace until the agent has opened it.
pub(super) fn main() -> ExitCode {
    let made = syscalls::unshare(libc::CLONE_NEWUSER);
    let errno = made.err().map_or(0, |error| error.raw_os_error().unwrap_or(libc::EINVAL));
    if std::io::stdout().write_all(&errno.to_ne_bytes()).is_err()
        || std::io::stdout().flush().is_err()
    {
        return ExitCode::FAILURE;
    }
    // The agent never writes: this ends with the pipe.
    std::io::stdin().read_exact(&mut [0]).ok();
    ExitCode::SUCCESS
}
