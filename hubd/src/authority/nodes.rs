//! Decisions of operators about nodes.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::Duration;

use cortex_shared::clock::unix_ms;
use cortex_shared::ids::NodeId;
use cortex_shared::policy::{Bound, Mode, Network};
use serde_json::json;
use tokio::sync::Mutex;

use crate::events::{EventBus, Kind, NewEvent};
use crate::node::membership::Membership;
use crate::node::registry::{ForgetRefusal, Registry};
use crate::store::{Actor, LabelChange, LabelRefusal, Node, NodePolicy, Store, StoreError};
use crate::task::relay::Relay;

/// How long a permissive policy lasts unless told otherwise.
pub const DEFAULT_PERMISSIVE: Duration = Duration::from_secs(3600);

/// Why a decision was not carried out.
#[derive(Debug, thiserror::Error)]
pub enum DecisionError {
    /// The store refused or failed; nothing has changed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// It is in force, but the store did not record it.
    #[error(
        "this is in force, but could not be recorded; if the hub restarts before it is, it is lifted"
    )]
    NotRecorded(#[source] StoreError),
    /// The node cannot be forgotten.
    #[error(transparent)]
    Forget(#[from] ForgetRefusal),
    /// The labels cannot be changed.
    #[error(transparent)]
    Label(#[from] LabelRefusal),
}

/// See the module.
pub struct NodeDecisions {
    registry: Arc<Registry>,
    relay: Arc<Relay>,
    membership: Arc<Membership>,
    store: Arc<dyn Store>,
    events: Arc<EventBus>,
    /// One at a time: memory and store see them in the same order.
    order: Mutex<()>,
    /// Decisions that withdraw something and wait for the store.
    withdrawing: Withdrawing,
}

/// What somebody may withdraw from a node: that is in force at once, whatever the store is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Withdrawn {
    Permissive,
    Network,
    Commands,
}

/// How many decisions withdraw something of a node and are not recorded yet. One that gives it, and
/// was decided before, must not give it after that.
#[derive(Default)]
struct Withdrawing(std::sync::Mutex<HashMap<(NodeId, Withdrawn), usize>>);

/// One of them, as long as it exists.
struct Withdrawal<'a> {
    all: &'a Withdrawing,
    what: (NodeId, Withdrawn),
}

impl Withdrawing {
    fn begin(&self, node: NodeId, what: Withdrawn) -> Withdrawal<'_> {
        let what = (node, what);
        *self.lock().entry(what).or_default() += 1;
        Withdrawal { all: self, what }
    }

    fn is_on(&self, node: NodeId, what: Withdrawn) -> bool {
        self.lock().contains_key(&(node, what))
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<(NodeId, Withdrawn), usize>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Withdrawal<'_> {
    fn drop(&mut self) {
        if let Entry::Occupied(mut count) = self.all.lock().entry(self.what) {
            *count.get_mut() -= 1;
            if *count.get() == 0 {
                count.remove();
            }
        }
    }
}

impl NodeDecisions {
    /// Decisions about these nodes.
    #[must_use]
    pub fn new(
        registry: Arc<Registry>,
        relay: Arc<Relay>,
        membership: Arc<Membership>,
        store: Arc<dyn Store>,
        events: Arc<EventBus>,
    ) -> Arc<Self> {
        let (order, withdrawing) = (Mutex::default(), Withdrawing::default());
        Arc::new(Self { registry, relay, membership, store, events, order, withdrawing })
    }

    /// Ends a node's session, commands and calls at once, for good.
    ///
    /// # Errors
    /// [`DecisionError::NotRecorded`].
    pub async fn revoke(&self, node: &Node, reason: &str, by: &Actor) -> Result<(), DecisionError> {
        let detail = json!({ "node_id": node.id.to_string(), "reason": reason });
        let about = NewEvent::of_node(node).by(by).with("reason", reason);
        self.end(node, "the node was revoked", by, (Kind::NodeRevoked, about), detail).await
    }

    /// The same, by the node's own wish.
    ///
    /// # Errors
    /// [`DecisionError::NotRecorded`].
    pub async fn leave(&self, node: &Node) -> Result<(), DecisionError> {
        let by = Actor::from(format!("node:{}", node.name).as_str());
        let detail = json!({ "node_id": node.id.to_string() });
        let about = NewEvent::of_node(node).by(&by);
        self.end(node, "the node has left the mesh", &by, (Kind::NodeLeft, about), detail).await
    }

