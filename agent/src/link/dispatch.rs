//! What each frame of the hub means on this node.
//!
//! Called by the session's task for each frame and never makes it wait: a task is started in a task
//! of its own, everything else is handed over. State: which tasks run, the policy in force (strict
//! until a hub says otherwise), and the journal of tasks, which is on disk. Tasks outlive the session
//! that ordered them; when the daemon stops, they are ended. What runs outside the sandbox is decided a
//! second time, and written down, directly before it runs: see `permit`. Policies are written down by
//! `policy_log`.

use std::collections::{HashSet, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use cortex_proto::v1::node_client::NodeClient;
use cortex_proto::v1::{self, hub_frame, node_frame};
use cortex_shared::crash::crash_point;
use cortex_shared::ids::{TaskId, WorkspaceId};
use cortex_shared::policy::{Bound, Mode, Role};
use cortex_shared::tasks::TaskScope;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;

use super::authority::{Authority, Clocks, HubPolicy, Wanted, permit, wanted};
use super::files::{FileWork, MAX_FILE_WORK};
use super::journal::Journal;
use super::permit::Permit;
use super::policy_log::PolicyLog;
use super::report_pace::Reports;
use super::request::{self, Refusal};
use super::running::{NotBegun, RunningTasks};
use super::session::Outbox;
use super::task::{self, OnDisconnect, TaskContext};
use super::workspaces::{Membership, Workspaces};
use super::{bound_of, mode_of, network_of, proto_mode, proto_network};
use crate::audit::{Audit, CommandLine, cut};
use crate::config::{Ceiling, CommandSettings, ConfigError, SandboxSettings, Settings, StateDir};
use crate::exec::{Bounds, CancelCause, CommandControl};
use crate::identity::live::LiveIdentity;
use crate::sandbox::exposed;
use crate::sync::Occupied;

/// Cancels of one task that may wait; more say nothing new.
const CANCELS: usize = 4;
/// Longest time between the first signal of a cancel and KILL.
const MAX_GRACE: Duration = Duration::from_secs(60);
/// Time between TERM and KILL for the commands of a node that was put out of the mesh.
const EXPELLED_GRACE: Duration = Duration::from_secs(2);

/// Ends of earlier tasks that are told at once in a new session; then one for each that is acknowledged.
const REPORTS_AT_ONCE: usize = 64;

/// What a session lends to what it makes the node do.
#[derive(Clone)]
pub struct SessionContext {
    /// The connection.
    pub client: NodeClient<Channel>,
    /// The way back for small frames.
    pub outbox: Outbox,
    /// Tasks that end with the session.
    pub tasks: TaskScope,
    /// How long after its loss commands can be taken up again; without that, they end with it.
    pub resume_grace: Duration,
}

/// Turns frames into deeds. Clones share the same state.
#[derive(Clone)]
pub struct Dispatcher {
    inner: Arc<Inner>,
}

struct Inner {
    state: StateDir,
    workspaces: Workspaces,
    journal: Journal,
    session: watch::Sender<Option<SessionContext>>,
    /// Owns the commands, which outlive their sessions; cancelled when the daemon stops.
    commands: TaskScope,
    identity: LiveIdentity,
    policy: Mutex<HubPolicy>,
    policy_log: PolicyLog,
    running: RunningTasks<Handle>,
    /// Ends of earlier tasks that this session has yet to hear of.
    to_report: Mutex<VecDeque<TaskId>>,
    /// Bounds the operations on files.
    file_slots: Arc<Semaphore>,
}

/// A task that runs.
struct Handle {
    cancels: mpsc::Sender<CommandControl>,
    acknowledged: CancellationToken,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every critical section leaves the data whole, so a panic elsewhere does not spoil it.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Dispatcher {
    /// A dispatcher without a session.
    ///
    /// # Errors
    /// If the record of started tasks cannot be read or written: without it no task could be run
    /// safely.
    pub fn new(
        state: StateDir,
        workspaces: Workspaces,
        identity: LiveIdentity,
    ) -> Result<Self, ConfigError> {
        let path = state.path().join("tasks");
        let journal = Journal::open(&path).map_err(|source| ConfigError::Write { path, source })?;
        let ceiling_of = state.clone();
        let policy_log =
            PolicyLog::new(identity.audit().clone(), Arc::new(move || read_ceiling(&ceiling_of)));
        Ok(Self {
            inner: Arc::new(Inner {
                state,
                workspaces,
                journal,
                session: watch::Sender::new(None),
                commands: TaskScope::new(),
                identity,
                policy: Mutex::new(HubPolicy::UNTOLD),
                policy_log,
                running: RunningTasks::new(),
                to_report: Mutex::new(VecDeque::new()),
                file_slots: Arc::new(Semaphore::new(MAX_FILE_WORK)),
            }),
        })
    }

    /// How many commands run.
    #[must_use]
    pub fn running_tasks(&self) -> usize {
        self.inner.running.len()
    }

    /// Waits until nobody's command or file is at work here; what would begin after that is refused. Safe to
    /// give up.
    pub async fn close_when_idle(&self) {
        let no_files = || self.inner.file_slots.available_permits() == MAX_FILE_WORK;
        self.inner.running.close_when_empty(no_files).await;
    }

    /// What the hub's policy for this node, as last told, allows now; and its end, 0 for none.
    #[must_use]
    pub fn policy(&self) -> (Bound, i64) {
        let policy = *lock(&self.inner.policy);
        match policy.in_force(clocks(&self.inner.identity)) {
            Bound::LEAST => (Bound::LEAST, 0),
            bound => (bound, policy.until_ms()),
        }
    }

    /// The owner's bound as it is now. Read anew, so that lowering it counts at once; what cannot
    /// be read allows nothing.
    pub async fn ceiling(&self) -> Bound {
        let inner = Arc::clone(&self.inner);
        tokio::task::spawn_blocking(move || read_ceiling(&inner.state)).await.unwrap_or_default()
    }

    /// Lets a command into a workspace. See [`Workspaces::enter`].
    pub(super) async fn enter_workspace(&self, root: &Path) -> Option<Occupied> {
        self.inner.workspaces.enter(root).await
    }

    /// Where this node writes down what changes authority.
    pub(super) fn audit(&self) -> &Audit {
        self.inner.identity.audit()
    }

    /// What is missing for somebody in this role to get what is wanted now. Blocks for the disk: the
    /// ceiling is read anew.
    pub(super) fn allows(&self, wanted: Wanted, role: Option<Role>) -> Result<(), Refusal> {
        permit(wanted, self.authority(Some(wanted), role))
            .map_err(|missing| Refusal::NotPermitted { wanted, missing })
    }

    fn authority(&self, wanted: Option<Wanted>, role: Option<Role>) -> Authority {
        Authority {
            role,
            policy: *lock(&self.inner.policy),
            // Nobody is asked for strict without network.
            ceiling: wanted.map_or(Bound::LEAST, |_| read_ceiling(&self.inner.state)),
            now: clocks(&self.inner.identity),
        }
    }

    /// Tells the hub what the owner's bound is now; `false` if there is no session.
    pub async fn report_ceiling(&self) -> bool {
        let ceiling = self.ceiling().await;
        let changed = v1::CeilingChanged {
            ceiling: proto_mode(ceiling.mode).into(),
            network: proto_network(ceiling.network).into(),
        };
        let session = self.inner.session.borrow();
        session
            .as_ref()
            .is_some_and(|session| session.outbox.send(node_frame::Frame::CeilingChanged(changed)))
    }

    /// The tasks that run, and those whose end the hub has not acknowledged.
    pub(super) fn held_tasks(&self) -> Vec<TaskId> {
        let mut held: Vec<TaskId> = self.inner.running.ids();
        let ended = self.inner.journal.unacknowledged();
        held.extend(ended.into_iter().filter(|id| !held.contains(id)).collect::<Vec<_>>());
        held
    }

    pub(super) fn begin_session(&self, context: SessionContext, policy: HubPolicy) {
        self.set_policy(&context, policy);
        // First, so that what leaves the table after the look at it is told here: see [`Running`].
        self.inner.session.send_replace(Some(context.clone()));
        let running: HashSet<TaskId> = self.inner.running.ids();
        let mut ended = self.inner.journal.unacknowledged();
        ended.retain(|id| !running.contains(id));
        *lock(&self.inner.to_report) = ended.into();
        for _ in 0..REPORTS_AT_ONCE {
            self.report_next(&context);
        }
        self.inner.workspaces.set_online(true);
    }

    pub(super) fn end_session(&self) {
        self.inner.session.send_replace(None);
        self.inner.workspaces.set_online(false);
    }

    /// Tells the hub how the next of the earlier tasks ended.
    fn report_next(&self, session: &SessionContext) {
        let Some(id) = lock(&self.inner.to_report).pop_front() else { return };
        self.report(session, id);
    }

    /// Tells the hub how a task ended, unless it has acknowledged that.
    fn report(&self, session: &SessionContext, id: TaskId) {
        if let Some(exit) = self.inner.journal.outcome(id) {
            let task_id = id.as_bytes().to_vec().into();
            let outcome = v1::TaskOutcome { task_id, exit: Some(exit) };
            session.outbox.send(node_frame::Frame::TaskOutcome(outcome));
        }
    }

    /// Ends what runs: nobody answers for it any more.
    pub(super) fn end_commands(&self, cause: CancelCause) {
        self.inner.running.each(|handle| {
            let cancel = CommandControl::Cancel { signal: 15, grace: EXPELLED_GRACE, cause };
            // Full: as many cancels wait already, and one is enough.
            handle.cancels.try_send(cancel).ok();
        });
    }

    /// Ends all commands, and waits until each is reported, or nobody is there to hear it.
    pub async fn stop_commands(&self) {
        self.inner.commands.cancel();
        self.inner.commands.finish().await;
    }

    /// Reports on workspaces, at the pace they may be sent.
    pub(super) fn reports(&self) -> Reports {
        Reports::new(self.inner.workspaces.clone())
    }

    /// Does what a frame asks for.
    pub(super) fn handle(&self, frame: hub_frame::Frame) {
        match frame {
            hub_frame::Frame::StartTask(start) => self.start(start),
            hub_frame::Frame::CancelTask(cancel) => self.cancel(&cancel),
            hub_frame::Frame::TaskAck(ack) => self.acknowledged(&ack),
            hub_frame::Frame::OpenFileIo(open) => self.open_file_io(open),
            hub_frame::Frame::HeadMoved(moved) => {
                if let Ok(id) = WorkspaceId::from_slice(&moved.workspace_id) {
                    self.inner.workspaces.head_moved(id, moved.seq);
                }
            }
            hub_frame::Frame::Memberships(list) => {
                let members = list.workspaces.iter().filter_map(|entry| {
                    Membership::from_wire(entry)
                        .inspect_err(|problem| {
                            tracing::warn!(problem, "a membership that the hub sent is not valid");
                        })
                        .ok()
                });
                // Its name and its id are known: nothing else of it is believed.
                let library = list.library.is_some();
                self.inner.workspaces.set_memberships(members.collect(), library);
            }
            hub_frame::Frame::Policy(update) => {
                let now = clocks(&self.inner.identity);
                let policy =
                    HubPolicy::told(bound_of(update.policy, update.network), update.until_ms, now);
                let session = self.inner.session.borrow().clone();
                if let Some(session) = session {
                    self.set_policy(&session, policy);
                }
            }
            // The session answers heartbeats by being alive, and ends itself on the last two; a
            // second welcome says nothing.
            hub_frame::Frame::Welcome(_)
            | hub_frame::Frame::Heartbeat(_)
            | hub_frame::Frame::Drain(_)
            | hub_frame::Frame::Superseded(_) => {}
        }
    }

    /// Takes a policy over; a new one is written down.
    fn set_policy(&self, session: &SessionContext, policy: HubPolicy) {
        let before = std::mem::replace(&mut *lock(&self.inner.policy), policy);
        if before.same_as(&policy) {
            return;
        }
        let bound = policy.in_force(clocks(&self.inner.identity));
        self.inner.policy_log.told(policy, bound, &session.tasks);
    }

    fn start(&self, start: v1::StartTask) {
        let Some(session) = self.inner.session.borrow().clone() else { return };
        let Ok(id) = TaskId::from_slice(&start.task_id) else {
            tracing::warn!("the hub sent a task without a valid id");
            return;
        };
        let (cancel, cancels) = mpsc::channel(CANCELS);
        let acknowledged = CancellationToken::new();
        let sessions = self.inner.session.subscribe();
        let handle = Handle { cancels: cancel, acknowledged: acknowledged.clone() };
        match self.inner.running.begin(id, handle) {
            Ok(()) => {}
            Err(NotBegun::Here) => {
                tracing::warn!(task = %id, "the hub ordered a task that is here; it is not started again");
                // Not refused while it runs: the hub would take that for its end.
                if let Some(exit) = self.inner.journal.outcome(id) {
                    answer(&session, id, exit);
                }
                return;
            }
            Err(NotBegun::Full) => {
                return refuse(&session, id, "too many commands run on this node");
            }
            Err(NotBegun::Closed) => {
                return refuse(&session, id, "the agent restarts just now: ask again");
            }
        }
        let guard = Running { dispatcher: self.clone(), id };
        let dispatcher = self.clone();
        let on_disconnect = match start.spec.as_ref().map(v1::TaskSpec::on_disconnect) {
            Some(v1::OnDisconnect::Kill) => OnDisconnect::Kill,
            Some(v1::OnDisconnect::Resume) | None => OnDisconnect::Resume,
        };
        let context = TaskContext {
            id,
            session,
            sessions,
            scope: self.inner.commands.clone(),
            on_disconnect,
            cancels,
            acknowledged,
            journal: self.inner.journal.clone(),
        };
        self.inner.commands.spawn("task", async move {
            dispatcher.run(context, start).await;
            drop(guard);
        });
    }

    async fn run(&self, context: TaskContext, start: v1::StartTask) {
        let id = context.id;
        // Written as a quoted string: it comes from elsewhere.
        let actor = start.actor;
        let line = CommandLine {
            task_id: id.to_string(),
            actor: cut(&actor),
            role: cut(&start.role),
            command: start.spec.as_ref().map(shown_command).unwrap_or_default(),
        };
        let role = start.role.parse().ok();
        let permit = Permit::new(self.clone(), role, line);
        // Beside the opening of its stream, which takes as long.
        let command = async {
            if !self.record_begin(id).await {
                return None;
            }
            let command = match start.spec {
                None => Err(Refusal::Invalid("no specification")),
                Some(spec) => {
                    let (dispatcher, permit) = (self.clone(), permit.clone());
                    let checking =
                        tokio::task::spawn_blocking(move || dispatcher.check(spec, role, permit));
                    checking.await.ok()?
                }
            };
            if let Err(refusal) = &command {
                tracing::info!(task = %id, ?actor, %refusal, "command refused");
            } else {
                tracing::info!(task = %id, ?actor, "command starts");
            }
            Some(command)
        };
        task::run_task(context, command, permit.clone(), start.initial_credit).await;
    }

    /// Writes down, durably, that a task starts; answers the hub where it must not.
    async fn record_begin(&self, id: TaskId) -> bool {
        crash_point("task.told");
        match self.inner.journal.begin(id).await {
            Ok(true) => {
                crash_point("task.begun");
                return true;
            }
            Ok(false) => {
                tracing::warn!(task = %id, "the hub ordered a task a second time; it does not run");
                // What is known of the first time is the answer, as for each task that is over.
                if self.inner.journal.outcome(id).is_none() {
                    self.refuse_now(id, "this task has been run before");
                }
            }
            Err(error) => {
                tracing::error!(%error, "a task cannot be recorded, so it does not run");
                self.refuse_now(id, "the node cannot record that the task starts");
            }
        }
        false
    }

    /// Refuses a task in the session of this moment: the disk may have taken longer than the one that
    /// ordered it lasted.
    fn refuse_now(&self, id: TaskId, reason: &str) {
        if let Some(session) = &*self.inner.session.borrow() {
            refuse(session, id, reason);
        }
    }

    /// Whether a command may run, by what is known now; a refusal for want of permission is
    /// written down. Blocks for the disk.
    fn check(
        &self,
        spec: v1::TaskSpec,
        role: Option<Role>,
        permit: Permit,
    ) -> Result<crate::exec::CommandRequest, Refusal> {
        let wanted = wanted(mode_of(spec.mode), network_of(spec.network));
        let authority = self.authority(wanted, role);
        let forbidden = vec![self.inner.state.path().to_owned()];
        let find = |id, name: &str| self.inner.workspaces.root_of(id, name);
        let command = request::command(spec, authority, find, forbidden);
        if let Err(refusal @ Refusal::NotPermitted { .. }) = &command {
            permit.note_refusal(refusal);
        }
        let command = command?;
        let owner = OwnersWill::of(&self.inner.state);
        let read_only_paths = match command.mode {
            Mode::Strict => owner.shown()?,
            // It sees everything anyway.
            Mode::Permissive => Vec::new(),
        };
        Ok(crate::exec::CommandRequest {
            require_control_group: owner.sandbox.require_cgroup,
            bounds: Bounds {
                time: owner.commands.time_limit_s.map(Duration::from_secs),
                memory_bytes: owner.commands.memory_bytes,
                processes: owner.commands.processes,
            },
            read_only_paths,
            library: self.inner.workspaces.library_dir(),
            ..command
        })
    }

    /// Begins what an operator wants of files here; it ends with the session.
    fn open_file_io(&self, open: v1::OpenFileIo) {
        let Some(session) = self.inner.session.borrow().clone() else { return };
        let work = FileWork {
            slot: Arc::clone(&self.inner.file_slots).try_acquire_owned().ok(),
            workspaces: self.inner.workspaces.clone(),
            forbidden: vec![self.inner.state.path().to_owned()],
        };
        let stop = session.tasks.token().clone();
        session.tasks.spawn("files", async move {
            stop.run_until_cancelled(work.run(session.client, open.request_id)).await;
        });
    }

    fn cancel(&self, cancel: &v1::CancelTask) {
        let Ok(id) = TaskId::from_slice(&cancel.task_id) else { return };
        let signal = i32::try_from(cancel.signal).ok().filter(|n| (1..=64).contains(n));
        let signal = signal.unwrap_or(15);
        let grace = Duration::from_millis(cancel.grace_ms).min(MAX_GRACE);
        self.inner.running.with(id, |handle| {
            // Full: as many cancels wait already, and one is enough.
            let cause = CancelCause::Requested;
            handle.cancels.try_send(CommandControl::Cancel { signal, grace, cause }).ok();
        });
    }

    /// The hub has a task's end, and the next one can be told.
    fn acknowledged(&self, ack: &v1::TaskAck) {
        let Ok(id) = TaskId::from_slice(&ack.task_id) else { return };
        self.inner.journal.acknowledged(id);
        self.inner.running.with(id, |handle| handle.acknowledged.cancel());
        let session = self.inner.session.borrow().clone();
        if let Some(session) = session {
            self.report_next(&session);
        }
    }
}

/// What the owner has decided about a command that is about to start.
struct OwnersWill {
    sandbox: SandboxSettings,
    commands: CommandSettings,
    /// Where the agent's state and the workspaces are.
    apart: Vec<PathBuf>,
}

impl OwnersWill {
    /// What cannot be read asks for most and shows nothing. Blocks for the disk.
    fn of(state: &StateDir) -> Self {
        match Settings::load(state) {
            Ok(settings) => Self {
                apart: settings.apart(state),
                sandbox: settings.sandbox,
                commands: settings.commands,
            },
            Err(error) => {
                tracing::error!(%error, "the owner's settings cannot be read: the strictest count");
                let sandbox = SandboxSettings { require_cgroup: true, ..Default::default() };
                Self { sandbox, commands: CommandSettings::default(), apart: Vec::new() }
            }
        }
    }

    /// What strict commands see of this machine besides what they see anyway, as far as it is there.
    fn shown(&self) -> Result<Vec<PathBuf>, Refusal> {
        let mut shown = Vec::new();
        for path in &self.sandbox.read_only_paths {
            if exposed::check(path, &self.apart)? {
                shown.push(path.clone());
            }
        }
        Ok(shown)
    }
}

/// The owner's bound; what cannot be read allows nothing. Blocks for the disk.
fn read_ceiling(state: &StateDir) -> Bound {
    match Ceiling::load(state, rustix::process::geteuid().as_raw()) {
        Ok(ceiling) => {
            if let Some(problem) = ceiling.problem {
                tracing::warn!(%problem, "the ceiling is not believed");
            }
            ceiling.bound
        }
        Err(error) => {
            tracing::error!(%error, "the ceiling cannot be read and counts as strict");
            Bound::LEAST
        }
    }
}

/// This instant, on the clocks that count for authority.
pub(super) fn clocks(identity: &LiveIdentity) -> Clocks {
    Clocks { hub_ms: identity.hub_now_ms(), steady: std::time::Instant::now() }
}

/// The beginning of what is to run, for people.
fn shown_command(spec: &v1::TaskSpec) -> String {
    const MOST: usize = 4096;
    let mut shown: Vec<u8> = spec.script.iter().take(MOST).copied().collect();
    for argument in &spec.argv {
        if shown.len() >= MOST {
            break;
        }
        if !shown.is_empty() {
            shown.push(b' ');
        }
        shown.extend(argument.iter().take(MOST));
    }
    cut(&String::from_utf8_lossy(&shown))
}

fn refuse(session: &SessionContext, id: TaskId, reason: &str) {
    let exit = v1::TaskExit {
        verdict: v1::TaskVerdict::Failed.into(),
        reason: reason.to_owned(),
        ..Default::default()
    };
    answer(session, id, exit);
}

/// Answers an order without a stream.
fn answer(session: &SessionContext, id: TaskId, exit: v1::TaskExit) {
    session.outbox.send(v1::node_frame::Frame::TaskRefused(v1::TaskRefused {
        task_id: id.as_bytes().to_vec().into(),
        exit: Some(exit),
    }));
}

/// A task in the table of running ones; leaves it whatever way the task ends. What the hub has not acknowledged
/// of its end then is told in the session of that moment, which may have begun while the task was in the table
/// and have left it out. Later sessions hear it from the journal.
struct Running {
    dispatcher: Dispatcher,
    id: TaskId,
}

impl Drop for Running {
    fn drop(&mut self) {
        let inner = &self.dispatcher.inner;
        inner.running.end(self.id);
        let session = inner.session.borrow().clone();
        if let Some(session) = session {
            self.dispatcher.report(&session, self.id);
        }
    }
}

#[cfg(test)]
mod tests {
    use cortex_shared::clock::unix_ms;
    use tonic::transport::Endpoint;

    use super::*;
    use crate::identity::NodeIdentity;
    use crate::identity::testing::Ca;
    use crate::link::workspaces::tests::workspaces;

    fn dispatcher(folder: &Path, scope: &TaskScope) -> Dispatcher {
        let workspaces = workspaces(folder, scope);
        let state = StateDir::resolve(Some(folder.join("state"))).unwrap();
        let settings = Settings::load(&state).unwrap();
        NodeIdentity::pending_key(&state).unwrap();
        Ca::new().node(&state.identity(), unix_ms() + 60_000).store(&state).unwrap();
        let identity = NodeIdentity::load(&state).unwrap().unwrap();
        let identity = LiveIdentity::new(state.clone(), identity, settings.hub).unwrap();
        Dispatcher::new(state, workspaces, identity).unwrap()
    }

    /// A session, and what is sent in it.
    fn session() -> (SessionContext, mpsc::Receiver<v1::NodeFrame>) {
        let (frames, sent) = mpsc::channel(16);
        let channel = Endpoint::from_static("http://127.0.0.1:1").connect_lazy();
        let context = SessionContext {
            client: NodeClient::new(channel),
            outbox: Outbox::new(frames),
            tasks: TaskScope::new(),
            resume_grace: Duration::from_secs(10),
        };
        (context, sent)
    }

    /// The ends that were told up to now.
    fn told(sent: &mut mpsc::Receiver<v1::NodeFrame>) -> Vec<TaskId> {
        std::iter::from_fn(|| sent.try_recv().ok())
            .filter_map(|frame| match frame.frame {
                Some(node_frame::Frame::TaskOutcome(outcome)) => {
                    TaskId::from_slice(&outcome.task_id).ok()
                }
                _ => None,
            })
            .collect()
    }

    #[tokio::test]
    async fn an_end_is_told_in_the_session_in_which_its_task_leaves_the_table() {
        let folder = tempfile::tempdir().unwrap();
        let scope = TaskScope::new();
        let dispatcher = dispatcher(folder.path(), &scope);
        let [open, acknowledged, earlier] = [(); 3].map(|()| TaskId::new());
        let (first, mut of_first) = session();
        dispatcher.begin_session(first, HubPolicy::UNTOLD);
        let tasks = [open, acknowledged].map(|id| {
            let handle =
                Handle { cancels: mpsc::channel(1).0, acknowledged: CancellationToken::new() };
            dispatcher.inner.running.begin(id, handle).unwrap();
            Running { dispatcher: dispatcher.clone(), id }
        });
        for id in [earlier, open, acknowledged] {
            assert!(dispatcher.inner.journal.begin(id).await.unwrap());
            let exit = v1::TaskExit { exit_code: 3, ..Default::default() };
            dispatcher.inner.journal.end(id, &exit).await.unwrap();
        }
        dispatcher.end_session();
        let (second, mut of_second) = session();
        dispatcher.begin_session(second, HubPolicy::UNTOLD);
        assert_eq!(told(&mut of_second), [earlier], "the others are not over yet");
        dispatcher.inner.journal.acknowledged(acknowledged);
        drop(tasks);
        assert_eq!(told(&mut of_second), [open]);
        assert_eq!(told(&mut of_first), []);
        scope.cancel();
    }

    #[tokio::test]
    async fn a_task_that_was_run_before_is_refused_in_the_session_of_that_moment() {
        let folder = tempfile::tempdir().unwrap();
        let scope = TaskScope::new();
        let dispatcher = dispatcher(folder.path(), &scope);
        let id = TaskId::new();
        assert!(dispatcher.inner.journal.begin(id).await.unwrap());
        let (first, mut of_first) = session();
        dispatcher.begin_session(first, HubPolicy::UNTOLD);
        let (second, mut of_second) = session();
        dispatcher.begin_session(second, HubPolicy::UNTOLD);
        assert!(!dispatcher.record_begin(id).await);
        assert!(of_first.try_recv().is_err());
        let refused = of_second.try_recv().unwrap().frame;
        assert!(matches!(refused, Some(node_frame::Frame::TaskRefused(_))), "{refused:?}");
        scope.cancel();
    }
}
