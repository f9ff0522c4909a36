//! Verification of the audit log.
//!
//! Each line holds the hash of the line before, so that a line that is edited, removed from the middle
//! or put in between no longer fits. What the chain alone cannot show is a cut at its end, or a log that
//! was written anew as a whole. While the hub runs it remembers its last line, appends to no other, and
//! compares. For the time when it does not, number and hash of that line are kept in a second place,
//! the *mark*: a file beside the database, moved on every minute, at each verification and at shutdown,
//! and never moved on a log that does not continue it; and each move is logged, so that it also stands
//! wherever the hub's log goes.
//!
//! A mark that is missing or damaged is a problem like any other. An administrator can accept a log whose
//! lines fit together but not with the mark, such as one from a backup; that is a line of the log itself.
//!
//! What this covers, and what not: whoever can write the database alone is found out, but for lines
//! younger than the mark if the hub was killed before they were cut off. Whoever can write the whole data directory can make a new log and a mark that
//! fits; against that only the copies of the mark in the hub's log help, on a machine out of reach.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use cortex_shared::clock::unix_ms;
use cortex_shared::durable;
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::sync::Mutex;

use crate::store::{Actor, AuditHead, AuditLine, Store, StoreError};

/// Lines read at a time.
pub const PAGE_LINES: u32 = 256;
/// A mark is far smaller.
const MAX_MARK_BYTES: u64 = 1024;

/// Why the log could not be verified or marked.
#[derive(Debug, thiserror::Error)]
pub enum AuditError {
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The mark.
    #[error("cannot use the mark {path}")]
    Mark {
        /// Its file.
        path: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

/// What a verification found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verification {
    /// Lines that were read.
    pub entries: u64,
    /// Number and hash of the last good line.
    pub head: AuditHead,
    /// The first thing that does not fit.
    pub problem: Option<AuditProblem>,
}

/// Something that does not fit.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AuditProblem {
    /// Lines are missing, or one stands where none belongs.
    #[error("line {expected} is missing: line {found} stands in its place")]
    Numbering {
        /// The number that belongs here.
        expected: u64,
        /// The number that is here.
        found: u64,
    },
    /// The line before is not the one that it was written after.
    #[error("line {seq} does not follow from the line before it")]
    Unchained {
        /// Its number.
        seq: u64,
    },
    /// The line is not as it was written.
    #[error("line {seq} was changed after it was written")]
    Edited {
        /// Its number.
        seq: u64,
    },
    /// The log was longer once.
    #[error("the log ends at line {seq}, but once reached line {marked}")]
    CutOff {
        /// Its last line.
        seq: u64,
        /// The line of the mark.
        marked: u64,
    },
    /// Lines stand at the end that the hub did not write.
    #[error("line {seq} was not written by this hub")]
    Foreign {
        /// The first of them.
        seq: u64,
    },
    /// There is a log, but no mark.
    #[error(
        "the mark {path} is missing: whether lines were cut off before this hub started cannot be told"
    )]
    MarkMissing {
        /// Its file.
        path: String,
    },
    /// The mark cannot be understood.
    #[error("the mark {path} is damaged ({reason}): whether lines were cut off cannot be told")]
    MarkDamaged {
        /// Its file.
        path: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The log is another one than it was, though it fits together.
    #[error("line {seq} is not the one that the mark was made at: the log was written anew")]
    Rewritten {
        /// The line of the mark.
        seq: u64,
    },
}

impl AuditProblem {
    /// The line it is about.
    #[must_use]
    pub fn seq(&self) -> u64 {
        match self {
            Self::Numbering { expected, .. } => *expected,
            Self::Unchained { seq }
            | Self::Edited { seq }
            | Self::Rewritten { seq }
            | Self::Foreign { seq } => *seq,
            Self::CutOff { seq, .. } => seq + 1,
            Self::MarkMissing { .. } | Self::MarkDamaged { .. } => 0,
        }
    }

    /// Whether the lines fit together, so that the log can be accepted as it is.
    #[must_use]
    pub fn can_be_accepted(&self) -> bool {
        match self {
            Self::Numbering { .. } | Self::Unchained { .. } | Self::Edited { .. } => false,
            Self::Rewritten { .. }
            | Self::Foreign { .. }
            | Self::CutOff { .. }
            | Self::MarkMissing { .. }
            | Self::MarkDamaged { .. } => true,
        }
    }
}

#[derive(Serialize, Deserialize)]
struct Mark {
    seq: u64,
    hash: String,
}

impl Mark {
    fn of(head: &AuditHead) -> Self {
        Self { seq: head.seq, hash: blake3::Hash::from_bytes(head.hash).to_string() }
    }

