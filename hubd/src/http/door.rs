//! Every request passes here: it has so much time and so large a body, comes from no other site's page,
//! and is carried out for an operator that may make the call it stands for.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{RawPathParams, Request};
use axum::middleware::map_response;
use axum::response::IntoResponse as _;
use axum::routing::{MethodFilter, get, on};
use bytes::{Bytes, BytesMut};
use cortex_proto::CODE_DRAINING;
use futures_util::StreamExt as _;
use http::header::{CONTENT_LENGTH, CONTENT_SECURITY_POLICY, CONTENT_TYPE, REFERRER_POLICY};
use http::header::{X_CONTENT_TYPE_OPTIONS, X_FRAME_OPTIONS};
use http::request::Parts;
use http::{HeaderValue, Response, StatusCode};
use tokio::time::Instant;

use super::api::Api;
use super::credentials::{Shown, check_origin, peer_of};
use super::error::Problem;
use super::health::{self, Readiness};
use super::metrics::{self, MetricsToken};
use super::provision::{self, Agents};
use super::routes::{Answered, Call, ROUTES, Route, Verb, Who, not_logged_in};
use super::{openapi, page};
use crate::authority::sessions::Sessions;
use crate::config::HttpConfig;
use crate::counters;
use crate::grpc::auth::{Entry, Peer};

/// How often a session is used by whoever listens: much less than what it lives without use.
const STILL_THERE: Duration = Duration::from_secs(60);

/// Largest body of somebody who has not logged in, in bytes: all that such a one sends is a secret to log in
/// with.
const STRANGERS_BYTES: usize = 4096;

/// See the module.
pub(super) struct Door {
    readiness: Arc<Readiness>,
    /// There once the hub is ready.
    api: OnceLock<Arc<Api>>,
    sessions: Arc<Sessions>,
    agents: Agents,
    metrics_token: Option<MetricsToken>,
    request_bytes: usize,
    request_time: Duration,
}

impl Door {
    pub(super) fn new(
        config: &HttpConfig,
        sessions: Arc<Sessions>,
        agents: Agents,
        metrics_token: Option<MetricsToken>,
    ) -> Self {
        Self {
            readiness: Arc::default(),
            api: OnceLock::new(),
            sessions,
            agents,
            metrics_token,
            request_bytes: config.request_bytes,
            request_time: config.request_time,
        }
    }

    pub(super) fn readiness(&self) -> &Arc<Readiness> {
        &self.readiness
    }

    pub(super) fn open(&self, api: Api) {
        // A second call would find the first one's, which is as good.
        drop(self.api.set(Arc::new(api)));
        self.readiness.ready();
    }

    /// Why the hub is to be given no work now, if it is not. It still answers who asks while an
    /// administrator drains it.
    fn unready(&self) -> Option<Problem> {
        let drained = |api: &Arc<Api>| {
            api.service.relay.draining().until()?;
            let detail = "the hub takes no new commands: it is about to restart";
            Some(
                Problem::new(StatusCode::SERVICE_UNAVAILABLE, CODE_DRAINING, detail).retry_after(5),
            )
        };
        self.readiness.refusal().or_else(|| self.api.get().and_then(drained))
    }

    /// The hub, if it is ready.
    pub(super) fn api(&self) -> Result<&Arc<Api>, Problem> {
        if let Some(refusal) = self.readiness.refusal() {
            return Err(refusal);
        }
        self.api.get().ok_or_else(starting)
    }

    /// Lets a request in as this call of the Operator service, or says why not.
    pub(super) fn admit(&self, method: &'static str, parts: &Parts) -> Result<Visit, Problem> {
        let api = self.api()?;
        check_origin(parts)?;
        let connection = parts.extensions.get::<Peer>().ok_or_else(not_logged_in)?;
        let (peer, session) = peer_of(parts, connection, &self.sessions)?;
        if matches!(peer, Peer::Anonymous(_)) {
            return Err(not_logged_in());
        }
        match api.auth.admit_operator(method, peer.clone()) {
            Ok(entry) => Ok(Visit { entry, peer, session }),
            Err(status) => {
                if let (Peer::Session { holder, .. }, tonic::Code::Unauthenticated) =
                    (&peer, status.code())
                {
                    // Its login no longer counts, and neither does whatever stands on it.
                    self.sessions.close_all_of(holder);
                }
                Err(status.into())
            }
        }
    }
}

