//! What each frame of the hub means on this node.
//!
//! Called by the session's task for each frame and never makes it wait: a task is started in a task
//! of its own, everything else is handed over. State: which tasks run, the policy in force (strict
//! until a hub says otherwise), and the record of started tasks, which is on disk. What runs outside
//! the sandbox is decided a second time, and written down, directly before it runs: see
//! `permit`. Policies are written down by `policy_log`.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use cortex_proto::v1::node_client::NodeClient;
use cortex_proto::v1::{self, hub_frame, node_frame};
use cortex_shared::ids::{TaskId, WorkspaceId};
use cortex_shared::policy::{Mode, Role};
use cortex_shared::tasks::TaskScope;
use tokio::sync::mpsc;
use tonic::transport::Channel;

use super::authority::{Authority, Clocks, HubPolicy, mode_in_force};
use super::permit::Permit;
use super::policy_log::PolicyLog;
use super::request::{self, Refusal};
use super::session::Outbox;
use super::started::StartedTasks;
use super::task::{self, TaskContext};
use super::workspaces::{Membership, Reports, Workspaces};
use super::{mode_of, proto_mode};
use crate::audit::{Audit, CommandLine, cut};
use crate::config::{Ceiling, ConfigError, Settings, StateDir};
use crate::exec::CommandControl;
use crate::identity::live::LiveIdentity;

/// Commands that run at the same time; more is refused, so that a node cannot be buried.
const MAX_RUNNING: usize = 256;
/// Cancels of one task that may wait; more say nothing new.
const CANCELS: usize = 4;
/// Longest time between the first signal of a cancel and KILL.
const MAX_GRACE: Duration = Duration::from_secs(60);

/// What a session lends to what it makes the node do.
#[derive(Clone)]
pub struct SessionContext {
    /// The connection.
    pub client: NodeClient<Channel>,
    /// The way back for small frames.
    pub outbox: Outbox,
    /// Tasks that end with the session.
    pub tasks: TaskScope,
}

/// Turns frames into deeds. Clones share the same state.
#[derive(Clone)]
pub struct Dispatcher {
    inner: Arc<Inner>,
}

