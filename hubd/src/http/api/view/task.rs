//! Tasks and output in JSON.

use std::collections::BTreeMap;

use cortex_proto::v1;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::node::{Mode, Network};
use super::{id, some, time};

/// Where a task is.
#[derive(Clone, Copy, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub(in crate::http) enum TaskState {
    Accepted,
    Running,
    Interrupted,
    Finished,
    Failed,
    Cancelled,
}

impl TaskState {
    /// The state of this word.
    pub(in crate::http) fn parse(word: &str) -> Option<Self> {
        Some(match word {
            "accepted" => Self::Accepted,
            "running" => Self::Running,
            "interrupted" => Self::Interrupted,
            "finished" => Self::Finished,
            "failed" => Self::Failed,
            "cancelled" => Self::Cancelled,
            _ => return None,
        })
    }

    pub(in crate::http) fn wire(self) -> v1::TaskState {
        match self {
            Self::Accepted => v1::TaskState::Accepted,
            Self::Running => v1::TaskState::Running,
            Self::Interrupted => v1::TaskState::Interrupted,
            Self::Finished => v1::TaskState::Finished,
            Self::Failed => v1::TaskState::Failed,
            Self::Cancelled => v1::TaskState::Cancelled,
        }
    }

    fn of(state: v1::TaskState) -> Self {
        match state {
            v1::TaskState::Accepted => Self::Accepted,
            // The hub names a state always.
            v1::TaskState::Running | v1::TaskState::Unspecified => Self::Running,
            v1::TaskState::Interrupted => Self::Interrupted,
            v1::TaskState::Finished => Self::Finished,
            v1::TaskState::Failed => Self::Failed,
            v1::TaskState::Cancelled => Self::Cancelled,
        }
    }
}

/// How a task ended.
#[derive(Serialize, JsonSchema)]
struct End {
    /// exited, signalled, time_limit, cancelled, or why it did not end by itself.
    verdict: String,
    /// Absent unless the command itself ended with one.
    exit_code: Option<u32>,
    /// The signal that ended it.
    signal: Option<u32>,
    reason: Option<String>,
    hint: Option<String>,
    stdout_bytes: u64,
    stderr_bytes: u64,
    duration_ms: u64,
}

impl End {
    fn of(exit: v1::TaskExit) -> Self {
        let verdict = exit.verdict();
        let word = verdict.as_str_name().trim_start_matches("TASK_VERDICT_").to_ascii_lowercase();
        Self {
            verdict: word,
            exit_code: (verdict == v1::TaskVerdict::Exited).then_some(exit.exit_code),
            signal: (exit.signal != 0).then_some(exit.signal),
            reason: some(exit.reason),
            hint: some(exit.hint),
            stdout_bytes: exit.stdout_bytes,
            stderr_bytes: exit.stderr_bytes,
            duration_ms: exit.duration_ms,
        }
    }
}

/// Some of the tasks.
#[derive(Serialize, JsonSchema)]
pub(in crate::http) struct Tasks {
    pub(in crate::http) tasks: Vec<Task>,
    /// For the next page; absent on the last.
    pub(in crate::http) next_cursor: Option<String>,
}

/// A command on a node.
#[derive(Serialize, JsonSchema)]
pub(in crate::http) struct Task {
    task_id: String,
    node: String,
    node_id: String,
    /// Who asked for it.
    actor: String,
    /// As it is shown to people; a long one is cut.
    command: String,
    workspace: Option<String>,
    mode: Mode,
    state: TaskState,
    /// Absent until there is a verdict, which never changes.
    end: Option<End>,
    /// Why it is interrupted.
    interruption: Option<String>,
    accepted_at_ms: i64,
    started_at_ms: Option<i64>,
    ended_at_ms: Option<i64>,
    /// How it ended on the node, where that was learnt after the verdict.
    late_outcome: Option<End>,
    late_outcome_at_ms: Option<i64>,
    detached: bool,
    /// The task that it repeats.
    retry_of: Option<String>,
    /// Somebody wants it to end, and its node has not said yet that it has.
    cancel_pending: bool,
}

