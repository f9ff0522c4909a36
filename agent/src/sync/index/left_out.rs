//! Rows of paths that the workspace's rules leave out.
//!
//! Such a row keeps what the hub has there, and nothing else: it is not planned for, so nothing is
//! sent, fetched or deleted. Once the rules let the path in again it differs, and is merged like
//! something that both sides have made.

use cortex_shared::entry::Entry;
use cortex_shared::wire_path::WirePath;

use super::{Index, IndexError};
use crate::sync::ignore::Ignore;
use crate::sync::plan::Row;

/// Rows looked at in one transaction.
const PAGE_ROWS: u32 = 4096;

pub(super) fn is_left_out(ignore: &Ignore, row: &Row) -> bool {
    let is_dir = |entry: &Option<Entry>| matches!(entry, Some(Entry::Dir));
    ignore.ignores(&row.path, is_dir(&row.local) || (row.local.is_none() && is_dir(&row.remote)))
}

impl Index {
    /// Takes over the rules of what is left out. If they are not those the index was written under,
    /// every row is looked at.
    ///
    /// # Errors
    /// Those of SQLite, and a damaged row.
    pub fn set_ignore(&mut self, ignore: Ignore) -> Result<(), IndexError> {
        let version = ignore.version().map(|digest| digest.as_bytes().to_vec()).unwrap_or_default();
        let known = self.meta("ignore")?.unwrap_or_default();
        self.ignore = ignore;
        if known == version {
            return Ok(());
        }
        let mut after = None;
        loop {
            let rows = self.below(None, after.as_ref(), PAGE_ROWS)?;
            let Some(last) = rows.last() else { break };
            after = Some(last.row.path.clone());
            self.batch(|writer| rows.iter().try_for_each(|row| writer.reconsider(row)))?;
        }
        // Last, so that after a crash it is done again.
        self.batch(|writer| writer.set_meta("ignore", &version))
    }

    /// Whether the hub has something below a directory that is left out here.
    ///
    /// # Errors
    /// Those of SQLite, and a damaged row.
    pub fn has_left_out_below(&self, directory: &WirePath) -> Result<bool, IndexError> {
        if self.ignore.version().is_none() {
            return Ok(false);
        }
        let mut after = None;
        loop {
            let rows = self.below(Some(directory), after.as_ref(), PAGE_ROWS)?;
            let Some(last) = rows.last() else { return Ok(false) };
            after = Some(last.row.path.clone());
            let left_out = |row: &Row| row.remote.is_some() && is_left_out(&self.ignore, row);
            if rows.iter().any(|found| left_out(&found.row)) {
                return Ok(true);
            }
        }
    }

    /// Whether the hub deleted anything that is still here.
    ///
    /// # Errors
    /// Those of SQLite.
    pub fn has_gone_there(&self) -> Result<bool, IndexError> {
        let sql = "SELECT 1 FROM entry INDEXED BY entry_dirty WHERE dirty != 0 \
                   AND remote IS NULL AND base IS NOT NULL AND local IS NOT NULL LIMIT 1";
        Ok(self.database.prepare_cached(sql)?.exists([])?)
    }

    /// How many files here are named like conflict copies of their own content.
    ///
    /// # Errors
    /// Those of SQLite, and a damaged row.
    pub fn conflict_copies(&self) -> Result<u64, IndexError> {
        let sql = format!(
            "SELECT {} FROM entry WHERE local IS NOT NULL AND instr(key, CAST('.conflict-' AS BLOB))",
            super::COLUMNS
        );
        let found = self.read_rows(&sql, [])?;
        let is_copy = |row: &Row| {
            let copy = |entry| crate::sync::plan::conflict_of(&row.path, entry);
            row.local.as_ref().and_then(copy).is_some()
        };
        Ok(found.iter().filter(|found| is_copy(&found.row)).count() as u64)
    }
}
