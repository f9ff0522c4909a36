//! Whether what a workspace's database says fits together. Only reads.

use cortex_shared::entry::{Digest, Entry};
use rusqlite::Connection;

use super::super::StoreError;
use super::content;
use super::history;
use super::read_head;
use super::schema::ROOT_ID;
use super::tree::{Tree, damaged, digest, entry_from_row, kind, unsigned};

/// What was looked at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Checked {
    /// Entries of the tree, without its root.
    pub entries: u64,
    /// Old versions that are kept.
    pub old_versions: u64,
    /// Chunks that are known to be lost: the members have been asked for them.
    pub wanted: u64,
}

/// Checks every chunk of every recipe, the digests of all directories, and the counters of the head.
pub(in crate::store) fn check(
    connection: &Connection,
    problem: &mut dyn FnMut(String),
) -> Result<Checked, StoreError> {
    let mut checked = Checked::default();
    let mut content_bytes = 0;
    // Without the root.
    let rows = "SELECT e.kind, e.size, e.mtime_ns, e.content, r.recipe, e.target, e.digest, e.id
         FROM entries e LEFT JOIN recipes r ON r.digest = e.recipe WHERE e.parent_id IS NOT NULL";
    let mut statement = connection.prepare(rows)?;
    let mut rows = statement.query([])?;
    while let Some(row) = rows.next()? {
        checked.entries += 1;
        let id: i64 = row.get(7)?;
        let entry = match entry_from_row(row, 0) {
            Ok(entry) => entry,
            Err(error) => {
                problem(format!("entry {id}: {error}"));
                continue;
            }
        };
        if let Entry::File(file) = &entry {
            content_bytes += file.size;
        }
        if !entry.is_dir() && digest(&row.get::<_, Vec<u8>>(6)?)? != entry.identity() {
            problem(format!("entry {id} is not what its digest says"));
        }
        check_chunks(connection, &entry, &mut |what| problem(format!("entry {id}: {what}")))?;
    }
    let rows = "SELECT v.kind, v.size, v.mtime_ns, v.content, r.recipe, v.target, v.seq
         FROM old_versions v LEFT JOIN recipes r ON r.digest = v.recipe";
    let mut statement = connection.prepare(rows)?;
    let mut rows = statement.query([])?;
    while let Some(row) = rows.next()? {
        checked.old_versions += 1;
        let seq: i64 = row.get(6)?;
        let mut tell = |what| problem(format!("old version {seq}: {what}"));
        match entry_from_row(row, 0) {
            Ok(entry) => check_chunks(connection, &entry, &mut tell)?,
            Err(error) => tell(error.to_string()),
        }
    }
    check_directories(connection, problem)?;
    let head = read_head(connection)?;
    if (head.entries, head.content_bytes) != (checked.entries, content_bytes) {
        problem(format!(
            "the head counts {} entries of {} bytes, the tree has {} of {content_bytes}",
            head.entries, head.content_bytes, checked.entries,
        ));
    }
    let root: Vec<u8> =
        connection
            .query_row("SELECT digest FROM entries WHERE id = ?1", [ROOT_ID], |row| row.get(0))?;
    if head.seq > 0 && digest(&root)? != head.root {
        problem("the head is not the digest of the tree".to_owned());
    }
    if !history::is_known(connection, &super::head_of(&head)?)? {
        problem("the head is not one of the versions that are remembered".to_owned());
    }
    checked.wanted =
        unsigned(connection.query_row("SELECT count(*) FROM wanted", [], |row| row.get(0))?)?;
    Ok(checked)
}

/// Each chunk of a file's content is present, with its length, or is known to be lost.
fn check_chunks(
    connection: &Connection,
    entry: &Entry,
    problem: &mut dyn FnMut(String),
) -> Result<(), StoreError> {
    let Entry::File(file) = entry else { return Ok(()) };
    let mut wanted = connection.prepare_cached("SELECT 1 FROM wanted WHERE hash = ?1")?;
    for chunk in file.chunks() {
        match content::len_of(connection, &chunk.hash)? {
            Some(len) if len == i64::from(chunk.len) => {}
            Some(len) => {
                problem(format!("chunk {} has {len} bytes, not {}", chunk.hash, chunk.len));
            }
            None if wanted.exists([chunk.hash.as_bytes()])? => {}
            None => problem(format!("chunk {} is missing", chunk.hash)),
        }
    }
    Ok(())
}

fn check_directories(
    connection: &Connection,
    problem: &mut dyn FnMut(String),
) -> Result<(), StoreError> {
    let tree = Tree::new(connection);
    let mut statement = connection.prepare("SELECT id, kind, digest FROM entries")?;
    let mut rows = statement.query([])?;
    while let Some(row) = rows.next()? {
        let id: i64 = row.get(0)?;
        if kind(row.get(1)?).is_ok_and(|kind| kind == cortex_shared::entry::Kind::Dir)
            && tree.directory_digest(id)? != digest(&row.get::<_, Vec<u8>>(2)?)?
        {
            problem(format!("directory {id} is not what its digest says"));
        }
    }
    Ok(())
}

/// The chunks that are looked for in a pack.
pub(in crate::store) fn chunks_in(
    connection: &Connection,
    pack: &Digest,
) -> Result<Vec<Digest>, StoreError> {
    let mut statement = connection.prepare_cached(
        "SELECT c.hash FROM chunks c JOIN packs p ON p.id = c.pack_id WHERE p.hash = ?1",
    )?;
    statement
        .query_and_then([pack.as_bytes()], |row| {
            Digest::from_slice(&row.get::<_, Vec<u8>>(0)?)
                .ok_or(damaged("a digest that is not 32 bytes"))
        })?
        .collect()
}
