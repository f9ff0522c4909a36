//! The calls of the Operator service about what a workspace was, and how much of that it keeps.

use std::sync::Arc;
use std::time::Duration;

use cortex_proto::v1;
use cortex_shared::clock::unix_ms;
use cortex_shared::entry::Kind;
use cortex_shared::wire_path::WirePath;
use serde_json::json;
use tonic::{Code, Status};

use super::auth::AdmittedOperator;
use super::detached::run_to_end;
use super::operator::OperatorService;
use super::status::{from_store, invalid, refuse, with_hint};
use super::sync::status;
use super::workspaces::{describe, find, find_whole};
use crate::store::workspace::{
    Author, LogEntry, LogFilter, LoggedChange, StoreError, WorkspaceSettings,
};
use crate::sync::SyncError;
use crate::sync::past::{Keep, NotRestored, Unsettled};

/// Changes of one answer.
const MAX_CHANGES: usize = 1000;
const DEFAULT_CHANGES: usize = 100;
/// Paths named in one answer.
const MAX_SKIPPED: usize = 1000;

/// A path that was named; `None` for the whole workspace.
fn path(bytes: &[u8]) -> Result<Option<WirePath>, Status> {
    if bytes.is_empty() {
        return Ok(None);
    }
    WirePath::new(bytes).map(Some).map_err(|error| invalid(format!("invalid path: {error}")))
}

fn wire_path(path: &WirePath) -> bytes::Bytes {
    path.as_bytes().to_vec().into()
}

pub(super) async fn log(
    service: &OperatorService,
    operator: &AdmittedOperator,
    request: v1::WorkspaceLogRequest,
) -> Result<v1::WorkspaceLogResponse, Status> {
    let workspace = find(service, &request.workspace, operator)?;
    let filter = LogFilter {
        path: path(&request.path)?,
        before: (request.before_seq > 0).then_some(request.before_seq),
        limit: match request.limit as usize {
            0 => DEFAULT_CHANGES,
            limit => limit.min(MAX_CHANGES),
        },
    };
    let content = service.content.workspace(workspace.id).await.map_err(status)?;
    let page = content.log(filter).await.map_err(status)?;
    let change = |entry: LogEntry| {
        let (node, operator) = match entry.author {
            // A node that is out of the caller's scope is not for it to know.
            Some(Author::Node(node)) => {
                let node = service.registry.get(node).filter(|view| operator.sees(&view.node));
                (node.map(|view| view.node.name).unwrap_or_default(), String::new())
            }
            Some(Author::Operator(name)) => (String::new(), name),
            None => Default::default(),
        };
        v1::LoggedChange {
            seq: entry.seq,
            at_ms: entry.at_ms,
            node,
            operator,
            path: wire_path(&entry.path),
            kind: match entry.change {
                LoggedChange::Created => v1::logged_change::Kind::Created,
                LoggedChange::Replaced => v1::logged_change::Kind::Replaced,
                LoggedChange::Deleted => v1::logged_change::Kind::Deleted,
                LoggedChange::Written => v1::logged_change::Kind::Written,
            }
            .into(),
            entry: match entry.kind {
                Kind::File => "file",
                Kind::ExecutableFile => "executable",
                Kind::Link => "link",
                Kind::Dir => "directory",
            }
            .to_owned(),
            size: entry.size,
            current: entry.current,
        }
    };
    Ok(v1::WorkspaceLogResponse {
        changes: page.entries.into_iter().map(change).collect(),
        next_before_seq: page.next_before.unwrap_or_default(),
    })
}

pub(super) async fn restore(
    service: &OperatorService,
    operator: &AdmittedOperator,
    request: v1::RestoreWorkspaceRequest,
) -> Result<v1::RestoreWorkspaceResponse, Status> {
    let workspace = find(service, &request.workspace, operator)?;
    let path = path(&request.path)?;
    if path.is_none() && request.version.is_none() {
        return Err(with_hint(
            invalid("which version is the whole workspace to have?"),
            &format!("see which there are: cortex-agent workspace log {}", workspace.name),
        ));
    }
    if request.version.is_some_and(|version| version > u64::MAX >> 2) {
        return Err(invalid("there is no such version"));
    }
    let content = service.content.workspace(workspace.id).await.map_err(status)?;
    let (store, by, name) = (Arc::clone(&service.store), operator.actor(), operator.name.clone());
    let shown = path.as_ref().map_or_else(|| ".".to_owned(), ToString::to_string);
    let detail = json!({
        "workspace_id": workspace.id, "path": shown, "version": request.version,
    });
    let audit = by.audit(unix_ms(), "workspace.restored", workspace.name.clone(), detail);
    let restore = async move {
        store.record_audit(audit).await.map_err(from_store)?;
        content.restore(path, request.version, &name).await.map_err(|error| {
            let hint = format!("cortex-agent workspace log {} {shown}", workspace.name);
            match &error {
                SyncError::Store(StoreError::BeyondHead { .. }) => {
                    with_hint(refuse(Code::NotFound, "version_unknown", error.to_string()), &hint)
                }
                SyncError::Store(
                    StoreError::VersionForgotten { .. } | StoreError::NothingBefore { .. },
                ) => with_hint(status(error), &format!("see what is kept: {hint}")),
                _ => status(error),
            }
        })
    };
    let done = run_to_end(&service.scope, "restore", restore).await??;
    let skipped = done.skipped.iter().take(MAX_SKIPPED).map(|(path, why)| v1::SkippedPath {
        path: wire_path(path),
        reason: word(*why).to_owned(),
    });
    Ok(v1::RestoreWorkspaceResponse {
        version: done.version,
        restored: done.restored,
        skipped: skipped.collect(),
        skipped_count: done.skipped.len() as u64,
    })
}

