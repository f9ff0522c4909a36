//! `node …`: the machines of the mesh.

mod show;

use std::time::Duration;

use clap::{Args, Subcommand};
use cortex_proto::v1;
use cortex_shared::labels;

use super::error::{CliError, Exit};
use super::persist::{Latest, Persistence};
use super::{Global, Output, hub, policy, printer, units};
pub(crate) use show::{NodeRow, bound_text, skew_text};

/// How often `node drain` looks.
const DRAIN_POLL: Duration = Duration::from_secs(1);

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
    /// Change labels: KEY=VALUE sets one, KEY- removes it
    #[command(after_help = "\
Labels decide which nodes an operator with a scope sees and commands.

Example:
  cortex-agent node label build-1 env=prod gpu-")]
    Label(LabelArgs),
    /// Give a node another name
    Rename {
        /// Name, or a unique prefix of the id
        node: String,
        /// The new name
        name: String,
        #[command(flatten)]
        output: Output,
    },
    /// Send a node no new commands; it keeps its session and what it runs
    Cordon {
        /// Name, or a unique prefix of the id
        node: String,
        #[command(flatten)]
        output: Output,
    },
    /// Send a node commands again
    Uncordon {
        /// Name, or a unique prefix of the id
        node: String,
        #[command(flatten)]
        output: Output,
    },
    /// Cordon a node and wait until it runs nothing
    #[command(after_help = "\
Ends no command. Afterwards the node stays cordoned; `node uncordon` takes that back.
A restart of the hub is waited for.
Exit codes: 0 it runs nothing, 6 it still did when the time was up, or the hub stays away.

Example:
  cortex-agent node drain build-1 --timeout 10m")]
    Drain {
        /// Name, or a unique prefix of the id
        node: String,
        /// When to give up waiting; without it, never
        #[arg(long, value_name = "DUR", value_parser = units::parse_duration)]
        timeout: Option<Duration>,
        #[command(flatten)]
        output: Output,
    },
    /// End a node's membership for good: its session and commands end at once
    Revoke {
        /// Name, or a unique prefix of the id
        node: String,
        /// Why; it stands in the audit log
        #[arg(long, default_value = "")]
        reason: String,
        /// Do not ask
        #[arg(long)]
        yes: bool,
        #[command(flatten)]
        output: Output,
    },
    /// Remove the record of a node that is revoked or offline; its name is free again
    Forget {
        /// Name, or a unique prefix of the id
        node: String,
        /// Do not ask
        #[arg(long)]
        yes: bool,
    },
    /// Show the hub's policy for a node; `policy set` changes it
    Policy {
        /// Name, or a unique prefix of the id
        node: String,
        #[command(flatten)]
        output: Output,
    },
    /// Wait until a node is online or offline
    #[command(after_help = "\
A restart of the hub is waited for; a node is offline then if it is not back a minute after it.
Exit codes: 0 it is, 6 it was not in time, or the hub stays away.

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

#[derive(Debug, Args)]
struct LabelArgs {
    /// Name, or a unique prefix of the id
    node: String,
    /// KEY=VALUE to set, KEY- to remove
    #[arg(value_name = "KEY=VALUE|KEY-", required = true)]
    changes: Vec<String>,
    #[command(flatten)]
    output: Output,
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
        let mut updates = Latest::new();
        // Nothing where it is not known whether it is so, or will not stay so.
        let mut so_from = None;
        loop {
            let next = updates.next(async || client.watch_nodes(request.clone()).await);
            let update = match so_from {
                None => next.await?,
                Some(so_from) => match tokio::time::timeout_at(so_from, next).await {
                    Ok(update) => update?,
                    Err(_) => return Ok(()),
                },
            };
            let wanted = state == Presence::Online;
            let nodes = update.map(|update| update.nodes).unwrap_or_default();
            if nodes.is_empty() || nodes.iter().any(|node| node.online != wanted) {
                so_from = None;
                continue;
            }
            match updates.settles_at().filter(|_| !wanted) {
                None => return Ok(()),
                settles_at => so_from = settles_at,
            }
        }
    };
    let Some(timeout) = timeout else { return watch.await };
    tokio::time::timeout(timeout, watch).await.unwrap_or_else(|_| {
        let state = if state == Presence::Online { "online" } else { "offline" };
        let text = format!("{node} was not {state} within {timeout:?}");
        Err(CliError::new(Exit::Unreachable, text).hint(format!("cortex-agent node list {node}")))
    })
}

