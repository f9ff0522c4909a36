//! The calls of the Operator service that decide about nodes and operators, and those of the audit log.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use cortex_proto::v1;
use cortex_shared::clock::unix_ms;
use cortex_shared::policy::{Bound, Mode};
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use tonic::{Code, Status};

use super::auth::AdmittedOperator;
use super::convert;
use super::detached::run_to_end;
use super::operator::{BoxStream, OperatorService, node_info};
use super::status::{from_decision, from_naming, from_store, invalid, refuse, with_hint};
use crate::authority::audit::{AuditError, PAGE_LINES};
use crate::authority::nodes::{DEFAULT_PERMISSIVE, DecisionError, NodeDecisions};
use crate::store::{Actor, AuditLine, LabelChange, Node, NodePolicy, OperatorRecord};

/// Most labels one call changes.
const MAX_LABEL_CHANGES: usize = cortex_shared::labels::MAX_LABELS;
/// Most actions one listing of the audit log may name.
const MAX_ACTIONS: usize = 64;

/// Carries a decision about a node out, and shows the node as it is then.
async fn decide<F>(
    service: &OperatorService,
    operator: &AdmittedOperator,
    node: Node,
    decision: impl FnOnce(Arc<NodeDecisions>, Node, Actor) -> F,
) -> Result<v1::NodeInfo, Status>
where
    F: Future<Output = Result<(), DecisionError>> + Send + 'static,
{
    let decision = decision(Arc::clone(&service.decisions), node.clone(), operator.actor());
    run_to_end(&service.scope, "decision", decision).await?.map_err(from_decision)?;
    shown(service, &node)
}

/// The node as it is now.
fn shown(service: &OperatorService, node: &Node) -> Result<v1::NodeInfo, Status> {
    let view = service.registry.get(node.id).ok_or_else(|| {
        refuse(Code::NotFound, "node_not_found", format!("node {:?} was forgotten", node.name))
    })?;
    let running = service.relay.running_on(node.id);
    Ok(node_info(view, u32::try_from(running).unwrap_or(u32::MAX)))
}

pub(super) async fn label_node(
    service: &OperatorService,
    operator: &AdmittedOperator,
    request: v1::LabelNodeRequest,
) -> Result<v1::NodeInfo, Status> {
    if request.set.len() + request.remove.len() > MAX_LABEL_CHANGES {
        return Err(invalid(format!("one call changes {MAX_LABEL_CHANGES} labels at most")));
    }
    let remove: BTreeSet<String> = request.remove.into_iter().collect();
    for key in &remove {
        cortex_shared::labels::check_label(key, "").map_err(|error| invalid(error.to_string()))?;
    }
    let set = convert::set_labels(request.set)?;
    if let Some(key) = set.keys().find(|key| remove.contains(*key)) {
        return Err(invalid(format!("the label {key:?} is both set and removed")));
    }
    let may_change_scopes =
        operator.role == cortex_shared::policy::Role::Admin && operator.scope.is_everything();
    let node = service.node(&request.node, operator)?.node;
    let change = LabelChange { set, remove, may_change_scopes };
    decide(service, operator, node, |decisions, node, by| async move {
        decisions.label(&node, change, &by).await
    })
    .await
}

pub(super) async fn rename_node(
    service: &OperatorService,
    operator: &AdmittedOperator,
    request: v1::RenameNodeRequest,
) -> Result<v1::NodeInfo, Status> {
    let name = convert::name(request.name)?;
    let node = service.node(&request.node, operator)?.node;
    let (decisions, by, shown_node) =
        (Arc::clone(&service.decisions), operator.actor(), node.clone());
    let rename = async move { decisions.rename(&node, name, &by).await };
    run_to_end(&service.scope, "decision", rename).await?.map_err(|error| match error {
        DecisionError::Store(error) => from_naming(error, &operator.scope),
        error => from_decision(error),
    })?;
    shown(service, &shown_node)
}

