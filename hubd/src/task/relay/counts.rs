//! Where tasks are and how many, for lists and metrics.

use std::collections::HashMap;
use std::sync::Arc;

use cortex_proto::v1::TaskState;
use cortex_shared::ids::NodeId;

use super::Relay;

impl Relay {
    /// Where each task without a verdict is.
    #[must_use]
    pub fn states(&self) -> Vec<TaskState> {
        let tasks: Vec<_> = self.lock().values().map(|one| Arc::clone(&one.task)).collect();
        tasks.iter().map(|task| task.state().0).collect()
    }

    /// How many of them there are on each node that has any.
    #[must_use]
    pub fn running_by_node(&self) -> HashMap<NodeId, usize> {
        let mut counts = HashMap::new();
        for running in self.lock().values() {
            *counts.entry(running.task.record.node).or_default() += 1;
        }
        counts
    }
}
