//! Certificates over real connections: renewed, recovered, copied, given up.

use std::collections::BTreeSet;

use cortex_proto::v1;
use cortex_proto::v1::enroll_client::EnrollClient;
use cortex_proto::v1::node_client::NodeClient;
use cortex_proto::v1::sync_client::SyncClient;
use cortex_shared::secret::InviteToken;
use tonic::{Code, Status};

use super::authority::{audit, line};
use super::support::{Login, TestHub, TestNode, machine, request, script, word};
use super::*;
use crate::enroll::validator::RECOVERY_WINDOW;
use crate::store::{Caller, Facts, InviteKind, Machine, NewCertificate, NewInvite, NodeRedemption};

async fn shown(hub: &TestHub, name: &str) -> v1::NodeInfo {
    let request = v1::ListNodesRequest { selector: name.into() };
    hub.local().await.list_nodes(request).await.unwrap().into_inner().nodes.remove(0)
}

/// Lines of this action in the audit log; waits until there are so many.
async fn lines_of(hub: &TestHub, action: &str, count: usize) -> Vec<serde_json::Value> {
    let waiting = async {
        loop {
            let lines = audit(hub).await.1;
            let lines = lines.iter().filter(|line| line.action == action);
            let found: Vec<_> =
                lines.map(|line| serde_json::from_str(&line.detail).unwrap()).collect();
            if found.len() >= count {
                return found;
            }
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), waiting).await.expect("it is written down")
}

#[tokio::test]
async fn each_row_of_the_table_of_generations_over_the_wire() {
    let hub = TestHub::start().await;
    let first = hub.join("box", &[]).await;
    let joined = first.connect(&hub).await.unwrap();
    assert!(!joined.welcome.renew_now);
    assert_eq!(joined.welcome.trusted_cas_der, [hub.authority().to_vec()]);
    let second = first.renew(&hub).await.unwrap();
    assert_eq!((first.generation, second.generation), (1, 2));
    let copy = first.copied_to("elsewhere");

    // The newest has not connected: its answer may have been lost.
    let taken = copy.connect(&hub).await.unwrap();
    assert!(taken.welcome.renew_now, "what it has is not what was recorded");
    // The newest; from now on it counts.
    let session = second.connect(&hub).await.unwrap();
    assert!(!session.welcome.renew_now);
    assert!(session.welcome.epoch > taken.welcome.epoch);
    // One before, on the machine that the newest was issued to.
    assert!(first.connect(&hub).await.unwrap().welcome.renew_now);
    let session = second.connect(&hub).await.unwrap();
    // One before, on another machine; and what it says of its generation counts for nothing.
    for liar in [copy.clone(), TestNode { generation: 7, ..copy.clone() }] {
        let refused = liar.connect(&hub).await.err().unwrap();
        assert_eq!(word(&refused), "identity_cloned");
        for part in ["\"box\"", "host-box", "boot-box", "host-elsewhere", "id-elsewhere"] {
            assert!(refused.message().contains(part), "{part} is not in {}", refused.message());
        }
    }
    let info = shown(&hub, "box").await;
    assert_eq!(info.session_epoch, session.welcome.epoch, "the session goes on");
    assert_eq!((info.generation, info.machine), (2, Some(machine("box"))));
    assert!(info.remote_address.starts_with("127.0.0.1:"), "{}", info.remote_address);
    assert!(info.certificate_not_after_ms > unix_ms());
    let clone = info.clone.unwrap();
    assert_eq!(clone.machine, Some(machine("elsewhere")));
    assert_eq!((clone.presented_generation, clone.current_generation), (1, 2));
    let recorded = lines_of(&hub, "node.clone_suspected", 1).await;
    assert_eq!(recorded.len(), 1, "the second attempt says nothing new");
    assert_eq!(recorded[0]["refused"]["machine"]["hostname"], "host-elsewhere");
    assert_eq!(recorded[0]["kept"]["machine"]["hostname"], "host-box");

    // Nor does the copy get anything else by its certificate, which is valid still.
    let cloned = |status: Status| assert_eq!(word(&status), "identity_cloned", "{status:?}");
    cloned(copy.renew(&hub).await.err().unwrap());
    cloned(copy.recover(&hub).await.err().unwrap());
    let channel = hub.channel(Some(&copy.login)).await.unwrap();
    let mut node = NodeClient::new(channel.clone());
    cloned(node.leave(v1::LeaveRequest {}).await.unwrap_err());
    let attach = v1::RequestAttachRequest { workspace: "w".into() };
    cloned(node.request_attach(attach.clone()).await.unwrap_err());
    let task = v1::TaskIoUp { frame: None };
    cloned(node.task_io(tokio_stream::once(task)).await.unwrap_err());
    cloned(SyncClient::new(channel).head(v1::HeadRequest::default()).await.unwrap_err());
    let refused = session.client.clone().request_attach(attach).await.unwrap_err();
    assert_eq!(word(&refused), "not_a_member", "the original is let in");

    // All of it holds after a restart.
    let hub = hub.restart().await;
    assert_eq!(shown(&hub, "box").await.clone.unwrap().machine, Some(machine("elsewhere")));
    cloned(copy.connect(&hub).await.err().unwrap());
    second.connect(&hub).await.unwrap();
    // Two before.
    let third = second.renew(&hub).await.unwrap();
    third.connect(&hub).await.unwrap();
    cloned(first.connect(&hub).await.err().unwrap());
    // Ahead, as after a restored database: what was signed is taken at its word.
    let ahead = TestNode { generation: 8, ..third };
    assert_eq!(ahead.renew(&hub).await.unwrap().generation, 9);
    let plausible = TestNode { generation: u64::MAX, ..ahead };
    cloned(plausible.renew(&hub).await.err().unwrap());
    hub.hub.shutdown().await;
}

