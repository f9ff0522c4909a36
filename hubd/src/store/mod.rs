//! What the hub remembers, in domain words.
//!
//! [`Store`] is implemented by [`sqlite::SqliteStore`]. It is deliberately free of that engine's
//! habits: every method is one transaction, named by what it means, and nothing outside this folder
//! knows SQL. A method that changes something returns once the change survives power loss.
//!
//! No handler of a live session waits for the store, except where its answer means "durable".

pub mod database;
pub mod events;
pub mod fault;
#[cfg(test)]
pub(crate) mod fixtures;
pub mod history;
pub mod identity;
pub mod offline;
pub mod records;
pub mod source;
pub mod sqlite;
pub mod workspace;

use std::collections::BTreeSet;

use async_trait::async_trait;
use cortex_shared::ids::{CommitId, MeshId, NodeId, TaskId, WorkspaceId};
use cortex_shared::labels::Labels;
use cortex_shared::secret::InviteId;

pub use database::DatabaseError;
pub use identity::{
    CaStage, CaState, CertificateState, CloneSuspicion, Machine, NewCertificate, Presented,
    RenewOutcome, RenewRefusal, Renewal, RenewalProof,
};
pub use records::{
    Acceptance, Actor, AuditHead, AuditLine, Caller, Facts, IdempotencyKey, Invite, InviteKind,
    KeyHash, LabelChange, LabelRefusal, LateOutcome, LateReport, NewAudit, NewInvite, NewTask,
    Node, NodePolicy, NodeRedemption, Operator, OperatorRecord, OperatorRedemption, RedeemRefusal,
    Scope, ShownCommand, SkillOrigin, SkillVersion, TaskEnd, TaskEndState, TaskQuery, TaskRecord,
    Verdict, Workspace,
};
pub use source::{InvalidRange, SourceRange};

/// Why the store could not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The database.
    #[error(transparent)]
    Database(#[from] DatabaseError),
    /// Somebody else has changed the end of the audit log: nothing is done that it would have to hold.
    #[error(
        "the audit log ends at line {found}, but line {written} was the last that this hub wrote"
    )]
    AuditAltered {
        /// Number of the last line that is there.
        found: u64,
        /// Number of the last line of the hub.
        written: u64,
    },
    /// Something of that name exists.
    #[error("{what} {name:?} exists already")]
    Exists {
        /// Kind of thing.
        what: &'static str,
        /// Its name.
        name: String,
    },
    /// Nothing of that name exists.
    #[error("there is no {what} {name:?}")]
    NotFound {
        /// Kind of thing.
        what: &'static str,
        /// Its name or id.
        name: String,
    },
}

impl From<rusqlite::Error> for StoreError {
    fn from(error: rusqlite::Error) -> Self {
        Self::Database(error.into())
    }
}

