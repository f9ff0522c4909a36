//! Dials the hub: TCP, then TLS.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use cortex_shared::peer::HUB_SERVER_NAME;
use cortex_shared::read_ahead::ReadAhead;
use hyper_util::rt::TokioIo;
use rustls_pki_types::ServerName;
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;

use super::traffic::{Counted, Traffic};
use super::{CONNECT_TIMEOUT, ConnectError, HubAddress, SharedTls};

/// How long one of several addresses of a name may take before the next is tried.
const ADDRESS_TIMEOUT: Duration = Duration::from_secs(4);

/// A tonic connector for one hub.
#[derive(Clone)]
pub(super) struct TlsConnector {
    address: HubAddress,
    tls: SharedTls,
    traffic: Arc<Traffic>,
}

impl TlsConnector {
    pub(super) fn new(address: HubAddress, tls: SharedTls) -> Self {
        Self { address, tls, traffic: Arc::default() }
    }

    /// Counts what moves on its connections.
    pub(super) fn counted(self, traffic: Arc<Traffic>) -> Self {
        Self { traffic, ..self }
    }

    /// Connects and completes the handshake within [`CONNECT_TIMEOUT`].
    pub(super) async fn dial(self) -> Result<TlsStream<ReadAhead<TcpStream>>, ConnectError> {
        let address = self.address.clone();
        match tokio::time::timeout(CONNECT_TIMEOUT, self.dial_unbounded()).await {
            Ok(result) => result,
            Err(_) => Err(ConnectError::TimedOut { address }),
        }
    }

    async fn dial_unbounded(self) -> Result<TlsStream<ReadAhead<TcpStream>>, ConnectError> {
        let Self { address, tls, .. } = self;
        let tcp = dial_tcp(&address).await?;
        let name = ServerName::try_from(HUB_SERVER_NAME).expect("the fixed name is a DNS name");
        // Read for each connection: what was renewed meanwhile counts.
        tokio_rustls::TlsConnector::from(tls.current())
            .connect(name, ReadAhead::new(tcp))
            .await
            .map_err(|error| ConnectError::from_handshake(address, error))
    }
}

async fn dial_tcp(address: &HubAddress) -> Result<TcpStream, ConnectError> {
    let unreachable =
        |source| ConnectError::Unreachable { address: address.clone(), source: Arc::new(source) };
    let targets = tokio::net::lookup_host(address.as_str()).await.map_err(|source| {
        ConnectError::Resolve { address: address.clone(), source: Arc::new(source) }
    })?;
    let mut last = std::io::Error::from(std::io::ErrorKind::NotFound);
    for target in targets {
        match tokio::time::timeout(ADDRESS_TIMEOUT, TcpStream::connect(target)).await {
            Ok(Ok(tcp)) => {
                // Small frames (credit, signals, heartbeats) must not wait for a full segment.
                tcp.set_nodelay(true).map_err(unreachable)?;
                cortex_shared::dead_line::notice(&tcp).map_err(unreachable)?;
                return Ok(tcp);
            }
            Ok(Err(error)) => last = error,
            Err(_) => last = std::io::ErrorKind::TimedOut.into(),
        }
    }
    Err(unreachable(last))
}

impl tower::Service<http::Uri> for TlsConnector {
    type Response = TokioIo<Counted<TlsStream<ReadAhead<TcpStream>>>>;
    type Error = ConnectError;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, ConnectError>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), ConnectError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: http::Uri) -> Self::Future {
        let (dial, traffic) = (self.clone().dial(), Arc::clone(&self.traffic));
        Box::pin(async move { Ok(TokioIo::new(Counted { stream: dial.await?, traffic })) })
    }
}
