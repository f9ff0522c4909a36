//! Workspaces of this node: keeping a directory here equal to the tree at the hub.
//!
//! ```text
//! watch ─ hints ─▶ scan ─▶ index (Base, Local, Remote) ─▶ plan ─▶ push ─▶ hub
//!                             ▲                            └────▶ pull ─▶ stage ─▶ apply ─▶ index
//!                  hub ─ refresh ┘
//! ```
//!
//! | module | subject |
//! |---|---|
//! | `engine` | one task per workspace: when to do what, failures, safety stops |
//! | [`plan`] | pure: from three trees to what has to be done |
//! | [`index`] | the three trees and the hash cache, on disk |
//! | [`scan`], `watch`, [`ignore`] | seeing what is here |
//! | `case` | names that differ only in case, where the file system takes them for one |
//! | `ground` | what an engine stands on: disk, clocks, threads |
//! | `transfer`, [`apply`], `moves`, [`private_dir`] | moving content, changing what is here |
//! | `occupancy` | commands that run here, and what must keep still under them |
//! | [`hub`], [`tonic_hub`] | the other side |
//! | [`roots`] | no two workspaces share files |
//! | [`mode`] | what a member does with its own changes and those of others |
//! | [`status`], [`problem`], `explain` | telling people |
//!
//! Invariants: no work queue is stored, so recovery from any crash is "scan and plan again"; the hub
//! is only told that something is applied when it is durable; nothing is overwritten or deleted here
//! that was not looked at after it had been displaced; what cannot be read is never taken for
//! deleted; a root that is not the one that was synced is not read at all.

pub mod apply;
mod case;
mod core;
mod engine;
mod explain;
mod ground;
pub mod hub;
pub mod ignore;
pub mod index;
pub mod mode;
mod moves;
mod occupancy;
pub mod plan;
pub mod private_dir;
pub mod problem;
pub mod roots;
pub mod scan;
pub mod status;
#[cfg(test)]
mod tests;
pub mod tonic_hub;
mod transfer;
mod watch;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use cortex_shared::ids::WorkspaceId;
use cortex_shared::tasks::TaskScope;
use cortex_shared::wire_path::WirePath;
use tokio::sync::{mpsc, oneshot, watch as watch_channel};
use tokio::task::JoinHandle;

use crate::library::Freshness;
use crate::root_dir::Disk;
use engine::{Command, Engine};
pub use explain::{ExplainError, Explanation};
use ground::Ground;
use hub::Hub;
use mode::MemberOptions;
pub use occupancy::{Occupancy, Occupied};
use roots::Roots;
use status::{Progress, SyncState, SyncStatus};

/// Commands that wait for the engine; they are rare.
const COMMAND_QUEUE: usize = 16;

/// A workspace on this node.
#[derive(Clone, Debug)]
pub struct WorkspaceConfig {
    /// Which workspace.
    pub id: WorkspaceId,
    /// Its name.
    pub name: String,
    /// The directory that is kept equal. Made if it does not exist and never did.
    pub root: PathBuf,
    /// The agent's state directory; the index is in `workspaces/<id>` below it.
    pub state_dir: PathBuf,
    /// The roots of all workspaces of this agent.
    pub roots: Roots,
    /// Has to be as new as a link to a skill before that takes the place of a directory; `None` where
    /// there is no library, and links lead nowhere anyway.
    pub library: Option<Freshness>,
}

/// Why a flush did not come to its end.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FlushError {
    /// The hub cannot be reached now.
    #[error("the hub cannot be reached now")]
    Offline,
    /// The workspace is paused.
    #[error("the workspace is paused")]
    Paused,
    /// The hub has not answered for a while; what is to be sent is sent later by itself.
    #[error("the hub does not answer; what is not there yet follows by itself")]
    Silent,
    /// The workspace is halted.
    #[error("the workspace is halted: {reason}")]
    Halted {
        /// Why.
        reason: String,
    },
    /// Something failed; it is tried again by itself.
    #[error("sync failed: {message}")]
    Failed {
        /// What.
        message: String,
    },
    /// The workspace was stopped.
    #[error("the workspace was stopped")]
    Stopped,
}

/// A running workspace. Dropping it leaves the engine running until its scope is cancelled.
pub struct WorkspaceHandle {
    config: WorkspaceConfig,
    disk: Arc<dyn Disk>,
    options: watch_channel::Sender<MemberOptions>,
    /// Bytes that have moved on the lines to the hub.
    moved: Arc<dyn Fn() -> u64 + Send + Sync>,
    head: watch_channel::Sender<u64>,
    status: watch_channel::Receiver<SyncStatus>,
    commands: mpsc::Sender<Command>,
    occupancy: Occupancy,
    scope: TaskScope,
    /// Taken by whoever stops it; the others wait for him.
    task: tokio::sync::Mutex<Option<JoinHandle<()>>>,
}

/// Starts to sync a workspace. `large` is another line to the same hub, for the content of large
/// files, so that nothing else waits behind it. `online` tells whether it makes sense to call.
pub fn start_workspace<H: Hub>(
    config: WorkspaceConfig,
    options: MemberOptions,
    hub: H,
    large: H,
    online: watch_channel::Receiver<bool>,
    scope: &TaskScope,
) -> WorkspaceHandle {
    start_on(Ground::real(), config, options, hub, large, online, scope)
}

