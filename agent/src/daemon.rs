//! The composition root of `cortex-agent run`: what exists while the daemon runs, and in which
//! order it ends.
//!
//! Start: lock the state, load settings and identity, probe the kernel, then workspaces, the local
//! socket and the session. The sync engines and the local socket work without a hub; readiness is
//! reported to the service manager when the first session is up. Stop (SIGTERM or SIGINT): running
//! commands are ended and reported, engines stopped, within [`STOP_TIMEOUT`]; a second signal, or
//! the time limit, ends the process at once, which loses nothing that was acknowledged. SIGUSR1 asks
//! for the same at the first moment at which no command runs: an upgrade ends none.

use std::path::PathBuf;
use std::time::Duration;

use cortex_proto::v1;
use cortex_shared::tasks::TaskScope;
use cortex_shared::telemetry::{self, Logging};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use crate::config::{ConfigError, Settings, StateDir};
use crate::control::{self, ControlError, LocalControl};
use crate::exec::Executor;
use crate::identity::NodeIdentity;
use crate::identity::live::{IdentityError, LiveIdentity};
use crate::link::cut_off;
use crate::link::dispatch::Dispatcher;
use crate::link::renewal;
use crate::link::session::{Greeting, LinkState, keep_session};
use crate::link::workspaces::Workspaces;

/// How long an orderly stop may take.
pub const STOP_TIMEOUT: Duration = Duration::from_secs(10);

/// What is logged unless the owner says. `notify` warns of each directory that is removed, which is nothing to
/// worry about; what it fails at comes back as an error.
pub const DEFAULT_LOG: &str = "info,notify=error";

/// Why the daemon did not start, or did not end in order.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// Settings or identity cannot be used.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The identity cannot be used.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// Another agent uses this state.
    #[error("an agent runs already with the state in {}", state.display())]
    AlreadyRunning {
        /// The state directory.
        state: PathBuf,
    },
    /// The local socket cannot be opened.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// The system refused something basic.
    #[error("cannot {what}")]
    System {
        /// What was tried.
        what: &'static str,
        /// What the system said.
        source: std::io::Error,
    },
}

/// Runs until a signal asks to stop. On SIGHUP it changes `logging` to what the settings say then, and
/// renews the node's certificate.
///
/// # Errors
/// If the daemon cannot start.
pub async fn run(state: StateDir, logging: &Logging) -> Result<(), DaemonError> {
    let settings = Settings::load(&state)?;
    log_as(logging, &settings);
    let identity = NodeIdentity::require(&state)?;
    let Some(_lock) = state.try_lock()? else {
        return Err(DaemonError::AlreadyRunning { state: state.path().to_owned() });
    };
    let mut stop = StopSignals::new()?;
    let hang_up = listen(SignalKind::hangup())?;
    let when_idle = listen(SignalKind::user_defined1())?;
    // The launcher of all commands: what the probe finds not to be enforced, it refuses.
    let launcher = Executor::of_this_process().launcher();
    let found = launcher.probe(&[state.path().to_owned()], settings.sandbox.require_cgroup).await;
    let sandbox = v1::SandboxReport::from(&found);
    if !sandbox.strict_available {
        for piece in &sandbox.missing {
            tracing::warn!(
                missing = piece.what,
                why = piece.why,
                remedy = piece.remedy,
                "commands in strict mode will be refused"
            );
        }
    }

    let scope = TaskScope::new();
    let identity = LiveIdentity::new(state.clone(), identity, settings.hub.clone())?;
    let hub = identity.client().clone();
    let workspaces = Workspaces::start(state.clone(), settings.clone(), hub, &scope)?;
    let dispatcher = Dispatcher::new(state.clone(), workspaces.clone(), identity.clone())?;
    let (link_state, link) = watch::channel(LinkState::default());
    let left = CancellationToken::new();
    let local = LocalControl {
        identity: identity.clone(),
        link: link.clone(),
        dispatcher: dispatcher.clone(),
        workspaces,
        left: left.clone(),
    };
    control::serve(local, &state.socket(), &scope)?;
    let greeting = Greeting { instance_id: *uuid::Uuid::new_v4().as_bytes(), sandbox };
    let known = identity.snapshot();
    tracing::info!(node = known.name, id = %known.node_id, hub = %settings.hub, "agent starts");
    let renewing = identity.clone();
    let session_scope = scope.child();
    let commands = dispatcher.clone();
    let limit = settings.commands.cut_off_limit_s.map(Duration::from_secs);
    let watching = (identity.clone(), dispatcher.clone(), link.clone(), scope.token().clone());
    let watching = cut_off::watch(watching.0, watching.1, limit, watching.2, watching.3);
    scope.spawn("cut off", watching);
    scope.spawn("session", keep_session(identity, greeting, dispatcher, link_state, session_scope));
    scope.spawn("readiness", announce_ready(link.clone(), scope.token().clone()));
    let reloading = (state.clone(), logging.clone(), renewing, link);
    let reloading = reload_on_hangup(hang_up, reloading, scope.token().clone());
    scope.spawn("reload", reloading);

    scope.spawn("watchdog", keep_alive(scope.token().clone()));
    scope.spawn("log repeats", tell_left_out(scope.token().clone()));
    tokio::select! {
        signal = stop.next() => tracing::info!(signal, "stopping"),
        () = left.cancelled() => tracing::info!("this node leaves its mesh: stopping"),
        () = idle_when_asked(when_idle, &commands) => tracing::info!("no command runs: stopping, as asked"),
    }
    notify(&[sd_notify::NotifyState::Stopping]);
    scope.cancel();
    let finishing = async {
        // Without a session there is nobody to report them to; the journal keeps how they ended.
        tokio::join!(commands.stop_commands(), scope.finish());
        launcher.close().await;
    };
    tokio::select! {
        () = finishing => tracing::info!("stopped"),
        () = tokio::time::sleep(STOP_TIMEOUT) => {
            tracing::warn!(tasks = scope.running(), "not everything ended in time");
        }
        signal = stop.next() => tracing::warn!(signal, "second signal: leaving at once"),
    }
    std::fs::remove_file(state.socket()).ok();
    Ok(())
}

