//! `bench`: emulated nodes measure a hub of their own.

use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Subcommand};
use cortex_shared::telemetry::{LogFormat, log_filter, start_logging};

use super::output::{self, Format};
use super::parse_duration;
use super::serve::raise_open_files;
use crate::bench::join::{JoinBench, Trouble};
use crate::bench::load::Load;

#[derive(Subcommand)]
pub(super) enum BenchCommand {
    /// Let many nodes join at once while the store stalls, and see what connected nodes notice of it
    Join(JoinArgs),
    /// Connect many nodes and hold them: what each costs the hub in memory
    #[command(after_help = LOAD)]
    Nodes(NodesArgs),
    /// Run commands at a fixed rate, whatever became of those before: how long they take
    #[command(after_help = LOAD)]
    Exec(ExecArgs),
    /// Run one command on all nodes at once
    #[command(after_help = LOAD)]
    Fanout(FanoutArgs),
    /// Run commands that write without end, one of which nobody reads, and short ones beside them
    #[command(after_help = LOAD)]
    Flood(FloodArgs),
    /// Kill the hub under many connected nodes, and wait until all are back
    #[command(after_help = LOAD)]
    Reconnect(ReconnectArgs),
}

const LOAD: &str = "\
Runs a hub of its own as another process, in a temporary directory on loopback, and emulated nodes in this
one that speak the real protocol over real TLS, each with a key and a connection of its own. They execute
nothing: a command ends at once, or floods. The exit code is 1 if a session or a command was lost.";

/// Nodes that one machine has the ports and descriptors for.
const NODES: std::ops::RangeInclusive<i64> = 1..=16_000;

#[derive(Args)]
pub(super) struct NodesArgs {
    /// Nodes
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(NODES))]
    count: u32,
    /// How long they stay
    #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = parse_duration)]
    duration: Duration,
    #[command(flatten)]
    format: Format,
}

#[derive(Args)]
pub(super) struct ExecArgs {
    /// Nodes that take turns
    #[arg(long, value_name = "N", default_value_t = 50, value_parser = clap::value_parser!(u32).range(NODES))]
    count: u32,
    /// Commands a second
    #[arg(long, value_name = "N", default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    rate: u32,
    /// For how long
    #[arg(long, value_name = "DURATION", default_value = "10s", value_parser = parse_duration)]
    duration: Duration,
    #[command(flatten)]
    format: Format,
}

#[derive(Args)]
pub(super) struct FanoutArgs {
    /// Nodes; one connection of an operator carries at most 4096 commands
    #[arg(long, value_name = "N", default_value_t = 300, value_parser = clap::value_parser!(u32).range(1..=4000))]
    count: u32,
    /// How often
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// Nodes beside them that go silent before as many rounds again
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u32).range(..=96))]
    black_holed: u32,
    #[command(flatten)]
    format: Format,
}

#[derive(Args)]
pub(super) struct FloodArgs {
    /// Commands that write without end
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=1000))]
    count: u32,
    /// For how long
    #[arg(long, value_name = "DURATION", default_value = "10s", value_parser = parse_duration)]
    duration: Duration,
    #[command(flatten)]
    format: Format,
}

#[derive(Args)]
pub(super) struct ReconnectArgs {
    /// Nodes
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(NODES))]
    count: u32,
    #[command(flatten)]
    format: Format,
}

#[derive(Args)]
#[command(after_help = "\
Runs a hub of its own in a temporary directory on loopback, with emulated nodes in the same process that
speak the real protocol over real TLS, each with a key of its own. All joins are offered at once, when
the store's trouble begins; at most 512 of them are connecting at a time. A join that is told to come back
does so as cortex-agent join would. The exit code is 1 if a join was lost or doubled, or a connected node
lost its session.")]
pub(super) struct JoinArgs {
    /// Nodes that join at once
    #[arg(long, value_name = "N", default_value_t = 2000, value_parser = clap::value_parser!(u32).range(1..=8000))]
    joins: u32,
    /// Nodes that are connected meanwhile
    #[arg(long, value_name = "N", default_value_t = 200, value_parser = clap::value_parser!(u32).range(..=2000))]
    connected: u32,
    /// How long the store is in trouble
    #[arg(long, value_name = "DURATION", default_value = "5s", value_parser = parse_duration)]
    stall: Duration,
    /// What the store does: stall, answers (it works, and does not say so), fail, or slow
    #[arg(long, value_name = "KIND", default_value_t)]
    trouble: Trouble,
    /// Heartbeat interval of the connected nodes
    #[arg(long, value_name = "DURATION", default_value = "1s", value_parser = parse_duration)]
    heartbeat: Duration,
    #[command(flatten)]
    format: Format,
}

pub(super) async fn bench(command: BenchCommand) -> anyhow::Result<ExitCode> {
    start_logging(&log_filter("error"), LogFormat::Text)?;
    raise_open_files();
    let (load, format) = match command {
        BenchCommand::Join(args) => return join(args).await,
        BenchCommand::Nodes(NodesArgs { count, duration, format }) => {
            (Load::Nodes { count, hold: duration }, format)
        }
        BenchCommand::Exec(ExecArgs { count, rate, duration, format }) => {
            (Load::Exec { count, rate, duration }, format)
        }
        BenchCommand::Fanout(FanoutArgs { count, rounds, black_holed, format }) => {
            (Load::Fanout { count, rounds, black_holed }, format)
        }
        BenchCommand::Flood(FloodArgs { count, duration, format }) => {
            (Load::Flood { count, duration }, format)
        }
        BenchCommand::Reconnect(ReconnectArgs { count, format }) => {
            (Load::Reconnect { count }, format)
        }
    };
    let report = load.run().await?;
    output::show(format, report.document(), &report.text());
    Ok(code(report.is_complete()))
}

fn code(complete: bool) -> ExitCode {
    if complete { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

async fn join(args: JoinArgs) -> anyhow::Result<ExitCode> {
    let bench = JoinBench {
        joins: args.joins,
        connected: args.connected,
        stall: args.stall,
        trouble: args.trouble,
        heartbeat: args.heartbeat,
    };
    let report = bench.run().await?;
    output::show(args.format, &report.document(), &report.text());
    Ok(code(report.is_complete()))
}
