//! Workspaces, their members, conflicts and past.

use cortex_proto::v1;
use cortex_proto::v1::operator_server::Operator as _;
use schemars::JsonSchema;
use serde::Deserialize;

use super::{Api, page_size, view};
use crate::http::error::Problem;
use crate::http::routes::{Call, NoQuery};

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::http) struct Cut {
    /// Items of a page: 1 to 1000, 100 unless told otherwise.
    limit: Option<u32>,
    /// `next_cursor` of the page before.
    cursor: Option<String>,
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::http) struct Past {
    /// A path, and everything below it. Without it, all.
    path: Option<String>,
    /// Items of a page: 1 to 1000, 100 unless told otherwise.
    limit: Option<u32>,
    /// `next_cursor` of the page before.
    cursor: Option<u64>,
}

pub(in crate::http) async fn list(
    api: &Api,
    call: &Call,
    cut: Cut,
) -> Result<view::Workspaces, Problem> {
    let limit = usize::try_from(page_size(cut.limit)).unwrap_or(usize::MAX);
    let cursor = cut.cursor.unwrap_or_default();
    let page = api.service.page_of_workspaces(call.caller()?, &cursor, limit).await?;
    let workspaces = page.items.into_iter().map(view::Workspace::of).collect();
    Ok(view::Workspaces { workspaces, next_cursor: page.next })
}

pub(in crate::http) async fn show(
    api: &Api,
    call: &Call,
    _: NoQuery,
) -> Result<view::WorkspaceDetails, Problem> {
    let request = v1::ShowWorkspaceRequest { workspace: call.part("workspace") };
    let shown = api.service.show_workspace(call.request(request)?).await?;
    Ok(view::WorkspaceDetails::of(shown.into_inner()))
}

pub(in crate::http) async fn conflicts(
    api: &Api,
    call: &Call,
    _: NoQuery,
) -> Result<view::Conflicts, Problem> {
    let request = v1::ListConflictsRequest { workspace: call.part("workspace") };
    let found = api.service.list_conflicts(call.request(request)?).await?.into_inner();
    Ok(view::Conflicts { conflicts: found.conflicts.into_iter().map(view::Conflict::of).collect() })
}

pub(in crate::http) async fn log(
    api: &Api,
    call: &Call,
    past: Past,
) -> Result<view::Changes, Problem> {
    let request = v1::WorkspaceLogRequest {
        workspace: call.part("workspace"),
        path: past.path.unwrap_or_default().into_bytes().into(),
        before_seq: past.cursor.unwrap_or_default(),
        limit: page_size(past.limit),
    };
    let log = api.service.workspace_log(call.request(request)?).await?.into_inner();
    let next_cursor = (log.next_before_seq > 0).then_some(log.next_before_seq);
    Ok(view::Changes {
        changes: log.changes.into_iter().map(view::Change::of).collect(),
        next_cursor,
    })
}
