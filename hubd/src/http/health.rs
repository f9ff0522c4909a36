//! Whether the hub lives, and whether it is to be given work.

use std::sync::atomic::{AtomicU8, Ordering};

use axum::body::Body;
use axum::response::IntoResponse as _;
use http::header::{CACHE_CONTROL, CONTENT_TYPE};
use http::{HeaderValue, Response, StatusCode};

use super::error::Problem;

/// Where the hub is between its beginning and its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// It reads what it remembers.
    Starting,
    /// It serves.
    Ready,
    /// It finishes what is under way, and takes nothing new.
    Draining,
}

/// The phase, for whoever asks; it only goes forward.
#[derive(Debug, Default)]
pub struct Readiness(AtomicU8);

impl Readiness {
    /// The hub serves now.
    pub fn ready(&self) {
        self.0.fetch_max(1, Ordering::AcqRel);
    }

    /// The hub ends.
    pub fn drain(&self) {
        self.0.fetch_max(2, Ordering::AcqRel);
    }

    /// Where it is.
    #[must_use]
    pub fn phase(&self) -> Phase {
        match self.0.load(Ordering::Acquire) {
            0 => Phase::Starting,
            1 => Phase::Ready,
            _ => Phase::Draining,
        }
    }

    /// Why it takes no work now, if it takes none.
    pub(super) fn refusal(&self) -> Option<Problem> {
        let (code, detail, seconds) = match self.phase() {
            Phase::Ready => return None,
            Phase::Starting => ("starting", "the hub is starting", 1),
            Phase::Draining => ("shutting_down", "the hub is shutting down", 5),
        };
        let problem = Problem::new(StatusCode::SERVICE_UNAVAILABLE, code, detail);
        Some(problem.retry_after(seconds))
    }
}

/// It answers, so it lives.
pub(super) fn healthz() -> Response<Body> {
    plain("ok\n")
}

/// Whether it is to be given work.
pub(super) fn readyz(refusal: Option<Problem>) -> Response<Body> {
    refusal.map_or_else(|| plain("ready\n"), Problem::into_response)
}

fn plain(text: &'static str) -> Response<Body> {
    let mut response = Response::new(Body::from(text));
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hub_is_ready_between_its_beginning_and_its_end_only() {
        let readiness = Readiness::default();
        assert_eq!(readyz(readiness.refusal()).status(), 503);
        readiness.ready();
        assert_eq!(readyz(readiness.refusal()).status(), 200);
        readiness.drain();
        readiness.ready();
        assert_eq!(readiness.phase(), Phase::Draining);
        assert_eq!(readyz(readiness.refusal()).status(), 503);
        assert_eq!(healthz().status(), 200, "it lives to its end");
    }
}
