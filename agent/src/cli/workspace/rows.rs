//! A workspace and a member's progress, for people and as the JSON of scripts.

use cortex_proto::v1;
use cortex_shared::ids::{NodeId, WorkspaceId};
use serde::Serialize;

use super::lossy;
use super::node::Condition;
use crate::cli::printer::{self, Row};
use crate::sync::problem::Code;

/// One member's progress, for people and as the JSON of scripts.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct SyncRow {
    pub(super) workspace: String,
    workspace_id: String,
    pub(in crate::cli) state: &'static str,
    pub(in crate::cli) applied_seq: u64,
    pub(in crate::cli) head_seq: u64,
    pub(in crate::cli) files_done: u64,
    pub(in crate::cli) files_total: u64,
    bytes_done: u64,
    bytes_total: u64,
    entries: u64,
    conflicts: u64,
    pub(in crate::cli) pending_push: u64,
    path: String,
    halted_reason: Option<String>,
    problems: Vec<ProblemJson>,
    #[serde(flatten)]
    condition: Condition,
}

#[derive(Clone, Debug, Serialize)]
struct ProblemJson {
    path: String,
    code: String,
    message: String,
    first_seen_ms: i64,
}

impl SyncRow {
    pub(crate) fn of(status: &v1::SyncStatus) -> Self {
        let state = match v1::SyncState::try_from(status.state) {
            Ok(v1::SyncState::Idle) => "idle",
            Ok(v1::SyncState::Scanning) => "scanning",
            Ok(v1::SyncState::Uploading) => "uploading",
            Ok(v1::SyncState::Downloading) => "downloading",
            Ok(v1::SyncState::Applying) => "applying",
            Ok(v1::SyncState::Offline) => "offline",
            Ok(v1::SyncState::Paused) => "paused",
            Ok(v1::SyncState::Halted) => "halted",
            Err(_) => "unknown",
        };
        let problem = |problem: &v1::SyncProblem| ProblemJson {
            path: lossy(&problem.path),
            code: problem.code.clone(),
            message: problem.message.clone(),
            first_seen_ms: problem.first_seen_ms,
        };
        Self {
            workspace: status.workspace.clone(),
            workspace_id: WorkspaceId::from_slice(&status.workspace_id)
                .map(|id| id.to_string())
                .unwrap_or_default(),
            state,
            applied_seq: status.applied_seq,
            head_seq: status.head_seq,
            files_done: status.files_done,
            files_total: status.files_total,
            bytes_done: status.bytes_done,
            bytes_total: status.bytes_total,
            entries: status.entries,
            conflicts: status.conflicts,
            pending_push: status.pending_push,
            path: lossy(&status.root_path),
            halted_reason: (!status.halted_reason.is_empty()).then(|| status.halted_reason.clone()),
            problems: status.problems.iter().map(problem).collect(),
            condition: Condition::of(status),
        }
    }

    /// Why it is not at the head though it does nothing; none if it does something.
    pub(in crate::cli) fn why_at_rest(&self) -> Option<String> {
        let awaited = Code::SkillAwaited.as_str();
        let reason = self.halted_reason.as_deref().unwrap_or("no reason is known");
        let problem = self.problems.first().map_or_else(String::new, |problem| {
            let path = if problem.path.is_empty() { "" } else { &format!("{}: ", problem.path) };
            format!(" ({path}{})", problem.message)
        });
        match self.state {
            "paused" => Some("is paused".to_owned()),
            "halted" => Some(format!("is halted: {reason}")),
            "idle" if self.pending_push > 0 => {
                Some(format!("has {} changes that do not go{problem}", self.pending_push))
            }
            // What it waits for is done by another engine of the same node.
            "idle" if self.problems.iter().any(|problem| problem.code == awaited) => None,
            "idle" => Some(format!("stays at version {}{problem}", self.applied_seq)),
            _ => None,
        }
    }

    /// Whether it does something again by itself, later.
    pub(in crate::cli) fn tries_again(&self) -> bool {
        self.condition.next_retry_ms.is_some()
    }

