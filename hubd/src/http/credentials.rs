//! By what a request proves who sends it: a session's cookie, a session's secret as a bearer token, or the
//! client certificate of the connection.

use std::time::Duration;

use http::header::{AUTHORIZATION, COOKIE, HOST, ORIGIN};
use http::request::Parts;
use http::{HeaderMap, Method, StatusCode};
use tokio::time::Instant;

use super::error::Problem;
use super::routes::not_logged_in;
use crate::authority::sessions::{FoundSession, SessionSecret, Sessions};
use crate::grpc::auth::Peer;

/// The prefix makes browsers take it only over TLS, for this host alone and for all paths.
const COOKIE_NAME: &str = "__Host-cortex";

/// What came with a request.
#[derive(Debug, PartialEq, Eq)]
enum Credential {
    Nothing,
    Bearer(String),
    Cookie(String),
}

/// The cookie of a session that has just begun. No script sees it, and no other site's page sends it.
pub(super) fn session_cookie(secret: &SessionSecret, life: Duration) -> String {
    let (secret, seconds) = (secret.expose(), life.as_secs());
    format!("{COOKIE_NAME}={secret}; Path=/; Max-Age={seconds}; HttpOnly; Secure; SameSite=Strict")
}

/// Takes the cookie away.
pub(super) fn clear_cookie() -> String {
    format!("{COOKIE_NAME}=; Path=/; Max-Age=0; HttpOnly; Secure; SameSite=Strict")
}

fn credential(headers: &HeaderMap) -> Credential {
    if let Some(value) = headers.get(AUTHORIZATION).and_then(|value| value.to_str().ok())
        && let Some((scheme, token)) = value.split_once(' ')
        && scheme.eq_ignore_ascii_case("bearer")
    {
        return Credential::Bearer(token.trim().to_owned());
    }
    let cookies = headers.get_all(COOKIE).iter().filter_map(|value| value.to_str().ok());
    let mut pairs =
        cookies.flat_map(|line| line.split(';')).filter_map(|pair| pair.split_once('='));
    let found = pairs.find(|(name, _)| name.trim() == COOKIE_NAME);
    found.map_or(Credential::Nothing, |(_, value)| Credential::Cookie(value.trim().to_owned()))
}

/// A bearer token that is no session's.
pub(super) fn bearer(headers: &HeaderMap) -> Option<String> {
    match credential(headers) {
        Credential::Bearer(token) => Some(token),
        Credential::Cookie(_) | Credential::Nothing => None,
    }
}

/// A session that a request showed.
#[derive(Clone)]
pub(crate) struct Shown {
    /// Its secret.
    pub(super) secret: String,
    /// What it is.
    pub(super) session: FoundSession,
}

/// Who sends a request, and the session if it is by one.
///
/// # Errors
/// If a session was shown that is not open (any more): never less than what was shown is taken.
pub(super) fn peer_of(
    parts: &Parts,
    connection: &Peer,
    sessions: &Sessions,
) -> Result<(Peer, Option<Shown>), Problem> {
    let secret = match credential(&parts.headers) {
        Credential::Nothing => return Ok((connection.clone(), None)),
        Credential::Bearer(secret) | Credential::Cookie(secret) => secret,
    };
    let session = sessions.find(&secret, Instant::now()).ok_or_else(not_logged_in)?;
    let address = connection.address().ok_or_else(not_logged_in)?;
    let peer = Peer::Session { address, holder: session.holder.clone() };
    Ok((peer, Some(Shown { secret, session })))
}

/// Refuses what another site's page makes a browser send. Browsers say where a request that changes
/// something comes from; programs, which have no cookies that others could use, need not.
pub(super) fn check_origin(parts: &Parts) -> Result<(), Problem> {
    if matches!(parts.method, Method::GET | Method::HEAD | Method::OPTIONS) {
        return Ok(());
    }
    let refused = |detail: &str| Problem::new(StatusCode::FORBIDDEN, "foreign_origin", detail);
    let mut origins = parts.headers.get_all(ORIGIN).iter();
    match (origins.next(), origins.next()) {
        (None, _) if matches!(credential(&parts.headers), Credential::Cookie(_)) => {
            Err(refused("a request with a cookie that changes something needs an Origin"))
        }
        (None, _) => Ok(()),
        (Some(origin), None) if origin.to_str().is_ok_and(|origin| is_own(parts, origin)) => Ok(()),
        _ => Err(refused("this request comes from another site's page")),
    }
}

/// Whether an origin is the place that the request was sent to.
fn is_own(parts: &Parts, origin: &str) -> bool {
    let host = parts.headers.get(HOST).and_then(|host| host.to_str().ok());
    // HTTP/2 has it in the target.
    let host = parts.uri.authority().map(http::uri::Authority::as_str).or(host);
    let plain = |host: &str| host.strip_suffix(":443").unwrap_or(host).to_ascii_lowercase();
    let own = origin.strip_prefix("https://").map(plain);
    own.is_some_and(|own| host.is_some_and(|host| plain(host) == own))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts(method: &str, headers: &[(&str, &str)]) -> Parts {
        let mut request = http::Request::builder().method(method).uri("/api/v1/session");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        request.body(()).unwrap().into_parts().0
    }

    #[test]
    fn what_another_sites_page_sends_is_refused() {
        let cookie = ("cookie", "__Host-cortex=cxs_x");
        let host = ("host", "hub.example.org:7480");
        let own = ("origin", "https://hub.example.org:7480");
        for (method, headers, allowed) in [
            ("GET", vec![host, cookie, ("origin", "https://evil.example")], true),
            ("POST", vec![host, cookie, own], true),
            ("POST", vec![host, cookie], false),
            ("POST", vec![host, cookie, ("origin", "null")], false),
            ("POST", vec![host, cookie, ("origin", "https://evil.example")], false),
            ("POST", vec![host, cookie, ("origin", "https://hub.example.org")], false),
            ("POST", vec![host, cookie, ("origin", "http://hub.example.org:7480")], false),
            ("POST", vec![host, cookie, own, ("origin", "https://evil.example")], false),
            ("DELETE", vec![host, cookie, ("origin", "https://hub.example.org.evil")], false),
            ("PUT", vec![host, ("authorization", "Bearer x")], true),
            (
                "PUT",
                vec![host, ("authorization", "Bearer x"), ("origin", "https://evil.example")],
                false,
            ),
            ("POST", vec![host], true),
            ("POST", vec![host, ("origin", "https://evil.example")], false),
            (
                "POST",
                vec![("host", "hub.example.org"), ("origin", "https://hub.example.org:443")],
                true,
            ),
        ] {
            assert_eq!(
                check_origin(&parts(method, &headers)).is_ok(),
                allowed,
                "{method} {headers:?}"
            );
        }
    }

    #[test]
    fn credentials_are_found_among_others() {
        let found = |headers: &[(&str, &str)]| credential(&parts("GET", headers).headers);
        assert_eq!(found(&[]), Credential::Nothing);
        let cookie = Credential::Cookie("cxs_1".into());
        assert_eq!(found(&[("cookie", "a=b; __Host-cortex=cxs_1; c=d")]), cookie);
        assert_eq!(found(&[("cookie", "a=b"), ("cookie", "__Host-cortex=cxs_1")]), cookie);
        assert_eq!(found(&[("cookie", "x__Host-cortex=cxs_1")]), Credential::Nothing);
        assert_eq!(found(&[("authorization", "bearer  t")]), Credential::Bearer("t".into()));
        assert_eq!(found(&[("authorization", "Basic x")]), Credential::Nothing);
    }
}
