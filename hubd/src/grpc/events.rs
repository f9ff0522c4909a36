//! Following events.

use std::time::Duration;

use cortex_proto::v1;
use futures_util::StreamExt as _;
use tokio::time::Instant;
use tonic::{Code, Status};

use super::auth::AdmittedOperator;
use super::operator::{BoxStream, OperatorService};
use super::status::{from_store, invalid, refuse, with_hint};
use super::stopping::until_stopped;
use crate::events::{Cursor, Event, Frame, Kind, Viewer};

/// Kinds that one caller may name.
const MAX_KINDS: usize = 64;
/// How often a caller is told where it is while only events happen that it does not want; those of the feed
/// come where nothing happens.
const TELL_PLACE: Duration = Duration::from_secs(10);
/// Longest word of a kind that is repeated to whoever asked for it.
const MAX_WORD_BYTES: usize = 64;

impl From<&AdmittedOperator> for Viewer {
    fn from(operator: &AdmittedOperator) -> Self {
        let AdmittedOperator { name, role, scope, .. } = operator;
        Self { name: name.clone(), role: *role, scope: scope.clone() }
    }
}

/// Which events are wanted.
struct Wanted(Option<Vec<Kind>>);

impl Wanted {
    fn parse(words: &[String]) -> Result<Self, Status> {
        if words.len() > MAX_KINDS {
            return Err(invalid(format!("at most {MAX_KINDS} kinds of events can be named")));
        }
        let mut kinds = Vec::new();
        for word in words {
            let of_subject = |kind: &&Kind| {
                kind.word().split_once('.').is_some_and(|(subject, _)| subject == word)
            };
            let known = kinds.len();
            kinds.extend(word.parse::<Kind>().ok());
            kinds.extend(Kind::ALL.iter().filter(of_subject));
            if kinds.len() == known {
                let shown: String = word.chars().take(MAX_WORD_BYTES).collect();
                let all: Vec<_> = Kind::ALL.iter().map(|kind| kind.word()).collect();
                let status = invalid(format!("there is no kind of event {shown:?}"));
                return Err(with_hint(status, &format!("there are {}", all.join(", "))));
            }
        }
        Ok(Self((!words.is_empty()).then_some(kinds)))
    }

    /// What the caller is told instead of this frame, after it was told nothing for so long.
    fn of(&self, frame: Frame, silent: Duration) -> Option<Frame> {
        match (&self.0, frame) {
            (Some(kinds), Frame::Event(event)) if !kinds.contains(&event.kind) => {
                (silent >= TELL_PLACE).then_some(Frame::Place(event.cursor))
            }
            (_, frame) => Some(frame),
        }
    }
}

/// What happens, of what the caller may see.
pub(super) fn watch(
    service: &OperatorService,
    caller: &AdmittedOperator,
    request: v1::WatchEventsRequest,
) -> Result<BoxStream<v1::EventFrame>, Status> {
    let wanted = Wanted::parse(&request.kinds)?;
    let (viewer, after) = (Viewer::from(caller), request.after.map(Cursor));
    let frames = if request.follow {
        service.events.subscribe(viewer, after)
    } else {
        service.events.replay(viewer, after.unwrap_or_else(|| service.events.bus.newest()))
    };
    let frames = frames.map_err(|error| {
        let status = refuse(Code::ResourceExhausted, "too_many_subscriptions", error.to_string());
        with_hint(status, "end some of them, or raise event_subscriptions at the hub")
    })?;
    let mut told = Instant::now();
    let frames = frames.filter_map(move |frame| {
        let frame = frame.map(|frame| wanted.of(frame, told.elapsed()));
        if !matches!(frame, Ok(None)) {
            told = Instant::now();
        }
        std::future::ready(frame.map_err(from_store).map(|frame| frame.map(wire)).transpose())
    });
    Ok(until_stopped(service.scope.token().clone(), frames))
}

fn wire(frame: Frame) -> v1::EventFrame {
    use v1::event_frame::Frame as Wire;
    let frame = match frame {
        Frame::Event(event) => Wire::Event(wire_event(&event)),
        Frame::Missed { count, to } => Wire::Missed(v1::EventsMissed { count, cursor: to.0 }),
        Frame::Place(cursor) => Wire::Place(cursor.0),
    };
    v1::EventFrame { frame: Some(frame) }
}

fn wire_event(event: &Event) -> v1::EventInfo {
    let about = &event.about;
    let id = |bytes: &[u8; 16]| bytes.to_vec().into();
    let detail = serde_json::Value::Object(about.detail.clone());
    v1::EventInfo {
        cursor: event.cursor.0,
        at_ms: event.at_ms,
        kind: event.kind.word().to_owned(),
        node_id: about.node.as_ref().map(|node| id(node.id.as_bytes())).unwrap_or_default(),
        node: about.node.as_ref().map(|node| node.name.clone()).unwrap_or_default(),
        workspace_id: about
            .workspace
            .as_ref()
            .map(|workspace| id(workspace.id.as_bytes()))
            .unwrap_or_default(),
        workspace: about.workspace.as_ref().map(|w| w.name.clone()).unwrap_or_default(),
        task_id: about.task.map(|task| id(task.as_bytes())).unwrap_or_default(),
        actor: about.actor.clone(),
        detail_json: detail.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_are_named_one_by_one_or_by_what_they_are_about() {
        let count = |words: &[&str]| {
            let words: Vec<String> = words.iter().map(|word| (*word).to_owned()).collect();
            Wanted::parse(&words).map(|wanted| wanted.0.map(|kinds| kinds.len()))
        };
        let of_nodes = Kind::ALL.iter().filter(|kind| kind.word().starts_with("node.")).count();
        assert_eq!(count(&[]).unwrap(), None);
        assert_eq!(count(&["node.online"]).unwrap(), Some(1));
        assert_eq!(count(&["node", "hub.started"]).unwrap(), Some(of_nodes + 1));
        for bad in [&["nodes"][..], &[""], &["node."], &["node.online", "x"], &["node"; 65]] {
            assert_eq!(count(bad).unwrap_err().code(), Code::InvalidArgument, "{bad:?}");
        }
        let endless = "x".repeat(1_000_000);
        assert!(count(&[&endless]).unwrap_err().message().len() < 200);
    }

    #[test]
    fn what_is_not_wanted_still_moves_the_callers_place_on() {
        let wanted = Wanted::parse(&["node".to_owned()]).unwrap();
        let event = |kind| {
            let (cursor, about) = (Cursor(7), crate::events::NewEvent::of_hub());
            Frame::Event(std::sync::Arc::new(Event { cursor, at_ms: 1, kind, about }))
        };
        let (other, node) = (event(Kind::HubStopping), event(Kind::NodeOnline));
        assert_eq!(wanted.of(node.clone(), Duration::ZERO), Some(node));
        assert_eq!(wanted.of(other.clone(), Duration::ZERO), None);
        assert_eq!(wanted.of(other, TELL_PLACE), Some(Frame::Place(Cursor(7))));
        let missed = Frame::Missed { count: None, to: Cursor(8) };
        assert_eq!(wanted.of(missed.clone(), Duration::ZERO), Some(missed));
    }
}
