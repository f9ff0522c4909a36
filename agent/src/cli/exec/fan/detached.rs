//! `--detach` on several nodes: each begins a command and is left to it; who began what is said.

use std::fmt::Write as _;

use cortex_proto::v1;
use cortex_proto::v1::operator_client::OperatorClient;
use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use serde::Serialize;
use tonic::transport::Channel;

use super::targets::Target;
use super::{FanArgs, Prefix, Targets, dry_run, start_for};
use crate::cli::error::{CliError, Exit};
use crate::cli::exec::one::{begin_detached, of_the_mesh, of_the_output};
use crate::cli::exec::signals::Signals;
use crate::cli::printer::{Format, Printer, Row, complain};
use crate::cli::{Global, Output, hub};

/// What came of it on one node.
#[derive(Debug, Serialize)]
struct Began {
    node: String,
    node_id: String,
    /// Empty if nothing was begun.
    task_id: String,
    /// The idempotency key led to a task that was there.
    known: bool,
    /// Why nothing was begun, and what helps.
    reason: String,
    hint: String,
    /// What `exec` would have ended with: 0, 125 not reached, 126 refused.
    code: u8,
}

impl Row for Began {
    const COLUMNS: &'static [&'static str] = &["NODE", "TASK"];

    fn cells(&self) -> Vec<String> {
        let task = if self.code == 0 { &self.task_id } else { "-" };
        vec![self.node.clone(), task.to_owned()]
    }
}

impl Began {
    fn of(target: &Target, outcome: Result<crate::cli::exec::one::Detached, CliError>) -> Self {
        let mut began = Self {
            node: target.name.clone(),
            node_id: target.id.to_string(),
            task_id: String::new(),
            known: false,
            reason: String::new(),
            hint: String::new(),
            code: 0,
        };
        match outcome {
            Ok(detached) => (began.task_id, began.known) = (detached.task_id, detached.known),
            Err(error) => {
                began.code = if error.exit() == Exit::Forbidden { 126 } else { 125 };
                began.hint = error.help().unwrap_or_default();
                began.reason = error.message();
            }
        }
        began
    }
}

/// Begins the command on each node, on so many at a time as are asked for; the result is the exit code of
/// this process.
pub(in crate::cli::exec) async fn detach(
    global: &Global,
    start: v1::ExecStart,
    targets: Targets,
    args: FanArgs,
    output: Output,
) -> Result<u8, CliError> {
    if args.group
        || args.output_dir.is_some()
        || args.max_output.is_some()
        || args.prefix != Prefix::Auto
    {
        return Err(CliError::usage("--detach shows no output, so nothing says how to show it")
            .hint("look at the output of each: cortex-agent task logs ID"));
    }
    let client = hub::operator(global).await.map_err(of_the_mesh)?;
    let nodes = targets.resolve(&client).await.map_err(of_the_mesh)?;
    if args.dry_run {
        return dry_run(&mut global.printer(output), &nodes).map(|()| 0);
    }
    let mut printer = global.printer(output);
    let Begun { began, unheard, interrupted, shown } =
        begin_all(&client, &start, &nodes, &args, &mut printer, output.format).await?;
    if let Some(text) = summary(&began, unheard, nodes.len()) {
        complain(&text, global.color);
    }
    // What was not even tried is not known to be well either.
    let any = |wanted| began.iter().any(|began| began.code == wanted);
    let code = if interrupted {
        130
    } else if any(125) || began.len() < nodes.len() {
        125
    } else {
        u8::from(any(126))
    };
    of_the_output(shown, code)
}

/// What came of it on all nodes.
struct Begun {
    /// In the order of the nodes; without those that were not tried because it had failed often enough or
    /// somebody interrupted.
    began: Vec<Began>,
    /// Nodes whose answer was not waited for.
    unheard: usize,
    interrupted: bool,
    /// Whether all of it could be printed.
    shown: Result<(), CliError>,
}

/// Begins the command on all nodes and prints what comes of it. A signal begins no more, a second one leaves at
/// once.
async fn begin_all(
    client: &OperatorClient<Channel>,
    start: &v1::ExecStart,
    nodes: &[Target],
    args: &FanArgs,
    printer: &mut Printer,
    format: Format,
) -> Result<Begun, CliError> {
    let max_fail = args.max_fail.map_or(usize::MAX, std::num::NonZeroUsize::get);
    let mut signals = Signals::new().map_err(of_the_mesh)?;
    let mut waiting = nodes.iter().enumerate();
    let mut running = FuturesUnordered::new();
    let (mut began, mut failed) = (Vec::new(), 0);
    let (mut interrupted, mut shown) = (false, Ok(()));
    loop {
        while failed < max_fail
            && !interrupted
            && shown.is_ok()
            && running.len() < args.parallel.get()
            && let Some((index, node)) = waiting.next()
        {
            let begin = begin_detached(client.clone(), start_for(start, node));
            running.push(async move { (index, Began::of(node, begin.await)) });
        }
        let one = tokio::select! {
            one = running.next() => one,
            () = signals.next() => match std::mem::replace(&mut interrupted, true) {
                true => None,
                false => continue,
            },
        };
        let Some(one) = one else { break };
        failed += usize::from(one.1.code != 0);
        // Programs hear of each at once: what is printed is not lost, however this process ends.
        if format != Format::Table && shown.is_ok() {
            shown = printer.item(began.len(), &one.1);
        }
        began.push(one);
    }
    began.sort_by_key(|(index, _)| *index);
    let began: Vec<_> = began.into_iter().map(|(_, began)| began).collect();
    let shown = shown.and_then(|()| match format {
        Format::Table => printer.list(&began),
        Format::Json | Format::Jsonl => printer.end_items(began.len()),
    });
    Ok(Begun { began, unheard: running.len(), interrupted, shown })
}

/// Names every node where nothing was begun; nothing if there is none.
fn summary(began: &[Began], unheard: usize, nodes: usize) -> Option<String> {
    let accepted = began.iter().filter(|began| began.code == 0).count();
    if accepted == nodes {
        return None;
    }
    let mut text = format!("{accepted} of {nodes} accepted");
    // Writing to a string does not fail, here and below.
    if unheard > 0 {
        write!(text, ", {unheard} asked and not waited for").ok();
    }
    if began.len() + unheard < nodes {
        write!(text, ", {} not started", nodes - began.len() - unheard).ok();
    }
    text.push('\n');
    for began in began.iter().filter(|began| began.code != 0) {
        let kind = if began.code == 126 { "refused" } else { "not reached" };
        writeln!(text, "{kind}: {} ({})", began.node, began.reason).ok();
    }
    Some(text)
}
