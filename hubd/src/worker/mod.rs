//! The hub's background work, outside every protocol handler, under one supervisor.
//!
//! A worker has a name, a purpose and a period, and does its work in runs. It runs when its period is over,
//! when something it waits for has happened, and when somebody asks ([`Supervisor::run`]); never twice at
//! the same time. A run that fails or panics is logged with an error id, told as an event, and followed by
//! another after a delay that grows; it disturbs neither other workers nor the hub. What a worker is to
//! do, it finds out anew in each run, so that a crash loses nothing but time.
//!
//! Work that waits for disks is done on threads of its own, never on those of the runtime: the store and
//! [`tokio::task::spawn_blocking`] see to that.

mod certificates;
mod supervisor;
mod tasks;

pub use certificates::expired_certificates;
pub use supervisor::{
    Due, LastRun, NoSuchWorker, Plan, Report, RunError, State, Supervisor, Trigger, WorkerStatus,
};
#[cfg(test)]
pub(crate) use tasks::revocations;
pub use tasks::{Periods, WorkOf, register};
