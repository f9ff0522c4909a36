//! The calls of the Operator service about workspaces: which there are, and who has them.

use std::sync::Arc;

use cortex_proto::v1;
use cortex_shared::ids::NodeId;
use futures_util::stream;
use tonic::{Code, Status};

use super::auth::AdmittedOperator;
use super::convert;
use super::detached::run_to_end;
use super::listing::watch;
use super::operator::{BoxStream, OperatorService};
use super::status::{from_naming, from_store, internal, refuse, with_hint};
use crate::node::registry::Registry;
use crate::store::Workspace;

/// Whether a caller sees a workspace: one that has a member within its scope. One without members has
/// content nevertheless, or will have some; it is for the scope it was made in.
pub(super) fn sees(registry: &Registry, workspace: &Workspace, caller: &AdmittedOperator) -> bool {
    caller.scope.is_everything()
        || (workspace.members.is_empty() && workspace.scope == caller.scope)
        || workspace.members.iter().any(|node| sees_node(registry, *node, caller))
}

fn sees_node(registry: &Registry, node: NodeId, caller: &AdmittedOperator) -> bool {
    registry.get(node).is_some_and(|view| caller.sees(&view.node))
}

/// The workspaces that a caller sees.
pub(super) fn visible(service: &OperatorService, caller: &AdmittedOperator) -> Vec<Workspace> {
    let mut workspaces = service.members.membership.all();
    workspaces.retain(|workspace| sees(&service.registry, workspace, caller));
    workspaces
}

/// The workspace of this name, of those that the caller sees.
pub(super) fn find(
    service: &OperatorService,
    name: &str,
    caller: &AdmittedOperator,
) -> Result<Workspace, Status> {
    let found = service.members.membership.by_name(name);
    found
        .filter(|workspace| sees(&service.registry, workspace, caller))
        .ok_or_else(|| not_found(name))
}

fn not_found(name: &str) -> Status {
    let text = format!("there is no workspace {name:?}");
    with_hint(
        refuse(Code::NotFound, "workspace_not_found", text),
        &format!("make it: cortex-agent workspace create {name}"),
    )
}

/// Refuses a caller whose scope does not hold all members, in words of what it wanted to do.
pub(super) fn whole(
    service: &OperatorService,
    workspace: &Workspace,
    operator: &AdmittedOperator,
    wanted: &str,
    detail: serde_json::Value,
) -> Result<(), Status> {
    if operator.scope.is_everything()
        || workspace.members.iter().all(|node| sees_node(&service.registry, *node, operator))
    {
        return Ok(());
    }
    let action = if wanted.starts_with("attach") {
        "workspace.attach_refused"
    } else {
        "workspace.change_refused"
    };
    service.refusals.record(&operator.actor(), action, &workspace.name, detail);
    let text = format!("this operator cannot {wanted} {:?}", workspace.name);
    Err(refuse(Code::PermissionDenied, "scope_too_narrow", text))
}

/// The same for what concerns the workspace as such.
pub(super) fn find_whole(
    service: &OperatorService,
    name: &str,
    operator: &AdmittedOperator,
    wanted: &str,
) -> Result<Workspace, Status> {
    let workspace = find(service, name, operator)?;
    let detail = serde_json::json!({ "reason": "scope_too_narrow", "wanted": wanted });
    whole(service, &workspace, operator, wanted, detail)?;
    Ok(workspace)
}

pub(super) async fn describe(
    service: &OperatorService,
    workspace: &Workspace,
    caller: &AdmittedOperator,
) -> Result<v1::WorkspaceInfo, Status> {
    service.members.describe(workspace, &caller.scope).await.map_err(|error| internal(&error))
}

pub(super) async fn create(
    service: &OperatorService,
    operator: &AdmittedOperator,
    request: v1::CreateWorkspaceRequest,
) -> Result<v1::WorkspaceInfo, Status> {
    let name = convert::name(request.name)?;
    let (members, by) = (Arc::clone(&service.members), operator.actor());
    let scope = operator.scope.clone();
    let create = async move { members.create(&name, scope, &by).await };
    let workspace = run_to_end(&service.scope, "workspace", create).await?;
    let workspace = workspace.map_err(|error| from_naming(error, &operator.scope))?;
    describe(service, &workspace, operator).await
}

pub(super) async fn list(
    service: &OperatorService,
    operator: &AdmittedOperator,
) -> Result<v1::ListWorkspacesResponse, Status> {
    let mut workspaces = Vec::new();
    for workspace in visible(service, operator) {
        workspaces.push(describe(service, &workspace, operator).await?);
    }
    Ok(v1::ListWorkspacesResponse { workspaces })
}

pub(super) async fn attach(
    service: &OperatorService,
    operator: &AdmittedOperator,
    request: v1::AttachWorkspaceRequest,
) -> Result<v1::AttachWorkspaceResponse, Status> {
    let workspace = find(service, &request.workspace, operator)?;
    let node = service.node(&request.node, operator)?.node;
    let (members, by) = (Arc::clone(&service.members), operator.actor());
    let (id, node_id) = (workspace.id, node.id);
    let (registry, caller) = (Arc::clone(&service.registry), operator.clone());
    // A workspace that reaches beyond the scope would be read through a node within it. Looked at when it
    // is this order's turn: others may come before it.
    let allowed = move |workspace: &Workspace| {
        caller.scope.is_everything()
            || (sees_node(&registry, node_id, &caller)
                && workspace.members.iter().all(|node| sees_node(&registry, *node, &caller)))
    };
    let attach = async move { members.attach(id, node_id, &by, allowed).await };
    if !run_to_end(&service.scope, "workspace", attach).await?.map_err(from_store)? {
        let detail = serde_json::json!({ "reason": "scope_too_narrow", "node": node.name });
        let actor = operator.actor();
        service.refusals.record(&actor, "workspace.attach_refused", &workspace.name, detail);
        let text = format!("this operator cannot attach nodes to {:?}", workspace.name);
        return Err(refuse(Code::PermissionDenied, "scope_too_narrow", text));
    }
    Ok(v1::AttachWorkspaceResponse {
        workspace_id: workspace.id.as_bytes().to_vec().into(),
        node_id: node.id.as_bytes().to_vec().into(),
    })
}

