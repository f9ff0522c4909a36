//! Running a command for an operator: from the request to the stream of its output.

mod reader;

use std::sync::Arc;
use std::time::Duration;

use cortex_proto::v1;
use cortex_proto::v1::{ExecDown, ExecUp, exec_down, exec_up};
use cortex_proto::{CODE_TASK_ENDING, DEFAULT_OUTPUT_CREDIT};
use cortex_shared::clock::unix_ms;
use cortex_shared::ids::{TaskId, WorkspaceId};
use cortex_shared::policy::{Mode, Network, Role};
use prost::Message as _;
use serde_json::json;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status, Streaming};

pub(super) use self::reader::hub_stops;
use self::reader::{Missed, Reader};
use super::auth::AdmittedOperator;
use super::detached::run_to_end;
use super::operator::{BoxStream, OperatorService};
use super::status::{draining, from_store, invalid, offline, refuse, with_hint, with_retry_after};
use super::{convert, tasks};
use crate::node::registry::NodeView;
use crate::store::{IdempotencyKey, NewTask, Node, TaskRecord};
use crate::task::relay::{Begun, Claim, DEFAULT_CANCEL_GRACE, Relay, StartRefusal, Task};
use crate::task::to_reader::{End, ToReader};
use crate::task::verdict::wire_exit;

/// Longest time a cancelled command may be given before it is killed.
const MAX_CANCEL_GRACE: Duration = Duration::from_secs(60);
/// Time the caller has to send its first frame.
const FIRST_FRAME: Duration = Duration::from_secs(10);

/// Most of a specification that is kept to repeat it.
const MAX_KEPT_SPEC_BYTES: usize = 64 * 1024;

type Frames = BoxStream<ExecDown>;

/// Begins a command, or goes on with one whose stream broke; returns what its reader gets.
pub(super) async fn begin(
    service: &OperatorService,
    operator: AdmittedOperator,
    mut inbound: Streaming<ExecUp>,
) -> Result<Frames, Status> {
    let first = tokio::time::timeout(FIRST_FRAME, inbound.message())
        .await
        .map_err(|_| refuse(Code::DeadlineExceeded, "no_first_frame", "no command in time"))??;
    match first.and_then(|first| first.frame) {
        Some(exec_up::Frame::Start(start)) => start_task(service, operator, start, inbound).await,
        Some(exec_up::Frame::Attach(attach)) => {
            let id = TaskId::from_slice(&attach.task_id).map_err(|e| invalid(e.to_string()))?;
            let place = Place {
                has: [attach.stdout_offset, attach.stderr_offset],
                credit: attach.credit,
                unacknowledged: attach.unacknowledged,
                known: false,
            };
            go_on(service, &operator, id, place, inbound).await
        }
        _ => Err(invalid("the first frame of a command is its start, or what it goes on with")),
    }
}

/// What is asked for: a new command, or an old one once more.
async fn wanted(
    service: &OperatorService,
    operator: &AdmittedOperator,
    start: &mut v1::ExecStart,
) -> Result<(NodeView, v1::TaskSpec, Option<TaskId>), Status> {
    if start.retry_of.is_empty() {
        let spec = start.spec.take().ok_or_else(|| invalid("there is no command"))?;
        return Ok((service.node(&start.node, operator)?, spec, None));
    }
    let record = tasks::find(service, operator, &start.retry_of).await?;
    let spec = service.store.task_spec(record.id).await.map_err(from_store)?;
    let spec =
        spec.and_then(|spec| v1::TaskSpec::decode(spec.as_slice()).ok()).ok_or_else(|| {
            let why = "its specification was not kept: it had input, or was too long";
            let text = format!("task {} cannot be repeated: {why}", record.id);
            refuse(Code::FailedPrecondition, "not_repeatable", text)
        })?;
    let mut spec = spec;
    give_variables(&mut spec, start.spec.take().unwrap_or_default(), record.id)?;
    let view = service.node(&record.node.to_string(), operator)?;
    Ok((view, spec, Some(record.id)))
}

