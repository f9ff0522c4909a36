//! The command line of `cortex-hubd`.

mod admin;
mod authority;
mod bench;
mod ca;
mod configuration;
mod database;
mod drain;
mod output;
mod serve;
mod service;
mod worker;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use cortex_shared::policy::Role;

use crate::config::HubConfig;
use authority::{AuditCommand, NodeCommand, PolicyCommand};
use output::Format;
use worker::WorkerCommand;

/// The hub of a cortex mesh: admits nodes, relays commands, orders and stores workspace changes.
#[derive(Parser)]
#[command(
    name = "cortex-hubd",
    version,
    after_help = "\
Examples:
  cortex-hubd serve                       run the hub on 127.0.0.1:7443, and its web page on :7480
  cortex-hubd invite create --uses 5      print the line that admits five nodes
  cortex-hubd operator create ann --role admin

Logs go to standard error; CORTEX_LOG sets what is logged (such as info or cortex_hubd=debug)."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Args)]
struct DataArg {
    /// Where the hub keeps everything [default: /var/lib/cortex-hubd for root, the user's data
    /// directory otherwise]
    #[arg(long, value_name = "DIR", env = "CORTEX_HUB_DATA")]
    data: Option<PathBuf>,
}

impl DataArg {
    fn config(&self) -> HubConfig {
        HubConfig::new(self.data.clone().unwrap_or_else(HubConfig::default_data))
    }
}

#[derive(Subcommand)]
enum Command {
    /// Run the hub until SIGTERM or SIGINT
    #[command(after_help = "\
SIGTERM and SIGINT stop it in order; SIGHUP reads the configuration again, changes what is logged, and
makes the hub a new certificate.
Each setting can also be given as an environment variable, CORTEX_HUB_ and its name in capitals, or in
a file (--config). A flag goes before a variable, and a variable before the file; CORTEX_LOG goes
before CORTEX_HUB_LOG.")]
    Serve(Box<serve::ServeArgs>),
    /// Say whether a configuration can be used, and what it comes to
    Check(Box<configuration::Configuration>),
    /// The configuration file
    Config {
        #[command(subcommand)]
        command: ConfigCommand,
    },
    /// Make the certificate authority and the store, and print the pin
    Init(DataArg),
    /// Show what the running hub does
    Status {
        #[command(flatten)]
        data: DataArg,
        #[command(flatten)]
        format: Format,
    },
    /// Print a link that logs a browser in as administrator, once and within five minutes
    LoginLink {
        #[command(flatten)]
        data: DataArg,
        #[command(flatten)]
        format: Format,
    },
    /// Stop the running hub once its commands have ended, for the next one
    #[command(after_help = "\
It takes no new commands from now on: their callers are told to ask again in a moment, and cortex-agent does
so by itself. After --wait, what still runs goes on and is handed to the next hub, with every byte. Where
systemd runs the hub, it starts the next one at once: this is how an upgrade is taken into use.

Example:
  cortex-hubd drain --wait 10m")]
    Drain(drain::DrainArgs),
    /// The mesh's certificate authority
    Ca {
        #[command(subcommand)]
        command: CaCommand,
    },
    /// The hub's background work
    Worker {
        #[command(subcommand)]
        command: WorkerCommand,
    },
    /// Invites for nodes
    Invite {
        #[command(subcommand)]
        command: InviteCommand,
    },
    /// Operators: people and programs that command nodes
    Operator {
        #[command(subcommand)]
        command: OperatorCommand,
    },
    /// Nodes
    Node {
        #[command(subcommand)]
        command: NodeCommand,
    },
    /// What the hub allows a node's commands
    Policy {
        #[command(subcommand)]
        command: PolicyCommand,
    },
    /// Who did what
    Audit {
        #[command(subcommand)]
        command: AuditCommand,
    },
    /// All that the hub remembers: back it up, put it back, check it
    Db {
        #[command(subcommand)]
        command: database::DbCommand,
    },
    /// Run the hub as a systemd service
    Service {
        #[command(subcommand)]
        command: service::ServiceCommand,
    },
    /// Measure a hub of its own with emulated nodes
    Bench {
        #[command(subcommand)]
        command: bench::BenchCommand,
    },
}

#[derive(Subcommand)]
enum ConfigCommand {
    /// Print a file with every setting, each explained
    Default,
}

#[derive(Subcommand)]
enum CaCommand {
    /// Print the pin of the authority's key, as `join --ca` takes it
    Pin(DataArg),
    /// Show how far the replacement of the authority is, and which nodes have followed
    #[command(after_help = ca::OPERATORS)]
    Status {
        #[command(flatten)]
        data: DataArg,
        #[command(flatten)]
        format: Format,
    },
    /// Replace the authority, step by step
    #[command(after_help = "\
Steps, each of which nodes and operators survive without being touched:
  prepare     make the next authority; all who connect or renew learn of it
  issue       sign nodes and operators with it; nodes move as they connect or renew, at half of their
              certificate's life at the latest
  trust-only  prove the hub by it, too; the old one signs nothing any more
  retire      trust the old one no longer, and delete its key
The last two are refused while nodes have not moved. No restart is needed. Operators follow with any
command they run between `issue` and `retire`, but cannot be counted: see `ca status --help`.")]
    Rotate {
        /// prepare, issue, trust-only or retire
        #[arg(value_name = "STAGE", value_parser = ["prepare", "issue", "trust-only", "retire"])]
        stage: String,
        /// Take the step even though some nodes have not moved; they may have to join again
        #[arg(long)]
        force: bool,
        #[command(flatten)]
        data: DataArg,
        #[command(flatten)]
        format: Format,
    },
}

