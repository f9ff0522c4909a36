//! What stood at each path before: kept when it is replaced or deleted, let go when its time is over.
//!
//! An entry that goes leaves its row to `old_versions`, in the transaction of the commit that ends it,
//! so what was acknowledged once can be brought back for as long as the settings say. Too many versions
//! of one path are thinned at once; those that are too old go with the collection (`trim`).

use cortex_shared::entry::{Digest, Entry, Kind};
use cortex_shared::wire_path::WirePath;
use rusqlite::{Connection, OptionalExtension as _, Row, params};

use super::super::{Author, Op, RestorePlan, StoreError, Usage, WorkspaceSettings};
use super::read_head;
use super::tree::{ENTRY_COLUMNS, Tree, damaged, entry_from_row, signed, unsigned};

/// Rows that one transaction lets go.
const TRIMMED: usize = 2000;
/// Paths that one transaction thins.
const PATHS_THINNED: i64 = 500;
/// How long deletions are recorded at least, in milliseconds: 30 days. A member that was away for longer
/// reads the whole tree.
const DELETIONS_KEPT_MS: i64 = 30 * 24 * 3600 * 1000;
/// Most paths that one restoration brings back: some 100 MB in memory.
const RESTORED: usize = 200_000;
/// Deletions of one directory's content that are further apart than this, in milliseconds, were not one
/// deletion.
const ONE_DELETION_MS: i64 = 60_000;

/// What ended a version.
pub(super) struct End<'a> {
    pub(super) seq: u64,
    pub(super) at_ms: i64,
    pub(super) author: &'a Author,
    /// Nothing took its place.
    pub(super) deleted: bool,
}

/// Keeps what stands in a row, which is about to change, and thins the old versions of its path.
pub(super) fn keep(
    connection: &Connection,
    row: i64,
    path: &WirePath,
    end: &End<'_>,
    keep_versions: u32,
) -> Result<(), StoreError> {
    connection
        .prepare_cached(
            "INSERT INTO old_versions (seq, path, kind, size, mtime_ns, content, recipe, target,
             author, at_ms, ended_seq, ended_at_ms, ended_by, deleted)
             SELECT seq, ?2, kind, size, mtime_ns, content, recipe, target, author, at_ms,
             ?3, ?4, ?5, ?6 FROM entries WHERE id = ?1",
        )?
        .execute(params![
            row,
            path.as_bytes(),
            signed(end.seq),
            end.at_ms,
            end.author.encode(),
            end.deleted,
        ])?;
    thin(connection, path.as_bytes(), keep_versions)
}

/// Lets go of the oldest versions of a path, but for so many.
fn thin(connection: &Connection, path: &[u8], keep_versions: u32) -> Result<(), StoreError> {
    let newest: Option<(i64, i64)> = connection
        .prepare_cached(
            "SELECT seq, ended_seq FROM old_versions WHERE path = ?1
             ORDER BY seq DESC LIMIT 1 OFFSET ?2",
        )?
        .query_row(params![path, keep_versions], |row| Ok((row.get(0)?, row.get(1)?)))
        .optional()?;
    let Some((seq, ended)) = newest else { return Ok(()) };
    connection
        .prepare_cached("DELETE FROM old_versions WHERE path = ?1 AND seq <= ?2")?
        .execute(params![path, seq])?;
    connection
        .prepare_cached("INSERT OR REPLACE INTO thinned (path, until_seq) VALUES (?1, ?2)")?
        .execute(params![path, ended])?;
    Ok(())
}

/// Lets go of some of what is kept for too long; returns how many rows went.
pub(super) fn trim(connection: &Connection, now_ms: i64) -> Result<usize, StoreError> {
    let settings = settings(connection)?;
    let keep_ms = i64::try_from(settings.keep_for.as_millis()).unwrap_or(i64::MAX);
    let mut trimmed = expire(
        connection,
        "SELECT ended_seq, ended_at_ms FROM old_versions ORDER BY ended_seq LIMIT ?1",
        "DELETE FROM old_versions WHERE ended_seq <= ?1",
        "UPDATE head SET history_floor = max(history_floor, ?1)",
        now_ms.saturating_sub(keep_ms),
    )?;
    if trimmed > 0 {
        connection.execute(
            "DELETE FROM thinned WHERE until_seq <= (SELECT history_floor FROM head)",
            [],
        )?;
    }
    trimmed += expire(
        connection,
        "SELECT seq, at_ms FROM deletions ORDER BY seq LIMIT ?1",
        "DELETE FROM deletions WHERE seq <= ?1",
        "UPDATE head SET log_floor = max(log_floor, ?1)",
        now_ms.saturating_sub(keep_ms.max(DELETIONS_KEPT_MS)),
    )?;
    // Only if fewer are to be kept than before: commits see to the rest.
    let paths: Vec<Vec<u8>> = connection
        .prepare_cached(
            "SELECT path FROM old_versions GROUP BY path HAVING count(*) > ?1 LIMIT ?2",
        )?
        .query_and_then(params![settings.keep_versions, PATHS_THINNED], |row| row.get(0))?
        .collect::<Result<_, _>>()?;
    for path in &paths {
        thin(connection, path, settings.keep_versions)?;
    }
    Ok(trimmed + paths.len())
}

