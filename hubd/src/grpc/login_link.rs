//! The call that leads an operator to the HTTP side.

use cortex_proto::v1;
use cortex_shared::clock::unix_ms;
use serde_json::json;
use tokio::time::Instant;
use tonic::{Code, Status};

use super::auth::AdmittedOperator;
use super::operator::OperatorService;
use super::status::{from_store, refuse, too_often, with_hint};
use crate::authority::sessions::{CODE_LIFE, OfferRefusal, SessionHolder};

/// The pin of the HTTP side's key, or nothing.
pub(super) fn pin(service: &OperatorService) -> String {
    let pin = service.http.as_ref().and_then(|http| http.pin());
    pin.map(|pin| pin.to_string()).unwrap_or_default()
}

pub(super) async fn create(
    service: &OperatorService,
    caller: &AdmittedOperator,
    holder: Option<SessionHolder>,
) -> Result<v1::CreateLoginLinkResponse, Status> {
    let Some(http) = &service.http else {
        let status = refuse(Code::FailedPrecondition, "http_off", "the hub has no HTTP side");
        return Err(with_hint(status, "start it with one: cortex-hubd serve --http ADDR:PORT"));
    };
    let Some(holder) = holder else {
        let text = "a session cannot make another; log in by a certificate";
        return Err(refuse(Code::PermissionDenied, "wrong_kind_of_caller", text));
    };
    let now = unix_ms();
    // First the code: what is refused must not fill the audit log.
    let code = service.sessions.offer(holder, Instant::now()).map_err(|refusal| match refusal {
        OfferRefusal::TooOften { wait } => too_often(wait),
        OfferRefusal::TooMany(error) => {
            refuse(Code::ResourceExhausted, "too_many_logins", error.to_string())
        }
    })?;
    let line = caller.actor().audit(now, "session.offered", &caller.name, json!({}));
    if let Err(error) = service.store.record_audit(line).await {
        // Nobody has seen it, and nothing was written down of it.
        drop(service.sessions.take_code(code.expose(), Instant::now()));
        return Err(from_store(error));
    }
    Ok(v1::CreateLoginLinkResponse {
        url: format!("{}/login#{}", http.url(), code.expose()),
        code: code.expose().to_owned(),
        expires_at_ms: now + i64::try_from(CODE_LIFE.as_millis()).unwrap_or(i64::MAX),
        http_pin: pin(service),
    })
}
