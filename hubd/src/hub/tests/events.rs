//! Events and workers over real connections.

use cortex_proto::v1;
use cortex_proto::v1::event_frame::Frame;
use tonic::Streaming;

use super::support::{TestHub, script, word};
use super::*;

fn from(after: Option<u64>) -> v1::WatchEventsRequest {
    v1::WatchEventsRequest { after, follow: true, kinds: Vec::new() }
}

/// What comes until an event of this kind: kinds and names of nodes.
async fn until(events: &mut Streaming<v1::EventFrame>, last: &str) -> (Vec<(String, String)>, u64) {
    let mut got = Vec::new();
    loop {
        match events.message().await.unwrap().unwrap().frame.unwrap() {
            Frame::Event(event) => {
                got.push((event.kind.clone(), event.node));
                if event.kind == last {
                    return (got, event.cursor);
                }
            }
            Frame::Missed(missed) => got.push(("missed".into(), format!("{:?}", missed.count))),
            Frame::Place(_) => {}
        }
    }
}

fn kinds(got: &[(String, String)], node: &str) -> Vec<String> {
    got.iter().filter(|(_, of)| of == node).map(|(kind, _)| kind.clone()).collect()
}

#[tokio::test]
async fn everybody_hears_once_of_what_it_may_see_and_goes_on_over_a_restart() {
    let hub = TestHub::start().await;
    let mut admin = hub.local().await;
    let mut all = admin.watch_events(from(None)).await.unwrap().into_inner();
    assert!(matches!(all.message().await.unwrap().unwrap().frame, Some(Frame::Place(_))));
    let scoped = hub.login_scoped("dev", "operator", &[("env", "dev")]).await;
    let mut scoped_client = hub.operator(&scoped).await;
    let mut some = scoped_client.watch_events(from(None)).await.unwrap().into_inner();

    let dev = hub.join("dev-box", &[("env", "dev")]).await;
    let prod = hub.join("prod-box", &[]).await;
    let mut session = dev.connect(&hub).await.unwrap();
    let prod_session = prod.connect(&hub).await.unwrap();
    // Two ways to see the node: itself, and a workspace that it is a member of.
    let name = || "code".to_owned();
    admin.create_workspace(v1::CreateWorkspaceRequest { name: name() }).await.unwrap();
    let attach = v1::AttachWorkspaceRequest { workspace: name(), node: "dev-box".into() };
    admin.attach_workspace(attach).await.unwrap();
    let running = hub.exec(&mut admin, "dev-box", script()).await.unwrap();
    session.start_task().await;
    let revoke = v1::RevokeNodeRequest { node: "dev-box".into(), reason: String::new() };
    admin.revoke_node(revoke).await.unwrap();
    running.end().await.unwrap();
    drop(prod_session);

    let expected = [
        "node.joined",
        "node.online",
        "workspace.attached",
        "task.accepted",
        "node.revoked",
        "task.ended",
        "node.offline",
    ];
    for (whose, events, sees_all) in [("admin", &mut all, true), ("scoped", &mut some, false)] {
        let mut got = Vec::new();
        while kinds(&got, "dev-box").len() < expected.len() {
            let event = loop {
                if let Frame::Event(event) = events.message().await.unwrap().unwrap().frame.unwrap()
                {
                    break event;
                }
            };
            got.push((event.kind, event.node));
        }
        // The end of the command, of the session and the record come in any order.
        let (mut heard, mut expected) = (kinds(&got, "dev-box"), expected.map(str::to_owned));
        assert_eq!(heard[..4], expected[..4], "{whose}");
        heard.sort();
        expected.sort();
        assert_eq!(heard, expected, "{whose}");
        assert_eq!(!kinds(&got, "prod-box").is_empty(), sees_all, "{whose}");
        let of_mesh = got.iter().any(|(kind, _)| kind.starts_with("invite."));
        assert_eq!(of_mesh, sees_all, "{whose}");
    }
    let known = until_newest(&mut admin).await;

    let hub = hub.restart().await;
    // Whoever follows is told that the hub stops.
    while let Ok(frame) = all.message().await {
        assert!(frame.is_some(), "not as if that were the end");
    }
    let mut admin = hub.local().await;
    let mut back = admin.watch_events(from(Some(known))).await.unwrap().into_inner();
    let (got, started) = until(&mut back, "hub.started").await;
    let kinds: Vec<&str> = got.iter().map(|(kind, _)| kind.as_str()).collect();
    assert_eq!(kinds.last(), Some(&"hub.started"));
    assert!(kinds.contains(&"hub.stopping") && !kinds.contains(&"missed"), "{kinds:?}");
    assert!(started > known);
    // Only some kinds, and an end.
    let request = v1::WatchEventsRequest {
        after: Some(0),
        follow: false,
        kinds: vec!["hub".to_owned(), "node.joined".to_owned()],
    };
    let mut listed = admin.watch_events(request).await.unwrap().into_inner();
    let mut heard = Vec::new();
    while let Some(frame) = listed.message().await.unwrap() {
        if let Some(Frame::Event(event)) = frame.frame {
            heard.push(event.kind);
        }
    }
    let expected = ["hub.started", "node.joined", "node.joined", "hub.stopping", "hub.started"];
    assert_eq!(heard, expected);
    hub.hub.shutdown().await;
}

