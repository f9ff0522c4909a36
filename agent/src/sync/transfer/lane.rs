//! The lane of large files: one job at a time that only moves content, beside the engine.
//!
//! A large file takes as long as the line does. Were it part of the engine's round, a file that is
//! saved meanwhile would wait for it. So the engine hands content of large files to a job that knows
//! neither index nor plan, on a connection of its own, and goes on; when the job has ended, the next
//! round plans anew and finds the content at its place: at the hub, or in the stage.

use std::sync::Arc;

use cortex_shared::tasks::TaskScope;
use tokio::sync::{Notify, oneshot};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::sync::core::SyncError;

/// Files larger than this go by the lane: smaller ones are a single chunk, and over in a moment.
pub(in crate::sync) const LARGE_BYTES: u64 = 1024 * 1024;
/// Content of one job, unless a single file is larger: what has arrived is taken over job by job.
pub(super) const JOB_BYTES: u64 = 64 * 1024 * 1024;

struct Job<T> {
    scope: TaskScope,
    task: JoinHandle<()>,
    result: oneshot::Receiver<Result<T, SyncError>>,
}

/// See the module. Owned by the engine of its workspace; a crash loses what the job has not brought
/// to its place.
pub(in crate::sync) struct Lane<T> {
    job: Option<Job<T>>,
    ended: Arc<Notify>,
}

impl<T: Send + 'static> Lane<T> {
    /// An empty lane; `ended` is notified whenever a job has ended.
    pub(in crate::sync) fn new(ended: Arc<Notify>) -> Self {
        Self { job: None, ended }
    }

    /// Whether a job runs, or its result has not been collected.
    pub(in crate::sync) fn is_busy(&self) -> bool {
        self.job.is_some()
    }

    /// Starts a job; the lane must not be busy.
    pub(in crate::sync) fn start<F>(
        &mut self,
        scope: &TaskScope,
        name: &'static str,
        work: impl FnOnce(CancellationToken) -> F,
    ) where
        F: Future<Output = Result<T, SyncError>> + Send + 'static,
    {
        debug_assert!(!self.is_busy(), "a lane has one job at a time");
        let scope = scope.child();
        let (sender, result) = oneshot::channel();
        let (work, ended) = (work(scope.token().clone()), self.ended.clone());
        let task = scope.spawn(name, async move {
            // Nobody waits for it any more once the engine has ended.
            sender.send(work.await).ok();
            ended.notify_one();
        });
        self.job = Some(Job { scope, task, result });
    }

    /// The result of the job, if it has ended.
    pub(in crate::sync) fn collect(&mut self) -> Option<Result<T, SyncError>> {
        let result = match self.job.as_mut()?.result.try_recv() {
            Ok(result) => result,
            Err(oneshot::error::TryRecvError::Empty) => return None,
            Err(oneshot::error::TryRecvError::Closed) => Err(SyncError::Panicked),
        };
        self.job = None;
        Some(result)
    }

    /// Ends the job; returns once it touches nothing any more.
    pub(in crate::sync) async fn end(&mut self) -> Option<T> {
        let Job { scope, task, result } = self.job.take()?;
        scope.cancel();
        if let Err(error) = task.await {
            tracing::error!(%error, "a transfer failed");
        }
        result.await.ok()?.ok()
    }
}
