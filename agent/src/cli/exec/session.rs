//! The conversation with the hub about one command.
//!
//! One loop owns it: reads the hub's frames at once, always; sends what waits (cancel before credit
//! before input) when there is room; listens to signals and to the writer. Nothing in it blocks.

use std::io::Read as _;
use std::time::Duration;

use bytes::Bytes;
use cortex_proto::STDIN_WINDOW_BYTES;
use cortex_proto::v1::operator_client::OperatorClient;
use cortex_proto::v1::{self, exec_down, exec_up};
use cortex_shared::ids::{NodeId, TaskId};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Response, Status, Streaming};

use super::check::{self, OutputCheck};
use super::writer::{Captured, OutputQueue, Sink, WriterEvent, write_output};
use crate::cli::error::{CliError, Exit};
use crate::cli::printer::{ColorWhen, complain, progress_is_visible};

/// Time between TERM and KILL for an interrupted command.
const GRACE: Duration = Duration::from_secs(2);
/// How long after a cancel the end is waited for.
const CANCEL_TIMEOUT: Duration = Duration::from_secs(12);
/// Largest piece of standard input.
const STDIN_PIECE_BYTES: usize = 64 * 1024;

/// How it went.
#[derive(Debug)]
pub(super) struct Outcome {
    pub(super) task_id: String,
    pub(super) node_id: String,
    pub(super) node_name: String,
    pub(super) ended: Ended,
    /// Why the output is not complete.
    pub(super) incomplete: Option<String>,
    pub(super) captured: Captured,
    interrupted: bool,
    reader_gone: bool,
    unwritable: Option<std::io::Error>,
}

/// What is known of the end.
#[derive(Debug)]
pub(super) enum Ended {
    /// The node or the hub said how.
    Exit(v1::TaskExit),
    /// Interrupted here, and nothing was heard in time.
    GaveUp,
}

impl Outcome {
    /// What this process ends with.
    pub(super) fn code(&self) -> u8 {
        match &self.ended {
            _ if self.interrupted => 130,
            Ended::GaveUp => 130,
            _ if self.unwritable.is_some() => 125,
            // As a command whose own pipe broke.
            _ if self.reader_gone => 141,
            _ if self.incomplete.is_some() => 125,
            Ended::Exit(exit) => check::exit_code(exit),
        }
    }

    /// What to say on standard error.
    pub(super) fn complaint(&self) -> Option<String> {
        if let Some(error) = &self.unwritable {
            return Some(format!(
                "error: cannot write the output; the command was ended\ncause: {error}\n"
            ));
        }
        if self.reader_gone {
            return None;
        }
        match &self.ended {
            Ended::GaveUp => Some(
                "error: interrupted, and the end of the command was not heard of in time\n"
                    .to_owned(),
            ),
            Ended::Exit(_) if self.interrupted => None,
            Ended::Exit(exit) => match &self.incomplete {
                Some(problem) => Some(format!(
                    "error: the output is incomplete\ncause: {problem}\nhint: the command itself ended ({}, exit code {}); run it again if it may run twice\n",
                    check::verdict_name(exit.verdict),
                    exit.exit_code
                )),
                None => check::complaint(exit),
            },
        }
    }
}

/// Runs a command to its end.
pub(super) async fn run(
    client: OperatorClient<Channel>,
    start: v1::ExecStart,
    with_stdin: bool,
    sink: Sink,
) -> Result<Outcome, CliError> {
    let signals = Signals::new()?;
    let granted = start.initial_credit;
    // One more than is ever sent before room is made: the start itself.
    let (up, up_frames) = mpsc::channel(16);
    up.try_send(frame(exec_up::Frame::Start(start))).expect("a new channel has room");
    let mut client = client;
    let opening = async move { client.exec(ReceiverStream::new(up_frames)).await };
    let queue = OutputQueue::default();
    let (events, writer_events) = mpsc::channel(64);
    let writer_queue = queue.clone();
    let writer = tokio::task::spawn_blocking(move || write_output(&writer_queue, sink, &events));
    let conversation = Conversation {
        up,
        queue,
        granted,
        writer_events,
        signals,
        stdin: with_stdin.then(read_stdin),
        stdin_window: STDIN_WINDOW_BYTES,
        input: Bytes::new(),
        input_ends: false,
        credit: 0,
        cancel: None,
        give_up_at: None,
        interrupted: false,
        reader_gone: false,
        unwritable: None,
        accepted: v1::ExecAccepted::default(),
    };
    conversation.run(opening, writer).await
}

fn frame(frame: exec_up::Frame) -> v1::ExecUp {
    v1::ExecUp { frame: Some(frame) }
}

