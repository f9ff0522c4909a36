//! The operators' side of a hub, as far as `exec`, `node drain` and those who watch need it.

use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};

use cortex_proto::v1::{self, exec_down, exec_up};
use futures_util::{Stream, StreamExt as _, stream};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::hub::Presence;
use super::{Script, within};

type BoxFuture<T> = Pin<Box<dyn Future<Output = T> + Send>>;
type BoxStream<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// The hub's end of one `exec`.
pub struct Exec {
    pub start: v1::ExecStart,
    pub up: Streaming<v1::ExecUp>,
    down: mpsc::Sender<Result<v1::ExecDown, Status>>,
}

impl Exec {
    pub async fn send(&self, frame: exec_down::Frame) {
        self.down.send(Ok(v1::ExecDown { frame: Some(frame) })).await.unwrap();
    }

    pub async fn fail(&self, status: Status) {
        self.down.send(Err(status)).await.unwrap();
    }

    pub async fn output(&self, offset: u64, data: &[u8]) {
        let data = data.to_vec().into();
        let stream = v1::OutputStream::Stdout.into();
        self.send(exec_down::Frame::Output(v1::Output { stream, offset, data })).await;
    }

    pub async fn next(&mut self) -> Option<exec_up::Frame> {
        within(self.up.message()).await.ok().flatten().and_then(|message| message.frame)
    }
}

/// Of the operators' service only what the tests ask for, routed by hand, so that a new method of the
/// protocol does not break them.
#[derive(Clone)]
pub struct ExecOnly(pub mpsc::Sender<Exec>, pub Arc<Mutex<Script>>);

impl tonic::server::NamedService for ExecOnly {
    const NAME: &'static str = "cortex.v1.Operator";
}

impl tonic::codegen::Service<http::Request<tonic::body::Body>> for ExecOnly {
    type Response = http::Response<tonic::body::Body>;
    type Error = std::convert::Infallible;
    type Future = BoxFuture<Result<Self::Response, Self::Error>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<tonic::body::Body>) -> Self::Future {
        let service = self.clone();
        Box::pin(async move {
            let script = Arc::clone(&service.1);
            let path = request.uri().path().to_owned();
            Ok(match path.as_str() {
                "/cortex.v1.Operator/Exec" => {
                    let codec = tonic_prost::ProstCodec::default();
                    tonic::server::Grpc::new(codec).streaming(service, request).await
                }
                "/cortex.v1.Operator/CordonNode" => {
                    let cordon =
                        tower::service_fn(move |request: Request<v1::CordonNodeRequest>| {
                            let mut script = script.lock().unwrap();
                            script.cordoned = request.get_ref().cordoned;
                            std::future::ready(Ok(Response::new(script.node())))
                        });
                    let codec = tonic_prost::ProstCodec::default();
                    tonic::server::Grpc::new(codec).unary(cordon, request).await
                }
                "/cortex.v1.Operator/ListNodes" => {
                    let list = tower::service_fn(move |_: Request<v1::ListNodesRequest>| {
                        let mut script = script.lock().unwrap();
                        if let Some(left) = script.failing_looks.checked_sub(1) {
                            script.failing_looks = left;
                            return std::future::ready(Err(Status::unavailable("it starts")));
                        }
                        let nodes = vec![script.node()];
                        if script.running.len() > 1 {
                            script.running.pop_front();
                        }
                        std::future::ready(Ok(Response::new(v1::ListNodesResponse { nodes })))
                    });
                    let codec = tonic_prost::ProstCodec::default();
                    tonic::server::Grpc::new(codec).unary(list, request).await
                }
                "/cortex.v1.Operator/WatchNodes" => {
                    let watch = tower::service_fn(move |_: Request<v1::ListNodesRequest>| {
                        let node = script.lock().unwrap().node();
                        std::future::ready(watched(&script, move |presence| {
                            let online = presence != Presence::Offline;
                            v1::ListNodesResponse {
                                nodes: vec![v1::NodeInfo { online, ..node.clone() }],
                            }
                        }))
                    });
                    let codec = tonic_prost::ProstCodec::default();
                    tonic::server::Grpc::new(codec).server_streaming(watch, request).await
                }
                "/cortex.v1.Operator/WorkspaceStatus" => {
                    let watch = tower::service_fn(move |_: Request<v1::WorkspaceStatusRequest>| {
                        std::future::ready(watched(&script, workspace))
                    });
                    let codec = tonic_prost::ProstCodec::default();
                    tonic::server::Grpc::new(codec).server_streaming(watch, request).await
                }
                _ => Status::unimplemented("not in this hub").into_http(),
            })
        })
    }
}

/// What the next stream of those who watch shows.
fn watched<T: Send + 'static>(
    script: &Mutex<Script>,
    shown: impl Fn(Presence) -> T + Send + 'static,
) -> Result<Response<BoxStream<T>>, Status> {
    let mut script = script.lock().unwrap();
    let next = script.watched.pop_front();
    let items = stream::iter(next.ok_or_else(|| Status::not_found("no more to see"))?);
    let items = items.map(move |presence| Ok(shown(presence)));
    Ok(Response::new(match script.watched.is_empty() {
        true => Box::pin(items.chain(stream::pending())),
        false => Box::pin(items),
    }))
}

/// A workspace with one member.
fn workspace(presence: Presence) -> v1::WorkspaceStatusResponse {
    let applied_seq = if presence == Presence::Equal { 5 } else { 4 };
    // What it does is not known before it has said so.
    let status = v1::SyncStatus { applied_seq, ..Default::default() };
    let member = v1::WorkspaceMember {
        node_name: "n1".into(),
        online: presence != Presence::Offline,
        applied_seq,
        status: (presence == Presence::Equal).then_some(status),
        ..Default::default()
    };
    let workspace = v1::WorkspaceInfo {
        name: "w".into(),
        head_seq: 5,
        members: vec![member],
        ..Default::default()
    };
    v1::WorkspaceStatusResponse { workspace: Some(workspace) }
}

impl tonic::server::StreamingService<v1::ExecUp> for ExecOnly {
    type Response = v1::ExecDown;
    type ResponseStream = ReceiverStream<Result<v1::ExecDown, Status>>;
    type Future = BoxFuture<Result<Response<Self::ResponseStream>, Status>>;

    fn call(&mut self, request: Request<Streaming<v1::ExecUp>>) -> Self::Future {
        let execs = self.0.clone();
        Box::pin(async move {
            let mut up = request.into_inner();
            let Some(exec_up::Frame::Start(start)) = up.message().await?.unwrap().frame else {
                return Err(Status::invalid_argument("no start"));
            };
            match start.node.as_str() {
                "nobody" => return Err(Status::not_found("no node matches")),
                "forbidden" => return Err(Status::permission_denied("viewers look only")),
                _ => {}
            }
            let (down, queue) = mpsc::channel(16);
            execs.send(Exec { start, up, down }).await.ok();
            Ok(Response::new(ReceiverStream::new(queue)))
        })
    }
}
