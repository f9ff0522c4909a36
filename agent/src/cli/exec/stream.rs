//! One command's frames to and from the hub: input, credit, cancels up; output and the end down.
//!
//! A [`TaskStream`] owns the conversation. It reads the hub's frames at once, always; sends what
//! waits (cancel before resize before credit before input) when there is room; hears what the
//! writer has dealt with. Nothing in it blocks. Who drives it decides about signals and terminals:
//! [`TaskStream::until_exit`] may be dropped and called again at any time without losing anything.
//!
//! Where the connection to the hub breaks, or the hub is restarted, it comes back by itself: output goes
//! on at the byte it has, and input at the byte the node has.

use std::io::Write as _;
use std::pin::Pin;
use std::time::Duration;

use bytes::Bytes;
use cortex_proto::v1::operator_client::OperatorClient;
use cortex_proto::v1::{self, exec_down, exec_up};
use cortex_proto::{
    CODE_DRAINING, CODE_TASK_ENDING, CODE_TRAILER, LEAST_OUTPUT_CREDIT, STDIN_WINDOW_BYTES,
};
use cortex_shared::clock::sleep_until;
use cortex_shared::ids::TaskId;
use cortex_shared::replay::{Piece, Replay};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Response, Status, Streaming};

use super::check;
use super::request::OWN_KEY;
use super::stdin::Input;
use super::writer::{OutputTo, WriterEvent};
use crate::cli::error::{CliError, Exit, printable};
use crate::cli::persist::{PATIENCE, is_passing, jittered, next_delay};
use crate::cli::printer::{ColorWhen, complain};
use crate::client::connect_error_in;

/// Time between TERM and KILL for an interrupted command.
const GRACE: Duration = Duration::from_secs(2);
/// Credit is given in frames of at least so much: the hub may have made the window as small as twice that.
const CREDIT_FRAME: u64 = LEAST_OUTPUT_CREDIT / 2;
/// How long after a cancel the end is waited for.
const CANCEL_TIMEOUT: Duration = Duration::from_secs(12);
/// The same where somebody wants to get away.
const LEAVE_TIMEOUT: Duration = Duration::from_secs(3);
/// How long a command is asked for again whose start nobody answered.
const START_PATIENCE: Duration = Duration::from_secs(10);

type Opened = Result<Response<Streaming<v1::ExecDown>>, Status>;

/// See the module.
pub(super) struct TaskStream {
    client: OperatorClient<Channel>,
    /// What was asked for, until the hub has taken it.
    start: Option<v1::ExecStart>,
    /// The hub has said that it is about to stop.
    drained: bool,
    opening: Option<Pin<Box<dyn Future<Output = Opened> + Send>>>,
    down: Option<Streaming<v1::ExecDown>>,
    up: mpsc::Sender<v1::ExecUp>,
    output: Box<dyn OutputTo>,
    granted: u64,
    /// Bytes of each stream that have come.
    received: [u64; 2],
    /// Bytes that came and that the writer has not dealt with.
    unwritten: u64,
    writer_events: mpsc::Receiver<WriterEvent>,
    /// Absent if the command gets no input, or has got all of it.
    stdin: Option<Input>,
    /// Input that was read and that the command has not taken.
    input: Replay,
    input_read: u64,
    /// Input that the node has, and the command has not taken, from before the stream broke.
    input_behind: u64,
    stdin_window: u64,
    /// Where input goes on is not known after the stream broke.
    input_waits: bool,
    /// All input was read; its end is to be sent.
    input_ends: bool,
    input_end_sent: bool,
    credit: u64,
    cancel: Option<v1::ExecCancel>,
    /// What was asked for before the stream broke, and may be lost.
    cancelled: Option<v1::ExecCancel>,
    resize: Option<v1::TerminalSize>,
    /// The last size that was told, and may be lost.
    resized: Option<v1::TerminalSize>,
    give_up_at: Option<Instant>,
    /// The command has a terminal, and so perhaps ours is in raw mode.
    on_terminal: bool,
    /// Since when the hub is away, and when it is tried next.
    lost_at: Option<Instant>,
    retry: Option<(Instant, Duration)>,
    /// What the hub said when it took the command; empty before.
    pub(super) accepted: v1::ExecAccepted,
    /// The reader of our standard output went away.
    pub(super) reader_gone: bool,
    /// It wrote more than is wanted.
    pub(super) too_much: bool,
    /// Our standard output or error cannot be written.
    pub(super) unwritable: Option<std::io::Error>,
    /// Our standard input cannot be read.
    pub(super) unreadable: Option<std::io::Error>,
}

