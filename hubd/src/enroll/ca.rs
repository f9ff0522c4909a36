//! A certificate authority of the mesh. Which ones there are, and which of them signs what, is in
//! [`super::authorities`].
//!
//! Its key never leaves `DATA/ca` (mode 0700). Certificates are made from the public key of a
//! request and from nothing else in it: a request can ask for any name and even to be an authority,
//! and rcgen would copy that. Chains have one level.

use std::fs;
use std::io;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use cortex_shared::durable;
use cortex_shared::ids::{MeshId, NodeId};
use cortex_shared::peer::{CaPin, HUB_SERVER_NAME, Holder, PeerIdentity};
use cortex_shared::policy::Role;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName,
    DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, PublicKeyData as _,
    SanType, SerialNumber, SubjectPublicKeyInfo,
};
use rustls::crypto::ring::sign::any_supported_type;
use rustls::sign::CertifiedKey;
use rustls_pki_types::{CertificateDer, CertificateSigningRequestDer, PrivateKeyDer};

use x509_parser::prelude::{FromDer as _, ParsedExtension, X509Certificate};

use crate::store::{KeyHash, NewCertificate};

/// Life of a node's certificate unless told otherwise. A node renews it over the live session at half of
/// it, and gets another by its key alone if it was away for longer.
pub const NODE_CERTIFICATE_LIFE: Duration = Duration::from_secs(24 * 3600);
/// What a node's certificate life may be set to. Below, renewing would be all that a node does; above, a
/// stolen disk would be good for too long.
pub const NODE_CERTIFICATE_LIVES: RangeInclusive<Duration> =
    Duration::from_secs(10)..=Duration::from_secs(30 * 24 * 3600);
/// Life of a person's certificate.
pub const OPERATOR_CERTIFICATE_LIFE: Duration = Duration::from_secs(30 * 24 * 3600);
/// Life of a program's certificate. Nothing renews it: a shorter one would stop the program at night. It
/// is revoked at the hub, at once, whatever its certificate says.
pub const AGENT_TOKEN_CERTIFICATE_LIFE: Duration = Duration::from_secs(30 * 24 * 3600);
/// Life of the hub's own certificate; a new one is made at half of it, without a restart.
pub(super) const HUB_CERTIFICATE_LIFE: Duration = Duration::from_secs(30 * 24 * 3600);
/// Life of the authority itself. It is pinned by key, and replaced by rotation.
const CA_LIFE: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
/// How far into the past a certificate reaches, for members whose clock is behind; a tenth of its life at
/// most, so that half of a short life is not over at its beginning.
const CLOCK_TOLERANCE: Duration = Duration::from_secs(5 * 60);
/// First byte of the serial number of a node's certificate. Eight bytes with its generation follow, and
/// eight by chance.
const NODE_SERIAL: u8 = 0x4e;
/// Largest request for a certificate.
pub const MAX_CSR_BYTES: usize = 4096;

