//! Tasks that somebody wants to end and that may still run on a node that was away.
//!
//! The journal knows them, and between a verdict and its line in the journal this does: a node that
//! comes back with one of them is told to end it, until it has said itself how it ended.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cortex_shared::ids::TaskId;
use cortex_shared::tasks::TaskScope;

use super::running::{DEFAULT_CANCEL_GRACE, Task, cancel_frame};
use crate::node::registry::SessionHandle;
use crate::store::Store;

/// See the module.
pub(super) struct Unwanted {
    /// Those that have a verdict which is not in the journal yet.
    concluded: Mutex<HashSet<TaskId>>,
    store: Arc<dyn Store>,
    scope: TaskScope,
}

impl Unwanted {
    pub(super) fn new(store: Arc<dyn Store>, scope: TaskScope) -> Arc<Self> {
        Arc::new(Self { concluded: Mutex::default(), store, scope })
    }

    fn lock(&self) -> MutexGuard<'_, HashSet<TaskId>> {
        self.concluded.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The task leaves the relay's table for its verdict. To be called while the table is locked: a task
    /// is there, or here, or the journal has it.
    pub(super) fn concluded(&self, task: &Task) {
        if task.is_cancelled() {
            self.lock().insert(task.id());
        }
    }

    /// The journal has it from here on.
    pub(super) fn journalled(&self, id: TaskId) {
        self.lock().remove(&id);
    }

    /// Somebody wants a task to end, which the next run of the hub has to know, too.
    pub(super) fn remember(&self, id: TaskId) {
        let store = Arc::clone(&self.store);
        self.scope.spawn("cancel", async move {
            if let Err(error) = store.want_cancel(id).await {
                tracing::warn!(task = %id, %error, "a cancel was not journalled");
            }
        });
    }

    /// Ends those of these tasks of a node that nobody wants any more: their verdicts were given while it
    /// was away.
    pub(super) fn end(&self, session: &SessionHandle, held: Vec<TaskId>) {
        let end = |session: &SessionHandle, id| {
            // A session that has ended is followed by another.
            session.send(cancel_frame(id, 0, DEFAULT_CANCEL_GRACE)).ok();
        };
        let (now, asked): (Vec<TaskId>, Vec<TaskId>) = {
            let concluded = self.lock();
            held.into_iter().partition(|id| concluded.contains(id))
        };
        now.into_iter().for_each(|id| end(session, id));
        if asked.is_empty() {
            return;
        }
        // Beside the session, which waits for no store.
        let (store, session) = (Arc::clone(&self.store), session.clone());
        self.scope.spawn("unwanted tasks", async move {
            match store.tasks_to_cancel(session.node, asked).await {
                Ok(unwanted) => unwanted.into_iter().for_each(|id| end(&session, id)),
                Err(error) => {
                    tracing::error!(node = %session.node, %error, "unwanted tasks may go on");
                }
            }
        });
    }
}
