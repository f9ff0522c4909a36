//! `workspace …`: trees of files that are kept equal on their members.
//!
//! `attach`, `detach`, `status` and `confirm-deletes` exist twice: for this node, over its local socket, and for the
//! mesh, as an operator. [`Side::of`] decides.

mod conflicts;
mod member;
mod rows;

use std::path::PathBuf;

use clap::{Args, Subcommand};
use cortex_proto::v1;

use super::error::CliError;
use super::{Global, Output, hub, watch};

pub(super) use self::rows::{SyncRow, WorkspaceRow};

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
                (Side::Node, name) => member::status(global, name, output).await,
                (Side::Mesh, Some(name)) => watch::status(global, name, watch, output).await,
                (Side::Mesh, None) => Err(CliError::usage("which workspace?")
                    .hint("cortex-agent workspace list; or --local for all of this node")),
            }
        }
        WorkspaceVerb::ConfirmDeletes { name, node, local, output } => {
            member::confirm_deletes(global, name, node, local, output).await
        }
        WorkspaceVerb::Conflicts { name, output } => conflicts::list(global, name, output).await,
    }
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
