//! Accepting connections: TCP with TLS 1.3 and optional client certificates, and the
//! administration socket.
//!
//! Every connection is shaken hands with in a task of its own, so that a slow or silent one delays
//! only itself, and on threads that do nothing else; how many may be at it at once is bounded, and so is the
//! time each has.

use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use cortex_shared::ids::MeshId;
use cortex_shared::peer::{CaPin, PeerIdentity};
use cortex_shared::tasks::TaskScope;
use rustls::server::{NoServerSessionStorage, ResolvesServerCert, WebPkiClientVerifier};
use rustls::{RootCertStore, ServerConfig};
use rustls_pki_types::CertificateDer;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer as _, X509Certificate};

use super::auth::Peer;
use super::handshakes::Handshakes;
use crate::enroll::authorities::{Authorities, Ring};
use crate::enroll::ca::generation_in;
use crate::shares::{Place, Queue, Shares};
use crate::store::KeyHash;

/// What connections may take that have not shaken hands yet.
#[derive(Clone, Copy)]
struct Limits {
    /// Connections that have not said anything yet, or wait for a place; beyond that, new ones are closed. Of
    /// one address there may be a quarter, here and below: two or three do not keep all others out.
    silent: usize,
    silent_of_address: usize,
    /// Time a connection has for its first byte.
    first_byte: Duration,
    /// Handshakes under way at once, of all and of one address; more wait for a place, and so long.
    handshakes: usize,
    handshakes_of_address: usize,
    place: Duration,
    /// Time a handshake may take.
    handshake: Duration,
}

const LIMITS: Limits = Limits {
    silent: 16 * 1024,
    silent_of_address: 16 * 1024 / 4,
    first_byte: Duration::from_secs(5),
    handshakes: 512,
    handshakes_of_address: 512 / 4,
    // As long as the handshake: whoever is at the other end has given up by then, and comes again.
    place: Duration::from_secs(10),
    handshake: Duration::from_secs(10),
};

/// Connections that are ready but not yet taken by the server.
const READY: usize = 64;

/// The server side of TLS: version 1.3 only, certificates of this mesh only, no resumption (it
/// would skip the check of client certificates, and so of revocation). It follows the certificate
/// authorities: a handshake that begins after one was added or retired heeds that.
pub struct TlsSettings {
    authorities: Arc<Authorities>,
    certificate: Arc<dyn ResolvesServerCert>,
    protocols: &'static [&'static [u8]],
    current: Mutex<(Arc<Ring>, Arc<ServerConfig>)>,
}

impl TlsSettings {
    /// Settings for the authorities there are now, and whatever becomes of them; `protocols` are those
    /// spoken over TLS, by their registered names, the preferred one first.
    ///
    /// # Errors
    /// If rustls refuses them.
    pub fn new(
        authorities: Arc<Authorities>,
        certificate: Arc<dyn ResolvesServerCert>,
        protocols: &'static [&'static [u8]],
    ) -> Result<Self, rustls::Error> {
        let ring = authorities.ring();
        let config = server_config(&ring, Arc::clone(&certificate), protocols)?;
        Ok(Self { authorities, certificate, protocols, current: Mutex::new((ring, config)) })
    }

    /// What the next handshake uses.
    fn config(&self) -> Arc<ServerConfig> {
        let ring = self.authorities.ring();
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        if !Arc::ptr_eq(&current.0, &ring) {
            match server_config(&ring, Arc::clone(&self.certificate), self.protocols) {
                Ok(config) => *current = (ring, config),
                Err(error) => tracing::error!(%error, "cannot follow the certificate authorities"),
            }
        }
        Arc::clone(&current.1)
    }
}

fn server_config(
    ring: &Ring,
    certificate: Arc<dyn ResolvesServerCert>,
    protocols: &[&[u8]],
) -> Result<Arc<ServerConfig>, rustls::Error> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut roots = RootCertStore::empty();
    for authority in ring.trusted() {
        roots.add(authority.certificate().clone())?;
    }
    let verifier =
        WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
            .allow_unauthenticated()
            .build()
            .map_err(|error| rustls::Error::General(error.to_string()))?;
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(verifier)
        .with_cert_resolver(certificate);
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    config.alpn_protocols = protocols.iter().map(|protocol| protocol.to_vec()).collect();
    Ok(Arc::new(config))
}

/// What a client certificate says.
struct Holding {
    identity: PeerIdentity,
    key: KeyHash,
    not_after_ms: i64,
    generation: Option<u64>,
}

