//! What a request may contain, and what it gets. Pure: no file is looked at, nothing is started.

use std::path::{Component, Path};
use std::time::Duration;

use cortex_shared::policy::Mode;

use super::request::{Bounds, CommandRequest, RequestedLimits};
use crate::config::LEAST_MEMORY_BYTES;
use crate::sandbox::{Command, HOME_INSIDE, LIBRARY_INSIDE, Limits, Program};

/// Longest argument, and longest name with value of a variable. The kernel's own limit is 128 KiB.
pub const MAX_ARGUMENT_BYTES: usize = 64 * 1024;
/// Most bytes of all arguments and variables together.
pub const MAX_ARGUMENTS_BYTES: usize = 1024 * 1024;
/// Most arguments, and most variables.
const MAX_ARGUMENTS: usize = 16 * 1024;
/// Longest script.
pub const MAX_SCRIPT_BYTES: usize = 4 * 1024 * 1024;
/// Longest time a command may run on this node.
pub const MAX_TIME_LIMIT: Duration = Duration::from_secs(24 * 60 * 60);

/// Enough for a parallel build on a large machine, few enough that a fork bomb stays a nuisance.
const DEFAULT_PROCESSES: u64 = 512;
const MAX_PROCESSES: u64 = 16 * 1024;
const OPEN_FILES: u64 = 4096;
const FILE_BYTES: u64 = 2 * 1024 * 1024 * 1024;
/// Of each of the private temporary directories, which live in memory.
const TEMPORARY_BYTES: u64 = 512 * 1024 * 1024;

