//! Validates joins and logins away from the connections they arrive on.
//!
//! Redeeming an invite needs the store, and the store may be slow. So a request takes one of a
//! bounded number of places, or is told at once to come back; its redemption runs as a task of its
//! own to its end, even if the caller hangs up; and the caller waits for a bounded time. Only a few of
//! those that have a place are in the store at a time, so that the journal of commands never stands
//! behind a crowd that joins. Nothing else of the hub waits here: sessions, reconnects and commands do
//! not pass this way.

mod renewal;

use std::sync::Arc;
use std::time::Duration;

use cortex_shared::clock::unix_ms;
use cortex_shared::ids::NodeId;
use cortex_shared::labels::Labels;
use cortex_shared::policy::Bound;
use cortex_shared::secret::InviteToken;
use cortex_shared::tasks::TaskScope;
use tokio::sync::{Semaphore, oneshot};

use self::renewal::Renewed;
use super::authorities::Authorities;
use super::ca::{CaError, CertificateRequest, Issued};
use super::limits::JoinLimits;
use super::refusals::Refusals;
use crate::authority::operators::Operators;
use crate::events::{EventBus, Kind, NewEvent};
use crate::node::membership::Membership;
use crate::node::registry::Registry;
use crate::store::{
    Caller, DatabaseError, Facts, Machine, Node, NodeRedemption, Operator, OperatorRedemption,
    RedeemRefusal, RenewRefusal, Store, StoreError,
};
pub use renewal::{RECOVERY_WINDOW, RenewalRequest};

/// Redemptions in the store at the same time: enough to share a flush of the disk, and few enough that
/// whatever else is to be written waits for one of their transactions at most.
const IN_STORE: usize = 64;

/// The same for renewals.
const RENEWALS_IN_STORE: usize = 16;

/// A request to become a node, checked for form.
pub struct JoinRequest {
    /// The invite.
    pub token: InviteToken,
    /// The key to certify.
    pub certificate: CertificateRequest,
    /// Wanted name, valid or empty.
    pub name: String,
    /// The node's own labels.
    pub labels: Labels,
    /// The node's own ceiling.
    pub ceiling: Bound,
    /// The node's machine.
    pub facts: Facts,
    /// The same, as it is told from others.
    pub machine: Machine,
    /// Who asks.
    pub caller: Caller,
}

