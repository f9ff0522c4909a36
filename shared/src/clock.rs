//! The wall clock, as it stands in records and messages; and moments that may never come.

use tokio::time::Instant;

/// Milliseconds since the Unix epoch, now. For records and for people; never to measure a duration.
#[must_use]
pub fn unix_ms() -> i64 {
    jiff::Timestamp::now().as_millisecond()
}

/// Waits until this moment; for ever if there is none.
pub async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}
