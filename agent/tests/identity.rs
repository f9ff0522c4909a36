//! The identity of a running agent: renewed, recovered, copied, forked, given up.

#![allow(clippy::unwrap_used)]

mod support;

use std::time::Duration;

use cortex_proto::v1::{self, hub_frame};
use support::{Agent, Ca, Hub, refusal, run, until};

const CALM: Duration = Duration::from_secs(60);
const HOUR_MS: i64 = 3_600_000;

async fn joined(hub: &Hub) -> Agent {
    let agent = Agent::unjoined();
    let output = agent.join(hub, "strict").await;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    agent
}

/// Makes the agent connect again at once.
async fn send_away(session: &support::Session) {
    session.send(hub_frame::Frame::Drain(v1::Drain { reconnect_after_ms: 1 })).await;
}

/// The agent has understood that it has a session.
async fn connected(agent: &Agent) -> serde_json::Value {
    loop {
        let mut command = agent.command();
        command.args(["status", "-o", "json"]);
        let output = run(command).await;
        if let Ok(status) = serde_json::from_slice::<serde_json::Value>(&output.stdout)
            && status["connected"] == true
        {
            return status;
        }
    }
}

fn has_next(agent: &Agent) -> bool {
    agent.path("state/identity/cert.next.pem").exists()
}

#[tokio::test]
async fn certificate_is_renewed_when_the_hub_asks_and_the_old_one_kept_until_it_has_connected() {
    let mut hub = Hub::start(v1::Mode::Strict, CALM).await;
    let mut agent = joined(&hub).await;
    hub.set(|script| script.renew_now = true);
    agent.run();
    let first = hub.session().await;
    assert_eq!(first.hello.generation, 1);
    let asked = hub.seen(|script| script.renewals.first().cloned()).await;
    assert_eq!(asked.generation, 1);
    let machine = asked.machine.unwrap();
    assert_eq!(
        (&machine.boot_id, &machine.machine_id),
        (&first.hello.boot_id, &first.hello.machine_id)
    );
    until(|| has_next(&agent)).await;
    let old = std::fs::read(agent.path("state/identity/cert.pem")).unwrap();
    let shown = agent.json(&["identity", "show"]).await;
    assert_eq!((&shown["generation"], &shown["unproven"]), (&2.into(), &true.into()));

    // The session goes on; the next one is made with the new certificate.
    hub.set(|script| script.renew_now = false);
    send_away(&first).await;
    let second = hub.session().await;
    assert_eq!(second.hello.generation, 2);
    assert_ne!(second.certificate, first.certificate);
    until(|| !has_next(&agent)).await;
    assert_ne!(std::fs::read(agent.path("state/identity/cert.pem")).unwrap(), old);
    assert_eq!(agent.audit("identity.renewed").len(), 1);
    assert_eq!(agent.audit("node.joined").len(), 1);
}

#[tokio::test]
async fn certificate_is_renewed_by_itself_at_half_of_its_life() {
    let mut hub = Hub::start(v1::Mode::Strict, CALM).await;
    // 55 % of this life is over in three seconds at most, and 45 % not before now.
    hub.set(|script| script.life = (-18_000, 22_000));
    let mut agent = joined(&hub).await;
    agent.run();
    let session = hub.session().await;
    assert_eq!(session.hello.generation, 1);
    hub.seen(|script| script.renewals.first().cloned()).await;
}

#[tokio::test]
async fn crash_between_issued_and_stored_is_survived() {
    let mut hub = Hub::start(v1::Mode::Strict, CALM).await;
    let mut agent = joined(&hub).await;
    hub.set(|script| {
        script.renew_now = true;
        // The answer gets lost.
        script.refuse_renewal = Some(tonic::Status::unavailable("lost"));
    });
    agent.run();
    let first = hub.session().await;
    hub.seen(|script| script.renewals.first().cloned()).await;
    agent.kill();
    drop(first);
    assert!(!has_next(&agent));
    hub.set(|script| {
        script.refuse_renewal = None;
        script.generation = 2;
    });
    agent.run();
    // It presents what it has, and gets what comes after what the hub has.
    let session = hub.session().await;
    assert_eq!(session.hello.generation, 1);
    until(|| has_next(&agent)).await;
    hub.set(|script| script.renew_now = false);
    agent.kill();
    drop(session);
    // A crash between stored and connected. (What the first agent asked for just before its end may
    // have been issued as well, and is one more that was never stored.)
    let stored = agent.json(&["identity", "show"]).await["generation"].as_u64().unwrap();
    assert!(stored >= 3, "{stored}");
    agent.run();
    let session = hub.session().await;
    assert_eq!(session.hello.generation, stored);
    until(|| !has_next(&agent)).await;
}

