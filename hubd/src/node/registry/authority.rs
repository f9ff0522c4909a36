//! What operators change about nodes, as it stands in memory. The store has each change as well; who
//! writes which first is decided by the caller (`crate::authority::nodes`).

use cortex_proto::v1::{PolicyUpdate, hub_frame};
use cortex_shared::clock::unix_ms;
use cortex_shared::ids::NodeId;
use cortex_shared::labels::Labels;
use cortex_shared::policy::{Bound, Mode, Network};
use tokio_util::sync::CancellationToken;

use super::{Known, Registry};
use crate::store::{KeyHash, Node, NodePolicy};

/// Why a call of a node is refused, though its certificate is good.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NodeRefusal {
    /// It was forgotten, or the hub's data is older than its certificate.
    #[error("the hub does not know this node")]
    Unknown,
    /// It was revoked.
    #[error("this node has been revoked")]
    Revoked,
    /// The certificate is an older one of an identity that is in use on another machine.
    #[error("this identity is in use on another machine, which has a newer certificate")]
    Overtaken,
}

/// Why a node cannot be forgotten.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ForgetRefusal {
    /// There is no such node.
    #[error("there is no such node")]
    Unknown,
    /// It is connected and not revoked.
    #[error("node {name:?} is online")]
    Online {
        /// Its name.
        name: String,
    },
}

/// What a node is told of the hub's policy: what is in force now, and until when.
#[must_use]
pub fn policy_update(policy: &NodePolicy, now_ms: i64) -> PolicyUpdate {
    let bound = policy.in_force(now_ms);
    let mode = match bound.mode {
        Mode::Strict => cortex_proto::v1::Mode::Strict,
        Mode::Permissive => cortex_proto::v1::Mode::Permissive,
    };
    let network = match bound.network {
        Network::None => cortex_proto::v1::Network::None,
        Network::Full => cortex_proto::v1::Network::Full,
    };
    PolicyUpdate {
        policy: mode.into(),
        until_ms: policy.ends_at(now_ms).unwrap_or_default(),
        network: network.into(),
    }
}

impl Registry {
    /// Whether a node may call with a certificate for this key and of this generation, where that is known and
    /// nothing else decides about it; the token is cancelled when it no longer may. Another key is another
    /// node: whoever made such a certificate has the authority's key, not the node's.
    ///
    /// # Errors
    /// See [`NodeRefusal`].
    pub fn admit(
        &self,
        id: NodeId,
        key: &KeyHash,
        generation: Option<u64>,
    ) -> Result<CancellationToken, NodeRefusal> {
        let nodes = self.lock();
        let known = nodes.get(id).filter(|known| known.node.key == *key);
        let known = known.ok_or(NodeRefusal::Unknown)?;
        if known.node.revoked_at_ms.is_some() {
            return Err(NodeRefusal::Revoked);
        }
        if generation.is_some_and(|generation| !known.accepts(generation)) {
            return Err(NodeRefusal::Overtaken);
        }
        Ok(known.calls.clone())
    }

    /// Marks a node as revoked, and ends its session and its calls at once. No change if it is
    /// revoked already or unknown.
    pub fn revoke(&self, id: NodeId) {
        self.change(id, |known| {
            known.node.revoked_at_ms.get_or_insert_with(unix_ms);
            known.calls.cancel();
            if let Some(session) = &known.session {
                session.close();
            }
        });
    }

    /// Takes a node out, if it is revoked or has no session; returns its record.
    ///
    /// # Errors
    /// See [`ForgetRefusal`].
    pub fn forget(&self, id: NodeId) -> Result<Node, ForgetRefusal> {
        let mut nodes = self.lock();
        let known = nodes.get(id).ok_or(ForgetRefusal::Unknown)?;
        if known.session.is_some() && known.node.revoked_at_ms.is_none() {
            return Err(ForgetRefusal::Online { name: known.node.name.clone() });
        }
        let known = nodes.remove(id).ok_or(ForgetRefusal::Unknown)?;
        drop(nodes);
        known.calls.cancel();
        self.notify();
        Ok(known.node)
    }

    /// Replaces a node's labels.
    pub fn set_labels(&self, id: NodeId, labels: Labels) {
        self.change(id, |known| known.node.labels = labels);
    }

    /// Renames a node.
    pub fn rename(&self, id: NodeId, name: String) {
        self.lock().rename(id, name);
        self.notify();
    }

    /// Withholds new commands from a node, or gives it commands again.
    pub fn set_cordoned(&self, id: NodeId, cordoned: bool) {
        self.change(id, |known| known.node.cordoned = cordoned);
    }

    /// Sets the hub's policy for a node, and tells the node if it is connected.
    pub fn set_policy(&self, id: NodeId, policy: NodePolicy) {
        self.change(id, |known| {
            known.node.policy = policy;
            known.send_policy();
        });
        self.policy_changed.notify_one();
    }

    /// Tells a node its policy again, if it is no longer the one that it has been told. For a session
    /// that has just begun: a change in between was sent ahead of the welcome.
    pub fn correct_policy(&self, id: NodeId, told: &NodePolicy) {
        let nodes = self.lock();
        if let Some(known) = nodes.get(id).filter(|known| known.node.policy != *told) {
            known.send_policy();
        }
    }

