//! Who may hear of an event. Asked for each event when it is delivered, against what is known by then:
//! an operator hears of nothing that it could not look up itself.

use std::collections::BTreeSet;
use std::sync::Arc;

use cortex_shared::ids::{NodeId, WorkspaceId};
use cortex_shared::labels::Labels;
use cortex_shared::policy::Role;
use serde::{Deserialize, Serialize};

use super::event::Event;
use crate::node::membership::Membership;
use crate::node::registry::Registry;
use crate::store::{Scope, Workspace};

/// Who may hear of an event.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Audience {
    /// Every operator.
    Everybody,
    /// Administrators without a scope.
    Governors,
    /// Whoever sees this node.
    Node(NodeId),
    /// Whoever would see a node with these labels: it is not there any more.
    Labels(Labels),
    /// Whoever sees the node of a command; an agent token its own commands only.
    Task {
        /// The node.
        node: NodeId,
        /// Whose command it is.
        actor: String,
    },
    /// Whoever sees this workspace.
    Workspace(WorkspaceId),
    /// Whoever saw a workspace that is not there any more.
    FormerWorkspace {
        /// Whose it was while it had no members.
        scope: Scope,
        /// Its members.
        members: BTreeSet<NodeId>,
    },
}

/// An operator that listens.
#[derive(Clone, Debug)]
pub struct Viewer {
    /// Its name.
    pub name: String,
    /// What it may do.
    pub role: Role,
    /// What it may do it to.
    pub scope: Scope,
}

/// What the hub knows, against which audiences are judged.
#[derive(Clone)]
pub struct Knowledge {
    /// Nodes.
    pub registry: Arc<Registry>,
    /// Workspaces.
    pub membership: Arc<Membership>,
}

impl Knowledge {
    /// Whether a viewer may hear of an event.
    #[must_use]
    pub fn may_hear(&self, viewer: &Viewer, event: &Event) -> bool {
        match &event.about.audience {
            Audience::Everybody => true,
            Audience::Governors => viewer.role == Role::Admin && viewer.scope.is_everything(),
            Audience::Task { node, actor } => {
                let own = viewer.role != Role::AgentToken || *actor == viewer.name;
                own && self.sees_node(viewer, *node)
            }
            Audience::Node(node) => self.sees_node(viewer, *node),
            Audience::Labels(labels) => viewer.scope.covers(labels),
            Audience::Workspace(id) => {
                viewer.scope.is_everything()
                    || self.membership.get(*id).is_some_and(|workspace| {
                        let Workspace { scope, members, .. } = &workspace;
                        self.sees_members(viewer, scope, members)
                    })
            }
            Audience::FormerWorkspace { scope, members } => {
                viewer.scope.is_everything() || self.sees_members(viewer, scope, members)
            }
        }
    }

    fn sees_node(&self, viewer: &Viewer, node: NodeId) -> bool {
        viewer.scope.is_everything()
            || self.registry.labels_of(node).is_some_and(|labels| viewer.scope.covers(&labels))
    }

    fn sees_members(&self, viewer: &Viewer, scope: &Scope, members: &BTreeSet<NodeId>) -> bool {
        (members.is_empty() && *scope == viewer.scope)
            || members.iter().any(|node| self.sees_node(viewer, *node))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::events::{Cursor, Kind, NewEvent};
    use crate::store::fixtures;

    fn labels(value: &str) -> Labels {
        [("env".to_owned(), value.to_owned())].into()
    }

    #[test]
    fn nobody_hears_of_what_it_could_not_look_up() {
        let mut dev = fixtures::node("dev");
        dev.labels = labels("dev");
        let prod = fixtures::node("prod");
        let registry = Arc::new(Registry::new(vec![dev.clone(), prod.clone()]));
        let knowledge = Knowledge { registry, membership: Arc::default() };
        let viewer = |role, scope: Labels| Viewer { name: "me".into(), role, scope: Scope(scope) };
        let everything = Labels::new();
        let viewers = [
            viewer(Role::Admin, everything.clone()),
            viewer(Role::Viewer, everything.clone()),
            viewer(Role::Admin, labels("dev")),
            viewer(Role::AgentToken, labels("dev")),
        ];
        let task = |node: &crate::store::Node, actor| {
            NewEvent::of_task(cortex_shared::ids::TaskId::new(), node.id, &node.name, actor)
        };
        let former = |scope: Labels, members: &[NodeId]| {
            NewEvent::of_former_workspace(&Workspace {
                id: WorkspaceId::new(),
                name: "w".into(),
                created_at_ms: 0,
                scope: Scope(scope),
                members: members.iter().copied().collect(),
            })
        };
        for (what, about, heard) in [
            ("the hub", NewEvent::of_hub(), [true; 4]),
            ("an invite", NewEvent::of_mesh(), [true, false, false, false]),
            ("a node within", NewEvent::of_node(&dev), [true; 4]),
            ("a node without", NewEvent::of_node(&prod), [true, true, false, false]),
            ("a former node", NewEvent::of_former_node(&dev), [true; 4]),
            ("another's command", task(&dev, "ann"), [true, true, true, false]),
            ("an own command", task(&dev, "me"), [true; 4]),
            ("a command elsewhere", task(&prod, "me"), [true, true, false, false]),
            ("a shared workspace", former(labels("x"), &[dev.id, prod.id]), [true; 4]),
            ("another's", former(labels("dev"), &[prod.id]), [true, true, false, false]),
            ("an empty one", former(labels("dev"), &[]), [true; 4]),
            (
                "an unknown one",
                NewEvent::of_workspace(WorkspaceId::new(), "w"),
                [true, true, false, false],
            ),
        ] {
            let event = Event { cursor: Cursor(1), at_ms: 1, kind: Kind::NodeOnline, about };
            let may: Vec<bool> =
                viewers.iter().map(|viewer| knowledge.may_hear(viewer, &event)).collect();
            assert_eq!(may, heard, "{what}");
        }
    }
}
