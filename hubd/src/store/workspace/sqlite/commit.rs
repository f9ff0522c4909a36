//! Applying commits: the one place where the tree changes.

use cortex_shared::crash::crash_point;
use cortex_shared::entry::{Digest, Entry};
use cortex_shared::ids::{CommitId, NodeId, WorkspaceEpoch};
use cortex_shared::wire_path::RULES_NAME;
use rusqlite::{Connection, params};

use super::super::{
    Commit, CommitResult, InvalidOp, KnownRules, Op, RejectReason, Rejection, StoreError,
};
use super::hold::{self, Removed, Verdict};
use super::schema::ROOT_ID;
use super::tree::{
    ENTRY_COLUMNS, Found, Made, Tree, damaged, digest, entry_from_row, kept_recipe, signed,
    unsigned,
};
use super::{HeadRow, content, history, past, read_head};

/// Most bytes of entries and missing chunks in one result: more would not fit a message of the
/// protocol (5 MiB) together with its up to 5,000 rejections.
const RESULT_BUDGET_BYTES: usize = 4 * 1024 * 1024;
/// How long a result is kept for a repetition, in milliseconds: a week.
const RESULT_KEPT_MS: i64 = 7 * 24 * 3600 * 1000;
/// How many old results one commit clears away.
const RESULTS_CLEARED: i64 = 16;

/// Carries a commit out, or returns the result it had before.
pub(super) fn commit(
    connection: &Connection,
    commit: &Commit,
    now_ms: i64,
) -> Result<CommitResult, StoreError> {
    if let Some(recorded) = recorded(connection, commit)? {
        return Ok(recorded);
    }
    let head = read_head(connection)?;
    let epoch = WorkspaceEpoch::from_slice(&head.epoch).map_err(|_| damaged("the epoch"))?;
    if epoch != commit.epoch {
        return Err(StoreError::WrongEpoch { asked: commit.epoch, current: epoch });
    }
    let old_seq = head.seq;
    // Operators do as they say; what a member deletes is judged once all of it is applied.
    let deletes = commit.ops.iter().flatten().any(|op| op.new.is_none());
    let (result, head) = match commit.author.node().filter(|_| deletes) {
        Some(node) => apply_judged(connection, commit, node, head, now_ms)?,
        None => {
            let mut work = Work::new(connection, commit, head, now_ms)?;
            (work.apply_all()?, work.head)
        }
    };
    if result.seq == old_seq {
        // Nothing changed, so there is nothing that a repetition could do twice: it is judged anew
        // rather than remembered, and refused commits leave nothing behind.
        return Ok(result);
    }
    history::write_head(connection, &head, now_ms)?;
    record(connection, commit, &result, now_ms)?;
    crash_point("sync.commit.written");
    Ok(result)
}

/// Applies the operations of a member, without its deletions if those are held.
fn apply_judged(
    connection: &Connection,
    commit: &Commit,
    node: NodeId,
    head: HeadRow,
    now_ms: i64,
) -> Result<(CommitResult, HeadRow), StoreError> {
    connection.execute_batch("SAVEPOINT judged")?;
    let mut work = Work::new(connection, commit, head.clone(), now_ms)?;
    let result = work.apply_all()?;
    let verdict = hold::judge(connection, node, &work.removed, work.head.entries, now_ms)?;
    match verdict {
        Verdict::Go { by_word, rest } => {
            connection.execute_batch("RELEASE judged")?;
            if !work.removed.is_empty() {
                hold::note_gone(connection, node, (by_word, rest), &work.removed, now_ms)?;
            }
            Ok((result, work.head))
        }
        Verdict::Held { losses } => {
            connection.execute_batch("ROLLBACK TO judged; RELEASE judged")?;
            hold::note_held(connection, node, losses, now_ms)?;
            let mut work = Work::new(connection, commit, head, now_ms)?;
            work.holds = true;
            Ok((work.apply_all()?, work.head))
        }
    }
}

/// Carries a commit out as a whole: an operation that is rejected undoes the others.
pub(super) fn commit_whole(
    connection: &Connection,
    whole: &Commit,
    now_ms: i64,
) -> Result<CommitResult, StoreError> {
    let result = commit(connection, whole, now_ms)?;
    let Some(rejection) = result.rejected.first() else { return Ok(result) };
    let op = whole.ops.get(rejection.index as usize).and_then(|op| op.as_ref().ok());
    // An error undoes what this request has written.
    Err(StoreError::NotWhole {
        path: op.map(|op| op.path.to_string()).unwrap_or_default(),
        reason: rejection.reason,
    })
}

