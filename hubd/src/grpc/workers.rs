//! The hub's background work, as administrators see it.

use cortex_proto::v1;
use tonic::{Code, Status};

use super::auth::AdmittedOperator;
use super::operator::OperatorService;
use super::status::{refuse, with_hint};
use crate::worker::{State, WorkerStatus};

/// Longest name that is repeated to whoever asked for it.
const MAX_NAME_BYTES: usize = 64;

pub(super) fn list(service: &OperatorService) -> v1::ListWorkersResponse {
    let workers = service.workers.list().into_iter().map(info).collect();
    v1::ListWorkersResponse { workers }
}

pub(super) async fn run(
    service: &OperatorService,
    caller: &AdmittedOperator,
    request: v1::RunWorkerRequest,
) -> Result<v1::WorkerInfo, Status> {
    tracing::info!(worker = %request.name.chars().take(MAX_NAME_BYTES).collect::<String>(), by = %caller.name, "a run was asked for");
    match service.workers.run(&request.name).await {
        Ok(status) => Ok(info(status)),
        Err(_) => {
            let name: String = request.name.chars().take(MAX_NAME_BYTES).collect();
            let status =
                refuse(Code::NotFound, "worker_not_found", format!("there is no worker {name:?}"));
            Err(with_hint(status, "list them: cortex-hubd worker list"))
        }
    }
}

fn info(status: WorkerStatus) -> v1::WorkerInfo {
    let millis = |time: std::time::Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
    let running_since_ms = match status.state {
        State::Running { since_ms } => since_ms,
        State::Waiting | State::Failing => 0,
    };
    let last = status.last;
    v1::WorkerInfo {
        name: status.name.to_owned(),
        purpose: status.purpose.to_owned(),
        period_ms: millis(status.period),
        state: status.state.to_string(),
        runs: status.runs,
        failures: status.failures,
        panics: status.panics,
        running_since_ms,
        last_began_ms: last.as_ref().map_or(0, |last| last.began_ms),
        last_took_ms: last.as_ref().map_or(0, |last| millis(last.took)),
        last_failed: last.as_ref().is_some_and(|last| last.error_id.is_some()),
        error_id: last.as_ref().and_then(|last| last.error_id.clone()).unwrap_or_default(),
        last_result: last.map(|last| last.result).unwrap_or_default(),
        next_run_ms: status.next_run_ms.unwrap_or_default(),
    }
}
