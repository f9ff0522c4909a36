//! Dying at a chosen point, to prove that nothing acknowledged is lost there.
//!
//! A process that is started with `CORTEX_CRASH_AT=NAME`, or `NAME:N`, kills itself with SIGKILL when it
//! passes the point of that name, for the N-th time. Builds without debug assertions, which releases are,
//! carry none of this.

/// The variable that names the point.
pub const CRASH_AT: &str = "CORTEX_CRASH_AT";

/// Kills the process here if it was asked to.
#[cfg(debug_assertions)]
pub fn crash_point(name: &str) {
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicU64, Ordering};

    static WANTED: OnceLock<Option<(String, AtomicU64)>> = OnceLock::new();
    let wanted = WANTED.get_or_init(|| {
        let wanted = std::env::var(CRASH_AT).ok()?;
        let (name, times) = wanted.split_once(':').unwrap_or((&wanted, "1"));
        Some((name.to_owned(), AtomicU64::new(times.parse().unwrap_or(1))))
    });
    let Some((wanted, left)) = wanted else { return };
    if wanted == name && left.fetch_sub(1, Ordering::Relaxed) == 1 {
        let this = rustix::process::getpid();
        // Nothing may be done in order after this, so a failure has no other way than the hard end.
        rustix::process::kill_process(this, rustix::process::Signal::KILL).ok();
        std::process::abort();
    }
}

/// Does nothing in this build.
#[cfg(not(debug_assertions))]
#[inline(always)]
pub fn crash_point(_name: &str) {}
