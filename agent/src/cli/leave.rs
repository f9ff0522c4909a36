//! `leave`: this machine is a node no longer.

use std::time::Duration;

use clap::Args;
use cortex_proto::CODE_TRAILER;
use cortex_proto::v1;
use cortex_proto::v1::node_client::NodeClient;
use serde::Serialize;

use super::error::{CliError, Exit};
use super::{Global, Output, hub, local, printer};
use crate::audit::{Audit, AuditEvent};
use crate::client::Purpose;
use crate::config::{Settings, StateDir};
use crate::daemon::STOP_TIMEOUT;
use crate::identity::NodeIdentity;

/// Leave the mesh: the hub revokes this node, and its agent ends
#[derive(Debug, Args)]
#[command(after_help = "\
Running commands are ended. The files of workspaces stay where they are. The identity is put aside
(STATE/identity.old-ID) and can no longer be used at the hub; --purge deletes it, with the settings
and the indexes of workspaces. The local audit file stays in either case.

Without a connection the machine is a node no longer, but the hub does not know of it: an admin then
runs `cortex-agent node revoke NODE`.")]
pub(crate) struct LeaveArgs {
    /// Also delete keys, certificates, settings and indexes from this machine
    #[arg(long)]
    purge: bool,
    #[command(flatten)]
    output: Output,
}

#[derive(Serialize)]
struct Left {
    node_id: String,
    name: String,
    hub_told: bool,
    hub_problem: Option<String>,
    old_identity: Option<String>,
}

pub(crate) async fn leave(global: &Global, args: LeaveArgs) -> Result<(), CliError> {
    let state = global.state()?;
    state.check_owner()?;
    let identity = NodeIdentity::require(&state)?;
    let (hub_problem, _lock) = match state.try_lock()? {
        Some(lock) => (tell_hub(&state, &identity).await, lock),
        None => {
            let mut agent = local::agent(global).await?;
            let question = hub::long_question(v1::LeaveLocalRequest {});
            let answer = agent.leave_local(question).await?.into_inner();
            let problem = (!answer.hub_problem.is_empty()).then_some(answer.hub_problem);
            (problem, lock_after_agent(&state).await?)
        }
    };
    let hub_told = hub_problem.is_none();
    let node_id = identity.node_id.to_string();
    Audit::of(&state).append(&AuditEvent::Left { node_id: node_id.clone(), hub_told })?;
    let kept = NodeIdentity::put_aside(&state, identity.node_id)?;
    if args.purge {
        state.purge()?;
    }
    if let Some(problem) = &hub_problem {
        printer::complain(
            &format!(
                "warning: the hub could not be told: {problem}\nhint: an admin runs `cortex-agent node revoke {node_id}`"
            ),
            global.color,
        );
    }
    let left = Left {
        node_id,
        name: identity.name,
        hub_told,
        hub_problem,
        old_identity: (!args.purge).then(|| kept.display().to_string()),
    };
    let sentence = match &left.old_identity {
        Some(kept) => format!("left the mesh; the old identity is kept in {kept}"),
        None => "left the mesh; nothing of the identity is left here".to_owned(),
    };
    global.printer(args.output).say(&sentence, &left)
}

/// Tells the hub without an agent; the result is why it does not know.
async fn tell_hub(state: &StateDir, identity: &NodeIdentity) -> Option<String> {
    let told = async {
        let hub = Settings::load(state)?.hub;
        let channel = identity.client(hub)?.connect(Purpose::Control).await?;
        match NodeClient::new(channel).leave(hub::question(v1::LeaveRequest {})).await {
            Ok(_) => Ok(()),
            Err(status) => {
                let code = status.metadata().get(CODE_TRAILER).and_then(|code| code.to_str().ok());
                match code {
                    // It is none of its nodes already.
                    Some("node_unknown" | "node_revoked") => Ok(()),
                    _ => Err(CliError::from(status)),
                }
            }
        }
    };
    let error = told.await.err()?;
    Some(error.render().trim_end().trim_start_matches("error: ").replace('\n', "; "))
}

/// The state's lock, once the agent has ended.
async fn lock_after_agent(state: &StateDir) -> Result<std::fs::File, CliError> {
    let state = state.clone();
    let waiting = tokio::task::spawn_blocking(move || state.wait_for_lock());
    match tokio::time::timeout(STOP_TIMEOUT + Duration::from_secs(5), waiting).await {
        Ok(Ok(lock)) => Ok(lock?),
        Ok(Err(_)) | Err(_) => Err(CliError::new(Exit::Unreachable, "the agent does not end")
            .hint("end its process (`cortex-agent status` names it), then repeat")),
    }
}