    async fn end(
        &self,
        node: &Node,
        told: &str,
        by: &Actor,
        (kind, about): (Kind, NewEvent),
        detail: serde_json::Value,
    ) -> Result<(), DecisionError> {
        // The words of the audit log and of events are the same.
        let action = kind.word();
        // The commands first: afterwards there is no session to tell the node by.
        self.relay.end_on_node(node.id, told);
        self.registry.revoke(node.id);
        // It is in force, whatever becomes of its record.
        self.events.publish(kind, about);
        let now = unix_ms();
        let audit = by.audit(now, action, &node.name, detail);
        let _order = self.order.lock().await;
        self.store.revoke_node(node.id, now, audit).await.map_err(DecisionError::NotRecorded)?;
        tracing::info!(node = %node.name, id = %node.id, by = %by.name, action, "node revoked");
        Ok(())
    }

    /// Removes the record of a node that is revoked or offline; its name is free again.
    ///
    /// # Errors
    /// [`DecisionError::Forget`], [`DecisionError::Store`].
    pub async fn forget(&self, node: &Node, by: &Actor) -> Result<(), DecisionError> {
        let detail = json!({ "node_id": node.id.to_string() });
        let audit = by.audit(unix_ms(), "node.forgotten", &node.name, detail);
        let _order = self.order.lock().await;
        let record = self.registry.forget(node.id)?;
        if let Err(error) = self.store.forget_node(node.id, audit).await {
            self.registry.add(record.clone());
            return Err(error.into());
        }
        self.membership.forgotten(node.id).await;
        tracing::info!(node = %node.name, id = %node.id, by = %by.name, "node forgotten");
        self.events.publish(Kind::NodeForgotten, NewEvent::of_former_node(&record).by(by));
        Ok(())
    }

    /// Changes a node's labels.
    ///
    /// # Errors
    /// [`DecisionError::Label`], [`DecisionError::Store`].
    pub async fn label(
        &self,
        node: &Node,
        change: LabelChange,
        by: &Actor,
    ) -> Result<(), DecisionError> {
        let detail = json!({
            "node_id": node.id.to_string(), "set": &change.set, "remove": &change.remove,
        });
        let audit = by.audit(unix_ms(), "node.labelled", &node.name, detail);
        let _order = self.order.lock().await;
        let labels = self.store.label_node(node.id, change, audit).await??;
        self.registry.set_labels(node.id, labels);
        self.tell(Kind::NodeLabelled, node.id, by);
        Ok(())
    }

    /// Renames a node.
    ///
    /// # Errors
    /// [`DecisionError::Store`], with [`StoreError::Exists`] if the name is taken.
    pub async fn rename(&self, node: &Node, name: String, by: &Actor) -> Result<(), DecisionError> {
        let detail = json!({ "node_id": node.id.to_string(), "name": &name });
        let audit = by.audit(unix_ms(), "node.renamed", &node.name, detail);
        let _order = self.order.lock().await;
        self.store.rename_node(node.id, name.clone(), audit).await?;
        self.registry.rename(node.id, name);
        if let Some(view) = self.registry.get(node.id) {
            let about = NewEvent::of_node(&view.node).by(by).with("before", &*node.name);
            self.events.publish(Kind::NodeRenamed, about);
        }
        Ok(())
    }

    /// Withholds new commands from a node, at once, or gives it commands again.
    ///
    /// # Errors
    /// [`DecisionError::Store`]; for withholding [`DecisionError::NotRecorded`].
    pub async fn cordon(
        &self,
        node: &Node,
        cordoned: bool,
        by: &Actor,
    ) -> Result<(), DecisionError> {
        let action = if cordoned { "node.cordoned" } else { "node.uncordoned" };
        let detail = json!({ "node_id": node.id.to_string() });
        let audit = by.audit(unix_ms(), action, &node.name, detail);
        if cordoned {
            let _withdrawal = self.withdrawing.begin(node.id, Withdrawn::Commands);
            self.registry.set_cordoned(node.id, true);
            self.tell(Kind::NodeCordoned, node.id, by);
            let _order = self.order.lock().await;
            let recorded = self.store.cordon_node(node.id, true, audit).await;
            return recorded.map_err(DecisionError::NotRecorded);
        }
        let _order = self.order.lock().await;
        self.store.cordon_node(node.id, false, audit).await?;
        if !self.withdrawing.is_on(node.id, Withdrawn::Commands) {
            self.registry.set_cordoned(node.id, false);
            self.tell(Kind::NodeUncordoned, node.id, by);
        }
        Ok(())
    }

