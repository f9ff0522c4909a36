//! Errors of the hub's own, which a caller is told by an id and nothing else: the log has the same id, the
//! chain of causes, and whose call it was.
//!
//! An error that repeats itself within a short time is logged once; the repetitions bear the same id, so that
//! every id that anybody was told stands in the log, and their number is logged with the next one.

use std::collections::HashMap;
use std::sync::{LazyLock, Mutex, PoisonError};
use std::time::Duration;

use tokio::task::futures::TaskLocalFuture;
use tokio::time::Instant;

/// The same error is logged this often at most.
const REPEATS_WITHIN: Duration = Duration::from_secs(10);
/// Errors that are remembered. Beyond that the oldest are forgotten, and logged anew.
const REMEMBERED: usize = 256;

tokio::task_local! {
    /// The call that is being answered: who asks, and what.
    static CALL: (String, &'static str);
}

/// A call that is being answered; see [`in_call`].
pub type InCall<F> = TaskLocalFuture<(String, &'static str), F>;

/// Answers a call, so that errors within say whose it was. `caller` as the audit log names it.
pub fn in_call<F: Future>(caller: String, method: &'static str, call: F) -> InCall<F> {
    CALL.scope((caller, method), call)
}

/// An error and all its causes, in a line.
#[must_use]
pub fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut chain = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let text = error.to_string();
        // Some errors repeat their cause in their own text.
        if !chain.ends_with(&text) {
            chain.push_str(": ");
            chain.push_str(&text);
        }
        source = error.source();
    }
    chain
}

/// Logs an error of the hub's own, with the call it was in; returns its id.
pub fn report(error: &(dyn std::error::Error + 'static)) -> String {
    report_of("internal error", &[], error)
}

/// The same in these words and with these particulars.
pub fn report_of(
    what: &'static str,
    about: &[(&'static str, &str)],
    error: &(dyn std::error::Error + 'static),
) -> String {
    static RECENT: LazyLock<Mutex<Recent>> = LazyLock::new(Mutex::default);
    crate::counters::INTERNAL_ERRORS.add(1);
    let (caller, method) = CALL.try_with(Clone::clone).unwrap_or_default();
    let about: Vec<_> = about.iter().map(|(key, value)| format!("{key}={value}")).collect();
    let (about, error) = (about.join(" "), chain(error));
    let key = format!("{what}|{about}|{caller}|{method}|{error}");
    let noted = RECENT.lock().unwrap_or_else(PoisonError::into_inner).note(key, Instant::now());
    if let Noted::Logged { error_id, repeated } = &noted {
        let repeated = (*repeated > 0).then_some(*repeated);
        let caller = (!caller.is_empty()).then_some(&*caller);
        let method = (!method.is_empty()).then_some(method);
        let about = (!about.is_empty()).then_some(&*about);
        tracing::error!(error_id, error, about, caller, method, repeated, "{what}");
    }
    match noted {
        Noted::Logged { error_id, .. } | Noted::Repeated { error_id } => error_id,
    }
}

#[derive(Default)]
struct Recent(HashMap<String, Remembered>);

struct Remembered {
    error_id: String,
    logged: Instant,
    repeated: u64,
}

#[derive(Debug, PartialEq, Eq)]
enum Noted {
    /// To be logged, with how often it came since the last time.
    Logged { error_id: String, repeated: u64 },
    /// Has been logged a moment ago.
    Repeated { error_id: String },
}

impl Recent {
    fn note(&mut self, key: String, now: Instant) -> Noted {
        if let Some(known) = self.0.get_mut(&key) {
            if now < known.logged + REPEATS_WITHIN {
                known.repeated += 1;
                return Noted::Repeated { error_id: known.error_id.clone() };
            }
        } else if self.0.len() >= REMEMBERED {
            let oldest = self.0.iter().min_by_key(|(_, known)| known.logged);
            if let Some(key) = oldest.map(|(key, _)| key.clone()) {
                self.0.remove(&key);
            }
        }
        let error_id = format!("{:08x}", rand::random::<u32>());
        let remembered = Remembered { error_id: error_id.clone(), logged: now, repeated: 0 };
        let before = self.0.insert(key, remembered);
        Noted::Logged { error_id, repeated: before.map_or(0, |before| before.repeated) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_repetition_bears_the_id_that_was_logged_and_is_counted_with_the_next_line() {
        let (mut recent, now) = (Recent::default(), Instant::now());
        let mut note = |key: &str, after: Duration| recent.note(key.to_owned(), now + after);
        let Noted::Logged { error_id: first, repeated: 0 } = note("a", Duration::ZERO) else {
            panic!()
        };
        for _ in 0..5 {
            let noted = note("a", Duration::from_secs(1));
            assert_eq!(noted, Noted::Repeated { error_id: first.clone() });
        }
        assert!(matches!(note("b", Duration::from_secs(1)), Noted::Logged { repeated: 0, .. }));
        let Noted::Logged { error_id, repeated } = note("a", REPEATS_WITHIN) else { panic!() };
        assert_eq!(repeated, 5);
        assert_ne!(error_id, first);
    }

    #[test]
    fn however_many_errors_there_are_so_many_are_remembered() {
        let (mut recent, now) = (Recent::default(), Instant::now());
        for n in 0..3 * REMEMBERED {
            recent.note(n.to_string(), now + Duration::from_millis(n as u64));
        }
        assert_eq!(recent.0.len(), REMEMBERED);
        let last = (3 * REMEMBERED - 1).to_string();
        assert!(matches!(recent.note(last, now), Noted::Repeated { .. }));
    }

    #[test]
    fn causes_are_in_the_chain_once() {
        #[derive(Debug, thiserror::Error)]
        #[error("outer")]
        struct Outer(#[source] std::io::Error);
        #[derive(Debug, thiserror::Error)]
        #[error(transparent)]
        struct Around(#[from] Outer);
        let error = Around(Outer(std::io::Error::other("inner")));
        assert_eq!(chain(&error), "outer: inner");
    }
}