    fn is_of(&self, head: &AuditHead) -> bool {
        self.seq == head.seq && self.hash == blake3::Hash::from_bytes(head.hash).to_string()
    }
}

/// What stands where the mark should be.
enum FoundMark {
    Good(Mark),
    Missing,
    /// Why it cannot be understood.
    Damaged(String),
}

/// See the module.
pub struct AuditLog {
    store: Arc<dyn Store>,
    mark: PathBuf,
    /// One move of the mark at a time.
    marking: Mutex<()>,
}

impl AuditLog {
    /// The log of this store, with its mark in this file.
    #[must_use]
    pub fn new(store: Arc<dyn Store>, mark: PathBuf) -> Arc<Self> {
        Arc::new(Self { store, mark, marking: Mutex::default() })
    }

    /// Makes the mark of a log that has no line yet. Before the first line is written.
    ///
    /// # Errors
    /// As [`AuditLog::verify`].
    pub async fn begin(&self) -> Result<(), AuditError> {
        let _marking = self.marking.lock().await;
        let head = self.store.audit_head().await?;
        match self.read_mark().await? {
            FoundMark::Missing if head.seq == 0 => self.write_mark(&head).await,
            _ => Ok(()),
        }
    }

    /// Recomputes the chain in bounded memory, compares it with the mark and with what the hub wrote
    /// last, and moves the mark if all fits.
    ///
    /// # Errors
    /// If the log or the mark cannot be read, or the mark cannot be written.
    pub async fn verify(&self) -> Result<Verification, AuditError> {
        let _marking = self.marking.lock().await;
        let found = self.check_all().await?;
        match &found.problem {
            None => self.write_mark(&found.head).await?,
            Some(problem) => tracing::error!(%problem, "the audit log does not verify"),
        }
        Ok(found)
    }

    /// Accepts a log that fits together, whatever the mark says, with a line that names the reason and
    /// the problem; and verifies it. One that verifies anyway, or does not fit together, is left alone.
    ///
    /// # Errors
    /// As [`AuditLog::verify`].
    pub async fn accept(&self, reason: &str, by: &Actor) -> Result<Verification, AuditError> {
        let marking = self.marking.lock().await;
        let problem = self.check_all().await?.problem;
        if let Some(problem) = problem.filter(AuditProblem::can_be_accepted) {
            tracing::warn!(%problem, by = %by.name, reason, "the audit log is accepted as it is");
            let detail = json!({ "reason": reason, "problem": problem.to_string() });
            let line = by.audit(unix_ms(), "audit.accepted", "audit", detail);
            self.store.accept_audit(line).await?;
            self.write_mark(&self.store.audit_head().await?).await?;
        }
        drop(marking);
        self.verify().await
    }

    async fn check_all(&self) -> Result<Verification, AuditError> {
        // The log reached this line at least, by the hub's memory and by the mark.
        let mut chain = Chain::new(&self.mark, self.read_mark().await?);
        chain.marks.push(Mark::of(&self.store.audit_head().await?));
        let mut after = None;
        loop {
            let lines = self.store.audit_page(after, PAGE_LINES).await?;
            let Some(last) = lines.last() else { break };
            after = Some(last.seq);
            chain.take(&lines);
        }
        let mut found = chain.end();
        if found.problem.is_none() {
            // By now the hub may have written more than was read, but never less.
            let written = self.store.audit_head().await?.seq;
            let foreign = found.head.seq > written;
            found.problem = foreign.then_some(AuditProblem::Foreign { seq: written + 1 });
        }
        Ok(found)
    }

    /// Moves the mark to the last line that the hub wrote, unless the log does not continue it.
    ///
    /// # Errors
    /// As [`AuditLog::verify`].
    pub async fn move_mark(&self) -> Result<(), AuditError> {
        let _marking = self.marking.lock().await;
        let head = self.store.audit_head().await?;
        let mark = match self.read_mark().await? {
            FoundMark::Good(mark) if mark.is_of(&head) => return Ok(()),
            FoundMark::Good(mark) => mark,
            FoundMark::Missing | FoundMark::Damaged(_) => {
                let path = self.mark.display();
                tracing::error!(%path, "the mark of the audit log is missing or damaged; see cortex-hubd audit verify");
                return Ok(());
            }
        };
        if mark.seq > 0 {
            let at_mark = self.store.audit_page(Some(mark.seq - 1), 1).await?;
            let continues = at_mark.first().is_some_and(|line| {
                mark.is_of(&AuditHead { seq: line.seq, hash: line.hash }) && line.seq <= head.seq
            });
            if !continues {
                tracing::error!(
                    seq = head.seq,
                    marked = mark.seq,
                    "the audit log does not continue its mark; see cortex-hubd audit verify"
                );
                return Ok(());
            }
        }
        self.write_mark(&head).await
    }