#[tokio::test]
async fn a_node_has_nothing_to_say_of_workspaces_of_others_and_gives_its_own_no_names() {
    let hub = TestHub::start().await;
    let mut admin = hub.local().await;
    let box_ = hub.join("box", &[]).await;
    let mut ids = Vec::new();
    for name in ["own", "foreign"] {
        let create = v1::CreateWorkspaceRequest { name: name.into() };
        ids.push(admin.create_workspace(create).await.unwrap().into_inner().workspace_id);
    }
    let attach = v1::AttachWorkspaceRequest { workspace: "own".into(), node: "box".into() };
    admin.attach_workspace(attach).await.unwrap();
    // And one that nobody has made.
    ids.push(vec![7; 16].into());
    let mut events = admin.watch_events(from(None)).await.unwrap().into_inner();
    let session = box_.connect(&hub).await.unwrap();
    let report = |ids: &[bytes::Bytes], held_deletions| {
        let status = |workspace_id: &bytes::Bytes| v1::SyncStatus {
            workspace_id: workspace_id.clone(),
            workspace: "forged".into(),
            state: v1::SyncState::Halted.into(),
            held_deletions,
            ..Default::default()
        };
        let workspaces = ids.iter().map(status).collect();
        let report = v1::node_frame::Frame::SyncReport(v1::SyncReport { workspaces });
        v1::NodeFrame { frame: Some(report) }
    };
    session.up.send(report(&ids, 1)).await.unwrap();
    // Only its own: what came of the first report has been told before what comes of this one.
    session.up.send(report(&ids[..1], 0)).await.unwrap();
    let mut heard = Vec::new();
    while heard.last().is_none_or(|(kind, _, _)| kind != "workspace.released") {
        if let Frame::Event(event) = events.message().await.unwrap().unwrap().frame.unwrap()
            && event.kind.starts_with("workspace.")
        {
            heard.push((event.kind, event.workspace, event.workspace_id));
        }
    }
    let own = |kind: &str| (kind.to_owned(), "own".to_owned(), ids[0].clone());
    let expected = ["workspace.hold", "workspace.halted", "workspace.released"].map(own);
    assert_eq!(heard, expected);
    hub.hub.shutdown().await;
}

/// The cursor of the newest event.
async fn until_newest(
    admin: &mut v1::operator_client::OperatorClient<tonic::transport::Channel>,
) -> u64 {
    let mut events = admin.watch_events(from(None)).await.unwrap().into_inner();
    match events.message().await.unwrap().unwrap().frame {
        Some(Frame::Place(cursor)) => cursor,
        other => panic!("no place: {other:?}"),
    }
}

/// In a process of its own, whose memory nobody else uses.
#[test]
fn ten_thousand_followers_that_hang_up_are_forgotten() {
    let mut alone = std::process::Command::new(std::env::current_exe().unwrap());
    alone.args(["--exact", "hub::tests::events::ten_thousand_followers", "--ignored"]);
    let ran = alone.output().unwrap();
    let said = String::from_utf8_lossy(&ran.stdout);
    assert!(ran.status.success() && said.contains("1 passed"), "{said}");
}

