//! Who has which workspace, and telling them: memberships when they change, and a hint when a
//! workspace has a newer version.

use std::sync::Arc;

use cortex_proto::v1::{self, HeadMoved, Memberships, hub_frame};
use cortex_shared::clock::unix_ms;
use cortex_shared::ids::{NodeId, WorkspaceId};
use cortex_shared::library::LIBRARY_NAME;
use serde_json::json;

use super::{SyncError, Workspaces};
use crate::events::{EventBus, Kind, NewEvent};
use crate::node::membership::Membership;
use crate::node::registry::Registry;
use crate::store::workspace::HeldMember;
use crate::store::{Actor, Scope, Store, StoreError, Workspace};

/// The problem of members that hold deletions because they are so many.
const HELD_CODE: &str = "mass_delete_held";

/// Why the word of an operator did not reach members.
#[derive(Debug, thiserror::Error)]
pub enum ConfirmError {
    /// It could not be put on record.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The workspace could not be told.
    #[error(transparent)]
    Sync(#[from] SyncError),
}

/// See the module.
pub struct Members {
    /// The record of memberships.
    pub membership: Arc<Membership>,
    registry: Arc<Registry>,
    store: Arc<dyn Store>,
    content: Arc<Workspaces>,
    events: Arc<EventBus>,
}

impl Members {
    /// Combines the record, the sessions and the content.
    #[must_use]
    pub fn new(
        membership: Arc<Membership>,
        registry: Arc<Registry>,
        store: Arc<dyn Store>,
        content: Arc<Workspaces>,
        events: Arc<EventBus>,
    ) -> Self {
        Self { membership, registry, store, content, events }
    }

    fn tell_member(&self, kind: Kind, workspace: WorkspaceId, node: NodeId, by: &Actor) {
        let name = self.membership.name_of(workspace).unwrap_or_default();
        if let Some(view) = self.registry.get(node) {
            let about = NewEvent::of_workspace(workspace, &name).of_member(&view.node).by(by);
            self.events.publish(kind, about);
        }
    }

    /// Makes a workspace that belongs to this scope; durable when this returns.
    ///
    /// # Errors
    /// [`StoreError::Exists`] if the name is taken; those of the store.
    pub async fn create(
        &self,
        name: &str,
        scope: Scope,
        by: &Actor,
    ) -> Result<Workspace, StoreError> {
        let workspace = self.membership.create(&*self.store, name, scope, by).await?;
        let about = NewEvent::of_workspace(workspace.id, &workspace.name).by(by);
        self.events.publish(Kind::WorkspaceCreated, about);
        self.registry.notify();
        Ok(workspace)
    }

    /// Makes a node a member, and tells it if it is connected.
    ///
    /// # Errors
    /// Those of the store.
    pub async fn attach(
        &self,
        workspace: WorkspaceId,
        node: NodeId,
        by: &Actor,
        allowed: impl Fn(&Workspace) -> bool + Send,
    ) -> Result<bool, StoreError> {
        if !self.membership.attach(&*self.store, workspace, node, by, allowed).await? {
            return Ok(false);
        }
        self.tell_member(Kind::WorkspaceAttached, workspace, node, by);
        self.send_memberships(node).await;
        self.registry.notify();
        Ok(true)
    }

    /// Ends a membership, and tells the node if it is connected.
    ///
    /// # Errors
    /// Those of the store.
    pub async fn detach(
        &self,
        workspace: WorkspaceId,
        node: NodeId,
        by: &Actor,
    ) -> Result<(), StoreError> {
        self.membership.detach(&*self.store, workspace, node, by).await?;
        self.tell_member(Kind::WorkspaceDetached, workspace, node, by);
        self.send_memberships(node).await;
        self.registry.notify();
        Ok(())
    }

