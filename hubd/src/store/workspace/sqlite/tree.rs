//! Rows of the tree: how entries rest, and how a path finds its row.

use std::collections::{BTreeSet, HashMap};

use cortex_shared::chunk::Recipe;
use cortex_shared::entry::{Digest, DirDigest, Entry, File, Kind};
use cortex_shared::wire_path::WirePath;
use rusqlite::{Connection, OptionalExtension as _, Row, params};

use super::super::super::database::DatabaseError;
use super::super::{Author, StoreError, Subtree};
use super::schema::ROOT_ID;

/// Columns of an entry (`e`) with its recipe (`r`), in the order in which [`entry_from_row`] reads
/// them.
pub(super) const ENTRY_COLUMNS: &str = "e.kind, e.size, e.mtime_ns, e.content, r.recipe, e.target";

pub(super) const fn damaged(what: &'static str) -> StoreError {
    StoreError::Database(DatabaseError::Damaged { what })
}

/// Reads a 32-byte column.
pub(super) fn digest(bytes: &[u8]) -> Result<Digest, StoreError> {
    Digest::from_slice(bytes).ok_or(damaged("a digest that is not 32 bytes"))
}

/// Reads a number that this program never writes negative.
pub(super) fn unsigned(number: i64) -> Result<u64, StoreError> {
    u64::try_from(number).map_err(|_| damaged("a negative number"))
}

/// Writes a number. Sizes and versions stay far below the limit, which the door checks.
pub(super) fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

/// A recipe as its table keeps it, with the digest that names it there; none of a single chunk or none.
pub(super) fn kept_recipe(recipe: &Recipe) -> Option<(Digest, Vec<u8>)> {
    let bytes = (!recipe.is_empty()).then(|| recipe.encode())?;
    Some((Digest::of(&bytes), bytes))
}

pub(super) fn kind(number: i64) -> Result<Kind, StoreError> {
    [Kind::File, Kind::ExecutableFile, Kind::Link, Kind::Dir]
        .into_iter()
        .find(|kind| *kind as i64 == number)
        .ok_or(damaged("an unknown kind of entry"))
}

/// Reads the columns of [`ENTRY_COLUMNS`], beginning at `first`.
pub(super) fn entry_from_row(row: &Row<'_>, first: usize) -> Result<Entry, StoreError> {
    let kind = kind(row.get(first)?)?;
    Ok(match kind {
        Kind::Dir => Entry::Dir,
        Kind::Link => Entry::Link { target: row.get::<_, Vec<u8>>(first + 5)?.into() },
        Kind::File | Kind::ExecutableFile => {
            let size = unsigned(row.get(first + 1)?)?;
            let recipe = match row.get_ref(first + 4)?.as_bytes_or_null() {
                Ok(Some(bytes)) => {
                    Recipe::parse(bytes, size).map_err(|_| damaged("an invalid recipe"))?
                }
                Ok(None) => Recipe::default(),
                Err(_) => return Err(damaged("a recipe of another type")),
            };
            let content = row.get_ref(first + 3)?.as_bytes().map_err(|_| damaged("no content"))?;
            Entry::File(File {
                content: digest(content)?,
                size,
                executable: kind == Kind::ExecutableFile,
                mtime_ns: row.get(first + 2)?,
                recipe,
            })
        }
    })
}

/// What a commit has to know of an entry before it touches it.
#[derive(Clone, Copy)]
pub(super) struct Found {
    pub(super) id: i64,
    pub(super) kind: Kind,
    /// What compare-and-set compares.
    pub(super) identity: Digest,
    pub(super) size: u64,
    pub(super) seq: u64,
}

/// When an entry was put where it stands, and by whom.
pub(super) struct Made<'a> {
    pub(super) seq: u64,
    pub(super) at_ms: i64,
    pub(super) author: &'a Author,
}

/// The tree while one commit changes it.
pub(super) struct Tree<'a> {
    connection: &'a Connection,
    /// Directories found so far, with their depth; the root is 0.
    directories: HashMap<WirePath, (i64, usize)>,
    /// Directories whose digests are no longer right, by depth.
    touched: BTreeSet<(usize, i64)>,
}

impl<'a> Tree<'a> {
    pub(super) fn new(connection: &'a Connection) -> Self {
        Self { connection, directories: HashMap::new(), touched: BTreeSet::new() }
    }

    /// Row and depth of the directory that holds `path`; `None` if there is no such directory.
    pub(super) fn parent(&mut self, path: &WirePath) -> Result<Option<(i64, usize)>, StoreError> {
        let Some(parent) = path.parent() else { return Ok(Some((ROOT_ID, 0))) };
        if let Some(found) = self.directories.get(&parent) {
            return Ok(Some(*found));
        }
        let mut row = ROOT_ID;
        let mut depth = 0;
        for name in parent.components() {
            match self.find(row, name)? {
                Some(Found { id, kind: Kind::Dir, .. }) => (row, depth) = (id, depth + 1),
                _ => return Ok(None),
            }
        }
        self.directories.insert(parent, (row, depth));
        Ok(Some((row, depth)))
    }

