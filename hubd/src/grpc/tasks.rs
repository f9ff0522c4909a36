//! Looking at tasks, waiting for them, cancelling them.
//!
//! A caller sees the tasks of the nodes it sees; an agent token its own only. What is not seen is not
//! there.

use std::collections::VecDeque;
use std::sync::Arc;

use cortex_proto::v1;
use cortex_proto::v1::{TaskState, read_task_response};
use cortex_shared::ids::{NodeId, TaskId};
use cortex_shared::policy::Role;
use cortex_shared::replay::Piece;
use futures_util::future::BoxFuture;
use futures_util::stream;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status};

use super::auth::AdmittedOperator;
use super::convert;
use super::exec::cancel_grace;
use super::in_scope::while_seen;
use super::operator::{BoxStream, OperatorService};
use super::status::{from_lookup, from_store, invalid, refuse, shutting_down, with_hint};
use crate::store::{TaskEndState, TaskQuery, TaskRecord};
use crate::task::relay::{Relay, Task};
use crate::task::running::cancel_frame;
use crate::task::spool::SpoolReader;
use crate::task::to_reader::wire;
use crate::task::verdict::wire_exit;

/// Tasks of a page, if the caller does not say.
const PAGE: u32 = 100;
/// Most tasks of a page.
const MAX_PAGE: u32 = 1000;
/// Digits that name a task at least.
const MIN_ENDING: usize = 8;

fn sees(service: &OperatorService, caller: &AdmittedOperator, task: &TaskRecord) -> bool {
    if caller.role == Role::AgentToken && task.actor != caller.name {
        return false;
    }
    match service.registry.get(task.node) {
        Some(view) => caller.sees(&view.node),
        // Of a node that was forgotten nobody knows the labels any more.
        None => caller.scope.is_everything(),
    }
}

fn unknown(wanted: &str) -> Status {
    let wanted: String = wanted.chars().take(64).collect();
    with_hint(
        refuse(Code::NotFound, "task_not_found", format!("no task matches {wanted:?}")),
        "list the tasks: cortex-agent task list",
    )
}

/// Writes down that a caller was refused a task of somebody else.
pub(super) fn note_refusal(
    service: &OperatorService,
    caller: &AdmittedOperator,
    action: &'static str,
    task: &TaskRecord,
) {
    let detail = serde_json::json!({ "reason": "not_your_task", "node_id": task.node.to_string() });
    service.refusals.record(&caller.actor(), action, &task.id.to_string(), detail);
}

/// The task of this id, if the caller sees it.
pub(super) async fn get(
    service: &OperatorService,
    caller: &AdmittedOperator,
    id: TaskId,
) -> Result<TaskRecord, Status> {
    let record = service.store.task(id).await.map_err(from_store)?;
    record.filter(|task| sees(service, caller, task)).ok_or_else(|| unknown(&id.to_string()))
}

/// The task of this id, or whose id ends like this.
pub(super) async fn find(
    service: &OperatorService,
    caller: &AdmittedOperator,
    wanted: &str,
) -> Result<TaskRecord, Status> {
    if let Ok(id) = wanted.parse() {
        return get(service, caller, id).await;
    }
    let digits: Vec<u8> = wanted.bytes().filter(|byte| *byte != b'-').collect();
    let number = |byte: &u8| char::from(*byte).to_digit(16).and_then(|n| u8::try_from(n).ok());
    let digits: Option<Vec<u8>> = digits.iter().map(number).collect();
    let digits = digits.filter(|digits| (MIN_ENDING..=32).contains(&digits.len()));
    let Some(digits) = digits else {
        let status = unknown(wanted);
        return Err(with_hint(status, "give its id, or the last 8 or more digits of it"));
    };
    // Whole bytes, from the end.
    let odd = digits.len() % 2;
    let ending: Vec<u8> = digits[odd..].chunks_exact(2).map(|two| two[0] << 4 | two[1]).collect();
    let mut found = service.store.tasks_ending_in(ending).await.map_err(from_store)?;
    let text: String =
        wanted.chars().filter(|c| *c != '-').map(|c| c.to_ascii_lowercase()).collect();
    found.retain(|task| task.id.to_string().replace('-', "").ends_with(&text));
    found.retain(|task| sees(service, caller, task));
    match found.len() {
        0 => Err(unknown(wanted)),
        1 => Ok(found.remove(0)),
        _ => Err(refuse(
            Code::FailedPrecondition,
            "task_ambiguous",
            format!("{wanted:?} is the end of more than one task id"),
        )),
    }
}