pub(super) async fn cordon_node(
    service: &OperatorService,
    operator: &AdmittedOperator,
    request: v1::CordonNodeRequest,
) -> Result<v1::NodeInfo, Status> {
    let node = service.node(&request.node, operator)?.node;
    decide(service, operator, node, move |decisions, node, by| async move {
        decisions.cordon(&node, request.cordoned, &by).await
    })
    .await
}

pub(super) async fn revoke_node(
    service: &OperatorService,
    operator: &AdmittedOperator,
    request: v1::RevokeNodeRequest,
) -> Result<v1::NodeInfo, Status> {
    let reason = convert::reason(request.reason)?;
    let node = service.node(&request.node, operator)?.node;
    decide(service, operator, node, |decisions, node, by| async move {
        decisions.revoke(&node, &reason, &by).await
    })
    .await
}

pub(super) async fn forget_node(
    service: &OperatorService,
    operator: &AdmittedOperator,
    request: v1::ForgetNodeRequest,
) -> Result<v1::ForgetNodeResponse, Status> {
    let node = service.node(&request.node, operator)?.node;
    let (decisions, by) = (Arc::clone(&service.decisions), operator.actor());
    let forget = async move { decisions.forget(&node, &by).await };
    run_to_end(&service.scope, "decision", forget).await?.map_err(from_decision)?;
    Ok(v1::ForgetNodeResponse {})
}

pub(super) async fn set_node_policy(
    service: &OperatorService,
    operator: &AdmittedOperator,
    request: v1::SetNodePolicyRequest,
) -> Result<v1::NodeInfo, Status> {
    let node = service.node(&request.node, operator)?.node;
    let policy = policy(&request, &node.name, service.permissive_longest)?;
    decide(service, operator, node, |decisions, node, by| async move {
        decisions.set_policy(&node, policy, &by).await
    })
    .await
}

/// The policy that is asked for. What allows more than strict without network has a reason, and
/// permissive an end.
fn policy(
    request: &v1::SetNodePolicyRequest,
    node: &str,
    longest: Duration,
) -> Result<NodePolicy, Status> {
    let reason = convert::reason(request.reason.clone())?;
    let bound = convert::bound(request.mode, request.network);
    if bound == Bound::LEAST {
        return Ok(NodePolicy { bound, until_ms: None, reason });
    }
    if reason.is_empty() {
        let wanted = match bound.mode {
            Mode::Permissive => "permissive",
            Mode::Strict => "strict --net full",
        };
        return Err(with_hint(
            refuse(
                Code::InvalidArgument,
                "reason_needed",
                "a policy that is permissive or allows the network needs a reason, which stands in \
                 the audit log",
            ),
            &format!("give it: cortex-hubd policy set {node} {wanted} --reason TEXT"),
        ));
    }
    let length = match (request.for_ms, bound.mode) {
        (0, Mode::Strict) => return Ok(NodePolicy { bound, until_ms: None, reason }),
        (0, Mode::Permissive) => DEFAULT_PERMISSIVE.min(longest),
        (ms, _) => Duration::from_millis(ms),
    };
    if length > longest {
        let longest = match longest.as_secs() {
            seconds if seconds % 86_400 == 0 => format!("{} days", seconds / 86_400),
            seconds => format!("{seconds} seconds"),
        };
        return Err(invalid(format!("a policy with an end lasts {longest} at most")));
    }
    let until_ms = unix_ms() + i64::try_from(length.as_millis()).unwrap_or(i64::MAX);
    Ok(NodePolicy { bound, until_ms: Some(until_ms), reason })
}

