//! Between a node's word on how a command ended and the journal's.

use cortex_proto::v1::{TaskExit, TaskVerdict};
use cortex_shared::clock::unix_ms;
use cortex_shared::text::shorten;

use crate::store::{TaskEnd, Verdict};

/// Longest reason or hint of a node that is kept.
pub const MAX_TEXT_BYTES: usize = 1024;

/// A node's words are kept for ever and shown to people: they are short.
pub(super) fn tidy(exit: &mut TaskExit) {
    shorten(&mut exit.reason, MAX_TEXT_BYTES);
    shorten(&mut exit.hint, MAX_TEXT_BYTES);
    exit.exit_code = exit.exit_code.min(255);
}

/// What is journalled of an end.
pub(super) fn journal_entry(exit: &TaskExit, started_at_ms: Option<i64>) -> TaskEnd {
    let verdict = match exit.verdict() {
        TaskVerdict::Exited => Verdict::Exited,
        TaskVerdict::Signalled => Verdict::Signalled,
        TaskVerdict::TimeLimit => Verdict::TimeLimit,
        TaskVerdict::Cancelled => Verdict::Cancelled,
        TaskVerdict::Refused => Verdict::Refused,
        TaskVerdict::NotFound => Verdict::NotFound,
        TaskVerdict::Failed | TaskVerdict::Unspecified => Verdict::Failed,
        TaskVerdict::StreamLost => Verdict::StreamLost,
    };
    TaskEnd {
        verdict,
        exit_code: (verdict == Verdict::Exited).then_some(exit.exit_code),
        signal: (exit.signal != 0).then_some(exit.signal),
        reason: exit.reason.clone(),
        hint: exit.hint.clone(),
        stdout_bytes: exit.stdout_bytes,
        stderr_bytes: exit.stderr_bytes,
        stdout_hash: exit.stdout_hash.as_ref().try_into().ok(),
        stderr_hash: exit.stderr_hash.as_ref().try_into().ok(),
        duration_ms: exit.duration_ms,
        started_at_ms,
        ended_at_ms: unix_ms(),
        never_begun: false,
        cancel_wanted: false,
    }
}

/// An end in the journal as it goes to readers.
#[must_use]
pub fn wire_exit(end: &TaskEnd) -> TaskExit {
    let verdict = match end.verdict {
        Verdict::Exited => TaskVerdict::Exited,
        Verdict::Signalled => TaskVerdict::Signalled,
        Verdict::TimeLimit => TaskVerdict::TimeLimit,
        Verdict::Cancelled => TaskVerdict::Cancelled,
        Verdict::Refused => TaskVerdict::Refused,
        Verdict::NotFound => TaskVerdict::NotFound,
        Verdict::Failed => TaskVerdict::Failed,
        Verdict::StreamLost => TaskVerdict::StreamLost,
    };
    let hash = |hash: Option<[u8; 32]>| hash.map(|h| h.to_vec().into()).unwrap_or_default();
    TaskExit {
        verdict: verdict.into(),
        exit_code: end.exit_code.unwrap_or(0),
        signal: end.signal.unwrap_or(0),
        stdout_bytes: end.stdout_bytes,
        stdout_hash: hash(end.stdout_hash),
        stderr_bytes: end.stderr_bytes,
        stderr_hash: hash(end.stderr_hash),
        reason: end.reason.clone(),
        hint: end.hint.clone(),
        duration_ms: end.duration_ms,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_end_survives_the_journal() {
        for number in 1..=8 {
            let exit = TaskExit {
                verdict: number,
                stdout_bytes: 5,
                stdout_hash: vec![7; 32].into(),
                reason: "why".into(),
                ..TaskExit::default()
            };
            assert_eq!(wire_exit(&journal_entry(&exit, None)), exit);
        }
    }
}
