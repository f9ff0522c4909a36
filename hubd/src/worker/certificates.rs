//! Nodes whose certificate has expired because they were not there to renew it.

use cortex_shared::ids::NodeId;

use crate::enroll::validator::RECOVERY_WINDOW;
use crate::node::registry::NodeView;

/// What a look at the certificates of all nodes finds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Expired {
    /// Nodes that come back by their key alone, once they are there.
    pub recoverable: Vec<NodeId>,
    /// Nodes that need a new invite.
    pub lost: Vec<NodeId>,
}

/// The nodes of a mesh whose certificate is over at this time. Those that are connected renew it, and those
/// that are revoked need none.
#[must_use]
pub fn expired_certificates(nodes: &[NodeView], now_ms: i64) -> Expired {
    let window = i64::try_from(RECOVERY_WINDOW.as_millis()).unwrap_or(i64::MAX);
    let mut expired = Expired::default();
    for NodeView { node, session, .. } in nodes {
        if session.is_some() || node.revoked_at_ms.is_some() {
            continue;
        }
        let end = node.certificate.not_after_ms;
        if end.saturating_add(window) <= now_ms {
            expired.lost.push(node.id);
        } else if end <= now_ms {
            expired.recoverable.push(node.id);
        }
    }
    expired
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::registry::Registry;
    use crate::store::{Node, fixtures};

    #[test]
    fn nodes_that_are_away_and_cannot_call_any_more_are_found() {
        let day = 24 * 3600 * 1000;
        let with = |name: &str, not_after_ms: i64, revoked_at_ms: Option<i64>| {
            let mut node = Node { revoked_at_ms, ..fixtures::node(name) };
            node.certificate.not_after_ms = not_after_ms;
            node
        };
        let nodes = vec![
            with("good", 101 * day, None),
            with("over", 100 * day, None),
            with("long over", 70 * day, None),
            with("revoked", 10 * day, Some(1)),
        ];
        let (over, lost) = (nodes[1].id, nodes[2].id);
        let found = expired_certificates(&Registry::new(nodes).all(), 100 * day);
        assert_eq!(found, Expired { recoverable: vec![over], lost: vec![lost] });
    }
}
