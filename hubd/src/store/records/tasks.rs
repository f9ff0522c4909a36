//! Records of the journal of tasks.

use cortex_shared::ids::{NodeId, TaskId};
use cortex_shared::policy::{Mode, Role};
use serde::{Deserialize, Serialize};

use super::Actor;

/// A caller's own name for one task, which makes asking twice harmless.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IdempotencyKey {
    /// Unique for its actor.
    pub key: String,
    /// BLAKE3 of node and specification: the same key must mean the same command.
    pub request_hash: [u8; 32],
}

/// A task to be journalled.
#[derive(Clone, Debug)]
pub struct NewTask {
    /// Its id.
    pub id: TaskId,
    /// Where it is to run.
    pub node: NodeId,
    /// Its name then.
    pub node_name: String,
    /// Who asked.
    pub actor: Actor,
    /// With which role.
    pub role: Role,
    /// The command as it is shown to people.
    pub command: ShownCommand,
    /// Workspace it runs in; empty for none.
    pub workspace: String,
    /// Mode it runs in.
    pub mode: Mode,
    /// Nobody reads its output as it comes.
    pub detached: bool,
    /// The specification, encoded, to repeat it; none if that is not possible.
    pub spec: Option<Vec<u8>>,
    /// The task it repeats.
    pub retry_of: Option<TaskId>,
    /// The caller's key.
    pub key: Option<IdempotencyKey>,
    /// When it was accepted.
    pub accepted_at_ms: i64,
}

/// A command for people, who may see its beginning only, and what tells it from all others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShownCommand {
    /// Its arguments, quoted as for a shell, or its script; says so if it is cut.
    pub text: String,
    /// Length of the whole of it.
    pub bytes: u64,
    /// BLAKE3 of its script, or of its arguments, each with a NUL byte after it.
    pub hash: [u8; 32],
}

impl ShownCommand {
    /// Puts it into the particulars of a line of the audit log.
    pub fn describe(&self, detail: &mut serde_json::Value) {
        detail["command"] = self.text.as_str().into();
        detail["command_bytes"] = self.bytes.into();
        detail["command_hash"] = blake3::Hash::from_bytes(self.hash).to_string().into();
    }
}

/// What became of a task to be journalled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Acceptance {
    /// It is in the journal.
    New,
    /// The key has led to this task before; nothing was journalled.
    Known(TaskId),
    /// The key has led to another command before; nothing was journalled.
    KeyReused(TaskId),
}

/// What became of a node's word on a task that should have its verdict.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LateReport {
    /// It is in the journal.
    Added,
    /// It adds nothing: the journal has the node's word, or there is no such task of this node.
    Known,
    /// The verdict is not in the journal yet; nothing was journalled.
    TooEarly,
}

/// In what way a task ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// With its own exit code.
    Exited,
    /// By a signal that nobody here asked for.
    Signalled,
    /// It ran into its time limit.
    TimeLimit,
    /// Somebody cancelled it.
    Cancelled,
    /// Policy or sandbox refused it.
    Refused,
    /// The program was not found.
    NotFound,
    /// The mesh failed.
    Failed,
    /// The session with its node was lost, and did not come back in time.
    StreamLost,
}

impl Verdict {
    const ALL: [Self; 8] = [
        Self::Exited,
        Self::Signalled,
        Self::TimeLimit,
        Self::Cancelled,
        Self::Refused,
        Self::NotFound,
        Self::Failed,
        Self::StreamLost,
    ];

    /// The stable word.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Exited => "exited",
            Self::Signalled => "signalled",
            Self::TimeLimit => "time_limit",
            Self::Cancelled => "cancelled",
            Self::Refused => "refused",
            Self::NotFound => "not_found",
            Self::Failed => "failed",
            Self::StreamLost => "stream_lost",
        }
    }

    /// The verdict of this word.
    #[must_use]
    pub fn parse(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|verdict| verdict.as_str() == word)
    }

    /// The state that a task ends in with it.
    #[must_use]
    pub fn state(self) -> TaskEndState {
        match self {
            Self::Exited | Self::Signalled => TaskEndState::Finished,
            Self::Cancelled => TaskEndState::Cancelled,
            Self::TimeLimit | Self::Refused | Self::NotFound | Self::Failed | Self::StreamLost => {
                TaskEndState::Failed
            }
        }
    }
}