/// The holder of a client certificate that TLS has accepted. Anything that this mesh would not
/// have issued (an authority, another usage, no or several names) is nobody.
fn identity_of(certificate: &CertificateDer<'_>, mesh: MeshId) -> Option<Holding> {
    let (_, certificate) = X509Certificate::from_der(certificate).ok()?;
    let usage = certificate.extended_key_usage().ok()??.value;
    let exact_usage = usage.client_auth && !usage.any && !usage.server_auth;
    if certificate.is_ca() || !exact_usage {
        return None;
    }
    let names = &certificate.subject_alternative_name().ok()??.value.general_names;
    let [GeneralName::URI(uri)] = names.as_slice() else { return None };
    let identity: PeerIdentity = uri.parse().ok()?;
    let not_after_ms = certificate.validity().not_after.timestamp().saturating_mul(1000);
    let key = *CaPin::of_spki(certificate.public_key().raw).as_bytes();
    let generation = generation_in(certificate.raw_serial());
    (identity.mesh == mesh).then_some(Holding { identity, key, not_after_ms, generation })
}

/// A connection whose other end is known as well as it will be.
pub struct PeerStream {
    pub(crate) stream: Box<dyn Stream>,
    pub(crate) peer: Peer,
}

/// What a connection can do, whatever it is made of.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// Connections as the server takes them. Closed when accepting ends.
pub type Incoming = mpsc::Receiver<io::Result<PeerStream>>;

/// Accepts TLS connections until the scope is cancelled.
#[must_use]
pub fn accept_tls(
    listener: TcpListener,
    handshakes: Arc<Handshakes>,
    settings: TlsSettings,
    mesh: MeshId,
    scope: &TaskScope,
) -> Incoming {
    accept_within(LIMITS, listener, handshakes, settings, mesh, scope)
}

fn accept_within(
    limits: Limits,
    listener: TcpListener,
    handshakes: Arc<Handshakes>,
    settings: TlsSettings,
    mesh: MeshId,
    scope: &TaskScope,
) -> Incoming {
    let (ready, incoming) = mpsc::channel(READY);
    let silent = Shares::new(limits.silent, limits.silent_of_address);
    let entrance = Arc::new(Entrance {
        limits,
        settings,
        mesh,
        places: Queue::new(limits.handshakes, limits.handshakes_of_address),
        handshakes,
    });
    let (own_scope, cancel) = (scope.clone(), scope.token().clone());
    scope.spawn("accept", async move {
        loop {
            let accepted = tokio::select! {
                () = cancel.cancelled() => return,
                accepted = listener.accept() => accepted,
            };
            let (tcp, address) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    pause_after(&error).await;
                    continue;
                }
            };
            let Some(waiting) = silent.take(address.ip()) else {
                // As good as any other: the one that has just come is turned away.
                continue;
            };
            let (entrance, ready) = (Arc::clone(&entrance), ready.clone());
            let arriving = async move {
                if let Some(stream) = entrance.shake_hands(tcp, address, waiting).await {
                    // The server is gone: so is the reason for this connection.
                    ready.send(Ok(stream)).await.ok();
                }
            };
            // Whoever has not shaken hands when the hub stops would have to begin anew in any case.
            let arriving = cancel.clone().run_until_cancelled_owned(arriving);
            own_scope.spawn("handshake", async move {
                arriving.await;
            });
        }
    });
    incoming
}

/// What all handshakes of one listener have in common.
struct Entrance {
    limits: Limits,
    settings: TlsSettings,
    mesh: MeshId,
    places: Arc<Queue>,
    handshakes: Arc<Handshakes>,
}

impl Entrance {
    /// The connection, once it is known who is at its other end; `waiting` is given back when it has a
    /// place among the handshakes.
    async fn shake_hands(
        &self,
        tcp: TcpStream,
        address: SocketAddr,
        waiting: Place,
    ) -> Option<PeerStream> {
        // A connection that says nothing takes no place from those that do. A look at the byte itself: a
        // socket counts as readable from the moment it is accepted, until a read has found it empty.
        match timeout(self.limits.first_byte, tcp.peek(&mut [0])).await {
            Ok(Ok(1..)) => {}
            Ok(Ok(0) | Err(_)) | Err(_) => return None,
        }
        let Ok(place) = timeout(self.limits.place, self.places.wait(address.ip())).await else {
            tracing::debug!(%address, "no place for a handshake");
            return None;
        };
        // Those that wait for a place are bounded as well.
        drop(waiting);
        let turn = self.handshakes.turn().await;
        // Small frames must not wait for more: latency is what people feel.
        tcp.set_nodelay(true).ok();
        cortex_shared::dead_line::notice(&tcp).ok();
        // Only now: what has become of the authorities while it waited counts.
        let acceptor = TlsAcceptor::from(self.settings.config());
        let handshake = self.handshakes.run(acceptor.accept(tcp), turn);
        let tls = match timeout(self.limits.handshake, handshake).await {
            Ok(Ok(tls)) => tls,
            Ok(Err(error)) => {
                tracing::debug!(%address, %error, "handshake failed");
                return None;
            }
            Err(_) => {
                tracing::debug!(%address, "handshake took too long");
                return None;
            }
        };
        drop(place);
        let peer = peer_of(tls.get_ref().1.peer_certificates(), address, self.mesh)?;
        Some(PeerStream { stream: Box::new(tls), peer })
    }
}

