//! The audit log: append-only, each line chained to the one before by its hash.

use rusqlite::{Connection, OptionalExtension as _, params};

use super::super::{AuditHead, AuditLine, NewAudit, StoreError};

/// The hash before the first line.
const GENESIS: [u8; 32] = [0; 32];

/// Appends a line, in the transaction of the change it speaks of: either both are there, or neither.
pub(super) fn append(t: &Connection, new: &NewAudit) -> Result<(), StoreError> {
    let line = AuditLine::after(head(t)?, new);
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
    Ok(())
}

/// Number and hash of the last line.
pub(super) fn head(t: &Connection) -> Result<AuditHead, StoreError> {
    let row = t
        .prepare_cached("SELECT seq, hash FROM audit ORDER BY seq DESC LIMIT 1")?
        .query_row([], |row| Ok((row.get::<_, i64>(0)?, row.get::<_, [u8; 32]>(1)?)))
        .optional()?;
    Ok(row.map_or(AuditHead { seq: 0, hash: GENESIS }, |(seq, hash)| AuditHead {
        seq: seq.cast_unsigned(),
        hash,
    }))
}

/// At most `limit` lines after a number, oldest first.
pub(super) fn page(
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