impl Task {
    pub(in crate::http) fn of(task: v1::TaskInfo) -> Self {
        let (mode, state) = (Mode::of(task.mode()), TaskState::of(task.state()));
        Self {
            task_id: id(&task.task_id),
            node: task.node_name,
            node_id: id(&task.node_id),
            actor: task.actor,
            command: task.command,
            workspace: some(task.workspace),
            mode,
            state,
            end: task.exit.map(End::of),
            interruption: some(task.interruption),
            accepted_at_ms: task.accepted_at_ms,
            started_at_ms: time(task.started_at_ms),
            ended_at_ms: time(task.ended_at_ms),
            late_outcome: task.late_outcome.map(End::of),
            late_outcome_at_ms: time(task.late_outcome_at_ms),
            detached: task.detached,
            retry_of: some(id(&task.retry_of)).filter(|_| !task.retry_of.is_empty()),
            cancel_pending: task.cancel_pending,
        }
    }
}

/// A command to run: `argv` or `script`, or `retry_of`. It has no input and no terminal, and nobody has to
/// wait for it: its output is kept, and its end stands in the journal.
#[derive(Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub(in crate::http) struct Command {
    /// A node's name or the beginning of its id; not with `retry_of`.
    node: String,
    /// The program and its arguments.
    argv: Vec<String>,
    /// A bash script.
    script: String,
    /// The name of the workspace whose files it sees; without one, it sees none.
    workspace: String,
    /// Where it begins, within the workspace.
    cwd: String,
    /// Variables of its environment. Their values are not kept.
    env: BTreeMap<String, String>,
    /// strict unless told otherwise.
    mode: Option<Mode>,
    /// none unless told otherwise.
    network: Option<Network>,
    /// Milliseconds it may take; without it, what the node allows.
    time_limit_ms: u64,
    /// Memory it may take; without it, what the node gives.
    memory_bytes: u64,
    /// Processes it may have; without it, what the node gives.
    max_processes: u32,
    /// What becomes of it when its node loses the hub; it goes on unless told otherwise.
    on_disconnect: OnDisconnect,
    /// A task to run once more, on the same node; its variables have to be given again.
    retry_of: String,
    /// However often it is sent with the same key, it runs once: at most 128 printable ASCII characters.
    idempotency_key: String,
}

/// What becomes of a command when its node loses the hub.
#[derive(Clone, Copy, Default, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
enum OnDisconnect {
    #[default]
    Resume,
    Kill,
}

impl Command {
    /// What is wrong with it at sight, if anything is.
    pub(in crate::http) fn flaw(&self) -> Option<&'static str> {
        let given = !self.argv.is_empty() || !self.script.is_empty();
        match (self.retry_of.is_empty(), given, self.node.is_empty()) {
            (true, false, _) => Some("there is no command: give argv or script, or retry_of"),
            (true, true, true) => Some("node is missing"),
            (false, true, _) => Some("retry_of repeats a command: give no other"),
            (false, false, false) => Some("retry_of runs where the task ran: give no node"),
            (true, true, false) | (false, false, true) => None,
        }
    }

    pub(in crate::http) fn wire(self) -> v1::ExecStart {
        let variable = |(name, value): (String, String)| v1::EnvVar {
            name: name.into_bytes().into(),
            value: value.into_bytes().into(),
        };
        let spec = v1::TaskSpec {
            argv: self.argv.into_iter().map(|argument| argument.into_bytes().into()).collect(),
            script: self.script.into_bytes().into(),
            workspace: self.workspace,
            cwd: self.cwd.into_bytes().into(),
            env: self.env.into_iter().map(variable).collect(),
            mode: self.mode.unwrap_or(Mode::Strict).wire().into(),
            network: self.network.unwrap_or(Network::None).wire().into(),
            time_limit_ms: self.time_limit_ms,
            memory_bytes: self.memory_bytes,
            max_processes: self.max_processes,
            on_disconnect: match self.on_disconnect {
                OnDisconnect::Resume => v1::OnDisconnect::Resume.into(),
                OnDisconnect::Kill => v1::OnDisconnect::Kill.into(),
            },
            ..v1::TaskSpec::default()
        };
        v1::ExecStart {
            node: self.node,
            spec: Some(spec),
            idempotency_key: self.idempotency_key,
            detach: true,
            retry_of: self.retry_of,
            ..v1::ExecStart::default()
        }
    }
}

