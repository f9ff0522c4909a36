//! Writing to the index. Totals, agreement and difference are kept up to date with every row.

use cortex_shared::entry::{Digest, Entry};
use cortex_shared::wire_path::WirePath;
use rusqlite::{Connection, params};

use super::left_out::is_left_out;
use super::power::DISTRUSTED;
use super::{Counts, Cursor, Displaced, IndexError, IndexRow, Seen, bounded, codec, differs, get};
use crate::root_dir::DirIdentity;
use crate::sync::ignore::Ignore;
use crate::sync::plan::{Row, settled_base};

/// Writes within one transaction.
pub struct Writer<'a> {
    pub(super) database: &'a Connection,
    counts: Counts,
    pub(super) ignore: &'a Ignore,
}

impl<'a> Writer<'a> {
    pub(super) fn new(database: &'a Connection, counts: Counts, ignore: &'a Ignore) -> Self {
        Self { database, counts, ignore }
    }

    /// Writes the totals down if they are not `before` any more, and returns them.
    pub(super) fn finish(self, before: Counts) -> Result<Counts, IndexError> {
        if self.counts != before {
            self.set_meta("local_count", &self.counts.local.to_be_bytes())?;
            self.set_meta("base_count", &self.counts.base.to_be_bytes())?;
        }
        Ok(self.counts)
    }

    /// Records what stands at a path here. The stamp of a directory is not kept; it only tells what was
    /// there before a loss of power.
    ///
    /// # Errors
    /// Those of SQLite, and a damaged row.
    pub fn set_local(&mut self, path: &WirePath, seen: Seen) -> Result<(), IndexError> {
        let mut lost = false;
        self.change(path, |found| match seen {
            Seen::Absent => {
                lost = found.is_lost();
                found.row.base.take_if(|_| lost);
                (found.row.local, found.row.unknown, found.stamp) = (None, false, None);
            }
            Seen::Entry(entry, stamp) => {
                found.row.base = found.base_of_found(&entry, stamp.as_ref());
                found.stamp = stamp.filter(|_| !entry.is_dir());
                (found.row.local, found.row.unknown) = (Some(entry), false);
            }
            // The stamp stays: after a loss of power it tells how old what was known is.
            Seen::Unknown => found.row.unknown = true,
        })?;
        // What comes back needs the directories above it.
        for directory in path.ancestors().filter(|_| lost) {
            self.change(&directory, |found| {
                found.row.base.take_if(|base| found.row.local.is_none() && base.is_dir());
            })?;
        }
        Ok(())
    }

    /// Records what stands at a path at the hub.
    ///
    /// # Errors
    /// Those of SQLite, and a damaged row.
    pub fn set_remote(&mut self, path: &WirePath, entry: Option<Entry>) -> Result<(), IndexError> {
        self.change(path, |found| found.row.remote = entry)
    }

    /// Records that nothing stands below `directory` any more.
    ///
    /// # Errors
    /// Those of SQLite, and a damaged row.
    pub fn set_absent_below(&mut self, directory: &WirePath) -> Result<(), IndexError> {
        let sql = "SELECT key FROM entry WHERE key > ? AND key < ? \
                   AND (local IS NOT NULL OR unknown != 0)";
        let range = [bounded(directory, 0), bounded(directory, 1)];
        let keys = self
            .database
            .prepare_cached(sql)?
            .query_map(range, |row| row.get::<_, Vec<u8>>(0))?
            .collect::<Result<Vec<_>, _>>()?;
        for key in keys {
            let path =
                WirePath::from_sort_key(&key).map_err(|_| IndexError::Damaged { what: "path" })?;
            self.set_local(&path, Seen::Absent)?;
        }
        Ok(())
    }

    /// Records how far the hub's history is in Remote.
    ///
    /// # Errors
    /// Those of SQLite.
    pub fn set_cursor(&mut self, cursor: Cursor) -> Result<(), IndexError> {
        self.set_meta("epoch", cursor.epoch.as_bytes())?;
        self.set_meta("seq", &cursor.seq.to_be_bytes())
    }

    /// Records the newest head that the hub told of. It has to be of the cursor's epoch.
    ///
    /// # Errors
    /// Those of SQLite.
    pub fn set_known_head(&self, seq: u64, root: &Digest) -> Result<(), IndexError> {
        self.set_meta("head_seq", &seq.to_be_bytes())?;
        self.set_meta("head_root", root.as_bytes())
    }

    /// Remembers a file that was displaced.
    ///
    /// # Errors
    /// Those of SQLite.
    pub fn note_displaced(&self, file: &Displaced) -> Result<(), IndexError> {
        let Displaced { name, path, size, mtime_ns, content } = file;
        let content = content.as_ref().map(Digest::as_bytes);
        self.database
            .prepare_cached("INSERT OR REPLACE INTO displaced VALUES (?, ?, ?, ?, ?)")?
            .execute(params![name, path.as_bytes(), size.cast_signed(), mtime_ns, content])?;
        Ok(())
    }

    /// Forgets a displaced file.
    ///
    /// # Errors
    /// Those of SQLite.
    pub fn forget_displaced(&self, name: &[u8]) -> Result<(), IndexError> {
        self.database.prepare_cached("DELETE FROM displaced WHERE name = ?")?.execute([name])?;
        Ok(())
    }

