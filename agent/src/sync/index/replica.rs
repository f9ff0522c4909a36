//! The token of the root that this index belongs to.

use super::{Index, IndexError};

impl Index {
    /// The token that the root carries; `None` if it was never given one.
    ///
    /// # Errors
    /// Those of SQLite.
    pub fn replica_token(&self) -> Result<Option<Vec<u8>>, IndexError> {
        self.meta("replica_token")
    }

    /// Records the token that the root carries.
    ///
    /// # Errors
    /// Those of SQLite.
    pub fn set_replica_token(&mut self, token: &[u8]) -> Result<(), IndexError> {
        self.batch(|writer| writer.set_meta("replica_token", token))
    }
}
