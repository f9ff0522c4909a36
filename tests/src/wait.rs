//! Waiting for something to become true in the world outside.

use std::thread;
use std::time::{Duration, Instant};

use crate::DEADLINE;

/// Returns once `true_now` says so; asks again every few milliseconds. For what no process
/// announces, such as the arrival of a file.
///
/// # Panics
/// If it is not true before the deadline; `what` says what was waited for.
pub fn until(what: &str, mut true_now: impl FnMut() -> bool) {
    let deadline = Instant::now() + DEADLINE;
    while !true_now() {
        assert!(Instant::now() < deadline, "never happened: {what}");
        thread::park_timeout(Duration::from_millis(5));
    }
}
