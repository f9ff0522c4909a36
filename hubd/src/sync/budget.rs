//! How much content may be in memory, counted in bytes: for the hub as a whole, and for each member,
//! so that one member's flood, or its refusal to read, leaves room for the others.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use cortex_shared::ids::NodeId;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// How much content may be in memory, and what stays free on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ContentLimits {
    /// Bytes on their way in, for all members together.
    pub hub_bytes: u32,
    /// Bytes on their way in for one member, and as many again on their way out.
    pub member_bytes: u32,
    /// What stays free on the disk, so that everything but content can still be written; `None` for a
    /// hundredth of the disk, and 2 GiB at most.
    pub reserve_bytes: Option<u64>,
}

impl Default for ContentLimits {
    /// 256 MiB for the hub: some fifty packs, enough to keep a disk busy. 32 MiB for a member: six
    /// packs, enough for a line of 1 Gbit/s with a quarter of a second of round trip.
    fn default() -> Self {
        Self { hub_bytes: 256 << 20, member_bytes: 32 << 20, reserve_bytes: None }
    }
}

/// Room for bytes of each member.
#[derive(Debug)]
struct Gates {
    member_bytes: u32,
    /// Members with bytes on their way; the others take no memory.
    members: Mutex<HashMap<NodeId, Weak<Semaphore>>>,
}

/// Room of one member, given back when dropped.
#[derive(Debug)]
pub struct MemberRoom {
    _permit: OwnedSemaphorePermit,
    /// Keeps the member's gate alive as long as somebody is within.
    _gate: Arc<Semaphore>,
}

/// Room for bytes on their way in, given back when dropped.
#[derive(Debug)]
pub struct Room {
    _hub: OwnedSemaphorePermit,
    _member: MemberRoom,
}

/// Room for content. Waiting for it is in order of arrival, first at the member's own gate.
#[derive(Debug)]
pub(super) struct Budget {
    hub_bytes: u32,
    hub: Arc<Semaphore>,
    incoming: Gates,
    /// Without a limit for all: a member that does not read holds its room as long as it likes, and
    /// must not be able to use up that of others.
    outgoing: Gates,
}

impl Budget {
    /// A budget with all of its room free.
    pub(super) fn new(limits: ContentLimits) -> Self {
        let gates = || Gates { member_bytes: limits.member_bytes, members: Mutex::default() };
        let hub = Arc::new(Semaphore::new(limits.hub_bytes as usize));
        Self { hub_bytes: limits.hub_bytes, hub, incoming: gates(), outgoing: gates() }
    }

    /// Waits for room for bytes on their way in. What is larger than a limit gets the whole of it.
    pub(super) async fn incoming(&self, member: NodeId, bytes: usize) -> Room {
        let of_member = self.incoming.room(member, bytes).await;
        Room { _hub: acquire(&self.hub, bytes, self.hub_bytes).await, _member: of_member }
    }

    /// Waits for room for bytes on their way out. What is larger than a limit gets the whole of it.
    pub(super) async fn outgoing(&self, member: NodeId, bytes: usize) -> MemberRoom {
        self.outgoing.room(member, bytes).await
    }
}

impl Gates {
    async fn room(&self, member: NodeId, bytes: usize) -> MemberRoom {
        let gate = self.gate(member);
        MemberRoom { _permit: acquire(&gate, bytes, self.member_bytes).await, _gate: gate }
    }

    fn gate(&self, member: NodeId) -> Arc<Semaphore> {
        let mut members = self.members.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(gate) = members.get(&member).and_then(Weak::upgrade) {
            return gate;
        }
        members.retain(|_, gate| gate.strong_count() > 0);
        let gate = Arc::new(Semaphore::new(self.member_bytes as usize));
        members.insert(member, Arc::downgrade(&gate));
        gate
    }
}

async fn acquire(gate: &Arc<Semaphore>, bytes: usize, limit: u32) -> OwnedSemaphorePermit {
    let permits = u32::try_from(bytes).unwrap_or(u32::MAX).min(limit);
    gate.clone().acquire_many_owned(permits).await.expect("a gate is never closed")
}

#[cfg(test)]
mod tests {
    use std::future::Future as _;
    use std::pin::pin;
    use std::task::{Context, Waker};

    use super::*;

    #[tokio::test]
    async fn a_member_that_fills_its_room_does_not_hold_up_another() {
        let budget = Budget::new(ContentLimits {
            hub_bytes: 100,
            member_bytes: 40,
            ..ContentLimits::default()
        });
        let (greedy, modest) = (NodeId::new(), NodeId::new());
        let first = budget.incoming(greedy, 40).await;
        let mut second = pin!(budget.incoming(greedy, 1));
        let mut context = Context::from_waker(Waker::noop());
        assert!(second.as_mut().poll(&mut context).is_pending());
        drop(budget.incoming(modest, 40).await);
        drop(first);
        drop(second.await);
        // More than there is takes all there is, rather than waiting for ever.
        drop(budget.incoming(modest, 1_000_000).await);
        assert_eq!(budget.hub.available_permits(), 100);
    }

    #[tokio::test]
    async fn idle_members_take_no_memory() {
        let budget = Budget::new(ContentLimits::default());
        for _ in 0..10 {
            drop(budget.incoming(NodeId::new(), 1).await);
        }
        drop(budget.incoming(NodeId::new(), 1).await);
        assert!(budget.incoming.members.lock().unwrap().len() <= 1);
    }
}
