//! Nodes.

use rusqlite::{Connection, Row, params};

use super::super::{Facts, Node, NodePolicy, StoreError};
use super::{damaged, from_json, node_id, to_json};

const COLUMNS: &str = "id, name, labels, key, policy, ceiling, joined_at, last_seen, revoked_at, \
                       hostname, os, arch, agent_version, policy_until, policy_reason, cordoned";

fn read(row: &Row<'_>) -> Result<Node, StoreError> {
    Ok(Node {
        id: node_id(row.get_ref(0)?.as_blob().map_err(|_| damaged("node id"))?)?,
        name: row.get(1)?,
        labels: from_json(&row.get::<_, String>(2)?, "labels")?,
        key: row.get(3)?,
        policy: NodePolicy {
            mode: row.get::<_, String>(4)?.parse().map_err(|_| damaged("policy"))?,
            until_ms: row.get("policy_until")?,
            reason: row.get("policy_reason")?,
        },
        cordoned: row.get("cordoned")?,
        ceiling: row.get::<_, String>(5)?.parse().map_err(|_| damaged("ceiling"))?,
        joined_at_ms: row.get(6)?,
        last_seen_ms: row.get(7)?,
        revoked_at_ms: row.get(8)?,
        facts: Facts {
            hostname: row.get(9)?,
            os: row.get(10)?,
            arch: row.get(11)?,
            agent_version: row.get(12)?,
        },
    })
}

pub(super) fn list(connection: &Connection) -> Result<Vec<Node>, StoreError> {
    let mut statement =
        connection.prepare(&format!("SELECT {COLUMNS} FROM nodes ORDER BY name"))?;
    statement.query_and_then([], read)?.collect()
}

/// The node of this id.
pub(super) fn get(connection: &Connection, id: &[u8]) -> Result<Node, StoreError> {
    let mut statement =
        connection.prepare_cached(&format!("SELECT {COLUMNS} FROM nodes WHERE id = ?"))?;
    let mut rows = statement.query([id])?;
    let row = rows.next()?.ok_or(damaged("invite use"))?;
    read(row)
}

pub(super) fn exists(connection: &Connection, name: &str) -> Result<bool, StoreError> {
    let mut statement = connection.prepare_cached("SELECT 1 FROM nodes WHERE name = ?")?;
    Ok(statement.exists([name])?)
}

pub(super) fn insert(connection: &Connection, node: &Node) -> Result<(), StoreError> {
    connection.execute(
        &format!("INSERT INTO nodes ({COLUMNS}) VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?)"),
        params![
            node.id.as_bytes().as_slice(),
            node.name,
            to_json(&node.labels)?,
            node.key.as_slice(),
            node.policy.mode.to_string(),
            node.ceiling.to_string(),
            node.joined_at_ms,
            node.last_seen_ms,
            node.revoked_at_ms,
            node.facts.hostname,
            node.facts.os,
            node.facts.arch,
            node.facts.agent_version,
            node.policy.until_ms,
            node.policy.reason,
            node.cordoned,
        ],
    )?;
    Ok(())
}

pub(super) fn touch(connection: &Connection, nodes: &[Node]) -> Result<(), StoreError> {
    let mut statement = connection.prepare_cached(
        "UPDATE nodes SET last_seen = max(last_seen, ?2), ceiling = ?3, hostname = ?4, os = ?5, \
         arch = ?6, agent_version = ?7 WHERE id = ?1",
    )?;
    for node in nodes {
        statement.execute(params![
            node.id.as_bytes().as_slice(),
            node.last_seen_ms,
            node.ceiling.to_string(),
            node.facts.hostname,
            node.facts.os,
            node.facts.arch,
            node.facts.agent_version,
        ])?;
    }
    Ok(())
}
