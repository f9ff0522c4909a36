//! Records for tests.

use cortex_shared::ids::{NodeId, TaskId};
use cortex_shared::policy::{Bound, Mode, Role};

use super::{CertificateState, Facts, Machine, NewTask, Node, NodePolicy, ShownCommand};

/// A node that has joined and was never seen.
pub(crate) fn node(name: &str) -> Node {
    Node {
        id: NodeId::new(),
        name: name.into(),
        labels: Default::default(),
        key: [0; 32],
        policy: NodePolicy::default(),
        cordoned: false,
        ceiling: Bound::LEAST,
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

/// A task of an operator, about to be journalled.
pub(crate) fn task(actor: &str, node: NodeId) -> NewTask {
    NewTask {
        id: TaskId::new(),
        node,
        node_name: "box".into(),
        actor: actor.into(),
        role: Role::Operator,
        command: command(),
        workspace: String::new(),
        mode: Mode::Strict,
        detached: false,
        spec: None,
        retry_of: None,
        key: None,
        accepted_at_ms: 1,
    }
}

/// A command that does nothing.
pub(crate) fn command() -> ShownCommand {
    ShownCommand { text: "true".into(), bytes: 4, hash: *blake3::hash(b"true").as_bytes() }
}