#[tokio::test]
async fn a_crash_between_issued_and_stored_is_survived_any_number_of_times() {
    let hub = TestHub::start().await;
    let stored = hub.join("box", &[]).await;
    stored.connect(&hub).await.unwrap();
    for _ in 0..3 {
        assert_eq!(stored.renew(&hub).await.unwrap().generation, 2, "the answer is lost");
        assert!(stored.connect(&hub).await.unwrap().welcome.renew_now);
    }
    let hub = hub.restart().await;
    // The hub crashed with it, and the machine was started again.
    let stored = stored.copied_to("box-after-boot");
    stored.connect(&hub).await.unwrap();
    let next = stored.renew(&hub).await.unwrap();
    assert_eq!(next.generation, 2);
    assert!(!next.connect(&hub).await.unwrap().welcome.renew_now);
    let renewed = lines_of(&hub, "node.renewed", 4).await;
    assert!(renewed.iter().all(|line| line["generation"] == 2), "{renewed:?}");
    hub.hub.shutdown().await;
}

#[tokio::test]
async fn machines_that_take_the_session_from_each_other_in_turns_are_found() {
    let hub = TestHub::start().await;
    let one = hub.join("box", &[]).await;
    let other = one.copied_to("elsewhere");
    let mut sessions = Vec::new();
    for node in [&one, &other, &one, &other] {
        sessions.push(node.connect(&hub).await.unwrap());
    }
    let refused = one.connect(&hub).await.err().unwrap();
    assert_eq!(word(&refused), "identity_cloned");
    let info = shown(&hub, "box").await;
    assert!(info.online);
    assert_eq!(info.machine, Some(machine("elsewhere")), "whoever has it keeps it");
    assert_eq!(info.clone.unwrap().machine, Some(machine("box")));
    lines_of(&hub, "node.clone_suspected", 1).await;
    hub.hub.shutdown().await;
}

/// A node that joined so long ago, whose certificate ended a day later; it was not seen since.
async fn absent(hub: &TestHub, ago: Duration) -> TestNode {
    const DAY_MS: i64 = 24 * 3600 * 1000;
    let then = unix_ms() - i64::try_from(ago.as_millis()).unwrap() - DAY_MS;
    let (token, (key, csr)) = (InviteToken::generate(), request());
    let store = &hub.hub.store;
    let invite = NewInvite {
        id: token.id().clone(),
        secret_hash: token.secret_hash(),
        kind: InviteKind::Node,
        max_uses: 1,
        expires_at_ms: then + 1,
        created_at_ms: then,
        created_by: "test".into(),
        labels: Default::default(),
        name_pattern: String::new(),
        workspaces: BTreeSet::new(),
        sources: BTreeSet::new(),
        owner: String::new(),
        scope: Default::default(),
    };
    let by = crate::store::Actor::hub().audit(then, "invite.created", "x", serde_json::json!({}));
    store.create_invite(invite, by).await.unwrap();
    let certificate = crate::enroll::ca::CertificateRequest::parse(&csr).unwrap();
    let redemption = NodeRedemption {
        invite: token.id().clone(),
        secret_hash: token.secret_hash(),
        key: certificate.key_hash(),
        new_id: NodeId::new(),
        wanted_name: String::new(),
        labels: Default::default(),
        ceiling: Bound::LEAST,
        facts: Facts { hostname: "absent".into(), ..Facts::default() },
        machine: Machine { boot_id: "boot-absent".into(), ..Machine::default() },
        certificate: NewCertificate { not_after_ms: then + DAY_MS, authority: [0; 32] },
        caller: Caller { address: None },
        now_ms: then,
    };
    let node = store.redeem_node(redemption).await.unwrap().unwrap();
    let login = Login { chain: Vec::new(), key };
    TestNode { id: node.id, login, generation: 1, machine: machine("absent"), clock_behind_ms: 0 }
}

