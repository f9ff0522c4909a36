//! Relays running tasks between their readers and their nodes.
//!
//! A task is journalled before the node hears of it, and its verdict is journalled before the
//! reader hears of it. Whoever takes a task out of the table gives it its verdict, so it gets
//! exactly one: the node's exit, or the loss of the session, or a deadline.
//!
//! When a session or a stream ends, the tasks it carried are interrupted, their readers are told at
//! once, and for the resume grace the node can take them up again. The same holds for a reader whose
//! stream broke. Both outlive a restart of the hub: the journal says what was open, the spool how far
//! its output had come, and node and reader each come back with what they have. So nothing here that
//! a restart loses has to be kept.

mod counts;
mod ending;

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use cortex_proto::DEFAULT_OUTPUT_CREDIT;
use cortex_proto::v1::{
    StartTask, TaskExit, TaskIoHello, TaskSpec, TaskVerdict, hub_frame, task_io_up,
};
use cortex_shared::crash::crash_point;
use cortex_shared::ids::{NodeId, SessionId, TaskId};
use cortex_shared::tasks::TaskScope;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::task::TaskTracker;

pub(super) use self::ending::acknowledge;
use self::ending::{Known, LATE_REPORTS, Report, record_late};
use super::budget::Budget;
use super::draining::Draining;
use super::history::History;
use super::limits::{CommandLimits, Slot, Slots};
use super::running::Lost;
pub use super::running::{DEFAULT_CANCEL_GRACE, StreamRefusal, Task};
use super::spool::Spool;
pub use super::start::{Begun, Claim, StartRefusal};
use super::unwanted::Unwanted;
use super::verdicts::Unrecorded;
use crate::counters;
use crate::events::{EventBus, Kind, NewEvent};
use crate::node::registry::SessionHandle;
use crate::store::{Acceptance, NewTask, Store, StoreError, TaskEnd, TaskRecord};

/// How often a hub that stops looks whether all commands have begun: that takes some milliseconds.
const SETTLING_LOOK: Duration = Duration::from_millis(5);

/// Why a task is interrupted. Its stream often breaks before the session does, and for the same reason.
const CONNECTION_LOST: &str =
    "the connection to the node was lost; the command may still be running there";
/// Why a task ends whose node came back and said that it holds it.
const NOT_TAKEN_UP: &str = "the node connected anew and did not take the command up in time; it may still be running there";

/// Why a task ends whose reader did not come back.
const READER_AWAY: &str = "whoever read its output was away for longer than the resume grace";

/// A task in the table. Its place among its caller's commands is free once it is taken out.
struct Running {
    task: Arc<Task>,
    _slot: Option<Slot>,
}

/// How long things may take.
#[derive(Clone, Copy, Debug)]
pub struct Deadlines {
    /// For a node to open the stream of a task.
    pub start: Duration,
    /// For a node or a reader to come back.
    pub resume: Duration,
}

/// See the module.
pub struct Relay {
    tasks: Mutex<HashMap<TaskId, Running>>,
    /// Those that left the table, until their verdicts are where their readers take them.
    ending: TaskTracker,
    slots: Arc<Slots>,
    budget: Arc<Budget>,
    store: Arc<dyn Store>,
    spool: Arc<Spool>,
    history: Arc<History>,
    events: Arc<EventBus>,
    scope: TaskScope,
    deadlines: Deadlines,
    limits: CommandLimits,
    late: mpsc::Sender<Report>,
    unrecorded: Arc<Unrecorded>,
    unwanted: Arc<Unwanted>,
    draining: Draining,
}

