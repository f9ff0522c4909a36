//! The private key of an identity: made before anything is asked of the hub, and the same for every
//! certificate the identity ever gets.

use std::path::Path;

use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use x509_parser::prelude::{FromDer as _, X509Certificate};

use super::pem::{encode, read_secret};
use super::{Credentials, KEY};
use crate::client::ClientCertificate;
use crate::config::{ConfigError, write_private};

/// A private key, with which certificates are asked for.
#[derive(Debug)]
pub struct IdentityKey {
    pair: rcgen::KeyPair,
}

impl IdentityKey {
    /// The key in `folder`; `None` if there is none.
    ///
    /// # Errors
    /// If it is damaged, or others may read it.
    pub fn load(folder: &Path) -> Result<Option<Self>, ConfigError> {
        let path = folder.join(KEY);
        let Some(pem) = read_secret(&path)? else { return Ok(None) };
        let text = String::from_utf8_lossy(&pem);
        let pair = rcgen::KeyPair::from_pem(&text).map_err(|error| damaged(&path, &error))?;
        Ok(Some(Self { pair }))
    }

    /// The key in `folder`: the one an interrupted attempt left, or a new one, durably stored.
    ///
    /// # Errors
    /// If the file system refuses, or the key there is damaged.
    pub fn load_or_make(folder: &Path) -> Result<Self, ConfigError> {
        if let Some(key) = Self::load(folder)? {
            return Ok(key);
        }
        let path = folder.join(KEY);
        let pair = rcgen::KeyPair::generate().map_err(|error| damaged(&path, &error))?;
        write_private(&path, encode("PRIVATE KEY", pair.serialized_der()).as_bytes())?;
        Ok(Self { pair })
    }

    /// The request for a certificate, signed with this key. Only its public key counts.
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
        authorities: Vec<CertificateDer<'static>>,
    ) -> Credentials {
        let key = PrivateKeyDer::Pkcs8(self.pair.serialize_der().into());
        Credentials { own: ClientCertificate { certificate, key }, authorities }
    }
}

fn damaged(path: &Path, error: &rcgen::Error) -> ConfigError {
    ConfigError::Damaged { path: path.to_owned(), problem: error.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::testing;

    #[test]
    fn interrupted_attempt_keeps_its_key() {
        let folder = tempfile::tempdir().unwrap();
        let first = IdentityKey::load_or_make(folder.path()).unwrap();
        let second = IdentityKey::load_or_make(folder.path()).unwrap();
        assert_eq!(first.pair.public_key_raw(), second.pair.public_key_raw());
        let certificate =
            rcgen::CertificateParams::default().self_signed(&first.pair).unwrap().der().clone();
        assert!(second.fits(&certificate));
        let other = testing::credentials();
        assert!(!second.fits(&other.own.certificate));
    }
}
