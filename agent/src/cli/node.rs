//! `node list|show|wait`: the machines of the mesh.

use std::collections::BTreeMap;
use std::time::Duration;

use clap::{Args, Subcommand};
use cortex_proto::v1;
use cortex_shared::ids::NodeId;
use serde::Serialize;

use super::error::{CliError, Exit};
use super::printer::Row;
use super::{Global, Output, hub, printer, units};
use crate::link::mode_of;

/// The machines of the mesh
#[derive(Debug, Args)]
pub(crate) struct NodeArgs {
    #[command(subcommand)]
    verb: NodeVerb,
}

#[derive(Debug, Subcommand)]
enum NodeVerb {
    /// List nodes
    #[command(after_help = "\
SELECTOR is a name, a unique prefix of an id, or labels: @env=prod,gpu=a100

Examples:
  cortex-agent node list --online
  cortex-agent node list @env=prod -o json")]
    List {
        /// Which nodes; all without it
        selector: Option<String>,
        /// Only those with a live session
        #[arg(long, conflicts_with = "offline")]
        online: bool,
        /// Only those without
        #[arg(long)]
        offline: bool,
        #[command(flatten)]
        output: Output,
    },
    /// Show everything about one node
    Show {
        /// Name, or a unique prefix of the id
        node: String,
        #[command(flatten)]
        output: Output,
    },
    /// Wait until a node is online or offline
    #[command(after_help = "\
Exit codes: 0 it is, 6 it was not in time.

Example:
  cortex-agent node wait build-1 --for online --timeout 2m")]
    Wait {
        /// Name, or a unique prefix of the id
        node: String,
        /// What to wait for
        #[arg(long = "for", value_enum)]
        presence: Presence,
        /// When to give up; without it, never
        #[arg(long, value_name = "DUR", value_parser = units::parse_duration)]
        timeout: Option<Duration>,
    },
}

/// Whether a node has a live session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Presence {
    Online,
    Offline,
}

async fn wait(
    global: &Global,
    node: String,
    state: Presence,
    timeout: Option<Duration>,
) -> Result<(), CliError> {
    let watch = async {
        let mut client = hub::operator(global).await?;
        let request = v1::ListNodesRequest { selector: node.clone() };
        let mut updates = client.watch_nodes(request).await?.into_inner();
        while let Some(update) = updates.message().await? {
            let wanted = state == Presence::Online;
            if !update.nodes.is_empty() && update.nodes.iter().all(|node| node.online == wanted) {
                return Ok(());
            }
        }
        Err(CliError::new(Exit::Unreachable, "the hub ended the stream"))
    };
    let Some(timeout) = timeout else { return watch.await };
    tokio::time::timeout(timeout, watch).await.unwrap_or_else(|_| {
        let state = if state == Presence::Online { "online" } else { "offline" };
        let text = format!("{node} was not {state} within {timeout:?}");
        Err(CliError::new(Exit::Unreachable, text))
    })
}

/// A node as it is listed; the JSON of scripts.
#[derive(Serialize)]
struct NodeRow {
    node_id: String,
    name: String,
    online: bool,
    labels: BTreeMap<String, String>,
    joined_at_ms: i64,
    last_seen_ms: i64,
    agent_version: String,
    hostname: String,
    os: String,
    arch: String,
    effective_mode: String,
    policy: String,
    ceiling: String,
    session_epoch: u64,
    running_tasks: u32,
    strict_available: Option<bool>,
    sandbox: Option<SandboxJson>,
}

#[derive(Serialize)]
struct SandboxJson {
    landlock_abi: u32,
    cgroup: String,
    seccomp: bool,
    user_namespaces: bool,
    root: bool,
    missing: Vec<MissingJson>,
}

#[derive(Serialize)]
struct MissingJson {
    what: String,
    why: String,
    remedy: String,
}

