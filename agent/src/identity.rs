//! Keys and certificates on disk: this node's own, and those of operators' contexts.
//!
//! A key is written before anything is asked of the hub, so that an interrupted attempt is repeated
//! with the same key and yields the same node. `node.json` is written last: without it this is not
//! a joined node. A good identity is never deleted here, and never replaced by joining.

use std::path::Path;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use cortex_shared::durable;
use cortex_shared::ids::{MeshId, NodeId};
use cortex_shared::peer::{Holder, PeerIdentity};
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use serde::{Deserialize, Serialize};
use x509_parser::prelude::{FromDer as _, GeneralName, X509Certificate};

use crate::client::{ClientCertificate, ConnectError, HubAddress, HubClient, Trust};
use crate::config::{ConfigError, StateDir, read_bounded, read_json, write_json, write_private};

const KEY: &str = "key.pem";
const CERTIFICATE: &str = "cert.pem";
const AUTHORITY: &str = "ca.pem";

/// What somebody needs to prove itself to a hub, and to know the hub.
#[derive(Clone, Debug)]
pub struct Credentials {
    /// Own certificate and key.
    pub own: ClientCertificate,
    /// The mesh's authority.
    pub authority: CertificateDer<'static>,
}

impl Credentials {
    /// Reads `key.pem`, `cert.pem` and `ca.pem`; `None` if there is no certificate yet.
    ///
    /// # Errors
    /// If a file is damaged, or the key may be read by others.
    pub fn load(folder: &Path) -> Result<Option<Self>, ConfigError> {
        let Some(certificate) = read_certificate(&folder.join(CERTIFICATE))? else {
            return Ok(None);
        };
        let missing = |name: &str| ConfigError::Damaged {
            path: folder.join(name),
            problem: "it is missing".to_owned(),
        };
        let authority =
            read_certificate(&folder.join(AUTHORITY))?.ok_or_else(|| missing(AUTHORITY))?;
        let path = folder.join(KEY);
        let pem = read_secret(&path)?.ok_or_else(|| missing(KEY))?;
        let key = PrivateKeyDer::from_pem_slice(&pem)
            .map_err(|error| ConfigError::Damaged { path, problem: error.to_string() })?;
        Ok(Some(Self { own: ClientCertificate { certificate, key }, authority }))
    }

    /// Writes the certificates; the key is there already.
    pub(crate) fn store(&self, folder: &Path) -> Result<(), ConfigError> {
        write_private(&folder.join(KEY), pem("PRIVATE KEY", self.own.key.secret_der()).as_bytes())?;
        write_private(&folder.join(AUTHORITY), pem("CERTIFICATE", &self.authority).as_bytes())?;
        write_private(
            &folder.join(CERTIFICATE),
            pem("CERTIFICATE", &self.own.certificate).as_bytes(),
        )
    }

    /// When the own certificate ends, in milliseconds since the epoch.
    #[must_use]
    pub fn not_after_ms(&self) -> i64 {
        X509Certificate::from_der(&self.own.certificate)
            .map_or(0, |(_, parsed)| parsed.validity().not_after.timestamp().saturating_mul(1000))
    }
}

/// Who a certificate says it belongs to; `None` if it names nobody of a mesh.
#[must_use]
pub fn holder_of(certificate: &CertificateDer<'_>) -> Option<PeerIdentity> {
    let (_, parsed) = X509Certificate::from_der(certificate).ok()?;
    let names = parsed.subject_alternative_name().ok()??;
    names.value.general_names.iter().find_map(|name| match name {
        GeneralName::URI(uri) => uri.parse().ok(),
        _ => None,
    })
}

/// A key for which no certificate has been issued yet.
#[derive(Debug)]
pub struct PendingKey {
    pair: rcgen::KeyPair,
}