const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// What a permissive command keeps of the agent's own environment.
const KEPT: [&str; 7] = ["PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "TZ"];

/// The variable that says where the library of skills is.
const LIBRARY_VARIABLE: &[u8] = b"CORTEX_LIBRARY";

/// Names and values.
type Environment = Vec<(Vec<u8>, Vec<u8>)>;

/// Why a request was refused before anything was tried.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum RequestRefusal {
    #[error("nothing to run: neither a program nor a script is named")]
    Nothing,
    #[error("both a program and a script are named")]
    Both,
    #[error("{what} is too long: {bytes} bytes, at most {most}")]
    TooLong { what: &'static str, bytes: usize, most: usize },
    #[error("{what} contains a zero byte")]
    ZeroByte { what: &'static str },
    #[error("{name:?} is no name of a variable")]
    VariableName { name: String },
    #[error("{cwd:?} is no relative path within the workspace")]
    WorkingDirectory { cwd: String },
    #[error("{kind:?} is no kind of terminal")]
    TerminalKind { kind: String },
    #[error("strict mode never lets a command see {path:?}")]
    ReadOnlyPath { path: std::path::PathBuf },
}

/// A request turned into what the sandbox understands.
pub(super) fn resolve(
    request: CommandRequest,
    machine_memory_bytes: u64,
    agent_env: impl Fn(&str) -> Option<Vec<u8>>,
) -> Result<(Command, Duration), RequestRefusal> {
    let longest = request.bounds.time.map_or(MAX_TIME_LIMIT, |bound| bound.min(MAX_TIME_LIMIT));
    let time_limit = request.time_limit.map_or(longest, |limit| limit.min(longest));
    let limits = limits(request.limits, request.bounds, machine_memory_bytes);
    check_arguments(&request)?;
    let terminal = request.terminal.as_ref();
    let kind = terminal.map(|terminal| check_terminal_kind(&terminal.kind)).transpose()?;
    let mut env = environment(request.mode, kind, &request.env, agent_env)?;
    if let (Some(library), false) =
        (&request.library, env.iter().any(|(name, _)| name == LIBRARY_VARIABLE))
    {
        use std::os::unix::ffi::OsStrExt as _;
        let place = match request.mode {
            Mode::Strict => LIBRARY_INSIDE.into(),
            Mode::Permissive => library.as_os_str().as_bytes().to_vec(),
        };
        env.push((LIBRARY_VARIABLE.to_vec(), place));
    }
    let program = match (request.argv.is_empty(), request.script) {
        (false, None) => Program::Arguments(request.argv),
        (true, Some(script)) => Program::Script(check_script(script)?),
        (true, None) => return Err(RequestRefusal::Nothing),
        (false, Some(_)) => return Err(RequestRefusal::Both),
    };
    let (workspace, cwd) = match request.workspace {
        Some(view) => (Some(view.host_root), check_directory(view.cwd)?),
        None => (None, Vec::new()),
    };
    for path in &request.read_only_paths {
        let plain = path.components().skip(1).all(|part| matches!(part, Component::Normal(_)));
        if !path.is_absolute()
            || !plain
            || path.parent().is_none()
            || request
                .forbidden_paths
                .iter()
                .any(|secret| secret.starts_with(path) || path.starts_with(secret))
        {
            return Err(RequestRefusal::ReadOnlyPath { path: path.clone() });
        }
    }
    let command = Command {
        program,
        env,
        workspace,
        cwd,
        mode: request.mode,
        network: request.network,
        limits,
        stdin: request.stdin,
        terminal: request.terminal.map(|terminal| terminal.size),
        read_only: request.read_only_paths,
        library: request.library,
        forbidden: request.forbidden_paths,
        require_control_group: request.require_control_group,
    };
    Ok((command, time_limit))
}

fn limits(requested: RequestedLimits, bounds: Bounds, machine_memory_bytes: u64) -> Limits {
    // By default a command may use most of the machine, but never so much that nothing is left for
    // the agent and its neighbours.
    let most_memory = (machine_memory_bytes / 8 * 7)
        .min(bounds.memory_bytes.unwrap_or(u64::MAX))
        .max(LEAST_MEMORY_BYTES);
    let most_processes = bounds.processes.map_or(MAX_PROCESSES, u64::from).clamp(1, MAX_PROCESSES);
    Limits {
        memory_bytes: requested
            .memory_bytes
            .map_or(most_memory, |bytes| bytes.clamp(LEAST_MEMORY_BYTES, most_memory)),
        processes: requested
            .processes
            .map_or(DEFAULT_PROCESSES, |count| u64::from(count).max(1))
            .min(most_processes),
        open_files: OPEN_FILES,
        file_bytes: FILE_BYTES,
        temporary_bytes: TEMPORARY_BYTES.min((machine_memory_bytes / 8).max(LEAST_MEMORY_BYTES)),
    }
}

fn check_arguments(request: &CommandRequest) -> Result<(), RequestRefusal> {
    let too_long = |what, bytes, most| RequestRefusal::TooLong { what, bytes, most };
    if request.argv.len() > MAX_ARGUMENTS {
        return Err(too_long("the list of arguments", request.argv.len(), MAX_ARGUMENTS));
    }
    if request.env.len() > MAX_ARGUMENTS {
        return Err(too_long("the list of variables", request.env.len(), MAX_ARGUMENTS));
    }
    let mut total = 0;
    let arguments = request.argv.iter().map(|bytes| ("an argument", bytes.len()));
    let variables =
        request.env.iter().map(|(name, value)| ("a variable", name.len() + value.len()));
    for (what, bytes) in arguments.chain(variables) {
        if bytes > MAX_ARGUMENT_BYTES {
            return Err(too_long(what, bytes, MAX_ARGUMENT_BYTES));
        }
        total += bytes;
    }
    if total > MAX_ARGUMENTS_BYTES {
        return Err(too_long("the command line", total, MAX_ARGUMENTS_BYTES));
    }
    if request.argv.iter().any(|bytes| bytes.contains(&0)) {
        return Err(RequestRefusal::ZeroByte { what: "an argument" });
    }
    if request.argv.first().is_some_and(Vec::is_empty) {
        return Err(RequestRefusal::Nothing);
    }
    Ok(())
}

fn check_script(script: Vec<u8>) -> Result<Vec<u8>, RequestRefusal> {
    if script.len() > MAX_SCRIPT_BYTES {
        return Err(RequestRefusal::TooLong {
            what: "the script",
            bytes: script.len(),
            most: MAX_SCRIPT_BYTES,
        });
    }
    if script.contains(&0) {
        return Err(RequestRefusal::ZeroByte { what: "the script" });
    }
    Ok(script)
}

fn check_directory(cwd: Vec<u8>) -> Result<Vec<u8>, RequestRefusal> {
    use std::os::unix::ffi::OsStrExt as _;
    let path = Path::new(std::ffi::OsStr::from_bytes(&cwd));
    let inside =
        path.components().all(|part| matches!(part, Component::Normal(_) | Component::CurDir));
    if inside && cwd.len() <= 4096 && !cwd.contains(&0) {
        Ok(cwd)
    } else {
        let cwd = String::from_utf8_lossy(&cwd).chars().take(200).collect();
        Err(RequestRefusal::WorkingDirectory { cwd })
    }
}

/// The value of `TERM` names a file to programs.
fn check_terminal_kind(kind: &str) -> Result<&str, RequestRefusal> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'+' | b'-' | b'_' | b'.');
    if (1..=64).contains(&kind.len()) && !kind.starts_with('.') && kind.bytes().all(plain) {
        Ok(kind)
    } else {
        Err(RequestRefusal::TerminalKind { kind: kind.chars().take(64).collect() })
    }
}

