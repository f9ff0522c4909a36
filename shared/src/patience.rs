//! How long a client goes on asking a peer that says "later".

use std::time::{Duration, Instant};

use crate::backoff::Backoff;

/// Longest own delay, where the peer names none.
const OWN_CEILING: Duration = Duration::from_secs(8);

/// Repeats of one question, bounded by time: what the peer asks for is heeded, with a little added so
/// that a crowd turned away at once does not return at once.
#[derive(Debug)]
pub struct Patience {
    until: Instant,
    own: Backoff,
}

impl Patience {
    /// Patience that ends `total` after `now`.
    #[must_use]
    pub fn new(total: Duration, now: Instant) -> Self {
        Self { until: now + total, own: Backoff::new(Duration::from_secs(1), OWN_CEILING) }
    }

    /// How long to wait before the next attempt, if the peer asked for `asked`; `None` if patience
    /// would be over by then, in which case waiting is of no use at all.
    pub fn next_delay(&mut self, asked: Option<Duration>, now: Instant) -> Option<Duration> {
        let own = self.own.next_delay();
        // Never sooner than asked; up to a second later.
        let delay = asked.map_or(own, |asked| asked + own.min(Duration::from_secs(1)));
        (now + delay <= self.until).then_some(delay)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_peer_asks_for_is_heeded_until_patience_ends() {
        let start = Instant::now();
        let mut patience = Patience::new(Duration::from_secs(60), start);
        for seconds in [2, 10, 50] {
            let asked = Duration::from_secs(seconds);
            let delay = patience.next_delay(Some(asked), start).unwrap();
            assert!((asked..=asked + Duration::from_secs(1)).contains(&delay), "{delay:?}");
        }
        assert_eq!(patience.next_delay(Some(Duration::from_secs(600)), start), None);
        assert!(patience.next_delay(None, start).unwrap() <= OWN_CEILING);
        assert_eq!(patience.next_delay(None, start + Duration::from_secs(61)), None);
    }
}
