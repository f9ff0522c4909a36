//! Reading the history of a node.

use std::collections::VecDeque;
use std::sync::Arc;

use cortex_proto::v1;
use cortex_shared::ids::NodeId;
use cortex_shared::policy::Role;
use futures_util::stream;
use tokio::sync::watch;
use tonic::{Code, Status};

use super::auth::AdmittedOperator;
use super::in_scope::while_seen;
use super::operator::{BoxStream, OperatorService};
use super::status::{from_lookup, from_store, refuse};
use crate::node::registry::NodeLookup;
use crate::store::StoreError;
use crate::store::history::Segment;
use crate::task::history::History;

/// Segments that are read at once; each is some ten kilobytes.
const PAGE: u32 = 32;

struct Reading {
    history: Arc<History>,
    node: NodeId,
    /// The last segment that was read.
    seq: u64,
    /// Bytes of the next one that belong to lines that are not wanted.
    skip: usize,
    segments: VecDeque<(u64, Segment)>,
    changes: watch::Receiver<u64>,
    follow: bool,
}

/// The latest output of a node's commands, and with `follow` what comes.
pub(super) async fn read(
    service: &OperatorService,
    caller: &AdmittedOperator,
    request: v1::ReadHistoryRequest,
) -> Result<BoxStream<v1::ReadHistoryResponse>, Status> {
    if caller.role == Role::AgentToken {
        let view = service.node(&request.node, caller)?;
        let detail = serde_json::json!({ "reason": "own_tasks_only" });
        let (actor, node) = (caller.actor(), view.node.name);
        service.refusals.record(&actor, "history.refused", &node, detail);
        let text = "an agent token sees the output of its own tasks only";
        return Err(refuse(Code::PermissionDenied, "own_tasks_only", text));
    }
    let node = service.node(&request.node, caller)?.node.id;
    let history = Arc::clone(service.relay.history());
    let changes = history.changes();
    history.flush().await;
    let (seq, skip) = match request.after_seq {
        0 => start(&history, node, request.lines).await.map_err(from_store)?,
        seq => (seq, 0),
    };
    let follow = request.follow;
    let segments = VecDeque::new();
    let reading = Reading { history, node, seq, skip, segments, changes, follow };
    let stop = service.scope.token().clone();
    let frames = stream::unfold(Some(reading), move |reading| {
        let stop = stop.clone();
        async move {
            let mut reading = reading?;
            match stop.run_until_cancelled(next(&mut reading)).await {
                Some(Ok(Some(frame))) => Some((Ok(frame), Some(reading))),
                Some(Ok(None)) => None,
                Some(Err(error)) => Some((Err(from_store(error)), None)),
                None => Some((Err(super::exec::hub_stops()), None)),
            }
        }
    });
    let wanted = NodeLookup::Unknown { wanted: request.node, similar: None };
    let gone = from_lookup(wanted);
    Ok(while_seen(Box::pin(frames), &service.registry, caller, node, gone))
}

/// Where the last lines begin: after which segment, and how many bytes into the next.
async fn start(history: &History, node: NodeId, lines: u32) -> Result<(u64, usize), StoreError> {
    if lines == 0 {
        return Ok((0, 0));
    }
    let (mut before, mut left) = (u64::MAX, lines);
    let mut newest = true;
    loop {
        let page = history.store().before(node, before, PAGE).await?;
        if page.is_empty() {
            return Ok((0, 0));
        }
        for (seq, segment) in page {
            let mut end = segment.data.len();
            // The very last newline ends a line and begins none.
            if std::mem::take(&mut newest) && segment.data.ends_with(b"\n") {
                end -= 1;
            }
            while let Some(at) = segment.data[..end].iter().rposition(|byte| *byte == b'\n') {
                left -= 1;
                if left == 0 {
                    return Ok((seq.saturating_sub(1), at + 1));
                }
                end = at;
            }
            before = seq;
        }
    }
}

async fn next(reading: &mut Reading) -> Result<Option<v1::ReadHistoryResponse>, StoreError> {
    loop {
        if let Some((seq, mut segment)) = reading.segments.pop_front() {
            reading.seq = seq;
            let skip = std::mem::take(&mut reading.skip).min(segment.data.len());
            segment.data.drain(..skip);
            return Ok(Some(v1::ReadHistoryResponse {
                at_ms: segment.at_ms,
                task_id: segment.task.as_bytes().to_vec().into(),
                stream: i32::from(segment.stream),
                data: segment.data.into(),
                skipped_bytes: segment.skipped,
                seq,
            }));
        }
        reading.changes.mark_unchanged();
        let store = reading.history.store();
        reading.segments = store.after(reading.node, reading.seq, PAGE).await?.into();
        if !reading.segments.is_empty() {
            continue;
        }
        // The history outlives every reader of it.
        if !reading.follow || reading.changes.changed().await.is_err() {
            return Ok(None);
        }
    }
}
