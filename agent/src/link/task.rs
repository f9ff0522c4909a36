//! One command of the hub: its `TaskIo` stream, its credit, its end.
//!
//! Owned by the session that ordered it. The stream from the hub is read in a loop that never waits
//! for the command: what the command has not taken yet waits in a queue bounded in bytes. Output
//! goes the other way, and is bounded by the reader's credit, which [`crate::exec`] keeps to. The
//! command's end is the last frame, and the stream stays open until the hub has taken it.

use std::collections::VecDeque;
use std::time::Duration;

use bytes::Bytes;
use cortex_proto::v1::node_client::NodeClient;
use cortex_proto::v1::{self, task_io_down, task_io_up};
use cortex_shared::ids::TaskId;
use cortex_shared::tasks::TaskScope;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Status, Streaming};

use super::permit::Permit;
use super::request::{Refusal, terminal_size};
use super::session::Outbox;
use crate::exec::{self, CommandControl, CommandEvent, CommandExit, CommandRequest};

/// Standard input that may lie here untaken: the callers' window and room for a late credit.
const MAX_QUEUED_INPUT_BYTES: usize = 1024 * 1024;
/// Signals and pieces of input that may lie here; more is not a reader but an attack.
const MAX_QUEUED_FRAMES: usize = 16 * 1024;
/// How long a command that lost its stream or session has between TERM and KILL.
const GRACE: Duration = Duration::from_secs(2);
/// How long the hub may take to take a task's stream. What allowed the command is not kept for longer.
const OPEN_TIMEOUT: Duration = Duration::from_secs(15);
/// How long the hub may take to close the stream after the command's end.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(30);
/// Frames between the command and HTTP/2; their bytes are bounded by the credit.
const FRAMES: usize = 16;

/// What one task needs of its session.
pub(super) struct TaskContext {
    pub(super) client: NodeClient<Channel>,
    pub(super) outbox: Outbox,
    pub(super) scope: TaskScope,
}

/// Runs a command, or reports why it does not run.
pub(super) async fn run_task(
    context: TaskContext,
    id: TaskId,
    command: Result<CommandRequest, Refusal>,
    permit: Permit,
    initial_credit: u64,
    cancels: mpsc::Receiver<CommandControl>,
) {
    let (up, up_frames) = mpsc::channel(FRAMES);
    let hello = v1::TaskIoHello { task_id: id.as_bytes().to_vec().into() };
    up.try_send(frame(task_io_up::Frame::Hello(hello))).expect("a new channel has room");
    let TaskContext { mut client, outbox, scope } = context;
    let opening = async move {
        let opening = client.task_io(ReceiverStream::new(up_frames));
        tokio::time::timeout(OPEN_TIMEOUT, opening)
            .await
            .unwrap_or_else(|_| Err(Status::deadline_exceeded("the hub did not take it in time")))
    };
    let command = match command {
        Ok(command) => command,
        Err(refusal) => {
            let exit = refused(&refusal);
            up.try_send(frame(task_io_up::Frame::Exit(exit.clone())))
                .expect("a new channel has room for two");
            drop(up);
            match opening.await {
                Ok(stream) => wait_for_close(stream.into_inner()).await,
                Err(status) => report_unopened(&outbox, id, &status, Some(exit)),
            }
            return;
        }
    };

    // The command starts only once the hub has taken its stream: a hub that has given the task up in
    // the meantime (and has said so to whoever asked for it) must not find it run all the same.
    let opened = tokio::select! {
        opened = opening => opened,
        () = scope.token().cancelled() => return,
    };
    let opened = match opened {
        Ok(opened) => opened,
        Err(status) => return report_unopened(&outbox, id, &status, None),
    };
    let (control, control_frames) = mpsc::channel(FRAMES);
    let (events_out, events) = mpsc::channel(FRAMES);
    scope.spawn("command", permit.run(command, initial_credit, control_frames, events_out));
    let (stream_gone, gone) = mpsc::channel(1);
    let down = DownPump { control, cancels, queue: VecDeque::new(), queued_input: 0 };
    let pumping = down.run(std::future::ready(Ok(opened)), scope.token().clone(), gone);
    let upward = pump_up(events, up, stream_gone);
    let (result, ()) = tokio::join!(pumping, upward);
    if let Err(status) = result {
        report_unopened(&outbox, id, &status, None);
    }
}