/// Deletes the first rows, up to the first one that is not over yet, and moves the floor there.
fn expire(
    connection: &Connection,
    first: &str,
    delete: &str,
    raise_floor: &str,
    over_before_ms: i64,
) -> Result<usize, StoreError> {
    let mut statement = connection.prepare_cached(first)?;
    let mut rows = statement.query([signed(TRIMMED as u64)])?;
    let mut last: Option<i64> = None;
    while let Some(row) = rows.next()? {
        if row.get::<_, i64>(1)? >= over_before_ms {
            break;
        }
        last = Some(row.get(0)?);
    }
    drop(rows);
    let Some(last) = last else { return Ok(0) };
    connection.prepare_cached(raise_floor)?.execute([last])?;
    Ok(connection.prepare_cached(delete)?.execute([last])?)
}

/// The settings, with the defaults for what was never set.
pub(super) fn settings(connection: &Connection) -> Result<WorkspaceSettings, StoreError> {
    let (quota, keep_ms, versions): (Option<i64>, Option<i64>, Option<u32>) = connection
        .prepare_cached("SELECT quota_bytes, keep_ms, keep_versions FROM settings")?
        .query_row([], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))?;
    let default = WorkspaceSettings::default();
    let keep_for = keep_ms.map(unsigned).transpose()?.map(std::time::Duration::from_millis);
    Ok(WorkspaceSettings {
        quota_bytes: quota.map(unsigned).transpose()?,
        keep_for: keep_for.unwrap_or(default.keep_for),
        keep_versions: versions.unwrap_or(default.keep_versions),
    })
}

pub(super) fn set_settings(
    connection: &Connection,
    settings: &WorkspaceSettings,
) -> Result<(), StoreError> {
    let keep_ms = i64::try_from(settings.keep_for.as_millis()).unwrap_or(i64::MAX);
    connection
        .prepare_cached("UPDATE settings SET quota_bytes = ?1, keep_ms = ?2, keep_versions = ?3")?
        .execute(params![settings.quota_bytes.map(signed), keep_ms, settings.keep_versions])?;
    Ok(())
}

pub(super) fn usage(connection: &Connection) -> Result<Usage, StoreError> {
    let (packs, pack_bytes): (i64, i64) = connection
        .prepare_cached("SELECT count(*), coalesce(sum(bytes), 0) FROM packs")?
        .query_row([], |row| Ok((row.get(0)?, row.get(1)?)))?;
    let old_versions: i64 = connection
        .prepare_cached("SELECT count(*) FROM old_versions")?
        .query_row([], |row| row.get(0))?;
    Ok(Usage {
        packs: unsigned(packs)?,
        pack_bytes: unsigned(pack_bytes)?,
        old_versions: unsigned(old_versions)?,
        oldest_version: unsigned(history_floor(connection)?)?,
    })
}

fn history_floor(connection: &Connection) -> Result<i64, StoreError> {
    Ok(connection
        .prepare_cached("SELECT history_floor FROM head")?
        .query_row([], |row| row.get(0))?)
}

/// The bounds of everything below a path, in the plain order of bytes: `/` comes directly before `0`.
fn below(path: &WirePath) -> (Vec<u8>, Vec<u8>) {
    ([path.as_bytes(), b"/"].concat(), [path.as_bytes(), b"0"].concat())
}

/// See [`super::super::WorkspaceStore::restore_plan`].
pub(super) fn restore_plan(
    connection: &Connection,
    path: Option<&WirePath>,
    version: Option<u64>,
) -> Result<RestorePlan, StoreError> {
    let head = read_head(connection)?;
    let version = match version {
        Some(asked) if asked > head.seq => {
            return Err(StoreError::BeyondHead { asked, head: head.seq });
        }
        Some(asked) => {
            let oldest = unsigned(history_floor(connection)?)?;
            if asked < oldest {
                return Err(StoreError::VersionForgotten { asked, oldest });
            }
            asked
        }
        None => before_last_change(connection, path)?,
    };
    let mut plan = RestorePlan { version, ops: Vec::new(), forgotten: Vec::new() };
    let mut old: Vec<(WirePath, Entry)> = Vec::new();
    let at = signed(version);
    let select = format!(
        "SELECT e.path, {ENTRY_COLUMNS} FROM old_versions e
         LEFT JOIN recipes r ON r.digest = e.recipe WHERE e.seq <= ?1 AND e.ended_seq > ?1"
    );
    let mut take = |row: &Row<'_>| -> Result<(), StoreError> {
        if old.len() == RESTORED {
            return Err(StoreError::TooMuch { limit: RESTORED });
        }
        old.push((path_of(row, 0)?, entry_from_row(row, 1)?));
        Ok(())
    };
    if let Some(path) = path {
        let (from, to) = below(path);
        let mut exact = connection.prepare_cached(&format!("{select} AND e.path = ?2"))?;
        exact
            .query_and_then(params![at, path.as_bytes()], &mut take)?
            .collect::<Result<(), _>>()?;
        let mut inside =
            connection.prepare_cached(&format!("{select} AND e.path > ?2 AND e.path < ?3"))?;
        inside.query_and_then(params![at, from, to], &mut take)?.collect::<Result<(), _>>()?;
    } else {
        let mut all = connection.prepare_cached(&select)?;
        all.query_and_then([at], &mut take)?.collect::<Result<(), _>>()?;
    }
    old.sort_by(|(a, _), (b, _)| a.cmp(b));
    plan.forgotten = forgotten(connection, path, at)?;
    add_ops(connection, old, &mut plan.ops)?;
    Ok(plan)
}