/// The whole environment of a command: a base that depends on the mode, then what was asked for.
/// Nothing else of the agent's own environment, which may hold secrets.
fn environment(
    mode: Mode,
    terminal_kind: Option<&str>,
    requested: &[(Vec<u8>, Vec<u8>)],
    agent_env: impl Fn(&str) -> Option<Vec<u8>>,
) -> Result<Environment, RequestRefusal> {
    let mut env: Environment = [
        ("PATH", PATH),
        ("HOME", HOME_INSIDE),
        ("USER", "cortex"),
        ("LOGNAME", "cortex"),
        ("SHELL", "/bin/bash"),
        ("LANG", "C.UTF-8"),
        ("TERM", terminal_kind.unwrap_or("dumb")),
        ("TMPDIR", "/tmp"),
    ]
    .into_iter()
    .map(|(name, value)| (name.into(), value.into()))
    .collect();
    if mode == Mode::Permissive {
        env.retain(|(name, _)| !matches!(name.as_slice(), b"HOME" | b"USER" | b"LOGNAME"));
        for name in KEPT {
            if let Some(value) = agent_env(name) {
                set(&mut env, name.as_bytes(), &value);
            }
        }
    }
    for (name, value) in requested {
        if name.is_empty() || name.contains(&b'=') || name.contains(&0) {
            let name = String::from_utf8_lossy(name).chars().take(200).collect();
            return Err(RequestRefusal::VariableName { name });
        }
        if value.contains(&0) {
            return Err(RequestRefusal::ZeroByte { what: "a variable" });
        }
        set(&mut env, name, value);
    }
    Ok(env)
}