fn frame(frame: task_io_up::Frame) -> v1::TaskIoUp {
    v1::TaskIoUp { frame: Some(frame) }
}

/// Passes the command's events to the hub until its end. If the stream is gone the events are
/// dropped, so that the command can end.
async fn pump_up(
    mut events: mpsc::Receiver<CommandEvent>,
    up: mpsc::Sender<v1::TaskIoUp>,
    stream_gone: mpsc::Sender<()>,
) {
    while let Some(event) = events.recv().await {
        if up.send(frame(up_frame(event))).await.is_err() {
            // Full means that it has been said already.
            stream_gone.try_send(()).ok();
        }
    }
}

/// Everything that goes to the command: credit, input, signals from the stream; cancels from the
/// link; the end of the session.
struct DownPump {
    control: mpsc::Sender<CommandControl>,
    cancels: mpsc::Receiver<CommandControl>,
    queue: VecDeque<CommandControl>,
    queued_input: usize,
}

impl DownPump {
    /// Ends when the stream has ended and the command with it. The error is the stream's, if it
    /// could not even be opened.
    async fn run(
        mut self,
        opening: impl Future<Output = Result<tonic::Response<Streaming<v1::TaskIoDown>>, Status>>,
        session_ended: tokio_util::sync::CancellationToken,
        mut stream_gone: mpsc::Receiver<()>,
    ) -> Result<(), Status> {
        let mut opening = std::pin::pin!(opening);
        let mut stream: Option<Streaming<v1::TaskIoDown>> = None;
        let mut unopened = None;
        let mut reading = true;
        let mut cancelled = false;
        let control = self.control.clone();
        loop {
            tokio::select! {
                // The command has ended: it takes nothing more.
                () = control.closed() => break,
                () = session_ended.cancelled(), if !cancelled => {
                    cancelled = true;
                    self.cancel();
                }
                Some(control) = self.cancels.recv() => self.queue.push_front(control),
                Some(()) = stream_gone.recv() => {
                    reading = false;
                    self.cancel();
                }
                opened = &mut opening, if stream.is_none() && unopened.is_none() => match opened {
                    Ok(response) => stream = Some(response.into_inner()),
                    Err(status) => {
                        unopened = Some(status);
                        self.cancel();
                    }
                },
                message = read(&mut stream), if reading => match message {
                    Ok(Some(message)) => {
                        if !self.accept(message) {
                            tracing::warn!("a task's stream broke its bounds; the task is cancelled");
                            reading = false;
                            self.cancel();
                        }
                    }
                    Ok(None) | Err(_) => {
                        reading = false;
                        self.cancel();
                    }
                },
                permit = control.reserve(), if !self.queue.is_empty() => {
                    if let (Ok(permit), Some(next)) = (permit, self.queue.pop_front()) {
                        if let CommandControl::Stdin { data, .. } = &next {
                            self.queued_input -= data.len();
                        }
                        permit.send(next);
                    }
                }
            }
        }
        match (stream, unopened) {
            (_, Some(status)) => return Err(status),
            (Some(stream), None) => wait_for_close(stream).await,
            // A command that was quicker than the stream: its frames wait in the stream's queue.
            (None, None) => wait_for_close(opening.await?.into_inner()).await,
        }
        Ok(())
    }

    fn cancel(&mut self) {
        self.queue.push_front(CommandControl::Cancel { signal: 15, grace: GRACE });
    }

    /// Takes one frame in; `false` if the peer exceeded what may lie here.
    fn accept(&mut self, message: v1::TaskIoDown) -> bool {
        match message.frame {
            Some(task_io_down::Frame::Credit(credit)) => {
                if let Some(CommandControl::Credit(waiting)) = self.queue.back_mut() {
                    *waiting = waiting.saturating_add(credit.bytes);
                } else {
                    self.queue.push_back(CommandControl::Credit(credit.bytes));
                }
            }
            Some(task_io_down::Frame::Stdin(v1::Stdin { data, end })) => {
                self.queued_input += data.len();
                self.queue.push_back(CommandControl::Stdin { data, end });
            }
            Some(task_io_down::Frame::Signal(signal)) => {
                // Signals do not wait behind input that the command does not read.
                if let Ok(number @ 1..=64) = i32::try_from(signal.number) {
                    self.queue.push_front(CommandControl::Signal(number));
                }
            }
            Some(task_io_down::Frame::Resize(size)) => {
                // Only the latest counts, and it does not wait behind input either.
                self.queue.retain(|waiting| !matches!(waiting, CommandControl::Resize(_)));
                self.queue.push_front(CommandControl::Resize(terminal_size(&size)));
            }
            None => {}
        }
        self.queued_input <= MAX_QUEUED_INPUT_BYTES && self.queue.len() <= MAX_QUEUED_FRAMES
    }
}

