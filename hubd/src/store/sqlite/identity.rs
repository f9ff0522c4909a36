//! Certificates of nodes, copies of their identities, and the authorities that sign.

use cortex_shared::ids::NodeId;
use rusqlite::{Connection, OptionalExtension as _, params};
use serde_json::json;

use super::super::{
    CaState, CloneSuspicion, NewAudit, Node, Presented, RenewOutcome, RenewRefusal, Renewal,
    RenewalProof, StoreError,
};
use super::{audit, from_json, nodes, to_json};

pub(super) fn renew(t: &Connection, renewal: &Renewal) -> Result<RenewOutcome, StoreError> {
    let Renewal { key, generation, machine, now_ms, .. } = renewal;
    let Some(mut node) = nodes::get(t, renewal.node.as_bytes())?.filter(|node| node.key == *key)
    else {
        return Ok(Err(RenewRefusal::Unknown));
    };
    if node.revoked_at_ms.is_some() {
        return Ok(Err(RenewRefusal::Revoked));
    }
    if let RenewalProof::Key { window_ms } = renewal.proof {
        // A node that was seen had a valid certificate then, whatever the record of it says.
        let ended = node.certificate.not_after_ms.max(node.last_seen_ms).max(node.joined_at_ms);
        if ended.saturating_add(window_ms) < *now_ms {
            return Ok(Err(RenewRefusal::TooLate));
        }
    }
    let state = &mut node.certificate;
    match state.judge(*generation, machine) {
        Presented::Newest | Presented::Ahead => {
            state.generation = generation + 1;
            state.connected = false;
        }
        // The same one again, so that any number of lost answers leaves it one behind at most.
        Presented::MissedAnswer => {}
        Presented::Overtaken => {
            let suspicion = CloneSuspicion {
                at_ms: *now_ms,
                address: renewal.address.clone(),
                machine: machine.clone(),
                presented_generation: *generation,
                current_generation: state.generation,
            };
            record_suspicion(t, &node, &suspicion)?;
            return Ok(Err(RenewRefusal::Cloned {
                name: node.name,
                suspicion: Box::new(suspicion),
                holder: node.machine,
            }));
        }
    }
    state.boot_id = machine.boot_id.clone();
    state.not_after_ms = renewal.certificate.not_after_ms;
    state.authority = renewal.certificate.authority;
    node.machine = machine.clone();
    nodes::certify(t, &node)?;
    let action = match renewal.proof {
        RenewalProof::Certificate => "node.renewed",
        RenewalProof::Key { .. } => "node.recovered",
    };
    let detail = json!({
        "node_id": node.id.to_string(),
        "generation": node.certificate.generation,
        "not_after_ms": node.certificate.not_after_ms,
        "address": renewal.address,
        "machine": machine,
    });
    let line = NewAudit {
        at_ms: *now_ms,
        actor: format!("node:{}", node.name),
        action,
        target: node.name.clone(),
        detail: detail.to_string(),
    };
    audit::append(t, &line)?;
    Ok(Ok(node))
}

pub(super) fn suspect_clone(
    t: &Connection,
    id: NodeId,
    suspicion: &CloneSuspicion,
) -> Result<(), StoreError> {
    match nodes::get(t, id.as_bytes())? {
        Some(node) => record_suspicion(t, &node, suspicion),
        None => Err(StoreError::NotFound { what: "node", name: id.to_string() }),
    }
}

fn record_suspicion(
    t: &Connection,
    node: &Node,
    suspicion: &CloneSuspicion,
) -> Result<(), StoreError> {
    if node.clone.as_ref().is_some_and(|earlier| suspicion.repeats(earlier)) {
        return Ok(());
    }
    t.execute(
        "UPDATE nodes SET clone = ?2 WHERE id = ?1",
        params![node.id.as_bytes().as_slice(), to_json(suspicion)?],
    )?;
    let detail = json!({
        "node_id": node.id.to_string(),
        "refused": suspicion,
        "kept": { "machine": node.machine, "generation": node.certificate.generation },
    });
    let line = NewAudit {
        at_ms: suspicion.at_ms,
        actor: "hub".to_owned(),
        action: "node.clone_suspected",
        target: node.name.clone(),
        detail: detail.to_string(),
    };
    audit::append(t, &line)
}

pub(in crate::store) fn ca_state(connection: &Connection) -> Result<Option<CaState>, StoreError> {
    let text: Option<Vec<u8>> = connection
        .query_row("SELECT value FROM meta WHERE key = 'ca'", [], |row| row.get(0))
        .optional()?;
    let parse =
        |bytes: Vec<u8>| from_json(&String::from_utf8_lossy(&bytes), "state of the authority");
    text.map(parse).transpose()
}

pub(super) fn set_ca_state(
    t: &Connection,
    state: &CaState,
    new: Option<&NewAudit>,
) -> Result<(), StoreError> {
    t.execute(
        "INSERT INTO meta VALUES ('ca', ?1) ON CONFLICT (key) DO UPDATE SET value = ?1",
        [to_json(state)?.as_bytes()],
    )?;
    new.map_or(Ok(()), |new| audit::append(t, new))
}
