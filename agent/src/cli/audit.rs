//! `audit list|verify`: the hub's log of everything that changed authority or ran a command.

use clap::{Args, Subcommand};
use cortex_proto::v1;
use cortex_shared::text::hex;
use serde::Serialize;

use super::error::{CliError, Exit};
use super::printer::{Format, Row};
use super::{Global, Output, hub, printer};

/// Entries that are kept for a table or one document; more come line by line.
const MAX_ROWS: u32 = 10_000;
/// Characters of the particulars in a table.
const SHOWN_DETAIL: usize = 100;

/// The hub's log of authority and commands
#[derive(Debug, Args)]
pub(crate) struct AuditArgs {
    #[command(subcommand)]
    verb: AuditVerb,
}

#[derive(Debug, Subcommand)]
enum AuditVerb {
    /// List entries, oldest first
    #[command(after_help = "\
With -o jsonl all entries are written as they come; a table or -o json holds at most 10000.

Example:
  cortex-agent audit list --action policy.set --action node.clone_suspected")]
    List {
        /// Only entries after this number
        #[arg(long, value_name = "SEQ", default_value_t)]
        after: u64,
        /// At most this many
        #[arg(long)]
        limit: Option<u32>,
        /// Only this action, such as policy.set; may be repeated
        #[arg(long = "action", value_name = "ACTION")]
        actions: Vec<String>,
        #[command(flatten)]
        output: Output,
    },
    /// Recompute the chain of hashes: finds what was changed or removed in the database
    Verify {
        #[command(flatten)]
        output: Output,
    },
}

#[derive(Serialize)]
struct EntryRow {
    seq: u64,
    at_ms: i64,
    actor: String,
    action: String,
    target: String,
    detail: serde_json::Value,
    prev_hash: String,
    hash: String,
}

impl EntryRow {
    fn of(entry: v1::AuditEntry) -> Self {
        // What is no JSON is shown as the text it is.
        let detail = serde_json::from_str(&entry.detail_json)
            .unwrap_or(serde_json::Value::String(entry.detail_json));
        Self {
            seq: entry.seq,
            at_ms: entry.at_ms,
            actor: entry.actor,
            action: entry.action,
            target: entry.target,
            detail,
            prev_hash: hex(&entry.prev_hash),
            hash: hex(&entry.hash),
        }
    }
}

impl Row for EntryRow {
    const COLUMNS: &'static [&'static str] = &["SEQ", "AT", "ACTOR", "ACTION", "TARGET", "DETAIL"];

    fn cells(&self) -> Vec<String> {
        let detail = self.detail.to_string();
        let mut shown: String = detail.chars().take(SHOWN_DETAIL).collect();
        if shown.len() < detail.len() {
            shown.push_str("...");
        }
        vec![
            self.seq.to_string(),
            printer::time(self.at_ms),
            self.actor.clone(),
            self.action.clone(),
            self.target.clone(),
            shown,
        ]
    }
}

#[derive(Serialize)]
struct Verdict {
    intact: bool,
    entries: u64,
    first_bad_seq: u64,
    head_hash: String,
    problem: String,
}

pub(crate) async fn audit(global: &Global, args: AuditArgs) -> Result<(), CliError> {
    match args.verb {
        AuditVerb::List { after, limit, actions, output } => {
            list(global, after, limit, actions, output).await
        }
        AuditVerb::Verify { output } => verify(global, output).await,
    }
}

async fn list(
    global: &Global,
    after_seq: u64,
    limit: Option<u32>,
    actions: Vec<String>,
    output: Output,
) -> Result<(), CliError> {
    if limit == Some(0) {
        return Err(CliError::usage("--limit 0 lists nothing"));
    }
    let lines = output.format == Format::Jsonl;
    // One more than is shown, to know whether there is more.
    let asked = match limit {
        Some(limit) if lines => limit,
        Some(limit) => limit.min(MAX_ROWS + 1),
        None if lines => 0,
        None => MAX_ROWS + 1,
    };
    let mut client = hub::operator(global).await?;
    let request = v1::ListAuditRequest { after_seq, limit: asked, actions };
    let mut entries = client.list_audit(request).await?.into_inner();
    let mut printer = global.printer(output);
    let mut rows = Vec::new();
    while let Some(entry) = entries.message().await? {
        let row = EntryRow::of(entry);
        if lines {
            printer.show(&row, &[])?;
        } else {
            rows.push(row);
        }
    }
    if lines {
        return Ok(());
    }
    let most = usize::try_from(MAX_ROWS).unwrap_or(usize::MAX);
    if rows.len() > most {
        rows.truncate(most);
        let last = rows.last().map_or(after_seq, |row| row.seq);
        printer::complain(
            &format!("there is more: go on with --after {last}, or use -o jsonl"),
            global.color,
        );
    }
    printer.list(&rows)
}

async fn verify(global: &Global, output: Output) -> Result<(), CliError> {
    let mut client = hub::operator(global).await?;
    // No time limit of a question: the whole log is read.
    let answer = client.verify_audit(v1::VerifyAuditRequest::default()).await?.into_inner();
    let verdict = Verdict {
        intact: answer.intact,
        entries: answer.entries,
        first_bad_seq: answer.first_bad_seq,
        head_hash: hex(&answer.head_hash),
        problem: answer.problem,
    };
    let sentence = if verdict.intact {
        format!("intact: {} entries, head {}", verdict.entries, verdict.head_hash)
    } else {
        format!("NOT intact at entry {}", verdict.first_bad_seq)
    };
    global.printer(output).say(&sentence, &verdict)?;
    if verdict.intact {
        return Ok(());
    }
    let text = format!(
        "the audit log was changed: entry {} does not follow from the one before: {}",
        verdict.first_bad_seq, verdict.problem
    );
    Err(CliError::new(Exit::Failed, text)
        .hint("compare with a backup of the hub's database; what follows cannot be trusted"))
}
