//! Reading the past, newest change first.
//!
//! A change is known by what it left: the entry that stands there now, an old version that is kept, or
//! the end of one that was deleted. The three have numbers of one sequence and are merged by it.

use cortex_shared::entry::{Digest, Kind};
use cortex_shared::wire_path::WirePath;
use rusqlite::{Connection, OptionalExtension as _, Row, params};

use super::super::{LogEntry, LogFilter, LogPage, LoggedChange, StoreError};
use super::past::{author, path_of};
use super::schema::ROOT_ID;
use super::tree::{Paths, damaged, kind, signed, unsigned};

/// Changes that one page looks at, whether or not they match: some tenths of a second.
const EXAMINED: usize = 50_000;

/// What the three kinds of rows have in common, from this column on.
const COLUMNS: &str = "author, at_ms, kind, size, content";

pub(super) fn log(connection: &Connection, filter: &LogFilter) -> Result<LogPage, StoreError> {
    let before = signed(filter.before.unwrap_or(u64::MAX));
    let mut standing = connection.prepare_cached(&format!(
        "SELECT seq, parent_id, name, {COLUMNS} FROM entries
         WHERE seq < ?1 AND id != ?2 ORDER BY seq DESC"
    ))?;
    let mut standing = standing.query(params![before, ROOT_ID])?;
    let mut old = connection.prepare_cached(&format!(
        "SELECT seq, path, NULL, {COLUMNS} FROM old_versions WHERE seq < ?1 ORDER BY seq DESC"
    ))?;
    let mut old = old.query([before])?;
    let mut ended = connection.prepare_cached(
        "SELECT ended_seq, path, NULL, ended_by, ended_at_ms, kind, size, content
         FROM old_versions WHERE ended_seq < ?1 AND deleted = 1 ORDER BY ended_seq DESC",
    )?;
    let mut ended = ended.query([before])?;
    let mut paths = Paths::new(connection);

    let mut page = LogPage::default();
    let mut examined = 0;
    let (mut now, mut then, mut gone) = (standing.next()?, old.next()?, ended.next()?);
    loop {
        let seq_of = |row: Option<&Row<'_>>| row.map_or(Ok(-1), |row| row.get::<_, i64>(0));
        let seqs = (seq_of(now)?, seq_of(then)?, seq_of(gone)?);
        let newest = seqs.0.max(seqs.1).max(seqs.2);
        if newest < 0 {
            return Ok(page);
        }
        if page.entries.len() == filter.limit || examined == EXAMINED {
            page.next_before = Some(unsigned(newest)? + 1);
            return Ok(page);
        }
        examined += 1;
        let (row, current, deleted) = match (now, then, gone) {
            (Some(row), _, _) if seqs.0 == newest => (row, true, false),
            (_, Some(row), _) if seqs.1 == newest => (row, false, false),
            (_, _, Some(row)) => (row, false, true),
            _ => return Err(damaged("no change where there was one")),
        };
        let path = if current {
            let name: Vec<u8> = row.get(2)?;
            paths.path(row.get(1)?, &name)?
        } else {
            path_of(row, 1)?
        };
        let asked_for = |wanted: &WirePath| path == *wanted || path.is_below(wanted);
        if filter.path.as_ref().is_none_or(asked_for) {
            let change = if deleted {
                LoggedChange::Deleted
            } else {
                change_of(connection, newest, path.as_bytes())?
            };
            page.entries.push(entry(row, path, change, current)?);
        }
        if current {
            now = standing.next()?;
        } else if deleted {
            gone = ended.next()?;
        } else {
            then = old.next()?;
        }
    }
}

fn entry(
    row: &Row<'_>,
    path: WirePath,
    change: LoggedChange,
    current: bool,
) -> Result<LogEntry, StoreError> {
    let content: Option<Vec<u8>> = row.get(7)?;
    let content = content
        .map(|bytes| Digest::from_slice(&bytes).ok_or(damaged("a digest that is not 32 bytes")))
        .transpose()?;
    let kind = kind(row.get(5)?)?;
    let is_file = matches!(kind, Kind::File | Kind::ExecutableFile);
    Ok(LogEntry {
        seq: unsigned(row.get(0)?)?,
        at_ms: row.get(4)?,
        author: author(row, 3)?,
        path,
        change,
        kind,
        size: if is_file { unsigned(row.get(6)?)? } else { 0 },
        content,
        current,
    })
}

/// What a change that left something was.
fn change_of(connection: &Connection, seq: i64, path: &[u8]) -> Result<LoggedChange, StoreError> {
    let replaced: Option<i64> = connection
        .prepare_cached("SELECT 1 FROM old_versions WHERE ended_seq = ?1")?
        .query_row([seq], |row| row.get(0))
        .optional()?;
    if replaced.is_some() {
        return Ok(LoggedChange::Replaced);
    }
    let forgotten: bool = connection
        .prepare_cached(
            "SELECT EXISTS (SELECT 1 FROM head WHERE history_floor >= ?1)
             OR EXISTS (SELECT 1 FROM thinned WHERE path = ?2 AND until_seq >= ?1)",
        )?
        .query_row(params![seq, path], |row| row.get(0))?;
    Ok(if forgotten { LoggedChange::Written } else { LoggedChange::Created })
}
