//! One task without a verdict: its mailboxes, where it is, and what is asked of its node.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use cortex_proto::v1::{
    CancelTask, Output, TaskInterrupted, TaskIoHello, TaskIoResume, TaskStarted, TaskState,
    hub_frame,
};
use cortex_shared::clock::unix_ms;
use cortex_shared::ids::{SessionId, TaskId};
use cortex_shared::replay::Piece;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::budget::Share;
use super::to_node::ToNode;
use super::to_reader::{Attached, FlowViolation, ToReader};
use crate::node::registry::SessionHandle;
use crate::store::TaskRecord;

/// Time a cancelled command has before it is killed, if the caller names none.
pub const DEFAULT_CANCEL_GRACE: Duration = Duration::from_secs(2);

/// Why a node's stream for a task is not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum StreamRefusal {
    /// It has its verdict, or is none of the node's, or may not begin any more: the node need not ask again.
    #[error("no such task waits for this node")]
    Unknown,
    /// The session has just ended in which the node asks: it takes the task up in its next one.
    #[error("the node has no session that the task is bound to: ask again in the next one")]
    NotReached,
}

/// What a task may have been carried by, and is gone.
#[derive(Clone, Copy, Debug)]
pub(super) enum Lost {
    Session(SessionId),
    /// One of the node's streams, by its number.
    Stream(u64),
    /// Whatever was before the node's latest session.
    EarlierSession,
}

/// Where a task is.
#[derive(Clone, Debug)]
enum Phase {
    Accepted,
    Running,
    Interrupted { reason: String },
}

struct Place {
    /// The session through which it is reached; none while the node is away.
    session: Option<SessionHandle>,
    phase: Phase,
    /// Counts the interruptions, so that the deadline of one does not end the next.
    interruptions: u64,
    /// The node has opened its stream once, or may not any more.
    opened: bool,
    started_at_ms: Option<i64>,
    /// The latest cancel. It is said again in each session: that one was sent does not mean that it
    /// arrived.
    cancel: Option<(u32, Duration)>,
}

/// See the module.
pub struct Task {
    /// What stands in the journal.
    pub record: TaskRecord,
    place: Mutex<Place>,
    /// Held while credit goes from one mailbox to the other: in a new stream it begins anew.
    flow: Mutex<()>,
    /// Output it may still write.
    output_left: AtomicU64,
    /// Frames to its reader.
    pub to_reader: Arc<ToReader>,
    /// Frames to its node.
    pub to_node: ToNode,
    last_frame: Mutex<Instant>,
    /// Counts interruptions and returns, for those who show them.
    phases: watch::Sender<u64>,
    /// Cancelled when the task has its verdict.
    pub(super) ended: CancellationToken,
    /// Room for what its reader does not take.
    _share: Share,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Task {
    /// A task that is about to be sent to its node.
    pub(super) fn new(
        record: TaskRecord,
        window: Option<u64>,
        session: SessionHandle,
        output_left: u64,
        share: Share,
    ) -> Arc<Self> {
        let to_reader = ToReader::new(window, share.bytes());
        let place = Place {
            session: Some(session),
            phase: Phase::Accepted,
            interruptions: 0,
            opened: false,
            started_at_ms: None,
            cancel: None,
        };
        Self::with(record, place, to_reader, ToNode::new(false), output_left, share)
    }

    /// A task that an earlier run of the hub left open; `received` bytes of it are in the spool.
    pub(super) fn recovered(
        record: TaskRecord,
        reason: &str,
        received: [u64; 2],
        output_left: u64,
        share: Share,
    ) -> Arc<Self> {
        let cancel = record.cancel_wanted.then_some((0, DEFAULT_CANCEL_GRACE));
        let to_reader = ToReader::recovered(received, record.detached, share.bytes());
        let place = Place {
            session: None,
            phase: Phase::Interrupted { reason: reason.to_owned() },
            interruptions: 1,
            opened: true,
            started_at_ms: None,
            cancel,
        };
        Self::with(record, place, to_reader, ToNode::new(true), output_left, share)
    }

    fn with(
        record: TaskRecord,
        place: Place,
        to_reader: ToReader,
        to_node: ToNode,
        output_left: u64,
        share: Share,
    ) -> Arc<Self> {
        Arc::new(Self {
            record,
            place: Mutex::new(place),
            flow: Mutex::default(),
            output_left: AtomicU64::new(output_left),
            to_reader: Arc::new(to_reader),
            to_node,
            last_frame: Mutex::new(Instant::now()),
            phases: watch::Sender::new(0),
            ended: CancellationToken::new(),
            _share: share,
        })
    }

    /// Its id.
    #[must_use]
    pub fn id(&self) -> TaskId {
        self.record.id
    }

    /// Whether the task has its verdict.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.ended.is_cancelled()
    }

