//! The Node service: sessions and the streams of running tasks.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use cortex_proto::v1::node_server::Node;
use cortex_proto::v1::{
    Credit, FileIoDown, FileIoUp, HubFrame, LeaveRequest, LeaveResponse, NodeFrame, RenewRequest,
    RenewResponse, RequestAttachRequest, RequestAttachResponse, Signal, Stdin, TaskIoDown,
    TaskIoUp, Welcome, file_io_up, hub_frame, node_frame, task_io_down, task_io_up,
};
use cortex_shared::clock::unix_ms;
use cortex_shared::ids::{NodeId, RequestId};
use cortex_shared::tasks::TaskScope;
use futures_util::{Stream, StreamExt as _, stream};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Request, Response, Status, Streaming};

use super::auth::{AdmittedNode, Peer, admitted, life_left};
use super::detached::run_to_end;
use super::status::{
    from_arrival, from_decision, from_enroll, from_node, from_store, invalid, refuse, with_hint,
};
use super::{convert, files};
use crate::authority::nodes::NodeDecisions;
use crate::enroll::authorities::Authorities;
use crate::enroll::validator::Validator;
use crate::events::{EventBus, Kind, NewEvent};
use crate::node::files::FileExchange;
use crate::node::registry::{ArrivalRefusal, NodeRefusal, Outbox, Registry, policy_update};
use crate::node::session::{self, SessionGuard};
use crate::store::{Actor, Presented, Store};
use crate::sync::members::Members;
use crate::task::relay::{Relay, StreamRefusal, Task};
use crate::task::to_node;

/// Time a node has to send its first frame on a stream.
const FIRST_FRAME: Duration = Duration::from_secs(10);
/// Longest wait for the end of a certificate before somebody looks again: it may have been renewed.
const CERTIFICATE_LOOK: Duration = Duration::from_secs(3600);
/// Heartbeats that all nodes together send in a second at most: some per cent of a processor.
const HEARTBEATS_PER_SECOND: u32 = 500;
/// A difference between a node's clock and the hub's that is worth a word.
const WORTHY_SKEW_MS: u64 = 30_000;

/// See the module.
pub struct NodeService {
    /// Who is known and connected.
    pub registry: Arc<Registry>,
    /// Running tasks.
    pub relay: Arc<Relay>,
    /// Operations on files.
    pub files: Arc<FileExchange>,
    /// Workspaces and their members.
    pub members: Arc<Members>,
    /// Where certificates are renewed.
    pub validator: Arc<Validator>,
    /// Whose certificates are trusted.
    pub authorities: Arc<Authorities>,
    /// Decisions about nodes.
    pub decisions: Arc<NodeDecisions>,
    /// Where copies of identities are recorded.
    pub store: Arc<dyn Store>,
    /// Where it is told what happens.
    pub events: Arc<EventBus>,
    /// Owns the session tasks.
    pub scope: TaskScope,
    /// Interval told to nodes.
    pub heartbeat: Duration,
}

impl NodeService {
    /// Ends a session when neither the certificate it began with nor a newer one is good any longer.
    fn end_with_certificate(&self, id: NodeId, began_with_ms: i64, cancel: CancellationToken) {
        let registry = Arc::clone(&self.registry);
        self.scope.spawn("certificate end", async move {
            loop {
                let newest = registry.get(id).map(|view| view.node.certificate.not_after_ms);
                let not_after_ms = newest.unwrap_or_default().max(began_with_ms);
                let Some(left) = life_left(not_after_ms) else {
                    tracing::warn!(%id, "the certificate of a connected node has expired");
                    return cancel.cancel();
                };
                tokio::select! {
                    () = cancel.cancelled() => return,
                    () = tokio::time::sleep(left.min(CERTIFICATE_LOOK)) => {}
                }
            }
        });
    }

    /// Writes a copy of an identity down that was found, beside the path of whoever is refused.
    fn record_clone(&self, id: NodeId, refusal: &ArrivalRefusal) {
        let ArrivalRefusal::Cloned { name, suspicion, holder, news: true } = refusal else {
            return;
        };
        tracing::warn!(node = %name, %id, ?suspicion, ?holder, "a copied identity was refused");
        if let Some(view) = self.registry.get(id) {
            let told = NewEvent::of_node(&view.node).with("hostname", &*suspicion.machine.hostname);
            self.events.publish(Kind::NodeCloneSuspected, told);
        }
        let (store, suspicion) = (Arc::clone(&self.store), suspicion.as_ref().clone());
        self.scope.spawn("clone suspicion", async move {
            if let Err(error) = store.suspect_clone(id, suspicion).await {
                tracing::error!(%id, %error, "the suspicion of a copied identity was not recorded");
            }
        });
    }
}

type BoxStream<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

