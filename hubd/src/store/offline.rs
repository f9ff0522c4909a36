//! Databases as files, beside the hub that has them open: copied as they are at one moment, and checked.
//!
//! Nothing here changes a database. All of it blocks on the disk. Each look is one read transaction,
//! which holds up nobody who writes.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use cortex_shared::entry::Digest;
use cortex_shared::ids::{MeshId, WorkspaceId};
use rusqlite::backup::{Backup, StepResult};
use rusqlite::{Connection, OpenFlags, OptionalExtension as _};

use super::database::{BUSY_TIMEOUT, DatabaseError};
use super::sqlite;
use super::workspace::sqlite as workspace;
use super::{AuditLine, CaState, StoreError};
use crate::store::workspace::StoreError as WorkspaceError;

/// Pages that are copied before progress is told: 16 MiB.
const PAGES_AT_ONCE: i32 = 4096;
/// Problems that the engine lists of one file at most.
const LISTED: u32 = 100;

/// A database that is only read.
pub struct OfflineDatabase {
    path: PathBuf,
    connection: Connection,
}

/// Which tables a file has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Schema {
    /// Those of this program.
    Current,
    /// Those of an earlier one: the hub changes them when it is started.
    Older,
    /// Those of a later one.
    Newer,
}

impl Schema {
    fn of(found: i64, known: usize) -> Self {
        match usize::try_from(found).unwrap_or_default().cmp(&known) {
            std::cmp::Ordering::Less => Self::Older,
            std::cmp::Ordering::Equal => Self::Current,
            std::cmp::Ordering::Greater => Self::Newer,
        }
    }
}

impl OfflineDatabase {
    /// Opens a database that is there, and stays at the moment of its first reading.
    ///
    /// # Errors
    /// Those of the engine: also if there is no such file.
    pub fn open(path: &Path) -> Result<Self, DatabaseError> {
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let connection = Connection::open_with_flags(path, flags)?;
        connection.busy_timeout(BUSY_TIMEOUT)?;
        // One moment for everything that is asked of it.
        connection.execute_batch("BEGIN")?;
        Ok(Self { path: path.to_owned(), connection })
    }

    /// Copies it to a new file, which is complete by itself: it has no log beside it. `progress` hears of
    /// bytes copied, and of all. The copy is as durable as the system makes it: flushing is the caller's.
    ///
    /// # Errors
    /// Those of the engine, for either file.
    pub fn copy_to(
        &self,
        target: &Path,
        mut progress: impl FnMut(u64, u64),
    ) -> Result<(), DatabaseError> {
        let mut copy = Connection::open(target)?;
        // Begins the moment: the backup reads within it, and never begins anew because somebody writes.
        let page_bytes: u64 = self.number("page_size")?;
        let _pages: u64 = self.number("page_count")?;
        {
            let backup = Backup::new(&self.connection, &mut copy)?;
            loop {
                let step = backup.step(PAGES_AT_ONCE)?;
                let told = backup.progress();
                let bytes = |pages: i32| u64::try_from(pages).unwrap_or_default() * page_bytes;
                progress(bytes(told.pagecount - told.remaining), bytes(told.pagecount));
                match step {
                    StepResult::Done => break,
                    StepResult::More => {}
                    // Somebody holds the new file, or the old one is being folded.
                    _ => std::thread::sleep(std::time::Duration::from_millis(10)),
                }
            }
        }
        copy.pragma_update(None, "journal_mode", "DELETE")?;
        copy.close().map_err(|(_, error)| error.into())
    }

    fn number(&self, pragma: &str) -> Result<u64, DatabaseError> {
        let number: i64 = self.connection.pragma_query_value(None, pragma, |row| row.get(0))?;
        Ok(u64::try_from(number).unwrap_or_default())
    }

    /// What the engine finds wrong with the file, at most 100 things; nothing if it is sound.
    ///
    /// # Errors
    /// If the file is so damaged that it cannot be looked at.
    pub fn integrity(&self) -> Result<Vec<String>, DatabaseError> {
        let mut problems: Vec<String> = Vec::new();
        let mut check = self.connection.prepare(&format!("PRAGMA integrity_check({LISTED})"))?;
        for line in check.query_map([], |row| row.get(0))? {
            problems.push(line?);
        }
        if problems == ["ok"] {
            problems.clear();
        }
        let mut check = self.connection.prepare("PRAGMA foreign_key_check")?;
        let rows = check.query_map([], |row| {
            let (table, parent): (String, String) = (row.get(0)?, row.get(2)?);
            Ok(format!("a row of {table} refers to one of {parent} that is not there"))
        })?;
        for row in rows.take(LISTED as usize) {
            problems.push(row?);
        }
        Ok(problems)
    }

    fn version(&self) -> Result<i64, DatabaseError> {
        Ok(self.connection.pragma_query_value(None, "user_version", |row| row.get(0))?)
    }

    /// Which tables it has, as the hub's main database.
    ///
    /// # Errors
    /// Those of the engine.
    pub fn main_schema(&self) -> Result<Schema, DatabaseError> {
        Ok(Schema::of(self.version()?, sqlite::SCHEMA_VERSION))
    }

    /// Which tables it has, as the database of a workspace.
    ///
    /// # Errors
    /// Those of the engine.
    pub fn workspace_schema(&self) -> Result<Schema, DatabaseError> {
        Ok(Schema::of(self.version()?, workspace::SCHEMA_VERSION))
    }