pub(crate) async fn node(global: &Global, args: NodeArgs) -> Result<(), CliError> {
    match args.verb {
        NodeVerb::List { selector, online, offline, output } => {
            let mut rows = list(global, selector.unwrap_or_default()).await?;
            rows.retain(|row| (!online || row.online) && (!offline || !row.online));
            global.printer(output).list(&rows)
        }
        NodeVerb::Show { node, output } => {
            let row = one(global, node).await?;
            global.printer(output).show(&row, &row.lines())
        }
        NodeVerb::Label(args) => label(global, args).await,
        NodeVerb::Rename { node, name, output } => {
            labels::check_new_name(&name).map_err(|error| CliError::usage(error.to_string()))?;
            let mut client = hub::operator(global).await?;
            let request = v1::RenameNodeRequest { node, name };
            let info = client.rename_node(hub::question(request)).await?.into_inner();
            changed(global, output, info)
        }
        NodeVerb::Cordon { node, output } => cordon(global, node, true, output).await,
        NodeVerb::Uncordon { node, output } => cordon(global, node, false, output).await,
        NodeVerb::Drain { node, timeout, output } => drain(global, node, timeout, output).await,
        NodeVerb::Revoke { node, reason, yes, output } => {
            let deed = format!("revoke {node} for good, ending its session and commands");
            confirm(&deed, yes, &format!("cortex-agent node revoke {node} --yes"))?;
            let mut client = hub::operator(global).await?;
            let request = v1::RevokeNodeRequest { node, reason };
            let info = client.revoke_node(hub::question(request)).await?.into_inner();
            changed(global, output, info)
        }
        NodeVerb::Forget { node, yes } => {
            let deed = format!("remove the record of {node}");
            confirm(&deed, yes, &format!("cortex-agent node forget {node} --yes"))?;
            let mut client = hub::operator(global).await?;
            client.forget_node(hub::question(v1::ForgetNodeRequest { node })).await?;
            Ok(())
        }
        NodeVerb::Policy { node, output } => policy::show(global, node, output).await,
        NodeVerb::Wait { node, presence, timeout } => wait(global, node, presence, timeout).await,
    }
}

async fn label(global: &Global, args: LabelArgs) -> Result<(), CliError> {
    let mut request = v1::LabelNodeRequest { node: args.node, ..Default::default() };
    for change in &args.changes {
        match (change.split_once('='), change.strip_suffix('-')) {
            (Some((key, value)), _) => {
                labels::check_label(key, value)
                    .map_err(|error| CliError::usage(error.to_string()))?;
                request.set.insert(key.to_owned(), value.to_owned());
            }
            (None, Some(key)) => request.remove.push(key.to_owned()),
            (None, None) => {
                return Err(CliError::usage(format!("{change:?} is neither KEY=VALUE nor KEY-"))
                    .hint("cortex-agent node label --help"));
            }
        }
    }
    let mut client = hub::operator(global).await?;
    let info = client.label_node(hub::question(request)).await?.into_inner();
    changed(global, args.output, info)
}

async fn cordon(
    global: &Global,
    node: String,
    cordoned: bool,
    output: Output,
) -> Result<(), CliError> {
    let mut client = hub::operator(global).await?;
    let request = v1::CordonNodeRequest { node, cordoned };
    let info = client.cordon_node(hub::question(request)).await?.into_inner();
    changed(global, output, info)
}

