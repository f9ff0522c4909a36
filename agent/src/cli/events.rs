//! `events`: what happens in the mesh.

use clap::Args;
use cortex_proto::v1;
use cortex_shared::ids::{NodeId, TaskId, WorkspaceId};
use serde::Serialize;

use super::error::{CliError, printable};
use super::persist::Persistence;
use super::printer::{ColorWhen, Format, complain, time};
use super::{Global, Output, hub};

/// What happens in the mesh: nodes that come and go, commands, workspaces, policies
#[derive(Debug, Args)]
#[command(after_help = "\
Without -f what the hub has kept, with -f what comes. Each event has a cursor; --since goes on after it,
also over restarts of the hub. Events that are not kept any more are said on standard error, and with
-o jsonl by a line {\"missed\":…}. With -f a lost connection is made anew by itself.

Examples:
  cortex-agent events -f -o jsonl
  cortex-agent events --since 1763700000000000 --kind node --kind task.ended")]
pub(crate) struct EventsArgs {
    /// Go on with what comes
    #[arg(short = 'f', long)]
    follow: bool,
    /// Only what came after this cursor; 0 for all that is kept
    #[arg(long, value_name = "CURSOR")]
    since: Option<u64>,
    /// Only this kind, such as node.online, or node for all about nodes; may be repeated
    #[arg(long = "kind", value_name = "KIND")]
    kinds: Vec<String>,
    #[command(flatten)]
    output: Output,
}

#[derive(Serialize)]
struct EventRow {
    cursor: u64,
    at_ms: i64,
    kind: String,
    node_id: Option<String>,
    node: Option<String>,
    workspace_id: Option<String>,
    workspace: Option<String>,
    task_id: Option<String>,
    actor: Option<String>,
    detail: serde_json::Value,
}

#[derive(Serialize)]
struct Missed {
    /// Absent if it is not known how many.
    missed: Option<u64>,
    cursor: u64,
}

impl EventRow {
    fn of(event: v1::EventInfo) -> Self {
        let some = |text: String| Some(text).filter(|text| !text.is_empty());
        // What is no JSON is shown as the text it is.
        let detail = serde_json::from_str(&event.detail_json)
            .unwrap_or(serde_json::Value::String(event.detail_json));
        Self {
            cursor: event.cursor,
            at_ms: event.at_ms,
            kind: event.kind,
            node_id: NodeId::from_slice(&event.node_id).ok().map(|id| id.to_string()),
            node: some(event.node),
            workspace_id: WorkspaceId::from_slice(&event.workspace_id)
                .ok()
                .map(|id| id.to_string()),
            workspace: some(event.workspace),
            task_id: TaskId::from_slice(&event.task_id).ok().map(|id| id.to_string()),
            actor: some(event.actor),
            detail,
        }
    }

    /// A line for people; the columns stand below each other for usual names.
    fn line(&self) -> String {
        let mut about = Vec::new();
        about.extend(self.node.as_deref().map(|name| format!("node {name}")));
        about.extend(self.workspace.as_deref().map(|name| format!("workspace {name}")));
        about.extend(self.task_id.as_deref().map(|id| format!("task {id}")));
        let fields = self.detail.as_object().into_iter().flatten();
        about.extend(fields.filter(|(_, value)| !is_nothing(value)).map(|(key, value)| {
            let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
            format!("{key}={text}")
        }));
        about.extend(self.actor.as_deref().map(|actor| format!("by {actor}")));
        let (at, kind) = (time(self.at_ms), &self.kind);
        printable(&format!("{at}  {kind:<22}  {}", about.join(" "))).trim_end().to_owned()
    }
}

fn is_nothing(value: &serde_json::Value) -> bool {
    value.is_null() || value.as_str().is_some_and(str::is_empty)
}

pub(crate) async fn events(global: &Global, args: EventsArgs) -> Result<(), CliError> {
    let EventsArgs { follow, since, kinds, output } = args;
    let mut client = hub::operator(global).await?;
    let after = if follow { since } else { Some(since.unwrap_or_default()) };
    let mut request = v1::WatchEventsRequest { after, follow, kinds };
    let mut persistence = Persistence::default();
    let mut printer = global.printer(output);
    let (mut printed, mut frames) = (0, None);
    loop {
        let frame = match &mut frames {
            None => client.watch_events(request.clone()).await.map(|answer| {
                frames = Some(answer.into_inner());
                None
            }),
            Some(open) => match open.message().await {
                Ok(None) => break,
                other => other,
            },
        };
        let frame = match frame {
            Ok(None) => {
                persistence.arrived();
                continue;
            }
            Ok(Some(frame)) => frame.frame,
            Err(status) if follow => {
                persistence.pause(status).await?;
                frames = None;
                continue;
            }
            Err(status) => return Err(status.into()),
        };
        match frame {
            Some(v1::event_frame::Frame::Event(event)) => {
                request.after = Some(event.cursor);
                let row = EventRow::of(event);
                match output.format {
                    Format::Json => printer.item(printed, &row)?,
                    Format::Table | Format::Jsonl => printer.say(&row.line(), &row)?,
                }
                printed += 1;
            }
            Some(v1::event_frame::Frame::Missed(missed)) => {
                request.after = Some(missed.cursor);
                let count = missed.count.map_or("some".to_owned(), |count| count.to_string());
                let text = format!("note: {count} events are not kept any more\n");
                complain(&text, ColorWhen::Auto);
                if output.format == Format::Jsonl {
                    let missed = Missed { missed: missed.count, cursor: missed.cursor };
                    printer.show(&missed, &[])?;
                }
            }
            Some(v1::event_frame::Frame::Place(cursor)) => request.after = Some(cursor),
            None => {}
        }
    }
    if output.format == Format::Json { printer.end_items(printed) } else { Ok(()) }
}