impl Relay {
    /// A relay without tasks.
    #[must_use]
    pub fn new(
        store: Arc<dyn Store>,
        spool: Arc<Spool>,
        history: Arc<History>,
        events: Arc<EventBus>,
        scope: TaskScope,
        deadlines: Deadlines,
        limits: CommandLimits,
    ) -> Arc<Self> {
        let (late, reports) = mpsc::channel(LATE_REPORTS);
        let recording =
            record_late(Arc::clone(&store), Arc::clone(&events), reports, scope.clone());
        scope.spawn("late outcomes", recording);
        let (tasks, ending, slots) = (Mutex::default(), TaskTracker::new(), Arc::default());
        let budget = Arc::new(Budget::new(&limits));
        let unwanted = Unwanted::new(Arc::clone(&store), scope.clone());
        let unrecorded = Unrecorded::new(Arc::clone(&store), scope.clone(), Arc::clone(&unwanted));
        let unrecorded = Arc::new(unrecorded);
        Arc::new(Self {
            tasks,
            ending,
            slots,
            budget,
            store,
            spool,
            history,
            events,
            scope,
            deadlines,
            limits,
            late,
            unrecorded,
            unwanted,
            draining: Draining::default(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<TaskId, Running>> {
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether new commands are taken.
    #[must_use]
    pub fn draining(&self) -> &Draining {
        &self.draining
    }

    /// Ends once no command that was sent is just beginning at its node. For a hub that stops: a node that is
    /// told to leave begins nothing for which it has no stream yet.
    pub async fn begun(&self) {
        while self.lock().values().any(|running| running.task.is_beginning()) {
            tokio::time::sleep(SETTLING_LOOK).await;
        }
    }

    /// Ends once no verdict is on its way into the journal. For a hub that stops: whose command has ended is
    /// not to wait for the next hub to hear it.
    pub async fn told(&self) {
        self.ending.close();
        self.ending.wait().await;
    }

    /// How long a lost stream can be resumed.
    #[must_use]
    pub fn resume_grace(&self) -> Duration {
        self.deadlines.resume
    }

    /// The latest output of each task.
    #[must_use]
    pub fn spool(&self) -> &Arc<Spool> {
        &self.spool
    }

    /// The latest output of each node.
    #[must_use]
    pub fn history(&self) -> &Arc<History> {
        &self.history
    }

    /// How many tasks have no verdict yet.
    #[must_use]
    pub fn running(&self) -> usize {
        self.lock().len()
    }

    /// How many tasks have no verdict yet, or one that is not journalled, before which nobody is told. A
    /// reader that takes its output is then told before the hub stops; one that does not comes back to the
    /// next hub for it.
    #[must_use]
    pub fn unfinished(&self) -> usize {
        let tasks = self.lock();
        tasks.len() + self.ending.len()
    }

    /// How many tasks without a verdict are on this node.
    #[must_use]
    pub fn running_on(&self, node: NodeId) -> usize {
        self.lock().values().filter(|running| running.task.record.node == node).count()
    }

    /// A task without a verdict.
    #[must_use]
    pub fn get(&self, id: TaskId) -> Option<Arc<Task>> {
        self.lock().get(&id).map(|running| Arc::clone(&running.task))
    }

    /// Takes up what an earlier run of the hub left open: nodes and readers have the resume grace to come
    /// back.
    ///
    /// # Errors
    /// Those of the store.
    pub async fn recover(self: &Arc<Self>) -> Result<(), StoreError> {
        const REASON: &str = "the hub was restarted while the command ran";
        let open = self.store.open_tasks().await?;
        if !open.is_empty() {
            tracing::info!(tasks = open.len(), "tasks were open when the last hub ended");
        }
        for record in open {
            let received = self.spooled(record.id).await.unwrap_or_else(|error| {
                tracing::warn!(task = %record.id, %error, "the output of a task cannot be read");
                [0; 2]
            });
            let limits = self.limits.of(record.role);
            let left = limits.output_bytes.saturating_sub(received[0].saturating_add(received[1]));
            // Whatever the limit is: it runs.
            let slot = self.slots.take(&record.actor, usize::MAX);
            let share = self.budget.take(record.node, DEFAULT_OUTPUT_CREDIT);
            let task = Task::recovered(record, REASON, received, left, share);
            self.lock().insert(task.id(), Running { task: Arc::clone(&task), _slot: slot });
            self.await_node(&task, 1, REASON);
            self.reader_lost(&task, 1);
        }
        Ok(())
    }

    async fn spooled(&self, id: TaskId) -> io::Result<[u64; 2]> {
        let spool = Arc::clone(&self.spool);
        let read = tokio::task::spawn_blocking(move || spool.reopen(id)).await;
        read.map_err(io::Error::other)?
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
    ) -> Result<Begun, StartRefusal> {
        let _begins = self.draining.enter().map_err(|wait| StartRefusal::Draining { wait })?;
        let limits = self.limits.of(new.role);
        let slot = self.slots.take(&new.actor.name, limits.commands).ok_or_else(|| {
            StartRefusal::TooMany { actor: new.actor.name.clone(), limit: limits.commands }
        })?;
        let CommandLimits { hub, node, .. } = self.limits;
        if self.running() >= hub {
            return Err(StartRefusal::Full { whose: "this hub".into(), limit: hub });
        }
        if self.running_on(new.node) >= node {
            let whose = format!("node {:?}", new.node_name);
            return Err(StartRefusal::Full { whose, limit: node });
        }
        let window = (!new.detached).then_some(initial_credit);
        let share = self.budget.take(new.node, window.unwrap_or(DEFAULT_OUTPUT_CREDIT));
        let task = Task::new(record_of(&new), window, session.clone(), limits.output_bytes, share);
        let id = task.id();
        let frame = hub_frame::Frame::StartTask(StartTask {
            task_id: id.as_bytes().to_vec().into(),
            spec: Some(spec),
            actor: new.actor.name.clone(),
            initial_credit: task.to_reader.first_credit(),
            role: new.role.to_string(),
        });
        crash_point("task.accepting");
        match self.store.accept_task(new).await? {
            Acceptance::New => counters::TASKS_ACCEPTED.add(1),
            Acceptance::Known(id) => return Ok(Begun::Known(id)),
            Acceptance::KeyReused(task) => return Err(StartRefusal::KeyReused { task }),
        }
        crash_point("task.accepted");
        if !claim.take() {
            let exit = TaskExit {
                verdict: TaskVerdict::Cancelled.into(),
                reason: StartRefusal::GivenUp.to_string(),
                ..TaskExit::default()
            };
            self.conclude(self.ending_of(task), exit, Known::NeverBegun);
            return Err(StartRefusal::GivenUp);
        }
        self.spool.begin(id);
        self.tell(Kind::TaskAccepted, &task, |about| {
            let TaskRecord { mode, detached, workspace, .. } = &task.record;
            let about = about.with("mode", mode.to_string()).with("detached", *detached);
            if workspace.is_empty() { about } else { about.with("workspace", &**workspace) }
        });
        // First into the table, then to the node: if the session ends in between, either the table
        // is searched after this, or the send fails.
        self.lock().insert(id, Running { task: Arc::clone(&task), _slot: Some(slot) });
        let sent = session.send(frame);
        crash_point("task.dispatched");
        if sent.is_err() {
            self.fail_unbegun(id, TaskVerdict::StreamLost, "the node is not connected");
        }
        let (relay, deadline, waiting) =
            (Arc::clone(self), self.deadlines.start, Arc::clone(&task));
        self.after(&task, deadline, move || {
            // Taking the stream's place: a node that comes for it later is refused, and runs nothing.
            if waiting.take_opening() {
                waiting.cancel(0, Duration::ZERO);
                let reason = "the node did not start the command in time";
                relay.fail_unbegun(id, TaskVerdict::Failed, reason);
            }
        });
        Ok(Begun::New(task))
    }

    fn tell(&self, kind: Kind, task: &Task, more: impl FnOnce(NewEvent) -> NewEvent) {
        self.events.publish(kind, more(about(&task.record)));
    }

    /// Does something later, unless the task ends first or the hub stops.
    fn after(&self, task: &Arc<Task>, delay: Duration, act: impl FnOnce() + Send + 'static) {
        let (task, stop) = (Arc::clone(task), self.scope.token().clone());
        self.scope.spawn("task deadline", async move {
            tokio::select! {
                () = stop.cancelled() => {}
                () = task.ended() => {}
                () = tokio::time::sleep(delay) => act(),
            }
        });
    }

    /// The node opened a stream for a task: its first, or, after an interruption, another. Returns the
    /// stream's number.
    ///
    /// # Errors
    /// See [`StreamRefusal`].
    pub fn open_stream(
        &self,
        node: NodeId,
        hello: &TaskIoHello,
    ) -> Result<(Arc<Task>, u64), StreamRefusal> {
        let task = TaskId::from_slice(&hello.task_id).ok().and_then(|id| self.get(id));
        let task = task.filter(|task| task.record.node == node).ok_or(StreamRefusal::Unknown)?;
        let stream = if hello.resume {
            let stream = task.resume(hello).ok_or(StreamRefusal::NotReached)?;
            self.tell(Kind::TaskResumed, &task, |about| about);
            stream
        } else {
            task.open().ok_or(StreamRefusal::Unknown)?
        };
        task.heard();
        Ok((task, stream))
    }

    /// Takes a frame from the node's stream; returns whether more may follow.
    pub fn node_frame(&self, task: &Arc<Task>, stream: u64, frame: task_io_up::Frame) -> bool {
        if task.to_node.stream() != stream {
            return false;
        }
        task.heard();
        match frame {
            task_io_up::Frame::Started(started) => {
                if task.start(started) {
                    self.tell(Kind::TaskStarted, task, |about| about);
                }
            }
            task_io_up::Frame::Output(output) => {
                let violation = match task.output(output) {
                    Ok(None) => None,
                    Ok(Some(piece)) if task.may_write(piece.data.len()) => {
                        self.keep(task, piece);
                        None
                    }
                    Ok(Some(_)) => {
                        Some("the command wrote more output than its caller's role may have")
                    }
                    Err(_) => Some("the node sent more than was granted"),
                };
                if let Some(reason) = violation {
                    task.cancel(0, Duration::ZERO);
                    self.fail(task.id(), TaskVerdict::Failed, reason);
                    return false;
                }
            }
            task_io_up::Frame::StdinCredit(credit) => task.stdin_taken(credit.bytes),
            task_io_up::Frame::Exit(exit) => {
                match task.session() {
                    // Also after a verdict of the hub's own: nobody else acknowledges it in this session.
                    Some(session) => self.outcome(task.id(), &session, exit),
                    // The next session hears it again.
                    None => drop(self.finish(task.id(), task.record.node, exit)),
                }
                return false;
            }
            task_io_up::Frame::Hello(_) => {}
        }
        true
    }

    /// Keeps a piece of output for those who read it later.
    fn keep(&self, task: &Arc<Task>, piece: cortex_shared::replay::Piece) {
        let done = task.record.detached.then(|| {
            let (task, bytes) = (Arc::clone(task), piece.data.len() as u64);
            Box::new(move || task.spooled(bytes)) as Box<dyn FnOnce() + Send>
        });
        self.history.append(task.record.node, task.id(), piece.clone());
        self.spool.append(task.id(), piece, done);
    }

    /// A stream of the node ended. Unless it has opened another one, the task is interrupted.
    pub fn stream_ended(self: &Arc<Self>, task: &Arc<Task>, stream: u64) {
        if !task.has_ended() {
            self.interrupt(task, Lost::Stream(stream), CONNECTION_LOST);
        }
    }

    /// The session ended: its tasks are interrupted, and everybody who waits for one hears it.
    pub fn session_lost(self: &Arc<Self>, session: SessionId) {
        for task in self.those(|task| task.is_of(session)) {
            self.interrupt(&task, Lost::Session(session), CONNECTION_LOST);
        }
    }

    /// A node begins a session and says what it holds. What it does not hold ends now; what it does, it
    /// can take up.
    pub fn session_began(self: &Arc<Self>, session: &SessionHandle, held: &[TaskId]) {
        let ended = {
            let tasks = self.lock();
            held.iter().copied().filter(|id| !tasks.contains_key(id)).collect()
        };
        self.unwanted.end(session, ended);
        for task in self.those(|task| task.record.node == session.node) {
            if held.contains(&task.id()) {
                // Its stream was one of another session, whose end may not have been noticed yet.
                self.interrupt(&task, Lost::EarlierSession, "the node has connected anew");
                if let Some(number) = task.rebind(session) {
                    self.await_node(&task, number, NOT_TAKEN_UP);
                }
            } else if !task.is_of(session.id) {
                let reason = "the node does not run the command any more; its end is not known";
                self.fail(task.id(), TaskVerdict::StreamLost, reason);
            }
        }
    }

    /// Asks a task's node to end it, and goes on asking in each session of the node until it has said how
    /// the command ended, also after a restart of the hub.
    pub fn cancel(&self, task: &Arc<Task>, signal: u32, grace: Duration) {
        let news = !task.is_cancelled();
        task.cancel(signal, grace);
        if news {
            self.unwanted.remember(task.id());
        }
    }

    fn interrupt(self: &Arc<Self>, task: &Arc<Task>, lost: Lost, reason: &str) {
        if let Some(number) = task.interrupt(lost, reason, self.deadlines.resume) {
            self.tell(Kind::TaskInterrupted, task, |about| about.with("reason", reason));
            self.await_node(task, number, reason);
        }
    }

    /// Gives the node the grace to come back.
    fn await_node(self: &Arc<Self>, task: &Arc<Task>, interruption: u64, reason: &str) {
        if self.deadlines.resume.is_zero() {
            return self.fail(task.id(), TaskVerdict::StreamLost, reason);
        }
        let (relay, waiting, reason) = (Arc::clone(self), Arc::clone(task), reason.to_owned());
        self.after(task, self.deadlines.resume, move || {
            if waiting.is_interrupted(interruption) {
                relay.fail(waiting.id(), TaskVerdict::StreamLost, &reason);
            }
        });
    }

    /// A reader is gone. Unless it comes back in time, nobody wants the command any longer.
    pub fn reader_lost(self: &Arc<Self>, task: &Arc<Task>, reader: u64) {
        if task.has_ended() || !task.to_reader.is_read_by(reader) {
            return;
        }
        let (relay, waiting) = (Arc::clone(self), Arc::clone(task));
        let give_up = move || {
            if !waiting.to_reader.is_read_by(reader) || waiting.has_ended() {
                return;
            }
            if waiting.is_cancelled() {
                relay.cancel(&waiting, 0, DEFAULT_CANCEL_GRACE);
                // What is still under way has no reader: let it flow, so that the command can end.
                waiting.discard();
            } else {
                // Nobody asked for it: the node would take it for a cancel, so the verdict is the hub's.
                waiting.cancel(0, DEFAULT_CANCEL_GRACE);
                relay.fail(waiting.id(), TaskVerdict::Failed, READER_AWAY);
            }
        };
        if self.deadlines.resume.is_zero() {
            give_up();
        } else {
            self.after(task, self.deadlines.resume, give_up);
        }
    }

    /// Ends everything that runs on a node, at once: it has lost its place in the mesh.
    pub fn end_on_node(&self, node: NodeId, reason: &str) {
        self.end_all(|task| task.record.node == node, reason);
    }

    /// Ends everything that runs for a caller, at once.
    pub fn end_of_actor(&self, actor: &str, reason: &str) {
        self.end_all(|task| task.record.actor == actor, reason);
    }

    fn end_all(&self, wanted: impl Fn(&Task) -> bool, reason: &str) {
        for task in self.those(wanted) {
            task.cancel(0, Duration::ZERO);
            self.fail(task.id(), TaskVerdict::Cancelled, reason);
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
        of_session.filter(|task| task.is_of(session)).map(|task| task.last_frame()).max()
    }
}

/// An event about a command. Its text is for those who look it up.
fn about(record: &TaskRecord) -> NewEvent {
    NewEvent::of_task(record.id, record.node, &record.node_name, &record.actor)
}

fn ended(about: NewEvent, end: &TaskEnd) -> NewEvent {
    let about = about.with("verdict", end.verdict.as_str()).with("reason", &*end.reason);
    let about = about.with("exit_code", end.exit_code).with("signal", end.signal);
    about.with("duration_ms", end.duration_ms)
}

fn record_of(new: &NewTask) -> TaskRecord {
    TaskRecord {
        id: new.id,
        node: new.node,
        node_name: new.node_name.clone(),
        actor: new.actor.name.clone(),
        role: new.role,
        command: new.command.text.clone(),
        workspace: new.workspace.clone(),
        mode: new.mode,
        detached: new.detached,
        retry_of: new.retry_of,
        idempotency_key: new.key.as_ref().map(|key| key.key.clone()).unwrap_or_default(),
        accepted_at_ms: new.accepted_at_ms,
        end: None,
        late: None,
        cancel_wanted: false,
    }
}

#[cfg(test)]
mod tests;
