//! A store that fails on demand, to show what a hub does on a bad disk.
//!
//! [`FaultStore`] stands before a real store and passes every call on, unless a [`Faults`] handle says
//! otherwise: it then holds calls before they reach the store, holds their answers after the store has
//! carried them out, slows them down, or fails them. Nothing here sleeps but a slow call; a test says
//! when a stall begins and ends, and can wait until so many calls are held.
//!
//! The benchmarks run a hub on it (`cortex-hubd bench`); `serve` never does.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use cortex_shared::ids::{CommitId, MeshId, NodeId, TaskId, WorkspaceId};
use cortex_shared::labels::Labels;
use cortex_shared::secret::InviteId;
use tokio::sync::watch;

use super::*;

/// What is wrong with the store.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Fault {
    /// Nothing.
    #[default]
    None,
    /// Calls wait before they reach the store.
    Stall,
    /// Calls are carried out, and their answers wait.
    StallAnswers,
    /// Each call takes this much longer.
    Slow(Duration),
    /// Each call fails, and changes nothing.
    Fail,
}

/// Says what is wrong with a [`FaultStore`], and sees what is asked of it. Clones share it.
#[derive(Clone, Default)]
pub struct Faults(Arc<State>);

#[derive(Default)]
struct State {
    fault: watch::Sender<Fault>,
    /// Calls that are held now, by method.
    held: watch::Sender<HashMap<&'static str, usize>>,
    /// How often each method was called.
    calls: Mutex<HashMap<&'static str, u64>>,
}

/// Counts a call as held as long as it exists.
struct Held<'a> {
    state: &'a State,
    method: &'static str,
}

impl<'a> Held<'a> {
    fn new(state: &'a State, method: &'static str) -> Self {
        state.held.send_modify(|held| *held.entry(method).or_default() += 1);
        Self { state, method }
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.state.held.send_modify(|held| {
            if let Some(count) = held.get_mut(self.method) {
                *count -= 1;
            }
        });
    }
}

impl Faults {
    /// From now on, for calls that are held and for those to come.
    pub fn set(&self, fault: Fault) {
        self.0.fault.send_replace(fault);
    }

    /// Waits until at least so many calls of a method of [`Store`] are held.
    pub async fn until_held(&self, method: &str, count: usize) {
        let mut held = self.0.held.subscribe();
        let enough = |held: &HashMap<_, _>| held.get(method).is_some_and(|held| *held >= count);
        // The sender is in `self`: it does not go away meanwhile.
        held.wait_for(enough).await.ok();
    }

    /// How often a method of [`Store`] was called.
    #[must_use]
    pub fn calls(&self, method: &str) -> u64 {
        let calls = self.0.calls.lock().unwrap_or_else(PoisonError::into_inner);
        calls.get(method).copied().unwrap_or_default()
    }

    async fn before(&self, method: &'static str) -> Result<(), StoreError> {
        *self.0.calls.lock().unwrap_or_else(PoisonError::into_inner).entry(method).or_default() +=
            1;
        self.hold_while(Fault::Stall, method).await;
        let fault = *self.0.fault.borrow();
        match fault {
            Fault::Slow(time) => tokio::time::sleep(time).await,
            Fault::Fail => {
                let reason = "a fault was asked for".to_owned();
                return Err(DatabaseError::NotCommitted { reason, disk_full: false }.into());
            }
            Fault::None | Fault::Stall | Fault::StallAnswers => {}
        }
        Ok(())
    }

    async fn hold_while(&self, fault: Fault, method: &'static str) {
        let mut current = self.0.fault.subscribe();
        if *current.borrow_and_update() != fault {
            return;
        }
        let _held = Held::new(&self.0, method);
        // The sender is in `self`: it does not go away meanwhile.
        current.wait_for(|current| *current != fault).await.ok();
    }
}

/// See the module.
pub struct FaultStore {
    store: Arc<dyn Store>,
    faults: Faults,
}

impl FaultStore {
    /// Stands before `store`.
    #[must_use]
    pub fn new(store: Arc<dyn Store>, faults: Faults) -> Self {
        Self { store, faults }
    }
}

