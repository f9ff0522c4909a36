//! `policy show|set`: the hub's half of what a node's commands may do.

use std::time::Duration;

use clap::{Args, Subcommand};
use cortex_proto::v1;
use cortex_shared::policy::{Bound, Mode, Network};
use serde::Serialize;

use super::error::CliError;
use super::{Global, Output, hub, node, units};
use crate::link::{proto_mode, proto_network};

/// What the hub lets a node's commands do
#[derive(Debug, Args)]
pub(crate) struct PolicyArgs {
    #[command(subcommand)]
    verb: PolicyVerb,
}

#[derive(Debug, Subcommand)]
enum PolicyVerb {
    /// Show it, with the node's ceiling and what follows from both
    Show {
        /// Name of the node, or a unique prefix of its id
        node: String,
        #[command(flatten)]
        output: Output,
    },
    /// Change it
    #[command(after_help = "\
strict counts at once and until further notice. permissive needs a reason, ends by itself, and also
needs the ceiling of the node's owner (`cortex-agent ceiling set permissive` on the node) and a
request for it (`cortex-agent exec --mode permissive`). --net full lets a strict command ask for the
node's network (`cortex-agent exec --net full`); it needs a reason and the owner's ceiling too
(`cortex-agent ceiling set strict --net full`), and ends only with --for. What is left out is not
allowed any more.

Examples:
  cortex-agent policy set build-1 permissive --reason 'install a driver' --for 30m
  cortex-agent policy set build-1 strict --net full --reason 'builds fetch packages'")]
    Set {
        /// Name of the node, or a unique prefix of its id
        node: String,
        /// strict or permissive
        #[arg(value_name = "strict|permissive")]
        mode: Mode,
        /// Network that a strict command may ask for
        #[arg(long, value_name = "none|full", default_value_t)]
        net: Network,
        /// Why; it stands in the audit log
        #[arg(long, default_value = "", required_if_eq("mode", "permissive"))]
        reason: String,
        /// When it ends by itself, such as 30m or 8h; at most the hub's `permissive_longest` (30d)
        /// [default: 1h for permissive]
        #[arg(long = "for", value_name = "DURATION", value_parser = units::parse_duration)]
        duration: Option<Duration>,
        #[command(flatten)]
        output: Output,
    },
}

#[derive(Serialize)]
struct Policy<'a> {
    node: &'a str,
    policy: &'a str,
    policy_network: &'a str,
    policy_until_ms: i64,
    policy_reason: &'a str,
    ceiling: &'a str,
    ceiling_network: &'a str,
    effective_mode: &'a str,
}

pub(crate) async fn policy(global: &Global, args: PolicyArgs) -> Result<(), CliError> {
    match args.verb {
        PolicyVerb::Show { node, output } => show(global, node, output).await,
        PolicyVerb::Set { node, mode, net, reason, duration, output } => {
            let bound = Bound { mode, network: net };
            if mode == Mode::Permissive && reason.trim().is_empty() {
                return Err(CliError::usage("permissive needs a reason")
                    .hint("cortex-agent policy set NODE permissive --reason TEXT"));
            }
            if bound != Bound::LEAST && reason.trim().is_empty() {
                return Err(CliError::usage("the network needs a reason")
                    .hint("cortex-agent policy set NODE strict --net full --reason TEXT"));
            }
            if bound == Bound::LEAST && duration.is_some() {
                return Err(CliError::usage(
                    "strict has no end, so --for goes with permissive or --net full only",
                )
                .hint("cortex-agent policy set NODE strict"));
            }
            let request = v1::SetNodePolicyRequest {
                node,
                mode: proto_mode(mode).into(),
                reason,
                for_ms: duration.map_or(0, units::millis),
                network: proto_network(net).into(),
            };
            let mut client = hub::operator(global).await?;
            let info = client.set_node_policy(hub::question(request)).await?.into_inner();
            print(global, output, &node::NodeRow::of(info))
        }
    }
}

pub(super) async fn show(global: &Global, name: String, output: Output) -> Result<(), CliError> {
    let row = node::one(global, name).await?;
    print(global, output, &row)
}

fn print(global: &Global, output: Output, row: &node::NodeRow) -> Result<(), CliError> {
    let policy = Policy {
        node: &row.name,
        policy: &row.policy,
        policy_network: &row.policy_network,
        policy_until_ms: row.policy_until_ms,
        policy_reason: &row.policy_reason,
        ceiling: &row.ceiling,
        ceiling_network: &row.ceiling_network,
        effective_mode: &row.effective_mode,
    };
    let lines = [
        ("node", policy.node.to_owned()),
        ("hub policy", row.policy_text()),
        ("ceiling", row.ceiling_text()),
        ("most a command gets", row.effective_mode.clone()),
    ];
    global.printer(output).show(&policy, &lines)
}
