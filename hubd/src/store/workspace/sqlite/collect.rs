//! Letting go of content that neither an entry nor a kept version names any more.
//!
//! In two steps. Which packs have become useless is found by readers, who hold nobody up, a slice of
//! packs at a time. Dropping them is the writer's, who looks again: a chunk that was touched in
//! between stays. Whatever begins to name a chunk touches it in the same transaction, so no entry
//! ever names a chunk that goes.
//!
//! A pack goes when all of it is useless. One of which less than half is used is rewritten without the
//! rest; one that is used for more stays whole.

use std::collections::{BTreeMap, HashMap, HashSet};

use cortex_shared::chunk::CHUNK_REF_BYTES;
use cortex_shared::entry::Digest;
use rusqlite::{Connection, OptionalExtension as _, params};

use super::super::{PackRecord, SparsePack, StoreError, UnusedPacks};
use super::tree::{damaged, digest, signed};

/// Chunks that one slice looks at, which bounds its memory to some 30 MB.
const SLICE_CHUNKS: usize = 200_000;
/// Recipes that are dropped in one transaction.
const RECIPES_DROPPED: i64 = 500;

/// Packs, from row `after` on, of which less than half is named or was touched since; and the row to go
/// on after, if there are more.
pub(super) fn unused_packs(
    connection: &Connection,
    after: i64,
    untouched_since_ms: i64,
) -> Result<(UnusedPacks, Option<i64>), StoreError> {
    let mut packs = connection.prepare_cached(
        "SELECT id, hash FROM packs p WHERE id > ?1 AND EXISTS
         (SELECT 1 FROM chunks c WHERE c.pack_id = p.id AND c.touched < ?2)
         OR id > ?1 AND NOT EXISTS (SELECT 1 FROM chunks c WHERE c.pack_id = p.id) ORDER BY id",
    )?;
    let mut chunks_of =
        connection.prepare_cached("SELECT hash, len, touched FROM chunks WHERE pack_id = ?1")?;
    let mut candidates: BTreeMap<i64, Candidate> = BTreeMap::new();
    let mut untouched = HashMap::new();
    let mut looked_at = 0;
    let mut next = None;
    let mut rows = packs.query([after, untouched_since_ms])?;
    while let Some(row) = rows.next()? {
        let id: i64 = row.get(0)?;
        let hash = digest(&row.get::<_, Vec<u8>>(1)?)?;
        let mut candidate = Candidate { hash, bytes: 0, used_bytes: 0, used: Vec::new() };
        let mut chunks = chunks_of.query([id])?;
        while let Some(chunk) = chunks.next()? {
            let hash = digest(&chunk.get::<_, Vec<u8>>(0)?)?;
            let len: u32 = chunk.get(1)?;
            candidate.bytes += u64::from(len);
            if chunk.get::<_, i64>(2)? >= untouched_since_ms {
                candidate.is_used(hash, len);
            } else {
                untouched.insert(hash, (id, len));
            }
            looked_at += 1;
        }
        candidates.insert(id, candidate);
        if looked_at >= SLICE_CHUNKS {
            next = Some(id);
            break;
        }
    }
    drop(rows);
    if candidates.is_empty() {
        return Ok((UnusedPacks::default(), None));
    }
    for_each_named_chunk(connection, |hash| {
        if let Some((pack, len)) = untouched.remove(hash)
            && let Some(candidate) = candidates.get_mut(&pack)
        {
            candidate.is_used(*hash, len);
        }
    })?;
    let mut unused = UnusedPacks::default();
    for Candidate { hash, bytes, used_bytes, used } in candidates.into_values() {
        if used.is_empty() {
            unused.useless.push(hash);
        } else if used_bytes * 2 < bytes {
            unused.sparse.push(SparsePack { hash, used });
        }
    }
    Ok((unused, next))
}

/// A pack that may be of little use.
struct Candidate {
    hash: Digest,
    bytes: u64,
    used_bytes: u64,
    used: Vec<Digest>,
}

impl Candidate {
    fn is_used(&mut self, chunk: Digest, len: u32) {
        self.used_bytes += u64::from(len);
        self.used.push(chunk);
    }
}

