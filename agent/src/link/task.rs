//! One command of the hub, from its first stream to the hub's word that its end is recorded.
//!
//! It outlives its session. The command belongs to this task, which holds the output that the hub has
//! not acknowledged: bounded by the reader's credit, so a command whose reader is away waits as for any
//! slow reader. In the next session the stream is opened anew, and both directions go on at the exact
//! byte ([`super::carrier`] keeps the books). A hub that does not know the task any more has given it
//! its verdict: the command then runs to its end without a reader, and its end is reported through the
//! journal, by the dispatcher. So is every end that the hub has not acknowledged when this task is over.
//!
//! The stream from the hub is read in a loop that never waits for the command: what the command has
//! not taken yet waits in a queue bounded in bytes.

use std::pin::Pin;
use std::time::Duration;

use cortex_proto::CODE_TRAILER;
use cortex_proto::v1::node_client::NodeClient;
use cortex_proto::v1::{self, task_io_up};
use cortex_shared::clock::sleep_until;
use cortex_shared::crash::crash_point;
use cortex_shared::ids::TaskId;
use cortex_shared::tasks::TaskScope;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;
use tonic::{Status, Streaming};

use super::carrier::{Carrier, command_exit};
use super::dispatch::SessionContext;
use super::journal::Journal;
use super::permit::Permit;
use super::request::Refusal;
use crate::exec::{CancelCause, CommandControl, CommandEvent, CommandRequest};

/// How long a command that its owner does not want any more has between TERM and KILL.
const GRACE: Duration = Duration::from_secs(2);
/// How long the hub may take to take a task's stream. What allowed the command is not kept for longer.
const OPEN_TIMEOUT: Duration = Duration::from_secs(15);
/// How long the hub may take to acknowledge an end that it was sent. After that the next session does.
const ACK_TIMEOUT: Duration = Duration::from_secs(30);
/// How long after the end of its grace a cancelled command's output is waited for: a reader that stands
/// still must not keep the end from being known.
const DRAIN: Duration = Duration::from_secs(3);
/// How long after its stream broke a task tries another one in the same session.
const REOPEN_AFTER: Duration = Duration::from_millis(500);
/// Frames between the command and HTTP/2; their bytes are bounded by the credit.
const FRAMES: usize = 16;

/// What becomes of the command while the hub is away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum OnDisconnect {
    /// It goes on, and is taken up again.
    Resume,
    /// It is ended.
    Kill,
}

/// What one task needs of the daemon.
pub(super) struct TaskContext {
    pub(super) id: TaskId,
    /// The session that ordered it.
    pub(super) session: SessionContext,
    /// The sessions to come.
    pub(super) sessions: watch::Receiver<Option<SessionContext>>,
    /// Owns what runs; cancelled when the daemon stops.
    pub(super) scope: TaskScope,
    pub(super) on_disconnect: OnDisconnect,
    pub(super) cancels: mpsc::Receiver<CommandControl>,
    /// Cancelled when the hub has acknowledged the end.
    pub(super) acknowledged: CancellationToken,
    pub(super) journal: Journal,
}

type Opened = Result<Stream, Status>;

/// A stream to the hub.
struct Stream {
    up: mpsc::Sender<v1::TaskIoUp>,
    down: Streaming<v1::TaskIoDown>,
}

/// Runs a command, or reports why it does not run. `command` resolves once it may start: nothing for one
/// that does not, and that is answered already. The stream is opened meanwhile.
pub(super) async fn run_task(
    context: TaskContext,
    command: impl Future<Output = Option<Result<CommandRequest, Refusal>>>,
    permit: Permit,
    initial_credit: u64,
) {
    let mut running = Running {
        carrier: Carrier::new(initial_credit),
        session: Some(context.session.clone()),
        context,
        control: None,
        events: None,
        opening: None,
        stream: None,
        reopen_at: None,
        ack_by: None,
        abandon_at: None,
        orphan: false,
        stopping: false,
    };
    running.context.sessions.mark_unchanged();
    running.open(false);
    // The command starts only once the hub has taken its stream: a hub that has given the task up in
    // the meantime (and has said so to whoever asked for it) must not find it run all the same.
    // A clone: the change of session is heard of once more in the loop.
    let mut sessions = running.context.sessions.clone();
    let (command, opened) = tokio::join!(command, async {
        tokio::select! {
            opened = opened(&mut running.opening) => opened,
            () = running.context.scope.token().cancelled() => Err(Status::cancelled("the agent stops")),
            // The session ended before it could be said.
            _ = sessions.changed() => {
                Err(Status::cancelled("the session was lost before the command started"))
            }
        }
    });
    running.opening = None;
    match (command, opened) {
        (None, _) => return,
        (Some(Err(refusal)), opened) => {
            running.end(refused(&refusal)).await;
            running.opened(opened);
        }
        (Some(Ok(command)), Ok(stream)) => {
            running.opened(Ok(stream));
            let (control, orders) = mpsc::channel(FRAMES);
            let (events_out, events) = mpsc::channel(FRAMES);
            let scope = &running.context.scope;
            scope.spawn("command", permit.run(command, initial_credit, orders, events_out));
            (running.control, running.events) = (Some(control), Some(events));
        }
        (Some(Ok(_)), Err(status)) => {
            running.orphan = true;
            running
                .end(v1::TaskExit {
                    verdict: v1::TaskVerdict::Failed.into(),
                    reason: format!(
                        "the task's stream could not be opened, and the command did not run: {}",
                        status.message()
                    ),
                    ..Default::default()
                })
                .await;
        }
    }
    running.carry().await;
}

