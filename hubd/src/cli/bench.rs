//! `bench`: emulated nodes measure a hub of their own.

use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Subcommand};
use cortex_shared::telemetry::{LogFormat, start_logging};

use super::output::{self, Format};
use super::parse_duration;
use super::serve::raise_open_files;
use crate::bench::join::{JoinBench, Trouble};

#[derive(Subcommand)]
pub(super) enum BenchCommand {
    /// Let many nodes join at once while the store stalls, and see what connected nodes notice of it
    Join(JoinArgs),
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
    let BenchCommand::Join(args) = command;
    start_logging("error", LogFormat::Text)?;
    raise_open_files();
    let bench = JoinBench {
        joins: args.joins,
        connected: args.connected,
        stall: args.stall,
        trouble: args.trouble,
        heartbeat: args.heartbeat,
    };
    let report = bench.run().await?;
    output::show(args.format, &report.document(), &report.text());
    Ok(if report.is_complete() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