/// The specification as it is kept to repeat it. Values of variables are often secrets: they pass
/// through, and are not kept.
fn kept_spec(spec: &v1::TaskSpec) -> Option<Vec<u8>> {
    if spec.stdin || spec.terminal.is_some() {
        return None;
    }
    let mut kept = spec.clone();
    for variable in &mut kept.env {
        variable.value.clear();
    }
    (kept.encoded_len() <= MAX_KEPT_SPEC_BYTES).then(|| kept.encode_to_vec())
}

/// Gives the variables of a repeated command their values again.
fn give_variables(
    spec: &mut v1::TaskSpec,
    given: v1::TaskSpec,
    task: TaskId,
) -> Result<(), Status> {
    let shown = |name: &[u8]| String::from_utf8_lossy(name).chars().take(64).collect::<String>();
    let known = |name: &[u8]| spec.env.iter().any(|variable| variable.name == name);
    if let Some(other) = given.env.iter().find(|variable| !known(&variable.name)) {
        return Err(invalid(format!("task {task} had no variable {:?}", shown(&other.name))));
    }
    let mut missing = Vec::new();
    for variable in &mut spec.env {
        // As when it was given first: the last one counts.
        match given.env.iter().rfind(|given| given.name == variable.name) {
            Some(given) => variable.value = given.value.clone(),
            None => missing.push(shown(&variable.name)),
        }
    }
    if missing.is_empty() {
        return Ok(());
    }
    missing.truncate(16);
    let text =
        format!("task {task} had variables, whose values are not kept: {}", missing.join(", "));
    let flags: Vec<String> = missing.iter().map(|name| format!("--env {name}=…")).collect();
    let hint = format!("give them again: cortex-agent task retry {task} {}", flags.join(" "));
    Err(with_hint(refuse(Code::FailedPrecondition, "variables_needed", text), &hint))
}

/// Begins a command that somebody reads, unless it is to run by itself.
async fn start_task(
    service: &OperatorService,
    operator: AdmittedOperator,
    start: v1::ExecStart,
    inbound: Streaming<ExecUp>,
) -> Result<Frames, Status> {
    if start.detach {
        return detached(service, &operator, start).await.map(only);
    }
    let credit = start.initial_credit;
    match given(service, &operator, start).await? {
        Given::New { task, reader, listening } => {
            let accepted = accepted(service, &task.record, false);
            listen(service, &task, reader.number, inbound, listening);
            Ok(Box::pin(reader::frames(reader, accepted, None, service.scope.token().clone())))
        }
        Given::Known(id) => {
            let place = Place { has: [0; 2], credit, unacknowledged: 0, known: true };
            go_on(service, &operator, id, place, inbound).await
        }
    }
}

/// Begins a command that runs by itself, or finds it by its idempotency key.
pub(super) async fn detached(
    service: &OperatorService,
    operator: &AdmittedOperator,
    start: v1::ExecStart,
) -> Result<v1::ExecAccepted, Status> {
    match given(service, operator, v1::ExecStart { detach: true, ..start }).await? {
        Given::New { task, .. } => Ok(accepted(service, &task.record, false)),
        Given::Known(id) => {
            let record = tasks::get(service, operator, id).await?;
            Ok(accepted(service, &record, true))
        }
    }
}

/// What has become of a command that was asked for.
enum Given {
    /// Its node has been given it.
    New {
        task: Arc<Task>,
        /// The caller's place at its output.
        reader: Reader,
        /// Cancelled once the reader is gone.
        listening: CancellationToken,
    },
    /// It is an earlier one, by its idempotency key.
    Known(TaskId),
}

