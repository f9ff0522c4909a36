//! Serving connections: how many at once, and of one address; how long one may be silent or download; and
//! the end of all of them.

use std::convert::Infallible;
use std::net::{IpAddr, Ipv4Addr};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use bytes::Bytes;
use cortex_shared::tasks::TaskScope;
use http::Request;
use http_body::{Body as HttpBody, Frame, SizeHint};
use hyper::body::Incoming as RequestBody;
use hyper::rt::Executor;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use tokio::sync::Notify;
use tokio::time::Instant;
use tower::ServiceExt as _;

use crate::config::HttpConfig;
use crate::counters;
use crate::grpc::accept::{Incoming, PeerStream};
use crate::grpc::auth::Peer;
use crate::shares::Shares;

/// Requests that one HTTP/2 connection may have open.
const STREAMS: u32 = 64;
/// Bytes that one connection keeps of what its peer sends and nobody has read yet: those who have not logged
/// in may send as well.
const UNREAD: u32 = 65_535;
/// Bytes of an answer that one stream has ready beyond what its peer takes.
const UNSENT: usize = 64 * 1024;
/// How long what is under way has at the end.
const ENDING: Duration = Duration::from_secs(5);

/// What a connection may take.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    connections: usize,
    address_connections: usize,
    header_bytes: usize,
    header_time: Duration,
    quiet: Duration,
    download_time: Duration,
}

impl Limits {
    pub(super) fn of(config: &HttpConfig) -> Self {
        Self {
            connections: config.connections,
            address_connections: config.address_connections,
            header_bytes: config.header_bytes,
            header_time: config.header_time,
            quiet: config.request_time + config.idle_time,
            download_time: config.download_time,
        }
    }
}

/// Serves connections until the scope is cancelled; each in a task of its own.
pub(super) fn serve(mut incoming: Incoming, router: Router, limits: Limits, scope: &TaskScope) {
    let places = Shares::new(limits.connections, limits.address_connections);
    let own = scope.clone();
    scope.spawn("http", async move {
        while let Some(Ok(stream)) = incoming.recv().await {
            let Some(place) = places.take(address_of(&stream.peer)) else {
                // As good as any other: the one that has just come is turned away.
                counters::HTTP_TURNED_AWAY.add(1);
                continue;
            };
            let (router, scope) = (router.clone(), own.clone());
            own.spawn("http connection", async move {
                counters::HTTP_CONNECTIONS.add(1);
                serve_one(stream, router, limits, &scope).await;
                counters::HTTP_CONNECTIONS.sub(1);
                drop(place);
            });
        }
    });
}

fn address_of(peer: &Peer) -> IpAddr {
    // All that comes here came over TCP.
    peer.address().map_or(IpAddr::V4(Ipv4Addr::LOCALHOST), |address| address.ip())
}

async fn serve_one(
    PeerStream { stream, peer }: PeerStream,
    router: Router,
    limits: Limits,
    scope: &TaskScope,
) {
    let moved = Arc::new(Moved::new());
    let seen = Arc::clone(&moved);
    let service = service_fn(move |mut request: Request<RequestBody>| {
        request.extensions_mut().insert(peer.clone());
        request.extensions_mut().insert(Downloading(Arc::clone(&seen)));
        let (router, moved) = (router.clone(), Arc::clone(&seen));
        async move {
            moved.asked();
            let Ok(response) = router.oneshot(request).await;
            moved.now();
            Ok::<_, Infallible>(response.map(|body| Watched { body, moved }))
        }
    });
    let mut builder = auto::Builder::new(InScope(scope.clone()));
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.header_time)
        .max_buf_size(limits.header_bytes.max(8192));
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(STREAMS)
        .initial_connection_window_size(UNREAD)
        .initial_stream_window_size(UNREAD)
        .max_send_buf_size(UNSENT)
        .max_header_list_size(u32::try_from(limits.header_bytes).unwrap_or(u32::MAX))
        .keep_alive_interval(Some(Duration::from_secs(20)))
        .keep_alive_timeout(Duration::from_secs(20));
    let mut connection = std::pin::pin!(builder.serve_connection(TokioIo::new(stream), service));
    let mut ending = None;
    loop {
        let until = ending.unwrap_or_else(|| moved.end(limits));
        tokio::select! {
            ended = connection.as_mut() => {
                if let Err(error) = ended {
                    tracing::debug!(error, "http connection ended");
                }
                return;
            }
            () = scope.token().cancelled(), if ending.is_none() => {
                connection.as_mut().graceful_shutdown();
                ending = Some(Instant::now() + ENDING);
            }
            () = moved.begun_download.notified() => {}
            () = tokio::time::sleep_until(until) => {
                if ending.is_some() || moved.end(limits) <= Instant::now() {
                    return;
                }
            }
        }
    }
}