struct Inner {
    state: StateDir,
    workspaces: Workspaces,
    started: Mutex<StartedTasks>,
    session: Mutex<Option<SessionContext>>,
    identity: LiveIdentity,
    policy: Mutex<HubPolicy>,
    policy_log: PolicyLog,
    running: Mutex<HashMap<TaskId, mpsc::Sender<CommandControl>>>,
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
        let path = state.path().join("started-tasks");
        let started = StartedTasks::open(Path::new(&path))
            .map_err(|source| ConfigError::Write { path, source })?;
        let ceiling_of = state.clone();
        let policy_log =
            PolicyLog::new(identity.audit().clone(), Arc::new(move || read_ceiling(&ceiling_of)));
        Ok(Self {
            inner: Arc::new(Inner {
                state,
                workspaces,
                started: Mutex::new(started),
                session: Mutex::new(None),
                identity,
                policy: Mutex::new(HubPolicy::UNTOLD),
                policy_log,
                running: Mutex::new(HashMap::new()),
            }),
        })
    }

    /// How many commands run.
    #[must_use]
    pub fn running_tasks(&self) -> usize {
        lock(&self.inner.running).len()
    }

    /// What the hub's policy for this node, as last told, allows now; and its end, 0 for none.
    #[must_use]
    pub fn policy(&self) -> (Mode, i64) {
        let policy = *lock(&self.inner.policy);
        match policy.in_force(clocks(&self.inner.identity)) {
            Mode::Strict => (Mode::Strict, 0),
            Mode::Permissive => (Mode::Permissive, policy.until_ms()),
        }
    }

    /// The owner's bound as it is now. Read anew, so that lowering it counts at once; what cannot
    /// be read allows nothing.
    pub async fn ceiling(&self) -> Mode {
        let inner = Arc::clone(&self.inner);
        tokio::task::spawn_blocking(move || read_ceiling(&inner.state)).await.unwrap_or_default()
    }

    /// Where this node writes down what changes authority.
    pub(super) fn audit(&self) -> &Audit {
        self.inner.identity.audit()
    }

    /// What is missing for somebody in this role to run a command outside the sandbox now. Blocks
    /// for the disk: the ceiling is read anew.
    pub(super) fn allows_permissive(&self, role: Option<Role>) -> Result<(), Refusal> {
        mode_in_force(Mode::Permissive, self.authority(Mode::Permissive, role))
            .map(drop)
            .map_err(|missing| Refusal::NotPermitted { missing })
    }

    fn authority(&self, requested: Mode, role: Option<Role>) -> Authority {
        Authority {
            role,
            policy: *lock(&self.inner.policy),
            ceiling: match requested {
                // Nobody is asked for strict.
                Mode::Strict => Mode::Strict,
                Mode::Permissive => read_ceiling(&self.inner.state),
            },
            now: clocks(&self.inner.identity),
        }
    }

    /// Tells the hub what the owner's bound is now; `false` if there is no session.
    pub async fn report_ceiling(&self) -> bool {
        let changed = v1::CeilingChanged { ceiling: proto_mode(self.ceiling().await).into() };
        lock(&self.inner.session)
            .as_ref()
            .is_some_and(|session| session.outbox.send(node_frame::Frame::CeilingChanged(changed)))
    }

    pub(super) fn begin_session(&self, context: SessionContext, policy: HubPolicy) {
        self.set_policy(&context, policy);
        *lock(&self.inner.session) = Some(context);
        self.inner.workspaces.set_online(true);
    }

    pub(super) fn end_session(&self) {
        *lock(&self.inner.session) = None;
        self.inner.workspaces.set_online(false);
    }

    /// Reports on workspaces, at the pace they may be sent.
    pub(super) fn reports(&self) -> Reports {
        self.inner.workspaces.reports()
    }

    /// Does what a frame asks for.
    pub(super) fn handle(&self, frame: hub_frame::Frame) {
        match frame {
            hub_frame::Frame::StartTask(start) => self.start(start),
            hub_frame::Frame::CancelTask(cancel) => self.cancel(&cancel),
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
                self.inner.workspaces.set_memberships(members.collect());
            }
            hub_frame::Frame::Policy(update) => {
                let now = clocks(&self.inner.identity);
                let policy = HubPolicy::told(mode_of(update.policy), update.until_ms, now);
                let session = lock(&self.inner.session).clone();
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
        let mode = policy.in_force(clocks(&self.inner.identity));
        self.inner.policy_log.told(policy, mode, &session.tasks);
    }

    fn start(&self, start: v1::StartTask) {
        let Some(session) = lock(&self.inner.session).clone() else { return };
        let Ok(id) = TaskId::from_slice(&start.task_id) else {
            tracing::warn!("the hub sent a task without a valid id");
            return;
        };
        let (cancel, cancels) = mpsc::channel(CANCELS);
        {
            let mut running = lock(&self.inner.running);
            if running.contains_key(&id) {
                // Not refused: the hub would take that for the end of the task that runs.
                tracing::warn!(task = %id, "the hub ordered a task that runs; it is not started again");
                return;
            }
            if running.len() >= MAX_RUNNING {
                drop(running);
                refuse(&session, id, "too many commands run on this node");
                return;
            }
            running.insert(id, cancel);
        }
        let guard = Running { dispatcher: self.clone(), id };
        let dispatcher = self.clone();
        session.tasks.clone().spawn("task", async move {
            dispatcher.run(session, id, start, cancels).await;
            drop(guard);
        });
    }

    async fn run(
        &self,
        session: SessionContext,
        id: TaskId,
        start: v1::StartTask,
        cancels: mpsc::Receiver<CommandControl>,
    ) {
        // Written as a quoted string: it comes from elsewhere.
        let actor = start.actor;
        let recording = {
            let inner = Arc::clone(&self.inner);
            tokio::task::spawn_blocking(move || lock(&inner.started).begin(id)).await
        };
        match recording {
            Ok(Ok(true)) => {}
            Ok(Ok(false)) => {
                tracing::warn!(task = %id, "the hub ordered a task a second time; it does not run");
                refuse(&session, id, "this task has been run before");
                return;
            }
            Ok(Err(error)) => {
                tracing::error!(%error, "a task cannot be recorded, so it does not run");
                refuse(&session, id, "the node cannot record that the task starts");
                return;
            }
            Err(_) => return,
        }
        let line = CommandLine {
            task_id: id.to_string(),
            actor: cut(&actor),
            role: cut(&start.role),
            command: start.spec.as_ref().map(shown_command).unwrap_or_default(),
        };
        let role = start.role.parse().ok();
        let permit = Permit::new(self.clone(), role, line);
        let command = match start.spec {
            None => Err(Refusal::Invalid("no specification")),
            Some(spec) => {
                let (dispatcher, permit) = (self.clone(), permit.clone());
                let checking =
                    tokio::task::spawn_blocking(move || dispatcher.check(spec, role, permit));
                let Ok(command) = checking.await else { return };
                command
            }
        };
        if let Err(refusal) = &command {
            tracing::info!(task = %id, ?actor, %refusal, "command refused");
        } else {
            tracing::info!(task = %id, ?actor, "command starts");
        }
        let context =
            TaskContext { client: session.client, outbox: session.outbox, scope: session.tasks };
        task::run_task(context, id, command, permit, start.initial_credit, cancels).await;
    }

    /// Whether a command may run, by what is known now; a refusal for want of permission is
    /// written down. Blocks for the disk.
    fn check(
        &self,
        spec: v1::TaskSpec,
        role: Option<Role>,
        permit: Permit,
    ) -> Result<crate::exec::CommandRequest, Refusal> {
        let authority = self.authority(mode_of(spec.mode), role);
        let forbidden = vec![self.inner.state.path().to_owned()];
        let find = |id, name: &str| self.inner.workspaces.root_of(id, name);
        let command = request::command(spec, authority, find, forbidden);
        if let Err(refusal @ Refusal::NotPermitted { .. }) = &command {
            permit.note_refusal(refusal);
        }
        let require_control_group = requires_control_group(&self.inner.state);
        command.map(|command| crate::exec::CommandRequest { require_control_group, ..command })
    }

    fn cancel(&self, cancel: &v1::CancelTask) {
        let Ok(id) = TaskId::from_slice(&cancel.task_id) else { return };
        let signal = i32::try_from(cancel.signal).ok().filter(|n| (1..=64).contains(n));
        let signal = signal.unwrap_or(15);
        let grace = Duration::from_millis(cancel.grace_ms).min(MAX_GRACE);
        if let Some(sender) = lock(&self.inner.running).get(&id) {
            // Full: as many cancels wait already, and one is enough.
            sender.try_send(CommandControl::Cancel { signal, grace }).ok();
        }
    }
}

