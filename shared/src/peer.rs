//! Who stands at the other end of a TLS connection: identities in certificates, and the pin of the
//! certificate authority.
//!
//! A certificate of a mesh names its holder by exactly one URI in its subject alternative names:
//!
//! ```text
//! cortex://mesh/<mesh id>/hub
//! cortex://mesh/<mesh id>/node/<node id>
//! cortex://mesh/<mesh id>/operator/<role>/<name>
//! ```

use std::fmt;
use std::str::FromStr;

use sha2::Digest as _;

use crate::ids::{MeshId, NodeId};
use crate::labels;
use crate::policy::Role;

/// The DNS name in every hub certificate, whatever address the hub is reached at. A member trusts
/// the hub because its mesh's authority signed it for this name, not because of its address, which
/// may change behind NAT. (`internal` is reserved for private use, so it resolves nowhere.)
pub const HUB_SERVER_NAME: &str = "hub.cortex.internal";

/// The holder of a certificate.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct PeerIdentity {
    /// The mesh whose authority signed it.
    pub mesh: MeshId,
    /// Who it is there.
    pub holder: Holder,
}

/// Who a certificate belongs to.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Holder {
    /// The hub itself.
    Hub,
    /// A node.
    Node(NodeId),
    /// An operator and what it may do.
    Operator {
        /// The operator's name.
        name: String,
        /// The role it logged in with.
        role: Role,
    },
}

/// A URI that names no holder of a certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not an identity of this kind of mesh")]
pub struct InvalidPeer;

impl fmt::Display for PeerIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cortex://mesh/{}/", self.mesh)?;
        match &self.holder {
            Holder::Hub => f.write_str("hub"),
            Holder::Node(id) => write!(f, "node/{id}"),
            Holder::Operator { name, role } => write!(f, "operator/{role}/{name}"),
        }
    }
}

impl FromStr for PeerIdentity {
    type Err = InvalidPeer;
    fn from_str(uri: &str) -> Result<Self, InvalidPeer> {
        let rest = uri.strip_prefix("cortex://mesh/").ok_or(InvalidPeer)?;
        let (mesh, holder) = rest.split_once('/').ok_or(InvalidPeer)?;
        let mesh = mesh.parse().map_err(|_| InvalidPeer)?;
        let parts: Vec<&str> = holder.split('/').collect();
        let holder = match parts.as_slice() {
            ["hub"] => Holder::Hub,
            ["node", id] => Holder::Node(id.parse().map_err(|_| InvalidPeer)?),
            ["operator", role, name] => {
                labels::check_name(name).map_err(|_| InvalidPeer)?;
                Holder::Operator {
                    name: (*name).to_owned(),
                    role: role.parse().map_err(|_| InvalidPeer)?,
                }
            }
            _ => return Err(InvalidPeer),
        };
        let identity = Self { mesh, holder };
        // One spelling only: another (such as an upper-case id) is not ours.
        if identity.to_string() == uri { Ok(identity) } else { Err(InvalidPeer) }
    }
}

/// SHA-256 of a public key (DER of its SubjectPublicKeyInfo), written `sha256:HEX`. Pins a mesh's
/// certificate authority by its key, which outlives any one certificate.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct CaPin([u8; 32]);

impl CaPin {
    /// The pin of a key given as the DER of its SubjectPublicKeyInfo.
    #[must_use]
    pub fn of_spki(der: &[u8]) -> Self {
        Self(sha2::Sha256::digest(der).into())
    }

    /// The digest.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

/// Text that is not a pin.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a CA pin: expected sha256: and 64 hexadecimal digits")]
pub struct InvalidPin;

impl FromStr for CaPin {
    type Err = InvalidPin;
    fn from_str(text: &str) -> Result<Self, InvalidPin> {
        let hex = text.trim().strip_prefix("sha256:").ok_or(InvalidPin)?;
        if hex.len() != 64 || !hex.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(InvalidPin);
        }
        let mut pin = [0; 32];
        for (byte, digits) in pin.iter_mut().zip(hex.as_bytes().chunks_exact(2)) {
            let digits = std::str::from_utf8(digits).map_err(|_| InvalidPin)?;
            *byte = u8::from_str_radix(digits, 16).map_err(|_| InvalidPin)?;
        }
        Ok(Self(pin))
    }
}

impl fmt::Display for CaPin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("sha256:")?;
        self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}

impl fmt::Debug for CaPin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identities_survive_their_uri() {
        let mesh = MeshId::new();
        for holder in [
            Holder::Hub,
            Holder::Node(NodeId::new()),
            Holder::Operator { name: "ann".into(), role: Role::AgentToken },
        ] {
            let identity = PeerIdentity { mesh, holder };
            assert_eq!(identity.to_string().parse::<PeerIdentity>().unwrap(), identity);
        }
    }

    #[test]
    fn other_uris_are_nobody() {
        let mesh = MeshId::new();
        let node = NodeId::new();
        for uri in [
            "https://example.org".to_owned(),
            format!("cortex://mesh/{mesh}"),
            format!("cortex://mesh/{mesh}/hub/x"),
            format!("cortex://mesh/{mesh}/node/{node}/"),
            format!("cortex://mesh/{mesh}/node/{}", node.to_string().to_uppercase()),
            format!("cortex://mesh/{mesh}/operator/root/ann"),
            format!("cortex://mesh/{mesh}/operator/admin/a/b"),
        ] {
            assert!(uri.parse::<PeerIdentity>().is_err(), "{uri}");
        }
    }

    #[test]
    fn pins_survive_text() {
        let pin = CaPin::of_spki(b"key");
        assert_eq!(pin.to_string().parse::<CaPin>().unwrap(), pin);
        for bad in ["", "sha256:", "sha256:xyz", &pin.to_string()[7..], &format!("{pin}0")] {
            assert!(bad.parse::<CaPin>().is_err(), "{bad}");
        }
    }
}
