//! How refusals look to a caller: a gRPC code, a text, a stable word and, where there is one, the
//! command that helps. Internal errors get an id that also stands in the log, and nothing else.

use std::time::Duration;

use cortex_proto::{CODE_TRAILER, ERROR_ID_TRAILER, HINT_TRAILER, RETRY_AFTER_TRAILER};
use cortex_shared::text::shorten;
use tonic::metadata::MetadataValue;
use tonic::{Code, Status};

use crate::authority::nodes::DecisionError;
use crate::authority::operators::OperatorRefusal;
use crate::enroll::validator::EnrollError;
use crate::error_id;
use crate::node::registry::{ArrivalRefusal, ForgetRefusal, NodeLookup, NodeRefusal, SessionEnded};
use crate::store::{
    CloneSuspicion, DatabaseError, LabelRefusal, Machine, RedeemRefusal, RenewRefusal, Scope,
    StoreError,
};

/// Longest text and hint of a refusal. Both travel as headers, of which a connection takes 16 KiB with
/// three bytes for one where it is not ASCII; what callers sent is repeated in them.
const MAX_TEXT_BYTES: usize = 2048;
const MAX_HINT_BYTES: usize = 512;

/// A refusal with its stable word.
pub fn refuse(code: Code, word: &'static str, text: impl Into<String>) -> Status {
    let mut text = text.into();
    if text.len() > MAX_TEXT_BYTES {
        shorten(&mut text, MAX_TEXT_BYTES);
        text.push('…');
    }
    let mut status = Status::new(code, text);
    status.metadata_mut().insert(CODE_TRAILER, MetadataValue::from_static(word));
    status
}

/// Adds the command that helps.
pub fn with_hint(mut status: Status, hint: &str) -> Status {
    // A trailer holds ASCII only; what somebody asked for may hold anything.
    let printable = |c: char| c.is_ascii_graphic() || c == ' ';
    let hint = hint.chars().map(|c| if printable(c) { c } else { '?' });
    let hint: String = hint.take(MAX_HINT_BYTES).collect();
    if let Ok(value) = MetadataValue::try_from(hint) {
        status.metadata_mut().insert(HINT_TRAILER, value);
    }
    status
}

/// Adds the time after which a repetition may succeed.
pub fn with_retry_after(mut status: Status, after: Duration) -> Status {
    let value = MetadataValue::from(u64::try_from(after.as_millis()).unwrap_or(u64::MAX));
    status.metadata_mut().insert(RETRY_AFTER_TRAILER, value);
    status
}

/// Something the caller sent is not what the protocol allows.
pub fn invalid(text: impl Into<String>) -> Status {
    refuse(Code::InvalidArgument, "invalid_argument", text)
}

