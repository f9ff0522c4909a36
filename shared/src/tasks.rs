//! Supervised tasks: nothing runs that nobody owns, and a panic is reported, never swallowed.

use std::future::Future;

use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Owns the tasks of one daemon or of one part of it.
///
/// Cancelling asks all tasks to end; [`TaskScope::finish`] waits until they have. Clones share the
/// same tasks.
#[derive(Clone, Debug, Default)]
pub struct TaskScope {
    tracker: TaskTracker,
    cancel: CancellationToken,
}

impl TaskScope {
    /// An empty scope.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// A scope that is cancelled with this one, and can be cancelled alone.
    #[must_use]
    pub fn child(&self) -> Self {
        Self { tracker: self.tracker.clone(), cancel: self.cancel.child_token() }
    }

    /// The token that tells tasks to end.
    #[must_use]
    pub fn token(&self) -> &CancellationToken {
        &self.cancel
    }

    /// Asks all tasks of this scope to end.
    pub fn cancel(&self) {
        self.cancel.cancel();
    }

    /// Runs a task that ends by itself or watches [`TaskScope::token`].
    pub fn spawn<F>(&self, name: &'static str, task: F) -> JoinHandle<()>
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let inner = self.tracker.spawn(task);
        self.tracker.spawn(async move {
            if let Err(error) = inner.await
                && error.is_panic()
            {
                tracing::error!(task = name, "task panicked");
            }
        })
    }

    /// Waits until every task has ended. New ones may still be added meanwhile.
    pub async fn finish(&self) {
        self.tracker.close();
        self.tracker.wait().await;
    }

    /// How many tasks run.
    #[must_use]
    pub fn running(&self) -> usize {
        self.tracker.len()
    }
}
