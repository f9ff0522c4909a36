//! What a role may have at once. People have what their nodes and their own readers bear; a program
//! that acts for somebody may be led astray by what it reads, and must not take a mesh with it.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Mutex, PoisonError};

use cortex_shared::policy::Role;

/// Commands that an agent token may have running at once. A program works through a handful of
/// things at a time; one that starts more is in a loop.
pub const AGENT_TOKEN_COMMANDS: usize = 8;
/// Output that one command of an agent token may write. The logs of a large build fit; more than
/// that no program reads, and it fills disks and histories.
pub const AGENT_TOKEN_OUTPUT_BYTES: u64 = 64 * 1024 * 1024;

/// Commands that a node has at once, for all callers together: as many as its agent runs.
pub const NODE_COMMANDS: usize = 256;
/// Commands that a hub has at once: what its memory and descriptors bear, at some tens of kilobytes each
/// without output ([`super::budget`] bounds the output).
pub const HUB_COMMANDS: usize = 16 * 1024;

/// The limits of one caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Commands at once.
    pub commands: usize,
    /// Output of one command, both streams together.
    pub output_bytes: u64,
}

impl Limits {
    /// The limits of a role.
    #[must_use]
    pub fn of(role: Role) -> Self {
        match role {
            Role::AgentToken => {
                Self { commands: AGENT_TOKEN_COMMANDS, output_bytes: AGENT_TOKEN_OUTPUT_BYTES }
            }
            Role::Viewer | Role::Operator | Role::Admin => {
                Self { commands: usize::MAX, output_bytes: u64::MAX }
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
