//! Reading the index beside its owner.

use std::path::Path;
use std::time::Duration;

use rusqlite::{Connection, OpenFlags};

use super::{Counts, FILE_NAME, Index, IndexError, SCHEMA_VERSION};
use crate::sync::ignore::Ignore;

/// How long a reader waits where the owner changes the file's mode, which it does when it opens it.
const PATIENCE: Duration = Duration::from_millis(300);

impl Index {
    /// Opens an index for reading, while its engine may be writing to it. `None` if there is none.
    ///
    /// # Errors
    /// If SQLite refuses, or the index is of another version.
    pub fn open_for_reading(folder: &Path) -> Result<Option<Self>, IndexError> {
        let path = folder.join(FILE_NAME);
        if !path.exists() {
            return Ok(None);
        }
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let database = Connection::open_with_flags(path, flags)?;
        database.busy_timeout(PATIENCE)?;
        let version: i64 = database.pragma_query_value(None, "user_version", |row| row.get(0))?;
        if version != SCHEMA_VERSION {
            return Err(IndexError::Damaged { what: "schema version" });
        }
        Ok(Some(Self { database, counts: Counts::default(), ignore: Ignore::default() }))
    }
}
