//! One command on several nodes.
//!
//! All commands share one connection; each has a conversation of its own, driven together by one
//! loop that never blocks, and all output goes through one [`board`] to one writer's thread. So a
//! slow node delays only itself, and a slow reader of our output slows all commands, as a pipe would.
//!
//! | module | subject |
//! |---|---|
//! | `targets` | which nodes are meant |
//! | `detached` | commands that are left to themselves |
//! | `board` | output on its way to the writer, served in turn |
//! | `output` | the writer |
//! | `lines`, `grouped`, `files`, `captured` | where output goes |
//! | `summary` | pure: how it went |

mod board;
mod captured;
mod detached;
mod files;
mod grouped;
mod lines;
mod output;
mod summary;
mod targets;

use std::collections::VecDeque;
use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::{Args, ValueEnum};
use cortex_proto::v1;
use cortex_proto::v1::operator_client::OperatorClient;
use cortex_proto::{DEFAULT_OUTPUT_CREDIT, MAX_OUTPUT_CREDIT};
use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use tokio::sync::{mpsc, oneshot, watch};
use tonic::transport::Channel;

use super::document::Document;
use super::one::{of_the_mesh, of_the_output};
use super::signals::Signals;
use super::stream::{TaskStream, with_task};
use crate::cli::error::{CliError, Exit};
use crate::cli::printer::{ColorWhen, Format, Printer, complain, progress_is_visible};
use crate::cli::units::parse_size;
use crate::cli::{Global, Output, hub};
use board::{Board, Lane, LaneEnd};
pub(super) use detached::detach;
use output::Destination;
use summary::{Course, Fate, Report};
use targets::Target;
pub(super) use targets::Targets;

/// Least output that each command may have under way, however many run.
const LEAST_CREDIT: u64 = 64 * 1024;

/// What concerns several targets.
#[derive(Debug, Args)]
pub(super) struct FanArgs {
    /// At most so many nodes at a time
    #[arg(long, value_name = "N", default_value = "32")]
    parallel: NonZeroUsize,
    /// Start no more once it has failed on so many nodes; what runs goes on to its end
    #[arg(long, value_name = "N")]
    max_fail: Option<NonZeroUsize>,
    /// Begin lines with the node's name; auto does where there is more than one target
    #[arg(long, value_enum, default_value_t, value_name = "WHEN")]
    prefix: Prefix,
    /// Show the output of each node as a whole at the end, equal output once
    #[arg(long, conflicts_with_all = ["output_dir", "prefix"])]
    group: bool,
    /// Write output to NODE.stdout and NODE.stderr in this directory, anew
    #[arg(long, value_name = "DIR", conflicts_with = "prefix")]
    output_dir: Option<PathBuf>,
    /// End the command on a node where it writes more than this, both streams together
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    max_output: Option<u64>,
    /// Name the nodes, and run nothing
    #[arg(long)]
    dry_run: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum Prefix {
    #[default]
    Auto,
    Always,
    Never,
}

impl FanArgs {
    /// Whether even a single target is to be treated as several are.
    pub(super) fn is_asked_for(&self) -> bool {
        self.group
            || self.dry_run
            || self.output_dir.is_some()
            || self.max_output.is_some()
            || self.prefix == Prefix::Always
    }

