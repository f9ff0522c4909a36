//! One SQLite file of the hub: one connection that writes, a few that read.
//!
//! WAL with `synchronous=FULL`: readers do not wait for the writer, and what has been answered
//! survives power loss. Changes that come while the writer is busy share the next transaction and its
//! flush (`writer`); readings have connections of their own (`readers`).
//!
//! A `Database` is owned by its store, and must be the only one on its file. Its writer is a task of
//! the scope it was opened with: when that is cancelled it accepts nothing more, writes what it has
//! accepted, waits for the readings that go on, and folds the log into the file, so that the file alone
//! is a complete copy. So the scope must outlive everything that still has something to write.
//! A crash loses the requests that were not answered yet, and nothing else.

mod readers;
#[cfg(test)]
pub(crate) mod readings;
#[cfg(test)]
mod tests;
mod writer;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use cortex_shared::tasks::TaskScope;
use rusqlite::config::DbConfig;
use rusqlite::{Connection, ErrorCode, TransactionBehavior};
use tokio::sync::mpsc;

use self::readers::Readers;
use self::writer::{Request, Writer};

/// How long a connection waits for a lock. Within the hub only opening and closing ever take one that
/// matters; an administrator's shell may hold one for a moment.
pub(super) const BUSY_TIMEOUT: Duration = Duration::from_secs(10);

/// Statements that a connection keeps ready, more than one commit of a workspace runs through. Each takes a
/// few KiB.
const STATEMENTS: usize = 64;

/// Why a database did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum DatabaseError {
    /// The engine reported an error; the change was not made.
    #[error("the database failed")]
    Sqlite(#[from] rusqlite::Error),
    /// The transaction that this change was part of could not be committed; nothing of it was kept.
    #[error("a transaction could not be made durable: {reason}")]
    NotCommitted {
        /// What the engine said.
        reason: String,
        /// Whether it was for want of space.
        disk_full: bool,
    },
    /// The file was written by a newer program.
    #[error("the database has schema version {found}, this program knows {known} at most")]
    TooNew {
        /// Version in the file.
        found: i64,
        /// Newest version this program knows.
        known: i64,
    },
    /// The database holds something that this program never writes.
    #[error("the database is damaged: {what}")]
    Damaged {
        /// What was found.
        what: &'static str,
    },
    /// The hub is shutting down.
    #[error("the database is closed")]
    Closed,
    /// The code that carried the request out failed.
    #[error("the request was lost: the code that carried it out failed")]
    Writer,
}

impl DatabaseError {
    /// Whether there was no space left.
    #[must_use]
    pub fn is_disk_full(&self) -> bool {
        match self {
            Self::NotCommitted { disk_full, .. } => *disk_full,
            Self::Sqlite(error) => error.sqlite_error_code() == Some(ErrorCode::DiskFull),
            _ => false,
        }
    }
}

/// What one kind of database differs in from another.
#[derive(Clone, Copy)]
pub(super) struct Settings {
    /// `migrations[n]` leads from version n (`PRAGMA user_version`) to n + 1. Entries are only ever
    /// added, never changed.
    pub(super) migrations: &'static [&'static str],
    /// Page cache of the connection that writes, in KiB; taken page by page as it is needed. Those
    /// that read have SQLite's own 2 MiB each: the system's cache of the file is behind them.
    pub(super) cache_kib: u32,
}

/// An open database: [`Database::write`], [`Database::write_then`] and [`Database::read`].
pub(super) struct Database {
    requests: mpsc::Sender<Request>,
    readers: Arc<Readers>,
}

impl Database {
    /// Opens the file, or creates it in its folder, which must exist, and brings it up to date.
    ///
    /// # Errors
    /// Those of the engine, and [`DatabaseError::TooNew`]; the file is left alone then.
    pub(super) async fn open(
        path: PathBuf,
        settings: Settings,
        scope: &TaskScope,
    ) -> Result<Self, DatabaseError> {
        let opening = path.clone();
        let opened = tokio::task::spawn_blocking(move || {
            let mut connection = connect(&opening, settings.cache_kib)?;
            migrate(&mut connection, settings.migrations)?;
            Ok::<_, DatabaseError>(connection)
        });
        let connection = opened.await.map_err(|_| DatabaseError::Writer)??;
        let readers = Arc::new(Readers::new(path.clone()));
        let (requests, writer) = Writer::new(path, settings.cache_kib, connection);
        let (token, remaining) = (scope.token().clone(), Arc::clone(&readers));
        scope.spawn("database", async move {
            let connection = writer.run(token).await;
            // The last connection that closes folds the log, which one that only reads cannot do.
            remaining.close().await;
            if let Some(connection) = connection {
                tokio::task::spawn_blocking(move || close(connection)).await.ok();
            }
        });
        Ok(Self { requests, readers })
    }
}

/// A connection that may write.
fn connect(path: &Path, cache_kib: u32) -> Result<Connection, DatabaseError> {
    let connection = Connection::open(path)?;
    prepare(&connection)?;
    connection.pragma_update(None, "journal_mode", "WAL")?;
    connection.pragma_update(None, "synchronous", "FULL")?;
    connection.pragma_update(None, "foreign_keys", true)?;
    // What a connection keeps for itself is nobody else's, on disk neither.
    connection.pragma_update(None, "temp_store", "MEMORY")?;
    // Negative: KiB rather than pages.
    connection.pragma_update(None, "cache_size", -i64::from(cache_kib))?;
    Ok(connection)
}

/// What every connection needs.
fn prepare(connection: &Connection) -> Result<(), DatabaseError> {
    connection.busy_timeout(BUSY_TIMEOUT)?;
    connection.set_prepared_statement_cache_capacity(STATEMENTS);
    // Otherwise SQLite plans each statement with a `LIMIT ?` anew whenever that is bound. No plan of ours
    // hangs on a value.
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_QPSG, true)?;
    Ok(())
}

/// Brings a database up to date, each step in a transaction of its own.
fn migrate(connection: &mut Connection, migrations: &[&str]) -> Result<(), DatabaseError> {
    let known = i64::try_from(migrations.len()).unwrap_or(i64::MAX);
    let found: i64 = connection.pragma_query_value(None, "user_version", |row| row.get(0))?;
    if found > known {
        return Err(DatabaseError::TooNew { found, known });
    }
    for (step, sql) in (0..).zip(migrations).skip_while(|(step, _)| *step < found) {
        let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        transaction.execute_batch(sql)?;
        transaction.pragma_update(None, "user_version", step + 1)?;
        transaction.commit()?;
    }
    Ok(())
}

/// Closes the last connection, which folds the log. If that fails, the next start does it.
fn close(connection: Connection) {
    if let Err((_, error)) = connection.close() {
        tracing::warn!(%error, "a database did not close in order");
    }
}