enum Outcome {
    /// With its number, or 0 if nothing had to change.
    Accepted(u64),
    Rejected(RejectReason, Option<Found>, Vec<Digest>),
}

struct Work<'a> {
    connection: &'a Connection,
    tree: Tree<'a>,
    head: HeadRow,
    budget: usize,
    commit: &'a Commit,
    keep_versions: u32,
    now_ms: i64,
    removed: Removed,
    /// No deletion is accepted.
    holds: bool,
    /// The member went by other rules than the tree has: nothing but those may it change.
    other_rules: bool,
}

impl<'a> Work<'a> {
    fn new(
        connection: &'a Connection,
        commit: &'a Commit,
        head: HeadRow,
        now_ms: i64,
    ) -> Result<Self, StoreError> {
        let tree = Tree::new(connection);
        let other_rules = has_other_rules(&tree, commit.rules)?;
        Ok(Self {
            connection,
            tree,
            other_rules,
            head,
            budget: RESULT_BUDGET_BYTES,
            commit,
            keep_versions: past::settings(connection)?.keep_versions,
            now_ms,
            removed: Removed::default(),
            holds: false,
        })
    }

    fn apply_all(&mut self) -> Result<CommitResult, StoreError> {
        let mut result =
            CommitResult { seq: 0, root: Digest::ZERO, rejected: Vec::new(), seqs: Vec::new() };
        for (index, op) in (0..).zip(&self.commit.ops) {
            match self.apply(op)? {
                Outcome::Accepted(seq) => result.seqs.push(seq),
                Outcome::Rejected(reason, found, missing) => {
                    result.rejected.push(self.rejection(index, reason, found, missing)?);
                }
            }
        }
        if let Some(root) = self.tree.refresh_digests()? {
            self.head.root = root;
        }
        (result.seq, result.root) = (self.head.seq, self.head.root);
        Ok(result)
    }

    fn apply(&mut self, op: &Result<Op, InvalidOp>) -> Result<Outcome, StoreError> {
        let Ok(op) = op else {
            return Ok(Outcome::Rejected(RejectReason::Invalid, None, Vec::new()));
        };
        if self.other_rules && !concerns_rules(op) {
            return Ok(Outcome::Rejected(RejectReason::Rules, None, Vec::new()));
        }
        let Some(parent) = self.tree.parent(&op.path)? else {
            return Ok(match op.new {
                // Nothing can stand there, which is what the member wants.
                None => Outcome::Accepted(0),
                Some(_) => Outcome::Rejected(RejectReason::NoParent, None, Vec::new()),
            });
        };
        let found = self.tree.find(parent.0, op.path.name())?;
        let current = found.as_ref().map(|found| found.identity);
        if current == op.new.as_ref().map(Entry::identity) {
            self.note_conflict(op)?;
            return Ok(Outcome::Accepted(0));
        }
        if current != op.expected {
            return Ok(Outcome::Rejected(RejectReason::Conflict, found, Vec::new()));
        }
        if self.holds && op.new.is_none() {
            return Ok(Outcome::Rejected(RejectReason::Held, found, Vec::new()));
        }
        if let Some(found) = &found
            && found.identity == Entry::Dir.identity()
            && self.tree.has_children(found.id)?
        {
            // The new entry is none or of another kind: an equal one was accepted above.
            return Ok(Outcome::Rejected(RejectReason::NotEmpty, Some(*found), Vec::new()));
        }
        if let Some(Entry::File(file)) = &op.new {
            let mut missing = Vec::new();
            for chunk in file.chunks() {
                match content::len_of(self.connection, &chunk.hash)? {
                    None => missing.push(chunk.hash),
                    Some(len) if len != i64::from(chunk.len) => {
                        return Ok(Outcome::Rejected(RejectReason::Invalid, found, Vec::new()));
                    }
                    Some(_) => {}
                }
            }
            if !missing.is_empty() {
                return Ok(Outcome::Rejected(RejectReason::MissingChunks, found, missing));
            }
        }
        if let Some(found) = &found {
            let entry = self.tree.entry(found.id)?;
            self.protect(&entry)?;
            if op.new.is_none() {
                self.removed.add(&entry);
            }
        }
        if let Some(new) = &op.new {
            self.protect(new)?;
        }
        self.head.seq += 1;
        let seq = self.head.seq;
        self.count(found.as_ref(), op.new.as_ref());
        if let Some(found) = &found {
            let end = past::End {
                seq,
                at_ms: self.now_ms,
                author: &self.commit.author,
                deleted: op.new.is_none(),
            };
            past::keep(self.connection, found.id, &op.path, &end, self.keep_versions)?;
        }
        match (&op.new, &found) {
            (Some(new), found) => {
                let made = Made { seq, at_ms: self.now_ms, author: &self.commit.author };
                self.tree.put(&op.path, parent, found.as_ref(), new, &made)?;
                self.connection
                    .prepare_cached("DELETE FROM deletions WHERE path = ?1")?
                    .execute([op.path.as_bytes()])?;
            }
            (None, Some(found)) => {
                self.tree.remove(&op.path, parent, found)?;
                self.connection
                    .prepare_cached(
                        "INSERT OR REPLACE INTO deletions (path, seq, at_ms) VALUES (?1, ?2, ?3)",
                    )?
                    .execute(params![op.path.as_bytes(), signed(seq), self.now_ms])?;
            }
            (None, None) => return Err(damaged("two answers for one path")),
        }
        self.note_conflict(op)?;
        Ok(Outcome::Accepted(seq))
    }