#[tokio::test]
async fn expired_certificate_is_recovered_with_the_same_key_and_without_a_certificate() {
    let mut hub = Hub::start(v1::Mode::Strict, CALM).await;
    hub.set(|script| script.life = (-2 * HOUR_MS, -HOUR_MS));
    let mut agent = joined(&hub).await;
    let key = std::fs::read(agent.path("state/identity/key.pem")).unwrap();
    agent.run();
    let session = hub.session().await;
    assert_eq!(session.hello.generation, 2);
    hub.set(|script| {
        assert_eq!(script.recoveries.len(), 1);
        assert_eq!(script.recoveries[0].generation, 1);
        assert_eq!(script.recoveries[0].node_id, script.node_id.as_bytes().as_slice());
        assert_eq!(script.joins.len(), 1);
    });
    assert_eq!(std::fs::read(agent.path("state/identity/key.pem")).unwrap(), key);
    assert_eq!(agent.audit("identity.renewed")[0]["recovered"], true);
}

#[tokio::test]
async fn refused_new_certificate_gives_way_to_the_old_one_and_is_replaced_at_once() {
    let mut hub = Hub::start(v1::Mode::Strict, CALM).await;
    let mut agent = joined(&hub).await;
    let stranger = std::sync::Arc::new(Ca::of(hub.ca.mesh));
    hub.set(|script| {
        script.renew_now = true;
        script.issuer = Some(stranger);
    });
    agent.run();
    let first = hub.session().await;
    until(|| has_next(&agent)).await;
    hub.set(|script| {
        script.renew_now = false;
        script.issuer = None;
    });
    send_away(&first).await;
    let second = hub.session().await;
    assert_eq!((second.hello.generation, &second.certificate), (1, &first.certificate));
    let renewals =
        hub.seen(|script| (script.renewals.len() == 2).then(|| script.renewals.clone())).await;
    assert_eq!(renewals[1].generation, 2, "the newest that was stored");
    until(|| agent.audit("identity.renewed").len() == 2).await;
    send_away(&second).await;
    let third = hub.session().await;
    assert_eq!(third.hello.generation, 3);
    until(|| !has_next(&agent)).await;
    hub.set(|script| assert!(script.recoveries.is_empty()));
}

#[tokio::test]
async fn copied_identity_is_refused_named_and_no_longer_tried_often() {
    let mut hub = Hub::start(v1::Mode::Strict, CALM).await;
    let mut agent = joined(&hub).await;
    hub.set(|script| {
        script.refuse_session =
            Some(refusal("identity_cloned", "node n1 is also on other-host (machine id m2)"));
    });
    agent.run();
    until(|| !agent.audit("identity.cloned").is_empty()).await;
    let status = agent.json(&["status"]).await;
    let problem = status["link_problem"].as_str().unwrap();
    let own = agent.json(&["identity", "show"]).await;
    for part in
        ["other-host", "m2", own["hostname"].as_str().unwrap(), "cortex-agent identity fork"]
    {
        assert!(problem.contains(part), "{part} is not in {problem}");
    }
    let wait_ms = status["next_attempt_ms"].as_i64().unwrap() - support::now_ms();
    assert!(wait_ms > 10 * 60 * 1000, "{wait_ms}");

    // The way out: an identity of its own. Not under the feet of the agent that runs.
    let fork = |agent: &Agent| {
        let mut command = agent.command();
        command.args(["identity", "fork", "--name", "n2", "-o", "json", "--token-file"]);
        command.arg(agent.token());
        command
    };
    assert_eq!(run(fork(&agent)).await.status.code(), Some(7));
    agent.kill();
    let old_key = std::fs::read(agent.path("state/identity/key.pem")).unwrap();
    let output = run(fork(&agent)).await;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let forked: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(forked["old_node_id"], own["node_id"]);
    assert_ne!(forked["node_id"], own["node_id"]);
    let kept = std::path::Path::new(forked["old_identity"].as_str().unwrap());
    assert_eq!(std::fs::read(kept.join("key.pem")).unwrap(), old_key);
    assert_ne!(std::fs::read(agent.path("state/identity/key.pem")).unwrap(), old_key);
    assert_eq!(agent.audit("identity.forked").len(), 1);

    hub.set(|script| script.refuse_session = None);
    agent.run();
    let session = hub.session().await;
    assert_eq!(session.hello.generation, 1);
}

#[tokio::test]
async fn copy_is_also_noticed_when_renewing_and_the_session_goes_on() {
    let mut hub = Hub::start(v1::Mode::Strict, CALM).await;
    let mut agent = joined(&hub).await;
    hub.set(|script| {
        script.renew_now = true;
        script.refuse_renewal = Some(refusal("identity_cloned", "two machines"));
    });
    agent.run();
    let _session = hub.session().await;
    until(|| !agent.audit("identity.cloned").is_empty()).await;
    let status = connected(&agent).await;
    assert!(status["identity_problem"].as_str().unwrap().contains("two machines"), "{status}");
    hub.set(|script| assert_eq!(script.renewals.len(), 1));
}

