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
