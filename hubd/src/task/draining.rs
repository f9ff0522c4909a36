//! Whether new commands are taken. Not while the hub drains: an operator has asked for it, or it stops.
//!
//! A refused command was certainly not begun, and its caller is told when to ask again. What runs goes on.
//! Nothing of this outlives the process: the next hub takes commands.

use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;

/// How often a hub that drains looks whether something still runs.
const LOOK: Duration = Duration::from_millis(100);

/// See the module.
#[derive(Debug)]
pub struct Draining {
    /// Until when commands that run are waited for.
    until: watch::Sender<Option<Instant>>,
    /// Commands that are just being begun.
    beginning: TaskTracker,
}

impl Default for Draining {
    fn default() -> Self {
        Self { until: watch::Sender::new(None), beginning: TaskTracker::new() }
    }
}

impl Draining {
    /// Lets a command begin, for as long as the token is held; says how long the wait for others lasts if
    /// none may.
    ///
    /// # Errors
    /// The time that is left of the wait.
    pub fn enter(&self) -> Result<TaskTrackerToken, Duration> {
        // Counted before the look, so that whoever drains either is seen here or waits for this.
        let token = self.beginning.token();
        match self.until() {
            None => Ok(token),
            Some(until) => Err(until - Instant::now()),
        }
    }

    /// Ends once no command is just being begun. For a hub that stops: what had begun has reached its node.
    pub async fn settled(&self) {
        self.beginning.close();
        self.beginning.wait().await;
    }

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

    /// Ends when commands are no longer taken. Safe to give up at any time.
    pub async fn begun(&self) {
        // The sender is in `self`.
        self.until.subscribe().wait_for(Option::is_some).await.ok();
    }

    /// Ends when commands are taken again. Safe to give up at any time.
    pub async fn undone(&self) {
        // The sender is in `self`.
        self.until.subscribe().wait_for(Option::is_none).await.ok();
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

    #[tokio::test]
    async fn whoever_drains_waits_for_what_is_just_beginning_and_for_nothing_else() {
        let draining = Draining::default();
        let begins = draining.enter().unwrap();
        draining.begin(Duration::from_secs(5));
        assert!(draining.enter().is_err_and(|left| left > Duration::from_secs(4)));
        let mut settled = Box::pin(draining.settled());
        assert!(futures_util::poll!(&mut settled).is_pending());
        drop(begins);
        settled.await;
        let mut undone = Box::pin(draining.undone());
        assert!(futures_util::poll!(&mut undone).is_pending());
        draining.undo();
        undone.await;
    }

    #[tokio::test]
    async fn the_wait_ends_with_the_last_command_or_when_its_time_is_over_and_not_once_it_is_undone()
     {
        let (draining, running) = (Draining::default(), AtomicUsize::new(2));
        let count = || running.load(Ordering::Relaxed);
        let mut over = Box::pin(draining.over(count));
        assert!(futures_util::poll!(&mut over).is_pending(), "nobody drains");
        draining.begin(Duration::from_secs(3600));
        assert!(draining.until().is_some());
        draining.begun().await;
        assert!(futures_util::poll!(&mut over).is_pending(), "two run");
        draining.undo();
        running.store(0, Ordering::Relaxed);
        assert!(futures_util::poll!(&mut over).is_pending(), "it was taken back");
        draining.begin(Duration::from_secs(3600));
        over.await;
        running.store(1, Ordering::Relaxed);
        let (begun, wait) = (Instant::now(), Duration::from_millis(30));
        draining.begin(wait);
        draining.over(count).await;
        assert!(begun.elapsed() >= wait, "one runs");
    }
}