#[derive(Subcommand)]
enum InviteCommand {
    /// Make an invite and print the line to paste on a node
    Create {
        /// How many nodes it admits
        #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
        uses: u32,
        /// How long it is valid, such as 30m, 12h or 7d
        #[arg(long, default_value = "1h", value_parser = parse_duration)]
        ttl: Duration,
        /// Label its nodes get; may be repeated
        #[arg(long = "label", value_name = "KEY=VALUE", value_parser = parse_label)]
        labels: Vec<(String, String)>,
        /// Names it allows, with * and ?
        #[arg(long, value_name = "PATTERN", default_value = "")]
        name_pattern: String,
        /// Workspace its nodes become members of; may be repeated
        #[arg(long = "workspace", value_name = "W")]
        workspaces: Vec<String>,
        /// Source addresses it is good from, such as 10.0.0.0/8; may be repeated
        #[arg(long, value_name = "CIDR")]
        from: Vec<String>,
        /// Who the nodes belong to; shown with them
        #[arg(long, default_value = "")]
        owner: String,
        #[command(flatten)]
        data: DataArg,
        #[command(flatten)]
        format: Format,
    },
    /// List invites, newest first
    List {
        #[command(flatten)]
        data: DataArg,
        #[command(flatten)]
        format: Format,
    },
    /// Make an invite unusable; nodes it admitted stay
    Revoke {
        /// Its id, the 8 characters after `cxi_`
        id: String,
        #[command(flatten)]
        data: DataArg,
    },
}

#[derive(Subcommand)]
enum OperatorCommand {
    /// Make an operator's invite and print the line to log in with
    Create {
        /// The operator's name
        name: String,
        /// What it may do: viewer, operator, admin or agent-token
        #[arg(long)]
        role: Role,
        /// How long the invite is valid, such as 30m, 12h or 7d
        #[arg(long, default_value = "1h", value_parser = parse_duration)]
        ttl: Duration,
        /// Label that a node must have for this operator to see or command it; may be repeated
        #[arg(long, value_name = "KEY=VALUE", value_parser = parse_label)]
        scope: Vec<(String, String)>,
        #[command(flatten)]
        data: DataArg,
        #[command(flatten)]
        format: Format,
    },
    /// List the operators that have logged in
    List {
        #[command(flatten)]
        data: DataArg,
        #[command(flatten)]
        format: Format,
    },
    /// End an operator's calls and commands at once, and refuse it until it is created anew
    Revoke {
        /// Its name
        name: String,
        #[command(flatten)]
        data: DataArg,
    },
}

/// Runs the program.
pub(crate) fn run() -> ExitCode {
    let cli = Cli::parse();
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            output::complain(&anyhow::Error::new(error).context("cannot start the runtime"));
            return ExitCode::FAILURE;
        }
    };
    let result = runtime.block_on(async {
        match cli.command {
            Command::Bench { command } => return bench::bench(command).await,
            Command::Serve(args) => serve::serve(*args).await,
            Command::Check(configuration) => configuration::check(&configuration),
            Command::Config { command: ConfigCommand::Default } => {
                configuration::print_default();
                Ok(())
            }
            Command::Db { command } => database::db(command).await,
            Command::Service { command } => service::service(command),
            Command::Init(data) => serve::init(&data.config()).await,
            Command::Status { data, format } => admin::status(&data.config(), format).await,
            Command::LoginLink { data, format } => admin::login_link(&data.config(), format).await,
            Command::Drain(args) => drain::drain(args).await,
            Command::Ca { command } => ca::ca(command).await,
            Command::Invite { command } => admin::invite(command).await,
            Command::Operator { command } => admin::operator(command).await,
            Command::Node { command } => authority::node(command).await,
            Command::Policy { command } => authority::policy(command).await,
            Command::Audit { command } => authority::audit(command).await,
            Command::Worker { command } => worker::worker(command).await,
        }
        .map(|()| ExitCode::SUCCESS)
    });
    // Blocking reads of a store that hangs must not keep the process.
    runtime.shutdown_timeout(Duration::from_secs(1));
    match result {
        Ok(code) => code,
        Err(error) => {
            output::complain(&error);
            output::exit_code(&error)
        }
    }
}

/// A duration: a number and one of ms, s, m, h, d.
pub(crate) fn parse_duration(text: &str) -> Result<Duration, String> {
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let number: u64 = text[..digits].parse().map_err(|_| "expected such as 30m, 12h or 7d")?;
    let factor_ms = match &text[digits..] {
        "ms" => 1,
        "s" => 1_000,
        "m" => 60_000,
        "h" => 3_600_000,
        "d" => 86_400_000,
        _ => return Err("expected a unit: ms, s, m, h or d".to_owned()),
    };
    number
        .checked_mul(factor_ms)
        .filter(|ms| *ms > 0)
        .map(Duration::from_millis)
        .ok_or("the duration is zero or too long".to_owned())
}

fn parse_label(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("expected KEY=VALUE")?;
    cortex_shared::labels::check_label(key, value).map_err(|error| error.to_string())?;
    Ok((key.to_owned(), value.to_owned()))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn durations() {
        assert_eq!(parse_duration("90m"), Ok(Duration::from_secs(5400)));
        assert_eq!(parse_duration("7d"), Ok(Duration::from_secs(604_800)));
        for bad in ["", "5", "m", "-1h", "0s", "1w", "99999999999999999999d", "999999999999999999d"]
        {
            assert!(parse_duration(bad).is_err(), "{bad}");
        }
    }
}
