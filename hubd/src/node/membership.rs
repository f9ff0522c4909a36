//! Which nodes are members of which workspaces: the store's record, held in memory so that no
//! handler of a live session asks the store.

use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use cortex_shared::clock::unix_ms;
use cortex_shared::ids::{NodeId, WorkspaceId};
use cortex_shared::library::LIBRARY_NAME;
use serde_json::json;

use crate::store::{Actor, NewAudit, Scope, Store, StoreError, Workspace};

/// All workspaces and their members. Changes reach the store first, and memory after that.
#[derive(Default)]
pub struct Membership {
    workspaces: Mutex<HashMap<WorkspaceId, Workspace>>,
    /// One change at a time, from the store's answer to memory: of two that cross, the later one in the
    /// store is the later one here.
    order: tokio::sync::Mutex<()>,
    /// There is a library, of which every node is a member.
    library: AtomicBool,
}

impl Membership {
    /// Reads everything from the store, at the start.
    ///
    /// # Errors
    /// Those of the store.
    pub async fn reload(&self, store: &dyn Store) -> Result<(), StoreError> {
        let workspaces =
            store.workspaces().await?.into_iter().map(|w| (w.id, w)).collect::<HashMap<_, _>>();
        *self.lock() = workspaces;
        Ok(())
    }

    /// Takes over the memberships that a node has by its invite.
    ///
    /// # Errors
    /// Those of the store.
    pub async fn joined(&self, store: &dyn Store, node: NodeId) -> Result<(), StoreError> {
        let _order = self.order.lock().await;
        let memberships = store.memberships(node).await?;
        for workspace in self.lock().values_mut() {
            if memberships.contains(&workspace.id) {
                workspace.members.insert(node);
            }
        }
        Ok(())
    }

    /// Forgets a node that the store has forgotten.
    pub async fn forgotten(&self, node: NodeId) {
        let _order = self.order.lock().await;
        for workspace in self.lock().values_mut() {
            workspace.members.remove(&node);
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<WorkspaceId, Workspace>> {
        self.workspaces.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on there is a library; whether that is new.
    pub fn begin_library(&self) -> bool {
        !self.library.swap(true, Ordering::AcqRel)
    }

    /// Whether there is a library.
    #[must_use]
    pub fn has_library(&self) -> bool {
        self.library.load(Ordering::Acquire)
    }

    /// All workspaces by name. The library is none of them.
    #[must_use]
    pub fn all(&self) -> Vec<Workspace> {
        let mut all: Vec<_> = self.lock().values().cloned().collect();
        all.sort_by(|a, b| a.name.cmp(&b.name));
        all
    }

    /// The workspace of this name.
    #[must_use]
    pub fn by_name(&self, name: &str) -> Option<Workspace> {
        self.lock().values().find(|w| w.name == name).cloned()
    }

    /// The workspace of this id.
    #[must_use]
    pub fn get(&self, workspace: WorkspaceId) -> Option<Workspace> {
        self.lock().get(&workspace).cloned()
    }

    /// The workspaces this node is a member of, by name.
    #[must_use]
    pub fn of_node(&self, node: NodeId) -> Vec<Workspace> {
        let mut all = self.all();
        all.retain(|w| w.members.contains(&node));
        all
    }

    /// Whether a node is a member of a workspace, or reads the library.
    #[must_use]
    pub fn is_member(&self, node: NodeId, workspace: WorkspaceId) -> bool {
        if workspace == WorkspaceId::LIBRARY {
            return self.has_library();
        }
        self.lock().get(&workspace).is_some_and(|w| w.members.contains(&node))
    }

    /// The name of a workspace.
    #[must_use]
    pub fn name_of(&self, workspace: WorkspaceId) -> Option<String> {
        if workspace == WorkspaceId::LIBRARY {
            return Some(LIBRARY_NAME.to_owned());
        }
        self.lock().get(&workspace).map(|w| w.name.clone())
    }

    /// The members of a workspace.
    #[must_use]
    pub fn members(&self, workspace: WorkspaceId) -> BTreeSet<NodeId> {
        self.lock().get(&workspace).map(|w| w.members.clone()).unwrap_or_default()
    }

    /// Makes a workspace of this name that belongs to this scope, durable when this returns.
    ///
    /// # Errors
    /// Those of the store; [`StoreError::Exists`] if the name is taken.
    pub async fn create(
        &self,
        store: &dyn Store,
        name: &str,
        scope: Scope,
        by: &Actor,
    ) -> Result<Workspace, StoreError> {
        let workspace = Workspace {
            id: WorkspaceId::new(),
            name: name.to_owned(),
            created_at_ms: unix_ms(),
            scope,
            members: BTreeSet::new(),
        };
        let detail = json!({ "workspace_id": workspace.id, "scope": workspace.scope });
        let audit = by.audit(workspace.created_at_ms, "workspace.created", name, detail);
        store.create_workspace(workspace.clone(), audit).await?;
        self.lock().insert(workspace.id, workspace.clone());
        Ok(workspace)
    }

    /// Makes a node a member, durable when this returns, if `allowed` says so of the workspace as it is by
    /// then: other memberships may have been decided since the caller looked. Whether it was.
    ///
    /// # Errors
    /// Those of the store.
    pub async fn attach(
        &self,
        store: &dyn Store,
        workspace: WorkspaceId,
        node: NodeId,
        by: &Actor,
        allowed: impl Fn(&Workspace) -> bool + Send,
    ) -> Result<bool, StoreError> {
        let audit = self.audit(workspace, node, by, "workspace.attached");
        let _order = self.order.lock().await;
        let now = self.get(workspace);
        if !now.is_some_and(|now| allowed(&now)) {
            return Ok(false);
        }
        store.attach(workspace, node, audit).await?;
        if let Some(workspace) = self.lock().get_mut(&workspace) {
            workspace.members.insert(node);
        }
        Ok(true)
    }

    /// Ends a membership, durable when this returns.
    ///
    /// # Errors
    /// Those of the store.
    pub async fn detach(
        &self,
        store: &dyn Store,
        workspace: WorkspaceId,
        node: NodeId,
        by: &Actor,
    ) -> Result<(), StoreError> {
        let audit = self.audit(workspace, node, by, "workspace.detached");
        let _order = self.order.lock().await;
        store.detach(workspace, node, audit).await?;
        if let Some(workspace) = self.lock().get_mut(&workspace) {
            workspace.members.remove(&node);
        }
        Ok(())
    }

    /// Removes a workspace, durable when this returns. Its content is for the caller to remove. Returns
    /// who was a member.
    ///
    /// # Errors
    /// Those of the store.
    pub async fn delete(
        &self,
        store: &dyn Store,
        workspace: &Workspace,
        by: &Actor,
    ) -> Result<BTreeSet<NodeId>, StoreError> {
        let detail = json!({ "workspace_id": workspace.id });
        let audit = by.audit(unix_ms(), "workspace.deleted", workspace.name.clone(), detail);
        let _order = self.order.lock().await;
        store.delete_workspace(workspace.id, audit).await?;
        Ok(self.lock().remove(&workspace.id).map(|gone| gone.members).unwrap_or_default())
    }

    fn audit(
        &self,
        workspace: WorkspaceId,
        node: NodeId,
        by: &Actor,
        action: &'static str,
    ) -> NewAudit {
        let name = self.name_of(workspace).unwrap_or_else(|| workspace.to_string());
        by.audit(unix_ms(), action, name, json!({ "workspace_id": workspace, "node_id": node }))
    }
}
