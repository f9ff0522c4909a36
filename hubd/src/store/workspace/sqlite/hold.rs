//! Holding back what a member deletes if it is suspiciously much, whatever the member says of it.
//!
//! A member that works holds such deletions itself; this is for one that is broken, or worse. Both go by
//! [`cortex_shared::mass_delete`], and by the same word of an operator. Once deletions of a member were
//! held, all its losses are, until it has not tried for a minute or an operator has spoken: otherwise a
//! member that never ceases would get through piece by piece.

use std::time::Duration;

use cortex_shared::entry::{Digest, Entry};
use cortex_shared::ids::NodeId;
use cortex_shared::mass_delete::{WINDOW, is_too_many};
use rusqlite::{Connection, OptionalExtension as _, params};

use super::super::{HeldMember, StoreError};
use super::tree::{damaged, kept_recipe, signed, unsigned};

/// How long a word of an operator waits for the member to hear of it.
const WORD_WAITS: Duration = Duration::from_secs(24 * 3600);
/// How long it holds once the member knows, and after each use.
const WORD_HOLDS: Duration = Duration::from_secs(600);
/// How long it is said again, unless the member makes use of it: the answer that says so may be lost. No longer,
/// because the member takes it for whatever it holds then.
const SAID_AGAIN: Duration = Duration::from_secs(60);
/// How long a member is listed after its deletions were held.
const LISTED: Duration = Duration::from_secs(600);

/// What a commit removes from the tree.
#[derive(Debug, Default)]
pub(super) struct Removed {
    /// Contents of the files that are not empty, one for each, and their recipes' digests: that a file has this
    /// content is its member's word, and what the recipe says is looked at.
    contents: Vec<(Digest, Option<Digest>)>,
    /// Entries of any kind.
    entries: u64,
}

impl Removed {
    pub(super) fn add(&mut self, entry: &Entry) {
        self.entries += 1;
        if let Entry::File(file) = entry
            && file.size > 0
        {
            let recipe = kept_recipe(&file.recipe).map(|(digest, _)| digest);
            self.contents.push((file.content, recipe));
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.entries == 0
    }

    /// How many of the files were the last with their content. Asked once the commit is applied.
    fn losses(&self, connection: &Connection) -> Result<u64, StoreError> {
        let mut elsewhere = connection.prepare_cached(
            "SELECT 1 FROM entries
             WHERE content = ?1 AND content IS NOT NULL AND size > 0 AND recipe IS ?2 LIMIT 1",
        )?;
        let mut losses = 0;
        for (content, recipe) in &self.contents {
            let recipe = recipe.as_ref().map(Digest::as_bytes);
            losses += u64::from(!elsewhere.exists(params![content.as_bytes(), recipe])?);
        }
        Ok(losses)
    }
}

#[derive(Default)]
struct Hold {
    held_at_ms: Option<i64>,
    allowed: u64,
}

fn millis(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}

/// What becomes of the deletions of a commit.
#[derive(Clone, Copy, Debug)]
pub(super) enum Verdict {
    /// They go: so many losses by the word of an operator, and the rest because they are few.
    Go { by_word: u64, rest: u64 },
    /// They are held: so many losses.
    Held { losses: u64 },
}

/// Judges a commit that has been applied and left so many entries.
pub(super) fn judge(
    connection: &Connection,
    node: NodeId,
    removed: &Removed,
    entries_left: u64,
    now_ms: i64,
) -> Result<Verdict, StoreError> {
    let losses = removed.losses(connection)?;
    let hold = read(connection, node, now_ms)?;
    let by_word = losses.min(hold.allowed);
    let rest = losses - by_word;
    let (recent, gone) = recent(connection, node, now_ms)?;
    let insists = hold.held_at_ms.is_some_and(|at| (0..millis(WINDOW)).contains(&(now_ms - at)));
    let emptied = entries_left == 0 && losses > 1;
    let too_many = is_too_many(rest + recent, entries_left + removed.entries + gone);
    if rest > 0 && (insists || emptied || too_many) {
        return Ok(Verdict::Held { losses });
    }
    Ok(Verdict::Go { by_word, rest })
}

/// Remembers that deletions of a member went.
pub(super) fn note_gone(
    connection: &Connection,
    node: NodeId,
    (by_word, rest): (u64, u64),
    removed: &Removed,
    now_ms: i64,
) -> Result<(), StoreError> {
    // Those of the time to come are of a clock that was put back since.
    connection
        .prepare_cached("DELETE FROM recent_losses WHERE second <= ?1 OR second > ?2")?
        .execute([(now_ms - millis(WINDOW)) / 1000, now_ms / 1000])?;
    connection
        .prepare_cached(
            "INSERT INTO recent_losses (node, second, losses, removed) VALUES (?1, ?2, ?3, ?4)
             ON CONFLICT (node, second) DO UPDATE
             SET losses = losses + excluded.losses, removed = removed + excluded.removed",
        )?
        .execute(params![node.as_bytes(), now_ms / 1000, signed(rest), signed(removed.entries)])?;
    if by_word > 0 {
        connection
            .prepare_cached(
                // Who has not been told may hold others, for which it waits to be.
                "UPDATE holds SET allowed = allowed - ?2, allowed_until_ms = ?3,
                 untold = CASE untold WHEN ?4 THEN 0 ELSE untold END
                 WHERE node = ?1",
            )?
            .execute(params![
                node.as_bytes(),
                signed(by_word),
                now_ms + millis(WORD_HOLDS),
                TOLD
            ])?;
    }
    Ok(())
}

/// Remembers that deletions of a member were held.
pub(super) fn note_held(
    connection: &Connection,
    node: NodeId,
    losses: u64,
    now_ms: i64,
) -> Result<(), StoreError> {
    connection
        .prepare_cached(
            "INSERT INTO holds (node, held_at_ms, held_losses) VALUES (?1, ?2, ?3)
             ON CONFLICT (node) DO UPDATE
             SET held_at_ms = excluded.held_at_ms, held_losses = excluded.held_losses",
        )?
        .execute(params![node.as_bytes(), now_ms, signed(losses)])?;
    Ok(())
}

fn read(connection: &Connection, node: NodeId, now_ms: i64) -> Result<Hold, StoreError> {
    let row: Option<(Option<i64>, i64, i64)> = connection
        .prepare_cached("SELECT held_at_ms, allowed, allowed_until_ms FROM holds WHERE node = ?1")?
        .query_row([node.as_bytes()], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))
        .optional()?;
    let Some((held_at_ms, allowed, until_ms)) = row else { return Ok(Hold::default()) };
    let allowed = if now_ms < until_ms { unsigned(allowed)? } else { 0 };
    Ok(Hold { held_at_ms, allowed })
}

