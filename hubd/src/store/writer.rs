//! One writer for one SQLite file, with group commit.
//!
//! A thread of its own owns the write connection. It takes whatever is waiting, runs each piece of
//! work in a savepoint inside one transaction, commits once, and only then answers. One fsync thus
//! serves every caller that waited for it (about ten times the rate of single commits at 64
//! callers), and one writer is also the protection against SQLite's races between a checkpoint and
//! a second writer.
//!
//! A caller that stops waiting does not undo its work: what is queued will be written.

use std::path::Path;
use std::thread;

use rusqlite::{Connection, Transaction};
use tokio::sync::{mpsc, oneshot};

use super::StoreError;

/// Work that waits for the writer before callers have to wait for a place.
const QUEUE: usize = 1024;
/// Most pieces of work in one transaction: bounds the time the first of them waits.
const BATCH: usize = 512;
/// Page cache of the write connection, in KiB. Random keys outgrow SQLite's default soon.
const CACHE_KIB: i64 = 64 * 1024;

/// A piece of work: runs inside the transaction, and hands back what tells its caller the outcome.
type Job = Box<dyn FnOnce(&Transaction<'_>) -> Answer + Send>;
/// Told whether the transaction was committed.
type Answer = Box<dyn FnOnce(Result<(), StoreError>) + Send>;

/// A handle to the writer thread; clones share it. The thread ends when the last one is dropped.
#[derive(Clone)]
pub struct Writer {
    queue: mpsc::Sender<Job>,
}

/// Opens a connection with the settings every connection of the hub has: WAL, so that readers do
/// not wait; `synchronous=FULL`, so that a commit survives power loss.
pub(crate) fn open(path: &Path) -> Result<Connection, StoreError> {
    let connection = Connection::open(path)?;
    connection.pragma_update(None, "journal_mode", "WAL")?;
    connection.pragma_update(None, "synchronous", "FULL")?;
    connection.pragma_update(None, "foreign_keys", "ON")?;
    connection.pragma_update(None, "cache_size", -CACHE_KIB)?;
    connection.busy_timeout(std::time::Duration::from_secs(5))?;
    Ok(connection)
}

/// Brings a database up to date. `migrations[n]` leads from version n to n + 1; entries are only
/// ever added.
pub(crate) fn migrate(connection: &mut Connection, migrations: &[&str]) -> Result<(), StoreError> {
    let known = i64::try_from(migrations.len()).unwrap_or(i64::MAX);
    let found: i64 = connection.query_row("PRAGMA user_version", [], |row| row.get(0))?;
    if found > known {
        return Err(StoreError::TooNew { found, known });
    }
    for (step, sql) in (0..).zip(migrations).skip_while(|(step, _)| *step < found) {
        let transaction = connection.transaction()?;
        transaction.execute_batch(sql)?;
        transaction.pragma_update(None, "user_version", step + 1)?;
        transaction.commit()?;
    }
    Ok(())
}

impl Writer {
    /// Starts the thread that owns `connection`.
    ///
    /// # Errors
    /// If no thread can be started.
    pub fn start(connection: Connection) -> std::io::Result<Self> {
        let (queue, jobs) = mpsc::channel(QUEUE);
        thread::Builder::new().name("store-writer".into()).spawn(move || run(connection, jobs))?;
        Ok(Self { queue })
    }

    /// Runs `work` in a transaction and returns its result once it survives power loss. If `work`
    /// returns an error, what it did is undone, and only that.
    ///
    /// # Errors
    /// Those of `work`, of the commit, or [`StoreError::Closed`].
    pub async fn write<T, F>(&self, work: F) -> Result<T, StoreError>
    where
        T: Send + 'static,
        F: FnOnce(&Transaction<'_>) -> Result<T, StoreError> + Send + 'static,
    {
        let (answer, answered) = oneshot::channel();
        let job: Job = Box::new(move |transaction| {
            let result = in_savepoint(transaction, work);
            Box::new(move |committed| {
                // A caller that stopped waiting is no error.
                answer.send(committed.and(result)).ok();
            })
        });
        self.queue.send(job).await.map_err(|_| StoreError::Closed)?;
        answered.await.map_err(|_| StoreError::Closed)?
    }
}

fn in_savepoint<T>(
    transaction: &Transaction<'_>,
    work: impl FnOnce(&Transaction<'_>) -> Result<T, StoreError>,
) -> Result<T, StoreError> {
    transaction.execute_batch("SAVEPOINT work")?;
    let result = work(transaction);
    transaction.execute_batch(match result {
        Ok(_) => "RELEASE work",
        Err(_) => "ROLLBACK TO work; RELEASE work",
    })?;
    result
}

fn run(mut connection: Connection, mut jobs: mpsc::Receiver<Job>) {
    let mut batch = Vec::with_capacity(BATCH);
    while jobs.blocking_recv_many(&mut batch, BATCH) > 0 {
        let mut answers = Vec::with_capacity(batch.len());
        let committed = (|| {
            let transaction =
                connection.transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)?;
            for job in batch.drain(..) {
                answers.push(job(&transaction));
            }
            transaction.commit()
        })();
        // Jobs that never ran drop their sender, which their callers see as `Closed`.
        batch.clear();
        let failure = committed.err().map(|error| {
            tracing::error!(%error, "commit failed");
            error.to_string()
        });
        for answer in answers {
            answer(match &failure {
                None => Ok(()),
                Some(reason) => Err(StoreError::CommitFailed { reason: reason.clone() }),
            });
        }
    }
    // Folds the log into the database, so that a copy of the closed file is complete.
    if let Err(error) = connection.pragma_update(None, "wal_checkpoint", "TRUNCATE") {
        tracing::debug!(%error, "no final checkpoint");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn writer() -> (tempfile::TempDir, Writer) {
        let folder = tempfile::tempdir().unwrap();
        let mut connection = open(&folder.path().join("db")).unwrap();
        migrate(&mut connection, &["CREATE TABLE t (x INTEGER PRIMARY KEY)"]).unwrap();
        (folder, Writer::start(connection).unwrap())
    }

    fn insert(transaction: &Transaction<'_>, x: i64) -> Result<(), StoreError> {
        transaction.execute("INSERT INTO t VALUES (?)", [x])?;
        Ok(())
    }

    #[tokio::test]
    async fn failing_work_is_undone_without_touching_its_neighbours() {
        let (_folder, writer) = writer();
        let bad = writer.write(|t| {
            insert(t, 1)?;
            Err::<(), _>(StoreError::Corrupt { what: "test" })
        });
        let good = writer.write(|t| insert(t, 2));
        let (bad, good) = tokio::join!(bad, good);
        assert!(matches!(bad, Err(StoreError::Corrupt { .. })));
        good.unwrap();
        let rows: Vec<i64> = writer
            .write(|t| {
                let mut statement = t.prepare("SELECT x FROM t")?;
                let rows = statement.query_map([], |row| row.get(0))?.collect::<Result<_, _>>()?;
                Ok(rows)
            })
            .await
            .unwrap();
        assert_eq!(rows, [2]);
    }

    #[tokio::test]
    async fn work_of_a_caller_that_gave_up_is_done_all_the_same() {
        let (_folder, writer) = writer();
        let (started, has_started) = std::sync::mpsc::channel();
        let (go, wait) = std::sync::mpsc::channel::<()>();
        let patient = writer.clone();
        let abandoned = tokio::spawn(async move {
            patient
                .write(move |t| {
                    started.send(()).unwrap();
                    wait.recv().unwrap();
                    insert(t, 7)
                })
                .await
        });
        tokio::task::spawn_blocking(move || has_started.recv().unwrap()).await.unwrap();
        abandoned.abort();
        go.send(()).unwrap();
        let count: i64 = writer
            .write(|t| Ok(t.query_row("SELECT count(*) FROM t", [], |row| row.get(0))?))
            .await
            .unwrap();
        assert_eq!(count, 1);
    }

    #[test]
    fn newer_database_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let mut connection = open(&folder.path().join("db")).unwrap();
        connection.pragma_update(None, "user_version", 9).unwrap();
        assert!(matches!(
            migrate(&mut connection, &[""]),
            Err(StoreError::TooNew { found: 9, known: 1 })
        ));
    }
}
