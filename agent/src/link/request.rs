//! Whether a command may run here, and as what: the door between the protocol and [`crate::exec`].
//!
//! Pure. The hub has computed the mode in force already, for its messages; here it is computed
//! again, for force: a hub that lies stays inside the node's own ceiling.

use std::path::PathBuf;
use std::time::Duration;

use cortex_proto::v1;
use cortex_shared::ids::WorkspaceId;
use cortex_shared::policy::Mode;

use super::mode_of;
use crate::exec::{CommandRequest, Network, WorkspaceView};

/// Largest argument, variable or path.
const MAX_ARGUMENT_BYTES: usize = 64 * 1024;
/// Largest sum of arguments and variables.
const MAX_ARGUMENTS_BYTES: usize = 1024 * 1024;
/// Largest script.
const MAX_SCRIPT_BYTES: usize = 4 * 1024 * 1024;

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
                "an admin runs `cortex-hubd policy set NODE permissive --reason TEXT`; or leave out --mode permissive".to_owned()
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
    check_sizes(&spec)?;
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
        memory_bytes: (spec.memory_bytes > 0).then_some(spec.memory_bytes),
        max_processes: (spec.max_processes > 0).then_some(spec.max_processes),
        stdin: spec.stdin,
        forbidden_paths,
    })
}

fn check_sizes(spec: &v1::TaskSpec) -> Result<(), Refusal> {
    if spec.argv.is_empty() == spec.script.is_empty() {
        return Err(Refusal::Invalid("either a program or a script is needed"));
    }
    if spec.argv.first().is_some_and(|program| program.is_empty()) {
        return Err(Refusal::Invalid("the program has no name"));
    }
    if spec.script.len() > MAX_SCRIPT_BYTES {
        return Err(Refusal::Invalid("the script is larger than 4 MiB"));
    }
    let variables = spec.env.iter().flat_map(|var| [&var.name, &var.value]);
    let mut total = 0;
    for text in spec.argv.iter().chain(variables).chain([&spec.cwd]) {
        if text.len() > MAX_ARGUMENT_BYTES {
            return Err(Refusal::Invalid("an argument or variable is larger than 64 KiB"));
        }
        if text.contains(&0) {
            return Err(Refusal::Invalid("an argument or variable contains a zero byte"));
        }
        total += text.len() + 1;
    }
    if total > MAX_ARGUMENTS_BYTES {
        return Err(Refusal::Invalid("arguments and variables are larger than 1 MiB"));
    }
    if spec.env.iter().any(|var| var.name.is_empty() || var.name.contains(&b'=')) {
        return Err(Refusal::Invalid("a variable's name is empty or contains '='"));
    }
    let leaves = spec.cwd.starts_with(b"/") || spec.cwd.split(|b| *b == b'/').any(|c| c == b"..");
    if leaves {
        return Err(Refusal::Invalid("the working directory is not inside the workspace"));
    }
    Ok(())
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
    fn unusable_requests_are_refused_at_the_door() {
        let big = || Bytes::from(vec![b'x'; MAX_ARGUMENT_BYTES + 1]);
        let var = |name: &'static [u8], value: &'static [u8]| v1::EnvVar {
            name: Bytes::from_static(name),
            value: Bytes::from_static(value),
        };
        let bytes = Bytes::from_static;
        let bad: Vec<(&str, v1::TaskSpec)> = vec![
            ("nothing to run", v1::TaskSpec::default()),
            ("both", v1::TaskSpec { script: bytes(b"ls"), ..spec() }),
            ("no name", v1::TaskSpec { argv: vec![Bytes::new()], ..spec() }),
            ("zero byte", v1::TaskSpec { argv: vec![bytes(b"a\0b")], ..spec() }),
            ("large argument", v1::TaskSpec { argv: vec![bytes(b"a"), big()], ..spec() }),
            ("many arguments", v1::TaskSpec { argv: vec![bytes(b"x"); 600_000], ..spec() }),
            ("variable without name", v1::TaskSpec { env: vec![var(b"", b"v")], ..spec() }),
            ("variable with =", v1::TaskSpec { env: vec![var(b"a=b", b"v")], ..spec() }),
            ("cwd without workspace", v1::TaskSpec { cwd: bytes(b"d"), ..spec() }),
            (
                "cwd that leaves",
                v1::TaskSpec { workspace: "w".into(), cwd: bytes(b"a/../.."), ..spec() },
            ),
            ("absolute cwd", v1::TaskSpec { workspace: "w".into(), cwd: bytes(b"/etc"), ..spec() }),
            ("workspace id", v1::TaskSpec { workspace_id: bytes(b"short"), ..spec() }),
            (
                "large script",
                v1::TaskSpec {
                    argv: vec![],
                    script: vec![b' '; MAX_SCRIPT_BYTES + 1].into(),
                    ..Default::default()
                },
            ),
        ];
        for (what, spec) in bad {
            assert!(matches!(check(spec, OPEN), Err(Refusal::Invalid(_))), "{what}");
        }
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
