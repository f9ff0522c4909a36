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

/// Reports for the hub.
pub(super) struct Reports {
    workspaces: Workspaces,
    changes: watch::Receiver<u64>,
    pace: Pace,
}

impl Reports {
    /// The first report is due at once.
    pub(super) fn new(workspaces: Workspaces) -> Self {
        let changes = workspaces.changes();
        Self { workspaces, changes, pace: Pace { due: true, sent: None } }
    }

    /// The next report. Dropping the future loses nothing.
    pub(super) async fn next(&mut self) -> v1::SyncReport {
        loop {
            let now = Instant::now();
            let moment = self.pace.moment(now, self.workspaces.are_at_rest());
            if moment.is_some_and(|moment| moment <= now) {
                break;
            }
            tokio::select! {
                changed = self.changes.changed() => match changed {
                    Ok(()) => self.pace.due = true,
                    // The sender lives as long as `workspaces`, which is held here.
                    Err(_) => std::future::pending().await,
                },
                () = wait_until(moment) => {}
            }
        }
        // What changes from here on is in the next one.
        self.changes.mark_unchanged();
        self.pace = Pace { due: false, sent: Some(Instant::now()) };
        v1::SyncReport { workspaces: self.workspaces.statuses() }
    }
}

async fn wait_until(moment: Option<Instant>) {
    match moment {
        Some(moment) => tokio::time::sleep_until(moment).await,
        None => std::future::pending().await,
    }
}

/// What was said when, and whether there is something to say.
#[derive(Clone, Copy, Debug)]
struct Pace {
    due: bool,
    sent: Option<Instant>,
}

impl Pace {
    /// When the next report is due, if there is something to say: `now` or earlier for at once.
    fn moment(self, now: Instant, at_rest: bool) -> Option<Instant> {
        let interval = if at_rest { AT_REST } else { UNDER_WAY };
        self.due.then(|| self.sent.map_or(now, |sent| sent + interval))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rest_is_told_soon_and_what_is_under_way_once_a_second() {
        let now = Instant::now();
        let ms = Duration::from_millis;
        for (due, sent, at_rest, moment) in [
            (false, None, true, None),
            (false, Some(now), true, None),
            (true, None, false, Some(now)),
            (true, Some(now), true, Some(now + ms(100))),
            (true, Some(now), false, Some(now + ms(1000))),
        ] {
            let pace = Pace { due, sent };
            assert_eq!(pace.moment(now, at_rest), moment, "{due} {at_rest}");
        }
    }
}
