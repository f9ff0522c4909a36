//! From arguments to the request.

use std::ffi::OsString;
use std::io::Read as _;
use std::os::unix::ffi::OsStringExt as _;
use std::path::PathBuf;

use cortex_proto::{DEFAULT_OUTPUT_CREDIT, v1};

use super::{ExecArgs, keyboard};
use crate::cli::error::{CliError, Exit};
use crate::cli::units::millis;
use crate::link::proto_mode;

/// How the keys begin by which the start of a command is repeated that nobody answered, so that it is not
/// begun twice. Those that somebody chose are shown, these are not.
pub(in crate::cli) const OWN_KEY: &str = "auto-";

/// Largest script that is sent.
const MAX_SCRIPT_BYTES: u64 = 4 * 1024 * 1024;

/// The request that the arguments mean, for a node that is still to be named.
pub(super) fn start(args: &ExecArgs) -> Result<v1::ExecStart, CliError> {
    let bytes = |text: &OsString| bytes::Bytes::from(text.clone().into_vec());
    let script = match (&args.script, &args.file) {
        (Some(line), _) => bytes(line),
        (None, Some(path)) => read_script(path, args.stdin)?,
        (None, None) => bytes::Bytes::new(),
    };
    if script.is_empty() && args.command.is_empty() {
        return Err(CliError::usage("nothing to run")
            .hint("cortex-agent exec NODE -- CMD [ARG…], or -s 'LINE'"));
    }
    let env = variables(&args.env)?;
    let spec = v1::TaskSpec {
        argv: args.command.iter().map(bytes).collect(),
        script,
        workspace: args.workspace.clone().unwrap_or_default(),
        cwd: args.cwd.as_ref().map(bytes).unwrap_or_default(),
        env,
        mode: proto_mode(args.mode).into(),
        network: v1::Network::from(args.net).into(),
        time_limit_ms: args.time_limit.map_or(0, millis),
        memory_bytes: args.memory.unwrap_or(0),
        max_processes: args.pids.unwrap_or(0),
        stdin: args.stdin,
        on_disconnect: v1::OnDisconnect::from(args.on_disconnect).into(),
        terminal: args.terminal.then(keyboard::size_and_kind),
        ..Default::default()
    };
    Ok(v1::ExecStart {
        spec: Some(spec),
        initial_credit: DEFAULT_OUTPUT_CREDIT,
        idempotency_key: args.idempotency_key.clone().unwrap_or_default(),
        detach: args.detach,
        ..Default::default()
    })
}

/// The variables that `--env NAME=VALUE` gives.
pub(in crate::cli) fn variables(given: &[OsString]) -> Result<Vec<v1::EnvVar>, CliError> {
    let variable = |text: &OsString| {
        let text = text.clone().into_vec();
        let split = text.iter().position(|b| *b == b'=').filter(|at| *at > 0);
        let split = split.ok_or_else(|| CliError::usage("--env: expected NAME=VALUE"))?;
        Ok(v1::EnvVar {
            name: text[..split].to_vec().into(),
            value: text[split + 1..].to_vec().into(),
        })
    };
    given.iter().map(variable).collect()
}

fn read_script(path: &PathBuf, stdin_is_taken: bool) -> Result<bytes::Bytes, CliError> {
    let mut script = Vec::new();
    let read = if path.as_os_str() == "-" {
        if stdin_is_taken {
            return Err(CliError::usage("-f - and -i both read standard input"));
        }
        std::io::stdin().lock().take(MAX_SCRIPT_BYTES + 1).read_to_end(&mut script)
    } else {
        std::fs::File::open(path)
            .and_then(|file| file.take(MAX_SCRIPT_BYTES + 1).read_to_end(&mut script))
    };
    read.map_err(|error| {
        CliError::new(Exit::Usage, format!("cannot read {}", path.display())).because(error)
    })?;
    if u64::try_from(script.len()).is_ok_and(|length| length > MAX_SCRIPT_BYTES) {
        return Err(CliError::usage("the script is larger than 4 MiB"));
    }
    Ok(script.into())
}
