//! A hub on loopback.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use cortex_proto::v1::enroll_server::{Enroll, EnrollServer};
use cortex_proto::v1::node_server::{Node, NodeServer};
use cortex_proto::v1::{self, hub_frame};
use cortex_shared::ids::NodeId;
use cortex_shared::peer::Holder;
use cortex_shared::policy::Role;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::ca::{Ca, Life};
use super::exec::{Exec, ExecOnly};
use super::{now_ms, within};

const DAY_MS: i64 = 24 * 60 * 60 * 1000;

/// What the hub issues and answers, and what it was asked.
pub struct Script {
    /// Life of the certificates it issues.
    pub life: Life,
    /// Number of the last certificate.
    pub generation: u64,
    pub node_id: NodeId,
    /// Who signs, if it is not the hub's authority.
    pub issuer: Option<Arc<Ca>>,
    /// Refusals, by method.
    pub refuse_renewal: Option<Status>,
    pub refuse_recovery: Option<Status>,
    pub refuse_leaving: Option<Status>,
    pub refuse_session: Option<Status>,
    /// With which word streams of tasks are refused, and how many were.
    pub refuse_tasks: Option<&'static str>,
    pub refused: u32,
    /// What a welcome says.
    pub renew_now: bool,
    pub trusted: Vec<bytes::Bytes>,
    pub policy_for_ms: i64,
    pub clock_ahead_ms: i64,
    /// Whether it leaves streams of tasks unanswered, and how many it left so.
    pub hold_tasks: bool,
    pub held: u32,
    /// How many commands the node runs, by each look of an operator; the last one stays.
    pub running: VecDeque<u32>,
    pub cordoned: bool,
    /// How many looks of an operator fail, as while the hub starts anew.
    pub failing_looks: u32,
    /// What an operator who watches is shown of the node and of a workspace, by each stream, which then ends
    /// as if the hub stopped; the last stream stays open, and there is none after it.
    pub watched: VecDeque<Vec<Presence>>,
    /// What was asked.
    pub renewals: Vec<v1::RenewRequest>,
    pub recoveries: Vec<v1::RecoverNodeRequest>,
    pub joins: Vec<v1::JoinNodeRequest>,
    pub leaves: u32,
}

impl Default for Script {
    fn default() -> Self {
        Self {
            life: (-300_000, DAY_MS),
            generation: 0,
            node_id: NodeId::new(),
            issuer: None,
            refuse_renewal: None,
            refuse_recovery: None,
            refuse_leaving: None,
            refuse_session: None,
            refuse_tasks: None,
            refused: 0,
            renew_now: false,
            trusted: Vec::new(),
            policy_for_ms: 3_600_000,
            clock_ahead_ms: 0,
            hold_tasks: false,
            held: 0,
            running: VecDeque::new(),
            cordoned: false,
            failing_looks: 0,
            watched: VecDeque::new(),
            renewals: Vec::new(),
            recoveries: Vec::new(),
            joins: Vec::new(),
            leaves: 0,
        }
    }
}

impl Script {
    /// The node, as an operator is shown it.
    pub fn node(&self) -> v1::NodeInfo {
        v1::NodeInfo {
            node_id: self.node_id.as_bytes().to_vec().into(),
            name: "n1".into(),
            running_tasks: self.running.front().copied().unwrap_or(0),
            cordoned: self.cordoned,
            ..Default::default()
        }
    }
}

/// How the node is, to an operator who watches.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Presence {
    Offline,
    /// Online, with less than the workspace's head.
    Behind,
    /// Online, with all of it.
    Equal,
}

/// A refusal with its stable word.
pub fn refusal(word: &'static str, text: &str) -> Status {
    let mut status = Status::failed_precondition(text);
    status.metadata_mut().insert(cortex_proto::CODE_TRAILER, word.parse().unwrap());
    status
}

/// The hub's end of one session.
pub struct Session {
    pub hello: v1::Hello,
    /// The certificate the node presented.
    pub certificate: Vec<u8>,
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

