//! The index of a workspace: the three trees, and what the files looked like when they were hashed.
//!
//! One SQLite file per workspace in the agent's state directory, owned by the workspace's engine
//! alone. It is disposable: if it is damaged it is moved aside, and the workspace joins anew with an
//! empty Base, which merges and never deletes. Its transactions may be lost by a power failure
//! (never torn): the older state that is then found is caught up with by scanning and by asking the
//! hub again.
//!
//! Rows are keyed by [`WirePath::sort_key`], so that reading them in order is a depth-first walk.
//! Whether the trees differ at a path is computed when a row is written, and rows that differ are
//! found without looking at the others.

mod codec;
mod left_out;
mod listing;
mod peek;
mod power;
mod replica;
#[cfg(test)]
mod tests;
mod unanswered;
mod writer;

use std::io;
use std::path::{Path, PathBuf};

use cortex_shared::entry::{Digest, Entry, same};
use cortex_shared::ids::WorkspaceEpoch;
use cortex_shared::wire_path::WirePath;
use rusqlite::config::DbConfig;
use rusqlite::{Connection, OptionalExtension as _, params};

use super::hub::Head;
use super::ignore::Ignore;
use super::plan::Row;
use crate::root_dir::{DirIdentity, Meta};
pub use unanswered::{SentOp, Unanswered};
pub use writer::Writer;

const FILE_NAME: &str = "index.db";
/// Raised with every change of the schema; an index of another version is rebuilt.
const SCHEMA_VERSION: i64 = 1;
const SCHEMA: &str = "
    CREATE TABLE entry (
        key BLOB PRIMARY KEY,
        base BLOB, local BLOB, remote BLOB,
        unknown INTEGER NOT NULL,
        dirty INTEGER NOT NULL,
        content BLOB,
        dev INTEGER, ino INTEGER, size INTEGER, mtime INTEGER, ctime INTEGER, racy INTEGER
    ) WITHOUT ROWID;
    CREATE INDEX entry_dirty ON entry(key) WHERE dirty != 0;
    CREATE INDEX entry_content ON entry(content) WHERE content IS NOT NULL;
    CREATE TABLE meta (name TEXT PRIMARY KEY, value BLOB) WITHOUT ROWID;
";
/// Added without a new version: an index of before simply remembers none.
const LATER_SCHEMA: &str = "
    CREATE TABLE IF NOT EXISTS displaced (
        name BLOB PRIMARY KEY, path BLOB NOT NULL, size INTEGER NOT NULL, mtime INTEGER NOT NULL,
        content BLOB
    ) WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS unanswered (id BLOB NOT NULL, ops BLOB NOT NULL);
";
/// The same for a table that has been there for longer than one of its columns.
const LATER_COLUMN: (&str, &str) = (
    "SELECT 1 FROM pragma_table_info('displaced') WHERE name = 'content'",
    "ALTER TABLE displaced ADD COLUMN content BLOB",
);
const COLUMNS: &str = "key, base, local, remote, unknown, dev, ino, size, mtime, ctime, racy";

