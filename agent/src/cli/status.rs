//! `status`: this node's agent, its session and its workspaces.

use clap::Args;
use cortex_proto::v1;
use cortex_shared::ids::NodeId;
use serde::Serialize;

use super::error::CliError;
use super::node::{bound_text, skew_text};
use super::workspace::SyncRow;
use super::{Global, Output, hub, local, printer};
use crate::config::Ceiling;
use crate::link::{mode_of, network_of};

/// Show this node's agent: connection, certificate, running commands, workspaces
#[derive(Debug, Args)]
#[command(after_help = "\
Asks the agent that runs with this state (--state), over its local socket. Fails with 6 if none
runs. For the whole mesh, see `cortex-agent node list`.")]
pub(crate) struct StatusArgs {
    #[command(flatten)]
    output: Output,
}

#[derive(Serialize)]
struct Status {
    node_id: String,
    name: String,
    mesh_id: String,
    hub: String,
    connected: bool,
    link_problem: Option<String>,
    next_attempt_ms: i64,
    connected_since_ms: i64,
    session_epoch: u64,
    certificate_not_after_ms: i64,
    ceiling: String,
    ceiling_network: String,
    ceiling_problem: Option<String>,
    policy: String,
    policy_network: String,
    policy_until_ms: i64,
    generation: u64,
    renew_at_ms: i64,
    clock_skew_ms: i64,
    identity_problem: Option<String>,
    running_tasks: u32,
    version: String,
    process_id: u32,
    workspaces: Vec<SyncRow>,
}

pub(crate) async fn status(global: &Global, args: StatusArgs) -> Result<(), CliError> {
    let mut agent = local::agent(global).await?;
    let answer = agent.agent_status(hub::question(v1::AgentStatusRequest {})).await?.into_inner();
    let status = Status {
        node_id: NodeId::from_slice(&answer.node_id).map(|id| id.to_string()).unwrap_or_default(),
        name: answer.name,
        mesh_id: answer.mesh_id,
        hub: answer.hub,
        connected: answer.connected,
        link_problem: (!answer.link_problem.is_empty()).then_some(answer.link_problem),
        next_attempt_ms: answer.next_attempt_ms,
        connected_since_ms: answer.connected_since_ms,
        session_epoch: answer.session_epoch,
        certificate_not_after_ms: answer.certificate_not_after_ms,
        ceiling: mode_of(answer.ceiling).to_string(),
        ceiling_network: network_of(answer.ceiling_network).to_string(),
        ceiling_problem: ceiling_problem(global)?,
        policy: mode_of(answer.policy).to_string(),
        policy_network: network_of(answer.policy_network).to_string(),
        policy_until_ms: answer.policy_until_ms,
        generation: answer.generation,
        renew_at_ms: answer.renew_at_ms,
        clock_skew_ms: answer.clock_skew_ms,
        identity_problem: (!answer.identity_problem.is_empty()).then_some(answer.identity_problem),
        running_tasks: answer.running_tasks,
        version: answer.version,
        process_id: answer.process_id,
        workspaces: answer.workspaces.iter().map(SyncRow::of).collect(),
    };
    let connection = match &status.link_problem {
        None if status.connected => format!(
            "connected since {} (session {})",
            printer::time(status.connected_since_ms),
            status.session_epoch
        ),
        None => "connecting".to_owned(),
        Some(problem) => {
            format!(
                "not connected: {problem}; next attempt {}",
                printer::time(status.next_attempt_ms)
            )
        }
    };
    let mut lines = vec![
        ("node", format!("{} ({})", status.name, status.node_id)),
        ("hub", status.hub.clone()),
        ("session", connection),
        (
            "certificate",
            format!(
                "until {}, generation {}, to be renewed at {}",
                printer::time(status.certificate_not_after_ms),
                status.generation,
                printer::time(status.renew_at_ms)
            ),
        ),
        ("ceiling", bound_text(&status.ceiling, &status.ceiling_network)),
        (
            "hub policy",
            match (status.policy_until_ms, bound_text(&status.policy, &status.policy_network)) {
                (0, policy) => policy,
                (until, policy) => format!("{policy} until {}", printer::time(until)),
            },
        ),
        ("clock", skew_text(status.clock_skew_ms)),
        ("running commands", status.running_tasks.to_string()),
        ("agent", format!("version {}, process {}", status.version, status.process_id)),
    ];
    if let Some(problem) = &status.ceiling_problem {
        lines.push(("ceiling problem", problem.clone()));
    }
    if let Some(problem) = &status.identity_problem {
        lines.push(("identity problem", problem.clone()));
    }
    lines.extend(status.workspaces.iter().map(|row| ("workspace", row.sentence())));
    global.printer(args.output).show(&status, &lines)
}

/// Why the stored ceiling does not count.
fn ceiling_problem(global: &Global) -> Result<Option<String>, CliError> {
    let state = global.state()?;
    let ceiling = state.owner().and_then(|owner| Ceiling::load(&state, owner));
    // An agent that has not joined has no ceiling, and the agent itself says so.
    Ok(ceiling.ok().and_then(|ceiling| ceiling.problem).map(|problem| problem.to_string()))
}
