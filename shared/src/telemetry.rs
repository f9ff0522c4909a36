//! Logs: one line for each change of state, on standard error.

use std::io::IsTerminal as _;

use tracing_subscriber::layer::SubscriberExt as _;
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

/// Starts logging to standard error. `filter` is used unless `CORTEX_LOG` is set, in the syntax of
/// `tracing_subscriber::EnvFilter` (such as `info` or `cortex_hubd=debug`).
///
/// Calling it again starts nothing, and returns a handle that changes nothing.
///
/// # Errors
/// If the filter cannot be used.
pub fn start_logging(filter: &str, format: LogFormat) -> Result<Logging, BadFilter> {
    let (filter, handle) = reload::Layer::new(wanted(filter)?);
    let lines = fmt::layer()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none());
    let base = tracing_subscriber::registry().with(filter);
    // A second start fails because logging runs already: that is the wanted state.
    match format {
        LogFormat::Text => base.with(lines).try_init().ok(),
        LogFormat::Json => base.with(lines.json()).try_init().ok(),
    };
    Ok(Logging(handle))
}

impl Logging {
    /// Logs by another filter from now on; `CORTEX_LOG` goes before it, as at the start.
    ///
    /// # Errors
    /// If the filter cannot be used; the old one stays.
    pub fn change(&self, filter: &str) -> Result<(), BadFilter> {
        let filter = wanted(filter)?;
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

fn wanted(filter: &str) -> Result<EnvFilter, BadFilter> {
    match std::env::var("CORTEX_LOG") {
        Ok(text) => parse(&text),
        Err(_) => parse(filter),
    }
}

fn parse(filter: &str) -> Result<EnvFilter, BadFilter> {
    EnvFilter::try_new(filter).map_err(|error| BadFilter(format!("{filter:?}: {error}")))
}
