//! Workspaces in JSON.

use cortex_proto::v1;
use schemars::JsonSchema;
use serde::Serialize;

use super::{id, path, some, time};

/// Some of the workspaces.
#[derive(Serialize, JsonSchema)]
pub(in crate::http) struct Workspaces {
    pub(in crate::http) workspaces: Vec<Workspace>,
    /// For the next page; absent on the last.
    pub(in crate::http) next_cursor: Option<String>,
}

/// A tree of files that is kept equal on its members.
#[derive(Serialize, JsonSchema)]
pub(in crate::http) struct Workspace {
    workspace_id: String,
    name: String,
    head_seq: u64,
    entries: u64,
    content_bytes: u64,
    created_at_ms: i64,
    members: Vec<Member>,
}

/// A node's copy of a workspace.
#[derive(Serialize, JsonSchema)]
struct Member {
    node_id: String,
    node_name: String,
    online: bool,
    /// The newest version that it has, completely and durably.
    applied_seq: u64,
    /// Absent until the node has said something in this session.
    status: Option<Progress>,
}

/// What a member does at the moment.
#[derive(Clone, Copy, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
enum State {
    Idle,
    Scanning,
    Uploading,
    Downloading,
    Applying,
    Offline,
    Paused,
    Halted,
    Unknown,
}

/// What a member does with its own changes and those of others.
#[derive(Clone, Copy, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
enum MemberMode {
    TwoWay,
    SendOnly,
    ReceiveOnly,
    Mirror,
    Unknown,
}

/// How far a member is.
#[derive(Serialize, JsonSchema)]
struct Progress {
    state: State,
    mode: MemberMode,
    applied_seq: u64,
    /// The newest version that it knows of.
    head_seq: u64,
    files_done: u64,
    files_total: u64,
    bytes_done: u64,
    bytes_total: u64,
    bytes_per_second: u64,
    /// How long the rest takes at this rate.
    eta_ms: Option<u64>,
    conflicts: u64,
    /// Changes that the hub does not have yet.
    pending_push: u64,
    /// Deletions among them that wait for somebody's word.
    held_deletions: u64,
    /// Why it is halted, with the remedy.
    halted_reason: Option<String>,
    problems: Vec<PathProblem>,
}

/// Why a path of a member is behind.
#[derive(Serialize, JsonSchema)]
struct PathProblem {
    path: String,
    code: String,
    message: String,
    first_seen_ms: i64,
}

impl Progress {
    fn of(status: v1::SyncStatus) -> Self {
        let state = match v1::SyncState::try_from(status.state) {
            Ok(v1::SyncState::Idle) => State::Idle,
            Ok(v1::SyncState::Scanning) => State::Scanning,
            Ok(v1::SyncState::Uploading) => State::Uploading,
            Ok(v1::SyncState::Downloading) => State::Downloading,
            Ok(v1::SyncState::Applying) => State::Applying,
            Ok(v1::SyncState::Offline) => State::Offline,
            Ok(v1::SyncState::Paused) => State::Paused,
            Ok(v1::SyncState::Halted) => State::Halted,
            Err(_) => State::Unknown,
        };
        let mode = match v1::MemberMode::try_from(status.mode) {
            // An older agent knows no other.
            Ok(v1::MemberMode::TwoWay | v1::MemberMode::Unspecified) => MemberMode::TwoWay,
            Ok(v1::MemberMode::SendOnly) => MemberMode::SendOnly,
            Ok(v1::MemberMode::ReceiveOnly) => MemberMode::ReceiveOnly,
            Ok(v1::MemberMode::Mirror) => MemberMode::Mirror,
            Err(_) => MemberMode::Unknown,
        };
        let problem = |problem: v1::SyncProblem| PathProblem {
            path: path(&problem.path),
            code: problem.code,
            message: problem.message,
            first_seen_ms: problem.first_seen_ms,
        };
        Self {
            state,
            mode,
            applied_seq: status.applied_seq,
            head_seq: status.head_seq,
            files_done: status.files_done,
            files_total: status.files_total,
            bytes_done: status.bytes_done,
            bytes_total: status.bytes_total,
            bytes_per_second: status.bytes_per_second,
            eta_ms: (status.eta_ms > 0).then_some(status.eta_ms),
            conflicts: status.conflicts,
            pending_push: status.pending_push,
            held_deletions: status.held_deletions,
            halted_reason: some(status.halted_reason),
            problems: status.problems.into_iter().map(problem).collect(),
        }
    }
}

