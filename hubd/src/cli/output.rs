//! All output of the command line: data on standard output, everything else on standard error.

use std::error::Error as _;
use std::io::{self, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use cortex_shared::systemd::StepError;
use serde_json::Value;

use crate::backup::BackupError;

/// No hub could be asked.
#[derive(Debug, thiserror::Error)]
#[error("no hub answers on {}", socket.display())]
pub(super) struct Unreachable {
    pub(super) socket: PathBuf,
    #[source]
    pub(super) source: tonic::transport::Error,
}

impl Unreachable {
    /// There may be a hub, but this user may not ask it.
    fn is_forbidden(&self) -> bool {
        let mut cause = self.source.source();
        while let Some(error) = cause {
            if let Some(error) = error.downcast_ref::<io::Error>() {
                return error.kind() == io::ErrorKind::PermissionDenied;
            }
            cause = error.source();
        }
        false
    }

    fn hint(&self) -> &'static str {
        if self.is_forbidden() {
            "only root and the user that the hub runs as may ask it here"
        } else {
            "start one with cortex-hubd serve, or name the --data of one that runs"
        }
    }
}

/// What was asked for makes no sense, whatever the hub says.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct WrongUse(pub(super) &'static str);

/// A node was not empty in time.
#[derive(Debug, thiserror::Error)]
#[error("{node} is cordoned and still runs {running} commands")]
pub(super) struct StillRuns {
    pub(super) node: String,
    pub(super) running: u32,
}

/// A worker was not done in time.
#[derive(Debug, thiserror::Error)]
#[error("{worker} is not done after {waited:?}, and goes on")]
pub(super) struct StillWorks {
    pub(super) worker: String,
    pub(super) waited: Duration,
}

/// How data is printed.
#[derive(Args, Clone, Copy)]
pub(super) struct Format {
    /// How to print: table, json (one document) or jsonl (a line each)
    #[arg(short = 'o', long = "output", value_name = "FORMAT", default_value = "table")]
    output: Kind,
}

#[derive(clap::ValueEnum, Clone, Copy, PartialEq)]
enum Kind {
    Table,
    Json,
    Jsonl,
}

/// A list with a column for each of `columns`, which are fields of the items.
pub(super) fn list(format: Format, columns: &[&str], items: Vec<Value>) {
    match format.output {
        Kind::Json => print(&pretty(&Value::Array(items))),
        Kind::Jsonl => items.iter().for_each(|item| print(&item.to_string())),
        Kind::Table => {
            let header = columns.iter().map(|c| c.to_uppercase().replace('_', " ")).collect();
            let rows = items.iter().map(|item| columns.iter().map(|c| cell(&item[c])).collect());
            table(&std::iter::once(header).chain(rows).collect::<Vec<Vec<String>>>());
        }
    }
}

/// A list that may be long, printed as it comes: a table has columns of a fixed width then, and a
/// document is written piece by piece.
pub(super) struct Stream<'a> {
    format: Format,
    columns: &'a [&'a str],
    items: usize,
}

impl<'a> Stream<'a> {
    pub(super) fn new(format: Format, columns: &'a [&'a str]) -> Self {
        match format.output {
            Kind::Json => print("["),
            Kind::Jsonl => {}
            Kind::Table => {
                let header: Vec<_> = columns.iter().map(|c| c.to_uppercase()).collect();
                print(wide(&header).trim_end());
            }
        }
        Self { format, columns, items: 0 }
    }

    pub(super) fn item(&mut self, item: Value) {
        match self.format.output {
            Kind::Json if self.items == 0 => print(&item.to_string()),
            Kind::Json => print(&format!(",{item}")),
            Kind::Jsonl => print(&item.to_string()),
            Kind::Table => {
                let cells: Vec<_> = self.columns.iter().map(|c| cell(&item[c])).collect();
                print(wide(&cells).trim_end());
            }
        }
        self.items += 1;
    }

    pub(super) fn end(self) {
        if self.format.output == Kind::Json {
            print("]");
        }
    }
}

/// A row whose neighbours are not known: a number, a time, and names.
fn wide(cells: &[String]) -> String {
    cells.iter().map(|cell| format!("{cell:<20}  ")).collect()
}

