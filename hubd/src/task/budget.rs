//! How much output the hub holds for readers that do not take it: of one task, one node, and in all.
//!
//! A task's share is fixed when it begins, by what is left then, and given back when it is dropped. It
//! bounds what the task's node is granted, so a crowd of readers that stand still costs their own
//! commands speed, and the hub a known amount of memory. In memory only.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Mutex, PoisonError};

use cortex_proto::{LEAST_OUTPUT_CREDIT, MAX_OUTPUT_CREDIT};
use cortex_shared::ids::NodeId;

use super::limits::CommandLimits;

#[derive(Default)]
struct Held {
    total: u64,
    nodes: HashMap<NodeId, u64>,
}

/// See the module.
pub(super) struct Budget {
    hub_bytes: u64,
    node_bytes: u64,
    held: Mutex<Held>,
}

/// What one task may have lying here; given back when dropped.
pub(super) struct Share {
    budget: Arc<Budget>,
    node: NodeId,
    bytes: u64,
}

impl Budget {
    pub(super) fn new(limits: &CommandLimits) -> Self {
        let (hub_bytes, node_bytes) = (limits.hub_memory, limits.node_memory);
        Self { hub_bytes, node_bytes, held: Mutex::default() }
    }

    /// A share of `wanted` bytes if there is plenty, and of less the less is left.
    pub(super) fn take(self: &Arc<Self>, node: NodeId, wanted: u64) -> Share {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let of_node = held.nodes.get(&node).copied().unwrap_or(0);
        // A part of what is left, so that whoever comes next finds something, too.
        let most = (self.node_bytes.saturating_sub(of_node) / 4)
            .min(self.hub_bytes.saturating_sub(held.total) / 8)
            .clamp(LEAST_OUTPUT_CREDIT, MAX_OUTPUT_CREDIT);
        let bytes = wanted.clamp(LEAST_OUTPUT_CREDIT, most);
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
        let mut held = self.budget.held.lock().unwrap_or_else(PoisonError::into_inner);
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
        let limits = CommandLimits::default();
        let budget = Arc::new(Budget::new(&limits));
        let (busy, other) = (NodeId::new(), NodeId::new());
        let wanted = cortex_proto::DEFAULT_OUTPUT_CREDIT;
        let shares: Vec<_> = (0..256).map(|_| budget.take(busy, wanted)).collect();
        assert_eq!(shares[0].bytes(), wanted);
        assert_eq!(shares[255].bytes(), LEAST_OUTPUT_CREDIT, "never nothing");
        let held: u64 = shares.iter().map(Share::bytes).sum();
        assert!(held <= limits.node_memory + 256 * LEAST_OUTPUT_CREDIT, "{held}");
        assert_eq!(budget.take(other, wanted).bytes(), wanted, "another node has its own");
        let crowd: Vec<_> = (0..1000).map(|_| budget.take(NodeId::new(), wanted)).collect();
        let held: u64 = crowd.iter().chain(&shares).map(Share::bytes).sum();
        assert!(held <= limits.hub_memory + 1256 * LEAST_OUTPUT_CREDIT, "{held}");
        drop((crowd, shares));
        let held = budget.held.lock().unwrap();
        assert!(held.total == 0 && held.nodes.is_empty());
    }
}
