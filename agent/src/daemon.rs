//! The composition root of `cortex-agent run`: what exists while the daemon runs, and in which
//! order it ends.
//!
//! Start: lock the state, load settings and identity, probe the kernel, then workspaces, the local
//! socket and the session. The sync engines and the local socket work without a hub; readiness is
//! reported to the service manager when the first session is up. Stop (SIGTERM or SIGINT): running
//! commands are ended and reported, engines stopped, within [`STOP_TIMEOUT`]; a second signal, or
//! the time limit, ends the process at once, which loses nothing that was acknowledged.

use std::fs::File;
use std::path::PathBuf;
use std::time::Duration;

use cortex_proto::v1;
use cortex_shared::tasks::TaskScope;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;

use crate::client::ConnectError;
use crate::config::{ConfigError, Settings, StateDir};
use crate::control::{self, ControlError, LocalControl};
use crate::identity::NodeIdentity;
use crate::link::dispatch::Dispatcher;
use crate::link::session::{Greeting, LinkState, keep_session};
use crate::link::workspaces::Workspaces;
use crate::sandbox::Launcher;

/// How long an orderly stop may take.
pub const STOP_TIMEOUT: Duration = Duration::from_secs(10);

/// Why the daemon did not start, or did not end in order.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// Settings or identity cannot be used.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Certificate and key cannot be used.
    #[error(transparent)]
    Connect(#[from] ConnectError),
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

/// Runs until a signal asks to stop.
///
/// # Errors
/// If the daemon cannot start.
pub async fn run(state: StateDir) -> Result<(), DaemonError> {
    let settings = Settings::load(&state)?;
    let identity = NodeIdentity::require(&state)?;
    let _lock = lock_state(&state)?;
    let mut stop = StopSignals::new()?;
    let sandbox = v1::SandboxReport::from(&Launcher::default().probe().await);
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
    let hub = identity.client(settings.hub.clone())?;
    let ceiling = settings.ceiling;
    let workspaces = Workspaces::start(state.clone(), settings.clone(), hub.clone(), &scope)?;
    let dispatcher = Dispatcher::new(state.clone(), workspaces.clone())?;
    let (link_state, link) = watch::channel(LinkState::default());
    let local = LocalControl {
        identity: identity.clone(),
        hub: settings.hub,
        link: link.clone(),
        dispatcher: dispatcher.clone(),
        workspaces,
    };
    control::serve(local, &state.socket(), &scope)?;
    let greeting = Greeting { instance_id: *uuid::Uuid::new_v4().as_bytes(), ceiling, sandbox };
    tracing::info!(node = identity.name, id = %identity.node_id, hub = %hub.address(), "agent starts");
    let session_scope = scope.child();
    scope.spawn("session", keep_session(hub, greeting, dispatcher, link_state, session_scope));
    scope.spawn("readiness", announce_ready(link, scope.token().clone()));

    let signal = stop.next().await;
    tracing::info!(signal, "stopping");
    notify(&[sd_notify::NotifyState::Stopping]);
    scope.cancel();
    let finishing = scope.finish();
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

/// One daemon per state. The lock ends with the process, however it ends.
fn lock_state(state: &StateDir) -> Result<File, DaemonError> {
    let path = state.lock();
    let failed = |source| ConfigError::Write { path: path.clone(), source };
    let file =
        File::options().create(true).truncate(false).write(true).open(&path).map_err(failed)?;
    match rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => {
            Err(DaemonError::AlreadyRunning { state: state.path().to_owned() })
        }
        Err(error) => Err(failed(error.into()).into()),
    }
}

/// Tells the service manager once that the first session is up.
async fn announce_ready(
    mut link: watch::Receiver<LinkState>,
    stop: tokio_util::sync::CancellationToken,
) {
    let up = stop.run_until_cancelled(link.wait_for(|state| state.session.is_some()));
    if matches!(up.await, Some(Ok(_))) {
        notify(&[sd_notify::NotifyState::Ready, sd_notify::NotifyState::Status("connected")]);
    }
}

fn notify(states: &[sd_notify::NotifyState<'_>]) {
    if std::env::var_os("NOTIFY_SOCKET").is_some()
        && let Err(error) = sd_notify::notify(states)
    {
        tracing::warn!(%error, "the service manager cannot be notified");
    }
}

struct StopSignals {
    terminate: Signal,
    interrupt: Signal,
}

impl StopSignals {
    fn new() -> Result<Self, DaemonError> {
        let listen = |kind| {
            signal(kind).map_err(|source| DaemonError::System { what: "listen to signals", source })
        };
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn second_agent_on_the_same_state_is_refused_until_the_first_ends() {
        let folder = tempfile::tempdir().unwrap();
        let state = StateDir::resolve(Some(folder.path().to_owned())).unwrap();
        let first = lock_state(&state).unwrap();
        assert!(matches!(lock_state(&state), Err(DaemonError::AlreadyRunning { .. })));
        drop(first);
        lock_state(&state).unwrap();
    }
}
