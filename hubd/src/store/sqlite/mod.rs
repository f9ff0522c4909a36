//! The store in SQLite: one file, one writer with group commit, readers beside it (`store::database`).

mod audit;
mod authority;
mod identity;
mod invites;
mod nodes;
mod skills;
mod tasks;
mod workspaces;

use std::collections::BTreeSet;
use std::path::PathBuf;

use async_trait::async_trait;
use cortex_shared::ids::{CommitId, MeshId, NodeId, TaskId, WorkspaceId};
use cortex_shared::labels::Labels;
use cortex_shared::secret::InviteId;
use cortex_shared::tasks::TaskScope;
use rusqlite::{Connection, OptionalExtension as _};

use super::database::{Database, DatabaseError, Settings};
use super::{
    Acceptance, AuditHead, AuditLine, CaState, CloneSuspicion, Invite, LabelChange, LabelRefusal,
    LateReport, NewAudit, NewInvite, NewTask, Node, NodePolicy, NodeRedemption, Operator,
    OperatorRecord, OperatorRedemption, RedeemRefusal, RenewOutcome, Renewal, SkillVersion, Store,
    StoreError, TaskEnd, TaskQuery, TaskRecord, Workspace,
};

pub(super) use self::audit::page as audit_page;
pub(super) use self::identity::ca_state;

const SETTINGS: Settings = Settings {
    migrations: &[
        include_str!("migrations/0001_first.sql"),
        include_str!("migrations/0002_authority.sql"),
        include_str!("migrations/0003_workspace_scope.sql"),
        include_str!("migrations/0004_tasks.sql"),
        include_str!("migrations/0005_cancel_wanted.sql"),
        include_str!("migrations/0006_deleted_workspaces.sql"),
        include_str!("migrations/0007_network.sql"),
        include_str!("migrations/0009_skills.sql"),
        include_str!("migrations/0010_unresolved_tasks.sql"),
    ],
    // The journal's random ids outgrow SQLite's default soon, and there is only one such database.
    cache_kib: 64 * 1024,
};