    /// As [`Session::start`], for an actor of another role.
    pub async fn start_as(&self, role: &str, id: &[u8], spec: v1::TaskSpec) {
        let start = v1::StartTask {
            task_id: id.to_vec().into(),
            spec: Some(spec),
            actor: "test".into(),
            initial_credit: 1024,
            role: role.into(),
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
    pub hello: v1::TaskIoHello,
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

    /// Says where the output of a task that comes back goes on.
    pub async fn resume(&self, stdout_offset: u64, credit: u64) {
        let resume = v1::TaskIoResume { stdout_offset, stderr_offset: 0, credit };
        self.send(v1::task_io_down::Frame::Resume(resume)).await;
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

#[derive(Clone)]
struct Service {
    ca: Arc<Ca>,
    heartbeat: Duration,
    policy: v1::Mode,
    script: Arc<Mutex<Script>>,
    sessions: mpsc::Sender<Session>,
    tasks: mpsc::Sender<TaskIo>,
}

/// A hub on loopback.
pub struct Hub {
    pub ca: Arc<Ca>,
    pub address: SocketAddr,
    pub script: Arc<Mutex<Script>>,
    pub acceptor: Arc<Mutex<tokio_rustls::TlsAcceptor>>,
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
        let script = Arc::new(Mutex::new(Script::default()));
        let service = Service {
            ca: Arc::clone(&ca),
            heartbeat,
            policy,
            script: Arc::clone(&script),
            sessions,
            tasks,
        };
        let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(ca.server_config(&[&ca])));
        let acceptor = Arc::new(Mutex::new(acceptor));
        let current = Arc::clone(&acceptor);
        let (streams, accepted) = mpsc::channel(16);
        tokio::spawn(async move {
            while let Ok((tcp, _)) = listener.accept().await {
                let (acceptor, streams) = (current.lock().unwrap().clone(), streams.clone());
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
            .add_service(ExecOnly(execs, Arc::clone(&script)));
        tokio::spawn(server.serve_with_incoming(ReceiverStream::new(accepted)));
        Self {
            ca,
            address,
            script,
            acceptor,
            sessions: incoming_sessions,
            tasks: incoming_tasks,
            execs: incoming_execs,
        }
    }

    /// Changes the script.
    pub fn set(&self, change: impl FnOnce(&mut Script)) {
        change(&mut self.script.lock().unwrap());
    }

    /// Looks at the script until it shows something.
    pub async fn seen<T>(&self, mut look: impl FnMut(&Script) -> Option<T>) -> T {
        within(async {
            loop {
                if let Some(found) = look(&self.script.lock().unwrap()) {
                    return found;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        })
        .await
    }

    /// Shows a certificate of another authority of the mesh from now on.
    pub fn show_as(&self, authority: &Ca) {
        let config = Arc::new(authority.server_config(&[&self.ca, authority]));
        *self.acceptor.lock().unwrap() = config.into();
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

impl Service {
    fn issue(&self, script: &Script, csr_der: &[u8], name: &str) -> v1::JoinNodeResponse {
        let holder = Holder::Node(script.node_id);
        let issuer = script.issuer.as_ref().unwrap_or(&self.ca);
        v1::JoinNodeResponse {
            node_id: script.node_id.as_bytes().to_vec().into(),
            name: name.to_owned(),
            certificate_der: issuer.sign(csr_der, holder, script.life).to_vec().into(),
            ca_der: self.ca.der(),
            mesh_id: self.ca.mesh.to_string(),
            not_after_ms: now_ms() + script.life.1,
            generation: script.generation,
            trusted_cas_der: Vec::new(),
        }
    }
}

#[tonic::async_trait]
impl Enroll for Service {
    async fn join_node(
        &self,
        request: Request<v1::JoinNodeRequest>,
    ) -> Result<Response<v1::JoinNodeResponse>, Status> {
        let request = request.into_inner();
        let mut script = self.script.lock().unwrap();
        script.node_id = NodeId::new();
        script.generation = 1;
        let response = self.issue(&script, &request.csr_der, &request.name);
        script.joins.push(request);
        Ok(Response::new(response))
    }

    async fn recover_node(
        &self,
        request: Request<v1::RecoverNodeRequest>,
    ) -> Result<Response<v1::JoinNodeResponse>, Status> {
        let mut script = self.script.lock().unwrap();
        let request = request.into_inner();
        script.recoveries.push(request.clone());
        if let Some(refusal) = &script.refuse_recovery {
            return Err(refusal.clone());
        }
        script.generation += 1;
        script.life = Script::default().life;
        Ok(Response::new(self.issue(&script, &request.csr_der, "")))
    }

    async fn login_operator(
        &self,
        request: Request<v1::LoginOperatorRequest>,
    ) -> Result<Response<v1::LoginOperatorResponse>, Status> {
        let holder = Holder::Operator { name: "ann".into(), role: Role::Operator };
        let certificate = self.ca.sign(&request.into_inner().csr_der, holder, (0, DAY_MS));
        Ok(Response::new(v1::LoginOperatorResponse {
            name: "ann".into(),
            role: "operator".into(),
            certificate_der: certificate.to_vec().into(),
            ca_der: self.ca.der(),
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
    type FileIoStream = ReceiverStream<Result<v1::FileIoDown, Status>>;

    /// This hub asks for no files.
    async fn file_io(
        &self,
        _: Request<Streaming<v1::FileIoUp>>,
    ) -> Result<Response<Self::FileIoStream>, Status> {
        Err(Status::not_found("no such request waits for this node"))
    }

    async fn link(
        &self,
        request: Request<Streaming<v1::NodeFrame>>,
    ) -> Result<Response<Self::LinkStream>, Status> {
        let certificate = request
            .peer_certs()
            .and_then(|chain| chain.first().map(|leaf| leaf.to_vec()))
            .ok_or_else(|| Status::unauthenticated("no certificate"))?;
        let mut frames = request.into_inner();
        let Some(v1::node_frame::Frame::Hello(hello)) = frames.message().await?.unwrap().frame
        else {
            return Err(Status::invalid_argument("no hello"));
        };
        let (renew_now, trusted, policy_for_ms, clock_ahead_ms) = {
            let script = self.script.lock().unwrap();
            if let Some(refusal) = &script.refuse_session {
                return Err(refusal.clone());
            }
            let trusted = script.trusted.clone();
            (script.renew_now, trusted, script.policy_for_ms, script.clock_ahead_ms)
        };
        let (out, queue) = mpsc::channel(16);
        let welcome = v1::Welcome {
            epoch: 1,
            name: "n1".into(),
            heartbeat_interval_ms: self.heartbeat.as_millis() as u64,
            policy: self.policy.into(),
            policy_until_ms: match self.policy {
                v1::Mode::Strict => 0,
                v1::Mode::Permissive => now_ms() + clock_ahead_ms + policy_for_ms,
            },
            hub_time_ms: now_ms() + clock_ahead_ms,
            trusted_cas_der: trusted,
            renew_now,
            resume_grace_ms: 10_000,
            ..Default::default()
        };
        let session = Session { hello, certificate, frames, out };
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
        let held = {
            let mut script = self.script.lock().unwrap();
            script.held += u32::from(script.hold_tasks);
            script.hold_tasks
        };
        while held && self.script.lock().unwrap().hold_tasks {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
        {
            let mut script = self.script.lock().unwrap();
            if let Some(word) = script.refuse_tasks {
                script.refused += 1;
                return Err(refusal(word, "not now, or never"));
            }
        }
        let (down, queue) = mpsc::channel(16);
        self.tasks.send(TaskIo { task_id: hello.task_id.to_vec(), hello, up, down }).await.ok();
        Ok(Response::new(ReceiverStream::new(queue)))
    }

    async fn renew(
        &self,
        request: Request<v1::RenewRequest>,
    ) -> Result<Response<v1::RenewResponse>, Status> {
        let mut script = self.script.lock().unwrap();
        let request = request.into_inner();
        script.renewals.push(request.clone());
        if let Some(refusal) = &script.refuse_renewal {
            return Err(refusal.clone());
        }
        script.generation += 1;
        script.life = Script::default().life;
        let issued = self.issue(&script, &request.csr_der, "");
        Ok(Response::new(v1::RenewResponse {
            certificate_der: issued.certificate_der,
            not_after_ms: issued.not_after_ms,
            generation: issued.generation,
            trusted_cas_der: Vec::new(),
        }))
    }

    async fn leave(
        &self,
        _: Request<v1::LeaveRequest>,
    ) -> Result<Response<v1::LeaveResponse>, Status> {
        let mut script = self.script.lock().unwrap();
        if let Some(refusal) = &script.refuse_leaving {
            return Err(refusal.clone());
        }
        script.leaves += 1;
        Ok(Response::new(v1::LeaveResponse {}))
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