/// Losses of a member within the window, and how many entries all members removed in it.
fn recent(connection: &Connection, node: NodeId, now_ms: i64) -> Result<(u64, u64), StoreError> {
    let (losses, gone): (i64, i64) = connection
        .prepare_cached(
            "SELECT coalesce(sum(CASE node WHEN ?1 THEN losses ELSE 0 END), 0),
                    coalesce(sum(removed), 0)
             FROM recent_losses WHERE second > ?2 AND second <= ?3",
        )?
        .query_row(
            params![node.as_bytes(), (now_ms - millis(WINDOW)) / 1000, now_ms / 1000],
            |row| Ok((row.get(0)?, row.get(1)?)),
        )?;
    Ok((unsigned(losses)?, unsigned(gone)?))
}

/// Lets so many losses of a member go.
pub(super) fn allow(
    connection: &Connection,
    node: NodeId,
    losses: u64,
    now_ms: i64,
) -> Result<(), StoreError> {
    connection
        .prepare_cached(
            "INSERT INTO holds (node, allowed, allowed_until_ms, untold) VALUES (?1, ?2, ?3, 1)
             ON CONFLICT (node) DO UPDATE SET held_at_ms = NULL, held_losses = 0,
             allowed = excluded.allowed, allowed_until_ms = excluded.allowed_until_ms, untold = 1",
        )?
        .execute(params![node.as_bytes(), signed(losses), now_ms + millis(WORD_WAITS)])?;
    Ok(())
}

/// The column `untold`; 0 once the member has made use of the word.
const NOT_TOLD: i64 = 1;
const TOLD: i64 = 2;

/// What a member is to be told of an operator's word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Word {
    None,
    New,
    /// It was told a moment ago, and has made no use of it: the answer may have been lost.
    Again,
}

pub(super) fn word(connection: &Connection, node: NodeId, now_ms: i64) -> Result<Word, StoreError> {
    let row: Option<(i64, i64)> = connection
        .prepare_cached(
            "SELECT untold, allowed_until_ms FROM holds
             WHERE node = ?1 AND untold > 0 AND allowed_until_ms > ?2",
        )?
        .query_row(params![node.as_bytes(), now_ms], |row| Ok((row.get(0)?, row.get(1)?)))
        .optional()?;
    Ok(match row {
        Some((NOT_TOLD, _)) => Word::New,
        // A clock that was put back says it no longer.
        Some((TOLD, until_ms))
            if (0..millis(SAID_AGAIN)).contains(&(now_ms - (until_ms - millis(WORD_HOLDS)))) =>
        {
            Word::Again
        }
        _ => Word::None,
    })
}

/// Notes that the member is told.
pub(super) fn word_told(
    connection: &Connection,
    node: NodeId,
    now_ms: i64,
) -> Result<(), StoreError> {
    connection
        .prepare_cached(
            "UPDATE holds SET untold = ?4, allowed_until_ms = ?3
             WHERE node = ?1 AND untold = ?5 AND allowed_until_ms > ?2",
        )?
        .execute(params![node.as_bytes(), now_ms, now_ms + millis(WORD_HOLDS), TOLD, NOT_TOLD])?;
    Ok(())
}

/// The members whose deletions were held lately.
pub(super) fn held(connection: &Connection, now_ms: i64) -> Result<Vec<HeldMember>, StoreError> {
    let mut statement = connection.prepare_cached(
        "SELECT node, held_losses, held_at_ms FROM holds WHERE held_at_ms > ?1 ORDER BY node",
    )?;
    let held = statement.query_and_then([now_ms - millis(LISTED)], |row| {
        Ok(HeldMember {
            node: NodeId::from_slice(&row.get::<_, Vec<u8>>(0)?)
                .map_err(|_| damaged("a member"))?,
            losses: unsigned(row.get(1)?)?,
            at_ms: row.get(2)?,
        })
    })?;
    held.collect()
}
