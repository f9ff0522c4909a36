//! Whether a command may run here, and as what: the door between the protocol and [`crate::exec`].
//!
//! Pure. The hub has computed the mode in force already, for its messages; here it is computed
//! again, for force: a hub that lies stays inside the node's own ceiling. Sizes and contents of
//! arguments and variables are [`crate::exec`]'s to check, which refuses in the same way.

use std::path::PathBuf;
use std::time::Duration;

use cortex_proto::v1;
use cortex_shared::ids::WorkspaceId;
use cortex_shared::policy::Mode;

use super::mode_of;
use crate::exec::{CommandRequest, RequestedLimits, WorkspaceView};
use crate::sandbox::Network;

/// Who else has a say in the mode.
#[derive(Clone, Copy, Debug)]
pub(super) struct Authority {
    /// The hub's policy for this node.
    pub(super) policy: Mode,
    /// The node owner's own bound.
    pub(super) ceiling: Mode,
}

/// Why a command does not run. It has not run.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum Refusal {
    #[error("permissive mode needs the hub's policy for this node, which is strict")]
    PolicyIsStrict,
    #[error("permissive mode needs the ceiling of this node's owner, which is strict")]
    CeilingIsStrict,
    #[error(
        "permissive mode needs the hub's policy for this node and the ceiling of its owner; both are strict"
    )]
    BothAreStrict,
    #[error("this node is not a member of workspace {name:?}")]
    NoSuchWorkspace { name: String },
    #[error("the workspace's files are not usable here: {reason}")]
    WorkspaceUnusable { reason: String },
    #[error("this agent does not offer terminals")]
    NoTerminals,
    #[error("the request is not valid: {0}")]
    Invalid(&'static str),
}

impl Refusal {
    /// The command that helps.
    pub(super) fn hint(&self) -> String {
        match self {
            Self::PolicyIsStrict | Self::BothAreStrict => {
                "leave out --mode permissive".to_owned()
            }
            Self::CeilingIsStrict => {
                "the node's owner runs `cortex-agent ceiling set permissive` on it; or leave out --mode permissive".to_owned()
            }
            Self::NoSuchWorkspace { name } => {
                format!("cortex-agent workspace attach {name} --node NODE")
            }
            Self::WorkspaceUnusable { .. } => {
                "`cortex-agent workspace status` on the node says more".to_owned()
            }
            Self::NoTerminals => "leave out -t".to_owned(),
            Self::Invalid(_) => String::new(),
        }
    }
}

/// The mode in force, or which half of the permission is missing. Asking for permissive and getting
/// strict would be a surprise either way, so it is refused rather than lowered.
fn mode_in_force(requested: Mode, authority: Authority) -> Result<Mode, Refusal> {
    match (requested, authority.policy, authority.ceiling) {
        (Mode::Strict, _, _) => Ok(Mode::Strict),
        (Mode::Permissive, Mode::Permissive, Mode::Permissive) => Ok(Mode::Permissive),
        (Mode::Permissive, Mode::Strict, Mode::Permissive) => Err(Refusal::PolicyIsStrict),
        (Mode::Permissive, Mode::Permissive, Mode::Strict) => Err(Refusal::CeilingIsStrict),
        (Mode::Permissive, Mode::Strict, Mode::Strict) => Err(Refusal::BothAreStrict),
    }
}