impl TaskStream {
    /// A conversation that begins with `start`. Output goes to `output`, whose writer tells
    /// `writer_events` what it has dealt with.
    pub(super) fn new(
        client: OperatorClient<Channel>,
        start: v1::ExecStart,
        stdin: Option<Input>,
        output: Box<dyn OutputTo>,
        writer_events: mpsc::Receiver<WriterEvent>,
    ) -> Self {
        let mut start = start;
        if start.idempotency_key.is_empty() {
            start.idempotency_key = format!("{OWN_KEY}{}", uuid::Uuid::new_v4().simple());
        }
        let granted = start.initial_credit;
        let on_terminal = start.spec.as_ref().is_some_and(|spec| spec.terminal.is_some());
        let (up, opening) = call(&client, exec_up::Frame::Start(start.clone()));
        Self {
            client,
            start: Some(start),
            drained: false,
            opening: Some(opening),
            down: None,
            up,
            output,
            granted,
            received: [0; 2],
            unwritten: 0,
            writer_events,
            stdin,
            input: Replay::default(),
            input_read: 0,
            input_behind: 0,
            stdin_window: STDIN_WINDOW_BYTES,
            input_waits: false,
            input_ends: false,
            input_end_sent: false,
            credit: 0,
            cancel: None,
            cancelled: None,
            resize: None,
            resized: None,
            on_terminal,
            give_up_at: None,
            lost_at: None,
            retry: None,
            accepted: v1::ExecAccepted::default(),
            reader_gone: false,
            too_much: false,
            unwritable: None,
            unreadable: None,
        }
    }

    /// Until the exit frame; `None` if it did not come in time after a cancel.
    ///
    /// # Errors
    /// If the hub refuses the command, or the conversation breaks before the end.
    pub(super) async fn until_exit(&mut self) -> Result<Option<v1::TaskExit>, CliError> {
        loop {
            if let Some(end) = self.turn().await? {
                return Ok(end);
            }
        }
    }

    /// Until the hub has said that it took the command.
    ///
    /// # Errors
    /// If it refuses the command, or cannot be asked.
    pub(super) async fn until_accepted(&mut self) -> Result<(), CliError> {
        while self.start.is_some() {
            if self.turn().await?.is_some() {
                return Err(lost("the hub did not say that it accepted the command"));
            }
        }
        Ok(())
    }

    /// One thing of all that may happen. The end, which is `None` if it did not come in time after a cancel.
    async fn turn(&mut self) -> Result<Option<Option<v1::TaskExit>>, CliError> {
        let sendable = self.has_frame();
        let up = self.up.clone();
        let wants_input = !self.input.has_next();
        tokio::select! {
            opened = open(&mut self.opening) => {
                self.opening = None;
                match opened {
                    Ok(response) => self.down = Some(response.into_inner()),
                    Err(status) => self.broke(status)?,
                }
            }
            message = read(&mut self.down) => match message {
                Ok(Some(message)) => return Ok(self.accept(message)?.map(Some)),
                Ok(None) => {
                    let text = "the hub closed the stream before the command's end";
                    self.broke(Status::unavailable(text))?;
                }
                Err(status) => self.broke(status)?,
            },
            Ok(permit) = up.reserve(), if sendable => {
                if let Some(next) = self.next_frame() {
                    permit.send(frame(next));
                }
            }
            Some(event) = self.writer_events.recv() => self.hear(event),
            piece = next_piece(&mut self.stdin), if wants_input => self.take_input(piece),
            () = sleep_until(self.retry.map(|(at, _)| at)) => self.reconnect(),
            () = sleep_until(self.give_up_at) => return Ok(Some(None)),
        }
        Ok(None)
    }

