//! A hub that does what a test tells it, right or wrong, and an agent process that talks to it.

// Each test binary uses its own part.
#![allow(dead_code, unreachable_pub)]
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

use std::net::SocketAddr;
use std::path::PathBuf;
use std::pin::Pin;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use cortex_proto::v1::enroll_server::{Enroll, EnrollServer};
use cortex_proto::v1::node_server::{Node, NodeServer};
use cortex_proto::v1::{self, exec_down, exec_up, hub_frame};
use cortex_shared::ids::{MeshId, NodeId};
use cortex_shared::peer::{CaPin, HUB_SERVER_NAME, Holder, PeerIdentity};
use cortex_shared::policy::Role;
use cortex_shared::secret::InviteToken;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, ExtendedKeyUsagePurpose,
    IsCa, Issuer, KeyPair, KeyUsagePurpose, SanType,
};
use rustls_pki_types::{CertificateDer, CertificateSigningRequestDer, PrivateKeyDer};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

type BoxFuture<T> = Pin<Box<dyn Future<Output = T> + Send>>;

/// Longest wait for anything; a hang fails instead of hanging.
pub const PATIENCE: Duration = Duration::from_secs(20);

pub struct Ca {
    pub mesh: MeshId,
    certificate: CertificateDer<'static>,
    issuer: Issuer<'static, KeyPair>,
}

impl Ca {
    pub fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let certificate = params.self_signed(&key).unwrap().der().clone();
        Self { mesh: MeshId::new(), certificate, issuer: Issuer::new(params, key) }
    }

    pub fn pin(&self) -> CaPin {
        cortex_agent::client::pin_of(&self.certificate).unwrap()
    }

    fn params(&self, holder: Holder, usage: ExtendedKeyUsagePurpose) -> CertificateParams {
        let mut params = CertificateParams::new(vec![HUB_SERVER_NAME.to_owned()]).unwrap();
        params.extended_key_usages = vec![usage];
        let uri = PeerIdentity { mesh: self.mesh, holder }.to_string();
        params.subject_alt_names.push(SanType::URI(uri.try_into().unwrap()));
        params
    }

    fn sign(&self, csr: &[u8], holder: Holder) -> CertificateDer<'static> {
        let csr = CertificateSigningRequestDer::from(csr.to_vec());
        let csr = CertificateSigningRequestParams::from_der(&csr).unwrap();
        let params = self.params(holder, ExtendedKeyUsagePurpose::ClientAuth);
        params.signed_by(&csr.public_key, &self.issuer).unwrap().der().clone()
    }

    fn server_config(&self) -> rustls::ServerConfig {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut roots = rustls::RootCertStore::empty();
        roots.add(self.certificate.clone()).unwrap();
        let clients = rustls::server::WebPkiClientVerifier::builder_with_provider(
            Arc::new(roots),
            Arc::clone(&provider),
        )
        .allow_unauthenticated()
        .build()
        .unwrap();
        let key = KeyPair::generate().unwrap();
        let leaf = self
            .params(Holder::Hub, ExtendedKeyUsagePurpose::ServerAuth)
            .signed_by(&key, &self.issuer)
            .unwrap();
        let chain = vec![leaf.der().clone(), self.certificate.clone()];
        let key = PrivateKeyDer::Pkcs8(key.serialize_der().into());
        let mut config = rustls::ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_client_cert_verifier(clients)
            .with_single_cert(chain, key)
            .unwrap();
        config.alpn_protocols = vec![b"h2".to_vec()];
        config
    }
}

/// The hub's end of one session.
pub struct Session {
    pub hello: v1::Hello,
    pub frames: Streaming<v1::NodeFrame>,
    out: mpsc::Sender<Result<v1::HubFrame, Status>>,
}

impl Session {
    pub async fn send(&self, frame: hub_frame::Frame) {
        self.out.send(Ok(v1::HubFrame { frame: Some(frame) })).await.unwrap();
    }

