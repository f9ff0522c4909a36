//! Calls that end when their caller is revoked: before the answer begins, and in the midst of it.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http::{HeaderMap, Response};
use http_body::{Body as HttpBody, Frame};
use tokio_util::sync::CancellationToken;
use tonic::{Status, body::Body};

use super::{CLOCK_LOOK, expired, life_left};

/// Lets a call and the stream of its answer go on until `until` is cancelled, or the certificate's life
/// is over; its caller is told why then, and whatever the handler held for it is dropped.
pub(super) fn guard<F>(call: F, until: CancellationToken, ends: Ends) -> Guarded<F> {
    let until: Until = Box::pin(async move {
        tokio::select! {
            () = until.cancelled() => ends.refusal,
            () = certificate_end(ends.not_after_ms) => expired,
        }
    });
    Guarded { call: Box::pin(call), until: Some(until) }
}

/// What ends a call besides its caller's revocation.
pub(super) struct Ends {
    /// What the caller is told if it was revoked.
    pub(super) refusal: fn() -> Status,
    /// End of its certificate's life, if it has one.
    pub(super) not_after_ms: Option<i64>,
}

/// Waits for the end of a certificate's life, by the clock as it is set then.
pub(super) async fn certificate_end(not_after_ms: Option<i64>) {
    let Some(not_after_ms) = not_after_ms else { return std::future::pending().await };
    while let Some(left) = life_left(not_after_ms) {
        tokio::time::sleep(left.min(CLOCK_LOOK)).await;
    }
}

/// It says the refusal.
type Until = Pin<Box<dyn Future<Output = fn() -> Status> + Send>>;

/// See [`guard`].
pub struct Guarded<F> {
    call: Pin<Box<F>>,
    /// There until the answer begins; its body watches from then on.
    until: Option<Until>,
}

impl<F, E> Future for Guarded<F>
where
    F: Future<Output = Result<Response<Body>, E>>,
{
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<F::Output> {
        if let Some(until) = &mut self.until
            && let Poll::Ready(refusal) = until.as_mut().poll(context)
        {
            return Poll::Ready(Ok(refusal().into_http()));
        }
        let response = ready!(self.call.as_mut().poll(context))?;
        let until = self.until.take();
        Poll::Ready(Ok(response.map(|body| match until {
            Some(until) if !body.is_end_stream() => {
                Body::new(GuardedBody { body: Some(body), until })
            }
            _ => body,
        })))
    }
}

/// The body of an answer that goes on until it is cut off.
struct GuardedBody {
    /// Gone once it was cut off.
    body: Option<Body>,
    until: Until,
}

impl HttpBody for GuardedBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = &mut *self;
        let Some(body) = &mut this.body else { return Poll::Ready(None) };
        if let Poll::Ready(refusal) = this.until.as_mut().poll(context) {
            this.body = None;
            let mut trailers = HeaderMap::new();
            let written = refusal().add_header(&mut trailers);
            return Poll::Ready(Some(written.map(|()| Frame::trailers(trailers))));
        }
        Pin::new(body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.as_ref().is_none_or(HttpBody::is_end_stream)
    }
}