/// Reads standard input on a thread that may block for ever; it ends with the process.
fn read_stdin() -> mpsc::Receiver<Bytes> {
    let (pieces, receiver) = mpsc::channel(2);
    tokio::task::spawn_blocking(move || {
        let mut stdin = std::io::stdin().lock();
        let mut buffer = vec![0; STDIN_PIECE_BYTES];
        loop {
            match stdin.read(&mut buffer) {
                Ok(0) | Err(_) => return,
                Ok(length) => {
                    if pieces.blocking_send(Bytes::copy_from_slice(&buffer[..length])).is_err() {
                        return;
                    }
                }
            }
        }
    });
    receiver
}

struct Conversation {
    up: mpsc::Sender<v1::ExecUp>,
    queue: OutputQueue,
    granted: u64,
    writer_events: mpsc::Receiver<WriterEvent>,
    signals: Signals,
    /// Absent if the command gets no input, or has got all of it.
    stdin: Option<mpsc::Receiver<Bytes>>,
    stdin_window: u64,
    /// Input that was read and waits for the window.
    input: Bytes,
    /// The end of input is to be sent.
    input_ends: bool,
    credit: u64,
    cancel: Option<v1::ExecCancel>,
    give_up_at: Option<Instant>,
    interrupted: bool,
    reader_gone: bool,
    unwritable: Option<std::io::Error>,
    accepted: v1::ExecAccepted,
}

type Opened = Result<Response<Streaming<v1::ExecDown>>, Status>;

impl Conversation {
    async fn run(
        mut self,
        opening: impl Future<Output = Opened>,
        writer: JoinHandle<(OutputCheck, Captured)>,
    ) -> Result<Outcome, CliError> {
        let exit = self.talk(opening).await;
        self.queue.close();
        let exit = exit?;
        let (check, captured) = self.finish_writing(writer).await?;
        let incomplete = exit.as_ref().and_then(|exit| check.incomplete(exit));
        Ok(Outcome {
            task_id: TaskId::from_slice(&self.accepted.task_id)
                .map(|id| id.to_string())
                .unwrap_or_default(),
            node_id: NodeId::from_slice(&self.accepted.node_id)
                .map(|id| id.to_string())
                .unwrap_or_default(),
            node_name: self.accepted.node_name,
            ended: exit.map_or(Ended::GaveUp, Ended::Exit),
            incomplete,
            captured,
            interrupted: self.interrupted,
            reader_gone: self.reader_gone,
            unwritable: self.unwritable,
        })
    }

    /// Until the exit frame; `None` if it did not come in time after a cancel.
    async fn talk(
        &mut self,
        opening: impl Future<Output = Opened>,
    ) -> Result<Option<v1::TaskExit>, CliError> {
        let mut opening = std::pin::pin!(opening);
        let mut down: Option<Streaming<v1::ExecDown>> = None;
        let up = self.up.clone();
        loop {
            let sendable =
                self.cancel.is_some() || self.credit > 0 || self.input_fits() || self.input_ends;
            let wants_input = self.input.is_empty();
            tokio::select! {
                opened = &mut opening, if down.is_none() => down = Some(opened?.into_inner()),
                message = read(&mut down) => match message? {
                    Some(message) => if let Some(exit) = self.accept(message)? {
                        return Ok(Some(exit));
                    },
                    None => return Err(lost("the hub closed the stream before the command's end")),
                },
                Ok(permit) = up.reserve(), if sendable => {
                    if let Some(next) = self.next_frame() {
                        permit.send(frame(next));
                    }
                }
                Some(event) = self.writer_events.recv() => self.hear(event),
                piece = next_piece(&mut self.stdin), if wants_input => self.take_input(piece),
                () = self.signals.next() => self.interrupt()?,
                () = sleep_until(self.give_up_at) => return Ok(None),
            }
        }
    }

    /// The most urgent frame that waits.
    fn next_frame(&mut self) -> Option<exec_up::Frame> {
        if let Some(cancel) = self.cancel.take() {
            return Some(exec_up::Frame::Cancel(cancel));
        }
        if self.credit > 0 {
            let bytes = std::mem::take(&mut self.credit);
            return Some(exec_up::Frame::Credit(v1::Credit { bytes }));
        }
        if self.input_fits() {
            let room = usize::try_from(self.stdin_window).unwrap_or(usize::MAX);
            let data = self.input.split_to(self.input.len().min(room));
            self.stdin_window -= u64::try_from(data.len()).unwrap_or(u64::MAX);
            return Some(exec_up::Frame::Stdin(v1::Stdin { data, end: false }));
        }
        if self.input_ends {
            self.input_ends = false;
            return Some(exec_up::Frame::Stdin(v1::Stdin { data: Bytes::new(), end: true }));
        }
        None
    }

    fn input_fits(&self) -> bool {
        !self.input.is_empty() && self.stdin_window > 0
    }

