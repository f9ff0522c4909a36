//! Commands that decide about nodes and operators, and those of the audit log.

use std::time::Duration;

use anyhow::bail;
use clap::Subcommand;
use cortex_proto::v1;
use cortex_shared::policy::{Mode, Network};
use cortex_shared::text::hex;
use serde_json::{Value, json};

use super::admin::{connect, connect_for_long, node_json, time};
use super::output::{self, Format};
use super::{DataArg, parse_duration, parse_label};

/// How often `node drain` looks.
const DRAIN_LOOK: Duration = Duration::from_millis(200);

#[derive(Subcommand)]
pub(super) enum NodeCommand {
    /// List all nodes
    List {
        #[command(flatten)]
        data: DataArg,
        #[command(flatten)]
        format: Format,
    },
    /// Show one node
    Show {
        /// Its name, or a unique beginning of its id
        node: String,
        #[command(flatten)]
        data: DataArg,
        #[command(flatten)]
        format: Format,
    },
    /// Set and remove labels
    Label {
        /// Its name, or a unique beginning of its id
        node: String,
        /// KEY=VALUE sets a label, KEY- removes one
        #[arg(required = true, value_name = "KEY=VALUE|KEY-", value_parser = parse_label_change)]
        changes: Vec<LabelArg>,
        #[command(flatten)]
        data: DataArg,
    },
    /// Give a node another name
    Rename {
        /// Its name, or a unique beginning of its id
        node: String,
        /// The new name
        name: String,
        #[command(flatten)]
        data: DataArg,
    },
    /// Send a node no new commands; what runs goes on
    Cordon {
        /// Its name, or a unique beginning of its id
        node: String,
        #[command(flatten)]
        data: DataArg,
    },
    /// Send a node commands again
    Uncordon {
        /// Its name, or a unique beginning of its id
        node: String,
        #[command(flatten)]
        data: DataArg,
    },
    /// Cordon a node and wait until it runs nothing
    #[command(after_help = "\
Ends no command. Afterwards the node stays cordoned; `node uncordon` takes that back.
Exit codes: 0 it runs nothing, 6 it still did when the time was up.")]
    Drain {
        /// Its name, or a unique beginning of its id
        node: String,
        /// When to give up waiting; without it, never
        #[arg(long, value_name = "DUR", value_parser = parse_duration)]
        timeout: Option<Duration>,
        #[command(flatten)]
        data: DataArg,
    },
    /// End a node's session and commands at once, for good
    Revoke {
        /// Its name, or a unique beginning of its id
        node: String,
        /// Why, for the audit log
        #[arg(long, default_value = "")]
        reason: String,
        #[command(flatten)]
        data: DataArg,
    },
    /// Remove the record of a node that is revoked or offline; its name is free again
    Forget {
        /// Its name, or a unique beginning of its id
        node: String,
        #[command(flatten)]
        data: DataArg,
    },
}

#[derive(Clone)]
pub(super) enum LabelArg {
    Set(String, String),
    Remove(String),
}

#[derive(Subcommand)]
pub(super) enum PolicyCommand {
    /// Show what the hub allows a node's commands
    Show {
        /// The node's name, or a unique beginning of its id
        node: String,
        #[command(flatten)]
        data: DataArg,
        #[command(flatten)]
        format: Format,
    },
    /// Say what a node's commands may do: run outside the sandbox for a while, or see the network
    #[command(after_help = "\
What is left out is not allowed. A permissive policy ends by itself, the network only with --for. The
node's own ceiling has to allow either as well; its owner raises that on the node:
cortex-agent ceiling set permissive, cortex-agent ceiling set strict --net full")]
    Set {
        /// The node's name, or a unique beginning of its id
        node: String,
        /// strict or permissive
        mode: Mode,
        /// Network that a strict command may ask for with --net
        #[arg(long, value_name = "none|full", default_value_t)]
        net: Network,
        /// Why, for the audit log; permissive and the network need it
        #[arg(long, default_value = "")]
        reason: String,
        /// How long it lasts, such as 30m or 12h, at most the hub's `permissive_longest` (30d)
        /// [default: 1h for permissive]
        #[arg(long = "for", value_name = "DUR", value_parser = parse_duration)]
        duration: Option<Duration>,
        #[command(flatten)]
        data: DataArg,
    },
}

#[derive(Subcommand)]
pub(super) enum AuditCommand {
    /// List the audit log, oldest first
    List {
        /// Only lines after this number
        #[arg(long, value_name = "SEQ", default_value_t = 0)]
        after: u64,
        /// At most this many lines
        #[arg(long, value_name = "N")]
        limit: Option<std::num::NonZeroU32>,
        /// Only this action, such as node.joined; may be repeated
        #[arg(long = "action", value_name = "ACTION")]
        actions: Vec<String>,
        #[command(flatten)]
        data: DataArg,
        #[command(flatten)]
        format: Format,
    },
    /// Check that no line was changed, removed or put in between
    Verify {
        /// Accept a log whose lines fit together, but not with the mark, such as one from a backup
        #[arg(long, value_name = "REASON", value_parser = clap::builder::NonEmptyStringValueParser::new())]
        accept: Option<String>,
        #[command(flatten)]
        data: DataArg,
        #[command(flatten)]
        format: Format,
    },
}