/// A task as callers see it: by the journal, and, without a verdict, by what the relay knows.
fn info(service: &OperatorService, record: TaskRecord) -> v1::TaskInfo {
    let live = if record.end.is_none() { service.relay.get(record.id) } else { None };
    let (state, interruption) = match (&record.end, &live) {
        (Some(end), _) => (ended_state(end.verdict.state()), String::new()),
        (None, Some(task)) => task.state(),
        // Its verdict is being written.
        (None, None) => (TaskState::Running, String::new()),
    };
    let started = record.end.as_ref().and_then(|end| end.started_at_ms);
    let started = started.or_else(|| live.as_ref().and_then(|task| task.started_at_ms()));
    let name = service.registry.get(record.node).map(|view| view.node.name);
    let may_run = record.may_run();
    v1::TaskInfo {
        task_id: record.id.as_bytes().to_vec().into(),
        node_id: record.node.as_bytes().to_vec().into(),
        node_name: name.unwrap_or(record.node_name),
        actor: record.actor,
        command: record.command,
        workspace: record.workspace,
        mode: convert::wire_mode(record.mode).into(),
        state: state.into(),
        exit: record.end.as_ref().map(wire_exit),
        accepted_at_ms: record.accepted_at_ms,
        started_at_ms: started.unwrap_or_default(),
        ended_at_ms: record.end.as_ref().map_or(0, |end| end.ended_at_ms),
        late_outcome: record.late.as_ref().map(wire_exit),
        late_outcome_at_ms: record.late.as_ref().map_or(0, |late| late.ended_at_ms),
        detached: record.detached,
        idempotency_key: record.idempotency_key,
        retry_of: record.retry_of.map(|id| id.as_bytes().to_vec().into()).unwrap_or_default(),
        interruption,
        cancel_pending: record.cancel_wanted && may_run,
    }
}

fn ended_state(state: TaskEndState) -> TaskState {
    match state {
        TaskEndState::Finished => TaskState::Finished,
        TaskEndState::Failed => TaskState::Failed,
        TaskEndState::Cancelled => TaskState::Cancelled,
    }
}

/// The tasks that the caller sees and wants.
pub(super) async fn list(
    service: &OperatorService,
    caller: &AdmittedOperator,
    request: v1::ListTasksRequest,
) -> Result<v1::ListTasksResponse, Status> {
    let nodes: Option<Vec<NodeId>> = if request.node.is_empty() {
        let all = || service.registry.all().into_iter().filter(|view| caller.sees(&view.node));
        (!caller.scope.is_everything()).then(|| all().map(|view| view.node.id).collect())
    } else {
        let find = service.registry.find(&request.node, |node| caller.sees(node));
        Some(vec![find.map_err(from_lookup)?.node.id])
    };
    let mut wanted = Vec::new();
    for number in request.states.iter().take(16) {
        match TaskState::try_from(*number) {
            Ok(state) if state != TaskState::Unspecified => wanted.push(state),
            _ => return Err(invalid("there is no such state of a task")),
        }
    }
    let mine = request.mine || caller.role == Role::AgentToken;
    let before = match request.page.as_ref() {
        [] => None,
        page => Some(TaskId::from_slice(page).map_err(|_| invalid("there is no such page"))?),
    };
    let limit = match request.page_size {
        0 => PAGE,
        size => size.min(MAX_PAGE),
    };
    let ended = [
        (TaskState::Finished, TaskEndState::Finished),
        (TaskState::Failed, TaskEndState::Failed),
        (TaskState::Cancelled, TaskEndState::Cancelled),
    ];
    let open = [TaskState::Accepted, TaskState::Running, TaskState::Interrupted];
    let states = (!wanted.is_empty()).then(|| {
        let ended = ended.iter().filter(|(state, _)| wanted.contains(state));
        (open.iter().any(|state| wanted.contains(state)), ended.map(|(_, end)| *end).collect())
    });
    let actor = mine.then(|| caller.name.clone());
    let query = TaskQuery { nodes, actor, states, before, limit };
    let records = service.store.tasks(query).await.map_err(from_store)?;
    let full = records.len() == usize::try_from(limit).unwrap_or(usize::MAX);
    let last = records.last().filter(|_| full).map(|record| record.id.as_bytes().to_vec());
    let tasks = records.into_iter().map(|record| info(service, record));
    // Which of the open ones runs, only the relay knows.
    let tasks = tasks.filter(|task| wanted.is_empty() || wanted.contains(&task.state()));
    Ok(v1::ListTasksResponse { tasks: tasks.collect(), next_page: last.unwrap_or_default().into() })
}

