//! Certificates for tests.

use std::time::Duration;

use cortex_shared::peer::PeerIdentity;
use rcgen::{CertificateParams, Issuer, KeyPair, SanType};
use rustls_pki_types::CertificateDer;

use super::{Credentials, IdentityKey, NodeIdentity};
use cortex_shared::ids::{MeshId, NodeId};
use cortex_shared::peer::Holder;

/// An authority that signs whatever is asked.
pub(crate) struct Ca {
    pub(crate) certificate: CertificateDer<'static>,
    issuer: Issuer<'static, KeyPair>,
}

impl Ca {
    pub(crate) fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let certificate = params.self_signed(&key).unwrap().der().clone();
        Self { certificate, issuer: Issuer::new(params, key) }
    }

    /// A certificate for the key of a request, valid for a day until `not_after_ms`.
    pub(crate) fn sign(
        &self,
        request_der: &[u8],
        peer: &PeerIdentity,
        not_after_ms: i64,
    ) -> CertificateDer<'static> {
        let request = rustls_pki_types::CertificateSigningRequestDer::from(request_der);
        let request = rcgen::CertificateSigningRequestParams::from_der(&request).unwrap();
        let mut params = params_until(not_after_ms);
        params.subject_alt_names = vec![SanType::URI(peer.to_string().try_into().unwrap())];
        params.signed_by(&request.public_key, &self.issuer).unwrap().der().clone()
    }

    /// An identity of a new node, with its key in `folder`.
    pub(crate) fn node(&self, folder: &std::path::Path, not_after_ms: i64) -> NodeIdentity {
        let key = IdentityKey::load_or_make(folder).unwrap();
        let (node_id, mesh) = (NodeId::new(), MeshId::new());
        let peer = PeerIdentity { mesh, holder: Holder::Node(node_id) };
        let certificate = self.sign(&key.request_der().unwrap(), &peer, not_after_ms);
        NodeIdentity {
            node_id,
            name: "n1".to_owned(),
            mesh,
            credentials: key.with(certificate, vec![self.certificate.clone()]),
            generation: 1,
            fallback: None,
        }
    }
}

fn params_until(not_after_ms: i64) -> CertificateParams {
    let end = rcgen::date_time_ymd(1970, 1, 1)
        + Duration::from_millis(u64::try_from(not_after_ms).unwrap());
    let mut params = CertificateParams::default();
    params.not_before = end - Duration::from_secs(24 * 60 * 60);
    params.not_after = end;
    params
}

/// A certificate of nobody, with this end.
pub(crate) fn certificate_until(not_after_ms: i64) -> CertificateDer<'static> {
    let key = KeyPair::generate().unwrap();
    params_until(not_after_ms).self_signed(&key).unwrap().der().clone()
}

/// Some credentials that fit each other.
pub(crate) fn credentials() -> Credentials {
    let folder = tempfile::tempdir().unwrap();
    let key = IdentityKey::load_or_make(folder.path()).unwrap();
    let ca = Ca::new();
    let peer = PeerIdentity { mesh: MeshId::new(), holder: Holder::Hub };
    let certificate = ca.sign(&key.request_der().unwrap(), &peer, 2_000_000_000_000);
    key.with(certificate, vec![ca.certificate])
}
