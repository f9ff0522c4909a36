//! The `Sync` service: content and versions of workspaces, for their members.
//!
//! A call names a workspace and is refused unless its caller, who is known by its certificate alone,
//! is a member. Streams ask again for each message, so that an ended membership ends them.

mod convert;

use std::collections::HashSet;
use std::pin::Pin;
use std::sync::Arc;

use bytes::Bytes;
use cortex_proto::v1::sync_server::{Sync, SyncServer};
use cortex_proto::{MAX_MESSAGE_BYTES, v1};
use cortex_shared::entry::Digest;
use cortex_shared::ids::{NodeId, WorkspaceId};
use cortex_shared::wire_path::WirePath;
use futures_util::stream::{self, Stream, StreamExt as _, TryStreamExt as _};
use prost::Message as _;
use tokio::time::Instant;
use tonic::{Code, Request, Response, Status, Streaming};

use super::auth::{AdmittedNode, admitted};
use super::status::{disk_full, from_database, internal, invalid, no_room, over_quota, refuse};
use super::stopping::until_stopped;
use crate::counters;
use crate::events::{EventBus, Kind, NewEvent};
use crate::node::registry::Registry;
use crate::store::workspace::{CommitResult, Found, StoreError};
use crate::sync::{SyncError, WorkspaceHub, Workspaces};

/// Packs of one stream that are worked on at the same time: while one is flushed to disk, others
/// are received, checked and flushed with it.
const PACKS_UNDER_WAY: usize = 4;
/// Packs of one stream that are read ahead of the member.
const PACKS_AHEAD: usize = 2;
/// Largest page of changes, unless a single change is larger.
const PAGE_BYTES: usize = 1024 * 1024;

/// Who is a member of what.
pub trait Membership: Send + std::marker::Sync + 'static {
    /// Whether a node is a member of a workspace. Asked often, answered from memory.
    fn is_member(&self, node: NodeId, workspace: WorkspaceId) -> bool;
    /// The name of a workspace.
    fn workspace_name(&self, workspace: WorkspaceId) -> Option<String>;
}

impl Membership for crate::node::membership::Membership {
    fn is_member(&self, node: NodeId, workspace: WorkspaceId) -> bool {
        Self::is_member(self, node, workspace)
    }

    fn workspace_name(&self, workspace: WorkspaceId) -> Option<String> {
        self.name_of(workspace)
    }
}

/// The service. Cheap to clone.
#[derive(Clone)]
pub struct SyncService {
    workspaces: Arc<Workspaces>,
    membership: Arc<dyn Membership>,
    registry: Arc<Registry>,
    events: Arc<EventBus>,
}

/// A member and the workspace it asks for.
#[derive(Clone)]
struct Member {
    node: NodeId,
    workspace: Arc<WorkspaceHub>,
}

/// A conflict copy: its place in the commit, the path that kept its name, and the copy's.
type ConflictCopy = (u32, (WirePath, WirePath));

/// The places in a commit of the operations that changed something.
fn changed(result: &CommitResult) -> HashSet<u32> {
    let rejected: HashSet<u32> = result.rejected.iter().map(|other| other.index).collect();
    let accepted = (0_u32..).filter(|index| !rejected.contains(index));
    accepted.zip(&result.seqs).filter(|(_, seq)| **seq != 0).map(|(index, _)| index).collect()
}

impl SyncService {
    /// Serves these workspaces to their members.
    #[must_use]
    pub fn new(
        workspaces: Arc<Workspaces>,
        membership: Arc<dyn Membership>,
        registry: Arc<Registry>,
        events: Arc<EventBus>,
    ) -> Self {
        Self { workspaces, membership, registry, events }
    }