async fn first_frame<T>(inbound: &mut Streaming<T>) -> Result<T, Status> {
    match tokio::time::timeout(FIRST_FRAME, inbound.message()).await {
        Ok(Ok(Some(frame))) => Ok(frame),
        Ok(Ok(None)) => Err(invalid("the stream ended before its first frame")),
        Ok(Err(status)) => Err(status),
        Err(_) => Err(refuse(Code::DeadlineExceeded, "no_first_frame", "no first frame in time")),
    }
}

/// Only the first lets the node give the task up.
fn from_stream(refusal: StreamRefusal) -> Status {
    let (code, word) = match refusal {
        StreamRefusal::Unknown => (Code::NotFound, "task_unknown"),
        StreamRefusal::NotReached => (Code::Unavailable, "task_not_reached"),
    };
    refuse(code, word, refusal.to_string())
}

#[tonic::async_trait]
impl Node for NodeService {
    type LinkStream = BoxStream<HubFrame>;
    type TaskIoStream = BoxStream<TaskIoDown>;
    type FileIoStream = BoxStream<FileIoDown>;

    async fn link(
        &self,
        request: Request<Streaming<NodeFrame>>,
    ) -> Result<Response<Self::LinkStream>, Status> {
        let AdmittedNode { node_id } = admitted(&request)?;
        let peer = request.extensions().get::<Peer>().cloned();
        let mut inbound = request.into_inner();
        let Some(node_frame::Frame::Hello(hello)) = first_frame(&mut inbound).await?.frame else {
            return Err(invalid("the first frame of a session is Hello"));
        };
        let held = convert::held_tasks(&hello.held_tasks);
        let signed = peer.as_ref().and_then(Peer::generation);
        let not_after_ms = match &peer {
            Some(Peer::Certified { not_after_ms, .. }) => *not_after_ms,
            _ => 0,
        };
        let arrival = convert::arrival(hello, signed, peer.as_ref().and_then(Peer::address))?;
        let skew_ms = arrival.skew_ms.unwrap_or_default();
        let cancel = self.scope.token().child_token();
        let (ends, node, presented) = match self.registry.begin_session(node_id, arrival, cancel) {
            Ok(begun) => begun,
            Err(refusal) => {
                self.record_clone(node_id, &refusal);
                return Err(from_arrival(refusal));
            }
        };
        let guard = SessionGuard::new(
            ends.handle.clone(),
            Arc::clone(&self.registry),
            Arc::clone(&self.members.membership),
            Arc::clone(&self.relay),
            Arc::clone(&self.events),
        );
        let heartbeat = heartbeat_for(self.registry.online(), self.heartbeat);
        let policy = policy_update(&node.policy, unix_ms());
        let ring = self.authorities.ring();
        let welcome = Welcome {
            session_id: ends.handle.id.as_bytes().to_vec().into(),
            epoch: ends.handle.epoch,
            name: node.name.clone(),
            heartbeat_interval_ms: u64::try_from(heartbeat.as_millis()).unwrap_or(u64::MAX),
            hub_time_ms: unix_ms(),
            policy: policy.policy,
            policy_until_ms: policy.until_ms,
            policy_network: policy.network,
            resume_grace_ms: u64::try_from(self.relay.resume_grace().as_millis())
                .unwrap_or(u64::MAX),
            hub_version: env!("CARGO_PKG_VERSION").to_owned(),
            trusted_cas_der: ring.trusted_der(),
            // Also who missed an answer: what it has may be of an authority that is to be retired.
            renew_now: !ring.has_moved(&node) || presented == Presented::MissedAnswer,
        };
        self.relay.session_began(&ends.handle, &held);
        self.registry.correct_policy(node_id, &node.policy);
        // Beside the session, which must not wait for the workspaces' databases.
        let members = Arc::clone(&self.members);
        self.scope.spawn("memberships", async move { members.send_memberships(node_id).await });
        tracing::info!(node = %node.name, id = %node_id, session = %ends.handle.id, "node connected");
        let address = peer.as_ref().and_then(Peer::address);
        let online = NewEvent::of_node(&node).with("agent_version", &*node.facts.agent_version);
        let online = online.with("address", address.map(|address| address.to_string()));
        self.events.publish(Kind::NodeOnline, online.with("epoch", ends.handle.epoch));
        if skew_ms.unsigned_abs() > WORTHY_SKEW_MS {
            tracing::warn!(node = %node.name, skew_ms, "the node's clock and the hub's differ");
        }
        let cancel = ends.cancel.clone();
        let inbound = inbound.map(|frame| frame.map(convert::node_frame));
        self.scope.spawn("session", async move {
            session::run(guard, inbound, cancel, heartbeat).await;
        });
        self.end_with_certificate(node_id, not_after_ms, ends.cancel.clone());
        let frames = outbound(welcome, ends.outbox, ends.cancel.cancelled_owned());
        Ok(Response::new(Box::pin(frames.map(|frame| Ok(*frame)))))
    }

