//! Nodes.

use cortex_shared::policy::Bound;
use rusqlite::{Connection, Row, params};

use super::super::{CertificateState, Facts, KeyHash, Node, NodePolicy, StoreError};
use super::{damaged, from_json, node_id, to_json};

fn read(row: &Row<'_>) -> Result<Node, StoreError> {
    let clone: Option<String> = row.get("clone")?;
    Ok(Node {
        id: node_id(row.get_ref("id")?.as_blob().map_err(|_| damaged("node id"))?)?,
        name: row.get("name")?,
        labels: from_json(&row.get::<_, String>("labels")?, "labels")?,
        key: row.get("key")?,
        policy: NodePolicy {
            bound: bound(row, "policy", "policy_network")?,
            until_ms: row.get("policy_until")?,
            reason: row.get("policy_reason")?,
        },
        cordoned: row.get("cordoned")?,
        ceiling: bound(row, "ceiling", "ceiling_network")?,
        joined_at_ms: row.get("joined_at")?,
        last_seen_ms: row.get("last_seen")?,
        revoked_at_ms: row.get("revoked_at")?,
        facts: Facts {
            hostname: row.get("hostname")?,
            os: row.get("os")?,
            arch: row.get("arch")?,
            agent_version: row.get("agent_version")?,
        },
        owner: row.get("owner")?,
        certificate: CertificateState {
            generation: row.get::<_, i64>("generation")?.cast_unsigned(),
            boot_id: row.get("generation_boot_id")?,
            connected: row.get("generation_connected")?,
            not_after_ms: row.get("certificate_not_after")?,
            authority: authority(&row.get::<_, Vec<u8>>("certificate_ca")?)?,
        },
        machine: from_json(&row.get::<_, String>("machine")?, "machine")?,
        clone: clone.map(|text| from_json(&text, "clone suspicion")).transpose()?,
    })
}

fn bound(row: &Row<'_>, mode: &str, network: &'static str) -> Result<Bound, StoreError> {
    Ok(Bound {
        mode: row.get::<_, String>(mode)?.parse().map_err(|_| damaged("mode"))?,
        network: row.get::<_, String>(network)?.parse().map_err(|_| damaged(network))?,
    })
}

/// Empty for a certificate from before authorities were recorded: no authority has this key.
fn authority(bytes: &[u8]) -> Result<KeyHash, StoreError> {
    match bytes {
        [] => Ok(KeyHash::default()),
        bytes => bytes.try_into().map_err(|_| damaged("certificate authority")),
    }
}

pub(super) fn list(connection: &Connection) -> Result<Vec<Node>, StoreError> {
    let mut statement = connection.prepare("SELECT * FROM nodes ORDER BY name")?;
    statement.query_and_then([], read)?.collect()
}

/// The node of this id; `None` if it was forgotten.
pub(super) fn get(connection: &Connection, id: &[u8]) -> Result<Option<Node>, StoreError> {
    let mut statement = connection.prepare_cached("SELECT * FROM nodes WHERE id = ?")?;
    let mut rows = statement.query([id])?;
    rows.next()?.map(read).transpose()
}

pub(super) fn exists(connection: &Connection, name: &str) -> Result<bool, StoreError> {
    let mut statement = connection.prepare_cached("SELECT 1 FROM nodes WHERE name = ?")?;
    Ok(statement.exists([name])?)
}

/// Records a new node, strict and never seen, with its first certificate.
pub(super) fn insert(connection: &Connection, node: &Node) -> Result<(), StoreError> {
    connection.execute(
        "INSERT INTO nodes (id, name, labels, key, policy, ceiling, joined_at, last_seen, \
          hostname, os, arch, agent_version, policy_until, policy_reason, cordoned, owner, \
          policy_network, ceiling_network) \
          VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?)",
        params![
            node.id.as_bytes().as_slice(),
            node.name,
            to_json(&node.labels)?,
            node.key.as_slice(),
            node.policy.bound.mode.to_string(),
            node.ceiling.mode.to_string(),
            node.joined_at_ms,
            node.last_seen_ms,
            node.facts.hostname,
            node.facts.os,
            node.facts.arch,
            node.facts.agent_version,
            node.policy.until_ms,
            node.policy.reason,
            node.cordoned,
            node.owner,
            node.policy.bound.network.to_string(),
            node.ceiling.network.to_string(),
        ],
    )?;
    certify(connection, node)
}

/// Writes the state of a node's certificate, and the machine it was issued to.
pub(super) fn certify(connection: &Connection, node: &Node) -> Result<(), StoreError> {
    let certificate = &node.certificate;
    connection.execute(
        "UPDATE nodes SET generation = ?2, generation_boot_id = ?3, generation_connected = ?4, \
         certificate_not_after = ?5, certificate_ca = ?6, machine = ?7 WHERE id = ?1",
        params![
            node.id.as_bytes().as_slice(),
            certificate.generation.cast_signed(),
            certificate.boot_id,
            certificate.connected,
            certificate.not_after_ms,
            certificate.authority.as_slice(),
            to_json(&node.machine)?,
        ],
    )?;
    Ok(())
}

pub(super) fn touch(connection: &Connection, nodes: &[Node]) -> Result<(), StoreError> {
    // What is in memory may be older than a certificate issued meanwhile, so that what it says of its
    // own generation counts for that one only.
    let mut statement = connection.prepare_cached(
        "UPDATE nodes SET last_seen = max(last_seen, ?2), ceiling = ?3, hostname = ?4, os = ?5, \
         arch = ?6, agent_version = ?7, machine = ?8, generation_connected = \
         CASE WHEN generation = ?9 THEN max(generation_connected, ?10) \
         ELSE generation_connected END, ceiling_network = ?11 WHERE id = ?1",
    )?;
    for node in nodes {
        statement.execute(params![
            node.id.as_bytes().as_slice(),
            node.last_seen_ms,
            node.ceiling.mode.to_string(),
            node.facts.hostname,
            node.facts.os,
            node.facts.arch,
            node.facts.agent_version,
            to_json(&node.machine)?,
            node.certificate.generation.cast_signed(),
            node.certificate.connected,
            node.ceiling.network.to_string(),
        ])?;
    }
    Ok(())
}
