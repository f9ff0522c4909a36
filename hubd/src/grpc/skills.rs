//! The calls of the Operator service about the library of skills.

use std::sync::Arc;

use cortex_proto::v1;
use cortex_shared::library::check_skill_name;
use cortex_shared::wire_path::WirePath;
use serde_json::json;
use tonic::{Code, Status};

use super::auth::AdmittedOperator;
use super::detached::run_to_end;
use super::operator::OperatorService;
use super::status::{from_store, invalid, refuse, with_hint};
use super::sync::status as from_sync;
use super::workspaces;
use crate::skills::{Promotion, SkillError, Surprise};
use crate::store::SkillVersion;

/// The largest number of a version that somebody may name.
const MAX_VERSION: u64 = u64::MAX >> 2;

pub(super) async fn promote(
    service: &OperatorService,
    operator: &AdmittedOperator,
    request: v1::PromoteSkillRequest,
) -> Result<v1::PromoteSkillResponse, Status> {
    let skill = skill_name(request.skill)?;
    let expected = expected(request.expected_version)?;
    let path = WirePath::new(request.path.to_vec())
        .map_err(|error| invalid(format!("invalid path: {error}")))?;
    let workspace = workspaces::find(service, &request.workspace, operator)?;
    everywhere(service, operator, &skill, "promote")?;
    let promotion = Promotion { workspace, path, skill, expected, by: operator.actor() };
    let (skills, wanted) = (Arc::clone(&service.skills), promotion.clone());
    let promote = async move { skills.promote(wanted).await };
    let promoted = run_to_end(&service.scope, "promotion", promote).await?.map_err(|error| {
        status(
            error,
            &format!(
                "cortex-agent workspace promote {} {} --as {} --expect",
                promotion.workspace.name, promotion.path, promotion.skill
            ),
        )
    })?;
    Ok(v1::PromoteSkillResponse {
        version: Some(wire(service, operator, &promoted.version)),
        unchanged: promoted.unchanged,
        link: promoted.link.into(),
    })
}

pub(super) async fn list(
    service: &OperatorService,
    operator: &AdmittedOperator,
    request: v1::ListSkillsRequest,
) -> Result<v1::ListSkillsResponse, Status> {
    let versions = service.skills.versions(None).await.map_err(|error| status(error, ""))?;
    let mut skills: Vec<v1::SkillVersion> = Vec::new();
    for version in versions.iter().rev() {
        // Newest first, so the first of each name is the one.
        if skills.last().is_none_or(|last| last.skill != version.skill) {
            skills.push(wire(service, operator, version));
        }
    }
    skills.retain(|skill| request.removed || skill.current);
    skills.reverse();
    Ok(v1::ListSkillsResponse { skills })
}

pub(super) async fn show(
    service: &OperatorService,
    operator: &AdmittedOperator,
    request: v1::ShowSkillRequest,
) -> Result<v1::ShowSkillResponse, Status> {
    let skill = skill_name(request.skill)?;
    let failed = |error| status(error, "");
    let versions = service.skills.versions(Some(&skill)).await.map_err(failed)?;
    if versions.is_empty() {
        return Err(failed(SkillError::NoSuchSkill { skill }));
    }
    let head = service.skills.head().await.map_err(failed)?;
    let applied = service.skills.applied().await.map_err(failed)?;
    let mut nodes = Vec::new();
    for view in service.registry.all() {
        if !operator.sees(&view.node) || view.node.revoked_at_ms.is_some() {
            continue;
        }
        let library = cortex_shared::ids::WorkspaceId::LIBRARY;
        nodes.push(v1::SkillNode {
            node_id: view.node.id.as_bytes().to_vec().into(),
            online: view.session.is_some(),
            up_to_date: applied.get(&view.node.id).copied().unwrap_or_default() >= head.seq,
            status: service.registry.sync_status(view.node.id, library),
            node_name: view.node.name,
        });
    }
    nodes.sort_by(|a, b| a.node_name.cmp(&b.node_name));
    let versions = versions.iter().rev().map(|version| wire(service, operator, version)).collect();
    Ok(v1::ShowSkillResponse { versions, nodes })
}

pub(super) async fn remove(
    service: &OperatorService,
    operator: &AdmittedOperator,
    request: v1::RemoveSkillRequest,
) -> Result<v1::RemoveSkillResponse, Status> {
    let skill = skill_name(request.skill)?;
    let expected = expected(request.expected_version)?;
    let (skills, by, name) = (Arc::clone(&service.skills), operator.actor(), skill.clone());
    let remove = async move { skills.remove(&name, expected, &by).await };
    let again = format!("cortex-agent skill remove {skill} --expect");
    let removed = run_to_end(&service.scope, "skill", remove).await?;
    let removed_version = removed.map_err(|error| status(error, &again))?.version;
    Ok(v1::RemoveSkillResponse { removed_version })
}

