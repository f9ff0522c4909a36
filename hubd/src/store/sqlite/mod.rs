//! The store in SQLite: one file, one writer with group commit, readers beside it (`store::database`).

mod audit;
mod identity;
mod invites;
mod nodes;
mod tasks;
mod workspaces;

use std::path::PathBuf;

use async_trait::async_trait;
use cortex_shared::ids::{MeshId, NodeId, TaskId, WorkspaceId};
use cortex_shared::secret::InviteId;
use cortex_shared::tasks::TaskScope;
use rusqlite::{Connection, OptionalExtension as _};

use super::database::{Database, DatabaseError, Settings};
use super::{
    CaState, CloneSuspicion, Invite, NewAudit, NewInvite, NewTask, Node, NodeRedemption, Operator,
    OperatorRedemption, RedeemRefusal, RenewOutcome, Renewal, Store, StoreError, TaskEnd, Workspace,
};

const SETTINGS: Settings = Settings {
    migrations: &[
        include_str!("migrations/0001_first.sql"),
        include_str!("migrations/0002_authority.sql"),
    ],
    // The journal's random ids outgrow SQLite's default soon, and there is only one such database.
    cache_kib: 64 * 1024,
};

/// The hub's main database. What it acknowledged survives power loss; what waits in its queue when
/// the process dies was never acknowledged.
pub struct SqliteStore {
    database: Database,
}

impl SqliteStore {
    /// Opens or creates the database file, and brings it up to date. It ends with `scope`, once it has
    /// written what it had accepted: so that must end after all that still has something to write.
    ///
    /// # Errors
    /// If the file cannot be opened, is damaged, or is of a newer version.
    pub async fn open(path: PathBuf, scope: &TaskScope) -> Result<Self, StoreError> {
        Ok(Self { database: Database::open(path, SETTINGS, scope).await? })
    }
}

#[async_trait]
impl Store for SqliteStore {
    async fn mesh(&self) -> Result<MeshId, StoreError> {
        self.database.write(mesh).await
    }

    async fn ca_state(&self) -> Result<Option<CaState>, StoreError> {
        self.database.read(identity::ca_state).await
    }

    async fn set_ca_state(
        &self,
        state: CaState,
        audit: Option<NewAudit>,
    ) -> Result<(), StoreError> {
        self.database.write(move |t| identity::set_ca_state(t, &state, audit.as_ref())).await
    }

    async fn create_invite(&self, invite: NewInvite, audit: NewAudit) -> Result<(), StoreError> {
        self.database.write(move |t| invites::create(t, &invite, &audit)).await
    }

    async fn invites(&self) -> Result<Vec<Invite>, StoreError> {
        self.database.read(invites::list).await
    }

    async fn revoke_invite(
        &self,
        id: InviteId,
        now_ms: i64,
        audit: NewAudit,
    ) -> Result<(), StoreError> {
        self.database.write(move |t| invites::revoke(t, &id, now_ms, &audit)).await
    }

    async fn redeem_node(
        &self,
        redemption: NodeRedemption,
    ) -> Result<Result<Node, RedeemRefusal>, StoreError> {
        self.database.write(move |t| invites::redeem_node(t, redemption)).await
    }

    async fn redeem_operator(
        &self,
        redemption: OperatorRedemption,
    ) -> Result<Result<Operator, RedeemRefusal>, StoreError> {
        self.database.write(move |t| invites::redeem_operator(t, &redemption)).await
    }

    async fn nodes(&self) -> Result<Vec<Node>, StoreError> {
        self.database.read(nodes::list).await
    }

    async fn touch_nodes(&self, nodes: Vec<Node>) -> Result<(), StoreError> {
        self.database.write(move |t| nodes::touch(t, &nodes)).await
    }

    async fn renew_node(&self, renewal: Renewal) -> Result<RenewOutcome, StoreError> {
        self.database.write(move |t| identity::renew(t, &renewal)).await
    }

    async fn suspect_clone(
        &self,
        node: NodeId,
        suspicion: CloneSuspicion,
    ) -> Result<(), StoreError> {
        self.database.write(move |t| identity::suspect_clone(t, node, &suspicion)).await
    }

    async fn revoke_node(
        &self,
        id: NodeId,
        now_ms: i64,
        audit: NewAudit,
    ) -> Result<(), StoreError> {
        self.database.write(move |t| nodes::revoke(t, id, now_ms, &audit)).await
    }

    async fn accept_task(&self, task: NewTask) -> Result<(), StoreError> {
        self.database.write(move |t| tasks::accept(t, &task)).await
    }

    async fn end_task(&self, id: TaskId, end: TaskEnd) -> Result<(), StoreError> {
        self.database.write(move |t| tasks::end(t, id, &end)).await
    }

    async fn end_open_tasks(&self, reason: String, now_ms: i64) -> Result<u64, StoreError> {
        self.database.write(move |t| tasks::end_open(t, &reason, now_ms)).await
    }

    async fn workspaces(&self) -> Result<Vec<Workspace>, StoreError> {
        self.database.read(workspaces::list).await
    }

    async fn create_workspace(&self, workspace: Workspace) -> Result<(), StoreError> {
        self.database.write(move |t| workspaces::create(t, &workspace)).await
    }

    async fn attach(
        &self,
        workspace: WorkspaceId,
        node: NodeId,
        now_ms: i64,
    ) -> Result<(), StoreError> {
        self.database.write(move |t| workspaces::attach(t, workspace, node, now_ms)).await
    }

    async fn detach(&self, workspace: WorkspaceId, node: NodeId) -> Result<(), StoreError> {
        self.database.write(move |t| workspaces::detach(t, workspace, node)).await
    }
}

fn mesh(connection: &Connection) -> Result<MeshId, StoreError> {
    let stored: Option<Vec<u8>> = connection
        .query_row("SELECT value FROM meta WHERE key = 'mesh'", [], |row| row.get(0))
        .optional()?;
    match stored {
        Some(bytes) => MeshId::from_slice(&bytes).map_err(|_| damaged("mesh id")),
        None => {
            let mesh = MeshId::new();
            connection
                .execute("INSERT INTO meta VALUES ('mesh', ?)", [mesh.as_bytes().as_slice()])?;
            Ok(mesh)
        }
    }
}

const fn damaged(what: &'static str) -> StoreError {
    StoreError::Database(DatabaseError::Damaged { what })
}

/// Reads a JSON column that this store wrote.
fn from_json<T: serde::de::DeserializeOwned>(
    text: &str,
    what: &'static str,
) -> Result<T, StoreError> {
    serde_json::from_str(text).map_err(|_| damaged(what))
}

/// Writes a value as a JSON column.
fn to_json<T: serde::Serialize>(value: &T) -> Result<String, StoreError> {
    serde_json::to_string(value).map_err(|_| damaged("value"))
}

fn node_id(bytes: &[u8]) -> Result<NodeId, StoreError> {
    NodeId::from_slice(bytes).map_err(|_| damaged("node id"))
}

fn workspace_id(bytes: &[u8]) -> Result<WorkspaceId, StoreError> {
    WorkspaceId::from_slice(bytes).map_err(|_| damaged("workspace id"))
}

/// Whether a statement failed because a row of that key exists.
fn is_duplicate(error: &rusqlite::Error) -> bool {
    error.sqlite_error_code() == Some(rusqlite::ErrorCode::ConstraintViolation)
}

#[cfg(test)]
mod tests;
