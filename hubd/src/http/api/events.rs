//! What happens, as it happens.

use cortex_proto::v1;
use cortex_proto::v1::event_frame::Frame;
use cortex_proto::v1::operator_server::Operator as _;
use futures_util::StreamExt as _;
use schemars::JsonSchema;
use serde::Deserialize;

use super::{Api, view};
use crate::http::error::Problem;
use crate::http::routes::Call;
use crate::http::sse::{Telling, Told};

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::http) struct Wanted {
    /// Only what came after this cursor; 0 for all that is kept; without it, only what comes. The header
    /// `Last-Event-ID`, which browsers send when they come back, goes before it.
    after: Option<u64>,
    /// Only these kinds, with commas between them: node.online, or node for all about nodes.
    kinds: Option<String>,
}

/// Ends with the caller's right to hear of anything, or with the hub.
pub(in crate::http) async fn watch(
    api: &Api,
    call: &Call,
    wanted: Wanted,
) -> Result<Telling<view::News>, Problem> {
    let after = match call.headers.get("last-event-id") {
        Some(id) => {
            let cursor = id.to_str().ok().and_then(|id| id.parse().ok());
            Some(cursor.ok_or_else(|| Problem::invalid("Last-Event-ID has to be a cursor"))?)
        }
        None => wanted.after,
    };
    let kinds = wanted.kinds.unwrap_or_default();
    let kinds = kinds.split(',').filter(|word| !word.is_empty()).map(str::to_owned).collect();
    let request = v1::WatchEventsRequest { after, follow: true, kinds };
    let frames = api.service.watch_events(call.request(request)?).await?.into_inner();
    Ok(Box::pin(frames.filter_map(async |frame| match frame {
        Ok(frame) => frame.frame.map(|frame| Ok(told(frame))),
        Err(status) => Some(Err(status.into())),
    })))
}

fn told(frame: Frame) -> Told<view::News> {
    match frame {
        Frame::Event(event) => {
            Told { id: event.cursor.to_string(), news: Some(view::News::of_event(event)) }
        }
        Frame::Missed(missed) => {
            Told { id: missed.cursor.to_string(), news: Some(view::News::of_missed(missed)) }
        }
        Frame::Place(cursor) => Told { id: cursor.to_string(), news: None },
    }
}
