//! Supervised tasks: nothing runs that nobody owns, and a panic is reported, never swallowed.

use std::future::Future;
use std::panic::AssertUnwindSafe;

use futures_util::FutureExt as _;
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
        // Not by a second task that waits for the first, nor by a block that holds it twice, before and
        // after its first poll: a hub has several tasks for each node. Nothing of a task is used after its
        // panic.
        self.tracker.spawn(AssertUnwindSafe(task).catch_unwind().map(move |outcome| {
            if outcome.is_err() {
                tracing::error!(task = name, "task panicked");
            }
        }))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_task_that_panics_ends_alone() {
        let scope = TaskScope::new();
        let (sender, receiver) = tokio::sync::oneshot::channel();
        scope.spawn("bad", async { panic!("as it should") }).await.unwrap();
        scope.spawn("good", async move { sender.send(7).unwrap() });
        assert_eq!(receiver.await, Ok(7));
        scope.finish().await;
        assert_eq!(scope.running(), 0);
    }
}
