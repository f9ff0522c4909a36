//! The journal of tasks.

use cortex_shared::ids::TaskId;
use rusqlite::{Connection, params};

use super::super::{NewTask, StoreError, TaskEnd, TaskEndState};

pub(super) fn accept(t: &Connection, task: &NewTask) -> Result<(), StoreError> {
    t.prepare_cached(
        "INSERT INTO tasks (id, node, actor, command, workspace, mode, state, accepted_at) \
         VALUES (?,?,?,?,?,?,'accepted',?)",
    )?
    .execute(params![
        task.id.as_bytes().as_slice(),
        task.node.as_bytes().as_slice(),
        task.actor,
        task.command,
        task.workspace,
        task.mode.to_string(),
        task.accepted_at_ms,
    ])?;
    Ok(())
}

/// A verdict is never rewritten: only a task without one takes it.
pub(super) fn end(t: &Connection, id: TaskId, end: &TaskEnd) -> Result<(), StoreError> {
    t.prepare_cached(
        "UPDATE tasks SET state = ?2, verdict = ?3, exit_code = ?4, signal = ?5, reason = ?6, \
         stdout_bytes = ?7, stderr_bytes = ?8, ended_at = ?9 WHERE id = ?1 AND ended_at IS NULL",
    )?
    .execute(params![
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
    Ok(())
}

pub(super) fn end_open(t: &Connection, reason: &str, now_ms: i64) -> Result<u64, StoreError> {
    let changed = t.execute(
        "UPDATE tasks SET state = ?1, verdict = 'stream_lost', reason = ?2, ended_at = ?3 \
         WHERE ended_at IS NULL",
        params![TaskEndState::Failed.as_str(), reason, now_ms],
    )?;
    Ok(changed as u64)
}
