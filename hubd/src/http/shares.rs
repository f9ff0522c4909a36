//! Places that are shared out: so many in all, and so many of them to one address.
//!
//! What costs memory or a connection is bounded for everybody together; what one address may have is bounded
//! as well, so that the others find places left.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// See the module. It knows the addresses that hold a place, and no others.
pub(super) struct Shares {
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
    pub(super) fn new(total: usize, each: usize) -> Arc<Self> {
        Arc::new(Self { total, each: each.max(1), held: Mutex::default() })
    }

    /// A place for this address, if there is one.
    pub(super) fn take(self: &Arc<Self>, address: IpAddr) -> Option<Place> {
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
pub(super) struct Place {
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
}
