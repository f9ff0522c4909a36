//! How a task begins, or why it does not.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use cortex_shared::ids::TaskId;

use super::running::Task;
use crate::store::StoreError;

/// Why a task was not begun.
#[derive(Debug, thiserror::Error)]
pub enum StartRefusal {
    /// The caller has as many running as it may.
    #[error("{actor:?} has {limit} commands running, which is as many as its role may")]
    TooMany {
        /// The caller.
        actor: String,
        /// How many it may have.
        limit: usize,
    },
    /// The caller's key has led to another command.
    #[error("this idempotency key belongs to another command, task {task}")]
    KeyReused {
        /// The task it led to.
        task: TaskId,
    },
    /// So much runs already.
    #[error("{whose} has {limit} commands running, and takes no more for now")]
    Full {
        /// The node, or the hub.
        whose: String,
        /// How many it takes.
        limit: usize,
    },
    /// The hub is about to stop.
    #[error("the hub is being restarted and takes no new commands; this one was not begun")]
    Draining {
        /// How long the hub waits for those that run.
        wait: Duration,
    },
    /// The task could not be journalled.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// It was journalled only after its caller had stopped waiting; it ends there.
    #[error("the command was not begun, because its caller no longer waited for it")]
    GivenUp,
}

/// Decides between a task that is about to begin and a caller that stops waiting for it: whoever comes
/// first has it.
#[derive(Clone, Debug, Default)]
pub struct Claim(Arc<AtomicBool>);

impl Claim {
    /// Whether the other side has not come first.
    #[must_use]
    pub fn take(&self) -> bool {
        !self.0.swap(true, Ordering::AcqRel)
    }
}

/// A task that was asked for.
pub enum Begun {
    /// It is accepted and on its way.
    New(Arc<Task>),
    /// The caller's key has led to this one before.
    Known(TaskId),
}
