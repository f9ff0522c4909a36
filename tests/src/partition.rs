//! A network between hub and node that the kernel itself takes away: a namespace for the node, a veth pair,
//! and rules that drop every packet both ways without a word.
//!
//! Needs root, and the programs `ip`, `nsenter` and `iptables`. Everything is removed with its value.

use std::path::PathBuf;
use std::process::Command;

use crate::is_root;
use crate::network::NetworkChange;
use crate::process::{Outcome, run};

/// See the module.
pub struct Island {
    _change: NetworkChange,
    name: String,
    outside: String,
    inside: String,
    network: u16,
}

impl Island {
    /// Makes one, or says why that is not possible here.
    ///
    /// # Errors
    /// The reason.
    pub fn make() -> Result<Self, String> {
        if !is_root() {
            return Err("network namespaces need root".to_owned());
        }
        // Names of interfaces have at most 15 characters.
        let number = rand::random::<u16>() >> 1;
        let island = Self {
            _change: NetworkChange::begin(),
            name: format!("cortex-{number:04x}"),
            outside: format!("cxo{number:04x}"),
            inside: format!("cxi{number:04x}"),
            network: number,
        };
        let Self { name, outside, inside, .. } = &island;
        let [here, there] = [1, 2].map(|host| format!("{}/30", island.address(host)));
        island.ip(&["netns", "add", name])?;
        island.ip(&["link", "add", outside, "type", "veth", "peer", "name", inside])?;
        island.ip(&["link", "set", inside, "netns", name])?;
        island.ip(&["addr", "add", &here, "dev", outside])?;
        island.ip(&["link", "set", outside, "up"])?;
        for arguments in [
            ["addr", "add", &there, "dev", inside].as_slice(),
            &["link", "set", inside, "up"],
            &["link", "set", "lo", "up"],
        ] {
            island.ip(&[&["-n", name], arguments].concat())?;
        }
        // Whether rules can be made at all is known before anything relies on it.
        island.rules("-A")?;
        island.rules("-D")?;
        Ok(island)
    }

    /// One of 198.18.0.0/15, which is set aside for benchmarks of networks (RFC 2544): nothing real is
    /// reached by it. Each line has four of them.
    fn address(&self, host: u16) -> String {
        let (high, middle, low) =
            (self.network >> 14, self.network >> 6 & 0xff, self.network & 0x3f);
        format!("198.{}.{middle}.{}", 18 + high, low * 4 + host)
    }

    /// The address of this side of the line.
    #[must_use]
    pub fn hub_address(&self) -> String {
        self.address(1)
    }

    /// The network namespace of the other side.
    #[must_use]
    pub fn namespace(&self) -> PathBuf {
        PathBuf::from("/run/netns").join(&self.name)
    }

    /// From now on no packet arrives on either side, and nobody is told.
    ///
    /// # Panics
    /// If the kernel refuses.
    pub fn cut(&self) {
        self.rules("-A").expect("it was tried before");
    }

    /// The line is whole again.
    ///
    /// # Panics
    /// If the kernel refuses.
    pub fn heal(&self) {
        self.rules("-D").expect("it was tried before");
    }

    fn rules(&self, action: &str) -> Result<(), String> {
        for (chain, interface) in [("INPUT", "-i"), ("OUTPUT", "-o")] {
            let namespace = format!("--net={}", self.namespace().display());
            // A machine that filters in another way may hold the lock of the older one.
            let rule = [&namespace, "iptables", "-w", action, chain, interface, &self.inside];
            tool("nsenter", &[&rule[..], &["-j", "DROP"]].concat())?;
        }
        Ok(())
    }

    fn ip(&self, arguments: &[&str]) -> Result<(), String> {
        tool("ip", arguments)
    }
}

impl Drop for Island {
    fn drop(&mut self) {
        // The pair goes with either end, but a namespace lives on while anybody is in it.
        self.ip(&["link", "del", &self.outside]).ok();
        self.ip(&["netns", "del", &self.name]).ok();
    }
}

fn tool(name: &str, arguments: &[&str]) -> Result<(), String> {
    let found = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"]
        .into_iter()
        .map(|folder| PathBuf::from(folder).join(name))
        .find(|path| path.exists())
        .ok_or_else(|| format!("{name} is not installed"))?;
    let outcome: Outcome = run(Command::new(found).args(arguments), b"");
    if outcome.code == 0 {
        return Ok(());
    }
    Err(format!("{name} {}: {}", arguments.join(" "), outcome.stderr.trim()))
}
