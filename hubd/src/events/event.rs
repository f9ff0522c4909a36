//! What an event is: a kind, whom it is about, and who may hear of it.

use std::fmt;
use std::str::FromStr;

use cortex_shared::ids::{NodeId, TaskId, WorkspaceId};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::audience::Audience;
use crate::store::{Actor, Node, Workspace};

/// Most bytes of an event's particulars, as JSON. What is longer is left out, and said to be.
const MAX_DETAIL_BYTES: usize = 4096;

/// Where an event stands among all events of a hub. Later ones have higher ones, over restarts as well.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Cursor(pub u64);

impl fmt::Display for Cursor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for Cursor {
    type Err = std::num::ParseIntError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.parse().map(Self)
    }
}

macro_rules! kinds {
    ($($(#[$doc:meta])+ $name:ident = $word:literal,)+) => {
        /// What has happened.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Kind {
            $($(#[$doc])+ $name,)+
        }

        impl Kind {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$name),+];

            /// Its word on the wire and in the store.
            #[must_use]
            pub const fn word(self) -> &'static str {
                match self {
                    $(Self::$name => $word,)+
                }
            }
        }
    };
}

kinds! {
    /// A hub has begun to serve; `after_crash` says that events of the moments before may be missing.
    HubStarted = "hub.started",
    /// The hub stops in order.
    HubStopping = "hub.stopping",
    /// A node was admitted.
    NodeJoined = "node.joined",
    /// A session of a node has begun.
    NodeOnline = "node.online",
    /// A node's session has ended, and no other has begun.
    NodeOffline = "node.offline",
    /// A node's labels were changed.
    NodeLabelled = "node.labelled",
    /// A node has another name.
    NodeRenamed = "node.renamed",
    /// A node gets no new commands.
    NodeCordoned = "node.cordoned",
    /// A node gets commands again.
    NodeUncordoned = "node.uncordoned",
    /// A node was revoked.
    NodeRevoked = "node.revoked",
    /// A node has left the mesh by its own wish.
    NodeLeft = "node.left",
    /// The record of a node was removed.
    NodeForgotten = "node.forgotten",
    /// Another machine has presented a node's identity.
    NodeCloneSuspected = "node.clone_suspected",
    /// A node's certificate has expired, and the node was not there to renew it.
    NodeCertificateExpired = "node.certificate_expired",
    /// The hub's policy for a node was set.
    PolicySet = "policy.set",
    /// A policy is over.
    PolicyEnded = "policy.ended",
    /// A command is journalled.
    TaskAccepted = "task.accepted",
    /// A command runs on its node.
    TaskStarted = "task.started",
    /// The connection to a command was lost; it may come back.
    TaskInterrupted = "task.interrupted",
    /// It is back.
    TaskResumed = "task.resumed",
    /// A command has its verdict.
    TaskEnded = "task.ended",
    /// How a command ended became known after its verdict.
    TaskLateOutcome = "task.late_outcome",
    /// A workspace was made.
    WorkspaceCreated = "workspace.created",
    /// A workspace was removed.
    WorkspaceDeleted = "workspace.deleted",
    /// A node has become a member.
    WorkspaceAttached = "workspace.attached",
    /// A node is a member no longer.
    WorkspaceDetached = "workspace.detached",
    /// Files were edited in two places: copies stand beside them.
    WorkspaceConflict = "workspace.conflict",
    /// A member holds deletions because they are so many.
    WorkspaceHold = "workspace.hold",
    /// It holds none any more.
    WorkspaceReleased = "workspace.released",
    /// A member has halted.
    WorkspaceHalted = "workspace.halted",
    /// An operator has logged in.
    OperatorLoggedIn = "operator.logged_in",
    /// An operator was revoked.
    OperatorRevoked = "operator.revoked",
    /// An invite was made.
    InviteCreated = "invite.created",
    /// An invite has admitted somebody.
    InviteUsed = "invite.used",
    /// An invite was made unusable.
    InviteRevoked = "invite.revoked",
    /// A run of a worker failed.
    WorkerFailed = "worker.failed",
    /// A worker that had failed is well again.
    WorkerRecovered = "worker.recovered",
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

/// A word that is none of the kinds: of a newer program.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("there is no such kind of event")]
pub struct UnknownKind;

impl FromStr for Kind {
    type Err = UnknownKind;

    fn from_str(word: &str) -> Result<Self, UnknownKind> {
        Self::ALL.iter().copied().find(|kind| kind.word() == word).ok_or(UnknownKind)
    }
}

/// An id with the name that belonged to it when the event happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Named<T> {
    /// Which.
    pub id: T,
    /// Its name by then.
    pub name: String,
}

