//! The calls of the Operator service that replace the certificate authority.

use std::sync::Arc;

use cortex_proto::v1;
use cortex_shared::clock::unix_ms;
use serde_json::json;
use tonic::{Code, Status};

use super::auth::AdmittedOperator;
use super::detached::run_to_end;
use super::operator::OperatorService;
use super::status::{from_store, internal, invalid, refuse, with_hint};
use crate::enroll::authorities::{Ring, RotationError, RotationStep};
use crate::node::registry::Registry;
use crate::store::CaStage;

/// Names of nodes in one answer. How many there are is said as a number.
const MAX_NAMES: usize = 100;
/// Names of nodes in one sentence.
const MAX_NAMES_IN_TEXT: usize = 5;

/// How far the nodes have followed.
struct Progress {
    total: usize,
    /// Names of those that have no certificate of the authority that signs now.
    behind: Vec<String>,
}

impl Progress {
    fn of(registry: &Registry, ring: &Ring) -> Self {
        let nodes = registry.all().into_iter().map(|view| view.node);
        let nodes: Vec<_> = nodes.filter(|node| node.revoked_at_ms.is_none()).collect();
        let total = nodes.len();
        let behind = nodes.into_iter().filter(|node| !ring.has_moved(node));
        Self { total, behind: behind.map(|node| node.name).collect() }
    }

    fn moved(&self) -> usize {
        self.total - self.behind.len()
    }

    fn names(&self) -> String {
        let some = &self.behind[..self.behind.len().min(MAX_NAMES_IN_TEXT)];
        let more = if some.len() < self.behind.len() { ", …" } else { "" };
        format!("{}{more}", some.join(", "))
    }
}

pub(super) fn status(service: &OperatorService) -> v1::CaStatusResponse {
    let ring = service.authorities.ring();
    let progress = Progress::of(&service.registry, &ring);
    let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    v1::CaStatusResponse {
        stage: ring.stage().word().to_owned(),
        current_pin: ring.issuing().pin().to_string(),
        other_pin: ring.other().map(|ca| ca.pin().to_string()).unwrap_or_default(),
        nodes_moved: count(progress.moved()),
        nodes_total: count(progress.total),
        nodes_not_moved: progress.behind.into_iter().take(MAX_NAMES).collect(),
    }
}

pub(super) async fn rotate(
    service: &OperatorService,
    operator: &AdmittedOperator,
    request: v1::RotateCaRequest,
) -> Result<v1::CaStatusResponse, Status> {
    let step: RotationStep = request
        .stage
        .parse()
        .map_err(|()| invalid("the steps are prepare, issue, trust-only and retire"))?;
    let ring = service.authorities.ring();
    let progress = Progress::of(&service.registry, &ring);
    // A node that knows only the old authority will not believe a hub that proves itself by the new one.
    let strands = matches!(
        (step, ring.stage()),
        (RotationStep::TrustOnly, CaStage::Issuing) | (RotationStep::Retire, CaStage::TrustOnly)
    );
    if strands && !request.force && !progress.behind.is_empty() {
        let text = format!(
            "{} of {} nodes have no certificate of the new authority yet: {}",
            progress.behind.len(),
            progress.total,
            progress.names()
        );
        return Err(with_hint(
            refuse(Code::FailedPrecondition, "nodes_not_moved", text),
            "wait until they have connected or renewed, revoke or forget those that are gone, or take the step with --force: they may have to join again",
        ));
    }
    let detail = json!({
        "step": step.word(),
        "forced": strands && request.force,
        "nodes_moved": progress.moved(),
        "nodes_total": progress.total,
    });
    let line = operator.actor().audit(unix_ms(), "ca.rotated", "ca", detail);
    let (authorities, store) = (Arc::clone(&service.authorities), Arc::clone(&service.store));
    let advance = async move { authorities.advance(step, &*store, line).await };
    run_to_end(&service.scope, "ca rotation", advance).await?.map_err(from_rotation)?;
    Ok(status(service))
}

fn from_rotation(error: RotationError) -> Status {
    let text = error.to_string();
    match error {
        RotationError::OutOfOrder { next, .. } => with_hint(
            refuse(Code::FailedPrecondition, "out_of_order", text),
            &format!("cortex-hubd ca rotate {next}"),
        ),
        RotationError::Ca(error) => internal(&error),
        RotationError::Store(error) => from_store(error),
    }
}
