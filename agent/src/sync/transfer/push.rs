//! Sending changes to the hub: which chunks it lacks, those chunks in packs, then the commit.
//!
//! A commit is only made once its packs are acknowledged, which means durable. If the answer to a
//! commit is lost, the next refresh tells what became of it.

use std::collections::HashSet;

use cortex_shared::entry::{Digest, Entry};
use cortex_shared::ids::CommitId;
use cortex_shared::wire_path::WirePath;

use super::lane::{JOB_BYTES, LARGE_BYTES};
use super::packing::{Parcel, send_packs};
use super::{Epoch, Session};
use crate::sync::core::{SyncError, waiting};
use crate::sync::hub::{
    Commit, CommitOp, Committed, Hub, HubError, MAX_HASHES, RejectReason, Rejected,
};
use crate::sync::index::Cursor;
use crate::sync::plan::PushOp;
use crate::sync::problem::{Code, Finding};
use crate::sync::scan::Scope;

/// Operations of one commit: few enough that others see the beginning of a large change early.
const COMMIT_OPS: usize = 1000;
/// Encoded operations of one commit, at most (a single larger one goes alone).
const COMMIT_BYTES: usize = 1024 * 1024;
/// Content of one commit, at most (a single larger file goes alone).
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
    /// What the hub has at these paths goes on standing there: its conflict copy was not made.
    kept: HashSet<WirePath>,
    /// The hub has no room for content; in its words.
    full: Option<String>,
    /// Content of large files that the hub lacks, for a job of its own. Their operations were left
    /// out, and so were those of others for which this job has no room.
    pub(in crate::sync) large: Parcel,
    pub(in crate::sync) large_bytes: u64,
}

/// Sends operations, in order, in as many commits as it takes.
pub(in crate::sync) async fn push<H: Hub>(
    session: &mut Session<'_, H>,
    epoch: Epoch,
    ops: Vec<PushOp>,
) -> Result<Pushed, SyncError> {
    let mut pushed = Pushed::default();
    let mut ops = ops.into_iter().peekable();
    while ops.peek().is_some() {
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
            let fits = batch.len() < COMMIT_OPS
                && bytes + more_bytes <= COMMIT_BYTES
                && content + more_content <= COMMIT_CONTENT_BYTES;
            (bytes, content) = (bytes + more_bytes, content + more_content);
            fits || batch.is_empty()
        }) {
            batch.push(op);
        }
        push_batch(session, epoch, batch, &mut pushed).await?;
    }
    Ok(pushed)
}

fn weight(op: &PushOp) -> (usize, u64) {
    let (recipe, size) = match &op.new {
        Some(Entry::File(file)) => (file.recipe.0.len() * 36, file.size),
        Some(Entry::Link { target }) => (target.len(), 0),
        _ => (0, 0),
    };
    (op.path.as_bytes().len() + recipe + 128, size)
}

