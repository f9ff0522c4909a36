//! The certificate by which the hub proves itself.

use std::sync::{Arc, Mutex, PoisonError};

use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;

use super::authorities::{Authorities, Ring};
use super::ca::{CaError, HUB_CERTIFICATE_LIFE, millis};

/// Gives the TLS server its certificate. A new one is made when half of its life is over, or when
/// the authorities have changed: a hub that runs for years needs no restart for either.
pub struct HubCertificate {
    authorities: Arc<Authorities>,
    clock: fn() -> i64,
    current: Mutex<Current>,
}

struct Current {
    key: Arc<CertifiedKey>,
    /// The authorities that it was made for.
    ring: Arc<Ring>,
    made_at_ms: i64,
}

impl Current {
    fn make(authorities: &Authorities, now_ms: i64) -> Result<Self, CaError> {
        let ring = authorities.ring();
        let key = Arc::new(ring.serving().issue_for_hub(&ring.trusted(), now_ms)?);
        Ok(Self { key, ring, made_at_ms: now_ms })
    }
}

impl HubCertificate {
    /// Makes the first certificate.
    ///
    /// # Errors
    /// If signing fails.
    pub fn new(authorities: Arc<Authorities>, clock: fn() -> i64) -> Result<Self, CaError> {
        let current = Mutex::new(Current::make(&authorities, clock())?);
        Ok(Self { authorities, clock, current })
    }

    /// Makes another one now, with a new key, for the connections that begin from here on.
    ///
    /// # Errors
    /// If signing fails; the old one stays.
    pub fn renew(&self) -> Result<(), CaError> {
        let made = Current::make(&self.authorities, (self.clock)())?;
        *self.current.lock().unwrap_or_else(PoisonError::into_inner) = made;
        Ok(())
    }
}

impl std::fmt::Debug for HubCertificate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("HubCertificate")
    }
}

impl ResolvesServerCert for HubCertificate {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        let now = (self.clock)();
        let old = now - current.made_at_ms > millis(HUB_CERTIFICATE_LIFE / 2);
        if old || !Arc::ptr_eq(&current.ring, &self.authorities.ring()) {
            match Current::make(&self.authorities, now) {
                Ok(made) => *current = made,
                Err(error) => tracing::error!(%error, "cannot renew the hub's certificate"),
            }
        }
        Some(Arc::clone(&current.key))
    }
}