    /// Waits for the verdict.
    pub async fn ended(&self) {
        self.ended.cancelled().await;
    }

    /// Its state, and why it is interrupted, if it is.
    #[must_use]
    pub fn state(&self) -> (TaskState, String) {
        match &lock(&self.place).phase {
            Phase::Accepted => (TaskState::Accepted, String::new()),
            Phase::Running => (TaskState::Running, String::new()),
            Phase::Interrupted { reason } => (TaskState::Interrupted, reason.clone()),
        }
    }

    /// Changes when it is interrupted or resumed.
    #[must_use]
    pub fn phases(&self) -> watch::Receiver<u64> {
        self.phases.subscribe()
    }

    /// When the hub heard that it had started.
    #[must_use]
    pub fn started_at_ms(&self) -> Option<i64> {
        lock(&self.place).started_at_ms
    }

    /// Asks the node to end the command; if the node is away, as soon as it is back. See
    /// [`super::relay::Relay::cancel`]: of this alone, a restart of the hub knows nothing.
    pub(super) fn cancel(&self, signal: u32, grace: Duration) {
        let mut place = lock(&self.place);
        place.cancel = Some((signal, grace));
        if let Some(session) = &place.session {
            // If it has ended, the next one hears it.
            session.send(cancel_frame(self.id(), signal, grace)).ok();
        }
    }

    /// Whether somebody wants it to end.
    pub(super) fn is_cancelled(&self) -> bool {
        lock(&self.place).cancel.is_some()
    }

    /// Whether it is reached through this session.
    pub(super) fn is_of(&self, session: SessionId) -> bool {
        lock(&self.place).session.as_ref().is_some_and(|current| current.id == session)
    }

    /// The session through which it is reached.
    pub(super) fn session(&self) -> Option<SessionHandle> {
        lock(&self.place).session.clone()
    }

    /// The node is back and has the task: it is reached through this session from now on. Returns the number
    /// of the interruption that lasts until the node takes it up; one of its own, whose deadline begins now.
    /// `None` if it is not interrupted.
    pub(super) fn rebind(&self, session: &SessionHandle) -> Option<u64> {
        let mut place = lock(&self.place);
        if let Some((signal, grace)) = place.cancel {
            // If this session is gone, too, its end is the next interruption.
            session.send(cancel_frame(self.id(), signal, grace)).ok();
        }
        place.session = Some(session.clone());
        if !matches!(place.phase, Phase::Interrupted { .. }) {
            return None;
        }
        place.interruptions += 1;
        Some(place.interruptions)
    }

    /// Notes that the node is away, or its stream. Returns the number of the interruption; `None` if it
    /// is interrupted already, or does not depend on what was lost.
    pub(super) fn interrupt(&self, lost: Lost, reason: &str, grace: Duration) -> Option<u64> {
        let mut place = lock(&self.place);
        match lost {
            Lost::Session(id) => drop(place.session.take_if(|current| current.id == id)?),
            // Streams are counted while the place is held: none is opened meanwhile.
            Lost::Stream(number) if self.to_node.stream() != number => return None,
            Lost::Stream(_) | Lost::EarlierSession => {}
        }
        if matches!(place.phase, Phase::Interrupted { .. }) {
            return None;
        }
        place.phase = Phase::Interrupted { reason: reason.to_owned() };
        place.interruptions += 1;
        // No stream may be opened for the first time any more: the order may never have arrived.
        place.opened = true;
        let number = place.interruptions;
        drop(place);
        self.phases.send_modify(|n| *n += 1);
        self.to_reader.interrupted(TaskInterrupted {
            reason: reason.to_owned(),
            resume_within_ms: u64::try_from(grace.as_millis()).unwrap_or(u64::MAX),
        });
        Some(number)
    }

    /// Whether this interruption still lasts.
    pub(super) fn is_interrupted(&self, number: u64) -> bool {
        let place = lock(&self.place);
        place.interruptions == number && matches!(place.phase, Phase::Interrupted { .. })
    }

