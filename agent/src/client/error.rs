//! Why a hub could not be reached, or was not believed.

use std::error::Error as StdError;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use cortex_shared::peer::CaPin;
use rustls::{AlertDescription, CertificateError};

use super::HubAddress;

/// Why there is no connection. Cheap to clone, because tonic hands it over behind a reference.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ConnectError {
    /// The name has no address.
    #[error("the name in {address} cannot be resolved")]
    Resolve {
        /// The hub.
        address: HubAddress,
        /// What the resolver said.
        source: Arc<io::Error>,
    },
    /// Nothing answers there.
    #[error("hub {address} cannot be reached")]
    Unreachable {
        /// The hub.
        address: HubAddress,
        /// What the system said.
        source: Arc<io::Error>,
    },
    /// Something took too long.
    #[error("hub {address} did not answer within 10 seconds")]
    TimedOut {
        /// The hub.
        address: HubAddress,
    },
    /// The peer at this address is not the hub that is trusted.
    #[error("the hub at {address} was not believed")]
    HubRefused {
        /// The hub.
        address: HubAddress,
        /// What is wrong with it.
        source: HubRefused,
    },
    /// TLS failed for another reason.
    #[error("no TLS session with {address}")]
    Tls {
        /// The hub.
        address: HubAddress,
        /// What the TLS library said.
        source: Arc<io::Error>,
    },
    /// TLS stands, HTTP/2 does not.
    #[error("{address} does not speak HTTP/2")]
    Http2 {
        /// The hub.
        address: HubAddress,
        /// What the HTTP library said.
        source: Arc<tonic::transport::Error>,
    },
    /// Own certificate and key cannot be used.
    #[error("this identity's certificate and key cannot be used")]
    Config(#[source] rustls::Error),
}

/// Why the peer was not believed to be the hub. Nothing was sent to it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HubRefused {
    /// Its authority is not the pinned one.
    #[error(
        "it shows another certificate authority: expected {}, shown {}",
        list_pins(expected),
        shown.map_or_else(|| "none".to_owned(), |pin| pin.to_string())
    )]
    Pin {
        /// The accepted pins.
        expected: Vec<CaPin>,
        /// The pin of the first authority the hub sent.
        shown: Option<CaPin>,
    },
    /// The stored authority did not sign it.
    #[error("its certificate was not signed by this mesh's authority")]
    NotThisMesh,
    /// Its certificate's time is over, or this machine's clock is ahead.
    #[error(
        "its certificate expired at {not_after}, and this machine's clock says {now}: it is {} ahead of the hub's, or the hub's certificate was not renewed",
        say_skew(*apart)
    )]
    Expired {
        /// End of validity.
        not_after: String,
        /// This machine's time.
        now: String,
        /// The time between them.
        apart: Duration,
    },
    /// Its certificate's time has not come, or this machine's clock is behind.
    #[error(
        "its certificate is not valid before {not_before}, and this machine's clock says {now}: it is at least {} behind the hub's",
        say_skew(*apart)
    )]
    NotYetValid {
        /// Begin of validity.
        not_before: String,
        /// This machine's time.
        now: String,
        /// The time between them.
        apart: Duration,
    },
    /// The authority signed it, but not as a hub.
    #[error("its certificate is not a hub's: {0}")]
    NotAHub(&'static str),
}

/// A difference between two clocks, for people: rough is enough.
#[must_use]
pub fn say_skew(apart: Duration) -> String {
    match apart.as_secs() {
        seconds @ 0..120 => format!("{seconds} s"),
        seconds @ 120..7_200 => format!("{} min", seconds / 60),
        seconds @ 7_200..172_800 => format!("{} h", seconds / 3_600),
        seconds => format!("{} days", seconds / 86_400),
    }
}

fn list_pins(pins: &[CaPin]) -> String {
    pins.iter().map(CaPin::to_string).collect::<Vec<_>>().join(" or ")
}

