//! What tells this machine from another. For people who have to find out which of two machines is
//! the copy; never an identity, because all of it is copied along with a disk.

use cortex_proto::v1;

/// Longest text of each fact; more is cut.
const MAX_BYTES: usize = 64;

/// Facts about this machine.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MachineFacts {
    /// `/etc/machine-id`; empty if the system has none.
    pub machine_id: String,
    /// Random for each start of the kernel.
    pub boot_id: String,
    /// The host's name.
    pub hostname: String,
}

impl MachineFacts {
    /// Looks them up. What cannot be read is empty.
    #[must_use]
    pub fn of_this_machine() -> Self {
        let machine_id = ["/etc/machine-id", "/var/lib/dbus/machine-id"]
            .iter()
            .map(|path| first_word(path))
            .find(|id| !id.is_empty())
            .unwrap_or_default();
        Self {
            machine_id,
            boot_id: first_word("/proc/sys/kernel/random/boot_id"),
            hostname: rustix::system::uname().nodename().to_string_lossy().into_owned(),
        }
    }
}

impl From<MachineFacts> for v1::MachineFacts {
    fn from(facts: MachineFacts) -> Self {
        Self { machine_id: facts.machine_id, boot_id: facts.boot_id, hostname: facts.hostname }
    }
}

fn first_word(path: &str) -> String {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let word = text.split_whitespace().next().unwrap_or_default();
    word.chars().filter(char::is_ascii_graphic).take(MAX_BYTES).collect()
}
