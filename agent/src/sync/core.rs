//! What the engine of a workspace works on with blocking calls: the tree, the private directory and
//! the index. Lent to a blocking thread for each piece of work and handed back after it, so there is
//! one owner at any time and no lock.

use std::io;
use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use super::apply::ApplyError;
use super::hub::{HubError, STALL_LIMIT};
use super::ignore::Ignore;
use super::index::{Index, IndexError};
use super::private_dir::PrivateDir;
use super::scan::ScanError;
use super::watch::Watch;
use crate::root_dir::RootDir;

/// Why the engine could not go on with what it was doing.
#[derive(Debug, thiserror::Error)]
pub(super) enum SyncError {
    /// It was told to stop.
    #[error("stopped")]
    Cancelled,
    /// The hub did not do its part.
    #[error(transparent)]
    Hub(#[from] HubError),
    /// The index failed.
    #[error(transparent)]
    Index(#[from] IndexError),
    /// The tree could not be read as a whole.
    #[error(transparent)]
    Scan(#[from] ScanError),
    /// The tree could not be changed.
    #[error(transparent)]
    Apply(#[from] ApplyError),
    /// Something else of the file system.
    #[error("file system failed")]
    Io(#[from] io::Error),
    /// A piece of blocking work panicked.
    #[error("internal error: blocking work panicked")]
    Panicked,
}

/// The state that blocking work needs.
pub(super) struct Core {
    pub(super) root: RootDir,
    pub(super) private: Arc<PrivateDir>,
    pub(super) index: Index,
    pub(super) ignore: Ignore,
    /// `None` if the kernel gives us no watcher at all.
    pub(super) watch: Option<Watch>,
    pub(super) owner: Option<(u32, u32)>,
}

/// The place of the [`Core`] between two pieces of work.
pub(super) struct CoreCell(Option<Box<Core>>);

impl CoreCell {
    pub(super) fn new(core: Core) -> Self {
        Self(Some(Box::new(core)))
    }

    /// Closes the index and the tree.
    pub(super) fn close(&mut self) {
        self.0 = None;
    }

    /// Does blocking work. The caller must not drop the future before it ends: the core would be
    /// lost. Work that takes long watches the token of the engine.
    pub(super) async fn run<T, E>(
        &mut self,
        work: impl FnOnce(&mut Core) -> Result<T, E> + Send + 'static,
    ) -> Result<T, SyncError>
    where
        T: Send + 'static,
        E: Into<SyncError> + Send + 'static,
    {
        let mut core = self.0.take().ok_or(SyncError::Panicked)?;
        let (core, result) = tokio::task::spawn_blocking(move || {
            let result = work(&mut core);
            (core, result)
        })
        .await
        .map_err(|_| SyncError::Panicked)?;
        self.0 = Some(core);
        result.map_err(Into::into)
    }
}

/// Waits for the hub, but neither beyond a stop nor for a line that is dead.
pub(super) async fn waiting<T>(
    cancel: &CancellationToken,
    call: impl Future<Output = Result<T, HubError>>,
) -> Result<T, SyncError> {
    tokio::select! {
        () = cancel.cancelled() => Err(SyncError::Cancelled),
        result = tokio::time::timeout(STALL_LIMIT, call) => {
            Ok(result.map_err(|_| HubError::stalled())??)
        }
    }
}
