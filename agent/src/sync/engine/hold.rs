//! Holding back suspiciously many deletions.
//!
//! A directory that is emptied by mistake, or by a disk that fails, must not empty every other
//! member ([`cortex_shared::mass_delete`]). Everything but the deletions goes on while they are held.
//!
//! The hub judges what it is sent by the same figures and does not rely on this. What it refuses is
//! held here as well, until it is tried again, or an operator has spoken.

use std::collections::VecDeque;
use std::time::Duration;

use cortex_shared::entry::{Entry, same};
use cortex_shared::mass_delete::{WINDOW, is_too_many};
use tokio::time::Instant;

use crate::sync::index::{Index, IndexError};

/// When deletions that the hub refused are tried again: a little later than it forgets the attempt.
pub(super) const REFUSED_RETRY: Duration = Duration::from_secs(65);
/// Rows read from the index at once.
const PAGE_ROWS: u32 = 1024;

/// Deletions that were sent, and when.
#[derive(Debug, Default)]
pub(super) struct Sent(VecDeque<(Instant, usize)>);

impl Sent {
    pub(super) fn add(&mut self, now: Instant, count: usize) {
        self.0.push_back((now, count));
    }

    /// How many were sent within the window.
    pub(super) fn recent(&mut self, now: Instant) -> usize {
        while self.0.front().is_some_and(|(at, _)| now - *at >= WINDOW) {
            self.0.pop_front();
        }
        self.0.iter().map(|(_, count)| count).sum()
    }

    /// When the first of them ceases to count.
    pub(super) fn next_forgotten(&self) -> Option<Instant> {
        self.0.front().map(|(at, _)| *at + WINDOW)
    }
}

/// Whether deleting this loses content: a file that is not empty and is nowhere else here.
pub(super) fn is_lost(index: &Index, entry: Option<&Entry>) -> Result<bool, IndexError> {
    match entry {
        Some(Entry::File(file)) if file.size > 0 => {
            Ok(index.with_content(&file.content, 1)?.is_empty())
        }
        _ => Ok(false),
    }
}

/// Whether the deletions to be sent are held back. Looks at all of them before the first is sent,
/// however many windows they fill.
///
/// Once they are too many by themselves, they wait for somebody's word, or for the files to be back,
/// whatever else changes meanwhile and over restarts.
pub(super) fn must_hold(
    index: &mut Index,
    recent: usize,
    confirmed: bool,
) -> Result<bool, IndexError> {
    let held_before = index.holds_deletions()?;
    let verdict = if confirmed { Verdict::Free } else { judge(index, recent, held_before)? };
    let hold = verdict == Verdict::HoldUntilConfirmed;
    if hold != held_before {
        index.batch(|writer| writer.set_holds_deletions(hold))?;
    }
    Ok(verdict != Verdict::Free)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Free,
    /// Too many only together with those that were sent within the last minute.
    HoldForNow,
    HoldUntilConfirmed,
}

/// Besides those that are too many, all files there were are held, if they were more than one.
fn judge(index: &Index, recent: usize, held_before: bool) -> Result<Verdict, IndexError> {
    let counts = index.counts();
    let (mut losses, mut files) = (0, 0);
    let mut after = None;
    loop {
        let rows = index.gone_here(after.as_ref(), PAGE_ROWS)?;
        let Some(last) = rows.last() else { break };
        after = Some(last.path.clone());
        // If it was changed at the hub meanwhile, that wins over the deletion.
        for row in rows.iter().filter(|row| same(row.base.as_ref(), row.remote.as_ref())) {
            files += u64::from(!row.base.as_ref().is_some_and(Entry::is_dir));
            losses += u64::from(is_lost(index, row.base.as_ref())?);
            let emptied = counts.local == 0 && files > 1;
            if is_too_many(losses, counts.base) || emptied || (held_before && losses > 0) {
                return Ok(Verdict::HoldUntilConfirmed);
            }
        }
    }
    let recent = recent as u64;
    let for_now = losses > 0 && is_too_many(losses + recent, counts.base + recent);
    Ok(if for_now { Verdict::HoldForNow } else { Verdict::Free })
}

#[cfg(test)]
mod tests {
    use cortex_shared::chunk::Recipe;
    use cortex_shared::entry::{Digest, File};
    use cortex_shared::wire_path::WirePath;

    use super::*;
    use crate::sync::index::Seen;

    fn path(name: &str) -> WirePath {
        WirePath::new(name).unwrap()
    }

    fn file(content: &str) -> Entry {
        Entry::File(File {
            content: Digest::of(content.as_bytes()),
            size: content.len() as u64,
            executable: false,
            mtime_ns: 0,
            recipe: Recipe::default(),
        })
    }