    fn destination(
        &self,
        format: Format,
        targets: usize,
    ) -> Result<Box<dyn Destination>, CliError> {
        if let Some(directory) = &self.output_dir {
            let files = files::Files::new(directory).map_err(|error| {
                let text = format!("cannot use the directory {}", directory.display());
                CliError::usage(text).because(error)
            })?;
            return Ok(Box::new(files));
        }
        if format != Format::Table {
            return Ok(Box::<captured::Documents>::default());
        }
        if self.group {
            return Ok(Box::new(grouped::Grouped::new()?));
        }
        let prefix = match self.prefix {
            Prefix::Auto => targets > 1,
            Prefix::Always => true,
            Prefix::Never => false,
        };
        Ok(Box::new(lines::Lines::new(prefix)?))
    }
}

/// Runs the command everywhere; the result is the exit code of this process.
pub(super) async fn exec(
    global: &Global,
    start: v1::ExecStart,
    targets: Targets,
    args: FanArgs,
    output: Output,
) -> Result<u8, CliError> {
    if args.group && output.format != Format::Table {
        return Err(CliError::usage("--group is for people; -o json has each node's output"));
    }
    let client = hub::operator(global).await.map_err(of_the_mesh)?;
    let nodes = targets.resolve(&client).await.map_err(of_the_mesh)?;
    if args.dry_run {
        return dry_run(&mut global.printer(output), &nodes).map(|()| 0);
    }
    let board = Board::default();
    let destination = args.destination(output.format, nodes.len())?;
    let (failed, failure) = oneshot::channel();
    let writer = {
        let (board, most) = (board.clone(), args.max_output.unwrap_or(u64::MAX));
        tokio::task::spawn_blocking(move || output::write_all(&board, destination, most, failed))
    };
    let parallel = args.parallel.get().min(nodes.len());
    let share = MAX_OUTPUT_CREDIT / u64::try_from(parallel).unwrap_or(u64::MAX).max(1);
    let initial_credit = share.clamp(LEAST_CREDIT, DEFAULT_OUTPUT_CREDIT);
    let (printing, printed) = mpsc::channel(1);
    let printer = global.printer(output);
    let printer = tokio::task::spawn_blocking(move || print(printer, printed));
    let fan = Fan {
        client,
        start: v1::ExecStart { initial_credit, ..start },
        board: board.clone(),
        parallel,
        max_fail: args.max_fail.map_or(usize::MAX, NonZeroUsize::get),
        documents_wanted: output.format != Format::Table,
        documents: VecDeque::new(),
        printing,
        signals: Signals::new().map_err(of_the_mesh)?,
        failure,
        cancel: watch::Sender::new(false),
        stop: Stop::No,
        reports: Vec::new(),
    };
    let Finished { reports, mut stop, mut signals, mut failure } = fan.run(nodes).await?;
    board.close();
    // A slow reader may delay the last bytes.
    let (written, printed) = tokio::select! {
        done = async { (writer.await, printer.await) } => done,
        () = signals.next() => {
            let text = "interrupted before all output was written";
            return Err(CliError::new(Exit::Code(130), text));
        }
    };
    complain(&summary::text(&reports), global.color);
    let lost = || super::stream::lost("the output was not written");
    written.map_err(|error| lost().because(error))?;
    let printed = printed.map_err(|error| lost().because(error))?;
    // Part of the output may be written only when all is over.
    if let Ok(error) = failure.try_recv() {
        stop = Stop::Unwritable(error);
    }
    let code = match stop {
        Stop::Unwritable(error) if error.kind() == std::io::ErrorKind::BrokenPipe => 141,
        Stop::Unwritable(error) => {
            return Err(super::stream::lost("cannot write the output; the commands were ended")
                .because(error));
        }
        stop => match (targets.single(), reports.as_slice()) {
            // One that was named: its own code, however its output is shown.
            (Some(_), [report]) if !stop.is_interrupted() => report.fate.code(),
            _ => summary::exit_code(&reports, stop.is_interrupted()),
        },
    };
    of_the_output(printed, code)
}

/// The request for one of the nodes.
fn start_for(start: &v1::ExecStart, node: &Target) -> v1::ExecStart {
    let mut start = v1::ExecStart { node: node.id.to_string(), ..start.clone() };
    if !start.idempotency_key.is_empty() {
        // One key for all of them would lead to the task of the first.
        start.idempotency_key = format!("{}@{}", start.idempotency_key, node.id);
    }
    start
}

/// Prints documents on a thread that may block on a slow reader.
fn print(mut printer: Printer, mut documents: mpsc::Receiver<Document>) -> Result<(), CliError> {
    let mut count = 0;
    while let Some(document) = documents.blocking_recv() {
        printer.item(count, &document)?;
        count += 1;
    }
    printer.end_items(count)
}

fn dry_run(printer: &mut Printer, nodes: &[Target]) -> Result<(), CliError> {
    #[derive(serde::Serialize)]
    struct Row {
        name: String,
        node_id: String,
        online: bool,
    }
    impl crate::cli::printer::Row for Row {
        const COLUMNS: &'static [&'static str] = &["NAME", "ID", "STATE"];
        fn cells(&self) -> Vec<String> {
            let state = if self.online { "online" } else { "offline" };
            vec![self.name.clone(), self.node_id.clone(), state.to_owned()]
        }
    }
    let row = |node: &Target| Row {
        name: node.name.clone(),
        node_id: node.id.to_string(),
        online: node.online,
    };
    printer.list(&nodes.iter().map(row).collect::<Vec<_>>())
}

/// Why no more commands are started.
#[derive(Debug)]
enum Stop {
    No,
    /// It has failed on as many nodes as it may.
    Failures,
    Interrupted,
    Unwritable(std::io::Error),
    /// Documents are not taken any longer; the printer knows why.
    Unprintable,
}

impl Stop {
    fn is_interrupted(&self) -> bool {
        matches!(self, Self::Interrupted)
    }
}

/// What is left when every command has ended.
struct Finished {
    reports: Vec<Report>,
    stop: Stop,
    signals: Signals,
    failure: oneshot::Receiver<std::io::Error>,
}

