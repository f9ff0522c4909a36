//! One command on one node: output and exit code become ours.

use cortex_proto::v1;
use cortex_proto::v1::operator_client::OperatorClient;
use cortex_shared::ids::TaskId;
use serde::Serialize;
use tokio::sync::mpsc;
use tonic::transport::Channel;

use super::check;
use super::document::Document;
use super::keyboard::{self, KeyEvent, Keyboard};
use super::signals::Signals;
use super::stdin::read_stdin;
use super::stream::{TaskStream, lost, with_task};
use super::writer::{Captured, LateWriter, NoOutput, Sink, Written};
use crate::cli::error::{CliError, Exit};
use crate::cli::printer::{ColorWhen, Format, Printer, complain, progress_is_visible};
use crate::cli::{Global, Output, hub};

/// How it went.
#[derive(Debug, Default)]
struct Outcome {
    accepted: v1::ExecAccepted,
    ended: Ended,
    /// Why the output is not complete.
    incomplete: Option<String>,
    captured: Captured,
    interrupted: bool,
    reader_gone: bool,
    unwritable: Option<std::io::Error>,
    unreadable: Option<std::io::Error>,
}

/// What is known of the end.
#[derive(Debug, Default)]
enum Ended {
    /// The node or the hub said how.
    Exit(v1::TaskExit),
    /// Interrupted here, and nothing was heard in time.
    #[default]
    GaveUp,
    /// The mesh refused the command, failed it, or was left: why.
    Broken(CliError),
}

/// What runs, and how it is attached to this process.
pub(in crate::cli) struct Attached {
    pub(in crate::cli) start: v1::ExecStart,
    /// Standard input is sent. What is typed at a terminal always is.
    pub(in crate::cli) stdin: bool,
    pub(in crate::cli) output: Output,
}

/// Runs the command; the result is the exit code of this process.
pub(in crate::cli) async fn exec(global: &Global, attached: Attached) -> Result<u8, CliError> {
    let Attached { start, stdin, output } = attached;
    if start.detach {
        return detach(global, output, start).await.map_err(of_the_mesh);
    }
    let sink = match output.format {
        Format::Table => Sink::pass()?,
        Format::Json | Format::Jsonl => Sink::capture(),
    };
    let with_keyboard =
        start.spec.as_ref().is_some_and(|spec| spec.terminal.is_some()) && keyboard::is_there();
    let node = start.node.clone();
    let mut listening = None;
    // From here on everything that fails is a failure of the mesh, told from the command's own.
    let outcome = async {
        let client = hub::operator(global).await?;
        let signals = listening.insert(Signals::new()?);
        let (events, writer_events) = mpsc::channel(64);
        let (writer, written) = LateWriter::new(sink, events);
        let (keyboard, input) = if with_keyboard {
            let (keyboard, input) = Keyboard::open()?;
            (Some(keyboard), Some(input))
        } else {
            (None, stdin.then(read_stdin))
        };
        let stream = TaskStream::new(client, start, input, Box::new(writer), writer_events);
        run(stream, signals, keyboard, written, output.format).await
    }
    .await
    .unwrap_or_else(|error| Outcome::broken(of_the_mesh(error)));
    let code = outcome.code();
    let shown = match output.format {
        Format::Table => Ok(()),
        Format::Json | Format::Jsonl => {
            show(global.printer(output), outcome.document(node, code), listening).await
        }
    };
    if let Some(text) = outcome.complaint() {
        complain(&text, global.color);
    }
    of_the_output(shown, code)
}

/// A command that was begun and left to itself.
#[derive(Debug, Serialize)]
pub(super) struct Detached {
    pub(super) task_id: String,
    node: String,
    node_id: String,
    /// The idempotency key led to a task that was there.
    pub(super) known: bool,
}

/// Begins a command and leaves it to itself.
async fn detach(global: &Global, output: Output, start: v1::ExecStart) -> Result<u8, CliError> {
    let detached = begin_detached(hub::operator(global).await?, start).await?;
    let lines = [("task", detached.task_id.clone())];
    of_the_output(global.printer(output).show(&detached, &lines), 0)
}