/// See [`super::super::WorkspaceStore::replace_packs`].
pub(super) fn replace_packs(
    connection: &Connection,
    old: &[Digest],
    new: &PackRecord,
    untouched_since_ms: i64,
    now_ms: i64,
) -> Result<bool, StoreError> {
    let kept: HashSet<Digest> = new.chunks.iter().map(|chunk| chunk.hash).collect();
    for pack in old {
        let mut touched = connection.prepare_cached(
            "SELECT c.hash FROM chunks c JOIN packs p ON p.id = c.pack_id
             WHERE p.hash = ?1 AND c.touched >= ?2",
        )?;
        let mut touched = touched.query(params![pack.as_bytes(), untouched_since_ms])?;
        while let Some(row) = touched.next()? {
            if !kept.contains(&digest(&row.get::<_, Vec<u8>>(0)?)?) {
                return Ok(false);
            }
        }
    }
    connection
        .prepare_cached("INSERT OR IGNORE INTO packs (hash, bytes, at_ms) VALUES (?1, ?2, ?3)")?
        .execute(params![new.hash.as_bytes(), signed(new.bytes), now_ms])?;
    let id: i64 = connection
        .prepare_cached("SELECT id FROM packs WHERE hash = ?1")?
        .query_row([new.hash.as_bytes()], |row| row.get(0))?;
    // A chunk that has found another place meanwhile is as good here.
    let mut take = connection.prepare_cached("UPDATE chunks SET pack_id = ?2 WHERE hash = ?1")?;
    for chunk in &new.chunks {
        take.execute(params![chunk.hash.as_bytes(), id])?;
    }
    super::content::forget_packs(connection, old)?;
    Ok(true)
}

/// Wanted chunks that no entry names. None of them can be named again before it is here again.
pub(super) fn useless_wanted(connection: &Connection) -> Result<Vec<Digest>, StoreError> {
    let slice = u32::try_from(SLICE_CHUNKS).unwrap_or(u32::MAX);
    let mut wanted: HashSet<Digest> =
        super::content::wanted(connection, slice)?.into_iter().collect();
    if !wanted.is_empty() {
        for_each_named_chunk(connection, |hash| {
            wanted.remove(hash);
        })?;
    }
    Ok(wanted.into_iter().collect())
}

/// Shows every chunk that an entry or a kept version names, some of them more than once.
fn for_each_named_chunk(
    connection: &Connection,
    mut show: impl FnMut(&Digest),
) -> Result<(), StoreError> {
    let mut single = connection.prepare_cached(
        "SELECT content FROM entries WHERE content IS NOT NULL AND recipe IS NULL UNION ALL
         SELECT content FROM old_versions WHERE content IS NOT NULL AND recipe IS NULL",
    )?;
    let mut rows = single.query([])?;
    while let Some(row) = rows.next()? {
        show(&digest(row.get_ref(0)?.as_bytes().map_err(|_| damaged("no content"))?)?);
    }
    let mut recipes = connection.prepare_cached(
        "SELECT recipe FROM recipes WHERE digest IN
         (SELECT recipe FROM entries WHERE recipe IS NOT NULL UNION ALL
         SELECT recipe FROM old_versions WHERE recipe IS NOT NULL)",
    )?;
    let mut rows = recipes.query([])?;
    while let Some(row) = rows.next()? {
        let recipe = row.get_ref(0)?.as_bytes().map_err(|_| damaged("no recipe"))?;
        for chunk in recipe.as_chunks::<CHUNK_REF_BYTES>().0 {
            show(&digest(&chunk[..32])?);
        }
    }
    Ok(())
}

/// Forgets those of the packs that are still untouched, and returns them.
pub(super) fn drop_packs(
    connection: &Connection,
    packs: &[Digest],
    untouched_since_ms: i64,
) -> Result<Vec<Digest>, StoreError> {
    let mut dropped = Vec::new();
    for pack in packs {
        let touched: Option<i64> = connection
            .prepare_cached(
                "SELECT 1 FROM chunks c JOIN packs p ON p.id = c.pack_id
                 WHERE p.hash = ?1 AND c.touched >= ?2 LIMIT 1",
            )?
            .query_row(params![pack.as_bytes(), untouched_since_ms], |row| row.get(0))
            .optional()?;
        if touched.is_none() {
            super::content::forget_packs(connection, std::slice::from_ref(pack))?;
            dropped.push(*pack);
        }
    }
    Ok(dropped)
}

/// Drops recipes that no entry, no kept version and no recorded result names, some at a time; returns how many.
pub(super) fn drop_recipes(connection: &Connection) -> Result<usize, StoreError> {
    Ok(connection
        .prepare_cached(
            "DELETE FROM recipes WHERE digest IN (SELECT digest FROM recipes r
             WHERE NOT EXISTS (SELECT 1 FROM entries e WHERE e.recipe = r.digest)
             AND NOT EXISTS (SELECT 1 FROM old_versions o WHERE o.recipe = r.digest)
             AND NOT EXISTS (SELECT 1 FROM rejections j WHERE j.recipe = r.digest) LIMIT ?1)",
        )?
        .execute([RECIPES_DROPPED])?)
}