    async fn read_mark(&self) -> Result<FoundMark, AuditError> {
        let path = self.mark.clone();
        let read = tokio::task::spawn_blocking(move || read_mark(&path));
        read.await.map_err(io::Error::other).flatten().map_err(|source| self.mark_error(source))
    }

    async fn write_mark(&self, head: &AuditHead) -> Result<(), AuditError> {
        let (path, mark) = (self.mark.clone(), Mark::of(head));
        tracing::info!(seq = mark.seq, hash = %mark.hash, "audit log marked");
        let write = tokio::task::spawn_blocking(move || {
            durable::write_file(&path, &serde_json::to_vec(&mark)?, 0o600)
        });
        write.await.map_err(io::Error::other).flatten().map_err(|source| self.mark_error(source))
    }

    fn mark_error(&self, source: io::Error) -> AuditError {
        AuditError::Mark { path: self.mark.display().to_string(), source }
    }
}

fn read_mark(path: &Path) -> io::Result<FoundMark> {
    use io::Read as _;
    let file = match std::fs::File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(FoundMark::Missing),
        file => file?,
    };
    let mut text = Vec::new();
    file.take(MAX_MARK_BYTES).read_to_end(&mut text)?;
    let mark = serde_json::from_slice(&text);
    Ok(mark.map_or_else(|error| FoundMark::Damaged(error.to_string()), FoundMark::Good))
}

/// Verifies a log that no hub of this process has open, and its mark; moves nothing. `page` gives lines
/// as `Store::audit_page` does.
///
/// # Errors
/// If the log or the mark cannot be read.
pub fn verify_file(
    mark: &Path,
    page: impl Fn(Option<u64>, u32) -> Result<Vec<AuditLine>, StoreError>,
) -> Result<Verification, AuditError> {
    // The mark first: a hub that runs may write lines meanwhile, and then move the mark.
    let found = read_mark(mark)
        .map_err(|source| AuditError::Mark { path: mark.display().to_string(), source })?;
    let mut chain = Chain::new(mark, found);
    let mut after = None;
    loop {
        let lines = page(after, PAGE_LINES)?;
        let Some(last) = lines.last() else { break };
        after = Some(last.seq);
        chain.take(&lines);
    }
    Ok(chain.end())
}

/// A verification under way.
struct Chain {
    found: Verification,
    marks: Vec<Mark>,
    /// What is wrong with the mark, which counts if nothing else is.
    of_mark: Option<AuditProblem>,
}

impl Chain {
    fn new(path: &Path, mark: FoundMark) -> Self {
        let path = || path.display().to_string();
        let (mut marks, mut of_mark) = (Vec::new(), None);
        match mark {
            FoundMark::Good(mark) => marks.push(mark),
            FoundMark::Missing => of_mark = Some(AuditProblem::MarkMissing { path: path() }),
            FoundMark::Damaged(reason) => {
                of_mark = Some(AuditProblem::MarkDamaged { path: path(), reason });
            }
        }
        let head = AuditHead { seq: 0, hash: [0; 32] };
        Self { found: Verification { entries: 0, head, problem: None }, marks, of_mark }
    }

    fn take(&mut self, lines: &[AuditLine]) {
        for line in lines {
            self.found.entries += 1;
            if self.found.problem.is_none() {
                self.found.problem = check(line, &mut self.found.head, &self.marks);
            }
        }
    }

    fn end(self) -> Verification {
        let Self { mut found, marks, of_mark } = self;
        if found.problem.is_none() {
            let seq = found.head.seq;
            let beyond = marks.iter().map(|mark| mark.seq).filter(|marked| *marked > seq).max();
            found.problem = beyond.map(|marked| AuditProblem::CutOff { seq, marked }).or(of_mark);
        }
        found
    }
}

/// Checks the line that comes after `head`, and moves `head` to it if it fits.
fn check(line: &AuditLine, head: &mut AuditHead, marks: &[Mark]) -> Option<AuditProblem> {
    let seq = line.seq;
    if seq != head.seq + 1 {
        return Some(AuditProblem::Numbering { expected: head.seq + 1, found: seq });
    }
    if line.computed_hash() != line.hash {
        return Some(AuditProblem::Edited { seq });
    }
    if line.prev_hash != head.hash {
        return Some(AuditProblem::Unchained { seq });
    }
    *head = AuditHead { seq, hash: line.hash };
    marks
        .iter()
        .any(|mark| mark.seq == seq && !mark.is_of(head))
        .then_some(AuditProblem::Rewritten { seq })
}

#[cfg(test)]
mod tests;
