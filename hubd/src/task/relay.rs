//! Relays running tasks between their readers and their nodes.
//!
//! A task is journalled before the node hears of it, and its verdict is journalled before the
//! reader hears of it. Whoever takes a task out of the table gives it its verdict, so it gets
//! exactly one: the node's exit, or the loss of the session, or a deadline.
//!
//! In memory only: a restart of the hub fails what was running, from the journal.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use cortex_proto::v1::{
    CancelTask, StartTask, TaskExit, TaskSpec, TaskVerdict, hub_frame, task_io_up,
};
use cortex_shared::clock::unix_ms;
use cortex_shared::ids::{NodeId, SessionId, TaskId};
use cortex_shared::tasks::TaskScope;
use cortex_shared::text::shorten;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::limits::{Limits, Slot, Slots};
use super::mailbox::{End, ToNode, ToReader};
use super::verdicts::Unrecorded;
use crate::node::registry::SessionHandle;
use crate::store::{NewTask, Store, StoreError, TaskEnd, TaskEndState};

/// Longest reason or hint of a node that is kept.
const MAX_TEXT_BYTES: usize = 1024;

/// Time a cancelled command has before it is killed, if the caller names none.
pub const DEFAULT_CANCEL_GRACE: Duration = Duration::from_secs(2);
/// Longest reason that is kept of what a node says.
const MAX_REASON_BYTES: usize = 1024;

/// Why a task was not begun.
#[derive(Debug, thiserror::Error)]
pub enum StartRefusal {
    /// The caller has as many running as it may.
    #[error("{actor:?} has {limit} commands running, which is as many as its role may")]
    TooMany {
        /// The caller.
        actor: String,
        /// How many it may have.
        limit: usize,
    },
    /// The task could not be journalled.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// It was journalled only after its caller had stopped waiting; it ends there.
    #[error("the command was not begun, because its caller no longer waited for it")]
    GivenUp,
}

/// Decides between a task that is about to begin and a caller that stops waiting for it: whoever comes
/// first has it.
#[derive(Clone, Debug, Default)]
pub struct Claim(Arc<AtomicBool>);

impl Claim {
    /// Whether the other side has not come first.
    #[must_use]
    pub fn take(&self) -> bool {
        !self.0.swap(true, Ordering::AcqRel)
    }
}

/// A task that is accepted and has not ended.
pub struct Task {
    /// Its id.
    pub id: TaskId,
    /// Where it runs.
    pub node: NodeId,
    /// Who asked for it.
    actor: String,
    session: SessionHandle,
    /// Output it may still write.
    output_left: AtomicU64,
    /// Frames to its reader.
    pub to_reader: ToReader,
    /// Frames to its node.
    pub to_node: ToNode,
    attached: AtomicBool,
    last_frame: Mutex<Instant>,
    /// Cancelled when the task has its verdict.
    ended: CancellationToken,
}

impl Task {
    /// Asks the node to end the command.
    pub fn cancel(&self, signal: u32, grace: Duration) {
        let frame = hub_frame::Frame::CancelTask(CancelTask {
            task_id: self.id.as_bytes().to_vec().into(),
            signal,
            grace_ms: u64::try_from(grace.as_millis()).unwrap_or(u64::MAX),
        });
        // A node that is gone has nothing to cancel: the loss of its session ends the task.
        self.session.send(frame).ok();
    }

    /// Takes output off what the task may write; whether there was enough left.
    fn may_write(&self, bytes: usize) -> bool {
        let bytes = bytes as u64;
        let take = |left: u64| left.checked_sub(bytes);
        self.output_left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).is_ok()
    }

    /// Whether the task has its verdict.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.ended.is_cancelled()
    }

    /// Waits until it has ended.
    pub async fn end(&self) {
        self.ended.cancelled().await;
    }
}

/// A task in the table. Its place among its caller's commands is free once it is taken out.
struct Running {
    task: Arc<Task>,
    _slot: Slot,
}

/// See the module.
pub struct Relay {
    tasks: Mutex<HashMap<TaskId, Running>>,
    slots: Arc<Slots>,
    store: Arc<dyn Store>,
    scope: TaskScope,
    start_deadline: Duration,
    unrecorded: Arc<Unrecorded>,
}

