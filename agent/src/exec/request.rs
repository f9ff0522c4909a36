//! What is asked of a node, and what it answers: the domain's words for one command.

use std::path::PathBuf;
use std::time::Duration;

use bytes::Bytes;
use cortex_shared::policy::Mode;

use crate::sandbox::{Network, TerminalSize};

/// One command. What is out of bounds is refused by [`super::run()`], not here.
#[derive(Debug, Clone, Default)]
pub struct CommandRequest {
    /// The program and its arguments; empty if there is a script.
    pub argv: Vec<Vec<u8>>,
    /// A bash script.
    pub script: Option<Vec<u8>>,
    /// The workspace it sees; without one it gets an empty private directory.
    pub workspace: Option<WorkspaceView>,
    /// Additions to the environment.
    pub env: Vec<(Vec<u8>, Vec<u8>)>,
    /// The mode in force: the least that role, policy, ceiling and request allow.
    pub mode: Mode,
    /// What of the network it sees.
    pub network: Network,
    /// Wall-clock limit; the node's own maximum if there is none or a longer one.
    pub time_limit: Option<Duration>,
    /// Limits that differ from the node's defaults.
    pub limits: RequestedLimits,
    /// The most that the node's owner lets any command have.
    pub bounds: Bounds,
    /// Standard input will be sent; otherwise the command reads end-of-file.
    pub stdin: bool,
    /// A terminal in place of pipes. Its output is all standard output, and its input is always sent.
    pub terminal: Option<TerminalRequest>,
    /// Directories that the workspace must neither contain nor lie in: the agent's own state.
    pub forbidden_paths: Vec<PathBuf>,
    /// Directories of this machine that the command sees read-only, at the same path.
    pub read_only_paths: Vec<PathBuf>,
    /// The library of skills on this machine, which the command sees read-only at
    /// [`crate::sandbox::LIBRARY_INSIDE`] and, as far as that is possible, at its own path.
    pub library: Option<PathBuf>,
    /// The node's owner wants no command without a control group to limit it as a whole.
    pub require_control_group: bool,
}

/// A terminal for a command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TerminalRequest {
    /// Its size at first.
    pub size: TerminalSize,
    /// What kind it is: the value of `TERM`, of 1 to 64 letters, digits, `+`, `-`, `_` and `.`.
    pub kind: String,
}

/// A workspace as a command sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WorkspaceView {
    /// Its directory on this machine.
    pub host_root: PathBuf,
    /// The working directory, relative to it; empty for its root.
    pub cwd: Vec<u8>,
}

/// Limits asked for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RequestedLimits {
    /// Bytes of memory; `None` for the node's default.
    pub memory_bytes: Option<u64>,
    /// Processes and threads; `None` for the node's default.
    pub processes: Option<u32>,
}

/// What no command gets more of, whatever is asked for; `None` for what the machine gives.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Bounds {
    /// Wall-clock time.
    pub time: Option<Duration>,
    /// Bytes of memory.
    pub memory_bytes: Option<u64>,
    /// Processes and threads.
    pub processes: Option<u32>,
}

/// One of the two outputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OutputStream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// What a command does, in order.
#[derive(Debug, Clone)]
pub enum CommandEvent {
    /// It runs.
    Started {
        /// The process on this machine with which all of the command ends.
        process_id: u32,
        /// The mode it runs in.
        mode: Mode,
    },
    /// It wrote something.
    Output {
        /// Where.
        stream: OutputStream,
        /// How many bytes of this stream came before.
        offset: u64,
        /// What: 1 to [`super::MAX_FRAME_BYTES`] bytes.
        data: Bytes,
    },
    /// It took, or will never take, this many more bytes of standard input.
    StdinTaken(u64),
    /// It is over. Always the last event.
    Exit(CommandExit),
}

