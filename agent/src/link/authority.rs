//! How much a command may do here, and who is asked: the least that the request, the actor's role,
//! the hub's policy and the owner's ceiling allow. Pure.
//!
//! The hub has computed this already, for its messages; here it is computed again, for force. A hub
//! that lies stays inside the ceiling. What is not understood is strict: an unknown mode, a role
//! that is not named, a permissive policy without an end.

use std::fmt;
use std::time::{Duration, Instant};

use cortex_shared::policy::{Mode, Role};

/// Longest permissive policy, whatever the hub says.
const LONGEST_POLICY: Duration = Duration::from_secs(30 * 24 * 60 * 60);

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
    mode: Mode,
    until_ms: i64,
    /// The same end on the steady clock; whichever end comes first counts.
    ends: Option<Instant>,
}

impl HubPolicy {
    /// No hub has said anything.
    pub const UNTOLD: Self = Self { mode: Mode::Strict, until_ms: 0, ends: None };

    /// What the hub told `now`. A permissive policy always has an end; one
    /// without is none.
    #[must_use]
    pub fn told(mode: Mode, until_ms: i64, now: Clocks) -> Self {
        let left = u64::try_from(until_ms.saturating_sub(now.hub_ms)).unwrap_or(0);
        if mode == Mode::Strict {
            // It has no end, whatever the hub names: otherwise each end would be another policy.
            return Self::UNTOLD;
        }
        if left == 0 {
            return Self { mode: Mode::Strict, until_ms: until_ms.max(0), ends: None };
        }
        let left = Duration::from_millis(left).min(LONGEST_POLICY);
        Self { mode, until_ms, ends: Some(now.steady + left) }
    }

    /// What it allows `now`.
    #[must_use]
    pub fn in_force(&self, now: Clocks) -> Mode {
        let over = now.hub_ms >= self.until_ms || self.ends.is_none_or(|end| now.steady >= end);
        if over { Mode::Strict } else { self.mode }
    }

    /// When it ends or ended by itself, by the hub's clock; 0 if it was always strict.
    #[must_use]
    pub fn until_ms(&self) -> i64 {
        self.until_ms
    }

    /// Whether another policy allows the same. What is over differs in nothing from strict.
    #[must_use]
    pub fn same_as(&self, other: &Self) -> bool {
        self.mode == other.mode && (self.mode == Mode::Strict || self.until_ms == other.until_ms)
    }
}

/// Everybody with a say in the mode of one command, besides the request.
#[derive(Clone, Copy, Debug)]
pub(super) struct Authority {
    /// The actor's role, as far as it is known.
    pub(super) role: Option<Role>,
    /// The hub's policy.
    pub(super) policy: HubPolicy,
    /// The node owner's own bound.
    pub(super) ceiling: Mode,
    /// When it is decided.
    pub(super) now: Clocks,
}

/// A part of the permission that is not there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Missing {
    /// The actor's role is not enough, or not known.
    Role(Option<Role>),
    /// The hub's policy is strict.
    Policy,
    /// The hub's policy was permissive, until then.
    PolicyEnded(i64),
    /// The owner's bound is strict.
    Ceiling,
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Role(Some(role)) => {
                write!(f, "a role that allows it (commands of {role} are always strict)")
            }
            Self::Role(None) => f.write_str("a role that allows it (the hub names none)"),
            Self::Policy => f.write_str("the hub's policy for this node (it is strict)"),
            Self::PolicyEnded(until_ms) => {
                let end = jiff::Timestamp::from_millisecond(*until_ms)
                    .map_or_else(|_| "some time ago".to_owned(), |time| format!("{time:.0}"));
                write!(f, "the hub's policy for this node (it was permissive until {end})")
            }
            Self::Ceiling => f.write_str("the ceiling of this node's owner (it is strict)"),
        }
    }
}

impl Missing {
    /// The command that helps.
    pub(super) fn hint(&self) -> &'static str {
        match self {
            Self::Role(_) => "an operator or admin has to run it",
            Self::Policy | Self::PolicyEnded(_) => {
                "an admin runs `cortex-agent policy set NODE permissive --reason TEXT`"
            }
            Self::Ceiling => {
                "the node's owner runs `cortex-agent ceiling set permissive` on the node"
            }
        }
    }
}