/// Accepts a command, journals it, sends it to its node.
async fn given(
    service: &OperatorService,
    operator: &AdmittedOperator,
    mut start: v1::ExecStart,
) -> Result<Given, Status> {
    let (view, mut spec, retry_of) = wanted(service, operator, &mut start).await?;
    convert::check_task_spec(&spec)?;
    if start.detach && (spec.stdin || spec.terminal.is_some()) {
        return Err(invalid("a detached command has neither input nor a terminal"));
    }
    let key = convert::idempotency_key(std::mem::take(&mut start.idempotency_key))?;
    let node = view.node;
    // What is asked for, before anything is filled in.
    let key = key.map(|key| {
        let mut hasher = blake3::Hasher::new();
        hasher.update(node.id.as_bytes());
        hasher.update(&spec.encode_to_vec());
        IdempotencyKey { key, request_hash: *hasher.finalize().as_bytes() }
    });
    let mode = convert::mode(spec.mode);
    let workspace = allowed(service, operator, &node, &spec)
        .inspect_err(|refusal| record_refusal(service, operator, &node, &spec, refusal))?;
    spec.workspace_id = workspace.map(|id| id.as_bytes().to_vec().into()).unwrap_or_default();
    let session = match view.session {
        Some(session) => session,
        None => service.returning(&node).await?,
    };
    let new = NewTask {
        id: TaskId::new(),
        node: node.id,
        node_name: node.name.clone(),
        actor: operator.actor(),
        role: operator.role,
        command: convert::shown_command(&spec),
        workspace: spec.workspace.clone(),
        mode,
        detached: start.detach,
        spec: kept_spec(&spec),
        retry_of,
        key,
        accepted_at_ms: unix_ms(),
    };
    // To its end, even if the caller is gone or is revoked meanwhile: what is in the journal has to end
    // there. The reader ends the command when it is dropped.
    let (relay, claim) = (Arc::clone(&service.relay), Claim::default());
    let waiting = Waiting(claim.clone());
    let credit = start.initial_credit;
    let (operators, name) = (Arc::clone(&service.operators), operator.name.clone());
    let gone = CancellationToken::new();
    let listening = gone.clone();
    let starting = async move {
        let begun = relay.start(new, spec, credit, session, &claim).await?;
        operators.end_if_revoked(&name);
        Ok::<_, StartRefusal>(match begun {
            Begun::Known(id) => Err(id),
            Begun::New(task) => Ok(Reader {
                to_reader: Arc::clone(&task.to_reader),
                number: 1,
                running: Some((task, relay)),
                _gone: gone.drop_guard(),
            }),
        })
    };
    let mut starting = std::pin::pin!(run_to_end(&service.scope, "exec start", starting));
    let begun = match tokio::time::timeout(service.accept_deadline, &mut starting).await {
        Ok(begun) => begun,
        Err(_) if waiting.0.take() => return Err(not_journalled()),
        // It begins at this very moment.
        Err(_) => starting.await,
    };
    let begun = begun?.map_err(|refusal| {
        if let StartRefusal::TooMany { .. } | StartRefusal::Full { .. } = &refusal {
            let detail = json!({ "reason": refusal.to_string(), "node_id": node.id.to_string() });
            service.refusals.record(&operator.actor(), "task.refused", &node.name, detail);
        }
        from_start(refusal)
    })?;
    let reader = match begun {
        Ok(reader) => reader,
        Err(id) => return Ok(Given::Known(id)),
    };
    let Some((task, _)) = reader.running.clone() else { return Err(offline(&node.name)) };
    Ok(Given::New { task, reader, listening })
}

/// Where a reader goes on.
struct Place {
    has: [u64; 2],
    credit: u64,
    unacknowledged: u64,
    /// It did not ask for this task, but its idempotency key led to it.
    known: bool,
}

