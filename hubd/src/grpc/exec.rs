//! Running a command for an operator: from the request to the stream of its output.

use std::sync::Arc;
use std::time::Duration;

use cortex_proto::v1;
use cortex_proto::v1::{ExecDown, ExecUp, exec_down, exec_up};
use cortex_shared::clock::unix_ms;
use cortex_shared::ids::{TaskId, WorkspaceId};
use cortex_shared::policy::{Mode, Role};
use futures_util::{Stream, stream};
use serde_json::json;
use tonic::{Code, Status, Streaming};

use super::auth::AdmittedOperator;
use super::convert;
use super::detached::run_to_end;
use super::operator::OperatorService;
use super::status::{from_store, invalid, offline, refuse, with_hint, with_retry_after};
use crate::store::{NewTask, Node};
use crate::task::mailbox::{End, ReaderFrame};
use crate::task::relay::{Claim, DEFAULT_CANCEL_GRACE, StartRefusal, Task};

/// Longest time a cancelled command may be given before it is killed.
const MAX_CANCEL_GRACE: Duration = Duration::from_secs(60);
/// Time the caller has to send its first frame.
const FIRST_FRAME: Duration = Duration::from_secs(10);

/// Accepts a command, journals it, sends it to its node, and returns what its reader gets.
pub(super) async fn begin(
    service: &OperatorService,
    operator: AdmittedOperator,
    mut inbound: Streaming<ExecUp>,
) -> Result<impl Stream<Item = Result<ExecDown, Status>> + Send + use<>, Status> {
    let first = tokio::time::timeout(FIRST_FRAME, inbound.message())
        .await
        .map_err(|_| refuse(Code::DeadlineExceeded, "no_first_frame", "no command in time"))??;
    let Some(ExecUp { frame: Some(exec_up::Frame::Start(start)) }) = first else {
        return Err(invalid("the first frame of a command is its start"));
    };
    let mut spec = start.spec.ok_or_else(|| invalid("there is no command"))?;
    convert::check_task_spec(&spec)?;
    let view = service.node(&start.node, &operator)?;
    let node = view.node;
    let mode = convert::mode(spec.mode);
    let workspace = allowed(service, &operator, &node, &spec)
        .inspect_err(|refusal| record_refusal(service, &operator, &node, &spec, refusal))?;
    spec.workspace_id = workspace.map(|id| id.as_bytes().to_vec().into()).unwrap_or_default();
    let session = view.session.ok_or_else(|| offline(&node.name))?;
    let new = NewTask {
        id: TaskId::new(),
        node: node.id,
        node_name: node.name.clone(),
        actor: operator.actor(),
        role: operator.role,
        command: convert::shown_command(&spec),
        workspace: spec.workspace.clone(),
        mode,
        accepted_at_ms: unix_ms(),
    };
    // To its end, even if the caller is gone or is revoked meanwhile: what is in the journal has to end
    // there. The reader ends the command when it is dropped.
    let (relay, claim) = (Arc::clone(&service.relay), Claim::default());
    let waiting = Waiting(claim.clone());
    let starting = async move {
        let task = relay.start(new, spec, start.initial_credit, session, &claim).await;
        task.map(|task| Reader { task })
    };
    let mut starting = std::pin::pin!(run_to_end(&service.scope, "exec start", starting));
    let reader = match tokio::time::timeout(service.accept_deadline, &mut starting).await {
        Ok(reader) => reader,
        Err(_) if waiting.0.take() => return Err(not_journalled()),
        // It begins at this very moment.
        Err(_) => starting.await,
    };
    let reader = reader?.map_err(|refusal| {
        if let StartRefusal::TooMany { .. } = &refusal {
            let detail = json!({ "reason": refusal.to_string(), "node_id": node.id.to_string() });
            service.refusals.record(&operator.actor(), "task.refused", &node.name, detail);
        }
        from_start(refusal)
    })?;
    let task = Arc::clone(&reader.task);
    let accepted = v1::ExecAccepted {
        task_id: task.id.as_bytes().to_vec().into(),
        node_id: node.id.as_bytes().to_vec().into(),
        node_name: node.name,
    };
    let cancel = service.scope.token().clone();
    service.scope.spawn("exec", async move {
        tokio::select! {
            () = cancel.cancelled() => {}
            // One that never ends its half does not keep this alive.
            () = task.end() => {}
            () = pass_on(&task, inbound) => {}
        }
    });
    Ok(output(reader, accepted))
}

/// A caller that waits for its command to begin. Once it is gone, for whatever reason, a command that
/// has not begun does not begin.
struct Waiting(Claim);

impl Drop for Waiting {
    fn drop(&mut self) {
        // Too late if the command has begun: its reader ends it then.
        let _taken = self.0.take();
    }
}