    pub async fn start(&self, id: &[u8], spec: v1::TaskSpec, initial_credit: u64) {
        let task_id = id.to_vec().into();
        let start = v1::StartTask {
            task_id,
            spec: Some(spec),
            actor: "test".into(),
            initial_credit,
            role: "operator".into(),
        };
        self.send(hub_frame::Frame::StartTask(start)).await;
    }

    /// The next frame that is neither a heartbeat nor a report.
    pub async fn next(&mut self) -> v1::node_frame::Frame {
        loop {
            let frame = within(self.frames.message()).await.unwrap().unwrap().frame.unwrap();
            match frame {
                v1::node_frame::Frame::Heartbeat(_) | v1::node_frame::Frame::SyncReport(_) => {}
                other => return other,
            }
        }
    }
}

/// The hub's end of one task.
pub struct TaskIo {
    pub task_id: Vec<u8>,
    pub up: Streaming<v1::TaskIoUp>,
    down: mpsc::Sender<Result<v1::TaskIoDown, Status>>,
}

impl TaskIo {
    pub async fn send(&self, frame: v1::task_io_down::Frame) {
        self.down.send(Ok(v1::TaskIoDown { frame: Some(frame) })).await.unwrap();
    }

    pub async fn next(&mut self) -> v1::task_io_up::Frame {
        within(self.up.message()).await.unwrap().unwrap().frame.unwrap()
    }

    /// Reads to the end, granting credit for everything; closes the stream as a hub does.
    pub async fn read_to_exit(mut self) -> (Vec<u8>, v1::TaskExit) {
        let mut stdout = Vec::new();
        loop {
            match self.next().await {
                v1::task_io_up::Frame::Output(output) => {
                    let bytes = output.data.len() as u64;
                    if output.stream == i32::from(v1::OutputStream::Stdout) {
                        stdout.extend_from_slice(&output.data);
                    }
                    self.send(v1::task_io_down::Frame::Credit(v1::Credit { bytes })).await;
                }
                v1::task_io_up::Frame::Exit(exit) => return (stdout, exit),
                _ => {}
            }
        }
    }
}

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

#[derive(Clone)]
struct Service {
    ca: Arc<Ca>,
    heartbeat: Duration,
    policy: v1::Mode,
    sessions: mpsc::Sender<Session>,
    tasks: mpsc::Sender<TaskIo>,
}

/// A hub on loopback.
pub struct Hub {
    pub ca: Arc<Ca>,
    pub address: SocketAddr,
    pub sessions: mpsc::Receiver<Session>,
    pub tasks: mpsc::Receiver<TaskIo>,
    pub execs: mpsc::Receiver<Exec>,
}

impl Hub {
    pub async fn start(policy: v1::Mode, heartbeat: Duration) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let ca = Arc::new(Ca::new());
        let (sessions, incoming_sessions) = mpsc::channel(16);
        let (tasks, incoming_tasks) = mpsc::channel(16);
        let (execs, incoming_execs) = mpsc::channel(16);
        let service = Service { ca: Arc::clone(&ca), heartbeat, policy, sessions, tasks };
        let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(ca.server_config()));
        let (streams, accepted) = mpsc::channel(16);
        tokio::spawn(async move {
            while let Ok((tcp, _)) = listener.accept().await {
                let (acceptor, streams) = (acceptor.clone(), streams.clone());
                tokio::spawn(async move {
                    if let Ok(tls) = acceptor.accept(tcp).await {
                        streams.send(Ok::<_, std::io::Error>(tls)).await.ok();
                    }
                });
            }
        });
        let server = tonic::transport::Server::builder()
            .add_service(EnrollServer::new(service.clone()))
            .add_service(NodeServer::new(service))
            .add_service(ExecOnly(execs));
        tokio::spawn(server.serve_with_incoming(ReceiverStream::new(accepted)));
        Self {
            ca,
            address,
            sessions: incoming_sessions,
            tasks: incoming_tasks,
            execs: incoming_execs,
        }
    }

    pub async fn session(&mut self) -> Session {
        within(self.sessions.recv()).await.unwrap()
    }

    pub async fn task(&mut self) -> TaskIo {
        within(self.tasks.recv()).await.unwrap()
    }

    pub async fn exec(&mut self) -> Exec {
        within(self.execs.recv()).await.unwrap()
    }
}

