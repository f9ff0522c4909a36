//! How much a command may do here, and who is asked: the least that the request, the actor's role,
//! the hub's policy and the owner's ceiling allow. Pure.
//!
//! The hub has computed this already, for its messages; here it is computed again, for force. A hub
//! that lies stays inside the ceiling. What is not understood is strict: an unknown mode, a role
//! that is not named, a permissive policy without an end.

use std::fmt;
use std::time::{Duration, Instant};

use cortex_shared::policy::{Bound, LONGEST_POLICY, Mode, Network, Role};

/// One instant on both clocks that count.
#[derive(Clone, Copy, Debug)]
pub struct Clocks {
    /// The time by the hub's clock, in milliseconds since the epoch.
    pub hub_ms: i64,
    /// A clock that nobody can set back. It stands still while the machine sleeps.
    pub steady: Instant,
}

/// The hub's policy for this node, as it was told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HubPolicy {
    bound: Bound,
    until_ms: i64,
    /// The same end on the steady clock; whichever end comes first counts.
    ends: Option<Instant>,
}

impl HubPolicy {
    /// No hub has said anything.
    pub const UNTOLD: Self = Self { bound: Bound::LEAST, until_ms: 0, ends: None };

    /// What the hub told `now`. A permissive policy always has an end; one without is none. The
    /// network may be allowed without an end.
    #[must_use]
    pub fn told(bound: Bound, until_ms: i64, now: Clocks) -> Self {
        if bound == Bound::LEAST {
            // It has no end, whatever the hub names: otherwise each end would be another policy.
            return Self::UNTOLD;
        }
        if until_ms == 0 {
            let bound = Bound { mode: Mode::Strict, ..bound };
            return Self { bound, until_ms, ends: None };
        }
        let left = u64::try_from(until_ms.saturating_sub(now.hub_ms)).unwrap_or(0);
        if left == 0 {
            return Self { bound: Bound::LEAST, until_ms: until_ms.max(0), ends: None };
        }
        let left = Duration::from_millis(left).min(LONGEST_POLICY);
        Self { bound, until_ms, ends: Some(now.steady + left) }
    }

    /// What it allows `now`.
    #[must_use]
    pub fn in_force(&self, now: Clocks) -> Bound {
        if self.until_ms == 0 {
            return self.bound;
        }
        let over = now.hub_ms >= self.until_ms || self.ends.is_none_or(|end| now.steady >= end);
        if over { Bound::LEAST } else { self.bound }
    }

    /// When it ends or ended by itself, by the hub's clock; 0 for never.
    #[must_use]
    pub fn until_ms(&self) -> i64 {
        self.until_ms
    }

    /// Whether another policy allows the same. What is over differs in nothing from strict.
    #[must_use]
    pub fn same_as(&self, other: &Self) -> bool {
        self.bound == other.bound && (self.bound == Bound::LEAST || self.until_ms == other.until_ms)
    }
}

/// Everybody with a say in what one command may do, besides the request.
#[derive(Clone, Copy, Debug)]
pub(super) struct Authority {
    /// The actor's role, as far as it is known.
    pub(super) role: Option<Role>,
    /// The hub's policy.
    pub(super) policy: HubPolicy,
    /// The node owner's own bound.
    pub(super) ceiling: Bound,
    /// When it is decided.
    pub(super) now: Clocks,
}

/// What somebody asked for beyond strict without network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wanted {
    /// Permissive mode.
    Permissive,
    /// The host's network, in strict mode.
    Network,
}

impl Wanted {
    /// Whether a party that says this allows it.
    fn is_in(self, bound: Bound) -> bool {
        match self {
            Self::Permissive => bound.mode == Mode::Permissive,
            Self::Network => bound.network == Network::Full,
        }
    }

    /// What a command that does not get it may leave out.
    pub(super) fn option(self) -> &'static str {
        match self {
            Self::Permissive => "--mode permissive",
            Self::Network => "--net full",
        }
    }
}

impl fmt::Display for Wanted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Permissive => "permissive mode",
            Self::Network => "the host's network",
        })
    }
}

/// Who does not allow what is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Party {
    /// The actor's role is not enough, or not known.
    Role(Option<Role>),
    /// The hub's policy.
    Policy,
    /// The hub's policy, which allowed it until then.
    PolicyEnded(i64),
    /// The owner's bound.
    Ceiling,
}

