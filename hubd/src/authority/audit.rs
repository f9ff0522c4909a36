//! Verification of the audit log.
//!
//! Each line holds the hash of the line before, so that a line that is edited, removed from the middle
//! or put in between no longer fits. What the chain alone cannot show is a cut at its end, or a log that
//! was written anew as a whole. For that, number and hash of its last line are kept in a second place,
//! the *mark*: a file beside the database, moved on every minute, at each verification and at shutdown,
//! and never moved on a log that does not continue it; and each move is logged, so that it also stands
//! wherever the hub's log goes.
//!
//! What this covers, and what not: whoever can write the database alone is found out, but for lines
//! younger than the mark. Whoever can write the whole data directory can make a new log and a mark that
//! fits; against that only the copies of the mark in the hub's log help, on a machine out of reach.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use cortex_shared::durable;
use cortex_shared::tasks::TaskScope;
use serde::{Deserialize, Serialize};
use tokio::sync::Mutex;

use crate::store::{AuditHead, AuditLine, Store, StoreError};

/// Lines read at a time.
pub const PAGE_LINES: u32 = 256;
/// How often the mark is moved.
const MARK_INTERVAL: Duration = Duration::from_secs(60);
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
            Self::Unchained { seq } | Self::Edited { seq } | Self::Rewritten { seq } => *seq,
            Self::CutOff { seq, .. } => seq + 1,
        }
    }
}

#[derive(Serialize, Deserialize)]
struct Mark {
    seq: u64,
    hash: String,
}

impl Mark {
    fn is_of(&self, head: &AuditHead) -> bool {
        self.seq == head.seq && self.hash == blake3::Hash::from_bytes(head.hash).to_string()
    }
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

    /// Recomputes the chain in bounded memory, compares it with the mark, and moves the mark if all
    /// fits.
    ///
    /// # Errors
    /// If the log or the mark cannot be read, or the mark cannot be written.
    pub async fn verify(&self) -> Result<Verification, AuditError> {
        let _marking = self.marking.lock().await;
        let mark = self.read_mark().await?;
        let mut found =
            Verification { entries: 0, head: AuditHead { seq: 0, hash: [0; 32] }, problem: None };
        let mut after = None;
        loop {
            let lines = self.store.audit_page(after, PAGE_LINES).await?;
            let Some(last) = lines.last() else { break };
            after = Some(last.seq);
            for line in &lines {
                found.entries += 1;
                if found.problem.is_none() {
                    found.problem = check(line, &mut found.head, mark.as_ref());
                }
            }
        }
        if let (None, Some(mark)) = (&found.problem, &mark)
            && mark.seq > found.head.seq
        {
            let problem = AuditProblem::CutOff { seq: found.head.seq, marked: mark.seq };
            found.problem = Some(problem);
        }
        match &found.problem {
            None => self.write_mark(&found.head).await?,
            Some(problem) => tracing::error!(%problem, "the audit log does not verify"),
        }
        Ok(found)
    }

    /// Moves the mark to the end of the log, unless the log does not continue it.
    ///
    /// # Errors
    /// As [`AuditLog::verify`].
    pub async fn move_mark(&self) -> Result<(), AuditError> {
        let _marking = self.marking.lock().await;
        let head = self.store.audit_head().await?;
        let mark = self.read_mark().await?;
        if mark.as_ref().is_some_and(|mark| mark.is_of(&head)) {
            return Ok(());
        }
        if let Some(mark) = mark.filter(|mark| mark.seq > 0) {
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

    /// Moves the mark from time to time, until the scope ends.
    pub fn keep_marking(self: &Arc<Self>, scope: &TaskScope) {
        let (log, cancel) = (Arc::clone(self), scope.token().clone());
        scope.spawn("audit mark", async move {
            loop {
                if let Err(error) = log.move_mark().await {
                    tracing::warn!(%error, "the mark of the audit log was not moved");
                }
                tokio::select! {
                    () = cancel.cancelled() => return,
                    () = tokio::time::sleep(MARK_INTERVAL) => {}
                }
            }
        });
    }

    async fn read_mark(&self) -> Result<Option<Mark>, AuditError> {
        let path = self.mark.clone();
        let read = tokio::task::spawn_blocking(move || {
            use io::Read as _;
            let file = match std::fs::File::open(&path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
                file => file?,
            };
            let mut text = String::new();
            file.take(MAX_MARK_BYTES).read_to_string(&mut text)?;
            Ok(Some(serde_json::from_str(&text).map_err(io::Error::from)?))
        });
        read.await.map_err(io::Error::other).flatten().map_err(|source| self.mark_error(source))
    }

    async fn write_mark(&self, head: &AuditHead) -> Result<(), AuditError> {
        let hash = blake3::Hash::from_bytes(head.hash).to_string();
        tracing::info!(seq = head.seq, %hash, "audit log marked");
        let (path, mark) = (self.mark.clone(), Mark { seq: head.seq, hash });
        let write = tokio::task::spawn_blocking(move || {
            durable::write_file(&path, &serde_json::to_vec(&mark)?, 0o600)
        });
        write.await.map_err(io::Error::other).flatten().map_err(|source| self.mark_error(source))
    }

    fn mark_error(&self, source: io::Error) -> AuditError {
        AuditError::Mark { path: self.mark.display().to_string(), source }
    }
}

/// Checks the line that comes after `head`, and moves `head` to it if it fits.
fn check(line: &AuditLine, head: &mut AuditHead, mark: Option<&Mark>) -> Option<AuditProblem> {
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
    mark.is_some_and(|mark| mark.seq == seq && !mark.is_of(head))
        .then_some(AuditProblem::Rewritten { seq })
}

#[cfg(test)]
mod tests;
