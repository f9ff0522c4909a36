//! Whether new commands are taken. Not while the hub drains: an operator has asked for it, or it stops.
//!
//! A refused command was certainly not begun, and its caller is told when to ask again. What runs goes on.
//! Nothing of this outlives the process: the next hub takes commands.

use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

/// How often a hub that drains looks whether something still runs.
const LOOK: Duration = Duration::from_millis(100);

/// See the module.
#[derive(Debug)]
pub struct Draining {
    /// Until when commands that run are waited for.
    until: watch::Sender<Option<Instant>>,
}

impl Default for Draining {
    fn default() -> Self {
        Self { until: watch::Sender::new(None) }
    }
}

impl Draining {
    /// Takes no new commands from now on; [`Draining::over`] ends after this time at the latest.
    pub fn begin(&self, wait: Duration) {
        self.until.send_replace(Some(Instant::now() + wait));
    }

    /// Takes commands again.
    pub fn undo(&self) {
        self.until.send_replace(None);
    }

    /// When the wait is over, if no new commands are taken.
    #[must_use]
    pub fn until(&self) -> Option<Instant> {
        *self.until.borrow()
    }

    /// Ends once no commands are taken, and either none runs or the wait is over. Safe to give up at any
    /// time.
    pub async fn over(&self, running: impl Fn() -> usize) {
        let mut changes = self.until.subscribe();
        loop {
            let until = *changes.borrow_and_update();
            let look = match until {
                Some(until) if until <= Instant::now() || running() == 0 => return,
                Some(until) => until.min(Instant::now() + LOOK),
                None => {
                    // The sender is in `self`.
                    if changes.changed().await.is_err() {
                        return;
                    }
                    continue;
                }
            };
            tokio::select! {
                () = tokio::time::sleep_until(look) => {}
                changed = changes.changed() => if changed.is_err() { return },
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_wait_ends_with_the_last_command_or_when_its_time_is_over_or_never() {
        let (draining, running) = (Draining::default(), AtomicUsize::new(2));
        let count = || running.load(Ordering::Relaxed);
        let mut over = Box::pin(draining.over(count));
        let wait = Duration::from_secs(30);
        assert!(tokio::time::timeout(wait * 100, &mut over).await.is_err(), "nobody drains");
        draining.begin(wait);
        assert!(draining.until().is_some());
        assert!(tokio::time::timeout(wait / 2, &mut over).await.is_err(), "two run");
        draining.undo();
        assert!(tokio::time::timeout(wait * 2, &mut over).await.is_err(), "it was taken back");
        draining.begin(wait);
        running.store(0, Ordering::Relaxed);
        assert!(tokio::time::timeout(wait / 2, &mut over).await.is_ok(), "none runs");
        running.store(1, Ordering::Relaxed);
        let begun = Instant::now();
        draining.begin(wait);
        draining.over(count).await;
        assert_eq!(begun.elapsed(), wait);
    }
}