/// Who has shown these certificates, if it may be here at all.
fn peer_of(
    shown: Option<&[CertificateDer<'_>]>,
    address: SocketAddr,
    mesh: MeshId,
) -> Option<Peer> {
    match shown {
        None | Some([]) => Some(Peer::Anonymous(address)),
        // The library does not hold the authority to signing no other authority: with one certificate,
        // there is no room for one.
        Some([leaf]) => {
            let Some(Holding { identity, key, not_after_ms, generation }) = identity_of(leaf, mesh)
            else {
                tracing::warn!(%address, "certificate names nobody of this mesh");
                return None;
            };
            let certificate = Bytes::copy_from_slice(leaf);
            Some(Peer::Certified { address, identity, key, not_after_ms, generation, certificate })
        }
        Some(_) => {
            tracing::warn!(%address, "a chain of certificates instead of one");
            None
        }
    }
}

/// Accepts connections of root and of the hub's own user on the administration socket.
#[must_use]
pub fn accept_local(listener: UnixListener, scope: &TaskScope) -> Incoming {
    let (ready, incoming) = mpsc::channel(READY);
    let cancel = scope.token().clone();
    let own_uid = rustix::process::geteuid().as_raw();
    scope.spawn("accept local", async move {
        loop {
            let accepted = tokio::select! {
                () = cancel.cancelled() => return,
                accepted = listener.accept() => accepted,
            };
            match accepted {
                Ok((stream, _)) => match local_uid(&stream) {
                    Some(uid) if uid == 0 || uid == own_uid => {
                        let peer = Peer::Local { uid };
                        if ready
                            .send(Ok(PeerStream { stream: Box::new(stream), peer }))
                            .await
                            .is_err()
                        {
                            return;
                        }
                    }
                    uid => tracing::warn!(?uid, "administration refused"),
                },
                Err(error) => pause_after(&error).await,
            }
        }
    });
    incoming
}

fn local_uid(stream: &UnixStream) -> Option<u32> {
    stream.peer_cred().ok().map(|credentials| credentials.uid())
}

/// Out of descriptors or memory: accepting again at once would only burn the processor.
async fn pause_after(error: &io::Error) {
    tracing::warn!(%error, "cannot accept a connection");
    tokio::time::sleep(Duration::from_millis(100)).await;
}

/// Binds the administration socket, mode 0600; a leftover of a hub that died is replaced. The
/// caller holds the lock of the data directory, so no living hub listens there.
///
/// # Errors
/// Those of the file system.
pub fn bind_local(path: &Path) -> io::Result<UnixListener> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        Ok(()) | Err(_) => {}
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
    Ok(listener)
}

#[cfg(test)]
mod tests {
    use cortex_shared::clock::unix_ms;
    use cortex_shared::peer::HUB_SERVER_NAME;
    use rustls::ClientConfig;
    use rustls_pki_types::ServerName;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio_rustls::TlsConnector;
    use tokio_rustls::client::TlsStream;

    use super::*;
    use crate::enroll::ca::NODE_CERTIFICATE_LIFE;
    use crate::enroll::hub_certificate::HubCertificate;
    use crate::store::Store as _;
    use crate::store::sqlite::SqliteStore;

    /// As long as nobody waits, and longer than a test.
    const FOR_EVER: Duration = Duration::from_secs(3600);
    /// What a test waits for that is to happen.
    const PATIENCE: Duration = Duration::from_secs(30);

    /// A listener, and whoever believes its authority.
    struct Listening {
        address: SocketAddr,
        incoming: Incoming,
        scope: TaskScope,
        connector: TlsConnector,
        _folder: tempfile::TempDir,
    }

    impl Listening {
        async fn start(limits: Limits) -> Self {
            let folder = tempfile::tempdir().unwrap();
            let (scope, databases) = (TaskScope::new(), TaskScope::new());
            let database = folder.path().join("hub.db");
            let store = SqliteStore::open(database, &databases).await.unwrap();
            let mesh = store.mesh().await.unwrap();
            let ca = folder.path().join("ca");
            let authorities = Authorities::open(ca, mesh, NODE_CERTIFICATE_LIFE, &store);
            let authorities = Arc::new(authorities.await.unwrap());
            let mut roots = RootCertStore::empty();
            roots.add(authorities.ring().serving().certificate().clone()).unwrap();
            let certificate = HubCertificate::new(Arc::clone(&authorities), unix_ms).unwrap();
            let settings = TlsSettings::new(authorities, Arc::new(certificate), &[b"h2"]).unwrap();
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap();
            let handshakes = Arc::new(Handshakes::start().unwrap());
            let incoming = accept_within(limits, listener, handshakes, settings, mesh, &scope);
            let provider = Arc::new(rustls::crypto::ring::default_provider());
            let client = ClientConfig::builder_with_provider(provider)
                .with_protocol_versions(&[&rustls::version::TLS13])
                .unwrap()
                .with_root_certificates(roots)
                .with_no_client_auth();
            let connector = TlsConnector::from(Arc::new(client));
            Self { address, incoming, scope, connector, _folder: folder }
        }

