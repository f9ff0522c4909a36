//! Sending changes to the hub: their content (`outgoing`), then the commit.
//!
//! A commit is only made once its packs are acknowledged, which means durable. While it is made and
//! written down, the content of the next one is on its way. If the answer to a commit is lost, the next
//! refresh asks what became of it: what it was to do is noted before it goes.

use std::collections::HashSet;
use std::iter::Peekable;

use cortex_shared::entry::Entry;
use cortex_shared::ids::{CommitId, WorkspaceId};
use cortex_shared::wire_path::WirePath;
use futures_util::future::join;
use tokio_util::sync::CancellationToken;

use super::lane::LARGE_BYTES;
use super::outgoing::{Line, Outgoing};
use super::packing::Parcel;
use super::{Epoch, Session};
use crate::sync::core::{Core, CoreCell, SyncError, waiting};
use crate::sync::hub::{Commit, CommitOp, Committed, Hub, HubError, RejectReason, Rejected};
use crate::sync::index::Cursor;
use crate::sync::plan::PushOp;
use crate::sync::problem::{Code, Finding};
use crate::sync::scan::Scope;
use crate::sync::status::Progress;

/// Encoded operations of one commit, at most (a single larger one goes alone).
const COMMIT_BYTES: usize = 1024 * 1024;
/// Content that is sent for one commit, at most; that of large files goes by the lane.
const COMMIT_CONTENT_BYTES: u64 = 64 * 1024 * 1024;

/// What came of a push.
#[derive(Debug, Default)]
pub(in crate::sync) struct Pushed {
    /// Operations the hub took.
    pub(in crate::sync) accepted: usize,
    /// Rows that now know better what the hub has.
    pub(in crate::sync) learned: usize,
    /// The hub's tree is not what it is taken for: refresh before planning again.
    pub(in crate::sync) outdated: bool,
    /// Deletions that the hub holds back because they are so many, and those that were not even sent
    /// because of them.
    pub(in crate::sync) held: usize,
    /// Operations that were left out because their files were not what the index says.
    pub(in crate::sync) changed: usize,
    /// Where those files are.
    pub(in crate::sync) dirty: Vec<Scope>,
    pub(in crate::sync) findings: Vec<Finding>,
    /// Content of large files that the hub lacks, for a job of its own. Their operations were left
    /// out, and so were those of others for which this job has no room.
    pub(in crate::sync) large: Parcel,
}

/// Sends operations, in order, in as many commits as it takes. `full` is the hub's word that it has no room
/// for large content, which is then not offered.
pub(in crate::sync) async fn push<H: Hub>(
    session: &mut Session<'_, H>,
    epoch: Epoch,
    ops: Vec<PushOp>,
    full: Option<String>,
) -> Result<Pushed, SyncError> {
    let root = session.core.run(|core| Ok::<_, SyncError>(core.root.clone())).await?;
    let blocking = session.core.blocking();
    let Session { hub, workspace, core, cancel, progress, batches, .. } = session;
    let no_longer = cancel.child_token();
    let line = Line { hub: *hub, workspace: *workspace, blocking, root, cancel: &no_longer };
    let (pushed, kept) = Default::default();
    let mut commits = Commits {
        hub: *hub,
        workspace: *workspace,
        core,
        cancel,
        progress,
        epoch,
        pushed,
        kept,
        full: false,
    };
    let mut outgoing = Outgoing::new(full);
    let mut ops = ops.into_iter().peekable();
    let most = batches.commit_ops;
    let mut ready = outgoing.send(&line, next_batch(&mut ops, most)).await?;
    loop {
        let next = next_batch(&mut ops, most);
        let is_last = next.is_empty();
        let commit = async {
            let committed = commits.commit(ready).await;
            if committed.is_err() {
                no_longer.cancel();
            }
            committed
        };
        let (committed, sent) = join(commit, outgoing.send(&line, next)).await;
        committed?;
        ready = sent?;
        if is_last {
            break;
        }
    }
    let mut pushed = commits.pushed;
    let Outgoing { changed, dirty, mut findings, large, .. } = outgoing;
    pushed.findings.append(&mut findings);
    Ok(Pushed { changed, dirty, large, ..pushed })
}

/// The operations of the next commit; none at the end.
fn next_batch(ops: &mut Peekable<impl Iterator<Item = PushOp>>, most: usize) -> Vec<PushOp> {
    let mut batch = Vec::new();
    let (mut bytes, mut content) = (0, 0);
    let mut copied = HashSet::new();
    while let Some(op) = ops.next_if(|op| {
        // A loser gives way only once its copy is known to be there.
        if copied.contains(&op.path) {
            return false;
        }
        copied.extend(op.conflict_of.clone());
        let (more_bytes, more_content) = weight(op);
        let fits = batch.len() < most
            && bytes + more_bytes <= COMMIT_BYTES
            && content + more_content <= COMMIT_CONTENT_BYTES;
        (bytes, content) = (bytes + more_bytes, content + more_content);
        fits || batch.is_empty()
    }) {
        batch.push(op);
    }
    batch
}

fn weight(op: &PushOp) -> (usize, u64) {
    let (recipe, size) = match &op.new {
        Some(Entry::File(file)) => {
            let sent = if file.size > LARGE_BYTES { 0 } else { file.size };
            (file.recipe.0.len() * 36, sent)
        }
        Some(Entry::Link { target }) => (target.len(), 0),
        _ => (0, 0),
    };
    (op.path.as_bytes().len() + recipe + 128, size)
}

