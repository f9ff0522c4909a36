//! What is said for one member: this node over its own agent, or any as an operator.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::PathBuf;

use cortex_proto::v1;
use serde::Serialize;

use super::Side;
use super::rows::SyncRow;
use crate::cli::error::{CliError, Exit};
use crate::cli::{Global, Output, hub, local, printer};

pub(super) async fn attach(
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

pub(super) async fn detach(
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

pub(super) async fn confirm_deletes(
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
                held => format!(
                    "{held} deletions go now, unless the hub holds them: then an operator has to say \
                     cortex-agent workspace confirm-deletes {workspace}"
                ),
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

pub(super) async fn status(
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
