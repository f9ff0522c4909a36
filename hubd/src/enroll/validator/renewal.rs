//! Renewing and recovering the certificates of nodes.
//!
//! The store records the next certificate before anybody gets it: whatever is lost after that, the hub
//! knows which generation is the newest. Renewals have places of their own, so that a crowd at the door
//! strands nobody who is in; recoveries, whose caller has proved nothing but a key, share those of joins.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use cortex_shared::clock::unix_ms;
use cortex_shared::ids::NodeId;

use tokio::time::Instant;

use super::super::ca::{CertificateRequest, Issued, millis};
use super::{EnrollError, Validator};
use crate::rate::{Bucket, Rate};
use crate::store::{Machine, Node, RenewRefusal, Renewal, RenewalProof};

/// How long after the end of its last certificate a node can get another by its key alone.
pub const RECOVERY_WINDOW: Duration = Duration::from_secs(30 * 24 * 3600);

/// Renewals of one node at once: some, since answers get lost.
const BURST: u32 = 8;
/// And then one in this time, or more where certificates live shorter than a quarter of an hour.
const INTERVAL: Duration = Duration::from_secs(60);
/// So many nodes are remembered before those that are at rest are forgotten; no more than are admitted.
const SWEEP_AT: usize = 4096;

/// A request for the next certificate of a node, checked for form.
pub struct RenewalRequest {
    /// Whose.
    pub node: NodeId,
    /// The key to certify, which has to be the node's.
    pub certificate: CertificateRequest,
    /// Generation of the newest certificate it has stored.
    pub generation: u64,
    /// Its machine.
    pub machine: Machine,
    /// Where it is.
    pub address: Option<SocketAddr>,
}

/// What each node has left of its renewals. A node renews twice in a certificate's life; each time is a
/// line of the audit log, and one that renews in a loop must not fill it.
pub(super) struct Renewed {
    rate: Rate,
    nodes: Mutex<HashMap<NodeId, Bucket>>,
}

impl Renewed {
    /// For certificates that live this long.
    pub(super) fn new(life: Duration) -> Self {
        let interval = INTERVAL.min(life / 15).max(Duration::from_millis(1));
        let rate = Rate { burst: BURST, per_second: 1.0 / interval.as_secs_f64() };
        Self { rate, nodes: Mutex::new(HashMap::new()) }
    }

    /// Counts a renewal of a node that is admitted.
    pub(super) fn check(&self, node: NodeId, now: Instant) -> Result<(), EnrollError> {
        let mut nodes = self.nodes.lock().unwrap_or_else(PoisonError::into_inner);
        if nodes.len() >= SWEEP_AT && !nodes.contains_key(&node) {
            // Of those that have all of it left nothing need be remembered.
            nodes.retain(|_, bucket| !bucket.is_full(self.rate, now));
        }
        let bucket = nodes.entry(node).or_insert_with(|| Bucket::full(self.rate, now));
        bucket.take(self.rate, now).map_err(|wait| EnrollError::TooOften { wait })
    }
}

impl Validator {
    /// Renews the certificate of a node that has proved itself by a valid one.
    ///
    /// # Errors
    /// See [`EnrollError`]. After [`EnrollError::Deadline`] the certificate may have been recorded; the
    /// same request then gives another of the same generation.
    pub async fn renew_node(&self, request: RenewalRequest) -> Result<(Node, Issued), EnrollError> {
        self.certify(request, RenewalProof::Certificate).await
    }

    /// The same for a node that has proved itself by its key alone.
    ///
    /// # Errors
    /// As [`Validator::renew_node`], and [`RenewRefusal::TooLate`].
    pub async fn recover_node(
        &self,
        request: RenewalRequest,
    ) -> Result<(Node, Issued), EnrollError> {
        // A stranger costs the store nothing, and learns nothing of nodes whose key it does not have.
        let known = self.admitted.registry.get(request.node).map(|view| view.node);
        let known = known.filter(|node| node.key == request.certificate.key_hash());
        match known.map(|node| node.revoked_at_ms) {
            None => return Err(RenewRefusal::Unknown.into()),
            Some(Some(_)) => return Err(RenewRefusal::Revoked.into()),
            Some(None) => {}
        }
        self.certify(request, RenewalProof::Key { window_ms: millis(RECOVERY_WINDOW) }).await
    }

    async fn certify(
        &self,
        request: RenewalRequest,
        proof: RenewalProof,
    ) -> Result<(Node, Issued), EnrollError> {
        // By now the caller has shown the node's certificate or its key: a stranger uses up nothing of it.
        self.renewed.check(request.node, Instant::now())?;
        let now_ms = unix_ms();
        // The one that signs is the one that is recorded, even if another takes over meanwhile.
        let ring = self.authorities.ring();
        let authority = ring.issuing();
        let renewal = Renewal {
            node: request.node,
            key: request.certificate.key_hash(),
            generation: request.generation,
            machine: request.machine,
            address: request.address.map(|address| address.to_string()).unwrap_or_default(),
            certificate: authority.terms(now_ms),
            proof,
            now_ms,
        };
        let (places, access) = match proof {
            RenewalProof::Certificate => (&self.renewals, &self.renewals_in_store),
            RenewalProof::Key { .. } => (&self.places, &self.access),
        };
        let (store, registry) = (Arc::clone(&self.store), Arc::clone(&self.admitted.registry));
        let work = async move {
            let id = renewal.node;
            // What has connected is written down at leisure, and decides here: the newest certificate
            // is given a second time only while nobody has used it.
            if let Some(known) = registry.get(id) {
                store.touch_nodes(vec![known.node]).await?;
            }
            let node = store.renew_node(renewal).await?.inspect_err(|refusal| {
                if let RenewRefusal::Cloned { name, suspicion, .. } = refusal {
                    tracing::warn!(node = %name, %id, ?suspicion, "a copied identity was refused");
                    registry.suspected(id, suspicion);
                }
            })?;
            registry.renewed(&node);
            Ok::<_, EnrollError>(node)
        };
        let node = self.detached_in(places, access, work).await?;
        let generation = node.certificate.generation;
        let issued = authority.issue_to_node(node.id, generation, &request.certificate, now_ms)?;
        tracing::info!(node = %node.name, id = %node.id, generation, ?proof, "certificate renewed");
        Ok((node, issued))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_renews_a_few_times_at_once_and_then_once_a_minute() {
        let day = Duration::from_secs(24 * 3600);
        let (renewed, now) = (Renewed::new(day), Instant::now());
        let (node, other) = (NodeId::new(), NodeId::new());
        for _ in 0..BURST {
            renewed.check(node, now).unwrap();
        }
        let refused = renewed.check(node, now).unwrap_err();
        assert!(matches!(refused, EnrollError::TooOften { wait } if wait.as_secs() >= 59));
        renewed.check(other, now).unwrap();
        let later = now + Duration::from_secs(61);
        renewed.check(node, later).unwrap();
        assert!(renewed.check(node, later).is_err());
    }

    #[test]
    fn certificates_of_a_short_life_are_renewed_as_often_as_that_takes() {
        let (renewed, start) = (Renewed::new(Duration::from_secs(10)), Instant::now());
        let node = NodeId::new();
        for renewals in 0..100 {
            renewed.check(node, start + Duration::from_secs(5) * renewals).unwrap();
        }
    }
}
