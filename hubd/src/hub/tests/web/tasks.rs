//! Commands over HTTP.

use super::stream::Follower;
use super::*;
use crate::hub::tests::support::TestNode;

/// A hub with a node of this name that is connected.
async fn hub_with_node(name: &str) -> (TestHub, TestNode) {
    let hub = TestHub::start().await;
    let node = hub.join(name, &[]).await;
    (hub, node)
}

async fn post(hub: &TestHub, session: &str, path: &str, body: Value) -> Answer {
    send(hub, None, "POST", path, &[session], &body.to_string()).await
}

async fn start(hub: &TestHub, session: &str, body: Value) -> Answer {
    post(hub, session, "/api/v1/tasks", body).await
}

#[tokio::test]
async fn a_command_over_http_is_journalled_given_to_its_node_and_ended_like_any_other() {
    let (hub, node) = hub_with_node("south").await;
    let mut link = node.connect(&hub).await.unwrap();
    let ann = hub.login("ann", "operator").await;
    let session = bearer(&hub, Some(&ann)).await;
    let body = json!({
        "node": "south", "argv": ["printf", "%s", "a b"], "env": { "LEVEL": "3" },
        "time_limit_ms": 5000, "memory_bytes": 1 << 20, "max_processes": 7,
        "on_disconnect": "kill", "idempotency_key": "once",
    });
    let accepted = start(&hub, &session, body.clone()).await.ok().json();
    assert_eq!((&accepted["node"], &accepted["known"]), (&json!("south"), &json!(false)));
    assert_eq!(accepted["node_id"], node.id.to_string());
    let given = link.start_task().await;
    let spec = given.spec.unwrap();
    assert_eq!(spec.argv, ["printf", "%s", "a b"]);
    assert_eq!((&*spec.env[0].name, &*spec.env[0].value), (&b"LEVEL"[..], &b"3"[..]));
    assert_eq!((spec.time_limit_ms, spec.memory_bytes, spec.max_processes), (5000, 1 << 20, 7));
    assert_eq!((spec.mode(), spec.network()), (v1::Mode::Strict, v1::Network::None));
    assert_eq!(spec.on_disconnect(), v1::OnDisconnect::Kill);
    assert!(!spec.stdin && spec.terminal.is_none());

    let id = accepted["task_id"].as_str().unwrap();
    let task = get(&hub, &format!("/api/v1/tasks/{id}"), &[&session]).await.ok().json();
    assert_eq!((&task["actor"], &task["detached"]), (&json!("ann"), &json!(true)));
    assert_eq!(task["command"], "printf %s 'a b'");
    // The same once more is the same, and another by its key is refused.
    let again = start(&hub, &session, body).await.ok().json();
    assert_eq!((&again["task_id"], &again["known"]), (&accepted["task_id"], &json!(true)));
    let other = json!({ "node": "south", "script": "true", "idempotency_key": "once" });
    let refused = start(&hub, &session, other).await;
    assert_eq!((refused.status, refused.code().as_str()), (409, "idempotency_key_reused"));

    let path = format!("/api/v1/tasks/{id}/cancel");
    post(&hub, &session, &path, json!({ "signal": 2 })).await.ok();
    let cancel = link.cancel_task().await.unwrap();
    assert_eq!((cancel.task_id, cancel.signal), (given.task_id, 2));
    let lines = hub.hub.store.audit_page(None, 1000).await.unwrap();
    for action in ["task.accepted", "task.cancel"] {
        let line = lines.iter().find(|line| line.action == action);
        assert_eq!(line.unwrap_or_else(|| panic!("{action}: {lines:?}")).actor, "ann");
    }
    hub.hub.shutdown().await;
}

