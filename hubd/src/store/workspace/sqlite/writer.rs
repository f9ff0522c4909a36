//! The one writer of a database: requests that come while it is busy share the next transaction and
//! its flush to disk.
//!
//! Each request runs in a savepoint of its own, so that one that fails takes nothing else along.
//! Nobody is answered before the shared transaction has been committed; if that fails, all of them
//! are told, and nothing of theirs was kept.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;

use cortex_shared::tasks::TaskScope;
use rusqlite::{Connection, TransactionBehavior};
use tokio::sync::{mpsc, oneshot};

use super::super::StoreError;

/// Requests that may wait. Their content is bounded by the ingest budget, not here.
const QUEUE: usize = 256;
/// Most requests of one transaction, so that the first one does not wait for ever for its answer.
const BATCH: usize = 128;

/// A request on its way through the writer.
trait Job: Send {
    /// Does the work; `false` if it is to be undone.
    fn run(&mut self, connection: &Connection) -> bool;
    /// Answers, once it is known whether the transaction was committed.
    fn finish(self: Box<Self>, committed: Result<(), StoreError>);
}

struct TypedJob<T, W, A> {
    work: Option<W>,
    result: Option<Result<T, StoreError>>,
    after: A,
    reply: oneshot::Sender<Result<T, StoreError>>,
}

impl<T, W, A> Job for TypedJob<T, W, A>
where
    T: Send,
    W: FnOnce(&Connection) -> Result<T, StoreError> + Send,
    A: FnOnce(&T) + Send,
{
    fn run(&mut self, connection: &Connection) -> bool {
        let Some(work) = self.work.take() else { return false };
        let result =
            catch_unwind(AssertUnwindSafe(|| work(connection))).unwrap_or(Err(StoreError::Writer));
        let keep = result.is_ok();
        self.result = Some(result);
        keep
    }

    fn finish(self: Box<Self>, committed: Result<(), StoreError>) {
        let result = match (self.result, committed) {
            (Some(Err(error)), _) => Err(error),
            (_, Err(error)) => Err(error),
            (Some(Ok(value)), Ok(())) => {
                (self.after)(&value);
                Ok(value)
            }
            (None, Ok(())) => Err(StoreError::Writer),
        };
        // A caller that went away does not need the answer; the work is done all the same.
        self.reply.send(result).ok();
    }
}

/// Hands requests to the writer. Cheap to clone.
#[derive(Clone)]
pub(super) struct WriterHandle {
    queue: mpsc::Sender<Box<dyn Job>>,
}

impl WriterHandle {
    /// Starts the writer of a database that has been opened. It ends when the scope is cancelled,
    /// after the requests that already wait, or when all handles are gone.
    pub(super) fn start(path: PathBuf, connection: Connection, scope: &TaskScope) -> Self {
        let (queue, requests) = mpsc::channel(QUEUE);
        let token = scope.token().clone();
        scope.spawn("workspace writer", async move {
            let mut writer = Writer { path, requests, connection: Some(connection) };
            let mut closing = false;
            loop {
                let mut batch = Vec::new();
                let received = tokio::select! {
                    received = writer.requests.recv_many(&mut batch, BATCH) => received,
                    () = token.cancelled(), if !closing => {
                        closing = true;
                        writer.requests.close();
                        continue;
                    }
                };
                if received == 0 {
                    break;
                }
                writer.carry_out(batch).await;
            }
            // Closing may write back the log, which blocks; if it fails, the next start does it.
            let connection = writer.connection.take();
            tokio::task::spawn_blocking(move || drop(connection)).await.ok();
        });
        Self { queue }
    }

    /// Runs `work` in a transaction and returns its result once that is durable.
    pub(super) async fn write<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Connection) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        self.write_then(work, |_| {}).await
    }

    /// The same; `after` runs once the result is durable, before the caller has it, and also if the
    /// caller is gone by then.
    pub(super) async fn write_then<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Connection) -> Result<T, StoreError> + Send + 'static,
        after: impl FnOnce(&T) + Send + 'static,
    ) -> Result<T, StoreError> {
        let (reply, answer) = oneshot::channel();
        let job = TypedJob { work: Some(work), result: None, after, reply };
        self.queue.send(Box::new(job)).await.map_err(|_| StoreError::Closed)?;
        answer.await.map_err(|_| StoreError::Writer)?
    }
}

struct Writer {
    path: PathBuf,
    requests: mpsc::Receiver<Box<dyn Job>>,
    /// Absent only while a batch runs, or if that batch took it along.
    connection: Option<Connection>,
}

impl Writer {
    async fn carry_out(&mut self, batch: Vec<Box<dyn Job>>) {
        let connection = self.connection.take();
        let path = self.path.clone();
        let done = tokio::task::spawn_blocking(move || {
            let mut connection = match connection.map_or_else(|| super::open_writer(&path), Ok) {
                Ok(connection) => connection,
                Err(error) => {
                    tracing::error!(path = %path.display(), %error, "cannot reopen the database");
                    return None;
                }
            };
            run_batch(&mut connection, batch);
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

fn run_batch(connection: &mut Connection, mut batch: Vec<Box<dyn Job>>) {
    let committed = (|| {
        let mut tx = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        for job in &mut batch {
            let savepoint = tx.savepoint()?;
            if job.run(&savepoint) {
                savepoint.commit()?;
            } else {
                savepoint.finish()?;
            }
        }
        tx.commit()
    })();
    for job in batch {
        job.finish(match &committed {
            Ok(()) => Ok(()),
            Err(error) => Err(StoreError::NotCommitted {
                reason: error.to_string(),
                disk_full: error.sqlite_error_code() == Some(rusqlite::ErrorCode::DiskFull),
            }),
        });
    }
}
