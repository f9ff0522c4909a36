//! Tasks and what is kept of their output.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use cortex_proto::v1;
use cortex_proto::v1::operator_server::Operator as _;
use cortex_proto::v1::read_task_response::Frame;
use cortex_shared::ids::TaskId;
use futures_util::StreamExt as _;
use schemars::JsonSchema;
use serde::Deserialize;

use super::{Api, page_size, view};
use crate::http::error::Problem;
use crate::http::routes::{Call, NoQuery};

/// Output of one answer.
const MAX_OUTPUT_BYTES: usize = 1024 * 1024;

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
                let stream = view::Stream::of(piece.stream());
                bytes += piece.data.len();
                next[stream.index()] = piece.offset.saturating_add(piece.data.len() as u64);
                let data = STANDARD.encode(&piece.data);
                pieces.push(view::OutputPiece { stream, offset: piece.offset, data });
            }
            Some(Frame::Task(info)) => task = Some(view::Task::of(info)),
            Some(Frame::Interrupted(_) | Frame::Resumed(_)) | None => {}
        }
    }
    let [next_stdout_offset, next_stderr_offset] = next;
    Ok(view::TaskOutput { pieces, next_stdout_offset, next_stderr_offset, task })
}
