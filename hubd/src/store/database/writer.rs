//! The one writer of a database: requests that come while it is busy share the next transaction and
//! its flush to disk (about ten times the rate of single commits at 64 callers).
//!
//! Each request runs in a savepoint of its own, so that one that fails takes nothing else along.
//! Nobody is answered before the shared transaction has been committed; if that fails, all of them
//! are told, and nothing of theirs was kept. One writer is also the protection against SQLite's races
//! between a checkpoint and a second writer.

use std::error::Error;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;

use rusqlite::{Connection, ErrorCode, TransactionBehavior};
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use super::{Database, DatabaseError};
use crate::counters;

/// Requests that may wait before callers have to wait for a place: some commands for each of hundreds
/// of nodes. What they hold in memory is bounded by those who let them in, not here.
const QUEUE: usize = 1024;
/// Most requests of one transaction, so that the first one does not wait for ever for its answer. The
/// flush is by then a small part of what each of them costs.
const BATCH: usize = 128;

/// Why a transaction was not committed.
#[derive(Clone)]
pub(super) struct Failure {
    reason: String,
    disk_full: bool,
}

impl From<rusqlite::Error> for Failure {
    fn from(error: rusqlite::Error) -> Self {
        Self { reason: error.to_string(), disk_full: comes_from_full_disk(&error) }
    }
}

impl From<Failure> for DatabaseError {
    fn from(Failure { reason, disk_full }: Failure) -> Self {
        Self::NotCommitted { reason, disk_full }
    }
}

/// Whether the engine's part in an error was that there is no space left.
fn comes_from_full_disk(error: &(dyn Error + 'static)) -> bool {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if let Some(engine) = error.downcast_ref::<rusqlite::Error>() {
            return engine.sqlite_error_code() == Some(ErrorCode::DiskFull);
        }
        cause = error.source();
    }
    false
}

/// Work whose changes are to be undone.
pub(super) struct Undo {
    disk_full: bool,
}

/// A request on its way through the writer.
pub(super) type Request = Box<dyn Job>;

/// What the writer does with a request.
pub(super) trait Job: Send {
    /// Does the work.
    fn run(&mut self, connection: &Connection) -> Result<(), Undo>;
    /// Answers, once it is known whether the transaction was committed.
    fn finish(self: Box<Self>, failure: Option<Failure>);
}

struct TypedJob<T, E, W, A> {
    work: Option<W>,
    result: Option<Result<T, E>>,
    after: A,
    reply: oneshot::Sender<Result<T, E>>,
}

impl<T, E, W, A> Job for TypedJob<T, E, W, A>
where
    T: Send,
    E: Error + From<DatabaseError> + Send + 'static,
    W: FnOnce(&Connection) -> Result<T, E> + Send,
    A: FnOnce(&T) + Send,
{
    fn run(&mut self, connection: &Connection) -> Result<(), Undo> {
        let Some(work) = self.work.take() else { return Err(Undo { disk_full: false }) };
        let result = catch_unwind(AssertUnwindSafe(|| work(connection)))
            .unwrap_or_else(|_| Err(DatabaseError::Writer.into()));
        let outcome = match &result {
            Ok(_) => Ok(()),
            Err(error) => Err(Undo { disk_full: comes_from_full_disk(error) }),
        };
        self.result = Some(result);
        outcome
    }

    fn finish(self: Box<Self>, failure: Option<Failure>) {
        let result = match (self.result, failure) {
            (Some(Err(error)), _) => Err(error),
            (_, Some(failure)) => Err(DatabaseError::from(failure).into()),
            (Some(Ok(value)), None) => {
                (self.after)(&value);
                Ok(value)
            }
            (None, None) => Err(DatabaseError::Writer.into()),
        };
        // A caller that went away does not need the answer; the work is done all the same.
        self.reply.send(result).ok();
    }
}

impl Database {
    /// Runs `work` in a transaction and returns its result once that survives power loss. If `work`
    /// returns an error or panics, what it did is undone, and only that. A caller that stops waiting
    /// does not undo its work.
    ///
    /// # Errors
    /// Those of `work`, and [`DatabaseError::Closed`], `NotCommitted` or `Writer`.
    pub(in crate::store) async fn write<T, E>(
        &self,
        work: impl FnOnce(&Connection) -> Result<T, E> + Send + 'static,
    ) -> Result<T, E>
    where
        T: Send + 'static,
        E: Error + From<DatabaseError> + Send + 'static,
    {
        self.write_then(work, |_| {}).await
    }

