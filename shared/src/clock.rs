//! The wall clock, as it stands in records and messages.

/// Milliseconds since the Unix epoch, now. For records and for people; never to measure a duration.
#[must_use]
pub fn unix_ms() -> i64 {
    jiff::Timestamp::now().as_millisecond()
}