/// One task.
pub(super) async fn show(
    service: &OperatorService,
    caller: &AdmittedOperator,
    wanted: &str,
) -> Result<v1::TaskInfo, Status> {
    Ok(info(service, find(service, caller, wanted).await?))
}

/// One task, once it has its verdict.
pub(super) async fn wait(
    service: &OperatorService,
    caller: &AdmittedOperator,
    wanted: &str,
) -> Result<v1::TaskInfo, Status> {
    let record = find(service, caller, wanted).await?;
    let Some(task) = service.relay.get(record.id).filter(|_| record.end.is_none()) else {
        return settled(service, caller, record.id).await;
    };
    match service.scope.token().run_until_cancelled(task.ended()).await {
        Some(()) => settled(service, caller, record.id).await,
        None => Err(shutting_down()),
    }
}

/// A task that has ended, once the journal has its verdict: that follows within a flush.
async fn settled(
    service: &OperatorService,
    caller: &AdmittedOperator,
    id: TaskId,
) -> Result<v1::TaskInfo, Status> {
    const PATIENCE: u32 = 1000;
    for _ in 0..PATIENCE {
        let record = get(service, caller, id).await?;
        if record.end.is_some() {
            return Ok(info(service, record));
        }
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    Err(refuse(Code::Internal, "verdict_not_recorded", "the end of the task was not recorded"))
}

/// Asks a task's node to end it.
pub(super) async fn cancel(
    service: &OperatorService,
    caller: &AdmittedOperator,
    request: v1::CancelTaskRequest,
) -> Result<v1::TaskInfo, Status> {
    let record = find(service, caller, &request.task).await?;
    if request.signal > 64 {
        return Err(invalid("there is no such signal"));
    }
    let own = record.actor == caller.name;
    if !own && !matches!(caller.role, Role::Operator | Role::Admin) {
        note_refusal(service, caller, "task.cancel_refused", &record);
        let text = format!("the role {} may cancel its own tasks only", caller.role);
        return Err(refuse(Code::PermissionDenied, "not_your_task", text));
    }
    let grace = cancel_grace(request.grace_ms);
    // Whatever its verdict here: without its node's word it may still run there.
    if record.may_run() {
        service.store.want_cancel(record.id).await.map_err(from_store)?;
        match service.relay.get(record.id) {
            Some(task) => service.relay.cancel(&task, request.signal, grace),
            None => {
                let view = service.registry.get(record.node);
                if let Some(session) = view.and_then(|view| view.session) {
                    // A node that is away hears it when it is back.
                    session.send(cancel_frame(record.id, request.signal, grace)).ok();
                }
            }
        }
        let detail = serde_json::json!({ "signal": request.signal, "node": record.node_name });
        let at_ms = cortex_shared::clock::unix_ms();
        let audit = caller.actor().audit(at_ms, "task.cancel", record.id.to_string(), detail);
        service.store.record_audit(audit).await.map_err(from_store)?;
    }
    let cancel_wanted = record.may_run();
    Ok(info(service, TaskRecord { cancel_wanted, ..record }))
}

/// What a viewer of a task's output goes through.
struct View {
    relay: Arc<Relay>,
    /// The last thing to say.
    finish: BoxFuture<'static, Result<v1::TaskInfo, Status>>,
    /// Away only while it reads.
    spool: Option<SpoolReader>,
    pieces: VecDeque<Piece>,
    /// What the viewer has of each stream.
    has: [u64; 2],
    changes: watch::Receiver<u64>,
    /// Changes when the task is interrupted or resumed.
    phases: watch::Receiver<u64>,
    /// What runs, as long as it has no verdict and is followed.
    running: Option<Arc<Task>>,
    interrupted: bool,
    stop: CancellationToken,
    over: bool,
}

/// What is kept of a task's output, and with `follow` what comes, until its end.
pub(super) async fn read(
    service: &OperatorService,
    caller: &AdmittedOperator,
    request: v1::ReadTaskRequest,
) -> Result<BoxStream<v1::ReadTaskResponse>, Status> {
    let record = find(service, caller, &request.task).await?;
    let (node, gone) = (record.node, unknown(&record.id.to_string()));
    let running = service.relay.get(record.id).filter(|_| request.follow);
    let spool = service.relay.spool();
    let changes = spool.changes(record.id);
    spool.flush(record.id).await;
    let (this, operator, id) = (service.clone(), caller.clone(), record.id);
    // Also one that has just left the relay, and whose verdict is being written.
    let settle = request.follow && record.end.is_none();
    let finish = async move {
        if settle {
            settled(&this, &operator, id).await
        } else {
            let record = get(&this, &operator, id).await?;
            Ok(info(&this, record))
        }
    };
    let view = View {
        relay: Arc::clone(&service.relay),
        finish: Box::pin(finish),
        spool: Some(spool.reader(record.id)),
        pieces: VecDeque::new(),
        has: [request.stdout_offset, request.stderr_offset],
        changes,
        phases: running.as_ref().map_or_else(|| watch::Sender::new(0).subscribe(), |t| t.phases()),
        running,
        interrupted: false,
        stop: service.scope.token().clone(),
        over: false,
    };
    let frames = stream::unfold(view, |mut view| async move {
        if view.over {
            return None;
        }
        let (stop, task) = (view.stop.clone(), view.running.clone());
        let stops = async move {
            stop.cancelled().await;
            // The rest of one that has ended comes without anybody's doing: its viewer need not come back for it.
            if task.is_none_or(|task| task.has_ended()) {
                std::future::pending::<()>().await;
            }
        };
        let frame = tokio::select! {
            biased;
            frame = next_of(&mut view) => frame,
            () = stops => Err(super::exec::hub_stops()),
        };
        view.over |= frame.is_err();
        Some((frame.map(|frame| v1::ReadTaskResponse { frame: Some(frame) }), view))
    });
    Ok(while_seen(Box::pin(frames), &service.registry, caller, node, gone))
}

async fn next_of(view: &mut View) -> Result<read_task_response::Frame, Status> {
    loop {
        if let Some(piece) = view.pieces.pop_front() {
            let has = view.has[piece.stream];
            let Some(piece) = piece.from(has) else { continue };
            return Ok(read_task_response::Frame::Output(wire(piece)));
        }
        view.changes.mark_unchanged();
        view.phases.mark_unchanged();
        let ended = view.running.as_ref().is_none_or(|task| task.has_ended());
        if let Some(task) = view.running.as_ref().filter(|_| ended) {
            view.relay.spool().flush(task.id()).await;
        }
        let mut spool = view.spool.take();
        let read = tokio::task::spawn_blocking(move || {
            let pieces = spool.as_mut().map_or_else(|| Ok(Vec::new()), SpoolReader::read);
            (spool, pieces)
        });
        let (spool, pieces) = read.await.map_err(|error| super::status::internal(&error))?;
        view.spool = spool;
        view.pieces = pieces.map_err(|error| super::status::internal(&error))?.into();
        if !view.pieces.is_empty() {
            continue;
        }
        let Some(task) = view.running.clone().filter(|_| !ended) else {
            view.over = true;
            return (&mut view.finish).await.map(read_task_response::Frame::Task);
        };
        let (state, reason) = task.state();
        let interrupted = state == TaskState::Interrupted;
        if std::mem::replace(&mut view.interrupted, interrupted) != interrupted {
            let grace = view.relay.resume_grace();
            let resume_within_ms = u64::try_from(grace.as_millis()).unwrap_or(u64::MAX);
            return Ok(if interrupted {
                let news = v1::TaskInterrupted { reason, resume_within_ms };
                read_task_response::Frame::Interrupted(news)
            } else {
                read_task_response::Frame::Resumed(v1::TaskResumed {})
            });
        }
        tokio::select! {
            () = task.ended() => {}
            Ok(()) = view.phases.changed() => {}
            // Closed: what was kept had to go, and its end is all that is left to tell.
            Ok(()) = view.changes.changed() => {}
        }
    }
}