/// How a task ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TaskEnd {
    /// In what way.
    pub verdict: Verdict,
    /// Exit code of the command, where it has one.
    pub exit_code: Option<u32>,
    /// Signal that ended the command, where one did.
    pub signal: Option<u32>,
    /// Why, for people.
    pub reason: String,
    /// What helps.
    pub hint: String,
    /// Bytes of output.
    pub stdout_bytes: u64,
    /// Bytes of error output.
    pub stderr_bytes: u64,
    /// BLAKE3 of the output, as the node reports it; none if the end is not known.
    pub stdout_hash: Option<[u8; 32]>,
    /// The same of the error output.
    pub stderr_hash: Option<[u8; 32]>,
    /// From start to end on the node.
    pub duration_ms: u64,
    /// When the hub heard that it had started; none if it has not.
    pub started_at_ms: Option<i64>,
    /// When.
    pub ended_at_ms: i64,
    /// It was not begun, and never will be: its caller's key is free again. Not read back.
    #[serde(default)]
    pub never_begun: bool,
    /// Its node did not say so, and is to end it if it still runs it. Not read back: see
    /// [`TaskRecord::cancel_wanted`].
    #[serde(default)]
    pub cancel_wanted: bool,
}

impl TaskEnd {
    /// Whether the node itself said how the command ended.
    #[must_use]
    pub fn is_nodes_word(&self) -> bool {
        self.stdout_hash.is_some()
    }
}

/// How a task ended on its node, learnt after its verdict.
pub type LateOutcome = TaskEnd;

/// The state a task ends in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TaskEndState {
    /// The command ran to its own end.
    Finished,
    /// The mesh could not run it, or lost it.
    Failed,
    /// Somebody cancelled it.
    Cancelled,
}

impl TaskEndState {
    /// The word in the store and in listings.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Finished => "finished",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }
}

/// A task in the journal.
#[derive(Clone, Debug)]
pub struct TaskRecord {
    /// Its id.
    pub id: TaskId,
    /// Where it ran.
    pub node: NodeId,
    /// The node's name when it was accepted.
    pub node_name: String,
    /// Who asked.
    pub actor: String,
    /// With which role.
    pub role: Role,
    /// The command as it is shown to people.
    pub command: String,
    /// Workspace it ran in; empty for none.
    pub workspace: String,
    /// Mode it ran in.
    pub mode: Mode,
    /// Nobody read its output as it came.
    pub detached: bool,
    /// The task it repeats.
    pub retry_of: Option<TaskId>,
    /// The caller's key; empty for none.
    pub idempotency_key: String,
    /// When it was accepted.
    pub accepted_at_ms: i64,
    /// The verdict.
    pub end: Option<TaskEnd>,
    /// What the node said after the verdict.
    pub late: Option<LateOutcome>,
    /// Somebody wants it to end.
    pub cancel_wanted: bool,
}

impl TaskRecord {
    /// Whether it may still run on its node, for all that is known here.
    #[must_use]
    pub fn may_run(&self) -> bool {
        self.late.is_none() && self.end.as_ref().is_none_or(|end| !end.is_nodes_word())
    }
}

/// Which tasks are wanted.
#[derive(Clone, Debug, Default)]
pub struct TaskQuery {
    /// Only those of these nodes; none for all.
    pub nodes: Option<Vec<NodeId>>,
    /// Only those of this actor.
    pub actor: Option<String>,
    /// Those without a verdict, and those that ended in these states; none for all.
    pub states: Option<(bool, Vec<TaskEndState>)>,
    /// Only those before this one.
    pub before: Option<TaskId>,
    /// At most so many.
    pub limit: u32,
}