    /// The same; `after` runs once the result is durable, in the order of the transactions, before the
    /// caller has it, and also if the caller is gone by then. It must neither block nor panic.
    ///
    /// # Errors
    /// As [`Database::write`].
    pub(in crate::store) async fn write_then<T, E>(
        &self,
        work: impl FnOnce(&Connection) -> Result<T, E> + Send + 'static,
        after: impl FnOnce(&T) + Send + 'static,
    ) -> Result<T, E>
    where
        T: Send + 'static,
        E: Error + From<DatabaseError> + Send + 'static,
    {
        let begun = std::time::Instant::now();
        let (reply, answer) = oneshot::channel();
        let job = TypedJob { work: Some(work), result: None, after, reply };
        self.requests.send(Box::new(job)).await.map_err(|_| DatabaseError::Closed)?;
        let answer = answer.await.map_err(|_| DatabaseError::Writer)?;
        counters::STORE_WRITES.observe(begun.elapsed());
        answer
    }
}

/// Owns the connection that writes.
pub(super) struct Writer {
    path: PathBuf,
    cache_kib: u32,
    requests: mpsc::Receiver<Request>,
    /// Absent only while a batch runs, or if that batch took it along.
    connection: Option<Connection>,
}

impl Writer {
    /// The writer of a database that has been opened, to be run, and its queue.
    pub(super) fn new(
        path: PathBuf,
        cache_kib: u32,
        connection: Connection,
    ) -> (mpsc::Sender<Request>, Self) {
        let (queue, requests) = mpsc::channel(QUEUE);
        (queue, Self { path, cache_kib, requests, connection: Some(connection) })
    }

    /// Works until the token is cancelled, and then until nothing waits any more; or until the handle
    /// is gone. Gives the connection back.
    pub(super) async fn run(mut self, token: CancellationToken) -> Option<Connection> {
        let mut closing = false;
        loop {
            let mut batch = Vec::new();
            let received = tokio::select! {
                received = self.requests.recv_many(&mut batch, BATCH) => received,
                () = token.cancelled(), if !closing => {
                    closing = true;
                    self.requests.close();
                    continue;
                }
            };
            if received == 0 {
                return self.connection;
            }
            self.carry_out(batch).await;
        }
    }

    async fn carry_out(&mut self, batch: Vec<Request>) {
        let connection = self.connection.take();
        let (path, cache_kib) = (self.path.clone(), self.cache_kib);
        let done = tokio::task::spawn_blocking(move || {
            let mut connection = match connection
                .map_or_else(|| super::connect(&path, cache_kib), Ok)
            {
                Ok(connection) => connection,
                Err(error) => {
                    tracing::error!(path = %path.display(), %error, "cannot reopen the database");
                    return None;
                }
            };
            if let Err(failure) = run_batch(&mut connection, batch) {
                let reason = failure.reason;
                tracing::error!(path = %path.display(), reason, "a transaction was not committed");
            }
            Some(connection)
        })
        .await;
        match done {
            Ok(connection) => self.connection = connection,
            // The connection is lost with the thread; the next batch opens another one, and the
            // database has rolled the transaction back.
            Err(error) => {
                tracing::error!(path = %self.path.display(), %error, "a batch of the writer failed");
            }
        }
    }
}

/// Carries a batch out and answers everyone in it.
fn run_batch(connection: &mut Connection, mut batch: Vec<Request>) -> Result<(), Failure> {
    let committed = in_one_transaction(connection, &mut batch);
    for job in batch {
        job.finish(committed.as_ref().err().cloned());
    }
    committed
}

fn in_one_transaction(connection: &mut Connection, batch: &mut [Request]) -> Result<(), Failure> {
    let mut tx = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    for job in batch {
        let savepoint = tx.savepoint()?;
        match job.run(&savepoint) {
            Ok(()) => savepoint.commit()?,
            // SQLite answers some failures, a full disk above all, by undoing the whole transaction.
            // A savepoint opened after that would be a transaction of its own, and be kept.
            Err(Undo { disk_full }) if savepoint.is_autocommit() => {
                let reason = "the failure of one change undid the whole transaction".to_owned();
                return Err(Failure { reason, disk_full });
            }
            Err(Undo { .. }) => savepoint.finish()?,
        }
    }
    Ok(tx.commit()?)
}
