//! Files of workspaces on nodes: who may, and the way between an operator and the node.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use cortex_proto::MAX_OUTPUT_FRAME_BYTES;
use cortex_proto::v1::{
    self, file_down, file_io_down, file_io_up, file_request, file_up, hub_frame,
};
use cortex_shared::clock::unix_ms;
use cortex_shared::ids::{NodeId, RequestId};
use cortex_shared::text::{hex, shorten};
use cortex_shared::wire_path::WirePath;
use futures_util::{Stream, StreamExt as _, stream};
use prost::Message as _;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status, Streaming};

use super::auth::AdmittedOperator;
use super::detached::run_to_end;
use super::exec::cordoned;
use super::operator::{BoxStream, OperatorService};
use super::status::{from_store, invalid, offline, refuse, with_hint, with_retry_after};
use crate::node::files::{Call, FileExchange, Flow, NodeEnd};
use crate::node::registry::SessionHandle;
use crate::store::{Actor, Node, Store};

/// Time the caller has to send its first frame.
const FIRST_FRAME: Duration = Duration::from_secs(10);
/// Time the node has to open its stream.
const OPEN_TIMEOUT: Duration = Duration::from_secs(20);
/// Longest text of a node that is passed on.
const MAX_TEXT_BYTES: usize = 1024;

/// The outcome of a change of which the node said nothing.
const UNKNOWN: &str = "unknown";

type Frames = BoxStream<v1::FileDown>;

/// What a method is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    Look,
    Change,
}

/// Begins an operation; returns what its caller gets.
pub(super) async fn begin(
    service: &OperatorService,
    operator: AdmittedOperator,
    mut inbound: Streaming<v1::FileUp>,
    purpose: Purpose,
) -> Result<Frames, Status> {
    let first = tokio::time::timeout(FIRST_FRAME, inbound.message())
        .await
        .map_err(|_| refuse(Code::DeadlineExceeded, "no_first_frame", "no request in time"))??;
    let Some(file_up::Frame::Start(start)) = first.and_then(|first| first.frame) else {
        return Err(invalid("the first frame is what is wanted of which node"));
    };
    let mut request = start.request.ok_or_else(|| invalid("there is no request"))?;
    let action = check(&request, purpose)?;
    let view = service.node(&start.node, &operator)?;
    let node = view.node;
    let workspace = allowed(service, &node, &request).inspect_err(|refusal| {
        if purpose == Purpose::Change {
            let mut detail = describe(&node, &request);
            detail["reason"] = refusal.message().into();
            detail["action"] = action.into();
            service.refusals.record(&operator.actor(), "file.refused", &node.name, detail);
        }
    })?;
    request.workspace_id = workspace;
    let session = match view.session {
        Some(session) => session,
        None => service.returning(&node).await?,
    };
    let call = service.files.begin(node.id, &operator.name).map_err(|refusal| {
        let status = refuse(Code::ResourceExhausted, "too_many_files", refusal.to_string());
        with_retry_after(status, Duration::from_secs(1))
    })?;
    let record = match purpose {
        Purpose::Look => None,
        Purpose::Change => {
            Some(Record::begin(service, &operator, &node, &request, action, call.id).await?)
        }
    };
    let open = v1::OpenFileIo { request_id: call.id.as_bytes().to_vec().into() };
    let sent = session.send(hub_frame::Frame::OpenFileIo(open));
    sent.map_err(|_| offline(&node.name))?;
    let request = file_io_down::Frame::Request(request);
    call.to_node.try_send(request).map_err(|_| offline(&node.name))?;
    let (to_node, flow, over) = (call.to_node.clone(), Arc::clone(&call.flow), call.over());
    let stop = service.scope.token().clone();
    service.scope.spawn("files", async move {
        tokio::select! {
            () = stop.cancelled() => {}
            () = over.cancelled() => {}
            () = pass_on(inbound, &to_node, &flow, &over) => {}
        }
    });
    let stop = service.scope.token().clone();
    let name = node.name;
    let answers =
        Answers { call, session, record, name, stop, open_by: Instant::now() + OPEN_TIMEOUT };
    Ok(Box::pin(answers.into_stream()))
}

