//! Keys and certificates on disk: this node's own, and those of operators' contexts.
//!
//! | file in `STATE/identity/` | what | changes |
//! |---|---|---|
//! | `key.pem` | the private key | never |
//! | `cert.pem`, `cert.next.pem` | two slots for certificates, see `slots` | when renewed |
//! | `ca.pem` | the authorities that may sign for the hub | when the hub names others |
//! | `node.json` | who this is; written last: without it this is not a joined node | never |
//!
//! A key is written before anything is asked of the hub, so that an interrupted attempt is repeated
//! with the same key and yields the same node. A good identity is never deleted here and never
//! replaced by joining; `identity fork` and `leave` put it aside under another name.
//! [`live::LiveIdentity`] is the identity of a running agent, which changes.

mod aside;
mod key;
pub mod live;
mod machine;
mod pem;
mod slots;

use std::path::Path;

use cortex_shared::durable;
use cortex_shared::ids::{MeshId, NodeId};
use cortex_shared::peer::{Holder, PeerIdentity};
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use serde::{Deserialize, Serialize};
use x509_parser::prelude::{FromDer as _, GeneralName, X509Certificate};

pub use key::IdentityKey;
pub use machine::MachineFacts;
pub use pem::MAX_CERTIFICATES;
pub use slots::{IssuedCertificate, Validity};

use crate::client::{ClientCertificate, ConnectError, HubAddress, HubClient, Trust, pin_of};
use crate::config::{ConfigError, StateDir, read_json, write_json, write_private};
use slots::Slots;

const KEY: &str = "key.pem";
const CERTIFICATE: &str = "cert.pem";
const AUTHORITIES: &str = "ca.pem";
const NODE: &str = "node.json";

/// What somebody needs to prove itself to a hub, and to know the hub.
#[derive(Clone, Debug)]
pub struct Credentials {
    /// Own certificate and key.
    pub own: ClientCertificate,
    /// The mesh's authorities: one, or more while it replaces one by another.
    pub authorities: Vec<CertificateDer<'static>>,
}

impl Credentials {
    /// Reads `key.pem`, `cert.pem` and `ca.pem`; `None` if there is no certificate yet.
    ///
    /// # Errors
    /// If a file is damaged, or the key may be read by others.
    pub fn load(folder: &Path) -> Result<Option<Self>, ConfigError> {
        let certificates = pem::read_certificates(&folder.join(CERTIFICATE))?;
        let Some(certificate) = certificates.into_iter().next() else { return Ok(None) };
        let (key, authorities) = load_key_and_authorities(folder)?;
        Ok(Some(Self { own: ClientCertificate { certificate, key }, authorities }))
    }

    /// Writes key and certificates.
    pub(crate) fn store(&self, folder: &Path) -> Result<(), ConfigError> {
        self.store_key_and_authorities(folder)?;
        let certificate = pem::encode("CERTIFICATE", &self.own.certificate);
        write_private(&folder.join(CERTIFICATE), certificate.as_bytes())
    }

    fn store_key_and_authorities(&self, folder: &Path) -> Result<(), ConfigError> {
        let key = pem::encode("PRIVATE KEY", self.own.key.secret_der());
        write_private(&folder.join(KEY), key.as_bytes())?;
        store_authorities(folder, &self.authorities)
    }

    /// When the own certificate ends, in milliseconds since the epoch.
    #[must_use]
    pub fn not_after_ms(&self) -> i64 {
        Validity::of(&self.own.certificate).map_or(0, |validity| validity.not_after_ms)
    }

    /// The pins of the authorities.
    #[must_use]
    pub fn pins(&self) -> Vec<cortex_shared::peer::CaPin> {
        self.authorities.iter().filter_map(pin_of).collect()
    }
}

fn load_key_and_authorities(
    folder: &Path,
) -> Result<(PrivateKeyDer<'static>, Vec<CertificateDer<'static>>), ConfigError> {
    let missing = |name: &str| ConfigError::Damaged {
        path: folder.join(name),
        problem: "it is missing".to_owned(),
    };
    let authorities = pem::read_certificates(&folder.join(AUTHORITIES))?;
    if authorities.is_empty() {
        return Err(missing(AUTHORITIES));
    }
    let path = folder.join(KEY);
    let pem = pem::read_secret(&path)?.ok_or_else(|| missing(KEY))?;
    let key = PrivateKeyDer::from_pem_slice(&pem)
        .map_err(|error| ConfigError::Damaged { path, problem: error.to_string() })?;
    Ok((key, authorities))
}

