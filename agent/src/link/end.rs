//! Why a session ended, or did not begin. Decides about the next attempt.

use std::time::Duration;

use cortex_proto::CODE_TRAILER;
use tonic::{Code, Status};

use super::renewal::{RenewError, this_machine};
use crate::client::{ConnectError, certificate_refusal, connect_error_in};

/// Longest wait the hub may ask for.
pub(super) const MAX_DRAIN: Duration = Duration::from_secs(300);

/// See the module.
#[derive(Debug)]
pub(super) enum End {
    /// This agent stops.
    Stopped,
    /// The hub stops and told when to return.
    Drained(Duration),
    /// Trouble that may pass by itself.
    Lost(String),
    /// The connection broke, and nobody said why.
    Broken(String),
    /// Nobody answers.
    Unreachable(String),
    /// The hub asked for patience.
    Busy(String, Duration),
    /// The hub does not accept our certificate.
    Certificate(String),
    /// Somebody has to change something first.
    Refused(String),
    /// The hub takes this machine for a copy of another.
    Cloned(String),
    /// This node has no place in the mesh any more: nothing goes on for it.
    Expelled(String),
}

impl From<ConnectError> for End {
    fn from(error: ConnectError) -> Self {
        let text = chain(&error);
        if error.is_permanent() { Self::Refused(text) } else { Self::Unreachable(text) }
    }
}

impl From<Status> for End {
    fn from(status: Status) -> Self {
        if let Some(error) = connect_error_in(&status) {
            return error.into();
        }
        if let Some(refusal) = certificate_refusal(&status) {
            return Self::Certificate(refusal.to_owned());
        }
        let text = text_of(&status);
        // A status that the hub sent has no cause on this side.
        if std::error::Error::source(&status).is_some() {
            return Self::Broken(text);
        }
        if is_clone_refusal(&status) {
            return Self::Cloned(format!("{text}; {}", this_machine()));
        }
        if is_expulsion(&status) {
            return Self::Expelled(text);
        }
        match status.code() {
            Code::Unauthenticated | Code::PermissionDenied | Code::FailedPrecondition => {
                Self::Refused(text)
            }
            Code::ResourceExhausted => Self::Busy(text, retry_after(&status)),
            _ => Self::Lost(text),
        }
    }
}

impl From<RenewError> for End {
    fn from(error: RenewError) -> Self {
        match error {
            RenewError::Cloned { .. } => Self::Cloned(error.to_string()),
            RenewError::Busy { after, .. } => Self::Busy(error.to_string(), after),
            RenewError::Connect(error) => error.into(),
            RenewError::Refused { .. } | RenewError::Identity(_) => Self::Refused(chain(&error)),
            RenewError::Failed { .. } => Self::Lost(error.to_string()),
        }
    }
}

/// Whether the hub takes this machine for a copy of another.
pub(super) fn is_clone_refusal(status: &Status) -> bool {
    status.metadata().get(CODE_TRAILER).is_some_and(|code| code == "identity_cloned")
}

/// Whether the hub has revoked this node, or does not know it.
fn is_expulsion(status: &Status) -> bool {
    let code = status.metadata().get(CODE_TRAILER);
    code.is_some_and(|code| code == "node_revoked" || code == "node_unknown")
}

pub(super) fn text_of(status: &Status) -> String {
    match status.message() {
        "" => status.code().description().to_owned(),
        text => text.to_owned(),
    }
}

/// The patience a busy hub asks for, at most [`MAX_DRAIN`].
pub(super) fn retry_after(status: &Status) -> Duration {
    cortex_proto::retry_after(status.metadata()).unwrap_or_default().min(MAX_DRAIN)
}

/// An error with its causes, each once.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        if !text.ends_with(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        next = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use cortex_proto::RETRY_AFTER_TRAILER;

    use super::*;

    #[test]
    fn refusals_that_somebody_must_resolve_are_told_from_passing_trouble() {
        for (code, permanent) in [
            (Code::Unauthenticated, true),
            (Code::PermissionDenied, true),
            (Code::FailedPrecondition, true),
            (Code::Unavailable, false),
            (Code::Internal, false),
            (Code::Unknown, false),
            (Code::Cancelled, false),
        ] {
            let end = End::from(Status::new(code, "x"));
            assert_eq!(matches!(end, End::Refused(_)), permanent, "{code:?}");
        }
        let mut revoked = Status::permission_denied("revoked");
        revoked.metadata_mut().insert(CODE_TRAILER, "node_revoked".parse().unwrap());
        assert!(matches!(End::from(revoked), End::Expelled(_)));
        let mut busy = Status::resource_exhausted("busy");
        busy.metadata_mut().insert(RETRY_AFTER_TRAILER, "2500".parse().unwrap());
        assert!(matches!(End::from(busy), End::Busy(_, d) if d == Duration::from_millis(2500)));
    }

    #[test]
    fn refusal_of_a_copy_names_this_machine_and_the_way_out() {
        let mut status = Status::failed_precondition("node n1 is also on machine b");
        status.metadata_mut().insert(CODE_TRAILER, "identity_cloned".parse().unwrap());
        let End::Cloned(text) = End::from(status) else { panic!("it is a clone refusal") };
        let host = crate::identity::MachineFacts::of_this_machine().hostname;
        assert!(text.starts_with("node n1 is also on machine b; "), "{text}");
        assert!(text.contains(&host) && text.contains("cortex-agent identity fork"), "{text}");
    }
}
