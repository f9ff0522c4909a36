//! What is made of a refused join or login: somebody who guesses is stopped, and people hear of it.
//!
//! The audit log gets a line for each refusal, but no more than people make: whoever guesses must not be
//! able to fill it. What a crash loses is the line of a refusal that nobody was told of yet.

use std::sync::Arc;

use cortex_shared::clock::unix_ms;
use cortex_shared::secret::{InviteId, InviteToken};
use serde_json::json;
use tokio::time::Instant;

use super::limits::JoinLimits;
use crate::store::{Actor, Caller, RedeemRefusal, Store};

/// See the module.
#[derive(Clone)]
pub struct Refusals {
    store: Arc<dyn Store>,
    limits: Arc<JoinLimits>,
}

impl Refusals {
    /// Refusals recorded here, within these limits.
    #[must_use]
    pub fn new(store: Arc<dyn Store>, limits: Arc<JoinLimits>) -> Self {
        Self { store, limits }
    }

    /// Those of one attempt.
    #[must_use]
    pub fn of(&self, token: &InviteToken, caller: Caller) -> RefusalsOf {
        RefusalsOf { refusals: self.clone(), invite: token.id().clone(), caller }
    }
}

/// The refusals of one attempt.
pub struct RefusalsOf {
    refusals: Refusals,
    invite: InviteId,
    caller: Caller,
}

impl RefusalsOf {
    /// Passes an outcome on; if it is a refusal, counts and records it first.
    ///
    /// # Errors
    /// That refusal.
    pub async fn watch<T>(&self, outcome: Result<T, RedeemRefusal>) -> Result<T, RedeemRefusal> {
        if let Err(refusal) = &outcome {
            let now = Instant::now();
            // Somebody who guesses is stopped, and nobody else: the limit is that invite's.
            let frozen = matches!(refusal, RedeemRefusal::Unknown)
                && self.refusals.limits.wrong_secret(&self.invite, now);
            self.record("invite.refused", refusal.word()).await;
            if frozen {
                self.record("invite.frozen", "too many wrong secrets").await;
            }
        }
        outcome
    }

    async fn record(&self, action: &'static str, reason: &str) {
        let Refusals { store, limits } = &self.refusals;
        if !limits.may_record_refusal(Instant::now()) {
            return;
        }
        let address = self.caller.shown();
        tracing::warn!(invite = %self.invite, address, reason, "{action}");
        let detail = json!({ "reason": reason, "address": address });
        let line = Actor::hub().audit(unix_ms(), action, self.invite.as_str(), detail);
        if let Err(error) = store.record_audit(line).await {
            tracing::warn!(%error, "a refused invite was not recorded");
        }
    }
}
