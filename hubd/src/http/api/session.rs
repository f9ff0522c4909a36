//! Logging in and out.

use std::time::Duration;

use cortex_shared::clock::unix_ms;
use http::StatusCode;
use serde_json::json;
use tokio::time::Instant;

use super::{Api, view};
use crate::grpc::auth::{AdmittedOperator, Peer};
use crate::grpc::status::from_store;
use crate::http::credentials::{clear_cookie, session_cookie};
use crate::http::error::Problem;
use crate::http::routes::{Call, NoQuery, Reply};

/// The call that decides whether somebody may have a session at all: any operator may make it.
const LOOK: &str = "/cortex.v1.Operator/HubStatus";

pub(in crate::http) async fn open(
    api: &Api,
    call: &Call,
    _: NoQuery,
    login: view::Login,
) -> Result<Reply<view::Session>, Problem> {
    let refused = || {
        let text = "this code is not good, or not any more";
        Problem::new(StatusCode::FORBIDDEN, "invalid_code", text)
            .hint("each is good once, for five minutes; get another: cortex-agent login-link")
    };
    let holder = api.sessions.take_code(&login.code, Instant::now()).ok_or_else(refused)?;
    let Some(address) = call.peer.address() else { return Err(refused()) };
    // It may have been revoked since it was given the code.
    let peer = Peer::Session { address, holder: holder.clone() };
    let operator = api.auth.admit_operator(LOOK, peer)?.operator;
    let now = unix_ms();
    let detail = json!({ "address": address.ip().to_string(), "bearer": login.bearer });
    let line = operator.actor().audit(now, "session.opened", &operator.name, detail);
    api.service.store.record_audit(line).await.map_err(from_store)?;
    let secret = api.sessions.open(holder, Instant::now()).map_err(|error| {
        Problem::new(StatusCode::TOO_MANY_REQUESTS, "too_many_logins", error.to_string())
    })?;
    tracing::info!(operator = %operator.name, %address, "session opened");
    let left = api.sessions.life();
    let mut session = describe(api, &operator, Some(left));
    if login.bearer {
        session.token = Some(secret.expose().to_owned());
        return Ok(session.into());
    }
    Ok(Reply::from(session).with_cookie(session_cookie(&secret, left)))
}

pub(in crate::http) async fn show(
    api: &Api,
    call: &Call,
    _: NoQuery,
) -> Result<view::Session, Problem> {
    let end = call.session.as_ref().map(|shown| shown.session.until);
    let left = end.map(|end| end.saturating_duration_since(Instant::now()));
    Ok(describe(api, call.caller()?, left))
}

pub(in crate::http) async fn close(
    api: &Api,
    call: &Call,
    _: NoQuery,
) -> Result<Reply<view::Done>, Problem> {
    if let Some(shown) = &call.session {
        let caller = call.caller()?;
        let line = caller.actor().audit(unix_ms(), "session.closed", &caller.name, json!({}));
        api.service.store.record_audit(line).await.map_err(from_store)?;
        // Nothing is waited for after this: this request ends with its session.
        api.sessions.close(&shown.secret);
    }
    Ok(Reply::from(view::Done { done: true }).with_cookie(clear_cookie()))
}

fn describe(api: &Api, operator: &AdmittedOperator, session: Option<Duration>) -> view::Session {
    let end = |left: Duration| {
        let end = unix_ms().saturating_add(i64::try_from(left.as_millis()).unwrap_or(i64::MAX));
        operator.certificate_not_after_ms.map_or(end, |login| login.min(end))
    };
    view::Session {
        name: operator.name.clone(),
        role: operator.role.to_string(),
        scope: operator.scope.0.clone().into_iter().collect(),
        mesh_id: api.service.authorities.mesh().to_string(),
        expires_at_ms: session.map(end).or(operator.certificate_not_after_ms),
        token: None,
    }
}
