//! `exec`: one command on one node, its output here.
//!
//! `check` is the pure part: completeness and exit codes. `writer` puts the output where it belongs
//! on a thread that may block; `session` talks to the hub and never blocks.

mod check;
mod session;
mod writer;

use std::ffi::OsString;
use std::io::Read as _;
use std::os::unix::ffi::OsStringExt as _;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};
use cortex_proto::{DEFAULT_OUTPUT_CREDIT, v1};
use cortex_shared::policy::Mode;
use serde::Serialize;

use super::error::{CliError, Exit};
use super::printer::{Format, complain};
use super::units::{millis, parse_duration, parse_size};
use super::{Global, Output, hub};
use crate::link::proto_mode;
use session::{Ended, Outcome};

/// Largest script that is sent.
const MAX_SCRIPT_BYTES: u64 = 4 * 1024 * 1024;

/// Run a command on a node
#[derive(Debug, Args)]
#[command(after_help = "\
The command runs in the strict sandbox: it sees read-only system directories, a private /tmp, no
network and, with --workspace, the files of that workspace. Its output arrives here as it is
written, stdout on stdout and stderr on stderr.

Exit code: the command's own; 124 time limit, 125 failure of the mesh (node or hub not reachable,
session lost, output incomplete), 126 refused by policy, 127 command not found, 128+n ended by
signal n, 130 interrupted here. Ctrl-C ends the command (TERM, then KILL after 2 s) and waits for
its end; a second one leaves at once.

Examples:
  cortex-agent exec build-1 -- make -j8
  cortex-agent exec build-1 --workspace app -s 'cargo test 2>&1 | tail'
  tar c src | cortex-agent exec build-1 -i --workspace app -- tar x")]
pub(crate) struct ExecArgs {
    /// Name of the node, or a unique prefix of its id
    node: String,
    /// A line for bash, instead of a command
    #[arg(short = 's', long = "shell", value_name = "LINE", group = "what")]
    script: Option<OsString>,
    /// A file with a bash script, or - for standard input, instead of a command
    #[arg(short = 'f', long = "file", value_name = "SCRIPT", group = "what")]
    file: Option<PathBuf>,
    /// The command and its arguments, after --
    #[arg(last = true, value_name = "CMD", group = "what")]
    command: Vec<OsString>,
    /// Send standard input to the command; otherwise it reads end of file
    #[arg(short = 'i', long = "stdin")]
    stdin: bool,
    /// The workspace whose files the command sees, at /workspace
    #[arg(long, value_name = "W")]
    workspace: Option<String>,
    /// Directory to start in, relative to the workspace
    #[arg(long, value_name = "DIR", requires = "workspace")]
    cwd: Option<OsString>,
    /// A variable for the command; may be repeated. Nothing of this environment is sent otherwise
    #[arg(long = "env", value_name = "NAME=VALUE")]
    env: Vec<OsString>,
    /// strict is the sandbox; permissive needs the hub's policy and the node owner's ceiling
    #[arg(long, value_name = "strict|permissive", default_value_t)]
    mode: Mode,
    /// Network the command sees
    #[arg(long, value_enum, default_value_t)]
    net: Net,
    /// Memory the command may use, such as 512M
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    memory: Option<u64>,
    /// Processes the command may have
    #[arg(long, value_name = "N")]
    pids: Option<u32>,
    /// Time the command may take, such as 90s or 1h
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    time_limit: Option<Duration>,
    #[command(flatten)]
    output: Output,
}

#[derive(Clone, Copy, Debug, Default, ValueEnum)]
enum Net {
    /// Its own loopback only
    #[default]
    None,
    /// The node's network
    Full,
}

#[derive(Serialize)]
struct Document {
    task_id: String,
    node: String,
    node_id: String,
    verdict: &'static str,
    /// What this process ends with.
    code: u8,
    exit_code: u32,
    signal: u32,
    complete: bool,
    truncated: bool,
    duration_ms: u64,
    reason: String,
    hint: String,
    stdout: String,
    stderr: String,
}

/// Runs the command; the result is the exit code of this process.
pub(crate) async fn exec(global: &Global, args: ExecArgs) -> Result<u8, CliError> {
    let format = args.output.format;
    let stdin = args.stdin;
    let start = start(&args)?;
    let sink = match format {
        Format::Table => writer::Sink::pass()?,
        Format::Json | Format::Jsonl => writer::Sink::capture(),
    };
    // From here on everything that fails is a failure of the mesh, told from the command's own.
    let outcome = async {
        let client = hub::operator(global).await?;
        session::run(client, start, stdin, sink).await
    }
    .await
    .map_err(|error: CliError| match error.exit() {
        Exit::Code(_) | Exit::ReaderGone => error,
        Exit::Forbidden => error.with_exit(Exit::Code(126)),
        _ => error.with_exit(Exit::Code(125)),
    })?;
    let code = outcome.code();
    if format != Format::Table {
        global.printer(args.output).show(&document(&outcome, code), &[])?;
    }
    if let Some(text) = outcome.complaint() {
        complain(&text, global.color);
    }
    Ok(code)
}

fn document(outcome: &Outcome, code: u8) -> Document {
    let (verdict, exit) = match &outcome.ended {
        Ended::Exit(exit) => (check::verdict_name(exit.verdict), exit.clone()),
        Ended::GaveUp => ("unknown", v1::TaskExit::default()),
    };
    Document {
        task_id: outcome.task_id.clone(),
        node: outcome.node_name.clone(),
        node_id: outcome.node_id.clone(),
        verdict,
        code,
        exit_code: exit.exit_code,
        signal: exit.signal,
        complete: outcome.incomplete.is_none() && matches!(outcome.ended, Ended::Exit(_)),
        truncated: outcome.captured.truncated,
        duration_ms: exit.duration_ms,
        reason: exit.reason,
        hint: exit.hint,
        stdout: String::from_utf8_lossy(&outcome.captured.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&outcome.captured.stderr).into_owned(),
    }
}

fn start(args: &ExecArgs) -> Result<v1::ExecStart, CliError> {
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
    let env = args
        .env
        .iter()
        .map(|text| {
            let text = text.clone().into_vec();
            let split = text.iter().position(|b| *b == b'=').filter(|at| *at > 0);
            let split = split.ok_or_else(|| CliError::usage("--env: expected NAME=VALUE"))?;
            Ok(v1::EnvVar {
                name: text[..split].to_vec().into(),
                value: text[split + 1..].to_vec().into(),
            })
        })
        .collect::<Result<_, CliError>>()?;
    let network = match args.net {
        Net::None => v1::Network::None,
        Net::Full => v1::Network::Full,
    };
    let spec = v1::TaskSpec {
        argv: args.command.iter().map(bytes).collect(),
        script,
        workspace: args.workspace.clone().unwrap_or_default(),
        cwd: args.cwd.as_ref().map(bytes).unwrap_or_default(),
        env,
        mode: proto_mode(args.mode).into(),
        network: network.into(),
        time_limit_ms: args.time_limit.map_or(0, millis),
        memory_bytes: args.memory.unwrap_or(0),
        max_processes: args.pids.unwrap_or(0),
        stdin: args.stdin,
        ..Default::default()
    };
    Ok(v1::ExecStart {
        node: args.node.clone(),
        spec: Some(spec),
        initial_credit: DEFAULT_OUTPUT_CREDIT,
    })
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