#[tokio::test]
#[ignore = "measures the memory of its process; run by the test above"]
async fn ten_thousand_followers() {
    const EACH: usize = 1000;
    let folder = tempfile::tempdir().unwrap();
    let mut config = config(folder.path());
    config.events.subscriptions = 100_000;
    let hub = TestHub { hub: Hub::start(config).await.unwrap(), folder };
    let subscriptions = || hub.hub.events.counters().subscriptions;
    let resident = || {
        let status = std::fs::read_to_string("/proc/self/statm").unwrap();
        status.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4096
    };
    let mut after_each = Vec::new();
    for _ in 0..10 {
        let client = hub.local().await;
        let open = (0..EACH).map(|_| {
            let mut client = client.clone();
            async move {
                let mut events = client.watch_events(from(None)).await.unwrap().into_inner();
                events.message().await.unwrap().unwrap();
                events
            }
        });
        let open = futures_util::future::join_all(open).await;
        assert_eq!(subscriptions(), EACH);
        drop((client, open));
        // The connection is closed with its last user.
        let patience = async {
            while subscriptions() > 0 {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(60), patience).await.expect("they are forgotten");
        after_each.push(resident());
    }
    // The allocator keeps what a thousand take; ten thousand take no more.
    let (early, late) = (after_each[2], after_each[9]);
    assert!(late < early + (16 << 20), "{after_each:?}");
    hub.hub.shutdown().await;
}

#[tokio::test]
async fn an_operator_follows_so_often_and_kinds_that_are_none_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = config(folder.path());
    config.events.subscriptions = 1;
    let hub = TestHub { hub: Hub::start(config).await.unwrap(), folder };
    let mut admin = hub.local().await;
    let _one = admin.watch_events(from(None)).await.unwrap();
    let refused = admin.watch_events(from(None)).await.unwrap_err();
    assert_eq!(word(&refused), "too_many_subscriptions");
    let request = v1::WatchEventsRequest { kinds: vec!["nodes".to_owned()], ..from(None) };
    assert_eq!(word(&admin.watch_events(request).await.unwrap_err()), "invalid_argument");
    hub.hub.shutdown().await;
}

#[tokio::test]
async fn a_revoked_operator_hears_nothing_more() {
    let hub = TestHub::start().await;
    let ann = hub.login("ann", "viewer").await;
    let mut client = hub.operator(&ann).await;
    let mut events = client.watch_events(from(None)).await.unwrap().into_inner();
    assert!(events.message().await.is_ok());
    let revoke = v1::RevokeOperatorRequest { name: "ann".into() };
    hub.local().await.revoke_operator(revoke).await.unwrap();
    let end = loop {
        match events.message().await {
            Ok(frame) => assert!(frame.is_some()),
            Err(status) => break status,
        }
    };
    assert_eq!(word(&end), "operator_revoked");
    hub.hub.shutdown().await;
}

#[tokio::test]
async fn workers_are_listed_and_run_when_asked() {
    let hub = TestHub::start().await;
    let mut admin = hub.local().await;
    let workers = admin.list_workers(v1::ListWorkersRequest {}).await.unwrap().into_inner().workers;
    let names: Vec<&str> = workers.iter().map(|worker| worker.name.as_str()).collect();
    let expected = [
        "audit-anchor",
        "certificate-sweep",
        "history-trim",
        "invite-expiry",
        "log-repeats",
        "mesh-monitor",
        "mirror-cleanup",
        "pack-collection",
        "policy-end",
        "revocations",
    ];
    assert_eq!(names, expected);
    for worker in workers {
        assert!(!worker.purpose.is_empty() && worker.period_ms > 0, "{worker:?}");
        let name = worker.name.clone();
        let ran = admin.run_worker(v1::RunWorkerRequest { name }).await.unwrap().into_inner();
        assert!(ran.runs > 0 && !ran.last_failed && !ran.last_result.is_empty(), "{ran:?}");
    }
    let nobody = v1::RunWorkerRequest { name: "x".repeat(10_000) };
    let refused = admin.run_worker(nobody).await.unwrap_err();
    assert_eq!(word(&refused), "worker_not_found");
    assert!(refused.message().len() < 200);
    hub.hub.shutdown().await;
}