/// The store does not answer; the command was not begun, and will not be.
fn not_journalled() -> Status {
    let text = "the hub's store did not take the command in time; it was not begun";
    let status = refuse(Code::Unavailable, "store_slow", text);
    with_retry_after(status, Duration::from_secs(2))
}

/// Whether the caller may run this on the node, and the workspace it runs in. The name says which one is
/// meant: it is what stands in the journal.
fn allowed(
    service: &OperatorService,
    operator: &AdmittedOperator,
    node: &Node,
    spec: &v1::TaskSpec,
) -> Result<Option<WorkspaceId>, Status> {
    if node.cordoned {
        return Err(cordoned(&node.name));
    }
    let policy = node.policy.in_force(unix_ms());
    check_mode(convert::mode(spec.mode), operator.role, policy, node.ceiling, &node.name)?;
    check_role(operator.role, spec)?;
    if spec.workspace.is_empty() {
        return Ok(None);
    }
    let workspace = service.members.membership.by_name(&spec.workspace);
    let workspace = workspace.filter(|workspace| workspace.members.contains(&node.id));
    workspace
        .map(|workspace| Some(workspace.id))
        .ok_or_else(|| not_a_member(&spec.workspace, &node.name))
}

/// A command that was refused stands in the audit log like one that ran.
fn record_refusal(
    service: &OperatorService,
    operator: &AdmittedOperator,
    node: &Node,
    spec: &v1::TaskSpec,
    refusal: &Status,
) {
    let mut detail = json!({
        "node_id": node.id.to_string(),
        "workspace": spec.workspace.chars().take(63).collect::<String>(),
        "mode": convert::mode(spec.mode).to_string(),
        "role": operator.role.to_string(),
        "reason": refusal.message().chars().take(500).collect::<String>(),
    });
    convert::shown_command(spec).describe(&mut detail);
    service.refusals.record(&operator.actor(), "task.refused", &node.name, detail);
}

fn cordoned(node: &str) -> Status {
    with_hint(
        refuse(
            Code::FailedPrecondition,
            "node_cordoned",
            format!("node {node:?} is cordoned: it gets no new commands"),
        ),
        &format!("give it commands again: cortex-hubd node uncordon {node}"),
    )
}

fn from_start(refusal: StartRefusal) -> Status {
    match refusal {
        StartRefusal::TooMany { .. } => with_hint(
            refuse(Code::ResourceExhausted, "too_many_commands", refusal.to_string()),
            "wait until one of them has ended, or cancel it",
        ),
        StartRefusal::Store(error) => from_store(error),
        // Nobody is there to hear of it.
        StartRefusal::GivenUp => not_journalled(),
    }
}

/// Nobody gets more than every party allows; the refusal names the missing half.
fn check_mode(
    wanted: Mode,
    role: Role,
    policy: Mode,
    ceiling: Mode,
    node: &str,
) -> Result<(), Status> {
    if wanted == Mode::Strict {
        return Ok(());
    }
    let denied = |text: String, hint: String| {
        Err(with_hint(refuse(Code::PermissionDenied, "mode_not_allowed", text), &hint))
    };
    if role == Role::AgentToken {
        return denied(
            "the role agent-token runs commands in strict mode only".into(),
            "leave --mode out, or ask an operator to run it".into(),
        );
    }
    // Whoever gives the one half and then hears of the other has been sent twice.
    let by_policy = format!(
        "an administrator can change it: cortex-hubd policy set {node} permissive --reason TEXT"
    );
    let by_ceiling = "its owner can raise it there: cortex-agent ceiling set permissive";
    match (policy, ceiling) {
        (Mode::Permissive, Mode::Permissive) => Ok(()),
        (Mode::Strict, Mode::Permissive) => {
            denied(format!("the hub's policy for {node:?} is strict"), by_policy)
        }
        (Mode::Permissive, Mode::Strict) => {
            denied(format!("the ceiling of {node:?} is strict"), by_ceiling.into())
        }
        (Mode::Strict, Mode::Strict) => denied(
            format!("the hub's policy for {node:?} and its own ceiling are strict"),
            format!("{by_policy}; {by_ceiling}"),
        ),
    }
}

/// An AI token works inside workspaces and without a network.
fn check_role(role: Role, spec: &v1::TaskSpec) -> Result<(), Status> {
    if role != Role::AgentToken {
        return Ok(());
    }
    if spec.workspace.is_empty() {
        return Err(refuse(
            Code::PermissionDenied,
            "workspace_needed",
            "an agent token runs commands in workspaces only",
        ));
    }
    if spec.network() == v1::Network::Full {
        return Err(refuse(
            Code::PermissionDenied,
            "network_not_allowed",
            "an agent token has no network",
        ));
    }
    Ok(())
}

