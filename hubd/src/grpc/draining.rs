//! The call of the Operator service that ends this hub in order, for the next one.

use std::sync::Arc;
use std::time::Duration;

use cortex_proto::v1;
use cortex_shared::clock::unix_ms;
use serde_json::json;
use tonic::Status;

use super::auth::AdmittedOperator;
use super::detached::run_to_end;
use super::operator::OperatorService;
use super::status::{from_store, invalid};

/// Longest wait for commands: who wants to wait longer cordons nodes.
const MAX_WAIT: Duration = Duration::from_secs(24 * 3600);

/// Takes no new commands from now on, or takes them again; in the audit log first. Answers when the wait is
/// over: the hub itself waits beside it, and stops (`Hub::drained`). A caller that goes away ends nothing.
pub(super) async fn drain_hub(
    service: &OperatorService,
    operator: &AdmittedOperator,
    request: v1::DrainHubRequest,
) -> Result<v1::DrainHubResponse, Status> {
    let wait = match request.wait_ms {
        0 => service.drain_wait,
        ms => Duration::from_millis(ms),
    };
    if wait > MAX_WAIT {
        return Err(invalid("a drain waits for 24 hours at most"));
    }
    let running = service.relay.running();
    let wait_ms = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX);
    let action = if request.undo { "hub.drain_undone" } else { "hub.drained" };
    let detail = match request.undo {
        true => json!({}),
        false => json!({ "wait_ms": wait_ms, "running_tasks": running }),
    };
    let line = operator.actor().audit(unix_ms(), action, "hub", detail);
    let (store, relay) = (Arc::clone(&service.store), Arc::clone(&service.relay));
    let by = operator.name.clone();
    let draining = async move {
        store.record_audit(line).await?;
        if request.undo {
            relay.draining().undo();
            tracing::info!(%by, "commands are taken again");
        } else {
            relay.draining().begin(wait);
            tracing::info!(%by, running, wait_ms, "no new commands are taken");
        }
        Ok(())
    };
    run_to_end(&service.scope, "drain", draining).await?.map_err(from_store)?;
    let (relay, stopping) = (&service.relay, service.scope.token());
    let undone = tokio::select! {
        biased;
        () = relay.draining().undone() => true,
        () = relay.draining().over(|| relay.unfinished()) => false,
        () = stopping.cancelled() => false,
    };
    let running_tasks = u32::try_from(service.relay.unfinished()).unwrap_or(u32::MAX);
    Ok(v1::DrainHubResponse { running_tasks, undone })
}
