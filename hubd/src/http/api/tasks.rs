//! Running commands, and what is kept of their output.

use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use cortex_proto::v1;
use cortex_proto::v1::operator_server::Operator as _;
use cortex_proto::v1::read_task_response::Frame;
use cortex_shared::ids::TaskId;
use futures_util::{StreamExt as _, stream};
use schemars::JsonSchema;
use serde::Deserialize;

use super::{Api, page_size, view};
use crate::http::error::Problem;
use crate::http::routes::{Call, NoQuery};
use crate::http::sse::{Telling, Told};

/// Output of one answer.
const MAX_OUTPUT_BYTES: usize = 1024 * 1024;
/// A stream of output on which nothing comes for this long says that it lives: proxies, and this side
/// itself, close connections on which nothing moves.
const SIGN_OF_LIFE: Duration = Duration::from_secs(15);

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::http) struct Filter {
    /// A node's name or the beginning of its id. Without it, all that the caller sees.
    node: Option<String>,
    /// States, with commas between them: accepted, running, interrupted, finished, failed, cancelled.
    state: Option<String>,
    /// Only the caller's own.
    mine: Option<bool>,
    /// Items of a page: 1 to 1000, 100 unless told otherwise.
    limit: Option<u32>,
    /// `next_cursor` of the page before.
    cursor: Option<String>,
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::http) struct Range {
    /// Bytes of standard output that the caller has.
    stdout_offset: Option<u64>,
    /// Bytes of standard error that the caller has.
    stderr_offset: Option<u64>,
}

pub(in crate::http) async fn list(
    api: &Api,
    call: &Call,
    filter: Filter,
) -> Result<view::Tasks, Problem> {
    let states = filter.state.unwrap_or_default();
    let states = states.split(',').filter(|word| !word.is_empty()).map(|word| {
        let state = view::TaskState::parse(word);
        let state = state.ok_or_else(|| Problem::invalid(format!("there is no state {word:?}")))?;
        Ok(state.wire().into())
    });
    let page = match filter.cursor.as_deref() {
        None | Some("") => bytes::Bytes::new(),
        Some(cursor) => match cursor.parse::<TaskId>() {
            Ok(id) => id.as_bytes().to_vec().into(),
            Err(_) => return Err(Problem::invalid("there is no such page")),
        },
    };
    let request = v1::ListTasksRequest {
        node: filter.node.unwrap_or_default(),
        states: states.collect::<Result<_, Problem>>()?,
        mine: filter.mine.unwrap_or_default(),
        page_size: page_size(filter.limit),
        page,
    };
    let page = api.service.list_tasks(call.request(request)?).await?.into_inner();
    let next_cursor = TaskId::from_slice(&page.next_page).ok().map(|id| id.to_string());
    Ok(view::Tasks { tasks: page.tasks.into_iter().map(view::Task::of).collect(), next_cursor })
}

pub(in crate::http) async fn show(
    api: &Api,
    call: &Call,
    _: NoQuery,
) -> Result<view::Task, Problem> {
    let request = v1::GetTaskRequest { task: call.part("task") };
    let task = api.service.get_task(call.request(request)?).await?;
    Ok(view::Task::of(task.into_inner()))
}

/// Accepted means durable: whatever becomes of the caller, the command stands in the journal.
pub(in crate::http) async fn start(
    api: &Api,
    call: &Call,
    _: NoQuery,
    command: view::Command,
) -> Result<view::Accepted, Problem> {
    if let Some(flaw) = command.flaw() {
        return Err(Problem::invalid(flaw));
    }
    let accepted = api.service.begin_detached(call.caller()?, command.wire()).await?;
    Ok(view::Accepted::of(accepted))
}

pub(in crate::http) async fn cancel(
    api: &Api,
    call: &Call,
    _: NoQuery,
    cancel: view::Cancel,
) -> Result<view::Task, Problem> {
    let request = v1::CancelTaskRequest {
        task: call.part("task"),
        signal: cancel.signal.unwrap_or_default(),
        grace_ms: cancel.grace_ms.unwrap_or_default(),
    };
    let task = api.service.cancel_task(call.request(request)?).await?;
    Ok(view::Task::of(task.into_inner()))
}