impl ConnectError {
    /// Whether somebody answered and closed the connection in the middle of it, as a hub does that stops: the
    /// next one may be there in a moment.
    pub(super) fn is_cut_off(&self) -> bool {
        match self {
            Self::Tls { source, .. } => is_end(source.kind()),
            Self::Http2 { source, .. } => {
                let mut cause: Option<&(dyn StdError + 'static)> = Some(&**source);
                while let Some(error) = cause {
                    if error.downcast_ref::<io::Error>().is_some_and(|error| is_end(error.kind())) {
                        return true;
                    }
                    cause = error.source();
                }
                false
            }
            _ => false,
        }
    }

    pub(super) fn from_handshake(address: HubAddress, error: io::Error) -> Self {
        let refused = error
            .get_ref()
            .and_then(|inner| inner.downcast_ref::<rustls::Error>())
            .and_then(|error| match error {
                rustls::Error::InvalidCertificate(CertificateError::Other(other)) => {
                    other.0.downcast_ref::<HubRefused>().cloned()
                }
                _ => None,
            });
        match refused {
            Some(source) => Self::HubRefused { address, source },
            None => Self::Tls { address, source: Arc::new(error) },
        }
    }

    /// The command or deed that helps.
    #[must_use]
    pub fn hint(&self) -> String {
        match self {
            Self::Resolve { .. } => "check the spelling and this machine's DNS".to_owned(),
            Self::Unreachable { address, .. } | Self::TimedOut { address } => format!(
                "is the hub running, and is {address} its gRPC address? `cortex-agent doctor` looks closer"
            ),
            Self::HubRefused { source: HubRefused::Pin { .. }, .. } => {
                "nothing was sent. `cortex-hubd ca pin` on the hub's machine shows the right pin; if the hub was not reinstalled, somebody may be in between".to_owned()
            }
            Self::HubRefused { source: HubRefused::NotThisMesh, .. } => {
                "nothing was sent. Is this the address of another mesh's hub? After a reinstallation of the hub, this identity has to join or log in again".to_owned()
            }
            Self::HubRefused {
                source: HubRefused::Expired { .. } | HubRefused::NotYetValid { .. },
                ..
            } => "compare this machine's clock with the hub's: `date -u`, `timedatectl`".to_owned(),
            Self::HubRefused { source: HubRefused::NotAHub(_), .. } => {
                "nothing was sent. Something else answers at this address".to_owned()
            }
            Self::Tls { .. } | Self::Http2 { .. } => {
                "is this the hub's gRPC port (7443 by default), not its HTTP port?".to_owned()
            }
            Self::Config(_) => "join or log in again".to_owned(),
        }
    }

    /// Whether trying again soon is of no use: somebody has to change something first.
    #[must_use]
    pub fn is_permanent(&self) -> bool {
        matches!(self, Self::HubRefused { .. } | Self::Config(_))
    }
}

/// Finds the [`ConnectError`] below an error of tonic (a transport error or a status).
#[must_use]
pub fn connect_error_in(error: &(dyn StdError + 'static)) -> Option<ConnectError> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(found) = error.downcast_ref::<ConnectError>() {
            return Some(found.clone());
        }
        next = error.source();
    }
    None
}

fn is_end(kind: io::ErrorKind) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, UnexpectedEof};
    matches!(kind, BrokenPipe | ConnectionAborted | ConnectionReset | UnexpectedEof)
}

/// What the hub had against our own certificate, if the error says so. In TLS 1.3 the client has
/// finished its handshake before the hub judges it, so this arrives with the first read.
#[must_use]
pub fn certificate_refusal(error: &(dyn StdError + 'static)) -> Option<&'static str> {
    const REFUSALS: [(AlertDescription, &str); 8] = [
        (AlertDescription::CertificateExpired, "this certificate has expired"),
        (AlertDescription::CertificateRevoked, "this certificate was revoked"),
        (AlertDescription::UnknownCA, "this certificate belongs to another mesh"),
        (AlertDescription::CertificateUnknown, "this certificate was not accepted"),
        (AlertDescription::BadCertificate, "this certificate was not accepted"),
        (AlertDescription::UnsupportedCertificate, "this certificate was not accepted"),
        // Two authorities of one mesh have one name, so that of the wrong one is a bad signature.
        (AlertDescription::DecryptError, "this certificate is not of the mesh's present authority"),
        (AlertDescription::AccessDenied, "this identity was not accepted"),
    ];
    let mut next = Some(error);
    while let Some(error) = next {
        // h2 keeps of a TLS error only its text, so the text has to be searched.
        let text = error.to_string();
        if text.contains("received fatal alert") {
            return REFUSALS
                .iter()
                .find(|(alert, _)| text.contains(&format!("{alert:?}")))
                .map(|(_, meaning)| *meaning);
        }
        next = error.source();
    }
    None
}