#[tokio::test]
async fn a_key_alone_is_good_for_thirty_days_after_its_last_certificate() {
    let hub = TestHub::start().await;
    let minute = Duration::from_secs(60);
    let (late, too_late) = (
        absent(&hub, RECOVERY_WINDOW - minute).await,
        absent(&hub, RECOVERY_WINDOW + minute).await,
    );
    // The hub takes in what the store has.
    let hub = hub.restart().await;
    let certified = hub.join("box", &[]).await;
    let refused = too_late.recover(&hub).await.err().unwrap();
    assert_eq!((refused.code(), word(&refused)), (Code::FailedPrecondition, "recovery_expired"));
    let recovered = late.recover(&hub).await.unwrap();
    assert_eq!(recovered.generation, 2);
    let session = recovered.connect(&hub).await.unwrap();
    assert!(!session.welcome.renew_now);
    let lines = lines_of(&hub, "node.recovered", 1).await;
    assert_eq!(lines[0]["node_id"], late.id.to_string());

    // Another's key, and a node that nobody knows: the same answer.
    let thief = TestNode { login: Login { chain: Vec::new(), key: request().0 }, ..late.clone() };
    assert_eq!(word(&thief.recover(&hub).await.err().unwrap()), "node_unknown");
    let nobody = TestNode { id: NodeId::new(), ..late.clone() };
    assert_eq!(word(&nobody.recover(&hub).await.err().unwrap()), "node_unknown");
    let revoke = v1::RevokeNodeRequest { node: recovered.id.to_string(), reason: String::new() };
    hub.local().await.revoke_node(revoke).await.unwrap();
    assert_eq!(word(&recovered.recover(&hub).await.err().unwrap()), "node_revoked");
    assert_eq!(word(&thief.recover(&hub).await.err().unwrap()), "node_unknown");
    assert_eq!(word(&recovered.renew(&hub).await.err().unwrap()), "node_revoked");

    // Who asks too often waits, before anything is looked at.
    let mut enroll = EnrollClient::new(hub.channel(None).await.unwrap());
    let limited = loop {
        let refused = enroll.recover_node(v1::RecoverNodeRequest::default()).await.unwrap_err();
        if refused.code() == Code::ResourceExhausted {
            break refused;
        }
    };
    assert_eq!(word(&limited), "rate_limited");
    // A node with a certificate does not.
    certified.renew(&hub).await.unwrap();
    hub.hub.shutdown().await;
}

#[tokio::test]
async fn a_node_that_recovers_in_a_loop_has_to_wait_and_strangers_use_nothing_of_it_up() {
    let hub = TestHub::start().await;
    let node = hub.join("box", &[]).await;
    let thief = TestNode { login: Login { chain: Vec::new(), key: request().0 }, ..node.clone() };
    for _ in 0..4 {
        assert_eq!(word(&thief.recover(&hub).await.err().unwrap()), "node_unknown");
    }
    for _ in 0..8 {
        node.recover(&hub).await.unwrap();
    }
    let refused = node.recover(&hub).await.err().unwrap();
    assert_eq!(word(&refused), "rate_limited");
    // By a certificate it is the same allowance.
    assert_eq!(word(&node.renew(&hub).await.err().unwrap()), "rate_limited");
    let lines = audit(&hub).await.1;
    assert_eq!(lines.iter().filter(|line| line.action == "node.recovered").count(), 8);
    hub.hub.shutdown().await;
}

#[tokio::test]
async fn a_node_that_leaves_is_revoked_by_itself() {
    let hub = TestHub::start().await;
    let (node, stays) = (hub.join("box", &[]).await, hub.join("stays", &[]).await);
    let mut session = node.connect(&hub).await.unwrap();
    let _stays = stays.connect(&hub).await.unwrap();
    let mut admin = hub.local().await;
    let running = hub.exec(&mut admin, "box", script()).await.unwrap();
    session.start_task().await;
    session.client.leave(v1::LeaveRequest {}).await.unwrap();
    let exit = running.end().await.unwrap();
    assert_eq!(exit.verdict(), v1::TaskVerdict::Cancelled);
    assert!(exit.reason.contains("left the mesh"), "{}", exit.reason);
    while session.next().await.is_ok_and(|frame| frame.is_some()) {}
    assert!(shown(&hub, "box").await.revoked_at_ms > 0);
    assert!(shown(&hub, "stays").await.online);
    let refused =
        |outcome: Result<_, Status>| assert_eq!(word(&outcome.err().unwrap()), "node_revoked");
    refused(node.connect(&hub).await.map(drop));
    refused(node.renew(&hub).await.map(drop));
    refused(node.recover(&hub).await.map(drop));
    let hub = hub.restart().await;
    refused(node.connect(&hub).await.map(drop));
    assert!(audit(&hub).await.0.contains(&line("node:box", "node.left", "box")));
    hub.hub.shutdown().await;
}

#[tokio::test]
async fn a_clock_that_is_wrong_is_measured() {
    let hub = TestHub::start().await;
    const HOUR_MS: i64 = 3_600_000;
    let node = hub.join("box", &[]).await;
    for behind in [2 * HOUR_MS, -2 * HOUR_MS, i64::MAX / 2] {
        let _session =
            TestNode { clock_behind_ms: behind, ..node.clone() }.connect(&hub).await.unwrap();
        let skew_ms = shown(&hub, "box").await.clock_skew_ms;
        assert!((skew_ms - behind).abs() < 10_000, "{skew_ms} for {behind}");
    }
    hub.hub.shutdown().await;
}
