//! Certificates and keys as files: PEM, bounded, checked when read.

use std::path::Path;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject as _;
use x509_parser::prelude::{FromDer as _, X509Certificate};

use crate::config::{ConfigError, read_bounded};

/// Most certificates in one file, and most authorities a mesh may have at a time. There are two
/// while one replaces the other.
pub const MAX_CERTIFICATES: usize = 8;

/// Something binary as PEM.
pub(super) fn encode(label: &str, der: &[u8]) -> String {
    let body = STANDARD.encode(der);
    let mut text = format!("-----BEGIN {label}-----\n");
    for line in body.as_bytes().chunks(64) {
        text.push_str(std::str::from_utf8(line).expect("base64 is ASCII"));
        text.push('\n');
    }
    text.push_str(&format!("-----END {label}-----\n"));
    text
}

/// The certificates in a file; none if there is no file.
pub(super) fn read_certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, ConfigError> {
    let Some(text) = read_bounded(path)? else { return Ok(Vec::new()) };
    let certificates = parse_certificates(&text)
        .map_err(|problem| ConfigError::Damaged { path: path.to_owned(), problem })?;
    if certificates.is_empty() {
        let problem = "no certificate is in it".to_owned();
        return Err(ConfigError::Damaged { path: path.to_owned(), problem });
    }
    Ok(certificates)
}

pub(super) fn parse_certificates(text: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    let mut certificates = Vec::new();
    for certificate in CertificateDer::pem_slice_iter(text).take(MAX_CERTIFICATES) {
        let certificate = certificate.map_err(|error| error.to_string())?;
        X509Certificate::from_der(&certificate).map_err(|error| error.to_string())?;
        certificates.push(certificate);
    }
    Ok(certificates)
}

/// Reads a secret, which nobody but its owner may be able to read.
pub(super) fn read_secret(path: &Path) -> Result<Option<Vec<u8>>, ConfigError> {
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