fn start_on<H: Hub>(
    ground: Ground,
    config: WorkspaceConfig,
    options: MemberOptions,
    hub: H,
    large: H,
    online: watch_channel::Receiver<bool>,
    scope: &TaskScope,
) -> WorkspaceHandle {
    let scope = scope.child();
    let (head, head_receiver) = watch_channel::channel(0);
    let (commands, command_receiver) = mpsc::channel(COMMAND_QUEUE);
    let progress = Progress::new(config.id, config.name.clone(), config.root.clone());
    let status = progress.subscribe();
    progress.update(|status| status.mode = options.mode);
    let (options, options_receiver) = watch_channel::channel(options);
    let (hub, large) = (Arc::new(hub), Arc::new(large));
    let lines = (hub.clone(), large.clone());
    let moved = Arc::new(move || lines.0.moved_bytes() + lines.1.moved_bytes());
    let progress = Arc::new(progress);
    let occupancy = Occupancy::default();
    let disk = ground.disk.clone();
    let engine = Engine {
        ground,
        occupancy: occupancy.clone(),
        config: config.clone(),
        options: options_receiver,
        hub,
        large,
        scope: scope.clone(),
        online,
        head: head_receiver,
        commands: command_receiver,
        cancel: scope.token().clone(),
        progress: progress.clone(),
    };
    let task = tokio::sync::Mutex::new(Some(scope.spawn("workspace sync", engine.run())));
    let (measured, stop) = (moved.clone(), scope.token().clone());
    scope.spawn("workspace rate", async move {
        stop.run_until_cancelled(progress.measure(move || measured())).await;
    });
    WorkspaceHandle { config, disk, options, moved, head, status, commands, occupancy, scope, task }
}

impl WorkspaceConfig {
    /// Forgets what is known of the workspace, once its engine has ended: this node has left it, and
    /// would come back as a stranger, who merges and deletes nothing. Files and trash stay. Blocking.
    ///
    /// # Errors
    /// If the file system refuses.
    pub fn forget(&self) -> Result<(), index::IndexError> {
        index::Index::remove(&self.state_folder())
    }
}

impl WorkspaceHandle {
    /// The hub says that its newest version is `seq`.
    pub fn head_moved(&self, seq: u64) {
        self.head.send_if_modified(|head| std::mem::replace(head, seq) != seq);
    }

    /// Who runs commands in it.
    #[must_use]
    pub fn occupancy(&self) -> Occupancy {
        self.occupancy.clone()
    }

    /// What the workspace is doing.
    #[must_use]
    pub fn status(&self) -> watch_channel::Receiver<SyncStatus> {
        self.status.clone()
    }

    /// Looks at everything and syncs it; returns once all changes made here before the call are at
    /// the hub and all changes known there are here, except what is listed as a problem.
    ///
    /// # Errors
    /// See [`FlushError`]. Ends at once if the hub cannot be reached.
    pub async fn flush(&self) -> Result<(), FlushError> {
        let (answer, answered) = oneshot::channel();
        self.commands.send(Command::Flush(answer)).await.map_err(|_| FlushError::Stopped)?;
        answered.await.map_err(|_| FlushError::Stopped)?
    }

    /// As [`Self::flush`], but gives up once the hub has been silent for `patience`: sync goes on.
    ///
    /// # Errors
    /// See [`FlushError`].
    pub async fn flush_within(&self, patience: Duration) -> Result<(), FlushError> {
        let progress = || (self.status.borrow().progress(), (self.moved)());
        let flush = self.flush();
        tokio::pin!(flush);
        let mut before = progress();
        loop {
            match tokio::time::timeout(patience, &mut flush).await {
                Ok(result) => return result,
                Err(_) => {
                    let now = progress();
                    let silent = now.1.saturating_sub(before.1) < hub::STALL_BYTES;
                    let here = self.status.borrow().state == SyncState::Scanning;
                    if silent && !here && now.0 == before.0 {
                        return Err(FlushError::Silent);
                    }
                    before = now;
                }
            }
        }
    }

    /// What the member does from now on. Returns at once; a pause waits for nothing.
    pub fn set_options(&self, options: MemberOptions) {
        self.options.send_if_modified(|now| std::mem::replace(now, options) != options);
    }

    /// What is known of a path here. Does not wait for the engine. Blocking.
    ///
    /// # Errors
    /// If the index cannot be read.
    pub fn explain(&self, path: &WirePath) -> Result<Explanation, ExplainError> {
        explain::explain(&*self.disk, &self.config, &self.status.borrow().clone(), path)
    }

    /// Something outside of the workspace that it waited for may have come: it plans again, soon.
    pub fn plan_again(&self) {
        // One that is too busy to be told plans anyway.
        self.commands.try_send(Command::PlanAgain).ok();
    }

    /// Lets deletions that are held because they are so many go to the hub, soon. Returns how many
    /// are held; with none it does nothing.
    ///
    /// # Errors
    /// If the engine is too busy to be told, works on nothing now, or has ended.
    pub fn confirm_deletions(&self) -> Result<u64, FlushError> {
        // Its state says so a moment later, and meanwhile nobody would take the word.
        if self.options.borrow().paused {
            return Err(FlushError::Paused);
        }
        let held = {
            let status = self.status.borrow();
            match status.state {
                SyncState::Paused => return Err(FlushError::Paused),
                SyncState::Halted => {
                    return Err(FlushError::Halted { reason: status.halted_reason.clone() });
                }
                _ => status.held_deletions,
            }
        };
        if held > 0 {
            self.commands.try_send(Command::ConfirmDeletions).map_err(|error| match error {
                mpsc::error::TrySendError::Full(_) => {
                    FlushError::Failed { message: "too many commands wait".to_owned() }
                }
                mpsc::error::TrySendError::Closed(_) => FlushError::Stopped,
            })?;
        }
        Ok(held)
    }

    /// Ends the engine; returns once nothing of it touches the directory any more.
    pub async fn stop(&self) {
        self.scope.cancel();
        let mut task = self.task.lock().await;
        if let Some(task) = task.take()
            && let Err(error) = task.await
        {
            tracing::error!(%error, "workspace task failed");
        }
    }
}
