//! Answers that go on: server-sent events, as browsers' `EventSource` and `curl -N` read them.
//!
//! A piece of news is an event without a name (`onmessage`) with one line of JSON, and its `id` is what
//! whoever comes back sends as `Last-Event-ID`. An `id` alone moves that on and tells nothing; it also
//! shows that the connection lives. Why a stream ends is told as the event `problem`, with the problem
//! document that the next request would get.

use std::convert::Infallible;
use std::fmt::Write as _;

use axum::body::{Body, Bytes};
use futures_util::stream::{self, BoxStream, StreamExt as _};
use http::header::{CACHE_CONTROL, CONTENT_TYPE, HeaderName};
use http::{HeaderValue, Response};
use serde::Serialize;

use super::error::{Problem, internal};

/// What the document calls such an answer.
pub(super) const MEDIA_TYPE: &str = "text/event-stream";

/// What a stream tells, until it ends or cannot go on.
pub(super) type Telling<T> = BoxStream<'static, Result<Told<T>, Problem>>;

/// A piece of a stream.
pub(super) struct Told<T> {
    /// Whoever comes back with this hears what comes after it. Without line ends.
    pub(super) id: String,
    /// Absent if there is nothing new up to here.
    pub(super) news: Option<T>,
}

/// An answer that is still to be sent, and ends at the latest when it is told to.
pub(super) struct Open(BoxStream<'static, Result<String, Problem>>);

impl Open {
    pub(super) fn of<T: Serialize + Send + 'static>(telling: Telling<T>) -> Self {
        Self(telling.map(|told| written(&told?)).boxed())
    }

    /// The answer, which ends when `over` does; with its problem.
    pub(super) fn until(
        self,
        over: impl Future<Output = Problem> + Send + 'static,
    ) -> Response<Body> {
        let state = Some((self.0, Box::pin(over)));
        let pieces = stream::unfold(state, |state| async move {
            let (mut telling, mut over) = state?;
            let told = tokio::select! {
                // First: whoever may hear nothing more is told nothing more.
                biased;
                problem = &mut over => Err(problem),
                told = telling.next() => told?,
            };
            Some(match told {
                Ok(text) => (text, Some((telling, over))),
                Err(problem) => (last(&problem), None),
            })
        });
        let pieces = pieces.map(|text| Ok::<_, Infallible>(Bytes::from(text)));
        let mut response = Response::new(Body::from_stream(pieces));
        for (name, value) in [
            (CONTENT_TYPE, MEDIA_TYPE),
            (CACHE_CONTROL, "no-store"),
            // A proxy that collects an answer before it passes it on would pass on nothing.
            (HeaderName::from_static("x-accel-buffering"), "no"),
        ] {
            response.headers_mut().insert(name, HeaderValue::from_static(value));
        }
        response
    }
}

fn last(problem: &Problem) -> String {
    format!("event: problem\ndata: {}\n\n", problem.document())
}

/// JSON has no line ends of its own, so that one line of data holds it.
fn written<T: Serialize>(told: &Told<T>) -> Result<String, Problem> {
    let mut text = format!("id: {}\n", told.id);
    if let Some(news) = &told.news {
        let news = serde_json::to_string(news).map_err(|error| internal(&error))?;
        // Writing to a string does not fail.
        writeln!(text, "data: {news}").ok();
    }
    text.push('\n');
    Ok(text)
}
