//! Paths that were changed in two places at once, and which side stays.

use std::ffi::OsStr;

use clap::ValueEnum;
use cortex_proto::v1;
use cortex_shared::ids::NodeId;
use serde::Serialize;

use super::lossy;
use super::past::wire_path;
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

/// Which side of a conflict stays.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Keep {
    /// The version that has the name; the copy is deleted.
    Theirs,
    /// The copy, which takes the name.
    Mine,
    /// Both, as two files.
    Both,
}

#[derive(Serialize)]
struct ResolvedJson {
    workspace: String,
    /// The copies that are settled.
    copies: Vec<String>,
}

/// `workspace resolve`.
pub(super) async fn resolve(
    global: &Global,
    workspace: String,
    path: &OsStr,
    keep: Keep,
    output: Output,
) -> Result<(), CliError> {
    let mut client = hub::operator(global).await?;
    let side = match keep {
        Keep::Theirs => v1::KeepSide::Theirs,
        Keep::Mine => v1::KeepSide::Mine,
        Keep::Both => v1::KeepSide::Both,
    };
    let request = v1::ResolveConflictRequest {
        workspace: workspace.clone(),
        path: wire_path(path),
        keep: side.into(),
    };
    let answer = client.resolve_conflict(hub::question(request)).await?.into_inner();
    let copies: Vec<String> = answer.copies.iter().map(|copy| lossy(copy)).collect();
    let settled = copies.join(", ");
    let sentence = match keep {
        Keep::Theirs => format!("deleted {settled}"),
        Keep::Mine => format!("{settled} took the name"),
        Keep::Both => format!("{settled} stays as a file of its own"),
    };
    global.printer(output).say(&sentence, &ResolvedJson { workspace, copies })
}
