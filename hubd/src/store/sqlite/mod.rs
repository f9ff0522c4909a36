//! The store in SQLite: one file, one writer thread with group commit, one reader beside it.

mod invites;
mod nodes;
mod tasks;
mod workspaces;

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use cortex_shared::ids::{MeshId, NodeId, TaskId, WorkspaceId};
use cortex_shared::secret::InviteId;
use rusqlite::{Connection, OptionalExtension as _, Transaction};

use super::writer::{self, Writer};
use super::{
    Invite, NewInvite, NewTask, Node, NodeRedemption, Operator, OperatorRedemption, RedeemRefusal,
    Store, StoreError, TaskEnd, Workspace,
};

/// Each leads one version further. Only ever added to.
const MIGRATIONS: [&str; 1] = [include_str!("migrations/0001_first.sql")];

/// The hub's main database. What it acknowledged survives power loss; what waits in its queue when
/// the process dies was never acknowledged.
pub struct SqliteStore {
    writer: Writer,
    /// Held only within `spawn_blocking`, never across an await.
    reader: Arc<Mutex<Connection>>,
}

impl SqliteStore {
    /// Opens or creates the database file, and brings it up to date.
    ///
    /// # Errors
    /// If the file cannot be opened, is damaged, or is of a newer version.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        let mut connection = writer::open(path)?;
        writer::migrate(&mut connection, &MIGRATIONS)?;
        let reader = writer::open(path)?;
        reader.pragma_update(None, "query_only", "ON")?;
        let writer = Writer::start(connection)
            .map_err(|error| StoreError::CommitFailed { reason: error.to_string() })?;
        Ok(Self { writer, reader: Arc::new(Mutex::new(reader)) })
    }

    async fn read<T, F>(&self, work: F) -> Result<T, StoreError>
    where
        T: Send + 'static,
        F: FnOnce(&Connection) -> Result<T, StoreError> + Send + 'static,
    {
        let reader = Arc::clone(&self.reader);
        tokio::task::spawn_blocking(move || {
            // A panic while reading leaves a connection that is still good.
            work(&reader.lock().unwrap_or_else(PoisonError::into_inner))
        })
        .await
        .map_err(|_| StoreError::Closed)?
    }
}

#[async_trait]
impl Store for SqliteStore {
    async fn mesh(&self) -> Result<MeshId, StoreError> {
        self.writer.write(mesh).await
    }

    async fn create_invite(&self, invite: NewInvite) -> Result<(), StoreError> {
        self.writer.write(move |t| invites::create(t, &invite)).await
    }

    async fn invites(&self) -> Result<Vec<Invite>, StoreError> {
        self.read(invites::list).await
    }

    async fn revoke_invite(&self, id: InviteId, now_ms: i64) -> Result<(), StoreError> {
        self.writer.write(move |t| invites::revoke(t, &id, now_ms)).await
    }

    async fn redeem_node(
        &self,
        redemption: NodeRedemption,
    ) -> Result<Result<Node, RedeemRefusal>, StoreError> {
        self.writer.write(move |t| invites::redeem_node(t, redemption)).await
    }

    async fn redeem_operator(
        &self,
        redemption: OperatorRedemption,
    ) -> Result<Result<Operator, RedeemRefusal>, StoreError> {
        self.writer.write(move |t| invites::redeem_operator(t, &redemption)).await
    }

    async fn nodes(&self) -> Result<Vec<Node>, StoreError> {
        self.read(nodes::list).await
    }

    async fn touch_nodes(&self, nodes: Vec<Node>) -> Result<(), StoreError> {
        self.writer.write(move |t| nodes::touch(t, &nodes)).await
    }

    async fn accept_task(&self, task: NewTask) -> Result<(), StoreError> {
        self.writer.write(move |t| tasks::accept(t, &task)).await
    }

    async fn end_task(&self, id: TaskId, end: TaskEnd) -> Result<(), StoreError> {
        self.writer.write(move |t| tasks::end(t, id, &end)).await
    }

    async fn end_open_tasks(&self, reason: String, now_ms: i64) -> Result<u64, StoreError> {
        self.writer.write(move |t| tasks::end_open(t, &reason, now_ms)).await
    }

    async fn workspaces(&self) -> Result<Vec<Workspace>, StoreError> {
        self.read(workspaces::list).await
    }

    async fn create_workspace(&self, workspace: Workspace) -> Result<(), StoreError> {
        self.writer.write(move |t| workspaces::create(t, &workspace)).await
    }

    async fn attach(
        &self,
        workspace: WorkspaceId,
        node: NodeId,
        now_ms: i64,
    ) -> Result<(), StoreError> {
        self.writer.write(move |t| workspaces::attach(t, workspace, node, now_ms)).await
    }

    async fn detach(&self, workspace: WorkspaceId, node: NodeId) -> Result<(), StoreError> {
        self.writer.write(move |t| workspaces::detach(t, workspace, node)).await
    }

    async fn close(&self) {
        // Everything queued before this has been answered once this has.
        if let Err(error) = self.writer.write(|_| Ok(())).await {
            tracing::warn!(%error, "the store did not close in order");
        }
    }
}

fn mesh(transaction: &Transaction<'_>) -> Result<MeshId, StoreError> {
    let stored: Option<Vec<u8>> = transaction
        .query_row("SELECT value FROM meta WHERE key = 'mesh'", [], |row| row.get(0))
        .optional()?;
    match stored {
        Some(bytes) => {
            MeshId::from_slice(&bytes).map_err(|_| StoreError::Corrupt { what: "mesh id" })
        }
        None => {
            let mesh = MeshId::new();
            transaction
                .execute("INSERT INTO meta VALUES ('mesh', ?)", [mesh.as_bytes().as_slice()])?;
            Ok(mesh)
        }
    }
}

/// Reads a JSON column that this store wrote.
fn from_json<T: serde::de::DeserializeOwned>(
    text: &str,
    what: &'static str,
) -> Result<T, StoreError> {
    serde_json::from_str(text).map_err(|_| StoreError::Corrupt { what })
}

/// Writes a value as a JSON column.
fn to_json<T: serde::Serialize>(value: &T) -> Result<String, StoreError> {
    serde_json::to_string(value).map_err(|_| StoreError::Corrupt { what: "value" })
}

fn node_id(bytes: &[u8]) -> Result<NodeId, StoreError> {
    NodeId::from_slice(bytes).map_err(|_| StoreError::Corrupt { what: "node id" })
}

fn workspace_id(bytes: &[u8]) -> Result<WorkspaceId, StoreError> {
    WorkspaceId::from_slice(bytes).map_err(|_| StoreError::Corrupt { what: "workspace id" })
}

/// Whether a statement failed because a row of that key exists.
fn is_duplicate(error: &rusqlite::Error) -> bool {
    error.sqlite_error_code() == Some(rusqlite::ErrorCode::ConstraintViolation)
}

#[cfg(test)]
mod tests;
