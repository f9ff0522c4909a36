//! The journal of tasks. Acceptance and end stand in the audit log as well, by the same transaction
//! and so by the same flush.

use cortex_shared::ids::{NodeId, TaskId};
use cortex_shared::policy::{Mode, Role};
use rusqlite::{Connection, OptionalExtension as _, Row, params};
use serde_json::{Value, json};

use super::super::{
    Acceptance, Actor, LateReport, NewTask, StoreError, TaskEnd, TaskEndState, TaskQuery,
    TaskRecord, Verdict,
};
use super::{audit, damaged, from_json, node_id, to_json};

/// The columns of a record, in the order that [`record`] reads them.
const COLUMNS: &str = "id, node, node_name, actor, role, command, workspace, mode, detached, retry_of, \
     idempotency_key, accepted_at, verdict, exit_code, signal, reason, hint, stdout_bytes, \
     stderr_bytes, stdout_hash, stderr_hash, duration_ms, started_at, ended_at, late_outcome, \
     cancel_wanted";

pub(super) fn accept(t: &Connection, task: &NewTask) -> Result<Acceptance, StoreError> {
    if let Some(key) = &task.key {
        let known = t
            .prepare_cached(
                "SELECT id, request_hash FROM tasks WHERE actor = ? AND idempotency_key = ?",
            )?
            .query_row(params![task.actor.name, key.key], |row| {
                Ok((row.get::<_, Vec<u8>>(0)?, row.get::<_, Vec<u8>>(1)?))
            })
            .optional()?;
        if let Some((id, hash)) = known {
            let id = task_id(&id)?;
            let same = hash == key.request_hash;
            return Ok(if same { Acceptance::Known(id) } else { Acceptance::KeyReused(id) });
        }
    }
    t.prepare_cached(
        "INSERT INTO tasks (id, node, actor, command, workspace, mode, state, accepted_at, node_name, \
         role, detached, spec, retry_of, idempotency_key, request_hash) \
         VALUES (?,?,?,?,?,?,'accepted',?,?,?,?,?,?,?,?)",
    )?
    .execute(params![
        task.id.as_bytes().as_slice(),
        task.node.as_bytes().as_slice(),
        task.actor.name,
        task.command.text,
        task.workspace,
        task.mode.to_string(),
        task.accepted_at_ms,
        task.node_name,
        task.role.to_string(),
        task.detached,
        task.spec,
        task.retry_of.map(|id| id.as_bytes().to_vec()),
        task.key.as_ref().map(|key| &key.key),
        task.key.as_ref().map(|key| key.request_hash.as_slice()),
    ])?;
    let mut detail = json!({
        "node": task.node_name,
        "node_id": task.node.to_string(),
        "workspace": task.workspace,
        "mode": task.mode.to_string(),
        "role": task.role.to_string(),
    });
    task.command.describe(&mut detail);
    if let Some(id) = task.retry_of {
        detail["retry_of"] = id.to_string().into();
    }
    let line = task.actor.audit(task.accepted_at_ms, "task.accepted", task.id.to_string(), detail);
    audit::append(t, &line)?;
    Ok(Acceptance::New)
}

/// A verdict is never rewritten: only a task without one takes it.
pub(super) fn end(t: &Connection, id: TaskId, end: &TaskEnd) -> Result<(), StoreError> {
    let mut statement = t.prepare_cached(
        "UPDATE tasks SET state = ?2, verdict = ?3, exit_code = ?4, signal = ?5, reason = ?6, \
         stdout_bytes = ?7, stderr_bytes = ?8, ended_at = ?9, hint = ?10, stdout_hash = ?11, \
         stderr_hash = ?12, duration_ms = ?13, started_at = ?14, \
         idempotency_key = CASE WHEN ?15 THEN NULL ELSE idempotency_key END, \
         cancel_wanted = cancel_wanted OR ?16 \
         WHERE id = ?1 AND ended_at IS NULL \
         RETURNING actor, node",
    )?;
    let mut rows = statement.query(params![
        id.as_bytes().as_slice(),
        end.verdict.state().as_str(),
        end.verdict.as_str(),
        end.exit_code,
        end.signal,
        end.reason,
        signed(end.stdout_bytes),
        signed(end.stderr_bytes),
        end.ended_at_ms,
        end.hint,
        end.stdout_hash,
        end.stderr_hash,
        signed(end.duration_ms),
        end.started_at_ms,
        end.never_begun,
        end.cancel_wanted,
    ])?;
    let Some(row) = rows.next()? else { return Ok(()) };
    let (actor, node) = (row.get::<_, String>(0)?, node_id(&row.get::<_, Vec<u8>>(1)?)?);
    drop(rows);
    append_end(t, id, &actor, "task.ended", node, end)
}

