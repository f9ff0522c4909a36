//! What was refused for want of authority, in the audit log.
//!
//! A caller that keeps asking must not fill the disk: each has so many lines at once and one a minute
//! after that. The others are counted, and the count goes with the caller's next line, or into one of its
//! own after a while. Nobody waits for these lines; a crash loses those of the last moments.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use cortex_shared::clock::unix_ms;
use cortex_shared::tasks::TaskScope;
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::rate::{Bucket, Rate};
use crate::store::{Actor, Store};

/// Lines of one caller at once.
const BURST: u32 = 20;
/// Time in which one more may be written.
const PER_LINE: Duration = Duration::from_secs(60);
const LINES: Rate = Rate { burst: BURST, per_second: 1.0 / PER_LINE.as_secs() as f64 };
/// Callers remembered. Beyond them, all that are not known share one allowance.
const MAX_ACTORS: usize = 1024;
/// Key of those who share it; no caller has this name.
const OTHERS: &str = "";

/// What a caller may still write.
struct Allowance {
    lines: Bucket,
    /// Refusals without a line.
    untold: u64,
}

/// See the module.
pub struct RefusalLog {
    store: Arc<dyn Store>,
    scope: TaskScope,
    actors: Mutex<HashMap<String, Allowance>>,
}

impl RefusalLog {
    /// Refusals for the log of this store, written by tasks of this scope.
    #[must_use]
    pub fn new(store: Arc<dyn Store>, scope: TaskScope) -> Arc<Self> {
        Arc::new(Self { store, scope, actors: Mutex::default() })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Allowance>> {
        self.actors.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Records a refusal, or counts it. `detail` is an object.
    pub fn record(
        self: &Arc<Self>,
        actor: &Actor,
        action: &'static str,
        target: &str,
        mut detail: Value,
    ) {
        match self.take(&actor.name, Instant::now()) {
            Taken::Line { untold } => {
                if untold > 0 {
                    detail["untold_before"] = untold.into();
                }
                self.write(actor.clone(), action, target.to_owned(), detail);
            }
            Taken::Counted { first: true } => self.tell_later(actor.clone()),
            Taken::Counted { first: false } => {}
        }
    }

    fn take(&self, actor: &str, now: Instant) -> Taken {
        let mut actors = self.lock();
        let mut key = actor;
        if !actors.contains_key(actor) && actors.len() >= MAX_ACTORS {
            actors.retain(|_, allowance| {
                !allowance.lines.is_full(LINES, now) || allowance.untold > 0
            });
            if actors.len() >= MAX_ACTORS {
                key = OTHERS;
            }
        }
        let fresh = || Allowance { lines: Bucket::full(LINES, now), untold: 0 };
        let allowance = actors.entry(key.to_owned()).or_insert_with(fresh);
        if allowance.lines.take(LINES, now).is_ok() {
            return Taken::Line { untold: std::mem::take(&mut allowance.untold) };
        }
        allowance.untold += 1;
        Taken::Counted { first: allowance.untold == 1 }
    }

    /// Writes how many refusals had no line, unless the caller's next line has said so by then.
    fn tell_later(self: &Arc<Self>, actor: Actor) {
        let (log, cancel) = (Arc::clone(self), self.scope.token().clone());
        self.scope.spawn("refusals", async move {
            tokio::select! {
                () = cancel.cancelled() => {}
                () = tokio::time::sleep(PER_LINE) => {}
            }
            let untold = {
                let mut actors = log.lock();
                let key = if actors.contains_key(&actor.name) { &actor.name } else { OTHERS };
                let untold = actors.get_mut(key).map(|allowance| &mut allowance.untold);
                untold.map(std::mem::take).unwrap_or_default()
            };
            if untold > 0 {
                log.write(actor, "refusals.untold", String::new(), json!({ "count": untold }));
            }
        });
    }

    fn write(&self, actor: Actor, action: &'static str, target: String, detail: Value) {
        let line = actor.audit(unix_ms(), action, target, detail);
        let store = Arc::clone(&self.store);
        self.scope.spawn("refusal", async move {
            if let Err(error) = store.record_audit(line).await {
                tracing::warn!(%error, "a refusal was not recorded");
            }
        });
    }
}

enum Taken {
    /// A line, which says how many had none before it.
    Line { untold: u64 },
    /// No line; whether it is the first without.
    Counted { first: bool },
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::sqlite::SqliteStore;

    #[tokio::test]
    async fn whoever_keeps_asking_gets_few_lines_and_the_rest_is_counted() {
        let folder = tempfile::tempdir().unwrap();
        let (of_store, scope) = (TaskScope::new(), TaskScope::new());
        let store = SqliteStore::open(folder.path().join("hub.db"), &of_store).await.unwrap();
        let store = Arc::new(store);
        let log = RefusalLog::new(Arc::clone(&store) as _, scope.clone());
        for _ in 0..1000 {
            log.record(&Actor::from("bot"), "call.refused", "RevokeNode", json!({}));
        }
        log.record(&Actor::from("ann"), "call.refused", "RevokeNode", json!({}));
        scope.cancel();
        scope.finish().await;
        let lines = store.audit_page(None, 100).await.unwrap();
        let of = |actor: &str| lines.iter().filter(|l| l.actor == actor).collect::<Vec<_>>();
        assert_eq!((of("bot").len(), of("ann").len()), (BURST as usize + 1, 1));
        let rest = lines.iter().find(|line| line.action == "refusals.untold").unwrap();
        assert_eq!(rest.detail, r#"{"count":980}"#);
    }

    #[tokio::test]
    async fn lines_come_back_with_time_and_say_what_was_left_out() {
        let folder = tempfile::tempdir().unwrap();
        let scope = TaskScope::new();
        let store = SqliteStore::open(folder.path().join("hub.db"), &scope).await.unwrap();
        let log = RefusalLog::new(Arc::new(store), scope);
        let now = Instant::now();
        for _ in 0..BURST {
            assert!(matches!(log.take("bot", now), Taken::Line { untold: 0 }));
        }
        assert!(matches!(log.take("bot", now), Taken::Counted { first: true }));
        assert!(matches!(log.take("bot", now), Taken::Counted { first: false }));
        let later = now + PER_LINE;
        assert!(matches!(log.take("bot", later), Taken::Line { untold: 2 }));
        assert!(matches!(log.take("bot", later), Taken::Counted { first: true }));
        // However many callers there are, so many are remembered.
        for n in 0..3 * MAX_ACTORS {
            log.take(&n.to_string(), later);
        }
        assert!(log.lock().len() <= MAX_ACTORS + 1);
    }
}
