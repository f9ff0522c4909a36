//! One command on one node: output and exit code become ours.

use cortex_proto::v1;
use cortex_shared::ids::{NodeId, TaskId};
use serde::Serialize;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::check::{self, OutputCheck};
use super::signals::Signals;
use super::stdin::read_stdin;
use super::stream::{TaskStream, lost};
use super::writer::{Captured, OutputQueue, Sink, write_output};
use super::{ExecArgs, request};
use crate::cli::error::{CliError, Exit};
use crate::cli::printer::{ColorWhen, Format, complain, progress_is_visible};
use crate::cli::{Global, Output, hub};

/// How it went.
#[derive(Debug)]
struct Outcome {
    accepted: v1::ExecAccepted,
    ended: Ended,
    /// Why the output is not complete.
    incomplete: Option<String>,
    captured: Captured,
    interrupted: bool,
    reader_gone: bool,
    unwritable: Option<std::io::Error>,
}

/// What is known of the end.
#[derive(Debug)]
enum Ended {
    /// The node or the hub said how.
    Exit(v1::TaskExit),
    /// Interrupted here, and nothing was heard in time.
    GaveUp,
}

#[derive(Serialize)]
struct Document {
    task_id: String,
    node: String,
    node_id: String,
    verdict: &'static str,
    /// What this process ends with.
    code: u8,
    exit_code: u32,
    signal: u32,
    complete: bool,
    truncated: bool,
    duration_ms: u64,
    reason: String,
    hint: String,
    stdout: String,
    stderr: String,
}

/// Runs the command; the result is the exit code of this process.
pub(super) async fn exec(global: &Global, args: ExecArgs) -> Result<u8, CliError> {
    let start = request::start(&args)?;
    run_start(global, args.output, start, args.stdin).await
}

/// Asks for what `start` says; the result is the exit code of this process.
pub(in crate::cli) async fn run_start(
    global: &Global,
    output: Output,
    start: v1::ExecStart,
    stdin: bool,
) -> Result<u8, CliError> {
    let format = output.format;
    if start.detach {
        return detach(global, output, start).await.map_err(of_the_mesh);
    }
    let sink = match format {
        Format::Table => Sink::pass()?,
        Format::Json | Format::Jsonl => Sink::capture(),
    };
    // From here on everything that fails is a failure of the mesh, told from the command's own.
    let outcome = async {
        let client = hub::operator(global).await?;
        let signals = Signals::new()?;
        let queue = OutputQueue::default();
        let (events, writer_events) = mpsc::channel(64);
        let writer_queue = queue.clone();
        let writer =
            tokio::task::spawn_blocking(move || write_output(&writer_queue, sink, &events));
        let input = stdin.then(read_stdin);
        let stream = TaskStream::new(client, start, input, queue, writer_events);
        run(stream, signals, writer).await
    }
    .await
    .map_err(of_the_mesh)?;
    let code = outcome.code();
    if format != Format::Table {
        global.printer(output).show(&outcome.document(code), &[])?;
    }
    if let Some(text) = outcome.complaint() {
        complain(&text, global.color);
    }
    Ok(code)
}

#[derive(Serialize)]
struct Detached {
    task_id: String,
    node: String,
    node_id: String,
    /// The idempotency key led to a task that was there.
    known: bool,
}

/// Begins a command and leaves it to itself.
async fn detach(global: &Global, output: Output, start: v1::ExecStart) -> Result<u8, CliError> {
    let mut client = hub::operator(global).await?;
    let first = v1::ExecUp { frame: Some(v1::exec_up::Frame::Start(start)) };
    let mut down = client.exec(tokio_stream::once(first)).await?.into_inner();
    let answer = down.message().await?.and_then(|message| message.frame);
    let Some(v1::exec_down::Frame::Accepted(accepted)) = answer else {
        return Err(lost("the hub did not say that it accepted the command"));
    };
    let detached = Detached {
        task_id: id_text(&accepted.task_id),
        node: accepted.node_name,
        node_id: id_text(&accepted.node_id),
        known: accepted.known,
    };
    let lines = [("task", detached.task_id.clone())];
    global.printer(output).show(&detached, &lines)?;
    Ok(0)
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

/// Until the command has ended and its output is written. A signal ends the command, a second one
/// leaves at once.
async fn run(
    mut stream: TaskStream,
    mut signals: Signals,
    mut writer: JoinHandle<(OutputCheck, Captured)>,
) -> Result<Outcome, CliError> {
    let mut interrupted = false;
    let exit = loop {
        tokio::select! {
            exit = stream.until_exit() => break exit,
            () = signals.next() => {
                if interrupted {
                    let text = "left at once; the command may still be running";
                    return Err(CliError::new(Exit::Code(130), text));
                }
                interrupted = true;
                if progress_is_visible() {
                    let text = "ending the command; Ctrl-C again to leave at once";
                    complain(text, ColorWhen::Auto);
                }
                stream.cancel();
            }
        }
    };
    stream.close_output();
    let exit = exit?;
    // A slow reader may delay the last bytes.
    let (check, captured) = tokio::select! {
        written = stream.hear_until(&mut writer) => {
            written.map_err(|error| lost("the output was not written").because(error))?
        }
        () = signals.next() => {
            let text = "interrupted before all output was written";
            return Err(CliError::new(Exit::Code(130), text));
        }
    };
    Ok(Outcome {
        incomplete: exit.as_ref().and_then(|exit| check.incomplete(exit)),
        accepted: stream.accepted,
        ended: exit.map_or(Ended::GaveUp, Ended::Exit),
        captured,
        interrupted,
        reader_gone: stream.reader_gone,
        unwritable: stream.unwritable,
    })
}

impl Outcome {
    /// What this process ends with.
    fn code(&self) -> u8 {
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
    fn complaint(&self) -> Option<String> {
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

    fn document(&self, code: u8) -> Document {
        let (verdict, exit) = match &self.ended {
            Ended::Exit(exit) => (check::verdict_name(exit.verdict), exit.clone()),
            Ended::GaveUp => ("unknown", v1::TaskExit::default()),
        };
        let accepted = &self.accepted;
        Document {
            task_id: TaskId::from_slice(&accepted.task_id)
                .map(|id| id.to_string())
                .unwrap_or_default(),
            node: accepted.node_name.clone(),
            node_id: NodeId::from_slice(&accepted.node_id)
                .map(|id| id.to_string())
                .unwrap_or_default(),
            verdict,
            code,
            exit_code: exit.exit_code,
            signal: exit.signal,
            complete: self.incomplete.is_none() && matches!(self.ended, Ended::Exit(_)),
            truncated: self.captured.truncated,
            duration_ms: exit.duration_ms,
            reason: exit.reason,
            hint: exit.hint,
            stdout: String::from_utf8_lossy(&self.captured.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&self.captured.stderr).into_owned(),
        }
    }
}
