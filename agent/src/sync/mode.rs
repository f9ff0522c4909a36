//! What a member does with changes of its own and of others.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The mode of one member of a workspace. Decided on its node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MemberMode {
    /// Changes go both ways.
    #[default]
    TwoWay,
    /// Changes here go to the hub; what others change stays away from here. Where both changed a
    /// path, it is left alone on both sides and told.
    SendOnly,
    /// Changes of others come here; what is changed here stays here.
    ReceiveOnly,
    /// An exact copy: what is changed here is undone, and what is here alone goes to the trash.
    Mirror,
}

impl MemberMode {
    /// All modes.
    pub const ALL: [Self; 4] = [Self::TwoWay, Self::SendOnly, Self::ReceiveOnly, Self::Mirror];

    /// As people write it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::TwoWay => "two-way",
            Self::SendOnly => "send-only",
            Self::ReceiveOnly => "receive-only",
            Self::Mirror => "mirror",
        }
    }
}

impl fmt::Display for MemberMode {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.name())
    }
}

/// No mode has this name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no mode: two-way, send-only, receive-only or mirror")]
pub struct NoSuchMode(String);

impl FromStr for MemberMode {
    type Err = NoSuchMode;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::ALL
            .into_iter()
            .find(|mode| mode.name() == text)
            .ok_or_else(|| NoSuchMode(text.to_owned()))
    }
}

/// What the owner of a node decided about one workspace on it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MemberOptions {
    /// See [`MemberMode`].
    pub mode: MemberMode,
    /// Nothing is looked at, sent or changed until somebody says otherwise.
    pub paused: bool,
}