    /// Removes a workspace: nobody is a member from then on, and its content goes. Durable once this
    /// returns; what of the content could not be removed goes when the hub starts again.
    ///
    /// # Errors
    /// Those of the store; the workspace is then as it was.
    pub async fn delete(&self, workspace: &Workspace, by: &Actor) -> Result<(), StoreError> {
        let members = self.membership.delete(&*self.store, workspace, by).await?;
        let about = NewEvent::of_former_workspace(workspace).by(by);
        self.events.publish(Kind::WorkspaceDeleted, about);
        for node in members {
            self.send_memberships(node).await;
        }
        self.registry.notify();
        self.remove_content(workspace.id).await;
        Ok(())
    }

    /// Removes what is left of workspaces whose removal the hub did not finish. How many there were.
    ///
    /// # Errors
    /// Those of the store.
    pub async fn finish_deletions(&self) -> Result<usize, StoreError> {
        let deleted = self.store.deleted_workspaces().await?;
        let count = deleted.len();
        for workspace in deleted {
            self.remove_content(workspace).await;
        }
        Ok(count)
    }

    async fn remove_content(&self, workspace: WorkspaceId) {
        let removed = match self.content.delete(workspace).await {
            Ok(()) => self.store.workspace_removed(workspace).await,
            Err(error) => {
                tracing::error!(%workspace, %error, "content of a deleted workspace is left");
                return;
            }
        };
        if let Err(error) = removed {
            tracing::warn!(%workspace, %error, "that a workspace is gone was not recorded");
        }
    }

    /// The members that hold deletions because they are so many, or of which the hub does, and how
    /// many: what connected members say, and what the hub held lately.
    ///
    /// # Errors
    /// If the content of the workspace cannot be read.
    pub async fn holding(&self, workspace: &Workspace) -> Result<Vec<(NodeId, u64)>, SyncError> {
        let held = self.content.workspace(workspace.id).await?.held_members().await?;
        let holding = workspace.members.iter().filter_map(|node| {
            let says = self.says_it_holds(workspace.id, *node);
            let refused = held.iter().find(|held| held.node == *node).map(|held| held.losses);
            says.max(refused).map(|losses| (*node, losses))
        });
        Ok(holding.collect())
    }

    /// How many deletions a connected member says that it holds because they are so many.
    fn says_it_holds(&self, workspace: WorkspaceId, node: NodeId) -> Option<u64> {
        let connected = self.registry.get(node).is_some_and(|view| view.session.is_some());
        let status = self.registry.sync_status(node, workspace).filter(|_| connected)?;
        let holds = status.problems.iter().any(|problem| problem.code == HELD_CODE);
        holds.then_some(status.held_deletions)
    }

    /// Lets so many deletions of these members go. They are told when they ask for the head, which they
    /// are made to do. Durable.
    ///
    /// # Errors
    /// Those of the stores.
    pub async fn confirm_deletes(
        &self,
        workspace: WorkspaceId,
        nodes: &[(NodeId, u64)],
        by: &Actor,
    ) -> Result<(), ConfirmError> {
        let name = self.membership.name_of(workspace).unwrap_or_else(|| workspace.to_string());
        for (node, deletions) in nodes {
            let detail =
                json!({ "workspace_id": workspace, "node_id": node, "deletions": deletions });
            let audit = by.audit(unix_ms(), "workspace.deletes_confirmed", name.clone(), detail);
            self.store.record_audit(audit).await?;
        }
        if !nodes.is_empty() {
            self.content.workspace(workspace).await?.confirm_deletes(nodes).await?;
        }
        Ok(())
    }

    /// Sends a connected node the complete list of its workspaces.
    pub async fn send_memberships(&self, node: NodeId) {
        let Some(session) = self.registry.get(node).and_then(|view| view.session) else { return };
        let mut workspaces = Vec::new();
        for workspace in self.membership.of_node(node) {
            workspaces.extend(self.wire_membership(workspace.id, workspace.name).await);
        }
        let library = if self.membership.has_library() {
            self.wire_membership(WorkspaceId::LIBRARY, LIBRARY_NAME.to_owned()).await
        } else {
            None
        };
        // A session that has just ended needs no list.
        session.send(hub_frame::Frame::Memberships(Memberships { workspaces, library })).ok();
    }

