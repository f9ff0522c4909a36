//! `serve`, `init` and `ca pin`.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use clap::Args;
use cortex_shared::telemetry::{LogFormat, start_logging};
use tokio::signal::unix::{SignalKind, signal};

use super::output;
use super::{DataArg, HubConfig, parse_duration};
use crate::config::DataLayout;
use crate::enroll::authorities::read_pins;
use crate::enroll::ca::NODE_CERTIFICATE_LIVES;
use crate::enroll::limits::join_rate;
use crate::hub::{Hub, HubData};

#[derive(Args)]
pub(super) struct ServeArgs {
    #[command(flatten)]
    data: DataArg,
    /// Address and port of the gRPC side; port 0 takes a free one [default: 127.0.0.1:7443]
    #[arg(long, value_name = "ADDR:PORT")]
    grpc: Option<SocketAddr>,
    /// Host name or address that invites tell nodes to dial, if another than --grpc
    #[arg(long, value_name = "HOST")]
    advertise: Option<String>,
    /// How long a node's certificate lives, 10s to 30d; nodes renew it at half of that [default: 24h]
    #[arg(long, value_name = "DURATION", value_parser = parse_certificate_life)]
    node_certificate_life: Option<Duration>,
    /// Joins and logins a second that one address may try, with four times as many at once; 0 for no
    /// limit
    #[arg(long, value_name = "N", default_value_t = 5)]
    join_rate: u32,
    /// How long a node or a caller that was cut off has to come back to its commands, such as 10s; 0s
    /// ends them at once [default: 10s]
    #[arg(long, value_name = "DURATION", value_parser = parse_grace)]
    resume_grace: Option<Duration>,
    /// Output kept of one command, in bytes [default: 16 MiB]
    #[arg(long, value_name = "BYTES", value_parser = clap::value_parser!(u64).range(65_536..))]
    task_output: Option<u64>,
    /// Output kept of all commands together, in bytes [default: 1 GiB]
    #[arg(long, value_name = "BYTES", value_parser = clap::value_parser!(u64).range(1_048_576..))]
    all_output: Option<u64>,
    /// Output kept of each node in its history, in bytes [default: 4 MiB]
    #[arg(long, value_name = "BYTES", value_parser = clap::value_parser!(u64).range(65_536..))]
    history_bytes: Option<u64>,
    /// Pieces of output kept of each node in its history [default: 10000]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(100..))]
    history_pieces: Option<u64>,
    /// What stays free on the disk: no content of workspaces is taken beyond it, in bytes [default: a
    /// hundredth of the disk, 2 GiB at most]
    #[arg(long, value_name = "BYTES")]
    disk_reserve: Option<u64>,
    /// Log as one JSON object a line
    #[arg(long)]
    log_json: bool,
}

fn parse_certificate_life(text: &str) -> Result<Duration, String> {
    let life = parse_duration(text)?;
    NODE_CERTIFICATE_LIVES.contains(&life).then_some(life).ok_or("expected 10s to 30d".to_owned())
}

/// A duration, of which zero is one.
fn parse_grace(text: &str) -> Result<Duration, String> {
    if matches!(text, "0" | "0s") { Ok(Duration::ZERO) } else { super::parse_duration(text) }
}

pub(super) async fn serve(args: ServeArgs) -> anyhow::Result<()> {
    let format = if args.log_json { LogFormat::Json } else { LogFormat::Text };
    start_logging("info", format);
    raise_open_files();
    forbid_core_images();
    let mut config = args.data.config();
    if let Some(address) = args.grpc {
        config.grpc = address;
    }
    config.advertise = args.advertise;
    if let Some(life) = args.node_certificate_life {
        config.node_certificate_life = life;
    }
    config.join_rate = join_rate(args.join_rate);
    config.resume_grace = args.resume_grace.unwrap_or(config.resume_grace);
    config.spool.task_bytes = args.task_output.unwrap_or(config.spool.task_bytes);
    config.spool.total_bytes = args.all_output.unwrap_or(config.spool.total_bytes);
    config.history.bytes = args.history_bytes.unwrap_or(config.history.bytes);
    config.history.segments = args.history_pieces.unwrap_or(config.history.segments);
    config.content.reserve_bytes = args.disk_reserve;
    // Before anything is promised to anybody: a signal from here on leads to an orderly stop.
    let mut terminate = signal(SignalKind::terminate()).context("cannot handle SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot handle SIGINT")?;
    let hub = Hub::start(config).await?;
    output::print(&format!("grpc listening on {}", hub.address()));
    notify_service_manager(sd_notify::NotifyState::Ready);
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    notify_service_manager(sd_notify::NotifyState::Stopping);
    hub.shutdown().await;
    Ok(())
}

/// Each connection takes a descriptor, and the usual soft limit of 1,024 is for programs that use
/// `select`. The hard limit is the administrator's word, and is kept.
pub(super) fn raise_open_files() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        tracing::warn!(%error, "cannot raise the limit of open files");
    }
}

/// The authorities' keys are in memory: the kernel is to write no core image of them, and to let nobody
/// but root look.
fn forbid_core_images() {
    use rustix::process::{DumpableBehavior, set_dumpable_behavior};
    if let Err(error) = set_dumpable_behavior(DumpableBehavior::NotDumpable) {
        tracing::warn!(%error, "core images cannot be forbidden");
    }
}

fn notify_service_manager(state: sd_notify::NotifyState<'_>) {
    if let Err(error) = sd_notify::notify(&[state]) {
        tracing::debug!(%error, "the service manager was not told");
    }
}

pub(super) async fn init(config: &HubConfig) -> anyhow::Result<()> {
    // Where a hub runs, everything has been made.
    if read_pins(&DataLayout::new(&config.data).ca()).is_ok() {
        return pin(config).await;
    }
    let data = HubData::open(config).await?;
    output::print(&data.pins());
    data.close().await;
    Ok(())
}

/// Reads the pins from the authorities' folder, which a running hub does not mind.
pub(super) async fn pin(config: &HubConfig) -> anyhow::Result<()> {
    let folder: PathBuf = DataLayout::new(&config.data).ca();
    let pins = read_pins(&folder).with_context(|| {
        format!("cannot read the pin in {} (hint: cortex-hubd init makes it)", folder.display())
    })?;
    output::print(&pins);
    Ok(())
}
