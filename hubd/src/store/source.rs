//! Source addresses that an invite is good from.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A range of addresses, such as `10.0.0.0/8` or `2001:db8::/32`; an address alone is a range of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SourceRange {
    network: IpAddr,
    prefix: u8,
}

/// Text that is not a range of addresses.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidRange {
    /// Neither an address nor one with a prefix length.
    #[error("{text:?} is not a range of addresses: expected such as 10.0.0.0/8 or 2001:db8::/32")]
    Form {
        /// What was given.
        text: String,
    },
    /// The address has bits after its prefix: which range is meant is a guess.
    #[error("{text:?} has bits after its prefix; the range is {meant}")]
    HostBits {
        /// What was given.
        text: String,
        /// The range that contains it.
        meant: SourceRange,
    },
}

impl SourceRange {
    /// Whether an address is within. An IPv4 address that arrived on an IPv6 socket counts as IPv4.
    #[must_use]
    pub fn contains(&self, address: IpAddr) -> bool {
        Self::masked(address.to_canonical(), self.prefix) == Some(self.network)
    }

    /// The address with the bits after the prefix cleared; `None` if the prefix is too long for it.
    fn masked(address: IpAddr, prefix: u8) -> Option<IpAddr> {
        let prefix = u32::from(prefix);
        match address {
            IpAddr::V4(v4) => {
                let shift = 32_u32.checked_sub(prefix)?;
                let mask = u32::MAX.checked_shl(shift).unwrap_or(0);
                Some(IpAddr::V4((v4.to_bits() & mask).into()))
            }
            IpAddr::V6(v6) => {
                let shift = 128_u32.checked_sub(prefix)?;
                let mask = u128::MAX.checked_shl(shift).unwrap_or(0);
                Some(IpAddr::V6((v6.to_bits() & mask).into()))
            }
        }
    }
}

impl FromStr for SourceRange {
    type Err = InvalidRange;
    fn from_str(text: &str) -> Result<Self, InvalidRange> {
        let shown = || text.chars().take(64).collect::<String>();
        let form = || InvalidRange::Form { text: shown() };
        let (address, prefix) = match text.split_once('/') {
            Some((address, prefix)) => (address, Some(prefix)),
            None => (text, None),
        };
        let address: IpAddr = address.parse().map_err(|_| form())?;
        let prefix = match prefix {
            // `+8` and `08` parse as numbers, and nobody writes them.
            Some(prefix)
                if prefix.starts_with(|c: char| c == '+' || (c == '0' && prefix != "0")) =>
            {
                return Err(form());
            }
            Some(prefix) => prefix.parse().map_err(|_| form())?,
            None if address.is_ipv4() => 32,
            None => 128,
        };
        let network = Self::masked(address, prefix).ok_or_else(form)?;
        let range = Self { network, prefix };
        if network != address {
            return Err(InvalidRange::HostBits { text: shown(), meant: range });
        }
        Ok(range)
    }
}

impl fmt::Display for SourceRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.network, self.prefix)
    }
}

impl TryFrom<String> for SourceRange {
    type Error = InvalidRange;
    fn try_from(text: String) -> Result<Self, InvalidRange> {
        text.parse()
    }
}

impl From<SourceRange> for String {
    fn from(range: SourceRange) -> Self {
        range.to_string()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn ranges_contain_what_they_say() {
        for (range, address, inside) in [
            ("10.0.0.0/8", "10.255.1.2", true),
            ("10.0.0.0/8", "11.0.0.0", false),
            ("10.0.0.0/8", "::ffff:10.1.1.1", true),
            ("0.0.0.0/0", "203.0.113.9", true),
            ("0.0.0.0/0", "2001:db8::1", false),
            ("192.0.2.7", "192.0.2.7", true),
            ("192.0.2.7", "192.0.2.8", false),
            ("2001:db8::/32", "2001:db8:ffff::1", true),
            ("2001:db8::/32", "2001:db9::1", false),
            ("::/0", "::1", true),
            ("::1", "::1", true),
        ] {
            let parsed: SourceRange = range.parse().unwrap();
            assert_eq!(parsed.contains(address.parse().unwrap()), inside, "{address} in {range}");
        }
    }

    #[test]
    fn what_is_not_plainly_a_range_is_refused() {
        for text in [
            "",
            "10.0.0.0/33",
            "10.0.0.0/",
            "10.0.0/8",
            "::/129",
            "10.0.0.0/+8",
            "10.0.0.0/08",
            "a",
        ] {
            assert!(
                matches!(text.parse::<SourceRange>(), Err(InvalidRange::Form { .. })),
                "{text}"
            );
        }
        let error = "10.1.2.3/8".parse::<SourceRange>().unwrap_err();
        assert!(error.to_string().ends_with("the range is 10.0.0.0/8"), "{error}");
    }

    proptest! {
        #[test]
        fn ranges_survive_text_and_contain_their_network(address: IpAddr, prefix in 0_u8..=128) {
            if let Some(network) = SourceRange::masked(address, prefix) {
                let range = SourceRange { network, prefix };
                prop_assert_eq!(range.to_string().parse(), Ok(range));
                prop_assert!(range.contains(network.to_canonical()) || network != network.to_canonical());
            }
        }
    }
}
