//! What the engine of a workspace works on with blocking calls: the tree, the private directory and
//! the index. Lent to a blocking thread for each piece of work and handed back after it, so there is
//! one owner at any time and no lock.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use cortex_shared::entry::Digest;
use tokio_util::sync::CancellationToken;

use super::apply::ApplyError;
use super::ground::Blocking;
use super::hub::{Hub, HubError, STALL_BYTES, STALL_LIMIT};
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
    /// The file system takes names for one that differ only in case.
    pub(super) folds_case: bool,
    pub(super) private: Arc<PrivateDir>,
    pub(super) index: Index,
    pub(super) ignore: Ignore,
    /// The version of the hub's rules that those come from: its content, `None` without one.
    pub(super) rules_base: Option<Digest>,
    /// `None` if the kernel gives us no watcher at all.
    pub(super) watch: Option<Watch>,
    pub(super) owner: Option<(u32, u32)>,
}

/// The place of the [`Core`] between two pieces of work.
pub(super) struct CoreCell {
    core: Option<Box<Core>>,
    blocking: Blocking,
}

impl CoreCell {
    pub(super) fn new(core: Core, blocking: Blocking) -> Self {
        Self { core: Some(Box::new(core)), blocking }
    }

    /// Where its work is done.
    pub(super) fn blocking(&self) -> Blocking {
        self.blocking
    }

    /// Closes the index and the tree.
    pub(super) fn close(&mut self) {
        self.core = None;
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
        let mut core = self.core.take().ok_or(SyncError::Panicked)?;
        let work = move || {
            let result = work(&mut core);
            (core, result)
        };
        let (core, result) = self.blocking.run(work).await?;
        self.core = Some(core);
        result.map_err(Into::into)
    }
}

/// Waits for the hub, but neither beyond a stop nor for a line that is dead.
pub(super) async fn waiting<T, H: Hub>(
    cancel: &CancellationToken,
    hub: &H,
    call: impl Future<Output = Result<T, HubError>>,
) -> Result<T, SyncError> {
    tokio::select! {
        biased;
        () = cancel.cancelled() => Err(SyncError::Cancelled),
        result = while_moving(STALL_LIMIT, || hub.moved_bytes(), call) => Ok(result?),
    }
}

/// Waits for a call as long as its line moves. What arrives is a pack or nothing, and a pack takes
/// its time on a slow line: so bytes are what counts.
async fn while_moving<T>(
    limit: Duration,
    moved: impl Fn() -> u64,
    call: impl Future<Output = Result<T, HubError>>,
) -> Result<T, HubError> {
    tokio::pin!(call);
    let mut before = moved();
    loop {
        match tokio::time::timeout(limit, &mut call).await {
            Ok(result) => return result,
            Err(_) => {
                let now = moved();
                if now.saturating_sub(before) < STALL_BYTES {
                    return Err(HubError::stalled());
                }
                before = now;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    #[tokio::test]
    async fn a_slow_line_is_waited_for_and_a_dead_one_is_not() {
        let limit = Duration::from_millis(20);
        let line = AtomicU64::new(0);
        // Many times the limit, but the line moves.
        let slow = async {
            for _ in 0..20 {
                tokio::time::sleep(limit / 2).await;
                line.fetch_add(STALL_BYTES, Ordering::SeqCst);
            }
            Ok(7)
        };
        let moved = || line.load(Ordering::SeqCst);
        assert_eq!(while_moving(limit, moved, slow).await.unwrap(), 7);
        // Whatever keeps a dead line open, moves a few bytes.
        let counted = || line.fetch_add(STALL_BYTES / 2, Ordering::SeqCst);
        let dead = while_moving(limit, counted, std::future::pending::<Result<(), HubError>>());
        let error = tokio::time::timeout(Duration::from_secs(20), dead).await.unwrap();
        assert!(matches!(error, Err(HubError::Unavailable { .. })));
    }
}
