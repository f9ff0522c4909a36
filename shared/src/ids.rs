//! Identifiers. Each is a type of its own, so that one cannot be passed for another.

use std::fmt;
use std::str::FromStr;

use uuid::Uuid;

/// Text that is not an identifier of the wanted kind.
#[derive(Debug, thiserror::Error)]
#[error("not a valid {kind} (16 bytes, or 36 characters as a UUID)")]
pub struct InvalidId {
    kind: &'static str,
}

macro_rules! id_type {
    ($(#[$doc:meta])* $name:ident, $kind:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
        #[serde(transparent)]
        pub struct $name(Uuid);

        impl $name {
            /// A new identifier; later ones sort after earlier ones (UUID version 7).
            #[must_use]
            #[allow(clippy::new_without_default)]
            pub fn new() -> Self {
                Self(Uuid::now_v7())
            }

            /// The 16 bytes that travel and rest.
            #[must_use]
            pub fn as_bytes(&self) -> &[u8; 16] {
                self.0.as_bytes()
            }

            /// Reads the 16 bytes of the wire or the store.
            ///
            /// # Errors
            /// If there are not exactly 16.
            pub fn from_slice(bytes: &[u8]) -> Result<Self, InvalidId> {
                Uuid::from_slice(bytes).map(Self).map_err(|_| InvalidId { kind: $kind })
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl FromStr for $name {
            type Err = InvalidId;
            fn from_str(text: &str) -> Result<Self, InvalidId> {
                Uuid::parse_str(text).map(Self).map_err(|_| InvalidId { kind: $kind })
            }
        }
    };
}

id_type!(
    /// A node: a machine with a joined agent.
    NodeId, "node id"
);
id_type!(
    /// One mesh: a hub's certificate authority and everything it admitted.
    MeshId, "mesh id"
);
id_type!(
    /// One live connection of one node.
    SessionId, "session id"
);
id_type!(
    /// One command on one node.
    TaskId, "task id"
);
id_type!(
    /// One operation on files of one node.
    RequestId, "request id"
);
id_type!(
    /// A named tree of files kept equal on its members.
    WorkspaceId, "workspace id"
);
id_type!(
    /// One history of a workspace's versions; a new one after versions were lost.
    WorkspaceEpoch, "workspace epoch"
);
id_type!(
    /// The idempotency key of one commit.
    CommitId, "commit id"
);

impl WorkspaceId {
    /// The library of the mesh (see [`crate::library`]): the one workspace that nobody made and that has
    /// every node as a member. No random identifier is equal to it.
    pub const LIBRARY: Self = Self(Uuid::from_bytes(*b"cortex's library"));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn id_survives_bytes_and_text() {
        let id = NodeId::new();
        assert_eq!(NodeId::from_slice(id.as_bytes()).unwrap(), id);
        assert_eq!(id.to_string().parse::<NodeId>().unwrap(), id);
    }

    #[test]
    fn wrong_length_is_refused() {
        assert!(TaskId::from_slice(b"short").is_err());
        assert!("".parse::<TaskId>().is_err());
    }
}