/// Begins a command that nobody stays with.
pub(super) async fn begin_detached(
    client: OperatorClient<Channel>,
    start: v1::ExecStart,
) -> Result<Detached, CliError> {
    // That a key of our own making led to the task only means that an answer was lost.
    let keyed = !start.idempotency_key.is_empty();
    let (_, no_events) = mpsc::channel(1);
    let mut stream = TaskStream::new(client, start, None, Box::new(NoOutput), no_events);
    stream.until_accepted().await?;
    let accepted = stream.accepted;
    Ok(Detached {
        task_id: id_text(&accepted.task_id),
        node: accepted.node_name,
        node_id: id_text(&accepted.node_id),
        known: keyed && accepted.known,
    })
}

/// An id of the wire as text; ids of all kinds look alike.
pub(in crate::cli) fn id_text(bytes: &[u8]) -> String {
    TaskId::from_slice(bytes).map(|id| id.to_string()).unwrap_or_default()
}

/// Gives an error that is not the command's the exit code of a failure of the mesh.
pub(super) fn of_the_mesh(error: CliError) -> CliError {
    match error.exit() {
        Exit::Code(_) | Exit::ReaderGone => error,
        Exit::Forbidden => error.with_exit(Exit::Code(126)),
        _ => error.with_exit(Exit::Code(125)),
    }
}

/// What this process ends with, where it is `code` if what it has to say could be written. As with the output
/// itself, a reader that went away is told as a broken pipe, and anything else is a failure of the mesh.
pub(super) fn of_the_output(shown: Result<(), CliError>, code: u8) -> Result<u8, CliError> {
    match shown {
        Ok(()) => Ok(code),
        Err(error) if error.exit() == Exit::ReaderGone => Ok(141),
        Err(error) => Err(of_the_mesh(error)),
    }
}