/// What makes the tree hold these entries, in the order of a walk, with the directories they need.
fn add_ops(
    connection: &Connection,
    old: Vec<(WirePath, Entry)>,
    ops: &mut Vec<Op>,
) -> Result<(), StoreError> {
    let mut tree = Tree::new(connection);
    let mut made = std::collections::HashSet::new();
    for (path, entry) in old {
        let mut missing: Vec<WirePath> = Vec::new();
        for above in path.ancestors() {
            if made.contains(&above) || current(&mut tree, &above)?.is_some() {
                break;
            }
            missing.push(above);
        }
        for directory in missing.into_iter().rev() {
            made.insert(directory.clone());
            ops.push(Op {
                path: directory,
                expected: None,
                new: Some(Entry::Dir),
                conflict_of: None,
            });
        }
        let expected = current(&mut tree, &path)?;
        if expected != Some(entry.identity()) {
            if entry == Entry::Dir {
                made.insert(path.clone());
            }
            ops.push(Op { path, expected, new: Some(entry), conflict_of: None });
        }
    }
    Ok(())
}

/// Identity of what stands at a path now.
fn current(tree: &mut Tree<'_>, path: &WirePath) -> Result<Option<Digest>, StoreError> {
    let Some((parent, _)) = tree.parent(path)? else { return Ok(None) };
    Ok(tree.find(parent, path.name())?.map(|found| found.identity))
}

/// Paths of which the version at `at` went because there were too many.
fn forgotten(
    connection: &Connection,
    path: Option<&WirePath>,
    at: i64,
) -> Result<Vec<WirePath>, StoreError> {
    let mut statement =
        connection.prepare_cached("SELECT path FROM thinned WHERE until_seq > ?1 ORDER BY path")?;
    let paths = statement.query_and_then([at], |row| path_of(row, 0))?;
    paths
        .filter(|found| match (path, found) {
            (Some(path), Ok(found)) => found == path || found.is_below(path),
            _ => true,
        })
        .collect()
}

/// The version before the last change of a path. For a directory that was deleted: before the deletion
/// of what was in it began, which is one deletion as long as it goes on.
fn before_last_change(connection: &Connection, path: Option<&WirePath>) -> Result<u64, StoreError> {
    let nothing = |path: &WirePath| StoreError::NothingBefore { path: path.to_string() };
    let Some(path) = path else {
        return Err(StoreError::NothingBefore { path: "the whole workspace".to_owned() });
    };
    let last: Option<(i64, i64, i64, bool)> = connection
        .prepare_cached(
            "SELECT ended_seq, ended_at_ms, kind, deleted FROM old_versions
             WHERE path = ?1 ORDER BY seq DESC LIMIT 1",
        )?
        .query_row([path.as_bytes()], |row| {
            Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?))
        })
        .optional()?;
    let Some((mut ended, mut at_ms, kind, deleted)) = last else { return Err(nothing(path)) };
    if kind == Kind::Dir as i64 && deleted {
        let (from, to) = below(path);
        let mut statement = connection.prepare_cached(
            "SELECT ended_seq, ended_at_ms FROM old_versions
             WHERE deleted = 1 AND ended_seq < ?1 AND path > ?2 AND path < ?3
             ORDER BY ended_seq DESC",
        )?;
        let mut rows = statement.query(params![ended, from, to])?;
        while let Some(row) = rows.next()? {
            let earlier_ms: i64 = row.get(1)?;
            if at_ms - earlier_ms > ONE_DELETION_MS {
                break;
            }
            (ended, at_ms) = (row.get(0)?, earlier_ms);
        }
    }
    unsigned(ended - 1)
}

/// The entry at a path.
pub(super) fn entry(connection: &Connection, path: &WirePath) -> Result<Option<Entry>, StoreError> {
    let mut tree = Tree::new(connection);
    let Some((parent, _)) = tree.parent(path)? else { return Ok(None) };
    tree.find(parent, path.name())?.map(|found| tree.entry(found.id)).transpose()
}

pub(super) fn path_of(row: &Row<'_>, column: usize) -> Result<WirePath, StoreError> {
    WirePath::new(row.get::<_, Vec<u8>>(column)?).map_err(|_| damaged("an invalid path"))
}

/// The author in a column, which is empty where it was not recorded.
pub(super) fn author(row: &Row<'_>, column: usize) -> Result<Option<Author>, StoreError> {
    let bytes: Option<Vec<u8>> = row.get(column)?;
    bytes.map(|bytes| Author::decode(&bytes).ok_or(damaged("an author"))).transpose()
}