    pub(super) fn find(&self, parent: i64, name: &[u8]) -> Result<Option<Found>, StoreError> {
        let mut statement = self.connection.prepare_cached(
            "SELECT id, kind, digest, size, seq FROM entries WHERE parent_id = ?1 AND name = ?2",
        )?;
        let mut rows = statement.query(params![parent, name])?;
        let Some(row) = rows.next()? else { return Ok(None) };
        let kind = kind(row.get(1)?)?;
        let identity = match kind {
            Kind::Dir => Entry::Dir.identity(),
            _ => digest(row.get_ref(2)?.as_bytes().map_err(|_| damaged("no digest"))?)?,
        };
        let (size, seq) = (unsigned(row.get(3)?)?, unsigned(row.get(4)?)?);
        Ok(Some(Found { id: row.get(0)?, kind, identity, size, seq }))
    }

    /// The whole entry of a row.
    pub(super) fn entry(&self, id: i64) -> Result<Entry, StoreError> {
        let mut statement = self.connection.prepare_cached(&format!(
            "SELECT {ENTRY_COLUMNS} FROM entries e LEFT JOIN recipes r ON r.digest = e.recipe
             WHERE e.id = ?1"
        ))?;
        let mut rows = statement.query([id])?;
        entry_from_row(rows.next()?.ok_or(damaged("an entry vanished"))?, 0)
    }

    pub(super) fn has_children(&self, id: i64) -> Result<bool, StoreError> {
        let child: Option<i64> = self
            .connection
            .prepare_cached("SELECT 1 FROM entries WHERE parent_id = ?1 LIMIT 1")?
            .query_row([id], |row| row.get(0))
            .optional()?;
        Ok(child.is_some())
    }

    /// Removes a row; a directory must be empty.
    pub(super) fn remove(
        &mut self,
        path: &WirePath,
        parent: (i64, usize),
        found: &Found,
    ) -> Result<(), StoreError> {
        self.connection.prepare_cached("DELETE FROM entries WHERE id = ?1")?.execute([found.id])?;
        self.no_longer_a_directory(path, parent.1, found.id);
        self.touched.insert((parent.1, parent.0));
        Ok(())
    }

    /// Puts an entry at a path, in the place of `found` if there is one.
    pub(super) fn put(
        &mut self,
        path: &WirePath,
        parent: (i64, usize),
        found: Option<&Found>,
        entry: &Entry,
        made: &Made<'_>,
    ) -> Result<(), StoreError> {
        let digest = match entry {
            Entry::Dir => DirDigest::new().finish(),
            _ => entry.identity(),
        };
        let (mut size, mut mtime_ns, mut content, mut recipe, mut target) =
            (0, 0, None, None, None);
        match entry {
            Entry::File(file) => {
                (size, mtime_ns) = (signed(file.size), file.mtime_ns);
                content = Some(*file.content.as_bytes());
                recipe = self.put_recipe(&file.recipe)?;
            }
            Entry::Link { target: bytes } => target = Some(bytes),
            Entry::Dir => {}
        }
        if let Some(found) = found {
            self.no_longer_a_directory(path, parent.1, found.id);
        }
        // An update keeps the row, so that replacing is one change of one row.
        self.connection
            .prepare_cached(
                "INSERT INTO entries
                 (parent_id, name, kind, size, mtime_ns, content, recipe, target, digest, seq,
                 author, at_ms) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12)
                 ON CONFLICT (parent_id, name) DO UPDATE SET kind = excluded.kind,
                 size = excluded.size, mtime_ns = excluded.mtime_ns, content = excluded.content,
                 recipe = excluded.recipe, target = excluded.target, digest = excluded.digest,
                 seq = excluded.seq, author = excluded.author, at_ms = excluded.at_ms",
            )?
            .execute(params![
                parent.0,
                path.name(),
                entry.kind() as u8,
                size,
                mtime_ns,
                content,
                recipe.map(|digest| *digest.as_bytes()),
                target,
                digest.as_bytes(),
                signed(made.seq),
                made.author.encode(),
                made.at_ms,
            ])?;
        self.touched.insert((parent.1, parent.0));
        Ok(())
    }

    fn put_recipe(&self, recipe: &Recipe) -> Result<Option<Digest>, StoreError> {
        let Some((digest, bytes)) = kept_recipe(recipe) else { return Ok(None) };
        self.connection
            .prepare_cached("INSERT OR IGNORE INTO recipes (digest, recipe) VALUES (?1, ?2)")?
            .execute(params![digest.as_bytes(), bytes])?;
        Ok(Some(digest))
    }

    fn no_longer_a_directory(&mut self, path: &WirePath, parent_depth: usize, id: i64) {
        self.directories.remove(path);
        self.touched.remove(&(parent_depth + 1, id));
    }

    /// Computes the digests of all touched directories anew, deepest first, each once, and returns
    /// that of the root; `None` if nothing was touched.
    pub(super) fn refresh_digests(&mut self) -> Result<Option<Digest>, StoreError> {
        let mut root = None;
        while let Some((depth, id)) = self.touched.pop_last() {
            let digest = self.directory_digest(id)?;
            let parent: Option<i64> = self
                .connection
                .prepare_cached("UPDATE entries SET digest = ?2 WHERE id = ?1 RETURNING parent_id")?
                .query_row(params![id, digest.as_bytes()], |row| row.get(0))?;
            match parent {
                Some(parent) if depth > 0 => drop(self.touched.insert((depth - 1, parent))),
                None if id == ROOT_ID => root = Some(digest),
                _ => return Err(damaged("a directory at the wrong depth")),
            }
        }
        Ok(root)
    }

    pub(super) fn directory_digest(&self, id: i64) -> Result<Digest, StoreError> {
        let mut statement = self.connection.prepare_cached(
            "SELECT name, kind, digest FROM entries WHERE parent_id = ?1 ORDER BY name",
        )?;
        let mut rows = statement.query([id])?;
        let mut builder = DirDigest::new();
        while let Some(row) = rows.next()? {
            let name = row.get_ref(0)?.as_bytes().map_err(|_| damaged("no name"))?;
            let child = digest(row.get_ref(2)?.as_bytes().map_err(|_| damaged("no digest"))?)?;
            builder.child(name, kind(row.get(1)?)?, &child);
        }
        Ok(builder.finish())
    }
}