    /// Tells of conflicts, once for each commit: names of members are for those who see them to look up.
    /// Not of copies that were there before, nor more often than one node is heard.
    fn tell_conflicts(&self, of: &Member, copies: &[ConflictCopy], result: &CommitResult) {
        if copies.is_empty() {
            return;
        }
        let changed = changed(result);
        let made: Vec<_> = copies.iter().filter(|(index, _)| changed.contains(index)).collect();
        let Some((_, (path, copy))) = made.first() else { return };
        if !self.registry.may_tell(of.node, Instant::now()) {
            return;
        }
        let workspace = of.workspace.id();
        let name = self.membership.workspace_name(workspace).unwrap_or_default();
        let shown = |path: &WirePath| String::from_utf8_lossy(path.as_bytes()).into_owned();
        let about = NewEvent::of_workspace(workspace, &name).with("copies", made.len());
        let about = about.with("path", shown(path)).with("copy", shown(copy));
        self.events.publish(Kind::WorkspaceConflict, about);
    }

    /// The service with the message limits of the protocol.
    #[must_use]
    pub fn into_server(self) -> SyncServer<Self> {
        SyncServer::new(self)
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES)
    }

    async fn member(&self, node: NodeId, workspace_id: &[u8]) -> Result<Member, Status> {
        let id = convert::workspace_id(workspace_id)?;
        self.check_member(node, id)?;
        let workspace = self.workspaces.workspace(id).await.map_err(status)?;
        Ok(Member { node, workspace })
    }

    fn check_member(&self, node: NodeId, workspace: WorkspaceId) -> Result<(), Status> {
        if self.membership.is_member(node, workspace) {
            return Ok(());
        }
        // The same for a workspace that does not exist: who is no member need not know.
        let text = "this node is not a member of the workspace";
        Err(refuse(Code::PermissionDenied, "not_a_member", text))
    }

    /// The same for whoever wants to write: nobody writes to the library, which the hub makes of what
    /// operators promote.
    async fn writer(&self, node: NodeId, workspace_id: &[u8]) -> Result<Member, Status> {
        let member = self.member(node, workspace_id).await?;
        if member.workspace.id() == WorkspaceId::LIBRARY {
            let text = "nodes read the library and do not write to it";
            return Err(refuse(Code::PermissionDenied, "library_read_only", text));
        }
        Ok(member)
    }

    async fn put_pack(&self, node: NodeId, put: v1::PutPack) -> Result<PutFuture, Status> {
        let Member { workspace, .. } = self.writer(node, &put.workspace_id).await?;
        let room = workspace.incoming_room(node, put.pack.len()).await;
        Ok(Box::pin(async move {
            counters::PACK_BYTES_IN.add(put.pack.len() as u64);
            let ack = workspace.put_pack(put.pack, room).await.map_err(status)?;
            let pack_hash = convert::wire_digest(&ack.hash);
            Ok(v1::PutPackAck { pack_hash, duplicate: ack.duplicate })
        }))
    }
}

/// Where a reader of changes is.
struct Reading {
    after: u64,
    /// It reads the whole tree, because not all deletions since its version are known.
    complete: bool,
}

