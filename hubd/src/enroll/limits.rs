//! How often callers without a certificate may try: by address, and by invite.
//!
//! Checked before any signature or database work. All of it is in memory and bounded; a restart of the
//! hub forgets it. Times are handed in, so that nothing here waits or reads a clock.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use cortex_shared::secret::InviteId;
use tokio::time::Instant;

use crate::rate::{Bucket, Rate};

/// Addresses remembered. Beyond them, all that are not known share one allowance.
const MAX_ADDRESSES: usize = 8192;
/// Invites remembered for wrong secrets.
const MAX_INVITES: usize = 4096;
/// So many wrong secrets for one invite within [`FREEZE`] make it unusable for as long.
const MAX_WRONG_SECRETS: u32 = 10;
/// See [`MAX_WRONG_SECRETS`].
const FREEZE: Duration = Duration::from_secs(600);
/// Refusals written to the audit log: as many as people make, and too few to fill a disk.
const RECORDED_REFUSALS: Rate = Rate { burst: 30, per_second: 0.1 };
/// A full table is searched for entries that can go this often at most.
const SWEEP_INTERVAL: Duration = Duration::from_secs(1);

/// How often one address may try to join or log in: a rack that boots behind one address gets in within
/// seconds; a guesser gets nowhere.
pub const DEFAULT_JOIN_RATE: Rate = Rate { burst: 20, per_second: 5.0 };

/// So many a second, and four times as many at once; no limit for 0.
#[must_use]
pub fn join_rate(per_second: u32) -> Option<Rate> {
    let rate = Rate { burst: per_second.saturating_mul(4), per_second: f64::from(per_second) };
    (per_second > 0).then_some(rate)
}

/// Wrong secrets given for one invite.
struct WrongSecrets {
    count: u32,
    since: Instant,
}

impl WrongSecrets {
    fn frozen_until(&self) -> Option<Instant> {
        (self.count >= MAX_WRONG_SECRETS).then(|| self.since + FREEZE)
    }
}

struct Tables {
    addresses: HashMap<IpAddr, Bucket>,
    strangers: Bucket,
    swept: Option<Instant>,
    invites: HashMap<InviteId, WrongSecrets>,
    refusals: Bucket,
}

/// See the module.
pub struct JoinLimits {
    rate: Option<Rate>,
    tables: Mutex<Tables>,
}

impl JoinLimits {
    /// Limits with nobody known. Without a rate, addresses are not limited; invites always are.
    #[must_use]
    pub fn new(rate: Option<Rate>, now: Instant) -> Self {
        let tables = Tables {
            addresses: HashMap::new(),
            strangers: Bucket::full(rate.unwrap_or(DEFAULT_JOIN_RATE), now),
            swept: None,
            invites: HashMap::new(),
            refusals: Bucket::full(RECORDED_REFUSALS, now),
        };
        Self { rate, tables: Mutex::new(tables) }
    }

    fn lock(&self) -> MutexGuard<'_, Tables> {
        self.tables.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts a request from an address.
    ///
    /// # Errors
    /// How long to wait.
    pub fn check_address(&self, address: IpAddr, now: Instant) -> Result<(), Duration> {
        let Some(rate) = self.rate else { return Ok(()) };
        let address = one_of_many(address);
        let mut tables = self.lock();
        if let Some(bucket) = tables.addresses.get_mut(&address) {
            return bucket.take(rate, now);
        }
        if tables.addresses.len() >= MAX_ADDRESSES && !tables.sweep(rate, now) {
            return tables.strangers.take(rate, now);
        }
        let mut bucket = Bucket::full(rate, now);
        let taken = bucket.take(rate, now);
        tables.addresses.insert(address, bucket);
        taken
    }

    /// Whether an invite may be tried now. Says nothing of whether there is such an invite.
    ///
    /// # Errors
    /// How long it is frozen for.
    pub fn check_invite(&self, id: &InviteId, now: Instant) -> Result<(), Duration> {
        let until = self.lock().invites.get(id).and_then(WrongSecrets::frozen_until);
        match until {
            Some(until) if until > now => Err(until - now),
            _ => Ok(()),
        }
    }

    /// Counts a wrong secret; returns whether the invite is frozen by it.
    pub fn wrong_secret(&self, id: &InviteId, now: Instant) -> bool {
        let mut tables = self.lock();
        let over = |wrong: &WrongSecrets| now.saturating_duration_since(wrong.since) >= FREEZE;
        if !tables.invites.contains_key(id) && tables.invites.len() >= MAX_INVITES {
            tables.invites.retain(|_, wrong| !over(wrong));
            if tables.invites.len() >= MAX_INVITES {
                // Somebody tries many ids: the one that has been counted for longest is let go.
                let oldest =
                    tables.invites.iter().min_by_key(|(_, wrong)| wrong.since).map(|(id, _)| id);
                if let Some(oldest) = oldest.cloned() {
                    tables.invites.remove(&oldest);
                }
            }
        }
        let fresh = || WrongSecrets { count: 0, since: now };
        let wrong = tables.invites.entry(id.clone()).or_insert_with(fresh);
        if over(wrong) {
            *wrong = fresh();
        }
        wrong.count += 1;
        let frozen = wrong.count == MAX_WRONG_SECRETS;
        if frozen {
            // From now on, not from the first of them.
            wrong.since = now;
        }
        frozen
    }

