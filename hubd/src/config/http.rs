//! The configuration of the HTTP side.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use crate::enroll::http_certificate::CertificateFiles;

/// Default port of the HTTP side.
pub const DEFAULT_HTTP_PORT: u16 = 7480;

/// An address of the web that can stand in a line of shell as it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HttpUrl(String);

impl HttpUrl {
    /// Such as `https://hub.example.org:7480`, without a slash at its end.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl std::str::FromStr for HttpUrl {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let plain = |c: char| c.is_ascii_alphanumeric() || "-._~:/[]".contains(c);
        let text = text.trim_end_matches('/');
        match text.strip_prefix("https://") {
            Some(rest) if !rest.is_empty() && rest.chars().all(plain) && text.len() <= 256 => {
                Ok(Self(text.to_owned()))
            }
            _ => Err("expected an address such as https://hub.example.org".to_owned()),
        }
    }
}

/// See the settings, which explain each of them.
#[derive(Clone, Debug)]
pub struct HttpConfig {
    /// Address of the HTTP side; none to have none.
    pub listen: Option<SocketAddr>,
    /// Where it is reached, if by something that stands before it.
    pub url: Option<HttpUrl>,
    /// Certificate chain, in PEM, instead of one of the mesh's own.
    pub certificate: Option<PathBuf>,
    /// Its key.
    pub key: Option<PathBuf>,
    /// Folder with the agents that nodes download.
    pub agents: Option<PathBuf>,
    /// Connections at the same time.
    pub connections: usize,
    /// Those of them that one address may have.
    pub address_connections: usize,
    /// Downloads of agents at the same time.
    pub downloads: usize,
    /// Time that one download may take.
    pub download_time: Duration,
    /// Largest header of a request, in bytes, all of its fields together.
    pub header_bytes: usize,
    /// Largest body of a request, in bytes.
    pub request_bytes: usize,
    /// Time that a request may take.
    pub request_time: Duration,
    /// Time that a connection has for the header of its next request.
    pub header_time: Duration,
    /// How long a connection on which nothing moves is kept, beyond `request_time`.
    pub idle_time: Duration,
    /// How long a session of a browser lasts at most.
    pub session_life: Duration,
    /// File with the token by which metrics are read.
    pub metrics_token: Option<PathBuf>,
}

impl Default for HttpConfig {
    fn default() -> Self {
        Self {
            listen: Some(SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), DEFAULT_HTTP_PORT)),
            url: None,
            certificate: None,
            key: None,
            agents: None,
            // A browser has six, and a thousand machines that install at once have one each.
            connections: 2048,
            // A quarter: an office behind one address has room, and leaves some.
            address_connections: 512,
            // Each holds a piece of 64 KiB and what the connection has of it: some 10 MiB together.
            downloads: 64,
            // 20 MiB at 25 KiB a second.
            download_time: Duration::from_secs(15 * 60),
            header_bytes: 16 * 1024,
            request_bytes: 64 * 1024,
            request_time: Duration::from_secs(30),
            // The slowest of lines needs less, and whoever opens connections to say nothing holds each no
            // longer.
            header_time: Duration::from_secs(15),
            // Twice the signs of life that streams and HTTP/2 give.
            idle_time: Duration::from_secs(30),
            // A working day.
            session_life: Duration::from_secs(8 * 3600),
            metrics_token: None,
        }
    }
}

impl HttpConfig {
    /// The files with certificate and key, if they are given.
    ///
    /// # Errors
    /// What is wrong, for people, if only one of the two is given.
    pub fn certificate_files(&self) -> Result<Option<CertificateFiles>, &'static str> {
        match (&self.certificate, &self.key) {
            (Some(certificate), Some(key)) => {
                Ok(Some(CertificateFiles { certificate: certificate.clone(), key: key.clone() }))
            }
            (None, None) => Ok(None),
            _ => Err("http_certificate and http_key belong together: give both or none"),
        }
    }
}
