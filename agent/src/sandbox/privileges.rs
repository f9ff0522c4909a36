//! Giving up every capability for good, and reading back that they are gone.

use rustix::thread::{CapabilitiesSecureBits, CapabilitySet, CapabilitySets};

use super::spec::{Context as _, Identity, SetupError, Step};

/// Makes sure that no later `exec` can gain anything: bounding and ambient sets empty, the special
/// treatment of user 0 switched off and locked, `no_new_privs` set.
///
/// Needs capabilities in the sandbox's user namespace, so it comes before [`drop_all`].
pub(super) fn lock() -> Result<(), SetupError> {
    let step = Step::Capabilities;
    for number in 0..64 {
        let capability = CapabilitySet::from_bits_retain(1 << number);
        match rustix::thread::remove_capability_from_bounding_set(capability) {
            Ok(()) => {}
            // Past the last capability that this kernel knows.
            Err(rustix::io::Errno::INVAL) => break,
            Err(error) => return Err(error).step(step, "empty the bounding set"),
        }
    }
    rustix::thread::clear_ambient_capability_set().step(step, "empty the ambient set")?;
    rustix::thread::set_capabilities_secure_bits(
        CapabilitiesSecureBits::NO_ROOT
            | CapabilitiesSecureBits::NO_ROOT_LOCKED
            | CapabilitiesSecureBits::NO_SETUID_FIXUP
            | CapabilitiesSecureBits::NO_SETUID_FIXUP_LOCKED
            | CapabilitiesSecureBits::KEEP_CAPS_LOCKED
            | CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE
            | CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE_LOCKED,
    )
    .step(step, "lock the secure bits")?;
    rustix::thread::set_no_new_privs(true).step(step, "set no_new_privs")
}

/// Empties the permitted, effective and inheritable sets of this process.
pub(super) fn drop_all() -> Result<(), SetupError> {
    let none = CapabilitySets {
        effective: CapabilitySet::empty(),
        permitted: CapabilitySet::empty(),
        inheritable: CapabilitySet::empty(),
    };
    rustix::thread::set_capabilities(None, none).step(Step::Capabilities, "drop all capabilities")
}

/// Reads back from the kernel that this process has no privilege and cannot get one.
pub(super) fn verify(identity: Identity, filters: usize) -> Result<(), SetupError> {
    let status = std::fs::read_to_string("/proc/self/status")
        .step(Step::Verification, "read /proc/self/status")?;
    verify_status(&status, identity, filters)
}

fn verify_status(status: &str, identity: Identity, filters: usize) -> Result<(), SetupError> {
    let field = |name: &str| {
        status
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
            .map(str::trim)
            .ok_or_else(|| {
                SetupError::new(Step::Verification, format!("the kernel does not tell {name}"))
            })
    };
    let expect = |name: &str, holds: bool, value: &str| {
        if holds {
            Ok(())
        } else {
            Err(SetupError::new(Step::Verification, format!("{name} is {value} before exec")))
        }
    };
    for name in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        let value = field(name)?;
        expect(name, u64::from_str_radix(value, 16) == Ok(0), value)?;
    }
    let value = field("NoNewPrivs")?;
    expect("NoNewPrivs", value == "1", value)?;
    let value = field("Seccomp")?;
    expect("Seccomp", value == "2", value)?;
    // Linux before 5.9 does not count its filters.
    if let Ok(value) = field("Seccomp_filters") {
        let enough = value.parse::<usize>().is_ok_and(|count| count >= filters);
        expect("Seccomp_filters", enough, value)?;
    }
    for (name, wanted) in [("Uid", identity.uid), ("Gid", identity.gid)] {
        let value = field(name)?;
        let all = value.split_whitespace().all(|id| id.parse() == Ok(wanted));
        expect(name, all, value)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "Name:\tx\nUid:\t7\t7\t7\t7\nGid:\t8\t8\t8\t8\nCapInh:\t0000000000000000\n\
        CapPrm:\t0000000000000000\nCapEff:\t0000000000000000\nCapBnd:\t0000000000000000\n\
        CapAmb:\t0000000000000000\nNoNewPrivs:\t1\nSeccomp:\t2\nSeccomp_filters:\t2\n";
    const WHO: Identity = Identity { uid: 7, gid: 8, assumed: true };

    #[test]
    fn a_process_without_privileges_passes() {
        verify_status(GOOD, WHO, 2).unwrap();
    }

    #[test]
    fn any_privilege_left_is_noticed() {
        for (from, to) in [
            ("CapEff:\t0", "CapEff:\t1"),
            ("CapBnd:\t0000000000000000", "CapBnd:\t000001ffffffffff"),
            ("CapAmb:\t0000000000000000", "CapAmb:\t0000000000000001"),
            ("NoNewPrivs:\t1", "NoNewPrivs:\t0"),
            ("Seccomp:\t2", "Seccomp:\t0"),
            ("Seccomp_filters:\t2", "Seccomp_filters:\t1"),
            ("Uid:\t7\t7", "Uid:\t7\t0"),
            ("Gid:\t8", "Gid:\t0"),
            ("CapPrm:", "CapXxx:"),
            ("NoNewPrivs:\t1\n", ""),
        ] {
            assert!(verify_status(&GOOD.replacen(from, to, 1), WHO, 2).is_err(), "{to:?}");
        }
    }
}
