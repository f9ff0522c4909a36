//! When the hub hears how the workspaces of this node are doing.
//!
//! While something is under way, once a second: that is for people who look on. That it has come to rest is
//! what programs wait for, and is said at once. Nothing here survives the session; the next one begins
//! with a report.

use std::time::Duration;

use cortex_proto::v1;
use tokio::sync::watch;
use tokio::time::Instant;

use super::workspaces::Workspaces;

/// Shortest time between two reports while something is under way.
const UNDER_WAY: Duration = Duration::from_secs(1);
/// And before one that says that nothing is: a tree in which files are saved one after the other comes to
/// rest often.
const AT_REST: Duration = Duration::from_millis(100);
/// How often it is looked whether it has come to rest.
const LOOK: Duration = Duration::from_millis(20);

/// Reports for the hub.
pub(super) struct Reports {
    workspaces: Workspaces,
    changes: watch::Receiver<u64>,
    /// There is something to say.
    due: bool,
    sent: Option<Instant>,
}

impl Reports {
    /// The first report is due at once.
    pub(super) fn new(workspaces: Workspaces) -> Self {
        let changes = workspaces.changes();
        Self { workspaces, changes, due: true, sent: None }
    }

    /// The next report. Dropping the future loses nothing.
    pub(super) async fn next(&mut self) -> v1::SyncReport {
        if !self.due {
            if self.changes.changed().await.is_err() {
                // The sender lives as long as `workspaces`, which is held here.
                std::future::pending::<()>().await;
            }
            self.due = true;
        }
        while !is_time(self.sent.map(|sent| sent.elapsed()), self.workspaces.are_at_rest()) {
            tokio::time::sleep(LOOK).await;
        }
        // What changes from here on is in the next one.
        self.changes.mark_unchanged();
        (self.due, self.sent) = (false, Some(Instant::now()));
        v1::SyncReport { workspaces: self.workspaces.statuses() }
    }
}

/// Whether what there is to say may be said, so long after the last report.
fn is_time(since: Option<Duration>, at_rest: bool) -> bool {
    since.is_none_or(|since| since >= if at_rest { AT_REST } else { UNDER_WAY })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rest_is_told_soon_and_what_is_under_way_once_a_second() {
        let ms = Duration::from_millis;
        for (since, at_rest, time) in [
            (None, false, true),
            (Some(ms(99)), true, false),
            (Some(ms(100)), true, true),
            (Some(ms(999)), false, false),
            (Some(ms(1000)), false, true),
        ] {
            assert_eq!(is_time(since, at_rest), time, "{since:?} {at_rest}");
        }
    }
}