/// Only a verdict that came without the node's word leaves room for it.
pub(super) fn add_late_outcome(
    t: &Connection,
    id: TaskId,
    node: NodeId,
    outcome: &TaskEnd,
) -> Result<LateReport, StoreError> {
    let mut statement = t.prepare_cached(
        "UPDATE tasks SET late_outcome = ?3 WHERE id = ?1 AND node = ?2 AND ended_at IS NOT NULL \
         AND late_outcome IS NULL AND stdout_hash IS NULL RETURNING actor",
    )?;
    let key = params![id.as_bytes().as_slice(), node.as_bytes().as_slice(), to_json(outcome)?];
    let actor: Option<String> = statement.query_row(key, |row| row.get(0)).optional()?;
    let Some(actor) = actor else {
        let open = t
            .prepare_cached("SELECT 1 FROM tasks WHERE id = ?1 AND node = ?2 AND ended_at IS NULL")?
            .exists([id.as_bytes().as_slice(), node.as_bytes().as_slice()])?;
        return Ok(if open { LateReport::TooEarly } else { LateReport::Known });
    };
    append_end(t, id, &actor, "task.late_outcome", node, outcome)?;
    Ok(LateReport::Added)
}

pub(super) fn want_cancel(t: &Connection, id: TaskId) -> Result<(), StoreError> {
    t.prepare_cached(
        "UPDATE tasks SET cancel_wanted = 1 \
         WHERE id = ? AND stdout_hash IS NULL AND late_outcome IS NULL",
    )?
    .execute([id.as_bytes().as_slice()])?;
    Ok(())
}

/// The same for all of somebody that may still run and that nobody wanted to end before. Returns those that
/// have a verdict.
pub(super) fn want_cancel_of(
    t: &Connection,
    actor: &str,
) -> Result<Vec<(TaskId, NodeId)>, StoreError> {
    let mut statement = t.prepare(
        "UPDATE tasks SET cancel_wanted = 1 \
         WHERE actor = ? AND stdout_hash IS NULL AND late_outcome IS NULL AND NOT cancel_wanted \
         RETURNING id, node, ended_at IS NOT NULL",
    )?;
    let mut rows = statement.query([actor])?;
    let mut found = Vec::new();
    while let Some(row) = rows.next()? {
        if row.get(2)? {
            let (id, node): (Vec<u8>, Vec<u8>) = (row.get(0)?, row.get(1)?);
            found.push((task_id(&id)?, node_id(&node)?));
        }
    }
    Ok(found)
}

pub(super) fn to_cancel(
    c: &Connection,
    node: NodeId,
    held: &[TaskId],
) -> Result<Vec<TaskId>, StoreError> {
    let mut statement = c.prepare_cached(
        "SELECT 1 FROM tasks WHERE id = ? AND node = ? AND cancel_wanted AND ended_at IS NOT NULL \
         AND stdout_hash IS NULL AND late_outcome IS NULL",
    )?;
    let mut found = Vec::new();
    for id in held {
        if statement.exists(params![id.as_bytes().as_slice(), node.as_bytes().as_slice()])? {
            found.push(*id);
        }
    }
    Ok(found)
}

pub(super) fn open(c: &Connection) -> Result<Vec<TaskRecord>, StoreError> {
    // As many as ran when the last hub died: nothing that grows.
    let sql = format!("SELECT {COLUMNS} FROM tasks WHERE ended_at IS NULL ORDER BY id");
    c.prepare(&sql)?.query_and_then([], record)?.collect()
}

pub(super) fn one(c: &Connection, id: TaskId) -> Result<Option<TaskRecord>, StoreError> {
    let sql = format!("SELECT {COLUMNS} FROM tasks WHERE id = ?");
    let mut statement = c.prepare_cached(&sql)?;
    statement.query_and_then([id.as_bytes().as_slice()], record)?.next().transpose()
}

pub(super) fn ending_in(c: &Connection, ending: &[u8]) -> Result<Vec<TaskRecord>, StoreError> {
    let Some(last) = ending.len().checked_sub(4).map(|at| &ending[at..]) else {
        return Ok(Vec::new());
    };
    let sql = format!(
        "SELECT {COLUMNS} FROM tasks WHERE substr(id, 13) = ?1 AND substr(id, 17 - ?2) = ?3 LIMIT 2"
    );
    let length = i64::try_from(ending.len()).unwrap_or(i64::MAX);
    c.prepare_cached(&sql)?.query_and_then(params![last, length, ending], record)?.collect()
}

