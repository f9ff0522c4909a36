//! Connections that only read. Readers never wait for the writer, nor it for them; each reading sees
//! one moment of the database.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rusqlite::{Connection, OpenFlags};
use tokio::sync::Semaphore;

use super::{Database, DatabaseError, prepare};
use crate::counters;

/// Readings at the same time. More would wait for the same disk and processors.
const CONNECTIONS: u32 = 4;

/// A few connections, opened when they are first needed.
pub(super) struct Readers {
    path: PathBuf,
    permits: Arc<Semaphore>,
    idle: Arc<IdleConnections>,
}

#[derive(Default)]
struct IdleConnections(Mutex<Vec<Connection>>);

impl IdleConnections {
    /// Held for a moment only, never across an await.
    fn lock(&self) -> MutexGuard<'_, Vec<Connection>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Readers {
    pub(super) fn new(path: PathBuf) -> Self {
        let permits = Arc::new(Semaphore::new(CONNECTIONS as usize));
        Self { path, permits, idle: Arc::default() }
    }

    /// Waits for the readings that go on and closes all connections; later readings are refused.
    pub(super) async fn close(&self) {
        // Only this closes the semaphore, so that all of it can be had.
        let all = self.permits.acquire_many(CONNECTIONS).await;
        self.permits.close();
        let idle = std::mem::take(&mut *self.idle.lock());
        drop(all);
        tokio::task::spawn_blocking(move || drop(idle)).await.ok();
    }
}

impl Database {
    /// Runs `work` within one read transaction, on a thread that may block. It sees one moment of the
    /// database, with everything that has been answered before, and cannot change it.
    ///
    /// # Errors
    /// Those of `work`, and [`DatabaseError::Closed`], `Sqlite` or `Writer`.
    pub(in crate::store) async fn read<T, E>(
        &self,
        work: impl FnOnce(&Connection) -> Result<T, E> + Send + 'static,
    ) -> Result<T, E>
    where
        T: Send + 'static,
        E: From<DatabaseError> + Send + 'static,
    {
        let begun = std::time::Instant::now();
        #[cfg(test)]
        super::readings::note(&self.readers.path);
        let permit = Arc::clone(&self.readers.permits).acquire_owned().await;
        let permit = permit.map_err(|_| DatabaseError::Closed)?;
        let (path, idle) = (self.readers.path.clone(), Arc::clone(&self.readers.idle));
        let read = tokio::task::spawn_blocking(move || {
            // Held by the thread, not by the caller: it may go away while the reading goes on.
            let _permit = permit;
            let pooled = idle.lock().pop();
            let mut connection = match pooled {
                Some(connection) => connection,
                None => open(&path)?,
            };
            let tx = connection.transaction().map_err(DatabaseError::from)?;
            let result = work(&tx);
            tx.finish().map_err(DatabaseError::from)?;
            idle.lock().push(connection);
            result
        })
        .await
        .map_err(|_| DatabaseError::Writer)?;
        counters::STORE_READS.observe(begun.elapsed());
        read
    }
}

fn open(path: &Path) -> Result<Connection, DatabaseError> {
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(path, flags)?;
    prepare(&connection)?;
    Ok(connection)
}