    /// Keeps content that the tree begins or ceases to name from being collected for a while:
    /// members may be about to fetch it, or to name it again.
    fn protect(&self, entry: &Entry) -> Result<(), StoreError> {
        let Entry::File(file) = entry else { return Ok(()) };
        for chunk in file.chunks() {
            content::renew(self.connection, &chunk.hash, self.now_ms)?;
        }
        Ok(())
    }

    fn count(&mut self, found: Option<&Found>, new: Option<&Entry>) {
        if let Some(found) = found {
            self.head.entries -= 1;
            self.head.content_bytes -= found.size;
        }
        if let Some(new) = new {
            self.head.entries += 1;
            if let Entry::File(file) = new {
                self.head.content_bytes += file.size;
            }
        }
    }

    /// A conflict is listed as long as its copy exists.
    fn note_conflict(&self, op: &Op) -> Result<(), StoreError> {
        match (&op.new, &op.conflict_of) {
            (Some(_), Some(path)) => {
                // Two members with the same losing content make the same copy: the first is named.
                self.connection
                    .prepare_cached(
                        "INSERT OR IGNORE INTO conflicts (copy, path, node, at_ms)
                         VALUES (?1, ?2, ?3, ?4)",
                    )?
                    .execute(params![
                        op.path.as_bytes(),
                        path.as_bytes(),
                        self.commit.author.encode(),
                        self.now_ms,
                    ])?;
            }
            (None, _) => {
                self.connection
                    .prepare_cached("DELETE FROM conflicts WHERE copy = ?1")?
                    .execute([op.path.as_bytes()])?;
            }
            (Some(_), None) => {}
        }
        Ok(())
    }

    fn rejection(
        &mut self,
        index: u32,
        reason: RejectReason,
        found: Option<Found>,
        mut missing: Vec<Digest>,
    ) -> Result<Rejection, StoreError> {
        // The first one always fits: 5,000 of them are 160 kB.
        missing.truncate((self.budget / 32).max(1));
        self.budget = self.budget.saturating_sub(missing.len() * 32);
        let mut rejection = Rejection { index, reason, current: None, current_seq: 0, missing };
        if let Some(found) = found {
            rejection.current_seq = found.seq;
            let entry = self.tree.entry(found.id)?;
            let bytes = entry_bytes(&entry);
            if bytes <= self.budget {
                self.budget -= bytes;
                rejection.current = Some(entry);
            }
        }
        Ok(rejection)
    }
}

/// Whether a member went by other rules than the tree has.
fn has_other_rules(tree: &Tree<'_>, known: KnownRules) -> Result<bool, StoreError> {
    if known == KnownRules::Unsaid {
        return Ok(false);
    }
    let now = match tree.find(ROOT_ID, RULES_NAME)? {
        Some(found) => match tree.entry(found.id)? {
            Entry::File(file) => KnownRules::Content(file.content),
            Entry::Link { .. } | Entry::Dir => KnownRules::Nothing,
        },
        None => KnownRules::Nothing,
    };
    Ok(now != known)
}

fn concerns_rules(op: &Op) -> bool {
    [Some(&op.path), op.conflict_of.as_ref()]
        .into_iter()
        .flatten()
        .any(|path| path.as_bytes() == RULES_NAME)
}

/// About how many bytes an entry takes in a message.
pub(super) fn entry_bytes(entry: &Entry) -> usize {
    64 + match entry {
        Entry::File(file) => file.recipe.0.len() * cortex_shared::chunk::CHUNK_REF_BYTES,
        Entry::Link { target } => target.len(),
        Entry::Dir => 0,
    }
}