/// Waits for the signal, and then for the moment at which no command runs; none begins after it.
async fn idle_when_asked(mut asked: Signal, dispatcher: &Dispatcher) {
    if asked.recv().await.is_none() {
        std::future::pending::<()>().await;
    }
    let commands = dispatcher.running_tasks();
    tracing::info!(commands, "stopping as soon as no command runs");
    notify(&[sd_notify::NotifyState::Status("restarting when no command runs any more")]);
    dispatcher.close_when_idle().await;
}

fn log_as(logging: &Logging, settings: &Settings) {
    let filter = telemetry::log_filter(settings.log.as_deref().unwrap_or(DEFAULT_LOG));
    match logging.change(&filter) {
        Ok(()) => tracing::info!(filter, "logging"),
        Err(error) => tracing::error!(%error, "what is logged stays as it was"),
    }
}

/// Takes into use what can change while the daemon runs, each time SIGHUP comes.
async fn reload_on_hangup(
    mut hang_up: Signal,
    (state, logging, identity, link): Reloading,
    stop: CancellationToken,
) {
    while let Some(Some(())) = stop.run_until_cancelled(hang_up.recv()).await {
        match Settings::load(&state) {
            Ok(settings) => log_as(&logging, &settings),
            Err(error) => tracing::error!(%error, "the settings cannot be read again"),
        }
        let session = link.borrow().session.clone();
        let Some(session) = session else {
            tracing::info!("the certificate is not renewed: there is no session with the hub");
            continue;
        };
        match stop.run_until_cancelled(renewal::renew(&identity, session.client)).await {
            None => return,
            Some(Ok(())) => tracing::info!("the certificate was renewed"),
            Some(Err(error)) => tracing::warn!(%error, "the certificate was not renewed"),
        }
    }
}

/// What a reload takes: where settings are, what logs, whose certificate, and over which session.
type Reloading = (StateDir, Logging, LiveIdentity, watch::Receiver<LinkState>);

/// Tells the service manager once that the first session is up.
async fn announce_ready(mut link: watch::Receiver<LinkState>, stop: CancellationToken) {
    let up = stop.run_until_cancelled(link.wait_for(|state| state.session.is_some()));
    if matches!(up.await, Some(Ok(_))) {
        notify(&[sd_notify::NotifyState::Ready, sd_notify::NotifyState::Status("connected")]);
    }
}

/// Signs of life at half the time within which the service manager wants one, if it wants any.
async fn keep_alive(stop: CancellationToken) {
    let Some(within) = sd_notify::watchdog_enabled().filter(|within| !within.is_zero()) else {
        return;
    };
    let mut signs = tokio::time::interval(within / 2);
    signs.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while stop.run_until_cancelled(signs.tick()).await.is_some() {
        notify(&[sd_notify::NotifyState::Watchdog]);
    }
}

/// Says now and then how many repeated lines were left out of the log.
async fn tell_left_out(stop: CancellationToken) {
    while stop.run_until_cancelled(tokio::time::sleep(telemetry::WITHIN)).await.is_some() {
        telemetry::tell_left_out();
    }
}

fn notify(states: &[sd_notify::NotifyState<'_>]) {
    if std::env::var_os("NOTIFY_SOCKET").is_some()
        && let Err(error) = sd_notify::notify(states)
    {
        tracing::warn!(%error, "the service manager cannot be notified");
    }
}

fn listen(kind: SignalKind) -> Result<Signal, DaemonError> {
    signal(kind).map_err(|source| DaemonError::System { what: "listen to signals", source })
}

struct StopSignals {
    terminate: Signal,
    interrupt: Signal,
}

impl StopSignals {
    fn new() -> Result<Self, DaemonError> {
        Ok(Self {
            terminate: listen(SignalKind::terminate())?,
            interrupt: listen(SignalKind::interrupt())?,
        })
    }

    async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}