/// What changes one label. A key may hold '-', so only a last one means removal.
fn parse_label_change(text: &str) -> Result<LabelArg, String> {
    match text.strip_suffix('-') {
        Some(key) if !text.contains('=') => {
            let checked = cortex_shared::labels::check_label(key, "");
            checked.map_err(|error| error.to_string())?;
            Ok(LabelArg::Remove(key.to_owned()))
        }
        _ => parse_label(text).map(|(key, value)| LabelArg::Set(key, value)),
    }
}

pub(super) async fn node(command: NodeCommand) -> anyhow::Result<()> {
    match command {
        NodeCommand::List { data, format } => {
            let request = v1::ListNodesRequest::default();
            let nodes = connect(&data.config()).await?.list_nodes(request).await?.into_inner();
            let items = nodes.nodes.into_iter().map(node_json).collect();
            let columns = ["name", "state", "effective_mode", "labels", "last_seen", "node_id"];
            output::list(format, &columns, items);
        }
        NodeCommand::Show { node, data, format } => {
            let node = node_json(find(&data, node).await?);
            output::show(format, &node, &fields(&node));
        }
        NodeCommand::Label { node, changes, data } => {
            let mut request = v1::LabelNodeRequest { node, ..Default::default() };
            for change in changes {
                match change {
                    LabelArg::Set(key, value) => {
                        request.set.insert(key, value);
                    }
                    LabelArg::Remove(key) => request.remove.push(key),
                }
            }
            connect(&data.config()).await?.label_node(request).await?;
        }
        NodeCommand::Rename { node, name, data } => {
            let request = v1::RenameNodeRequest { node, name };
            connect(&data.config()).await?.rename_node(request).await?;
        }
        NodeCommand::Cordon { node, data } => cordon(node, true, &data).await?,
        NodeCommand::Uncordon { node, data } => cordon(node, false, &data).await?,
        NodeCommand::Drain { node, timeout, data } => drain(node, timeout, &data).await?,
        NodeCommand::Revoke { node, reason, data } => {
            let request = v1::RevokeNodeRequest { node, reason };
            connect(&data.config()).await?.revoke_node(request).await?;
        }
        NodeCommand::Forget { node, data } => {
            let request = v1::ForgetNodeRequest { node };
            connect(&data.config()).await?.forget_node(request).await?;
        }
    }
    Ok(())
}

async fn cordon(node: String, cordoned: bool, data: &DataArg) -> anyhow::Result<()> {
    let request = v1::CordonNodeRequest { node, cordoned };
    connect(&data.config()).await?.cordon_node(request).await?;
    Ok(())
}

async fn drain(node: String, timeout: Option<Duration>, data: &DataArg) -> anyhow::Result<()> {
    let deadline = timeout.map(|timeout| tokio::time::Instant::now() + timeout);
    let request = v1::CordonNodeRequest { node, cordoned: true };
    let node = connect(&data.config()).await?.cordon_node(request).await?.into_inner();
    // By its id from here on: somebody may rename it.
    let id = cortex_shared::ids::NodeId::from_slice(&node.node_id)?.to_string();
    loop {
        let running = find(data, id.clone()).await?.running_tasks;
        if running == 0 {
            return Ok(());
        }
        let next = tokio::time::Instant::now() + DRAIN_LOOK;
        if deadline.is_some_and(|deadline| deadline < next) {
            return Err(output::StillRuns { node: node.name, running }.into());
        }
        tokio::time::sleep_until(next).await;
    }
}

async fn find(data: &DataArg, selector: String) -> anyhow::Result<v1::NodeInfo> {
    let request = v1::ListNodesRequest { selector };
    let nodes = connect(&data.config()).await?.list_nodes(request).await?.into_inner().nodes;
    match nodes.as_slice() {
        [node] => Ok(node.clone()),
        _ => bail!("name one node (hint: cortex-hubd node list)"),
    }
}

