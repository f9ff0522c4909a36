//! Records for tests.

use cortex_shared::ids::NodeId;
use cortex_shared::policy::Mode;

use super::{CertificateState, Facts, Machine, Node, NodePolicy};

/// A node that has joined and was never seen.
pub(crate) fn node(name: &str) -> Node {
    Node {
        id: NodeId::new(),
        name: name.into(),
        labels: Default::default(),
        key: [0; 32],
        policy: NodePolicy::default(),
        cordoned: false,
        ceiling: Mode::Strict,
        joined_at_ms: 0,
        last_seen_ms: 0,
        revoked_at_ms: None,
        facts: Facts::default(),
        owner: String::new(),
        certificate: CertificateState { generation: 1, ..CertificateState::default() },
        machine: Machine::default(),
        clone: None,
    }
}
