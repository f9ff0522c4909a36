//! What can go wrong with a file.

use std::io;

use cortex_shared::text::hex;
use rustix::io::Errno;

/// Why a request was not done. Names stand in it as they were asked for.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// There is no such file.
    #[error("{name}: no such file or directory")]
    NotFound {
        /// What was looked for.
        name: String,
    },
    /// It is something else than what is needed.
    #[error("{name}: {why}")]
    WrongKind {
        /// What was looked at.
        name: String,
        /// What it is.
        why: &'static str,
    },
    /// A directory where a file is needed.
    #[error("{name} is a directory")]
    IsDirectory {
        /// What was looked at.
        name: String,
    },
    /// Something stands there.
    #[error("{name} exists already")]
    Exists {
        /// What was looked at.
        name: String,
    },
    /// The content is another one.
    #[error("{name} is not what it was expected to be: {}", found(*.now))]
    Changed {
        /// What was looked at.
        name: String,
        /// Its hash, if there is a file.
        now: Option<[u8; 32]>,
    },
    /// Somebody was there at the same time.
    #[error("{name}: {why}")]
    Raced {
        /// What was to be changed.
        name: String,
        /// What happened.
        why: &'static str,
    },
    /// A name that programs obey.
    #[error("{name} is a name that programs on the node obey: nobody changes it from afar")]
    Protected {
        /// The name.
        name: String,
    },
    /// The workspace's directory is not to be changed itself.
    #[error("the directory of the workspace itself stays as it is")]
    TheWorkspaceItself,
    /// More than one request may ask for.
    #[error("{name}: {why}")]
    TooMuch {
        /// What was looked at.
        name: String,
        /// Of what.
        why: &'static str,
    },
    /// A tree was removed in part.
    #[error("{source}; {removed} names were removed before that")]
    Partly {
        /// How many names are gone.
        removed: u64,
        /// What stopped it.
        source: Box<FileError>,
    },
    /// What arrived is not what was sent.
    #[error("what arrived is not what was sent")]
    Damaged,
    /// Nobody is there any more who asked.
    #[error("the caller has gone")]
    Gone,
    /// Not a request.
    #[error("this is no valid request: {0}")]
    Invalid(&'static str),
    /// The workspace cannot be used.
    #[error("{reason}")]
    Unusable {
        /// Why.
        reason: String,
        /// What helps.
        hint: String,
    },
    /// The file system.
    #[error("{name}: {source}")]
    Io {
        /// What was tried with.
        name: String,
        /// What it said.
        source: io::Error,
    },
}

fn found(hash: Option<[u8; 32]>) -> String {
    hash.map_or_else(
        || "there is no such file".to_owned(),
        |hash| format!("its hash is {}", hex(&hash)),
    )
}

impl FileError {
    /// What the file system said about a name.
    pub(super) fn of(name: &dyn std::fmt::Display, source: io::Error) -> Self {
        let name = name.to_string();
        match (source.kind(), Errno::from_io_error(&source)) {
            (io::ErrorKind::NotFound, _) => Self::NotFound { name },
            (io::ErrorKind::AlreadyExists, _) => Self::Exists { name },
            (_, Some(Errno::LOOP)) => Self::WrongKind { name, why: IS_LINK },
            (_, Some(Errno::NOTDIR)) => Self::WrongKind {
                name,
                why: "it, or what is above it, is not a directory, and symbolic links are not followed",
            },
            (_, Some(Errno::ISDIR)) => Self::IsDirectory { name },
            (_, Some(Errno::NXIO)) => Self::WrongKind { name, why: IS_SPECIAL },
            _ => Self::Io { name, source },
        }
    }

    /// The command that helps; empty for none.
    #[must_use]
    pub fn hint(&self) -> &str {
        match self {
            Self::NotFound { .. } => "look at what there is: cortex-agent ls NODE:WORKSPACE",
            Self::IsDirectory { .. } => {
                "list it: cortex-agent ls NODE:PATH; remove it: cortex-agent rm -r NODE:PATH"
            }
            Self::Changed { .. } | Self::Raced { .. } => {
                "read it anew: cortex-agent cat NODE:PATH, then write with --if-hash of that"
            }
            Self::Protected { .. } => "change it on the node itself",
            Self::TooMuch { .. } => "do it with a command on the node: cortex-agent exec NODE",
            Self::Damaged => "repeat the command",
            Self::Unusable { hint, .. } => hint,
            Self::Partly { source, .. } => source.hint(),
            Self::Exists { .. }
            | Self::WrongKind { .. }
            | Self::TheWorkspaceItself
            | Self::Gone
            | Self::Invalid(_)
            | Self::Io { .. } => "",
        }
    }
}

/// See [`FileError::WrongKind`].
pub(super) const IS_LINK: &str =
    "it, or what is above it, is a symbolic link, and links are not followed";
/// See [`FileError::WrongKind`].
pub(super) const IS_SPECIAL: &str = "it is neither a file nor a directory";
