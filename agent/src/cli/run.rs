//! `run`: the node's daemon.

use clap::{Args, ValueEnum};
use cortex_shared::telemetry::{LogFormat, log_filter, start_logging};

use super::Global;
use super::error::{CliError, Exit};
use crate::daemon::{self, DEFAULT_LOG};

/// Keep this node in its mesh: the daemon
#[derive(Debug, Args)]
#[command(after_help = "\
Dials the hub and stays connected, runs commands that operators send, and keeps workspaces equal.
Listens on no network port. Logs to standard error; CORTEX_LOG=debug says more. SIGTERM or SIGINT
ends it in order, within 10 seconds. SIGUSR1 ends it as soon as no command runs. SIGHUP reads `log` in
agent.json again and renews the certificate.")]
pub(crate) struct RunArgs {
    /// How log lines look
    #[arg(long, value_enum, default_value_t)]
    log_format: LogShape,
}

#[derive(Clone, Copy, Debug, Default, ValueEnum)]
enum LogShape {
    /// For people
    #[default]
    Text,
    /// One JSON object a line
    Json,
}

pub(crate) async fn run(global: &Global, args: RunArgs) -> Result<(), CliError> {
    let logging = start_logging(
        &log_filter(DEFAULT_LOG),
        match args.log_format {
            LogShape::Text => LogFormat::Text,
            LogShape::Json => LogFormat::Json,
        },
    )
    .map_err(|error| {
        CliError::new(Exit::Usage, "cannot start logging").because(error).hint("see CORTEX_LOG")
    })?;
    let state = global.state()?;
    daemon::run(state, &logging).await.map_err(|error| match error {
        daemon::DaemonError::Config(error) => error.into(),
        daemon::DaemonError::Identity(error) => error.into(),
        daemon::DaemonError::AlreadyRunning { .. } => {
            CliError::new(Exit::Conflict, error.to_string())
                .hint("`cortex-agent status` shows it; give --state DIR for a second agent")
        }
        other => CliError::new(Exit::Failed, other.to_string()).because(other),
    })
}
