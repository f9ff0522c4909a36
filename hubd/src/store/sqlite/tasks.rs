//! The journal of tasks. Acceptance and end stand in the audit log as well, by the same transaction
//! and so by the same flush.

use cortex_shared::ids::{NodeId, TaskId};
use rusqlite::{Connection, params};
use serde_json::{Value, json};

use super::super::{Actor, NewTask, StoreError, TaskEnd, TaskEndState};
use super::{audit, damaged, node_id};

pub(super) fn accept(t: &Connection, task: &NewTask) -> Result<(), StoreError> {
    t.prepare_cached(
        "INSERT INTO tasks (id, node, actor, command, workspace, mode, state, accepted_at) \
         VALUES (?,?,?,?,?,?,'accepted',?)",
    )?
    .execute(params![
        task.id.as_bytes().as_slice(),
        task.node.as_bytes().as_slice(),
        task.actor.name,
        task.command.text,
        task.workspace,
        task.mode.to_string(),
        task.accepted_at_ms,
    ])?;
    let mut detail = json!({
        "node": task.node_name,
        "node_id": task.node.to_string(),
        "workspace": task.workspace,
        "mode": task.mode.to_string(),
        "role": task.role.to_string(),
    });
    task.command.describe(&mut detail);
    let line = task.actor.audit(task.accepted_at_ms, "task.accepted", task.id.to_string(), detail);
    audit::append(t, &line)
}

/// A verdict is never rewritten: only a task without one takes it.
pub(super) fn end(t: &Connection, id: TaskId, end: &TaskEnd) -> Result<(), StoreError> {
    let mut statement = t.prepare_cached(
        "UPDATE tasks SET state = ?2, verdict = ?3, exit_code = ?4, signal = ?5, reason = ?6, \
         stdout_bytes = ?7, stderr_bytes = ?8, ended_at = ?9 WHERE id = ?1 AND ended_at IS NULL \
         RETURNING actor, node",
    )?;
    let mut rows = statement.query(params![
        id.as_bytes().as_slice(),
        end.state.as_str(),
        end.verdict,
        end.exit_code,
        end.signal,
        end.reason,
        // SQLite's integers are signed; no command writes 8 EiB.
        i64::try_from(end.stdout_bytes).unwrap_or(i64::MAX),
        i64::try_from(end.stderr_bytes).unwrap_or(i64::MAX),
        end.ended_at_ms,
    ])?;
    let Some(row) = rows.next()? else { return Ok(()) };
    let (actor, node) = (row.get::<_, String>(0)?, node_id(&row.get::<_, Vec<u8>>(1)?)?);
    drop(rows);
    let hash = |hash: Option<[u8; 32]>| hash.map(|h| blake3::Hash::from_bytes(h).to_string());
    let mut detail = ended(node, end.verdict, &end.reason);
    detail["exit_code"] = end.exit_code.into();
    detail["signal"] = end.signal.into();
    detail["stdout_bytes"] = end.stdout_bytes.into();
    detail["stdout_hash"] = hash(end.stdout_hash).into();
    detail["stderr_bytes"] = end.stderr_bytes.into();
    detail["stderr_hash"] = hash(end.stderr_hash).into();
    append_end(t, id, &actor, end.ended_at_ms, detail)
}

pub(super) fn end_open(t: &Connection, reason: &str, now_ms: i64) -> Result<u64, StoreError> {
    let mut statement = t.prepare(
        "UPDATE tasks SET state = ?1, verdict = 'stream_lost', reason = ?2, ended_at = ?3 \
         WHERE ended_at IS NULL RETURNING id, actor, node",
    )?;
    // As many as ran when the last hub died: nothing that grows.
    let open = statement
        .query_and_then(params![TaskEndState::Failed.as_str(), reason, now_ms], |row| {
            let id =
                TaskId::from_slice(&row.get::<_, Vec<u8>>(0)?).map_err(|_| damaged("task id"))?;
            Ok((id, row.get::<_, String>(1)?, node_id(&row.get::<_, Vec<u8>>(2)?)?))
        })?
        .collect::<Result<Vec<_>, StoreError>>()?;
    for (id, actor, node) in &open {
        append_end(t, *id, actor, now_ms, ended(*node, "stream_lost", reason))?;
    }
    Ok(open.len() as u64)
}

fn ended(node: NodeId, verdict: &str, reason: &str) -> Value {
    json!({ "node_id": node.to_string(), "verdict": verdict, "reason": reason })
}

fn append_end(
    t: &Connection,
    id: TaskId,
    actor: &str,
    at_ms: i64,
    detail: Value,
) -> Result<(), StoreError> {
    audit::append(t, &Actor::from(actor).audit(at_ms, "task.ended", id.to_string(), detail))
}