/// See [`super::super::WorkspaceStore::subtree`].
pub(super) fn subtree(
    connection: &Connection,
    path: &WirePath,
    limit: usize,
) -> Result<Option<Subtree>, StoreError> {
    let mut tree = Tree::new(connection);
    let Some((parent, _)) = tree.parent(path)? else { return Ok(None) };
    let found = tree.find(parent, path.name())?.filter(|found| found.kind == Kind::Dir);
    let Some(top) = found else { return Ok(None) };
    let digest: Vec<u8> = connection
        .prepare_cached("SELECT digest FROM entries WHERE id = ?1")?
        .query_row([top.id], |row| row.get(0))?;
    let digest = self::digest(&digest)?;
    let mut entries = Vec::new();
    let mut children = connection.prepare_cached(&format!(
        "SELECT e.id, e.name, {ENTRY_COLUMNS} FROM entries e
         LEFT JOIN recipes r ON r.digest = e.recipe WHERE e.parent_id = ?1"
    ))?;
    let mut open = vec![(top.id, path.clone())];
    while let Some((directory, path)) = open.pop() {
        let mut rows = children.query([directory])?;
        while let Some(row) = rows.next()? {
            if entries.len() == limit {
                return Err(StoreError::TooMuch { limit });
            }
            let name: Vec<u8> = row.get(1)?;
            let path = path.join(&name).map_err(|_| damaged("an invalid path"))?;
            let entry = entry_from_row(row, 2)?;
            if entry.is_dir() {
                open.push((row.get(0)?, path.clone()));
            }
            entries.push((path, entry));
        }
    }
    entries.sort_by(|(a, _), (b, _)| a.cmp(b));
    Ok(Some(Subtree { digest, entries }))
}

/// Paths of rows, found by walking up, with the directories that were seen on the way.
pub(super) struct Paths<'a> {
    connection: &'a Connection,
    directories: HashMap<i64, Vec<u8>>,
}

impl<'a> Paths<'a> {
    pub(super) fn new(connection: &'a Connection) -> Self {
        Self { connection, directories: HashMap::from([(ROOT_ID, Vec::new())]) }
    }

    pub(super) fn path(&mut self, parent: i64, name: &[u8]) -> Result<WirePath, StoreError> {
        let mut unknown = Vec::new();
        let mut row = parent;
        while !self.directories.contains_key(&row) {
            let (above, name): (i64, Vec<u8>) = self
                .connection
                .prepare_cached("SELECT parent_id, name FROM entries WHERE id = ?1")?
                .query_row([row], |row| Ok((row.get(0)?, row.get(1)?)))?;
            unknown.push((row, name));
            row = above;
        }
        let mut path = self.directories[&row].clone();
        for (row, name) in unknown.into_iter().rev() {
            push_name(&mut path, &name);
            self.directories.insert(row, path.clone());
        }
        push_name(&mut path, name);
        WirePath::new(path).map_err(|_| damaged("an invalid path"))
    }
}

fn push_name(path: &mut Vec<u8>, name: &[u8]) {
    if !path.is_empty() {
        path.push(b'/');
    }
    path.extend_from_slice(name);
}
