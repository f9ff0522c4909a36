//! What the API shows and takes, in JSON. Field names are those of the command line's `-o json`; times are
//! milliseconds since the Unix epoch, absent for never.

mod event;
mod node;
mod task;
mod workspace;

use std::collections::BTreeMap;

use cortex_proto::v1;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub(in crate::http) use self::event::News;
pub(in crate::http) use self::node::{Network, Node, Nodes, Policy};
pub(in crate::http) use self::task::{
    Accepted, Cancel, Command, History, HistoryPiece, Interruption, OutputPiece, Stream, Task,
    TaskNews, TaskOutput, TaskState, Tasks,
};
pub(in crate::http) use self::workspace::{
    Change, Changes, Conflict, Conflicts, Workspace, WorkspaceDetails, Workspaces,
};

/// A code for a session.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::http) struct Login {
    /// From a login link: what stands behind its `#`.
    pub(in crate::http) code: String,
    /// Whether the session's secret is to be in the answer, for `Authorization: Bearer`, instead of in a
    /// cookie.
    #[serde(default)]
    pub(in crate::http) bearer: bool,
}

/// Who is logged in.
#[derive(Serialize, JsonSchema)]
pub(in crate::http) struct Session {
    pub(in crate::http) name: String,
    /// viewer, agent-token, operator or admin.
    pub(in crate::http) role: String,
    /// Labels that nodes must have for this operator to see them; empty for all nodes.
    pub(in crate::http) scope: BTreeMap<String, String>,
    pub(in crate::http) mesh_id: String,
    /// When this login ends at the latest.
    pub(in crate::http) expires_at_ms: Option<i64>,
    /// For `Authorization: Bearer`; only in the answer to a login that asked for it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(in crate::http) token: Option<String>,
}

/// It is done.
#[derive(Serialize, JsonSchema)]
pub(in crate::http) struct Done {
    pub(in crate::http) done: bool,
}

/// The hub and what it does, as far as the caller sees it.
#[derive(Serialize, JsonSchema)]
pub(in crate::http) struct Hub {
    version: String,
    mesh_id: String,
    started_at_ms: i64,
    nodes_known: u32,
    nodes_online: u32,
    running_tasks: u32,
    workspaces: u32,
    /// What nodes and operators dial.
    grpc_address: String,
}

impl Hub {
    pub(in crate::http) fn of(status: v1::HubStatusResponse) -> Self {
        Self {
            version: status.version,
            mesh_id: status.mesh_id,
            started_at_ms: status.started_at_ms,
            nodes_known: status.nodes_known,
            nodes_online: status.nodes_online,
            running_tasks: status.running_tasks,
            workspaces: status.workspaces,
            grpc_address: status.grpc_address,
        }
    }
}

/// A time, or nothing for 0.
fn time(ms: i64) -> Option<i64> {
    (ms != 0).then_some(ms)
}

fn some(text: String) -> Option<String> {
    (!text.is_empty()).then_some(text)
}

/// An id as it is written.
fn id(bytes: &[u8]) -> String {
    uuid::Uuid::from_slice(bytes).map(|id| id.to_string()).unwrap_or_default()
}

/// A path for people: what is not UTF-8 in it is replaced.
fn path(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