#[tonic::async_trait]
impl Enroll for Service {
    async fn join_node(
        &self,
        request: Request<v1::JoinNodeRequest>,
    ) -> Result<Response<v1::JoinNodeResponse>, Status> {
        let request = request.into_inner();
        let id = NodeId::new();
        Ok(Response::new(v1::JoinNodeResponse {
            node_id: id.as_bytes().to_vec().into(),
            name: request.name,
            certificate_der: self.ca.sign(&request.csr_der, Holder::Node(id)).to_vec().into(),
            ca_der: self.ca.certificate.to_vec().into(),
            mesh_id: self.ca.mesh.to_string(),
            not_after_ms: 0,
            ..v1::JoinNodeResponse::default()
        }))
    }

    async fn recover_node(
        &self,
        _: Request<v1::RecoverNodeRequest>,
    ) -> Result<Response<v1::JoinNodeResponse>, Status> {
        Err(Status::unimplemented("not in this hub"))
    }

    async fn login_operator(
        &self,
        request: Request<v1::LoginOperatorRequest>,
    ) -> Result<Response<v1::LoginOperatorResponse>, Status> {
        let holder = Holder::Operator { name: "ann".into(), role: Role::Operator };
        let certificate = self.ca.sign(&request.into_inner().csr_der, holder);
        Ok(Response::new(v1::LoginOperatorResponse {
            name: "ann".into(),
            role: "operator".into(),
            certificate_der: certificate.to_vec().into(),
            ca_der: self.ca.certificate.to_vec().into(),
            mesh_id: self.ca.mesh.to_string(),
            not_after_ms: 0,
            ..v1::LoginOperatorResponse::default()
        }))
    }
}

#[tonic::async_trait]
impl Node for Service {
    type LinkStream = ReceiverStream<Result<v1::HubFrame, Status>>;
    type TaskIoStream = ReceiverStream<Result<v1::TaskIoDown, Status>>;

    async fn link(
        &self,
        request: Request<Streaming<v1::NodeFrame>>,
    ) -> Result<Response<Self::LinkStream>, Status> {
        let mut frames = request.into_inner();
        let Some(v1::node_frame::Frame::Hello(hello)) = frames.message().await?.unwrap().frame
        else {
            return Err(Status::invalid_argument("no hello"));
        };
        let (out, queue) = mpsc::channel(16);
        let welcome = v1::Welcome {
            epoch: 1,
            name: "n1".into(),
            heartbeat_interval_ms: self.heartbeat.as_millis() as u64,
            policy: self.policy.into(),
            policy_until_ms: match self.policy {
                v1::Mode::Strict => 0,
                v1::Mode::Permissive => now_ms() + 3_600_000,
            },
            hub_time_ms: now_ms(),
            ..Default::default()
        };
        let session = Session { hello, frames, out };
        session.send(hub_frame::Frame::Welcome(welcome)).await;
        self.sessions.send(session).await.ok();
        Ok(Response::new(ReceiverStream::new(queue)))
    }

    async fn task_io(
        &self,
        request: Request<Streaming<v1::TaskIoUp>>,
    ) -> Result<Response<Self::TaskIoStream>, Status> {
        let mut up = request.into_inner();
        let Some(v1::task_io_up::Frame::Hello(hello)) = up.message().await?.unwrap().frame else {
            return Err(Status::invalid_argument("no hello"));
        };
        let (down, queue) = mpsc::channel(16);
        self.tasks.send(TaskIo { task_id: hello.task_id.to_vec(), up, down }).await.ok();
        Ok(Response::new(ReceiverStream::new(queue)))
    }

    async fn renew(
        &self,
        _: Request<v1::RenewRequest>,
    ) -> Result<Response<v1::RenewResponse>, Status> {
        Err(Status::unimplemented("not in this hub"))
    }