/// What an event is about and who may hear of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NewEvent {
    /// The node it is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<Named<NodeId>>,
    /// The workspace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub workspace: Option<Named<WorkspaceId>>,
    /// The command.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub task: Option<TaskId>,
    /// Whoever did it, as the audit log names them; empty if nobody did.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub actor: String,
    /// The particulars. Never a secret, never content, never a command's text.
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub detail: Map<String, Value>,
    /// Who may hear of it.
    pub audience: Audience,
}

impl NewEvent {
    fn to(audience: Audience) -> Self {
        let (node, workspace, task) = (None, None, None);
        Self { node, workspace, task, actor: String::new(), detail: Map::new(), audience }
    }

    /// One of the hub as a whole, which every operator may hear of.
    #[must_use]
    pub fn of_hub() -> Self {
        Self::to(Audience::Everybody)
    }

    /// One for those who administer the whole mesh.
    #[must_use]
    pub fn of_mesh() -> Self {
        Self::to(Audience::Governors)
    }

    /// One about a node, for whoever sees it.
    #[must_use]
    pub fn of_node(node: &Node) -> Self {
        let named = Named { id: node.id, name: node.name.clone() };
        Self { node: Some(named), ..Self::to(Audience::Node(node.id)) }
    }

    /// One about a node that is not there any more: for whoever saw it.
    #[must_use]
    pub fn of_former_node(node: &Node) -> Self {
        Self { audience: Audience::Labels(node.labels.clone()), ..Self::of_node(node) }
    }

    /// One about a command, for whoever sees its node; an agent token hears of its own only.
    #[must_use]
    pub fn of_task(task: TaskId, node: NodeId, node_name: &str, actor: &str) -> Self {
        let named = Named { id: node, name: node_name.to_owned() };
        let audience = Audience::Task { node, actor: actor.to_owned() };
        Self { node: Some(named), task: Some(task), ..Self::to(audience) }.by_name(actor)
    }

    /// One about a workspace, for whoever sees that.
    #[must_use]
    pub fn of_workspace(workspace: WorkspaceId, name: &str) -> Self {
        let named = Named { id: workspace, name: name.to_owned() };
        Self { workspace: Some(named), ..Self::to(Audience::Workspace(workspace)) }
    }

    /// One about a workspace that is not there any more: for whoever saw it.
    #[must_use]
    pub fn of_former_workspace(workspace: &Workspace) -> Self {
        let audience = Audience::FormerWorkspace {
            scope: workspace.scope.clone(),
            members: workspace.members.clone(),
        };
        Self { audience, ..Self::of_workspace(workspace.id, &workspace.name) }
    }

    /// One about a member of a workspace, for whoever sees that node.
    #[must_use]
    pub fn of_member(self, node: &Node) -> Self {
        let named = Named { id: node.id, name: node.name.clone() };
        Self { node: Some(named), audience: Audience::Node(node.id), ..self }
    }

    /// Says who did it.
    #[must_use]
    pub fn by(self, actor: &Actor) -> Self {
        self.by_name(&actor.name)
    }

    fn by_name(self, actor: &str) -> Self {
        Self { actor: actor.to_owned(), ..self }
    }

    /// Adds a particular.
    #[must_use]
    pub fn with(mut self, key: &str, value: impl Into<Value>) -> Self {
        self.detail.insert(key.to_owned(), value.into());
        self
    }

    /// Leaves particulars out that are too long.
    pub(super) fn within_limits(mut self) -> Self {
        let too_long = |detail: &Map<String, Value>| {
            serde_json::to_string(detail).map_or(usize::MAX, |text| text.len()) > MAX_DETAIL_BYTES
        };
        if too_long(&self.detail) {
            self.detail = Map::new();
            self.detail.insert("left_out".to_owned(), true.into());
        }
        self
    }
}

/// Something that has happened.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// Where it stands.
    pub cursor: Cursor,
    /// When it happened, milliseconds since the Unix epoch by the hub's clock.
    pub at_ms: i64,
    /// What.
    pub kind: Kind,
    /// To whom or to what.
    pub about: NewEvent,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_has_a_word_of_its_own_that_leads_back_to_it() {
        for kind in Kind::ALL {
            assert_eq!(kind.word().parse(), Ok(*kind));
            assert!(kind.word().split('.').count() == 2, "{kind}");
        }
        assert_eq!("node.exploded".parse::<Kind>(), Err(UnknownKind));
    }

    #[test]
    fn particulars_that_are_too_long_are_left_out_and_said_to_be() {
        let long = NewEvent::of_hub().with("reason", "x".repeat(MAX_DETAIL_BYTES)).within_limits();
        assert_eq!(Value::Object(long.detail), serde_json::json!({ "left_out": true }));
        let short = NewEvent::of_hub().with("reason", "x").within_limits();
        assert_eq!(Value::Object(short.detail), serde_json::json!({ "reason": "x" }));
    }
}
