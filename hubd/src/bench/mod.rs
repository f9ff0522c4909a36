//! Emulated clients that speak the real protocol over real TLS, and what is measured with them.
//!
//! A benchmark runs a hub of its own in a temporary directory, on loopback: [`join`] in this process, so
//! that it can let the hub's store stall, [`load`] as another one, so that its memory is its own and it
//! can be killed. Nothing here is part of a serving hub.
//!
//! The emulated nodes are written for this purpose: the hub does not depend on the agent. They keep
//! their session, heartbeats, streams and credit as the agent does, and execute nothing.

mod client;
mod commander;
mod crowd;
mod executor;
mod fanout;
pub mod join;
mod line;
pub mod load;
mod node;
mod process;
mod statistics;

use std::io;
use std::sync::Arc;

use crate::config::HubConfig;
use crate::hub::{Hub, StartError};
use crate::store::fault::{FaultStore, Faults};

/// Why a benchmark could not be carried out.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// The hub under test.
    #[error("the hub does not start")]
    Hub(#[from] StartError),
    /// A file.
    #[error("cannot prepare the benchmark")]
    Io(#[from] io::Error),
    /// A key.
    #[error("cannot make a key")]
    Key(#[from] rcgen::Error),
    /// TLS.
    #[error("cannot set up TLS")]
    Tls(#[from] rustls::Error),
    /// A connection.
    #[error("cannot connect to the hub")]
    Connect(#[from] tonic::transport::Error),
    /// A call that has to succeed for anything to be measured.
    #[error("the hub refused: {}", .0.message())]
    Refused(Box<tonic::Status>),
    /// The hub as a process.
    #[error("the hub's process ended, or did not say that it listens")]
    HubDied,
    /// Each connection takes a descriptor, here and at the hub.
    #[error(
        "{nodes} nodes need {needed} open files, and the limit is {limit}: raise it (ulimit -Hn)"
    )]
    Descriptors {
        /// Nodes that are to connect.
        nodes: u32,
        /// Descriptors for them.
        needed: u64,
        /// The hard limit of this process.
        limit: u64,
    },
    /// A session that ended while it was needed.
    #[error("an emulated node lost its session")]
    SessionLost,
}

impl From<tonic::Status> for BenchError {
    fn from(status: tonic::Status) -> Self {
        Self::Refused(Box::new(status))
    }
}

/// Descriptors beside those of the connections: databases, sockets, what the runtime needs, and some.
const OTHER_DESCRIPTORS: u64 = 128;

/// Whether this process may have a connection for each of so many nodes; the hub inherits its limit.
fn descriptors_for(nodes: u32) -> Result<(), BenchError> {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).maximum;
    let needed = u64::from(nodes) + OTHER_DESCRIPTORS;
    match limit {
        Some(limit) if limit < needed => Err(BenchError::Descriptors { nodes, needed, limit }),
        _ => Ok(()),
    }
}

/// A hub on a store that does as it is told.
struct BenchHub {
    hub: Hub,
    faults: Faults,
    /// Removed with it.
    folder: tempfile::TempDir,
}

impl BenchHub {
    async fn start(change: impl FnOnce(&mut HubConfig)) -> Result<Self, BenchError> {
        let folder = tempfile::Builder::new().prefix("cortex-bench-").tempdir()?;
        let mut config = HubConfig::new(folder.path().to_owned());
        config.grpc.set_port(0);
        config.http.listen = None;
        // Everybody comes from one address here.
        config.join_rate = None;
        change(&mut config);
        let faults = Faults::default();
        let handle = faults.clone();
        let hub =
            Hub::start_on(config, |store| Arc::new(FaultStore::new(store, handle)) as _).await?;
        Ok(Self { hub, faults, folder })
    }

    async fn stop(self) {
        let Self { hub, folder, .. } = self;
        hub.shutdown().await;
        if let Err(error) = folder.close() {
            tracing::warn!(%error, "the benchmark's directory was not removed");
        }
    }
}
