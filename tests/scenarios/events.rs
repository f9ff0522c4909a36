//! Following what happens, over restarts of the hub.

use std::collections::HashSet;

use cortex_tests::mesh::{As, Mesh};
use cortex_tests::process::{Daemon, Outcome};
use serde_json::Value;

/// Events until one of this kind.
fn until(follower: &mut Daemon, kind: &str) -> Vec<Value> {
    let mut events = Vec::new();
    follower.line(kind, |line| {
        let event: Value = serde_json::from_str(line).unwrap();
        let found = event["kind"] == kind;
        events.push(event);
        found.then_some(())
    });
    events
}

#[test]
fn a_follower_goes_on_over_restarts_and_a_crash_and_gets_each_event_once() {
    let mut mesh = Mesh::start();
    let viewer = mesh.operator("viewer");
    let mut command = viewer.command(&["events", "-f", "--since", "0", "-o", "jsonl"]);
    let mut follower = Daemon::start("events", &mut command, &mesh.path("events.log"));
    let mut events = until(&mut follower, "hub.started");
    let node = mesh.node("box", As::Me);
    events.extend(until(&mut follower, "node.online"));
    let admin = mesh.operator("admin");
    let ran: Outcome = admin.agent(&["exec", "box", "-s", "true"]).ok();
    drop(ran);
    events.extend(until(&mut follower, "task.ended"));
    mesh.hub().terminate();
    mesh.start_hub();
    events.extend(until(&mut follower, "hub.started"));
    events.extend(until(&mut follower, "node.online"));
    mesh.kill_hub();
    mesh.start_hub();
    events.extend(until(&mut follower, "hub.started"));
    events.extend(until(&mut follower, "node.online"));
    drop(node);
    events.extend(until(&mut follower, "node.offline"));

    let cursors: Vec<u64> = events.iter().map(|event| event["cursor"].as_u64().unwrap()).collect();
    assert!(cursors.is_sorted(), "{cursors:?}");
    assert_eq!(cursors.iter().collect::<HashSet<_>>().len(), cursors.len(), "each once");
    let of = |kind: &str| events.iter().filter(|event| event["kind"] == kind).collect::<Vec<_>>();
    let crashes: Vec<&Value> =
        of("hub.started").iter().map(|event| &event["detail"]["after_crash"]).collect();
    assert_eq!(crashes, [false, false, true]);
    for kind in ["node.joined", "task.accepted", "task.started", "task.ended", "hub.stopping"] {
        assert_eq!(of(kind).len(), 1, "{kind}");
    }
    assert_eq!(of("task.ended")[0]["detail"]["exit_code"], 0);
    assert_eq!(of("task.ended")[0]["node"], "box");
    assert!(of("invite.used").is_empty(), "not for a viewer");
    // The same again, as far as it is kept: what is acknowledged by a cursor is not said again. The hub that
    // was killed may have taken its last moments with it, and the newest are still on their way to the disk.
    let since = cursors[3].to_string();
    let listed = viewer.agent(&["events", "--since", &since, "-o", "json"]).ok().json();
    let listed: Vec<u64> =
        listed.as_array().unwrap().iter().map(|event| event["cursor"].as_u64().unwrap()).collect();
    let starts: Vec<u64> =
        of("hub.started").iter().map(|event| event["cursor"].as_u64().unwrap()).collect();
    let of_the_killed = starts[1] + 1..starts[2];
    let kept = &cursors[4..cursors.len() - 3];
    let kept: Vec<u64> = kept.iter().copied().filter(|at| !of_the_killed.contains(at)).collect();
    let mut without = listed.clone();
    without.retain(|at| !of_the_killed.contains(at));
    assert!(without.starts_with(&kept), "{listed:?} {cursors:?}");
}

#[test]
fn workers_are_run_by_name_on_the_hubs_machine() {
    let mesh = Mesh::start();
    let listed = mesh.hubd(&["worker", "list", "-o", "json"]).ok().json();
    assert!(listed.as_array().unwrap().iter().any(|worker| worker["name"] == "pack-collection"));
    let ran = mesh.hubd(&["worker", "run", "pack-collection", "-o", "json"]).ok().json();
    assert!(ran["runs"].as_u64().unwrap() > 0 && ran["last_failed"] == false, "{ran}");
    let refused = mesh.hubd(&["worker", "run", "nobody"]);
    assert_eq!(refused.code, 3);
}