pub(super) async fn detach(
    service: &OperatorService,
    operator: &AdmittedOperator,
    request: v1::DetachWorkspaceRequest,
) -> Result<v1::DetachWorkspaceResponse, Status> {
    let workspace = find(service, &request.workspace, operator)?;
    let node = service.node(&request.node, operator)?.node;
    let (members, by) = (Arc::clone(&service.members), operator.actor());
    let detach = async move { members.detach(workspace.id, node.id, &by).await };
    run_to_end(&service.scope, "workspace", detach).await?.map_err(from_store)?;
    Ok(v1::DetachWorkspaceResponse {})
}

pub(super) async fn delete(
    service: &OperatorService,
    operator: &AdmittedOperator,
    request: v1::DeleteWorkspaceRequest,
) -> Result<v1::DeleteWorkspaceResponse, Status> {
    let workspace = find_whole(service, &request.workspace, operator, "delete")?;
    let (members, by) = (Arc::clone(&service.members), operator.actor());
    let delete = async move { members.delete(&workspace, &by).await };
    run_to_end(&service.scope, "workspace", delete).await?.map_err(from_store)?;
    Ok(v1::DeleteWorkspaceResponse {})
}

pub(super) async fn status(
    service: &OperatorService,
    operator: &AdmittedOperator,
    request: v1::WorkspaceStatusRequest,
) -> Result<BoxStream<v1::WorkspaceStatusResponse>, Status> {
    let workspace = find(service, &request.workspace, operator)?;
    if !request.watch {
        let info = describe(service, &workspace, operator).await?;
        let response = v1::WorkspaceStatusResponse { workspace: Some(info) };
        return Ok(Box::pin(stream::once(async { Ok(response) })));
    }
    let changes = service.registry.changes();
    let (members, registry) = (Arc::clone(&service.members), Arc::clone(&service.registry));
    let caller = operator.clone();
    let stream = watch(&service.scope, changes, move || {
        // It may have left the caller's scope meanwhile.
        let now = members.membership.get(workspace.id);
        let now = now.filter(|workspace| sees(&registry, workspace, &caller));
        let now = now.ok_or_else(|| not_found(&workspace.name));
        let (members, scope) = (Arc::clone(&members), caller.scope.clone());
        async move {
            let info = members.describe(&now?, &scope).await;
            let info = info.map_err(|error| internal(&error))?;
            Ok(v1::WorkspaceStatusResponse { workspace: Some(info) })
        }
    });
    Ok(stream)
}

pub(super) async fn conflicts(
    service: &OperatorService,
    operator: &AdmittedOperator,
    request: v1::ListConflictsRequest,
) -> Result<v1::ListConflictsResponse, Status> {
    let workspace = find(service, &request.workspace, operator)?;
    let conflicts = service.content.conflicts(workspace.id).await;
    let conflicts = conflicts
        .map_err(|error| internal(&error))?
        .into_iter()
        .map(|conflict| v1::ConflictInfo {
            path: conflict.path.as_bytes().to_vec().into(),
            copy: conflict.copy.as_bytes().to_vec().into(),
            node_id: conflict
                .author
                .node()
                .map(|node| node.as_bytes().to_vec().into())
                .unwrap_or_default(),
            node_name: conflict
                .author
                .node()
                .and_then(|node| service.registry.get(node))
                .filter(|view| operator.sees(&view.node))
                .map(|view| view.node.name)
                .unwrap_or_default(),
            at_ms: conflict.at_ms,
        })
        .collect();
    Ok(v1::ListConflictsResponse { conflicts })
}

pub(super) async fn confirm_deletes(
    service: &OperatorService,
    operator: &AdmittedOperator,
    request: v1::ConfirmDeletesRequest,
) -> Result<v1::ConfirmDeletesResponse, Status> {
    let workspace = find(service, &request.workspace, operator)?;
    let only = match request.node.as_str() {
        "" => None,
        node => Some(service.node(node, operator)?.node.id),
    };
    let mut holding =
        service.members.holding(&workspace).await.map_err(|error| internal(&error))?;
    holding.retain(|(node, _)| {
        only.is_none_or(|only| *node == only) && sees_node(&service.registry, *node, operator)
    });
    let (members, by, nodes) = (Arc::clone(&service.members), operator.actor(), holding.clone());
    let confirm = async move { members.confirm_deletes(workspace.id, &nodes, &by).await };
    run_to_end(&service.scope, "workspace", confirm).await?.map_err(|error| internal(&error))?;
    let name = |node: NodeId| service.registry.get(node).map(|view| view.node.name);
    Ok(v1::ConfirmDeletesResponse {
        nodes: holding.iter().filter_map(|(node, _)| name(*node)).collect(),
    })
}