struct Running {
    context: TaskContext,
    carrier: Carrier,
    session: Option<SessionContext>,
    /// To the command; none before it starts and after its end.
    control: Option<mpsc::Sender<CommandControl>>,
    events: Option<mpsc::Receiver<CommandEvent>>,
    opening: Option<Pin<Box<dyn Future<Output = Opened> + Send>>>,
    stream: Option<Stream>,
    reopen_at: Option<Instant>,
    ack_by: Option<Instant>,
    /// When a cancelled command's output is given up.
    abandon_at: Option<Instant>,
    /// The hub does not know the task any more.
    orphan: bool,
    stopping: bool,
}

impl Running {
    async fn carry(mut self) {
        let stop = self.context.scope.token().clone();
        let acknowledged = self.context.acknowledged.clone();
        while !self.is_over() {
            let up = self.stream.as_ref().map(|stream| stream.up.clone());
            let sendable = up.is_some() && self.carrier.has_frame();
            let control = self.control.clone();
            let has_order = control.is_some() && self.carrier.has_order();
            tokio::select! {
                () = acknowledged.cancelled(), if self.carrier.exit().is_some() => return,
                () = stop.cancelled(), if !self.stopping => {
                    self.stopping = true;
                    self.carrier.cancel(GRACE, CancelCause::AgentStops);
                }
                changed = self.context.sessions.changed() => {
                    if changed.is_ok() {
                        self.change_session();
                    } else {
                        self.stopping = true;
                    }
                }
                opened = opened(&mut self.opening) => self.opened(opened),
                message = read(&mut self.stream) => self.hear(message),
                permit = reserve(up), if sendable => match permit {
                    Ok(permit) => {
                        if let Some(frame) = self.carrier.next_frame() {
                            if matches!(frame, task_io_up::Frame::Exit(_)) {
                                self.ack_by = Some(Instant::now() + ACK_TIMEOUT);
                            }
                            permit.send(v1::TaskIoUp { frame: Some(frame) });
                        }
                    }
                    Err(_) => self.lose_stream(),
                },
                event = next_event(&mut self.events) => self.take_event(event).await,
                Some(cancel) = self.context.cancels.recv() => self.carrier.urgent(cancel),
                permit = reserve(control), if has_order => match permit {
                    Ok(permit) => if let Some(order) = self.carrier.next_order() {
                        if let CommandControl::Cancel { grace, .. } = &order {
                            self.abandon_at.get_or_insert(Instant::now() + *grace + DRAIN);
                        }
                        permit.send(order);
                    },
                    Err(_) => self.control = None,
                },
                () = sleep_until(self.reopen_at) => {
                    self.reopen_at = None;
                    self.open(true);
                }
                () = sleep_until(self.abandon_at) => {
                    // While nobody is there, there is somebody to come back to it.
                    self.abandon_at = None;
                    if self.stream.is_some() {
                        self.carrier.abandon();
                    } else if self.carrier.exit().is_none() {
                        self.abandon_at = Some(Instant::now() + DRAIN);
                    }
                }
                () = sleep_until(self.ack_by) => return,
            }
        }
    }

    /// Whether nothing is left to do here.
    fn is_over(&self) -> bool {
        let told =
            self.orphan || (self.stopping && self.stream.is_none() && self.opening.is_none());
        self.carrier.exit().is_some() && told
    }

    fn open(&mut self, resume: bool) {
        let Some(session) = &self.session else { return };
        let mut client: NodeClient<Channel> = session.client.clone();
        let (up, up_frames) = mpsc::channel(FRAMES);
        let hello = self.carrier.hello(self.context.id, resume);
        let hello = v1::TaskIoUp { frame: Some(task_io_up::Frame::Hello(hello)) };
        up.try_send(hello).expect("a new channel has room");
        self.opening = Some(Box::pin(async move {
            let opening = client.task_io(ReceiverStream::new(up_frames));
            let opened =
                tokio::time::timeout(OPEN_TIMEOUT, opening).await.unwrap_or_else(|_| {
                    Err(Status::deadline_exceeded("the hub did not take it in time"))
                })?;
            Ok(Stream { up, down: opened.into_inner() })
        }));
    }

