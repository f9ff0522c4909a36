//! Why the library was not changed.

use cortex_shared::wire_path::WirePath;

use crate::store::{SkillVersion, StoreError};
use crate::sync::SyncError;

/// Why a version was not made, removed or brought back. Nothing has changed then, but where said.
#[derive(Debug, thiserror::Error)]
pub enum SkillError {
    /// No directory stands there.
    #[error("{path} is not a directory of the workspace as the hub has it")]
    NotADirectory {
        /// The path.
        path: WirePath,
    },
    /// The directory kept changing while it was promoted.
    #[error("{path} changed while it was being promoted; nothing was done")]
    PathChanged {
        /// The path.
        path: WirePath,
    },
    /// Another version is current than the caller may take the place of.
    #[error("{surprise}")]
    SkillChanged {
        /// What is in the way.
        surprise: Surprise,
    },
    /// A link in the directory leads out of it: elsewhere it would lead to something else.
    #[error("the link {path} leads out of the directory")]
    LinkOutside {
        /// The link.
        path: WirePath,
    },
    /// There is more in it than a skill may have.
    #[error("a skill has at most {limit} {what}")]
    TooLarge {
        /// Of what.
        what: &'static str,
        /// How much at most.
        limit: u64,
    },
    /// It would be too long, or too deep, in the library.
    #[error("the path {path} is too long for the library")]
    PathTooLong {
        /// The path.
        path: WirePath,
    },
    /// The hub has lost content of it with a damaged disk.
    #[error("content of {what} was lost at the hub")]
    ContentLost {
        /// The directory, or the version.
        what: String,
    },
    /// There is no such skill.
    #[error("there is no skill {skill:?}")]
    NoSuchSkill {
        /// Its name.
        skill: String,
    },
    /// There is no such version of it.
    #[error("skill {skill:?} has no version {version} that could be restored")]
    NoSuchVersion {
        /// Its name.
        skill: String,
        /// The version.
        version: u64,
    },
    /// The version is what nodes have.
    #[error("version {version} of skill {skill:?} is the current one")]
    IsCurrent {
        /// Its name.
        skill: String,
        /// The version.
        version: u64,
    },
    /// The version is no longer kept.
    #[error("version {version} of skill {skill:?} is no longer kept")]
    Forgotten {
        /// Its name.
        skill: String,
        /// The version.
        version: u64,
    },
    /// The record of versions. What was begun is finished, or undone, by itself.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A tree or its content. What was begun is finished, or undone, by itself.
    #[error(transparent)]
    Sync(#[from] SyncError),
}

/// What is current, to the surprise of a caller.
#[derive(Debug, thiserror::Error)]
pub enum Surprise {
    /// There is none.
    #[error("skill {skill:?} has no current version, and version {expected} was expected")]
    None {
        /// Its name.
        skill: String,
        /// What the caller expected.
        expected: u64,
    },
    /// Another version than the caller named.
    #[error(
        "skill {:?} is at version {} by now, promoted by {}, and {} was expected",
        current.skill, current.version, current.by.name, expectation(*expected)
    )]
    Version {
        /// What is current.
        current: Box<SkillVersion>,
        /// What the caller expected; 0 for none.
        expected: u64,
    },
    /// One that came from another place; the caller has not said that it knows of it.
    #[error(
        "skill {:?} exists: version {}, promoted by {} from another directory",
        current.skill, current.version, current.by.name
    )]
    OtherOrigin {
        /// What is current.
        current: Box<SkillVersion>,
    },
}

impl Surprise {
    /// What is current.
    #[must_use]
    pub fn current(&self) -> Option<&SkillVersion> {
        match self {
            Self::None { .. } => None,
            Self::Version { current, .. } | Self::OtherOrigin { current } => Some(current),
        }
    }
}

impl From<Surprise> for SkillError {
    fn from(surprise: Surprise) -> Self {
        Self::SkillChanged { surprise }
    }
}

fn expectation(expected: u64) -> String {
    match expected {
        0 => "none".to_owned(),
        version => format!("version {version}"),
    }
}
