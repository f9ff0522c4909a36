//! Reading what changed after a version.

use cortex_shared::wire_path::WirePath;
use rusqlite::Connection;

use super::super::{Change, ChangesPage, StoreError};
use super::commit::entry_bytes;
use super::tree::{ENTRY_COLUMNS, Paths, damaged, entry_from_row, signed, unsigned};
use super::{head_of, read_head};

/// One page, of one moment. Entries and deletions have numbers of one sequence and are merged by it.
pub(super) fn changes(
    connection: &Connection,
    after_seq: u64,
    budget_bytes: usize,
) -> Result<ChangesPage, StoreError> {
    let head = head_of(&read_head(connection)?)?;
    if after_seq > head.seq {
        return Err(StoreError::BeyondHead { asked: after_seq, head: head.seq });
    }
    let mut entries = connection.prepare_cached(&format!(
        "SELECT e.seq, e.parent_id, e.name, {ENTRY_COLUMNS}
         FROM entries e LEFT JOIN recipes r ON r.digest = e.recipe
         WHERE e.seq > ?1 ORDER BY e.seq"
    ))?;
    let mut entries = entries.query([signed(after_seq)])?;
    let mut deletions =
        connection.prepare_cached("SELECT seq, path FROM deletions WHERE seq > ?1 ORDER BY seq")?;
    let mut deletions = deletions.query([signed(after_seq)])?;
    let mut paths = Paths::new(connection);

    let log_floor: i64 =
        connection.prepare_cached("SELECT log_floor FROM head")?.query_row([], |row| row.get(0))?;
    let log_floor = unsigned(log_floor)?;
    let mut page = ChangesPage { changes: Vec::new(), last_seq: after_seq, head, log_floor };
    let mut left = budget_bytes;
    // Rows stay readable until their cursor moves on, so each side's next one is looked at in place.
    let mut entry = entries.next()?;
    let mut deletion = deletions.next()?;
    loop {
        let seq_of =
            |row: Option<&rusqlite::Row<'_>>| row.map(|row| unsigned(row.get(0)?)).transpose();
        let (entry_seq, deletion_seq) = (seq_of(entry)?, seq_of(deletion)?);
        let next_is_entry = match (entry_seq, deletion_seq) {
            (None, None) => {
                page.last_seq = head.seq;
                return Ok(page);
            }
            (Some(entry), Some(deletion)) => entry < deletion,
            (entry, None) => entry.is_some(),
            (None, Some(_)) => false,
        };
        let change = if let (true, Some(row)) = (next_is_entry, entry) {
            let name: Vec<u8> = row.get(2)?;
            Change {
                seq: unsigned(row.get(0)?)?,
                path: paths.path(row.get(1)?, &name)?,
                entry: Some(entry_from_row(row, 3)?),
            }
        } else {
            let row = deletion.ok_or(damaged("no change where there was one"))?;
            let path =
                WirePath::new(row.get::<_, Vec<u8>>(1)?).map_err(|_| damaged("an invalid path"))?;
            Change { seq: unsigned(row.get(0)?)?, path, entry: None }
        };
        let bytes =
            32 + change.path.as_bytes().len() + change.entry.as_ref().map_or(0, entry_bytes);
        if bytes > left && !page.changes.is_empty() {
            return Ok(page);
        }
        left = left.saturating_sub(bytes);
        page.last_seq = change.seq;
        page.changes.push(change);
        if next_is_entry {
            entry = entries.next()?;
        } else {
            deletion = deletions.next()?;
        }
    }
}
