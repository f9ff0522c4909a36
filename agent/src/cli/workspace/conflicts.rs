//! Paths that were changed in two places at once.

use cortex_proto::v1;
use cortex_shared::ids::NodeId;
use serde::Serialize;

use super::lossy;
use crate::cli::error::CliError;
use crate::cli::printer::{self, Row};
use crate::cli::{Global, Output, hub};

#[derive(Serialize)]
struct ConflictRow {
    path: String,
    copy: String,
    node_id: String,
    node_name: String,
    at_ms: i64,
}

impl Row for ConflictRow {
    const COLUMNS: &'static [&'static str] = &["PATH", "COPY", "NODE", "SINCE"];

    fn cells(&self) -> Vec<String> {
        vec![
            self.path.clone(),
            self.copy.clone(),
            self.node_name.clone(),
            printer::time(self.at_ms),
        ]
    }
}

/// `workspace conflicts`.
pub(super) async fn list(global: &Global, name: String, output: Output) -> Result<(), CliError> {
    let mut client = hub::operator(global).await?;
    let request = v1::ListConflictsRequest { workspace: name };
    let answer = client.list_conflicts(hub::question(request)).await?.into_inner();
    let rows: Vec<ConflictRow> = answer
        .conflicts
        .into_iter()
        .map(|conflict| ConflictRow {
            path: lossy(&conflict.path),
            copy: lossy(&conflict.copy),
            node_id: NodeId::from_slice(&conflict.node_id)
                .map(|id| id.to_string())
                .unwrap_or_default(),
            node_name: conflict.node_name,
            at_ms: conflict.at_ms,
        })
        .collect();
    global.printer(output).list(&rows)
}