    /// The same to every connected node.
    pub async fn send_memberships_to_all(&self) {
        for session in self.registry.sessions() {
            self.send_memberships(session.node).await;
        }
    }

    async fn wire_membership(&self, id: WorkspaceId, name: String) -> Option<v1::Membership> {
        match self.content.summary(id).await {
            Ok(summary) => Some(v1::Membership {
                workspace_id: id.as_bytes().to_vec().into(),
                name,
                head_seq: summary.head.seq,
                workspace_epoch: summary.head.epoch.as_bytes().to_vec().into(),
            }),
            // The node keeps its copy as it is; the others are told.
            Err(error) => {
                tracing::error!(workspace = %name, %error, "workspace cannot be opened");
                None
            }
        }
    }

    /// Hints at a newer version to every connected member.
    pub fn head_moved(&self, workspace: WorkspaceId, seq: u64) {
        let sessions = if workspace == WorkspaceId::LIBRARY {
            self.registry.sessions()
        } else {
            let members = self.membership.members(workspace).into_iter();
            members.filter_map(|node| self.registry.get(node)?.session).collect()
        };
        for session in sessions {
            let workspace_id = workspace.as_bytes().to_vec().into();
            // Losing a hint costs time, nothing else.
            session.send(hub_frame::Frame::HeadMoved(HeadMoved { workspace_id, seq })).ok();
        }
        self.registry.notify();
    }

    /// A workspace with its size and the progress of its members within this scope.
    ///
    /// # Errors
    /// If its content cannot be read.
    pub async fn describe(
        &self,
        workspace: &Workspace,
        scope: &Scope,
    ) -> Result<v1::WorkspaceInfo, SyncError> {
        let content = self.content.workspace(workspace.id).await?;
        let summary = content.summary().await?;
        let held = content.held_members().await?;
        let applied = content.applied_by_all().await?;
        let mut members = Vec::with_capacity(workspace.members.len());
        for node in &workspace.members {
            let view = self.registry.get(*node);
            if !scope.covers(&view.as_ref().map(|v| v.node.labels.clone()).unwrap_or_default()) {
                continue;
            }
            let mut status = self.registry.sync_status(*node, workspace.id);
            if let Some(held) = held.iter().find(|held| held.node == *node) {
                add_hold(&mut status, workspace, held);
            }
            members.push(v1::WorkspaceMember {
                node_id: node.as_bytes().to_vec().into(),
                node_name: view.as_ref().map(|v| v.node.name.clone()).unwrap_or_default(),
                online: view.is_some_and(|v| v.session.is_some()),
                applied_seq: applied.get(node).copied().unwrap_or_default(),
                status,
            });
        }
        members.sort_by(|a, b| a.node_name.cmp(&b.node_name));
        Ok(v1::WorkspaceInfo {
            workspace_id: workspace.id.as_bytes().to_vec().into(),
            name: workspace.name.clone(),
            epoch: summary.head.epoch.as_bytes().to_vec().into(),
            head_seq: summary.head.seq,
            entries: summary.entries,
            content_bytes: summary.content_bytes,
            created_at_ms: workspace.created_at_ms,
            members,
        })
    }
}

/// Tells what the hub holds of a member that does not say so itself.
fn add_hold(status: &mut Option<v1::SyncStatus>, workspace: &Workspace, held: &HeldMember) {
    let status = status.get_or_insert_default();
    if status.problems.iter().any(|problem| problem.code == HELD_CODE) {
        return;
    }
    status.held_deletions = status.held_deletions.max(held.losses);
    status.problems.push(v1::SyncProblem {
        path: Vec::new().into(),
        code: HELD_CODE.to_owned(),
        message: format!(
            "{} deletions of this member are held by the hub because they are so many; let them go \
             (cortex-agent workspace confirm-deletes {}), or detach the node",
            held.losses, workspace.name
        ),
        first_seen_ms: held.at_ms,
    });
}