/// Goes on with a task of the caller's own.
async fn go_on(
    service: &OperatorService,
    operator: &AdmittedOperator,
    id: TaskId,
    place: Place,
    inbound: Streaming<ExecUp>,
) -> Result<Frames, Status> {
    let Place { has, credit, unacknowledged, known } = place;
    let record = tasks::get(service, operator, id).await?;
    if record.actor != operator.name {
        tasks::note_refusal(service, operator, "task.attach_refused", &record);
        let text = format!("task {id} belongs to {:?}", record.actor);
        let status = refuse(Code::PermissionDenied, "not_your_task", text);
        return Err(with_hint(status, &format!("look at it: cortex-agent task attach {id}")));
    }
    let spool = service.relay.spool();
    let running = service.relay.get(id);
    let gone = CancellationToken::new();
    let (reader, attached) = match running {
        Some(task) => {
            let attached = task.attach(has, credit, unacknowledged).ok_or_else(|| {
                let text = format!("task {id} runs without a reader");
                let status = refuse(Code::FailedPrecondition, "detached", text);
                with_hint(status, &format!("look at it: cortex-agent task attach {id}"))
            })?;
            listen(service, &task, attached.reader, inbound, gone.clone());
            let to_reader = Arc::clone(&task.to_reader);
            let running = Some((task, Arc::clone(&service.relay)));
            (
                Reader { to_reader, number: attached.reader, running, _gone: gone.drop_guard() },
                attached,
            )
        }
        None => {
            // Asked again: it may have ended since.
            let record = tasks::get(service, operator, id).await?;
            let end = record.end.as_ref().ok_or_else(|| {
                let status = refuse(Code::Unavailable, CODE_TASK_ENDING, "the task is just ending");
                with_retry_after(status, Duration::from_millis(100))
            })?;
            let mailbox = ToReader::recovered(
                [end.stdout_bytes, end.stderr_bytes],
                false,
                DEFAULT_OUTPUT_CREDIT,
            );
            let attached = mailbox.attach(has, credit, unacknowledged);
            let attached = attached.ok_or_else(|| invalid("the task has no reader"))?;
            mailbox.end(End::Exit(wire_exit(end)));
            let to_reader = Arc::new(mailbox);
            let (granting, stop) = (Arc::clone(&to_reader), service.scope.token().clone());
            let listening = gone.clone();
            service.scope.spawn("exec", async move {
                let credit = async {
                    let mut inbound = inbound;
                    while let Ok(Some(up)) = inbound.message().await {
                        if let Some(exec_up::Frame::Credit(credit)) = up.frame {
                            granting.grant(credit.bytes);
                        }
                    }
                };
                tokio::select! {
                    () = stop.cancelled() => {}
                    () = listening.cancelled() => {}
                    () = credit => {}
                }
            });
            let gone = gone.drop_guard();
            (Reader { to_reader, number: attached.reader, running: None, _gone: gone }, attached)
        }
    };
    spool.flush(id).await;
    let missed = Missed::new(spool.reader(id), has, attached);
    let accepted = accepted(service, &record, known);
    let stop = service.scope.token().clone();
    Ok(Box::pin(reader::frames(reader, accepted, Some(missed), stop)))
}

fn accepted(service: &OperatorService, record: &TaskRecord, known: bool) -> v1::ExecAccepted {
    v1::ExecAccepted {
        task_id: record.id.as_bytes().to_vec().into(),
        node_id: record.node.as_bytes().to_vec().into(),
        node_name: record.node_name.clone(),
        resume_grace_ms: u64::try_from(service.relay.resume_grace().as_millis())
            .unwrap_or(u64::MAX),
        known,
    }
}

/// An answer that says no more than that the task is accepted.
fn only(accepted: v1::ExecAccepted) -> Frames {
    let frame = ExecDown { frame: Some(exec_down::Frame::Accepted(accepted)) };
    Box::pin(futures_util::stream::iter([Ok(frame)]))
}