impl Workspace {
    pub(in crate::http) fn of(info: v1::WorkspaceInfo) -> Self {
        let member = |member: v1::WorkspaceMember| Member {
            node_id: id(&member.node_id),
            node_name: member.node_name,
            online: member.online,
            applied_seq: member.applied_seq,
            status: member.status.map(Progress::of),
        };
        Self {
            workspace_id: id(&info.workspace_id),
            name: info.name,
            head_seq: info.head_seq,
            entries: info.entries,
            content_bytes: info.content_bytes,
            created_at_ms: info.created_at_ms,
            members: info.members.into_iter().map(member).collect(),
        }
    }
}

/// A workspace with its settings and what it takes at the hub.
#[derive(Serialize, JsonSchema)]
pub(in crate::http) struct WorkspaceDetails {
    workspace: Option<Workspace>,
    /// Absent for no limit.
    quota_bytes: Option<u64>,
    /// How long an old version is kept after it was replaced or deleted.
    keep_for_ms: u64,
    /// How many old versions of one path are kept at most.
    keep_versions: u32,
    stored_bytes: u64,
    old_versions: u64,
    /// The oldest version at which the whole tree is known.
    oldest_version: u64,
}

impl WorkspaceDetails {
    pub(in crate::http) fn of(shown: v1::ShowWorkspaceResponse) -> Self {
        let settings = shown.settings.unwrap_or_default();
        Self {
            workspace: shown.workspace.map(Workspace::of),
            quota_bytes: (settings.quota_bytes > 0).then_some(settings.quota_bytes),
            keep_for_ms: settings.keep_for_ms,
            keep_versions: settings.keep_versions,
            stored_bytes: shown.stored_bytes,
            old_versions: shown.old_versions,
            oldest_version: shown.oldest_version,
        }
    }
}

/// The conflicts of a workspace.
#[derive(Serialize, JsonSchema)]
pub(in crate::http) struct Conflicts {
    pub(in crate::http) conflicts: Vec<Conflict>,
}

/// Two versions of a file, made without knowing of each other.
#[derive(Serialize, JsonSchema)]
pub(in crate::http) struct Conflict {
    /// The one that kept its name.
    path: String,
    /// The other, beside it.
    copy: String,
    /// Who made the copy.
    node: Option<String>,
    at_ms: i64,
}

impl Conflict {
    pub(in crate::http) fn of(conflict: v1::ConflictInfo) -> Self {
        Self {
            path: path(&conflict.path),
            copy: path(&conflict.copy),
            node: some(conflict.node_name),
            at_ms: conflict.at_ms,
        }
    }
}

/// Some of what changed in a workspace.
#[derive(Serialize, JsonSchema)]
pub(in crate::http) struct Changes {
    pub(in crate::http) changes: Vec<Change>,
    /// For the next page; absent on the last. A page may have fewer changes than asked for.
    pub(in crate::http) next_cursor: Option<u64>,
}

/// A change of one path.
#[derive(Serialize, JsonSchema)]
pub(in crate::http) struct Change {
    seq: u64,
    at_ms: Option<i64>,
    /// The member that made it.
    node: Option<String>,
    /// The operator who made it.
    operator: Option<String>,
    path: String,
    /// created, replaced, deleted or written.
    kind: String,
    /// file, executable, link or directory.
    entry: String,
    size: u64,
    /// Whether this is what stands there now.
    current: bool,
}

impl Change {
    pub(in crate::http) fn of(change: v1::LoggedChange) -> Self {
        let kind = change.kind().as_str_name().trim_start_matches("KIND_").to_ascii_lowercase();
        Self {
            seq: change.seq,
            at_ms: time(change.at_ms),
            node: some(change.node),
            operator: some(change.operator),
            path: path(&change.path),
            kind,
            entry: change.entry,
            size: change.size,
            current: change.current,
        }
    }
}