/// A request that was let in.
pub(super) struct Visit {
    /// Who it is.
    pub(super) entry: Entry,
    /// The connection, or the session on it.
    pub(super) peer: Peer,
    /// The session, if it is by one.
    pub(super) session: Option<Shown>,
}

impl Visit {
    /// Waits until whoever asked may go on no longer, and says why: whoever answers with a stream ends it
    /// then. Safe to give up and to begin again.
    pub(super) async fn over(&self) -> Problem {
        let logged_out = async {
            match &self.session {
                Some(shown) => shown.session.ended().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            status = self.entry.over() => status.into(),
            () = logged_out => not_logged_in(),
        }
    }
}

/// The router of everything.
pub(super) fn router(door: &Arc<Door>) -> Router {
    let with = |door: &Arc<Door>| Arc::clone(door);
    let (ready, measured, served) = (with(door), with(door), with(door));
    let mut router = Router::new()
        .route("/healthz", get(|| async { health::healthz() }))
        .route("/readyz", get(move || async move { health::readyz(ready.unready()) }))
        .route(
            "/metrics",
            get(move |request: Request| async move { answer(metrics(&measured, request)) }),
        )
        .route("/install.sh", get(|| async { provision::script() }))
        .route(
            "/v1/agent/{platform}",
            get(move |path: RawPathParams, request: Request| async move {
                let (parts, _) = request.into_parts();
                answer(provision::file(&served.agents, &first(&path), &parts).await)
            }),
        )
        .route("/api/v1/openapi.json", get(|| async { openapi::response() }));
    router = page::routes(router);
    for route in ROUTES {
        let door = Arc::clone(door);
        let handle = move |path: RawPathParams, request: Request| async move {
            answer(carry_out(&door, route, &path, request).await)
        };
        router = router.route(route.path, on(filter(route.verb), handle));
    }
    router
        .fallback(|| async {
            Problem::new(StatusCode::NOT_FOUND, "no_such_path", "there is nothing here")
        })
        .method_not_allowed_fallback(|| async {
            let status = StatusCode::METHOD_NOT_ALLOWED;
            Problem::new(status, "method_not_allowed", "this cannot be asked in this way")
        })
        .layer(map_response(finish))
}

fn filter(verb: Verb) -> MethodFilter {
    match verb {
        Verb::Get => MethodFilter::GET,
        Verb::Post => MethodFilter::POST,
        Verb::Put => MethodFilter::PUT,
        Verb::Delete => MethodFilter::DELETE,
    }
}

fn answer(result: Result<Response<Body>, Problem>) -> Response<Body> {
    result.unwrap_or_else(Problem::into_response)
}

fn first(path: &RawPathParams) -> String {
    path.iter().next().map(|(_, value)| value.to_owned()).unwrap_or_default()
}

/// Carries out a line of the table.
async fn carry_out(
    door: &Arc<Door>,
    route: &'static Route,
    path: &RawPathParams,
    request: Request,
) -> Result<Response<Body>, Problem> {
    let (parts, body) = request.into_parts();
    let (api, visit, peer) = match let_in(door, route, &parts) {
        Ok(let_in) => let_in,
        Err(problem) => {
            discard(body, door).await;
            return Err(problem);
        }
    };
    let work = async {
        let body = match route.body {
            Some(_) => {
                check_json(&parts)?;
                let limit = match route.who {
                    Who::Caller(_) => door.request_bytes,
                    Who::Anyone => door.request_bytes.min(STRANGERS_BYTES),
                };
                read(&parts, body, limit).await?
            }
            None => Bytes::new(),
        };
        let call = Call {
            caller: visit.as_ref().map(|visit| visit.entry.operator.clone()),
            peer,
            session: visit.as_ref().and_then(|visit| visit.session.clone()),
            path: path.iter().map(|(name, value)| (name.to_owned(), value.to_owned())).collect(),
            query: parts.uri.query().unwrap_or_default().to_owned(),
            headers: parts.headers.clone(),
            body,
        };
        (route.handle)(api, call).await
    };
    let answered = tokio::select! {
        // First: logging out ends its own session, and is answered.
        biased;
        answered = work => answered?,
        problem = over(visit.as_ref()) => return Err(problem),
        () = tokio::time::sleep(door.request_time) => return Err(Problem::new(
            StatusCode::GATEWAY_TIMEOUT,
            "deadline",
            "this took too long; what was begun may still happen",
        )),
    };
    Ok(match answered {
        Answered::Whole(response) => response,
        // It has begun in time, and goes on as long as it may.
        Answered::Open(open) => {
            let sessions = Arc::clone(&door.sessions);
            open.until(async move {
                let shown = visit.as_ref().and_then(|visit| visit.session.as_ref());
                tokio::select! {
                    problem = over(visit.as_ref()) => problem,
                    () = in_use(&sessions, shown, STILL_THERE) => not_logged_in(),
                }
            })
        }
    })
}

/// Who it is that asks.
fn let_in(
    door: &Door,
    route: &Route,
    parts: &Parts,
) -> Result<(Arc<Api>, Option<Visit>, Peer), Problem> {
    let api = Arc::clone(door.api()?);
    match route.who {
        Who::Caller(method) => {
            let visit = door.admit(method, parts)?;
            let peer = visit.peer.clone();
            Ok((api, Some(visit), peer))
        }
        Who::Anyone => {
            check_origin(parts)?;
            let peer = parts.extensions.get::<Peer>().cloned();
            Ok((api, None, peer.ok_or_else(not_logged_in)?))
        }
    }
}

/// Takes in what somebody sends who is not let in, as far as a request may go, and keeps none of it: some
/// clients (curl 7.88, for one) take the answer to what they are still sending for a broken stream.
async fn discard(body: Body, door: &Door) {
    let mut pieces = body.into_data_stream();
    let taking = async {
        let mut left = door.request_bytes;
        while let Some(Ok(piece)) = pieces.next().await {
            let Some(rest) = left.checked_sub(piece.len()) else { return };
            left = rest;
        }
    };
    // Whoever takes longer hears it all the same.
    tokio::time::timeout(door.request_time, taking).await.ok();
}

/// Uses a session for as long as somebody listens by it: this is waited for only while the answer is taken.
/// Ends if there is none any more.
async fn in_use(sessions: &Sessions, shown: Option<&Shown>, every: Duration) {
    let Some(shown) = shown else { return std::future::pending().await };
    while sessions.find(&shown.secret, Instant::now()).is_some() {
        tokio::time::sleep(every).await;
    }
}

/// Waits until a request may go on no longer.
async fn over(visit: Option<&Visit>) -> Problem {
    match visit {
        Some(visit) => visit.over().await,
        None => std::future::pending().await,
    }
}

async fn read(parts: &Parts, body: Body, limit: usize) -> Result<Bytes, Problem> {
    let too_large = || {
        let text = format!("a request has {limit} bytes at most");
        Problem::new(StatusCode::PAYLOAD_TOO_LARGE, "too_large", text)
    };
    let length = parts.headers.get(CONTENT_LENGTH).and_then(|length| length.to_str().ok());
    if length.and_then(|length| length.parse().ok()).is_some_and(|length: usize| length > limit) {
        return Err(too_large());
    }
    let mut pieces = body.into_data_stream();
    let mut whole = BytesMut::new();
    while let Some(piece) = pieces.next().await {
        let piece = piece.map_err(|_| {
            let text = "the body did not arrive whole";
            Problem::new(StatusCode::BAD_REQUEST, "body_incomplete", text)
        })?;
        if piece.len() > limit - whole.len() {
            return Err(too_large());
        }
        whole.extend_from_slice(&piece);
    }
    Ok(whole.freeze())
}

/// What a page of another site can send without asking is no JSON.
fn check_json(parts: &Parts) -> Result<(), Problem> {
    let kind = parts.headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok());
    let kind = kind.and_then(|kind| kind.split(';').next()).map(str::trim);
    if kind != Some("application/json") {
        let status = StatusCode::UNSUPPORTED_MEDIA_TYPE;
        return Err(Problem::new(status, "not_json", "the body has to be application/json"));
    }
    Ok(())
}