/// The owner's bound; what cannot be read allows nothing. Blocks for the disk.
/// Whether the owner lets no command run without a control group. What cannot be read asks for most.
fn requires_control_group(state: &StateDir) -> bool {
    match Settings::load(state) {
        Ok(settings) => settings.sandbox.require_cgroup,
        Err(error) => {
            tracing::error!(%error, "the owner's settings cannot be read: the strictest count");
            true
        }
    }
}

fn read_ceiling(state: &StateDir) -> Mode {
    match Ceiling::load(state, rustix::process::geteuid().as_raw()) {
        Ok(ceiling) => {
            if let Some(problem) = ceiling.problem {
                tracing::warn!(%problem, "the ceiling is not believed");
            }
            ceiling.mode
        }
        Err(error) => {
            tracing::error!(%error, "the ceiling cannot be read and counts as strict");
            Mode::Strict
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
    session.outbox.send(v1::node_frame::Frame::TaskRefused(v1::TaskRefused {
        task_id: id.as_bytes().to_vec().into(),
        exit: Some(exit),
    }));
}

/// A task in the table of running ones; leaves it whatever way the task ends.
struct Running {
    dispatcher: Dispatcher,
    id: TaskId,
}

impl Drop for Running {
    fn drop(&mut self) {
        lock(&self.dispatcher.inner.running).remove(&self.id);
    }
}
