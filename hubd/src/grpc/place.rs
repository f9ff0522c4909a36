//! Where others reach the HTTP side, for the lines that are printed to be pasted.

use std::net::SocketAddr;
use std::sync::Arc;

use crate::config::HttpConfig;
use crate::enroll::http_certificate::{HttpCertificate, HttpPin};

/// See the module.
#[derive(Clone, Debug)]
pub struct HttpPlace {
    url: String,
    bound: SocketAddr,
    /// Absent where something else shows a certificate of its own.
    certificate: Option<Arc<HttpCertificate>>,
}

impl HttpPlace {
    /// The HTTP side that listens here; `host` is what others call this machine.
    #[must_use]
    pub fn new(
        config: &HttpConfig,
        bound: SocketAddr,
        host: &str,
        certificate: Arc<HttpCertificate>,
    ) -> Self {
        match &config.url {
            Some(url) => Self { url: url.as_str().to_owned(), bound, certificate: None },
            None => {
                let url = format!("https://{host}:{}", bound.port());
                Self { url, bound, certificate: Some(certificate) }
            }
        }
    }

    /// Such as `https://hub.example.org:7480`.
    #[must_use]
    pub fn url(&self) -> &str {
        &self.url
    }

    /// What its certificate's key has to be; none where the certificate is somebody else's.
    #[must_use]
    pub fn pin(&self) -> Option<HttpPin> {
        self.certificate.as_ref().and_then(|certificate| certificate.pin())
    }

    /// Whether a machine that reaches the hub at `grpc` reaches this place, too.
    #[must_use]
    pub fn is_reached_like(&self, grpc: SocketAddr) -> bool {
        self.certificate.is_none() || !self.bound.ip().is_loopback() || grpc.ip().is_loopback()
    }
}
