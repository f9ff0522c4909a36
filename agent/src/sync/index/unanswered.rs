//! A commit that was sent to the hub and not answered: the line broke, or the process ended.
//!
//! What a commit is to put where is noted before it goes. The next look at the hub asks first what became of
//! it, by its idempotency key. What the hub took of it was here when it was sent, so whatever stands here now
//! comes after it: that is no conflict.
//!
//! After a loss of power that no longer holds, since files may be what they were before that was sent.

use cortex_shared::entry::Entry;
use cortex_shared::ids::CommitId;
use cortex_shared::wire_path::WirePath;
use rusqlite::{OptionalExtension as _, params};

use super::left_out::is_left_out;
use super::{Index, IndexError, Writer, codec};
use crate::sync::plan::PushOp;

/// What a commit was to do at a path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SentOp {
    /// Where.
    pub path: WirePath,
    /// What was to stand there.
    pub new: Option<Entry>,
    /// It stood there here as well; else it was put together of both sides, or somebody else's.
    pub ours: bool,
}

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unanswered {
    /// Under which the hub knows it, if it took it.
    pub id: CommitId,
    /// Its operations, in order.
    pub ops: Vec<SentOp>,
}

const OURS: u8 = 1;
const STANDS: u8 = 2;

/// For each operation the path, what is known of it, and the entry; lengths are big-endian 32-bit numbers.
fn encode(ops: &[PushOp]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut put = |part: &[u8]| {
        let len = u32::try_from(part.len()).expect("a commit is bounded");
        bytes.extend_from_slice(&len.to_be_bytes());
        bytes.extend_from_slice(part);
    };
    for op in ops {
        put(op.path.as_bytes());
        let ours = if op.ours { OURS } else { 0 };
        put(&[ours | if op.new.is_some() { STANDS } else { 0 }]);
        put(&op.new.as_ref().map(codec::encode).unwrap_or_default());
    }
    bytes
}

fn decode(mut bytes: &[u8]) -> Option<Vec<SentOp>> {
    let mut ops = Vec::new();
    while !bytes.is_empty() {
        let mut part = || {
            let (len, rest) = bytes.split_first_chunk::<4>()?;
            let (part, rest) = rest.split_at_checked(u32::from_be_bytes(*len) as usize)?;
            bytes = rest;
            Some(part)
        };
        let path = WirePath::new(part()?).ok()?;
        let &[flags] = part()? else { return None };
        let new = part()?;
        let new = if flags & STANDS != 0 { Some(codec::decode(new)?) } else { None };
        ops.push(SentOp { path, new, ours: flags & OURS != 0 });
    }
    Some(ops)
}

impl Index {
    /// The last commit that was sent, if it was not answered.
    ///
    /// # Errors
    /// Those of SQLite, and a damaged row.
    pub fn unanswered(&self) -> Result<Option<Unanswered>, IndexError> {
        let mut statement = self.database.prepare_cached("SELECT id, ops FROM unanswered")?;
        let row = statement.query_row([], |row| Ok((row.get(0)?, row.get(1)?))).optional()?;
        let Some((id, ops)): Option<(Vec<u8>, Vec<u8>)> = row else { return Ok(None) };
        let damaged = IndexError::Damaged { what: "what was sent" };
        let (Ok(id), Some(ops)) = (CommitId::from_slice(&id), decode(&ops)) else {
            return Err(damaged);
        };
        Ok(Some(Unanswered { id, ops }))
    }
}

impl Writer<'_> {
    /// Notes a commit that is about to be sent, in place of the one before.
    ///
    /// # Errors
    /// Those of SQLite.
    pub fn note_sent(&self, id: CommitId, ops: &[PushOp]) -> Result<(), IndexError> {
        self.forget_sent()?;
        self.database
            .prepare_cached("INSERT INTO unanswered (id, ops) VALUES (?, ?)")?
            .execute(params![id.as_bytes(), encode(ops)])?;
        Ok(())
    }

    /// Forgets it: it was answered, or what stands here need not come after it.
    ///
    /// # Errors
    /// Those of SQLite.
    pub fn forget_sent(&self) -> Result<(), IndexError> {
        self.database.prepare_cached("DELETE FROM unanswered")?.execute([])?;
        Ok(())
    }

    /// Records that the hub put an entry at a path, which stood there here when it was sent: both sides had it.
    /// Of what is left out here by now, only what the hub has is known.
    ///
    /// # Errors
    /// Those of SQLite, and a damaged row.
    pub fn set_taken(&mut self, path: &WirePath, entry: Option<Entry>) -> Result<(), IndexError> {
        let ignore = self.ignore;
        self.change(path, |found| {
            found.row.remote.clone_from(&entry);
            if !is_left_out(ignore, &found.row) {
                found.row.base = entry;
            }
        })
    }
}
