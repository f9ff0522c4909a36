//! Workspace versions and content.
//!
//! [`Workspaces`] owns all of them and opens each when it is first asked for; [`WorkspaceHub`] is one
//! workspace: its store (`store::workspace`) and its pack files, kept in step. On disk:
//!
//! ```text
//! <folder>/<workspace id>/ws.db          versions, and which pack holds which chunk
//!                        /packs/aa/…     the content, as it was received
//!                        /tmp/           packs on their way in
//! ```
//!
//! The hub orders, checks, stores and forwards. It never merges, never looks into content beyond
//! checking hashes, and keeps no state for a member but the version it has applied.
//!
//! A crash loses what was not acknowledged. A pack file that no database row knows is adopted at the
//! next start. A row whose file is gone or damaged is forgotten, then or when the file is read, and
//! members are asked for its content again (`WorkspaceHub::wanted`).

pub mod budget;
pub mod heads;
pub mod members;
pub mod pack_files;
mod workspace;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use cortex_shared::clock::unix_ms;
use cortex_shared::durable;
use cortex_shared::ids::{NodeId, WorkspaceId};
use cortex_shared::pack::InvalidPack;
use cortex_shared::tasks::TaskScope;
use tokio::sync::OnceCell;
use tokio_util::sync::CancellationToken;

use self::budget::Budget;
pub use self::budget::ContentLimits;
use self::heads::HeadBoard;
pub use self::heads::MovedHeads;
pub use self::pack_files::PackFileError;
pub use self::workspace::{PutPackAck, WorkspaceHub};
use crate::store::workspace::StoreError;
pub use crate::store::workspace::{Conflict, Head, Summary};

/// Why a workspace did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum SyncError {
    /// The versions' database.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The content's files.
    #[error(transparent)]
    Files(#[from] PackFileError),
    /// What the member sent is not a valid pack.
    #[error("invalid pack")]
    Pack(#[from] InvalidPack),
    /// The work was lost because the code that did it failed.
    #[error("the work failed")]
    Failed,
}

impl SyncError {
    /// Whether there was no space left.
    #[must_use]
    pub fn is_disk_full(&self) -> bool {
        match self {
            Self::Store(error) => error.is_disk_full(),
            Self::Files(error) => error.is_disk_full(),
            _ => false,
        }
    }
}

/// How often useless content is looked for: rarely against the days for which it is kept, since each
/// look reads all entries.
const COLLECTION_PERIOD: Duration = Duration::from_secs(6 * 3600);
/// How long content stays that nothing names, in milliseconds: the 72 hours for which members may
/// rely on what they were told, and one more, within which a touch is not always recorded anew.
const CONTENT_KEPT_MS: i64 = 73 * 3600 * 1000;

/// Workspaces that are open, or are being opened.
type OpenWorkspaces = Mutex<HashMap<WorkspaceId, Arc<OnceCell<Arc<WorkspaceHub>>>>>;

/// All workspaces of a hub.
pub struct Workspaces {
    folder: PathBuf,
    scope: TaskScope,
    databases: TaskScope,
    board: Arc<HeadBoard>,
    budget: Arc<Budget>,
    open: Arc<OpenWorkspaces>,
}

impl Workspaces {
    /// The workspaces in `folder`, which is created; none of them is open yet. What they do by
    /// themselves ends with `scope`; their databases end with `databases`, which must come later, so
    /// that the calls that are still open when the hub stops can finish.
    ///
    /// # Errors
    /// If the folder cannot be created.
    pub fn open(
        folder: &Path,
        limits: ContentLimits,
        scope: TaskScope,
        databases: TaskScope,
    ) -> Result<Self, SyncError> {
        durable::create_private_folder(folder)
            .map_err(|error| PackFileError::new("create", folder, error))?;
        let open = Arc::new(OpenWorkspaces::default());
        scope.spawn("pack collection", collect_regularly(open.clone(), scope.token().clone()));
        Ok(Self {
            folder: folder.to_owned(),
            scope,
            databases,
            board: Arc::default(),
            budget: Arc::new(Budget::new(limits)),
            open,
        })
    }

    /// A workspace, opened if it is not yet, and created empty if there is none on disk. Whether
    /// there ought to be such a workspace is for the caller to know.
    ///
    /// # Errors
    /// Those of its database and folders. The next call tries again.
    pub async fn workspace(&self, id: WorkspaceId) -> Result<Arc<WorkspaceHub>, SyncError> {
        let cell = {
            let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
            open.entry(id).or_default().clone()
        };
        let opening = || {
            let folder = self.folder.join(id.to_string());
            let (budget, board) = (self.budget.clone(), self.board.clone());
            WorkspaceHub::open(id, folder, budget, board, &self.scope, &self.databases)
        };
        cell.get_or_try_init(opening).await.cloned()
    }

    /// Head and size of a workspace.
    ///
    /// # Errors
    /// If it cannot be opened or read.
    pub async fn summary(&self, id: WorkspaceId) -> Result<Summary, SyncError> {
        self.workspace(id).await?.summary().await
    }

    /// The version a member has applied completely; 0 if it never said so.
    ///
    /// # Errors
    /// If the workspace cannot be opened or read.
    pub async fn applied(&self, id: WorkspaceId, member: NodeId) -> Result<u64, SyncError> {
        self.workspace(id).await?.applied(member).await
    }

    /// The conflict copies that still exist in a workspace, oldest first, at most 10,000.
    ///
    /// # Errors
    /// If the workspace cannot be opened or read.
    pub async fn conflicts(&self, id: WorkspaceId) -> Result<Vec<Conflict>, SyncError> {
        self.workspace(id).await?.conflicts().await
    }

    /// Is cancelled when the workspaces close.
    #[must_use]
    pub fn closing(&self) -> CancellationToken {
        self.scope.token().clone()
    }

    /// Will tell of every head that moves from now on, in any workspace.
    #[must_use]
    pub fn moved(&self) -> MovedHeads {
        self.board.subscribe()
    }
}

/// Lets go of useless content in all workspaces that are open, one after another.
async fn collect_regularly(open: Arc<OpenWorkspaces>, closing: CancellationToken) {
    loop {
        tokio::select! {
            () = tokio::time::sleep(COLLECTION_PERIOD) => {}
            () = closing.cancelled() => return,
        }
        let workspaces: Vec<Arc<WorkspaceHub>> = {
            let open = open.lock().unwrap_or_else(PoisonError::into_inner);
            open.values().filter_map(|cell| cell.get().cloned()).collect()
        };
        for workspace in workspaces {
            let since_ms = unix_ms() - CONTENT_KEPT_MS;
            let id = workspace.id();
            tokio::select! {
                collected = workspace.collect(since_ms) => match collected {
                    Ok(0) => {}
                    Ok(packs) => tracing::info!(workspace = %id, packs, "content collected"),
                    Err(error) => tracing::error!(workspace = %id, %error, "collection failed"),
                },
                () = closing.cancelled() => return,
            }
        }
    }
}

#[cfg(test)]
mod tests;
