//! Where a hub is reached.

use std::fmt;
use std::str::FromStr;

/// `HOST:PORT`, `IPV4:PORT` or `[IPV6]:PORT`. Says where to dial, never whom to trust.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct HubAddress(String);

/// Text that is not an address of a hub.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not the address of a hub: expected HOST:PORT, such as hub.example.org:7443")]
pub struct InvalidAddress(String);

impl HubAddress {
    /// The text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for HubAddress {
    type Err = InvalidAddress;
    fn from_str(text: &str) -> Result<Self, InvalidAddress> {
        let invalid = || InvalidAddress(text.to_owned());
        let (host, port) = text.rsplit_once(':').ok_or_else(invalid)?;
        let port: u16 = port.parse().map_err(|_| invalid())?;
        let host_is_valid = match host.strip_prefix('[') {
            Some(rest) => rest
                .strip_suffix(']')
                .is_some_and(|address| address.parse::<std::net::Ipv6Addr>().is_ok()),
            None => {
                matches!(host.len(), 1..=253)
                    && host
                        .bytes()
                        .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_'))
            }
        };
        if port == 0 || !host_is_valid { Err(invalid()) } else { Ok(Self(text.to_owned())) }
    }
}

impl fmt::Display for HubAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_a_host_and_a_port() {
        for good in ["hub:7443", "10.0.0.1:1", "[::1]:7443", "a-b.example.org:65535"] {
            assert_eq!(good.parse::<HubAddress>().unwrap().as_str(), good);
        }
        for bad in
            ["", "hub", "hub:", ":7443", "hub:0", "hub:65536", "::1:7443", "https://hub:1", "a b:1"]
        {
            assert!(bad.parse::<HubAddress>().is_err(), "{bad}");
        }
    }
}