    /// An index on which both sides agree.
    fn index(folder: &std::path::Path, files: usize) -> Index {
        let mut index = Index::open(folder).unwrap();
        index
            .batch(|writer| {
                for number in 0..files {
                    let (path, entry) = (path(&format!("f{number}")), file(&number.to_string()));
                    writer.set_local(&path, Seen::Entry(entry.clone(), None))?;
                    writer.set_remote(&path, Some(entry))?;
                }
                Ok(())
            })
            .unwrap();
        index
    }

    fn remove(index: &mut Index, numbers: std::ops::Range<usize>) {
        let absent = |writer: &mut crate::sync::index::Writer<'_>| {
            numbers
                .into_iter()
                .try_for_each(|number| writer.set_local(&path(&format!("f{number}")), Seen::Absent))
        };
        index.batch(absent).unwrap();
    }

    #[test]
    fn deletions_are_held_by_number_by_share_and_if_nothing_is_left() {
        for (files, removed, recent, held) in [
            (1, 1, 0, false),
            (2, 2, 0, true),
            (2, 1, 0, false),
            (3, 2, 0, false),
            (150, 100, 0, false),
            (150, 101, 0, true),
            (150, 1, 100, true),
            (150, 1, 99, false),
            (150, 0, 1000, false),
            (1000, 250, 0, false),
            (1000, 251, 0, true),
            // More than one page of rows, and those beyond it count before the first one goes.
            (4000, 1001, 0, true),
            (4000, 1000, 0, false),
        ] {
            let folder = tempfile::tempdir().unwrap();
            let mut index = index(folder.path(), files);
            remove(&mut index, 0..removed);
            let outcome = must_hold(&mut index, recent, false).unwrap();
            assert_eq!(outcome, held, "{removed} of {files} after {recent}");
        }
    }

    #[test]
    fn renamed_files_and_those_that_were_changed_at_the_hub_are_no_losses() {
        let folder = tempfile::tempdir().unwrap();
        let mut index = index(folder.path(), 300);
        remove(&mut index, 0..300);
        index
            .batch(|writer| {
                for number in 0..150 {
                    let entry = file(&number.to_string());
                    writer.set_local(&path(&format!("g{number}")), Seen::Entry(entry, None))?;
                }
                for number in 150..250 {
                    writer.set_remote(&path(&format!("f{number}")), Some(file("changed")))?;
                }
                Ok(())
            })
            .unwrap();
        assert!(!must_hold(&mut index, 0, false).unwrap());
        assert!(must_hold(&mut index, 51, false).unwrap());
    }

    #[test]
    fn what_is_held_stays_held_until_somebody_says_otherwise_or_it_is_back() {
        let folder = tempfile::tempdir().unwrap();
        let mut index = index(folder.path(), 3);
        remove(&mut index, 0..3);
        assert!(must_hold(&mut index, 0, false).unwrap());
        // Another file arrives, so the workspace is not empty any more.
        let arrive = |writer: &mut crate::sync::index::Writer<'_>| {
            writer.set_local(&path("other"), Seen::Entry(file("other"), None))?;
            writer.set_remote(&path("other"), Some(file("other")))
        };
        index.batch(arrive).unwrap();
        drop(index);
        let mut index = Index::open(folder.path()).unwrap();
        assert!(must_hold(&mut index, 0, false).unwrap(), "over a restart");
        assert!(!must_hold(&mut index, 0, true).unwrap());
        assert!(!must_hold(&mut index, 0, false).unwrap());

        let folder = tempfile::tempdir().unwrap();
        let mut index = self::index(folder.path(), 200);
        remove(&mut index, 0..150);
        assert!(must_hold(&mut index, 0, false).unwrap());
        let restore = |writer: &mut crate::sync::index::Writer<'_>| {
            (0..150).try_for_each(|number| {
                let entry = file(&number.to_string());
                writer.set_local(&path(&format!("f{number}")), Seen::Entry(entry, None))
            })
        };
        index.batch(restore).unwrap();
        assert!(!must_hold(&mut index, 0, false).unwrap());
        remove(&mut index, 0..1);
        assert!(!must_hold(&mut index, 0, false).unwrap(), "forgotten");
        // Only together with what came shortly before: not for longer than that counts.
        assert!(must_hold(&mut index, 100, false).unwrap());
        assert!(!must_hold(&mut index, 0, false).unwrap());
    }

    #[test]
    fn deletions_that_were_sent_are_forgotten_after_a_minute() {
        let mut sent = Sent::default();
        let begun = Instant::now();
        sent.add(begun, 7);
        sent.add(begun + WINDOW / 2, 1);
        assert_eq!(sent.recent(begun + WINDOW / 2), 8);
        assert_eq!(sent.recent(sent.next_forgotten().unwrap()), 1);
        assert_eq!(sent.recent(sent.next_forgotten().unwrap()), 0);
        assert_eq!(sent.next_forgotten(), None);
    }
}
