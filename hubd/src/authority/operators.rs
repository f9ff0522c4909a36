//! Every operator that has logged in, and what ends its calls.
//!
//! An operator has one login: a newer one replaces it, and with it the role, the scope and the key. So a
//! certificate counts only if its key is that of the newest login, which is also why a login after a
//! revocation does not bring the certificate back that was revoked.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cortex_shared::clock::unix_ms;
use cortex_shared::policy::Role;
use serde_json::json;
use tokio_util::sync::CancellationToken;

use super::nodes::DecisionError;
use crate::store::{Actor, KeyHash, OperatorRecord, Scope, Store, StoreError};
use crate::task::relay::Relay;

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

/// See the module.
pub struct Operators {
    known: Mutex<HashMap<String, Known>>,
    store: Arc<dyn Store>,
    relay: Arc<Relay>,
    /// One change at a time, from the store's answer to memory.
    order: tokio::sync::Mutex<()>,
}

impl Operators {
    /// The operators of the store.
    ///
    /// # Errors
    /// Those of the store.
    pub async fn load(store: Arc<dyn Store>, relay: Arc<Relay>) -> Result<Arc<Self>, StoreError> {
        let records = store.operators().await?;
        let operators =
            Self { known: Mutex::default(), store, relay, order: tokio::sync::Mutex::default() };
        operators.apply(records);
        Ok(Arc::new(operators))
    }

    /// Held for map operations only.
    fn lock(&self) -> MutexGuard<'_, HashMap<String, Known>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the holder of a certificate for this name and key may call.
    ///
    /// # Errors
    /// See [`OperatorRefusal`].
    pub fn admit(&self, name: &str, key: &KeyHash) -> Result<Admission, OperatorRefusal> {
        let known = self.lock();
        let Known { record, calls } = known.get(name).ok_or(OperatorRefusal::Unknown)?;
        if record.revoked_at_ms.is_some() {
            return Err(OperatorRefusal::Revoked);
        }
        if record.key != *key {
            return Err(OperatorRefusal::Replaced);
        }
        Ok(Admission { role: record.role, scope: record.scope.clone(), calls: calls.clone() })
    }

    /// Takes over what the store has, after a login.
    ///
    /// # Errors
    /// Those of the store.
    pub async fn reload(&self) -> Result<(), StoreError> {
        let _order = self.order.lock().await;
        self.apply(self.store.operators().await?);
        Ok(())
    }

    /// Revokes an operator and the invites in its name: its calls and commands end at once.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] in [`DecisionError::Store`]; [`DecisionError::NotRecorded`].
    pub async fn revoke(&self, name: &str, by: &Actor) -> Result<(), DecisionError> {
        let now = unix_ms();
        let known = self.mark_revoked(name, now);
        let audit = by.audit(now, "operator.revoked", name, json!({}));
        let _order = self.order.lock().await;
        match self.store.revoke_operator(name.to_owned(), now, audit).await {
            Ok(()) => {}
            Err(error @ StoreError::NotFound { .. }) => return Err(error.into()),
            Err(error) if known => return Err(DecisionError::NotRecorded(error)),
            Err(error) => return Err(error.into()),
        }
        // Again: a login that was under way may have brought it back in between.
        self.mark_revoked(name, now);
        tracing::info!(operator = %name, by = %by.name, "operator revoked");
        Ok(())
    }

    fn mark_revoked(&self, name: &str, now_ms: i64) -> bool {
        let mut known = self.lock();
        let Some(Known { record, calls }) = known.get_mut(name) else { return false };
        record.revoked_at_ms.get_or_insert(now_ms);
        calls.cancel();
        drop(known);
        self.relay.end_of_actor(name, "the operator who asked for it was revoked");
        true
    }

    /// Makes memory what the store says. A login that is no longer the newest loses its calls.
    pub(crate) fn apply(&self, records: Vec<OperatorRecord>) {
        let mut known = self.lock();
        for record in records {
            match known.get_mut(&record.name) {
                Some(old) if old.record == record => {}
                Some(old) => {
                    old.calls.cancel();
                    *old = Known::new(record);
                }
                None => {
                    known.insert(record.name.clone(), Known::new(record));
                }
            }
        }
    }
}

impl Known {
    fn new(record: OperatorRecord) -> Self {
        Self { record, calls: CancellationToken::new() }
    }
}