type PutFuture = Pin<Box<dyn Future<Output = Result<v1::PutPackAck, Status>> + Send>>;
type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl Sync for SyncService {
    async fn head(
        &self,
        request: Request<v1::HeadRequest>,
    ) -> Result<Response<v1::HeadResponse>, Status> {
        let AdmittedNode { node_id } = admitted(&request)?;
        let Member { node, workspace } =
            self.member(node_id, &request.get_ref().workspace_id).await?;
        let head = match convert::known(request.get_ref().known.as_ref())? {
            Some(known) => workspace.check_history(node, known).await.map_err(status)?,
            None => *workspace.head().borrow(),
        };
        Ok(Response::new(v1::HeadResponse {
            epoch: Bytes::copy_from_slice(head.epoch.as_bytes()),
            seq: head.seq,
            root_digest: convert::wire_digest(&head.root),
            name: self.membership.workspace_name(workspace.id()).unwrap_or_default(),
            applied_seq: workspace.applied(node).await.map_err(status)?,
            confirm_deletes: workspace.take_word(node).await.map_err(status)?,
            // Nobody could send what the library has lost.
            wanted: match workspace.id() {
                WorkspaceId::LIBRARY => Bytes::new(),
                _ => convert::wire_hashes(&workspace.wanted().await.map_err(status)?),
            },
        }))
    }

    async fn have(
        &self,
        request: Request<v1::HaveRequest>,
    ) -> Result<Response<v1::HaveResponse>, Status> {
        let AdmittedNode { node_id } = admitted(&request)?;
        let request = request.into_inner();
        let Member { workspace, .. } = self.member(node_id, &request.workspace_id).await?;
        let chunks = convert::hashes(&request.chunks)?;
        let answers = workspace.have(chunks).await.map_err(status)?;
        Ok(Response::new(v1::HaveResponse { bitmap: convert::bitmap(&answers) }))
    }

    type PutPacksStream = Answers<v1::PutPackAck>;

    async fn put_packs(
        &self,
        request: Request<Streaming<v1::PutPack>>,
    ) -> Result<Response<Self::PutPacksStream>, Status> {
        let AdmittedNode { node_id } = admitted(&request)?;
        let service = self.clone();
        // One message is taken in at a time, and waits for its room before the next one is; then
        // several are worked on at once, and answered in order.
        let acks = request
            .into_inner()
            .and_then(move |put| {
                let service = service.clone();
                async move { service.put_pack(node_id, put).await }
            })
            .try_buffered(PACKS_UNDER_WAY);
        Ok(Response::new(until_stopped(self.workspaces.closing(), acks)))
    }

    async fn commit(
        &self,
        request: Request<v1::CommitRequest>,
    ) -> Result<Response<v1::CommitResponse>, Status> {
        let AdmittedNode { node_id } = admitted(&request)?;
        let request = request.into_inner();
        let Member { node, workspace } = self.writer(node_id, &request.workspace_id).await?;
        let room = workspace.incoming_room(node, request.encoded_len()).await;
        same_history(&workspace, node, request.known.as_ref()).await?;
        let commit = convert::commit(request, node)?;
        let copies: Vec<_> = commit.copies().collect();
        let result = workspace.commit(commit).await.map_err(status)?;
        drop(room);
        counters::COMMITS.add(1);
        counters::CHANGES_REJECTED.add(result.rejected.len() as u64);
        self.tell_conflicts(&Member { node, workspace }, &copies, &result);
        Ok(Response::new(convert::wire_result(result)))
    }

    type ChangesStream = Answers<v1::ChangesPage>;

    async fn changes(
        &self,
        request: Request<v1::ChangesRequest>,
    ) -> Result<Response<Self::ChangesStream>, Status> {
        let AdmittedNode { node_id } = admitted(&request)?;
        let request = request.into_inner();
        let Member { node, workspace } = self.member(node_id, &request.workspace_id).await?;
        same_history(&workspace, node, request.known.as_ref()).await?;
        let service = self.clone();
        let first = Reading { after: request.after_seq, complete: false };
        let pages = stream::try_unfold(Some(first), move |reading| {
            let (service, workspace) = (service.clone(), workspace.clone());
            async move {
                let Some(Reading { after, mut complete }) = reading else { return Ok(None) };
                service.check_member(node, workspace.id())?;
                let mut page = workspace.changes(after, PAGE_BYTES).await.map_err(status)?;
                // From 0, members know that what is not named is not there.
                if after > 0 && after < page.log_floor && !complete {
                    complete = true;
                    page = workspace.changes(0, PAGE_BYTES).await.map_err(status)?;
                }
                let next = (page.last_seq < page.head.seq)
                    .then_some(Reading { after: page.last_seq, complete });
                Ok::<_, Status>(Some((convert::wire_page(page, complete), next)))
            }
        });
        Ok(Response::new(until_stopped(self.workspaces.closing(), pages)))
    }

    type GetPacksStream = Answers<v1::Pack>;

    async fn get_packs(
        &self,
        request: Request<v1::GetPacksRequest>,
    ) -> Result<Response<Self::GetPacksStream>, Status> {
        let AdmittedNode { node_id } = admitted(&request)?;
        let request = request.into_inner();
        let Member { node, workspace } = self.member(node_id, &request.workspace_id).await?;
        let chunks = convert::hashes(&request.chunks)?;
        let Found { packs, missing } = workspace.packs_of(chunks).await.map_err(status)?;
        let unknown = (!missing.is_empty()).then(|| Ok(absent(&missing)));
        // Held as long as the stream: a member that does not read keeps its own room only.
        let room = workspace.outgoing_room(node, PACKS_AHEAD * MAX_MESSAGE_BYTES).await;
        let service = self.clone();
        let packs = stream::iter(packs)
            .map(move |(pack, chunks)| {
                let _held = &room;
                let (service, workspace) = (service.clone(), workspace.clone());
                async move {
                    service.check_member(node, workspace.id())?;
                    let pack = workspace.read_pack(pack).await.map_err(status)?;
                    counters::PACK_BYTES_OUT.add(pack.as_ref().map_or(0, |pack| pack.len() as u64));
                    Ok(pack.map_or_else(
                        || absent(&chunks),
                        |pack| v1::Pack { pack, missing: Bytes::new() },
                    ))
                }
            })
            .buffered(PACKS_AHEAD);
        let packs = stream::iter(unknown).chain(packs);
        Ok(Response::new(until_stopped(self.workspaces.closing(), packs)))
    }

    async fn ack_applied(
        &self,
        request: Request<v1::AckAppliedRequest>,
    ) -> Result<Response<v1::AckAppliedResponse>, Status> {
        let AdmittedNode { node_id } = admitted(&request)?;
        let request = request.into_inner();
        let Member { node, workspace } = self.member(node_id, &request.workspace_id).await?;
        let epoch = convert::epoch(&request.epoch)?;
        workspace.ack_applied(node, epoch, request.seq).await.map_err(status)?;
        // Who waits for it may have had this node's last report before.
        self.registry.notify();
        Ok(Response::new(v1::AckAppliedResponse {}))
    }
}