#[tokio::test]
async fn what_an_operator_may_not_run_is_refused_over_http_too_and_written_down() {
    let (hub, node) = hub_with_node("south").await;
    let _link = node.connect(&hub).await.unwrap();
    hub.join("away", &[]).await;
    let ann = hub.login("ann", "operator").await;
    let bot = hub.login("bot", "agent-token").await;
    let (ann, bot) = (bearer(&hub, Some(&ann)).await, bearer(&hub, Some(&bot)).await);
    let run = |more: Value| {
        let mut body = json!({ "node": "south", "script": "true" });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        body
    };
    for (session, body, status, code) in [
        (&ann, json!({}), 400, "invalid_argument"),
        (&ann, json!({ "node": "south" }), 400, "invalid_argument"),
        (&ann, json!({ "script": "true" }), 400, "invalid_argument"),
        (&ann, run(json!({ "argv": ["true"] })), 400, "invalid_argument"),
        (&ann, run(json!({ "stdin": true })), 400, "invalid_argument"),
        (&ann, run(json!({ "mode": "loose" })), 400, "invalid_argument"),
        (&ann, run(json!({ "retry_of": "0123456789abcdef" })), 400, "invalid_argument"),
        (&ann, json!({ "node": "south", "retry_of": "01234567" }), 400, "invalid_argument"),
        (&ann, json!({ "retry_of": "0123456789abcdef" }), 404, "task_not_found"),
        (&ann, run(json!({ "env": { "A=B": "x" } })), 400, "invalid_argument"),
        (&ann, json!({ "node": "nowhere", "script": "true" }), 404, "node_not_found"),
        (&ann, json!({ "node": "away", "script": "true" }), 503, "node_offline"),
        (&ann, run(json!({ "workspace": "w" })), 409, "not_a_member"),
        (&ann, run(json!({ "mode": "permissive" })), 403, "mode_not_allowed"),
        (&ann, run(json!({ "network": "full" })), 403, "network_not_allowed"),
        (&bot, run(json!({})), 403, "workspace_needed"),
        (&bot, run(json!({ "workspace": "w", "mode": "permissive" })), 403, "mode_not_allowed"),
    ] {
        let refused = start(&hub, session, body.clone()).await;
        assert_eq!((refused.status, refused.code().as_str()), (status, code), "{body}");
    }
    assert_eq!(hub.hub.relay.running(), 0, "nothing has begun");
    // Nobody waits for such lines.
    let written = async {
        loop {
            let lines = hub.hub.store.audit_page(None, 1000).await.unwrap();
            if lines.iter().filter(|line| line.action == "task.refused").count() >= 4 {
                return;
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(30), written).await.expect("they are in the log");
    hub.hub.shutdown().await;
}

#[tokio::test]
async fn a_stream_of_output_ends_with_the_task_and_with_the_right_to_it() {
    let (hub, node) = hub_with_node("south").await;
    let mut link = node.connect(&hub).await.unwrap();
    let ann = hub.login("ann", "operator").await;
    let session = bearer(&hub, Some(&ann)).await;
    let begin = async || {
        let body = json!({ "node": "south", "script": "sleep 1000" });
        let accepted = start(&hub, &session, body).await.ok().json();
        accepted["task_id"].as_str().unwrap().to_owned()
    };
    let id = begin().await;
    link.start_task().await;
    let path = format!("/api/v1/tasks/{id}/output/stream");
    for (path, header) in [
        (path.clone(), "last-event-id: 1"),
        (path.clone(), "last-event-id: x-1"),
        (format!("{path}?follow=true"), "x-none: 1"),
    ] {
        let refused = get(&hub, &path, &[&session, header]).await;
        assert_eq!((refused.status, refused.code().as_str()), (400, "invalid_argument"), "{path}");
    }
    let gone = get(&hub, "/api/v1/tasks/0123456789abcdef/output/stream", &[&session]).await;
    assert_eq!((gone.status, gone.code().as_str()), (404, "task_not_found"));

    let mut follower = Follower::of(&hub, None, &path, &[&session]).await;
    // The node goes, and does not come back in time: that is a verdict like any other.
    drop(link);
    let piece = follower.news().await;
    assert!(piece.json()["interrupted"]["resume_within_ms"].is_u64(), "{piece:?}");
    assert_eq!(piece.id, "0-0");
    let piece = follower.news().await.json();
    assert_eq!(
        (&piece["task"]["task_id"], &piece["task"]["state"]),
        (&json!(id), &json!("failed"))
    );
    assert!(follower.next().await.is_none(), "nothing comes after the end");

    let mut link = node.connect(&hub).await.unwrap();
    let id = begin().await;
    link.start_task().await;
    let path = format!("/api/v1/tasks/{id}/output/stream");
    let follower = Follower::of(&hub, None, &path, &[&session]).await;
    send(&hub, None, "DELETE", "/api/v1/session", &[&session], "").await.ok();
    assert_eq!(follower.end().await["code"], "not_logged_in");
    hub.hub.shutdown().await;
}