fn word(why: NotRestored) -> &'static str {
    match why {
        NotRestored::Forgotten => "forgotten",
        NotRestored::Changed => "changed",
        NotRestored::InTheWay => "in_the_way",
        NotRestored::ContentLost => "content_lost",
    }
}

pub(super) async fn resolve(
    service: &OperatorService,
    operator: &AdmittedOperator,
    request: v1::ResolveConflictRequest,
) -> Result<v1::ResolveConflictResponse, Status> {
    let workspace = find(service, &request.workspace, operator)?;
    let path = path(&request.path)?.ok_or_else(|| invalid("which path?"))?;
    let keep = match request.keep() {
        v1::KeepSide::Theirs => Keep::Theirs,
        v1::KeepSide::Mine => Keep::Mine,
        v1::KeepSide::Both => Keep::Both,
        v1::KeepSide::Unspecified => return Err(invalid("which side is to be kept?")),
    };
    let content = service.content.workspace(workspace.id).await.map_err(status)?;
    let (store, by, name) = (Arc::clone(&service.store), operator.actor(), operator.name.clone());
    let detail = json!({
        "workspace_id": workspace.id, "path": path.to_string(), "keep": format!("{keep:?}"),
    });
    let audit = by.audit(unix_ms(), "workspace.conflict_resolved", workspace.name.clone(), detail);
    let asked = path.clone();
    let resolve = async move {
        let settled = content.resolve(&asked, keep, &name).await.map_err(status)?;
        if settled.is_ok() {
            store.record_audit(audit).await.map_err(from_store)?;
        }
        Ok::<_, Status>(settled)
    };
    let copies = match run_to_end(&service.scope, "resolve", resolve).await?? {
        Ok(copies) => copies,
        Err(Unsettled::None) => {
            return Err(with_hint(
                refuse(Code::NotFound, "no_conflict", format!("there is no conflict at {path}")),
                &format!("list them: cortex-agent workspace conflicts {}", workspace.name),
            ));
        }
        Err(Unsettled::Several(copies)) => {
            let copies: Vec<String> = copies.iter().map(ToString::to_string).collect();
            let text = format!("{path} has several copies: name one of {}", copies.join(", "));
            return Err(refuse(Code::FailedPrecondition, "several_copies", text));
        }
        Err(Unsettled::Refused(at, why)) => {
            let text = match why {
                NotRestored::Changed => format!("{at} changed just now"),
                NotRestored::InTheWay => format!("a directory stands at {at}"),
                NotRestored::ContentLost | NotRestored::Forgotten => {
                    format!("the content for {at} is not there")
                }
            };
            return Err(refuse(Code::Aborted, word(why), text));
        }
    };
    Ok(v1::ResolveConflictResponse { copies: copies.iter().map(wire_path).collect() })
}

pub(super) async fn show(
    service: &OperatorService,
    operator: &AdmittedOperator,
    request: v1::ShowWorkspaceRequest,
) -> Result<v1::ShowWorkspaceResponse, Status> {
    let workspace = find(service, &request.workspace, operator)?;
    let content = service.content.workspace(workspace.id).await.map_err(status)?;
    let usage = content.usage().await.map_err(status)?;
    let settings = content.settings().await.map_err(status)?;
    Ok(v1::ShowWorkspaceResponse {
        workspace: Some(describe(service, &workspace, operator).await?),
        settings: Some(wire_settings(&settings)),
        stored_bytes: usage.pack_bytes,
        packs: usage.packs,
        old_versions: usage.old_versions,
        oldest_version: usage.oldest_version,
    })
}

fn wire_settings(settings: &WorkspaceSettings) -> v1::WorkspaceSettings {
    v1::WorkspaceSettings {
        quota_bytes: settings.quota_bytes.unwrap_or_default(),
        keep_for_ms: u64::try_from(settings.keep_for.as_millis()).unwrap_or(u64::MAX),
        keep_versions: settings.keep_versions,
    }
}

pub(super) async fn set(
    service: &OperatorService,
    operator: &AdmittedOperator,
    request: v1::SetWorkspaceRequest,
) -> Result<v1::WorkspaceSettings, Status> {
    let workspace = find_whole(service, &request.workspace, operator, "change")?;
    let content = service.content.workspace(workspace.id).await.map_err(status)?;
    let mut settings = content.settings().await.map_err(status)?;
    if let Some(bytes) = request.quota_bytes {
        settings.quota_bytes = (bytes > 0).then_some(bytes);
    }
    if let Some(ms) = request.keep_for_ms {
        settings.keep_for = Duration::from_millis(ms.min(u64::MAX >> 2));
    }
    settings.keep_versions = request.keep_versions.unwrap_or(settings.keep_versions);
    let detail = json!({
        "workspace_id": workspace.id,
        "quota_bytes": settings.quota_bytes,
        "keep_for_seconds": settings.keep_for.as_secs(),
        "keep_versions": settings.keep_versions,
    });
    let by = operator.actor();
    let audit = by.audit(unix_ms(), "workspace.settings", workspace.name.clone(), detail);
    let store = Arc::clone(&service.store);
    let set = async move {
        store.record_audit(audit).await.map_err(from_store)?;
        content.set_settings(settings).await.map_err(status)
    };
    run_to_end(&service.scope, "workspace", set).await??;
    Ok(wire_settings(&settings))
}