/// Takes the caller's frames, until it ends them, is gone, or another reader takes over.
fn listen(
    service: &OperatorService,
    task: &Arc<Task>,
    reader: u64,
    inbound: Streaming<ExecUp>,
    gone: CancellationToken,
) {
    let (task, stop) = (Arc::clone(task), service.scope.token().clone());
    let relay = Arc::clone(&service.relay);
    service.scope.spawn("exec", async move {
        tokio::select! {
            () = stop.cancelled() => {}
            () = gone.cancelled() => {}
            () = pass_on(&relay, &task, reader, inbound) => {}
        }
    });
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
    let mode = convert::mode(spec.mode);
    check_mode(mode, operator.role, policy.mode, node.ceiling.mode, &node.name)?;
    check_role(operator.role, spec)?;
    // A permissive command has the host's network anyway.
    if mode == Mode::Strict && spec.network() == v1::Network::Full {
        check_network(policy.network, node.ceiling.network, &node.name)?;
    }
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

pub(super) fn cordoned(node: &str) -> Status {
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
        StartRefusal::TooMany { .. } | StartRefusal::Full { .. } => with_hint(
            refuse(Code::ResourceExhausted, "too_many_commands", refusal.to_string()),
            "wait until one of them has ended, or cancel it",
        ),
        StartRefusal::Draining { wait } => draining(wait, &refusal.to_string()),
        StartRefusal::KeyReused { .. } => with_hint(
            refuse(Code::AlreadyExists, "idempotency_key_reused", refusal.to_string()),
            "choose another key, or repeat exactly the same command",
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

/// The network of a strict command is for those to give who give the mode.
fn check_network(policy: Network, ceiling: Network, node: &str) -> Result<(), Status> {
    let by_policy = format!(
        "an administrator can allow it: cortex-hubd policy set {node} strict --net full --reason TEXT"
    );
    let by_ceiling = "its owner can allow it there: cortex-agent ceiling set strict --net full";
    let (text, hint) = match (policy, ceiling) {
        (Network::Full, Network::Full) => return Ok(()),
        (Network::None, Network::Full) => {
            (format!("the hub's policy for {node:?} allows no network"), by_policy)
        }
        (Network::Full, Network::None) => {
            (format!("the ceiling of {node:?} allows no network"), by_ceiling.into())
        }
        (Network::None, Network::None) => (
            format!("the hub's policy for {node:?} and its own ceiling allow no network"),
            format!("{by_policy}; {by_ceiling}"),
        ),
    };
    Err(with_hint(refuse(Code::PermissionDenied, "network_not_allowed", text), &hint))
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
async fn pass_on(relay: &Relay, task: &Arc<Task>, reader: u64, mut inbound: Streaming<ExecUp>) {
    while let Ok(Some(frame)) = inbound.message().await {
        if !task.to_reader.is_read_by(reader) {
            return;
        }
        match frame.frame {
            Some(exec_up::Frame::Credit(credit)) => task.grant(credit.bytes),
            Some(exec_up::Frame::Stdin(stdin)) => {
                if task.to_node.stdin(stdin.data, stdin.end).is_err() {
                    // It sends more than it may: its own command is the only one that suffers.
                    relay.cancel(task, 0, Duration::ZERO);
                    return;
                }
            }
            Some(exec_up::Frame::Signal(signal)) => task.to_node.signal(signal.number),
            // A terminal's kind is told once, at its start.
            Some(exec_up::Frame::Resize(size)) => {
                task.to_node.resize(v1::TerminalSize { term: String::new(), ..size });
            }
            Some(exec_up::Frame::Cancel(cancel)) => {
                relay.cancel(task, cancel.signal, cancel_grace(cancel.grace_ms));
            }
            Some(exec_up::Frame::Start(_) | exec_up::Frame::Attach(_)) | None => {}
        }
    }
}

/// The time between the first signal of a cancel and KILL.
pub(super) fn cancel_grace(grace_ms: u64) -> Duration {
    match grace_ms {
        0 => DEFAULT_CANCEL_GRACE,
        ms => Duration::from_millis(ms).min(MAX_CANCEL_GRACE),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn variable(name: &str, value: &str) -> v1::EnvVar {
        v1::EnvVar { name: name.to_owned().into(), value: value.to_owned().into() }
    }

    #[test]
    fn values_of_variables_are_not_kept_and_have_to_be_given_again() {
        let env = vec![variable("TOKEN", "secret"), variable("LEVEL", "3")];
        let spec = v1::TaskSpec { env: env.clone(), ..v1::TaskSpec::default() };
        let kept = kept_spec(&spec).unwrap();
        assert!(!kept.windows(6).any(|part| part == b"secret"));
        let mut repeated = v1::TaskSpec::decode(kept.as_slice()).unwrap();
        let give = |spec: &mut v1::TaskSpec, env: Vec<v1::EnvVar>| {
            give_variables(spec, v1::TaskSpec { env, ..v1::TaskSpec::default() }, TaskId::new())
        };
        let refused = give(&mut repeated, vec![variable("TOKEN", "x")]).unwrap_err();
        assert!(refused.message().contains("LEVEL") && !refused.message().contains("TOKEN"));
        assert!(give(&mut repeated, vec![variable("OTHER", "x")]).is_err());
        give(&mut repeated, env).unwrap();
        assert_eq!(repeated, spec);
    }

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
    fn the_network_needs_both_halves_and_the_refusal_names_who_is_missing() {
        for policy in [Network::None, Network::Full] {
            for ceiling in [Network::None, Network::Full] {
                let Err(refusal) = check_network(policy, ceiling, "a") else {
                    assert_eq!(policy.min(ceiling), Network::Full);
                    continue;
                };
                let said = |word| refusal.message().contains(word);
                assert_eq!(said("policy"), policy == Network::None, "{refusal}");
                assert_eq!(said("ceiling"), ceiling == Network::None, "{refusal}");
            }
        }
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
