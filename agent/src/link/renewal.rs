//! Keeping the certificate fresh: renewal over the live session at half of its life, recovery by
//! the key alone once it has expired.
//!
//! A renewal that is interrupted anywhere is simply asked for again: the hub accepts the generation
//! before the newest from the machine it issued the newest to. `keep_fresh` lives as long as its
//! session; what it stores is the identity's.

use std::time::Duration;

use cortex_proto::v1::enroll_client::EnrollClient;
use cortex_proto::v1::node_client::NodeClient;
use cortex_proto::{CODE_TRAILER, HINT_TRAILER, v1};
use cortex_shared::backoff::Backoff;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;
use tonic::{Code, Request, Status};

use super::end::{is_clone_refusal, retry_after, text_of};
use crate::client::{ConnectError, HubClient, Purpose, connect_error_in};
use crate::identity::MachineFacts;
use crate::identity::live::{IdentityError, LiveIdentity};

/// How long the hub may take to issue a certificate.
const ISSUE_TIMEOUT: Duration = Duration::from_secs(60);
/// Longest sleep before the clocks are looked at again: a machine that was suspended finds out.
const LOOK_AGAIN: Duration = Duration::from_secs(60);
/// How long to leave a hub alone that will not issue a certificate for now.
const PATIENCE: Duration = Duration::from_secs(60 * 60);

/// How a machine gets an identity of its own. It is refused while an agent runs with the old one, and an agent
/// that is a service comes back by itself unless it is stopped as one.
pub(crate) const FORK: &str = "with a new invite: stop the agent (systemctl [--user] stop cortex-agent; where it is no service, end the process that `cortex-agent status` names), cortex-agent identity fork --token-file FILE, then start it again";

/// Why there is no new certificate.
#[derive(Debug, thiserror::Error)]
pub enum RenewError {
    /// The hub takes this machine for a copy of another one.
    #[error("{reason}")]
    Cloned {
        /// What the hub says, which machine this is, and what helps.
        reason: String,
    },
    /// The hub refuses, and will go on refusing.
    #[error("{reason}{}", hint.as_ref().map(|hint| format!(" ({hint})")).unwrap_or_default())]
    Refused {
        /// What it says.
        reason: String,
        /// What it says helps.
        hint: Option<String>,
    },
    /// The hub asks for patience.
    #[error("{reason}")]
    Busy {
        /// What it says.
        reason: String,
        /// How long.
        after: Duration,
    },
    /// The hub cannot be reached or is not believed.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// What it issued cannot be used or stored.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// Something that may pass by itself.
    #[error("{reason}")]
    Failed {
        /// What.
        reason: String,
    },
}

impl From<Status> for RenewError {
    fn from(status: Status) -> Self {
        if let Some(error) = connect_error_in(&status) {
            return Self::Connect(error);
        }
        let reason = text_of(&status);
        if is_clone_refusal(&status) {
            return Self::Cloned { reason: format!("{reason}; {}", this_machine()) };
        }
        let trailer =
            |name| status.metadata().get(name).and_then(|v| v.to_str().ok()).map(str::to_owned);
        match status.code() {
            Code::ResourceExhausted => Self::Busy { reason, after: retry_after(&status) },
            Code::PermissionDenied
            | Code::FailedPrecondition
            | Code::Unauthenticated
            | Code::NotFound
            | Code::InvalidArgument
            | Code::Unimplemented => {
                let hint = match trailer(CODE_TRAILER).as_deref() {
                    Some("recovery_expired" | "node_revoked" | "node_unknown") => {
                        Some(FORK.to_owned())
                    }
                    _ => trailer(HINT_TRAILER),
                };
                Self::Refused { reason, hint }
            }
            _ => Self::Failed { reason },
        }
    }
}

/// Which machine this is, for somebody who has to find out which of two is the copy.
pub(super) fn this_machine() -> String {
    let MachineFacts { machine_id, boot_id, hostname } = MachineFacts::of_this_machine();
    format!(
        "this machine is {hostname} (machine id {machine_id}, boot id {boot_id}). If it is the copy, give it an identity of its own, {FORK}"
    )
}

/// Asks for a certificate over a session, and stores it.
///
/// # Errors
/// See [`RenewError`]. The certificate in use stays.
pub async fn renew(
    identity: &LiveIdentity,
    mut client: NodeClient<Channel>,
) -> Result<(), RenewError> {
    let _one = identity.begin_renewal().await;
    let mut request = Request::new(v1::RenewRequest {
        csr_der: identity.request_der()?.into(),
        generation: identity.snapshot().generation,
        machine: Some(MachineFacts::of_this_machine().into()),
    });
    request.set_timeout(ISSUE_TIMEOUT);
    let answer = in_time(client.renew(request)).await?;
    store(identity, answer.certificate_der, answer.generation, answer.trusted_cas_der, false).await
}

/// Asks for a certificate by the key alone, on a connection without a client certificate, and
/// stores it.
///
/// # Errors
/// See [`RenewError`]. The certificate in use stays.
pub async fn recover(identity: &LiveIdentity) -> Result<(), RenewError> {
    let _one = identity.begin_renewal().await;
    let known = identity.snapshot();
    let hub = HubClient::new(identity.client().address().clone(), known.trust(), None)?;
    let channel = hub.connect(Purpose::Control).await?;
    let mut request = Request::new(v1::RecoverNodeRequest {
        node_id: known.node_id.as_bytes().to_vec().into(),
        csr_der: identity.request_der()?.into(),
        generation: known.generation,
        machine: Some(MachineFacts::of_this_machine().into()),
    });
    request.set_timeout(ISSUE_TIMEOUT);
    let answer = in_time(EnrollClient::new(channel).recover_node(request)).await?;
    store(identity, answer.certificate_der, answer.generation, answer.trusted_cas_der, true).await
}