/// The loop that owns everything but the writer.
struct Fan {
    client: OperatorClient<Channel>,
    start: v1::ExecStart,
    board: Board,
    parallel: usize,
    max_fail: usize,
    documents_wanted: bool,
    /// Not printed yet. They count as if they were running, so that they are few.
    documents: VecDeque<Document>,
    printing: mpsc::Sender<Document>,
    signals: Signals,
    failure: oneshot::Receiver<std::io::Error>,
    /// Becomes true when everything is to end.
    cancel: watch::Sender<bool>,
    stop: Stop,
    reports: Vec<Report>,
}

impl Fan {
    /// Until every command has ended. Reports are in the order of the nodes.
    async fn run(mut self, nodes: Vec<Target>) -> Result<Finished, CliError> {
        let order: Vec<_> = nodes.iter().map(|node| node.id).collect();
        let mut waiting = nodes.into_iter();
        let mut running = FuturesUnordered::new();
        let mut writable = true;
        let printing = self.printing.clone();
        loop {
            while matches!(self.stop, Stop::No)
                && running.len() + self.documents.len() < self.parallel
                && let Some(node) = waiting.next()
            {
                running.push(self.converse(node));
            }
            if running.is_empty() && !matches!(self.stop, Stop::No) {
                waiting.by_ref().for_each(|node| self.ended(Report::not_started(node)));
            }
            if running.is_empty() && self.documents.is_empty() {
                break;
            }
            tokio::select! {
                Some(report) = running.next(), if !running.is_empty() => self.ended(report),
                permit = printing.reserve(), if !self.documents.is_empty() => match permit {
                    Ok(permit) => {
                        if let Some(document) = self.documents.pop_front() {
                            permit.send(document);
                        }
                    }
                    Err(_) => self.unprintable(),
                },
                Ok(error) = &mut self.failure, if writable => {
                    writable = false;
                    self.stop = Stop::Unwritable(error);
                    self.cancel.send_replace(true);
                }
                () = self.signals.next() => self.interrupt()?,
            }
        }
        self.reports.sort_by_key(|report| order.iter().position(|id| *id == report.target.id));
        let Self { reports, stop, signals, failure, .. } = self;
        Ok(Finished { reports, stop, signals, failure })
    }

    /// The conversation about the command on one node.
    fn converse(&self, node: Target) -> impl Future<Output = Report> + use<> {
        let (events, writer_events) = mpsc::channel(64);
        let (done, written) = oneshot::channel();
        let output = self.board.open(Lane { name: node.name.clone(), events, done });
        let start = start_for(&self.start, &node);
        let mut stream =
            TaskStream::new(self.client.clone(), start, None, Box::new(output), writer_events);
        let mut cancel = self.cancel.subscribe();
        async move {
            let mut interrupted = false;
            let exit = loop {
                tokio::select! {
                    exit = stream.until_exit() => break exit,
                    // The sender outlives every conversation.
                    Ok(_) = cancel.wait_for(|cancel| *cancel), if !interrupted => {
                        interrupted = true;
                        stream.cancel();
                    }
                }
            };
            // Without an answer the writer is gone, which ends the whole.
            let end = if stream.accepted.task_id.is_empty() {
                LaneEnd::default()
            } else {
                stream.close_output();
                stream.hear_until(written).await.unwrap_or_default()
            };
            let known = exit.as_ref().ok().and_then(Option::as_ref);
            let incomplete = known.and_then(|exit| end.check.incomplete(exit));
            let course = Course {
                incomplete,
                captured: end.captured,
                too_much: stream.too_much,
                interrupted,
                exit: exit.map_err(|error| with_task(error, &stream.accepted)),
                accepted: stream.accepted,
            };
            Report::new(node, course)
        }
    }

    fn unprintable(&mut self) {
        self.documents.clear();
        if matches!(self.stop, Stop::No | Stop::Failures) {
            self.stop = Stop::Unprintable;
        }
        self.cancel.send_replace(true);
    }

    fn ended(&mut self, mut report: Report) {
        let document = std::mem::take(&mut report.document);
        if self.documents_wanted && !matches!(self.stop, Stop::Unprintable) {
            self.documents.push_back(document);
        }
        self.reports.push(report);
        let failed = self.reports.iter().filter(|report| report.fate != Fate::Succeeded).count();
        if failed >= self.max_fail && matches!(self.stop, Stop::No) {
            self.stop = Stop::Failures;
        }
    }

    fn interrupt(&mut self) -> Result<(), CliError> {
        if self.stop.is_interrupted() {
            let text = "left at once; the commands may still be running";
            return Err(CliError::new(Exit::Code(130), text));
        }
        self.stop = Stop::Interrupted;
        self.cancel.send_replace(true);
        if progress_is_visible() {
            let text = "ending the commands; Ctrl-C again to leave at once";
            complain(text, ColorWhen::Auto);
        }
        Ok(())
    }
}