/// The next message, once there is a stream.
async fn read(
    stream: &mut Option<Streaming<v1::TaskIoDown>>,
) -> Result<Option<v1::TaskIoDown>, Status> {
    match stream {
        Some(stream) => stream.message().await,
        None => std::future::pending().await,
    }
}

/// Leaves the stream open until the hub has read the end and closes it: to drop it earlier could
/// take the last frames along.
async fn wait_for_close(mut stream: Streaming<v1::TaskIoDown>) {
    let drained = async { while let Ok(Some(_)) = stream.message().await {} };
    if tokio::time::timeout(CLOSE_TIMEOUT, drained).await.is_err() {
        tracing::warn!("the hub did not close the stream of an ended task");
    }
}

fn report_unopened(outbox: &Outbox, id: TaskId, status: &Status, exit: Option<v1::TaskExit>) {
    let exit = exit.unwrap_or_else(|| v1::TaskExit {
        verdict: v1::TaskVerdict::Failed.into(),
        reason: format!("the task's stream could not be opened: {}", status.message()),
        ..Default::default()
    });
    // If even the session is gone, the hub knows of the failure by that.
    outbox.send(v1::node_frame::Frame::TaskRefused(v1::TaskRefused {
        task_id: id.as_bytes().to_vec().into(),
        exit: Some(exit),
    }));
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

fn up_frame(event: CommandEvent) -> task_io_up::Frame {
    match event {
        CommandEvent::Started { process_id, mode } => task_io_up::Frame::Started(v1::TaskStarted {
            mode: super::proto_mode(mode).into(),
            process_id,
        }),
        CommandEvent::Output { stream, offset, data } => {
            let stream = match stream {
                exec::OutputStream::Stdout => v1::OutputStream::Stdout,
                exec::OutputStream::Stderr => v1::OutputStream::Stderr,
            };
            task_io_up::Frame::Output(v1::Output { stream: stream.into(), offset, data })
        }
        CommandEvent::StdinTaken(bytes) => task_io_up::Frame::StdinCredit(v1::Credit { bytes }),
        CommandEvent::Exit(exit) => task_io_up::Frame::Exit(proto_exit(exit)),
    }
}

fn proto_exit(exit: CommandExit) -> v1::TaskExit {
    let verdict = match exit.verdict {
        exec::CommandVerdict::Exited => v1::TaskVerdict::Exited,
        exec::CommandVerdict::Signalled => v1::TaskVerdict::Signalled,
        exec::CommandVerdict::TimeLimit => v1::TaskVerdict::TimeLimit,
        exec::CommandVerdict::Cancelled => v1::TaskVerdict::Cancelled,
        exec::CommandVerdict::Refused => v1::TaskVerdict::Refused,
        exec::CommandVerdict::NotFound => v1::TaskVerdict::NotFound,
        exec::CommandVerdict::Failed => v1::TaskVerdict::Failed,
    };
    v1::TaskExit {
        verdict: verdict.into(),
        exit_code: exit.exit_code.into(),
        signal: exit.signal.and_then(|n| u32::try_from(n).ok()).unwrap_or(0),
        stdout_bytes: exit.stdout_bytes,
        stdout_hash: Bytes::copy_from_slice(&exit.stdout_hash),
        stderr_bytes: exit.stderr_bytes,
        stderr_hash: Bytes::copy_from_slice(&exit.stderr_hash),
        reason: exit.reason.unwrap_or_default(),
        hint: exit.hint.unwrap_or_default(),
        duration_ms: u64::try_from(exit.duration.as_millis()).unwrap_or(u64::MAX),
    }
}
