//! Logs: one line for each change of state, on standard error.

use std::io::IsTerminal as _;

/// How log lines look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// Starts logging to standard error. `default_filter` is used unless `CORTEX_LOG` is set, in the
/// syntax of `tracing_subscriber::EnvFilter` (such as `info` or `cortex_hubd=debug`).
///
/// Calling it again changes nothing.
pub fn start_logging(default_filter: &str, format: LogFormat) {
    let filter = std::env::var("CORTEX_LOG")
        .ok()
        .and_then(|text| tracing_subscriber::EnvFilter::try_new(text).ok())
        .unwrap_or_else(|| tracing_subscriber::EnvFilter::new(default_filter));
    let base = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none());
    // A second start fails because logging runs already: that is the wanted state.
    match format {
        LogFormat::Text => base.try_init().ok(),
        LogFormat::Json => base.json().try_init().ok(),
    };
}