/// The hub's memory. Times are milliseconds since the Unix epoch, by the hub's clock.
#[async_trait]
pub trait Store: Send + Sync + 'static {
    /// The mesh this store belongs to; made up at the first call.
    async fn mesh(&self) -> Result<MeshId, StoreError>;

    /// Which certificate authorities there are; `None` before the first was recorded.
    async fn ca_state(&self) -> Result<Option<CaState>, StoreError>;
    /// Records which authorities there are, with a line in the audit log if this is somebody's act.
    async fn set_ca_state(&self, state: CaState, audit: Option<NewAudit>)
    -> Result<(), StoreError>;

    /// Records an invite.
    async fn create_invite(&self, invite: NewInvite, audit: NewAudit) -> Result<(), StoreError>;
    /// All invites, newest first.
    async fn invites(&self) -> Result<Vec<Invite>, StoreError>;
    /// Makes an invite unusable; [`StoreError::NotFound`] if there is none.
    async fn revoke_invite(
        &self,
        id: InviteId,
        now_ms: i64,
        audit: NewAudit,
    ) -> Result<(), StoreError>;

    /// Forgets invites that nobody can use any more since before a time: those that have expired or were
    /// revoked by then. How many there were.
    async fn forget_invites(&self, before_ms: i64) -> Result<u64, StoreError>;

    /// Turns an invite into a node, as one compare-and-set. The same invite and key again gives the
    /// same node and uses nothing up.
    async fn redeem_node(
        &self,
        redemption: NodeRedemption,
    ) -> Result<Result<Node, RedeemRefusal>, StoreError>;
    /// Turns an invite into an operator, likewise.
    async fn redeem_operator(
        &self,
        redemption: OperatorRedemption,
    ) -> Result<Result<Operator, RedeemRefusal>, StoreError>;

    /// All nodes.
    async fn nodes(&self) -> Result<Vec<Node>, StoreError>;
    /// Remembers when these nodes were last seen and what they last said of themselves.
    async fn touch_nodes(&self, nodes: Vec<Node>) -> Result<(), StoreError>;
    /// Records the next certificate of a node, or, if a copy of its identity asks, that suspicion.
    async fn renew_node(&self, renewal: Renewal) -> Result<RenewOutcome, StoreError>;
    /// Records that a machine presented a copied identity; no change if the same was just recorded.
    async fn suspect_clone(
        &self,
        node: NodeId,
        suspicion: CloneSuspicion,
    ) -> Result<(), StoreError>;

    /// Journals a task as accepted, before anyone else hears of it; or finds the task that the same
    /// actor's idempotency key has led to before, and journals nothing.
    async fn accept_task(&self, task: NewTask) -> Result<Acceptance, StoreError>;
    /// Journals how a task ended. The first verdict stands; a later one changes nothing.
    async fn end_task(&self, id: TaskId, end: TaskEnd) -> Result<(), StoreError>;
    /// Adds what a node reports of a task that has a verdict without it. Changes nothing if this is known
    /// already, if the verdict was the node's own, or if it is not a task of this node.
    async fn add_late_outcome(
        &self,
        id: TaskId,
        node: NodeId,
        outcome: TaskEnd,
    ) -> Result<LateReport, StoreError>;
    /// Records that somebody wants a command to end, unless its node has said how it ended.
    async fn want_cancel(&self, id: TaskId) -> Result<(), StoreError>;
    /// Those of these tasks that have a verdict, are wanted to end, and of whose end their node has not
    /// said anything yet.
    async fn tasks_to_cancel(
        &self,
        node: NodeId,
        held: Vec<TaskId>,
    ) -> Result<Vec<TaskId>, StoreError>;
    /// Every task without a verdict.
    async fn open_tasks(&self) -> Result<Vec<TaskRecord>, StoreError>;
    /// One task.
    async fn task(&self, id: TaskId) -> Result<Option<TaskRecord>, StoreError>;
    /// At most two tasks whose ids end in these bytes, of which there are at least four.
    async fn tasks_ending_in(&self, ending: Vec<u8>) -> Result<Vec<TaskRecord>, StoreError>;
    /// Tasks, newest first.
    async fn tasks(&self, query: TaskQuery) -> Result<Vec<TaskRecord>, StoreError>;
    /// What was kept of a task's specification to repeat it; `None` if it was not kept.
    async fn task_spec(&self, id: TaskId) -> Result<Option<Vec<u8>>, StoreError>;

    /// All workspaces with their members.
    async fn workspaces(&self) -> Result<Vec<Workspace>, StoreError>;
    /// The workspaces that a node is a member of.
    async fn memberships(&self, node: NodeId) -> Result<BTreeSet<WorkspaceId>, StoreError>;
    /// Records a workspace; [`StoreError::Exists`] if the name is taken.
    async fn create_workspace(
        &self,
        workspace: Workspace,
        audit: NewAudit,
    ) -> Result<(), StoreError>;
    /// Forgets a workspace and its memberships; its name is free again. It is listed as deleted until its
    /// content is removed. [`StoreError::NotFound`] if there is none.
    async fn delete_workspace(
        &self,
        workspace: WorkspaceId,
        audit: NewAudit,
    ) -> Result<(), StoreError>;
    /// Deleted workspaces of which content may be left.
    async fn deleted_workspaces(&self) -> Result<Vec<WorkspaceId>, StoreError>;
    /// Notes that the content of a deleted workspace is gone.
    async fn workspace_removed(&self, workspace: WorkspaceId) -> Result<(), StoreError>;
    /// Makes a node a member; no change, and no line in the audit log, if it is one.
    async fn attach(
        &self,
        workspace: WorkspaceId,
        node: NodeId,
        audit: NewAudit,
    ) -> Result<(), StoreError>;
    /// Ends a membership; likewise if there is none.
    async fn detach(
        &self,
        workspace: WorkspaceId,
        node: NodeId,
        audit: NewAudit,
    ) -> Result<(), StoreError>;

    /// Versions of one skill, or of all: by name, then oldest first. What is pending is among them.
    async fn skills(&self, skill: Option<String>) -> Result<Vec<SkillVersion>, StoreError>;
    /// Records a version as pending: it is about to be made, and nobody else makes it.
    /// [`StoreError::Exists`] if somebody has.
    async fn begin_skill(&self, version: SkillVersion) -> Result<(), StoreError>;
    /// Makes a pending version the current one of its skill, at this time; no change, and no line in the
    /// audit log, if it is not pending.
    async fn finish_skill(
        &self,
        id: CommitId,
        now_ms: i64,
        audit: NewAudit,
    ) -> Result<(), StoreError>;
    /// Forgets a pending version: it was not made.
    async fn abandon_skill(&self, id: CommitId) -> Result<(), StoreError>;
    /// Ends the current version of a skill, which has none from then on; [`StoreError::NotFound`] if this
    /// is not a current one.
    async fn remove_skill(
        &self,
        id: CommitId,
        now_ms: i64,
        audit: NewAudit,
    ) -> Result<(), StoreError>;

    // Authority over nodes. Each is in the audit log in the same transaction.

    /// Revokes a node; the first time stands, and a repetition is not in the audit log.
    async fn revoke_node(&self, id: NodeId, now_ms: i64, audit: NewAudit)
    -> Result<(), StoreError>;
    /// Removes a node, its memberships and its use of an invite.
    async fn forget_node(&self, id: NodeId, audit: NewAudit) -> Result<(), StoreError>;
    /// Changes labels; returns all labels of the node after it.
    async fn label_node(
        &self,
        id: NodeId,
        change: LabelChange,
        audit: NewAudit,
    ) -> Result<Result<Labels, LabelRefusal>, StoreError>;
    /// Renames a node; [`StoreError::Exists`] if the name is taken.
    async fn rename_node(
        &self,
        id: NodeId,
        name: String,
        audit: NewAudit,
    ) -> Result<(), StoreError>;
    /// Withholds new commands from a node, or gives it commands again.
    async fn cordon_node(
        &self,
        id: NodeId,
        cordoned: bool,
        audit: NewAudit,
    ) -> Result<(), StoreError>;
    /// Sets the hub's policy for a node.
    async fn set_node_policy(
        &self,
        id: NodeId,
        policy: NodePolicy,
        audit: NewAudit,
    ) -> Result<(), StoreError>;

    /// All operators that have ever logged in, by name.
    async fn operators(&self) -> Result<Vec<OperatorRecord>, StoreError>;
    /// Revokes an operator and the invites in its name; [`StoreError::NotFound`] if there is neither. Its
    /// commands that may still run are unwanted from now on, as by [`Store::want_cancel`]; those that have a
    /// verdict without their node's word are returned.
    async fn revoke_operator(
        &self,
        name: String,
        now_ms: i64,
        audit: NewAudit,
    ) -> Result<Vec<(TaskId, NodeId)>, StoreError>;

    /// Adds a line to the audit log that speaks of no change, such as a refusal.
    async fn record_audit(&self, audit: NewAudit) -> Result<(), StoreError>;
    /// At most `limit` lines of the audit log after this number, oldest first; from the very first
    /// for `None`. A line whose hashes are damaged comes with hashes that fit nothing.
    async fn audit_page(
        &self,
        after_seq: Option<u64>,
        limit: u32,
    ) -> Result<Vec<AuditLine>, StoreError>;
    /// The last line of the audit log that the hub wrote, by its own memory, whatever the log holds now;
    /// after a start, the one that it found.
    async fn audit_head(&self) -> Result<AuditHead, StoreError>;
    /// Takes the end of the audit log for its own as it is now, and writes this line after it.
    async fn accept_audit(&self, audit: NewAudit) -> Result<(), StoreError>;
}