/// Streams of HTTP/2 are tasks of their own, and belong to somebody like every other.
#[derive(Clone)]
struct InScope(TaskScope);

impl<F> Executor<F> for InScope
where
    F: Future<Output = ()> + Send + 'static,
{
    fn execute(&self, task: F) {
        self.0.spawn("http stream", task);
    }
}

/// When something last moved on a connection: a request came, or a piece of an answer was taken. A peer
/// that does not read what it asked for moves nothing. And since when it has downloaded without a pause.
struct Moved {
    begun: Instant,
    /// Until its first request, none moves anything: not even what looks like the beginning of one.
    asked: AtomicBool,
    after_ms: AtomicU64,
    /// How many downloads are under way, and since when there has been one.
    downloads: Mutex<Option<(usize, Instant)>>,
    /// One has begun: the connection may end earlier.
    begun_download: Notify,
}

impl Moved {
    fn new() -> Self {
        Self {
            begun: Instant::now(),
            asked: AtomicBool::new(false),
            after_ms: AtomicU64::new(0),
            downloads: Mutex::default(),
            begun_download: Notify::new(),
        }
    }

    fn downloads(&self, change: impl FnOnce(&mut Option<(usize, Instant)>)) -> Option<Instant> {
        let mut downloads = self.downloads.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut downloads);
        downloads.map(|(_, since)| since)
    }

    fn asked(&self) {
        self.asked.store(true, Ordering::Relaxed);
        self.now();
    }

    fn now(&self) {
        let after = u64::try_from(self.begun.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.after_ms.store(after, Ordering::Relaxed);
    }

    /// When the connection ends if nothing moves until then.
    fn end(&self, limits: Limits) -> Instant {
        if !self.asked.load(Ordering::Relaxed) {
            return self.begun + limits.header_time;
        }
        let moved = Duration::from_millis(self.after_ms.load(Ordering::Relaxed));
        let quiet = self.begun + moved + limits.quiet;
        let downloaded = self.downloads(|_| {}).map(|since| since + limits.download_time);
        downloaded.map_or(quiet, |downloaded| downloaded.min(quiet))
    }
}

/// By which a request says that its answer is a download. A stream of HTTP/2 whose peer takes nothing is not
/// asked for more, and could not end itself: its connection does, with the time for a download.
#[derive(Clone)]
pub(super) struct Downloading(Arc<Moved>);

impl Downloading {
    /// A download has begun; it lasts until what is returned is dropped.
    pub(super) fn begin(self) -> Download {
        self.0.downloads(|downloads| {
            let (count, since) = downloads.unwrap_or((0, Instant::now()));
            *downloads = Some((count + 1, since));
        });
        self.0.begun_download.notify_one();
        Download(self.0)
    }
}

/// See [`Downloading::begin`].
pub(super) struct Download(Arc<Moved>);

impl Drop for Download {
    fn drop(&mut self) {
        self.0.downloads(|downloads| {
            *downloads =
                downloads.and_then(|(count, since)| (count > 1).then(|| (count - 1, since)));
        });
    }
}

/// The body of an answer, which notes that it is read.
struct Watched {
    body: Body,
    moved: Arc<Moved>,
}

impl HttpBody for Watched {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        self.moved.now();
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
