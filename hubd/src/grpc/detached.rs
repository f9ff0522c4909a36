//! Work that runs to its end, whether or not its caller waits for it.

use cortex_shared::tasks::TaskScope;
use tokio::sync::oneshot;
use tonic::{Code, Status};

use super::status::refuse;

/// Runs `work` as a task of its own and waits for it. A caller that hangs up, or is cut off, must not
/// leave memory and store apart, or a command half begun; its result is dropped then.
pub(super) async fn run_to_end<T, F>(
    scope: &TaskScope,
    name: &'static str,
    work: F,
) -> Result<T, Status>
where
    T: Send + 'static,
    F: Future<Output = T> + Send + 'static,
{
    let (done, result) = oneshot::channel();
    scope.spawn(name, async move {
        drop(done.send(work.await));
    });
    // Only a panic loses the result; the log has it.
    result.await.map_err(|_| refuse(Code::Internal, "internal", "the hub failed"))
}
