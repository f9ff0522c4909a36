//! When everything is looked at, beside what hints ask for.

use std::time::Duration;

use tokio::time::Instant;

/// Everything is looked at this often, whatever the hints say.
const FULL_SCAN: Duration = Duration::from_secs(600);
/// Bounds of the same where not every directory can be watched, and how many times longer than the
/// look itself the pause is: looking must not become all there is.
const POLL: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(60));
const POLL_SHARE: u32 = 20;

/// The next look at everything.
#[derive(Debug)]
pub(super) struct Looks {
    next: Instant,
    poll: Duration,
}

impl Looks {
    pub(super) fn new(now: Instant) -> Self {
        Self { next: now + FULL_SCAN, poll: POLL.0 }
    }

    /// When it is due.
    pub(super) fn next(&self) -> Instant {
        self.next
    }

    /// Everything has been looked at, which took until now. If nothing was watched anew, that is still to
    /// be done when it was due.
    pub(super) fn done(&mut self, begun: Instant, now: Instant, watched_anew: bool) {
        self.poll = ((now - begun) * POLL_SHARE).clamp(POLL.0, POLL.1);
        if watched_anew {
            self.next = now + FULL_SCAN;
        }
    }

    /// Takes over whether the kernel tells of changes everywhere; if not, they are looked for soon,
    /// whatever was planned while it still did. The pause between two looks is returned then.
    pub(super) fn watched(&mut self, limited: bool, now: Instant) -> Option<Duration> {
        if !limited {
            return None;
        }
        self.next = self.next.min(now + self.poll);
        Some(self.poll)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_watches_run_out_everything_is_looked_at_soon_until_they_are_back() {
        let now = Instant::now();
        let mut looks = Looks::new(now);
        assert_eq!(looks.watched(false, now), None);
        assert_eq!(looks.next(), now + FULL_SCAN);
        // Met by a look at one directory, minutes before the next look at everything.
        assert_eq!(looks.watched(true, now), Some(POLL.0));
        assert_eq!(looks.next(), now + POLL.0);
        // It does not get later because there are hints meanwhile.
        let later = now + Duration::from_secs(3);
        looks.watched(true, later);
        assert_eq!(looks.next(), now + POLL.0);
        // A look that takes a second is not repeated every five.
        let begun = later;
        let ended = begun + Duration::from_secs(1);
        looks.done(begun, ended, true);
        assert_eq!(looks.watched(true, ended), Some(Duration::from_secs(20)));
        assert_eq!(looks.next(), ended + Duration::from_secs(20));
        looks.done(ended, ended + POLL.1, true);
        assert_eq!(looks.watched(true, ended + POLL.1), Some(POLL.1));
        looks.done(ended, ended, true);
        assert_eq!(looks.watched(false, ended), None);
        assert_eq!(looks.next(), ended + FULL_SCAN, "watches are back");
        // Where it is done often on somebody's word, directories are still watched anew from time to time.
        looks.done(later, ended + FULL_SCAN / 2, false);
        assert_eq!(looks.next(), ended + FULL_SCAN);
    }
}