impl PendingKey {
    /// The key in `folder`: the one an interrupted attempt left, or a new one, durably stored.
    ///
    /// # Errors
    /// If the file system refuses, or the key there is damaged.
    pub fn load_or_make(folder: &Path) -> Result<Self, ConfigError> {
        let path = folder.join(KEY);
        let damaged = |problem: rcgen::Error| ConfigError::Damaged {
            path: path.clone(),
            problem: problem.to_string(),
        };
        if let Some(pem) = read_secret(&path)? {
            let text = String::from_utf8_lossy(&pem);
            return Ok(Self { pair: rcgen::KeyPair::from_pem(&text).map_err(damaged)? });
        }
        let pair = rcgen::KeyPair::generate().map_err(damaged)?;
        write_private(&path, pem("PRIVATE KEY", pair.serialized_der()).as_bytes())?;
        Ok(Self { pair })
    }

    /// The request for a certificate. Only its public key counts.
    ///
    /// # Errors
    /// If the request cannot be signed.
    pub fn request_der(&self) -> Result<Vec<u8>, rcgen::Error> {
        let request = rcgen::CertificateParams::default().serialize_request(&self.pair)?;
        Ok(request.der().to_vec())
    }

    /// Whether a certificate was issued for this key.
    #[must_use]
    pub fn fits(&self, certificate: &CertificateDer<'_>) -> bool {
        X509Certificate::from_der(certificate).is_ok_and(|(_, parsed)| {
            parsed.public_key().subject_public_key.data.as_ref() == self.pair.public_key_raw()
        })
    }

    /// The key with what was issued for it.
    #[must_use]
    pub fn with(
        &self,
        certificate: CertificateDer<'static>,
        authority: CertificateDer<'static>,
    ) -> Credentials {
        let key = PrivateKeyDer::Pkcs8(self.pair.serialize_der().into());
        Credentials { own: ClientCertificate { certificate, key }, authority }
    }
}

/// This node, as its mesh knows it.
#[derive(Clone, Debug)]
pub struct NodeIdentity {
    /// The id in its certificate.
    pub node_id: NodeId,
    /// Its name when it joined; the hub may have renamed it since.
    pub name: String,
    /// Its mesh.
    pub mesh: MeshId,
    /// Key and certificates.
    pub credentials: Credentials,
}

#[derive(Serialize, Deserialize)]
struct RawNode {
    node_id: NodeId,
    name: String,
    mesh_id: MeshId,
}

impl NodeIdentity {
    /// This node's identity; `None` if it has not joined.
    ///
    /// # Errors
    /// If it is damaged or its key may be read by others.
    pub fn load(state: &StateDir) -> Result<Option<Self>, ConfigError> {
        let folder = state.identity();
        let path = folder.join("node.json");
        let Some(raw) = read_json::<RawNode>(&path)? else { return Ok(None) };
        let credentials = Credentials::load(&folder)?.ok_or_else(|| ConfigError::Damaged {
            path: folder.join(CERTIFICATE),
            problem: "it is missing".to_owned(),
        })?;
        let identity =
            Self { node_id: raw.node_id, name: raw.name, mesh: raw.mesh_id, credentials };
        if holder_of(&identity.credentials.own.certificate) != Some(identity.peer()) {
            return Err(ConfigError::Damaged {
                path,
                problem: "it and the certificate beside it name different nodes".to_owned(),
            });
        }
        Ok(Some(identity))
    }

    /// As [`NodeIdentity::load`], where only a joined node can go on.
    ///
    /// # Errors
    /// Also if this node has not joined.
    pub fn require(state: &StateDir) -> Result<Self, ConfigError> {
        Self::load(state)?.ok_or_else(|| ConfigError::NotJoined { state: state.path().to_owned() })
    }

