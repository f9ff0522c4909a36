//! A task as it is listed and shown.

use cortex_proto::v1::{self, TaskState};
use serde::Serialize;

use super::{check, id_text};
use crate::cli::exec::request::OWN_KEY;
use crate::cli::printer::Row;

/// How a task ended.
#[derive(Serialize)]
pub(super) struct End {
    verdict: &'static str,
    /// Null unless the command itself ended with one.
    exit_code: Option<u32>,
    signal: u32,
    reason: String,
    hint: String,
    /// Without the node's word: what came to the hub.
    stdout_bytes: u64,
    stderr_bytes: u64,
    /// Null if the node has not said how it ended.
    duration_ms: Option<u64>,
}

impl From<&v1::TaskExit> for End {
    fn from(exit: &v1::TaskExit) -> Self {
        Self {
            verdict: check::verdict_name(exit.verdict),
            exit_code: check::own_exit_code(exit),
            signal: exit.signal,
            reason: exit.reason.clone(),
            hint: exit.hint.clone(),
            stdout_bytes: exit.stdout_bytes,
            stderr_bytes: exit.stderr_bytes,
            duration_ms: check::is_nodes_word(exit).then_some(exit.duration_ms),
        }
    }
}

/// A task in a list, and as a document.
#[derive(Serialize)]
pub(super) struct TaskRow {
    pub(super) task_id: String,
    node: String,
    node_id: String,
    actor: String,
    command: String,
    workspace: String,
    mode: &'static str,
    pub(super) state: &'static str,
    /// Null until it has ended.
    verdict: Option<&'static str>,
    exit_code: Option<u32>,
    signal: Option<u32>,
    /// Why it ended, or why it is interrupted.
    reason: String,
    end: Option<End>,
    accepted_at_ms: i64,
    started_at_ms: i64,
    ended_at_ms: i64,
    late_outcome: Option<End>,
    late_outcome_at_ms: i64,
    detached: bool,
    idempotency_key: String,
    retry_of: String,
    /// Somebody wants it to end, and its node has not said yet that it has.
    pub(super) cancel_pending: bool,
}

fn state_name(state: TaskState) -> &'static str {
    match state {
        TaskState::Accepted => "accepted",
        TaskState::Running => "running",
        TaskState::Interrupted => "interrupted",
        TaskState::Finished => "finished",
        TaskState::Failed => "failed",
        TaskState::Cancelled => "cancelled",
        TaskState::Unspecified => "unknown",
    }
}

impl From<&v1::TaskInfo> for TaskRow {
    fn from(info: &v1::TaskInfo) -> Self {
        let end = info.exit.as_ref().map(End::from);
        let reason = end.as_ref().map_or(&info.interruption, |end| &end.reason).clone();
        Self {
            task_id: id_text(&info.task_id),
            node: info.node_name.clone(),
            node_id: id_text(&info.node_id),
            actor: info.actor.clone(),
            command: info.command.clone(),
            workspace: info.workspace.clone(),
            mode: match info.mode() {
                v1::Mode::Strict => "strict",
                v1::Mode::Permissive => "permissive",
            },
            state: state_name(info.state()),
            verdict: end.as_ref().map(|end| end.verdict),
            exit_code: end.as_ref().and_then(|end| end.exit_code),
            signal: end.as_ref().map(|end| end.signal).filter(|signal| *signal != 0),
            reason,
            end,
            accepted_at_ms: info.accepted_at_ms,
            started_at_ms: info.started_at_ms,
            ended_at_ms: info.ended_at_ms,
            late_outcome: info.late_outcome.as_ref().map(End::from),
            late_outcome_at_ms: info.late_outcome_at_ms,
            detached: info.detached,
            idempotency_key: Some(&info.idempotency_key)
                .filter(|key| !key.starts_with(OWN_KEY))
                .cloned()
                .unwrap_or_default(),
            retry_of: id_text(&info.retry_of),
            cancel_pending: info.cancel_pending,
        }
    }
}

impl Row for TaskRow {
    const COLUMNS: &'static [&'static str] =
        &["TASK", "NODE", "STATE", "CODE", "ACTOR", "ACCEPTED", "COMMAND"];

    fn cells(&self) -> Vec<String> {
        // The end of an id tells tasks apart; the beginning is a time.
        let short = self.task_id.get(self.task_id.len().saturating_sub(12)..).unwrap_or_default();
        let code = match (&self.end, self.verdict) {
            (Some(End { exit_code: Some(code), .. }), _) => code.to_string(),
            (_, Some(verdict)) => verdict.to_owned(),
            _ => String::new(),
        };
        let command: String = self.command.chars().take(60).collect();
        vec![
            short.to_owned(),
            self.node.clone(),
            self.state.to_owned(),
            code,
            self.actor.clone(),
            time(self.accepted_at_ms),
            command,
        ]
    }
}

fn time(ms: i64) -> String {
    match jiff::Timestamp::from_millisecond(ms) {
        Ok(time) if ms != 0 => format!("{time:.0}"),
        _ => String::new(),
    }
}

/// Everything about a task, for people.
pub(super) fn lines(info: &v1::TaskInfo) -> Vec<(&'static str, String)> {
    let row = TaskRow::from(info);
    let mut lines = vec![
        ("task", row.task_id),
        ("node", format!("{} ({})", row.node, row.node_id)),
        ("actor", row.actor),
        ("command", row.command),
        ("workspace", row.workspace),
        ("mode", row.mode.to_owned()),
        ("state", row.state.to_owned()),
        ("accepted", time(row.accepted_at_ms)),
        ("started", time(row.started_at_ms)),
        ("ended", time(row.ended_at_ms)),
        ("detached", if row.detached { "yes".to_owned() } else { String::new() }),
        ("key", row.idempotency_key),
        ("repeats", row.retry_of),
        ("reason", row.reason),
    ];
    if let Some(end) = &row.end {
        lines.push(("verdict", said(end)));
        lines.push(("hint", end.hint.clone()));
        let (out, err) = (end.stdout_bytes, end.stderr_bytes);
        let far = if end.duration_ms.is_some() { "" } else { ", as far as it came to the hub" };
        lines.push(("output", format!("{out} bytes, and {err} of errors{far}")));
    }
    if row.cancel_pending {
        let wanted = "wanted; the node has not said yet that the command has ended";
        lines.push(("cancel", wanted.to_owned()));
    }
    if let Some(late) = &row.late_outcome {
        let at = time(row.late_outcome_at_ms);
        lines.push(("late outcome", format!("{}, learnt at {at}", said(late))));
    }
    lines.retain(|(_, value)| !value.is_empty());
    lines
}

fn said(end: &End) -> String {
    let mut said = end.verdict.to_owned();
    match (end.exit_code, end.signal) {
        (Some(code), _) => said.push_str(&format!(" (exit code {code})")),
        (None, 0) => {}
        (None, signal) => said.push_str(&format!(" (signal {signal})")),
    }
    if let Some(took) = end.duration_ms.map(std::time::Duration::from_millis) {
        said.push_str(&format!(" after {took:?}"));
    }
    said
}