    /// The stream broke. What is gone for good is an error; otherwise another one is opened soon.
    fn broke(&mut self, status: Status) -> Result<(), CliError> {
        self.down = None;
        let code = status.metadata().get(CODE_TRAILER);
        let known = !self.accepted.task_id.is_empty() && self.accepted.resume_grace_ms > 0;
        let lost_at = *self.lost_at.get_or_insert_with(Instant::now);
        // Not begun, or begun once: its key leads to it. Between two hubs there is none to connect to.
        let draining = code.is_some_and(|code| code == CODE_DRAINING);
        let ending = code.is_some_and(|code| code == CODE_TASK_ENDING);
        let midway = code.is_none() && is_passing(&status) && connect_error_in(&status).is_none();
        let absent = || connect_error_in(&status).is_some_and(|error| !error.is_permanent());
        let waits = draining || ending || midway || self.retry.is_some() && absent();
        self.drained |= draining;
        let patience = if self.drained { PATIENCE } else { START_PATIENCE };
        if waits && self.start.is_some() && lost_at.elapsed() <= patience {
            if self.retry.is_none() {
                self.say(if draining {
                    "note: the hub is being restarted; the command waits for the next one"
                } else {
                    "note: the connection to the hub was lost before it took the command; asking again"
                });
            }
            let delay = next_delay(&status, self.retry.map(|(_, delay)| delay));
            self.retry = Some((Instant::now() + jittered(delay), delay));
            return Ok(());
        }
        if code.is_some() && !is_passing(&status) {
            return Err(status.into());
        }
        if !known || lost_at.elapsed() > PATIENCE {
            tracing::debug!(%status, "the stream broke");
            let text = "the connection to the hub was lost; how the command ended is not known";
            return Err(match code {
                Some(_) => status.into(),
                // What was never accepted may not even have arrived.
                None if self.accepted.task_id.is_empty() => status.into(),
                None => lost(text),
            });
        }
        if self.retry.is_none() {
            self.note("the connection to the hub was lost; reconnecting");
        }
        let delay = next_delay(&status, self.retry.map(|(_, delay)| delay));
        self.retry = Some((Instant::now() + jittered(delay), delay));
        Ok(())
    }

    /// Opens the stream anew, where this one stopped.
    fn reconnect(&mut self) {
        // In an hour, as far as the wait is concerned: the answer comes first.
        self.retry = self.retry.map(|(at, delay)| (at + Duration::from_secs(3600), delay));
        self.cancel = self.cancel.take().or(self.cancelled);
        self.resize = self.resize.take().or_else(|| self.resized.clone());
        if let Some(start) = &self.start {
            let (up, opening) = call(&self.client, exec_up::Frame::Start(start.clone()));
            (self.up, self.opening) = (up, Some(opening));
            // Whatever of the input was sent went nowhere.
            self.resume_input(v1::StdinResume::default());
            return;
        }
        let attach = v1::ExecAttach {
            task_id: self.accepted.task_id.clone(),
            stdout_offset: self.received[0],
            stderr_offset: self.received[1],
            credit: self.granted.saturating_sub(self.unwritten),
            unacknowledged: self.unwritten,
        };
        self.credit = 0;
        self.input_waits = true;
        let (up, opening) = call(&self.client, exec_up::Frame::Attach(attach));
        (self.up, self.opening) = (up, Some(opening));
    }

    fn note(&self, what: &str) {
        let node = &self.accepted.node_name;
        self.say(&format!("note: {node}: {what}"));
    }

