//! The library on this node: kept new, placed where commands find it, and led to by the workspaces' links.

use std::path::PathBuf;
use std::time::Duration;

use cortex_shared::backoff::Backoff;
use cortex_shared::ids::WorkspaceId;
use cortex_shared::library::LIBRARY_NAME;
use tokio::sync::watch;

use super::{Workspaces, lock, settled_at};
use crate::library::hang_door;
use crate::sync::status::{SyncState, SyncStatus};

/// How soon a library that is not up to date is looked at again: first, and at most.
const LIBRARY_RETRY: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(5));
/// An engine that has done everything comes to rest within this.
const SETTLING: Duration = Duration::from_secs(1);

impl Workspaces {
    /// Where skills are, if there are some on this node.
    #[must_use]
    pub fn library_dir(&self) -> Option<PathBuf> {
        let library = self.inner.library.as_ref().filter(|library| library.is_placed())?;
        Some(library.dir().to_owned())
    }

    /// Brings the library up to date whenever somebody needs it to be.
    pub(super) async fn refresh_library(&self) {
        let mut backoff = Backoff::new(LIBRARY_RETRY.0, LIBRARY_RETRY.1);
        loop {
            let ticket = self.inner.freshness.asked().await;
            if self.refresh_library_once().await {
                backoff.reset();
                self.inner.freshness.finish(ticket);
                lock(&self.inner.engines).values().for_each(|engine| engine.handle.plan_again());
            } else {
                tokio::time::sleep(backoff.next_delay()).await;
            }
        }
    }

    /// Whether the library that is placed is as new as the hub's was after the call.
    async fn refresh_library_once(&self) -> bool {
        let Some(handle) = self.handle_of(LIBRARY_NAME) else { return false };
        if handle.flush().await.is_err() {
            return false;
        }
        // The engine answers as soon as all is done, and says after it that it has come to rest.
        let mut status = handle.status();
        let settled = status.wait_for(|status| settled_at(status).is_some());
        let settled =
            tokio::time::timeout(SETTLING, settled).await.is_ok_and(|found| found.is_ok());
        settled && self.place_library(status).await
    }

    /// Places what has arrived of the library, whose engine has this status, and hangs the doors to it.
    /// Whether all of it is placed.
    pub(super) async fn place_library(&self, status: watch::Receiver<SyncStatus>) -> bool {
        let Some(library) = self.inner.library.clone() else { return false };
        let _placing = self.inner.placing.lock().await;
        let Some(seq) = settled_at(&status.borrow()) else { return false };
        let still = move || settled_at(&status.borrow()) == Some(seq);
        let placed = tokio::task::spawn_blocking(move || library.place(&still)).await;
        if let Ok(Err(error)) = &placed {
            let cause = std::error::Error::source(error).map(ToString::to_string);
            tracing::error!(%error, cause, "the library cannot be placed");
        }
        let roots: Vec<PathBuf> = {
            let engines = lock(&self.inner.engines);
            let open = engines.values().filter(|engine| {
                engine.config.id != WorkspaceId::LIBRARY
                    && engine.handle.status().borrow().state != SyncState::Halted
            });
            open.map(|engine| engine.root.clone()).filter(|root| root.is_dir()).collect()
        };
        for root in roots {
            self.hang_door(root).await;
        }
        matches!(placed, Ok(Ok(true)))
    }

    /// Makes links of a workspace that lead to skills lead there, once there are some.
    pub(super) async fn hang_door(&self, root: PathBuf) {
        let Some(place) = self.library_dir() else { return };
        let _hanging = self.inner.hanging.lock().await;
        let shown = root.clone();
        let hung = tokio::task::spawn_blocking(move || hang_door(&root, &place)).await;
        if let Ok(Err(error)) = hung {
            tracing::warn!(root = %shown.display(), %error, "links to skills lead nowhere here");
        }
    }
}