/// A part of the permission that is not there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Missing {
    /// Of the permission for what.
    pub(super) wanted: Wanted,
    /// Whose.
    pub(super) party: Party,
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (is, was) = match self.wanted {
            Wanted::Permissive => ("is strict", "was permissive"),
            Wanted::Network => ("allows no network", "allowed it"),
        };
        match self.party {
            Party::Role(Some(role)) => {
                let never = match self.wanted {
                    Wanted::Permissive => "always strict",
                    Wanted::Network => "never on the network",
                };
                write!(f, "a role that allows it (commands of {role} are {never})")
            }
            Party::Role(None) => f.write_str("a role that allows it (the hub names none)"),
            Party::Policy => write!(f, "the hub's policy for this node (it {is})"),
            Party::PolicyEnded(until_ms) => {
                let end = jiff::Timestamp::from_millisecond(until_ms)
                    .map_or_else(|_| "some time ago".to_owned(), |time| format!("{time:.0}"));
                write!(f, "the hub's policy for this node (it {was} until {end})")
            }
            Party::Ceiling => write!(f, "the ceiling of this node's owner (it {is})"),
        }
    }
}

impl Missing {
    /// The command that helps.
    pub(super) fn hint(&self) -> &'static str {
        match (self.party, self.wanted) {
            (Party::Role(_), _) => "an operator or admin has to run it",
            (Party::Policy | Party::PolicyEnded(_), Wanted::Permissive) => {
                "an admin runs `cortex-agent policy set NODE permissive --reason TEXT`"
            }
            (Party::Policy | Party::PolicyEnded(_), Wanted::Network) => {
                "an admin runs `cortex-agent policy set NODE strict --net full --reason TEXT`"
            }
            (Party::Ceiling, Wanted::Permissive) => {
                "the node's owner runs `cortex-agent ceiling set permissive` on the node"
            }
            (Party::Ceiling, Wanted::Network) => {
                "the node's owner runs `cortex-agent ceiling set strict --net full` on the node"
            }
        }
    }
}

/// What a request needs a permission for; `None` for what everybody may. A permissive command has the
/// host's network whatever it asks for.
pub(super) fn wanted(mode: Mode, network: Network) -> Option<Wanted> {
    match (mode, network) {
        (Mode::Permissive, _) => Some(Wanted::Permissive),
        (Mode::Strict, Network::Full) => Some(Wanted::Network),
        (Mode::Strict, Network::None) => None,
    }
}