#[tokio::test]
async fn authority_of_the_hub_is_replaced_by_way_of_trusting_both() {
    let mut hub = Hub::start(v1::Mode::Strict, CALM).await;
    let next = Ca::of(hub.ca.mesh);
    hub.set(|script| script.trusted = vec![hub.ca.der(), next.der()]);
    let agent = Agent::joined(&hub, "strict").await;
    let session = hub.session().await;
    until(|| agent.audit("hub.authorities").len() == 1).await;
    let shown = agent.json(&["identity", "show"]).await;
    assert_eq!(shown["authorities"].as_array().unwrap().len(), 2);

    // The hub shows the next one's certificate, and names only that one.
    hub.show_as(&next);
    hub.set(|script| script.trusted = vec![next.der()]);
    send_away(&session).await;
    let session = hub.session().await;
    until(|| agent.audit("hub.authorities").len() == 2).await;

    // A list without any known authority is not believed.
    hub.set(|script| script.trusted = vec![Ca::of(next.mesh).der()]);
    send_away(&session).await;
    let _session = hub.session().await;
    until(|| agent.audit("hub.authorities").len() == 3).await;
    assert_eq!(agent.audit("hub.authorities")[2]["accepted"], false);
    let shown = agent.json(&["identity", "show"]).await;
    assert_eq!(shown["authorities"], serde_json::json!([next.pin().to_string()]));
}

#[tokio::test]
async fn clock_that_is_wrong_is_measured_and_told() {
    let mut hub = Hub::start(v1::Mode::Strict, CALM).await;
    hub.set(|script| script.clock_ahead_ms = 2 * HOUR_MS);
    let agent = Agent::joined(&hub, "strict").await;
    let _session = hub.session().await;
    let status = connected(&agent).await;
    let skew_ms = status["clock_skew_ms"].as_i64().unwrap();
    assert!((skew_ms - 2 * HOUR_MS).abs() < 5_000, "{skew_ms}");
}

#[tokio::test]
async fn owner_renews_with_the_agent_running_and_without_it() {
    let mut hub = Hub::start(v1::Mode::Strict, CALM).await;
    let mut agent = Agent::joined(&hub, "strict").await;
    let _session = hub.session().await;
    connected(&agent).await;
    let renewed = agent.json(&["identity", "renew"]).await;
    assert_eq!(renewed["generation"], 2);
    agent.kill();
    assert_eq!(agent.json(&["identity", "renew"]).await["generation"], 3);
    assert_eq!(agent.json(&["identity", "recover"]).await["generation"], 4);
    hub.set(|script| script.refuse_recovery = Some(refusal("recovery_expired", "too late")));
    let mut command = agent.command();
    command.args(["identity", "recover"]);
    let output = run(command).await;
    assert_eq!(output.status.code(), Some(5));
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(text.contains("too late") && text.contains("identity fork"), "{text}");
}

#[tokio::test]
async fn leaving_tells_the_hub_ends_the_agent_and_keeps_the_old_identity() {
    let mut hub = Hub::start(v1::Mode::Strict, CALM).await;
    let mut agent = Agent::joined(&hub, "strict").await;
    let _session = hub.session().await;
    connected(&agent).await;
    let left = agent.json(&["leave"]).await;
    assert_eq!(left["hub_told"], true);
    hub.set(|script| assert_eq!(script.leaves, 1));
    assert!(agent.end_of_daemon().await.success());
    let kept = left["old_identity"].as_str().unwrap();
    assert!(std::path::Path::new(kept).join("key.pem").exists());
    assert_eq!(agent.audit("node.left").len(), 1);
    let mut status = agent.command();
    status.args(["identity", "show"]);
    assert_eq!(run(status).await.status.code(), Some(4));
    // The machine can join again, as another node.
    assert!(agent.join(&hub, "strict").await.status.success());
    assert_ne!(agent.json(&["identity", "show"]).await["node_id"], left["node_id"]);
}

#[tokio::test]
async fn leaving_without_a_hub_warns_and_purging_deletes_the_keys_only() {
    let hub = Hub::start(v1::Mode::Strict, CALM).await;
    let agent = joined(&hub).await;
    hub.set(|script| script.refuse_leaving = Some(tonic::Status::unavailable("gone")));
    std::fs::create_dir_all(agent.path("workspaces/w")).unwrap();
    let mut command = agent.command();
    command.args(["leave", "--purge"]);
    let output = run(command).await;
    assert!(output.status.success());
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        text.contains("could not be told: gone") && text.contains("cortex-agent node revoke "),
        "{text}"
    );
    let left: Vec<_> = std::fs::read_dir(agent.path("state"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| !name.ends_with(".lock"))
        .collect();
    assert_eq!(left, ["audit.jsonl"]);
    assert!(agent.path("workspaces/w").exists());
    assert_eq!(agent.audit("node.left")[0]["hub_told"], false);
}
