//! The check of the hub within the TLS handshake.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use cortex_shared::ids::MeshId;
use cortex_shared::peer::{CaPin, HUB_SERVER_NAME, Holder, PeerIdentity};
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::{CertificateError, DigitallySignedStruct, RootCertStore, SignatureScheme};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use x509_parser::prelude::{FromDer as _, GeneralName, X509Certificate};

use super::HubRefused;

/// Whom to believe.
#[derive(Clone, Debug)]
pub enum Trust {
    /// Whoever the authority with one of these keys signed: before joining or logging in.
    Pins(Vec<CaPin>),
    /// Whoever one of these authorities signed as the hub of this mesh: afterwards. More than one
    /// while the mesh replaces one by another.
    Authorities {
        /// The stored certificates.
        certificates: Vec<CertificateDer<'static>>,
        /// Its mesh.
        mesh: MeshId,
    },
}

/// The pin of a certificate's key; `None` if it is no certificate.
#[must_use]
pub fn pin_of(certificate: &CertificateDer<'_>) -> Option<CaPin> {
    let (_, parsed) = X509Certificate::from_der(certificate).ok()?;
    Some(CaPin::of_spki(parsed.public_key().raw))
}

#[derive(Debug)]
pub(super) struct HubVerifier {
    trust: Trust,
    provider: Arc<CryptoProvider>,
    shown: Shown,
}

/// The authorities that a hub which proved itself has shown last. Shared by all of one client.
#[derive(Clone, Debug, Default)]
pub(super) struct Shown(Arc<Mutex<Vec<CertificateDer<'static>>>>);

impl Shown {
    pub(super) fn get(&self) -> Vec<CertificateDer<'static>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set(&self, chain: &[CertificateDer<'_>]) {
        let shown = chain.iter().map(|shown| shown.clone().into_owned()).collect();
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = shown;
    }
}

impl HubVerifier {
    pub(super) fn new(trust: Trust, provider: Arc<CryptoProvider>, shown: Shown) -> Self {
        Self { trust, provider, shown }
    }

    /// The authorities to check against: the stored ones, or those in the hub's own chain that have
    /// a pinned key.
    fn authorities(
        &self,
        chain: &[CertificateDer<'_>],
    ) -> Result<Vec<CertificateDer<'static>>, HubRefused> {
        match &self.trust {
            Trust::Authorities { certificates, .. } => Ok(certificates.clone()),
            Trust::Pins(pins) => {
                let pinned: Vec<_> = chain
                    .iter()
                    .filter(|shown| pin_of(shown).is_some_and(|pin| pins.contains(&pin)))
                    .map(|shown| shown.clone().into_owned())
                    .collect();
                if pinned.is_empty() {
                    let shown = chain.first().and_then(pin_of);
                    return Err(HubRefused::Pin { expected: pins.clone(), shown });
                }
                Ok(pinned)
            }
        }
    }

    fn check(
        &self,
        leaf: &CertificateDer<'_>,
        chain: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), rustls::Error> {
        let mut roots = RootCertStore::empty();
        for authority in self.authorities(chain).map_err(refuse)? {
            roots.add(authority)?;
        }
        let verifier = WebPkiServerVerifier::builder_with_provider(
            Arc::new(roots),
            Arc::clone(&self.provider),
        )
        .build()
        .map_err(|error| rustls::Error::General(error.to_string()))?;
        let name = ServerName::try_from(HUB_SERVER_NAME).expect("the fixed name is a DNS name");
        // No authority in between: the mesh's own signs the hub itself.
        verifier.verify_server_cert(leaf, &[], &name, &[], now).map_err(explain)?;
        self.check_is_hub(leaf).map_err(refuse)
    }

    /// What the general check of certificates leaves open: that the key may be used by servers only
    /// because it says so, and that its holder is the hub of this mesh.
    fn check_is_hub(&self, leaf: &CertificateDer<'_>) -> Result<(), HubRefused> {
        let (_, leaf) = X509Certificate::from_der(leaf)
            .map_err(|_| HubRefused::NotAHub("it cannot be read"))?;
        let for_servers =
            leaf.extended_key_usage().ok().flatten().is_some_and(|usage| usage.value.server_auth);
        if !for_servers {
            return Err(HubRefused::NotAHub("it is not for servers"));
        }
        let names = leaf
            .subject_alternative_name()
            .ok()
            .flatten()
            .ok_or(HubRefused::NotAHub("it names nobody"))?;
        let uris: Vec<&str> = names
            .value
            .general_names
            .iter()
            .filter_map(|name| match name {
                GeneralName::URI(uri) => Some(*uri),
                _ => None,
            })
            .collect();
        let [uri] = uris.as_slice() else {
            return Err(HubRefused::NotAHub("it does not name exactly one holder"));
        };
        let identity: PeerIdentity =
            uri.parse().map_err(|_| HubRefused::NotAHub("its holder is not one of a mesh"))?;
        if identity.holder != Holder::Hub {
            return Err(HubRefused::NotAHub("its holder is a node or an operator"));
        }
        match &self.trust {
            Trust::Authorities { mesh, .. } if *mesh != identity.mesh => {
                Err(HubRefused::NotThisMesh)
            }
            _ => Ok(()),
        }
    }
}

fn refuse(reason: HubRefused) -> rustls::Error {
    CertificateError::Other(rustls::OtherError(Arc::new(reason))).into()
}

/// Gives the refusals that people meet a text of ours; the others keep the library's.
fn explain(error: rustls::Error) -> rustls::Error {
    let rustls::Error::InvalidCertificate(reason) = &error else { return error };
    match reason {
        CertificateError::ExpiredContext { time, not_after } => refuse(HubRefused::Expired {
            not_after: timestamp(*not_after),
            now: timestamp(*time),
            apart: apart(*not_after, *time),
        }),
        CertificateError::NotValidYetContext { time, not_before } => {
            refuse(HubRefused::NotYetValid {
                not_before: timestamp(*not_before),
                now: timestamp(*time),
                apart: apart(*time, *not_before),
            })
        }
        CertificateError::UnknownIssuer | CertificateError::BadSignature => {
            refuse(HubRefused::NotThisMesh)
        }
        CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
            refuse(HubRefused::NotAHub("it has another name"))
        }
        CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. } => {
            refuse(HubRefused::NotAHub("it is not for servers"))
        }
        _ => error,
    }
}

/// How far this machine's clock and the hub's must differ at least, if the certificate is right.
fn apart(earlier: UnixTime, later: UnixTime) -> Duration {
    Duration::from_secs(later.as_secs().saturating_sub(earlier.as_secs()))
}

fn timestamp(time: UnixTime) -> String {
    i64::try_from(time.as_secs())
        .ok()
        .and_then(|seconds| jiff::Timestamp::from_second(seconds).ok())
        .map_or_else(|| "an unknown time".to_owned(), |time| time.to_string())
}

impl ServerCertVerifier for HubVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.check(end_entity, intermediates, now)?;
        self.shown.set(intermediates);
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("only TLS 1.3 is spoken".to_owned()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(
            message,
            cert,
            dss,
            &self.provider.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
