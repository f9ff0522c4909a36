//! The certificate of the HTTP side: one of the mesh's own making, or one from files.
//!
//! The mesh's own has a key of its own that never changes, in `DATA/http.key` (mode 0600), so that a
//! line which pins it stays good over restarts and over a replacement of the authority, which signs it
//! anew. It names addresses and hosts and not the hub: who takes this key can pretend to be the web page,
//! and never the hub that nodes dial.

use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use cortex_shared::durable;
use cortex_shared::peer::CaPin;
use rcgen::{KeyPair, SanType};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use x509_parser::prelude::{FromDer as _, X509Certificate};

use super::authorities::{Authorities, Ring};
use super::ca::{CaError, HUB_CERTIFICATE_LIFE, millis};

/// Largest file with a certificate chain or a key.
const MAX_FILE_BYTES: u64 = 256 * 1024;

/// Why the HTTP side has no certificate.
#[derive(Debug, thiserror::Error)]
pub enum HttpCertificateError {
    /// A file cannot be read or written.
    #[error("cannot use {}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A file holds something else.
    #[error("{} holds no {what} in PEM", path.display())]
    NotPem {
        /// Which.
        path: PathBuf,
        /// What it should hold.
        what: &'static str,
    },
    /// They do not belong together.
    #[error("certificate and key of the HTTP side do not fit")]
    Mismatch(#[source] rustls::Error),
    /// The mesh's own could not be made.
    #[error("cannot make the certificate of the HTTP side")]
    Ca(#[from] CaError),
}

/// What curl is told to accept, and nothing else: `sha256//` and the key's hash in base64.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HttpPin(String);

impl std::fmt::Display for HttpPin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// Certificate chain and key of files.
#[derive(Clone, Debug)]
pub struct CertificateFiles {
    /// The chain in PEM, the server's own certificate first.
    pub certificate: PathBuf,
    /// Its key in PEM.
    pub key: PathBuf,
}

/// Gives the TLS server of the HTTP side its certificate.
pub struct HttpCertificate(Source);

enum Source {
    Mesh(Box<OfMesh>),
    Files { files: CertificateFiles, current: Mutex<Arc<CertifiedKey>> },
}

struct OfMesh {
    authorities: Arc<Authorities>,
    clock: fn() -> i64,
    key: KeyPair,
    names: Vec<SanType>,
    current: Mutex<Current>,
}

struct Current {
    certified: Arc<CertifiedKey>,
    ring: Arc<Ring>,
    made_at_ms: i64,
}

impl Current {
    fn make(
        authorities: &Authorities,
        key: &KeyPair,
        names: &[SanType],
        now_ms: i64,
    ) -> Result<Self, CaError> {
        let ring = authorities.ring();
        let certified = Arc::new(ring.serving().issue_for_http(key, names, now_ms)?);
        Ok(Self { certified, ring, made_at_ms: now_ms })
    }
}

impl HttpCertificate {
    /// One that the mesh's authority signs, for these hosts and addresses. Its key is read from this
    /// file, or made there.
    ///
    /// # Errors
    /// See [`HttpCertificateError`].
    pub fn of_mesh(
        authorities: Arc<Authorities>,
        clock: fn() -> i64,
        key_file: &Path,
        hosts: &[String],
    ) -> Result<Self, HttpCertificateError> {
        let file = |source| HttpCertificateError::File { path: key_file.to_owned(), source };
        let key = match fs::read_to_string(key_file) {
            Ok(pem) => KeyPair::from_pem(&pem).map_err(CaError::from)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let key = KeyPair::generate().map_err(CaError::from)?;
                durable::write_file(key_file, key.serialize_pem().as_bytes(), 0o600)
                    .map_err(file)?;
                key
            }
            Err(error) => return Err(file(error)),
        };
        let name = |host: &String| match host.parse::<IpAddr>() {
            Ok(address) => Some(SanType::IpAddress(address)),
            // What is no name of a host is left out: the certificate is good for the others.
            Err(_) => host.as_str().try_into().ok().map(SanType::DnsName),
        };
        let names: Vec<SanType> = hosts.iter().filter_map(name).collect();
        let current = Mutex::new(Current::make(&authorities, &key, &names, clock())?);
        Ok(Self(Source::Mesh(Box::new(OfMesh { authorities, clock, key, names, current }))))
    }

    /// One from files.
    ///
    /// # Errors
    /// See [`HttpCertificateError`].
    pub fn of_files(files: CertificateFiles) -> Result<Self, HttpCertificateError> {
        let current = Mutex::new(Arc::new(read(&files)?));
        Ok(Self(Source::Files { files, current }))
    }

    /// Reads the files again; the mesh's own needs no reading. What cannot be used leaves the one that is
    /// in use.
    ///
    /// # Errors
    /// See [`HttpCertificateError`].
    pub fn reload(&self) -> Result<(), HttpCertificateError> {
        if let Source::Files { files, current } = &self.0 {
            let read = Arc::new(read(files)?);
            *current.lock().unwrap_or_else(PoisonError::into_inner) = read;
        }
        Ok(())
    }

    fn current(&self) -> Arc<CertifiedKey> {
        match &self.0 {
            Source::Files { current, .. } => {
                Arc::clone(&current.lock().unwrap_or_else(PoisonError::into_inner))
            }
            Source::Mesh(mesh) => mesh.current(),
        }
    }

    /// The pin of the key that is in use; `None` for a certificate that cannot be read.
    #[must_use]
    pub fn pin(&self) -> Option<HttpPin> {
        let certified = self.current();
        let (_, leaf) = X509Certificate::from_der(certified.cert.first()?).ok()?;
        let pin = CaPin::of_spki(leaf.public_key().raw);
        Some(HttpPin(format!("sha256//{}", STANDARD.encode(pin.as_bytes()))))
    }
}

impl OfMesh {
    fn current(&self) -> Arc<CertifiedKey> {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        let now = (self.clock)();
        let old = now - current.made_at_ms > millis(HUB_CERTIFICATE_LIFE / 2);
        if old || !Arc::ptr_eq(&current.ring, &self.authorities.ring()) {
            match Current::make(&self.authorities, &self.key, &self.names, now) {
                Ok(made) => *current = made,
                Err(error) => tracing::error!(%error, "cannot renew the certificate of HTTP"),
            }
        }
        Arc::clone(&current.certified)
    }
}

impl std::fmt::Debug for HttpCertificate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("HttpCertificate")
    }
}

