//! Taking over a complete listing of the hub's tree: what it does not name is not there.
//!
//! The names are gathered in a table of this connection. A listing that is cut off is forgotten with the
//! cursor unmoved; until then Remote only gains what is really there, so that nothing looks deleted that
//! was merely not read yet.

use cortex_shared::wire_path::WirePath;

use super::{IndexError, Writer};

impl Writer<'_> {
    /// A listing begins.
    ///
    /// # Errors
    /// Those of SQLite.
    pub fn begin_listing(&mut self) -> Result<(), IndexError> {
        self.database.execute_batch(
            "CREATE TEMP TABLE IF NOT EXISTS listed (key BLOB PRIMARY KEY) WITHOUT ROWID;
             DELETE FROM temp.listed;",
        )?;
        Ok(())
    }

    /// It names this path.
    ///
    /// # Errors
    /// Those of SQLite.
    pub fn list(&mut self, path: &WirePath) -> Result<(), IndexError> {
        self.database
            .prepare_cached("INSERT OR IGNORE INTO temp.listed VALUES (?)")?
            .execute([path.sort_key()])?;
        Ok(())
    }

    /// It is over: nothing else stands at the hub.
    ///
    /// # Errors
    /// Those of SQLite, and a damaged row.
    pub fn end_listing(&mut self) -> Result<(), IndexError> {
        let gone = self
            .database
            .prepare_cached(
                "SELECT key FROM entry WHERE remote IS NOT NULL
                 AND key NOT IN (SELECT key FROM temp.listed)",
            )?
            .query_map([], |row| row.get::<_, Vec<u8>>(0))?
            .collect::<Result<Vec<_>, _>>()?;
        for key in gone {
            let path =
                WirePath::from_sort_key(&key).map_err(|_| IndexError::Damaged { what: "path" })?;
            self.set_remote(&path, None)?;
        }
        self.database.execute("DELETE FROM temp.listed", [])?;
        Ok(())
    }
}
