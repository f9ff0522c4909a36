//! Every operator that has logged in, and what ends its calls.
//!
//! An operator has one login: a newer one replaces it, and with it the role, the scope and the key. So a
//! certificate counts only if its key is that of the newest login, which is also why a login after a
//! revocation does not bring the certificate back that was revoked.
//!
//! A revocation is in force before the store has it. Until the store has it, it stands in a list of its
//! own, from which it is tried again; whatever a login says meanwhile, the operator stays revoked. What
//! of that list a crash loses is said to whoever revoked: the answer was that it is not recorded yet.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use cortex_shared::clock::unix_ms;
use cortex_shared::ids::{NodeId, TaskId};
use cortex_shared::policy::Role;
use serde_json::json;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::nodes::DecisionError;
use crate::events::{EventBus, Kind, NewEvent};
use crate::node::registry::Registry;
use crate::store::{Actor, KeyHash, NewAudit, OperatorRecord, Scope, Store, StoreError};
use crate::task::relay::Relay;
use crate::task::running::cancel_frame;

/// Why a command of a revoked operator ends.
const REVOKED: &str = "the operator who asked for it was revoked";

/// An operator that may call.
#[derive(Clone, Debug)]
pub struct Admission {
    /// What it may do, by its newest login.
    pub role: Role,
    /// What it may do it to.
    pub scope: Scope,
    /// Cancelled when it no longer may.
    pub calls: CancellationToken,
}

/// Lost commands of one node that a revocation ends at once. Each waits in the outbox of the node's session, which has
/// room for some hundred frames.
const MOST_TOLD: usize = 128;

/// Why an operator's call is refused, though its certificate is good.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum OperatorRefusal {
    /// The hub's data is older than its certificate.
    #[error("the hub does not know this operator")]
    Unknown,
    /// It was revoked.
    #[error("this operator has been revoked")]
    Revoked,
    /// The operator logged in again, with another key.
    #[error("this login has been replaced by a newer one of the same operator")]
    Replaced,
}

struct Known {
    record: OperatorRecord,
    calls: CancellationToken,
}

/// What is known of operators.
#[derive(Default)]
struct Memory {
    known: HashMap<String, Known>,
    /// Revocations that the store does not have yet, by name: of known operators, and of those that
    /// somebody is revoking at this moment.
    unrecorded: HashMap<String, Unrecorded>,
}

#[derive(Clone)]
struct Unrecorded {
    at_ms: i64,
    audit: NewAudit,
}

/// See the module.
pub struct Operators {
    memory: Mutex<Memory>,
    store: Arc<dyn Store>,
    relay: Arc<Relay>,
    registry: Arc<Registry>,
    events: Arc<EventBus>,
    /// One change at a time, from the store's answer to memory.
    order: tokio::sync::Mutex<()>,
    /// A revocation was not recorded.
    record_again: Notify,
}

impl Operators {
    /// The operators of the store.
    ///
    /// # Errors
    /// Those of the store.
    pub async fn load(
        store: Arc<dyn Store>,
        relay: Arc<Relay>,
        registry: Arc<Registry>,
        events: Arc<EventBus>,
    ) -> Result<Arc<Self>, StoreError> {
        let records = store.operators().await?;
        let operators = Self {
            memory: Mutex::default(),
            store,
            relay,
            registry,
            events,
            order: tokio::sync::Mutex::default(),
            record_again: Notify::new(),
        };
        for record in records.iter().filter(|record| record.revoked_at_ms.is_some()) {
            // A command that an earlier run of the hub left open, if that one was cut off.
            operators.relay.end_of_actor(&record.name, REVOKED);
        }
        operators.apply(records);
        Ok(Arc::new(operators))
    }

    /// Held for map operations only.
    fn lock(&self) -> MutexGuard<'_, Memory> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the holder of a certificate for this name and key may call.
    ///
    /// # Errors
    /// See [`OperatorRefusal`].
    pub fn admit(&self, name: &str, key: &KeyHash) -> Result<Admission, OperatorRefusal> {
        let memory = self.lock();
        let Known { record, calls } = memory.known.get(name).ok_or(OperatorRefusal::Unknown)?;
        if record.revoked_at_ms.is_some() {
            return Err(OperatorRefusal::Revoked);
        }
        if record.key != *key {
            return Err(OperatorRefusal::Replaced);
        }
        Ok(Admission { role: record.role, scope: record.scope.clone(), calls: calls.clone() })
    }

