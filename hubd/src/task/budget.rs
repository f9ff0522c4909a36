//! How much output the hub holds for readers that do not take it: of one task, one node, and in all.
//!
//! A task's share is fixed when it begins, by what is left then, and given back when it is dropped. It
//! bounds what the task's node is granted, so a crowd of readers that stand still costs their own
//! commands speed, and the hub a known amount of memory. In memory only.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Mutex, PoisonError};

use cortex_proto::MAX_OUTPUT_CREDIT;
use cortex_shared::ids::NodeId;

/// For all tasks of a hub: room for 64 fast commands, and a small part of the memory that a hub of
/// hundreds of nodes has.
pub const HUB_BYTES: u64 = 256 * 1024 * 1024;
/// For all tasks of a node, so that one node does not take all of it.
pub const NODE_BYTES: u64 = 64 * 1024 * 1024;
/// What every task gets, whatever is left: less would make each frame wait for a round trip. A node
/// runs some hundreds of commands at most, so this is bounded, too.
pub const LEAST_BYTES: u64 = 64 * 1024;

#[derive(Default)]
struct Held {
    total: u64,
    nodes: HashMap<NodeId, u64>,
}

/// See the module.
#[derive(Default)]
pub(super) struct Budget(Mutex<Held>);

/// What one task may have lying here; given back when dropped.
pub(super) struct Share {
    budget: Arc<Budget>,
    node: NodeId,
    bytes: u64,
}

impl Budget {
    /// A share of `wanted` bytes if there is plenty, and of less the less is left.
    pub(super) fn take(self: &Arc<Self>, node: NodeId, wanted: u64) -> Share {
        let mut held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let of_node = held.nodes.get(&node).copied().unwrap_or(0);
        // A part of what is left, so that whoever comes next finds something, too.
        let most = (NODE_BYTES.saturating_sub(of_node) / 4)
            .min(HUB_BYTES.saturating_sub(held.total) / 8)
            .clamp(LEAST_BYTES, MAX_OUTPUT_CREDIT);
        let bytes = wanted.clamp(LEAST_BYTES, most);
        held.total += bytes;
        *held.nodes.entry(node).or_default() += bytes;
        Share { budget: Arc::clone(self), node, bytes }
    }
}

impl Share {
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let mut held = self.budget.0.lock().unwrap_or_else(PoisonError::into_inner);
        held.total -= self.bytes;
        if let Entry::Occupied(mut of_node) = held.nodes.entry(self.node) {
            *of_node.get_mut() -= self.bytes;
            // Nodes that run nothing are forgotten.
            if *of_node.get() == 0 {
                of_node.remove();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_task_gets_what_it_wants_and_a_crowd_less_each_and_all_of_it_comes_back() {
        let budget = Arc::new(Budget::default());
        let (busy, other) = (NodeId::new(), NodeId::new());
        let wanted = cortex_proto::DEFAULT_OUTPUT_CREDIT;
        let shares: Vec<_> = (0..256).map(|_| budget.take(busy, wanted)).collect();
        assert_eq!(shares[0].bytes(), wanted);
        assert_eq!(shares[255].bytes(), LEAST_BYTES, "never nothing");
        let held: u64 = shares.iter().map(Share::bytes).sum();
        assert!(held <= NODE_BYTES + 256 * LEAST_BYTES, "{held}");
        assert_eq!(budget.take(other, wanted).bytes(), wanted, "another node has its own");
        let crowd: Vec<_> = (0..1000).map(|_| budget.take(NodeId::new(), wanted)).collect();
        let held: u64 = crowd.iter().chain(&shares).map(Share::bytes).sum();
        assert!(held <= HUB_BYTES + 1256 * LEAST_BYTES, "{held}");
        drop((crowd, shares));
        let held = budget.0.lock().unwrap();
        assert!(held.total == 0 && held.nodes.is_empty());
    }
}