/// A command that is in the journal, and has been given to its node.
#[derive(Serialize, JsonSchema)]
pub(in crate::http) struct Accepted {
    task_id: String,
    node: String,
    node_id: String,
    /// Whether its idempotency key led to a command from before.
    known: bool,
}

impl Accepted {
    pub(in crate::http) fn of(accepted: v1::ExecAccepted) -> Self {
        Self {
            task_id: id(&accepted.task_id),
            node: accepted.node_name,
            node_id: id(&accepted.node_id),
            known: accepted.known,
        }
    }
}

/// How a command is ended.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::http) struct Cancel {
    /// 15 (SIGTERM) unless told otherwise.
    pub(in crate::http) signal: Option<u32>,
    /// Milliseconds until SIGKILL: 2000 unless told otherwise, 60000 at most; more is taken for that.
    pub(in crate::http) grace_ms: Option<u64>,
}

/// Which of its outputs a command wrote to.
#[derive(Clone, Copy, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub(in crate::http) enum Stream {
    Stdout,
    Stderr,
}

impl Stream {
    pub(in crate::http) fn of(stream: v1::OutputStream) -> Self {
        match stream {
            v1::OutputStream::Stdout => Self::Stdout,
            v1::OutputStream::Stderr => Self::Stderr,
        }
    }

    pub(in crate::http) fn index(self) -> usize {
        match self {
            Self::Stdout => 0,
            Self::Stderr => 1,
        }
    }
}

/// A piece of what a task wrote.
#[derive(Serialize, JsonSchema)]
pub(in crate::http) struct OutputPiece {
    pub(in crate::http) stream: Stream,
    /// Bytes of this stream before it. Where that is more than what came before, something was not kept.
    pub(in crate::http) offset: u64,
    /// The bytes, in base64.
    pub(in crate::http) data: String,
}

/// What is kept of a task's output, a megabyte at a time.
#[derive(Serialize, JsonSchema)]
pub(in crate::http) struct TaskOutput {
    pub(in crate::http) pieces: Vec<OutputPiece>,
    /// Ask on with these.
    pub(in crate::http) next_stdout_offset: u64,
    pub(in crate::http) next_stderr_offset: u64,
    /// The task as it is now; only where this is all there is at the moment.
    pub(in crate::http) task: Option<Task>,
}

/// A piece of a stream of a task's output.
#[derive(Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub(in crate::http) enum TaskNews {
    /// It has written something.
    Output(OutputPiece),
    /// Its node has lost the hub.
    Interrupted(Interruption),
    /// Its node is back.
    Resumed {},
    /// The task, once it has ended: the last piece.
    Task(Box<Task>),
}

/// A task whose node has lost the hub.
#[derive(Serialize, JsonSchema)]
pub(in crate::http) struct Interruption {
    pub(in crate::http) reason: String,
    /// How long its node has to come back.
    pub(in crate::http) resume_within_ms: u64,
}

/// A piece of what a node's commands wrote.
#[derive(Serialize, JsonSchema)]
pub(in crate::http) struct HistoryPiece {
    pub(in crate::http) at_ms: i64,
    pub(in crate::http) task_id: Option<String>,
    pub(in crate::http) stream: Stream,
    /// The bytes, in base64.
    pub(in crate::http) data: String,
    /// Bytes between the piece before and this one that were not kept.
    pub(in crate::http) skipped_bytes: u64,
}

/// The latest output of a node's commands, oldest first.
#[derive(Serialize, JsonSchema)]
pub(in crate::http) struct History {
    pub(in crate::http) pieces: Vec<HistoryPiece>,
    /// Ask on with this for what comes next, now or later.
    pub(in crate::http) next_cursor: u64,
    /// Whether there may be more at once.
    pub(in crate::http) more: bool,
}
