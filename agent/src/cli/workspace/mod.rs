//! `workspace …`: trees of files that are kept equal on their members.
//!
//! `attach`, `detach`, `status` and `confirm-deletes` exist twice: for this node, over its local socket, and for the
//! mesh, as an operator. [`Side::of`] decides.

mod conflicts;
mod member;
mod node;
mod past;
mod rows;

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand};
use cortex_proto::v1;

use super::error::CliError;
use super::{Global, Output, hub, skill, watch};

pub(super) use self::past::wire_path;
pub(super) use self::rows::{MemberJson, SyncRow, WorkspaceRow};

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
        /// As an operator: follow until all members that are online are at the head; ends with 1 and says
        /// why if those that are not do nothing about it, such as one that is paused, and with 6 if the hub
        /// stays away
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
    /// within a minute, or all files at once; everything else is synced meanwhile. The hub holds what a
    /// member should have held. Otherwise bring the files back on that member, and nothing is deleted.
    ///
    /// With --local only the node's own hold ends; that of the hub ends by an operator's word.
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
    /// End a conflict: keep the version that has the name, the copy, or both
    Resolve {
        /// The workspace
        name: String,
        /// The path that was changed in two places, or the copy beside it
        path: OsString,
        /// `theirs` deletes the copy, `mine` puts it in the place of the other, `both` leaves two files
        #[arg(long, value_name = "SIDE")]
        keep: conflicts::Keep,
        #[command(flatten)]
        output: Output,
    },
    /// Show what changed, newest first, as far back as old versions are kept
    Log {
        /// The workspace
        name: String,
        /// Only this path and everything below it
        path: Option<OsString>,
        /// How many changes
        #[arg(long, value_name = "N", default_value_t = 50)]
        limit: usize,
        /// Only changes before this version
        #[arg(long, value_name = "VERSION")]
        before: Option<u64>,
        #[command(flatten)]
        output: Output,
    },
    /// Bring a path, and everything below it, back to what it was
    ///
    /// Nothing is deleted by it, and what it replaces can be brought back in turn. What is missing on
    /// members comes to them like any other change.
    #[command(disable_version_flag = true)]
    Restore {
        /// The workspace
        name: String,
        /// The path; `.` for the whole workspace, which needs --version
        path: OsString,
        /// The version whose state it is to have, of those that `log` shows [default: the one before its
        /// last change, or before its deletion began]
        #[arg(long, value_name = "VERSION")]
        version: Option<u64>,
        #[command(flatten)]
        output: Output,
    },
    /// Make a directory the next version of a skill, which every node has, and put a link in its place
    ///
    /// What is promoted is the directory as the hub has it. It is replaced in one step, exactly as it was
    /// promoted; if somebody changes it meanwhile, nothing is done.
    Promote {
        /// The workspace
        name: String,
        /// The directory
        path: OsString,
        /// The skill's name
        #[arg(long = "as", value_name = "SKILL")]
        skill: String,
        /// The version that is current, 0 for none; needed to take the place of a skill that was promoted
        /// from another directory
        #[arg(long, value_name = "VERSION")]
        expect: Option<u64>,
        #[command(flatten)]
        output: Output,
    },
    /// Show a workspace: its members, what it takes on the hub, and what is kept of the past
    Show {
        /// The workspace
        name: String,
        #[command(flatten)]
        output: Output,
    },
    /// Change how much a workspace may store, and how much of the past it keeps
    #[command(group = clap::ArgGroup::new("settings").required(true).multiple(true))]
    Set {
        /// The workspace
        name: String,
        /// What it may take on the hub's disk with its past, such as 50G; `none` for no limit
        #[arg(long, value_name = "SIZE", value_parser = past::parse_quota, group = "settings")]
        quota: Option<u64>,
        /// How long an old version is kept after it was replaced or deleted, such as 7d; 0 for not at all
        #[arg(long, value_name = "DURATION", value_parser = past::parse_keep, group = "settings")]
        keep_for: Option<Duration>,
        /// How many old versions of a path are kept at most; 0 for none
        #[arg(long, value_name = "N", group = "settings")]
        keep_versions: Option<u32>,
        #[command(flatten)]
        output: Output,
    },
    /// Remove a workspace with all its versions from the hub; members keep their files
    Delete {
        /// The workspace
        name: String,
        /// Do not ask
        #[arg(long)]
        yes: bool,
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
            member::attach(global, name, node, local || path.is_some(), path).await
        }
        WorkspaceVerb::Detach { name, node, local } => {
            member::detach(global, name, node, local).await
        }
        WorkspaceVerb::Status { name, watch, local, output } => {
            match (Side::choose(global, local, None)?, name) {
                (Side::Node, name) if watch => Err(only_for_the_mesh(name)),
                (Side::Node, name) => member::status(global, name, output).await,
                (Side::Mesh, Some(name)) => watch::status(global, name, watch, output).await,
                (Side::Mesh, None) => Err(CliError::usage("which workspace?")
                    .hint("cortex-agent workspace list; or --local for all of this node")),
            }
        }
        WorkspaceVerb::ConfirmDeletes { name, node, local, output } => {
            member::confirm_deletes(global, name, node, local, output).await
        }
        WorkspaceVerb::Node(verb) => node::run(global, verb).await,
        WorkspaceVerb::Conflicts { name, output } => conflicts::list(global, name, output).await,
        WorkspaceVerb::Resolve { name, path, keep, output } => {
            conflicts::resolve(global, name, &path, keep, output).await
        }
        WorkspaceVerb::Log { name, path, limit, before, output } => {
            past::log(global, name, path, limit, before, output).await
        }
        WorkspaceVerb::Restore { name, path, version, output } => {
            past::restore(global, name, path, version, output).await
        }
        WorkspaceVerb::Promote { name, path, skill, expect, output } => {
            skill::promote(global, name, path, skill, expect, output).await
        }
        WorkspaceVerb::Show { name, output } => past::show(global, name, output).await,
        WorkspaceVerb::Set { name, quota, keep_for, keep_versions, output } => {
            let changed = past::Changed { quota_bytes: quota, keep_for, keep_versions };
            past::set(global, name, changed, output).await
        }
        WorkspaceVerb::Delete { name, yes } => past::delete(global, name, yes).await,
    }
}

/// Nobody is to take one look for the end of what is followed.
fn only_for_the_mesh(workspace: Option<String>) -> CliError {
    let flush = workspace.map_or_else(String::new, |workspace| format!(" {workspace}"));
    CliError::usage("--watch follows all members, as an operator; this speaks for this node alone")
        .hint(format!(
            "cortex-agent workspace flush{flush}; that ends once this node and the hub are equal"
        ))
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