impl ResolvesServerCert for HttpCertificate {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.current())
    }
}

fn read(files: &CertificateFiles) -> Result<CertifiedKey, HttpCertificateError> {
    let bytes = |path: &Path| {
        let error = |source| HttpCertificateError::File { path: path.to_owned(), source };
        if fs::metadata(path).map_err(error)?.len() > MAX_FILE_BYTES {
            return Err(error(io::Error::new(io::ErrorKind::InvalidData, "too large")));
        }
        fs::read(path).map_err(error)
    };
    let CertificateFiles { certificate, key } = files;
    let not_pem = |path: &Path, what| HttpCertificateError::NotPem { path: path.to_owned(), what };
    let chain: Vec<CertificateDer<'static>> = CertificateDer::pem_slice_iter(&bytes(certificate)?)
        .collect::<Result<_, _>>()
        .map_err(|_| not_pem(certificate, "certificates"))?;
    if chain.is_empty() {
        return Err(not_pem(certificate, "certificates"));
    }
    let key_der = PrivateKeyDer::from_pem_slice(&bytes(key)?).map_err(|_| not_pem(key, "key"))?;
    let provider = rustls::crypto::ring::default_provider();
    CertifiedKey::from_der(chain, key_der, &provider).map_err(HttpCertificateError::Mismatch)
}

#[cfg(test)]
mod tests {
    use rcgen::CertificateParams;

    use super::*;

    /// Writes a certificate with a new key, and returns the key in PEM.
    fn write(files: &CertificateFiles) -> String {
        let key = KeyPair::generate().unwrap();
        let names = CertificateParams::new(vec!["hub.example.org".to_owned()]).unwrap();
        fs::write(&files.certificate, names.self_signed(&key).unwrap().pem()).unwrap();
        fs::write(&files.key, key.serialize_pem()).unwrap();
        key.serialize_pem()
    }

    #[test]
    fn files_are_read_again_and_what_cannot_be_used_changes_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name| folder.path().join(name);
        let files = CertificateFiles { certificate: path("chain.pem"), key: path("key.pem") };
        let missing = HttpCertificate::of_files(files.clone()).unwrap_err();
        assert!(matches!(missing, HttpCertificateError::File { .. }), "{missing}");
        let first_key = write(&files);
        let certificate = HttpCertificate::of_files(files.clone()).unwrap();
        let first = certificate.pin().unwrap();
        assert!(first.to_string().starts_with("sha256//"), "{first}");
        write(&files);
        assert_eq!(certificate.pin().unwrap(), first, "until somebody says so");
        certificate.reload().unwrap();
        let second = certificate.pin().unwrap();
        assert_ne!(second, first);
        fs::write(&files.key, first_key).unwrap();
        let error = certificate.reload().unwrap_err();
        assert!(matches!(error, HttpCertificateError::Mismatch(_)), "{error}");
        fs::write(&files.certificate, "no certificate").unwrap();
        let error = certificate.reload().unwrap_err();
        assert!(matches!(error, HttpCertificateError::NotPem { .. }), "{error}");
        assert_eq!(certificate.pin().unwrap(), second);
    }
}
