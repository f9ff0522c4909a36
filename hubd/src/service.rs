//! What a service manager (systemd) gives the hub and hears of it: sockets that it keeps open over
//! restarts, readiness, and a sign of life.
//!
//! Without one, nothing here does anything.

use std::net::TcpListener;
use std::time::Duration;

use tokio::time::{Interval, MissedTickBehavior, interval};

/// Listening sockets that were handed over: connections made while no hub ran wait in them.
#[derive(Debug, Default)]
pub struct Inherited {
    /// The gRPC side's.
    pub grpc: Option<TcpListener>,
    /// The HTTP side's.
    pub http: Option<TcpListener>,
}

/// The listening sockets that were handed over, by their names (`FileDescriptorName=`). One of another name
/// is the gRPC side's: before there were two, it had none.
///
/// # Errors
/// If something else than a listening TCP socket was handed over.
pub fn inherited_listeners() -> std::io::Result<Inherited> {
    let names = std::env::var("LISTEN_FDNAMES").unwrap_or_default();
    let names: Vec<&str> = names.split(':').collect();
    let mut handed = listenfd::ListenFd::from_env();
    let mut inherited = Inherited::default();
    for index in 0..handed.len() {
        let listener = handed.take_tcp_listener(index)?;
        if let Some(listener) = &listener {
            listener.set_nonblocking(true)?;
        }
        match names.get(index) {
            Some(&"http") => inherited.http = listener,
            _ => inherited.grpc = listener,
        }
    }
    Ok(inherited)
}

/// Tells the service manager how the hub is.
pub fn notify(states: &[sd_notify::NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::debug!(%error, "the service manager was not told");
    }
}

/// Signs of life at half the time within which the service manager wants one.
pub struct Watchdog(Option<Interval>);

impl Watchdog {
    /// As the environment says; a watchdog that nobody asked for never has anything to do.
    #[must_use]
    pub fn from_environment() -> Self {
        let wanted = sd_notify::watchdog_enabled().filter(|within| *within > Duration::ZERO);
        Self(wanted.map(|within| {
            let mut signs = interval(within / 2);
            signs.set_missed_tick_behavior(MissedTickBehavior::Delay);
            signs
        }))
    }

    /// Ends when it is time for the next sign. Safe to give up at any time.
    pub async fn due(&mut self) {
        match &mut self.0 {
            Some(signs) => {
                signs.tick().await;
            }
            None => std::future::pending().await,
        }
    }
}
