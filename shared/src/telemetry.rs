//! Logs: one line for each change of state, on standard error.
//!
//! A warning or an error that repeats itself is logged [`LINES`] times within [`WITHIN`] from each place of
//! the program; the others are counted, and the count is logged by [`tell_left_out`], which a daemon calls
//! now and then. A line that bears an `error_id`, which somebody was told, is always logged.

use std::collections::HashMap;
use std::io::IsTerminal as _;
use std::sync::{LazyLock, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tracing::callsite::Identifier;
use tracing::{Event, Level, Metadata};
use tracing_subscriber::Layer as _;
use tracing_subscriber::layer::{Context, Filter, SubscriberExt as _};
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Registry, fmt, reload};

/// How log lines look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// Logging that runs; what it logs can be changed.
#[derive(Clone, Debug)]
pub struct Logging(reload::Handle<EnvFilter, Registry>);

/// A filter that cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("not a log filter: {0}")]
pub struct BadFilter(String);

/// Lines that one place of the program may log as warnings or errors within [`WITHIN`].
pub const LINES: u32 = 20;
/// See [`LINES`].
pub const WITHIN: Duration = Duration::from_secs(10);

/// Which lines were left out. The places are those of the program, so there are only so many.
static PLACES: LazyLock<Mutex<HashMap<Identifier, Place>>> = LazyLock::new(Mutex::default);

/// A place of the program that logs.
struct Place {
    metadata: &'static Metadata<'static>,
    lines: Lines,
}

/// The lines of a place.
struct Lines {
    since: Instant,
    logged: u32,
    left_out: u64,
}

impl Lines {
    fn new(now: Instant) -> Self {
        Self { since: now, logged: 0, left_out: 0 }
    }

    /// Whether one more is logged.
    fn admit(&mut self, now: Instant) -> bool {
        if now >= self.since + WITHIN {
            (self.since, self.logged) = (now, 0);
        }
        let admitted = self.logged < LINES;
        if admitted {
            self.logged += 1;
        } else {
            self.left_out += 1;
        }
        admitted
    }
}

/// Leaves out what repeats itself.
struct Repeats;

impl<S> Filter<S> for Repeats {
    fn enabled(&self, _: &Metadata<'_>, _: &Context<'_, S>) -> bool {
        true
    }

    fn event_enabled(&self, event: &Event<'_>, _: &Context<'_, S>) -> bool {
        let metadata = event.metadata();
        if *metadata.level() > Level::WARN || metadata.fields().field("error_id").is_some() {
            return true;
        }
        let now = Instant::now();
        let mut places = PLACES.lock().unwrap_or_else(PoisonError::into_inner);
        let fresh = || Place { metadata, lines: Lines::new(now) };
        places.entry(metadata.callsite()).or_insert_with(fresh).lines.admit(now)
    }
}

/// Logs how many lines of which places were left out since the last time. How many there were.
pub fn tell_left_out() -> u64 {
    let left_out: Vec<_> = {
        let mut places = PLACES.lock().unwrap_or_else(PoisonError::into_inner);
        let with_any = places.values_mut().filter(|place| place.lines.left_out > 0);
        with_any.map(|place| (place.metadata, std::mem::take(&mut place.lines.left_out))).collect()
    };
    for (metadata, count) in &left_out {
        let (place, line) = (metadata.file().unwrap_or_default(), metadata.line());
        tracing::warn!(count, place, line, "lines like the last one of this place were left out");
    }
    left_out.iter().map(|(_, count)| count).sum()
}

/// What `CORTEX_LOG` says is to be logged, or else `otherwise`.
#[must_use]
pub fn log_filter(otherwise: &str) -> String {
    std::env::var("CORTEX_LOG").unwrap_or_else(|_| otherwise.to_owned())
}

/// Starts logging to standard error. `filter` is in the syntax of `tracing_subscriber::EnvFilter` (such as
/// `info` or `cortex_hubd=debug`); whether `CORTEX_LOG` goes before it is the caller's to say, by
/// [`log_filter`].
///
/// Calling it again starts nothing, and returns a handle that changes nothing.
///
/// # Errors
/// If the filter cannot be used.
pub fn start_logging(filter: &str, format: LogFormat) -> Result<Logging, BadFilter> {
    let (filter, handle) = reload::Layer::new(parse(filter)?);
    let lines = fmt::layer()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none());
    let base = tracing_subscriber::registry().with(filter);
    // A second start fails because logging runs already: that is the wanted state.
    match format {
        LogFormat::Text => base.with(lines.with_filter(Repeats)).try_init().ok(),
        LogFormat::Json => base.with(lines.json().with_filter(Repeats)).try_init().ok(),
    };
    Ok(Logging(handle))
}

impl Logging {
    /// Logs by another filter from now on.
    ///
    /// # Errors
    /// If the filter cannot be used; the old one stays.
    pub fn change(&self, filter: &str) -> Result<(), BadFilter> {
        let filter = parse(filter)?;
        self.0.reload(filter).map_err(|error| BadFilter(error.to_string()))
    }
}

/// Whether a filter can be used.
///
/// # Errors
/// Why not.
pub fn check_filter(filter: &str) -> Result<(), BadFilter> {
    parse(filter).map(|_| ())
}

fn parse(filter: &str) -> Result<EnvFilter, BadFilter> {
    EnvFilter::try_new(filter).map_err(|error| BadFilter(format!("{filter:?}: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_logs_so_many_lines_within_a_time_and_counts_the_others() {
        let now = Instant::now();
        let mut lines = Lines::new(now);
        let logged = (0..100).filter(|_| lines.admit(now)).count();
        assert_eq!((logged, lines.left_out), (LINES as usize, 100 - u64::from(LINES)));
        assert!(!lines.admit(now + WITHIN / 2));
        assert!(lines.admit(now + WITHIN));
        assert_eq!(lines.left_out, 101 - u64::from(LINES), "to be told");
    }
}
