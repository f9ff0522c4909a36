//! A hub with real connections: clients with certificates of its own making, and nodes that speak the
//! protocol without running anything.

use cortex_proto::v1;
use cortex_proto::v1::enroll_client::EnrollClient;
use cortex_proto::v1::node_client::NodeClient;
use cortex_proto::v1::operator_client::OperatorClient;
use cortex_shared::ids::NodeId;
use cortex_shared::peer::HUB_SERVER_NAME;
use hyper_util::rt::TokioIo;
use rcgen::{CertificateParams, KeyPair};
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::mpsc;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Status, Streaming};

use super::*;

/// A hub on a data directory that outlives it.
pub(super) struct TestHub {
    pub(super) hub: Hub,
    pub(super) folder: tempfile::TempDir,
}

/// A certificate, alone or with what signed it, and its key.
#[derive(Clone)]
pub(super) struct Login {
    pub(super) chain: Vec<CertificateDer<'static>>,
    pub(super) key: Vec<u8>,
}

impl Login {
    pub(super) fn new(certificate: &[u8], key: Vec<u8>) -> Self {
        Self { chain: vec![CertificateDer::from(certificate.to_vec())], key }
    }
}

/// The stable word of a refusal.
pub(super) fn word(status: &Status) -> &str {
    let word = status.metadata().get(cortex_proto::CODE_TRAILER);
    word.map_or("", |word| word.to_str().unwrap())
}

/// What somebody dials a side of the hub with who believes these authorities.
pub(super) fn tls(
    authorities: &[CertificateDer<'static>],
    login: Option<&Login>,
    protocol: &[u8],
) -> TlsConnector {
    let mut roots = RootCertStore::empty();
    for authority in authorities {
        roots.add(authority.clone()).unwrap();
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots);
    let mut tls = match login {
        None => builder.with_no_client_auth(),
        Some(Login { chain, key }) => builder
            .with_client_auth_cert(chain.clone(), PrivateKeyDer::try_from(key.clone()).unwrap())
            .unwrap(),
    };
    tls.alpn_protocols = vec![protocol.to_vec()];
    TlsConnector::from(Arc::new(tls))
}

/// How a client of HTTP/2 begins, and that it has no wishes.
pub(super) const GREETING: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";

/// A connection on which nothing has been said yet, with a side of the hub that calls itself so.
pub(super) async fn shake(
    address: std::net::SocketAddr,
    name: &'static str,
    connector: TlsConnector,
) -> TlsStream<TcpStream> {
    let tcp = TcpStream::connect(address).await.unwrap();
    connector.connect(ServerName::try_from(name).unwrap(), tcp).await.unwrap()
}

impl TestHub {
    pub(super) async fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let hub = Hub::start(config(folder.path())).await.unwrap();
        Self { hub, folder }
    }

    /// The authority by which the hub proves itself now.
    pub(super) fn authority(&self) -> CertificateDer<'static> {
        self.hub.data.authorities.ring().serving().certificate().clone()
    }

    pub(super) async fn restart(self) -> Self {
        let Self { hub, folder } = self;
        hub.shutdown().await;
        let hub = Hub::start(config(folder.path())).await.unwrap();
        Self { hub, folder }
    }

    /// The administration socket.
    pub(super) async fn local(&self) -> OperatorClient<Channel> {
        let path = self.hub.data.layout.socket();
        let connect = tower::service_fn(move |_| {
            let path = path.clone();
            async move { UnixStream::connect(path).await.map(TokioIo::new) }
        });
        let channel = Endpoint::from_static("http://hub").connect_with_connector(connect).await;
        OperatorClient::new(channel.unwrap())
    }

    /// A connection over TLS, with a certificate or without.
    pub(super) async fn channel(
        &self,
        login: Option<&Login>,
    ) -> Result<Channel, tonic::transport::Error> {
        self.channel_believing(&[self.authority()], login).await
    }

    /// The same by somebody who believes these authorities.
    pub(super) async fn channel_believing(
        &self,
        authorities: &[CertificateDer<'static>],
        login: Option<&Login>,
    ) -> Result<Channel, tonic::transport::Error> {
        let (connector, address) = (tls(authorities, login, b"h2"), self.hub.address());
        let connect = tower::service_fn(move |_| {
            let connector = connector.clone();
            async move {
                let tcp = TcpStream::connect(address).await?;
                tcp.set_nodelay(true)?;
                let name = ServerName::try_from(HUB_SERVER_NAME).unwrap();
                connector.connect(name, tcp).await.map(TokioIo::new)
            }
        });
        Endpoint::from_static("http://hub").connect_with_connector(connect).await
    }

    pub(super) async fn operator(&self, login: &Login) -> OperatorClient<Channel> {
        OperatorClient::new(self.channel(Some(login)).await.unwrap())
    }

    /// Creates an operator and logs it in.
    pub(super) async fn login(&self, name: &str, role: &str) -> Login {
        self.login_scoped(name, role, &[]).await
    }

    /// The same, with a scope.
    pub(super) async fn login_scoped(
        &self,
        name: &str,
        role: &str,
        scope: &[(&str, &str)],
    ) -> Login {
        let scope: std::collections::HashMap<String, String> =
            scope.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        let request = v1::CreateOperatorRequest {
            name: name.into(),
            role: role.into(),
            scope,
            ..Default::default()
        };
        let token = self.local().await.create_operator(request).await.unwrap().into_inner().token;
        self.redeem_operator(token).await.unwrap()
    }

    pub(super) async fn redeem_operator(&self, token: String) -> Result<Login, Status> {
        let (key, csr_der) = request();
        let request = v1::LoginOperatorRequest { token, csr_der: csr_der.into() };
        let mut enroll = EnrollClient::new(self.channel(None).await.unwrap());
        let response = enroll.login_operator(request).await?.into_inner();
        Ok(Login::new(&response.certificate_der, key))
    }

    /// Invites a node with these labels and joins it; its ceiling is permissive.
    pub(super) async fn join(&self, name: &str, labels: &[(&str, &str)]) -> TestNode {
        let labels = labels.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        let invite = v1::CreateInviteRequest { labels, ..Default::default() };
        let token = self.local().await.create_invite(invite).await.unwrap().into_inner().token;
        self.join_with(token, name, &[]).await
    }

    /// Joins a node that brings these labels of its own.
    pub(super) async fn join_with(
        &self,
        token: String,
        name: &str,
        labels: &[(&str, &str)],
    ) -> TestNode {
        let (key, csr_der) = request();
        let request = v1::JoinNodeRequest {
            token,
            csr_der: csr_der.into(),
            name: name.into(),
            labels: labels.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect(),
            ceiling: v1::Mode::Permissive.into(),
            machine: Some(machine(name)),
            ..Default::default()
        };
        let mut enroll = EnrollClient::new(self.channel(None).await.unwrap());
        let response = enroll.join_node(request).await.unwrap().into_inner();
        TestNode {
            id: NodeId::from_slice(&response.node_id).unwrap(),
            generation: response.generation,
            login: Login::new(&response.certificate_der, key),
            machine: machine(name),
            clock_behind_ms: 0,
        }
    }

    /// Runs a command that lasts until somebody ends it; returns its id and what its caller gets.
    pub(super) async fn exec(
        &self,
        client: &mut OperatorClient<Channel>,
        node: &str,
        spec: v1::TaskSpec,
    ) -> Result<Running, Status> {
        let start = v1::ExecStart {
            node: node.into(),
            spec: Some(spec),
            initial_credit: 1 << 20,
            ..v1::ExecStart::default()
        };
        let (frames, receiver) = mpsc::channel(8);
        let frame = v1::ExecUp { frame: Some(v1::exec_up::Frame::Start(start)) };
        frames.send(frame).await.unwrap();
        let mut output = client.exec(ReceiverStream::new(receiver)).await?.into_inner();
        let Some(v1::ExecDown { frame: Some(v1::exec_down::Frame::Accepted(accepted)) }) =
            output.message().await?
        else {
            panic!("a command is accepted first");
        };
        Ok(Running { task_id: accepted.task_id.to_vec(), output, _frames: frames })
    }
}

