//! How long to wait before the next attempt.

use std::time::Duration;

use rand::RngExt as _;

/// Exponential backoff with full jitter: each delay is uniform between zero and a bound that
/// doubles up to a ceiling. Spreads a crowd that lost the same hub at the same instant.
#[derive(Debug, Clone)]
pub struct Backoff {
    first: Duration,
    ceiling: Duration,
    bound: Duration,
}

impl Backoff {
    /// Delays bounded by `first`, then twice that, and so on up to `ceiling`.
    #[must_use]
    pub fn new(first: Duration, ceiling: Duration) -> Self {
        Self { first, ceiling, bound: first }
    }

    /// The next delay.
    pub fn next_delay(&mut self) -> Duration {
        self.next_delay_of(rand::rng().random_range(0.0..1.0))
    }

    /// The next delay, where somebody else provides the chance: a number from 0 to 1.
    pub fn next_delay_of(&mut self, chance: f64) -> Duration {
        let bound = self.bound;
        self.bound = (bound * 2).min(self.ceiling);
        bound.mul_f64(chance.clamp(0.0, 1.0))
    }

    /// Starts again from the first bound. To be called after a stable minute, not after a mere
    /// connect: a peer that accepts and drops would otherwise be hammered.
    pub fn reset(&mut self) {
        self.bound = self.first;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_stay_under_a_growing_bound_and_reset() {
        let (first, ceiling) = (Duration::from_millis(100), Duration::from_secs(1));
        let mut backoff = Backoff::new(first, ceiling);
        for bound_ms in [100, 200, 400, 800, 1000, 1000] {
            assert!(backoff.next_delay() <= Duration::from_millis(bound_ms));
        }
        backoff.reset();
        assert!(backoff.next_delay() <= first);
    }
}
