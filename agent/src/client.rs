//! Authenticated channels to the hub.
//!
//! The hub is trusted because its mesh's authority signed it for one fixed name, whatever address
//! it is reached at. Before a node has joined, the authority itself is known only by the pin of its
//! key; afterwards its certificate is stored. In both cases a hub that does not prove itself ends
//! the handshake before anything of ours, client certificate and token included, is sent.
//!
//! A [`HubClient`] and every channel made with it share what they present and whom they trust;
//! [`HubClient::present`] changes both for each connection that is made afterwards, so a renewed
//! certificate is used by the next connection and costs none of the living ones. Nothing is stored.

mod address;
mod connector;
mod error;
mod traffic;
mod verifier;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use cortex_proto::{
    BULK_CONNECTION_WINDOW, BULK_STREAM_WINDOW, CONTROL_CONNECTION_WINDOW, CONTROL_STREAM_WINDOW,
    HTTP2_FRAME_BYTES,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tonic::transport::{Channel, Endpoint};

pub use address::{HubAddress, InvalidAddress};
pub use error::{ConnectError, HubRefused, certificate_refusal, connect_error_in, say_skew};
pub use traffic::Traffic;
pub use verifier::{Trust, pin_of};

use connector::TlsConnector;
use verifier::Shown;

/// How long reaching the hub may take: name, TCP and TLS together.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long after somebody answered and closed the connection another one is tried: a hub that stops closes
/// those that have just come, and the next one is there in a moment.
const CUT_OFF_PAUSES: [Duration; 3] =
    [Duration::from_millis(100), Duration::from_millis(300), Duration::from_millis(900)];

/// How long a refusal of our certificate may take to arrive. A hub that accepts it need not say
/// anything before it is asked.
const REFUSAL_TIMEOUT: Duration = Duration::from_secs(2);

/// What a connection is for, which decides its windows. Bulk data has a connection of its own, so
/// that it never delays a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Sessions, commands and their output, questions.
    Control,
    /// Packs and manifests of workspaces.
    Bulk,
}

/// The certificate and key with which this side proves itself.
#[derive(Debug)]
pub struct ClientCertificate {
    /// The leaf certificate.
    pub certificate: CertificateDer<'static>,
    /// Its private key.
    pub key: PrivateKeyDer<'static>,
}

impl Clone for ClientCertificate {
    fn clone(&self) -> Self {
        Self { certificate: self.certificate.clone(), key: self.key.clone_key() }
    }
}

/// What connections present and whom they trust, shared by all of one client.
#[derive(Clone, Debug)]
struct SharedTls {
    config: Arc<Mutex<Arc<rustls::ClientConfig>>>,
    shown: Shown,
}

