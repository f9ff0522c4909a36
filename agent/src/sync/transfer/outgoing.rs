//! Content of operations on its way to the hub: which chunks it lacks, and those chunks in packs.

use std::collections::HashSet;

use cortex_shared::entry::{Digest, Entry, File};
use cortex_shared::ids::WorkspaceId;
use cortex_shared::wire_path::WirePath;
use tokio_util::sync::CancellationToken;

use super::lane::{JOB_BYTES, LARGE_BYTES};
use super::packing::{Parcel, send_packs};
use crate::root_dir::RootDir;
use crate::sync::core::{SyncError, waiting};
use crate::sync::ground::Blocking;
use crate::sync::hub::{Hub, HubError, MAX_HASHES};
use crate::sync::plan::PushOp;
use crate::sync::problem::{Code, Finding};
use crate::sync::scan::Scope;

/// What content goes by.
pub(super) struct Line<'a, H> {
    pub(super) hub: &'a H,
    pub(super) workspace: WorkspaceId,
    pub(super) blocking: Blocking,
    pub(super) root: RootDir,
    pub(super) cancel: &'a CancellationToken,
}

/// What came of sending the content of a push so far.
#[derive(Debug, Default)]
pub(super) struct Outgoing {
    /// Operations that were left out because their files were not what the index says.
    pub(super) changed: usize,
    /// Where those files are.
    pub(super) dirty: Vec<Scope>,
    pub(super) findings: Vec<Finding>,
    /// Content of large files that the hub lacks, for a job of its own. Their operations were left
    /// out, and so were those of others for which this job has no room.
    pub(super) large: Parcel,
    large_bytes: u64,
    /// What the hub has at these paths goes on standing there: the content of its conflict copy was not sent.
    kept: HashSet<WirePath>,
    /// The hub has no room for content; in its words.
    full: Option<String>,
    /// The same for that of large files.
    full_for_large: Option<String>,
}

impl Outgoing {
    pub(super) fn new(full_for_large: Option<String>) -> Self {
        Self { full_for_large, ..Self::default() }
    }

    /// Sends what the hub lacks of the content of operations, and leaves those out that have to wait. The
    /// others can be committed once this returns: their content is durable at the hub.
    pub(super) async fn send<H: Hub>(
        &mut self,
        line: &Line<'_, H>,
        mut ops: Vec<PushOp>,
    ) -> Result<Vec<PushOp>, SyncError> {
        ops.retain(|op| !self.kept.contains(&op.path));
        let missing = missing_chunks(line, &ops).await?;
        if missing.is_empty() {
            return Ok(ops);
        }
        self.retain(&mut ops, |op, outgoing| !outgoing.leave_to_lane(op, &missing));
        let mut parcel = Parcel::default();
        for op in &ops {
            if let Some(Entry::File(file)) = &op.new {
                parcel.missing.extend(lacking(file, &missing));
                parcel.files.push((op.path.clone(), file.chunks().collect()));
            }
        }
        if !parcel.missing.is_empty() && self.full.is_none() {
            let Line { hub, workspace, blocking, root, cancel } = line;
            match send_packs(*hub, *workspace, *blocking, root.clone(), cancel, parcel).await {
                Ok(failed) => {
                    for path in &failed {
                        self.dirty.push(Scope::Children(path.parent()));
                    }
                    self.changed += failed.len();
                    self.retain(&mut ops, |op, _| !failed.contains(&op.path));
                }
                // Whatever needs no room goes on: deletions may even make some.
                Err(SyncError::Hub(HubError::Full { message })) => self.full = Some(message),
                Err(error) => return Err(error),
            }
        }
        if let Some(message) = self.full.clone() {
            self.retain(&mut ops, |op, outgoing| {
                let lacks = matches!(&op.new, Some(Entry::File(file))
                    if lacking(file, &missing).next().is_some());
                if lacks {
                    outgoing.findings.push(Finding::at(&op.path, Code::HubFull, &message));
                }
                !lacks
            });
        }
        Ok(ops)
    }

    /// Leaves operations out. One that would replace what should have got a conflict copy goes with it.
    fn retain(&mut self, ops: &mut Vec<PushOp>, mut keep: impl FnMut(&PushOp, &mut Self) -> bool) {
        ops.retain(|op| {
            let kept = keep(op, self);
            if !kept {
                self.kept.extend(op.conflict_of.clone());
            }
            kept
        });
    }

    /// Whether the content of an operation is left to the lane of large files.
    fn leave_to_lane(&mut self, op: &PushOp, missing: &HashSet<Digest>) -> bool {
        let Some(Entry::File(file)) = &op.new else { return false };
        if file.size <= LARGE_BYTES || lacking(file, missing).next().is_none() {
            return false;
        }
        if let Some(message) = self.full.as_ref().or(self.full_for_large.as_ref()) {
            self.findings.push(Finding::at(&op.path, Code::HubFull, message));
            return true;
        }
        if self.large.is_empty() || self.large_bytes + file.size <= JOB_BYTES {
            self.large_bytes += file.size;
            self.large.missing.extend(lacking(file, missing));
            self.large.files.push((op.path.clone(), file.chunks().collect()));
        }
        true
    }
}

/// Those chunks of a file that are among the missing ones.
fn lacking<'a>(file: &'a File, missing: &'a HashSet<Digest>) -> impl Iterator<Item = Digest> + 'a {
    file.chunks().map(|chunk| chunk.hash).filter(|hash| missing.contains(hash))
}

/// The chunks of these operations that the hub lacks.
async fn missing_chunks<H: Hub>(
    line: &Line<'_, H>,
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
        let have = waiting(line.cancel, line.hub, line.hub.have(line.workspace, part)).await?;
        if have.len() != part.len() {
            return Err(HubError::protocol("answer to another number of chunks").into());
        }
        missing.extend(part.iter().zip(have).filter(|(_, have)| !have).map(|(hash, _)| *hash));
    }
    Ok(missing)
}