/// A command that was accepted.
pub(super) struct Running {
    pub(super) task_id: Vec<u8>,
    pub(super) output: Streaming<v1::ExecDown>,
    _frames: mpsc::Sender<v1::ExecUp>,
}

impl Running {
    /// How it ends: with an exit, or cut off with a status.
    pub(super) async fn end(self) -> Result<v1::TaskExit, Status> {
        let end = tokio::time::timeout(Duration::from_secs(20), self.wait()).await;
        end.expect("a command that was ended says so")
    }

    async fn wait(mut self) -> Result<v1::TaskExit, Status> {
        loop {
            match self.output.message().await? {
                Some(v1::ExecDown { frame: Some(v1::exec_down::Frame::Exit(exit)) }) => {
                    return Ok(exit);
                }
                Some(_) => {}
                None => panic!("the stream ended without an exit"),
            }
        }
    }
}

/// A script that does nothing.
pub(super) fn script() -> v1::TaskSpec {
    v1::TaskSpec { script: "true".into(), ..Default::default() }
}

/// The same, permissive.
pub(super) fn permissive() -> v1::TaskSpec {
    v1::TaskSpec { mode: v1::Mode::Permissive.into(), ..script() }
}

/// A joined node: what is in its state, and the machine that this is on.
#[derive(Clone)]
pub(super) struct TestNode {
    pub(super) id: NodeId,
    pub(super) login: Login,
    pub(super) generation: u64,
    pub(super) machine: v1::MachineFacts,
    pub(super) clock_behind_ms: i64,
}

/// A machine of this name.
pub(super) fn machine(name: &str) -> v1::MachineFacts {
    v1::MachineFacts {
        machine_id: format!("id-{name}"),
        boot_id: format!("boot-{name}"),
        hostname: format!("host-{name}"),
    }
}

