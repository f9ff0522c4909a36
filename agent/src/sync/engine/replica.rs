//! The token that binds a root directory to its index.
//!
//! Number and birth of a directory tell it from others, but not from an older state of itself: a
//! container that starts from its image again, or a restored snapshot, has the same directory with
//! files of long ago, and what is missing there would look deleted. So the root carries a random
//! token in an extended attribute, and the index knows which. Where the file system has no such
//! attributes, number and birth have to do.

use std::io;

use crate::root_dir::DirHandle;
use crate::sync::index::{Index, IndexError};

/// Whether the root is the one that was synced last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Replica {
    Ours,
    /// It carries no token, or another one.
    Other,
}

/// Compares the tokens of root and index; gives both one if the index knows none.
pub(super) fn check_replica(top: &DirHandle, index: &mut Index) -> Result<Replica, ReplicaError> {
    let Some(known) = index.replica_token()? else {
        let token = uuid::Uuid::new_v4().simple().to_string().into_bytes();
        // The index must not know of a token that the root has lost with the power.
        match top.set_token(&token).and_then(|()| top.sync()) {
            Ok(()) => index.set_replica_token(&token)?,
            Err(error) => tracing::debug!(%error, "the root takes no token"),
        }
        return Ok(Replica::Ours);
    };
    match top.token() {
        Ok(token) if token.as_ref() == Some(&known) => Ok(Replica::Ours),
        Ok(_) => Ok(Replica::Other),
        Err(error) => Err(ReplicaError::Root(error)),
    }
}

#[derive(Debug, thiserror::Error)]
pub(super) enum ReplicaError {
    #[error(transparent)]
    Index(#[from] IndexError),
    #[error("the root directory cannot be read")]
    Root(#[source] io::Error),
}
