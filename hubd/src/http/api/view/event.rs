//! Events, as the lines of `cortex-agent events -o jsonl`.

use cortex_proto::v1;
use schemars::JsonSchema;
use serde::Serialize;

use super::{id, some};

/// What a stream of events tells.
#[derive(Serialize, JsonSchema)]
#[serde(untagged)]
pub(in crate::http) enum News {
    Event(Event),
    Missed(Missed),
}

/// Something that has happened.
#[derive(Serialize, JsonSchema)]
pub(in crate::http) struct Event {
    /// Later events have higher ones, over restarts of the hub as well. Also the `id` of the stream.
    cursor: u64,
    at_ms: i64,
    /// Such as node.online or task.ended.
    kind: String,
    /// What it is about; names are those of the moment.
    node_id: Option<String>,
    node: Option<String>,
    workspace_id: Option<String>,
    workspace: Option<String>,
    task_id: Option<String>,
    /// Whoever did it, as in the audit log.
    actor: Option<String>,
    /// The particulars, by the kind.
    detail: serde_json::Value,
}

/// Events are not there any more, of which the caller might have heard some.
#[derive(Serialize, JsonSchema)]
pub(in crate::http) struct Missed {
    /// How many; null if that is not known.
    missed: Option<u64>,
    /// The stream goes on after this one.
    cursor: u64,
}

impl News {
    pub(in crate::http) fn of_event(event: v1::EventInfo) -> Self {
        let known = |bytes: &[u8]| some(id(bytes));
        Self::Event(Event {
            cursor: event.cursor,
            at_ms: event.at_ms,
            kind: event.kind,
            node_id: known(&event.node_id),
            node: some(event.node),
            workspace_id: known(&event.workspace_id),
            workspace: some(event.workspace),
            task_id: known(&event.task_id),
            actor: some(event.actor),
            // What is no JSON is shown as the text it is.
            detail: serde_json::from_str(&event.detail_json)
                .unwrap_or(serde_json::Value::String(event.detail_json)),
        })
    }

    pub(in crate::http) fn of_missed(missed: v1::EventsMissed) -> Self {
        Self::Missed(Missed { missed: missed.count, cursor: missed.cursor })
    }
}