/// Refuses a member whose versions are not those of this history.
async fn same_history(
    workspace: &WorkspaceHub,
    member: NodeId,
    known: Option<&v1::Version>,
) -> Result<(), Status> {
    let Some(known) = convert::known(known)? else { return Ok(()) };
    let head = workspace.check_history(member, known).await.map_err(status)?;
    if head.epoch == known.epoch {
        return Ok(());
    }
    let error = StoreError::WrongEpoch { asked: known.epoch, current: head.epoch };
    Err(status(error.into()))
}

/// Names chunks that the hub does not have.
fn absent(chunks: &[Digest]) -> v1::Pack {
    v1::Pack { pack: Bytes::new(), missing: convert::wire_hashes(chunks) }
}

/// How errors of a workspace look to a caller.
pub(super) fn status(error: SyncError) -> Status {
    if matches!(error, SyncError::Full) {
        return no_room();
    }
    if error.is_disk_full() {
        return disk_full(&error);
    }
    match &error {
        SyncError::Pack(reason) => invalid(format!("invalid pack: {reason}")),
        SyncError::Store(reason) => {
            let text = reason.to_string();
            match reason {
                StoreError::WrongEpoch { .. } => {
                    refuse(Code::FailedPrecondition, "epoch_changed", text)
                }
                StoreError::BeyondHead { .. } => {
                    refuse(Code::FailedPrecondition, "beyond_head", text)
                }
                StoreError::ForeignCommit { .. } => {
                    refuse(Code::AlreadyExists, "commit_id_used", text)
                }
                StoreError::VersionForgotten { .. } => {
                    refuse(Code::NotFound, "version_forgotten", text)
                }
                StoreError::NotWhole { .. } => refuse(Code::Aborted, "changed", text),
                StoreError::NothingBefore { .. } => refuse(Code::NotFound, "nothing_before", text),
                StoreError::TooMuch { .. } => refuse(Code::ResourceExhausted, "too_much", text),
                StoreError::Database(error) => from_database(error),
            }
        }
        SyncError::OverQuota { .. } => over_quota(&error),
        SyncError::RestartedTooOften { .. } => {
            refuse(Code::Unavailable, "restarted_too_often", error.to_string())
        }
        SyncError::Deleted => {
            refuse(Code::NotFound, "workspace_not_found", "the workspace was deleted")
        }
        SyncError::Full | SyncError::Files(_) | SyncError::Failed => internal(&error),
    }
}

#[cfg(test)]
mod tests;