    fn accept(&mut self, message: v1::ExecDown) -> Result<Option<v1::TaskExit>, CliError> {
        match message.frame {
            Some(exec_down::Frame::Accepted(accepted)) => self.accepted = accepted,
            Some(exec_down::Frame::Output(output)) => self.take_output(output)?,
            Some(exec_down::Frame::StdinCredit(credit)) => {
                self.stdin_window = self.stdin_window.saturating_add(credit.bytes);
            }
            Some(exec_down::Frame::Exit(exit)) => return Ok(Some(exit)),
            Some(exec_down::Frame::Started(started)) => self.warn_if_unconfined(&started),
            // Unknown frames come from a newer hub.
            None => {}
        }
        Ok(None)
    }

    fn take_output(&mut self, output: v1::Output) -> Result<(), CliError> {
        if self.queue.push(output, self.granted) {
            Ok(())
        } else {
            Err(lost("more output came than was granted"))
        }
    }

    /// Nobody should overlook that a command is not in the sandbox.
    fn warn_if_unconfined(&self, started: &v1::TaskStarted) {
        if started.mode() == v1::Mode::Permissive {
            let node = match self.accepted.node_name.as_str() {
                "" => "the node",
                name => name,
            };
            let text = format!(
                "warning: PERMISSIVE: this runs on {node} outside the sandbox, with all rights of \
                 the agent's user"
            );
            complain(&text, ColorWhen::Auto);
        }
    }

    fn hear(&mut self, event: WriterEvent) {
        match event {
            WriterEvent::Written(bytes) => self.credit = self.credit.saturating_add(bytes),
            WriterEvent::ReaderGone => {
                self.reader_gone = true;
                self.end_command();
            }
            WriterEvent::Failed(error) => {
                self.unwritable = Some(error);
                self.end_command();
            }
        }
    }

    fn take_input(&mut self, piece: Option<Bytes>) {
        match piece {
            Some(data) => self.input = data,
            None => {
                self.stdin = None;
                self.input_ends = true;
            }
        }
    }

    fn interrupt(&mut self) -> Result<(), CliError> {
        if self.interrupted {
            return Err(CliError::new(
                Exit::Code(130),
                "left at once; the command may still be running",
            ));
        }
        self.interrupted = true;
        if progress_is_visible() {
            complain("ending the command; Ctrl-C again to leave at once", ColorWhen::Auto);
        }
        self.end_command();
        Ok(())
    }

    fn end_command(&mut self) {
        let grace_ms = u64::try_from(GRACE.as_millis()).unwrap_or(u64::MAX);
        self.cancel = Some(v1::ExecCancel { signal: 15, grace_ms });
        self.give_up_at.get_or_insert(Instant::now() + CANCEL_TIMEOUT);
    }

    /// Waits for the last bytes to be written, which a slow reader may delay; a signal leaves.
    async fn finish_writing(
        &mut self,
        mut writer: JoinHandle<(OutputCheck, Captured)>,
    ) -> Result<(OutputCheck, Captured), CliError> {
        loop {
            tokio::select! {
                done = &mut writer => {
                    while let Ok(event) = self.writer_events.try_recv() {
                        self.hear(event);
                    }
                    return done.map_err(|error| lost("the output was not written").because(error));
                }
                Some(event) = self.writer_events.recv() => self.hear(event),
                () = self.signals.next() => {
                    return Err(CliError::new(Exit::Code(130), "interrupted before all output was written"));
                }
            }
        }
    }
}

fn lost(what: &str) -> CliError {
    CliError::new(Exit::Code(125), what)
}

async fn read(down: &mut Option<Streaming<v1::ExecDown>>) -> Result<Option<v1::ExecDown>, Status> {
    match down {
        Some(down) => down.message().await.map_err(|status| {
            // What the hub says carries a code; anything else is the connection's end.
            if status.metadata().contains_key(cortex_proto::CODE_TRAILER) {
                return status;
            }
            tracing::debug!(%status, "the stream broke");
            Status::unavailable(
                "the connection to the hub was lost; how the command ended is not known",
            )
        }),
        None => std::future::pending().await,
    }
}

async fn next_piece(stdin: &mut Option<mpsc::Receiver<Bytes>>) -> Option<Bytes> {
    match stdin {
        Some(stdin) => stdin.recv().await,
        None => std::future::pending().await,
    }
}

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

struct Signals {
    interrupt: Signal,
    terminate: Signal,
}

impl Signals {
    fn new() -> Result<Self, CliError> {
        let listen = |kind| {
            signal(kind).map_err(|error| {
                CliError::new(Exit::Code(125), "cannot listen to signals").because(error)
            })
        };
        Ok(Self {
            interrupt: listen(SignalKind::interrupt())?,
            terminate: listen(SignalKind::terminate())?,
        })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}
