//! The identity of a running agent, which changes: certificates are renewed and proven, the hub
//! names other authorities, clocks are compared.
//!
//! Owned by the daemon (or by a command that holds the state's lock) and shared by clones. What
//! changes is on disk before it counts; connections made afterwards use it, living ones stay. The
//! skew and the problem are in memory only and found anew by the next session. Methods that write
//! block for the disk; those that only ask never wait for them.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cortex_shared::clock::unix_ms;
use cortex_shared::peer::CaPin;
use rand::RngExt as _;
use rustls_pki_types::CertificateDer;
use tokio::sync::{Notify, watch};

use super::{
    IdentityKey, IssuedCertificate, NodeIdentity, Validity, authorities_of, holder_of, slots,
    store_authorities,
};
use crate::audit::{Audit, AuditEvent, cut};
use crate::client::{ClientCertificate, ConnectError, HubAddress, HubClient, pin_of};
use crate::config::{ConfigError, StateDir};

/// Where in its life a certificate is renewed: half, give or take a tenth, so that nodes that
/// joined together do not renew together.
const RENEWAL: std::ops::Range<f64> = 0.45..0.55;

/// Why something the hub issued is not used.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// The hub's answer does not fit this node.
    #[error("the hub's answer is wrong: {0}")]
    Wrong(&'static str),
    /// It cannot be stored, or what is stored cannot be read.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// It cannot be used for a connection.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The key cannot sign.
    #[error("cannot sign the certificate request")]
    Sign(#[source] rcgen::Error),
}

/// The identity of this agent as it is now. Clones share it.
#[derive(Clone, Debug)]
pub struct LiveIdentity {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    state: StateDir,
    audit: Audit,
    client: HubClient,
    key: IdentityKey,
    current: Mutex<Current>,
    /// Held while something is written, so that `current` need not be.
    writing: Mutex<()>,
    /// Counts the certificates that were stored, so that whoever waits for the next renewal wakes.
    stored: watch::Sender<u64>,
    /// One renewal at a time.
    renewing: tokio::sync::Mutex<()>,
    retry: Notify,
}

#[derive(Debug)]
struct Current {
    identity: NodeIdentity,
    renew_at_ms: i64,
    /// The fallback is presented instead of the newest, which the hub did not accept.
    fell_back: bool,
    skew_ms: i64,
    problem: Option<String>,
}

/// What the next connection presents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Presented {
    /// Number of the certificate.
    pub generation: u64,
    /// It is the newest one, and has not connected yet.
    pub unproven: bool,
}