    /// Whether a refusal may be written to the audit log.
    pub fn may_record_refusal(&self, now: Instant) -> bool {
        self.lock().refusals.take(RECORDED_REFUSALS, now).is_ok()
    }
}

impl Tables {
    /// Forgets the addresses that have their full allowance again; returns whether there is room now.
    fn sweep(&mut self, rate: Rate, now: Instant) -> bool {
        if self.swept.is_some_and(|at| now.saturating_duration_since(at) < SWEEP_INTERVAL) {
            return false;
        }
        self.swept = Some(now);
        self.addresses.retain(|_, bucket| !bucket.is_full(rate, now));
        self.addresses.len() < MAX_ADDRESSES
    }
}

/// What counts as one address: with IPv6 everybody has 2^64 of them.
fn one_of_many(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => IpAddr::V6(Ipv6Addr::from_bits(v6.to_bits() & !u128::from(u64::MAX))),
        v4 @ IpAddr::V4(_) => v4,
    }
}

#[cfg(test)]
mod tests {
    use cortex_shared::secret::InviteToken;

    use super::*;

    const RATE: Rate = DEFAULT_JOIN_RATE;

    fn address(number: u32) -> IpAddr {
        IpAddr::V4(number.into())
    }

    #[test]
    fn an_address_gets_its_burst_and_then_its_rate() {
        let start = Instant::now();
        let limits = JoinLimits::new(Some(RATE), start);
        for _ in 0..RATE.burst {
            assert_eq!(limits.check_address(address(1), start), Ok(()));
        }
        let wait = limits.check_address(address(1), start).unwrap_err();
        assert_eq!(wait, Duration::from_millis(200));
        assert_eq!(limits.check_address(address(2), start), Ok(()), "others are not held up");
        assert_eq!(limits.check_address(address(1), start + wait), Ok(()));
        assert!(limits.check_address(address(1), start + wait).is_err());
    }

    #[test]
    fn an_ipv6_network_is_one_address_and_a_mapped_one_is_ipv4() {
        let start = Instant::now();
        let limits = JoinLimits::new(Some(Rate { burst: 1, per_second: 1.0 }), start);
        assert!(limits.check_address("2001:db8::1".parse().unwrap(), start).is_ok());
        assert!(limits.check_address("2001:db8::ffff:1".parse().unwrap(), start).is_err());
        assert!(limits.check_address("2001:db8:0:1::1".parse().unwrap(), start).is_ok());
        assert!(limits.check_address("192.0.2.1".parse().unwrap(), start).is_ok());
        assert!(limits.check_address("::ffff:192.0.2.1".parse().unwrap(), start).is_err());
    }

    #[test]
    fn memory_is_bounded_and_idle_addresses_make_room() {
        let start = Instant::now();
        let limits = JoinLimits::new(Some(RATE), start);
        for number in 0..50_000 {
            // Beyond the table, strangers share one allowance.
            limits.check_address(address(number), start).ok();
        }
        assert_eq!(limits.lock().addresses.len(), MAX_ADDRESSES);
        assert!(limits.check_address(address(60_000), start).is_err());
        let later = start + Duration::from_secs(60);
        assert!(limits.check_address(address(60_000), later).is_ok());
        assert_eq!(limits.lock().addresses.len(), 1);
    }

    #[test]
    fn ten_wrong_secrets_freeze_an_invite_for_a_while() {
        let start = Instant::now();
        let limits = JoinLimits::new(Some(RATE), start);
        let (guessed, other) = (InviteToken::generate(), InviteToken::generate());
        for count in 1..=MAX_WRONG_SECRETS {
            assert!(limits.check_invite(guessed.id(), start).is_ok());
            assert_eq!(limits.wrong_secret(guessed.id(), start), count == MAX_WRONG_SECRETS);
        }
        assert_eq!(limits.check_invite(guessed.id(), start), Err(FREEZE));
        assert!(limits.check_invite(other.id(), start).is_ok());
        let later = start + FREEZE;
        assert!(limits.check_invite(guessed.id(), later).is_ok());
        assert!(!limits.wrong_secret(guessed.id(), later), "counting begins anew");
        assert!(limits.check_invite(guessed.id(), later).is_ok());
    }

    #[test]
    fn guesses_over_a_long_time_and_over_many_ids_are_forgotten() {
        let start = Instant::now();
        let limits = JoinLimits::new(Some(RATE), start);
        let slow = InviteToken::generate();
        for count in 0..100 {
            assert!(!limits.wrong_secret(slow.id(), start + FREEZE / 5 * count));
        }
        for _ in 0..MAX_INVITES * 2 {
            limits.wrong_secret(InviteToken::generate().id(), start);
        }
        assert_eq!(limits.lock().invites.len(), MAX_INVITES);
    }

    #[test]
    fn a_rate_of_nothing_is_no_limit() {
        let start = Instant::now();
        assert_eq!(join_rate(5), Some(RATE));
        let limits = JoinLimits::new(join_rate(0), start);
        assert!((0..10_000).all(|_| limits.check_address(address(1), start).is_ok()));
    }

    #[test]
    fn a_guesser_cannot_fill_the_audit_log() {
        let start = Instant::now();
        let limits = JoinLimits::new(Some(RATE), start);
        let recorded = (0..1000).filter(|_| limits.may_record_refusal(start)).count();
        assert_eq!(recorded, 30);
        assert!(limits.may_record_refusal(start + Duration::from_secs(10)));
    }
}