pub(super) fn list(c: &Connection, query: &TaskQuery) -> Result<Vec<TaskRecord>, StoreError> {
    let nodes = query.nodes.as_ref().map(|nodes| {
        let hex = |node: &NodeId| node.to_string().replace('-', "");
        json!(nodes.iter().map(hex).collect::<Vec<_>>()).to_string()
    });
    let (open, states) = match &query.states {
        None => (true, None),
        Some((open, states)) => {
            let words: Vec<_> = states.iter().copied().map(TaskEndState::as_str).collect();
            (*open, Some(json!(words).to_string()))
        }
    };
    let sql = format!(
        "SELECT {COLUMNS} FROM tasks WHERE (?1 IS NULL OR node IN (SELECT unhex(value) FROM json_each(?1))) \
         AND (?2 IS NULL OR actor = ?2) AND (?3 IS NULL OR id < ?3) \
         AND (?4 IS NULL OR (?5 AND ended_at IS NULL) OR state IN (SELECT value FROM json_each(?4))) \
         ORDER BY id DESC LIMIT ?6"
    );
    let before = query.before.map(|id| id.as_bytes().to_vec());
    let key = params![nodes, query.actor, before, states, open, query.limit];
    c.prepare_cached(&sql)?.query_and_then(key, record)?.collect()
}

pub(super) fn spec(c: &Connection, id: TaskId) -> Result<Option<Vec<u8>>, StoreError> {
    let mut statement = c.prepare_cached("SELECT spec FROM tasks WHERE id = ?")?;
    let spec = statement.query_row([id.as_bytes().as_slice()], |row| row.get(0)).optional()?;
    Ok(spec.flatten())
}

fn record(row: &Row<'_>) -> Result<TaskRecord, StoreError> {
    let text = |column| row.get::<_, String>(column);
    let verdict: Option<String> = row.get("verdict")?;
    let end = match verdict {
        None => None,
        Some(word) => Some(TaskEnd {
            verdict: Verdict::parse(&word).ok_or_else(|| damaged("verdict"))?,
            exit_code: row.get("exit_code")?,
            signal: row.get("signal")?,
            reason: row.get::<_, Option<String>>("reason")?.unwrap_or_default(),
            hint: row.get::<_, Option<String>>("hint")?.unwrap_or_default(),
            stdout_bytes: row.get::<_, Option<i64>>("stdout_bytes")?.unwrap_or(0).cast_unsigned(),
            stderr_bytes: row.get::<_, Option<i64>>("stderr_bytes")?.unwrap_or(0).cast_unsigned(),
            stdout_hash: row.get("stdout_hash")?,
            stderr_hash: row.get("stderr_hash")?,
            duration_ms: row.get::<_, Option<i64>>("duration_ms")?.unwrap_or(0).cast_unsigned(),
            started_at_ms: row.get("started_at")?,
            ended_at_ms: row.get::<_, Option<i64>>("ended_at")?.unwrap_or(0),
            never_begun: false,
            cancel_wanted: false,
        }),
    };
    let late: Option<String> = row.get("late_outcome")?;
    let retry_of: Option<Vec<u8>> = row.get("retry_of")?;
    Ok(TaskRecord {
        id: task_id(&row.get::<_, Vec<u8>>("id")?)?,
        node: node_id(&row.get::<_, Vec<u8>>("node")?)?,
        node_name: text("node_name")?,
        actor: text("actor")?,
        role: text("role")?.parse::<Role>().map_err(|_| damaged("role"))?,
        command: text("command")?,
        workspace: text("workspace")?,
        mode: text("mode")?.parse::<Mode>().map_err(|_| damaged("mode"))?,
        detached: row.get("detached")?,
        retry_of: retry_of.map(|id| task_id(&id)).transpose()?,
        idempotency_key: row.get::<_, Option<String>>("idempotency_key")?.unwrap_or_default(),
        accepted_at_ms: row.get("accepted_at")?,
        end,
        late: late.map(|text| from_json(&text, "late outcome")).transpose()?,
        cancel_wanted: row.get("cancel_wanted")?,
    })
}

fn task_id(bytes: &[u8]) -> Result<TaskId, StoreError> {
    TaskId::from_slice(bytes).map_err(|_| damaged("task id"))
}

/// SQLite's integers are signed; no command writes 8 EiB.
fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

fn append_end(
    t: &Connection,
    id: TaskId,
    actor: &str,
    action: &'static str,
    node: NodeId,
    end: &TaskEnd,
) -> Result<(), StoreError> {
    let hash = |hash: Option<[u8; 32]>| hash.map(|h| blake3::Hash::from_bytes(h).to_string());
    let detail: Value = json!({
        "node_id": node.to_string(),
        "verdict": end.verdict.as_str(),
        "reason": end.reason,
        "exit_code": end.exit_code,
        "signal": end.signal,
        "stdout_bytes": end.stdout_bytes,
        "stdout_hash": hash(end.stdout_hash),
        "stderr_bytes": end.stderr_bytes,
        "stderr_hash": hash(end.stderr_hash),
    });
    audit::append(t, &Actor::from(actor).audit(end.ended_at_ms, action, id.to_string(), detail))
}