impl LiveIdentity {
    /// The identity of a state, and a client for its hub.
    ///
    /// # Errors
    /// If there is none or it cannot be used.
    pub fn new(
        state: StateDir,
        identity: NodeIdentity,
        hub: HubAddress,
    ) -> Result<Self, IdentityError> {
        let folder = state.identity();
        let key = IdentityKey::load(&folder)?
            .ok_or_else(|| ConfigError::NotJoined { state: state.path().to_owned() })?;
        let client = identity.client(hub)?;
        let renew_at_ms = renewal_time(&identity.credentials.own.certificate);
        let audit = Audit::of(&state);
        let current = Mutex::new(Current {
            identity,
            renew_at_ms,
            fell_back: false,
            skew_ms: 0,
            problem: None,
        });
        let inner = Inner {
            state,
            audit,
            client,
            key,
            current,
            writing: Mutex::new(()),
            stored: watch::Sender::new(0),
            renewing: tokio::sync::Mutex::new(()),
            retry: Notify::new(),
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    fn current(&self) -> MutexGuard<'_, Current> {
        // Every critical section leaves the data whole, so a panic elsewhere does not spoil it.
        self.inner.current.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn writing(&self) -> MutexGuard<'_, ()> {
        self.inner.writing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A copy of what is known now.
    #[must_use]
    pub fn snapshot(&self) -> NodeIdentity {
        self.current().identity.clone()
    }

    /// The client whose connections present this identity.
    #[must_use]
    pub fn client(&self) -> &HubClient {
        &self.inner.client
    }

    /// Where its deeds are written down.
    #[must_use]
    pub fn audit(&self) -> &Audit {
        &self.inner.audit
    }

    /// A request for a certificate for the same key.
    ///
    /// # Errors
    /// If the key cannot sign.
    pub fn request_der(&self) -> Result<Vec<u8>, IdentityError> {
        self.inner.key.request_der().map_err(IdentityError::Sign)
    }

    /// Lets one renewal happen at a time.
    pub(crate) async fn begin_renewal(&self) -> tokio::sync::MutexGuard<'_, ()> {
        self.inner.renewing.lock().await
    }

    /// What the next connection presents.
    #[must_use]
    pub fn presented(&self) -> Presented {
        let current = self.current();
        match (&current.identity.fallback, current.fell_back) {
            (Some(old), true) => Presented { generation: old.generation, unproven: false },
            (fallback, _) => {
                Presented { generation: current.identity.generation, unproven: fallback.is_some() }
            }
        }
    }

    /// The hub's clock minus this machine's, as last measured; 0 before the first session.
    #[must_use]
    pub fn skew_ms(&self) -> i64 {
        self.current().skew_ms
    }

    /// Remembers a measurement of [`LiveIdentity::skew_ms`].
    pub fn set_skew_ms(&self, skew_ms: i64) {
        self.current().skew_ms = skew_ms;
    }

    /// The time by the hub's clock, as far as it is known.
    #[must_use]
    pub fn hub_now_ms(&self) -> i64 {
        unix_ms().saturating_add(self.skew_ms())
    }

    /// What keeps the identity from being renewed.
    #[must_use]
    pub fn problem(&self) -> Option<String> {
        self.current().problem.clone()
    }

    /// Sets or clears [`LiveIdentity::problem`]; `true` if that is news.
    pub fn set_problem(&self, problem: Option<String>) -> bool {
        let mut current = self.current();
        let news = current.problem != problem;
        current.problem = problem;
        news
    }

    /// Writes down, once, that the hub believes this identity to be on two machines.
    pub fn note_clone(&self, reason: &str) {
        if self.set_problem(Some(reason.to_owned())) {
            self.audit().note(&AuditEvent::Cloned { reason: cut(reason) });
        }
    }

    /// When the newest certificate is to be renewed, by the hub's clock.
    #[must_use]
    pub fn renew_at_ms(&self) -> i64 {
        let current = self.current();
        // What the hub did not accept cannot be replaced too soon.
        if current.fell_back { 0 } else { current.renew_at_ms }
    }

    /// Changes whenever a certificate was stored.
    #[must_use]
    pub fn stored(&self) -> watch::Receiver<u64> {
        self.inner.stored.subscribe()
    }

    /// Asks whoever waits for the next attempt to make it now.
    pub fn retry_now(&self) {
        self.inner.retry.notify_one();
    }

    /// Ends when somebody called [`LiveIdentity::retry_now`].
    pub async fn retry_asked(&self) {
        self.inner.retry.notified().await;
    }

    /// Whether the newest certificate's time is over, by the hub's clock.
    #[must_use]
    pub fn is_expired(&self) -> bool {
        let now = self.hub_now_ms();
        self.current().identity.credentials.not_after_ms() <= now
    }

    /// Stores a certificate the hub issued, beside the old one, and presents it from now on.
    ///
    /// # Errors
    /// If it is not for this node and its key, or cannot be stored: nothing has changed then.
    pub fn accept(
        &self,
        certificate_der: &[u8],
        generation: u64,
        recovered: bool,
    ) -> Result<(), IdentityError> {
        let certificate = CertificateDer::from(certificate_der.to_vec());
        if !self.inner.key.fits(&certificate) {
            return Err(IdentityError::Wrong("the certificate is for another key"));
        }
        let _writing = self.writing();
        if holder_of(&certificate) != Some(self.snapshot().peer()) {
            return Err(IdentityError::Wrong("the certificate is for another node"));
        }
        let validity = Validity::of(&certificate)
            .ok_or(IdentityError::Wrong("the certificate cannot be read"))?;
        let next = IssuedCertificate { certificate, generation };
        let folder = self.inner.state.identity();
        slots::store_next(&folder, &next, self.hub_now_ms())?;
        // Read back, so that memory and disk cannot disagree about the fallback.
        let stored = NodeIdentity::load_from(&folder)?
            .ok_or_else(|| ConfigError::NotJoined { state: self.inner.state.path().to_owned() })?;
        {
            let mut current = self.current();
            current.renew_at_ms = renewal_time(&next.certificate);
            current.identity = stored;
            current.fell_back = false;
            current.problem = None;
            self.present(&current)?;
        }
        tracing::info!(generation, recovered, "a new certificate is stored");
        let not_after_ms = validity.not_after_ms;
        self.audit().note(&AuditEvent::Renewed { generation, not_after_ms, recovered });
        self.inner.stored.send_modify(|count| *count += 1);
        Ok(())
    }

    /// The certificate with this number has connected: the one before it is not needed any more.
    ///
    /// # Errors
    /// Those of the file system. It is tried again with the next connection.
    pub fn proven(&self, generation: u64) -> Result<(), IdentityError> {
        let _writing = self.writing();
        let identity = self.snapshot();
        if identity.fallback.is_none() || identity.generation != generation {
            return Ok(());
        }
        slots::promote(&self.inner.state.identity())?;
        self.current().identity.fallback = None;
        Ok(())
    }

    /// The hub did not accept the newest certificate: presents the one before it, if that can still
    /// be used. `false` if there is none.
    pub fn fall_back(&self) -> bool {
        let now = self.hub_now_ms();
        let mut current = self.current();
        let usable = !current.fell_back
            && current.identity.fallback.as_ref().is_some_and(|old| {
                Validity::of(&old.certificate).is_some_and(|life| life.not_after_ms > now)
            });
        if !usable {
            return false;
        }
        current.fell_back = true;
        match self.present(&current) {
            Ok(()) => {
                tracing::warn!("the new certificate is not accepted; the one before it is used");
                true
            }
            Err(error) => {
                tracing::error!(%error, "the certificate before the newest cannot be used");
                current.fell_back = false;
                false
            }
        }
    }

    /// Takes over the authorities the hub names, over a connection on which it proved itself. An
    /// empty list changes nothing. A list without any that is trusted already is refused: a mesh
    /// replaces its authority by way of trusting both, so such a list is a mistake or worse, and
    /// would cut this node off.
    ///
    /// # Errors
    /// If the list is not valid, is refused, or cannot be stored: nothing has changed then.
    pub fn trust<'a>(&self, ders: impl IntoIterator<Item = &'a [u8]>) -> Result<(), IdentityError> {
        let named = authorities_of(ders).map_err(IdentityError::Wrong)?;
        let _writing = self.writing();
        let known = self.snapshot().credentials.authorities;
        if named.is_empty() || named == known {
            return Ok(());
        }
        let accepted = named.iter().any(|authority| known.contains(authority));
        let event = AuditEvent::Authorities { before: pins(&known), named: pins(&named), accepted };
        if accepted {
            store_authorities(&self.inner.state.identity(), &named)?;
            let mut current = self.current();
            current.identity.credentials.authorities = named;
            self.present(&current)?;
        }
        self.audit().note(&event);
        if !accepted {
            return Err(IdentityError::Wrong("none of the authorities it names is known here"));
        }
        tracing::info!("the hub's list of authorities has changed");
        Ok(())
    }