impl SharedTls {
    fn current(&self) -> Arc<rustls::ClientConfig> {
        Arc::clone(&self.config.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Makes channels to one hub as one identity. Clones share the identity.
#[derive(Clone, Debug)]
pub struct HubClient {
    address: HubAddress,
    tls: SharedTls,
}

impl HubClient {
    /// A client for the hub at `address`; `certificate` is absent while joining or logging in.
    ///
    /// # Errors
    /// If certificate and key do not fit each other.
    pub fn new(
        address: HubAddress,
        trust: Trust,
        certificate: Option<ClientCertificate>,
    ) -> Result<Self, ConnectError> {
        let shown = Shown::default();
        let config = Arc::new(tls_config(trust, certificate, shown.clone())?);
        Ok(Self { address, tls: SharedTls { config: Arc::new(Mutex::new(config)), shown } })
    }

    /// Changes what is presented and who is trusted, for every connection made from now on.
    ///
    /// # Errors
    /// If certificate and key do not fit each other; nothing is changed then.
    pub fn present(
        &self,
        trust: Trust,
        certificate: Option<ClientCertificate>,
    ) -> Result<(), ConnectError> {
        let config = Arc::new(tls_config(trust, certificate, self.tls.shown.clone())?);
        *self.tls.config.lock().unwrap_or_else(PoisonError::into_inner) = config;
        Ok(())
    }

    /// Where the hub is.
    #[must_use]
    pub fn address(&self) -> &HubAddress {
        &self.address
    }

    /// The authorities that the hub has shown with its proof, in the newest handshake in which it was
    /// believed: more than are trusted, or others, while it replaces one. To be asked about, never to
    /// be trusted for being shown.
    #[must_use]
    pub fn authorities_shown(&self) -> Vec<CertificateDer<'static>> {
        self.tls.shown.get()
    }

    /// Connects now. The channel reconnects by itself if it is used after the connection broke.
    ///
    /// # Errors
    /// Why the hub could not be reached or was not believed.
    pub async fn connect(&self, purpose: Purpose) -> Result<Channel, ConnectError> {
        self.connect_counted(purpose).await.map(|(channel, _)| channel)
    }

    /// The same, and what moves on it.
    ///
    /// # Errors
    /// As [`HubClient::connect`].
    pub async fn connect_counted(
        &self,
        purpose: Purpose,
    ) -> Result<(Channel, Arc<Traffic>), ConnectError> {
        let mut pauses = CUT_OFF_PAUSES.into_iter();
        loop {
            match self.connect_once(purpose).await {
                Err(error) if error.is_cut_off() => match pauses.next() {
                    Some(pause) => tokio::time::sleep(pause).await,
                    None => return Err(error),
                },
                result => return result,
            }
        }
    }

    async fn connect_once(
        &self,
        purpose: Purpose,
    ) -> Result<(Channel, Arc<Traffic>), ConnectError> {
        let endpoint = endpoint(purpose);
        let traffic = Arc::new(Traffic::default());
        let connector = self.connector().counted(Arc::clone(&traffic));
        let connecting = endpoint.connect_with_connector(connector);
        match tokio::time::timeout(CONNECT_TIMEOUT, connecting).await {
            Ok(Ok(channel)) => Ok((channel, traffic)),
            Ok(Err(error)) => Err(connect_error_in(&error).unwrap_or_else(|| {
                ConnectError::Http2 { address: self.address.clone(), source: Arc::new(error) }
            })),
            Err(_) => Err(ConnectError::TimedOut { address: self.address.clone() }),
        }
    }

    /// A channel that connects with its first use, and what moves on it.
    #[must_use]
    pub fn connect_lazy_counted(&self, purpose: Purpose) -> (Channel, Arc<Traffic>) {
        let traffic = Arc::new(Traffic::default());
        let connector = self.connector().counted(Arc::clone(&traffic));
        (endpoint(purpose).connect_with_connector_lazy(connector), traffic)
    }

    /// Reaches the hub and checks it, without speaking any protocol above TLS.
    ///
    /// # Errors
    /// As [`HubClient::connect`].
    pub async fn probe(&self) -> Result<(), ConnectError> {
        self.connector().dial().await.map(drop)
    }

    /// What the hub has against our certificate, if it says so. In TLS 1.3 the client has finished
    /// its handshake before the hub judges it, and a connection that is written to by then often
    /// breaks before the refusal is read. So on a connection of its own nothing is written, and the
    /// first that arrives is read.
    pub async fn certificate_refused(&self) -> Option<&'static str> {
        let mut tls = self.connector().dial().await.ok()?;
        let mut first = [0];
        let reading = tokio::io::AsyncReadExt::read(&mut tls, &mut first);
        match tokio::time::timeout(REFUSAL_TIMEOUT, reading).await {
            Ok(Err(error)) => certificate_refusal(&error),
            Ok(Ok(_)) | Err(_) => None,
        }
    }

    fn connector(&self) -> TlsConnector {
        TlsConnector::new(self.address.clone(), self.tls.clone())
    }
}

fn tls_config(
    trust: Trust,
    certificate: Option<ClientCertificate>,
    shown: Shown,
) -> Result<rustls::ClientConfig, ConnectError> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier = Arc::new(verifier::HubVerifier::new(trust, Arc::clone(&provider), shown));
    let builder = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(ConnectError::Config)?
        .dangerous()
        .with_custom_certificate_verifier(verifier);
    let mut tls = match certificate {
        Some(ClientCertificate { certificate, key }) => {
            builder.with_client_auth_cert(vec![certificate], key).map_err(ConnectError::Config)?
        }
        None => builder.with_no_client_auth(),
    };
    tls.alpn_protocols = vec![b"h2".to_vec()];
    // A resumed session would skip the check of certificates on both sides.
    tls.resumption = rustls::client::Resumption::disabled();
    Ok(tls)
}

fn endpoint(purpose: Purpose) -> Endpoint {
    let seconds = Duration::from_secs;
    let (stream_window, connection_window, keep_alive) = match purpose {
        // People wait for an answer. A session beats more often than this, and so never asks.
        Purpose::Control => {
            (CONTROL_STREAM_WINDOW, CONTROL_CONNECTION_WINDOW, (seconds(8), seconds(5)))
        }
        // A ping waits behind what the kernel has taken but a slow line has not.
        Purpose::Bulk => (BULK_STREAM_WINDOW, BULK_CONNECTION_WINDOW, (seconds(20), seconds(60))),
    };
    // The connector does the TLS, so the scheme seen here is the one below it.
    Endpoint::from_static("http://hub.cortex.internal")
        .initial_stream_window_size(stream_window)
        .initial_connection_window_size(connection_window)
        .max_frame_size(HTTP2_FRAME_BYTES)
        .http2_keep_alive_interval(keep_alive.0)
        .keep_alive_timeout(keep_alive.1)
        .keep_alive_while_idle(true)
}

#[cfg(test)]
mod tests;
