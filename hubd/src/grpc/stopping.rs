//! How streams end when the hub stops: with a word, so that the caller comes back to the next one.

use std::pin::Pin;

use futures_util::{Stream, StreamExt as _, stream};
use tokio_util::sync::CancellationToken;
use tonic::Status;

use super::status::shutting_down;

/// These answers until the hub stops, which is said last. Whoever is silent, or does not read, does not hold that
/// up.
pub(super) fn until_stopped<T: Send + 'static>(
    stop: CancellationToken,
    answers: impl Stream<Item = Result<T, Status>> + Send + 'static,
) -> Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>> {
    let answers = answers.take_until(stop.clone().cancelled_owned());
    let last = async move { stop.is_cancelled().then(|| Err(shutting_down())) };
    Box::pin(answers.chain(stream::once(last).filter_map(std::future::ready)))
}
