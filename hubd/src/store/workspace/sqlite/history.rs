//! Which versions this history has had, and beginning another one.
//!
//! A database that was put back from a backup has lost versions that members have seen, and counts
//! the same numbers again for others. So each version is written down with its root digest, in the
//! transaction that makes it, and members say what the newest one is that they were told of. One
//! that was never here proves the loss, and the history gets another name (epoch): everybody then
//! merges anew, and nobody deletes anything.

use cortex_shared::ids::WorkspaceEpoch;
use rusqlite::{Connection, OptionalExtension as _, params};

use super::super::{Head, StoreError};
use super::tree::{digest, signed};
use super::{HeadRow, head_of, read_head};

/// How long versions are remembered, in milliseconds: 30 days. A member that was away for longer is
/// believed unless it has seen more than there is.
const VERSIONS_KEPT_MS: i64 = 30 * 24 * 3600 * 1000;
/// More versions than any backup is behind: who says that so many were lost is not believed. Nobody can
/// bring the numbers to their end.
const MAX_LOST: u64 = 1 << 32;
/// How many old versions are cleared away with each new one.
const VERSIONS_CLEARED: i64 = 16;

/// Writes the new head down, and that it has been one.
pub(super) fn write_head(
    connection: &Connection,
    head: &HeadRow,
    now_ms: i64,
) -> Result<(), StoreError> {
    connection
        .prepare_cached(
            "UPDATE head SET epoch = ?1, seq = ?2, root = ?3, entries = ?4, content_bytes = ?5",
        )?
        .execute(params![
            head.epoch,
            signed(head.seq),
            head.root.as_bytes(),
            signed(head.entries),
            signed(head.content_bytes),
        ])?;
    connection
        .prepare_cached("INSERT OR REPLACE INTO versions (seq, root, at_ms) VALUES (?1, ?2, ?3)")?
        .execute(params![signed(head.seq), head.root.as_bytes(), now_ms])?;
    connection
        .prepare_cached(
            "DELETE FROM versions WHERE seq IN
             (SELECT seq FROM versions WHERE at_ms < ?1 ORDER BY seq LIMIT ?2)",
        )?
        .execute([now_ms - VERSIONS_KEPT_MS, VERSIONS_CLEARED])?;
    Ok(())
}

/// Whether a version that a member was told of can have been one of this history. One of another
/// epoch tells nothing about this one.
pub(super) fn is_known(connection: &Connection, known: &Head) -> Result<bool, StoreError> {
    let head = head_of(&read_head(connection)?)?;
    if known.epoch != head.epoch || known.seq == 0 {
        return Ok(true);
    }
    if known.seq > head.seq {
        return Ok(false);
    }
    let root: Option<Vec<u8>> = connection
        .prepare_cached("SELECT root FROM versions WHERE seq = ?1")?
        .query_row([signed(known.seq)], |row| row.get(0))
        .optional()?;
    if let Some(root) = root {
        return Ok(digest(&root)? == known.root);
    }
    // Not one of those that are remembered; it may only be older than them.
    let first: Option<i64> = connection
        .prepare_cached("SELECT min(seq) FROM versions")?
        .query_row([], |row| row.get(0))?;
    Ok(first.is_none_or(|first| signed(known.seq) < first))
}

/// Begins a new history with the tree there is, if `known` proves that this one has lost versions.
/// Returns the head.
pub(super) fn restart_if_lost(
    connection: &Connection,
    known: &Head,
    now_ms: i64,
) -> Result<Head, StoreError> {
    let mut head = read_head(connection)?;
    if !is_known(connection, known)? {
        if known.seq.saturating_sub(head.seq) > MAX_LOST {
            return Err(StoreError::BeyondHead { asked: known.seq, head: head.seq });
        }
        head.epoch = WorkspaceEpoch::new().as_bytes().to_vec();
        // Above all that the member has seen, so that it also looks newer to those who only compare
        // numbers.
        head.seq = head.seq.max(known.seq) + 1;
        connection.execute("DELETE FROM versions", [])?;
        write_head(connection, &head, now_ms)?;
    }
    head_of(&head)
}

/// If `news`, makes a new version of the same tree, so that members ask what there is to do.
pub(super) fn repeat_head_if(
    connection: &Connection,
    news: bool,
    now_ms: i64,
) -> Result<Option<Head>, StoreError> {
    let mut head = read_head(connection)?;
    // Of a workspace that was always empty nothing can be of use to anybody.
    if !news || head.seq == 0 {
        return Ok(None);
    }
    head.seq += 1;
    write_head(connection, &head, now_ms)?;
    head_of(&head).map(Some)
}
