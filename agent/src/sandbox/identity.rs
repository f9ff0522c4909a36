//! Who commands run as.

use std::io;

use super::spec::Identity;

/// The user and group of a root agent's commands: beyond every range that distributions,
/// containers and directory services hand out (systemd's documentation lists them).
const ASSUMED_ID: u32 = 1_912_602_624;

/// Why there is nobody that a command could run as.
#[derive(Debug, thiserror::Error)]
pub enum NoIdentity {
    /// The agent is root in a user namespace that knows no other user.
    #[error("the agent is root in a user namespace that knows no unprivileged {what}")]
    OnlyRoot {
        /// User or group.
        what: &'static str,
    },
    /// The maps of this user namespace cannot be read.
    #[error("cannot read which ids exist in this user namespace: {source}")]
    Unknown {
        /// What the kernel said.
        source: io::Error,
    },
}

impl NoIdentity {
    /// What helps.
    #[must_use]
    pub fn hint(&self) -> &'static str {
        match self {
            Self::OnlyRoot { .. } => {
                "run the agent as a user other than root, or give the container more user ids"
            }
            Self::Unknown { .. } => "mount /proc",
        }
    }
}

/// The identity of commands started by this process: its own, or an unprivileged one if it is root.
///
/// # Errors
/// If this process is root and there is no other user.
pub(super) fn of_commands() -> Result<Identity, NoIdentity> {
    let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    if uid != 0 {
        return Ok(Identity { uid, gid, assumed: false });
    }
    let read =
        |path| std::fs::read_to_string(path).map_err(|source| NoIdentity::Unknown { source });
    let pick = |map: String, what| pick(&map).ok_or(NoIdentity::OnlyRoot { what });
    Ok(Identity {
        uid: pick(read("/proc/self/uid_map")?, "user")?,
        gid: pick(read("/proc/self/gid_map")?, "group")?,
        assumed: true,
    })
}

/// An unprivileged id that exists in a namespace with this map: the usual one, or in a container
/// with few ids the last, which nobody is likely to have there.
fn pick(map: &str) -> Option<u32> {
    let ranges = map.lines().filter_map(|line| {
        let mut numbers = line.split_whitespace();
        let first: u64 = numbers.next()?.parse().ok()?;
        let count: u64 = numbers.nth(1)?.parse().ok()?;
        Some(first..first.checked_add(count)?)
    });
    let mut last = None;
    for range in ranges {
        if range.contains(&u64::from(ASSUMED_ID)) {
            return Some(ASSUMED_ID);
        }
        last = last.max(range.end.checked_sub(1));
    }
    last.and_then(|id| u32::try_from(id).ok()).filter(|id| *id != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unprivileged_id_is_picked_wherever_there_is_one() {
        for (map, id) in [
            ("         0          0 4294967295\n", Some(ASSUMED_ID)),
            ("0 100000 65536\n", Some(65535)),
            ("0 1000 1\n1 100000 65536\n", Some(65536)),
            ("0 1000 1\n", None),
            ("", None),
            ("nonsense\n", None),
        ] {
            assert_eq!(pick(map), id, "{map:?}");
        }
    }
}
