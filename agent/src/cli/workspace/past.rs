//! What a workspace was: `log`, `restore`; and how much of that it keeps: `show`, `set`, `delete`.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt as _;
use std::time::Duration;

use cortex_proto::v1;
use serde::Serialize;

use super::lossy;
use super::rows::WorkspaceRow;
use crate::cli::error::{CliError, Exit};
use crate::cli::printer::{self, Row};
use crate::cli::units::millis;
use crate::cli::{Global, Output, hub, node};

/// Changes of one question.
const PAGE: u32 = 1000;

/// A path of a workspace as the protocol has it; `.` is all of it.
pub(in crate::cli) fn wire_path(path: &OsStr) -> bytes::Bytes {
    let mut bytes = path.as_bytes();
    bytes = bytes.strip_prefix(b"./").unwrap_or(bytes);
    while let Some(shorter) = bytes.strip_suffix(b"/") {
        bytes = shorter;
    }
    if bytes == b"." { bytes::Bytes::new() } else { bytes::Bytes::copy_from_slice(bytes) }
}

/// One change of the past.
#[derive(Serialize)]
struct ChangeRow {
    version: u64,
    at_ms: i64,
    by: String,
    change: &'static str,
    entry: String,
    size: u64,
    path: String,
    /// Whether this is what stands there now.
    current: bool,
}

impl ChangeRow {
    fn of(change: v1::LoggedChange) -> Self {
        use v1::logged_change::Kind;
        let kind = match change.kind() {
            Kind::Created => "created",
            Kind::Replaced => "replaced",
            Kind::Deleted => "deleted",
            Kind::Written => "written",
            Kind::Unspecified => "unknown",
        };
        Self {
            version: change.seq,
            at_ms: change.at_ms,
            by: if change.operator.is_empty() {
                change.node
            } else {
                format!("operator {}", change.operator)
            },
            change: kind,
            entry: change.entry,
            size: change.size,
            path: lossy(&change.path),
            current: change.current,
        }
    }
}

impl Row for ChangeRow {
    const COLUMNS: &'static [&'static str] =
        &["VERSION", "TIME", "BY", "CHANGE", "ENTRY", "SIZE", "PATH"];

    fn cells(&self) -> Vec<String> {
        let is_file = matches!(self.entry.as_str(), "file" | "executable");
        vec![
            self.version.to_string(),
            printer::time(self.at_ms),
            if self.by.is_empty() { "-".to_owned() } else { self.by.clone() },
            self.change.to_owned(),
            self.entry.clone(),
            if is_file { printer::size(self.size) } else { "-".to_owned() },
            self.path.clone(),
        ]
    }
}

/// `workspace log`.
pub(super) async fn log(
    global: &Global,
    workspace: String,
    path: Option<OsString>,
    limit: usize,
    before: Option<u64>,
    output: Output,
) -> Result<(), CliError> {
    let mut client = hub::operator(global).await?;
    let path = path.as_deref().map(wire_path).unwrap_or_default();
    let mut rows: Vec<ChangeRow> = Vec::new();
    let mut before_seq = before.unwrap_or_default();
    while rows.len() < limit {
        let left = u32::try_from(limit - rows.len()).unwrap_or(PAGE).min(PAGE);
        let request = v1::WorkspaceLogRequest {
            workspace: workspace.clone(),
            path: path.clone(),
            before_seq,
            limit: left,
        };
        let page = client.workspace_log(hub::question(request)).await?.into_inner();
        rows.extend(page.changes.into_iter().map(ChangeRow::of));
        before_seq = page.next_before_seq;
        if before_seq == 0 {
            break;
        }
    }
    global.printer(output).list(&rows)?;
    if before_seq > 0 {
        let more = format!("note: there is more; go on with --before {before_seq}");
        printer::complain(&more, global.color);
    }
    Ok(())
}

#[derive(Serialize)]
struct RestoredJson {
    workspace: String,
    version: u64,
    restored: u64,
    skipped_count: u64,
    skipped: Vec<SkippedJson>,
}

#[derive(Serialize)]
struct SkippedJson {
    path: String,
    reason: String,
}

/// `workspace restore`.
pub(super) async fn restore(
    global: &Global,
    workspace: String,
    path: OsString,
    version: Option<u64>,
    output: Output,
) -> Result<(), CliError> {
    let mut client = hub::operator(global).await?;
    let request = v1::RestoreWorkspaceRequest {
        workspace: workspace.clone(),
        path: wire_path(&path),
        version,
    };
    // As long as it takes: a whole tree may be brought back.
    let done = client.restore_workspace(request).await?.into_inner();
    let skipped: Vec<SkippedJson> = done
        .skipped
        .iter()
        .map(|skipped| SkippedJson { path: lossy(&skipped.path), reason: skipped.reason.clone() })
        .collect();
    let mut sentence = match done.restored {
        0 => format!("nothing differs from version {}", done.version),
        1 => format!("1 path is as it was at version {}", done.version),
        some => format!("{some} paths are as they were at version {}", done.version),
    };
    for SkippedJson { path, reason } in &skipped {
        let why = match reason.as_str() {
            "forgotten" => "that version is no longer kept",
            "changed" => "it changed just now",
            "in_the_way" => "something else is in the way",
            "content_lost" => "its content was lost on the hub's disk",
            other => other,
        };
        sentence.push_str(&format!("\nnot {path}: {why}"));
    }
    if done.skipped_count > skipped.len() as u64 {
        let more = done.skipped_count - skipped.len() as u64;
        sentence.push_str(&format!("\nnor {more} more"));
    }
    let (version, restored, skipped_count) = (done.version, done.restored, done.skipped_count);
    let json = RestoredJson { workspace, version, restored, skipped_count, skipped };
    global.printer(output).say(&sentence, &json)?;
    if skipped_count == 0 {
        return Ok(());
    }
    Err(CliError::new(Exit::Failed, format!("{skipped_count} paths were not brought back")))
}