/// Whether a request is well formed, and of this kind; what it is called in the audit log.
fn check(request: &v1::FileRequest, purpose: Purpose) -> Result<&'static str, Status> {
    if !request.path.is_empty() {
        WirePath::new(request.path.as_ref()).map_err(|error| {
            let text = format!("{:?}: {error}", String::from_utf8_lossy(&request.path));
            with_hint(invalid(text), "a path is WORKSPACE/names, without . and ..")
        })?;
    }
    let action = request.action.as_ref().ok_or_else(|| invalid("there is no action"))?;
    let (of, name) = match action {
        file_request::Action::List(list) => {
            if list.after.len() > cortex_shared::wire_path::MAX_NAME_BYTES {
                return Err(invalid("the name after which to go on is too long"));
            }
            (Purpose::Look, "file.list")
        }
        file_request::Action::Read(_) => (Purpose::Look, "file.read"),
        file_request::Action::Stat(_) => (Purpose::Look, "file.stat"),
        file_request::Action::Write(write) => {
            if !matches!(write.expected_hash.len(), 0 | 32) {
                return Err(invalid("a hash has 32 bytes"));
            }
            if write.must_be_absent && !write.expected_hash.is_empty() {
                return Err(invalid("a file cannot be absent and have a hash"));
            }
            if write.mode > 0o777 {
                return Err(invalid("permission bits are at most 0777"));
            }
            (Purpose::Change, "file.write")
        }
        file_request::Action::Remove(_) => (Purpose::Change, "file.remove"),
        file_request::Action::MakeDirectory(_) => (Purpose::Change, "file.mkdir"),
    };
    if of == purpose { Ok(name) } else { Err(invalid("this method is not for this action")) }
}

/// The id of the workspace, if the node has it and may be asked.
fn allowed(
    service: &OperatorService,
    node: &Node,
    request: &v1::FileRequest,
) -> Result<bytes::Bytes, Status> {
    if node.cordoned {
        return Err(cordoned(&node.name));
    }
    let workspace = service.members.membership.by_name(&request.workspace);
    let workspace = workspace.filter(|workspace| workspace.members.contains(&node.id));
    let workspace = workspace.ok_or_else(|| {
        let wanted: String = request.workspace.chars().take(63).collect();
        let text = format!("node {:?} has no workspace {wanted:?}", node.name);
        with_hint(
            refuse(Code::NotFound, "not_a_member", text),
            "list them: cortex-agent workspace list",
        )
    })?;
    Ok(workspace.id.as_bytes().to_vec().into())
}

/// What the audit log says of a request.
fn describe(node: &Node, request: &v1::FileRequest) -> Value {
    let mut path = String::from_utf8_lossy(&request.path).into_owned();
    let lossless = path.as_bytes() == request.path.as_ref();
    shorten(&mut path, MAX_TEXT_BYTES);
    let mut detail = json!({
        "node_id": node.id.to_string(),
        "workspace": request.workspace.chars().take(63).collect::<String>(),
        "path": path,
    });
    if !lossless {
        detail["path_hex"] = hex(&request.path).into();
    }
    match &request.action {
        Some(file_request::Action::Write(write)) => {
            if !write.expected_hash.is_empty() {
                detail["if_hash"] = hex(&write.expected_hash).into();
            }
            if write.must_be_absent {
                detail["if_absent"] = true.into();
            }
            if write.has_mode {
                detail["mode"] = format!("{:04o}", write.mode).into();
            }
        }
        Some(file_request::Action::Remove(remove)) => {
            detail["recursive"] = remove.recursive.into();
        }
        _ => {}
    }
    detail
}

/// Passes the caller's frames on to the node, until the caller ends them.
async fn pass_on(
    mut inbound: Streaming<v1::FileUp>,
    to_node: &mpsc::Sender<file_io_down::Frame>,
    flow: &Flow,
    over: &CancellationToken,
) {
    while let Ok(Some(frame)) = inbound.message().await {
        let frame = match frame.frame {
            Some(file_up::Frame::Credit(credit)) => {
                flow.down.give(credit.bytes);
                file_io_down::Frame::Credit(credit)
            }
            Some(file_up::Frame::Data(data)) => {
                let length = data.data.len();
                if length > MAX_OUTPUT_FRAME_BYTES || !flow.up.take(length as u64) {
                    // It sends more than it may: its own operation is the only one that suffers.
                    return over.cancel();
                }
                file_io_down::Frame::Data(data)
            }
            Some(file_up::Frame::Start(_)) | None => continue,
        };
        if to_node.send(frame).await.is_err() {
            return;
        }
    }
}

/// What the caller gets.
struct Answers {
    call: Call,
    session: SessionHandle,
    record: Option<Record>,
    /// Of the node.
    name: String,
    stop: CancellationToken,
    open_by: Instant,
}

