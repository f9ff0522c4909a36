//! How much a command may do, and who decides.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// Longest policy with an end, whatever a hub says: nodes take none for longer. What is needed for longer
/// belongs into the sandbox's own rules.
pub const LONGEST_POLICY: Duration = Duration::from_secs(30 * 24 * 60 * 60);

/// How much a command may do on a node. Ordered: strict is less than permissive, so the mode in
/// force is the minimum of what everyone involved allows.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    serde::Serialize,
    serde::Deserialize,
)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// The sandbox. What an unconfigured node, policy or request means.
    #[default]
    Strict,
    /// No isolation; limits and time limits still hold.
    Permissive,
}

impl Mode {
    /// The mode in force where several parties have a say.
    #[must_use]
    pub fn strictest(modes: impl IntoIterator<Item = Self>) -> Self {
        modes.into_iter().min().unwrap_or_default()
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Strict => "strict",
            Self::Permissive => "permissive",
        })
    }
}

impl FromStr for Mode {
    type Err = UnknownWord;
    fn from_str(text: &str) -> Result<Self, UnknownWord> {
        match text {
            "strict" => Ok(Self::Strict),
            "permissive" => Ok(Self::Permissive),
            _ => Err(UnknownWord { kind: "mode", word: text.to_owned() }),
        }
    }
}

/// What of the network a command in strict mode sees. Ordered: nothing is less than everything.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    serde::Serialize,
    serde::Deserialize,
)]
#[serde(rename_all = "lowercase")]
pub enum Network {
    /// A private loopback interface.
    #[default]
    None,
    /// The network of the host.
    Full,
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "none",
            Self::Full => "full",
        })
    }
}

impl FromStr for Network {
    type Err = UnknownWord;
    fn from_str(text: &str) -> Result<Self, UnknownWord> {
        match text {
            "none" => Ok(Self::None),
            "full" => Ok(Self::Full),
            _ => Err(UnknownWord { kind: "network", word: text.to_owned() }),
        }
    }
}

/// How much somebody lets commands do at most: the hub by its policy for a node, the node's owner by
/// the ceiling. A permissive command has the host's network whatever is said of it here.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Bound {
    /// The mode.
    pub mode: Mode,
    /// The network of a strict command.
    pub network: Network,
}

impl Bound {
    /// Strict, without a network: what everybody allows who has said nothing.
    pub const LEAST: Self = Self { mode: Mode::Strict, network: Network::None };

    /// What both allow.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self { mode: self.mode.min(other.mode), network: self.network.min(other.network) }
    }
}

impl fmt::Display for Bound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.network {
            Network::None => self.mode.fmt(f),
            Network::Full => write!(f, "{}, network full", self.mode),
        }
    }
}

/// What an operator may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// Looks only.
    Viewer,
    /// A program that acts for somebody, such as an AI agent: commands in STRICT, in workspaces.
    AgentToken,
    /// Runs commands and manages workspaces.
    Operator,
    /// Changes authority: invites, operators, policy.
    Admin,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Viewer => "viewer",
            Self::AgentToken => "agent-token",
            Self::Operator => "operator",
            Self::Admin => "admin",
        })
    }
}

impl FromStr for Role {
    type Err = UnknownWord;
    fn from_str(text: &str) -> Result<Self, UnknownWord> {
        match text {
            "viewer" => Ok(Self::Viewer),
            "agent-token" => Ok(Self::AgentToken),
            "operator" => Ok(Self::Operator),
            "admin" => Ok(Self::Admin),
            _ => Err(UnknownWord { kind: "role", word: text.to_owned() }),
        }
    }
}

/// A word that is none of the known ones.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown {kind} {word:?}")]
pub struct UnknownWord {
    kind: &'static str,
    word: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_can_loosen_what_another_made_strict() {
        use Mode::{Permissive, Strict};
        assert_eq!(Mode::strictest([Permissive, Permissive]), Permissive);
        assert_eq!(Mode::strictest([Permissive, Strict]), Strict);
        assert_eq!(Mode::strictest([]), Strict);
        assert_eq!(Mode::default(), Strict);
        let online = Bound { network: Network::Full, ..Bound::LEAST };
        let open = Bound { mode: Permissive, ..online };
        assert_eq!(open.and(online), online);
        assert_eq!(open.and(Bound { mode: Permissive, ..Bound::LEAST }).network, Network::None);
        assert_eq!(
            (Bound::default(), online.to_string()),
            (Bound::LEAST, "strict, network full".into())
        );
    }
}