    /// Whether it was sent to its node, which has not said yet that it began.
    pub(super) fn is_beginning(&self) -> bool {
        matches!(lock(&self.place).phase, Phase::Accepted)
    }

    /// Takes the place of the node's first stream; whether it was free.
    pub(super) fn take_opening(&self) -> bool {
        !std::mem::replace(&mut lock(&self.place).opened, true)
    }

    /// The node opens its first stream; returns its number.
    pub(super) fn open(&self) -> Option<u64> {
        let mut place = lock(&self.place);
        (!std::mem::replace(&mut place.opened, true)).then(|| self.to_node.open())
    }

    /// The node opens its stream anew; returns its number. `None` if it is not reached by any session.
    pub(super) fn resume(&self, hello: &TaskIoHello) -> Option<u64> {
        let flow = lock(&self.flow);
        let (stream, taken) = {
            let mut place = lock(&self.place);
            place.session.as_ref()?;
            let ([stdout_offset, stderr_offset], credit) = self.to_reader.resume();
            let resume = TaskIoResume { stdout_offset, stderr_offset, credit };
            let opened = self.to_node.resume(hello, resume);
            // The end of the stream before cannot interrupt it any more.
            place.phase = Phase::Running;
            opened
        };
        if taken > 0 {
            self.to_reader.stdin_credit(taken);
        }
        drop(flow);
        self.tell_input();
        self.phases.send_modify(|n| *n += 1);
        self.to_reader.resumed();
        Some(stream)
    }

    fn tell_input(&self) {
        let _flow = lock(&self.flow);
        if let Some(input) = self.to_node.input() {
            self.to_reader.input_known(input);
        }
    }

    /// The command has started; whether that is news.
    pub(super) fn start(&self, started: TaskStarted) -> bool {
        let mut place = lock(&self.place);
        let news = place.started_at_ms.is_none();
        place.started_at_ms.get_or_insert_with(unix_ms);
        place.phase = Phase::Running;
        drop(place);
        self.to_reader.started(started);
        news
    }

    /// Takes output from the node; returns what of it is new.
    pub(super) fn output(&self, output: Output) -> Result<Option<Piece>, FlowViolation> {
        let _flow = lock(&self.flow);
        let (piece, more) = self.to_reader.output(output)?;
        self.to_node.credit(more);
        Ok(piece)
    }

    /// Takes output off what the task may write; whether there was enough left.
    pub(super) fn may_write(&self, bytes: usize) -> bool {
        let take = |left: u64| left.checked_sub(bytes as u64);
        self.output_left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).is_ok()
    }

    /// The reader has dealt with so many more bytes.
    pub fn grant(&self, bytes: u64) {
        let _flow = lock(&self.flow);
        self.to_node.credit(self.to_reader.grant(bytes));
    }

    /// The spool has.
    pub(super) fn spooled(&self, bytes: u64) {
        let _flow = lock(&self.flow);
        self.to_node.credit(self.to_reader.spooled(bytes));
    }

    /// Nobody takes the output any more.
    pub(super) fn discard(&self) {
        let _flow = lock(&self.flow);
        self.to_node.credit(self.to_reader.discard());
    }

    /// The command has taken input.
    pub(super) fn stdin_taken(&self, bytes: u64) {
        let _flow = lock(&self.flow);
        self.to_node.stdin_taken(bytes);
        self.to_reader.stdin_credit(bytes);
    }

    /// A reader comes back; see [`ToReader::attach`].
    #[must_use]
    pub fn attach(&self, has: [u64; 2], credit: u64, unacknowledged: u64) -> Option<Attached> {
        let attached = {
            let _flow = lock(&self.flow);
            let attached = self.to_reader.attach(has, credit, unacknowledged)?;
            self.to_node.credit(self.to_reader.grant(0));
            attached
        };
        self.tell_input();
        Some(attached)
    }

    pub(super) fn heard(&self) {
        *lock(&self.last_frame) = Instant::now();
    }

    pub(super) fn last_frame(&self) -> Instant {
        *lock(&self.last_frame)
    }
}

/// The order to end a command.
#[must_use]
pub fn cancel_frame(id: TaskId, signal: u32, grace: Duration) -> hub_frame::Frame {
    hub_frame::Frame::CancelTask(CancelTask {
        task_id: id.as_bytes().to_vec().into(),
        signal,
        grace_ms: u64::try_from(grace.as_millis()).unwrap_or(u64::MAX),
    })
}