    async fn task_io(
        &self,
        request: Request<Streaming<TaskIoUp>>,
    ) -> Result<Response<Self::TaskIoStream>, Status> {
        let AdmittedNode { node_id } = admitted(&request)?;
        let mut inbound = request.into_inner();
        let Some(task_io_up::Frame::Hello(hello)) = first_frame(&mut inbound).await?.frame else {
            return Err(invalid("the first frame of a task is TaskIoHello"));
        };
        let opened = self.relay.open_stream(node_id, &hello);
        let (task, number) = opened.map_err(from_stream)?;
        let (relay, reading, stop) =
            (Arc::clone(&self.relay), Arc::clone(&task), self.scope.token().clone());
        self.scope.spawn("task output", async move {
            // Never waits for the reader: the mailbox takes everything that credit allows.
            while let Some(Some(Ok(frame))) = stop.run_until_cancelled(inbound.next()).await {
                let more = frame.frame.is_none_or(|f| relay.node_frame(&reading, number, f));
                if !more {
                    return;
                }
            }
            relay.stream_ended(&reading, number);
        });
        let outbound = stream::unfold(task, move |task: Arc<Task>| async move {
            let frame = match task.to_node.next(number).await? {
                to_node::NodeFrame::Resume(resume) => task_io_down::Frame::Resume(resume),
                to_node::NodeFrame::Signal(number) => {
                    task_io_down::Frame::Signal(Signal { number })
                }
                to_node::NodeFrame::Resize(size) => task_io_down::Frame::Resize(size),
                to_node::NodeFrame::Credit(bytes) => task_io_down::Frame::Credit(Credit { bytes }),
                to_node::NodeFrame::Stdin(data, end) => {
                    task_io_down::Frame::Stdin(Stdin { data, end })
                }
            };
            Some((Ok(TaskIoDown { frame: Some(frame) }), task))
        });
        let outbound = outbound.take_until(self.scope.token().clone().cancelled_owned());
        Ok(Response::new(Box::pin(outbound)))
    }

    async fn file_io(
        &self,
        request: Request<Streaming<FileIoUp>>,
    ) -> Result<Response<Self::FileIoStream>, Status> {
        let AdmittedNode { node_id } = admitted(&request)?;
        let mut inbound = request.into_inner();
        let Some(file_io_up::Frame::Hello(hello)) = first_frame(&mut inbound).await?.frame else {
            return Err(invalid("the first frame of an operation on files is FileIoHello"));
        };
        let id = RequestId::from_slice(&hello.request_id).map_err(|e| invalid(e.to_string()))?;
        let stream = files::node_stream(&self.files, node_id, id, inbound, &self.scope)?;
        Ok(Response::new(stream))
    }

    async fn renew(
        &self,
        request: Request<RenewRequest>,
    ) -> Result<Response<RenewResponse>, Status> {
        let AdmittedNode { node_id } = admitted(&request)?;
        let address = request.extensions().get::<Peer>().and_then(Peer::address);
        let renewal = convert::renewal(node_id, request.into_inner(), address)?;
        let (node, issued) = self.validator.renew_node(renewal).await.map_err(from_enroll)?;
        Ok(Response::new(RenewResponse {
            certificate_der: issued.der.to_vec().into(),
            not_after_ms: issued.not_after_ms,
            generation: node.certificate.generation,
            trusted_cas_der: self.authorities.ring().trusted_der(),
        }))
    }

    async fn leave(
        &self,
        request: Request<LeaveRequest>,
    ) -> Result<Response<LeaveResponse>, Status> {
        let AdmittedNode { node_id } = admitted(&request)?;
        let node = self.registry.get(node_id).map(|view| view.node);
        let node = node.ok_or_else(|| from_node(NodeRefusal::Unknown))?;
        let decisions = Arc::clone(&self.decisions);
        let leave = async move { decisions.leave(&node).await };
        run_to_end(&self.scope, "leave", leave).await?.map_err(from_decision)?;
        Ok(Response::new(LeaveResponse {}))
    }

    async fn request_attach(
        &self,
        request: Request<RequestAttachRequest>,
    ) -> Result<Response<RequestAttachResponse>, Status> {
        let AdmittedNode { node_id } = admitted(&request)?;
        let name = request.into_inner().workspace;
        // The same answer for a workspace that does not exist: a node learns nothing of others'.
        let workspace = self.members.membership.by_name(&name);
        match workspace.filter(|w| w.members.contains(&node_id)) {
            Some(workspace) => Ok(Response::new(RequestAttachResponse {
                workspace_id: workspace.id.as_bytes().to_vec().into(),
            })),
            None => Err(with_hint(
                refuse(
                    Code::PermissionDenied,
                    "not_a_member",
                    format!("this node may not have the workspace {name:?}"),
                ),
                &format!(
                    "an operator can grant it: cortex-agent workspace attach {name} --node NODE"
                ),
            )),
        }
    }

