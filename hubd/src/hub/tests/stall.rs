//! A store that stalls delays nobody who does not need it.

use std::time::Duration;

use cortex_proto::v1;
use tokio::time::timeout;
use tonic::Code;

use super::joining::retry_after_ms;
use super::support::{TestHub, script, word};
use super::*;
use crate::store::fault::{Fault, FaultStore, Faults};

/// A hang, which this only ends.
const HANG: Duration = Duration::from_secs(30);

/// A hub with two places for joins, on a store that does as it is told.
async fn hub(change: impl FnOnce(&mut HubConfig)) -> (TestHub, Faults) {
    let folder = tempfile::tempdir().unwrap();
    let mut config = HubConfig {
        join_queue: 2,
        join_deadline: Duration::from_millis(300),
        join_rate: None,
        ..config(folder.path())
    };
    change(&mut config);
    let faults = Faults::default();
    let handle = faults.clone();
    let hub = Hub::start_on(config, |store| Arc::new(FaultStore::new(store, handle))).await;
    (TestHub { hub: hub.unwrap(), folder }, faults)
}

async fn uses(hub: &TestHub) -> Vec<u32> {
    let invites = hub.hub.store.invites().await.unwrap();
    let mut uses: Vec<_> = invites.iter().map(|invite| invite.uses).collect();
    uses.sort_unstable();
    uses
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_the_store_stalls_only_those_who_need_it_wait() {
    let (hub, faults) = hub(|_| {}).await;
    let node = hub.join("box", &[]).await;
    let mut session = node.connect(&hub).await.unwrap();
    let other = hub.join("other", &[]).await;
    let mut admin = hub.local().await;
    let token = hub.invite(v1::CreateInviteRequest { uses: 9, ..Default::default() }).await;
    let mut running = hub.exec(&mut admin, "box", script()).await.unwrap();
    let task = session.attach_task().await;

    faults.set(Fault::Stall);
    let joining = [hub.begin_join(&token).await, hub.begin_join(&token).await];
    faults.until_held("redeem_node", 2).await;
    let all = async {
        // Heartbeats are answered.
        session.heartbeat().await;
        // Output streams, to whoever reads it.
        for offset in 0..3 {
            task.output(offset, b"x").await;
            running.reads(offset, b"x").await;
        }
        // A node with a certificate reconnects over a new connection, and the old one's successor too.
        let mut reconnected = other.connect(&hub).await.unwrap();
        reconnected.heartbeat().await;
        // Operators look.
        let nodes = admin.list_nodes(v1::ListNodesRequest::default()).await.unwrap();
        assert_eq!(nodes.into_inner().nodes.iter().filter(|n| n.online).count(), 2);
        // A third join is told at once to come back.
        let busy = hub.begin_join(&token).await.first().await.unwrap_err();
        assert_eq!((word(&busy), busy.code()), ("busy", Code::ResourceExhausted));
        assert!((500..3000).contains(&retry_after_ms(&busy)));
    };
    timeout(HANG, all).await.expect("nobody waits for the store");
    // Those that have a place are told at their deadline.
    let mut joining_again = Vec::new();
    for mut attempt in joining {
        let slow = timeout(HANG, attempt.first()).await.unwrap().unwrap_err();
        assert_eq!((word(&slow), slow.code()), ("store_slow", Code::Unavailable));
        assert_eq!(retry_after_ms(&slow), 2000);
        joining_again.push(attempt);
    }
    session.heartbeat().await;

    faults.set(Fault::None);
    let mut ids = Vec::new();
    for attempt in &joining_again {
        ids.push(attempt.again_until_joined().await.node_id);
    }
    ids.dedup();
    assert_eq!(ids.len(), 2);
    assert_eq!(uses(&hub).await, [1, 1, 2], "a repetition uses nothing up");
    let nodes = hub.hub.store.nodes().await.unwrap();
    assert_eq!(nodes.len(), 4);
    task.exit().await;
    assert_eq!(running.end().await.unwrap().verdict(), v1::TaskVerdict::Exited);
    hub.hub.shutdown().await;
}

#[tokio::test]
async fn a_join_whose_answer_was_late_is_found_again_by_its_key() {
    let (hub, faults) = hub(|_| {}).await;
    let token = hub.invite(v1::CreateInviteRequest::default()).await;
    // It is redeemed, but nobody hears of it.
    faults.set(Fault::StallAnswers);
    let mut attempt = hub.begin_join(&token).await;
    let slow = timeout(HANG, attempt.first()).await.unwrap().unwrap_err();
    assert_eq!(word(&slow), "store_slow");
    faults.set(Fault::None);
    let joined = attempt.again_until_joined().await;
    let nodes = hub.hub.store.nodes().await.unwrap();
    assert_eq!(nodes.len(), 1);
    assert_eq!(nodes[0].id.as_bytes().as_slice(), &joined.node_id[..]);
    assert_eq!(uses(&hub).await, [1]);
    let used_up = hub.begin_join(&token).await.first().await.unwrap_err();
    assert_eq!(word(&used_up), "invite_used_up");
    hub.hub.shutdown().await;
}

#[tokio::test]
async fn a_join_whose_caller_hung_up_is_finished() {
    let (hub, faults) = hub(|config| config.join_deadline = HANG).await;
    let token = hub.invite(v1::CreateInviteRequest::default()).await;
    faults.set(Fault::Stall);
    let attempt = hub.begin_join(&token).await;
    faults.until_held("redeem_node", 1).await;
    let request = attempt.hang_up().await;
    let mut changes = hub.hub.registry.changes();
    changes.mark_unchanged();
    faults.set(Fault::None);
    // Nobody has asked again yet.
    timeout(HANG, changes.changed()).await.expect("the join goes on").unwrap();
    assert_eq!(hub.hub.store.nodes().await.unwrap().len(), 1);
    let joined = hub.join_again(request).await.again_until_joined().await;
    assert_eq!(uses(&hub).await, [1]);
    assert_eq!(hub.hub.store.nodes().await.unwrap().len(), 1);
    assert_eq!(joined.generation, 1);
    hub.hub.shutdown().await;
}

#[tokio::test]
async fn a_command_that_is_not_journalled_in_time_is_refused_and_never_begun() {
    let deadline = Duration::from_millis(200);
    let (hub, faults) = hub(|config| {
        config.accept_deadline = deadline;
        // What runs ends with the hub.
        config.resume_grace = Duration::ZERO;
    })
    .await;
    let node = hub.join("box", &[]).await;
    let mut session = node.connect(&hub).await.unwrap();
    let mut admin = hub.local().await;
    faults.set(Fault::Stall);
    let refused = timeout(HANG, hub.exec(&mut admin, "box", script())).await.unwrap();
    let refused = refused.err().unwrap();
    assert_eq!((word(&refused), retry_after_ms(&refused)), ("store_slow", 2000));
    faults.set(Fault::None);
    // The next one is the first that the node hears of.
    let running = hub.exec(&mut admin, "box", script()).await.unwrap();
    assert_eq!(session.start_task().await.task_id, running.task_id);
    let TestHub { hub, folder } = hub;
    hub.shutdown().await;
    let data = HubData::open(&config(folder.path())).await.unwrap();
    let lines = data.store.audit_page(None, 100).await.unwrap();
    let of = |action: &str| lines.iter().filter(|l| l.action == action).collect::<Vec<_>>();
    assert_eq!((of("task.accepted").len(), of("task.ended").len()), (2, 2));
    assert!(of("task.ended")[0].detail.contains("was not begun"), "{:?}", of("task.ended"));
    data.close().await;
}

#[tokio::test]
async fn a_hub_that_drains_tells_how_the_last_command_ended_before_it_stops() {
    let (hub, faults) = hub(|_| {}).await;
    let node = hub.join("box", &[]).await;
    let mut session = node.connect(&hub).await.unwrap();
    let mut admin = hub.local().await;
    let running = hub.exec(&mut admin, "box", script()).await.unwrap();
    let task = session.attach_task().await;
    faults.set(Fault::Stall);
    task.exit().await;
    faults.until_held("end_task", 1).await;
    hub.hub.relay.draining().begin(HANG);
    let mut drained = Box::pin(hub.hub.drained());
    assert!(futures_util::poll!(&mut drained).is_pending(), "its verdict is not in the journal");
    faults.set(Fault::None);
    timeout(HANG, drained).await.unwrap();
    let ((), end) = tokio::join!(hub.hub.shutdown(), running.end());
    assert_eq!(end.unwrap().verdict(), v1::TaskVerdict::Exited);
}

#[tokio::test]
async fn a_store_that_fails_or_is_slow_says_so_and_recovers() {
    let (hub, faults) = hub(|config| config.join_deadline = HANG).await;
    let token = hub.invite(v1::CreateInviteRequest::default()).await;
    faults.set(Fault::Fail);
    let mut attempt = hub.begin_join(&token).await;
    let failed = attempt.first().await.unwrap_err();
    assert_eq!(word(&failed), "internal");
    assert!(!failed.message().contains("fault"), "internals stay inside: {failed}");
    faults.set(Fault::Slow(Duration::from_millis(20)));
    attempt.again_until_joined().await;
    assert_eq!(uses(&hub).await, [1]);
    hub.hub.shutdown().await;
}

#[tokio::test]
async fn what_is_withdrawn_from_a_node_is_in_force_while_the_store_stalls() {
    let (hub, faults) = hub(|_| {}).await;
    let node = hub.join("box", &[]).await;
    let mut session = node.connect(&hub).await.unwrap();
    let mut admin = hub.local().await;
    let policy = |mode: v1::Mode| v1::SetNodePolicyRequest {
        node: "box".into(),
        mode: mode.into(),
        reason: "x".into(),
        for_ms: 0,
        ..Default::default()
    };
    let cordon = |cordoned| v1::CordonNodeRequest { node: "box".into(), cordoned };
    admin.set_node_policy(policy(v1::Mode::Permissive)).await.unwrap();
    assert_eq!(session.policy().await.policy(), v1::Mode::Permissive);
    faults.set(Fault::Stall);
    // A decision that gives something waits, and others behind it.
    let calls = TaskScope::new();
    let call = |method: &'static str, request: v1::SetNodePolicyRequest| {
        let mut admin = admin.clone();
        calls.spawn(method, async move { drop(admin.set_node_policy(request).await.unwrap()) });
    };
    call("permissive", policy(v1::Mode::Permissive));
    faults.until_held("set_node_policy", 1).await;
    call("strict", policy(v1::Mode::Strict));
    let told = timeout(HANG, session.policy()).await.expect("the node hears of it at once");
    assert_eq!(told.policy(), v1::Mode::Strict);
    let mut changes = hub.hub.registry.changes();
    changes.mark_unchanged();
    let mut again = admin.clone();
    calls.spawn("cordon", async move { drop(again.cordon_node(cordon(true)).await.unwrap()) });
    let view = || hub.hub.registry.get(node.id).unwrap().node;
    while !view().cordoned {
        timeout(HANG, changes.changed()).await.expect("it is in force at once").unwrap();
    }
    faults.set(Fault::None);
    calls.finish().await;
    assert_eq!(view().policy.bound.mode, cortex_shared::policy::Mode::Strict);
    let stored = hub.hub.store.nodes().await.unwrap().remove(0);
    assert_eq!((stored.policy.bound.mode, stored.cordoned), (view().policy.bound.mode, true));
    // The one that was decided before was not told after it.
    let beat = v1::node_frame::Frame::Heartbeat(v1::Heartbeat {});
    session.up.send(v1::NodeFrame { frame: Some(beat) }).await.unwrap();
    let next = session.until(|frame| match frame {
        hub_frame::Frame::Policy(_) => Some("policy"),
        hub_frame::Frame::Heartbeat(_) => Some("heartbeat"),
        _ => None,
    });
    assert_eq!(next.await, Some("heartbeat"));
    admin.cordon_node(cordon(false)).await.unwrap();
    assert!(!view().cordoned);
    hub.hub.shutdown().await;
}

#[tokio::test]
async fn a_verdict_that_the_store_did_not_take_is_recorded_when_it_works_again() {
    let (hub, faults) = hub(|_| {}).await;
    let node = hub.join("box", &[]).await;
    let mut session = node.connect(&hub).await.unwrap();
    let mut admin = hub.local().await;
    let running = hub.exec(&mut admin, "box", script()).await.unwrap();
    let task = session.attach_task().await;
    faults.set(Fault::Fail);
    task.exit().await;
    assert_eq!(word(&running.end().await.unwrap_err()), "verdict_not_recorded");
    faults.set(Fault::None);
    let ended = async {
        loop {
            let lines = hub.hub.store.audit_page(None, 100).await.unwrap();
            if let Some(line) = lines.into_iter().find(|line| line.action == "task.ended") {
                return line;
            }
        }
    };
    let line = timeout(HANG, ended).await.expect("it is offered again");
    assert!(line.detail.contains(r#""verdict":"exited""#), "{}", line.detail);
    hub.hub.shutdown().await;
}
