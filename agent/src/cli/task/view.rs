//! The output of a task for somebody who did not start it.

use cortex_proto::v1::{self, OutputStream, read_task_response::Frame};
use tokio::io::AsyncWriteExt as _;
use tonic::{Status, Streaming};

use super::no_task;
use crate::cli::error::{CliError, Exit};
use crate::cli::exec::check;
use crate::cli::exec::signals::Signals;
use crate::cli::exec::writer::unless_closed;
use crate::cli::persist::Persistence;
use crate::cli::printer::{ColorWhen, complain};
use crate::cli::{Global, hub};

/// What was written of each stream.
#[derive(Default)]
struct Written {
    next: [u64; 2],
    missing: u64,
}

/// Writes what is kept, and with `follow` what comes; returns the task as it is then.
pub(super) async fn write(
    global: &Global,
    task: String,
    follow: bool,
) -> Result<v1::TaskInfo, CliError> {
    let (info, written) = read(global, task, follow).await?;
    report(&info, &written);
    Ok(info)
}

/// The same, to the end of the task; its exit code becomes ours.
pub(super) async fn attach(global: &Global, task: String) -> Result<u8, CliError> {
    let mut signals = Signals::new()?;
    let (info, written) = tokio::select! {
        read = read(global, task, true) => read?,
        () = signals.next() => {
            return Err(CliError::new(Exit::Code(130), "left; the task goes on")
                .hint("cortex-agent task cancel ends it"));
        }
    };
    let missing = report(&info, &written);
    let exit = info.exit.as_ref().ok_or_else(no_task)?;
    if let Some(text) = check::complaint(exit) {
        complain(&text, global.color);
    }
    // Without all of the output it is no success.
    Ok(if missing { 125 } else { check::exit_code(exit) })
}

/// What ends the reading before the end of the task.
enum Broken {
    /// The stream, and perhaps another one goes on.
    Stream(Status),
    /// Our own output.
    Output(std::io::Error),
}

impl From<Status> for Broken {
    fn from(status: Status) -> Self {
        Self::Stream(status)
    }
}

impl From<std::io::Error> for Broken {
    fn from(error: std::io::Error) -> Self {
        Self::Output(error)
    }
}

/// Reads to the end; where the hub goes away for a moment, from the byte on that is due.
async fn read(
    global: &Global,
    task: String,
    follow: bool,
) -> Result<(v1::TaskInfo, Written), CliError> {
    let mut client = hub::operator(global).await?;
    let (mut written, mut persistence) = (Written::default(), Persistence::default());
    loop {
        let [stdout_offset, stderr_offset] = written.next;
        let task = task.clone();
        let request = v1::ReadTaskRequest { task, follow, stdout_offset, stderr_offset };
        let status = match client.read_task(request).await {
            Ok(answer) => match pass(answer.into_inner(), &mut written, &mut persistence).await {
                Ok(info) => return Ok((info, written)),
                Err(Broken::Output(error)) => return Err(error.into()),
                Err(Broken::Stream(status)) => status,
            },
            Err(status) => status,
        };
        persistence.pause(status).await?;
    }
}

async fn pass(
    mut frames: Streaming<v1::ReadTaskResponse>,
    written: &mut Written,
    persistence: &mut Persistence,
) -> Result<v1::TaskInfo, Broken> {
    let (mut stdout, mut stderr) = (tokio::io::stdout(), tokio::io::stderr());
    persistence.arrived();
    while let Some(response) = frames.message().await? {
        match response.frame {
            Some(Frame::Output(output)) => {
                let stream = usize::from(output.stream() == OutputStream::Stderr);
                let next = &mut written.next[stream];
                written.missing += output.offset.saturating_sub(*next);
                *next = output.offset.saturating_add(output.data.len() as u64);
                if stream == 0 {
                    stdout.write_all(&output.data).await?;
                    stdout.flush().await?;
                } else {
                    let written = match stderr.write_all(&output.data).await {
                        Ok(()) => stderr.flush().await,
                        error => error,
                    };
                    unless_closed(written)?;
                }
            }
            Some(Frame::Interrupted(news)) => {
                let text = format!("note: {}\n", check::interruption(&news));
                complain(&text, ColorWhen::Auto);
            }
            Some(Frame::Resumed(_)) => {
                complain("note: the node is back; the output goes on\n", ColorWhen::Auto);
            }
            Some(Frame::Task(info)) => return Ok(info),
            None => {}
        }
    }
    Err(Status::unavailable("the hub closed the stream before the end").into())
}

/// Says what is missing; whether something is.
fn report(info: &v1::TaskInfo, written: &Written) -> bool {
    let mut missing = written.missing;
    // A verdict without the node's word counts nothing.
    if let Some(exit) = info.exit.as_ref().filter(|exit| !exit.stdout_hash.is_empty()) {
        missing += exit.stdout_bytes.saturating_sub(written.next[0]);
        missing += exit.stderr_bytes.saturating_sub(written.next[1]);
    }
    if missing > 0 {
        let text = format!("note: {missing} bytes were not kept, and are missing above\n");
        complain(&text, ColorWhen::Auto);
    }
    missing > 0
}
