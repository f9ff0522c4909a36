//! What an engine stands on: the disk, clocks, chance and threads. In a simulation all of them are
//! its own, so that one seed always makes the same history.

use std::fmt;
use std::num::NonZero;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use cortex_shared::clock::unix_ms;
use rand::RngExt as _;

use super::core::SyncError;
use super::watch::Kernels;
use crate::identity::MachineFacts;
use crate::root_dir::{Disk, real_disk};

/// Where blocking work is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Blocking {
    /// On threads made for it.
    Threads,
    /// At once, by the task that asks for it.
    #[cfg_attr(not(test), expect(dead_code, reason = "for the simulation"))]
    Inline,
}

impl Blocking {
    /// How many pieces of one transfer may be worked on at once: as many as the machine has cores, but not
    /// so many that memory, of which each takes two packs, would be felt.
    pub(super) fn at_once(self) -> usize {
        const MOST: usize = 4;
        static CORES: LazyLock<usize> =
            LazyLock::new(|| std::thread::available_parallelism().map_or(1, NonZero::get));
        match self {
            Self::Threads => (*CORES).min(MOST),
            Self::Inline => 1,
        }
    }

    /// Does a piece of blocking work.
    pub(super) async fn run<T: Send + 'static>(
        self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, SyncError> {
        match self {
            Self::Threads => {
                tokio::task::spawn_blocking(work).await.map_err(|_| SyncError::Panicked)
            }
            Self::Inline => {
                // As if it took a moment: others have their turn.
                tokio::task::yield_now().await;
                Ok(work())
            }
        }
    }
}

/// How much is done at once, and how long.
#[derive(Clone, Copy, Debug)]
pub(super) struct Batches {
    /// Operations of one commit: few enough that others see the beginning of a large change early.
    pub(super) commit_ops: usize,
    /// Changes of one group of a pull: the more, the fewer times the disk is asked to sync.
    pub(super) group_changes: usize,
    /// How long a pull goes on once there are changes here: it then ends early, between two groups.
    pub(super) patience: Duration,
}

impl Batches {
    pub(super) const REAL: Self =
        Self { commit_ops: 1000, group_changes: 2048, patience: Duration::from_secs(5) };
}

/// See the module. Cheap to clone.
#[derive(Clone)]
pub(super) struct Ground {
    /// Where the root and the private directory are.
    pub(super) disk: Arc<dyn Disk>,
    /// Where blocking work is done.
    pub(super) blocking: Blocking,
    pub(super) batches: Batches,
    /// Who tells of changes.
    pub(super) kernels: Kernels,
    /// The time of day in milliseconds since the Unix epoch: to tell when, never to compare.
    pub(super) wall_ms: Arc<dyn Fn() -> i64 + Send + Sync>,
    /// Tells one start of the machine from another; empty if that is not known.
    pub(super) boot_id: Arc<dyn Fn() -> String + Send + Sync>,
    /// A number from 0 to 1, to spread what would otherwise happen at once.
    pub(super) chance: Arc<dyn Fn() -> f64 + Send + Sync>,
}

impl fmt::Debug for Ground {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ground").field("disk", &self.disk).finish_non_exhaustive()
    }
}

impl Ground {
    /// The machine itself.
    pub(super) fn real() -> Self {
        Self {
            disk: real_disk(),
            blocking: Blocking::Threads,
            batches: Batches::REAL,
            kernels: Kernels::real(),
            wall_ms: Arc::new(unix_ms),
            boot_id: Arc::new(|| MachineFacts::of_this_machine().boot_id),
            chance: Arc::new(|| rand::rng().random_range(0.0..1.0)),
        }
    }
}
