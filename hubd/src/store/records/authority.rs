//! Records of authority: who acts, what the hub allows a node, and who operators are.

use std::collections::BTreeSet;

use cortex_shared::labels::{Labels, SELF_LABEL_PREFIX};
use cortex_shared::policy::{Bound, Mode, Role};
use serde_json::Value;

use super::{KeyHash, NewAudit};

/// Whoever does something, as the audit log names them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Actor {
    /// An operator's name, `local` for the administration socket, `node:NAME` or `hub`.
    pub name: String,
    /// The user behind `local`.
    pub uid: Option<u32>,
}

impl Actor {
    /// The hub itself, such as when a policy ends by itself.
    #[must_use]
    pub fn hub() -> Self {
        "hub".into()
    }

    /// A line for the audit log; `detail` is an object, to which the user of `local` is added.
    #[must_use]
    pub fn audit(
        &self,
        at_ms: i64,
        action: &'static str,
        target: impl Into<String>,
        mut detail: Value,
    ) -> NewAudit {
        if let (Some(uid), Value::Object(fields)) = (self.uid, &mut detail) {
            fields.insert("uid".to_owned(), uid.into());
        }
        NewAudit {
            at_ms,
            actor: self.name.clone(),
            action,
            target: target.into(),
            detail: detail.to_string(),
        }
    }
}

impl From<&str> for Actor {
    fn from(name: &str) -> Self {
        Self { name: name.to_owned(), uid: None }
    }
}

/// What the hub allows a node's commands. Strict unless somebody said otherwise, and strict again
/// when the time is over, whether or not anyone has written that down yet.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodePolicy {
    /// As it was set; [`NodePolicy::in_force`] is what counts.
    pub bound: Bound,
    /// When what it allows beyond [`Bound::LEAST`] ends. Permissive always has an end.
    pub until_ms: Option<i64>,
    /// Why it allows more than that.
    pub reason: String,
}

impl NodePolicy {
    /// What counts at this time. A permissive policy without an end is none: nobody can set one.
    #[must_use]
    pub fn in_force(&self, now_ms: i64) -> Bound {
        match self.until_ms {
            Some(until) if now_ms < until => self.bound,
            Some(_) => Bound::LEAST,
            None => Bound { mode: Mode::Strict, ..self.bound },
        }
    }

    /// When it ends by itself, if it allows anything to end now.
    #[must_use]
    pub fn ends_at(&self, now_ms: i64) -> Option<i64> {
        self.until_ms.filter(|_| self.in_force(now_ms) != Bound::LEAST)
    }
}

/// Which nodes an operator may see and command: those that carry all of these labels, as set by
/// operators and invites. Empty for all nodes.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(transparent)]
pub struct Scope(pub Labels);

impl Scope {
    /// Whether a node with these labels is in it. What a node says of itself never counts.
    #[must_use]
    pub fn covers(&self, labels: &Labels) -> bool {
        self.0.iter().all(|(key, value)| {
            !key.starts_with(SELF_LABEL_PREFIX) && labels.get(key) == Some(value)
        })
    }

    /// Whether it is the whole mesh.
    #[must_use]
    pub fn is_everything(&self) -> bool {
        self.0.is_empty()
    }
}

/// An operator that has logged in at least once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OperatorRecord {
    /// Its unique name.
    pub name: String,
    /// What it may do.
    pub role: Role,
    /// What it may do it to.
    pub scope: Scope,
    /// The key of its newest login: certificates of other keys are not its own any longer.
    pub key: KeyHash,
    /// When it first logged in.
    pub created_at_ms: i64,
    /// When it was revoked; a later login lifts it.
    pub revoked_at_ms: Option<i64>,
}

/// A change of a node's labels.
#[derive(Clone, Debug, Default)]
pub struct LabelChange {
    /// Labels to set.
    pub set: Labels,
    /// Keys to remove; one that is not there is no error.
    pub remove: BTreeSet<String>,
    /// Whether the keys that scopes are made of may be changed.
    pub may_change_scopes: bool,
}

/// Why labels were not changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LabelRefusal {
    /// A scope is made of this key.
    #[error("the label {key:?} decides what some operator may command")]
    Protected {
        /// The key.
        key: String,
    },
    /// The node would carry too many.
    #[error("a node carries at most {} labels", cortex_shared::labels::MAX_LABELS)]
    TooMany,
}

#[cfg(test)]
mod tests {
    use cortex_shared::policy::Network;

    use super::*;

    fn labels(pairs: &[(&str, &str)]) -> Labels {
        pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
    }

    #[test]
    fn a_permissive_policy_ends_by_itself_and_never_lacks_an_end() {
        let policy = |mode, until_ms| NodePolicy {
            bound: Bound { mode, ..Bound::LEAST },
            until_ms,
            reason: String::new(),
        };
        for (policy, now, in_force) in [
            (policy(Mode::Strict, None), 5, Mode::Strict),
            (policy(Mode::Strict, Some(10)), 5, Mode::Strict),
            (policy(Mode::Permissive, Some(10)), 9, Mode::Permissive),
            (policy(Mode::Permissive, Some(10)), 10, Mode::Strict),
            (policy(Mode::Permissive, None), 5, Mode::Strict),
        ] {
            assert_eq!(policy.in_force(now).mode, in_force, "{policy:?} at {now}");
            let online = Bound { network: Network::Full, ..policy.bound };
            let online = NodePolicy { bound: online, ..policy };
            let over = online.until_ms.is_some_and(|until| until <= now);
            let expected = if over { Network::None } else { Network::Full };
            assert_eq!(online.in_force(now).network, expected, "{online:?} at {now}");
        }
    }

    #[test]
    fn a_scope_covers_nodes_that_carry_all_of_its_labels() {
        for (scope, node, covered) in [
            (labels(&[]), labels(&[]), true),
            (labels(&[("env", "dev")]), labels(&[("env", "dev"), ("a", "b")]), true),
            (labels(&[("env", "dev")]), labels(&[("env", "prod")]), false),
            (labels(&[("env", "dev")]), labels(&[]), false),
            (labels(&[("env", "dev"), ("a", "b")]), labels(&[("env", "dev")]), false),
            // A node that says so itself is not in.
            (labels(&[("env", "dev")]), labels(&[("self/env", "dev")]), false),
            (labels(&[("self/env", "dev")]), labels(&[("self/env", "dev")]), false),
        ] {
            assert_eq!(Scope(scope.clone()).covers(&node), covered, "{scope:?} {node:?}");
        }
    }

    #[test]
    fn the_user_behind_the_socket_stands_in_the_particulars() {
        let local = Actor { name: "local".into(), uid: Some(7) };
        let line = local.audit(1, "node.revoked", "web", serde_json::json!({"a": 1}));
        assert_eq!(line.detail, r#"{"a":1,"uid":7}"#);
        let hub = Actor::hub().audit(1, "policy.ended", "web", serde_json::json!({}));
        assert_eq!((hub.actor.as_str(), hub.detail.as_str()), ("hub", "{}"));
    }
}