pub(in crate::http) async fn output(
    api: &Api,
    call: &Call,
    range: Range,
) -> Result<view::TaskOutput, Problem> {
    let mut next = [range.stdout_offset, range.stderr_offset].map(Option::unwrap_or_default);
    let request = v1::ReadTaskRequest {
        task: call.part("task"),
        follow: false,
        stdout_offset: next[0],
        stderr_offset: next[1],
    };
    let mut frames = api.service.read_task(call.request(request)?).await?.into_inner();
    let (mut pieces, mut bytes, mut task) = (Vec::new(), 0, None);
    while bytes < MAX_OUTPUT_BYTES {
        let Some(response) = frames.next().await else { break };
        match response?.frame {
            Some(Frame::Output(piece)) => {
                bytes += piece.data.len();
                pieces.push(shown(piece, &mut next));
            }
            Some(Frame::Task(info)) => task = Some(view::Task::of(info)),
            Some(Frame::Interrupted(_) | Frame::Resumed(_)) | None => {}
        }
    }
    let [next_stdout_offset, next_stderr_offset] = next;
    Ok(view::TaskOutput { pieces, next_stdout_offset, next_stderr_offset, task })
}

/// A piece of output for the caller, who has `next` bytes of each stream with it.
fn shown(piece: v1::Output, next: &mut [u64; 2]) -> view::OutputPiece {
    let stream = view::Stream::of(piece.stream());
    next[stream.index()] = piece.offset.saturating_add(piece.data.len() as u64);
    view::OutputPiece { stream, offset: piece.offset, data: STANDARD.encode(&piece.data) }
}

/// What is kept of a task's output, then what comes, then the task once it has ended. The id of each
/// piece are the bytes of both streams up to there, as `12-0`.
pub(in crate::http) async fn follow(
    api: &Api,
    call: &Call,
    range: Range,
) -> Result<Telling<view::TaskNews>, Problem> {
    let has = match call.headers.get("last-event-id") {
        Some(id) => id.to_str().ok().and_then(place).ok_or_else(|| {
            Problem::invalid(
                "Last-Event-ID has to be two numbers, as a stream of output gives them",
            )
        })?,
        None => [range.stdout_offset, range.stderr_offset].map(Option::unwrap_or_default),
    };
    let request = v1::ReadTaskRequest {
        task: call.part("task"),
        follow: true,
        stdout_offset: has[0],
        stderr_offset: has[1],
    };
    let frames = api.service.read_task(call.request(request)?).await?.into_inner();
    Ok(stream::unfold((frames, has), |(mut frames, mut has)| async move {
        let news = match tokio::time::timeout(SIGN_OF_LIFE, frames.next()).await {
            Err(_) => Ok(None),
            Ok(None) => return None,
            Ok(Some(Err(status))) => Err(status.into()),
            Ok(Some(Ok(response))) => Ok(response.frame.map(|frame| match frame {
                Frame::Output(piece) => view::TaskNews::Output(shown(piece, &mut has)),
                Frame::Interrupted(news) => view::TaskNews::Interrupted(view::Interruption {
                    reason: news.reason,
                    resume_within_ms: news.resume_within_ms,
                }),
                Frame::Resumed(_) => view::TaskNews::Resumed {},
                Frame::Task(info) => view::TaskNews::Task(Box::new(view::Task::of(info))),
            })),
        };
        let told = news.map(|news| Told { id: format!("{}-{}", has[0], has[1]), news });
        Some((told, (frames, has)))
    })
    .boxed())
}

/// How much of each stream a caller had that comes back.
fn place(id: &str) -> Option<[u64; 2]> {
    let (stdout, stderr) = id.split_once('-')?;
    Some([stdout.parse().ok()?, stderr.parse().ok()?])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_comes_back_says_how_much_it_has_of_both_streams() {
        assert_eq!(place("12-0"), Some([12, 0]));
        assert_eq!(place(&format!("0-{}", u64::MAX)), Some([0, u64::MAX]));
        for bad in ["", "-", "1", "1-", "-1", "1-2-3", "1.5-2", "1--2", "18446744073709551616-0"] {
            assert_eq!(place(bad), None, "{bad:?}");
        }
    }
}
