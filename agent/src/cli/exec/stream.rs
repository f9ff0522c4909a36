//! One command's frames to and from the hub: input, credit, cancels up; output and the end down.
//!
//! A [`TaskStream`] owns the conversation. It reads the hub's frames at once, always; sends what
//! waits (cancel before resize before credit before input) when there is room; hears what the
//! writer has dealt with. Nothing in it blocks. Who drives it decides about signals and terminals:
//! [`TaskStream::until_exit`] may be dropped and called again at any time without losing anything.

use std::pin::Pin;
use std::time::Duration;

use bytes::Bytes;
use cortex_proto::STDIN_WINDOW_BYTES;
use cortex_proto::v1::operator_client::OperatorClient;
use cortex_proto::v1::{self, exec_down, exec_up};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Response, Status, Streaming};

use super::stdin::Input;
use super::writer::{OutputTo, WriterEvent};
use crate::cli::error::{CliError, Exit};
use crate::cli::printer::{ColorWhen, complain};

/// Time between TERM and KILL for an interrupted command.
const GRACE: Duration = Duration::from_secs(2);
/// How long after a cancel the end is waited for.
const CANCEL_TIMEOUT: Duration = Duration::from_secs(12);
/// The same where somebody wants to get away.
const LEAVE_TIMEOUT: Duration = Duration::from_secs(3);

type Opened = Result<Response<Streaming<v1::ExecDown>>, Status>;

/// See the module.
pub(super) struct TaskStream {
    opening: Option<Pin<Box<dyn Future<Output = Opened> + Send>>>,
    down: Option<Streaming<v1::ExecDown>>,
    up: mpsc::Sender<v1::ExecUp>,
    output: Box<dyn OutputTo>,
    granted: u64,
    writer_events: mpsc::Receiver<WriterEvent>,
    /// Absent if the command gets no input, or has got all of it.
    stdin: Option<Input>,
    stdin_window: u64,
    /// Input that was read and waits for the window.
    input: Bytes,
    /// The end of input is to be sent.
    input_ends: bool,
    credit: u64,
    cancel: Option<v1::ExecCancel>,
    resize: Option<v1::TerminalSize>,
    give_up_at: Option<Instant>,
    /// What the hub said when it took the command; empty before.
    pub(super) accepted: v1::ExecAccepted,
    /// The reader of our standard output went away.
    pub(super) reader_gone: bool,
    /// It wrote more than is wanted.
    pub(super) too_much: bool,
    /// Our standard output or error cannot be written.
    pub(super) unwritable: Option<std::io::Error>,
}

impl TaskStream {
    /// A conversation that begins with `start`. Output goes to `output`, whose writer tells
    /// `writer_events` what it has dealt with.
    pub(super) fn new(
        mut client: OperatorClient<Channel>,
        start: v1::ExecStart,
        stdin: Option<Input>,
        output: Box<dyn OutputTo>,
        writer_events: mpsc::Receiver<WriterEvent>,
    ) -> Self {
        let granted = start.initial_credit;
        let (up, up_frames) = mpsc::channel(16);
        up.try_send(frame(exec_up::Frame::Start(start))).expect("a new channel has room");
        let opening = Box::pin(async move { client.exec(ReceiverStream::new(up_frames)).await });
        Self {
            opening: Some(opening),
            down: None,
            up,
            output,
            granted,
            writer_events,
            stdin,
            stdin_window: STDIN_WINDOW_BYTES,
            input: Bytes::new(),
            input_ends: false,
            credit: 0,
            cancel: None,
            resize: None,
            give_up_at: None,
            accepted: v1::ExecAccepted::default(),
            reader_gone: false,
            too_much: false,
            unwritable: None,
        }
    }

    /// Until the exit frame; `None` if it did not come in time after a cancel.
    ///
    /// # Errors
    /// If the hub refuses the command, or the conversation breaks before the end.
    pub(super) async fn until_exit(&mut self) -> Result<Option<v1::TaskExit>, CliError> {
        let up = self.up.clone();
        loop {
            let sendable = self.has_frame();
            let wants_input = self.input.is_empty();
            tokio::select! {
                opened = open(&mut self.opening) => {
                    self.opening = None;
                    self.down = Some(opened?.into_inner());
                }
                message = read(&mut self.down) => match message? {
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
                () = sleep_until(self.give_up_at) => return Ok(None),
            }
        }
    }

    /// Hears the writer until `done`, which waits for it to write the last bytes.
    pub(super) async fn hear_until<T>(&mut self, done: impl Future<Output = T>) -> T {
        let mut done = std::pin::pin!(done);
        loop {
            tokio::select! {
                done = &mut done => {
                    while let Ok(event) = self.writer_events.try_recv() {
                        self.hear(event);
                    }
                    return done;
                }
                Some(event) = self.writer_events.recv() => self.hear(event),
            }
        }
    }

    /// Asks for the end of the command: TERM, then KILL. Its end is waited for, but not for ever.
    pub(super) fn cancel(&mut self) {
        let grace_ms = u64::try_from(GRACE.as_millis()).unwrap_or(u64::MAX);
        self.cancel = Some(v1::ExecCancel { signal: 15, grace_ms });
        self.give_up_at.get_or_insert(Instant::now() + CANCEL_TIMEOUT);
    }

    /// The same, but its end is waited for a moment only.
    pub(super) fn leave(&mut self) {
        self.cancel();
        self.give_up_at = Some(Instant::now() + LEAVE_TIMEOUT);
    }

    /// Tells the command of another size of its terminal.
    pub(super) fn resize(&mut self, size: v1::TerminalSize) {
        self.resize = Some(size);
    }

    /// No more output comes: the writer ends once it has written what waits.
    pub(super) fn close_output(&self) {
        self.output.close();
    }

    fn has_frame(&self) -> bool {
        self.cancel.is_some()
            || self.resize.is_some()
            || self.credit > 0
            || self.input_fits()
            || self.input_ends
    }

    /// The most urgent frame that waits.
    fn next_frame(&mut self) -> Option<exec_up::Frame> {
        if let Some(cancel) = self.cancel.take() {
            return Some(exec_up::Frame::Cancel(cancel));
        }
        if let Some(size) = self.resize.take() {
            return Some(exec_up::Frame::Resize(size));
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
        // The end comes after the last piece of it.
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
            Some(exec_down::Frame::Output(output)) => {
                if !self.output.push(output, self.granted) {
                    return Err(lost("more output came than was granted"));
                }
            }
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
            WriterEvent::TooMuch => {
                self.too_much = true;
                self.cancel();
            }
            WriterEvent::ReaderGone => {
                self.reader_gone = true;
                self.cancel();
            }
            WriterEvent::Failed(error) => {
                self.unwritable = Some(error);
                self.cancel();
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
}

fn frame(frame: exec_up::Frame) -> v1::ExecUp {
    v1::ExecUp { frame: Some(frame) }
}

/// The mesh failed the command.
pub(super) fn lost(what: &str) -> CliError {
    CliError::new(Exit::Code(125), what)
}

async fn open(opening: &mut Option<Pin<Box<dyn Future<Output = Opened> + Send>>>) -> Opened {
    match opening {
        Some(opening) => opening.await,
        None => std::future::pending().await,
    }
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

async fn next_piece(stdin: &mut Option<Input>) -> Option<Bytes> {
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