    /// Records whether deletions wait for somebody's word.
    ///
    /// # Errors
    /// Those of SQLite.
    pub fn set_holds_deletions(&self, hold: bool) -> Result<(), IndexError> {
        if hold {
            return self.set_meta("holds_deletions", &[]);
        }
        self.database.execute("DELETE FROM meta WHERE name = 'holds_deletions'", [])?;
        Ok(())
    }

    /// Records which directory is the root.
    ///
    /// # Errors
    /// Those of SQLite.
    pub fn set_root(&mut self, root: DirIdentity) -> Result<(), IndexError> {
        self.set_meta("root_ino", &root.ino.to_be_bytes())?;
        self.set_meta("root_born", &root.born_ns.to_be_bytes())
    }

    /// Forgets Base and Remote: the history at the hub is another one. What follows merges both
    /// sides and deletes nothing.
    ///
    /// # Errors
    /// Those of SQLite.
    pub fn forget_history(&mut self) -> Result<(), IndexError> {
        self.database.execute("DELETE FROM entry WHERE local IS NULL AND unknown = 0", [])?;
        self.database.execute("UPDATE entry SET base = NULL, remote = NULL, dirty = 1", [])?;
        self.database.execute(
            "DELETE FROM meta WHERE name IN ('epoch', 'seq', 'head_seq', 'head_root')",
            [],
        )?;
        self.counts.base = 0;
        self.forget_sent()
    }

    /// Applies the rules of what is left out to a row that was written under others.
    pub(super) fn reconsider(&mut self, found: &IndexRow) -> Result<(), IndexError> {
        if is_left_out(self.ignore, &found.row) {
            self.change(&found.row.path, |found| {
                (found.row.local, found.row.unknown, found.stamp) = (None, false, None);
                found.row.base = None;
            })?;
        }
        // Whether it differs, and so is planned for, follows from the rules as well.
        let Some(found) = get(self.database, &found.row.path)? else { return Ok(()) };
        let (dirty, key) = (self.is_dirty(&found.row), found.row.path.sort_key());
        self.database
            .prepare_cached("UPDATE entry SET dirty = ?1 WHERE key = ?2 AND dirty != ?1")?
            .execute(params![dirty, key])?;
        Ok(())
    }

    fn is_dirty(&self, row: &Row) -> bool {
        differs(row) && !is_left_out(self.ignore, row)
    }

    pub(super) fn set_meta(&self, name: &str, value: &[u8]) -> Result<(), IndexError> {
        self.database
            .prepare_cached("INSERT OR REPLACE INTO meta VALUES (?, ?)")?
            .execute(params![name, value])?;
        Ok(())
    }

    pub(super) fn change(
        &mut self,
        path: &WirePath,
        change: impl FnOnce(&mut IndexRow),
    ) -> Result<(), IndexError> {
        let before = get(self.database, path)?;
        let mut after = before.clone().unwrap_or_else(|| IndexRow {
            row: Row { path: path.clone(), base: None, local: None, remote: None, unknown: false },
            stamp: None,
        });
        change(&mut after);
        let row = &mut after.row;
        row.base =
            settled_base(row.base.take(), row.local.as_ref(), row.remote.as_ref(), row.unknown);
        if before.as_ref() == Some(&after) {
            return Ok(());
        }
        self.count(before.as_ref().map(|found| &found.row), &after.row);
        self.write(&after)
    }

    fn count(&mut self, before: Option<&Row>, after: &Row) {
        let local = |row: &Row| u64::from(row.local.as_ref().is_some_and(|entry| !entry.is_dir()));
        let base = |row: &Row| u64::from(row.base.is_some());
        let adjust = |count: &mut u64, before: u64, after: u64| {
            *count = (*count + after).saturating_sub(before);
        };
        adjust(&mut self.counts.local, before.map_or(0, local), local(after));
        adjust(&mut self.counts.base, before.map_or(0, base), base(after));
    }

    fn write(&mut self, found: &IndexRow) -> Result<(), IndexError> {
        let row = &found.row;
        let key = row.path.sort_key();
        let nothing = row.base.is_none() && row.local.is_none() && row.remote.is_none();
        if nothing && !row.unknown {
            self.database.prepare_cached("DELETE FROM entry WHERE key = ?")?.execute([key])?;
            return Ok(());
        }
        let content = match &row.local {
            Some(Entry::File(file)) if file.size > 0 => Some(file.content.as_bytes()),
            _ => None,
        };
        let encode = |entry: &Option<Entry>| entry.as_ref().map(codec::encode);
        let stamp = found.stamp;
        self.database
            .prepare_cached(
                "INSERT OR REPLACE INTO entry VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            )?
            .execute(params![
                key,
                encode(&row.base),
                encode(&row.local),
                encode(&row.remote),
                row.unknown,
                self.is_dirty(row),
                content,
                stamp.map(|s| s.dev.cast_signed()),
                stamp.map(|s| s.ino.cast_signed()),
                stamp.map(|s| s.size.cast_signed()),
                stamp.map(|s| s.mtime_ns),
                stamp.map(|s| s.ctime_ns),
                stamp.map(|s| i64::from(s.racy) | if s.distrusted { DISTRUSTED } else { 0 }),
            ])?;
        Ok(())
    }
}
