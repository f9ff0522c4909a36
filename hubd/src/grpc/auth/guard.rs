//! Calls that end when their caller is revoked: before the answer begins, and in the midst of it.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http::{HeaderMap, Response};
use http_body::{Body as HttpBody, Frame};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tonic::{Status, body::Body};

/// Lets a call and the stream of its answer go on until `until` is cancelled; its caller is told
/// `refusal` then, and whatever the handler held for it is dropped.
pub(super) fn guard<F>(call: F, until: CancellationToken, refusal: fn() -> Status) -> Guarded<F> {
    let until = Box::pin(until.cancelled_owned());
    Guarded { call: Box::pin(call), until: Some(until), refusal }
}

type Until = Pin<Box<WaitForCancellationFutureOwned>>;

/// See [`guard`].
pub struct Guarded<F> {
    call: Pin<Box<F>>,
    /// There until the answer begins; its body watches from then on.
    until: Option<Until>,
    refusal: fn() -> Status,
}

impl<F, E> Future for Guarded<F>
where
    F: Future<Output = Result<Response<Body>, E>>,
{
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<F::Output> {
        let refusal = self.refusal;
        if self.until.as_mut().is_some_and(|until| until.as_mut().poll(context).is_ready()) {
            return Poll::Ready(Ok(refusal().into_http()));
        }
        let response = ready!(self.call.as_mut().poll(context))?;
        let until = self.until.take();
        Poll::Ready(Ok(response.map(|body| match until {
            Some(until) if !body.is_end_stream() => {
                Body::new(GuardedBody { body: Some(body), until, refusal })
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
    refusal: fn() -> Status,
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
        if this.until.as_mut().poll(context).is_ready() {
            this.body = None;
            let mut trailers = HeaderMap::new();
            let written = (this.refusal)().add_header(&mut trailers);
            return Poll::Ready(Some(written.map(|()| Frame::trailers(trailers))));
        }
        Pin::new(body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.as_ref().is_none_or(HttpBody::is_end_stream)
    }
}