    /// Sets the hub's policy for a node, and tells the node; what it takes away at once, whatever else
    /// is being decided. Commands that run already go on.
    ///
    /// # Errors
    /// [`DecisionError::Store`]; where something was taken away [`DecisionError::NotRecorded`].
    pub async fn set_policy(
        &self,
        node: &Node,
        policy: NodePolicy,
        by: &Actor,
    ) -> Result<(), DecisionError> {
        let detail = json!({
            "node_id": node.id.to_string(),
            "mode": policy.bound.mode.to_string(),
            "network": policy.bound.network.to_string(),
            "until_ms": policy.until_ms,
            "reason": &policy.reason,
        });
        let audit = by.audit(unix_ms(), "policy.set", &node.name, detail);
        let (given, taken): (Vec<_>, Vec<_>) = [
            (Withdrawn::Permissive, policy.bound.mode == Mode::Permissive),
            (Withdrawn::Network, policy.bound.network == Network::Full),
        ]
        .into_iter()
        .partition(|(_, allowed)| *allowed);
        let withdrawals: Vec<_> =
            taken.iter().map(|(what, _)| self.withdrawing.begin(node.id, *what)).collect();
        let reduced = self.reduce(node.id, &policy);
        if reduced {
            self.tell_policy(node.id, by);
        }
        let _order = self.order.lock().await;
        if let Err(error) = self.store.set_node_policy(node.id, policy.clone(), audit).await {
            return Err(if reduced || given.is_empty() {
                DecisionError::NotRecorded(error)
            } else {
                error.into()
            });
        }
        drop(withdrawals);
        let withdrawn = |what: &Withdrawn| self.withdrawing.is_on(node.id, *what);
        if !given.is_empty() && !given.iter().any(|(what, _)| withdrawn(what)) {
            self.registry.set_policy(node.id, policy.clone());
            self.tell_policy(node.id, by);
            let (by, reason) = (&by.name, &policy.reason);
            tracing::warn!(node = %node.name, %by, reason, policy = %policy.bound, "policy allows more");
        }
        Ok(())
    }

    fn tell(&self, kind: Kind, node: NodeId, by: &Actor) {
        if let Some(view) = self.registry.get(node) {
            self.events.publish(kind, NewEvent::of_node(&view.node).by(by));
        }
    }

    fn tell_policy(&self, node: NodeId, by: &Actor) {
        let Some(node) = self.registry.get(node).map(|view| view.node) else { return };
        let NodePolicy { bound, until_ms, reason } = &node.policy;
        let about = NewEvent::of_node(&node).by(by).with("reason", &**reason);
        let about = about.with("mode", bound.mode.to_string());
        let about = about.with("network", bound.network.to_string());
        self.events.publish(Kind::PolicySet, about.with("until_ms", *until_ms));
    }

    /// Takes away at once what a new policy does not allow; whether anything was.
    fn reduce(&self, id: NodeId, new: &NodePolicy) -> bool {
        let Some(current) = self.registry.get(id).map(|view| view.node.policy) else {
            return false;
        };
        let bound = current.bound.and(new.bound);
        if bound == current.bound && new.bound != Bound::LEAST {
            return false;
        }
        let reduced =
            if new.bound == Bound::LEAST { new.clone() } else { NodePolicy { bound, ..current } };
        self.registry.set_policy(id, reduced);
        true
    }

    /// Writes down the end of each policy whose time is over, and tells its node. The end itself needs
    /// nobody: a policy that is over is strict wherever it is read, even if the hub was down at that
    /// moment. Returns how many ended, and when the next one will.
    ///
    /// # Errors
    /// Those of the store; the others are ended all the same.
    pub async fn end_policies(&self) -> Result<(usize, Option<Duration>), StoreError> {
        let (ended, next) = self.registry.ended_policies(unix_ms());
        let (count, mut failed) = (ended.len(), None);
        for node in ended {
            if let Err(error) = self.end_policy(&node).await {
                tracing::error!(node = %node.name, %error, "the end of a policy was not recorded");
                failed = Some(error);
            }
        }
        let left = |next: i64| u64::try_from(next - unix_ms()).unwrap_or_default();
        match failed {
            Some(error) => Err(error),
            None => Ok((count, next.map(|next| Duration::from_millis(left(next))))),
        }
    }

    async fn end_policy(&self, node: &Node) -> Result<(), StoreError> {
        let now = unix_ms();
        let detail = json!({
            "node_id": node.id.to_string(),
            "until_ms": node.policy.until_ms,
            "reason": &node.policy.reason,
        });
        let audit = Actor::hub().audit(now, "policy.ended", &node.name, detail);
        let _order = self.order.lock().await;
        // Somebody may have set another meanwhile, or forgotten the node.
        let current = self.registry.get(node.id).map(|view| view.node.policy);
        if current.as_ref() != Some(&node.policy) {
            return Ok(());
        }
        self.store.set_node_policy(node.id, NodePolicy::default(), audit).await?;
        self.registry.set_policy(node.id, NodePolicy::default());
        tracing::info!(node = %node.name, "policy ended");
        self.tell(Kind::PolicyEnded, node.id, &Actor::hub());
        Ok(())
    }
}
