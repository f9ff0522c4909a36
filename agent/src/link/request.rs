//! Whether a command may run here, and as what: the door between the protocol and [`crate::exec`].
//!
//! Pure. How much it may do is [`super::authority`]'s to say; sizes and contents of arguments and
//! variables are [`crate::exec`]'s to check, which refuses in the same way.

use std::path::PathBuf;
use std::time::Duration;

use cortex_proto::v1;
use cortex_shared::ids::WorkspaceId;

use super::authority::{Authority, Missing, Wanted, permit, wanted};
use super::{mode_of, network_of};
use crate::exec::{Bounds, CommandRequest, RequestedLimits, TerminalRequest, WorkspaceView};
use crate::sandbox::TerminalSize;
use crate::sandbox::exposed::ExposeRefusal;

/// Why a command does not run. It has not run.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum Refusal {
    #[error("{wanted} is refused; missing: {}", list(missing))]
    NotPermitted { wanted: Wanted, missing: Vec<Missing> },
    #[error("a permissive command has to be written down on the node first, and that failed")]
    NotRecorded,
    #[error("this node is not a member of workspace {name:?}")]
    NoSuchWorkspace { name: String },
    #[error("the workspace's files are not usable here: {reason}")]
    WorkspaceUnusable { reason: String },
    #[error("what the node's owner shows to commands cannot be shown: {0}")]
    NotShown(#[from] ExposeRefusal),
    #[error("the request is not valid: {0}")]
    Invalid(&'static str),
}

impl Refusal {
    /// The command that helps.
    pub(super) fn hint(&self) -> String {
        match self {
            Self::NotPermitted { wanted, missing } => {
                let hints: Vec<&str> = missing.iter().map(Missing::hint).collect();
                format!("{}; or leave out {}", hints.join("; "), wanted.option())
            }
            Self::NotRecorded => "`cortex-agent doctor` on the node looks at its disk".to_owned(),
            Self::NoSuchWorkspace { name } => {
                format!("cortex-agent workspace attach {name} --node NODE")
            }
            Self::WorkspaceUnusable { .. } => {
                "`cortex-agent workspace status --local` on the node says more".to_owned()
            }
            Self::NotShown(refusal) => refusal.hint().to_owned(),
            Self::Invalid(_) => String::new(),
        }
    }
}

fn list(missing: &[Missing]) -> String {
    missing.iter().map(Missing::to_string).collect::<Vec<_>>().join(" and ")
}

/// Checks a request and makes it a command. `find_workspace` gives the root of a workspace this
/// node is a member of.
pub(super) fn command(
    spec: v1::TaskSpec,
    authority: Authority,
    find_workspace: impl FnOnce(Option<WorkspaceId>, &str) -> Result<PathBuf, Refusal>,
    forbidden_paths: Vec<PathBuf>,
) -> Result<CommandRequest, Refusal> {
    let (mode, network) = (mode_of(spec.mode), network_of(spec.network));
    if let Some(wanted) = wanted(mode, network) {
        permit(wanted, authority).map_err(|missing| Refusal::NotPermitted { wanted, missing })?;
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
        terminal: spec.terminal.map(|terminal| TerminalRequest {
            size: terminal_size(&terminal),
            kind: terminal.term,
        }),
        forbidden_paths,
        bounds: Bounds::default(),
        read_only_paths: Vec::new(),
        library: None,
        require_control_group: false,
    })
}

