//! `exec` and `shell`: commands on nodes, their output here.
//!
//! | module | subject |
//! |---|---|
//! | `request` | from arguments to the request |
//! | `one` | one command on one node, attached to this process |
//! | `fan` | one command on several nodes |
//! | `stream` | one command's frames to and from the hub; never blocks |
//! | `writer` | puts output where it belongs, on a thread that may block |
//! | `check` | pure: completeness, exit codes, what to say |
//! | `document` | the end of a command for programs |
//! | `keyboard` | the terminal on this side: raw mode, keys, escapes |
//! | `stdin`, `signals` | what else comes from this side |

pub(super) mod check;
mod document;
mod fan;
mod keyboard;
pub(super) mod one;
pub(super) mod request;
mod shell;
pub(super) mod signals;
mod stdin;
mod stream;
pub(super) mod writer;

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};
use cortex_proto::v1;
use cortex_shared::policy::Mode;

use super::error::CliError;
use super::units::{parse_duration, parse_size};
use super::{Global, Output};
use crate::exec::MAX_TIME_LIMIT;
pub(crate) use shell::{ShellArgs, shell};

/// Run a command on a node
#[derive(Debug, Args)]
#[command(after_help = "\
The command runs in the strict sandbox: it sees read-only system directories, a private /tmp, no
network and, with --workspace, the files of that workspace. Its output arrives here as it is
written, stdout on stdout and stderr on stderr. After 24 hours it is ended, or earlier if
--time-limit or the node's owner say so.

Exit code: the command's own; 124 time limit, 125 failure of the mesh (node or hub not reachable,
session lost, output incomplete), 126 refused by policy, 127 command not found, 128+n ended by
signal n, 130 interrupted here. Ctrl-C ends the command (TERM, then KILL after 2 s) and waits for
its end; a second one leaves at once. Where the node or the hub goes away for a moment, the command
goes on, and so does its output, at the exact byte.

Several targets (more than one, a selector, or --all): the command runs on each, on at most
--parallel at a time. Lines of output begin with the node's name. A summary on standard error names
every node where the command failed and every node that was not reached. Exit code: 0 all
succeeded, 1 it failed somewhere, 125 a node was not reached or its end is not known.

With -t the command has a terminal (see also `cortex-agent shell --help`).

Examples:
  cortex-agent exec build-1 -- make -j8
  cortex-agent exec build-1 --workspace app -s 'cargo test 2>&1 | tail'
  tar c src | cortex-agent exec build-1 -i --workspace app -- tar x
  cortex-agent exec @env=prod --group -- uname -r
  cortex-agent exec --all --output-dir logs --max-fail 3 -f check.sh")]
pub(crate) struct ExecArgs {
    /// Where: names, unique prefixes of ids, or @label=value,… for all nodes with these labels
    #[arg(value_name = "TARGET", required_unless_present = "all")]
    targets: Vec<String>,
    /// On every node
    #[arg(long, conflicts_with = "targets")]
    all: bool,
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
    /// Give the command a terminal; keys typed at ours go to it. `~.` at the beginning of a line leaves
    #[arg(short = 't', long = "tty", conflicts_with = "format")]
    terminal: bool,
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
    /// Time the command may take, such as 90s or 1h; 24h at most, and where nothing is said. The node's
    /// owner may allow less
    #[arg(long, value_name = "DURATION", value_parser = parse_time_limit)]
    time_limit: Option<Duration>,
    /// Say the task's id (of each node) and leave; `task logs`, `task wait` and `task attach` lead to it
    #[arg(long, conflicts_with_all = ["stdin", "terminal"])]
    detach: bool,
    /// What happens to the command when the node loses the hub: it goes on and is taken up again, or is
    /// ended at once
    #[arg(long, value_enum, default_value_t, value_name = "resume|kill")]
    on_disconnect: OnDisconnect,
    /// Your own name for this task: the same key leads to the same task, however often it is used
    #[arg(long, value_name = "KEY")]
    idempotency_key: Option<String>,
    #[command(flatten)]
    several: fan::FanArgs,
    #[command(flatten)]
    output: Output,
}

#[derive(Clone, Copy, Debug, Default, ValueEnum)]
enum OnDisconnect {
    #[default]
    Resume,
    Kill,
}

impl From<OnDisconnect> for v1::OnDisconnect {
    fn from(wanted: OnDisconnect) -> Self {
        match wanted {
            OnDisconnect::Resume => Self::Resume,
            OnDisconnect::Kill => Self::Kill,
        }
    }
}

#[derive(Clone, Copy, Debug, Default, ValueEnum)]
enum Net {
    /// Its own loopback only
    #[default]
    None,
    /// The node's network
    Full,
}

impl From<Net> for v1::Network {
    fn from(net: Net) -> Self {
        match net {
            Net::None => Self::None,
            Net::Full => Self::Full,
        }
    }
}

/// Reads the time that a command may take. No node gives it more than this, so what is asked for beyond
/// would be cut without a word.
fn parse_time_limit(text: &str) -> Result<Duration, String> {
    let limit = parse_duration(text)?;
    if limit > MAX_TIME_LIMIT {
        let hours = MAX_TIME_LIMIT.as_secs() / 3600;
        return Err(format!(
            "every command is ended after {hours}h; no longer time can be asked for"
        ));
    }
    Ok(limit)
}

/// Runs the command; the result is the exit code of this process.
pub(crate) async fn exec(global: &Global, args: ExecArgs) -> Result<u8, CliError> {
    let start = request::start(&args)?;
    let targets = fan::Targets::new(args.targets, args.all);
    let single = targets.single().filter(|_| !args.several.is_asked_for());
    if let Some(node) = single {
        let start = v1::ExecStart { node: node.to_owned(), ..start };
        let attached = one::Attached { start, stdin: args.stdin, output: args.output };
        return one::exec(global, attached).await;
    }
    if args.stdin || args.terminal {
        let flag = if args.terminal { "-t" } else { "-i" };
        return Err(CliError::usage(format!("{flag} goes with a single target"))
            .hint("-f - reads a script from standard input, for any number of targets"));
    }
    if args.detach {
        return fan::detach(global, start, targets, args.several, args.output).await;
    }
    fan::exec(global, start, targets, args.several, args.output).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_time_can_be_asked_for_than_a_node_gives() {
        assert_eq!(parse_time_limit("24h"), Ok(MAX_TIME_LIMIT));
        assert_eq!(parse_time_limit("90s"), Ok(Duration::from_secs(90)));
        for long in ["25h", "86401", "2d"] {
            assert!(parse_time_limit(long).unwrap_err().contains("24h"), "{long}");
        }
        assert!(parse_time_limit("x").is_err());
    }
}