impl NodeRow {
    fn of(node: v1::NodeInfo) -> Self {
        let strict_available = node.sandbox.as_ref().map(|report| report.strict_available);
        let sandbox = node.sandbox.map(|report| SandboxJson {
            landlock_abi: report.landlock_abi,
            cgroup: report.cgroup,
            seccomp: report.seccomp,
            user_namespaces: report.user_namespaces,
            root: report.root,
            missing: report
                .missing
                .into_iter()
                .map(|piece| MissingJson { what: piece.what, why: piece.why, remedy: piece.remedy })
                .collect(),
        });
        Self {
            node_id: NodeId::from_slice(&node.node_id).map(|id| id.to_string()).unwrap_or_default(),
            name: node.name,
            online: node.online,
            labels: node.labels.into_iter().collect(),
            joined_at_ms: node.joined_at_ms,
            last_seen_ms: node.last_seen_ms,
            agent_version: node.agent_version,
            hostname: node.hostname,
            os: node.os,
            arch: node.arch,
            effective_mode: mode_of(node.effective_mode).to_string(),
            policy: mode_of(node.policy).to_string(),
            ceiling: mode_of(node.ceiling).to_string(),
            session_epoch: node.session_epoch,
            running_tasks: node.running_tasks,
            strict_available,
            sandbox,
        }
    }

    fn state(&self) -> String {
        if self.online { "online" } else { "offline" }.to_owned()
    }

    fn label_text(&self) -> String {
        self.labels.iter().map(|(k, v)| format!("{k}={v}")).collect::<Vec<_>>().join(",")
    }
}

impl Row for NodeRow {
    const COLUMNS: &'static [&'static str] =
        &["NAME", "ID", "STATE", "LAST SEEN", "MODE", "TASKS", "LABELS"];

    fn cells(&self) -> Vec<String> {
        vec![
            self.name.clone(),
            self.node_id.clone(),
            self.state(),
            printer::time(self.last_seen_ms),
            self.effective_mode.clone(),
            self.running_tasks.to_string(),
            self.label_text(),
        ]
    }
}

pub(crate) async fn node(global: &Global, args: NodeArgs) -> Result<(), CliError> {
    match args.verb {
        NodeVerb::List { selector, online, offline, output } => {
            let mut rows = list(global, selector.unwrap_or_default()).await?;
            rows.retain(|row| (!online || row.online) && (!offline || !row.online));
            global.printer(output).list(&rows)
        }
        NodeVerb::Show { node, output } => {
            let rows = list(global, node.clone()).await?;
            let [row] = rows.as_slice() else {
                return Err(match rows.len() {
                    0 => CliError::new(Exit::NotFound, format!("no node matches {node:?}")),
                    n => CliError::new(Exit::Conflict, format!("{n} nodes match {node:?}")),
                }
                .hint("cortex-agent node list"));
            };
            let sandbox = match (&row.sandbox, row.strict_available) {
                (Some(_), Some(true)) => "complete".to_owned(),
                (Some(report), _) => {
                    let missing: Vec<&str> =
                        report.missing.iter().map(|piece| piece.what.as_str()).collect();
                    format!("incomplete: {}; strict commands are refused", missing.join(", "))
                }
                (None, _) => "not reported".to_owned(),
            };
            let lines = [
                ("name", row.name.clone()),
                ("id", row.node_id.clone()),
                ("state", row.state()),
                ("last seen", printer::time(row.last_seen_ms)),
                ("joined", printer::time(row.joined_at_ms)),
                ("labels", row.label_text()),
                ("host", format!("{} ({} {})", row.hostname, row.os, row.arch)),
                ("agent", row.agent_version.clone()),
                (
                    "mode",
                    format!(
                        "{} (policy {}, ceiling {})",
                        row.effective_mode, row.policy, row.ceiling
                    ),
                ),
                ("sandbox", sandbox),
                ("running commands", row.running_tasks.to_string()),
            ];
            global.printer(output).show(row, &lines)
        }
        NodeVerb::Wait { node, presence, timeout } => wait(global, node, presence, timeout).await,
    }
}

async fn list(global: &Global, selector: String) -> Result<Vec<NodeRow>, CliError> {
    let mut client = hub::operator(global).await?;
    let answer = client.list_nodes(hub::question(v1::ListNodesRequest { selector })).await?;
    let mut rows: Vec<NodeRow> = answer.into_inner().nodes.into_iter().map(NodeRow::of).collect();
    rows.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(rows)
}
