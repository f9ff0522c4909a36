//! Which chunks and packs are present.

use std::collections::{HashMap, HashSet};

use cortex_shared::entry::Digest;
use rusqlite::{Connection, OptionalExtension as _, params};

use super::super::{Found, PackAdded, PackRecord, StoreError};
use super::tree::{digest, signed};

/// A chunk touched within this time, in milliseconds, is not touched again: an hour is little
/// against the 72 hours that a touch protects, and spares most questions a write.
pub(super) const TOUCH_INTERVAL_MS: i64 = 3600 * 1000;

/// The length of a chunk that is present.
pub(super) fn len_of(connection: &Connection, hash: &Digest) -> Result<Option<i64>, StoreError> {
    Ok(connection
        .prepare_cached("SELECT len FROM chunks WHERE hash = ?1")?
        .query_row([hash.as_bytes()], |row| row.get(0))
        .optional()?)
}

/// Renews the protection of a chunk unless that was done lately.
pub(super) fn renew(connection: &Connection, hash: &Digest, now_ms: i64) -> Result<(), StoreError> {
    connection
        .prepare_cached("UPDATE chunks SET touched = ?2 WHERE hash = ?1 AND touched < ?3")?
        .execute(params![hash.as_bytes(), now_ms, now_ms - TOUCH_INTERVAL_MS])?;
    Ok(())
}

/// What a look at the chunks table found.
pub(super) enum Presence {
    Absent,
    Present,
    /// Present, but its protection is about to be renewed.
    Stale,
}

pub(super) fn presence(
    connection: &Connection,
    chunks: &[Digest],
    now_ms: i64,
) -> Result<Vec<Presence>, StoreError> {
    let mut statement = connection.prepare_cached("SELECT touched FROM chunks WHERE hash = ?1")?;
    chunks
        .iter()
        .map(|hash| {
            let touched: Option<i64> =
                statement.query_row([hash.as_bytes()], |row| row.get(0)).optional()?;
            Ok(match touched {
                None => Presence::Absent,
                Some(touched) if now_ms - touched > TOUCH_INTERVAL_MS => Presence::Stale,
                Some(_) => Presence::Present,
            })
        })
        .collect()
}

/// Renews the protection of chunks, and says for each whether it was still there.
pub(super) fn touch(
    connection: &Connection,
    chunks: &[Digest],
    now_ms: i64,
) -> Result<Vec<bool>, StoreError> {
    let mut statement =
        connection.prepare_cached("UPDATE chunks SET touched = ?2 WHERE hash = ?1")?;
    chunks
        .iter()
        .map(|hash| Ok(statement.execute(params![hash.as_bytes(), now_ms])? == 1))
        .collect()
}

pub(super) fn has_pack(connection: &Connection, pack: &Digest) -> Result<bool, StoreError> {
    let found: Option<i64> = connection
        .prepare_cached("SELECT 1 FROM packs WHERE hash = ?1")?
        .query_row([pack.as_bytes()], |row| row.get(0))
        .optional()?;
    Ok(found.is_some())
}

pub(in crate::store) fn packs(connection: &Connection) -> Result<HashSet<Digest>, StoreError> {
    let mut statement = connection.prepare_cached("SELECT hash FROM packs")?;
    statement.query_and_then([], |row| digest(&row.get::<_, Vec<u8>>(0)?))?.collect()
}

pub(super) fn add_pack(
    connection: &Connection,
    pack: &PackRecord,
    now_ms: i64,
) -> Result<PackAdded, StoreError> {
    let inserted = connection
        .prepare_cached("INSERT OR IGNORE INTO packs (hash, bytes, at_ms) VALUES (?1, ?2, ?3)")?
        .execute(params![pack.hash.as_bytes(), signed(pack.bytes), now_ms])?;
    let id: i64 = connection
        .prepare_cached("SELECT id FROM packs WHERE hash = ?1")?
        .query_row([pack.hash.as_bytes()], |row| row.get(0))?;
    // A chunk that is in several packs is served from the first; the others are as good.
    let mut insert = connection.prepare_cached(
        "INSERT INTO chunks (hash, len, pack_id, touched) VALUES (?1, ?2, ?3, ?4)
         ON CONFLICT (hash) DO UPDATE SET touched = excluded.touched",
    )?;
    for chunk in &pack.chunks {
        insert.execute(params![chunk.hash.as_bytes(), chunk.len, id, now_ms])?;
    }
    Ok(if inserted == 1 { PackAdded::New } else { PackAdded::Known })
}

pub(super) fn forget_packs(connection: &Connection, packs: &[Digest]) -> Result<(), StoreError> {
    for pack in packs {
        connection
            .prepare_cached(
                "DELETE FROM chunks WHERE pack_id IN (SELECT id FROM packs WHERE hash = ?1)",
            )?
            .execute([pack.as_bytes()])?;
        connection
            .prepare_cached("DELETE FROM packs WHERE hash = ?1")?
            .execute([pack.as_bytes()])?;
    }
    Ok(())
}

/// Forgets packs whose files are lost, and wants their chunks back. Whether that was news.
pub(super) fn lose_packs(connection: &Connection, packs: &[Digest]) -> Result<bool, StoreError> {
    let mut wanted = 0;
    for pack in packs {
        wanted += connection
            .prepare_cached(
                "INSERT OR IGNORE INTO wanted (hash)
                 SELECT hash FROM chunks WHERE pack_id IN (SELECT id FROM packs WHERE hash = ?1)",
            )?
            .execute([pack.as_bytes()])?;
    }
    forget_packs(connection, packs)?;
    Ok(wanted > 0)
}

/// Notes that chunks are here; whether some of them were wanted.
pub(super) fn no_longer_wanted(
    connection: &Connection,
    chunks: impl Iterator<Item = Digest>,
) -> Result<bool, StoreError> {
    if wanted(connection, 1)?.is_empty() {
        return Ok(false);
    }
    let mut delete = connection.prepare_cached("DELETE FROM wanted WHERE hash = ?1")?;
    let mut found = 0;
    for chunk in chunks {
        found += delete.execute([chunk.as_bytes()])?;
    }
    Ok(found > 0)
}

/// Some of the chunks that are wanted back.
pub(super) fn wanted(connection: &Connection, limit: u32) -> Result<Vec<Digest>, StoreError> {
    let mut statement = connection.prepare_cached("SELECT hash FROM wanted LIMIT ?1")?;
    statement.query_and_then([limit], |row| digest(&row.get::<_, Vec<u8>>(0)?))?.collect()
}

pub(super) fn packs_of(connection: &Connection, chunks: &[Digest]) -> Result<Found, StoreError> {
    let mut statement = connection.prepare_cached(
        "SELECT p.hash FROM chunks c JOIN packs p ON p.id = c.pack_id WHERE c.hash = ?1",
    )?;
    let mut places = HashMap::new();
    let mut found = Found::default();
    for chunk in chunks {
        let pack: Option<Vec<u8>> =
            statement.query_row([chunk.as_bytes()], |row| row.get(0)).optional()?;
        let Some(pack) = pack else {
            found.missing.push(*chunk);
            continue;
        };
        let pack = digest(&pack)?;
        let place = *places.entry(pack).or_insert_with(|| {
            found.packs.push((pack, Vec::new()));
            found.packs.len() - 1
        });
        found.packs[place].1.push(*chunk);
    }
    Ok(found)
}
