//! What a workspace was before: old versions of its entries, how long they are kept, and how one comes
//! back.

use std::time::Duration;

use cortex_shared::entry::{Digest, Kind};
use cortex_shared::ids::NodeId;
use cortex_shared::wire_path::WirePath;

use super::Op;

/// Who made a change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Author {
    /// A member.
    Node(NodeId),
    /// An operator, by name, who restored something or settled a conflict.
    Operator(String),
}

/// Before an operator's name at rest; a node is its 16 bytes alone, of which no id is all zeros.
const OPERATOR_PREFIX: [u8; 16] = [0; 16];

impl Author {
    /// The bytes at rest.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        match self {
            Self::Node(node) => node.as_bytes().to_vec(),
            Self::Operator(name) => [&OPERATOR_PREFIX[..], name.as_bytes()].concat(),
        }
    }

    /// The author of these bytes; `None` if they are none.
    #[must_use]
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        match bytes.strip_prefix(&OPERATOR_PREFIX) {
            Some(name) if !name.is_empty() => {
                String::from_utf8(name.to_vec()).ok().map(Self::Operator)
            }
            _ => NodeId::from_slice(bytes).ok().map(Self::Node),
        }
    }

    /// The member, if it was one.
    #[must_use]
    pub fn node(&self) -> Option<NodeId> {
        match self {
            Self::Node(node) => Some(*node),
            Self::Operator(_) => None,
        }
    }
}

/// How much of the past a workspace keeps, and how much it may store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WorkspaceSettings {
    /// Content on disk at most, in bytes, with what is kept of the past; `None` for no limit.
    pub quota_bytes: Option<u64>,
    /// How long an old version stays after it was replaced or deleted.
    pub keep_for: Duration,
    /// How many old versions of one path stay at most.
    pub keep_versions: u32,
}

impl Default for WorkspaceSettings {
    /// A week or twenty versions, whichever ends first: long enough to notice a mistake after a weekend,
    /// and a file that a program writes all day costs twenty times its size at most.
    fn default() -> Self {
        Self { quota_bytes: None, keep_for: Duration::from_secs(7 * 24 * 3600), keep_versions: 20 }
    }
}

/// What a workspace takes on disk, and how far back it can be looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    /// Packs.
    pub packs: u64,
    /// Bytes of all packs.
    pub pack_bytes: u64,
    /// Old versions that are kept.
    pub old_versions: u64,
    /// The oldest version at which the whole tree is known.
    pub oldest_version: u64,
}

/// What happened to a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LoggedChange {
    /// Something came where nothing stood.
    Created,
    /// It took the place of something else.
    Replaced,
    /// It was written; what stood there before is no longer known.
    Written,
    /// It went.
    Deleted,
}

/// One change of the past.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogEntry {
    /// Its number.
    pub seq: u64,
    /// When, in milliseconds since the Unix epoch; 0 if that was not recorded.
    pub at_ms: i64,
    /// Who; `None` if that was not recorded.
    pub author: Option<Author>,
    /// Where.
    pub path: WirePath,
    /// What happened.
    pub change: LoggedChange,
    /// What it was that came, or went.
    pub kind: Kind,
    /// Its size, of files.
    pub size: u64,
    /// Its content, of files.
    pub content: Option<Digest>,
    /// Whether it stands there now.
    pub current: bool,
}

/// Which changes are asked for, newest first.
#[derive(Clone, Debug, Default)]
pub struct LogFilter {
    /// A path and everything below it; everything for `None`.
    pub path: Option<WirePath>,
    /// Only changes before this one; from the newest on for `None`.
    pub before: Option<u64>,
    /// How many at most.
    pub limit: usize,
}

/// Some changes of the past.
#[derive(Clone, Debug, Default)]
pub struct LogPage {
    /// Newest first.
    pub entries: Vec<LogEntry>,
    /// Ask on before this one; `None` at the end.
    pub next_before: Option<u64>,
}

/// What would bring an earlier state back.
#[derive(Clone, Debug)]
pub struct RestorePlan {
    /// The version whose state it is.
    pub version: u64,
    /// What to commit, in this order. Nothing is deleted by it.
    pub ops: Vec<Op>,
    /// Paths of which that version is no longer kept.
    pub forgotten: Vec<WirePath>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn authors_survive_their_rest() {
        for author in [
            Author::Node(NodeId::new()),
            Author::Operator("a".into()),
            Author::Operator("sixteen-letters!".into()),
        ] {
            assert_eq!(Author::decode(&author.encode()), Some(author));
        }
        for bytes in [&b""[..], b"short", &[0; 17][..16]] {
            let decoded = Author::decode(bytes);
            assert!(decoded.as_ref().and_then(Author::node).is_none_or(|_| bytes.len() == 16));
        }
    }
}
