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

/// Returns whether the node was not a member before.
pub(super) fn attach(
    t: &Connection,
    workspace: WorkspaceId,
    node: NodeId,
    now_ms: i64,
) -> Result<bool, StoreError> {
    let changed = t.execute(
        "INSERT INTO members VALUES (?,?,?) ON CONFLICT DO NOTHING",
        params![workspace.as_bytes().as_slice(), node.as_bytes().as_slice(), now_ms],
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