/// A document as lines for people.
fn fields(document: &Value) -> String {
    let shown = |value: &Value| match value {
        Value::Null => "-".to_owned(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    let fields = document.as_object().into_iter().flatten();
    let lines: Vec<_> = fields.map(|(name, value)| format!("{name:<22}{}", shown(value))).collect();
    lines.join("\n")
}

pub(super) async fn policy(command: PolicyCommand) -> anyhow::Result<()> {
    match command {
        PolicyCommand::Show { node, data, format } => {
            let node = node_json(find(&data, node).await?);
            let names = [
                "name",
                "policy",
                "policy_network",
                "policy_until",
                "policy_reason",
                "ceiling",
                "ceiling_network",
                "effective_mode",
            ];
            let shown: Value =
                names.iter().map(|name| ((*name).to_owned(), node[*name].clone())).collect();
            output::show(format, &shown, &fields(&shown));
        }
        PolicyCommand::Set { node, mode, net, reason, duration, data } => {
            let for_ms = duration.map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX));
            if (mode, net) == (Mode::Strict, Network::None) && duration.is_some() {
                let text = "strict without network has no end: leave --for out";
                return Err(output::WrongUse(text).into());
            }
            let mode = match mode {
                Mode::Strict => v1::Mode::Strict,
                Mode::Permissive => v1::Mode::Permissive,
            };
            let network = crate::grpc::convert::wire_network(net).into();
            let mode = mode.into();
            let request = v1::SetNodePolicyRequest { node, mode, reason, for_ms, network };
            connect(&data.config()).await?.set_node_policy(request).await?;
        }
    }
    Ok(())
}

pub(super) async fn operators(data: &DataArg, format: Format) -> anyhow::Result<()> {
    let request = v1::ListOperatorsRequest {};
    let operators = connect(&data.config()).await?.list_operators(request).await?.into_inner();
    let item = |operator: v1::OperatorInfo| {
        json!({
            "name": operator.name,
            "role": operator.role,
            "scope": operator.scope,
            "created_at": time(operator.created_at_ms),
            "revoked_at": time(operator.revoked_at_ms),
        })
    };
    let items = operators.operators.into_iter().map(item).collect();
    output::list(format, &["name", "role", "scope", "created_at", "revoked_at"], items);
    Ok(())
}

pub(super) async fn revoke_operator(name: String, data: &DataArg) -> anyhow::Result<()> {
    let request = v1::RevokeOperatorRequest { name };
    connect(&data.config()).await?.revoke_operator(request).await?;
    Ok(())
}

pub(super) async fn audit(command: AuditCommand) -> anyhow::Result<()> {
    match command {
        AuditCommand::List { after, limit, actions, data, format } => {
            let limit = limit.map_or(0, std::num::NonZeroU32::get);
            let request = v1::ListAuditRequest { after_seq: after, limit, actions };
            let mut lines = connect(&data.config()).await?.list_audit(request).await?.into_inner();
            let mut list = output::Stream::new(format, &["seq", "at", "actor", "action", "target"]);
            while let Some(line) = lines.message().await? {
                list.item(audit_json(line));
            }
            list.end();
        }
        AuditCommand::Verify { accept, data, format } => {
            let request = v1::VerifyAuditRequest { accept_reason: accept.unwrap_or_default() };
            // It reads the whole log, however long that takes.
            let mut hub = connect_for_long(&data.config()).await?;
            let found = hub.verify_audit(request).await?.into_inner();
            let document = json!({
                "intact": found.intact,
                "entries": found.entries,
                "first_bad_seq": (!found.intact).then_some(found.first_bad_seq),
                "head_hash": hex(&found.head_hash),
                "problem": (!found.intact).then_some(&found.problem),
            });
            let text = if found.intact {
                format!(
                    "{} lines, intact; the last has the hash {}",
                    found.entries,
                    hex(&found.head_hash)
                )
            } else {
                format!("NOT INTACT: {}", found.problem)
            };
            output::show(format, &document, &text);
            if !found.intact {
                bail!(
                    "the audit log does not verify (hint: if this is explained, by a restored backup \
                     say, and the lines fit together: cortex-hubd audit verify --accept REASON)"
                );
            }
        }
    }
    Ok(())
}

fn audit_json(line: v1::AuditEntry) -> Value {
    let detail = serde_json::from_str(&line.detail_json).unwrap_or(Value::String(line.detail_json));
    json!({
        "seq": line.seq,
        "at": time(line.at_ms),
        "actor": line.actor,
        "action": line.action,
        "target": line.target,
        "detail": detail,
        "prev_hash": hex(&line.prev_hash),
        "hash": hex(&line.hash),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn label_changes_set_and_remove() {
        let parse = |text: &str| match parse_label_change(text) {
            Ok(LabelArg::Set(key, value)) => format!("{key} = {value}"),
            Ok(LabelArg::Remove(key)) => format!("no {key}"),
            Err(_) => "error".to_owned(),
        };
        for (text, meaning) in [
            ("env=prod", "env = prod"),
            ("env=", "env = "),
            ("env=a-", "env = a-"),
            ("env-", "no env"),
            ("a-b-", "no a-b"),
            ("env", "error"),
            ("-", "error"),
            ("a b-", "error"),
        ] {
            assert_eq!(parse(text), meaning, "{text}");
        }
    }
}
