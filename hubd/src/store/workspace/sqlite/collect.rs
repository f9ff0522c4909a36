//! Letting go of content that no entry names any more.
//!
//! In two steps. Which packs have become useless is found by readers, who hold nobody up, a slice of
//! packs at a time. Dropping them is the writer's, who looks again: a chunk that was touched in
//! between stays. Whatever begins to name a chunk touches it in the same transaction, so no entry
//! ever names a chunk that goes.
//!
//! A pack goes when all of it is useless; one that is partly in use stays whole.

use std::collections::{HashMap, HashSet};

use cortex_shared::chunk::CHUNK_REF_BYTES;
use cortex_shared::entry::Digest;
use rusqlite::{Connection, OptionalExtension as _, params};

use super::super::StoreError;
use super::tree::{damaged, digest};

/// Chunks that one slice looks at, which bounds its memory to some 30 MB.
const SLICE_CHUNKS: usize = 200_000;
/// Recipes that are dropped in one transaction.
const RECIPES_DROPPED: i64 = 500;

/// Packs, from row `after` on, of which nothing was touched since and nothing is named; and the row
/// to go on after, if there are more.
pub(super) fn useless_packs(
    connection: &Connection,
    after: i64,
    untouched_since_ms: i64,
) -> Result<(Vec<Digest>, Option<i64>), StoreError> {
    let mut packs = connection.prepare_cached(
        "SELECT id, hash FROM packs p WHERE id > ?1 AND NOT EXISTS
         (SELECT 1 FROM chunks c WHERE c.pack_id = p.id AND c.touched >= ?2) ORDER BY id",
    )?;
    let mut chunks_of = connection.prepare_cached("SELECT hash FROM chunks WHERE pack_id = ?1")?;
    let mut candidates = HashMap::new();
    let mut in_pack = HashMap::new();
    let mut next = None;
    let mut rows = packs.query([after, untouched_since_ms])?;
    while let Some(row) = rows.next()? {
        let id: i64 = row.get(0)?;
        candidates.insert(id, digest(&row.get::<_, Vec<u8>>(1)?)?);
        let mut chunks = chunks_of.query([id])?;
        while let Some(chunk) = chunks.next()? {
            in_pack.insert(digest(&chunk.get::<_, Vec<u8>>(0)?)?, id);
        }
        if in_pack.len() >= SLICE_CHUNKS {
            next = Some(id);
            break;
        }
    }
    if candidates.is_empty() {
        return Ok((Vec::new(), None));
    }
    for_each_named_chunk(connection, |hash| {
        if let Some(pack) = in_pack.get(hash) {
            candidates.remove(pack);
        }
    })?;
    Ok((candidates.into_values().collect(), next))
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

/// Shows every chunk that an entry names, some of them more than once.
fn for_each_named_chunk(
    connection: &Connection,
    mut show: impl FnMut(&Digest),
) -> Result<(), StoreError> {
    let mut single = connection.prepare_cached(
        "SELECT content FROM entries WHERE content IS NOT NULL AND recipe IS NULL",
    )?;
    let mut rows = single.query([])?;
    while let Some(row) = rows.next()? {
        show(&digest(row.get_ref(0)?.as_bytes().map_err(|_| damaged("no content"))?)?);
    }
    let mut recipes = connection.prepare_cached(
        "SELECT recipe FROM recipes WHERE digest IN
         (SELECT recipe FROM entries WHERE recipe IS NOT NULL)",
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

/// Drops recipes that no entry and no recorded result names, some at a time; returns how many.
pub(super) fn drop_recipes(connection: &Connection) -> Result<usize, StoreError> {
    Ok(connection
        .prepare_cached(
            "DELETE FROM recipes WHERE digest IN (SELECT digest FROM recipes r
             WHERE NOT EXISTS (SELECT 1 FROM entries e WHERE e.recipe = r.digest)
             AND NOT EXISTS (SELECT 1 FROM rejections j WHERE j.recipe = r.digest) LIMIT ?1)",
        )?
        .execute([RECIPES_DROPPED])?)
}
