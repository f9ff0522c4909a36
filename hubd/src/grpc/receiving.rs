//! What the messages of one member may take while they arrive.
//!
//! A message is put together before anybody looks at it, with room for all of it once its length is known. A
//! connection has thousands of calls, and a member as many connections as it likes; so of what the calls of the
//! sync service are sent, each certificate has so many bytes under way, over all its connections. A call counts as
//! its largest message, until it is over: the room is kept for the next one. Whoever wants more is refused. If it
//! waited instead, what it has sent already would fill the window of its connection, and nothing would come to an
//! end.

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};

use bytes::{Buf as _, Bytes};
use cortex_proto::MAX_MESSAGE_BYTES;
use http::{Request, Response};
use http_body::{Body as HttpBody, Frame};
use tonic::{Code, Status, body::Body};
use tower::{Layer, Service};

use super::auth::Peer;
use super::status::refuse;
use crate::store::KeyHash;

/// For one certificate: the packs of fifty workspaces that begin at once. Members try again.
const EACH_BYTES: usize = 256 * 1024 * 1024;
/// Messages up to this size are not counted, as most are: a connection full of them has 64 MiB.
const SMALL_BYTES: usize = 16 * 1024;
/// What comes before each message: whether it is compressed, and its length.
/// <https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md>
const PREFIX_BYTES: usize = 5;
const COUNTED: &str = "/cortex.v1.Sync/";

/// See the module. Clones count together.
#[derive(Clone)]
pub(crate) struct ReceivingLayer {
    each: usize,
    held: Arc<Mutex<HashMap<KeyHash, usize>>>,
}

impl Default for ReceivingLayer {
    fn default() -> Self {
        Self { each: EACH_BYTES, held: Arc::default() }
    }
}

impl ReceivingLayer {
    fn held(&self) -> MutexGuard<'_, HashMap<KeyHash, usize>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A call that counts, until it is dropped.
struct Charge {
    layer: ReceivingLayer,
    key: KeyHash,
    bytes: AtomicUsize,
}

impl Charge {
    /// Counts as so many bytes if it does not as more already; whether there is room for that.
    fn grow(&self, bytes: usize) -> bool {
        let mut held = self.layer.held();
        let counted = self.bytes.load(Ordering::Relaxed);
        if bytes <= counted {
            return true;
        }
        let has = held.get(&self.key).copied().unwrap_or_default() + (bytes - counted);
        let fits = has <= self.layer.each;
        if fits {
            held.insert(self.key, has);
            self.bytes.store(bytes, Ordering::Relaxed);
        }
        fits
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        let bytes = *self.bytes.get_mut();
        let mut held = self.layer.held();
        if let Some(has) = held.get_mut(&self.key) {
            *has = has.saturating_sub(bytes);
            if *has == 0 {
                held.remove(&self.key);
            }
        }
    }
}

impl<S> Layer<S> for ReceivingLayer {
    type Service = Receiving<S>;
    fn layer(&self, inner: S) -> Self::Service {
        Receiving { inner, layer: self.clone() }
    }
}

/// See the module.
#[derive(Clone)]
pub(crate) struct Receiving<S> {
    inner: S,
    layer: ReceivingLayer,
}

impl<S> Service<Request<Body>> for Receiving<S>
where
    S: Service<Request<Body>, Response = Response<Body>>,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = Charged<S::Future>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let peer = request.extensions().get::<Peer>();
        let charge = match peer.filter(|_| request.uri().path().starts_with(COUNTED)) {
            Some(Peer::Certified { key, .. }) => {
                let (layer, bytes) = (self.layer.clone(), AtomicUsize::new(0));
                Some(Arc::new(Charge { layer, key: *key, bytes }))
            }
            Some(Peer::Anonymous(_) | Peer::Local { .. } | Peer::Session { .. }) | None => None,
        };
        let request = match charge.clone() {
            Some(charge) => {
                let arriving = Arriving::default();
                request.map(|body| Body::new(Measured { body, charge, arriving }))
            }
            None => request,
        };
        Charged { call: Box::pin(self.inner.call(request)), _charge: charge }
    }
}

/// A call until its answer begins.
pub(crate) struct Charged<F> {
    call: Pin<Box<F>>,
    _charge: Option<Arc<Charge>>,
}

impl<F: Future> Future for Charged<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<F::Output> {
        self.call.as_mut().poll(context)
    }
}

/// The body of a request.
struct Measured {
    body: Body,
    charge: Arc<Charge>,
    arriving: Arriving,
}

/// Where in its messages a body is.
#[derive(Default)]
struct Arriving {
    prefix: [u8; PREFIX_BYTES],
    /// Bytes that have come of the prefix.
    prefixed: usize,
    /// Bytes that have not come of the message whose prefix has.
    rest: usize,
}

impl Arriving {
    /// Takes some of the body in; the length of the next message that begins in it. Ends with an empty `data`.
    fn next(&mut self, data: &mut &[u8]) -> Option<usize> {
        let came = self.rest.min(data.len());
        self.rest -= came;
        data.advance(came);
        let came = (PREFIX_BYTES - self.prefixed).min(data.len());
        self.prefix[self.prefixed..][..came].copy_from_slice(&data[..came]);
        self.prefixed += came;
        data.advance(came);
        let [_, length @ ..] = self.prefix;
        (self.prefixed == PREFIX_BYTES).then(|| {
            self.prefixed = 0;
            self.rest = u32::from_be_bytes(length) as usize;
            self.rest
        })
    }
}

impl Measured {
    fn measure(&mut self, mut data: &[u8]) -> Result<(), Status> {
        while let Some(bytes) = self.arriving.next(&mut data) {
            // What is longer is refused by whoever puts it together.
            let bytes = bytes.min(MAX_MESSAGE_BYTES);
            if bytes > SMALL_BYTES && !self.charge.grow(bytes) {
                let text =
                    "more is sent with this certificate than the hub takes at a time; try again";
                return Err(refuse(Code::ResourceExhausted, "too_much_at_once", text));
            }
        }
        Ok(())
    }
}

impl HttpBody for Measured {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = &mut *self;
        let Some(frame) = ready!(Pin::new(&mut this.body).poll_frame(context)?) else {
            return Poll::Ready(None);
        };
        if let Some(data) = frame.data_ref() {
            this.measure(data)?;
        }
        Poll::Ready(Some(Ok(frame)))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }
}

#[cfg(test)]
mod tests;
