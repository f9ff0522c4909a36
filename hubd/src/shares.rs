//! Places that are shared out: so many in all, and so many of them to one address.
//!
//! What costs memory or a connection is bounded for everybody together; what one address may have is bounded
//! as well, so that the others find places left. Who finds none is turned away ([`Shares`]), or waits
//! ([`Queue`]).

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// See the module. It knows the addresses that hold a place, and no others.
pub(crate) struct Shares {
    total: usize,
    each: usize,
    held: Mutex<Held>,
}

#[derive(Default)]
struct Held {
    total: usize,
    by_address: HashMap<IpAddr, usize>,
}

impl Shares {
    /// `total` places, `each` of them at most for one address; one at least.
    pub(crate) fn new(total: usize, each: usize) -> Arc<Self> {
        Arc::new(Self { total, each: each.max(1), held: Mutex::default() })
    }

    /// A place for this address, if there is one.
    pub(crate) fn take(self: &Arc<Self>, address: IpAddr) -> Option<Place> {
        let holder = holder(address);
        let mut held = self.held();
        let has = held.by_address.get(&holder).copied().unwrap_or_default();
        if held.total >= self.total || has >= self.each {
            return None;
        }
        held.total += 1;
        held.by_address.insert(holder, has + 1);
        Some(Place { shares: Arc::clone(self), holder })
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whose place it is: a network of version 6 is given to one customer whole.
fn holder(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V4(address) => IpAddr::V4(address),
        IpAddr::V6(address) => {
            let network = address.to_bits() & !u128::from(u64::MAX);
            IpAddr::V6(Ipv6Addr::from_bits(network))
        }
    }
}

/// A place, until it is dropped.
pub(crate) struct Place {
    shares: Arc<Shares>,
    holder: IpAddr,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut held = self.shares.held();
        held.total = held.total.saturating_sub(1);
        if let Some(has) = held.by_address.get_mut(&self.holder) {
            *has = has.saturating_sub(1);
            if *has == 0 {
                held.by_address.remove(&self.holder);
            }
        }
    }
}

/// Places for which those wait who find none. Whoever comes from an address that has its share waits for one
/// of that address; all others are before him.
pub(crate) struct Queue {
    all: Arc<Semaphore>,
    each: usize,
    /// Of the addresses that hold a place or wait for one: their places, and how many hold or wait.
    by_address: Mutex<HashMap<IpAddr, (Arc<Semaphore>, usize)>>,
}

impl Queue {
    /// `total` places, `each` of them at most for one address; one at least.
    pub(crate) fn new(total: usize, each: usize) -> Arc<Self> {
        let all = Arc::new(Semaphore::new(total));
        Arc::new(Self { all, each: each.max(1), by_address: Mutex::default() })
    }

    /// Waits for a place for this address; whoever gives up waiting stands in nobody's way. How many wait,
    /// and how long, is the caller's to bound.
    pub(crate) async fn wait(self: &Arc<Self>, address: IpAddr) -> Queued {
        let holder = holder(address);
        let own = {
            let mut by_address = self.by_address();
            let new = || (Arc::new(Semaphore::new(self.each)), 0);
            let (own, concerned) = by_address.entry(holder).or_insert_with(new);
            *concerned += 1;
            Arc::clone(own)
        };
        let concerned = Concerned { queue: Arc::clone(self), holder };
        let never_closed = "nobody closes these semaphores";
        let own = own.acquire_owned().await.expect(never_closed);
        let of_all = Arc::clone(&self.all).acquire_owned().await.expect(never_closed);
        Queued { _places: [own, of_all], _concerned: concerned }
    }

    fn by_address(&self) -> MutexGuard<'_, HashMap<IpAddr, (Arc<Semaphore>, usize)>> {
        self.by_address.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Somebody of an address who holds a place or waits for one.
struct Concerned {
    queue: Arc<Queue>,
    holder: IpAddr,
}

impl Drop for Concerned {
    fn drop(&mut self) {
        let mut by_address = self.queue.by_address();
        if let Some((_, concerned)) = by_address.get_mut(&self.holder) {
            *concerned = concerned.saturating_sub(1);
            if *concerned == 0 {
                by_address.remove(&self.holder);
            }
        }
    }
}

/// A place of a [`Queue`], until it is dropped.
pub(crate) struct Queued {
    _places: [OwnedSemaphorePermit; 2],
    _concerned: Concerned,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_address_has_its_share_and_all_of_them_no_more_than_there_is() {
        let shares = Shares::new(5, 2);
        let take = |address: &str| shares.take(address.parse().unwrap());
        let mut kept = vec![take("192.0.2.1").unwrap(), take("::ffff:192.0.2.1").unwrap()];
        assert!(take("192.0.2.1").is_none(), "the same, however it is written");
        kept.extend([take("2001:db8::1").unwrap(), take("2001:db8::2").unwrap()]);
        assert!(take("2001:db8::3").is_none(), "one network is one address");
        kept.push(take("2001:db8:0:1::1").unwrap());
        assert!(take("192.0.2.2").is_none(), "there are no more");
        drop(kept.remove(0));
        assert!(take("192.0.2.1").is_some());
        kept.clear();
        assert!(shares.held().by_address.is_empty(), "nobody is remembered");
        assert_eq!(shares.held().total, 0);
    }

    #[tokio::test]
    async fn who_comes_from_an_address_that_has_its_share_waits_behind_all_others() {
        let queue = Queue::new(3, 2);
        let wait = |address: &str| {
            let (queue, address) = (queue.clone(), address.parse().unwrap());
            tokio::spawn(async move { queue.wait(address).await })
        };
        let (one, two) = (wait("192.0.2.1").await.unwrap(), wait("192.0.2.1").await.unwrap());
        let third = wait("::ffff:192.0.2.1");
        for number in 2..10 {
            // The last place, again and again.
            wait(&format!("192.0.2.{number}")).await.unwrap();
        }
        assert!(!third.is_finished(), "its address has its share");
        drop(one);
        let third = third.await.unwrap();
        let other = wait("192.0.2.2").await.unwrap();
        let given_up = wait("192.0.2.3");
        tokio::task::yield_now().await;
        assert!(!given_up.is_finished(), "there are no more");
        given_up.abort();
        given_up.await.err().unwrap();
        drop((two, third, other));
        assert!(queue.by_address().is_empty(), "nobody is remembered");
        assert_eq!(queue.all.available_permits(), 3);
    }
}
