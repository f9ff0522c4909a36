//! Landlock: what the command may do with files, whatever else fails.
//!
//! While mount, process and network namespaces are intact this repeats what they say. It is what
//! still holds if one of them is shared or broken, and it keeps signals and abstract sockets in.
//! Everything that the running kernel knows to restrict is handled, as a hard requirement: the
//! library's default would silently do less.

use landlock::{
    ABI, Access as _, AccessFs, AccessNet, CompatLevel, Compatible as _, NetPort, PathBeneath,
    PathFd, Ruleset, RulesetAttr as _, RulesetCreatedAttr as _, RulesetStatus, Scope,
};

use super::spec::{
    Context as _, HOME_INSIDE, Network, SetupError, Step, StrictSpec, WORKSPACE_INSIDE,
};
use super::syscalls;

/// The first interface that keeps signals and abstract sockets in.
pub(super) const ABI_WITH_SCOPES: i64 = 6;

/// Restricts this process and everything it becomes or starts.
pub(super) fn restrict(strict: &StrictSpec) -> Result<(), SetupError> {
    let number = syscalls::landlock_abi().step(Step::Landlock, "ask for Landlock")?;
    if number < strict.minimum_landlock_abi {
        return Err(SetupError::new(
            Step::Landlock,
            format!(
                "Landlock ABI {number} is older than the required {}",
                strict.minimum_landlock_abi
            ),
        ));
    }
    if strict.network == Network::Full && number < ABI_WITH_SCOPES {
        return Err(SetupError::new(
            Step::Landlock,
            format!(
                "with the host's network, Landlock ABI {ABI_WITH_SCOPES} is needed to keep the \
                 host's abstract sockets out of reach; this kernel has {number}"
            ),
        ));
    }
    let abi = ABI::from(i32::try_from(number).unwrap_or(i32::MAX));
    let status = build(abi, strict.network)?.restrict_self().map_err(failed)?;
    if status.ruleset == RulesetStatus::FullyEnforced && status.no_new_privs {
        Ok(())
    } else {
        Err(SetupError::new(
            Step::Landlock,
            format!("Landlock is not fully enforced: {:?}", status.ruleset),
        ))
    }
}

fn failed(error: impl std::fmt::Display) -> SetupError {
    SetupError::new(Step::Landlock, format!("set up Landlock: {error}"))
}

fn build(abi: ABI, network: Network) -> Result<landlock::RulesetCreated, SetupError> {
    let all = AccessFs::from_all(abi);
    let mut ruleset = Ruleset::default()
        .set_compatibility(CompatLevel::HardRequirement)
        .handle_access(all)
        .map_err(failed)?;
    if abi >= ABI::V6 {
        ruleset = ruleset.scope(Scope::AbstractUnixSocket | Scope::Signal).map_err(failed)?;
    }
    // Device nodes never; sockets of processes outside (from ABI 9 on) neither.
    let denied = AccessFs::MakeChar | AccessFs::MakeBlock | AccessFs::ResolveUnix;
    let read_write = all & !denied;
    let device = AccessFs::from_file(abi) & !(AccessFs::Execute | AccessFs::ResolveUnix);
    if network == Network::Full {
        // On the host's network a command may call out, not pose as a service: it listens on no
        // port of its choice. Addresses, which calling out would have to be limited by, are
        // nothing that Landlock knows.
        ruleset = ruleset.handle_access(AccessNet::BindTcp).map_err(failed)?;
    }
    let mut created = ruleset.create().map_err(failed)?;
    if network == Network::Full {
        // Any port, as the kernel chooses: what programs bind before they call out.
        created = created.add_rule(NetPort::new(0, AccessNet::BindTcp)).map_err(failed)?;
    }
    for (path, access) in [
        ("/", AccessFs::from_read(abi)),
        (WORKSPACE_INSIDE, read_write),
        (HOME_INSIDE, read_write),
        ("/tmp", read_write),
        ("/dev/shm", read_write),
        // Only harmless nodes and the command's own terminals are there.
        ("/dev", device),
    ] {
        let place = PathFd::new(path).map_err(failed)?;
        created = created.add_rule(PathBeneath::new(place, access)).map_err(failed)?;
    }
    Ok(created)
}
