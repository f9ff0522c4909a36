//! The API: one table, from which the router and the OpenAPI document are made.
//!
//! Each line says which call of the Operator service it is. Whoever may make that call over gRPC may make
//! it here, and the same code carries it out. The types of a line's query, body and answer are those that
//! are read and written, so that the document cannot say anything else.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::Arc;

use axum::body::Body;
use bytes::Bytes;
use http::header::{CACHE_CONTROL, CONTENT_TYPE, ETAG, SET_COOKIE};
use http::{HeaderMap, HeaderValue, Response, StatusCode};
use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use sha2::Digest as _;

use super::api::{Api, events, history, hub, nodes, session, tasks, view, workspaces};
use super::credentials::Shown;
use super::error::{Problem, internal};
use super::{page, sse};
use crate::grpc::auth::{AdmittedOperator, Peer};

/// How a route is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verb {
    Get,
    Post,
    Put,
    Delete,
}

impl Verb {
    /// As OpenAPI writes it.
    pub(super) fn word(self) -> &'static str {
        match self {
            Self::Get => "get",
            Self::Post => "post",
            Self::Put => "put",
            Self::Delete => "delete",
        }
    }
}

/// Who is let in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Who {
    /// Anyone.
    Anyone,
    /// Whoever may make this call of the Operator service.
    Caller(&'static str),
}

type Handled = Pin<Box<dyn Future<Output = Result<Answered, Problem>> + Send>>;

/// What was made of a request.
pub(super) enum Answered {
    /// The answer.
    Whole(Response<Body>),
    /// One that goes on as long as the caller may make the call.
    Open(sse::Open),
}

/// What a route answers.
#[derive(Clone, Copy)]
pub(super) enum Shape {
    /// JSON of this type.
    One(fn(&mut SchemaGenerator) -> Schema),
    /// A stream of events, each with JSON of this type.
    Each(fn(&mut SchemaGenerator) -> Schema),
}

/// A line of the table.
pub(super) struct Route {
    pub(super) verb: Verb,
    pub(super) path: &'static str,
    pub(super) who: Who,
    pub(super) summary: &'static str,
    pub(super) query: fn(&mut SchemaGenerator) -> Schema,
    /// Absent where nothing is sent.
    pub(super) body: Option<fn(&mut SchemaGenerator) -> Schema>,
    pub(super) answer: Shape,
    pub(super) handle: fn(Arc<Api>, Call) -> Handled,
}

/// A request that was let in.
pub(crate) struct Call {
    /// Who asks; nobody where anyone may.
    pub(super) caller: Option<AdmittedOperator>,
    /// The connection, or the session on it.
    pub(super) peer: Peer,
    /// The session, where one was shown.
    pub(super) session: Option<Shown>,
    /// The parts of the path that have names.
    pub(super) path: BTreeMap<String, String>,
    /// What stands behind the question mark.
    pub(super) query: String,
    /// The request's headers.
    pub(super) headers: HeaderMap,
    /// What was sent.
    pub(super) body: Bytes,
}

impl Call {
    /// Who asks.
    pub(super) fn caller(&self) -> Result<&AdmittedOperator, Problem> {
        self.caller.as_ref().ok_or_else(not_logged_in)
    }

    /// A part of the path.
    pub(super) fn part(&self, name: &str) -> String {
        self.path.get(name).cloned().unwrap_or_default()
    }

    /// A message for the Operator service, with who asks.
    pub(super) fn request<T>(&self, message: T) -> Result<tonic::Request<T>, Problem> {
        let mut request = tonic::Request::new(message);
        request.extensions_mut().insert(self.caller()?.clone());
        Ok(request)
    }

    fn query<T: DeserializeOwned>(&self) -> Result<T, Problem> {
        let uri: http::Uri = format!("/?{}", self.query)
            .parse()
            .map_err(|_| Problem::invalid("the query cannot be read"))?;
        axum::extract::Query::<T>::try_from_uri(&uri)
            .map(|query| query.0)
            .map_err(|error| Problem::invalid(error.body_text()))
    }

    fn body<T: DeserializeOwned>(&self) -> Result<T, Problem> {
        serde_json::from_slice(&self.body)
            .map_err(|error| Problem::invalid(format!("the body cannot be used: {error}")))
    }
}

/// Nobody has logged in here.
pub(super) fn not_logged_in() -> Problem {
    Problem::new(StatusCode::UNAUTHORIZED, "not_logged_in", "log in first")
        .hint("get a link: cortex-agent login-link, or cortex-hubd login-link on the hub's machine")
}

/// An answer, and what goes along with it.
pub(super) struct Reply<T> {
    value: T,
    cookie: Option<String>,
}

impl<T> From<T> for Reply<T> {
    fn from(value: T) -> Self {
        Self { value, cookie: None }
    }
}

impl<T> Reply<T> {
    /// Sets this cookie.
    pub(super) fn with_cookie(self, cookie: String) -> Self {
        Self { cookie: Some(cookie), ..self }
    }
}

impl<T: Serialize> Reply<T> {
    /// What was only looked at has a tag, by which whoever asks again is told that nothing has changed.
    fn into_answer(self, verb: Verb, call: &Call) -> Result<Answered, Problem> {
        let body = serde_json::to_vec(&self.value).map_err(|error| internal(&error))?;
        let tag = (verb == Verb::Get).then(|| page::tag_of(&sha2::Sha256::digest(&body)));
        let known = tag.as_ref().is_some_and(|tag| page::has(&call.headers, tag));
        let mut response = Response::new(if known { Body::empty() } else { Body::from(body) });
        if known {
            *response.status_mut() = StatusCode::NOT_MODIFIED;
        }
        let headers = response.headers_mut();
        if let Some(tag) = tag {
            headers.insert(ETAG, tag);
        }
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
        if let Some(cookie) = self.cookie {
            let mut cookie = HeaderValue::from_str(&cookie).map_err(|error| internal(&error))?;
            cookie.set_sensitive(true);
            headers.insert(SET_COOKIE, cookie);
        }
        Ok(Answered::Whole(response))
    }
}