/// Why nobody was admitted.
#[derive(Debug, thiserror::Error)]
pub enum EnrollError {
    /// The invite does not admit this caller.
    #[error(transparent)]
    Refused(#[from] RedeemRefusal),
    /// The node gets no certificate.
    #[error(transparent)]
    NotRenewed(#[from] RenewRefusal),
    /// All places are taken.
    #[error("too many joins are waiting")]
    Busy,
    /// The node renews too often.
    #[error("this node renews its certificate too often")]
    TooOften {
        /// When it may again.
        wait: Duration,
    },
    /// The store did not answer in time; the redemption goes on, and a retry finds its result.
    #[error("the hub's store did not answer in time")]
    Deadline,
    /// The store failed.
    #[error("the hub's store failed")]
    Store(#[from] StoreError),
    /// The certificate could not be made.
    #[error("the certificate could not be made")]
    Certificate(#[from] CaError),
}

/// What the hub holds in memory of those it has admitted; it follows the store.
pub struct Admitted {
    /// Nodes.
    pub registry: Arc<Registry>,
    /// Members of workspaces.
    pub membership: Arc<Membership>,
    /// Operators.
    pub operators: Arc<Operators>,
    /// Where it is told.
    pub events: Arc<EventBus>,
}

/// See the module.
pub struct Validator {
    places: Arc<Semaphore>,
    /// Those of nodes that are in already.
    renewals: Arc<Semaphore>,
    /// And their way to the store, which joins do not stand in.
    renewals_in_store: Arc<Semaphore>,
    /// How often each of them renews.
    renewed: Renewed,
    access: Arc<Semaphore>,
    deadline: Duration,
    store: Arc<dyn Store>,
    authorities: Arc<Authorities>,
    refusals: Refusals,
    admitted: Admitted,
    scope: TaskScope,
}

impl Validator {
    /// A validator with `places` requests at a time and `deadline` for each.
    #[must_use]
    pub fn new(
        places: usize,
        deadline: Duration,
        store: Arc<dyn Store>,
        authorities: Arc<Authorities>,
        limits: Arc<JoinLimits>,
        admitted: Admitted,
        scope: TaskScope,
    ) -> Self {
        let refusals = Refusals::new(Arc::clone(&store), limits);
        Self {
            places: Arc::new(Semaphore::new(places)),
            renewals: Arc::new(Semaphore::new(places)),
            renewals_in_store: Arc::new(Semaphore::new(RENEWALS_IN_STORE)),
            renewed: Renewed::new(authorities.node_life()),
            access: Arc::new(Semaphore::new(IN_STORE)),
            deadline,
            store,
            authorities,
            refusals,
            admitted,
            scope,
        }
    }

    /// Admits a node.
    ///
    /// # Errors
    /// See [`EnrollError`]. After [`EnrollError::Deadline`] the same request may succeed.
    pub async fn join_node(&self, request: JoinRequest) -> Result<(Node, Issued), EnrollError> {
        let (now_ms, new_id) = (unix_ms(), NodeId::new());
        // The one that signs is the one that is recorded, even if another takes over meanwhile.
        let ring = self.authorities.ring();
        let authority = ring.issuing();
        let redemption = NodeRedemption {
            invite: request.token.id().clone(),
            secret_hash: request.token.secret_hash(),
            key: request.certificate.key_hash(),
            new_id,
            wanted_name: request.name,
            labels: request.labels,
            ceiling: request.ceiling,
            facts: request.facts,
            machine: request.machine,
            certificate: authority.terms(now_ms),
            caller: request.caller,
            now_ms,
        };
        let (store, registry) = (Arc::clone(&self.store), Arc::clone(&self.admitted.registry));
        let membership = Arc::clone(&self.admitted.membership);
        let refusals = self.refusals.of(&request.token, request.caller);
        let (events, invite) = (Arc::clone(&self.admitted.events), request.token.id().to_string());
        let node = self
            .detached(async move {
                let node = refusals.watch(store.redeem_node(redemption).await?).await?;
                // The invite may have made it a member; what is known in memory follows the store.
                membership.joined(&*store, node.id).await?;
                // Not for one that is known already: it asks again because an answer was lost.
                if registry.add(node.clone()) {
                    let used = NewEvent::of_mesh().with("invite", &*invite);
                    events.publish(Kind::InviteUsed, used.with("admitted", &*node.name));
                    let joined = NewEvent::of_node(&node).with("hostname", &*node.facts.hostname);
                    events.publish(Kind::NodeJoined, joined);
                }
                // One that is known already, whose answer was lost, has got another certificate.
                registry.renewed(&node);
                Ok::<_, EnrollError>(node)
            })
            .await?;
        let generation = node.certificate.generation;
        let issued = authority.issue_to_node(node.id, generation, &request.certificate, now_ms)?;
        tracing::info!(node = %node.name, id = %node.id, invite = %request.token.id(), "node joined");
        Ok((node, issued))
    }

    /// Logs an operator in.
    ///
    /// # Errors
    /// As [`Validator::join_node`].
    pub async fn login_operator(
        &self,
        token: &InviteToken,
        certificate: &CertificateRequest,
        caller: Caller,
    ) -> Result<(Operator, Issued), EnrollError> {
        let redemption = OperatorRedemption {
            invite: token.id().clone(),
            secret_hash: token.secret_hash(),
            key: certificate.key_hash(),
            caller,
            now_ms: unix_ms(),
        };
        let (store, operators) = (Arc::clone(&self.store), Arc::clone(&self.admitted.operators));
        let refusals = self.refusals.of(token, caller);
        let operator = self
            .detached(async move {
                let operator = refusals.watch(store.redeem_operator(redemption).await?).await?;
                // From now on its certificate counts.
                operators.logged_in(&operator.name).await?;
                Ok::<_, EnrollError>(operator)
            })
            .await?;
        let (ring, role) = (self.authorities.ring(), operator.role);
        let issued =
            ring.issuing().issue_to_operator(&operator.name, role, certificate, unix_ms())?;
        tracing::info!(operator = %operator.name, role = %operator.role, "operator logged in");
        let told = NewEvent::of_mesh().with("operator", &*operator.name);
        let told = told.with("role", operator.role.to_string());
        let invite = token.id().to_string();
        self.admitted.events.publish(Kind::OperatorLoggedIn, told.with("invite", invite));
        Ok((operator, issued))
    }

    async fn detached<T, F>(&self, work: F) -> Result<T, EnrollError>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, EnrollError>> + Send + 'static,
    {
        self.detached_in(&self.places, &self.access, work).await
    }

    async fn detached_in<T, F>(
        &self,
        places: &Arc<Semaphore>,
        access: &Arc<Semaphore>,
        work: F,
    ) -> Result<T, EnrollError>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, EnrollError>> + Send + 'static,
    {
        let place = Arc::clone(places).try_acquire_owned().map_err(|_| EnrollError::Busy)?;
        let (done, result) = oneshot::channel();
        let access = Arc::clone(access);
        self.scope.spawn("enroll", async move {
            let result = match access.acquire_owned().await {
                Ok(_access) => work.await,
                // Nobody closes it.
                Err(_) => Err(EnrollError::Store(DatabaseError::Closed.into())),
            };
            drop(place);
            // A caller that hung up finds the result when it comes back.
            done.send(result).ok();
        });
        match tokio::time::timeout(self.deadline, result).await {
            Err(_) => Err(EnrollError::Deadline),
            Ok(Err(_)) => Err(EnrollError::Store(DatabaseError::Closed.into())),
            Ok(Ok(result)) => result,
        }
    }
}
