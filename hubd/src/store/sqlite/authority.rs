//! Changes of authority, each in one transaction with its line in the audit log.

use std::collections::BTreeSet;

use cortex_shared::ids::{NodeId, TaskId};
use cortex_shared::labels::{Labels, MAX_LABELS};
use rusqlite::{Connection, OptionalExtension as _, Row, ToSql, params};

use super::super::{
    LabelChange, LabelRefusal, NewAudit, NodePolicy, OperatorRecord, Scope, StoreError,
};
use super::{audit, damaged, from_json, is_duplicate, tasks, to_json};

/// A change of one node's row; [`StoreError::NotFound`] if there is none.
fn update_node(
    t: &Connection,
    id: NodeId,
    set: &str,
    value: &[&dyn ToSql],
    audit: &NewAudit,
) -> Result<(), StoreError> {
    let bytes = id.as_bytes().as_slice();
    let mut values: Vec<&dyn ToSql> = vec![&bytes];
    values.extend_from_slice(value);
    let changed = t
        .prepare_cached(&format!("UPDATE nodes SET {set} WHERE id = ?1"))?
        .execute(values.as_slice())?;
    if changed == 0 {
        return Err(unknown_node(id));
    }
    audit::append(t, audit)
}

fn unknown_node(id: NodeId) -> StoreError {
    StoreError::NotFound { what: "node", name: id.to_string() }
}

pub(super) fn revoke_node(
    t: &Connection,
    id: NodeId,
    now_ms: i64,
    audit: &NewAudit,
) -> Result<(), StoreError> {
    let revoked: Option<Option<i64>> = t
        .query_row("SELECT revoked_at FROM nodes WHERE id = ?", [id.as_bytes().as_slice()], |row| {
            row.get(0)
        })
        .optional()?;
    match revoked {
        None => Err(unknown_node(id)),
        Some(Some(_)) => Ok(()),
        Some(None) => update_node(t, id, "revoked_at = ?2", &[&now_ms], audit),
    }
}

pub(super) fn forget_node(t: &Connection, id: NodeId, audit: &NewAudit) -> Result<(), StoreError> {
    let bytes = id.as_bytes().as_slice();
    t.execute("DELETE FROM members WHERE node = ?", [bytes])?;
    // The result that a repeated request would find is gone with the node.
    t.execute("DELETE FROM invite_uses WHERE result = ?", [bytes])?;
    if t.execute("DELETE FROM nodes WHERE id = ?", [bytes])? == 0 {
        return Err(unknown_node(id));
    }
    audit::append(t, audit)
}

pub(super) fn label_node(
    t: &Connection,
    id: NodeId,
    change: LabelChange,
    audit: &NewAudit,
) -> Result<Result<Labels, LabelRefusal>, StoreError> {
    let stored: Option<String> = t
        .query_row("SELECT labels FROM nodes WHERE id = ?", [id.as_bytes().as_slice()], |row| {
            row.get(0)
        })
        .optional()?;
    let mut labels: Labels = from_json(&stored.ok_or_else(|| unknown_node(id))?, "labels")?;
    if !change.may_change_scopes {
        let protected = scope_keys(t, audit.at_ms)?;
        let mut touched = change.set.keys().chain(&change.remove);
        if let Some(key) = touched.find(|key| protected.contains(*key)) {
            return Ok(Err(LabelRefusal::Protected { key: key.clone() }));
        }
    }
    labels.retain(|key, _| !change.remove.contains(key));
    labels.extend(change.set);
    if labels.len() > MAX_LABELS {
        return Ok(Err(LabelRefusal::TooMany));
    }
    update_node(t, id, "labels = ?2", &[&to_json(&labels)?], audit)?;
    Ok(Ok(labels))
}

/// The keys that decide what some operator may command: those of operators, and of invites that may
/// still become one.
fn scope_keys(t: &Connection, now_ms: i64) -> Result<BTreeSet<String>, StoreError> {
    let mut statement = t.prepare_cached(
        "SELECT scope FROM operators WHERE revoked_at IS NULL UNION ALL SELECT scope FROM invites \
         WHERE kind <> 'node' AND revoked_at IS NULL AND uses < max_uses AND expires_at > ?",
    )?;
    let mut keys = BTreeSet::new();
    let mut rows = statement.query([now_ms])?;
    while let Some(row) = rows.next()? {
        let scope: Scope = from_json(&row.get::<_, String>(0)?, "scope")?;
        keys.extend(scope.0.into_keys());
    }
    Ok(keys)
}

pub(super) fn rename_node(
    t: &Connection,
    id: NodeId,
    name: &str,
    audit: &NewAudit,
) -> Result<(), StoreError> {
    update_node(t, id, "name = ?2", &[&name], audit).map_err(|error| match error {
        StoreError::Database(super::DatabaseError::Sqlite(error)) if is_duplicate(&error) => {
            StoreError::Exists { what: "node", name: name.to_owned() }
        }
        error => error,
    })
}

pub(super) fn cordon_node(
    t: &Connection,
    id: NodeId,
    cordoned: bool,
    audit: &NewAudit,
) -> Result<(), StoreError> {
    update_node(t, id, "cordoned = ?2", &[&cordoned], audit)
}

pub(super) fn set_node_policy(
    t: &Connection,
    id: NodeId,
    policy: &NodePolicy,
    audit: &NewAudit,
) -> Result<(), StoreError> {
    let set = "policy = ?2, policy_until = ?3, policy_reason = ?4, policy_network = ?5";
    let (mode, network) = (policy.bound.mode.to_string(), policy.bound.network.to_string());
    update_node(t, id, set, &[&mode, &policy.until_ms, &policy.reason, &network], audit)
}

fn read_operator(row: &Row<'_>) -> Result<OperatorRecord, StoreError> {
    Ok(OperatorRecord {
        name: row.get(0)?,
        role: row.get::<_, String>(1)?.parse().map_err(|_| damaged("role"))?,
        scope: from_json(&row.get::<_, String>(2)?, "scope")?,
        key: row.get(3)?,
        created_at_ms: row.get(4)?,
        revoked_at_ms: row.get(5)?,
    })
}

pub(super) fn operators(connection: &Connection) -> Result<Vec<OperatorRecord>, StoreError> {
    let mut statement = connection.prepare(
        "SELECT name, role, scope, key, created_at, revoked_at FROM operators ORDER BY name",
    )?;
    statement.query_and_then([], read_operator)?.collect()
}

pub(super) fn revoke_operator(
    t: &Connection,
    name: &str,
    now_ms: i64,
    audit: &NewAudit,
) -> Result<Vec<(TaskId, NodeId)>, StoreError> {
    let known: bool = t
        .prepare("SELECT 1 FROM operators WHERE name = ?1 UNION SELECT 1 FROM invites WHERE kind <> 'node' AND name_pattern = ?1")?
        .exists([name])?;
    if !known {
        return Err(StoreError::NotFound { what: "operator", name: name.to_owned() });
    }
    let operator = t.execute(
        "UPDATE operators SET revoked_at = ?2 WHERE name = ?1 AND revoked_at IS NULL",
        params![name, now_ms],
    )?;
    // An invite in its name, used or not, would lift the revocation again.
    let invites = t.execute(
        "UPDATE invites SET revoked_at = ?2 \
         WHERE kind <> 'node' AND name_pattern = ?1 AND revoked_at IS NULL",
        params![name, now_ms],
    )?;
    if operator + invites > 0 {
        audit::append(t, audit)?;
    }
    tasks::want_cancel_of(t, name)
}