fn not_a_member(workspace: &str, node: &str) -> Status {
    with_hint(
        refuse(
            Code::FailedPrecondition,
            "not_a_member",
            format!("node {node:?} has no workspace {workspace:?}"),
        ),
        &format!("attach it: cortex-agent workspace attach {workspace} --node {node}"),
    )
}

/// Passes the caller's frames on to the task until the caller ends them.
async fn pass_on(task: &Task, mut inbound: Streaming<ExecUp>) {
    while let Ok(Some(frame)) = inbound.message().await {
        match frame.frame {
            Some(exec_up::Frame::Credit(credit)) => {
                task.to_node.credit(task.to_reader.grant(credit.bytes));
            }
            Some(exec_up::Frame::Stdin(stdin)) => {
                if task.to_node.stdin(stdin.data, stdin.end).is_err() {
                    // It sends more than it may: its own command is the only one that suffers.
                    task.cancel(0, Duration::ZERO);
                    return;
                }
            }
            Some(exec_up::Frame::Signal(signal)) => task.to_node.signal(signal.number),
            // A terminal's kind is told once, at its start.
            Some(exec_up::Frame::Resize(size)) => {
                task.to_node.resize(v1::TerminalSize { term: String::new(), ..size });
            }
            Some(exec_up::Frame::Cancel(cancel)) => {
                let grace = match cancel.grace_ms {
                    0 => DEFAULT_CANCEL_GRACE,
                    ms => Duration::from_millis(ms).min(MAX_CANCEL_GRACE),
                };
                task.cancel(cancel.signal, grace);
            }
            Some(exec_up::Frame::Start(_)) | None => {}
        }
    }
}

/// The reader of a task. When it goes away, nobody wants the command any longer.
struct Reader {
    task: Arc<Task>,
}

impl Drop for Reader {
    fn drop(&mut self) {
        if !self.task.has_ended() {
            self.task.cancel(0, DEFAULT_CANCEL_GRACE);
            // What is still under way has no reader: let it flow, so that the command can end.
            self.task.to_node.credit(self.task.to_reader.grant(u64::MAX));
        }
    }
}

fn output(
    reader: Reader,
    accepted: v1::ExecAccepted,
) -> impl Stream<Item = Result<ExecDown, Status>> + Send {
    stream::unfold((reader, Some(accepted)), |(reader, accepted)| async move {
        let frame = match accepted {
            Some(accepted) => exec_down::Frame::Accepted(accepted),
            None => match reader.task.to_reader.next().await? {
                ReaderFrame::Started(started) => exec_down::Frame::Started(started),
                ReaderFrame::Output(output) => exec_down::Frame::Output(output),
                ReaderFrame::StdinCredit(bytes) => {
                    exec_down::Frame::StdinCredit(v1::Credit { bytes })
                }
                ReaderFrame::End(End::Exit(exit)) => exec_down::Frame::Exit(exit),
                ReaderFrame::End(End::NotRecorded) => {
                    let status = refuse(
                        Code::Internal,
                        "verdict_not_recorded",
                        "the command ended, but the hub could not record how",
                    );
                    return Some((Err(status), (reader, None)));
                }
            },
        };
        Some((Ok(ExecDown { frame: Some(frame) }), (reader, None)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn permissive_needs_everyone_and_the_refusal_names_who_is_missing() {
        use Mode::{Permissive, Strict};
        let check = |role, policy, ceiling| check_mode(Permissive, role, policy, ceiling, "a");
        assert!(check(Role::Admin, Permissive, Permissive).is_ok());
        let missing = check(Role::Admin, Strict, Permissive).unwrap_err();
        assert!(missing.message().contains("policy"));
        let missing = check(Role::Admin, Permissive, Strict).unwrap_err();
        assert!(missing.message().contains("ceiling"));
        assert!(check(Role::AgentToken, Permissive, Permissive).is_err());
        assert!(check_mode(Strict, Role::AgentToken, Strict, Strict, "a").is_ok());
    }

    #[test]
    fn an_agent_token_stays_in_workspaces_without_a_network() {
        let inside = v1::TaskSpec { workspace: "w".into(), ..Default::default() };
        assert!(check_role(Role::AgentToken, &inside).is_ok());
        assert!(check_role(Role::AgentToken, &v1::TaskSpec::default()).is_err());
        let online = v1::TaskSpec { network: v1::Network::Full.into(), ..inside };
        assert!(check_role(Role::AgentToken, &online).is_err());
        assert!(check_role(Role::Operator, &online).is_ok());
    }
}