/// Version of the tables of this program.
pub(super) const SCHEMA_VERSION: usize = SETTINGS.migrations.len();

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
        let database = Database::open(path, SETTINGS, scope).await?;
        // From here on, what others do to the end of the audit log shows.
        database.write(audit::remembered).await?;
        Ok(Self { database })
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

    async fn forget_invites(&self, before_ms: i64) -> Result<u64, StoreError> {
        self.database.write(move |t| invites::forget(t, before_ms)).await
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

    async fn accept_task(&self, task: NewTask) -> Result<Acceptance, StoreError> {
        self.database.write(move |t| tasks::accept(t, &task)).await
    }

    async fn end_task(&self, id: TaskId, end: TaskEnd) -> Result<(), StoreError> {
        self.database.write(move |t| tasks::end(t, id, &end)).await
    }

    async fn add_late_outcome(
        &self,
        id: TaskId,
        node: NodeId,
        outcome: TaskEnd,
    ) -> Result<LateReport, StoreError> {
        self.database.write(move |t| tasks::add_late_outcome(t, id, node, &outcome)).await
    }

    async fn want_cancel(&self, id: TaskId) -> Result<(), StoreError> {
        self.database.write(move |t| tasks::want_cancel(t, id)).await
    }

    async fn tasks_to_cancel(
        &self,
        node: NodeId,
        held: Vec<TaskId>,
    ) -> Result<Vec<TaskId>, StoreError> {
        self.database.read(move |c| tasks::to_cancel(c, node, &held)).await
    }

    async fn open_tasks(&self) -> Result<Vec<TaskRecord>, StoreError> {
        self.database.read(tasks::open).await
    }

    async fn task(&self, id: TaskId) -> Result<Option<TaskRecord>, StoreError> {
        self.database.read(move |c| tasks::one(c, id)).await
    }

    async fn tasks_ending_in(&self, ending: Vec<u8>) -> Result<Vec<TaskRecord>, StoreError> {
        self.database.read(move |c| tasks::ending_in(c, &ending)).await
    }

    async fn tasks(&self, query: TaskQuery) -> Result<Vec<TaskRecord>, StoreError> {
        self.database.read(move |c| tasks::list(c, &query)).await
    }

    async fn task_spec(&self, id: TaskId) -> Result<Option<Vec<u8>>, StoreError> {
        self.database.read(move |c| tasks::spec(c, id)).await
    }

    async fn workspaces(&self) -> Result<Vec<Workspace>, StoreError> {
        self.database.read(workspaces::list).await
    }

    async fn memberships(&self, node: NodeId) -> Result<BTreeSet<WorkspaceId>, StoreError> {
        self.database.read(move |c| workspaces::of_node(c, node)).await
    }

    async fn create_workspace(
        &self,
        workspace: Workspace,
        audit: NewAudit,
    ) -> Result<(), StoreError> {
        let create = move |t: &Connection| {
            workspaces::create(t, &workspace)?;
            audit::append(t, &audit)
        };
        self.database.write(create).await
    }

    async fn delete_workspace(
        &self,
        workspace: WorkspaceId,
        audit: NewAudit,
    ) -> Result<(), StoreError> {
        let delete = move |t: &Connection| {
            workspaces::delete(t, workspace, audit.at_ms)?;
            audit::append(t, &audit)
        };
        self.database.write(delete).await
    }

    async fn deleted_workspaces(&self) -> Result<Vec<WorkspaceId>, StoreError> {
        self.database.read(workspaces::deleted).await
    }

    async fn workspace_removed(&self, workspace: WorkspaceId) -> Result<(), StoreError> {
        self.database.write(move |t| workspaces::removed(t, workspace)).await
    }

    async fn attach(
        &self,
        workspace: WorkspaceId,
        node: NodeId,
        audit: NewAudit,
    ) -> Result<(), StoreError> {
        let attach = move |t: &Connection| {
            let changed = workspaces::attach(t, workspace, node, audit.at_ms)?;
            if changed { audit::append(t, &audit) } else { Ok(()) }
        };
        self.database.write(attach).await
    }

    async fn detach(
        &self,
        workspace: WorkspaceId,
        node: NodeId,
        audit: NewAudit,
    ) -> Result<(), StoreError> {
        let detach = move |t: &Connection| {
            let changed = workspaces::detach(t, workspace, node)?;
            if changed { audit::append(t, &audit) } else { Ok(()) }
        };
        self.database.write(detach).await
    }

    async fn skills(&self, skill: Option<String>) -> Result<Vec<SkillVersion>, StoreError> {
        self.database.read(move |c| skills::list(c, skill.as_deref())).await
    }

    async fn begin_skill(&self, version: SkillVersion) -> Result<(), StoreError> {
        self.database.write(move |t| skills::begin(t, &version)).await
    }

    async fn finish_skill(
        &self,
        id: CommitId,
        now_ms: i64,
        audit: NewAudit,
    ) -> Result<(), StoreError> {
        let finish = move |t: &Connection| {
            if skills::finish(t, id, now_ms)? { audit::append(t, &audit) } else { Ok(()) }
        };
        self.database.write(finish).await
    }

    async fn abandon_skill(&self, id: CommitId) -> Result<(), StoreError> {
        self.database.write(move |t| skills::abandon(t, id)).await
    }

    async fn remove_skill(
        &self,
        id: CommitId,
        now_ms: i64,
        audit: NewAudit,
    ) -> Result<(), StoreError> {
        let remove = move |t: &Connection| {
            skills::remove(t, id, now_ms)?;
            audit::append(t, &audit)
        };
        self.database.write(remove).await
    }

    async fn revoke_node(
        &self,
        id: NodeId,
        now_ms: i64,
        audit: NewAudit,
    ) -> Result<(), StoreError> {
        self.database.write(move |t| authority::revoke_node(t, id, now_ms, &audit)).await
    }

    async fn forget_node(&self, id: NodeId, audit: NewAudit) -> Result<(), StoreError> {
        self.database.write(move |t| authority::forget_node(t, id, &audit)).await
    }

    async fn label_node(
        &self,
        id: NodeId,
        change: LabelChange,
        audit: NewAudit,
    ) -> Result<Result<Labels, LabelRefusal>, StoreError> {
        self.database.write(move |t| authority::label_node(t, id, change, &audit)).await
    }

    async fn rename_node(
        &self,
        id: NodeId,
        name: String,
        audit: NewAudit,
    ) -> Result<(), StoreError> {
        self.database.write(move |t| authority::rename_node(t, id, &name, &audit)).await
    }

    async fn cordon_node(
        &self,
        id: NodeId,
        cordoned: bool,
        audit: NewAudit,
    ) -> Result<(), StoreError> {
        self.database.write(move |t| authority::cordon_node(t, id, cordoned, &audit)).await
    }

    async fn set_node_policy(
        &self,
        id: NodeId,
        policy: NodePolicy,
        audit: NewAudit,
    ) -> Result<(), StoreError> {
        self.database.write(move |t| authority::set_node_policy(t, id, &policy, &audit)).await
    }

    async fn operators(&self) -> Result<Vec<OperatorRecord>, StoreError> {
        self.database.read(authority::operators).await
    }

    async fn revoke_operator(
        &self,
        name: String,
        now_ms: i64,
        audit: NewAudit,
    ) -> Result<Vec<(TaskId, NodeId)>, StoreError> {
        self.database.write(move |t| authority::revoke_operator(t, &name, now_ms, &audit)).await
    }

    async fn record_audit(&self, audit: NewAudit) -> Result<(), StoreError> {
        self.database.write(move |t| audit::append(t, &audit)).await
    }

    async fn audit_page(
        &self,
        after_seq: Option<u64>,
        limit: u32,
    ) -> Result<Vec<AuditLine>, StoreError> {
        self.database.read(move |c| audit::page(c, after_seq, limit)).await
    }

    async fn audit_head(&self) -> Result<AuditHead, StoreError> {
        self.database.write(audit::remembered).await
    }

    async fn accept_audit(&self, audit: NewAudit) -> Result<(), StoreError> {
        self.database.write(move |t| audit::accept(t, &audit)).await
    }
}

/// The mesh, if it has been made up.
pub(super) fn known_mesh(connection: &Connection) -> Result<Option<MeshId>, StoreError> {
    let stored: Option<Vec<u8>> = connection
        .query_row("SELECT value FROM meta WHERE key = 'mesh'", [], |row| row.get(0))
        .optional()?;
    stored.map(|bytes| MeshId::from_slice(&bytes).map_err(|_| damaged("mesh id"))).transpose()
}

/// The ids of all workspaces.
pub(super) fn workspace_ids(connection: &Connection) -> Result<Vec<WorkspaceId>, StoreError> {
    let mut statement = connection.prepare("SELECT id FROM workspaces")?;
    statement.query_and_then([], |row| workspace_id(&row.get::<_, Vec<u8>>(0)?))?.collect()
}

fn mesh(connection: &Connection) -> Result<MeshId, StoreError> {
    match known_mesh(connection)? {
        Some(mesh) => Ok(mesh),
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
