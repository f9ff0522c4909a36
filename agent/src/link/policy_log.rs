//! Writes down which policies the hub tells, however fast it tells them.
//!
//! One writer at a time. While it writes, only the newest policy waits for it; the ones in between
//! are counted. A hub that never stops gets a line of its own for the first policies of a
//! [`PERIOD`] and one with the count at its end, or at the end of the session. A crash
//! loses the one that waits.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use cortex_shared::policy::Bound;
use cortex_shared::tasks::TaskScope;

use super::authority::HubPolicy;
use crate::audit::{Audit, AuditEvent};

/// Policies that get a line of their own in one [`PERIOD`].
const MAX_LINES: u32 = 20;
const PERIOD: Duration = Duration::from_secs(60);

/// The owner's bound, read when it is asked for. Blocks for the disk.
type ReadCeiling = Arc<dyn Fn() -> Bound + Send + Sync>;

/// See the module. Clones share the same writer.
#[derive(Clone)]
pub(super) struct PolicyLog {
    audit: Audit,
    ceiling: ReadCeiling,
    state: Arc<Mutex<State>>,
}

struct State {
    newest: Option<(HubPolicy, Bound)>,
    /// Policies that were told and replaced before they were written.
    not_listed: u64,
    /// Whether a writer runs.
    writing: bool,
    since: Instant,
    lines: u32,
}

impl PolicyLog {
    pub(super) fn new(audit: Audit, ceiling: ReadCeiling) -> Self {
        let state =
            State { newest: None, not_listed: 0, writing: false, since: Instant::now(), lines: 0 };
        Self { audit, ceiling, state: Arc::new(Mutex::new(state)) }
    }

    /// Has a policy written down that allows this much now. Does not wait.
    pub(super) fn told(&self, policy: HubPolicy, bound: Bound, session: &TaskScope) {
        {
            let mut state = self.lock();
            if state.newest.replace((policy, bound)).is_some() {
                state.not_listed += 1;
            }
            if std::mem::replace(&mut state.writing, true) {
                return;
            }
        }
        let (log, ended) = (self.clone(), session.token().clone());
        session.spawn("policy log", async move {
            while let Some(wait) = log.next() {
                // The end of the session does not wait: nothing follows it.
                tokio::time::timeout(wait, ended.cancelled()).await.ok();
                let writer = log.clone();
                if tokio::task::spawn_blocking(move || writer.write()).await.is_err() {
                    tracing::error!("a policy could not be written down");
                }
            }
        });
    }

    /// How long the waiting policy has to wait; without one the writer is done.
    fn next(&self) -> Option<Duration> {
        let mut state = self.lock();
        if state.newest.is_none() {
            state.writing = false;
            return None;
        }
        let gone = state.since.elapsed();
        if gone >= PERIOD {
            (state.since, state.lines) = (Instant::now(), 0);
        }
        Some(if state.lines < MAX_LINES { Duration::ZERO } else { PERIOD.saturating_sub(gone) })
    }

    fn write(&self) {
        let (newest, not_listed) = {
            let mut state = self.lock();
            state.lines = state.lines.saturating_add(1);
            (state.newest.take(), std::mem::take(&mut state.not_listed))
        };
        let Some((policy, bound)) = newest else { return };
        let effective = bound.and((self.ceiling)());
        tracing::info!(policy = %bound, %effective, not_listed, "the hub's policy for this node changed");
        self.audit.note(&AuditEvent::Policy {
            policy: bound.to_string(),
            until_ms: policy.until_ms(),
            effective: effective.to_string(),
            not_listed,
        });
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Every critical section leaves the data whole, so a panic elsewhere does not spoil it.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::StateDir;

    #[test]
    fn after_its_lines_of_a_period_the_newest_waits_for_the_next_one() {
        let folder = tempfile::tempdir().unwrap();
        let state = StateDir::resolve(Some(folder.path().to_owned())).unwrap();
        let log = PolicyLog::new(Audit::of(&state), Arc::new(|| Bound::LEAST));
        let tell = || log.lock().newest = Some((HubPolicy::UNTOLD, Bound::LEAST));
        for _ in 0..MAX_LINES {
            tell();
            assert_eq!(log.next(), Some(Duration::ZERO));
            log.write();
        }
        assert_eq!(log.next(), None);
        tell();
        assert!(log.next().is_some_and(|wait| wait > Duration::ZERO && wait <= PERIOD));
    }
}
