//! What this machine can enforce, found by trying.
//!
//! One empty command is set up exactly as any other would be, verified and left. Whatever fails is
//! what every strict command would be refused for, in the same words.

use cortex_proto::v1;
use cortex_shared::policy::Mode;

use super::launch::{Command, LaunchError, Launcher, Program, StageMessage};
use super::remedy::Refusal;
use super::spec::{Limits, Network};
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
    /// Finds out what this machine can enforce. Takes as long as one command.
    pub async fn probe(&self) -> Capabilities {
        let missing = self.try_strict().await.err();
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

    async fn try_strict(&self) -> Result<(), Refusal> {
        let mut launched = self.launch(empty_command()).await.map_err(|error| Refusal {
            what: "sandbox stage",
            why: error.to_string(),
            remedy: match &error {
                LaunchError::Identity(error) => error.hint().to_owned(),
                _ => "check that the agent can start processes and write memory files".to_owned(),
            },
        })?;
        let mut outcome = Err(Refusal {
            what: "sandbox stage",
            why: "it ended without a word".to_owned(),
            remedy: "see the kernel's log: it may have been ended for want of memory".to_owned(),
        });
        loop {
            match launched.stage.next_message().await {
                Ok(StageMessage::Started) => outcome = Ok(()),
                Ok(StageMessage::Refused(refusal)) => outcome = Err(refusal),
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

fn empty_command() -> Command {
    const MEBIBYTE: u64 = 1024 * 1024;
    Command {
        program: Program::Probe,
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
        limits_asked_for: true,
        stdin: false,
        terminal: None,
        read_only: Vec::new(),
        forbidden: Vec::new(),
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