async fn drain(
    global: &Global,
    node: String,
    timeout: Option<Duration>,
    output: Output,
) -> Result<(), CliError> {
    let mut client = hub::operator(global).await?;
    let request = v1::CordonNodeRequest { node, cordoned: true };
    let info = client.cordon_node(hub::question(request)).await?.into_inner();
    // By its id from here on: somebody may rename it.
    let (id, name) = NodeRow::of(info).into_identity();
    let deadline = timeout.map(|timeout| tokio::time::Instant::now() + timeout);
    let late = |at| deadline.is_some_and(|deadline| deadline < at);
    let mut persistence = Persistence::default();
    persistence.arrived();
    loop {
        let request = v1::ListNodesRequest { selector: id.clone() };
        let nodes = match client.list_nodes(hub::question(request)).await {
            Ok(answer) => answer.into_inner().nodes,
            Err(status) if late(tokio::time::Instant::now()) => return Err(status.into()),
            Err(status) => {
                persistence.pause(status).await?;
                continue;
            }
        };
        persistence.arrived();
        let row = the_one(rows(nodes), &name)?;
        if row.running_tasks == 0 {
            return global.printer(output).list(&[row]);
        }
        let next = tokio::time::Instant::now() + DRAIN_POLL;
        if late(next) {
            let text = format!("{name} is cordoned and still runs {} commands", row.running_tasks);
            return Err(CliError::new(Exit::Unreachable, text)
                .hint(format!("`cortex-agent node uncordon {name}` takes it back")));
        }
        tokio::time::sleep_until(next).await;
    }
}

/// The node as it is after a change.
pub(super) fn changed(global: &Global, output: Output, info: v1::NodeInfo) -> Result<(), CliError> {
    global.printer(output).list(&[NodeRow::of(info)])
}

/// Asks a person at a terminal before something that cannot be taken back. Where nobody can be asked it has to be
/// said with the command, as in `again`.
pub(super) fn confirm(deed: &str, yes: bool, again: &str) -> Result<(), CliError> {
    use std::io::{BufRead as _, IsTerminal as _};
    let stdin = std::io::stdin();
    if yes {
        return Ok(());
    }
    if !stdin.is_terminal() {
        let text = format!("nobody can be asked here whether to {deed}");
        return Err(CliError::usage(text).hint(again));
    }
    printer::complain(&format!("{deed}? [y/N]"), printer::ColorWhen::Auto);
    let mut answer = String::new();
    stdin.lock().read_line(&mut answer)?;
    if matches!(answer.trim(), "y" | "Y" | "yes") {
        return Ok(());
    }
    Err(CliError::new(Exit::Failed, "nothing was changed"))
}

/// The one node that is meant.
pub(super) async fn one(global: &Global, node: String) -> Result<NodeRow, CliError> {
    the_one(list(global, node.clone()).await?, &node)
}

fn the_one(mut rows: Vec<NodeRow>, node: &str) -> Result<NodeRow, CliError> {
    match (rows.pop(), rows.len()) {
        (Some(row), 0) => Ok(row),
        (None, _) => Err(CliError::new(Exit::NotFound, format!("no node matches {node:?}"))),
        (Some(_), more) => {
            let text = format!("{} nodes match {node:?}", more + 1);
            Err(CliError::new(Exit::Conflict, text))
        }
    }
    .map_err(|error| error.hint("cortex-agent node list"))
}

async fn list(global: &Global, selector: String) -> Result<Vec<NodeRow>, CliError> {
    let mut client = hub::operator(global).await?;
    let answer = client.list_nodes(hub::question(v1::ListNodesRequest { selector })).await?;
    Ok(rows(answer.into_inner().nodes))
}

fn rows(nodes: Vec<v1::NodeInfo>) -> Vec<NodeRow> {
    let mut rows: Vec<NodeRow> = nodes.into_iter().map(NodeRow::of).collect();
    rows.sort_by(|a, b| a.name.cmp(&b.name));
    rows
}