/// Prints a document. Whoever interrupts us does not wait for a slow reader of it.
async fn show(
    mut printer: Printer,
    document: Document,
    signals: Option<Signals>,
) -> Result<(), CliError> {
    let printing = tokio::task::spawn_blocking(move || printer.show(&document, &[]));
    let interrupted = async {
        match signals {
            Some(mut signals) => signals.next().await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        shown = printing => {
            shown.map_err(|error| lost("the output was not written").because(error))?
        }
        () = interrupted => Err(unwritten()),
    }
}

fn unwritten() -> CliError {
    CliError::new(Exit::Code(130), "interrupted before all output was written")
}

/// Until the command has ended and its output is written. A signal ends the command, a second one
/// leaves at once.
async fn run(
    mut stream: TaskStream,
    signals: &mut Signals,
    mut keyboard: Option<Keyboard>,
    mut written: Written,
    format: Format,
) -> Result<Outcome, CliError> {
    let (mut interrupted, mut left) = (false, false);
    let exit = loop {
        tokio::select! {
            exit = stream.until_exit() => break exit,
            event = next_event(&mut keyboard) => match event {
                KeyEvent::Resized(size) => stream.resize(size),
                KeyEvent::Leave if interrupted => {
                    left = true;
                    break Err(leaving());
                }
                KeyEvent::Leave => {
                    interrupted = true;
                    stream.leave();
                }
            },
            () = signals.next() => {
                if interrupted {
                    left = true;
                    break Err(leaving());
                }
                interrupted = true;
                let text = "ending the command; Ctrl-C again to leave at once";
                match &keyboard {
                    Some(keyboard) => keyboard.say("ending the command; ~. leaves at once"),
                    None if progress_is_visible() => complain(text, ColorWhen::Auto),
                    None => {}
                }
                stream.cancel();
            }
        }
    };
    stream.close_output();
    if exit.is_err() {
        stream.hang_up();
    }
    let ended = match exit {
        Ok(Some(exit)) => Ended::Exit(exit),
        Ok(None) => Ended::GaveUp,
        Err(error) => Ended::Broken(of_the_mesh(with_task(error, &stream.accepted))),
    };
    let (check, captured) = if left && format == Format::Table {
        // Who leaves waits for no reader. What is kept for a document has none.
        Default::default()
    } else {
        // However it ended, what came of its output has come; a slow reader may delay the last bytes.
        tokio::select! {
            written = stream.hear_until(&mut written) => {
                written.map_err(|error| lost("the output was not written").because(error))?
            }
            () = signals.next() => {
                return Err(match ended {
                    Ended::Broken(error) => error,
                    Ended::Exit(_) | Ended::GaveUp => unwritten(),
                });
            }
        }
    };
    let incomplete = match &ended {
        Ended::Exit(exit) => check.incomplete(exit),
        Ended::GaveUp | Ended::Broken(_) => None,
    };
    Ok(Outcome {
        incomplete,
        accepted: stream.accepted,
        ended,
        captured,
        interrupted,
        reader_gone: stream.reader_gone,
        unwritable: stream.unwritable,
        unreadable: stream.unreadable,
    })
}

fn leaving() -> CliError {
    CliError::new(Exit::Code(130), "left at once; the command may still be running")
}

async fn next_event(keyboard: &mut Option<Keyboard>) -> KeyEvent {
    match keyboard {
        Some(keyboard) => keyboard.next().await,
        None => std::future::pending().await,
    }
}

impl Outcome {
    /// Of a command that was not even asked for.
    fn broken(error: CliError) -> Self {
        Self { ended: Ended::Broken(error), ..Self::default() }
    }

    /// What this process ends with.
    fn code(&self) -> u8 {
        match &self.ended {
            Ended::Broken(error) => error.exit().code(),
            _ if self.interrupted => 130,
            _ if self.unwritable.is_some() || self.unreadable.is_some() => 125,
            // As a command whose own pipe broke.
            _ if self.reader_gone => 141,
            Ended::GaveUp => 130,
            _ if self.incomplete.is_some() => 125,
            Ended::Exit(exit) => check::exit_code(exit),
        }
    }

    /// What to say on standard error.
    fn complaint(&self) -> Option<String> {
        let exit = match &self.ended {
            Ended::Exit(exit) => Some(exit),
            Ended::GaveUp => None,
            Ended::Broken(error) => return Some(error.render()),
        };
        if let Some(error) = &self.unwritable {
            return Some(format!(
                "error: cannot write the output; the command was ended\ncause: {error}\n"
            ));
        }
        if let Some(error) = &self.unreadable {
            return Some(format!(
                "error: cannot read standard input; the command was ended\ncause: {error}\n"
            ));
        }
        if self.reader_gone {
            return None;
        }
        match exit {
            None => Some(self.gave_up().render()),
            Some(_) if self.interrupted => None,
            Some(exit) => match &self.incomplete {
                Some(problem) => Some(format!(
                    "error: the output is incomplete\ncause: {problem}\nhint: the command itself ended ({}, exit code {}); run it again if it may run twice\n",
                    check::verdict_name(exit.verdict),
                    exit.exit_code
                )),
                None => check::complaint(exit),
            },
        }
    }

    /// For programs. `node` is what the node was called by whoever asked for it.
    fn document(&self, node: String, code: u8) -> Document {
        let of =
            |exit, complete| Document::new(&self.accepted, exit, &self.captured, complete, code);
        let mut document = match &self.ended {
            Ended::Exit(exit) => of(Some(exit), self.incomplete.is_none()),
            Ended::GaveUp => of(None, false).with_error(&self.gave_up()),
            Ended::Broken(error) => of(None, false).with_error(error),
        };
        if let Some(error) = &self.unreadable {
            document.reason = format!("cannot read standard input: {error}");
        }
        if document.node.is_empty() {
            document.node = node;
        }
        document
    }

    fn gave_up(&self) -> CliError {
        let text = "interrupted, and the end of the command was not heard of in time";
        with_task(CliError::new(Exit::Code(130), text), &self.accepted)
    }
}
