//! How much content may be in memory on its way in, counted in bytes: for the hub as a whole, and
//! for each member, so that one member's flood leaves room for the others.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use cortex_shared::ids::NodeId;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Limits of a [`Budget`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BudgetLimits {
    /// Bytes for all members together.
    pub hub_bytes: u32,
    /// Bytes for one member.
    pub member_bytes: u32,
}

impl Default for BudgetLimits {
    /// 256 MiB for the hub: some fifty packs, enough to keep a disk busy. 32 MiB for a member: six
    /// packs, enough for a line of 1 Gbit/s with a quarter of a second of round trip.
    fn default() -> Self {
        Self { hub_bytes: 256 << 20, member_bytes: 32 << 20 }
    }
}

/// Room for bytes. Waiting for it is in order of arrival, first at the member's own gate.
#[derive(Debug)]
pub struct Budget {
    limits: BudgetLimits,
    hub: Arc<Semaphore>,
    /// Members with bytes on their way; the others take no memory.
    members: Mutex<HashMap<NodeId, Weak<Semaphore>>>,
}

/// Bytes that are on their way; gives the room back when dropped.
#[derive(Debug)]
pub struct Room {
    _hub: OwnedSemaphorePermit,
    _member: OwnedSemaphorePermit,
    /// Keeps the member's gate alive as long as somebody is within.
    _gate: Arc<Semaphore>,
}

impl Budget {
    /// A budget with all of its room free.
    #[must_use]
    pub fn new(limits: BudgetLimits) -> Self {
        let hub = Arc::new(Semaphore::new(limits.hub_bytes as usize));
        Self { limits, hub, members: Mutex::default() }
    }

    /// Waits for room. What is larger than a limit gets the whole of it.
    pub async fn room(&self, member: NodeId, bytes: usize) -> Room {
        let gate = self.gate(member);
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
        let open = "the budget never closes its gates";
        let of_member =
            gate.clone().acquire_many_owned(bytes.min(self.limits.member_bytes)).await.expect(open);
        let of_hub = self
            .hub
            .clone()
            .acquire_many_owned(bytes.min(self.limits.hub_bytes))
            .await
            .expect(open);
        Room { _hub: of_hub, _member: of_member, _gate: gate }
    }

    fn gate(&self, member: NodeId) -> Arc<Semaphore> {
        let mut members = self.members.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(gate) = members.get(&member).and_then(Weak::upgrade) {
            return gate;
        }
        members.retain(|_, gate| gate.strong_count() > 0);
        let gate = Arc::new(Semaphore::new(self.limits.member_bytes as usize));
        members.insert(member, Arc::downgrade(&gate));
        gate
    }
}

#[cfg(test)]
mod tests {
    use std::future::Future as _;
    use std::pin::pin;
    use std::task::{Context, Waker};

    use super::*;

    #[tokio::test]
    async fn a_member_that_fills_its_room_does_not_hold_up_another() {
        let budget = Budget::new(BudgetLimits { hub_bytes: 100, member_bytes: 40 });
        let (greedy, modest) = (NodeId::new(), NodeId::new());
        let first = budget.room(greedy, 40).await;
        let mut second = pin!(budget.room(greedy, 1));
        let mut context = Context::from_waker(Waker::noop());
        assert!(second.as_mut().poll(&mut context).is_pending());
        drop(budget.room(modest, 40).await);
        drop(first);
        drop(second.await);
        // More than there is takes all there is, rather than waiting for ever.
        drop(budget.room(modest, 1_000_000).await);
        assert_eq!(budget.hub.available_permits(), 100);
    }

    #[tokio::test]
    async fn idle_members_take_no_memory() {
        let budget = Budget::new(BudgetLimits::default());
        for _ in 0..10 {
            drop(budget.room(NodeId::new(), 1).await);
        }
        drop(budget.room(NodeId::new(), 1).await);
        assert!(budget.members.lock().unwrap().len() <= 1);
    }
}
