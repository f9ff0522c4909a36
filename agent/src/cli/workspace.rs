//! `workspace …`: trees of files that are kept equal on their members.
//!
//! `attach`, `detach`, `status` and `confirm-deletes` exist twice: for this node, over its local socket, and for the
//! mesh, as an operator. [`Side::of`] decides.

mod node;

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::PathBuf;

use clap::{Args, Subcommand};
use cortex_proto::v1;
use cortex_shared::ids::{NodeId, WorkspaceId};
use serde::Serialize;

use super::error::{CliError, Exit};
use super::printer::Row;
use super::{Global, Output, hub, local, printer, watch};

const SIDES: &str = "\
`attach`, `detach`, `status` and `confirm-deletes` speak for this node, over its own agent, with --local or --state
(or CORTEX_STATE); for the mesh, as an operator, with --node, or where somebody is logged in. Where
nobody is logged in they speak for this node.

Examples:
  cortex-agent workspace create app
  cortex-agent workspace attach app --node build-1
  cortex-agent workspace attach app --local --path /home/ann/app
  cortex-agent workspace status app --watch";

/// Trees of files that are kept equal on their members
#[derive(Debug, Args)]
#[command(after_help = SIDES)]
pub(crate) struct WorkspaceArgs {
    #[command(subcommand)]
    verb: WorkspaceVerb,
}

#[derive(Debug, Subcommand)]
enum WorkspaceVerb {
    /// Make a workspace; it is empty until a member brings files
    Create {
        /// Its name
        name: String,
        #[command(flatten)]
        output: Output,
    },
    /// List all workspaces
    List {
        #[command(flatten)]
        output: Output,
    },
    /// Make a node a member
    #[command(after_help = SIDES)]
    Attach {
        /// The workspace
        name: String,
        /// The node that becomes a member
        #[arg(long, conflicts_with_all = ["local", "path"])]
        node: Option<String>,
        /// This node, over its own agent
        #[arg(long)]
        local: bool,
        /// Where the files live on this node [default: WORKSPACE-ROOT/NAME]
        #[arg(long, value_name = "DIR")]
        path: Option<PathBuf>,
    },
    /// End a node's membership; its files stay where they are
    #[command(after_help = SIDES)]
    Detach {
        /// The workspace
        name: String,
        /// The node
        #[arg(long, conflicts_with = "local")]
        node: Option<String>,
        /// This node, over its own agent
        #[arg(long)]
        local: bool,
    },
    /// Show how far each member is
    #[command(after_help = SIDES)]
    Status {
        /// The workspace; on this node, all without it
        name: Option<String>,
        /// Follow until all members that are online are at the head
        #[arg(long)]
        watch: bool,
        /// This node, over its own agent
        #[arg(long)]
        local: bool,
        #[command(flatten)]
        output: Output,
    },
    /// Let deletions go that members hold back because they are suspiciously many
    ///
    /// A member holds its deletions if more than 100 files and a quarter of the workspace would go
    /// within a minute, or all files at once; everything else is synced meanwhile. Otherwise bring the
    /// files back on that member, and nothing is deleted.
    #[command(after_help = SIDES)]
    ConfirmDeletes {
        /// The workspace
        name: String,
        /// The member; without it, every member that is online and holds deletions
        #[arg(long, conflicts_with = "local")]
        node: Option<String>,
        /// This node, over its own agent
        #[arg(long)]
        local: bool,
        #[command(flatten)]
        output: Output,
    },
    #[command(flatten)]
    Node(node::NodeVerb),
    /// List paths that were changed in two places at once
    Conflicts {
        /// The workspace
        name: String,
        #[command(flatten)]
        output: Output,
    },
}

/// Who is spoken for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    Node,
    Mesh,
}

impl Side {
    fn of(local: bool, node_named: bool, state_named: bool, logged_in: bool) -> Self {
        if node_named {
            Self::Mesh
        } else if local || state_named || !logged_in {
            Self::Node
        } else {
            Self::Mesh
        }
    }

    fn choose(global: &Global, local: bool, node: Option<&str>) -> Result<Self, CliError> {
        let logged_in = global.context.is_some() || global.config()?.current()?.is_some();
        Ok(Self::of(local, node.is_some(), global.state.is_some(), logged_in))
    }
}

