//! What was sent to the hub, and not answered: the line broke, or the process ended.
//!
//! The hub may have taken it, and may still take it. What it then tells to stand there came from here, and
//! whoever changed it here since had it before him: that is no conflict. So what a commit is to put where is
//! noted before it goes, until a later one has been answered.
//!
//! After a loss of power it no longer holds: the files may be what they were before that was sent.

use std::collections::HashMap;

use cortex_shared::entry::{Digest, Entry};
use cortex_shared::wire_path::WirePath;
use rusqlite::params;

use super::{Index, IndexError, Writer};

/// Commits that are remembered. Each is preceded by a look at what became of those before it, so that more
/// than the last is of use only if the hub was slow to take it.
const COMMITS: u32 = 4;

/// See the module.
#[derive(Debug, Default)]
pub struct Sent(HashMap<WirePath, Vec<Option<Digest>>>);

impl Sent {
    /// Whether this was sent to stand at a path, or that nothing is to stand there.
    #[must_use]
    pub fn holds(&self, path: &WirePath, entry: Option<&Entry>) -> bool {
        self.0.get(path).is_some_and(|sent| sent.contains(&entry.map(Entry::identity)))
    }

    /// Takes over what one commit was to do.
    fn add(&mut self, mut ops: &[u8]) -> Option<()> {
        while !ops.is_empty() {
            let (len, rest) = ops.split_first_chunk::<4>()?;
            let (path, rest) = rest.split_at_checked(u32::from_be_bytes(*len) as usize)?;
            let (&stands, rest) = rest.split_first()?;
            let (identity, rest) = rest.split_at_checked(if stands == 0 { 0 } else { 32 })?;
            let identity = match stands {
                0 => None,
                _ => Some(Digest::from_slice(identity)?),
            };
            self.0.entry(WirePath::new(path).ok()?).or_default().push(identity);
            ops = rest;
        }
        Some(())
    }
}

impl Index {
    /// What is remembered to have been sent.
    ///
    /// # Errors
    /// Those of SQLite, and a damaged row.
    pub fn sent(&self) -> Result<Sent, IndexError> {
        let mut sent = Sent::default();
        let mut rows = self.database.prepare_cached("SELECT ops FROM sent")?;
        let mut rows = rows.query([])?;
        while let Some(row) = rows.next()? {
            let ops = row.get_ref(0)?.as_blob().map_err(rusqlite::Error::from)?;
            sent.add(ops).ok_or(IndexError::Damaged { what: "what was sent" })?;
        }
        Ok(sent)
    }
}

impl Writer<'_> {
    /// Remembers what a commit is to put at which paths.
    ///
    /// # Errors
    /// Those of SQLite.
    pub fn note_sent<'a>(
        &self,
        ops: impl Iterator<Item = (&'a WirePath, Option<&'a Entry>)>,
    ) -> Result<(), IndexError> {
        let mut bytes = Vec::new();
        for (path, entry) in ops {
            let path = path.as_bytes();
            bytes.extend_from_slice(&u32::try_from(path.len()).unwrap_or(u32::MAX).to_be_bytes());
            bytes.extend_from_slice(path);
            bytes.push(u8::from(entry.is_some()));
            bytes.extend(entry.map(Entry::identity).iter().flat_map(Digest::as_bytes));
        }
        self.database.prepare_cached("INSERT INTO sent (ops) VALUES (?)")?.execute([bytes])?;
        self.database
            .prepare_cached("DELETE FROM sent WHERE number <= (SELECT max(number) FROM sent) - ?")?
            .execute(params![COMMITS])?;
        Ok(())
    }

    /// Forgets it all: a later commit was answered, or what stands here need not be younger.
    ///
    /// # Errors
    /// Those of SQLite.
    pub fn forget_sent(&self) -> Result<(), IndexError> {
        self.database.prepare_cached("DELETE FROM sent")?.execute([])?;
        Ok(())
    }

    /// Records what stands at a path at the hub, which is what was sent from here: both sides had it.
    ///
    /// # Errors
    /// Those of SQLite, and a damaged row.
    pub fn set_taken(&mut self, path: &WirePath, entry: Option<Entry>) -> Result<(), IndexError> {
        self.change(path, |found| {
            found.row.base.clone_from(&entry);
            found.row.remote = entry;
        })
    }
}
