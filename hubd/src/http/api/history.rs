//! What a node's commands wrote last.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use cortex_proto::v1;
use cortex_proto::v1::operator_server::Operator as _;
use cortex_shared::ids::TaskId;
use futures_util::StreamExt as _;
use schemars::JsonSchema;
use serde::Deserialize;

use super::{Api, page_size, view};
use crate::http::error::Problem;
use crate::http::routes::Call;

/// Lines from the end, if the caller does not say.
const LINES: u32 = 500;
/// Most lines from the end.
const MAX_LINES: u32 = 100_000;
/// Output of one answer.
const MAX_BYTES: usize = 1024 * 1024;

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::http) struct Range {
    /// Lines from the end: 1 to 100000, 500 unless told otherwise. Not with `cursor`.
    lines: Option<u32>,
    /// `next_cursor` of an answer before: what has come since.
    cursor: Option<u64>,
    /// Pieces of an answer: 1 to 1000, 100 unless told otherwise.
    limit: Option<u32>,
}

pub(in crate::http) async fn read(
    api: &Api,
    call: &Call,
    range: Range,
) -> Result<view::History, Problem> {
    if range.lines.is_some() && range.cursor.is_some() {
        return Err(Problem::invalid("give lines or cursor, not both"));
    }
    let after_seq = range.cursor.unwrap_or_default();
    let request = v1::ReadHistoryRequest {
        node: call.part("node"),
        // A cursor from before anything was written means everything.
        lines: match range.cursor {
            Some(_) => 0,
            None => range.lines.unwrap_or(LINES).clamp(1, MAX_LINES),
        },
        follow: false,
        after_seq,
    };
    let mut frames = api.service.read_history(call.request(request)?).await?.into_inner();
    let limit = usize::try_from(page_size(range.limit)).unwrap_or(usize::MAX);
    let (mut pieces, mut bytes, mut next_cursor, mut more) = (Vec::new(), 0, after_seq, true);
    while pieces.len() < limit && bytes < MAX_BYTES {
        let Some(piece) = frames.next().await else {
            more = false;
            break;
        };
        let piece = piece?;
        bytes += piece.data.len();
        next_cursor = piece.seq;
        pieces.push(view::HistoryPiece {
            at_ms: piece.at_ms,
            task_id: TaskId::from_slice(&piece.task_id).map(|id| id.to_string()).ok(),
            stream: view::Stream::of(piece.stream()),
            data: STANDARD.encode(&piece.data),
            skipped_bytes: piece.skipped_bytes,
        });
    }
    Ok(view::History { pieces, next_cursor, more })
}
