//! The two slots of a node's certificate.
//!
//! | file | what |
//! |---|---|
//! | `cert.pem` | a certificate that has connected, or the one from joining |
//! | `cert.next.pem` | a newer one that has not connected yet |
//!
//! A new certificate is stored durably beside the old one, which stays until the new one has
//! connected once; then one rename puts it in the old one's place. So there is no instant at which
//! a crash leaves less than one good certificate. Each file holds the certificate and its
//! generation together (as a line before the PEM, which every reader of PEM passes over), so that
//! the two cannot come apart. A `cert.next.pem` that cannot be used is passed over, never a reason
//! to stop.

use std::path::Path;

use cortex_shared::durable;
use rustls_pki_types::CertificateDer;
use x509_parser::prelude::{FromDer as _, X509Certificate};

use super::pem::{encode, parse_certificates};
use crate::config::{ConfigError, read_bounded, write_private};

const CURRENT: &str = "cert.pem";
const NEXT: &str = "cert.next.pem";
const GENERATION: &str = "generation: ";

/// A certificate as the hub issued it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IssuedCertificate {
    /// The leaf.
    pub certificate: CertificateDer<'static>,
    /// Counts the certificates of this identity; 0 if it was issued before they were counted.
    pub generation: u64,
}

/// Begin and end of a certificate's life, in milliseconds since the epoch, by the hub's clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Validity {
    /// Begin.
    pub not_before_ms: i64,
    /// End.
    pub not_after_ms: i64,
}

impl Validity {
    /// The life of a certificate; `None` if it cannot be read.
    #[must_use]
    pub fn of(certificate: &CertificateDer<'_>) -> Option<Self> {
        let (_, parsed) = X509Certificate::from_der(certificate).ok()?;
        let ms = |time: &x509_parser::time::ASN1Time| time.timestamp().saturating_mul(1000);
        let validity = parsed.validity();
        Some(Self {
            not_before_ms: ms(&validity.not_before),
            not_after_ms: ms(&validity.not_after),
        })
    }
}

/// What both slots hold.
#[derive(Clone, Debug)]
pub(super) struct Slots {
    /// The newest usable certificate.
    pub(super) newest: IssuedCertificate,
    /// The proven one, if the newest has not connected yet.
    pub(super) fallback: Option<IssuedCertificate>,
}