    /// One line for people.
    pub(crate) fn sentence(&self) -> String {
        let mut text = format!(
            "{} in {}: {}, version {} of {}, {} entries",
            self.workspace, self.path, self.state, self.applied_seq, self.head_seq, self.entries
        );
        if self.pending_push > 0 {
            text.push_str(&format!(", {} changes to send", self.pending_push));
        }
        if self.conflicts > 0 {
            text.push_str(&format!(", {} conflicts", self.conflicts));
        }
        text.push_str(&self.condition.words());
        if let Some(reason) = &self.halted_reason {
            text.push_str(&format!(" ({reason})"));
        }
        if let [problem, rest @ ..] = self.problems.as_slice() {
            text.push_str(&format!("; {}: {}", problem.path, problem.message));
            if !rest.is_empty() {
                text.push_str(&format!(" and {} more problems", rest.len()));
            }
        }
        text
    }
}

impl Row for SyncRow {
    const COLUMNS: &'static [&'static str] =
        &["WORKSPACE", "STATE", "VERSION", "HEAD", "ENTRIES", "TO SEND", "CONFLICTS", "PATH"];

    fn cells(&self) -> Vec<String> {
        vec![
            self.workspace.clone(),
            self.state.to_owned(),
            self.applied_seq.to_string(),
            self.head_seq.to_string(),
            self.entries.to_string(),
            self.pending_push.to_string(),
            self.conflicts.to_string(),
            self.path.clone(),
        ]
    }
}

/// A workspace as the hub knows it.
#[derive(Clone, Debug, Serialize)]
pub(in crate::cli) struct WorkspaceRow {
    pub(in crate::cli) workspace_id: String,
    pub(in crate::cli) name: String,
    pub(in crate::cli) head_seq: u64,
    entries: u64,
    content_bytes: u64,
    created_at_ms: i64,
    pub(in crate::cli) members: Vec<MemberJson>,
}

#[derive(Clone, Debug, Serialize)]
pub(in crate::cli) struct MemberJson {
    pub(in crate::cli) node_id: String,
    pub(in crate::cli) node_name: String,
    pub(in crate::cli) online: bool,
    pub(in crate::cli) applied_seq: u64,
    pub(in crate::cli) status: Option<SyncRow>,
}

impl WorkspaceRow {
    pub(in crate::cli) fn of(info: v1::WorkspaceInfo) -> Self {
        let member = |member: v1::WorkspaceMember| MemberJson {
            node_id: NodeId::from_slice(&member.node_id)
                .map(|id| id.to_string())
                .unwrap_or_default(),
            node_name: member.node_name,
            online: member.online,
            applied_seq: member.applied_seq,
            status: member.status.as_ref().map(SyncRow::of),
        };
        Self {
            workspace_id: WorkspaceId::from_slice(&info.workspace_id)
                .map(|id| id.to_string())
                .unwrap_or_default(),
            name: info.name,
            head_seq: info.head_seq,
            entries: info.entries,
            content_bytes: info.content_bytes,
            created_at_ms: info.created_at_ms,
            members: info.members.into_iter().map(member).collect(),
        }
    }

    pub(in crate::cli) fn lines(&self) -> Vec<(&str, String)> {
        let mut lines = vec![
            ("workspace", format!("{} ({})", self.name, self.workspace_id)),
            ("version", self.head_seq.to_string()),
            ("content", format!("{} entries, {}", self.entries, printer::size(self.content_bytes))),
        ];
        for member in &self.members {
            let state = match (&member.status, member.online) {
                (_, false) => "offline".to_owned(),
                (Some(status), true) => status.state.to_owned(),
                (None, true) => "online".to_owned(),
            };
            let mut text = format!("{}: {state}, version {}", member.node_name, member.applied_seq);
            if let Some(status) = &member.status {
                if status.pending_push > 0 {
                    text.push_str(&format!(", {} changes to send", status.pending_push));
                }
                if let Some(reason) = &status.halted_reason {
                    text.push_str(&format!(" ({reason})"));
                }
                for problem in &status.problems {
                    text.push_str(&format!("; {}: {}", problem.path, problem.message));
                }
            }
            lines.push(("member", text));
        }
        lines
    }
}

impl Row for WorkspaceRow {
    const COLUMNS: &'static [&'static str] =
        &["NAME", "ID", "VERSION", "ENTRIES", "SIZE", "MEMBERS", "ONLINE"];

    fn cells(&self) -> Vec<String> {
        vec![
            self.name.clone(),
            self.workspace_id.clone(),
            self.head_seq.to_string(),
            self.entries.to_string(),
            printer::size(self.content_bytes),
            self.members.len().to_string(),
            self.members.iter().filter(|member| member.online).count().to_string(),
        ]
    }
}
