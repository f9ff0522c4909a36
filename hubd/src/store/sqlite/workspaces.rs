//! Workspaces and their members. Their content has databases of its own.

use std::collections::{BTreeMap, BTreeSet};

use cortex_shared::ids::{NodeId, WorkspaceId};
use rusqlite::{Connection, params};

use super::super::{StoreError, Workspace};
use super::{from_json, is_duplicate, node_id, to_json, workspace_id};

pub(super) fn list(connection: &Connection) -> Result<Vec<Workspace>, StoreError> {
    let mut members: BTreeMap<WorkspaceId, BTreeSet<NodeId>> = BTreeMap::new();
    let mut statement = connection.prepare("SELECT workspace, node FROM members")?;
    let mut rows = statement.query([])?;
    while let Some(row) = rows.next()? {
        let workspace = workspace_id(&row.get::<_, Vec<u8>>(0)?)?;
        members.entry(workspace).or_default().insert(node_id(&row.get::<_, Vec<u8>>(1)?)?);
    }
    let mut statement =
        connection.prepare("SELECT id, name, created_at, scope FROM workspaces ORDER BY name")?;
    let workspaces = statement.query_and_then([], |row| {
        let id = workspace_id(&row.get::<_, Vec<u8>>(0)?)?;
        Ok(Workspace {
            id,
            name: row.get(1)?,
            created_at_ms: row.get(2)?,
            scope: from_json(&row.get::<_, String>(3)?, "scope")?,
            members: members.remove(&id).unwrap_or_default(),
        })
    })?;
    workspaces.collect()
}

pub(super) fn of_node(
    connection: &Connection,
    node: NodeId,
) -> Result<BTreeSet<WorkspaceId>, StoreError> {
    let mut statement =
        connection.prepare_cached("SELECT workspace FROM members WHERE node = ?")?;
    let rows = statement.query_and_then([node.as_bytes().as_slice()], |row| {
        workspace_id(&row.get::<_, Vec<u8>>(0)?)
    })?;
    rows.collect()
}

pub(super) fn create(t: &Connection, workspace: &Workspace) -> Result<(), StoreError> {
    t.execute(
        "INSERT INTO workspaces (id, name, created_at, scope) VALUES (?,?,?,?)",
        params![
            workspace.id.as_bytes().as_slice(),
            workspace.name,
            workspace.created_at_ms,
            to_json(&workspace.scope)?
        ],
    )
    .map_err(|error| {
        if is_duplicate(&error) {
            StoreError::Exists { what: "workspace", name: workspace.name.clone() }
        } else {
            error.into()
        }
    })?;
    Ok(())
}

pub(super) fn delete(
    t: &Connection,
    workspace: WorkspaceId,
    now_ms: i64,
) -> Result<(), StoreError> {
    let id = workspace.as_bytes().as_slice();
    t.execute("DELETE FROM members WHERE workspace = ?", [id])?;
    if t.execute("DELETE FROM workspaces WHERE id = ?", [id])? == 0 {
        return Err(StoreError::NotFound { what: "workspace", name: workspace.to_string() });
    }
    t.execute(
        "INSERT INTO deleted_workspaces (id, deleted_at) VALUES (?, ?)",
        params![id, now_ms],
    )?;
    Ok(())
}

pub(super) fn deleted(connection: &Connection) -> Result<Vec<WorkspaceId>, StoreError> {
    let mut statement = connection.prepare_cached("SELECT id FROM deleted_workspaces")?;
    let rows = statement.query_and_then([], |row| workspace_id(&row.get::<_, Vec<u8>>(0)?))?;
    rows.collect()
}

pub(super) fn removed(t: &Connection, workspace: WorkspaceId) -> Result<(), StoreError> {
    t.execute("DELETE FROM deleted_workspaces WHERE id = ?", [workspace.as_bytes().as_slice()])?;
    Ok(())
}

/// Returns whether the node was not a member before. [`StoreError::NotFound`] if there is no such
/// workspace.
pub(super) fn attach(
    t: &Connection,
    workspace: WorkspaceId,
    node: NodeId,
    now_ms: i64,
) -> Result<bool, StoreError> {
    let id = workspace.as_bytes().as_slice();
    if !t.prepare_cached("SELECT 1 FROM workspaces WHERE id = ?")?.exists([id])? {
        return Err(StoreError::NotFound { what: "workspace", name: workspace.to_string() });
    }
    let changed = t.execute(
        "INSERT INTO members VALUES (?,?,?) ON CONFLICT DO NOTHING",
        params![id, node.as_bytes().as_slice(), now_ms],
    )?;
    Ok(changed > 0)
}

/// Returns whether the node was a member.
pub(super) fn detach(
    t: &Connection,
    workspace: WorkspaceId,
    node: NodeId,
) -> Result<bool, StoreError> {
    let changed = t.execute(
        "DELETE FROM members WHERE workspace = ? AND node = ?",
        params![workspace.as_bytes().as_slice(), node.as_bytes().as_slice()],
    )?;
    Ok(changed > 0)
}