    /// Says something to whoever sits here.
    fn say(&self, text: &str) {
        if self.on_terminal {
            // In raw mode a line neither begins at the left nor ends there by itself.
            let line = format!("\r{}\r\n", printable(text));
            std::io::stderr().write_all(line.as_bytes()).ok();
        } else {
            complain(text, ColorWhen::Auto);
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
        // What waits for the next hub has no end that could be waited for.
        let waits = self.start.is_some() && self.retry.is_some();
        let within = if waits { Duration::ZERO } else { CANCEL_TIMEOUT };
        self.give_up_at.get_or_insert(Instant::now() + within);
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

    /// Ends the call, which has failed: the hub keeps nothing for it while a slow reader is waited for.
    pub(super) fn hang_up(&mut self) {
        (self.down, self.opening) = (None, None);
        self.up = mpsc::channel(1).0;
    }

    /// No more output comes: the writer ends once it has written what waits.
    pub(super) fn close_output(&self) {
        self.output.close();
    }

    /// Whether what was dealt with is worth a frame. Until then the command has the rest of the window.
    fn credit_is_due(&self) -> bool {
        self.credit > 0 && self.credit >= CREDIT_FRAME.min(self.granted / 2)
    }

    fn has_frame(&self) -> bool {
        self.cancel.is_some()
            || self.resize.is_some()
            || self.credit_is_due()
            || self.input_fits()
            || self.input_end_is_due()
    }

    /// The most urgent frame that waits.
    fn next_frame(&mut self) -> Option<exec_up::Frame> {
        if let Some(cancel) = self.cancel.take() {
            self.cancelled = Some(cancel);
            return Some(exec_up::Frame::Cancel(cancel));
        }
        if let Some(size) = self.resize.take() {
            self.resized = Some(size.clone());
            return Some(exec_up::Frame::Resize(size));
        }
        if self.credit_is_due() {
            let bytes = std::mem::take(&mut self.credit);
            return Some(exec_up::Frame::Credit(v1::Credit { bytes }));
        }
        if self.input_fits() {
            let Piece { data, .. } = self.input.next(self.stdin_window)?;
            self.stdin_window -= u64::try_from(data.len()).unwrap_or(u64::MAX);
            return Some(exec_up::Frame::Stdin(v1::Stdin { data, end: false }));
        }
        if self.input_end_is_due() {
            self.input_end_sent = true;
            return Some(exec_up::Frame::Stdin(v1::Stdin { data: Bytes::new(), end: true }));
        }
        None
    }

    fn input_fits(&self) -> bool {
        !self.input_waits && self.input.has_next() && self.stdin_window > 0
    }

    /// The end comes after the last piece of it.
    fn input_end_is_due(&self) -> bool {
        !self.input_waits && self.input_ends && !self.input_end_sent && !self.input.has_next()
    }

    /// The node has this much of the input; the rest is sent again.
    fn resume_input(&mut self, resume: v1::StdinResume) {
        self.input_waits = false;
        self.input.rewind([resume.received, 0]);
        self.input_behind = resume.received.saturating_sub(resume.taken);
        self.stdin_window = STDIN_WINDOW_BYTES.saturating_sub(self.input_behind);
        self.input_end_sent = resume.ended;
    }

    fn accept(&mut self, message: v1::ExecDown) -> Result<Option<v1::TaskExit>, CliError> {
        match message.frame {
            Some(exec_down::Frame::Accepted(accepted)) => {
                let begins = self.start.take().is_some();
                if self.lost_at.take().is_some() {
                    self.retry = None;
                    if !begins {
                        self.note("connected to the hub again; the output goes on");
                    }
                }
                self.accepted = accepted;
            }
            Some(exec_down::Frame::Output(output)) => {
                let length = u64::try_from(output.data.len()).unwrap_or(u64::MAX);
                let stream = usize::from(output.stream() == v1::OutputStream::Stderr);
                self.received[stream] = output.offset.saturating_add(length);
                self.unwritten = self.unwritten.saturating_add(length);
                if !self.output.push(output, self.granted) {
                    return Err(lost("more output came than was granted"));
                }
            }
            Some(exec_down::Frame::StdinCredit(credit)) => {
                self.stdin_window = self.stdin_window.saturating_add(credit.bytes);
                let before = credit.bytes.min(self.input_behind);
                self.input_behind -= before;
                self.input.acknowledge(credit.bytes - before);
            }
            Some(exec_down::Frame::StdinResume(resume)) => self.resume_input(resume),
            Some(exec_down::Frame::Interrupted(interrupted)) => {
                self.note(&check::interruption(&interrupted));
            }
            Some(exec_down::Frame::Resumed(_)) => {
                self.note("the node is back; the output goes on");
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
            self.say(&text);
        }
    }

    fn hear(&mut self, event: WriterEvent) {
        match event {
            WriterEvent::Written(bytes) => {
                self.credit = self.credit.saturating_add(bytes);
                self.unwritten = self.unwritten.saturating_sub(bytes);
            }
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

    fn take_input(&mut self, piece: Option<std::io::Result<Bytes>>) {
        match piece {
            Some(Ok(data)) => {
                let offset = self.input_read;
                self.input_read += data.len() as u64;
                self.input.push(Piece { stream: 0, offset, data });
            }
            // The command is not told that this is the end: it would take what it has for the whole.
            Some(Err(error)) => {
                self.stdin = None;
                self.unreadable = Some(error);
                self.cancel();
            }
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

/// With where to look for the command's end, if the hub has taken it.
pub(super) fn with_task(error: CliError, accepted: &v1::ExecAccepted) -> CliError {
    match TaskId::from_slice(&accepted.task_id) {
        Ok(task) => error.hint(format!("cortex-agent task show {task}")),
        Err(_) => error,
    }
}

async fn open(opening: &mut Option<Pin<Box<dyn Future<Output = Opened> + Send>>>) -> Opened {
    match opening {
        Some(opening) => opening.await,
        None => std::future::pending().await,
    }
}

async fn read(down: &mut Option<Streaming<v1::ExecDown>>) -> Result<Option<v1::ExecDown>, Status> {
    match down {
        Some(down) => down.message().await,
        None => std::future::pending().await,
    }
}

/// Opens a stream with this first frame.
fn call(
    client: &OperatorClient<Channel>,
    first: exec_up::Frame,
) -> (mpsc::Sender<v1::ExecUp>, Pin<Box<dyn Future<Output = Opened> + Send>>) {
    let mut client = client.clone();
    let (up, up_frames) = mpsc::channel(16);
    up.try_send(frame(first)).expect("a new channel has room");
    (up, Box::pin(async move { client.exec(ReceiverStream::new(up_frames)).await }))
}

async fn next_piece(stdin: &mut Option<Input>) -> Option<std::io::Result<Bytes>> {
    match stdin {
        Some(stdin) => stdin.recv().await,
        None => std::future::pending().await,
    }
}
