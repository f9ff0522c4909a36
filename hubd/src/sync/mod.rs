//! Workspace versions and content.
//!
//! [`Workspaces`] owns all of them and opens each when it is first asked for; [`WorkspaceHub`] is one
//! workspace: its store (`store::workspace`) and its pack files, kept in step. On disk:
//!
//! ```text
//! <folder>/<workspace id>/ws.db          versions, and which pack holds which chunk
//!                        /packs/…        the content, as it was received
//!                        /tmp/           packs on their way in
//! <folder>/deleted-<id>                  a workspace that is being removed
//! <folder>/ballast                       room for the databases on a full disk (`space`)
//! ```
//!
//! The hub orders, checks, stores and forwards. It never merges, never looks into content beyond
//! checking hashes, and keeps no state for a member but the version it has applied.
//!
//! A crash loses what was not acknowledged. A pack file that no database row knows is adopted at the
//! next start. A row whose file is gone or damaged is forgotten, then or when the file is read, and
//! members are asked for its content again (`WorkspaceHub::wanted`).

pub mod adopt;
pub mod budget;
pub mod collection;
pub mod heads;
pub mod members;
pub mod pack_files;
pub mod past;
mod space;
mod workspace;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use cortex_shared::durable;
use cortex_shared::ids::{NodeId, WorkspaceId};
use cortex_shared::pack::InvalidPack;
use cortex_shared::tasks::TaskScope;
use tokio::sync::OnceCell;
use tokio_util::sync::CancellationToken;

use self::budget::Budget;
pub use self::budget::ContentLimits;
use self::collection::{Pressure, collect_all};
use self::heads::HeadBoard;
pub use self::heads::MovedHeads;
pub use self::pack_files::PackFileError;
use self::space::Space;
use self::workspace::blocking;
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
    /// There is no room for content on the disk, beside what stays free.
    #[error("the hub's disk is full")]
    Full,
    /// The workspace may not store more.
    #[error("the workspace has {stored_bytes} bytes on the hub, of {quota_bytes} that it may have")]
    OverQuota {
        /// What it has.
        stored_bytes: u64,
        /// What it may have.
        quota_bytes: u64,
    },
    /// Members said so often that versions were lost that nobody is believed for a while.
    #[error(
        "the history of this workspace was begun anew several times a moment ago; again in {} s",
        wait.as_secs() + 1
    )]
    RestartedTooOften {
        /// How long.
        wait: Duration,
    },
    /// The workspace was deleted.
    #[error("the workspace was deleted")]
    Deleted,
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
            Self::Full => true,
            _ => false,
        }
    }

    /// Whether the caller works in another history.
    #[must_use]
    pub fn is_wrong_epoch(&self) -> bool {
        matches!(self, Self::Store(StoreError::WrongEpoch { .. }))
    }
}

/// Before the name of a folder that is being removed.
const DELETED_PREFIX: &str = "deleted-";

/// Workspaces that are open, or are being opened; `None` for those that were deleted.
type OpenWorkspaces = Mutex<HashMap<WorkspaceId, Option<Arc<OnceCell<Arc<WorkspaceHub>>>>>>;

/// Opens workspaces, and has what they share.
pub(crate) struct Opener {
    folder: PathBuf,
    scope: TaskScope,
    databases: TaskScope,
    board: Arc<HeadBoard>,
    budget: Arc<Budget>,
    space: Arc<Space>,
    pressure: Arc<Pressure>,
    open: OpenWorkspaces,
}

impl Opener {
    async fn workspace(&self, id: WorkspaceId) -> Result<Arc<WorkspaceHub>, SyncError> {
        let cell = {
            let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
            open.entry(id).or_insert_with(|| Some(Arc::default())).clone()
        };
        let cell = cell.ok_or(SyncError::Deleted)?;
        let opening = || WorkspaceHub::open(id, self.folder.join(id.to_string()), self);
        cell.get_or_try_init(opening).await.cloned()
    }

    /// The workspaces that have a folder.
    async fn on_disk(&self) -> Vec<WorkspaceId> {
        let folder = self.folder.clone();
        let names = blocking(move || {
            let failed = |error| PackFileError::new("list", &folder, error);
            let entries = std::fs::read_dir(&folder).map_err(failed)?;
            Ok(entries.flatten().map(|entry| entry.file_name()).collect::<Vec<_>>())
        });
        let names = names.await.unwrap_or_else(|error| {
            tracing::error!(%error, "the folder of workspaces cannot be read");
            Vec::new()
        });
        names.iter().filter_map(|name| name.to_str()?.parse().ok()).collect()
    }
}

/// All workspaces of a hub.
pub struct Workspaces(Arc<Opener>);

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
        let opener = Arc::new(Opener {
            folder: folder.to_owned(),
            scope: scope.clone(),
            databases,
            board: Arc::default(),
            budget: Arc::new(Budget::new(limits)),
            space: Arc::new(Space::new(folder, limits.reserve_bytes)),
            pressure: Arc::default(),
            open: OpenWorkspaces::default(),
        });
        Ok(Self(opener))
    }

    /// Waits until somebody is in want of room, or wants less to be kept. For one waiter.
    pub async fn pressed_for_room(&self) {
        self.0.pressure.wait().await;
    }

    /// Lets go of what is of no use any more, in all workspaces; sooner than usual after
    /// [`Workspaces::pressed_for_room`]. What it did, in words.
    ///
    /// # Errors
    /// If it failed in a workspace; it goes on with the others first.
    pub async fn collect(&self) -> Result<String, SyncError> {
        collect_all(&self.0).await
    }

    /// A workspace, opened if it is not yet, and created empty if there is none on disk. Whether
    /// there ought to be such a workspace is for the caller to know.
    ///
    /// # Errors
    /// Those of its database and folders: the next call tries again. [`SyncError::Deleted`] for good.
    pub async fn workspace(&self, id: WorkspaceId) -> Result<Arc<WorkspaceHub>, SyncError> {
        self.0.workspace(id).await
    }

    /// Removes a workspace and its content. Calls that are using it fail or finish on what is left. If
    /// the hub stops meanwhile, the rest goes with the next call for the same workspace.
    ///
    /// # Errors
    /// Those of the file system.
    pub async fn delete(&self, id: WorkspaceId) -> Result<(), SyncError> {
        self.0.open.lock().unwrap_or_else(PoisonError::into_inner).insert(id, None);
        let live = self.0.folder.join(id.to_string());
        let dead = self.0.folder.join(format!("{DELETED_PREFIX}{id}"));
        blocking(move || {
            let gone = |result: std::io::Result<()>| match result {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
                _ => Ok(()),
            };
            // Two steps, so that half of a workspace never looks like one.
            gone(std::fs::rename(&live, &dead))
                .map_err(|error| PackFileError::new("move", &live, error))?;
            gone(std::fs::remove_dir_all(&dead))
                .map_err(|error| PackFileError::new("remove", &dead, error))?;
            Ok(())
        })
        .await
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
        self.0.scope.token().clone()
    }

    /// Will tell of every head that moves from now on, in any workspace.
    #[must_use]
    pub fn moved(&self) -> MovedHeads {
        self.0.board.subscribe()
    }
}

#[cfg(test)]
mod tests;