/// One thing: as a document, or as the text that people want of it.
pub(super) fn show(format: Format, item: &Value, text: &str) {
    match format.output {
        Kind::Json => print(&pretty(item)),
        Kind::Jsonl => print(&item.to_string()),
        Kind::Table => print(text),
    }
}

fn pretty(value: &Value) -> String {
    format!("{value:#}")
}

fn cell(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Null => "-".to_owned(),
        Value::Array(items) => items.iter().map(cell).collect::<Vec<_>>().join(","),
        Value::Object(fields) => {
            fields.iter().map(|(k, v)| format!("{k}={}", cell(v))).collect::<Vec<_>>().join(",")
        }
        other => other.to_string(),
    }
}

fn table(rows: &[Vec<String>]) {
    let columns = rows.first().map_or(0, Vec::len);
    let widths: Vec<usize> = (0..columns)
        .map(|c| rows.iter().map(|row| row[c].chars().count()).max().unwrap_or(0))
        .collect();
    for row in rows {
        let line: String =
            row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}  ")).collect();
        print(line.trim_end());
    }
}

/// Prints a line of data.
pub(super) fn print(line: &str) {
    // A reader that has had enough (such as `head`) is no failure.
    writeln!(anstream::stdout(), "{line}").ok();
}

/// Says something that is not data.
pub(super) fn note(line: &str) {
    // Nothing is left to be done if even this cannot be written.
    writeln!(anstream::stderr(), "{line}").ok();
}

/// Says what failed and why, and which command helps.
pub(super) fn complain(error: &anyhow::Error) {
    let mut out = anstream::stderr();
    let chain: Vec<String> = error
        .chain()
        .map(|cause| match cause.downcast_ref::<tonic::Status>() {
            Some(status) => status.message().to_owned(),
            None => cause.to_string(),
        })
        .collect();
    // Nothing is left to be done if even this cannot be written.
    writeln!(out, "error: {}", chain.join(": ")).ok();
    let hint = error
        .downcast_ref::<tonic::Status>()
        .and_then(|status| status.metadata().get(cortex_proto::HINT_TRAILER))
        .and_then(|hint| hint.to_str().ok())
        .or_else(|| error.downcast_ref().map(Unreachable::hint))
        .or_else(|| error.is::<StillRuns>().then_some("cortex-hubd node uncordon takes it back"))
        .or_else(|| {
            error.is::<StillWorks>().then_some("cortex-hubd worker list tells how it ended")
        })
        .or_else(|| {
            let again = "what was done stays; run the same command again when the cause is gone";
            error.is::<StepError>().then_some(again)
        });
    if let Some(hint) = hint {
        writeln!(out, "hint: {hint}").ok();
    }
}

/// The exit code of an error, by the same table as the agent's command line.
pub(super) fn exit_code(error: &anyhow::Error) -> ExitCode {
    use tonic::Code;
    if let Some(unreachable) = error.downcast_ref::<Unreachable>() {
        return ExitCode::from(if unreachable.is_forbidden() { 5 } else { 6 });
    }
    if error.is::<WrongUse>() {
        return ExitCode::from(2);
    }
    if error.is::<StillRuns>() || error.is::<StillWorks>() {
        return ExitCode::from(6);
    }
    if let Some(failed) = error.downcast_ref::<BackupError>() {
        return ExitCode::from(match failed {
            failed if failed.is_not_found() => 3,
            failed if failed.is_conflict() => 7,
            _ => 1,
        });
    }
    let Some(status) = error.downcast_ref::<tonic::Status>() else { return ExitCode::FAILURE };
    // The connection broke before an answer came: the hub stops, or was killed.
    let broke = status
        .source()
        .is_some_and(|source| source.downcast_ref::<tonic::transport::Error>().is_some());
    ExitCode::from(match status.code() {
        _ if broke => 6,
        Code::InvalidArgument => 2,
        Code::NotFound => 3,
        Code::Unauthenticated => 4,
        Code::PermissionDenied => 5,
        Code::Unavailable | Code::DeadlineExceeded => 6,
        Code::AlreadyExists | Code::FailedPrecondition | Code::Aborted => 7,
        _ => 1,
    })
}

/// Says what is worth knowing and stops nothing.
pub(super) fn warn(text: &str) {
    // Nothing is left to be done if even this cannot be written.
    writeln!(anstream::stderr(), "warning: {text}").ok();
}