/// Why the index cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum IndexError {
    /// SQLite refused.
    #[error("index database failed")]
    Database(#[from] rusqlite::Error),
    /// A row does not hold what only we write into it.
    #[error("index row is damaged: {what}")]
    Damaged {
        /// Which part.
        what: &'static str,
    },
    /// The file could not be created or moved aside.
    #[error("cannot open or remove index {path}")]
    Open {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl IndexError {
    /// Whether only a new index helps.
    #[must_use]
    pub fn is_damage(&self) -> bool {
        use rusqlite::ErrorCode::{DatabaseCorrupt, NotADatabase};
        match self {
            Self::Database(error) => {
                matches!(error.sqlite_error_code(), Some(DatabaseCorrupt | NotADatabase))
            }
            Self::Damaged { .. } => true,
            Self::Open { .. } => false,
        }
    }
}

/// What a file looked like when its content was read. While it looks the same, and could not have
/// been changed unseen (`racy`), the content need not be read again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    /// File system.
    pub dev: u64,
    /// File number.
    pub ino: u64,
    /// Length in bytes.
    pub size: u64,
    /// Modification time in nanoseconds.
    pub mtime_ns: i64,
    /// Change time in nanoseconds.
    pub ctime_ns: i64,
    /// It had been changed so shortly before it was read that a change right after it might have
    /// left the same times.
    pub racy: bool,
    /// The machine was started since, and the file may have been lost with the power.
    pub distrusted: bool,
}

impl Stamp {
    /// The stamp of a file of which `meta` was read both before and after its content.
    #[must_use]
    pub fn new(meta: &Meta, racy: bool) -> Self {
        let Meta { dev, ino, size, mtime_ns, ctime_ns, .. } = *meta;
        Self { dev, ino, size, mtime_ns, ctime_ns, racy, distrusted: false }
    }

    /// Whether the content is surely what it was.
    #[must_use]
    pub fn proves_unchanged(&self, meta: &Meta) -> bool {
        !self.racy && *self == Self::new(meta, false)
    }

    /// Whether this is the same file with the same content as far as can be told after a rename,
    /// which changes `ctime`.
    #[must_use]
    pub fn fits_renamed(&self, meta: &Meta) -> bool {
        (self.dev, self.ino, self.size, self.mtime_ns)
            == (meta.dev, meta.ino, meta.size, meta.mtime_ns)
    }
}

/// A file in the trash, and what it looked like when it got there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Displaced {
    /// Its name in the trash.
    pub name: Vec<u8>,
    /// Where it stood.
    pub path: WirePath,
    /// Length in bytes.
    pub size: u64,
    /// Modification time in nanoseconds.
    pub mtime_ns: i64,
    /// What it held, if it was written so shortly before that another write right after would leave the
    /// same time: then its length and its time say nothing.
    pub content: Option<Digest>,
}

/// A row with its stamp.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IndexRow {
    /// The three trees.
    pub row: Row,
    /// What the local file or link looked like.
    pub stamp: Option<Stamp>,
}

/// What is known of the tree here at a path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Seen {
    /// Nothing stands there.
    Absent,
    /// This stands there.
    Entry(Entry, Option<Stamp>),
    /// Something stands there or stood there, but cannot be read now.
    Unknown,
}

/// Rows that differ, for the planner.
#[derive(Debug, Default)]
pub struct Window {
    /// Ancestors of the first row that differ, then the rows themselves.
    pub rows: Vec<Row>,
    /// How many are such ancestors.
    pub context: usize,
    /// There are more.
    pub truncated: bool,
}

/// How far the history of the hub is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cursor {
    /// Which history.
    pub epoch: WorkspaceEpoch,
    /// The last change that is in Remote.
    pub seq: u64,
}

/// Totals, kept up to date by every write.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Files and links here.
    pub local: u64,
    /// Entries on which both sides agreed, directories included.
    pub base: u64,
}

/// The open index.
pub struct Index {
    database: Connection,
    counts: Counts,
    pub(super) ignore: Ignore,
}

impl Index {
    /// Opens or creates the index in `folder`, which must exist. A damaged or outdated one is moved
    /// aside first; that is logged.
    ///
    /// # Errors
    /// If the file system or SQLite refuses.
    pub fn open(folder: &Path) -> Result<Self, IndexError> {
        match Self::open_existing(folder) {
            Err(error) if error.is_damage() => {
                tracing::error!(?folder, %error, "index is damaged: joining anew");
                Self::set_aside(folder)?;
                Self::open_existing(folder)
            }
            result => result,
        }
    }