impl Slots {
    /// Reads the slots in `folder`; `None` if both are empty. `usable` says whether a certificate
    /// is for this node and its key.
    pub(super) fn load(
        folder: &Path,
        usable: impl Fn(&CertificateDer<'_>) -> bool,
    ) -> Result<Option<Self>, ConfigError> {
        let next = match read_slot(&folder.join(NEXT)) {
            Ok(next) => next.filter(|next| {
                let usable = usable(&next.certificate);
                if !usable {
                    tracing::warn!(
                        file = NEXT,
                        "a new certificate is for somebody else and is not used"
                    );
                }
                usable
            }),
            Err(error) => {
                tracing::warn!(%error, "a new certificate cannot be read and is not used");
                None
            }
        };
        let current = read_slot(&folder.join(CURRENT));
        let Some(newest) = next else {
            return Ok(current?.map(|newest| Self { newest, fallback: None }));
        };
        let fallback = current.ok().flatten().filter(|current| usable(&current.certificate));
        Ok(Some(Self { newest, fallback }))
    }
}

/// Writes the first certificate.
pub(super) fn store_first(folder: &Path, first: &IssuedCertificate) -> Result<(), ConfigError> {
    write_slot(&folder.join(CURRENT), first)
}

/// Stores a newer certificate beside the current one. If one stands there already that has never
/// connected, it makes room: it takes the current one's place if that one's time is over at
/// `now_ms`, so that the fallback is a certificate that can still be used.
pub(super) fn store_next(
    folder: &Path,
    next: &IssuedCertificate,
    now_ms: i64,
) -> Result<(), ConfigError> {
    let current = read_slot(&folder.join(CURRENT)).ok().flatten();
    let over = current
        .and_then(|current| Validity::of(&current.certificate))
        .is_none_or(|validity| validity.not_after_ms <= now_ms);
    if over && read_slot(&folder.join(NEXT)).is_ok_and(|waiting| waiting.is_some()) {
        promote(folder)?;
    }
    write_slot(&folder.join(NEXT), next)
}

/// Puts the newer certificate in the current one's place: it has connected.
pub(super) fn promote(folder: &Path) -> Result<(), ConfigError> {
    let path = folder.join(CURRENT);
    std::fs::rename(folder.join(NEXT), &path)
        .and_then(|()| durable::sync_folder(folder))
        .map_err(|source| ConfigError::Write { path, source })
}

fn read_slot(path: &Path) -> Result<Option<IssuedCertificate>, ConfigError> {
    let Some(text) = read_bounded(path)? else { return Ok(None) };
    let damaged = |problem| ConfigError::Damaged { path: path.to_owned(), problem };
    let generation = text
        .split(|byte| *byte == b'\n')
        .next()
        .and_then(|line| std::str::from_utf8(line).ok()?.strip_prefix(GENERATION))
        .map_or(Ok(0), |number| {
            number.trim().parse().map_err(|_| damaged("its generation is no number".to_owned()))
        })?;
    let certificate = parse_certificates(&text)
        .map_err(damaged)?
        .into_iter()
        .next()
        .ok_or_else(|| damaged("no certificate is in it".to_owned()))?;
    Ok(Some(IssuedCertificate { certificate, generation }))
}

fn write_slot(path: &Path, issued: &IssuedCertificate) -> Result<(), ConfigError> {
    let pem = encode("CERTIFICATE", &issued.certificate);
    write_private(path, format!("{GENERATION}{}\n{pem}", issued.generation).as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::testing;

    const NOW: i64 = 1_900_000_000_000;

    fn issued(generation: u64, not_after_ms: i64) -> IssuedCertificate {
        IssuedCertificate { certificate: testing::certificate_until(not_after_ms), generation }
    }

    fn generations(folder: &Path) -> Option<(u64, Option<u64>)> {
        let slots = Slots::load(folder, |_| true).unwrap()?;
        Some((slots.newest.generation, slots.fallback.map(|old| old.generation)))
    }

    /// What a crash may leave after each step of a renewal, in order.
    #[test]
    fn every_step_of_a_renewal_leaves_a_good_certificate() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        assert_eq!(generations(folder), None);
        store_first(folder, &issued(1, NOW + 1000)).unwrap();
        assert_eq!(generations(folder), Some((1, None)));

        // The new file is being written: it has another name, and half of its contents.
        std::fs::write(folder.join(".cert.next.pem.1.tmp"), "generation: 2\n-----BEG").unwrap();
        assert_eq!(generations(folder), Some((1, None)));
        // A file system that lost the contents of a renamed file.
        for torn in ["", "generation: 2\n-----BEGIN CERTIFICATE-----\nMIIB", "generation: x\n"] {
            std::fs::write(folder.join(NEXT), torn).unwrap();
            assert_eq!(generations(folder), Some((1, None)), "{torn:?}");
        }
        // Stored, not yet connected.
        store_next(folder, &issued(2, NOW + 2000), NOW).unwrap();
        assert_eq!(generations(folder), Some((2, Some(1))));
        // Connected, and renamed.
        promote(folder).unwrap();
        assert_eq!(generations(folder), Some((2, None)));
        // Promoted twice, as after a crash between the rename and whatever follows.
        assert!(promote(folder).is_err());
        assert_eq!(generations(folder), Some((2, None)));
        // The proven one is lost; the newer one carries on.
        store_next(folder, &issued(3, NOW + 3000), NOW).unwrap();
        std::fs::write(folder.join(CURRENT), "").unwrap();
        assert_eq!(generations(folder), Some((3, None)));
    }

    #[test]
    fn fallback_is_the_proven_certificate_until_its_time_is_over() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        store_first(folder, &issued(1, NOW + 1000)).unwrap();
        store_next(folder, &issued(2, NOW + 2000), NOW).unwrap();
        store_next(folder, &issued(3, NOW + 3000), NOW).unwrap();
        assert_eq!(generations(folder), Some((3, Some(1))));
        store_next(folder, &issued(4, NOW + 4000), NOW + 1000).unwrap();
        assert_eq!(generations(folder), Some((4, Some(3))));
    }

    #[test]
    fn new_certificate_for_somebody_else_is_passed_over() {
        let folder = tempfile::tempdir().unwrap();
        let own = issued(1, NOW);
        store_first(folder.path(), &own).unwrap();
        store_next(folder.path(), &issued(2, NOW), NOW - 1).unwrap();
        let slots = Slots::load(folder.path(), |leaf| *leaf == own.certificate).unwrap().unwrap();
        assert_eq!(slots.newest, own);
        assert!(slots.fallback.is_none());
    }

    #[test]
    fn certificate_from_before_generations_were_counted_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let old = issued(0, NOW);
        let pem = encode("CERTIFICATE", &old.certificate);
        std::fs::write(folder.path().join(CURRENT), pem).unwrap();
        assert_eq!(generations(folder.path()), Some((0, None)));
    }
}