/// Every method of [`Store`], each passed on in the same way.
macro_rules! passed_on {
    ($(fn $method:ident($($argument:ident: $kind:ty),*) -> $answer:ty;)*) => {
        #[async_trait]
        impl Store for FaultStore {
            $(async fn $method(&self, $($argument: $kind),*) -> Result<$answer, StoreError> {
                self.faults.before(stringify!($method)).await?;
                let answer = self.store.$method($($argument),*).await;
                self.faults.hold_while(Fault::StallAnswers, stringify!($method)).await;
                answer
            })*
        }
    };
}

passed_on! {
    fn mesh() -> MeshId;
    fn ca_state() -> Option<CaState>;
    fn set_ca_state(state: CaState, audit: Option<NewAudit>) -> ();
    fn create_invite(invite: NewInvite, audit: NewAudit) -> ();
    fn invites() -> Vec<Invite>;
    fn revoke_invite(id: InviteId, now_ms: i64, audit: NewAudit) -> ();
    fn forget_invites(before_ms: i64) -> u64;
    fn redeem_node(redemption: NodeRedemption) -> Result<Node, RedeemRefusal>;
    fn redeem_operator(redemption: OperatorRedemption) -> Result<Operator, RedeemRefusal>;
    fn nodes() -> Vec<Node>;
    fn touch_nodes(nodes: Vec<Node>) -> ();
    fn renew_node(renewal: Renewal) -> RenewOutcome;
    fn suspect_clone(node: NodeId, suspicion: CloneSuspicion) -> ();
    fn accept_task(task: NewTask) -> Acceptance;
    fn end_task(id: TaskId, end: TaskEnd) -> ();
    fn add_late_outcome(id: TaskId, node: NodeId, outcome: TaskEnd) -> LateReport;
    fn want_cancel(id: TaskId) -> ();
    fn tasks_to_cancel(node: NodeId, held: Vec<TaskId>) -> Vec<TaskId>;
    fn open_tasks() -> Vec<TaskRecord>;
    fn task(id: TaskId) -> Option<TaskRecord>;
    fn tasks_ending_in(ending: Vec<u8>) -> Vec<TaskRecord>;
    fn tasks(query: TaskQuery) -> Vec<TaskRecord>;
    fn task_spec(id: TaskId) -> Option<Vec<u8>>;
    fn workspaces() -> Vec<Workspace>;
    fn memberships(node: NodeId) -> BTreeSet<WorkspaceId>;
    fn create_workspace(workspace: Workspace, audit: NewAudit) -> ();
    fn delete_workspace(workspace: WorkspaceId, audit: NewAudit) -> ();
    fn deleted_workspaces() -> Vec<WorkspaceId>;
    fn workspace_removed(workspace: WorkspaceId) -> ();
    fn attach(workspace: WorkspaceId, node: NodeId, audit: NewAudit) -> ();
    fn detach(workspace: WorkspaceId, node: NodeId, audit: NewAudit) -> ();
    fn skills(skill: Option<String>) -> Vec<SkillVersion>;
    fn begin_skill(version: SkillVersion) -> ();
    fn finish_skill(id: CommitId, now_ms: i64, audit: NewAudit) -> ();
    fn abandon_skill(id: CommitId) -> ();
    fn remove_skill(id: CommitId, now_ms: i64, audit: NewAudit) -> ();
    fn revoke_node(id: NodeId, now_ms: i64, audit: NewAudit) -> ();
    fn forget_node(id: NodeId, audit: NewAudit) -> ();
    fn label_node(id: NodeId, change: LabelChange, audit: NewAudit) -> Result<Labels, LabelRefusal>;
    fn rename_node(id: NodeId, name: String, audit: NewAudit) -> ();
    fn cordon_node(id: NodeId, cordoned: bool, audit: NewAudit) -> ();
    fn set_node_policy(id: NodeId, policy: NodePolicy, audit: NewAudit) -> ();
    fn operators() -> Vec<OperatorRecord>;
    fn revoke_operator(
        name: String,
        now_ms: i64,
        audit: NewAudit
    ) -> Vec<(TaskId, NodeId)>;
    fn record_audit(audit: NewAudit) -> ();
    fn audit_page(after_seq: Option<u64>, limit: u32) -> Vec<AuditLine>;
    fn audit_head() -> AuditHead;
    fn accept_audit(audit: NewAudit) -> ();
}