/// The hub is told a deadline; here it is kept, even if the hub keeps silent.
async fn in_time<T>(
    call: impl Future<Output = Result<tonic::Response<T>, Status>>,
) -> Result<T, RenewError> {
    match tokio::time::timeout(ISSUE_TIMEOUT, call).await {
        Ok(answer) => Ok(answer?.into_inner()),
        Err(_) => Err(RenewError::Failed { reason: "the hub did not answer in time".to_owned() }),
    }
}

async fn store(
    identity: &LiveIdentity,
    certificate_der: bytes::Bytes,
    generation: u64,
    trusted_cas_der: Vec<bytes::Bytes>,
    recovered: bool,
) -> Result<(), RenewError> {
    let identity = identity.clone();
    let storing = tokio::task::spawn_blocking(move || {
        // A list of authorities that is refused is no reason to go without a certificate.
        if let Err(error) = identity.trust(trusted_cas_der.iter().map(AsRef::as_ref)) {
            tracing::error!(%error, "the hub's authorities stay as they were");
        }
        identity.accept(&certificate_der, generation, recovered)
    });
    match storing.await {
        Ok(stored) => Ok(stored?),
        Err(_) => Err(RenewError::Failed { reason: "storing was interrupted".to_owned() }),
    }
}

/// Writes a clone refusal down, by a thread that may wait for the disk.
pub(super) async fn note_clone(identity: &LiveIdentity, reason: String) {
    let identity = identity.clone();
    tokio::task::spawn_blocking(move || identity.note_clone(&reason)).await.ok();
}

/// The certificate that connected takes the old one's place before it can itself be replaced; the
/// session does not wait for the disk.
async fn learn(identity: &LiveIdentity, welcomed: Welcomed) {
    let identity = identity.clone();
    let learning = move || {
        if let Err(error) = identity.proven(welcomed.generation) {
            tracing::error!(%error, "the new certificate's slot cannot be changed");
        }
        if let Err(error) = identity.trust(welcomed.authorities.iter().map(AsRef::as_ref)) {
            tracing::error!(%error, "the hub's authorities stay as they were");
        }
    };
    tokio::task::spawn_blocking(learning).await.ok();
}

/// What a welcome says about the identity.
#[derive(Debug, Default)]
pub(super) struct Welcomed {
    /// The certificate that connected.
    pub(super) generation: u64,
    /// Whom to trust from now on.
    pub(super) authorities: Vec<bytes::Bytes>,
    /// Whether the hub wants this node's certificate renewed at once.
    pub(super) renew_now: bool,
}

/// Takes over what the welcome said, then renews whenever it is time, until the session ends.
pub(super) async fn keep_fresh(
    identity: LiveIdentity,
    client: NodeClient<Channel>,
    welcomed: Welcomed,
    session_ended: CancellationToken,
) {
    let mut now = welcomed.renew_now;
    learn(&identity, welcomed).await;
    let mut backoff = Backoff::new(Duration::from_secs(5), Duration::from_secs(600));
    let mut stored = identity.stored();
    loop {
        let left_ms = if now { 0 } else { identity.renew_at_ms() - identity.hub_now_ms() };
        if let Ok(left @ 1..) = u64::try_from(left_ms) {
            tokio::select! {
                () = session_ended.cancelled() => return,
                _ = stored.changed() => {}
                () = tokio::time::sleep(Duration::from_millis(left).min(LOOK_AGAIN)) => {}
            }
            continue;
        }
        let renewed = tokio::select! {
            () = session_ended.cancelled() => return,
            renewed = renew(&identity, client.clone()) => renewed,
        };
        let Err(error) = renewed else {
            now = false;
            backoff.reset();
            continue;
        };
        let delay = match &error {
            RenewError::Cloned { reason } => {
                tracing::error!(reason, "the certificate is not renewed: the hub sees a copy");
                note_clone(&identity, reason.clone()).await;
                PATIENCE
            }
            RenewError::Refused { .. } => PATIENCE,
            RenewError::Busy { after, .. } => *after + backoff.next_delay(),
            RenewError::Connect(_) | RenewError::Identity(_) | RenewError::Failed { .. } => {
                backoff.next_delay()
            }
        };
        let problem = format!("the certificate cannot be renewed: {}", super::end::chain(&error));
        if !matches!(error, RenewError::Cloned { .. }) && identity.set_problem(Some(problem)) {
            tracing::warn!(%error, "the certificate cannot be renewed");
        }
        tokio::select! {
            () = session_ended.cancelled() => return,
            () = tokio::time::sleep(delay) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_say_what_helps() {
        let refused = |code: &str| {
            let mut status = Status::permission_denied("no");
            status.metadata_mut().insert(CODE_TRAILER, code.parse().unwrap());
            RenewError::from(status)
        };
        for code in ["recovery_expired", "node_revoked", "node_unknown"] {
            let text = refused(code).to_string();
            let at =
                |part| text.find(part).unwrap_or_else(|| panic!("{code}: {part} is not in {text}"));
            // It is refused while the agent runs.
            assert!(at("stop cortex-agent") < at("cortex-agent identity fork"), "{text}");
        }
        assert_eq!(refused("other").to_string(), "no");
        assert!(matches!(refused("identity_cloned"), RenewError::Cloned { .. }));
        assert!(matches!(RenewError::from(Status::unavailable("gone")), RenewError::Failed { .. }));
    }
}