impl Answers {
    fn into_stream(self) -> impl Stream<Item = Result<v1::FileDown, Status>> + Send {
        stream::unfold(Some(self), |answers| async move {
            let mut answers = answers?;
            match answers.next().await {
                Ok((frame, true)) => Some((Ok(frame), Some(answers))),
                // Its last frame, or an error, is all that comes.
                Ok((frame, false)) => Some((Ok(frame), None)),
                Err(status) => {
                    if let Some(record) = &mut answers.record {
                        record.lost(status.message());
                    }
                    Some((Err(status), None))
                }
            }
        })
    }

    /// The next frame, and whether more come.
    async fn next(&mut self) -> Result<(v1::FileDown, bool), Status> {
        let over = self.call.over();
        let frame = tokio::select! {
            biased;
            frame = self.call.from_node.recv() => {
                frame.ok_or_else(|| lost(&self.name))?
            }
            () = over.cancelled() => {
                let text = "more was under way than may be";
                return Err(refuse(Code::Aborted, "flow_violation", text));
            }
            () = self.session.ended() => return Err(lost(&self.name)),
            () = self.stop.cancelled() => return Err(hub_stops()),
            () = tokio::time::sleep_until(self.open_by), if self.call.waits() => {
                let text =
                    format!("node {:?} does not answer; its agent may be too old", self.name);
                return Err(with_hint(
                    refuse(Code::Unavailable, "node_silent", text),
                    &format!("see its version: cortex-agent node show {}", self.name),
                ));
            }
        };
        let frame = match frame {
            file_io_up::Frame::Entries(entries) => file_down::Frame::Entries(entries),
            file_io_up::Frame::Data(data) => file_down::Frame::Data(data),
            file_io_up::Frame::Credit(credit) => file_down::Frame::Credit(credit),
            file_io_up::Frame::Done(done) => {
                if let Some(record) = &mut self.record {
                    record.done(&done);
                }
                file_down::Frame::Done(done)
            }
            file_io_up::Frame::Refused(refused) => {
                let status = from_node(refused);
                if let Some(record) = &mut self.record {
                    record.refused(status.message());
                }
                return Err(status);
            }
            file_io_up::Frame::Hello(_) => return Err(lost(&self.name)),
        };
        let more = !matches!(frame, file_down::Frame::Done(_));
        Ok((v1::FileDown { frame: Some(frame) }, more))
    }
}

fn hub_stops() -> Status {
    let text = "the hub is shutting down; what was done is not known";
    with_retry_after(refuse(Code::Unavailable, "shutting_down", text), Duration::from_secs(1))
}

fn lost(node: &str) -> Status {
    let text =
        format!("the session with node {node:?} ended in the middle; what was done is not known");
    with_hint(
        refuse(Code::Unavailable, "stream_lost", text),
        "look at the file when the node is back: cortex-agent stat NODE:PATH",
    )
}

/// How a node's refusal looks to the caller.
fn from_node(refused: v1::FileRefused) -> Status {
    let (code, word) = match refused.kind() {
        v1::FileRefusal::Failed => (Code::Unknown, "file_failed"),
        v1::FileRefusal::NotFound => (Code::NotFound, "file_not_found"),
        v1::FileRefusal::WrongKind => (Code::FailedPrecondition, "wrong_kind"),
        v1::FileRefusal::Exists => (Code::AlreadyExists, "file_exists"),
        v1::FileRefusal::Changed => (Code::Aborted, "file_changed"),
        v1::FileRefusal::Denied => (Code::PermissionDenied, "file_denied"),
        v1::FileRefusal::Protected => (Code::PermissionDenied, "name_protected"),
        v1::FileRefusal::NoSpace => (Code::ResourceExhausted, "node_disk_full"),
        v1::FileRefusal::TooMuch => (Code::ResourceExhausted, "too_much"),
        v1::FileRefusal::Invalid => (Code::InvalidArgument, "invalid_argument"),
        v1::FileRefusal::Unusable => (Code::FailedPrecondition, "workspace_unusable"),
    };
    let bounded = |mut text: String| {
        shorten(&mut text, MAX_TEXT_BYTES);
        text
    };
    let status = refuse(code, word, bounded(refused.reason));
    if refused.hint.is_empty() { status } else { with_hint(status, &bounded(refused.hint)) }
}

/// A change in the audit log: a line before the node hears of it, and one for how it ended.
struct Record {
    store: Arc<dyn Store>,
    scope: cortex_shared::tasks::TaskScope,
    actor: Actor,
    node: String,
    detail: Value,
}

