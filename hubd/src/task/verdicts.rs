//! Verdicts that the journal did not take at once.
//!
//! Without one, the next start of the hub would call the command `stream_lost`, whatever its node said.
//! So it is offered again until the journal takes it. A hub that ends before that loses it.

use std::sync::Arc;
use std::time::Duration;

use cortex_shared::backoff::Backoff;
use cortex_shared::ids::TaskId;
use cortex_shared::tasks::TaskScope;
use tokio::sync::Semaphore;

use super::relay::acknowledge;
use super::unwanted::Unwanted;
use crate::node::registry::SessionHandle;
use crate::store::{Store, TaskEnd};

/// Verdicts that are offered again at the same time; beyond them, one is lost, and that is said.
const MAX_UNRECORDED: usize = 4096;
/// First and longest bound of the wait before the next attempt.
const AGAIN: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));

/// See the module.
pub(super) struct Unrecorded {
    store: Arc<dyn Store>,
    scope: TaskScope,
    places: Arc<Semaphore>,
    unwanted: Arc<Unwanted>,
}

impl Unrecorded {
    /// Verdicts for this store, offered by tasks of this scope.
    pub(super) fn new(store: Arc<dyn Store>, scope: TaskScope, unwanted: Arc<Unwanted>) -> Self {
        Self { store, scope, places: Arc::new(Semaphore::new(MAX_UNRECORDED)), unwanted }
    }

    /// Offers a verdict again until the store has it or the hub ends. The node need not keep it once the
    /// store has it.
    pub(super) fn keep(&self, task: TaskId, session: Option<SessionHandle>, end: TaskEnd) {
        let Ok(place) = Arc::clone(&self.places).try_acquire_owned() else {
            tracing::error!(%task, "too many verdicts are not journalled: this one is lost");
            return;
        };
        let (store, cancel) = (Arc::clone(&self.store), self.scope.token().clone());
        let unwanted = Arc::clone(&self.unwanted);
        self.scope.spawn("verdict again", async move {
            let mut backoff = Backoff::new(AGAIN.0, AGAIN.1);
            loop {
                tokio::select! {
                    () = cancel.cancelled() => break,
                    () = tokio::time::sleep(backoff.next_delay()) => {}
                }
                match store.end_task(task, end.clone()).await {
                    Ok(()) => {
                        tracing::info!(%task, "a verdict was journalled late");
                        unwanted.journalled(task);
                        if let Some(session) = &session {
                            acknowledge(session, task);
                        }
                        break;
                    }
                    Err(error) => tracing::warn!(%task, %error, "a verdict is not journalled yet"),
                }
            }
            drop(place);
        });
    }
}