    /// Moves the index out of the way, so that the next one is empty. Must not be open.
    ///
    /// # Errors
    /// If the file system refuses.
    pub fn set_aside(folder: &Path) -> Result<(), IndexError> {
        for suffix in ["", "-wal", "-shm"] {
            let path = folder.join(format!("{FILE_NAME}{suffix}"));
            let aside = folder.join(format!("{FILE_NAME}.damaged{suffix}"));
            match std::fs::rename(&path, aside) {
                Err(source) if source.kind() != io::ErrorKind::NotFound => {
                    return Err(IndexError::Open { path, source });
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Removes the index, so that the next one is empty. Must not be open.
    ///
    /// # Errors
    /// If the file system refuses.
    pub fn remove(folder: &Path) -> Result<(), IndexError> {
        for suffix in ["", "-wal", "-shm"] {
            let path = folder.join(format!("{FILE_NAME}{suffix}"));
            match std::fs::remove_file(&path) {
                Err(source) if source.kind() != io::ErrorKind::NotFound => {
                    return Err(IndexError::Open { path, source });
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn open_existing(folder: &Path) -> Result<Self, IndexError> {
        let database = Connection::open(folder.join(FILE_NAME))?;
        database.set_prepared_statement_cache_capacity(32);
        // Otherwise SQLite plans each statement with a `LIMIT ?` anew whenever that is bound, which takes longer
        // than most of them run.
        database.set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_QPSG, true)?;
        database.pragma_update(None, "journal_mode", "WAL")?;
        database.pragma_update(None, "synchronous", "NORMAL")?;
        database.pragma_update(None, "cache_size", -16_384)?;
        let version: i64 = database.pragma_query_value(None, "user_version", |row| row.get(0))?;
        if version == 0 {
            let transaction = database.unchecked_transaction()?;
            transaction.execute_batch(SCHEMA)?;
            transaction.pragma_update(None, "user_version", SCHEMA_VERSION)?;
            transaction.commit()?;
        } else if version != SCHEMA_VERSION {
            return Err(IndexError::Damaged { what: "schema version" });
        }
        database.execute_batch(LATER_SCHEMA)?;
        let (has, add) = LATER_COLUMN;
        if !database.prepare(has)?.exists([])? {
            database.execute_batch(add)?;
        }
        let mut index = Self { database, counts: Counts::default(), ignore: Ignore::default() };
        index.counts = Counts {
            local: index.meta_number("local_count")?.unwrap_or(0),
            base: index.meta_number("base_count")?.unwrap_or(0),
        };
        Ok(index)
    }

    /// Totals.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// Does several writes in one transaction. Nothing of it is kept if `work` fails.
    ///
    /// # Errors
    /// Those of `work` and of SQLite.
    pub fn batch<T>(
        &mut self,
        work: impl FnOnce(&mut Writer<'_>) -> Result<T, IndexError>,
    ) -> Result<T, IndexError> {
        let transaction = self.database.unchecked_transaction()?;
        let mut writer = Writer::new(&transaction, self.counts, &self.ignore);
        let result = work(&mut writer)?;
        let counts = writer.finish(self.counts)?;
        transaction.commit()?;
        self.counts = counts;
        Ok(result)
    }

    /// The row of a path.
    ///
    /// # Errors
    /// Those of SQLite, and a damaged row.
    pub fn get(&self, path: &WirePath) -> Result<Option<IndexRow>, IndexError> {
        get(&self.database, path)
    }

    /// Up to `limit` rows below `directory` (all for `None`) that come after `after`, in order.
    ///
    /// # Errors
    /// Those of SQLite, and a damaged row.
    pub fn below(
        &self,
        directory: Option<&WirePath>,
        after: Option<&WirePath>,
        limit: u32,
    ) -> Result<Vec<IndexRow>, IndexError> {
        let (first, end) = match directory {
            Some(directory) => (bounded(directory, 0), bounded(directory, 1)),
            // A name has at most 255 bytes.
            None => (Vec::new(), vec![0xff; 256]),
        };
        let first = after.map_or(first, WirePath::sort_key);
        let sql =
            format!("SELECT {COLUMNS} FROM entry WHERE key > ? AND key < ? ORDER BY key LIMIT ?");
        self.read_rows(&sql, params![first, end, limit])
    }

    /// The rows directly in `directory` (the root for `None`), in order.
    ///
    /// # Errors
    /// Those of SQLite, and a damaged row.
    pub fn children(&self, directory: Option<&WirePath>) -> Result<Vec<IndexRow>, IndexError> {
        let (mut position, end) = match directory {
            Some(directory) => (bounded(directory, 0), bounded(directory, 1)),
            None => (Vec::new(), vec![0xff; 256]),
        };
        let prefix = position.len();
        let sql =
            format!("SELECT {COLUMNS} FROM entry WHERE key >= ? AND key < ? ORDER BY key LIMIT 1");
        let mut children = Vec::new();
        while let Some(found) = self.read_rows(&sql, params![position, end])?.pop() {
            let key = found.row.path.sort_key();
            let name_end = key[prefix..].iter().position(|&b| b == 0).map(|at| prefix + at);
            // The first key that is not below this child.
            position = key[..name_end.unwrap_or(key.len())].to_vec();
            position.push(1);
            if name_end.is_none() {
                children.push(found);
            }
        }
        Ok(children)
    }

    /// The next rows that differ after `after`, with those ancestors of the first that differ.
    ///
    /// # Errors
    /// Those of SQLite, and a damaged row.
    pub fn window(&self, after: Option<&WirePath>, limit: u32) -> Result<Window, IndexError> {
        let sql = format!(
            "SELECT {COLUMNS} FROM entry INDEXED BY entry_dirty \
             WHERE dirty != 0 AND key > ? ORDER BY key LIMIT ?"
        );
        let after = after.map(WirePath::sort_key).unwrap_or_default();
        let mut found = self.read_rows(&sql, params![after, limit + 1])?;
        let limit_rows = limit as usize;
        let truncated = found.len() > limit_rows;
        found.truncate(limit_rows);
        let mut rows = Vec::new();
        if let Some(first) = found.first() {
            for ancestor in first.row.path.ancestors() {
                if let Some(row) = self.get(&ancestor)?
                    && differs(&row.row)
                {
                    rows.push(row.row);
                }
            }
        }
        rows.reverse();
        let context = rows.len();
        rows.extend(found.into_iter().map(|found| found.row));
        Ok(Window { rows, context, truncated })
    }

    /// Up to `limit` rows after `after` of what both sides had and is not here any more, in order.
    ///
    /// # Errors
    /// Those of SQLite, and a damaged row.
    pub fn gone_here(&self, after: Option<&WirePath>, limit: u32) -> Result<Vec<Row>, IndexError> {
        let sql = format!(
            "SELECT {COLUMNS} FROM entry INDEXED BY entry_dirty WHERE dirty != 0 AND local IS NULL \
             AND unknown = 0 AND base IS NOT NULL AND remote IS NOT NULL AND key > ? \
             ORDER BY key LIMIT ?"
        );
        let after = after.map(WirePath::sort_key).unwrap_or_default();
        let found = self.read_rows(&sql, params![after, limit])?;
        Ok(found.into_iter().map(|found| found.row).collect())
    }

    /// At how many paths the trees differ.
    ///
    /// # Errors
    /// Those of SQLite.
    pub fn differing(&self) -> Result<u64, IndexError> {
        let sql = "SELECT count(*) FROM entry INDEXED BY entry_dirty WHERE dirty != 0";
        let count: i64 = self.database.prepare_cached(sql)?.query_row([], |row| row.get(0))?;
        Ok(count.unsigned_abs())
    }

    /// Up to `limit` local files with this content.
    ///
    /// # Errors
    /// Those of SQLite, and a damaged row.
    pub fn with_content(&self, content: &Digest, limit: u32) -> Result<Vec<IndexRow>, IndexError> {
        let sql = format!("SELECT {COLUMNS} FROM entry WHERE content = ? LIMIT ?");
        self.read_rows(&sql, params![content.as_bytes(), limit])
    }

    /// How far the hub's history is known; `None` before the first contact.
    ///
    /// # Errors
    /// Those of SQLite.
    pub fn cursor(&self) -> Result<Option<Cursor>, IndexError> {
        let epoch = self.meta("epoch")?.and_then(|bytes| WorkspaceEpoch::from_slice(&bytes).ok());
        let seq = self.meta_number("seq")?;
        Ok(epoch.zip(seq).map(|(epoch, seq)| Cursor { epoch, seq }))
    }

    /// The newest head that the hub told of, in the epoch of the cursor.
    ///
    /// # Errors
    /// Those of SQLite.
    pub fn known_head(&self) -> Result<Option<Head>, IndexError> {
        let epoch = self.meta("epoch")?.and_then(|bytes| WorkspaceEpoch::from_slice(&bytes).ok());
        let seq = self.meta_number("head_seq")?;
        let root = self.meta("head_root")?.and_then(|bytes| Digest::from_slice(&bytes));
        Ok(epoch.zip(seq).zip(root).map(|((epoch, seq), root)| Head { epoch, seq, root }))
    }

    /// Up to `limit` displaced files that are remembered, after `after`, by name.
    ///
    /// # Errors
    /// Those of SQLite, and a damaged row.
    pub fn displaced(
        &self,
        after: Option<&[u8]>,
        limit: u32,
    ) -> Result<Vec<Displaced>, IndexError> {
        let mut statement = self.database.prepare_cached(
            "SELECT name, path, size, mtime, content FROM displaced WHERE name > ? ORDER BY name LIMIT ?",
        )?;
        let mut rows = statement.query(params![after.unwrap_or_default(), limit])?;
        let mut displaced = Vec::new();
        while let Some(row) = rows.next()? {
            let path = WirePath::new(row.get::<_, Vec<u8>>(1)?)
                .map_err(|_| IndexError::Damaged { what: "displaced path" })?;
            let size = row.get::<_, i64>(2)?.cast_unsigned();
            let content = row.get::<_, Option<Vec<u8>>>(4)?;
            let content = content.and_then(|bytes| Digest::from_slice(&bytes));
            let (name, mtime_ns) = (row.get(0)?, row.get(3)?);
            displaced.push(Displaced { name, path, size, mtime_ns, content });
        }
        Ok(displaced)
    }

    /// Whether deletions wait for somebody's word.
    ///
    /// # Errors
    /// Those of SQLite.
    pub fn holds_deletions(&self) -> Result<bool, IndexError> {
        Ok(self.meta("holds_deletions")?.is_some())
    }

    /// The directory that was the root when the index was made.
    ///
    /// # Errors
    /// Those of SQLite.
    pub fn root(&self) -> Result<Option<DirIdentity>, IndexError> {
        let ino = self.meta_number("root_ino")?;
        let born = self.meta_number("root_born")?;
        Ok(ino.zip(born).map(|(ino, born)| DirIdentity { ino, born_ns: born.cast_signed() }))
    }

    fn meta(&self, name: &str) -> Result<Option<Vec<u8>>, IndexError> {
        let mut statement =
            self.database.prepare_cached("SELECT value FROM meta WHERE name = ?")?;
        Ok(statement.query_row([name], |row| row.get(0)).optional()?)
    }

    fn meta_number(&self, name: &str) -> Result<Option<u64>, IndexError> {
        let bytes = self.meta(name)?;
        Ok(bytes.and_then(|bytes| bytes.try_into().ok()).map(u64::from_be_bytes))
    }

    fn read_rows(
        &self,
        sql: &str,
        parameters: impl rusqlite::Params,
    ) -> Result<Vec<IndexRow>, IndexError> {
        let mut statement = self.database.prepare_cached(sql)?;
        let mut rows = statement.query(parameters)?;
        let mut result = Vec::new();
        while let Some(row) = rows.next()? {
            result.push(decode_row(row)?);
        }
        Ok(result)
    }
}

/// The key of `directory` followed by `byte`: 0 is before everything below it, 1 after.
fn bounded(directory: &WirePath, byte: u8) -> Vec<u8> {
    let mut key = directory.sort_key();
    key.push(byte);
    key
}

fn differs(row: &Row) -> bool {
    row.unknown
        || !same(row.base.as_ref(), row.local.as_ref())
        || !same(row.local.as_ref(), row.remote.as_ref())
}

fn get(database: &Connection, path: &WirePath) -> Result<Option<IndexRow>, IndexError> {
    let mut statement =
        database.prepare_cached(&format!("SELECT {COLUMNS} FROM entry WHERE key = ?"))?;
    let mut rows = statement.query([path.sort_key()])?;
    rows.next()?.map(decode_row).transpose()
}

fn decode_row(row: &rusqlite::Row<'_>) -> Result<IndexRow, IndexError> {
    let key = row.get_ref(0)?.as_blob().map_err(|_| IndexError::Damaged { what: "key" })?;
    let path = WirePath::from_sort_key(key).map_err(|_| IndexError::Damaged { what: "path" })?;
    let entry = |column| -> Result<Option<Entry>, IndexError> {
        let Some(bytes) = row
            .get_ref(column)?
            .as_blob_or_null()
            .map_err(|_| IndexError::Damaged { what: "entry" })?
        else {
            return Ok(None);
        };
        codec::decode(bytes).map(Some).ok_or(IndexError::Damaged { what: "entry" })
    };
    let number = |column| -> Result<Option<i64>, IndexError> { Ok(row.get(column)?) };
    let stamp = match (number(5)?, number(6)?, number(7)?, number(8)?, number(9)?, number(10)?) {
        (Some(dev), Some(ino), Some(size), Some(mtime_ns), Some(ctime_ns), Some(racy)) => {
            Some(Stamp {
                dev: dev.cast_unsigned(),
                ino: ino.cast_unsigned(),
                size: size.cast_unsigned(),
                mtime_ns,
                ctime_ns,
                racy: racy & !power::DISTRUSTED != 0,
                distrusted: racy & power::DISTRUSTED != 0,
            })
        }
        _ => None,
    };
    let row = Row {
        path,
        base: entry(1)?,
        local: entry(2)?,
        remote: entry(3)?,
        unknown: row.get::<_, i64>(4)? != 0,
    };
    Ok(IndexRow { row, stamp })
}