    /// Makes the next connections use what is current.
    fn present(&self, current: &Current) -> Result<(), ConnectError> {
        let identity = &current.identity;
        let newest = &identity.credentials.own;
        let certificate = match (&identity.fallback, current.fell_back) {
            (Some(old), true) => old.certificate.clone(),
            _ => newest.certificate.clone(),
        };
        let own = ClientCertificate { certificate, key: newest.key.clone_key() };
        self.inner.client.present(identity.trust(), Some(own))
    }
}

fn pins(authorities: &[CertificateDer<'_>]) -> Vec<String> {
    authorities.iter().filter_map(pin_of).map(|pin: CaPin| pin.to_string()).collect()
}

/// When to renew: at half of its life, with jitter. What cannot be read is renewed at once.
fn renewal_time(certificate: &CertificateDer<'_>) -> i64 {
    Validity::of(certificate)
        .map_or(0, |life| renewal_within(life, rand::rng().random_range(RENEWAL)))
}

#[allow(clippy::cast_possible_truncation, clippy::cast_precision_loss)] // a part of the life
fn renewal_within(life: Validity, part: f64) -> i64 {
    let length = life.not_after_ms.saturating_sub(life.not_before_ms).max(0);
    life.not_before_ms.saturating_add((length as f64 * part) as i64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::testing::Ca;

    const DAY_MS: i64 = 24 * 60 * 60 * 1000;

    struct Node {
        _folder: tempfile::TempDir,
        state: StateDir,
        ca: Ca,
        live: LiveIdentity,
    }

    /// A node whose first certificate ends in `left_ms`.
    fn node(left_ms: i64) -> Node {
        let folder = tempfile::tempdir().unwrap();
        let state = StateDir::resolve(Some(folder.path().to_owned())).unwrap();
        NodeIdentity::pending_key(&state).unwrap();
        let ca = Ca::new();
        ca.node(&state.identity(), unix_ms() + left_ms).store(&state).unwrap();
        let identity = NodeIdentity::load(&state).unwrap().unwrap();
        let live = LiveIdentity::new(state.clone(), identity, "hub:1".parse().unwrap()).unwrap();
        Node { _folder: folder, state, ca, live }
    }

    impl Node {
        fn issue(&self, generation: u64) -> Result<(), IdentityError> {
            let request = self.live.request_der().unwrap();
            let end = unix_ms() + DAY_MS;
            let peer = self.live.snapshot().peer();
            let certificate = self.ca.sign(&request, &peer, end);
            self.live.accept(&certificate, generation, false)
        }

        fn on_disk(&self) -> (u64, Option<u64>) {
            let identity = NodeIdentity::load(&self.state).unwrap().unwrap();
            (identity.generation, identity.fallback.map(|old| old.generation))
        }

        fn audit(&self) -> String {
            std::fs::read_to_string(self.live.audit().path()).unwrap_or_default()
        }
    }

    #[test]
    fn new_certificate_is_presented_at_once_and_the_old_one_kept_until_it_has_connected() {
        let node = node(DAY_MS);
        assert_eq!(node.live.presented(), Presented { generation: 1, unproven: false });
        node.issue(2).unwrap();
        assert_eq!(node.live.presented(), Presented { generation: 2, unproven: true });
        assert_eq!(node.on_disk(), (2, Some(1)));
        // A session with the old certificate proves nothing about the new one.
        node.live.proven(1).unwrap();
        assert_eq!(node.on_disk(), (2, Some(1)));
        node.live.proven(2).unwrap();
        assert_eq!(node.on_disk(), (2, None));
        assert!(node.audit().contains("identity.renewed"));
    }

    #[test]
    fn certificate_that_the_hub_refuses_gives_way_to_the_one_before() {
        let node = node(DAY_MS);
        assert!(!node.live.fall_back());
        node.issue(2).unwrap();
        assert!(node.live.fall_back());
        assert_eq!(node.live.presented(), Presented { generation: 1, unproven: false });
        assert_eq!(node.live.renew_at_ms(), 0);
        assert!(!node.live.fall_back(), "there is nothing before it");
        node.issue(3).unwrap();
        assert_eq!(node.live.presented().generation, 3);
        assert_eq!(node.on_disk(), (3, Some(1)));
    }

    #[test]
    fn expired_certificate_is_no_fallback() {
        let node = node(-1000);
        assert!(node.live.is_expired());
        node.issue(2).unwrap();
        assert!(!node.live.is_expired());
        assert!(!node.live.fall_back());
        // By the hub's clock everything is over.
        node.live.set_skew_ms(2 * DAY_MS);
        assert!(node.live.is_expired());
    }

    #[test]
    fn certificate_for_another_key_or_node_changes_nothing() {
        let node = node(DAY_MS);
        let other = tempfile::tempdir().unwrap();
        let stranger = node.ca.node(other.path(), unix_ms() + DAY_MS);
        let foreign = stranger.credentials.own.certificate.clone();
        assert!(matches!(node.live.accept(&foreign, 2, false), Err(IdentityError::Wrong(_))));
        let request = node.live.request_der().unwrap();
        let misnamed = node.ca.sign(&request, &stranger.peer(), unix_ms() + DAY_MS);
        assert!(matches!(node.live.accept(&misnamed, 2, false), Err(IdentityError::Wrong(_))));
        assert!(node.live.accept(b"x", 2, false).is_err());
        assert_eq!(node.on_disk(), (1, None));
    }

    #[test]
    fn authorities_change_only_by_way_of_a_known_one() {
        let node = node(DAY_MS);
        let (old, new) = (node.ca.certificate.clone(), Ca::new().certificate);
        let trusted = || NodeIdentity::load(&node.state).unwrap().unwrap().credentials.authorities;
        node.live.trust([]).unwrap();
        node.live.trust([old.as_ref()]).unwrap();
        assert_eq!(node.audit(), "");
        assert!(matches!(node.live.trust([new.as_ref()]), Err(IdentityError::Wrong(_))));
        assert_eq!(trusted(), std::slice::from_ref(&old));
        assert!(node.audit().contains("\"accepted\":false"));
        node.live.trust([old.as_ref(), new.as_ref()]).unwrap();
        assert_eq!(trusted(), [old, new.clone()]);
        node.live.trust([new.as_ref()]).unwrap();
        assert_eq!(trusted(), [new]);
    }

    #[test]
    fn renewal_comes_around_half_of_the_life() {
        let life = Validity { not_before_ms: 1000, not_after_ms: 1000 + DAY_MS };
        for (part, hours) in [(0.45, 10), (0.5, 12), (0.55, 13)] {
            assert_eq!((renewal_within(life, part) - 1000) / 3_600_000, hours);
        }
        let node = node(DAY_MS);
        let due = node.live.renew_at_ms() - unix_ms();
        assert!((DAY_MS * 44 / 100..=DAY_MS * 56 / 100).contains(&due), "{due}");
    }
}
