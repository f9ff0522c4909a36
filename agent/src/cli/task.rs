//! `task …`: commands that run or have run, wherever they were started.

mod show;
mod view;

use std::ffi::OsString;
use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};
use cortex_proto::{DEFAULT_OUTPUT_CREDIT, v1};

use super::error::{CliError, Exit};
use super::exec::check;
use super::exec::one::{Attached, exec, id_text};
use super::exec::request::variables;
use super::persist::Persistence;
use super::printer::complain;
use super::units::{millis, parse_duration};
use super::{Global, Output, hub};
use show::{TaskRow, lines};

/// Most tasks that are asked for at once.
const PAGE: u32 = 1000;

/// Commands that run or have run
#[derive(Debug, Args)]
#[command(after_help = "\
A task is named by its id, or by the last 8 or more digits of it: the beginning of an id is a time.

Examples:
  cortex-agent task list --node build-1 --status running
  id=$(cortex-agent exec build-1 --detach -o json -- make | jq -r .task_id)
  cortex-agent task logs $id -f
  cortex-agent task wait $id")]
pub(crate) struct TaskArgs {
    #[command(subcommand)]
    verb: TaskVerb,
}

#[derive(Debug, Subcommand)]
enum TaskVerb {
    /// List tasks, newest first
    List {
        /// Only those of this node
        #[arg(long, value_name = "NODE")]
        node: Option<String>,
        /// Only those in this state; may be repeated
        #[arg(long, value_enum, value_name = "STATE")]
        status: Vec<State>,
        /// Only your own
        #[arg(long)]
        mine: bool,
        /// At most this many; 0 for all
        #[arg(long, default_value_t = 50, value_name = "N")]
        limit: u32,
        #[command(flatten)]
        output: Output,
    },
    /// Show everything about one task
    Show {
        /// Its id, or the last 8 or more digits of it
        task: String,
        #[command(flatten)]
        output: Output,
    },
    /// Write the output that the hub has kept; what is missing is said on standard error
    Logs {
        /// Its id, or the last 8 or more digits of it
        task: String,
        /// Go on with what comes, until the task ends
        #[arg(short = 'f', long)]
        follow: bool,
    },
    /// Watch a task as if you had started it: its output from the beginning, and its exit code. Ctrl-C
    /// leaves it running
    Attach {
        /// Its id, or the last 8 or more digits of it
        task: String,
    },
    /// Wait until tasks have ended; ends with the code of the first one that did not succeed
    Wait {
        /// Their ids, or the last 8 or more digits of them
        #[arg(required = true)]
        tasks: Vec<String>,
        #[command(flatten)]
        output: Output,
    },
    /// End a task: a signal, then KILL after the grace time
    Cancel {
        /// Its id, or the last 8 or more digits of it
        task: String,
        /// The first signal, by name or number
        #[arg(long, default_value = "TERM", value_parser = parse_signal)]
        signal: u32,
        /// Time until KILL, 60s at most
        #[arg(long, default_value = "2s", value_parser = parse_duration, value_name = "DURATION")]
        grace: Duration,
        #[command(flatten)]
        output: Output,
    },
    /// Run the same command on the same node again, as a new task
    Retry {
        /// Its id, or the last 8 or more digits of it
        task: String,
        /// Say the new task's id and leave
        #[arg(long)]
        detach: bool,
        /// A variable of the command once more: the hub does not keep their values. May be repeated
        #[arg(long = "env", value_name = "NAME=VALUE")]
        env: Vec<OsString>,
        #[command(flatten)]
        output: Output,
    },
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum State {
    Accepted,
    Running,
    Interrupted,
    Finished,
    Failed,
    Cancelled,
}

impl From<State> for v1::TaskState {
    fn from(state: State) -> Self {
        match state {
            State::Accepted => Self::Accepted,
            State::Running => Self::Running,
            State::Interrupted => Self::Interrupted,
            State::Finished => Self::Finished,
            State::Failed => Self::Failed,
            State::Cancelled => Self::Cancelled,
        }
    }
}

/// Reads `INT`, `SIGINT` or `2`.
fn parse_signal(text: &str) -> Result<u32, String> {
    const NAMES: [(&str, u32); 9] = [
        ("HUP", 1),
        ("INT", 2),
        ("QUIT", 3),
        ("KILL", 9),
        ("USR1", 10),
        ("USR2", 12),
        ("TERM", 15),
        ("CONT", 18),
        ("STOP", 19),
    ];
    let name = text.to_ascii_uppercase();
    let name = name.strip_prefix("SIG").unwrap_or(&name);
    let known = NAMES.iter().find(|(known, _)| *known == name).map(|(_, number)| *number);
    let number = known.or_else(|| name.parse().ok().filter(|number| (1..=64).contains(number)));
    number.ok_or_else(|| format!("{text:?} is no signal: a name such as INT, or 1 to 64"))
}

/// Does what the verb says; the result is the exit code of this process.
pub(crate) async fn task(global: &Global, args: TaskArgs) -> Result<u8, CliError> {
    match args.verb {
        TaskVerb::List { node, status, mine, limit, output } => {
            refuse_state(global)?;
            let states =
                status.into_iter().map(|state| v1::TaskState::from(state).into()).collect();
            let request = v1::ListTasksRequest {
                node: node.unwrap_or_default(),
                states,
                mine,
                ..v1::ListTasksRequest::default()
            };
            list(global, request, limit, output).await?;
            Ok(0)
        }
        TaskVerb::Show { task, output } => {
            let request = hub::question(v1::GetTaskRequest { task });
            let info = hub::operator(global).await?.get_task(request).await?.into_inner();
            global.printer(output).show(&TaskRow::from(&info), &lines(&info))?;
            Ok(0)
        }
        TaskVerb::Logs { task, follow } => {
            view::write(global, task, follow).await?;
            Ok(0)
        }
        TaskVerb::Attach { task } => view::attach(global, task).await,
        TaskVerb::Wait { tasks, output } => wait(global, tasks, output).await,
        TaskVerb::Cancel { task, signal, grace, output } => {
            let grace_ms = millis(grace);
            let request = hub::question(v1::CancelTaskRequest { task, signal, grace_ms });
            let info = hub::operator(global).await?.cancel_task(request).await?.into_inner();
            let row = TaskRow::from(&info);
            let (node, id) = (&info.node_name, &row.task_id);
            let sentence = match &info.exit {
                None if info.state() == v1::TaskState::Interrupted => {
                    format!("{node} is away; it is asked to end {id} when it is back")
                }
                None => format!("asked {node} to end {id}"),
                Some(_) if info.cancel_pending => format!(
                    "{id} has its verdict ({}), but {node} has not said that it has ended there: asked \
                     it to end it, now or when it is back",
                    row.state
                ),
                Some(_) => format!("{} has ended already: {}", row.task_id, row.state),
            };
            global.printer(output).say(&sentence, &row)?;
            Ok(0)
        }
        TaskVerb::Retry { task, detach, env, output } => {
            let env = variables(&env)?;
            let start = v1::ExecStart {
                retry_of: task,
                detach,
                spec: (!env.is_empty()).then(|| v1::TaskSpec { env, ..Default::default() }),
                initial_credit: DEFAULT_OUTPUT_CREDIT,
                ..v1::ExecStart::default()
            };
            exec(global, Attached { start, stdin: false, output }).await
        }
    }
}

/// `--state` is the global flag that names a directory, which would be taken without a word.
fn refuse_state(global: &Global) -> Result<(), CliError> {
    let meant = global.state.as_ref().and_then(|state| state.to_str());
    match meant.filter(|text| State::from_str(text, true).is_ok()) {
        None => Ok(()),
        Some(state) => Err(CliError::usage("--state names a node's directory")
            .hint(format!("tasks in a state: cortex-agent task list --status {state}"))),
    }
}

async fn list(
    global: &Global,
    mut request: v1::ListTasksRequest,
    limit: u32,
    output: Output,
) -> Result<(), CliError> {
    let mut client = hub::operator(global).await?;
    let limit = if limit == 0 { usize::MAX } else { usize::try_from(limit).unwrap_or(usize::MAX) };
    // One more than is shown says whether there are more.
    let wanted = limit.saturating_add(1);
    let mut rows = Vec::new();
    loop {
        let left = wanted - rows.len();
        request.page_size = u32::try_from(left).unwrap_or(PAGE).min(PAGE);
        let page = client.list_tasks(hub::question(request.clone())).await?.into_inner();
        rows.extend(page.tasks.iter().map(TaskRow::from).take(left));
        if page.next_page.is_empty() || rows.len() >= wanted {
            break;
        }
        request.page = page.next_page;
    }
    let more = rows.len() > limit;
    rows.truncate(limit);
    global.printer(output).list(&rows)?;
    if more {
        complain("note: there are more; --limit 0 lists all\n", global.color);
    }
    Ok(())
}

async fn wait(global: &Global, tasks: Vec<String>, output: Output) -> Result<u8, CliError> {
    let mut client = hub::operator(global).await?;
    // One that is misspelt is said before the others are waited for.
    let mut ids = Vec::new();
    for task in tasks {
        let info = client.get_task(hub::question(v1::GetTaskRequest { task })).await?.into_inner();
        ids.push(id_text(&info.task_id));
    }
    let (mut rows, mut code) = (Vec::new(), 0);
    let mut persistence = Persistence::default();
    persistence.arrived();
    // One after the other takes as long as the longest of them.
    for task in ids {
        let info = loop {
            match client.wait_task(v1::GetTaskRequest { task: task.clone() }).await {
                Ok(info) => break info.into_inner(),
                Err(status) => {
                    if let Err(error) = persistence.pause(status).await {
                        // What is known of the others is said all the same.
                        global.printer(output).list(&rows)?;
                        return Err(error);
                    }
                }
            }
        };
        persistence.arrived();
        let exit = info.exit.clone().unwrap_or_default();
        if code == 0 {
            code = check::exit_code(&exit);
        }
        if let Some(text) = check::complaint(&exit) {
            complain(&text, global.color);
        }
        rows.push(TaskRow::from(&info));
    }
    global.printer(output).list(&rows)?;
    Ok(code)
}

/// Leaves with an error that says so, where a task's id could not be read.
fn no_task() -> CliError {
    CliError::new(Exit::Failed, "the hub said nothing of the task's end")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_have_names_and_numbers() {
        for (text, number) in [("INT", 2), ("sigterm", 15), ("9", 9), ("64", 64)] {
            assert_eq!(parse_signal(text), Ok(number));
        }
        for text in ["", "0", "65", "SIGNAL", "-1"] {
            assert!(parse_signal(text).is_err(), "{text}");
        }
    }
}
