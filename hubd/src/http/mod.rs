//! The HTTP side: a listener of its own for browsers, scripts and monitoring.
//!
//! | module | subject |
//! |---|---|
//! | `server` | connections: how many, how long, and their end |
//! | `door` | every request: whose it is, whether it may, how long it has |
//! | `credentials` | cookie, bearer token, client certificate; where a request comes from |
//! | `routes` | the API as one table |
//! | `api` | carrying it out, by the calls of the Operator service |
//! | `sse` | answers that go on until something ends them |
//! | `openapi` | the table as a document |
//! | `provision` | installing nodes: the script and the agent |
//! | `page` | the web page, and where a login link leads |
//! | [`health`], `metrics` | for monitoring |
//! | `error` | problem documents |
//!
//! It begins before the hub is ready and ends after everything else, so that whoever asks how the hub is
//! gets an answer throughout. It holds nothing that is not the rest of the hub's, but for logins, which a
//! restart ends ([`crate::authority::sessions`]). Nobody who has not logged in learns anything here but
//! that a hub is here; what they can download is the same for everybody.

mod api;
mod credentials;
mod door;
mod error;
pub mod health;
mod metrics;
mod openapi;
mod page;
mod provision;
mod routes;
mod server;
mod sse;

use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use cortex_shared::clock::unix_ms;
use cortex_shared::tasks::TaskScope;
use tokio::net::TcpListener;

use self::api::Api;
use self::door::Door;
use self::health::Readiness;
use self::provision::Agents;
use crate::authority::sessions::Sessions;
use crate::config::HttpConfig;
use crate::enroll::authorities::Authorities;
use crate::enroll::http_certificate::{HttpCertificate, HttpCertificateError};
use crate::grpc::accept::{TlsSettings, accept_tls};
use crate::grpc::auth::AuthLayer;
use crate::grpc::handshakes::Handshakes;
use crate::grpc::operator::OperatorService;
use crate::grpc::place::HttpPlace;

/// Why there is no HTTP side.
#[derive(Debug, thiserror::Error)]
pub enum HttpError {
    /// Its address cannot be listened on.
    #[error("cannot listen on {address}")]
    Listen {
        /// Which.
        address: SocketAddr,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Settings that do not fit together.
    #[error("{0}")]
    Settings(&'static str),
    /// Its certificate.
    #[error(transparent)]
    Certificate(#[from] HttpCertificateError),
    /// TLS.
    #[error("cannot set up TLS")]
    Tls(#[from] rustls::Error),
    /// The file with the token for metrics.
    #[error("cannot use {path}")]
    Token {
        /// Which.
        path: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

/// What the HTTP side is made of, besides its configuration.
pub struct Ground<'a> {
    /// Who signs its certificate, and those of its callers.
    pub authorities: &'a Arc<Authorities>,
    /// Where the key of its own certificate is kept.
    pub key: &'a Path,
    /// What others call this machine.
    pub host: &'a str,
    /// Who has logged in.
    pub sessions: &'a Arc<Sessions>,
    /// Where it shakes hands.
    pub handshakes: &'a Arc<Handshakes>,
}

/// The HTTP side while it serves.
pub struct HttpSide {
    address: SocketAddr,
    place: HttpPlace,
    certificate: Arc<HttpCertificate>,
    door: Arc<Door>,
    scope: TaskScope,
}

impl HttpSide {
    /// Listens and serves; until [`HttpSide::open`] only what needs no hub that is ready. `None` if the
    /// configuration has no HTTP side.
    ///
    /// # Errors
    /// See [`HttpError`]. Nothing is listened on then.
    pub async fn start(
        config: &HttpConfig,
        inherited: Option<std::net::TcpListener>,
        ground: Ground<'_>,
    ) -> Result<Option<Self>, HttpError> {
        let Some(address) = config.listen else { return Ok(None) };
        let listen_error = |source| HttpError::Listen { address, source };
        let listener = match inherited {
            Some(listener) => TcpListener::from_std(listener),
            None => TcpListener::bind(address).await,
        }
        .map_err(listen_error)?;
        let address = listener.local_addr().map_err(listen_error)?;
        let certificate =
            Arc::new(match config.certificate_files().map_err(HttpError::Settings)? {
                Some(files) => HttpCertificate::of_files(files)?,
                None => {
                    let hosts = hosts(ground.host, address);
                    let authorities = Arc::clone(ground.authorities);
                    HttpCertificate::of_mesh(authorities, unix_ms, ground.key, &hosts)?
                }
            });
        let tls = TlsSettings::new(
            Arc::clone(ground.authorities),
            Arc::clone(&certificate) as _,
            &[b"h2", b"http/1.1"],
        )?;
        let metrics_token =
            match &config.metrics_token {
                None => None,
                Some(path) => Some(metrics::token(path).map_err(|source| HttpError::Token {
                    path: path.display().to_string(),
                    source,
                })?),
            };
        let door = Arc::new(Door::new(
            config,
            Arc::clone(ground.sessions),
            Agents::new(config.agents.clone(), config.downloads),
            metrics_token,
        ));
        let place = HttpPlace::new(config, address, ground.host, Arc::clone(&certificate));
        let scope = TaskScope::new();
        let (handshakes, mesh) = (Arc::clone(ground.handshakes), ground.authorities.mesh());
        let incoming = accept_tls(listener, handshakes, tls, mesh, &scope);
        server::serve(incoming, door::router(&door), server::Limits::of(config), &scope);
        tracing::info!(%address, url = place.url(), "http serves");
        Ok(Some(Self { address, place, certificate, door, scope }))
    }

    /// Serves everything from now on.
    pub fn open(&self, service: OperatorService, auth: AuthLayer) {
        let sessions = Arc::clone(&service.sessions);
        self.door.open(Api { service, auth, sessions });
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where others reach it.
    #[must_use]
    pub fn place(&self) -> &HttpPlace {
        &self.place
    }

    /// Whether the hub is ready, as it is told here.
    #[must_use]
    pub fn readiness(&self) -> &Arc<Readiness> {
        self.door.readiness()
    }

    /// Reads certificate and key again, if they are given.
    ///
    /// # Errors
    /// See [`HttpCertificateError`]; the old ones stay in use.
    pub fn reload(&self) -> Result<(), HttpCertificateError> {
        self.certificate.reload()
    }

    /// Ends it, once everything else has ended. What is under way has a few seconds, and no longer than
    /// `grace`.
    pub async fn shutdown(self, grace: Duration) {
        self.scope.cancel();
        if tokio::time::timeout(grace, self.scope.finish()).await.is_err() {
            tracing::warn!(tasks = self.scope.running(), "http did not end in time");
        }
    }
}

/// What the certificate is good for.
fn hosts(host: &str, address: SocketAddr) -> Vec<String> {
    let mut hosts = vec!["localhost".to_owned(), "127.0.0.1".to_owned(), "::1".to_owned()];
    let own = rustix::system::uname().nodename().to_string_lossy().into_owned();
    hosts.extend([own, address.ip().to_string()]);
    hosts.push(host.trim_start_matches('[').trim_end_matches(']').to_owned());
    hosts.retain(|host| host != "0.0.0.0" && host != "::");
    hosts.sort();
    hosts.dedup();
    hosts
}

#[cfg(test)]
mod tests;