impl Relay {
    /// A relay without tasks. A node has `start_deadline` to open the stream of a task.
    #[must_use]
    pub fn new(store: Arc<dyn Store>, scope: TaskScope, start_deadline: Duration) -> Arc<Self> {
        let (tasks, slots) = (Mutex::default(), Arc::default());
        let unrecorded = Arc::new(Unrecorded::new(Arc::clone(&store), scope.clone()));
        Arc::new(Self { tasks, slots, store, scope, start_deadline, unrecorded })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<TaskId, Running>> {
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many tasks have no verdict yet.
    #[must_use]
    pub fn running(&self) -> usize {
        self.lock().len()
    }

    /// How many of them are on this node.
    #[must_use]
    pub fn running_on(&self, node: NodeId) -> usize {
        self.lock().values().filter(|running| running.task.node == node).count()
    }

    /// Journals a task, then sends it to its node, unless `claim` was taken meanwhile. The task is
    /// durable when this returns. To be run to its end: one that is given up half way leaves a task in
    /// the journal that nobody ends.
    ///
    /// # Errors
    /// See [`StartRefusal`]; the node has then not heard of it.
    pub async fn start(
        self: &Arc<Self>,
        new: NewTask,
        spec: TaskSpec,
        initial_credit: u64,
        session: SessionHandle,
        claim: &Claim,
    ) -> Result<Arc<Task>, StartRefusal> {
        let limits = Limits::of(new.role);
        let slot = self.slots.take(&new.actor.name, limits.commands).ok_or_else(|| {
            StartRefusal::TooMany { actor: new.actor.name.clone(), limit: limits.commands }
        })?;
        let to_reader = ToReader::new(0);
        let initial_credit = to_reader.grant(initial_credit);
        let task = Arc::new(Task {
            id: new.id,
            node: new.node,
            actor: new.actor.name.clone(),
            session,
            output_left: AtomicU64::new(limits.output_bytes),
            to_reader,
            to_node: ToNode::default(),
            attached: AtomicBool::new(false),
            last_frame: Mutex::new(Instant::now()),
            ended: CancellationToken::new(),
        });
        let frame = hub_frame::Frame::StartTask(StartTask {
            task_id: task.id.as_bytes().to_vec().into(),
            spec: Some(spec),
            actor: new.actor.name.clone(),
            initial_credit,
            role: new.role.to_string(),
        });
        self.store.accept_task(new).await?;
        if !claim.take() {
            let exit = TaskExit {
                verdict: TaskVerdict::Cancelled.into(),
                reason: StartRefusal::GivenUp.to_string(),
                ..TaskExit::default()
            };
            self.conclude(task, exit);
            return Err(StartRefusal::GivenUp);
        }
        // First into the table, then to the node: if the session ends in between, either the table
        // is searched after this, or the send fails.
        self.lock().insert(task.id, Running { task: Arc::clone(&task), _slot: slot });
        if task.session.send(frame).is_err() {
            self.fail(task.id, TaskVerdict::StreamLost, "the node is not connected");
        }
        let (relay, id, ended) = (Arc::clone(self), task.id, task.ended.clone());
        let deadline = self.start_deadline;
        let waiting = Arc::clone(&task);
        self.scope.spawn("task start deadline", async move {
            let late = tokio::time::timeout(deadline, ended.cancelled()).await.is_err();
            // Taking the stream's place: a node that comes for it later is refused, and runs nothing.
            if late && !waiting.attached.swap(true, Ordering::AcqRel) {
                waiting.cancel(0, Duration::ZERO);
                relay.fail(id, TaskVerdict::Failed, "the node did not start the command in time");
            }
        });
        Ok(task)
    }

    /// The node opened the task's stream; `None` if this is not its task, or not the first time.
    #[must_use]
    pub fn attach(&self, node: NodeId, id: TaskId) -> Option<Arc<Task>> {
        let tasks = self.lock();
        let task = Arc::clone(&tasks.get(&id).filter(|running| running.task.node == node)?.task);
        (!task.attached.swap(true, Ordering::AcqRel)).then_some(task)
    }

    /// Takes a frame from the node; returns whether more may follow.
    pub fn node_frame(&self, task: &Task, frame: task_io_up::Frame) -> bool {
        *task.last_frame.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
        match frame {
            task_io_up::Frame::Started(started) => task.to_reader.started(started),
            task_io_up::Frame::Output(output) => {
                if !task.may_write(output.data.len()) {
                    task.cancel(0, Duration::ZERO);
                    let reason = "the command wrote more output than its caller's role may have";
                    self.fail(task.id, TaskVerdict::Failed, reason);
                    return false;
                }
                if task.to_reader.output(output).is_err() {
                    task.cancel(0, Duration::ZERO);
                    self.fail(task.id, TaskVerdict::Failed, "the node sent more than was granted");
                    return false;
                }
            }
            task_io_up::Frame::StdinCredit(credit) => {
                task.to_node.stdin_taken(credit.bytes);
                task.to_reader.stdin_credit(credit.bytes);
            }
            task_io_up::Frame::Exit(exit) => {
                self.finish(task.id, task.session.id, exit);
                return false;
            }
            task_io_up::Frame::Hello(_) => {}
        }
        true
    }

    /// The node's stream of this task ended; without an exit before, its end is not known.
    pub fn stream_ended(&self, task: &Task) {
        self.fail(task.id, TaskVerdict::StreamLost, "the node closed the stream of the command");
    }

    /// The session ended: nobody waits any longer for its tasks.
    pub fn session_lost(&self, session: SessionId) {
        for task in self.those(|task| task.session.id == session) {
            self.fail(
                task.id,
                TaskVerdict::StreamLost,
                "the connection to the node was lost; the command may still be running there",
            );
        }
    }

    /// Ends everything that runs on a node, at once: it has lost its place in the mesh.
    pub fn end_on_node(&self, node: NodeId, reason: &str) {
        self.end_all(|task| task.node == node, reason);
    }

    /// Ends everything that runs for a caller, at once.
    pub fn end_of_actor(&self, actor: &str, reason: &str) {
        self.end_all(|task| task.actor == actor, reason);
    }

    fn end_all(&self, wanted: impl Fn(&Task) -> bool, reason: &str) {
        for task in self.those(wanted) {
            task.cancel(0, Duration::ZERO);
            self.fail(task.id, TaskVerdict::Cancelled, reason);
        }
    }

    fn those(&self, wanted: impl Fn(&Task) -> bool) -> Vec<Arc<Task>> {
        let tasks = self.lock();
        let wanted = tasks.values().filter(|running| wanted(&running.task));
        wanted.map(|running| Arc::clone(&running.task)).collect()
    }

    /// When something last came from one of this session's tasks.
    #[must_use]
    pub fn last_frame(&self, session: SessionId) -> Option<Instant> {
        let tasks = self.lock();
        let of_session = tasks.values().map(|running| &running.task);
        let of_session = of_session.filter(|task| task.session.id == session);
        of_session.map(|task| *task.last_frame.lock().unwrap_or_else(PoisonError::into_inner)).max()
    }

    fn fail(&self, id: TaskId, verdict: TaskVerdict, reason: &str) {
        if let Some(task) = self.take(id, |_| true) {
            let exit = TaskExit {
                verdict: verdict.into(),
                reason: reason.to_owned(),
                ..TaskExit::default()
            };
            self.conclude(task, exit);
        }
    }

    /// Gives a task the verdict its node reports.
    pub fn finish(&self, id: TaskId, session: SessionId, exit: TaskExit) {
        if let Some(task) = self.take(id, |task| task.session.id == session) {
            self.conclude(task, exit);
        }
    }

    fn take(&self, id: TaskId, wanted: impl FnOnce(&Task) -> bool) -> Option<Arc<Task>> {
        let mut tasks = self.lock();
        if wanted(&tasks.get(&id)?.task) { Some(tasks.remove(&id)?.task) } else { None }
    }

    /// Journals the verdict, and only then tells the reader.
    fn conclude(&self, task: Arc<Task>, mut exit: TaskExit) {
        // A node's words are kept for ever and shown to people: they are short.
        shorten(&mut exit.reason, MAX_TEXT_BYTES);
        shorten(&mut exit.hint, MAX_TEXT_BYTES);
        exit.exit_code = exit.exit_code.min(255);
        task.ended.cancel();
        task.to_node.close();
        let end = journal_entry(&exit);
        let (store, unrecorded) = (Arc::clone(&self.store), Arc::clone(&self.unrecorded));
        self.scope.spawn("task verdict", async move {
            let end = match store.end_task(task.id, end.clone()).await {
                Ok(()) => End::Exit(exit),
                Err(error) => {
                    tracing::error!(task = %task.id, %error, "verdict not journalled");
                    unrecorded.keep(task.id, end);
                    End::NotRecorded
                }
            };
            task.to_reader.end(end);
        });
    }
}

fn journal_entry(exit: &TaskExit) -> TaskEnd {
    let (state, verdict) = match exit.verdict() {
        TaskVerdict::Exited => (TaskEndState::Finished, "exited"),
        TaskVerdict::Signalled => (TaskEndState::Finished, "signalled"),
        TaskVerdict::TimeLimit => (TaskEndState::Failed, "time_limit"),
        TaskVerdict::Cancelled => (TaskEndState::Cancelled, "cancelled"),
        TaskVerdict::Refused => (TaskEndState::Failed, "refused"),
        TaskVerdict::NotFound => (TaskEndState::Failed, "not_found"),
        TaskVerdict::Failed | TaskVerdict::Unspecified => (TaskEndState::Failed, "failed"),
        TaskVerdict::StreamLost => (TaskEndState::Failed, "stream_lost"),
    };
    TaskEnd {
        state,
        verdict,
        exit_code: (exit.verdict() == TaskVerdict::Exited).then_some(exit.exit_code),
        signal: (exit.signal != 0).then_some(exit.signal),
        reason: shortened(&exit.reason),
        stdout_bytes: exit.stdout_bytes,
        stderr_bytes: exit.stderr_bytes,
        stdout_hash: exit.stdout_hash.as_ref().try_into().ok(),
        stderr_hash: exit.stderr_hash.as_ref().try_into().ok(),
        ended_at_ms: unix_ms(),
    }
}

/// What is kept of a text that a node wrote.
fn shortened(text: &str) -> String {
    let mut end = text.len().min(MAX_REASON_BYTES);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text[..end].to_owned()
}

#[cfg(test)]
mod tests;