/// Checks a request and makes it a command. `find_workspace` gives the root of a workspace this
/// node is a member of.
pub(super) fn command(
    spec: v1::TaskSpec,
    authority: Authority,
    find_workspace: impl FnOnce(Option<WorkspaceId>, &str) -> Result<PathBuf, Refusal>,
    forbidden_paths: Vec<PathBuf>,
) -> Result<CommandRequest, Refusal> {
    let mode = mode_in_force(mode_of(spec.mode), authority)?;
    if spec.terminal.is_some() {
        return Err(Refusal::NoTerminals);
    }
    let workspace = if spec.workspace.is_empty() && spec.workspace_id.is_empty() {
        if !spec.cwd.is_empty() {
            return Err(Refusal::Invalid("a working directory needs a workspace"));
        }
        None
    } else {
        let id = match spec.workspace_id.as_ref() {
            [] => None,
            id => Some(WorkspaceId::from_slice(id).map_err(|_| Refusal::Invalid("workspace id"))?),
        };
        let host_root = find_workspace(id, &spec.workspace)?;
        Some(WorkspaceView { host_root, cwd: spec.cwd.to_vec() })
    };
    let network = match v1::Network::try_from(spec.network) {
        Ok(v1::Network::Full) => Network::Full,
        Ok(v1::Network::None) | Err(_) => Network::None,
    };
    Ok(CommandRequest {
        argv: spec.argv.iter().map(|argument| argument.to_vec()).collect(),
        script: (!spec.script.is_empty()).then(|| spec.script.to_vec()),
        workspace,
        env: spec.env.iter().map(|var| (var.name.to_vec(), var.value.to_vec())).collect(),
        mode,
        network,
        time_limit: (spec.time_limit_ms > 0).then(|| Duration::from_millis(spec.time_limit_ms)),
        limits: RequestedLimits {
            memory_bytes: (spec.memory_bytes > 0).then_some(spec.memory_bytes),
            processes: (spec.max_processes > 0).then_some(spec.max_processes),
        },
        stdin: spec.stdin,
        forbidden_paths,
        read_only_paths: Vec::new(),
    })
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    const OPEN: Authority = Authority { policy: Mode::Permissive, ceiling: Mode::Permissive };

    fn spec() -> v1::TaskSpec {
        v1::TaskSpec { argv: vec![Bytes::from_static(b"true")], ..Default::default() }
    }

    fn nowhere(_: Option<WorkspaceId>, name: &str) -> Result<PathBuf, Refusal> {
        Err(Refusal::NoSuchWorkspace { name: name.to_owned() })
    }

    fn check(spec: v1::TaskSpec, authority: Authority) -> Result<CommandRequest, Refusal> {
        command(spec, authority, nowhere, Vec::new())
    }

    #[test]
    fn permissive_needs_both_halves_and_names_the_missing_one() {
        use Mode::{Permissive, Strict};
        for (policy, ceiling, expected) in [
            (Strict, Strict, Err(Refusal::BothAreStrict)),
            (Strict, Permissive, Err(Refusal::PolicyIsStrict)),
            (Permissive, Strict, Err(Refusal::CeilingIsStrict)),
            (Permissive, Permissive, Ok(Permissive)),
        ] {
            let authority = Authority { policy, ceiling };
            let wish = v1::TaskSpec { mode: v1::Mode::Permissive.into(), ..spec() };
            assert_eq!(check(wish, authority).map(|c| c.mode), expected);
            // Whoever does not ask gets the sandbox, whatever would be allowed.
            assert_eq!(check(spec(), authority).map(|c| c.mode), Ok(Strict));
            // A mode this agent does not know is not more than strict.
            let unknown = v1::TaskSpec { mode: 77, ..spec() };
            assert_eq!(check(unknown, authority).map(|c| c.mode), Ok(Strict));
        }
    }

    #[test]
    fn terminals_bad_ids_and_directories_without_a_workspace_are_refused() {
        let terminal = v1::TaskSpec { terminal: Some(v1::TerminalSize::default()), ..spec() };
        assert_eq!(check(terminal, OPEN).map(|_| ()), Err(Refusal::NoTerminals));
        let bad_id = v1::TaskSpec { workspace_id: Bytes::from_static(b"short"), ..spec() };
        assert!(matches!(check(bad_id, OPEN), Err(Refusal::Invalid(_))));
        let cwd = v1::TaskSpec { cwd: Bytes::from_static(b"d"), ..spec() };
        assert!(matches!(check(cwd, OPEN), Err(Refusal::Invalid(_))));
    }

    #[test]
    fn unknown_network_is_none() {
        let unknown = v1::TaskSpec { network: 9, ..spec() };
        assert_eq!(check(unknown, OPEN).map(|c| c.network), Ok(Network::None));
        let full = v1::TaskSpec { network: v1::Network::Full.into(), ..spec() };
        assert_eq!(check(full, OPEN).map(|c| c.network), Ok(Network::Full));
    }

    #[test]
    fn workspace_must_be_one_of_ours() {
        let wish = v1::TaskSpec { workspace: "w".into(), cwd: Bytes::from_static(b"a"), ..spec() };
        assert_eq!(
            check(wish.clone(), OPEN).map(|_| ()),
            Err(Refusal::NoSuchWorkspace { name: "w".into() })
        );
        let found = |_: Option<WorkspaceId>, _: &str| Ok(PathBuf::from("/srv/w"));
        let view = command(wish, OPEN, found, Vec::new()).unwrap().workspace.unwrap();
        assert_eq!((view.host_root, view.cwd), (PathBuf::from("/srv/w"), b"a".to_vec()));
    }
}
