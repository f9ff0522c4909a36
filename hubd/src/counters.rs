//! What the program has done since it began, for `/metrics`: numbers that only grow, a few that also
//! shrink, and times. They are of the whole process, decide nothing, and a restart begins them anew.

use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::Duration;

/// A number that only grows.
pub struct Counter(AtomicU64);

impl Counter {
    const fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    /// Adds to it.
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    /// What it comes to.
    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// A number of things that there are.
pub struct Gauge(AtomicI64);

impl Gauge {
    const fn new() -> Self {
        Self(AtomicI64::new(0))
    }

    /// So many more.
    pub fn add(&self, n: i64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    /// So many fewer.
    pub fn sub(&self, n: i64) {
        self.0.fetch_sub(n, Ordering::Relaxed);
    }

    /// How many there are.
    #[must_use]
    pub fn get(&self) -> i64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Upper ends of the intervals that times are counted in, in seconds.
pub const TIME_BOUNDS: [f64; 12] =
    [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0, 15.0];

/// How long something took, each time.
pub struct Times {
    /// How many fell into each interval, and those beyond the last.
    counts: [AtomicU64; TIME_BOUNDS.len() + 1],
    nanos: AtomicU64,
}

impl Times {
    const fn new() -> Self {
        Self {
            counts: [const { AtomicU64::new(0) }; TIME_BOUNDS.len() + 1],
            nanos: AtomicU64::new(0),
        }
    }

    /// Counts one.
    pub fn observe(&self, took: Duration) {
        let seconds = took.as_secs_f64();
        let index = TIME_BOUNDS.iter().position(|bound| seconds <= *bound);
        self.counts[index.unwrap_or(TIME_BOUNDS.len())].fetch_add(1, Ordering::Relaxed);
        let nanos = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        self.nanos.fetch_add(nanos, Ordering::Relaxed);
    }

    /// How many took no longer than each of [`TIME_BOUNDS`], how many there were, and their sum in
    /// seconds.
    #[must_use]
    pub fn read(&self) -> (Vec<u64>, u64, f64) {
        let mut all = 0;
        let mut up_to = Vec::with_capacity(TIME_BOUNDS.len());
        for (index, count) in self.counts.iter().enumerate() {
            all += count.load(Ordering::Relaxed);
            if index < TIME_BOUNDS.len() {
                up_to.push(all);
            }
        }
        (up_to, all, Duration::from_nanos(self.nanos.load(Ordering::Relaxed)).as_secs_f64())
    }
}

/// Connections to the HTTP side.
pub static HTTP_CONNECTIONS: Gauge = Gauge::new();
/// Those that were closed because there were too many.
pub static HTTP_TURNED_AWAY: Counter = Counter::new();
/// Requests over HTTP, by the first digit of their answer's status.
pub static HTTP_ANSWERS: [Counter; 5] = [const { Counter::new() }; 5];
/// Bytes of output that nodes have sent.
pub static OUTPUT_BYTES: Counter = Counter::new();
/// Bytes of standard input that callers have sent.
pub static INPUT_BYTES: Counter = Counter::new();
/// Commands that got a verdict, by what they became (`TaskEndState`): finished, failed, cancelled.
pub static TASKS_ENDED: [Counter; 3] = [const { Counter::new() }; 3];
/// Commands that were accepted.
pub static TASKS_ACCEPTED: Counter = Counter::new();
/// Sessions of nodes that began.
pub static SESSIONS_BEGUN: Counter = Counter::new();
/// Errors of the hub's own, each of which stands in the log with its id.
pub static INTERNAL_ERRORS: Counter = Counter::new();
/// Commits of members.
pub static COMMITS: Counter = Counter::new();
/// Changes of paths in them that were rejected, most of them for somebody else's change before them.
pub static CHANGES_REJECTED: Counter = Counter::new();
/// Bytes of packs that came from members.
pub static PACK_BYTES_IN: Counter = Counter::new();
/// Bytes of packs that went to members.
pub static PACK_BYTES_OUT: Counter = Counter::new();
/// How long changes of the databases took, from being asked for to being durable.
pub static STORE_WRITES: Times = Times::new();
/// How long reading from the databases took.
pub static STORE_READS: Times = Times::new();

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_fall_into_the_interval_that_holds_them() {
        let times = Times::new();
        for ms in [0, 1, 20, 60_000] {
            times.observe(Duration::from_millis(ms));
        }
        let (up_to, all, sum) = times.read();
        assert_eq!(up_to, [1, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3]);
        assert_eq!((all, (sum * 1000.0).round()), (4, 60_021.0));
    }
}