fn set(env: &mut Environment, name: &[u8], value: &[u8]) {
    env.retain(|(known, _)| known != name);
    env.push((name.to_owned(), value.to_owned()));
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::exec::WorkspaceView;

    const MACHINE: u64 = 8 << 30;

    fn resolve_on_a_machine(
        request: CommandRequest,
    ) -> Result<(Command, Duration), RequestRefusal> {
        resolve(request, MACHINE, |name| Some(format!("agent's {name}").into_bytes()))
    }

    fn echo() -> CommandRequest {
        CommandRequest { script: Some(b"echo".to_vec()), ..CommandRequest::default() }
    }

    #[test]
    fn an_unspecific_request_gets_the_strictest_of_everything() {
        let (command, time_limit) = resolve_on_a_machine(echo()).unwrap();
        assert_eq!(command.mode, Mode::Strict);
        assert_eq!(command.network, crate::sandbox::Network::None);
        assert_eq!(time_limit, MAX_TIME_LIMIT);
        assert_eq!(command.limits.processes, DEFAULT_PROCESSES);
        assert_eq!(command.limits.memory_bytes, MACHINE / 8 * 7);
    }

    #[test]
    fn limits_stay_within_what_the_node_has() {
        for (asked, memory_bytes, processes) in [
            ((Some(1), Some(0)), LEAST_MEMORY_BYTES, 1),
            ((Some(64 << 20), Some(50)), 64 << 20, 50),
            ((Some(u64::MAX), Some(u32::MAX)), MACHINE / 8 * 7, MAX_PROCESSES),
        ] {
            let asked = RequestedLimits { memory_bytes: asked.0, processes: asked.1 };
            let given = limits(asked, Bounds::default(), MACHINE);
            assert_eq!((given.memory_bytes, given.processes), (memory_bytes, processes));
        }
        let longest = CommandRequest { time_limit: Some(Duration::MAX), ..echo() };
        assert_eq!(resolve_on_a_machine(longest).unwrap().1, MAX_TIME_LIMIT);
    }

    #[test]
    fn nobody_gets_more_than_the_owner_of_the_node_gives() {
        let minute = Duration::from_secs(60);
        let bounds =
            Bounds { time: Some(minute), memory_bytes: Some(64 << 20), processes: Some(10) };
        for (asked, given) in [
            ((None, None, None), (minute, 64 << 20, 10)),
            ((Some(2 * minute), Some(1 << 30), Some(600)), (minute, 64 << 20, 10)),
            ((Some(minute / 2), Some(32 << 20), Some(3)), (minute / 2, 32 << 20, 3)),
        ] {
            let (time_limit, memory_bytes, processes) = asked;
            let limits = RequestedLimits { memory_bytes, processes };
            let request = CommandRequest { time_limit, limits, bounds, ..echo() };
            let (command, time) = resolve_on_a_machine(request).unwrap();
            let limits = command.limits;
            assert_eq!((time, limits.memory_bytes, limits.processes), given, "{asked:?}");
        }
        // More than the machine has is no bound.
        let bounds = Bounds { memory_bytes: Some(u64::MAX), processes: Some(u32::MAX), ..bounds };
        let given = limits(RequestedLimits::default(), bounds, MACHINE);
        assert_eq!((given.memory_bytes, given.processes), (MACHINE / 8 * 7, DEFAULT_PROCESSES));
    }

    #[test]
    fn a_strict_command_inherits_nothing_of_the_agents_environment() {
        let (command, _) = resolve_on_a_machine(echo()).unwrap();
        for (name, value) in &command.env {
            assert!(!value.starts_with(b"agent's"), "{}", String::from_utf8_lossy(name));
        }
        let permissive = CommandRequest { mode: Mode::Permissive, ..echo() };
        let (command, _) = resolve_on_a_machine(permissive).unwrap();
        let inherited: Vec<_> =
            command.env.iter().filter(|(_, value)| value.starts_with(b"agent's")).collect();
        assert_eq!(inherited.len(), KEPT.len());
    }

    #[test]
    fn a_requested_variable_replaces_the_default_one() {
        let env = vec![(b"HOME".to_vec(), b"/tmp".to_vec())];
        let (command, _) = resolve_on_a_machine(CommandRequest { env, ..echo() }).unwrap();
        let homes: Vec<_> = command.env.iter().filter(|(name, _)| name == b"HOME").collect();
        assert_eq!(homes, [&(b"HOME".to_vec(), b"/tmp".to_vec())]);
    }

    #[test]
    fn kind_of_terminal_is_checked_and_told() {
        let request = |kind: &str| {
            let size = crate::sandbox::TerminalSize { rows: 24, columns: 80 };
            let terminal = crate::exec::TerminalRequest { size, kind: kind.to_owned() };
            CommandRequest { terminal: Some(terminal), ..echo() }
        };
        for (kind, good) in [
            ("xterm-256color", true),
            ("screen.xterm+x", true),
            ("", false),
            ("../../etc/passwd", false),
            (".hidden", false),
            ("a b", false),
            ("x\u{1b}", false),
            (&"x".repeat(65), false),
        ] {
            let found = resolve_on_a_machine(request(kind));
            let term = found.map(|(command, _)| {
                let term = command.env.iter().find(|(name, _)| name == b"TERM").unwrap();
                term.1 == kind.as_bytes() && command.terminal.is_some()
            });
            assert_eq!(term.unwrap_or(false), good, "{kind:?}");
        }
    }

    #[test]
    fn paths_that_leave_the_workspace_are_refused() {
        for (cwd, inside) in [
            ("", true),
            ("a/b", true),
            ("./a", true),
            ("..", false),
            ("a/../b", false),
            ("/", false),
            ("/workspace", false),
            ("a\0b", false),
        ] {
            assert_eq!(check_directory(cwd.into()).is_ok(), inside, "{cwd:?}");
        }
        for path in ["/", "relative", "/opt/../root"] {
            let read_only_paths = vec![path.into()];
            assert!(resolve_on_a_machine(CommandRequest { read_only_paths, ..echo() }).is_err());
        }
    }

    proptest! {
        #[test]
        fn an_accepted_directory_never_climbs(cwd in proptest::collection::vec(any::<u8>(), 0..40)) {
            if let Ok(cwd) = check_directory(cwd) {
                prop_assert!(cwd.first() != Some(&b'/'));
                prop_assert!(!cwd.split(|byte| *byte == b'/').any(|part| part == b".."));
            }
        }

        #[test]
        fn an_accepted_command_line_is_bounded(
            sizes in proptest::collection::vec(0_usize..70_000, 0..24),
        ) {
            let argv: Vec<_> = sizes.iter().map(|size| vec![b'x'; *size]).collect();
            let workspace = Some(WorkspaceView { host_root: "/w".into(), cwd: Vec::new() });
            let request = CommandRequest { argv, workspace, ..CommandRequest::default() };
            if resolve_on_a_machine(request).is_ok() {
                prop_assert!(sizes.iter().all(|size| *size <= MAX_ARGUMENT_BYTES));
                prop_assert!(sizes.iter().sum::<usize>() <= MAX_ARGUMENTS_BYTES);
                prop_assert!(sizes.first().is_some_and(|size| *size > 0));
            }
        }
    }
}