    async fn request_detach(
        &self,
        request: Request<RequestAttachRequest>,
    ) -> Result<Response<RequestAttachResponse>, Status> {
        let AdmittedNode { node_id } = admitted(&request)?;
        let name = request.into_inner().workspace;
        let workspace = self
            .members
            .membership
            .by_name(&name)
            .filter(|w| w.members.contains(&node_id))
            .ok_or_else(|| {
                refuse(Code::NotFound, "not_a_member", format!("not a member of {name:?}"))
            })?;
        let name = self.registry.get(node_id).map(|view| view.node.name).unwrap_or_default();
        let by = Actor::from(format!("node:{name}").as_str());
        self.members.detach(workspace.id, node_id, &by).await.map_err(from_store)?;
        Ok(Response::new(RequestAttachResponse {
            workspace_id: workspace.id.as_bytes().to_vec().into(),
        }))
    }
}

/// The interval for a session that begins while so many are connected.
fn heartbeat_for(online: usize, least: Duration) -> Duration {
    let online = u32::try_from(online).unwrap_or(u32::MAX);
    least.max(Duration::from_secs(1) * online / HEARTBEATS_PER_SECOND)
}

/// What a node hears: first the welcome, whatever others have put into the queue since they see the session.
/// What is queued is still sent after the session was ended: the reason is among it.
fn outbound(
    welcome: Welcome,
    outbox: Outbox,
    end: impl Future<Output = ()>,
) -> impl Stream<Item = Box<HubFrame>> {
    let welcome = Box::new(HubFrame { frame: Some(hub_frame::Frame::Welcome(welcome)) });
    stream_until(stream::iter([welcome]).chain(ReceiverStream::new(outbox)), end)
}

/// Passes a stream on until `end`, and then only what is ready at once.
fn stream_until<S: Stream + Unpin>(
    frames: S,
    end: impl Future<Output = ()>,
) -> impl Stream<Item = S::Item> {
    let end = Box::pin(end);
    stream::unfold((frames, end, false), |(mut frames, mut end, mut ended)| async move {
        let item = if ended {
            futures_util::FutureExt::now_or_never(frames.next()).flatten()
        } else {
            tokio::select! {
                biased;
                item = frames.next() => item,
                () = &mut end => {
                    ended = true;
                    futures_util::FutureExt::now_or_never(frames.next()).flatten()
                }
            }
        };
        item.map(|item| (item, (frames, end, ended)))
    })
}

#[cfg(test)]
mod tests {
    use cortex_proto::v1::Heartbeat;
    use tokio::sync::mpsc;

    use super::*;

    #[tokio::test]
    async fn a_node_is_welcomed_before_it_hears_anything_else_also_if_its_session_is_over() {
        for over in [false, true] {
            let (queue, outbox) = mpsc::channel(2);
            let early = hub_frame::Frame::Heartbeat(Heartbeat {});
            queue.try_send(Box::new(HubFrame { frame: Some(early) })).unwrap();
            let cancel = CancellationToken::new();
            if over {
                cancel.cancel();
            }
            let mut heard = Box::pin(outbound(Welcome::default(), outbox, cancel.cancelled()));
            let first = heard.next().await.unwrap().frame;
            assert!(matches!(first, Some(hub_frame::Frame::Welcome(_))), "{first:?}");
            let second = heard.next().await.unwrap().frame;
            assert!(matches!(second, Some(hub_frame::Frame::Heartbeat(_))), "{second:?}");
        }
    }

    #[test]
    fn a_task_is_called_unknown_only_if_its_node_need_not_ask_again() {
        let unknown = from_stream(StreamRefusal::Unknown);
        assert_eq!((unknown.code(), word(&unknown)), (Code::NotFound, "task_unknown"));
        let not_reached = from_stream(StreamRefusal::NotReached);
        assert_eq!(
            (not_reached.code(), word(&not_reached)),
            (Code::Unavailable, "task_not_reached")
        );
    }

    fn word(status: &Status) -> &str {
        status.metadata().get(cortex_proto::CODE_TRAILER).unwrap().to_str().unwrap()
    }

    #[test]
    fn heartbeats_are_bounded_in_all() {
        let least = Duration::from_secs(4);
        for (online, seconds) in [(0, 4), (2000, 4), (10_000, 20)] {
            assert_eq!(heartbeat_for(online, least), Duration::from_secs(seconds), "{online}");
        }
    }
}
