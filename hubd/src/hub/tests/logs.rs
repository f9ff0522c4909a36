//! What the hub logs: a line for each change of state, and none for what goes on.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use cortex_proto::v1;
use tracing::field::{Field, Visit};
use tracing::{Event, Metadata, span};

use super::support::{TestHub, TestSession};
use super::*;
use crate::store::fault::{Fault, FaultStore, Faults};

/// Lines of our own, however little they matter.
#[derive(Clone, Default)]
struct Lines(Arc<(Mutex<Vec<String>>, AtomicU64)>);

impl Lines {
    fn all(&self) -> Vec<String> {
        self.0.0.lock().unwrap().clone()
    }
}

struct Line(String);

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        self.0.push_str(&format!(" {field}={value:?}"));
    }
}

impl tracing::Subscriber for Lines {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target().starts_with("cortex")
    }
    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(self.0.1.fetch_add(1, Ordering::Relaxed) + 1)
    }
    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}
    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}
    fn event(&self, event: &Event<'_>) {
        let mut line = Line(event.metadata().level().to_string());
        event.record(&mut line);
        self.0.0.lock().unwrap().push(line.0);
    }
    fn enter(&self, _: &span::Id) {}
    fn exit(&self, _: &span::Id) {}
}

async fn beat(session: &mut TestSession, times: u32) {
    for _ in 0..times {
        let beat = v1::node_frame::Frame::Heartbeat(v1::Heartbeat {});
        session.up.send(v1::NodeFrame { frame: Some(beat) }).await.unwrap();
        let answered = |frame| matches!(frame, hub_frame::Frame::Heartbeat(_)).then_some(());
        session.until(answered).await.unwrap();
    }
}

#[tokio::test]
async fn a_session_is_a_line_and_its_heartbeats_are_none() {
    let lines = Lines::default();
    let _logging = tracing::subscriber::set_default(lines.clone());
    let hub = TestHub::start().await;
    let node = hub.join("box", &[]).await;
    let mut session = node.connect(&hub).await.unwrap();
    beat(&mut session, 1).await;
    let of_session = |line: &String| line.contains("node connected");
    assert_eq!(lines.all().iter().filter(|line| of_session(line)).count(), 1);
    let heartbeats = |line: &String| line.to_lowercase().contains("heartbeat");
    let before = lines.all().len();
    beat(&mut session, 300).await;
    let more = lines.all().split_off(before);
    assert!(!more.iter().any(heartbeats), "{more:?}");
    // Workers may have something to say meanwhile, but not for each heartbeat.
    assert!(more.len() < 10, "{more:?}");
    drop(session);
    hub.hub.shutdown().await;
}

#[tokio::test]
async fn an_error_of_the_hub_stands_in_the_log_under_the_id_that_its_caller_was_told() {
    let lines = Lines::default();
    let _logging = tracing::subscriber::set_default(lines.clone());
    let (folder, faults) = (tempfile::tempdir().unwrap(), Faults::default());
    let handle = faults.clone();
    let hub =
        Hub::start_on(config(folder.path()), |store| Arc::new(FaultStore::new(store, handle)) as _);
    let hub = TestHub { hub: hub.await.unwrap(), folder };
    let mut admin = hub.local().await;
    faults.set(Fault::Fail);
    let mut ids = Vec::new();
    for _ in 0..50 {
        let refused = admin.list_invites(v1::ListInvitesRequest {}).await.unwrap_err();
        let id = refused.metadata().get(cortex_proto::ERROR_ID_TRAILER).unwrap();
        let id = id.to_str().unwrap().to_owned();
        assert!(refused.message().contains(&id), "{}", refused.message());
        assert!(!refused.message().contains("fault"), "{}", refused.message());
        ids.push(id);
    }
    faults.set(Fault::None);
    ids.dedup();
    // One line, which says why and whose call it was.
    let of_error = |line: &&String| line.contains(&ids[0]);
    let all = lines.all();
    let told: Vec<&String> = all.iter().filter(of_error).collect();
    assert_eq!((ids.len(), told.len()), (1, 1), "{ids:?}");
    for part in ["a fault was asked for", "local", "Operator/ListInvites"] {
        assert!(told[0].contains(part), "{}", told[0]);
    }
    hub.hub.shutdown().await;
}