fn metrics(door: &Door, request: Request) -> Result<Response<Body>, Problem> {
    let api = door.api.get().ok_or_else(starting)?;
    let (parts, _) = request.into_parts();
    let connection = parts.extensions.get::<Peer>().ok_or_else(not_logged_in)?;
    if !metrics::may_see(door.metrics_token.as_ref(), connection, &parts.headers) {
        let visit = door.admit("/cortex.v1.Operator/HubStatus", &parts)?;
        if !visit.entry.operator.scope.is_everything() {
            let text = "these numbers are of the whole mesh, and this operator sees a part of it";
            return Err(Problem::new(StatusCode::FORBIDDEN, "scope_too_narrow", text));
        }
    }
    metrics::response(api, door.readiness.phase())
}

fn starting() -> Problem {
    Problem::new(StatusCode::SERVICE_UNAVAILABLE, "starting", "the hub is starting").retry_after(1)
}

/// What every answer has, whoever made it.
async fn finish(mut response: Response<Body>) -> Response<Body> {
    let class = usize::from(response.status().as_u16() / 100).saturating_sub(1);
    if let Some(counter) = counters::HTTP_ANSWERS.get(class) {
        counter.add(1);
    }
    let headers = response.headers_mut();
    for (name, value) in [
        (X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (X_FRAME_OPTIONS, "DENY"),
        (REFERRER_POLICY, "no-referrer"),
        (CONTENT_SECURITY_POLICY, "default-src 'none'; frame-ancestors 'none'"),
    ] {
        // A page says more precisely what it needs.
        headers.entry(name).or_insert(HeaderValue::from_static(value));
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::authority::sessions::{IDLE, SessionHolder};

    fn open(sessions: &Sessions) -> Shown {
        let opened = sessions.open(SessionHolder::Local { uid: 0 }, Instant::now()).unwrap();
        let secret = opened.expose().to_owned();
        let session = sessions.find(&secret, Instant::now()).unwrap();
        Shown { secret, session }
    }

    #[tokio::test]
    async fn a_body_is_whole_or_too_large_or_did_not_arrive() {
        let parts = http::Request::new(()).into_parts().0;
        let body = |pieces: Vec<Result<&'static str, std::io::Error>>| {
            Body::from_stream(futures_util::stream::iter(pieces))
        };
        let read = |pieces| read(&parts, body(pieces), 4);
        assert_eq!(read(vec![Ok("ab"), Ok("cd")]).await.ok().unwrap(), "abcd");
        let code = |result: Result<Bytes, Problem>| result.err().unwrap().code().to_owned();
        assert_eq!(code(read(vec![Ok("abc"), Ok("de")]).await), "too_large");
        let broken = std::io::Error::other("the connection ended");
        assert_eq!(code(read(vec![Ok("ab"), Err(broken)]).await), "body_incomplete");
    }

    #[tokio::test]
    async fn a_session_is_in_use_while_somebody_listens_by_it_and_no_longer() {
        let (sessions, step) = (Sessions::new(24 * IDLE), Duration::from_millis(2));
        let (heard, unheard) = (open(&sessions), open(&sessions));
        let opened = Instant::now();
        let listening = in_use(&sessions, Some(&heard), step);
        assert!(tokio::time::timeout(50 * step, listening).await.is_err(), "it goes on");
        let stopped = Instant::now();
        // When the one that nobody used is over, the other is not; it is an hour after the listening.
        let later = opened + IDLE;
        assert!(sessions.find(&unheard.secret, later).is_none());
        assert_eq!(sessions.count(later), 1);
        assert_eq!(sessions.count(stopped + IDLE), 0);
    }

    #[tokio::test]
    async fn however_long_somebody_listens_a_session_has_an_end() {
        let life = Duration::from_millis(50);
        let sessions = Sessions::new(life);
        let (begun, heard) = (Instant::now(), open(&sessions));
        in_use(&sessions, Some(&heard), Duration::from_millis(5)).await;
        assert!(begun.elapsed() >= life);
        heard.session.ended().await;
    }
}