    fn opened(&mut self, opened: Opened) {
        self.opening = None;
        match opened {
            Ok(stream) => {
                self.stream = Some(stream);
                if !self.carrier.is_resuming() {
                    self.carrier.opened();
                }
            }
            // The hub's own word: it has given the task its verdict.
            Err(status) if status.metadata().contains_key(CODE_TRAILER) && is_unknown(&status) => {
                tracing::info!(task = %self.context.id, "the hub does not wait for this task any more");
                self.orphan = true;
                self.carrier.abandon();
            }
            Err(status) => {
                tracing::debug!(task = %self.context.id, %status, "a task's stream did not open");
                self.reopen_at = Some(Instant::now() + REOPEN_AFTER);
            }
        }
    }

    fn hear(&mut self, message: Result<Option<v1::TaskIoDown>, Status>) {
        match message {
            Ok(Some(message)) => {
                if let Some(frame) = message.frame
                    && !self.carrier.accept(frame)
                {
                    tracing::warn!("a task's stream broke its bounds; the task is cancelled");
                    self.lose_stream();
                    self.reopen_at = None;
                    self.carrier.cancel(GRACE, CancelCause::Protocol);
                }
            }
            Ok(None) | Err(_) => self.lose_stream(),
        }
    }

    /// The stream is gone. Unless the end was sent, which the hub acknowledges by the session, another
    /// is tried.
    fn lose_stream(&mut self) {
        self.stream = None;
        if !self.carrier.exit_sent() && self.session.is_some() && !self.orphan {
            self.reopen_at = Some(Instant::now() + REOPEN_AFTER);
        }
    }

    fn change_session(&mut self) {
        let session = self.context.sessions.borrow_and_update().clone();
        let before = std::mem::replace(&mut self.session, session);

        (self.stream, self.opening) = (None, None);
        (self.reopen_at, self.ack_by) = (None, None);
        // Also where the next session came before the end of the last one was heard of.
        if let Some(before) = before
            && (self.context.on_disconnect == OnDisconnect::Kill || before.resume_grace.is_zero())
        {
            self.carrier.cancel(GRACE, CancelCause::LinkLost);
        }
        if self.session.is_some() && !self.orphan {
            self.open(true);
        }
    }

    async fn take_event(&mut self, event: Option<CommandEvent>) {
        match event {
            Some(CommandEvent::Exit(exit)) => self.end(command_exit(exit)).await,
            Some(event) => self.carrier.event(event),
            None => {
                self.events = None;
                // It always ends with an exit, unless it panicked.
                if self.carrier.exit().is_none() {
                    self.end(v1::TaskExit {
                        verdict: v1::TaskVerdict::Failed.into(),
                        reason: "the agent failed while it ran the command".to_owned(),
                        ..Default::default()
                    })
                    .await;
                }
            }
        }
    }

    async fn end(&mut self, exit: v1::TaskExit) {
        let id = self.context.id;
        crash_point("task.over");
        if let Err(error) = self.context.journal.end(id, &exit).await {
            tracing::error!(task = %id, %error, "the end of a task is not on disk");
        }
        crash_point("task.over.recorded");
        (self.control, self.events) = (None, None);
        self.carrier.end(exit);
    }
}

fn is_unknown(status: &Status) -> bool {
    status.metadata().get(CODE_TRAILER).is_some_and(|code| code == "task_unknown")
}

async fn opened(opening: &mut Option<Pin<Box<dyn Future<Output = Opened> + Send>>>) -> Opened {
    match opening {
        Some(opening) => opening.await,
        None => std::future::pending().await,
    }
}

/// The next message, once there is a stream.
async fn read(stream: &mut Option<Stream>) -> Result<Option<v1::TaskIoDown>, Status> {
    match stream {
        Some(stream) => stream.down.message().await,
        None => std::future::pending().await,
    }
}

async fn reserve<T>(
    sender: Option<mpsc::Sender<T>>,
) -> Result<mpsc::OwnedPermit<T>, mpsc::error::SendError<()>> {
    match sender {
        Some(sender) => sender.reserve_owned().await,
        None => std::future::pending().await,
    }
}

async fn next_event(events: &mut Option<mpsc::Receiver<CommandEvent>>) -> Option<CommandEvent> {
    match events {
        Some(events) => events.recv().await,
        None => std::future::pending().await,
    }
}

/// The end of a command that did not run.
pub(super) fn refused(refusal: &Refusal) -> v1::TaskExit {
    let nothing = blake3::hash(b"").as_bytes().to_vec();
    v1::TaskExit {
        verdict: v1::TaskVerdict::Refused.into(),
        reason: refusal.to_string(),
        hint: refusal.hint(),
        stdout_hash: nothing.clone().into(),
        stderr_hash: nothing.into(),
        ..Default::default()
    }
}
