//! `shell`: an interactive shell on one node.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt as _;
use std::time::Duration;

use bytes::Bytes;
use clap::Args;
use cortex_proto::{DEFAULT_OUTPUT_CREDIT, v1};
use cortex_shared::policy::Mode;

use super::{Net, keyboard, one, parse_time_limit};
use crate::cli::error::CliError;
use crate::cli::printer::Format;
use crate::cli::units::millis;
use crate::cli::{Global, Output};
use crate::link::proto_mode;

/// Open an interactive shell on a node
#[derive(Debug, Args)]
#[command(after_help = "\
A login shell (bash) with a terminal, in the strict sandbox as every command: see
`cortex-agent exec --help`. Ends with the shell's exit code.

Escapes, at the beginning of a line: ~. leaves and hangs up on the shell, ~^Z suspends this program,
~? shows this help, ~~ types a ~.

Examples:
  cortex-agent shell build-1
  cortex-agent shell build-1 --workspace app")]
pub(crate) struct ShellArgs {
    /// Name of the node, or a unique prefix of its id
    node: String,
    /// The workspace whose files the shell sees, at /workspace
    #[arg(long, value_name = "W")]
    workspace: Option<String>,
    /// Directory to start in, relative to the workspace
    #[arg(long, value_name = "DIR", requires = "workspace")]
    cwd: Option<OsString>,
    /// strict is the sandbox; permissive needs the hub's policy and the node owner's ceiling
    #[arg(long, value_name = "strict|permissive", default_value_t)]
    mode: Mode,
    /// Network the shell sees
    #[arg(long, value_enum, default_value_t)]
    net: Net,
    /// Time the shell may stay open, such as 90s or 1h; 24h at most, and where nothing is said. The
    /// node's owner may allow less
    #[arg(long, value_name = "DURATION", value_parser = parse_time_limit)]
    time_limit: Option<Duration>,
}

/// Runs the shell; the result is the exit code of this process.
pub(crate) async fn shell(global: &Global, args: ShellArgs) -> Result<u8, CliError> {
    if !keyboard::is_there() {
        return Err(CliError::usage("a shell needs a terminal, and standard input is none")
            .hint("cortex-agent exec NODE -f - runs a script from standard input"));
    }
    let spec = v1::TaskSpec {
        argv: vec![Bytes::from_static(b"bash"), Bytes::from_static(b"-l")],
        workspace: args.workspace.unwrap_or_default(),
        cwd: args.cwd.map(|cwd| cwd.into_vec().into()).unwrap_or_default(),
        mode: proto_mode(args.mode).into(),
        network: v1::Network::from(args.net).into(),
        time_limit_ms: args.time_limit.map_or(0, millis),
        stdin: true,
        terminal: Some(keyboard::size_and_kind()),
        ..Default::default()
    };
    let start = v1::ExecStart {
        node: args.node,
        spec: Some(spec),
        initial_credit: DEFAULT_OUTPUT_CREDIT,
        ..Default::default()
    };
    let output = Output { format: Format::Table };
    one::exec(global, one::Attached { start, stdin: true, output }).await
}