/// The mode in force, or which parts of the permission are missing. Asking for permissive and
/// getting strict would be a surprise either way, so it is refused rather than lowered.
pub(super) fn mode_in_force(requested: Mode, authority: Authority) -> Result<Mode, Vec<Missing>> {
    if requested == Mode::Strict {
        return Ok(Mode::Strict);
    }
    let mut missing = Vec::new();
    if !matches!(authority.role, Some(Role::Operator | Role::Admin)) {
        missing.push(Missing::Role(authority.role));
    }
    if authority.policy.in_force(authority.now) == Mode::Strict {
        missing.push(match authority.policy.until_ms() {
            0 => Missing::Policy,
            until_ms => Missing::PolicyEnded(until_ms),
        });
    }
    if authority.ceiling == Mode::Strict {
        missing.push(Missing::Ceiling);
    }
    if missing.is_empty() { Ok(requested) } else { Err(missing) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW_MS: i64 = 1_900_000_000_000;

    fn now() -> Clocks {
        Clocks { hub_ms: NOW_MS, steady: Instant::now() }
    }

    #[test]
    fn permissive_needs_every_part_and_each_missing_one_is_named() {
        use Mode::{Permissive, Strict};
        let now = now();
        let permissive = HubPolicy::told(Permissive, NOW_MS + 60_000, now);
        let roles = [Role::Viewer, Role::AgentToken, Role::Operator, Role::Admin];
        for role in roles.map(Some).into_iter().chain([None]) {
            for policy in [HubPolicy::UNTOLD, permissive] {
                for ceiling in [Strict, Permissive] {
                    let authority = Authority { role, policy, ceiling, now };
                    assert_eq!(mode_in_force(Strict, authority), Ok(Strict));
                    let mut expected = Vec::new();
                    if !matches!(role, Some(Role::Operator | Role::Admin)) {
                        expected.push(Missing::Role(role));
                    }
                    if policy == HubPolicy::UNTOLD {
                        expected.push(Missing::Policy);
                    }
                    if ceiling == Strict {
                        expected.push(Missing::Ceiling);
                    }
                    let expected = if expected.is_empty() { Ok(Permissive) } else { Err(expected) };
                    assert_eq!(mode_in_force(Permissive, authority), expected);
                }
            }
        }
    }

    #[test]
    fn permissive_policy_ends_by_the_wall_clock_and_by_the_steady_one() {
        let begin = now();
        let policy = HubPolicy::told(Mode::Permissive, NOW_MS + 60_000, begin);
        let at = |hub_ms, seconds| Clocks {
            hub_ms: NOW_MS + hub_ms,
            steady: begin.steady + Duration::from_secs(seconds),
        };
        assert_eq!(policy.in_force(at(59_999, 0)), Mode::Permissive);
        assert_eq!(policy.in_force(at(60_000, 0)), Mode::Strict);
        // Somebody set the clock back.
        assert_eq!(policy.in_force(at(-3_600_000, 60)), Mode::Strict);
        let authority = Authority {
            role: Some(Role::Admin),
            policy,
            ceiling: Mode::Permissive,
            now: at(60_000, 0),
        };
        let missing = mode_in_force(Mode::Permissive, authority).unwrap_err();
        assert_eq!(missing, [Missing::PolicyEnded(NOW_MS + 60_000)]);
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
            let policy = HubPolicy::told(Mode::Permissive, until_ms, now);
            assert_eq!(policy.in_force(now), expected, "{until_ms}");
        }
        let endless = HubPolicy::told(Mode::Permissive, i64::MAX, now);
        let later = Clocks { steady: now.steady + LONGEST_POLICY, ..now };
        assert_eq!(endless.in_force(later), Mode::Strict);
        let strict = |until_ms| HubPolicy::told(Mode::Strict, until_ms, now);
        assert_eq!(strict(NOW_MS + 1), HubPolicy::UNTOLD);
        let over = HubPolicy::told(Mode::Permissive, NOW_MS - 1, now);
        assert!(over.same_as(&strict(0)) && !over.same_as(&endless));
        let ever = Clocks { hub_ms: i64::MIN, ..now };
        assert_eq!(HubPolicy::UNTOLD.in_force(ever), Mode::Strict);
    }
}