/// An error of the hub's own: the caller gets an id, the log gets the chain.
pub fn internal(error: &(dyn std::error::Error + 'static)) -> Status {
    with_error_id(Code::Internal, "internal", "the hub failed", error_id::report(error))
}

/// A refusal whose reason stands in the log, under this id.
fn with_error_id(code: Code, word: &'static str, text: &str, id: String) -> Status {
    let mut status = refuse(code, word, format!("{text} (error id {id})"));
    if let Ok(id) = MetadataValue::try_from(id) {
        status.metadata_mut().insert(ERROR_ID_TRAILER, id);
    }
    status
}

/// How errors of the store look to a caller.
pub fn from_store(error: StoreError) -> Status {
    match &error {
        StoreError::Exists { .. } => {
            refuse(Code::AlreadyExists, "already_exists", error.to_string())
        }
        StoreError::NotFound { .. } => refuse(Code::NotFound, "not_found", error.to_string()),
        StoreError::AuditAltered { .. } => {
            tracing::error!(%error, "refused what the audit log would have to hold");
            with_hint(
                refuse(Code::FailedPrecondition, "audit_altered", error.to_string()),
                "look at it: cortex-hubd audit verify; if that is explained: audit verify --accept REASON",
            )
        }
        StoreError::Database(error) => from_database(error),
    }
}

/// How it looks to a caller with this scope that a name is taken: by what, or even that it is by
/// something it does not see, is not for one that does not see everything.
pub fn from_naming(error: StoreError, scope: &Scope) -> Status {
    match error {
        StoreError::Exists { .. } if !scope.is_everything() => with_hint(
            refuse(Code::AlreadyExists, "already_exists", "this name cannot be used"),
            "choose another name",
        ),
        error => from_store(error),
    }
}

/// The hub stops; the next one can be asked.
pub fn shutting_down() -> Status {
    refuse(Code::Unavailable, "shutting_down", "the hub is shutting down")
}

/// How errors of a database look to a caller.
pub fn from_database(error: &DatabaseError) -> Status {
    match error {
        DatabaseError::Closed => shutting_down(),
        error if error.is_disk_full() => disk_full(error),
        error => internal(error),
    }
}

/// How a full disk looks to a caller: it need not give up.
pub fn disk_full(error: &(dyn std::error::Error + 'static)) -> Status {
    error_id::report(error);
    no_room()
}

/// The same where it is known and logged already that there is no room.
pub fn no_room() -> Status {
    let status = refuse(Code::ResourceExhausted, "disk_full", "the hub's disk is full");
    with_retry_after(status, Duration::from_secs(60))
}

/// How it looks to a member that its workspace may not store more: what makes room is somebody's choice.
pub fn over_quota(error: &(dyn std::error::Error + 'static)) -> Status {
    let status = refuse(Code::ResourceExhausted, "quota_exceeded", error.to_string());
    let hint = "delete something and keep less of the past, or raise it: cortex-agent workspace set W --quota SIZE";
    with_retry_after(with_hint(status, hint), Duration::from_secs(60))
}

/// How it looks to a caller that it tries too often.
pub fn too_often(wait: Duration) -> Status {
    let text = format!("too many attempts; try again in {} s", wait.as_secs() + 1);
    with_retry_after(refuse(Code::ResourceExhausted, "rate_limited", text), wait)
}

/// How a refused join or login looks to a caller.
pub fn from_enroll(error: EnrollError) -> Status {
    let ask = "ask an administrator for a new one: cortex-hubd invite create";
    match error {
        EnrollError::Refused(refusal) => {
            let (word, text) = (refusal.word(), refusal.to_string());
            let status = |code| refuse(code, word, text);
            match refusal {
                RedeemRefusal::Unknown
                | RedeemRefusal::Expired
                | RedeemRefusal::UsedUp
                | RedeemRefusal::Revoked => with_hint(status(Code::PermissionDenied), ask),
                RedeemRefusal::SourceNotAllowed { .. } => with_hint(
                    status(Code::PermissionDenied),
                    "ask an administrator for one that is valid from there: cortex-hubd invite create --from CIDR",
                ),
                RedeemRefusal::NameNotAllowed { .. } => {
                    with_hint(status(Code::PermissionDenied), "choose another name with --name")
                }
                RedeemRefusal::NameTaken { .. } => {
                    with_hint(status(Code::AlreadyExists), "choose another name with --name")
                }
            }
        }
        EnrollError::NotRenewed(refusal) => from_renewal(refusal),
        EnrollError::Busy => with_retry_after(
            refuse(Code::ResourceExhausted, "busy", error.to_string()),
            // Spread over a second or two: everyone turned away at once must not return at once.
            Duration::from_millis(500 + u64::from(rand::random::<u16>() % 2000)),
        ),
        EnrollError::TooOften { wait } => too_often(wait),
        EnrollError::Deadline => with_retry_after(
            refuse(Code::Unavailable, "store_slow", error.to_string()),
            Duration::from_secs(2),
        ),
        EnrollError::Store(error) => from_store(error),
        EnrollError::Certificate(error) => internal(&error),
    }
}

/// How it looks to a node that it gets no certificate.
fn from_renewal(refusal: RenewRefusal) -> Status {
    let text = refusal.to_string();
    match refusal {
        RenewRefusal::Unknown => from_node(NodeRefusal::Unknown),
        RenewRefusal::Revoked => from_node(NodeRefusal::Revoked),
        RenewRefusal::TooLate => with_hint(
            refuse(Code::FailedPrecondition, "recovery_expired", text),
            "ask an administrator for a new invite: cortex-hubd invite create",
        ),
        RenewRefusal::Cloned { name, suspicion, holder } => cloned(&name, &suspicion, &holder),
    }
}

/// How it looks to a node that no session begins.
pub fn from_arrival(refusal: ArrivalRefusal) -> Status {
    match refusal {
        ArrivalRefusal::Node(refusal) => from_node(refusal),
        ArrivalRefusal::Cloned { name, suspicion, holder, .. } => {
            cloned(&name, &suspicion, &holder)
        }
    }
}

/// How it looks to a machine that has the identity of another one: both are named, so that somebody can
/// find out which is the copy.
fn cloned(name: &str, suspicion: &CloneSuspicion, holder: &Machine) -> Status {
    let machine = |machine: &Machine| {
        let or_unknown = |text: &str| match text {
            "" => "unknown".to_owned(),
            text => text.to_owned(),
        };
        format!(
            "{} (machine id {}, boot id {})",
            or_unknown(&machine.hostname),
            or_unknown(&machine.machine_id),
            or_unknown(&machine.boot_id)
        )
    };
    let text = format!(
        "the identity of {name:?} was copied: it is in use on {}, with certificate generation {}; \
         this one, {}, presents generation {}",
        machine(holder),
        suspicion.current_generation,
        machine(&suspicion.machine),
        suspicion.presented_generation,
    );
    with_hint(refuse(Code::FailedPrecondition, "identity_cloned", text), FORK)
}

/// What helps a copy.
const FORK: &str = "on the copy, with a new invite: stop the agent (systemctl [--user] stop cortex-agent; where it is no service, end the process that `cortex-agent status` names), cortex-agent identity fork --token-file FILE, then start it again";

/// How a name that leads to no node looks to a caller.
pub fn from_lookup(error: NodeLookup) -> Status {
    let status = refuse(Code::NotFound, "node_not_found", error.to_string());
    match error {
        NodeLookup::Unknown { similar: Some(name), .. } => {
            with_hint(status, &format!("did you mean {name:?}?"))
        }
        NodeLookup::Unknown { similar: None, .. } => {
            with_hint(status, "list the nodes: cortex-agent node list")
        }
        NodeLookup::Ambiguous { .. } => with_hint(status, "give more characters, or the name"),
    }
}

/// How a decision that was not carried out looks to a caller.
pub fn from_decision(error: DecisionError) -> Status {
    let text = error.to_string();
    match error {
        DecisionError::Store(error) => from_store(error),
        DecisionError::NotRecorded(StoreError::NotFound { what, name }) => {
            from_store(StoreError::NotFound { what, name })
        }
        DecisionError::NotRecorded(source) => {
            let id = error_id::report(&source);
            with_hint(
                with_error_id(Code::Internal, "not_recorded", &text, id),
                "repeat the command",
            )
        }
        DecisionError::Forget(ForgetRefusal::Unknown) => {
            refuse(Code::NotFound, "node_not_found", text)
        }
        DecisionError::Forget(ForgetRefusal::Online { name }) => with_hint(
            refuse(Code::FailedPrecondition, "node_online", text),
            &format!("revoke it first: cortex-hubd node revoke {name}"),
        ),
        DecisionError::Label(LabelRefusal::Protected { .. }) => with_hint(
            refuse(Code::PermissionDenied, "label_protected", text),
            "only an administrator without a scope may change it",
        ),
        DecisionError::Label(LabelRefusal::TooMany) => invalid(text),
    }
}

/// How an operator's certificate that no longer counts looks to its holder.
pub fn from_operator(refusal: OperatorRefusal) -> Status {
    let word = match refusal {
        OperatorRefusal::Unknown => "operator_unknown",
        OperatorRefusal::Revoked => "operator_revoked",
        OperatorRefusal::Replaced => "login_replaced",
    };
    with_hint(
        refuse(Code::Unauthenticated, word, refusal.to_string()),
        "ask an administrator for a new login: cortex-hubd operator create",
    )
}

/// How a node's certificate that no longer counts looks to its holder.
pub fn from_node(refusal: NodeRefusal) -> Status {
    let text = refusal.to_string();
    let ask = "ask an administrator for a new invite: cortex-hubd invite create";
    match refusal {
        NodeRefusal::Unknown => {
            with_hint(refuse(Code::PermissionDenied, "node_unknown", text), ask)
        }
        NodeRefusal::Revoked => {
            with_hint(refuse(Code::PermissionDenied, "node_revoked", text), ask)
        }
        NodeRefusal::Overtaken => {
            with_hint(refuse(Code::FailedPrecondition, "identity_cloned", text), FORK)
        }
    }
}

/// How soon what met a hub that drains is asked for again, at least and at most: the next hub may be there
/// sooner than the last command of this one ends.
const DRAINED_RETRY: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(1));

/// The hub is about to stop, after this time at the latest: what was asked for was not begun.
pub fn draining(wait: Duration, text: &str) -> Status {
    let status = refuse(Code::Unavailable, cortex_proto::CODE_DRAINING, text);
    let status = with_hint(status, "ask again in a moment");
    with_retry_after(status, wait.clamp(DRAINED_RETRY.0, DRAINED_RETRY.1))
}

/// The node is known, but not connected.
pub fn offline(name: &str) -> Status {
    with_hint(
        refuse(Code::Unavailable, "node_offline", format!("node {name:?} is offline")),
        "see when it was last seen: cortex-agent node list --offline",
    )
}

impl From<SessionEnded> for Box<Status> {
    fn from(error: SessionEnded) -> Self {
        Box::new(refuse(Code::Unavailable, "node_offline", error.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hint_is_never_lost_for_what_somebody_asked_for() {
        let status = with_hint(invalid("x"), "make it: create b\u{e4}r\n");
        assert_eq!(status.metadata().get(HINT_TRAILER).unwrap(), "make it: create b?r?");
    }

    #[test]
    fn whatever_a_caller_sends_the_refusal_that_repeats_it_fits_into_headers() {
        for sent in ["x".repeat(100_000), "ä".repeat(100_000)] {
            let status = with_hint(invalid(format!("no {sent:?}")), &format!("make {sent}"));
            assert!(status.message().len() <= MAX_TEXT_BYTES + 3, "{}", status.message().len());
            assert!(status.message().ends_with('…'));
            assert_eq!(status.metadata().get(HINT_TRAILER).unwrap().len(), MAX_HINT_BYTES);
        }
    }
}