fn store_authorities(
    folder: &Path,
    authorities: &[CertificateDer<'static>],
) -> Result<(), ConfigError> {
    let text: String = authorities.iter().map(|ca| pem::encode("CERTIFICATE", ca)).collect();
    write_private(&folder.join(AUTHORITIES), text.as_bytes())
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

/// This node, as its mesh knows it.
#[derive(Clone, Debug)]
pub struct NodeIdentity {
    /// The id in its certificate.
    pub node_id: NodeId,
    /// Its name when it joined; the hub may have renamed it since.
    pub name: String,
    /// Its mesh.
    pub mesh: MeshId,
    /// Key, authorities, and the newest certificate.
    pub credentials: Credentials,
    /// The newest certificate's number.
    pub generation: u64,
    /// The certificate before it, while the newest has not connected once.
    pub fallback: Option<IssuedCertificate>,
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
        aside::finish_replacement(state)?;
        Self::load_from(&state.identity())
    }

    fn load_from(folder: &Path) -> Result<Option<Self>, ConfigError> {
        let path = folder.join(NODE);
        let Some(raw) = read_json::<RawNode>(&path)? else { return Ok(None) };
        let (private_key, authorities) = load_key_and_authorities(folder)?;
        let peer = PeerIdentity { mesh: raw.mesh_id, holder: Holder::Node(raw.node_id) };
        let key = IdentityKey::load(folder)?;
        let usable = |certificate: &CertificateDer<'_>| {
            holder_of(certificate).as_ref() == Some(&peer)
                && key.as_ref().is_some_and(|key| key.fits(certificate))
        };
        let slots = Slots::load(folder, usable)?.ok_or_else(|| ConfigError::Damaged {
            path: folder.join(CERTIFICATE),
            problem: "it is missing".to_owned(),
        })?;
        if !usable(&slots.newest.certificate) {
            return Err(ConfigError::Damaged {
                path,
                problem: "it and the certificate or key beside it are of different nodes"
                    .to_owned(),
            });
        }
        let own =
            ClientCertificate { certificate: slots.newest.certificate.clone(), key: private_key };
        Ok(Some(Self {
            node_id: raw.node_id,
            name: raw.name,
            mesh: raw.mesh_id,
            credentials: Credentials { own, authorities },
            generation: slots.newest.generation,
            fallback: slots.fallback,
        }))
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
    pub fn pending_key(state: &StateDir) -> Result<IdentityKey, ConfigError> {
        let folder = state.identity();
        private_folder(&folder)?;
        IdentityKey::load_or_make(&folder)
    }

    /// The directory and the key for an identity that is to replace this one.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn replacement_key(state: &StateDir) -> Result<IdentityKey, ConfigError> {
        let folder = state.new_identity();
        private_folder(&folder)?;
        IdentityKey::load_or_make(&folder)
    }

    /// Stores a new identity durably; `node.json` last.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn store(&self, state: &StateDir) -> Result<(), ConfigError> {
        self.store_in(&state.identity())
    }

    /// Stores this identity in the place of the one there, which is put aside, not deleted. The
    /// result is where. A crash leaves the one or the other.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn replace(
        &self,
        state: &StateDir,
        old: NodeId,
    ) -> Result<std::path::PathBuf, ConfigError> {
        self.store_in(&state.new_identity())?;
        let kept = aside::put_aside(state, old)?;
        aside::finish_replacement(state)?;
        Ok(kept)
    }

    /// Puts the identity aside, so that this machine is no node any more. The result is where.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn put_aside(state: &StateDir, id: NodeId) -> Result<std::path::PathBuf, ConfigError> {
        aside::leave(state, id)
    }

    fn store_in(&self, folder: &Path) -> Result<(), ConfigError> {
        self.credentials.store_key_and_authorities(folder)?;
        let first = IssuedCertificate {
            certificate: self.credentials.own.certificate.clone(),
            generation: self.generation,
        };
        slots::store_first(folder, &first)?;
        let raw = RawNode { node_id: self.node_id, name: self.name.clone(), mesh_id: self.mesh };
        write_json(&folder.join(NODE), &raw)
    }

    /// What its certificate has to say.
    #[must_use]
    pub fn peer(&self) -> PeerIdentity {
        PeerIdentity { mesh: self.mesh, holder: Holder::Node(self.node_id) }
    }

    /// Whom it believes.
    #[must_use]
    pub fn trust(&self) -> Trust {
        let certificates = self.credentials.authorities.clone();
        Trust::Authorities { certificates, mesh: self.mesh }
    }

    /// A client that acts as this node.
    ///
    /// # Errors
    /// If certificate and key do not fit each other.
    pub fn client(&self, hub: HubAddress) -> Result<HubClient, ConnectError> {
        HubClient::new(hub, self.trust(), Some(self.credentials.own.clone()))
    }
}

/// The authorities in an answer of the hub: certificates that say they are authorities, each once.
///
/// # Errors
/// If one is none, or there are too many.
pub fn authorities_of<'a>(
    ders: impl IntoIterator<Item = &'a [u8]>,
) -> Result<Vec<CertificateDer<'static>>, &'static str> {
    let mut authorities: Vec<CertificateDer<'static>> = Vec::new();
    for der in ders {
        let certificate = CertificateDer::from(der.to_vec());
        if authorities.contains(&certificate) {
            continue;
        }
        let is_authority =
            X509Certificate::from_der(der).is_ok_and(|(rest, ca)| rest.is_empty() && ca.is_ca());
        if !is_authority {
            return Err("one of its authorities is none");
        }
        if authorities.len() == MAX_CERTIFICATES {
            return Err("it names too many authorities");
        }
        authorities.push(certificate);
    }
    Ok(authorities)
}

fn private_folder(folder: &Path) -> Result<(), ConfigError> {
    durable::create_private_folder(folder)
        .and_then(|()| crate::config::own_like_folder(folder))
        .map_err(|source| ConfigError::Write { path: folder.to_owned(), source })
}

#[cfg(test)]
pub(crate) mod testing;

#[cfg(test)]
mod tests;