/// One member's progress, for people and as the JSON of scripts.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct SyncRow {
    workspace: String,
    workspace_id: String,
    pub(super) state: &'static str,
    pub(super) applied_seq: u64,
    pub(super) head_seq: u64,
    pub(super) files_done: u64,
    pub(super) files_total: u64,
    bytes_done: u64,
    bytes_total: u64,
    entries: u64,
    conflicts: u64,
    pub(super) pending_push: u64,
    path: String,
    halted_reason: Option<String>,
    problems: Vec<ProblemJson>,
    #[serde(flatten)]
    condition: node::Condition,
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
            condition: node::Condition::of(status),
        }
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
pub(super) struct WorkspaceRow {
    pub(super) workspace_id: String,
    pub(super) name: String,
    pub(super) head_seq: u64,
    entries: u64,
    content_bytes: u64,
    created_at_ms: i64,
    pub(super) members: Vec<MemberJson>,
}

#[derive(Clone, Debug, Serialize)]
pub(super) struct MemberJson {
    node_id: String,
    pub(super) node_name: String,
    pub(super) online: bool,
    pub(super) applied_seq: u64,
    pub(super) status: Option<SyncRow>,
}

impl WorkspaceRow {
    pub(super) fn of(info: v1::WorkspaceInfo) -> Self {
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

    pub(super) fn lines(&self) -> Vec<(&str, String)> {
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

#[derive(Serialize)]
struct ConflictRow {
    path: String,
    copy: String,
    node_id: String,
    node_name: String,
    at_ms: i64,
}

impl Row for ConflictRow {
    const COLUMNS: &'static [&'static str] = &["PATH", "COPY", "NODE", "SINCE"];

    fn cells(&self) -> Vec<String> {
        vec![
            self.path.clone(),
            self.copy.clone(),
            self.node_name.clone(),
            printer::time(self.at_ms),
        ]
    }
}

pub(crate) async fn workspace(global: &Global, args: WorkspaceArgs) -> Result<(), CliError> {
    match args.verb {
        WorkspaceVerb::Create { name, output } => {
            let mut client = hub::operator(global).await?;
            let request = v1::CreateWorkspaceRequest { name };
            let info = client.create_workspace(hub::question(request)).await?.into_inner();
            let row = WorkspaceRow::of(info);
            let sentence = format!("created workspace {} ({})", row.name, row.workspace_id);
            global.printer(output).say(&sentence, &row)
        }
        WorkspaceVerb::List { output } => {
            let mut client = hub::operator(global).await?;
            let answer =
                client.list_workspaces(hub::question(v1::ListWorkspacesRequest {})).await?;
            let rows: Vec<WorkspaceRow> =
                answer.into_inner().workspaces.into_iter().map(WorkspaceRow::of).collect();
            global.printer(output).list(&rows)
        }
        WorkspaceVerb::Attach { name, node, local, path } => {
            attach(global, name, node, local || path.is_some(), path).await
        }
        WorkspaceVerb::Detach { name, node, local } => detach(global, name, node, local).await,
        WorkspaceVerb::Status { name, watch, local, output } => {
            match (Side::choose(global, local, None)?, name) {
                (Side::Node, name) => local_status(global, name, output).await,
                (Side::Mesh, Some(name)) => watch::status(global, name, watch, output).await,
                (Side::Mesh, None) => Err(CliError::usage("which workspace?")
                    .hint("cortex-agent workspace list; or --local for all of this node")),
            }
        }
        WorkspaceVerb::ConfirmDeletes { name, node, local, output } => {
            confirm_deletes(global, name, node, local, output).await
        }
        WorkspaceVerb::Node(verb) => node::run(global, verb).await,
        WorkspaceVerb::Conflicts { name, output } => {
            let mut client = hub::operator(global).await?;
            let request = v1::ListConflictsRequest { workspace: name };
            let answer = client.list_conflicts(hub::question(request)).await?.into_inner();
            let rows: Vec<ConflictRow> = answer
                .conflicts
                .into_iter()
                .map(|conflict| ConflictRow {
                    path: lossy(&conflict.path),
                    copy: lossy(&conflict.copy),
                    node_id: NodeId::from_slice(&conflict.node_id)
                        .map(|id| id.to_string())
                        .unwrap_or_default(),
                    node_name: conflict.node_name,
                    at_ms: conflict.at_ms,
                })
                .collect();
            global.printer(output).list(&rows)
        }
    }
}

async fn attach(
    global: &Global,
    workspace: String,
    node: Option<String>,
    local: bool,
    path: Option<PathBuf>,
) -> Result<(), CliError> {
    match Side::choose(global, local, node.as_deref())? {
        Side::Mesh => {
            let node = node.ok_or_else(|| which_node("attach", &workspace))?;
            let mut client = hub::operator(global).await?;
            let request = v1::AttachWorkspaceRequest { workspace, node };
            client.attach_workspace(hub::question(request)).await?;
            Ok(())
        }
        Side::Node => {
            let path = match path {
                Some(path) => std::path::absolute(&path)
                    .map_err(|error| CliError::usage("--path is no path").because(error))?
                    .as_os_str()
                    .as_bytes()
                    .to_vec(),
                None => Vec::new(),
            };
            let mut agent = local::agent(global).await?;
            let request = v1::AttachLocalRequest { workspace, path: path.into() };
            let answer = agent.attach_local(hub::question(request)).await?.into_inner();
            let mut line = OsString::from_vec(answer.path.to_vec()).into_vec();
            line.push(b'\n');
            printer::Printer::stdout(printer::Format::Table, global.color).raw(&line)
        }
    }
}

async fn detach(
    global: &Global,
    workspace: String,
    node: Option<String>,
    local: bool,
) -> Result<(), CliError> {
    match Side::choose(global, local, node.as_deref())? {
        Side::Mesh => {
            let node = node.ok_or_else(|| which_node("detach", &workspace))?;
            let mut client = hub::operator(global).await?;
            let request = v1::DetachWorkspaceRequest { workspace, node };
            client.detach_workspace(hub::question(request)).await?;
        }
        Side::Node => {
            let mut agent = local::agent(global).await?;
            let request = v1::DetachLocalRequest { workspace };
            agent.detach_local(hub::question(request)).await?;
        }
    }
    Ok(())
}

#[derive(Serialize)]
struct ConfirmedJson {
    workspace: String,
    /// Members that were told.
    nodes: Vec<String>,
    /// How many deletions they held, if this node was asked.
    held: Option<u64>,
}

async fn confirm_deletes(
    global: &Global,
    workspace: String,
    node: Option<String>,
    local: bool,
    output: Output,
) -> Result<(), CliError> {
    let (sentence, nodes, held) = match Side::choose(global, local, node.as_deref())? {
        Side::Mesh => {
            let mut client = hub::operator(global).await?;
            let (workspace, node) = (workspace.clone(), node.unwrap_or_default());
            let request = v1::ConfirmDeletesRequest { workspace, node };
            let nodes = client.confirm_deletes(hub::question(request)).await?.into_inner().nodes;
            let sentence = match nodes.as_slice() {
                [] => "no member that is online holds deletions".to_owned(),
                nodes => format!("{} may delete now", nodes.join(", ")),
            };
            (sentence, nodes, None)
        }
        Side::Node => {
            let mut agent = local::agent(global).await?;
            let request = v1::ConfirmDeletesLocalRequest { workspace: workspace.clone() };
            let answer = agent.confirm_deletes_local(hub::question(request)).await?.into_inner();
            let sentence = match answer.held {
                0 => "no deletions are held here".to_owned(),
                held => format!("{held} deletions go now"),
            };
            (sentence, Vec::new(), Some(answer.held))
        }
    };
    global.printer(output).say(&sentence, &ConfirmedJson { workspace, nodes, held })
}

fn which_node(verb: &str, workspace: &str) -> CliError {
    CliError::usage("which node?").hint(format!(
        "cortex-agent workspace {verb} {workspace} --node NODE, or --local for this one"
    ))
}

async fn local_status(
    global: &Global,
    name: Option<String>,
    output: Output,
) -> Result<(), CliError> {
    let mut agent = local::agent(global).await?;
    let answer = agent.agent_status(hub::question(v1::AgentStatusRequest {})).await?.into_inner();
    let mut rows: Vec<SyncRow> = answer.workspaces.iter().map(SyncRow::of).collect();
    if let Some(name) = name {
        rows.retain(|row| row.workspace == name);
        if rows.is_empty() {
            return Err(CliError::new(
                Exit::NotFound,
                format!("this node is not a member of workspace {name:?}"),
            )
            .hint(format!("cortex-agent workspace attach {name} --local")));
        }
    }
    global.printer(output).list(&rows)
}

fn lossy(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_spoken_for_follows_what_was_named() {
        for (local, node, state, logged_in, side) in [
            (false, false, false, true, Side::Mesh),
            (false, false, false, false, Side::Node),
            (true, false, false, true, Side::Node),
            (false, false, true, true, Side::Node),
            (false, true, true, true, Side::Mesh),
            (false, true, false, false, Side::Mesh),
        ] {
            assert_eq!(Side::of(local, node, state, logged_in), side);
        }
    }
}
