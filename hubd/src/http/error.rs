//! Errors as problem documents (RFC 9457).
//!
//! An endpoint never answers 200 with an error inside. A document has the stable code that gRPC callers
//! and the command line see, too, and the command that helps. One for an error of the hub's own has an
//! `error_id` and no particulars; the log has both.

use axum::body::Body;
use axum::response::IntoResponse;
use cortex_proto::{CODE_TRAILER, ERROR_ID_TRAILER, HINT_TRAILER, retry_after};
use http::header::{CACHE_CONTROL, CONTENT_TYPE, RETRY_AFTER};
use http::{HeaderValue, Response, StatusCode};
use schemars::JsonSchema;
use serde::Serialize;
use tonic::{Code, Status};

/// Why a request was not carried out.
#[derive(Clone, Debug)]
pub(crate) struct Problem(Box<Document>);

/// Why a request was not carried out.
#[derive(Clone, Debug, Serialize, JsonSchema)]
#[schemars(rename = "Problem")]
pub(super) struct Document {
    /// `urn:cortex:problem:` and the code.
    r#type: String,
    /// The HTTP status in words.
    title: &'static str,
    /// The HTTP status.
    status: u16,
    /// What is wrong, for people.
    detail: String,
    /// A stable word for programs.
    code: String,
    /// The command, or the change to the request, that helps.
    #[serde(skip_serializing_if = "Option::is_none")]
    hint: Option<String>,
    /// Under which this stands in the hub's log; only where the hub itself failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    error_id: Option<String>,
    /// Seconds after which a repetition may succeed; also the header `Retry-After`.
    #[serde(skip_serializing_if = "Option::is_none")]
    retry_after_s: Option<u64>,
}

impl Problem {
    /// A problem with its stable word and a text for people.
    pub(crate) fn new(status: StatusCode, code: &str, detail: impl Into<String>) -> Self {
        Self(Box::new(Document {
            r#type: format!("urn:cortex:problem:{code}"),
            title: status.canonical_reason().unwrap_or("Error"),
            status: status.as_u16(),
            detail: detail.into(),
            code: code.to_owned(),
            hint: None,
            error_id: None,
            retry_after_s: None,
        }))
    }

    /// Adds what helps.
    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.0.hint = Some(hint.into());
        self
    }

    /// Adds after how many seconds a repetition may succeed.
    pub(crate) fn retry_after(mut self, seconds: u64) -> Self {
        self.0.retry_after_s = Some(seconds);
        self
    }

    /// Something in the request is not what the API allows.
    pub(crate) fn invalid(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_argument", detail)
    }

    /// The document, in one line.
    pub(super) fn document(&self) -> String {
        // It has strings and numbers alone, which can be written.
        serde_json::to_string(&self.0).unwrap_or_default()
    }

    /// Its stable word.
    #[cfg(test)]
    pub(crate) fn code(&self) -> &str {
        &self.0.code
    }
}

/// An error of the hub's own: the log has the particulars, and the caller their id.
pub(crate) fn internal(error: &(dyn std::error::Error + 'static)) -> Problem {
    crate::grpc::status::internal(error).into()
}

fn status_of(status: &Status, code: &str) -> StatusCode {
    match (status.code(), code) {
        (_, "disk_full" | "quota_exceeded") => StatusCode::INSUFFICIENT_STORAGE,
        (Code::InvalidArgument | Code::OutOfRange, _) => StatusCode::BAD_REQUEST,
        (Code::NotFound | Code::Unimplemented, _) => StatusCode::NOT_FOUND,
        (Code::AlreadyExists | Code::FailedPrecondition | Code::Aborted, _) => StatusCode::CONFLICT,
        (Code::PermissionDenied, _) => StatusCode::FORBIDDEN,
        (Code::Unauthenticated, _) => StatusCode::UNAUTHORIZED,
        (Code::ResourceExhausted, _) => StatusCode::TOO_MANY_REQUESTS,
        (Code::Unavailable | Code::Cancelled, _) => StatusCode::SERVICE_UNAVAILABLE,
        (Code::DeadlineExceeded, _) => StatusCode::GATEWAY_TIMEOUT,
        (Code::Ok | Code::Unknown | Code::Internal | Code::DataLoss, _) => {
            StatusCode::INTERNAL_SERVER_ERROR
        }
    }
}

impl From<Status> for Problem {
    fn from(status: Status) -> Self {
        let trailer = |name: &str| {
            let value = status.metadata().get(name)?.to_str().ok()?;
            Some(value.to_owned())
        };
        let code = trailer(CODE_TRAILER).unwrap_or_else(|| "internal".to_owned());
        let after = retry_after(status.metadata()).map(|after| after.as_secs() + 1);
        let mut problem = Self::new(status_of(&status, &code), &code, status.message());
        (problem.0.hint, problem.0.retry_after_s) = (trailer(HINT_TRAILER), after);
        problem.0.error_id = trailer(ERROR_ID_TRAILER);
        problem
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response<Body> {
        let mut response = Response::new(Body::from(self.document()));
        let Self(document) = self;
        *response.status_mut() =
            StatusCode::from_u16(document.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
        if let Some(seconds) = document.retry_after_s {
            headers.insert(RETRY_AFTER, seconds.into());
        }
        if document.status == StatusCode::UNAUTHORIZED.as_u16() {
            let scheme = HeaderValue::from_static("Bearer realm=\"cortex\"");
            headers.insert(http::header::WWW_AUTHENTICATE, scheme);
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::grpc::status::{internal as grpc_internal, invalid, offline, too_often};

    fn shown(problem: Problem) -> serde_json::Value {
        serde_json::to_value(&problem.0).unwrap()
    }

    #[test]
    fn a_refusal_keeps_its_word_its_text_and_what_helps() {
        let problem = shown(Problem::from(offline("south")));
        assert_eq!(problem["status"], 503);
        assert_eq!(problem["code"], "node_offline");
        assert_eq!(problem["type"], "urn:cortex:problem:node_offline");
        assert_eq!(problem["title"], "Service Unavailable");
        assert!(problem["hint"].as_str().unwrap().contains("node list"));
        assert!(problem.get("error_id").is_none());
        assert_eq!(shown(invalid("x").into())["status"], 400);
    }

    #[test]
    fn whoever_is_too_fast_hears_when_to_come_back() {
        let problem = Problem::from(too_often(std::time::Duration::from_millis(1500)));
        let response = problem.into_response();
        assert_eq!(response.status(), 429);
        assert_eq!(response.headers()[RETRY_AFTER], "2");
        assert_eq!(response.headers()[CONTENT_TYPE], "application/problem+json");
    }

    #[test]
    fn an_error_of_the_hub_has_an_id_and_no_particulars() {
        let error = std::io::Error::other("secret particulars");
        let problem = shown(grpc_internal(&error).into());
        assert_eq!(problem["status"], 500);
        assert_eq!(problem["error_id"].as_str().unwrap().len(), 8);
        assert!(!problem.to_string().contains("secret"));
    }
}