fn record(
    connection: &Connection,
    commit: &Commit,
    result: &CommitResult,
    now_ms: i64,
) -> Result<(), StoreError> {
    connection
        .prepare_cached(
            "DELETE FROM commits WHERE commit_id IN
             (SELECT commit_id FROM commits WHERE at_ms < ?1 ORDER BY at_ms LIMIT ?2)",
        )?
        .execute([now_ms - RESULT_KEPT_MS, RESULTS_CLEARED])?;
    let seqs: Vec<u8> = result.seqs.iter().flat_map(|seq| seq.to_be_bytes()).collect();
    connection
        .prepare_cached(
            "INSERT INTO commits (commit_id, node, at_ms, seq, root, seqs)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
        )?
        .execute(params![
            commit.id.as_bytes(),
            commit.author.encode(),
            now_ms,
            signed(result.seq),
            result.root.as_bytes(),
            seqs,
        ])?;
    let mut insert = connection.prepare_cached(
        "INSERT INTO rejections (commit_id, position, reason, missing, kind, size, mtime_ns,
         content, recipe, target, current_seq) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11)",
    )?;
    for rejection in &result.rejected {
        let missing: Vec<u8> = rejection.missing.iter().flat_map(|hash| *hash.as_bytes()).collect();
        let (file, target) = match &rejection.current {
            Some(Entry::File(file)) => (Some(file), None),
            Some(Entry::Link { target }) => (None, Some(target)),
            Some(Entry::Dir) | None => (None, None),
        };
        // The recipe itself rests in its table, under its digest, as long as the result does.
        let recipe = file.and_then(|file| kept_recipe(&file.recipe));
        let recipe = recipe.map(|(digest, _)| *digest.as_bytes());
        insert.execute(params![
            commit.id.as_bytes(),
            rejection.index,
            rejection.reason as u8,
            missing,
            rejection.current.as_ref().map(|entry| entry.kind() as u8),
            file.map(|file| signed(file.size)),
            file.map(|file| file.mtime_ns),
            file.map(|file| *file.content.as_bytes()),
            recipe,
            target,
            signed(rejection.current_seq),
        ])?;
    }
    Ok(())
}

fn recorded(connection: &Connection, commit: &Commit) -> Result<Option<CommitResult>, StoreError> {
    let mut statement = connection
        .prepare_cached("SELECT node, seq, root, seqs FROM commits WHERE commit_id = ?1")?;
    let mut rows = statement.query([commit.id.as_bytes()])?;
    let Some(row) = rows.next()? else { return Ok(None) };
    if row.get::<_, Vec<u8>>(0)? != commit.author.encode() {
        return Err(StoreError::ForeignCommit { commit: commit.id });
    }
    let seqs: Vec<u8> = row.get(3)?;
    Ok(Some(CommitResult {
        seq: unsigned(row.get(1)?)?,
        root: digest(&row.get::<_, Vec<u8>>(2)?)?,
        rejected: recorded_rejections(connection, commit.id)?,
        seqs: seqs.as_chunks::<8>().0.iter().map(|seq| u64::from_be_bytes(*seq)).collect(),
    }))
}

fn recorded_rejections(
    connection: &Connection,
    commit: CommitId,
) -> Result<Vec<Rejection>, StoreError> {
    let mut statement = connection.prepare_cached(&format!(
        "SELECT e.position, e.reason, e.missing, e.current_seq, {ENTRY_COLUMNS}
         FROM rejections e LEFT JOIN recipes r ON r.digest = e.recipe
         WHERE e.commit_id = ?1 ORDER BY e.position"
    ))?;
    let rejections = statement.query_and_then([commit.as_bytes()], |row| {
        let missing: Vec<u8> = row.get(2)?;
        let known = row.get::<_, Option<i64>>(4)?.is_some();
        Ok(Rejection {
            index: row.get(0)?,
            reason: reject_reason(row.get(1)?)?,
            current: if known { Some(entry_from_row(row, 4)?) } else { None },
            current_seq: unsigned(row.get(3)?)?,
            missing: missing.as_chunks::<32>().0.iter().map(|h| Digest::from_bytes(*h)).collect(),
        })
    })?;
    rejections.collect()
}

fn reject_reason(number: i64) -> Result<RejectReason, StoreError> {
    use RejectReason::{Conflict, Held, Invalid, MissingChunks, NoParent, NotEmpty, Rules};
    [Conflict, NoParent, NotEmpty, MissingChunks, Invalid, Held, Rules]
        .into_iter()
        .find(|reason| *reason as i64 == number)
        .ok_or(damaged("an unknown reason of a rejection"))
}