        async fn dial(&self) -> TcpStream {
            TcpStream::connect(self.address).await.unwrap()
        }

        /// Dials and shakes hands.
        async fn greet(&mut self) -> (TlsStream<TcpStream>, PeerStream) {
            let name = ServerName::try_from(HUB_SERVER_NAME).unwrap();
            let shaking = async {
                let tls = self.connector.connect(name, self.dial().await).await.unwrap();
                (tls, self.incoming.recv().await.unwrap().unwrap())
            };
            timeout(PATIENCE, shaking).await.expect("there is a place for it")
        }
    }

    #[tokio::test]
    async fn a_silent_connection_holds_no_place_of_those_that_speak() {
        let limits = Limits {
            first_byte: FOR_EVER,
            handshakes: 1,
            handshakes_of_address: 1,
            handshake: FOR_EVER,
            ..LIMITS
        };
        let mut listening = Listening::start(limits).await;
        let silent = listening.dial().await;
        // It has been accepted before.
        let (_, stream) = listening.greet().await;
        assert!(matches!(stream.peer, Peer::Anonymous(_)));
        drop(silent);
        listening.scope.cancel();
    }

    #[tokio::test]
    async fn a_silent_connection_is_closed_when_its_time_for_a_first_byte_is_over() {
        let limits =
            Limits { first_byte: Duration::from_millis(50), handshake: FOR_EVER, ..LIMITS };
        let listening = Listening::start(limits).await;
        let mut silent = listening.dial().await;
        let closed = timeout(PATIENCE, silent.read(&mut [0])).await.expect("it is closed");
        assert!(matches!(closed, Ok(0) | Err(_)), "nobody has said anything");
        listening.scope.cancel();
    }

    #[tokio::test]
    async fn a_connection_that_finds_no_place_for_its_handshake_in_time_is_closed() {
        let limits = Limits {
            handshakes: 1,
            handshakes_of_address: 1,
            place: Duration::from_millis(50),
            handshake: FOR_EVER,
            ..LIMITS
        };
        let listening = Listening::start(limits).await;
        let mut both = Vec::new();
        for _ in 0..2 {
            let mut half_shaken = listening.dial().await;
            half_shaken.write_all(&[22]).await.unwrap();
            both.push(half_shaken);
        }
        let [one, other] = &mut both[..] else { unreachable!() };
        let (mut of_one, mut of_other) = ([0], [0]);
        let closed = async {
            tokio::select! {
                closed = one.read(&mut of_one) => closed,
                closed = other.read(&mut of_other) => closed,
            }
        };
        let closed = timeout(PATIENCE, closed).await.expect("the one without a place is closed");
        assert!(matches!(closed, Ok(0) | Err(_)));
        listening.scope.cancel();
    }

    #[tokio::test]
    async fn three_addresses_leave_places_for_others() {
        let places = Queue::new(LIMITS.handshakes, LIMITS.handshakes_of_address);
        let silent = Shares::new(LIMITS.silent, LIMITS.silent_of_address);
        let (mut held, mut shaking) = (Vec::new(), Vec::new());
        for address in ["192.0.2.1", "192.0.2.2", "192.0.2.3"] {
            let address = address.parse().unwrap();
            held.extend(std::iter::from_fn(|| silent.take(address)));
            let all = async {
                for _ in 0..LIMITS.handshakes_of_address {
                    shaking.push(places.wait(address).await);
                }
            };
            timeout(PATIENCE, all).await.expect("it has its share, whatever the others have");
        }
        let other = "192.0.2.4".parse().unwrap();
        assert!(silent.take(other).is_some());
        timeout(PATIENCE, places.wait(other)).await.expect("there is a place");
    }

    #[tokio::test]
    async fn a_stop_waits_for_nobody_who_has_not_shaken_hands() {
        let limits = Limits { first_byte: FOR_EVER, handshake: FOR_EVER, ..LIMITS };
        let mut listening = Listening::start(limits).await;
        let _silent = listening.dial().await;
        let mut half_shaken = listening.dial().await;
        half_shaken.write_all(&[22]).await.unwrap();
        // Both have been accepted before.
        let _shaken = listening.greet().await;
        listening.scope.cancel();
        timeout(PATIENCE, listening.scope.finish()).await.expect("it ends");
    }
}
