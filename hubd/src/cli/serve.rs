//! `serve`, `init` and `ca pin`.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use clap::Args;
use cortex_shared::telemetry::{Logging, start_logging};
use sd_notify::NotifyState;
use tokio::signal::unix::{SignalKind, signal};

use super::HubConfig;
use super::configuration::Configuration;
use super::output;
use crate::config::DataLayout;
use crate::enroll::authorities::read_pins;
use crate::hub::{Hub, HubData};
use crate::service::{self, Watchdog};

#[derive(Args)]
pub(super) struct ServeArgs {
    #[command(flatten)]
    configuration: Configuration,
}

pub(super) async fn serve(args: ServeArgs) -> anyhow::Result<()> {
    let config = args.configuration.read()?;
    let logging = start_logging(&config.log.filter, config.log.format)?;
    raise_open_files();
    forbid_core_images();
    // Before anything is promised to anybody: a signal from here on leads to an orderly stop.
    let mut terminate = signal(SignalKind::terminate()).context("cannot handle SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot handle SIGINT")?;
    let mut hang_up = signal(SignalKind::hangup()).context("cannot handle SIGHUP")?;
    let longest = longest_stop(&config);
    let inherited = service::inherited_listeners().context("cannot use the inherited sockets")?;
    let hub = Hub::start_with(config, inherited, |store| store).await?;
    output::print(&format!("grpc listening on {}", hub.address()));
    if let Some(http) = hub.http() {
        output::print(&format!("http listening on {}", http.address()));
    }
    service::notify(&[NotifyState::Ready]);
    let mut watchdog = Watchdog::from_environment();
    loop {
        tokio::select! {
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            () = hub.drained() => break,
            _ = hang_up.recv() => reload(&args.configuration, &logging, &hub),
            () = watchdog.due() => service::notify(&[NotifyState::Watchdog]),
        }
    }
    // The unit gives it a time of its own, and does not know what the settings allow.
    service::notify(&[NotifyState::Stopping, NotifyState::ExtendTimeoutUsec(longest)]);
    hub.shutdown().await;
    Ok(())
}

/// The longest that an orderly stop can take, in microseconds, with some time to spare.
fn longest_stop(config: &HubConfig) -> u32 {
    // What begins, what ends, what is under way, the databases, and the HTTP side have so much each at most.
    let longest = config.shutdown_grace * 5 + Duration::from_secs(10);
    u32::try_from(longest.as_micros()).unwrap_or(u32::MAX)
}

/// Takes into use what can change while the hub runs: what is logged, what is in the files of the HTTP
/// side's certificate, and the hub's own certificate.
fn reload(configuration: &Configuration, logging: &Logging, hub: &Hub) {
    if let Ok(now) = NotifyState::monotonic_usec_now() {
        service::notify(&[NotifyState::Reloading, now]);
    }
    let changed = configuration.read().and_then(|config| Ok(logging.change(&config.log.filter)?));
    let changed = changed.and_then(|()| match hub.http() {
        Some(http) => Ok(http.reload()?),
        None => Ok(()),
    });
    // `systemctl reload` succeeds either way; `systemctl status` shows what became of it.
    let mut status = "configuration read again".to_owned();
    match changed {
        Ok(()) => tracing::info!("configuration read again"),
        Err(error) => {
            status = format!("configuration not changed: {error:#}");
            tracing::error!(error = format!("{error:#}"), "configuration not changed");
        }
    }
    match hub.renew_certificate() {
        Ok(()) => tracing::info!("the hub has a new certificate"),
        Err(error) => {
            status = format!("{status}; the hub keeps its certificate: {error}");
            tracing::error!(%error, "the hub keeps its certificate");
        }
    }
    // One line is what there is room for.
    let status = status.replace('\n', " ");
    service::notify(&[NotifyState::Ready, NotifyState::Status(&status)]);
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