    async fn leave(
        &self,
        _: Request<v1::LeaveRequest>,
    ) -> Result<Response<v1::LeaveResponse>, Status> {
        Err(Status::unimplemented("not in this hub"))
    }

    async fn request_attach(
        &self,
        _: Request<v1::RequestAttachRequest>,
    ) -> Result<Response<v1::RequestAttachResponse>, Status> {
        Err(Status::permission_denied("not a member"))
    }

    async fn request_detach(
        &self,
        _: Request<v1::RequestAttachRequest>,
    ) -> Result<Response<v1::RequestAttachResponse>, Status> {
        Err(Status::permission_denied("not a member"))
    }
}

/// Of the operators' service only `Exec`, routed by hand, so that a new method of the protocol does
/// not break these tests.
#[derive(Clone)]
struct ExecOnly(mpsc::Sender<Exec>);

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
            if request.uri().path() != "/cortex.v1.Operator/Exec" {
                return Ok(Status::unimplemented("not in this hub").into_http());
            }
            let codec = tonic_prost::ProstCodec::default();
            Ok(tonic::server::Grpc::new(codec).streaming(service, request).await)
        })
    }
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

/// An agent process with a state of its own, ended with the test.
pub struct Agent {
    pub folder: tempfile::TempDir,
    daemon: Option<Child>,
}

impl Agent {
    /// Joined to the hub, with the daemon running.
    pub async fn joined(hub: &Hub, ceiling: &str) -> Self {
        let mut agent = Self { folder: tempfile::tempdir().unwrap(), daemon: None };
        let output = agent.join(hub, ceiling).await;
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        agent.daemon = Some(agent.command().arg("run").stdout(Stdio::null()).spawn().unwrap());
        agent
    }

    pub fn unjoined() -> Self {
        Self { folder: tempfile::tempdir().unwrap(), daemon: None }
    }

    pub async fn join(&self, hub: &Hub, ceiling: &str) -> std::process::Output {
        let token = self.path("token");
        std::fs::write(&token, InviteToken::generate().expose()).unwrap();
        let mut command = self.command();
        command
            .arg("join")
            .arg(hub.address.to_string())
            .args(["--ca", &hub.ca.pin().to_string(), "--name", "n1", "--ceiling", ceiling])
            .arg("--token-file")
            .arg(token)
            .arg("--workspace-root")
            .arg(self.path("workspaces"));
        run(command).await
    }

    pub async fn login(&self, hub: &Hub) {
        let token = self.path("operator-token");
        std::fs::write(&token, InviteToken::generate().expose()).unwrap();
        let mut command = self.command();
        command
            .arg("login")
            .arg(hub.address.to_string())
            .args(["--ca", &hub.ca.pin().to_string(), "--token-file"])
            .arg(token);
        let output = run(command).await;
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_cortex-agent"));
        command
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap())
            .env("HOME", self.folder.path())
            .env("CORTEX_STATE", self.path("state"))
            .env("CORTEX_CONFIG_DIR", self.path("config"))
            .stdin(Stdio::null());
        command
    }

    pub fn process_id(&self) -> rustix::process::Pid {
        rustix::process::Pid::from_child(self.daemon.as_ref().unwrap())
    }

    pub async fn end_of_daemon(&mut self) -> std::process::ExitStatus {
        let mut daemon = self.daemon.take().unwrap();
        within(tokio::task::spawn_blocking(move || daemon.wait())).await.unwrap().unwrap()
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if let Some(daemon) = &mut self.daemon {
            daemon.kill().ok();
            daemon.wait().ok();
        }
    }
}

/// Runs a command to its end without blocking the hub in this process.
pub async fn run(mut command: Command) -> std::process::Output {
    within(tokio::task::spawn_blocking(move || command.output())).await.unwrap().unwrap()
}

pub async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.expect("nothing happened in time")
}

pub fn now_ms() -> i64 {
    jiff::Timestamp::now().as_millisecond()
}

pub fn shell(script: &str) -> v1::TaskSpec {
    v1::TaskSpec { script: script.as_bytes().to_vec().into(), ..Default::default() }
}