async fn push_batch<H: Hub>(
    session: &mut Session<'_, H>,
    epoch: Epoch,
    mut ops: Vec<PushOp>,
    pushed: &mut Pushed,
) -> Result<(), SyncError> {
    ops.retain(|op| !pushed.kept.contains(&op.path));
    if pushed.held > 0 {
        // The others would be refused as well.
        let before = ops.len();
        ops.retain(|op| op.new.is_some());
        pushed.held += before - ops.len();
    }
    let missing = missing_chunks(session, &ops).await?;
    if !missing.is_empty() {
        retain(&mut ops, pushed, |op, pushed| !leave_to_lane(op, &missing, pushed));
    }
    let mut parcel = Parcel::default();
    for op in &ops {
        if let Some(Entry::File(file)) = &op.new {
            let lacking =
                file.chunks().map(|chunk| chunk.hash).filter(|hash| missing.contains(hash));
            parcel.missing.extend(lacking);
            parcel.files.push((op.path.clone(), file.chunks().collect()));
        }
    }
    if !parcel.missing.is_empty() && pushed.full.is_none() {
        let root = session.core.run(|core| Ok::<_, SyncError>(core.root.clone())).await?;
        let Session { hub, workspace, cancel, .. } = session;
        let blocking = session.core.blocking();
        match send_packs(*hub, *workspace, blocking, root, cancel, parcel).await {
            Ok(failed) => {
                for path in &failed {
                    pushed.dirty.push(Scope::Children(path.parent()));
                }
                pushed.changed += failed.len();
                retain(&mut ops, pushed, |op, _| !failed.contains(&op.path));
            }
            // Whatever needs no room goes on: deletions may even make some.
            Err(SyncError::Hub(HubError::Full { message })) => pushed.full = Some(message),
            Err(error) => return Err(error),
        }
    }
    if let Some(message) = pushed.full.clone() {
        retain(&mut ops, pushed, |op, pushed| {
            let lacks = matches!(&op.new, Some(Entry::File(file))
                if file.chunks().any(|chunk| missing.contains(&chunk.hash)));
            if lacks {
                pushed.findings.push(Finding::at(&op.path, Code::HubFull, &message));
            }
            !lacks
        });
    }
    if ops.is_empty() {
        return Ok(());
    }
    let (known, rules) = session
        .core
        .run(|core| Ok::<_, SyncError>((core.index.known_head()?, core.rules_base)))
        .await?;
    let commit = Commit {
        id: CommitId::new(),
        epoch,
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
    let committed =
        waiting(session.cancel, session.hub, session.hub.commit(session.workspace, commit)).await?;
    record(session, epoch, ops, committed, pushed).await
}

/// Leaves operations out. One that would replace what should have got a conflict copy goes with it.
fn retain(
    ops: &mut Vec<PushOp>,
    pushed: &mut Pushed,
    mut keep: impl FnMut(&PushOp, &mut Pushed) -> bool,
) {
    ops.retain(|op| {
        let kept = keep(op, pushed);
        if !kept {
            pushed.kept.extend(op.conflict_of.clone());
        }
        kept
    });
}

/// Whether the content of an operation is left to the lane of large files.
fn leave_to_lane(op: &PushOp, missing: &HashSet<Digest>, pushed: &mut Pushed) -> bool {
    let Some(Entry::File(file)) = &op.new else { return false };
    if file.size <= LARGE_BYTES || !file.chunks().any(|chunk| missing.contains(&chunk.hash)) {
        return false;
    }
    if pushed.large.is_empty() || pushed.large_bytes + file.size <= JOB_BYTES {
        pushed.large_bytes += file.size;
        let lacking = file.chunks().map(|chunk| chunk.hash).filter(|hash| missing.contains(hash));
        pushed.large.missing.extend(lacking);
        pushed.large.files.push((op.path.clone(), file.chunks().collect()));
    }
    true
}

/// The chunks of these operations that the hub lacks.
async fn missing_chunks<H: Hub>(
    session: &mut Session<'_, H>,
    ops: &[PushOp],
) -> Result<HashSet<Digest>, SyncError> {
    let mut asked = HashSet::new();
    let mut hashes = Vec::new();
    for op in ops {
        if let Some(Entry::File(file)) = &op.new {
            hashes.extend(file.chunks().map(|chunk| chunk.hash).filter(|hash| asked.insert(*hash)));
        }
    }
    let mut missing = HashSet::new();
    for part in hashes.chunks(MAX_HASHES) {
        let have =
            waiting(session.cancel, session.hub, session.hub.have(session.workspace, part)).await?;
        if have.len() != part.len() {
            return Err(HubError::protocol("answer to another number of chunks").into());
        }
        missing.extend(part.iter().zip(have).filter(|(_, have)| !have).map(|(hash, _)| *hash));
    }
    Ok(missing)
}

/// Writes down what the hub now has.
async fn record<H: Hub>(
    session: &mut Session<'_, H>,
    epoch: Epoch,
    ops: Vec<PushOp>,
    committed: Committed,
    pushed: &mut Pushed,
) -> Result<(), SyncError> {
    let Committed { seq, root, rejected, changes } = committed;
    if rejected.iter().any(|rejected| rejected.index >= ops.len()) {
        return Err(HubError::protocol("rejected an operation that was not sent").into());
    }
    let mut is_rejected = vec![false; ops.len()];
    let mut learned = Vec::new();
    for Rejected { index, reason, current } in rejected {
        is_rejected[index] = true;
        let op = &ops[index];
        pushed.kept.extend(op.conflict_of.clone());
        match reason {
            RejectReason::Conflict => learned.push((op.path.clone(), op.expected.clone(), current)),
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
    session.progress.pushed(accepted.len());
    let head = session
        .core
        .run(move |core| {
            let cursor = core.index.cursor()?;
            core.index.batch(|writer| {
                for (path, entry) in accepted {
                    writer.set_remote(&path, entry)?;
                }
                for (path, _, current) in learned {
                    writer.set_remote(&path, current)?;
                }
                // Nobody else committed in between: these changes need not be fetched.
                let next =
                    cursor.filter(|cursor| cursor.epoch == epoch && cursor.seq + changes == seq);
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
    session.progress.head(seq);
    pushed.outdated |= !head;
    Ok(())
}