impl Record {
    async fn begin(
        service: &OperatorService,
        operator: &AdmittedOperator,
        node: &Node,
        request: &v1::FileRequest,
        action: &'static str,
        id: RequestId,
    ) -> Result<Self, Status> {
        let mut detail = describe(node, request);
        detail["request_id"] = id.to_string().into();
        let (store, actor) = (Arc::clone(&service.store), operator.actor());
        let line = actor.audit(unix_ms(), action, &node.name, detail.clone());
        let writing = {
            let store = Arc::clone(&store);
            run_to_end(&service.scope, "audit", async move { store.record_audit(line).await })
        };
        let written = tokio::time::timeout(service.accept_deadline, writing).await;
        let slow = || {
            let text = "the hub's store did not take the request in time; nothing was changed";
            with_retry_after(refuse(Code::Unavailable, "store_slow", text), Duration::from_secs(2))
        };
        written.map_err(|_| slow())??.map_err(from_store)?;
        detail["action"] = action.into();
        detail["outcome"] = UNKNOWN.into();
        detail["reason"] = "the caller went away".into();
        let scope = service.scope.clone();
        Ok(Self { store, scope, actor, node: node.name.clone(), detail })
    }

    fn done(&mut self, done: &v1::FileDone) {
        self.detail["outcome"] = "done".into();
        if let Some(detail) = self.detail.as_object_mut() {
            detail.remove("reason");
        }
        if !done.hash.is_empty() {
            self.detail["bytes"] = done.bytes.into();
            self.detail["hash"] = hex(&done.hash[..done.hash.len().min(32)]).into();
        }
        if done.count > 0 {
            self.detail["count"] = done.count.into();
        }
    }

    fn refused(&mut self, reason: &str) {
        self.detail["outcome"] = "refused".into();
        self.detail["reason"] = reason.into();
    }

    /// Unless something better is known.
    fn lost(&mut self, reason: &str) {
        if self.detail["outcome"] == UNKNOWN {
            self.detail["reason"] = reason.into();
        }
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        let detail = std::mem::take(&mut self.detail);
        let line =
            self.actor.audit(unix_ms(), "file.ended", std::mem::take(&mut self.node), detail);
        let store = Arc::clone(&self.store);
        self.scope.spawn("audit", async move {
            if let Err(error) = store.record_audit(line).await {
                tracing::warn!(%error, "how an operation on files ended was not recorded");
            }
        });
    }
}

type NodeFrames = Pin<Box<dyn Stream<Item = Result<v1::FileIoDown, Status>> + Send>>;

/// The node's stream of an operation.
pub(super) fn node_stream(
    exchange: &FileExchange,
    node: NodeId,
    id: RequestId,
    inbound: Streaming<v1::FileIoUp>,
    scope: &cortex_shared::tasks::TaskScope,
) -> Result<NodeFrames, Status> {
    let end = exchange.take(node, id).ok_or_else(|| {
        refuse(Code::NotFound, "request_unknown", "no such request waits for this node")
    })?;
    let NodeEnd { to_caller, from_caller, flow, over } = end;
    let (stop, ended) = (scope.token().clone(), over.clone());
    scope.spawn("file answers", async move {
        tokio::select! {
            () = stop.cancelled() => {}
            () = ended.cancelled() => {}
            () = answer(inbound, to_caller, &flow) => {}
        }
    });
    let stop = scope.token().clone();
    let over = async move {
        tokio::select! {
            () = stop.cancelled() => {}
            () = over.cancelled() => {}
        }
    };
    let frames = ReceiverStream::new(from_caller)
        .map(|frame| Ok(v1::FileIoDown { frame: Some(frame) }))
        .take_until(over);
    Ok(Box::pin(frames))
}

/// Reads the node's frames. Never waits for the caller: an honest node sends no more than there is
/// room for, and one that is not honest ends its operation.
async fn answer(
    mut inbound: Streaming<v1::FileIoUp>,
    to_caller: mpsc::Sender<file_io_up::Frame>,
    flow: &Flow,
) {
    while let Ok(Some(frame)) = inbound.message().await {
        let Some(frame) = frame.frame else { continue };
        let fits = match &frame {
            file_io_up::Frame::Data(data) => {
                data.data.len() <= MAX_OUTPUT_FRAME_BYTES && flow.down.take(data.data.len() as u64)
            }
            file_io_up::Frame::Entries(entries) => {
                let length = entries.encoded_len();
                length <= MAX_OUTPUT_FRAME_BYTES && flow.down.take(length as u64)
            }
            file_io_up::Frame::Credit(credit) => {
                flow.up.give(credit.bytes);
                true
            }
            file_io_up::Frame::Done(_) | file_io_up::Frame::Refused(_) => true,
            file_io_up::Frame::Hello(_) => false,
        };
        if !fits || to_caller.try_send(frame).is_err() {
            tracing::warn!("a node sent more of a file than it may");
            return;
        }
    }
}
