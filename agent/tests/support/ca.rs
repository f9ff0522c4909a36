//! The authority of a mesh.

use std::sync::Arc;
use std::time::Duration;

use cortex_shared::ids::MeshId;
use cortex_shared::peer::{CaPin, HUB_SERVER_NAME, Holder, PeerIdentity};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, ExtendedKeyUsagePurpose,
    IsCa, Issuer, KeyPair, KeyUsagePurpose, SanType,
};
use rustls_pki_types::{CertificateDer, CertificateSigningRequestDer, PrivateKeyDer};

use super::now_ms;

/// Begin and end of a certificate, in milliseconds from now.
pub type Life = (i64, i64);

pub struct Ca {
    pub mesh: MeshId,
    certificate: CertificateDer<'static>,
    issuer: Issuer<'static, KeyPair>,
}

impl Ca {
    pub fn new() -> Self {
        Self::of(MeshId::new())
    }

    /// Another authority of the same mesh.
    pub fn of(mesh: MeshId) -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let certificate = params.self_signed(&key).unwrap().der().clone();
        Self { mesh, certificate, issuer: Issuer::new(params, key) }
    }

    pub fn der(&self) -> bytes::Bytes {
        self.certificate.to_vec().into()
    }

    pub fn pin(&self) -> CaPin {
        cortex_agent::client::pin_of(&self.certificate).unwrap()
    }

    fn params(&self, holder: Holder, usage: ExtendedKeyUsagePurpose) -> CertificateParams {
        let mut params = CertificateParams::new(vec![HUB_SERVER_NAME.to_owned()]).unwrap();
        params.extended_key_usages = vec![usage];
        let uri = PeerIdentity { mesh: self.mesh, holder }.to_string();
        params.subject_alt_names.push(SanType::URI(uri.try_into().unwrap()));
        params
    }

    /// Signs for a life given in milliseconds from now.
    pub fn sign(&self, csr: &[u8], holder: Holder, (begin, end): Life) -> CertificateDer<'static> {
        let csr = CertificateSigningRequestDer::from(csr.to_vec());
        let csr = CertificateSigningRequestParams::from_der(&csr).unwrap();
        let mut params = self.params(holder, ExtendedKeyUsagePurpose::ClientAuth);
        let at = |ms: i64| {
            let ms = u64::try_from(now_ms() + ms).unwrap();
            rcgen::date_time_ymd(1970, 1, 1) + Duration::from_millis(ms)
        };
        (params.not_before, params.not_after) = (at(begin), at(end));
        params.signed_by(&csr.public_key, &self.issuer).unwrap().der().clone()
    }

    /// Shows a certificate of this authority, and accepts clients of these.
    pub fn server_config(&self, accepted: &[&Self]) -> rustls::ServerConfig {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut roots = rustls::RootCertStore::empty();
        for authority in accepted {
            roots.add(authority.certificate.clone()).unwrap();
        }
        let clients = rustls::server::WebPkiClientVerifier::builder_with_provider(
            Arc::new(roots),
            Arc::clone(&provider),
        )
        .allow_unauthenticated()
        .build()
        .unwrap();
        let key = KeyPair::generate().unwrap();
        let leaf = self
            .params(Holder::Hub, ExtendedKeyUsagePurpose::ServerAuth)
            .signed_by(&key, &self.issuer)
            .unwrap();
        let chain = vec![leaf.der().clone(), self.certificate.clone()];
        let key = PrivateKeyDer::Pkcs8(key.serialize_der().into());
        let mut config = rustls::ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_client_cert_verifier(clients)
            .with_single_cert(chain, key)
            .unwrap();
        config.alpn_protocols = vec![b"h2".to_vec()];
        config
    }
}