/// Whether it is allowed, or which parts of the permission are missing. Asking for more and getting
/// less would be a surprise either way, so it is refused rather than lowered.
pub(super) fn permit(wanted: Wanted, authority: Authority) -> Result<(), Vec<Missing>> {
    let mut missing = Vec::new();
    if !matches!(authority.role, Some(Role::Operator | Role::Admin)) {
        missing.push(Party::Role(authority.role));
    }
    if !wanted.is_in(authority.policy.in_force(authority.now)) {
        missing.push(match authority.policy.until_ms() {
            until_ms if until_ms != 0 && until_ms <= authority.now.hub_ms => {
                Party::PolicyEnded(until_ms)
            }
            _ => Party::Policy,
        });
    }
    if !wanted.is_in(authority.ceiling) {
        missing.push(Party::Ceiling);
    }
    if missing.is_empty() {
        return Ok(());
    }
    Err(missing.into_iter().map(|party| Missing { wanted, party }).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW_MS: i64 = 1_900_000_000_000;

    fn now() -> Clocks {
        Clocks { hub_ms: NOW_MS, steady: Instant::now() }
    }

    fn bound(mode: Mode, network: Network) -> Bound {
        Bound { mode, network }
    }

    fn permissive() -> Bound {
        bound(Mode::Permissive, Network::None)
    }

    #[test]
    fn each_permission_needs_every_part_and_each_missing_one_is_named() {
        let now = now();
        let bounds: Vec<Bound> = [Mode::Strict, Mode::Permissive]
            .into_iter()
            .flat_map(|mode| [Network::None, Network::Full].map(|network| bound(mode, network)))
            .collect();
        let roles = [Role::Viewer, Role::AgentToken, Role::Operator, Role::Admin];
        for role in roles.map(Some).into_iter().chain([None]) {
            for policy in &bounds {
                for ceiling in &bounds {
                    for wanted in [Wanted::Permissive, Wanted::Network] {
                        let told = HubPolicy::told(*policy, NOW_MS + 60_000, now);
                        let authority = Authority { role, policy: told, ceiling: *ceiling, now };
                        let allows = |bound: &Bound| match wanted {
                            Wanted::Permissive => bound.mode == Mode::Permissive,
                            Wanted::Network => bound.network == Network::Full,
                        };
                        let mut expected = Vec::new();
                        if !matches!(role, Some(Role::Operator | Role::Admin)) {
                            expected.push(Party::Role(role));
                        }
                        if !allows(policy) {
                            expected.push(Party::Policy);
                        }
                        if !allows(ceiling) {
                            expected.push(Party::Ceiling);
                        }
                        let found = permit(wanted, authority).err().unwrap_or_default();
                        assert!(found.iter().all(|missing| missing.wanted == wanted));
                        let found: Vec<Party> = found.iter().map(|missing| missing.party).collect();
                        assert_eq!(found, expected, "{wanted:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn the_network_may_be_allowed_without_an_end_and_permissive_may_not() {
        let now = now();
        let told = HubPolicy::told(bound(Mode::Permissive, Network::Full), 0, now);
        let later = Clocks { steady: now.steady + 2 * LONGEST_POLICY, ..now };
        assert_eq!(told.in_force(later), bound(Mode::Strict, Network::Full));
        let told = HubPolicy::told(bound(Mode::Strict, Network::Full), NOW_MS + 60_000, now);
        assert_eq!(told.in_force(now).network, Network::Full);
        assert_eq!(told.in_force(later), Bound::LEAST);
    }

    #[test]
    fn permissive_policy_ends_by_the_wall_clock_and_by_the_steady_one() {
        let begin = now();
        let policy = HubPolicy::told(permissive(), NOW_MS + 60_000, begin);
        let at = |hub_ms, seconds| Clocks {
            hub_ms: NOW_MS + hub_ms,
            steady: begin.steady + Duration::from_secs(seconds),
        };
        assert_eq!(policy.in_force(at(59_999, 0)), permissive());
        assert_eq!(policy.in_force(at(60_000, 0)), Bound::LEAST);
        // Somebody set the clock back.
        assert_eq!(policy.in_force(at(-3_600_000, 60)), Bound::LEAST);
        let authority = Authority {
            role: Some(Role::Admin),
            policy,
            ceiling: permissive(),
            now: at(60_000, 0),
        };
        let missing = permit(Wanted::Permissive, authority).unwrap_err();
        assert_eq!(missing[0].party, Party::PolicyEnded(NOW_MS + 60_000));
        assert!(missing[0].to_string().contains("until 2030-03-17T"), "{}", missing[0]);
    }

    #[test]
    fn permissive_policy_without_an_end_or_a_sane_one_is_not_believed() {
        let now = now();
        for (until_ms, expected) in [
            (0, Mode::Strict),
            (NOW_MS, Mode::Strict),
            (-1, Mode::Strict),
            (NOW_MS + 1, Mode::Permissive),
        ] {
            let policy = HubPolicy::told(permissive(), until_ms, now);
            assert_eq!(policy.in_force(now).mode, expected, "{until_ms}");
        }
        let endless = HubPolicy::told(permissive(), i64::MAX, now);
        let later = Clocks { steady: now.steady + LONGEST_POLICY, ..now };
        assert_eq!(endless.in_force(later), Bound::LEAST);
        let strict = |until_ms| HubPolicy::told(Bound::LEAST, until_ms, now);
        assert_eq!(strict(NOW_MS + 1), HubPolicy::UNTOLD);
        let over = HubPolicy::told(permissive(), NOW_MS - 1, now);
        assert!(over.same_as(&strict(0)) && !over.same_as(&endless));
        let ever = Clocks { hub_ms: i64::MIN, ..now };
        assert_eq!(HubPolicy::UNTOLD.in_force(ever), Bound::LEAST);
    }
}
