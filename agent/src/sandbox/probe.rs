//! What this machine can enforce, found by trying.
//!
//! One empty command is set up exactly as any other would be, verified, and then tries what a
//! command must not be able to do. Whatever fails is what every strict command is refused for, in
//! the same words.

use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::path::PathBuf;

use cortex_proto::v1;
use cortex_shared::policy::Mode;

use super::cgroup::ControlGroups;
use super::launch::{Command, LaunchError, Launcher, Program};
use super::remedy::{Refusal, SELF_TEST};
use super::spec::{Limits, Network};
use super::stage_handle::StageMessage;
use super::syscalls;

/// What this machine can enforce.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Capabilities {
    /// What is missing for strict mode; empty if it can be enforced completely.
    pub missing: Vec<Refusal>,
    /// The kernel's Landlock interface, 0 without one.
    pub landlock_abi: u32,
    /// The kernel filters system calls.
    pub seccomp: bool,
    /// Where limits of a whole command are enforced: "v2", "v1" or "none".
    pub control_groups: &'static str,
    /// This process may create user namespaces.
    pub user_namespaces: bool,
    /// This process is root, so commands run as another user.
    pub root: bool,
}

impl Capabilities {
    /// Whether strict mode can be enforced completely.
    #[must_use]
    pub fn strict_available(&self) -> bool {
        self.missing.is_empty()
    }
}

impl Launcher {
    /// Finds out what this machine can enforce. Takes as long as one command. `hidden` are the
    /// agent's own directories, which must not show. If this kernel accepts what is asked of it
    /// and does not enforce it, every strict command of this launcher is refused from then on. Where
    /// the owner requires a control group for each command, none to be had is something missing.
    pub async fn probe(&self, hidden: &[PathBuf], require_control_group: bool) -> Capabilities {
        let mut missing = self.try_strict(hidden).await.err();
        if require_control_group && self.control_groups() == "none" {
            missing.get_or_insert_with(ControlGroups::required_and_missing);
        }
        if let Some(refusal) = missing.as_ref().filter(|found| found.what == SELF_TEST) {
            self.refuse_from_now_on(refusal.clone());
        }
        let landlock_abi = syscalls::landlock_abi().ok().and_then(|abi| u32::try_from(abi).ok());
        Capabilities {
            user_namespaces: missing
                .as_ref()
                .is_none_or(|refusal| !matches!(refusal.what, "namespaces" | "user namespace")),
            missing: missing.into_iter().collect(),
            landlock_abi: landlock_abi.unwrap_or(0),
            control_groups: self.control_groups(),
            seccomp: rustix::thread::secure_computing_mode().is_ok(),
            root: rustix::process::geteuid().is_root(),
        }
    }

    async fn try_strict(&self, hidden: &[PathBuf]) -> Result<(), Refusal> {
        let failed = |error: &dyn std::fmt::Display| Refusal {
            what: "sandbox stage",
            why: error.to_string(),
            remedy: "check that the agent can start processes and write memory files".to_owned(),
        };
        // For the probe to reach for: an abstract socket, gone with the probe.
        let abstract_socket = format!("cortex-probe-{}", uuid::Uuid::new_v4()).into_bytes();
        let _listener = SocketAddr::from_abstract_name(&abstract_socket)
            .and_then(|address| UnixListener::bind_addr(&address))
            .map_err(|error| failed(&error))?;
        let command = empty_command(abstract_socket, hidden);
        let mut launched = self.launch(command).await.map_err(|error| match error {
            LaunchError::Refused(refusal) => refusal,
            LaunchError::Identity(error) => {
                Refusal { remedy: error.hint().to_owned(), ..failed(&error) }
            }
            error => failed(&error),
        })?;
        let mut outcome = Err(Refusal {
            what: "sandbox stage",
            why: "it ended without a word".to_owned(),
            remedy: "see the kernel's log: it may have been ended for want of memory".to_owned(),
        });
        loop {
            match launched.stage.next_message().await {
                Ok(StageMessage::Started) => outcome = Ok(()),
                Ok(StageMessage::Refused(refusal) | StageMessage::Failed(refusal)) => {
                    outcome = Err(refusal);
                }
                Ok(
                    StageMessage::NotExecuted { .. }
                    | StageMessage::Terminal(_)
                    | StageMessage::Ended(_),
                ) => {}
                Ok(StageMessage::Over(_)) | Err(_) => return outcome,
            }
        }
    }
}

fn empty_command(abstract_socket: Vec<u8>, hidden: &[PathBuf]) -> Command {
    const MEBIBYTE: u64 = 1024 * 1024;
    Command {
        program: Program::Probe { abstract_socket },
        env: Vec::new(),
        workspace: None,
        cwd: Vec::new(),
        mode: Mode::Strict,
        network: Network::None,
        limits: Limits {
            memory_bytes: 64 * MEBIBYTE,
            processes: 8,
            open_files: 64,
            file_bytes: MEBIBYTE,
            temporary_bytes: MEBIBYTE,
        },
        // Whether there is one where it is required is looked at beside.
        stdin: false,
        terminal: None,
        read_only: Vec::new(),
        library: None,
        forbidden: hidden.to_vec(),
        require_control_group: false,
    }
}

impl From<&Capabilities> for v1::SandboxReport {
    fn from(found: &Capabilities) -> Self {
        Self {
            strict_available: found.strict_available(),
            missing: found
                .missing
                .iter()
                .map(|refusal| v1::MissingPiece {
                    what: refusal.what.to_owned(),
                    why: refusal.why.clone(),
                    remedy: refusal.remedy.clone(),
                })
                .collect(),
            landlock_abi: found.landlock_abi,
            cgroup: found.control_groups.to_owned(),
            seccomp: found.seccomp,
            user_namespaces: found.user_namespaces,
            root: found.root,
        }
    }
}