    /// Ends the commands of an operator that is revoked: what began while it was being revoked may not
    /// have been seen then.
    pub fn end_if_revoked(&self, name: &str) {
        let revoked = |known: &Known| known.record.revoked_at_ms.is_some();
        let revoked = self.lock().known.get(name).is_some_and(revoked);
        if revoked {
            self.relay.end_of_actor(name, REVOKED);
        }
    }

    /// Takes over what the store has of this operator, after its login.
    ///
    /// # Errors
    /// Those of the store.
    pub async fn logged_in(&self, name: &str) -> Result<(), StoreError> {
        let _order = self.order.lock().await;
        let mut records = self.store.operators().await?;
        records.retain(|record| record.name == name);
        self.apply(records);
        Ok(())
    }

    /// Makes memory what the store says of these operators.
    pub(crate) fn apply(&self, records: Vec<OperatorRecord>) {
        let mut memory = self.lock();
        records.into_iter().for_each(|record| memory.apply(record));
    }

    /// Revokes an operator and the invites in its name: its calls and commands end at once.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] in [`DecisionError::Store`]; [`DecisionError::NotRecorded`], after which
    /// it is tried again until the store has it.
    pub async fn revoke(&self, name: &str, by: &Actor) -> Result<(), DecisionError> {
        let now = unix_ms();
        let audit = by.audit(now, "operator.revoked", name, json!({}));
        self.mark_revoked(name, Unrecorded { at_ms: now, audit });
        match self.record_revocation(name).await {
            Ok(()) => {}
            Err(error @ StoreError::NotFound { .. }) => return Err(error.into()),
            Err(error) => {
                let mut memory = self.lock();
                if memory.known.contains_key(name) {
                    self.record_again.notify_one();
                    return Err(DecisionError::NotRecorded(error));
                }
                // There was nothing to put an end to, so nothing is in force.
                memory.unrecorded.remove(name);
                return Err(error.into());
            }
        }
        tracing::info!(operator = %name, by = %by.name, "operator revoked");
        Ok(())
    }

    /// Ends an operator's calls and commands.
    fn mark_revoked(&self, name: &str, revocation: Unrecorded) {
        let mut memory = self.lock();
        let at_ms = revocation.at_ms;
        memory.unrecorded.entry(name.to_owned()).or_insert(revocation);
        let Some(Known { record, calls }) = memory.known.get_mut(name) else { return };
        record.revoked_at_ms.get_or_insert(at_ms);
        calls.cancel();
        drop(memory);
        self.relay.end_of_actor(name, REVOKED);
        self.events.publish(Kind::OperatorRevoked, NewEvent::of_mesh().with("operator", name));
    }

    /// Records the revocation of an operator, if there is one that is not recorded.
    ///
    /// # Errors
    /// Those of the store. It is kept then, unless there is no such operator.
    pub async fn record_revocation(&self, name: &str) -> Result<(), StoreError> {
        let _order = self.order.lock().await;
        let Some(Unrecorded { at_ms, audit }) = self.lock().unrecorded.get(name).cloned() else {
            return Ok(());
        };
        let recorded = self.store.revoke_operator(name.to_owned(), at_ms, audit).await;
        if matches!(recorded, Ok(_) | Err(StoreError::NotFound { .. })) {
            self.lock().unrecorded.remove(name);
        }
        // What was lost, and may go on where it was. A node that is away hears it when it is back, and of more than
        // its session has room for in its next one.
        for (task, node) in to_tell(recorded?) {
            if let Some(session) = self.registry.get(node).and_then(|view| view.session) {
                session.send(cancel_frame(task, 0, Duration::ZERO)).ok();
            }
        }
        Ok(())
    }

    /// Waits until a revocation was not recorded. For one waiter.
    pub async fn unrecorded(&self) {
        self.record_again.notified().await;
    }

    /// Offers revocations that were not recorded to the store again; returns how many it took.
    ///
    /// # Errors
    /// Those of the store, if it did not take all of them.
    pub async fn record_revocations(&self) -> Result<usize, StoreError> {
        let names: Vec<String> = self.lock().unrecorded.keys().cloned().collect();
        let (mut recorded, mut failed) = (0, None);
        for name in names {
            match self.record_revocation(&name).await {
                Ok(()) => {
                    recorded += 1;
                    tracing::info!(operator = %name, "a revocation was recorded late");
                }
                Err(error) => failed = Some(error),
            }
        }
        failed.map_or(Ok(recorded), Err)
    }
}