/// Why the authority could not do its work.
#[derive(Debug, thiserror::Error)]
pub enum CaError {
    /// Files of the authority cannot be read or written.
    #[error("cannot access {path}")]
    Io {
        /// Which file.
        path: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A key or certificate cannot be made or read.
    #[error("cannot make or read a certificate")]
    Certificate(#[source] rcgen::Error),
    /// The request for a certificate is not one.
    #[error("the certificate request is not valid")]
    InvalidRequest,
    /// What the store says of the authorities cannot be: the files or the store are of another hub.
    #[error("the record of the certificate authorities does not make sense: {what}")]
    InvalidState {
        /// What is wrong.
        what: &'static str,
    },
}

impl From<rcgen::Error> for CaError {
    fn from(error: rcgen::Error) -> Self {
        Self::Certificate(error)
    }
}

/// A certificate for somebody else.
#[derive(Clone, Debug)]
pub struct Issued {
    /// The certificate.
    pub der: CertificateDer<'static>,
    /// End of its life, milliseconds since the Unix epoch.
    pub not_after_ms: i64,
}

/// A request for a certificate, reduced to the one thing that is used of it.
pub struct CertificateRequest {
    key: rcgen::PublicKey,
    hash: KeyHash,
}

impl CertificateRequest {
    /// Reads a PKCS#10 request and checks that its sender holds the key.
    ///
    /// # Errors
    /// [`CaError::InvalidRequest`].
    pub fn parse(der: &[u8]) -> Result<Self, CaError> {
        if der.len() > MAX_CSR_BYTES {
            return Err(CaError::InvalidRequest);
        }
        let request =
            CertificateSigningRequestParams::from_der(&CertificateSigningRequestDer::from(der))
                .map_err(|_| CaError::InvalidRequest)?;
        let hash = *CaPin::of_spki(&request.public_key.subject_public_key_info()).as_bytes();
        Ok(Self { key: request.public_key, hash })
    }

    /// SHA-256 of the key.
    #[must_use]
    pub fn key_hash(&self) -> KeyHash {
        self.hash
    }
}

/// The certificate authority of one mesh.
pub struct CertificateAuthority {
    mesh: MeshId,
    issuer: Issuer<'static, KeyPair>,
    certificate: CertificateDer<'static>,
    pin: CaPin,
    node_life: Duration,
}

impl CertificateAuthority {
    /// Loads the authority of this name from `folder`, or makes it there. Nodes' certificates that it
    /// signs live for `node_life`.
    ///
    /// # Errors
    /// If files cannot be read or written, or are damaged. An existing authority is never replaced.
    pub fn open(
        folder: &Path,
        name: &str,
        mesh: MeshId,
        node_life: Duration,
        now_ms: i64,
    ) -> Result<Self, CaError> {
        let io = |path: &Path| {
            let path = path.display().to_string();
            move |source| CaError::Io { path, source }
        };
        durable::create_private_folder(folder).map_err(io(folder))?;
        let (key_path, certificate_path) = files(folder, name);
        let read = |path: &Path| match fs::read_to_string(path) {
            Ok(text) => Ok(Some(text)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(io(path)(error)),
        };
        let key = match read(&key_path)? {
            Some(pem) => KeyPair::from_pem(&pem)?,
            None => {
                let key = KeyPair::generate()?;
                durable::write_file(&key_path, key.serialize_pem().as_bytes(), 0o600)
                    .map_err(io(&key_path))?;
                key
            }
        };
        let pin = CaPin::of_spki(&key.subject_public_key_info());
        let pem = match read(&certificate_path)? {
            Some(pem) => pem,
            None => {
                let pem = ca_params(mesh, now_ms).self_signed(&key)?.pem();
                durable::write_file(&certificate_path, pem.as_bytes(), 0o644)
                    .map_err(io(&certificate_path))?;
                pem
            }
        };
        let certificate = rustls_pki_types::pem::PemObject::from_pem_slice(pem.as_bytes())
            .map_err(|_| CaError::InvalidRequest)?;
        let issuer = Issuer::from_ca_cert_der(&certificate, key)?;
        Ok(Self { mesh, issuer, certificate, pin, node_life })
    }

    /// The mesh it signs for.
    #[must_use]
    pub fn mesh(&self) -> MeshId {
        self.mesh
    }

    /// Its own certificate.
    #[must_use]
    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// The pin of its key, as it stands in invites.
    #[must_use]
    pub fn pin(&self) -> CaPin {
        self.pin
    }

    /// What is recorded of a node's certificate that is signed at this time.
    #[must_use]
    pub fn terms(&self, now_ms: i64) -> NewCertificate {
        let not_after_ms = now_ms.saturating_add(millis(self.node_life));
        NewCertificate { not_after_ms, authority: *self.pin.as_bytes() }
    }

    /// Signs a certificate for a node, as [`CertificateAuthority::terms`] says. It carries its
    /// generation, so that nobody need believe what its holder says of that.
    ///
    /// # Errors
    /// If signing fails.
    pub fn issue_to_node(
        &self,
        node: NodeId,
        generation: u64,
        request: &CertificateRequest,
        now_ms: i64,
    ) -> Result<Issued, CaError> {
        let serial = node_serial(generation);
        self.issue(Holder::Node(node), serial, self.node_life, request, now_ms)
    }

    /// Signs a certificate for an operator.
    ///
    /// # Errors
    /// If signing fails.
    pub fn issue_to_operator(
        &self,
        name: &str,
        role: Role,
        request: &CertificateRequest,
        now_ms: i64,
    ) -> Result<Issued, CaError> {
        let life = match role {
            Role::AgentToken => AGENT_TOKEN_CERTIFICATE_LIFE,
            Role::Viewer | Role::Operator | Role::Admin => OPERATOR_CERTIFICATE_LIFE,
        };
        let holder = Holder::Operator { name: name.to_owned(), role };
        self.issue(holder, any_serial(), life, request, now_ms)
    }

    /// Signs an operator's certificate, the holder of which has proved itself by it, anew: the same key
    /// and the same end. `None` if this authority has signed it already, or it has ended.
    ///
    /// # Errors
    /// If it cannot be read, or signing fails.
    pub fn sign_anew(
        &self,
        name: &str,
        role: Role,
        certificate: &[u8],
        now_ms: i64,
    ) -> Result<Option<CertificateDer<'static>>, CaError> {
        let read = |der| match X509Certificate::from_der(der) {
            Ok((_, certificate)) => Ok(certificate),
            Err(_) => Err(CaError::InvalidRequest),
        };
        let (old, own) = (read(certificate)?, read(&self.certificate)?);
        let left_ms = old.validity().not_after.timestamp().saturating_mul(1000) - now_ms;
        let left = u64::try_from(left_ms).map(Duration::from_millis).unwrap_or_default();
        if left.is_zero() || signer_of(&old) == key_id_of(&own) {
            return Ok(None);
        }
        let key = SubjectPublicKeyInfo::from_der(old.public_key().raw)?;
        let holder = Holder::Operator { name: name.to_owned(), role };
        let usage = ExtendedKeyUsagePurpose::ClientAuth;
        let params = self.leaf_params(holder, left, usage, now_ms)?;
        Ok(Some(params.signed_by(&key, &self.issuer)?.der().clone()))
    }

    fn issue(
        &self,
        holder: Holder,
        serial: SerialNumber,
        life: Duration,
        request: &CertificateRequest,
        now_ms: i64,
    ) -> Result<Issued, CaError> {
        let usage = ExtendedKeyUsagePurpose::ClientAuth;
        let mut params = self.leaf_params(holder, life, usage, now_ms)?;
        params.serial_number = Some(serial);
        let der = params.signed_by(&request.key, &self.issuer)?.der().clone();
        Ok(Issued { der, not_after_ms: now_ms.saturating_add(millis(life)) })
    }

    /// A certificate of the hub's own. It is shown with those of `trusted`, this authority's first.
    pub(super) fn issue_for_hub(
        &self,
        trusted: &[&Arc<Self>],
        now_ms: i64,
    ) -> Result<CertifiedKey, CaError> {
        let key = KeyPair::generate()?;
        let mut params = self.leaf_params(
            Holder::Hub,
            HUB_CERTIFICATE_LIFE,
            ExtendedKeyUsagePurpose::ServerAuth,
            now_ms,
        )?;
        params.subject_alt_names.push(SanType::DnsName(HUB_SERVER_NAME.try_into()?));
        let certificate = params.signed_by(&key, &self.issuer)?.der().clone();
        let key = PrivateKeyDer::try_from(key.serialize_der())
            .ok()
            .and_then(|key| any_supported_type(&key).ok())
            .ok_or(CaError::InvalidRequest)?;
        // Those of the authorities go along: who knows only a pin finds the one there, and who knows
        // only one of two sees that there is another to ask for.
        let mut chain = vec![certificate];
        chain.extend(trusted.iter().map(|authority| authority.certificate.clone()));
        Ok(CertifiedKey::new(chain, key))
    }

    /// A certificate of this key for these hosts and addresses, and for nobody of the mesh.
    pub(super) fn issue_for_http(
        &self,
        key: &KeyPair,
        names: &[SanType],
        now_ms: i64,
    ) -> Result<CertifiedKey, CaError> {
        let mut params = base_params(now_ms, HUB_CERTIFICATE_LIFE);
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        params.subject_alt_names = names.to_vec();
        let certificate = params.signed_by(key, &self.issuer)?.der().clone();
        let key = PrivateKeyDer::try_from(key.serialize_der())
            .ok()
            .and_then(|key| any_supported_type(&key).ok())
            .ok_or(CaError::InvalidRequest)?;
        Ok(CertifiedKey::new(vec![certificate], key))
    }

    fn leaf_params(
        &self,
        holder: Holder,
        life: Duration,
        usage: ExtendedKeyUsagePurpose,
        now_ms: i64,
    ) -> Result<CertificateParams, CaError> {
        let identity = PeerIdentity { mesh: self.mesh, holder };
        let mut params = base_params(now_ms, life);
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![usage];
        params.subject_alt_names = vec![SanType::URI(identity.to_string().try_into()?)];
        Ok(params)
    }
}

fn ca_params(mesh: MeshId, now_ms: i64) -> CertificateParams {
    let mut params = base_params(now_ms, CA_LIFE);
    params.distinguished_name.push(DnType::CommonName, format!("cortex mesh {mesh}"));
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}

fn base_params(now_ms: i64, life: Duration) -> CertificateParams {
    let now = rcgen::date_time_ymd(1970, 1, 1)
        + Duration::from_millis(u64::try_from(now_ms).unwrap_or_default());
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.not_before = now - CLOCK_TOLERANCE.min(life / 10);
    params.not_after = now + life;
    params.serial_number = Some(any_serial());
    params.use_authority_key_identifier_extension = true;
    params
}

/// Which key signed a certificate, by its own word.
fn signer_of<'a>(certificate: &'a X509Certificate<'_>) -> Option<&'a [u8]> {
    certificate.iter_extensions().find_map(|extension| match extension.parsed_extension() {
        ParsedExtension::AuthorityKeyIdentifier(signer) => {
            signer.key_identifier.as_ref().map(|id| id.0)
        }
        _ => None,
    })
}

/// How its own certificates call the key of an authority.
fn key_id_of<'a>(certificate: &'a X509Certificate<'_>) -> Option<&'a [u8]> {
    certificate.iter_extensions().find_map(|extension| match extension.parsed_extension() {
        ParsedExtension::SubjectKeyIdentifier(id) => Some(id.0),
        _ => None,
    })
}

fn any_serial() -> SerialNumber {
    SerialNumber::from_slice(&rand::random::<[u8; 16]>())
}

fn node_serial(generation: u64) -> SerialNumber {
    let mut serial = vec![NODE_SERIAL];
    serial.extend_from_slice(&generation.to_be_bytes());
    serial.extend_from_slice(&rand::random::<[u8; 8]>());
    serial.into()
}

/// The generation that a node's certificate carries in its serial number; none in one from before they
/// did.
pub(crate) fn generation_in(serial: &[u8]) -> Option<u64> {
    match serial {
        [NODE_SERIAL, rest @ ..] if rest.len() == 16 => {
            rest.first_chunk().map(|generation| u64::from_be_bytes(*generation))
        }
        _ => None,
    }
}

/// The files of an authority: its key and its certificate.
pub(crate) fn files(folder: &Path, name: &str) -> (PathBuf, PathBuf) {
    (folder.join(format!("{name}.key")), folder.join(format!("{name}.crt")))
}

pub(super) fn millis(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn authority() -> (tempfile::TempDir, CertificateAuthority) {
        let folder = tempfile::tempdir().unwrap();
        let authority = CertificateAuthority::open(
            folder.path(),
            "ca",
            MeshId::new(),
            NODE_CERTIFICATE_LIFE,
            1_000,
        )
        .unwrap();
        (folder, authority)
    }

    #[test]
    fn authority_is_the_same_after_reopening_and_its_key_is_private() {
        let (folder, first) = authority();
        let life = NODE_CERTIFICATE_LIFE;
        let second =
            CertificateAuthority::open(folder.path(), "ca", first.mesh, life, 9_000).unwrap();
        assert_eq!(first.pin(), second.pin());
        assert_eq!(first.certificate(), second.certificate());
        let mode = fs::metadata(folder.path().join("ca.key")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn nothing_but_the_key_of_a_hostile_request_is_used() {
        let (_folder, authority) = authority();
        let key = KeyPair::generate().unwrap();
        let mut wish = CertificateParams::new(vec!["hub.cortex.internal".to_owned()]).unwrap();
        wish.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        wish.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let request = wish.serialize_request(&key).unwrap();
        let request = CertificateRequest::parse(request.der()).unwrap();
        let node = NodeId::new();
        let issued = authority.issue_to_node(node, 7, &request, 0).unwrap();
        let (_, certificate) = X509Certificate::from_der(&issued.der).unwrap();
        assert!(!certificate.is_ca());
        let usage = certificate.extended_key_usage().unwrap().unwrap().value;
        assert!(usage.client_auth && !usage.server_auth && !usage.any);
        let names = &certificate.subject_alternative_name().unwrap().unwrap().value.general_names;
        let expected = PeerIdentity { mesh: authority.mesh, holder: Holder::Node(node) };
        assert_eq!(names.len(), 1);
        assert_eq!(names[0].to_string(), format!("URI({expected})"));
        assert_eq!(generation_in(certificate.raw_serial()), Some(7));
    }

    #[test]
    fn generations_are_read_only_where_they_were_written() {
        for generation in [0, 1, 7, 1 << 32, u64::MAX] {
            assert_eq!(generation_in(&node_serial(generation).to_bytes()), Some(generation));
        }
        for _ in 0..1000 {
            let serial = any_serial().to_bytes();
            assert_eq!(generation_in(&serial), None, "{serial:?}");
            assert_eq!(generation_in(&[&[0], serial.as_slice()].concat()), None);
        }
        assert_eq!(generation_in(&[]), None);
    }

    #[test]
    fn half_of_the_shortest_life_is_still_to_come_when_it_begins() {
        let folder = tempfile::tempdir().unwrap();
        let life = *NODE_CERTIFICATE_LIVES.start();
        let authority =
            CertificateAuthority::open(folder.path(), "ca", MeshId::new(), life, 0).unwrap();
        let request =
            CertificateParams::default().serialize_request(&KeyPair::generate().unwrap()).unwrap();
        let request = CertificateRequest::parse(request.der()).unwrap();
        let now_ms = 1_000_000_000_000;
        let issued = authority.issue_to_node(NodeId::new(), 1, &request, now_ms).unwrap();
        let (_, certificate) = X509Certificate::from_der(&issued.der).unwrap();
        let validity = certificate.validity();
        let (begin, end) = (validity.not_before.timestamp(), validity.not_after.timestamp());
        assert!((begin + end) / 2 > now_ms / 1000, "{begin} to {end}");
        assert_eq!(issued.not_after_ms, authority.terms(now_ms).not_after_ms);
    }

    #[test]
    fn rubbish_is_no_request() {
        for der in [&b""[..], b"x", &[0x30; 5000]] {
            assert!(matches!(CertificateRequest::parse(der), Err(CaError::InvalidRequest)));
        }
    }
}
