//! Connections that only read. Readers never wait for the writer, nor it for them; each reading sees
//! one moment of the database.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use rusqlite::{Connection, OpenFlags};
use tokio::sync::Semaphore;

use super::super::StoreError;

/// Readings at the same time. More would wait for the same disk and processors.
const CONNECTIONS: usize = 4;

/// A few connections, opened when they are first needed.
pub(super) struct Readers {
    path: PathBuf,
    permits: Arc<Semaphore>,
    idle: Arc<Mutex<Vec<Connection>>>,
}

impl Readers {
    pub(super) fn new(path: PathBuf) -> Self {
        Self { path, permits: Arc::new(Semaphore::new(CONNECTIONS)), idle: Arc::default() }
    }

    /// Runs `work` within one read transaction, on a thread that may block.
    pub(super) async fn read<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Connection) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let permit = self.permits.clone().acquire_owned().await.map_err(|_| StoreError::Closed)?;
        let (path, idle) = (self.path.clone(), self.idle.clone());
        tokio::task::spawn_blocking(move || {
            // Held by the thread, not by the caller: it may go away while the reading goes on.
            let _permit = permit;
            let pooled = idle.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).pop();
            let mut connection = match pooled {
                Some(connection) => connection,
                None => open(&path)?,
            };
            let tx = connection.transaction()?;
            let result = work(&tx);
            tx.finish()?;
            idle.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).push(connection);
            result
        })
        .await
        .map_err(|_| StoreError::Writer)?
    }
}

fn open(path: &Path) -> Result<Connection, StoreError> {
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(path, flags)?;
    connection.busy_timeout(super::BUSY_TIMEOUT)?;
    Ok(connection)
}
