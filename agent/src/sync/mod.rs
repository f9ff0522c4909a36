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
//! | `ground` | what an engine stands on: disk, clocks, threads |
//! | `transfer`, [`apply`], [`private_dir`] | moving content, changing what is here |
//! | [`hub`], [`tonic_hub`] | the other side |
//! | [`status`], [`problem`] | telling people |
//!
//! Invariants: no work queue is stored, so recovery from any crash is "scan and plan again"; the hub
//! is only told that something is applied when it is durable; nothing is overwritten or deleted here
//! that was not looked at after it had been displaced; what cannot be read is never taken for
//! deleted; a root that is not the one that was synced is not read at all.

pub mod apply;
mod core;
mod engine;
mod ground;
pub mod hub;
pub mod ignore;
pub mod index;
pub mod plan;
pub mod private_dir;
pub mod problem;
pub mod scan;
pub mod status;
#[cfg(test)]
mod tests;
pub mod tonic_hub;
mod transfer;
mod watch;

use std::path::PathBuf;
use std::sync::Arc;

use cortex_shared::ids::WorkspaceId;
use cortex_shared::tasks::TaskScope;
use tokio::sync::{mpsc, oneshot, watch as watch_channel};
use tokio::task::JoinHandle;

use engine::{Command, Engine};
use ground::Ground;
use hub::Hub;
use status::{Progress, SyncStatus};

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
}

/// Why a flush did not come to its end.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FlushError {
    /// The hub cannot be reached now.
    #[error("the hub cannot be reached now")]
    Offline,
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
    head: watch_channel::Sender<u64>,
    status: watch_channel::Receiver<SyncStatus>,
    commands: mpsc::Sender<Command>,
    scope: TaskScope,
    task: JoinHandle<()>,
}

/// Starts to sync a workspace. `large` is another line to the same hub, for the content of large
/// files, so that nothing else waits behind it. `online` tells whether it makes sense to call.
pub fn start_workspace<H: Hub>(
    config: WorkspaceConfig,
    hub: H,
    large: H,
    online: watch_channel::Receiver<bool>,
    scope: &TaskScope,
) -> WorkspaceHandle {
    start_on(Ground::real(), config, hub, large, online, scope)
}

fn start_on<H: Hub>(
    ground: Ground,
    config: WorkspaceConfig,
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
    let engine = Engine {
        ground,
        config,
        hub,
        large: Arc::new(large),
        scope: scope.clone(),
        online,
        head: head_receiver,
        commands: command_receiver,
        cancel: scope.token().clone(),
        progress: Arc::new(progress),
    };
    let task = scope.spawn("workspace sync", engine.run());
    WorkspaceHandle { head, status, commands, scope, task }
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

    /// Lets deletions that are held because they are so many go to the hub, soon. Returns how many
    /// are held; with none it does nothing.
    ///
    /// # Errors
    /// If the engine is too busy to be told, or has ended.
    pub fn confirm_deletions(&self) -> Result<u64, FlushError> {
        let held = self.status.borrow().held_deletions;
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
    pub async fn stop(self) {
        self.scope.cancel();
        if let Err(error) = self.task.await {
            tracing::error!(%error, "workspace task failed");
        }
    }
}