    /// Creates the directory of the identity and the key to join with.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn pending_key(state: &StateDir) -> Result<PendingKey, ConfigError> {
        let folder = state.identity();
        durable::create_private_folder(&folder)
            .map_err(|source| ConfigError::Write { path: folder.clone(), source })?;
        PendingKey::load_or_make(&folder)
    }

    /// Stores a new identity durably; `node.json` last.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn store(&self, state: &StateDir) -> Result<(), ConfigError> {
        let folder = state.identity();
        self.credentials.store(&folder)?;
        let raw = RawNode { node_id: self.node_id, name: self.name.clone(), mesh_id: self.mesh };
        write_json(&folder.join("node.json"), &raw)
    }

    /// What its certificate has to say.
    #[must_use]
    pub fn peer(&self) -> PeerIdentity {
        PeerIdentity { mesh: self.mesh, holder: Holder::Node(self.node_id) }
    }

    /// A client that acts as this node.
    ///
    /// # Errors
    /// If certificate and key do not fit each other.
    pub fn client(&self, hub: HubAddress) -> Result<HubClient, ConnectError> {
        let Credentials { own, authority } = self.credentials.clone();
        let trust = Trust::Authority { certificate: authority, mesh: self.mesh };
        HubClient::new(hub, trust, Some(own))
    }
}

fn read_certificate(path: &Path) -> Result<Option<CertificateDer<'static>>, ConfigError> {
    let Some(pem) = read_bounded(path)? else { return Ok(None) };
    let damaged = |problem| ConfigError::Damaged { path: path.to_owned(), problem };
    let certificate =
        CertificateDer::from_pem_slice(&pem).map_err(|error| damaged(error.to_string()))?;
    X509Certificate::from_der(&certificate).map_err(|error| damaged(error.to_string()))?;
    Ok(Some(certificate))
}

/// Reads a secret, which nobody but its owner may be able to read.
fn read_secret(path: &Path) -> Result<Option<Vec<u8>>, ConfigError> {
    use std::os::unix::fs::PermissionsExt as _;
    let mode = match std::fs::metadata(path) {
        Ok(metadata) => metadata.permissions().mode() & 0o7777,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(ConfigError::Read { path: path.to_owned(), source }),
    };
    if mode & 0o077 != 0 {
        return Err(ConfigError::TooOpen { path: path.to_owned(), mode });
    }
    read_bounded(path)
}

fn pem(label: &str, der: &[u8]) -> String {
    let body = STANDARD.encode(der);
    let mut text = format!("-----BEGIN {label}-----\n");
    for line in body.as_bytes().chunks(64) {
        text.push_str(std::str::from_utf8(line).expect("base64 is ASCII"));
        text.push('\n');
    }
    text.push_str(&format!("-----END {label}-----\n"));
    text
}

#[cfg(test)]
pub(crate) mod testing {
    use super::*;

    /// Some credentials that fit each other.
    pub(crate) fn credentials() -> Credentials {
        let pair = rcgen::KeyPair::generate().unwrap();
        let certificate =
            rcgen::CertificateParams::default().self_signed(&pair).unwrap().der().clone();
        PendingKey { pair }.with(certificate.clone(), certificate)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn credentials_survive_the_disk() {
        let folder = tempfile::tempdir().unwrap();
        assert!(Credentials::load(folder.path()).unwrap().is_none());
        let written = testing::credentials();
        written.store(folder.path()).unwrap();
        let read = Credentials::load(folder.path()).unwrap().unwrap();
        assert_eq!(read.own.certificate, written.own.certificate);
        assert_eq!(read.own.key, written.own.key);
        assert_eq!(read.authority, written.authority);
    }

    #[test]
    fn key_that_others_may_read_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        testing::credentials().store(folder.path()).unwrap();
        let key = folder.path().join(KEY);
        assert_eq!(std::fs::metadata(&key).unwrap().permissions().mode() & 0o777, 0o600);
        std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o640)).unwrap();
        assert!(matches!(
            Credentials::load(folder.path()),
            Err(ConfigError::TooOpen { mode: 0o640, .. })
        ));
    }

    #[test]
    fn interrupted_attempt_keeps_its_key() {
        let folder = tempfile::tempdir().unwrap();
        let first = PendingKey::load_or_make(folder.path()).unwrap();
        let second = PendingKey::load_or_make(folder.path()).unwrap();
        assert_eq!(first.pair.public_key_raw(), second.pair.public_key_raw());
        let certificate =
            rcgen::CertificateParams::default().self_signed(&first.pair).unwrap().der().clone();
        assert!(second.fits(&certificate));
        let other = testing::credentials();
        assert!(!second.fits(&other.own.certificate));
    }
}
