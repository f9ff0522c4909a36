//! The token that binds a root directory to its index.
//!
//! Number and birth of a directory tell it from others, but not from an older state of itself: a
//! container that starts from its image again, or a restored snapshot, has the same directory with
//! files of long ago, and what is missing there would look deleted. So the root carries a random
//! token in an extended attribute, and the index knows which. Where the file system has no such
//! attributes, number and birth have to do.

use std::io;

use rustix::fs::XattrFlags;
use rustix::io::Errno;

use crate::root_dir::DirHandle;
use crate::sync::index::{Index, IndexError};

const NAME: &std::ffi::CStr = c"user.cortex.replica";
/// Longest token that is read; ours are shorter.
const MAX_BYTES: usize = 64;

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
        match rustix::fs::fsetxattr(top, NAME, &token, XattrFlags::empty()) {
            Ok(()) => index.set_replica_token(&token)?,
            Err(errno) => tracing::debug!(%errno, "the root takes no token"),
        }
        return Ok(Replica::Ours);
    };
    let mut buffer = [0; MAX_BYTES];
    match rustix::fs::fgetxattr(top, NAME, &mut buffer) {
        Ok(length) if buffer[..length] == known[..] => Ok(Replica::Ours),
        Ok(_) | Err(Errno::NODATA | Errno::OPNOTSUPP | Errno::RANGE) => Ok(Replica::Other),
        Err(errno) => Err(ReplicaError::Root(errno.into())),
    }
}

#[derive(Debug, thiserror::Error)]
pub(super) enum ReplicaError {
    #[error(transparent)]
    Index(#[from] IndexError),
    #[error("the root directory cannot be read")]
    Root(#[source] io::Error),
}
