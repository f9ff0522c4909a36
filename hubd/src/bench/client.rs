//! Connections as agents make them: TLS 1.3 to a hub whose authority is known.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use cortex_proto::v1;
use cortex_proto::v1::enroll_client::EnrollClient;
use cortex_proto::v1::operator_client::OperatorClient;
use cortex_shared::peer::HUB_SERVER_NAME;
use hyper_util::rt::TokioIo;
use rcgen::{CertificateParams, KeyPair};
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::TlsConnector;
use tonic::Status;
use tonic::transport::{Channel, Endpoint};

use super::BenchError;
use super::line::Line;

/// A hub as its clients know it.
#[derive(Clone)]
pub(super) struct Target {
    pub(super) address: SocketAddr,
    pub(super) authority: CertificateDer<'static>,
    /// What its connections go over.
    pub(super) line: Line,
}

/// A key made beforehand, and its request for a certificate.
pub(super) struct Key {
    key: Vec<u8>,
    csr: Bytes,
}

impl Key {
    pub(super) fn make() -> Result<Self, rcgen::Error> {
        let key = KeyPair::generate()?;
        let csr = CertificateParams::default().serialize_request(&key)?;
        Ok(Self { key: key.serialize_der(), csr: Bytes::copy_from_slice(csr.der()) })
    }

    /// The key with the certificate that was issued for it.
    pub(super) fn certified(&self, certificate: &[u8]) -> Login {
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        Login { certificate: certificate.to_vec(), key: self.key.clone(), number }
    }
}

/// A certificate with its key.
pub(super) struct Login {
    certificate: Vec<u8>,
    key: Vec<u8>,
    number: u64,
}

/// The next login's number.
static NUMBER: AtomicU64 = AtomicU64::new(1);

impl Login {
    /// What tells it from others, in place of a machine.
    pub(super) fn number(&self) -> u64 {
        self.number
    }
}

impl Target {
    /// The same hub, at the other end of another line.
    pub(super) fn over(&self, line: &Line) -> Self {
        Self { line: line.clone(), ..self.clone() }
    }

    /// A new connection, with a certificate or without.
    pub(super) async fn connect(&self, login: Option<&Login>) -> Result<Channel, BenchError> {
        let mut roots = RootCertStore::empty();
        roots.add(self.authority.clone())?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_root_certificates(roots);
        let mut tls = match login {
            None => builder.with_no_client_auth(),
            Some(Login { certificate, key, .. }) => builder.with_client_auth_cert(
                vec![CertificateDer::from(certificate.clone())],
                PrivateKeyDer::Pkcs8(key.clone().into()),
            )?,
        };
        tls.alpn_protocols = vec![b"h2".to_vec()];
        let (connector, address) = (TlsConnector::from(Arc::new(tls)), self.address);
        let line = self.line.clone();
        let connect = tower::service_fn(move |_| {
            let (connector, line) = (connector.clone(), line.clone());
            async move {
                let tcp = TcpStream::connect(address).await?;
                tcp.set_nodelay(true)?;
                let name = ServerName::try_from(HUB_SERVER_NAME).map_err(std::io::Error::other)?;
                connector.connect(name, line.carry(tcp)).await.map(TokioIo::new)
            }
        });
        Ok(Endpoint::from_static("http://hub").connect_with_connector(connect).await?)
    }

    /// One attempt to join.
    pub(super) async fn join(
        &self,
        channel: Channel,
        token: &str,
        key: &Key,
    ) -> Result<v1::JoinNodeResponse, BenchError> {
        let request = v1::JoinNodeRequest {
            token: token.to_owned(),
            csr_der: key.csr.clone(),
            hostname: "bench".to_owned(),
            ..v1::JoinNodeRequest::default()
        };
        let answer: Result<_, Status> = EnrollClient::new(channel).join_node(request).await;
        Ok(answer?.into_inner())
    }
}

impl Target {
    /// Makes an operator of whoever has this token.
    pub(super) async fn log_in(
        &self,
        channel: Channel,
        token: &str,
        key: &Key,
    ) -> Result<Login, BenchError> {
        let request =
            v1::LoginOperatorRequest { token: token.to_owned(), csr_der: key.csr.clone() };
        let answer: Result<_, Status> = EnrollClient::new(channel).login_operator(request).await;
        Ok(key.certified(&answer?.into_inner().certificate_der))
    }

    /// An operator's connection.
    pub(super) async fn operator(
        &self,
        login: &Login,
    ) -> Result<OperatorClient<Channel>, BenchError> {
        let channel = self.connect(Some(login)).await?;
        Ok(OperatorClient::new(channel).max_decoding_message_size(cortex_proto::MAX_MESSAGE_BYTES))
    }
}

/// The administration socket.
pub(super) async fn local(
    socket: PathBuf,
) -> Result<OperatorClient<Channel>, tonic::transport::Error> {
    let connect = tower::service_fn(move |_| {
        let socket = socket.clone();
        async move { UnixStream::connect(socket).await.map(TokioIo::new) }
    });
    let channel = Endpoint::from_static("http://hub").connect_with_connector(connect).await?;
    // All nodes of a benchmark are one answer.
    Ok(OperatorClient::new(channel).max_decoding_message_size(cortex_proto::MAX_MESSAGE_BYTES))
}