/// No query.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct NoQuery {}

fn schema_of<T: JsonSchema>(generator: &mut SchemaGenerator) -> Schema {
    generator.subschema_for::<T>()
}

/// Inline: the fields of a query become parameters.
fn fields_of<T: JsonSchema>(generator: &mut SchemaGenerator) -> Schema {
    T::json_schema(generator)
}

macro_rules! routes {
    (@who Anyone) => { Who::Anyone };
    (@who $call:ident) => { Who::Caller(concat!("/cortex.v1.Operator/", stringify!($call))) };
    (@body) => { None };
    (@body $body:ty) => { Some(schema_of::<$body> as fn(&mut SchemaGenerator) -> Schema) };
    (@shape each $item:ty) => { Shape::Each(schema_of::<$item>) };
    (@shape $answer:ty) => { Shape::One(schema_of::<$answer>) };
    (@answer $verb:expr, $call:expr, $made:expr, each $item:ty) => {
        Ok(Answered::Open(sse::Open::of::<$item>($made)))
    };
    (@answer $verb:expr, $call:expr, $made:expr, $answer:ty) => {
        Reply::<$answer>::from($made).into_answer($verb, $call)
    };
    ($($verb:ident $path:literal $who:ident, $summary:literal:
        $handler:path, ($query:ty) $(< $body:ty)? => $(@$each:ident)? $answer:ty;)+) => {
        /// Every route of the API.
        pub(super) static ROUTES: &[Route] = &[$(Route {
            verb: Verb::$verb,
            path: $path,
            who: routes!(@who $who),
            summary: $summary,
            query: fields_of::<$query>,
            body: routes!(@body $($body)?),
            answer: routes!(@shape $($each)? $answer),
            handle: |api, call| Box::pin(async move {
                let query: $query = call.query()?;
                let made = $handler(&api, &call, query $(, call.body::<$body>()?)?).await?;
                routes!(@answer Verb::$verb, &call, made, $($each)? $answer)
            }),
        }),+];
    };
}

routes! {
    Post "/api/v1/session" Anyone, "Log in with a code from a login link":
        session::open, (NoQuery) < view::Login => view::Session;
    Get "/api/v1/session" HubStatus, "Who is logged in":
        session::show, (NoQuery) => view::Session;
    Delete "/api/v1/session" HubStatus, "Log out":
        session::close, (NoQuery) => view::Done;
    Get "/api/v1/hub" HubStatus, "The hub and what it does":
        hub::show, (NoQuery) => view::Hub;
    Get "/api/v1/events" WatchEvents, "What happens, as it happens":
        events::watch, (events::Wanted) => @each view::News;
    Get "/api/v1/nodes" ListNodes, "Nodes by name":
        nodes::list, (nodes::Filter) => view::Nodes;
    Get "/api/v1/nodes/{node}" ListNodes, "One node, by its name or the beginning of its id":
        nodes::show, (NoQuery) => view::Node;
    Put "/api/v1/nodes/{node}/policy" SetNodePolicy, "Let a node's commands do more, for a reason and a time":
        nodes::set_policy, (NoQuery) < view::Policy => view::Node;
    Delete "/api/v1/nodes/{node}/policy" SetNodePolicy, "Make a node's policy strict again":
        nodes::clear_policy, (NoQuery) => view::Node;
    Get "/api/v1/nodes/{node}/history" ReadHistory, "The latest output of a node's commands":
        history::read, (history::Range) => view::History;
    Get "/api/v1/tasks" ListTasks, "Tasks, newest first":
        tasks::list, (tasks::Filter) => view::Tasks;
    Post "/api/v1/tasks" Exec, "Run a command, which goes on by itself":
        tasks::start, (NoQuery) < view::Command => view::Accepted;
    Get "/api/v1/tasks/{task}" GetTask, "One task, by its id or the last 8 or more digits of it":
        tasks::show, (NoQuery) => view::Task;
    Get "/api/v1/tasks/{task}/output" ReadTask, "The output that is kept of a task":
        tasks::output, (tasks::Range) => view::TaskOutput;
    Get "/api/v1/tasks/{task}/output/stream" ReadTask, "The output of a task as it comes, and how it ends":
        tasks::follow, (tasks::Range) => @each view::TaskNews;
    Post "/api/v1/tasks/{task}/cancel" CancelTask, "End a command":
        tasks::cancel, (NoQuery) < view::Cancel => view::Task;
    Get "/api/v1/workspaces" ListWorkspaces, "Workspaces by name, with their members":
        workspaces::list, (workspaces::Cut) => view::Workspaces;
    Get "/api/v1/workspaces/{workspace}" ShowWorkspace, "One workspace":
        workspaces::show, (NoQuery) => view::WorkspaceDetails;
    Get "/api/v1/workspaces/{workspace}/conflicts" ListConflicts, "Conflicts that nobody has settled":
        workspaces::conflicts, (NoQuery) => view::Conflicts;
    Get "/api/v1/workspaces/{workspace}/log" WorkspaceLog, "What changed in a workspace, newest first":
        workspaces::log, (workspaces::Past) => view::Changes;
}