/// Commits, one after the other.
struct Commits<'a, H> {
    hub: &'a H,
    workspace: WorkspaceId,
    core: &'a mut CoreCell,
    cancel: &'a CancellationToken,
    progress: &'a Progress,
    epoch: Epoch,
    pushed: Pushed,
    /// What the hub has at these paths goes on standing there: it did not take its conflict copy.
    kept: HashSet<WirePath>,
    /// The hub has no room even for names. Nothing more goes then: what was moved must not be deleted
    /// where it was before it is there under its new name.
    full: bool,
}

impl<H: Hub> Commits<'_, H> {
    /// Commits operations whose content the hub has.
    async fn commit(&mut self, mut ops: Vec<PushOp>) -> Result<(), SyncError> {
        ops.retain(|op| !self.kept.contains(&op.path));
        if self.pushed.held > 0 {
            // The others would be refused as well.
            let before = ops.len();
            ops.retain(|op| op.new.is_some());
            self.pushed.held += before - ops.len();
        }
        if ops.is_empty() || self.full {
            return Ok(());
        }
        let id = CommitId::new();
        let note = move |core: &mut Core| {
            core.index.batch(|writer| writer.note_sent(id, &ops))?;
            Ok::<_, SyncError>((ops, core.index.known_head()?, core.rules_base))
        };
        let (ops, known, rules) = self.core.run(note).await?;
        let commit = Commit {
            id,
            epoch: self.epoch,
            known,
            rules,
            ops: ops
                .iter()
                .map(|op| CommitOp {
                    path: op.path.clone(),
                    expected: op.expected.as_ref().map(Entry::identity),
                    new: op.new.clone(),
                    conflict_of: op.conflict_of.clone(),
                })
                .collect(),
        };
        let committing = self.hub.commit(self.workspace, commit);
        match waiting(self.cancel, self.hub, committing).await {
            // What others changed goes on arriving.
            Err(SyncError::Hub(HubError::Full { message })) => {
                self.full = true;
                let finding = ops.first().map(|op| Finding::at(&op.path, Code::HubFull, message));
                self.pushed.findings.extend(finding);
                Ok(())
            }
            committed => self.record(ops, committed?).await,
        }
    }

    /// Writes down what the hub now has.
    async fn record(&mut self, ops: Vec<PushOp>, committed: Committed) -> Result<(), SyncError> {
        let (epoch, pushed) = (self.epoch, &mut self.pushed);
        let changes = committed.changes();
        let Committed { seq, root, rejected, .. } = committed;
        if rejected.iter().any(|rejected| rejected.index >= ops.len()) {
            return Err(HubError::protocol("rejected an operation that was not sent").into());
        }
        let mut is_rejected = vec![false; ops.len()];
        let mut learned = Vec::new();
        for Rejected { index, reason, current } in rejected {
            is_rejected[index] = true;
            let op = &ops[index];
            self.kept.extend(op.conflict_of.clone());
            match reason {
                RejectReason::Conflict => {
                    learned.push((op.path.clone(), op.expected.clone(), current))
                }
                RejectReason::NoParent | RejectReason::NotEmpty | RejectReason::Rules => {
                    pushed.outdated = true;
                }
                RejectReason::MissingChunks => {
                    let text = "the hub lost content that it had; it is sent again";
                    pushed.findings.push(Finding::at(&op.path, Code::MissingChunks, text));
                }
                RejectReason::Held => pushed.held += 1,
                RejectReason::Invalid => {
                    let text = "the hub does not accept this entry";
                    pushed.findings.push(Finding::at(&op.path, Code::Rejected, text));
                }
            }
        }
        let mut accepted = Vec::with_capacity(ops.len());
        for (op, rejected) in ops.into_iter().zip(is_rejected) {
            if !rejected {
                accepted.push((op.path, op.new));
            }
        }
        pushed.accepted += accepted.len();
        for (_, expected, current) in &learned {
            if cortex_shared::entry::same(expected.as_ref(), current.as_ref()) {
                // It says that something else is there and names what we expected.
                pushed.outdated = true;
            } else {
                pushed.learned += 1;
            }
        }
        self.progress.pushed(accepted.len());
        let head = self
            .core
            .run(move |core| {
                let cursor = core.index.cursor()?;
                core.index.batch(|writer| {
                    writer.forget_sent()?;
                    for (path, entry) in accepted {
                        writer.set_remote(&path, entry)?;
                    }
                    for (path, _, current) in learned {
                        writer.set_remote(&path, current)?;
                    }
                    // Nobody else committed in between: these changes need not be fetched.
                    let next = cursor
                        .filter(|cursor| cursor.epoch == epoch && cursor.seq + changes == seq);
                    if next.is_some() {
                        writer.set_cursor(Cursor { epoch, seq })?;
                    }
                    if cursor.is_some_and(|cursor| cursor.epoch == epoch && cursor.seq <= seq) {
                        writer.set_known_head(seq, &root)?;
                    }
                    Ok(next.is_some())
                })
            })
            .await?;
        self.progress.head(seq);
        pushed.outdated |= !head;
        Ok(())
    }
}
