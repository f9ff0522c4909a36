//! The page that a login link leads to. The code stands behind the `#` of the link, which browsers do not
//! send: a script of the page posts it, so that nobody who merely looks at the link (a chat's preview)
//! uses it up.

use axum::body::Body;
use http::header::{CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE};
use http::{HeaderValue, Response};

const PAGE: &str = include_str!("login/login.html");
const SCRIPT: &str = include_str!("login/login.js");
const POLICY: &str = "default-src 'none'; script-src 'self'; connect-src 'self'; \
                      base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

pub(super) fn page() -> Response<Body> {
    file(PAGE, "text/html; charset=utf-8")
}

pub(super) fn script() -> Response<Body> {
    file(SCRIPT, "text/javascript; charset=utf-8")
}

fn file(text: &'static str, kind: &'static str) -> Response<Body> {
    let mut response = Response::new(Body::from(text));
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    headers.insert(CONTENT_SECURITY_POLICY, HeaderValue::from_static(POLICY));
    response
}