    /// The mesh that the hub's main database is of; `None` before the hub was first started.
    ///
    /// # Errors
    /// Those of the engine, or what is there is damaged.
    pub fn mesh(&self) -> Result<Option<MeshId>, StoreError> {
        sqlite::known_mesh(&self.connection)
    }

    /// The workspaces in the hub's main database.
    ///
    /// # Errors
    /// As [`OfflineDatabase::mesh`].
    pub fn workspaces(&self) -> Result<Vec<WorkspaceId>, StoreError> {
        sqlite::workspace_ids(&self.connection)
    }

    /// The authorities in the hub's main database.
    ///
    /// # Errors
    /// As [`OfflineDatabase::mesh`].
    pub fn authorities(&self) -> Result<Option<CaState>, StoreError> {
        sqlite::ca_state(&self.connection)
    }

    /// Lines of the audit log in the hub's main database; see `Store::audit_page`.
    ///
    /// # Errors
    /// Those of the engine.
    pub fn audit_page(
        &self,
        after_seq: Option<u64>,
        limit: u32,
    ) -> Result<Vec<AuditLine>, StoreError> {
        sqlite::audit_page(&self.connection, after_seq, limit)
    }

    /// The packs that the database of a workspace knows.
    ///
    /// # Errors
    /// Those of the engine.
    pub fn packs(&self) -> Result<HashSet<Digest>, WorkspaceError> {
        workspace::known_packs(&self.connection)
    }

    /// Whether the database of a workspace knows a pack now, not at the moment at which this one stays.
    ///
    /// # Errors
    /// Those of the engine.
    pub fn still_has_pack(&self, pack: &Digest) -> Result<bool, WorkspaceError> {
        let now = Self::open(&self.path)?;
        let found: Option<i64> = now
            .connection
            .query_row("SELECT 1 FROM packs WHERE hash = ?1", [pack.as_bytes()], |row| row.get(0))
            .optional()?;
        Ok(found.is_some())
    }

    /// The chunks that the database of a workspace looks for in a pack.
    ///
    /// # Errors
    /// Those of the engine.
    pub fn chunks_in(&self, pack: &Digest) -> Result<Vec<Digest>, WorkspaceError> {
        workspace::chunks_in(&self.connection, pack)
    }

    /// Checks what the database of a workspace says against itself: every chunk of every recipe, the
    /// digests of all directories up to the head, and the counters.
    ///
    /// # Errors
    /// Those of the engine.
    pub fn check_workspace(
        &self,
        problem: &mut dyn FnMut(String),
    ) -> Result<workspace::Checked, WorkspaceError> {
        workspace::check(&self.connection, problem)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The copy is of one moment, however much is written while it is made.
    #[test]
    fn a_copy_is_of_one_moment_and_needs_no_log() {
        let folder = tempfile::tempdir().unwrap();
        let (from, to) = (folder.path().join("from"), folder.path().join("to"));
        let writer = Connection::open(&from).unwrap();
        writer.pragma_update(None, "journal_mode", "WAL").unwrap();
        writer.execute_batch("CREATE TABLE t (x, y); BEGIN").unwrap();
        let filling = "x".repeat(4000);
        for x in 0..10_000 {
            writer.execute("INSERT INTO t VALUES (?, ?)", (x, &filling)).unwrap();
        }
        writer.execute_batch("COMMIT").unwrap();
        let database = OfflineDatabase::open(&from).unwrap();
        let mut told = Vec::new();
        database
            .copy_to(&to, |done, all| {
                told.push((done, all));
                writer.execute("INSERT INTO t VALUES (1, 2)", []).unwrap();
                writer.execute("UPDATE t SET x = x + 1", []).unwrap();
            })
            .unwrap();
        assert!(told.len() > 1, "some came while it was made: {told:?}");
        assert!(told.last().is_some_and(|(done, all)| done == all));
        assert!(!to.with_extension("-wal").exists());
        let copy = Connection::open_with_flags(&to, OpenFlags::SQLITE_OPEN_READ_ONLY).unwrap();
        let sum = "SELECT count(*), sum(x) FROM t";
        let found = copy.query_row(sum, [], |row| Ok((row.get(0)?, row.get(1)?))).unwrap();
        assert_eq!(found, (10_000, 49_995_000));
        assert_eq!(OfflineDatabase::open(&to).unwrap().integrity().unwrap(), [""; 0]);
    }

    #[test]
    fn a_damaged_file_is_told_from_a_sound_one_and_a_missing_one_is_not_made() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("db");
        assert!(OfflineDatabase::open(&path).and_then(|db| db.integrity()).is_err());
        assert!(!path.exists());
        let database = Connection::open(&path).unwrap();
        database.execute_batch("CREATE TABLE t (x TEXT); CREATE INDEX i ON t (x)").unwrap();
        for x in 0..1000 {
            database.execute("INSERT INTO t VALUES (?)", [format!("row {x}")]).unwrap();
        }
        database.close().unwrap();
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[8192..].fill(0x55);
        std::fs::write(&path, bytes).unwrap();
        let found = OfflineDatabase::open(&path).and_then(|db| db.integrity());
        assert!(found.as_ref().is_ok_and(|found| !found.is_empty()) || found.is_err(), "{found:?}");
    }
}