#[derive(Serialize)]
struct SettingsJson {
    /// Absent for no limit.
    quota_bytes: Option<u64>,
    keep_for_seconds: u64,
    keep_versions: u32,
}

impl SettingsJson {
    fn of(settings: &v1::WorkspaceSettings) -> Self {
        Self {
            quota_bytes: (settings.quota_bytes > 0).then_some(settings.quota_bytes),
            keep_for_seconds: settings.keep_for_ms / 1000,
            keep_versions: settings.keep_versions,
        }
    }

    fn lines(&self) -> Vec<(&'static str, String)> {
        let quota = self.quota_bytes.map_or_else(|| "none".to_owned(), printer::size);
        let duration = indicatif::HumanDuration(Duration::from_secs(self.keep_for_seconds));
        vec![
            ("quota", quota),
            ("keeps", format!("{duration}, at most {} old versions of a path", self.keep_versions)),
        ]
    }
}

#[derive(Serialize)]
struct ShownJson {
    #[serde(flatten)]
    workspace: WorkspaceRow,
    settings: SettingsJson,
    stored_bytes: u64,
    packs: u64,
    old_versions: u64,
    oldest_version: u64,
}

/// `workspace show`.
pub(super) async fn show(
    global: &Global,
    workspace: String,
    output: Output,
) -> Result<(), CliError> {
    let mut client = hub::operator(global).await?;
    let request = v1::ShowWorkspaceRequest { workspace };
    let shown = client.show_workspace(hub::question(request)).await?.into_inner();
    let json = ShownJson {
        workspace: WorkspaceRow::of(shown.workspace.unwrap_or_default()),
        settings: SettingsJson::of(&shown.settings.unwrap_or_default()),
        stored_bytes: shown.stored_bytes,
        packs: shown.packs,
        old_versions: shown.old_versions,
        oldest_version: shown.oldest_version,
    };
    let mut lines = json.workspace.lines();
    let stored = format!("{} in {} packs", printer::size(json.stored_bytes), json.packs);
    let past = format!(
        "{} old versions; complete since version {}",
        json.old_versions, json.oldest_version
    );
    lines.extend([("stored", stored), ("past", past)]);
    lines.extend(json.settings.lines());
    global.printer(output).show(&json, &lines)
}

/// What is to be changed; the rest stays.
pub(super) struct Changed {
    /// 0 for no limit.
    pub(super) quota_bytes: Option<u64>,
    pub(super) keep_for: Option<Duration>,
    pub(super) keep_versions: Option<u32>,
}

/// `workspace set`.
pub(super) async fn set(
    global: &Global,
    workspace: String,
    changed: Changed,
    output: Output,
) -> Result<(), CliError> {
    let mut client = hub::operator(global).await?;
    let request = v1::SetWorkspaceRequest {
        workspace,
        quota_bytes: changed.quota_bytes,
        keep_for_ms: changed.keep_for.map(millis),
        keep_versions: changed.keep_versions,
    };
    let settings = client.set_workspace(hub::question(request)).await?.into_inner();
    let settings = SettingsJson::of(&settings);
    global.printer(output).show(&settings, &settings.lines())
}

/// `workspace delete`.
pub(super) async fn delete(global: &Global, workspace: String, yes: bool) -> Result<(), CliError> {
    let deed = format!("remove workspace {workspace} with all its versions from the hub");
    node::confirm(&deed, yes, &format!("cortex-agent workspace delete {workspace} --yes"))?;
    let mut client = hub::operator(global).await?;
    // As long as it takes: its content goes with it.
    client.delete_workspace(v1::DeleteWorkspaceRequest { workspace }).await?;
    Ok(())
}

/// Reads a quota: a size, or `none`.
pub(super) fn parse_quota(text: &str) -> Result<u64, String> {
    if text == "none" { Ok(0) } else { crate::cli::units::parse_size(text) }
}

/// Reads a time to keep something, of which zero is one.
pub(super) fn parse_keep(text: &str) -> Result<Duration, String> {
    if matches!(text, "0" | "0s") {
        return Ok(Duration::ZERO);
    }
    crate::cli::units::parse_duration(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_taken_as_people_write_them() {
        for (written, path) in [
            ("a/b", "a/b"),
            ("./a", "a"),
            ("a/", "a"),
            ("a//", "a"),
            (".", ""),
            ("./", ""),
            ("-rf", "-rf"),
        ] {
            assert_eq!(wire_path(OsStr::new(written)), path.as_bytes(), "{written}");
        }
    }
}