impl Memory {
    /// Makes memory what the store says of an operator. A login that is no longer the newest loses its
    /// calls; only a login with another key, after the revocation was recorded, lifts that.
    fn apply(&mut self, mut record: OperatorRecord) {
        if let Some(unrecorded) = self.unrecorded.get(&record.name) {
            record.revoked_at_ms.get_or_insert(unrecorded.at_ms);
        }
        match self.known.get_mut(&record.name) {
            Some(old) => {
                if old.record.key == record.key {
                    record.revoked_at_ms = old.record.revoked_at_ms.or(record.revoked_at_ms);
                }
                if old.record != record {
                    old.calls.cancel();
                    *old = Known::new(record);
                }
            }
            None => {
                self.known.insert(record.name.clone(), Known::new(record));
            }
        }
    }
}

impl Known {
    fn new(record: OperatorRecord) -> Self {
        Self { record, calls: CancellationToken::new() }
    }
}

/// Those of these lost commands that are ended at once: the latest of each node.
fn to_tell(lost: Vec<(TaskId, NodeId)>) -> impl Iterator<Item = (TaskId, NodeId)> {
    let mut told: HashMap<NodeId, usize> = HashMap::new();
    lost.into_iter().rev().filter(move |(_, node)| {
        let told = told.entry(*node).or_default();
        *told += 1;
        *told <= MOST_TOLD
    })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use cortex_shared::labels::Labels;
    use cortex_shared::secret::InviteToken;
    use cortex_shared::tasks::TaskScope;

    use super::*;
    use crate::events::EventLimits;
    use crate::store::fault::{Fault, FaultStore, Faults};
    use crate::store::history::{HistoryLimits, HistoryStore};
    use crate::store::sqlite::SqliteStore;
    use crate::store::{Caller, InviteKind, NewInvite, OperatorRedemption};
    use crate::task::history::History;
    use crate::task::relay::Deadlines;
    use crate::task::spool::{Spool, SpoolLimits};
    use crate::worker::{Supervisor, revocations};

    /// Operators on a store that does as it is told.
    struct Fixture {
        _folder: tempfile::TempDir,
        store: Arc<SqliteStore>,
        faults: Faults,
        operators: Arc<Operators>,
        scope: TaskScope,
    }

    async fn fixture() -> Fixture {
        let folder = tempfile::tempdir().unwrap();
        let scope = TaskScope::new();
        let store = SqliteStore::open(folder.path().join("hub.db"), &scope).await.unwrap();
        let (store, faults) = (Arc::new(store), Faults::default());
        let faulty = Arc::new(FaultStore::new(Arc::clone(&store) as _, faults.clone()));
        let spool = Spool::open(folder.path().join("tasks"), SpoolLimits::default(), &scope);
        let history = HistoryStore::open(folder.path().join("history.db"), &scope).await.unwrap();
        let history = History::start(history, HistoryLimits::default(), &scope);
        let deadlines = Deadlines { start: Duration::from_secs(9), resume: Duration::from_secs(9) };
        let store_of_relay = Arc::clone(&faulty) as _;
        let events = EventBus::in_memory(EventLimits::default());
        let told = Arc::clone(&events);
        let relay = Relay::new(
            store_of_relay,
            spool.unwrap(),
            history,
            told,
            scope.clone(),
            deadlines,
            Default::default(),
        );
        let registry = Arc::new(Registry::new(Vec::new()));
        let operators = Operators::load(faulty, relay, registry, events).await.unwrap();
        Fixture { _folder: folder, store, faults, operators, scope }
    }

    impl Fixture {
        async fn invite(&self, name: &str) -> InviteToken {
            let token = InviteToken::generate();
            let invite = NewInvite {
                id: token.id().clone(),
                secret_hash: token.secret_hash(),
                kind: InviteKind::Operator(Role::Admin),
                max_uses: 1,
                expires_at_ms: i64::MAX,
                created_at_ms: 0,
                created_by: "local".into(),
                labels: Labels::new(),
                name_pattern: name.into(),
                workspaces: Default::default(),
                sources: Default::default(),
                owner: String::new(),
                scope: Labels::new(),
            };
            let audit = Actor::hub().audit(0, "invite.created", name, json!({}));
            self.store.create_invite(invite, audit).await.unwrap();
            token
        }

        /// What the store does for a login; whether it let it in.
        async fn redeem(&self, token: &InviteToken, key: KeyHash) -> bool {
            let redemption = OperatorRedemption {
                invite: token.id().clone(),
                secret_hash: token.secret_hash(),
                key,
                caller: Caller { address: None },
                now_ms: 1,
            };
            self.store.redeem_operator(redemption).await.unwrap().is_ok()
        }

        async fn login(&self, name: &str, key: KeyHash) {
            let token = self.invite(name).await;
            assert!(self.redeem(&token, key).await);
            self.operators.logged_in(name).await.unwrap();
            assert!(self.operators.admit(name, &key).is_ok());
        }

        fn is_revoked(&self, name: &str, key: KeyHash) -> bool {
            matches!(self.operators.admit(name, &key), Err(OperatorRefusal::Revoked))
        }
    }

    #[tokio::test]
    async fn a_revocation_that_is_not_recorded_outlives_every_login_and_is_recorded_in_the_end() {
        let f = fixture().await;
        let (old, new) = ([1; 32], [2; 32]);
        f.login("ann", old).await;
        let unused = f.invite("ann").await;
        let supervisor = Supervisor::new(Arc::clone(&f.operators.events), f.scope.clone());
        revocations(&supervisor, &f.operators);
        f.faults.set(Fault::Fail);
        let refused = f.operators.revoke("ann", &Actor::hub()).await.unwrap_err();
        assert!(matches!(refused, DecisionError::NotRecorded(_)), "{refused}");
        assert!(f.is_revoked("ann", old));
        f.faults.set(Fault::Stall);
        f.faults.until_held("revoke_operator", 1).await;
        // Logins that were under way, hers among them.
        assert!(f.redeem(&unused, new).await);
        let records = f.store.operators().await.unwrap();
        assert_eq!(records[0].revoked_at_ms, None);
        f.operators.apply(records);
        assert!(f.is_revoked("ann", new));
        f.faults.set(Fault::None);
        f.login("bob", [3; 32]).await;
        assert!(f.is_revoked("ann", new), "the login of another changes nothing");
        assert!(f.store.operators().await.unwrap()[0].revoked_at_ms.is_some());
        // What an administrator decides after that counts.
        let token = f.invite("ann").await;
        assert!(!f.redeem(&token, new).await, "the key that was revoked is not taken again");
        f.login("ann", [4; 32]).await;
        f.scope.cancel();
    }

    #[tokio::test]
    async fn the_login_of_another_leaves_a_revocation_that_waits_for_the_store_alone() {
        let f = fixture().await;
        f.login("ann", [1; 32]).await;
        f.faults.set(Fault::Stall);
        let operators = Arc::clone(&f.operators);
        let calls = TaskScope::new();
        calls.spawn("revoke", async move {
            operators.revoke("ann", &Actor::hub()).await.unwrap();
        });
        f.faults.until_held("revoke_operator", 1).await;
        assert!(f.is_revoked("ann", [1; 32]));
        let records = f.store.operators().await.unwrap();
        f.operators.apply(records);
        assert!(f.is_revoked("ann", [1; 32]));
        f.faults.set(Fault::None);
        calls.finish().await;
        assert!(f.store.operators().await.unwrap()[0].revoked_at_ms.is_some());
    }

    #[test]
    fn a_node_with_many_lost_commands_takes_no_other_nodes_place() {
        let (busy, other) = (NodeId::new(), NodeId::new());
        let first = (TaskId::new(), other);
        let many: Vec<_> = (0..=MOST_TOLD).map(|_| (TaskId::new(), busy)).collect();
        let lost = std::iter::once(first).chain(many.iter().copied()).collect();
        let mut told: Vec<_> = to_tell(lost).collect();
        assert_eq!(told.pop(), Some(first));
        told.reverse();
        assert_eq!(told, many[1..], "the oldest of too many hears it in its node's next session");
    }

    #[tokio::test]
    async fn what_cannot_be_revoked_leaves_nothing_behind() {
        let f = fixture().await;
        let refused = f.operators.revoke("nobody", &Actor::hub()).await.unwrap_err();
        assert!(matches!(refused, DecisionError::Store(StoreError::NotFound { .. })), "{refused}");
        f.faults.set(Fault::Fail);
        let refused = f.operators.revoke("nobody", &Actor::hub()).await.unwrap_err();
        assert!(matches!(refused, DecisionError::Store(_)), "{refused}");
        assert!(f.operators.lock().unrecorded.is_empty());
    }
}