/// Its session.
pub(super) struct TestSession {
    pub(super) client: NodeClient<Channel>,
    pub(super) welcome: v1::Welcome,
    frames: Streaming<v1::HubFrame>,
    pub(super) up: mpsc::Sender<v1::NodeFrame>,
}

impl TestNode {
    /// The same state on another machine.
    pub(super) fn copied_to(&self, name: &str) -> Self {
        Self { machine: machine(name), ..self.clone() }
    }

    /// A request for a certificate for its key.
    pub(super) fn csr(&self) -> bytes::Bytes {
        let key = KeyPair::try_from(self.login.key.as_slice()).unwrap();
        CertificateParams::default().serialize_request(&key).unwrap().der().to_vec().into()
    }

    fn with(&self, certificate: &[u8], generation: u64) -> Self {
        let login = Login::new(certificate, self.login.key.clone());
        Self { login, generation, ..self.clone() }
    }

    /// The node as it is once it has stored the answer.
    pub(super) async fn renew(&self, hub: &TestHub) -> Result<Self, Status> {
        self.renew_at(hub.channel(Some(&self.login)).await.unwrap()).await
    }

    /// The same over this connection.
    pub(super) async fn renew_at(&self, channel: Channel) -> Result<Self, Status> {
        let request = v1::RenewRequest {
            csr_der: self.csr(),
            generation: self.generation,
            machine: Some(self.machine.clone()),
        };
        let answer = NodeClient::new(channel).renew(request).await?.into_inner();
        Ok(self.with(&answer.certificate_der, answer.generation))
    }

    /// The same by its key alone.
    pub(super) async fn recover(&self, hub: &TestHub) -> Result<Self, Status> {
        let request = v1::RecoverNodeRequest {
            node_id: self.id.as_bytes().to_vec().into(),
            csr_der: self.csr(),
            generation: self.generation,
            machine: Some(self.machine.clone()),
        };
        let mut enroll = EnrollClient::new(hub.channel(None).await.unwrap());
        let answer = enroll.recover_node(request).await?.into_inner();
        Ok(self.with(&answer.certificate_der, answer.generation))
    }

    pub(super) async fn connect(&self, hub: &TestHub) -> Result<TestSession, Status> {
        let channel = hub.channel(Some(&self.login)).await;
        let channel = channel.map_err(|error| Status::from_error(Box::new(error)))?;
        let mut client = NodeClient::new(channel);
        let (up, receiver) = mpsc::channel(8);
        let hello = v1::Hello {
            ceiling: v1::Mode::Permissive.into(),
            generation: self.generation,
            node_time_ms: unix_ms() - self.clock_behind_ms,
            machine_id: self.machine.machine_id.clone(),
            boot_id: self.machine.boot_id.clone(),
            hostname: self.machine.hostname.clone(),
            ..Default::default()
        };
        let hello = v1::NodeFrame { frame: Some(v1::node_frame::Frame::Hello(hello)) };
        up.send(hello).await.unwrap();
        let frames = client.link(ReceiverStream::new(receiver)).await?.into_inner();
        let welcome = v1::Welcome::default();
        let mut session = TestSession { client, welcome, frames, up };
        match session.next().await? {
            Some(hub_frame::Frame::Welcome(welcome)) => session.welcome = welcome,
            other => panic!("no welcome: {other:?}"),
        }
        Ok(session)
    }
}

impl TestSession {
    pub(super) async fn next(&mut self) -> Result<Option<hub_frame::Frame>, Status> {
        Ok(self.frames.message().await?.and_then(|frame| frame.frame))
    }

    /// The next frame of this kind; `None` if the session ends before.
    pub(super) async fn until<T>(
        &mut self,
        wanted: impl Fn(hub_frame::Frame) -> Option<T>,
    ) -> Option<T> {
        while let Ok(Some(frame)) = self.next().await {
            if let Some(found) = wanted(frame) {
                return Some(found);
            }
        }
        None
    }

    pub(super) async fn start_task(&mut self) -> v1::StartTask {
        let start = self.until(|frame| match frame {
            hub_frame::Frame::StartTask(start) => Some(start),
            _ => None,
        });
        start.await.expect("the session goes on")
    }

    pub(super) async fn policy(&mut self) -> v1::PolicyUpdate {
        let policy = self.until(|frame| match frame {
            hub_frame::Frame::Policy(policy) => Some(policy),
            _ => None,
        });
        policy.await.expect("the session goes on")
    }

    pub(super) async fn cancel_task(&mut self) -> Option<v1::CancelTask> {
        let cancel = self.until(|frame| match frame {
            hub_frame::Frame::CancelTask(cancel) => Some(cancel),
            _ => None,
        });
        cancel.await
    }
}

/// A key and a request for a certificate.
pub(super) fn request() -> (Vec<u8>, Vec<u8>) {
    let key = KeyPair::generate().unwrap();
    let csr = CertificateParams::default().serialize_request(&key).unwrap();
    (key.serialize_der(), csr.der().to_vec())
}