pub(super) async fn restore(
    service: &OperatorService,
    operator: &AdmittedOperator,
    request: v1::RestoreSkillRequest,
) -> Result<v1::RestoreSkillResponse, Status> {
    let skill = skill_name(request.skill)?;
    let expected = expected(request.expected_version)?;
    let wanted = (request.version > 0).then_some(request.version);
    if wanted.is_some_and(|version| version > MAX_VERSION) {
        return Err(invalid("there is no such version"));
    }
    everywhere(service, operator, &skill, "restore")?;
    let (skills, by, name) = (Arc::clone(&service.skills), operator.actor(), skill.clone());
    let restore = async move { skills.restore(&name, wanted, expected, &by).await };
    let again = format!("cortex-agent skill restore {skill} --expect");
    let restored = run_to_end(&service.scope, "skill", restore).await?;
    let version = restored.map_err(|error| status(error, &again))?;
    Ok(v1::RestoreSkillResponse { version: Some(wire(service, operator, &version)) })
}

fn skill_name(name: String) -> Result<String, Status> {
    check_skill_name(&name).map_err(|error| invalid(error.to_string()))?;
    Ok(name)
}

fn expected(version: Option<u64>) -> Result<Option<u64>, Status> {
    if version.is_some_and(|version| version > MAX_VERSION) {
        return Err(invalid("there is no such version"));
    }
    Ok(version)
}

/// Refuses a caller that does not command all nodes: all of them get what it promotes.
fn everywhere(
    service: &OperatorService,
    operator: &AdmittedOperator,
    skill: &str,
    wanted: &str,
) -> Result<(), Status> {
    if operator.scope.is_everything() {
        return Ok(());
    }
    let detail = json!({ "reason": "scope_too_narrow", "wanted": wanted });
    service.refusals.record(&operator.actor(), "skill.change_refused", skill, detail);
    let text =
        format!("every node has the library: an operator with a scope cannot {wanted} skills");
    Err(refuse(Code::PermissionDenied, "scope_too_narrow", text))
}

/// A version as this caller may know it.
fn wire(
    service: &OperatorService,
    caller: &AdmittedOperator,
    version: &SkillVersion,
) -> v1::SkillVersion {
    let origin = service.members.membership.get(version.origin.workspace);
    let origin = origin.filter(|origin| workspaces::sees(&service.registry, origin, caller));
    let path = origin.as_ref().map(|_| version.origin.path.as_bytes().to_vec());
    v1::SkillVersion {
        skill: version.skill.clone(),
        version: version.version,
        workspace: origin.map(|workspace| workspace.name).unwrap_or_default(),
        path: path.unwrap_or_default().into(),
        restored_from: version.restored_from.unwrap_or_default(),
        entries: version.entries,
        content_bytes: version.content_bytes,
        promoted_by: version.by.name.clone(),
        promoted_at_ms: version.at_ms,
        current: version.is_current(),
        ended_at_ms: version.ended_at_ms.unwrap_or_default(),
        kept_until_ms: service.skills.kept_until_ms(version).unwrap_or_default(),
        digest: version.digest.as_bytes().to_vec().into(),
    }
}

/// How a refusal looks to a caller; `again` is its command up to the version that it would have to expect.
fn status(error: SkillError, again: &str) -> Status {
    let text = error.to_string();
    match &error {
        SkillError::NotADirectory { .. } => with_hint(
            refuse(Code::NotFound, "no_such_directory", text),
            "send what is new on the node: cortex-agent workspace flush W",
        ),
        SkillError::PathChanged { .. } => with_hint(
            refuse(Code::Aborted, "path_changed", text),
            "try again when nobody writes there",
        ),
        SkillError::SkillChanged { surprise } => {
            let status = refuse(Code::Aborted, "skill_changed", text);
            match surprise {
                Surprise::None { skill, .. } => {
                    with_hint(status, &format!("look at it: cortex-agent skill show {skill}"))
                }
                Surprise::Version { current, .. } | Surprise::OtherOrigin { current } => {
                    let skill = &current.skill;
                    let hint = format!(
                        "look at it: cortex-agent skill show {skill}; to take its place: {again} {}",
                        current.version
                    );
                    with_hint(status, &hint)
                }
            }
        }
        SkillError::LinkOutside { .. } => refuse(Code::FailedPrecondition, "link_outside", text),
        SkillError::TooLarge { .. } | SkillError::PathTooLong { .. } => {
            refuse(Code::ResourceExhausted, "too_much", text)
        }
        SkillError::ContentLost { .. } => refuse(Code::DataLoss, "content_lost", text),
        SkillError::NoSuchSkill { .. } => with_hint(
            refuse(Code::NotFound, "skill_not_found", text),
            "list them: cortex-agent skill list",
        ),
        SkillError::NoSuchVersion { skill, .. } => with_hint(
            refuse(Code::NotFound, "version_unknown", text),
            &format!("see which there are: cortex-agent skill versions {skill}"),
        ),
        SkillError::IsCurrent { .. } => refuse(Code::FailedPrecondition, "is_current", text),
        SkillError::Forgotten { skill, .. } => with_hint(
            refuse(Code::NotFound, "version_forgotten", text),
            &format!("see which there are: cortex-agent skill versions {skill}"),
        ),
        SkillError::Store(_) | SkillError::Sync(_) => match error {
            SkillError::Store(error) => from_store(error),
            SkillError::Sync(error) => from_sync(error),
            _ => refuse(Code::Internal, "internal", text),
        },
    }
}
