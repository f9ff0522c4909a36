//! The audit log: append-only, each line chained to the one before by its hash.
//!
//! The connection that writes remembers its last line in a table of its own, in memory: it takes part in
//! transactions, and nobody who writes the file can change it. A line is only written after the one that
//! is remembered. That memory ends with the process, and with a connection that was lost to a panic; the
//! mark beside the database (`authority::audit`) is for that.

use rusqlite::{Connection, OptionalExtension as _, Row, params};

use super::super::{AuditHead, AuditLine, NewAudit, StoreError};

/// The hash before the first line.
const GENESIS: [u8; 32] = [0; 32];

/// Appends a line, in the transaction of the change it speaks of: either both are there, or neither.
///
/// # Errors
/// [`StoreError::AuditAltered`] if the log does not end where it was left.
pub(super) fn append(t: &Connection, new: &NewAudit) -> Result<(), StoreError> {
    let (found, written) = (head(t)?, remembered(t)?);
    if found != written {
        let (found, written) = (found.seq, written.seq);
        tracing::error!(found, written, "the audit log was changed by somebody else");
        return Err(StoreError::AuditAltered { found, written });
    }
    let line = AuditLine::after(written, new);
    t.prepare_cached("INSERT INTO audit VALUES (?,?,?,?,?,?,?,?)")?.execute(params![
        line.seq.cast_signed(),
        line.at_ms,
        line.actor,
        line.action,
        line.target,
        line.detail,
        line.prev_hash.as_slice(),
        line.hash.as_slice(),
    ])?;
    remember(t, AuditHead { seq: line.seq, hash: line.hash })
}

/// Appends a line to the log as it is, whoever has changed it.
pub(super) fn accept(t: &Connection, new: &NewAudit) -> Result<(), StoreError> {
    // Its table has to be there first.
    remembered(t)?;
    remember(t, head(t)?)?;
    append(t, new)
}

/// Number and hash of the last line that this connection wrote; at first, of the last line.
pub(super) fn remembered(t: &Connection) -> Result<AuditHead, StoreError> {
    t.prepare_cached(
        "CREATE TEMP TABLE IF NOT EXISTS audit_head \
         (only INTEGER PRIMARY KEY CHECK (only = 1), seq INTEGER NOT NULL, hash BLOB NOT NULL)",
    )?
    .execute([])?;
    let row = t
        .prepare_cached("SELECT seq, hash FROM temp.audit_head")?
        .query_row([], read_head)
        .optional()?;
    match row {
        Some(head) => Ok(head),
        None => {
            let head = head(t)?;
            tracing::info!(seq = head.seq, "the audit log goes on after this line");
            remember(t, head)?;
            Ok(head)
        }
    }
}

fn remember(t: &Connection, head: AuditHead) -> Result<(), StoreError> {
    t.prepare_cached("INSERT OR REPLACE INTO temp.audit_head VALUES (1, ?, ?)")?
        .execute(params![head.seq.cast_signed(), head.hash.as_slice()])?;
    Ok(())
}

fn read_head(row: &Row<'_>) -> rusqlite::Result<AuditHead> {
    Ok(AuditHead { seq: row.get::<_, i64>(0)?.cast_unsigned(), hash: row.get(1)? })
}

/// Number and hash of the last line.
fn head(t: &Connection) -> Result<AuditHead, StoreError> {
    let row = t
        .prepare_cached("SELECT seq, hash FROM audit ORDER BY seq DESC LIMIT 1")?
        .query_row([], |row| {
            // Whatever somebody put there is not the hash of a line.
            let hash = row.get_ref(1)?.as_blob().unwrap_or_default();
            let hash = hash.try_into().unwrap_or([0xff; 32]);
            Ok(AuditHead { seq: row.get::<_, i64>(0)?.cast_unsigned(), hash })
        })
        .optional()?;
    Ok(row.unwrap_or(AuditHead { seq: 0, hash: GENESIS }))
}

/// At most `limit` lines after a number, oldest first.
pub(in crate::store) fn page(
    connection: &Connection,
    after_seq: Option<u64>,
    limit: u32,
) -> Result<Vec<AuditLine>, StoreError> {
    let mut statement = connection.prepare_cached(
        "SELECT seq, at, actor, action, target, detail, prev_hash, hash FROM audit \
         WHERE seq > ? ORDER BY seq LIMIT ?",
    )?;
    // Before everything, even before numbers that this program never gives.
    let after = after_seq.map_or(i64::MIN, |seq| i64::try_from(seq).unwrap_or(i64::MAX));
    let lines = statement.query_and_then(params![after, limit], |row| {
        // Whatever somebody put there must not keep the others from being read.
        let text = |column| -> Result<String, StoreError> {
            let value = row.get_ref(column)?;
            Ok(String::from_utf8_lossy(value.as_bytes().unwrap_or_default()).into_owned())
        };
        let hash = |column, otherwise| -> Result<[u8; 32], StoreError> {
            let bytes = row.get_ref(column)?;
            let bytes = bytes.as_blob().unwrap_or_default();
            Ok(bytes.try_into().unwrap_or([otherwise; 32]))
        };
        Ok(AuditLine {
            seq: row.get::<_, i64>(0)?.cast_unsigned(),
            at_ms: row.get(1)?,
            actor: text(2)?,
            action: text(3)?,
            target: text(4)?,
            detail: text(5)?,
            // No line before has either of these as its hash.
            prev_hash: hash(6, 0xff)?,
            hash: hash(7, 0)?,
        })
    })?;
    lines.collect()
}