/// How a command ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CommandExit {
    /// In what way.
    pub verdict: CommandVerdict,
    /// The exit code for whoever waits: the command's own, 124 time limit, 125 failure of the mesh,
    /// 126 refused, 127 not found, 128 and the signal's number.
    pub exit_code: u8,
    /// The signal that ended it.
    pub signal: Option<i32>,
    /// Bytes sent of standard output.
    pub stdout_bytes: u64,
    /// BLAKE3 of them.
    pub stdout_hash: [u8; 32],
    /// Bytes sent of standard error.
    pub stderr_bytes: u64,
    /// BLAKE3 of them.
    pub stderr_hash: [u8; 32],
    /// Why, for every verdict but exited and signalled.
    pub reason: Option<String>,
    /// What helps against `reason`; or, without one, what its reader should know of what the command
    /// left behind.
    pub hint: Option<String>,
    /// From the request to the end.
    pub duration: Duration,
}

impl CommandExit {
    /// An end with this verdict and its exit code, of a command that wrote nothing; an empty reason is
    /// none.
    pub(crate) fn new(verdict: CommandVerdict, reason: String, hint: Option<String>) -> Self {
        let nothing = *blake3::hash(b"").as_bytes();
        let exit_code = match verdict {
            CommandVerdict::TimeLimit => 124,
            CommandVerdict::Refused => 126,
            CommandVerdict::NotFound => 127,
            CommandVerdict::Exited => 0,
            CommandVerdict::Signalled | CommandVerdict::Cancelled | CommandVerdict::Failed => 125,
        };
        Self {
            verdict,
            exit_code,
            signal: None,
            stdout_bytes: 0,
            stdout_hash: nothing,
            stderr_bytes: 0,
            stderr_hash: nothing,
            reason: (!reason.is_empty()).then_some(reason),
            hint,
            duration: Duration::ZERO,
        }
    }
}

/// In what way a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CommandVerdict {
    /// By itself, with an exit code.
    Exited,
    /// By a signal that nobody here asked for.
    Signalled,
    /// Its time was up.
    TimeLimit,
    /// Somebody cancelled it.
    Cancelled,
    /// Policy or sandbox refused it; it has not run.
    Refused,
    /// The program was not found or cannot be executed.
    NotFound,
    /// This node failed.
    Failed,
}

/// What the caller may tell a running command. Closing the channel ends the command, which has then failed.
#[derive(Debug, Clone)]
pub enum CommandControl {
    /// This many more bytes of output may be sent, over both streams.
    Credit(u64),
    /// Standard input.
    Stdin {
        /// What to write to it.
        data: Bytes,
        /// Nothing follows.
        end: bool,
    },
    /// Send this signal to the command's process group.
    Signal(i32),
    /// Give its terminal another size. Without effect where it has none.
    Resize(TerminalSize),
    /// Send `signal`, and end everything after `grace`.
    Cancel {
        /// 0 for SIGTERM.
        signal: i32,
        /// How long the command may take to end by itself.
        grace: Duration,
        /// Why it is to end.
        cause: CancelCause,
    },
}

/// Why a command is ended from outside. Decides whose doing its end is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CancelCause {
    /// Somebody who may asked for it.
    Requested,
    /// The hub has put this node out of its mesh.
    Expelled,
    /// The connection to the hub was lost, and the command was not to outlive that.
    LinkLost,
    /// No hub was heard of for longer than commands may go on without one.
    CutOff,
    /// The agent of this node stops.
    AgentStops,
    /// The hub sent more than it may.
    Protocol,
}

impl CancelCause {
    /// The verdict, and why.
    #[must_use]
    pub fn verdict(self) -> (CommandVerdict, &'static str) {
        match self {
            Self::Requested => (CommandVerdict::Cancelled, "cancelled on request"),
            Self::Expelled => {
                (CommandVerdict::Cancelled, "the hub has put the node out of its mesh")
            }
            Self::LinkLost => (
                CommandVerdict::Failed,
                "the node lost its connection to the hub, and the command ended with it",
            ),
            Self::CutOff => (
                CommandVerdict::Failed,
                "the node was without a hub for longer than commands may go on there",
            ),
            Self::AgentStops => (
                CommandVerdict::Failed,
                "the agent on the node was stopped, and the command with it",
            ),
            Self::Protocol => (CommandVerdict::Failed, "the hub broke the protocol of the task"),
        }
    }
}
