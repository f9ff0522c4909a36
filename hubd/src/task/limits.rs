//! What a role may have at once. People have what their nodes and their own readers bear; a program
//! that acts for somebody may be led astray by what it reads, and must not take a mesh with it.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Mutex, PoisonError};

use cortex_shared::policy::Role;

/// Commands that a node has at once at most, for all callers together: as many as its agent runs.
pub const NODE_COMMANDS: usize = 256;

/// How many commands run at once, and what they may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CommandLimits {
    /// Commands of the hub.
    pub hub: usize,
    /// Commands of a node.
    pub node: usize,
    /// Commands of one agent token.
    pub agent_token: usize,
    /// Output of one command of an agent token, both streams together, in bytes.
    pub agent_token_output: u64,
    /// Output that waits in memory for readers, of all commands, in bytes.
    pub hub_memory: u64,
    /// The same of the commands of one node.
    pub node_memory: u64,
}

impl Default for CommandLimits {
    /// 16,384 commands are what memory and descriptors bear, at some tens of kilobytes each without output.
    /// 256 MiB of that: room for 64 fast commands, and a small part of the memory that a hub of hundreds
    /// of nodes has. An agent token works through a handful of things at a time, and one that starts more
    /// is in a loop; of its output the logs of a large build fit, and more no program reads.
    fn default() -> Self {
        Self {
            hub: 16 * 1024,
            node: NODE_COMMANDS,
            agent_token: 8,
            agent_token_output: 64 << 20,
            hub_memory: 256 << 20,
            node_memory: 64 << 20,
        }
    }
}

/// The limits of one caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Commands at once.
    pub commands: usize,
    /// Output of one command, both streams together.
    pub output_bytes: u64,
}

impl CommandLimits {
    /// The limits of a role.
    #[must_use]
    pub fn of(&self, role: Role) -> Limits {
        match role {
            Role::AgentToken => {
                Limits { commands: self.agent_token, output_bytes: self.agent_token_output }
            }
            Role::Viewer | Role::Operator | Role::Admin => {
                Limits { commands: usize::MAX, output_bytes: u64::MAX }
            }
        }
    }
}

/// How many commands each caller has running.
#[derive(Default)]
pub(crate) struct Slots(Mutex<HashMap<String, usize>>);

/// A place among a caller's commands, given back when dropped.
pub(crate) struct Slot {
    slots: Arc<Slots>,
    actor: String,
}

impl Slots {
    /// Takes a place; `None` if the caller has `limit` of them already.
    pub(crate) fn take(self: &Arc<Self>, actor: &str, limit: usize) -> Option<Slot> {
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let count = counts.entry(actor.to_owned()).or_default();
        if *count >= limit {
            return None;
        }
        *count += 1;
        Some(Slot { slots: Arc::clone(self), actor: actor.to_owned() })
    }

    /// How many places are taken, of all callers.
    pub(crate) fn total(&self) -> usize {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).values().sum()
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut counts = self.slots.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Entry::Occupied(mut count) = counts.entry(std::mem::take(&mut self.actor)) {
            *count.get_mut() -= 1;
            // Names that have nothing running are forgotten: the map is as large as what runs.
            if *count.get() == 0 {
                count.remove();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_counted_by_caller_and_given_back() {
        let slots = Arc::new(Slots::default());
        let one = slots.take("bot", 2).unwrap();
        let two = slots.take("bot", 2).unwrap();
        assert!(slots.take("bot", 2).is_none());
        assert!(slots.take("ann", 2).is_some(), "another caller has places of its own");
        drop(one);
        assert!(slots.take("bot", 2).is_some());
        drop(two);
        assert!(slots.0.lock().unwrap().is_empty(), "nobody is remembered without a reason");
    }
}