/// A size as a terminal can have it. Nothing, which some callers send for "unknown", becomes what
/// programs assume then; more than there can be is cut.
pub(super) fn terminal_size(size: &v1::TerminalSize) -> TerminalSize {
    let fit = |wanted: u32, unknown: u16| match wanted {
        0 => unknown,
        wanted => u16::try_from(wanted).unwrap_or(u16::MAX),
    };
    TerminalSize { rows: fit(size.rows, 24), columns: fit(size.columns, 80) }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use cortex_shared::policy::{Bound, Mode, Network, Role};

    use super::*;
    use crate::link::authority::{Clocks, HubPolicy};

    fn open() -> Authority {
        let now = Clocks { hub_ms: 0, steady: std::time::Instant::now() };
        let all = Bound { mode: Mode::Permissive, network: Network::Full };
        let policy = HubPolicy::told(all, 60_000, now);
        Authority { role: Some(Role::Admin), policy, ceiling: all, now }
    }

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
    fn nobody_gets_more_than_was_asked_for() {
        let permissive = v1::TaskSpec { mode: v1::Mode::Permissive.into(), ..spec() };
        assert_eq!(check(permissive.clone(), open()).map(|c| c.mode), Ok(Mode::Permissive));
        assert_eq!(check(spec(), open()).map(|c| c.mode), Ok(Mode::Strict));
        // A mode this agent does not know is not more than strict.
        let unknown = v1::TaskSpec { mode: 77, ..spec() };
        assert_eq!(check(unknown, open()).map(|c| c.mode), Ok(Mode::Strict));

        let bounded = Authority { ceiling: Bound::LEAST, role: None, ..open() };
        let refusal = check(permissive, bounded).unwrap_err();
        let text = refusal.to_string();
        assert!(
            text.contains("ceiling") && text.contains("role") && !text.contains("policy"),
            "{text}"
        );
        assert!(refusal.hint().contains("cortex-agent ceiling set permissive"));
        assert!(refusal.hint().is_ascii());
    }

    #[test]
    fn bad_ids_and_directories_without_a_workspace_are_refused() {
        let bad_id = v1::TaskSpec { workspace_id: Bytes::from_static(b"short"), ..spec() };
        assert!(matches!(check(bad_id, open()), Err(Refusal::Invalid(_))));
        let cwd = v1::TaskSpec { cwd: Bytes::from_static(b"d"), ..spec() };
        assert!(matches!(check(cwd, open()), Err(Refusal::Invalid(_))));
    }

    #[test]
    fn a_terminal_has_a_size_that_a_terminal_can_have() {
        for ((rows, columns), size) in
            [((50, 132), (50, 132)), ((0, 0), (24, 80)), ((u32::MAX, 1), (u16::MAX, 1))]
        {
            let wanted = v1::TerminalSize { rows, columns, term: "xterm".into() };
            let found = check(v1::TaskSpec { terminal: Some(wanted), ..spec() }, open()).unwrap();
            let found = found.terminal.unwrap();
            assert_eq!((found.size.rows, found.size.columns), size);
            assert_eq!(found.kind, "xterm");
        }
    }

    #[test]
    fn the_network_is_for_those_whom_everybody_lets_have_it_and_an_unknown_one_is_none() {
        let unknown = v1::TaskSpec { network: 9, ..spec() };
        assert_eq!(check(unknown, open()).map(|c| c.network), Ok(Network::None));
        let full = v1::TaskSpec { network: v1::Network::Full.into(), ..spec() };
        assert_eq!(check(full.clone(), open()).map(|c| c.network), Ok(Network::Full));
        let bounded = Authority { ceiling: Bound::LEAST, policy: HubPolicy::UNTOLD, ..open() };
        let refusal = check(full.clone(), bounded).unwrap_err();
        assert!(refusal.to_string().starts_with("the host's network is refused"), "{refusal}");
        for half in ["policy set NODE strict --net full", "ceiling set strict --net full"] {
            assert!(refusal.hint().contains(half), "{}", refusal.hint());
        }
        // Whoever may do everything needs no permission for the network besides.
        let policy =
            HubPolicy::told(Bound { network: Network::None, ..open().ceiling }, 60_000, open().now);
        let permissive = v1::TaskSpec { mode: v1::Mode::Permissive.into(), ..full };
        assert!(check(permissive, Authority { policy, ..open() }).is_ok());
    }

    #[test]
    fn workspace_must_be_one_of_ours() {
        let wish = v1::TaskSpec { workspace: "w".into(), cwd: Bytes::from_static(b"a"), ..spec() };
        assert_eq!(
            check(wish.clone(), open()).map(|_| ()),
            Err(Refusal::NoSuchWorkspace { name: "w".into() })
        );
        let found = |_: Option<WorkspaceId>, _: &str| Ok(PathBuf::from("/srv/w"));
        let view = command(wish, open(), found, Vec::new()).unwrap().workspace.unwrap();
        assert_eq!((view.host_root, view.cwd), (PathBuf::from("/srv/w"), b"a".to_vec()));
    }
}