pub(super) async fn list_operators(
    service: &OperatorService,
) -> Result<v1::ListOperatorsResponse, Status> {
    let operators = service.store.operators().await.map_err(from_store)?;
    let info = |operator: OperatorRecord| v1::OperatorInfo {
        name: operator.name,
        role: operator.role.to_string(),
        scope: operator.scope.0.into_iter().collect(),
        created_at_ms: operator.created_at_ms,
        revoked_at_ms: operator.revoked_at_ms.unwrap_or_default(),
    };
    Ok(v1::ListOperatorsResponse { operators: operators.into_iter().map(info).collect() })
}

pub(super) async fn revoke_operator(
    service: &OperatorService,
    operator: &AdmittedOperator,
    request: v1::RevokeOperatorRequest,
) -> Result<v1::RevokeOperatorResponse, Status> {
    let name = convert::name(request.name)?;
    let (operators, by) = (Arc::clone(&service.operators), operator.actor());
    let revoke = async move { operators.revoke(&name, &by).await };
    run_to_end(&service.scope, "decision", revoke).await?.map_err(from_decision)?;
    Ok(v1::RevokeOperatorResponse {})
}

/// Lines of the audit log, a page at a time: the next one is read when the last one has been sent.
pub(super) fn list_audit(
    service: &OperatorService,
    request: v1::ListAuditRequest,
) -> Result<BoxStream<v1::AuditEntry>, Status> {
    if request.actions.len() > MAX_ACTIONS {
        return Err(invalid(format!("one listing names {MAX_ACTIONS} actions at most")));
    }
    let actions: BTreeSet<String> = request.actions.into_iter().collect();
    let limit = match request.limit {
        0 => usize::MAX,
        limit => usize::try_from(limit).unwrap_or(usize::MAX),
    };
    let store = Arc::clone(&service.store);
    let pages = stream::try_unfold(Some(request.after_seq), move |after| {
        let store = Arc::clone(&store);
        async move {
            let Some(after) = after else { return Ok(None) };
            let lines = store.audit_page(Some(after), PAGE_LINES).await.map_err(from_store)?;
            let next = lines.last().map(|line| line.seq);
            Ok::<_, Status>(Some((stream::iter(lines.into_iter().map(Ok)), next)))
        }
    });
    let lines = pages
        .try_flatten()
        .try_filter(move |line: &AuditLine| {
            std::future::ready(actions.is_empty() || actions.contains(&line.action))
        })
        .map_ok(entry)
        .take(limit);
    Ok(Box::pin(lines))
}

fn entry(line: AuditLine) -> v1::AuditEntry {
    v1::AuditEntry {
        seq: line.seq,
        at_ms: line.at_ms,
        actor: line.actor,
        action: line.action,
        target: line.target,
        detail_json: line.detail,
        prev_hash: line.prev_hash.to_vec().into(),
        hash: line.hash.to_vec().into(),
    }
}

pub(super) async fn verify_audit(
    service: &OperatorService,
    operator: &AdmittedOperator,
    request: v1::VerifyAuditRequest,
) -> Result<v1::VerifyAuditResponse, Status> {
    let reason = convert::reason(request.accept_reason)?;
    let (audit, by) = (Arc::clone(&service.audit), operator.actor());
    let found = run_to_end(&service.scope, "audit", async move {
        if reason.is_empty() { audit.verify().await } else { audit.accept(&reason, &by).await }
    });
    let found = found.await?.map_err(|error| match error {
        AuditError::Store(error) => from_store(error),
        // Only an administrator asks, who has to mend it.
        AuditError::Mark { path, source } => {
            let text = format!("the mark of the audit log, {path}, cannot be used: {source}");
            let status = refuse(Code::FailedPrecondition, "audit_mark_unusable", text);
            with_hint(status, "see to it that the hub's user can read and write it")
        }
    })?;
    Ok(v1::VerifyAuditResponse {
        intact: found.problem.is_none(),
        entries: found.entries,
        first_bad_seq: found.problem.as_ref().map_or(0, |problem| problem.seq()),
        head_hash: found.head.hash.to_vec().into(),
        problem: found.problem.map(|problem| problem.to_string()).unwrap_or_default(),
    })
}