    /// The policies whose time is over, and when the next one's will be.
    #[must_use]
    pub fn ended_policies(&self, now_ms: i64) -> (Vec<Node>, Option<i64>) {
        let nodes = self.lock();
        let ending = || {
            nodes.values().filter(|known| {
                let policy = &known.node.policy;
                policy.bound != Bound::LEAST && policy.until_ms.is_some()
            })
        };
        let ended = ending().filter(|k| k.node.policy.in_force(now_ms) == Bound::LEAST);
        let next = ending().filter_map(|k| k.node.policy.ends_at(now_ms)).min();
        (ended.map(|known| known.node.clone()).collect(), next)
    }

    /// Waits until somebody sets a policy. For one waiter.
    pub async fn policy_changed(&self) {
        self.policy_changed.notified().await;
    }

    pub(super) fn change(&self, id: NodeId, change: impl FnOnce(&mut Known)) {
        if let Some(known) = self.lock().get_mut(id) {
            change(known);
        }
        self.notify();
    }
}

impl Known {
    fn send_policy(&self) {
        if let Some(session) = &self.session {
            let update = policy_update(&self.node.policy, unix_ms());
            // A session that has just ended learns it from its next welcome.
            session.send(hub_frame::Frame::Policy(update)).ok();
        }
    }
}

#[cfg(test)]
mod tests {
    use cortex_proto::v1;
    use cortex_shared::policy::{Bound, Mode};

    use super::super::tests::{begin, node};
    use super::*;

    #[test]
    fn revocation_ends_the_session_and_all_calls_and_holds() {
        let one = node("a");
        let id = one.id;
        let registry = Registry::new(vec![one]);
        let session = begin(&registry, id);
        let key = registry.get(id).unwrap().node.key;
        assert_eq!(registry.admit(id, &[7; 32], None).unwrap_err(), NodeRefusal::Unknown);
        let calls = registry.admit(id, &key, None).unwrap();
        registry.revoke(id);
        assert!(session.cancel.is_cancelled() && calls.is_cancelled());
        assert_eq!(registry.admit(id, &key, None).unwrap_err(), NodeRefusal::Revoked);
        let at = registry.get(id).unwrap().node.revoked_at_ms;
        registry.revoke(id);
        assert_eq!(registry.get(id).unwrap().node.revoked_at_ms, at, "the first time stands");
    }

    #[test]
    fn only_what_is_revoked_or_offline_is_forgotten() {
        let (a, b) = (node("a"), node("b"));
        let (a_id, b_id) = (a.id, b.id);
        let registry = Registry::new(vec![a, b]);
        let session = begin(&registry, a_id);
        let refusal = registry.forget(a_id).unwrap_err();
        assert_eq!(refusal, ForgetRefusal::Online { name: "a".into() });
        registry.revoke(a_id);
        assert_eq!(registry.forget(a_id).unwrap().name, "a");
        assert!(!registry.end_session(a_id, session.handle.id), "its farewell finds nobody");
        assert_eq!(registry.forget(b_id).unwrap().name, "b");
        assert_eq!(registry.forget(b_id).unwrap_err(), ForgetRefusal::Unknown);
        assert_eq!(registry.admit(b_id, &[7; 32], None).unwrap_err(), NodeRefusal::Unknown);
    }

    #[test]
    fn a_node_hears_of_its_policy_and_of_its_end() {
        let one = node("a");
        let id = one.id;
        let registry = Registry::new(vec![one]);
        let mut session = begin(&registry, id);
        let later = unix_ms() + 60_000;
        let policy = |mode, until_ms| NodePolicy {
            bound: Bound { mode, ..Bound::LEAST },
            until_ms,
            reason: String::new(),
        };
        let mut told = || match session.outbox.try_recv().map(|frame| frame.frame) {
            Ok(Some(hub_frame::Frame::Policy(update))) => Some((update.policy(), update.until_ms)),
            _ => None,
        };
        let permissive = policy(Mode::Permissive, Some(later));
        registry.set_policy(id, permissive.clone());
        assert_eq!(told(), Some((v1::Mode::Permissive, later)));
        // One that is over is told as strict.
        registry.set_policy(id, policy(Mode::Permissive, Some(1)));
        assert_eq!(told(), Some((v1::Mode::Strict, 0)));
        registry.correct_policy(id, &permissive);
        assert_eq!(told(), Some((v1::Mode::Strict, 0)), "the welcome spoke of another");
        registry.correct_policy(id, &policy(Mode::Permissive, Some(1)));
        assert_eq!(told(), None);
    }

    #[test]
    fn the_next_policy_to_end_is_known() {
        let mut nodes = [node("a"), node("b"), node("c")];
        for (node, until) in nodes.iter_mut().zip([10, 20, 30]) {
            let bound = Bound { mode: Mode::Permissive, ..Bound::LEAST };
            node.policy = NodePolicy { bound, until_ms: Some(until), reason: String::new() };
        }
        let registry = Registry::new(nodes.to_vec());
        let (ended, next) = registry.ended_policies(15);
        assert_eq!((ended.len(), ended[0].name.as_str(), next), (1, "a", Some(20)));
        assert_eq!(registry.ended_policies(30).1, None);
    }
}
