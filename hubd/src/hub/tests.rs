mod authority;
mod chains;
mod events;
mod identity;
mod invites;
mod joining;
mod logs;
mod matrix;
mod receiving;
mod rotation;
mod stall;
mod stopping;
mod support;
mod web;

use cortex_shared::ids::{NodeId, TaskId};
use cortex_shared::policy::Bound;

use super::*;
use crate::store::{NewTask, TaskEnd, Verdict};

fn config(data: &std::path::Path) -> HubConfig {
    // Some tests write down what happened long ago.
    let invite_keep = Duration::from_secs(365 * 24 * 3600);
    HubConfig {
        workers: crate::worker::Periods { invite_keep, ..Default::default() },
        grpc: "127.0.0.1:0".parse().unwrap(),
        resume_grace: Duration::from_millis(100),
        http: crate::config::HttpConfig {
            listen: Some("127.0.0.1:0".parse().unwrap()),
            ..Default::default()
        },
        ..HubConfig::new(data.to_owned())
    }
}

/// A verdict that falls while everything is being stopped is still journalled.
#[tokio::test]
async fn the_databases_outlive_whatever_still_writes_at_shutdown() {
    let folder = tempfile::tempdir().unwrap();
    let hub = Hub::start(config(folder.path())).await.unwrap();
    let database = hub.data.layout.database();
    let id = TaskId::new();
    let task = NewTask { id, ..crate::store::fixtures::task("ann", NodeId::new()) };
    hub.store.accept_task(task).await.unwrap();
    let (store, stop) = (Arc::clone(&hub.store), hub.scope.token().clone());
    hub.scope.spawn("verdict", async move {
        stop.cancelled().await;
        // As sessions do that find out what became of their tasks: some steps, of some time.
        for _ in 0..20 {
            store.nodes().await.unwrap();
        }
        let end = TaskEnd {
            verdict: Verdict::Exited,
            exit_code: Some(0),
            signal: None,
            reason: String::new(),
            stdout_bytes: 0,
            stderr_bytes: 0,
            stdout_hash: None,
            stderr_hash: None,
            hint: String::new(),
            duration_ms: 1,
            started_at_ms: None,
            ended_at_ms: 2,
            never_begun: false,
            cancel_wanted: false,
        };
        store.end_task(id, end).await.unwrap();
    });
    hub.shutdown().await;
    assert!(!database.with_extension("db-wal").exists(), "the log has been folded");

    let data = HubData::open(&config(folder.path())).await.unwrap();
    assert!(data.store.open_tasks().await.unwrap().is_empty());
    data.close().await;
}

#[tokio::test]
async fn the_data_directory_is_free_again_once_it_has_been_closed() {
    let folder = tempfile::tempdir().unwrap();
    let config = config(folder.path());
    let data = HubData::open(&config).await.unwrap();
    let pins = data.pins();
    assert!(matches!(HubData::open(&config).await.err(), Some(StartError::Locked { .. })));
    data.close().await;
    let data = HubData::open(&config).await.unwrap();
    assert_eq!(data.pins(), pins);
    data.close().await;
}
