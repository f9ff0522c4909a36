//! Times, and what they come to.

use std::time::Duration;

use serde_json::{Value, json};

/// Times that were measured.
#[derive(Clone, Debug, Default)]
pub(super) struct Times(Vec<Duration>);

impl Times {
    pub(super) fn add(&mut self, time: Duration) {
        self.0.push(time);
    }

    pub(super) fn join(&mut self, other: Self) {
        self.0.extend(other.0);
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// The time that this share of all (0 to 100 per cent) does not exceed; nothing without times.
    pub(super) fn percentile(&self, percent: usize) -> Option<Duration> {
        let mut sorted = self.0.clone();
        sorted.sort_unstable();
        // The nearest rank: the smallest time that at least so many do not exceed.
        let rank = (sorted.len() * percent).div_ceil(100).max(1);
        sorted.get(rank - 1).copied()
    }

    /// Number, middle, near-worst and worst, in milliseconds.
    pub(super) fn summary(&self) -> Value {
        let ms = |percent| self.percentile(percent).map(millis);
        json!({ "count": self.len(), "p50_ms": ms(50), "p99_ms": ms(99), "max_ms": ms(100) })
    }
}

/// A time in milliseconds, with three decimals at most.
pub(super) fn millis(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e6).round() / 1e3
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_times_that_were_measured() {
        let mut times = Times::default();
        assert_eq!(times.percentile(99), None);
        for ms in (1..=200).rev() {
            times.add(Duration::from_millis(ms));
        }
        for (percent, ms) in [(50, 100), (99, 198), (100, 200), (0, 1)] {
            assert_eq!(times.percentile(percent), Some(Duration::from_millis(ms)), "{percent}");
        }
        assert_eq!(millis(Duration::from_micros(1234)), 1.234);
    }
}
