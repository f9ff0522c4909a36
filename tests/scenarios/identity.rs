//! Certificates of real nodes: renewed, recovered, copied, given up, revoked, and the authority replaced.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use cortex_tests::mesh::{As, Mesh, Node};
use cortex_tests::process::{Outcome, end};
use cortex_tests::wait::until;
use serde_json::Value;

/// A life of a node's certificate that ends within a test, and not before a slow disk has the next one.
const SHORT_LIFE: [&str; 2] = ["--node-certificate-life", "20s"];

fn now_ms() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis() as i64
}

/// What a node knows of its own certificate.
fn identity(node: &Node) -> Value {
    node.agent(&["identity", "show", "-o", "json"]).ok().json()
}

fn generation(value: &Value) -> u64 {
    value["generation"].as_u64().unwrap()
}

#[test]
fn a_certificate_is_renewed_over_the_session_which_goes_on() {
    let mut mesh = Mesh::start_with(&SHORT_LIFE);
    let node = mesh.node("a", As::Me);
    let operator = mesh.operator("operator");
    let epoch = || {
        let node = operator.agent(&["node", "show", "a", "-o", "json"]).ok().json();
        assert_eq!(node["online"], true);
        node["session_epoch"].clone()
    };
    let before = epoch();
    let first = mesh.shown("a");
    let due = generation(&first) + 2;
    until("two renewals", || generation(&mesh.shown("a")) >= due);
    assert_eq!(epoch(), before, "it is the same session");
    let shown = mesh.shown("a");
    assert!(shown["certificate_until"].as_str() > first["certificate_until"].as_str());
    assert_eq!(shown["clone"], Value::Null);
    until("the node has stored what it was given", || generation(&identity(&node)) >= due);
}

#[test]
fn a_node_that_was_off_for_longer_than_its_certificate_lives_comes_back_by_its_key() {
    let mesh = Mesh::start_with(&SHORT_LIFE);
    let mut node = mesh.node("a", As::Me);
    let before = mesh.shown("a");
    node.stop();
    let end = identity(&node)["not_after_ms"].as_i64().unwrap();
    until("the end of its certificate", || now_ms() > end + 1_000);
    assert!(mesh.audit("node.recovered").is_empty());
    node.run();
    mesh.wait_online("a");
    let after = mesh.shown("a");
    assert_eq!(after["node_id"], before["node_id"]);
    assert!(!mesh.audit("node.recovered").is_empty());
    assert!(generation(&after) > generation(&before));
}

/// A second connection with what the node has got, so that it counts as received.
fn reconnect(mesh: &Mesh, node: &mut Node, expected: u64) {
    node.stop();
    node.run();
    until("a session with the newest certificate", || {
        let status = node.agent(&["status", "-o", "json"]);
        status.code == 0 && status.json()["connected"] == true
    });
    assert_eq!(generation(&mesh.shown(&node.name)), expected);
    until("the old one is given up", || identity(node)["unproven"] == false);
}

#[test]
fn a_copied_node_is_refused_named_and_gets_an_id_of_its_own() {
    let mesh = Mesh::start();
    let mut original = mesh.node("a", As::Me);
    let mut copy = mesh.copy_of(&original, "b");
    // Twice: both are on one machine here, which may have missed one answer.
    for expected in [2, 3] {
        let _renewed: Outcome = original.agent(&["identity", "renew"]).ok();
        reconnect(&mesh, &mut original, expected);
    }
    copy.run();
    let refusal = |copy: &Node| {
        let status = copy.agent(&["status", "-o", "json"]);
        let problem = (status.code == 0).then(|| status.json()["link_problem"].take())?;
        problem.as_str().map(str::to_owned)
    };
    until("the copy is refused", || refusal(&copy).is_some());
    let text = refusal(&copy).unwrap();
    let machine = identity(&copy);
    for part in ["copied", machine["hostname"].as_str().unwrap(), "cortex-agent identity fork"] {
        assert!(text.contains(part), "{part} is not in {text}");
    }
    let shown = mesh.shown("a");
    assert_eq!(
        (&shown["online"], &shown["clone"]["machine"]["hostname"]),
        (&true.into(), &machine["hostname"])
    );
    assert_eq!(shown["clone"]["presented_generation"], 1);
    // It is in force before it is written down.
    until("the suspicion is in the log", || mesh.audit("node.clone_suspected").len() == 1);

    copy.stop();
    let token = mesh.path("token");
    std::fs::write(&token, mesh.invite(&[])).unwrap();
    let fork = ["identity", "fork", "--name", "b", "-o", "json", "--token-file"];
    let mut fork = copy.command(&fork);
    fork.arg(&token);
    let forked = cortex_tests::process::run(&mut fork, b"").ok().json();
    assert_eq!(forked["old_node_id"], shown["node_id"]);
    assert_ne!(forked["node_id"], shown["node_id"]);
    copy.run();
    mesh.wait_online("b");
    assert_eq!(mesh.shown("a")["online"], true);
}

#[test]
fn a_node_that_is_killed_around_a_renewal_is_never_taken_for_its_own_copy() {
    let mesh = Mesh::start();
    let mut node = mesh.node("a", As::Me);
    let begun_with = now_ms().unsigned_abs() | 1;
    let mut seed = begun_with;
    // The hub allows eight at once. Each takes one, and another one by the agent itself if an answer was
    // missed; then comes a last one.
    for _ in 0..3 {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        let mut renewing = node.command(&["identity", "renew"]);
        renewing.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null());
        let mut renewing = renewing.spawn().unwrap();
        // Somewhere between the request and what is on disk after it.
        let moment = Instant::now() + Duration::from_micros(seed % 80_000);
        while Instant::now() < moment {
            std::thread::yield_now();
        }
        node.kill();
        renewing.wait().unwrap();
        let connect = |node: &mut Node| {
            node.run();
            until("a session", || {
                let status = node.agent(&["status", "-o", "json"]);
                status.code == 0 && status.json()["connected"] == true
            });
            let shown = mesh.shown("a");
            let unharmed = shown["online"] == true && shown["clone"] == Value::Null;
            assert!(unharmed, "seed {begun_with}: {shown}");
            generation(&shown)
        };
        let mut told_at = connect(&mut node);
        // Who missed an answer is told to ask once more, when its session begins.
        until(&format!("node and hub agree, seed {begun_with}"), || {
            let (has, at_hub) = (generation(&identity(&node)), generation(&mesh.shown("a")));
            // The hub was still at it when the session began: that is told at the next one.
            if has == told_at && at_hub > told_at {
                node.kill();
                told_at = connect(&mut node);
            }
            has == at_hub
        });
    }
    let before = generation(&mesh.shown("a"));
    let _renewed: Outcome = node.agent(&["identity", "renew"]).ok();
    until("node and hub agree", || {
        let at_hub = generation(&mesh.shown("a"));
        at_hub > before && generation(&identity(&node)) == at_hub
    });
}

#[test]
fn a_node_that_leaves_is_one_no_longer() {
    let mut mesh = Mesh::start();
    let mut node = mesh.node("a", As::Me);
    let left = node.agent(&["leave", "-o", "json"]).ok().json();
    assert_eq!(left["hub_told"], true);
    assert!(node.daemon().wait().success());
    assert_eq!(mesh.shown("a")["state"], "revoked");
    assert_eq!(mesh.audit("node.left").len(), 1);
    mesh.kill_hub();
    mesh.start_hub();
    assert_eq!(mesh.shown("a")["state"], "revoked");
    let _gone: Outcome = mesh.hubd(&["node", "forget", "a"]).ok();
    assert_ne!(mesh.hubd(&["node", "show", "a"]).code, 0);
}

#[test]
fn a_revoked_node_loses_its_running_command_at_once_also_after_a_restart_of_the_hub() {
    let mut mesh = Mesh::start_with(&["--resume-grace", "60s"]);
    let operator = mesh.operator("operator");
    let mut node = mesh.node("a", As::Me);
    let mut exec = operator.command(&["exec", "a", "-s", "echo running; sleep 1000"]);
    let mut running = exec
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut begun = [0; 8];
    std::io::Read::read_exact(running.stdout.as_mut().unwrap(), &mut begun).unwrap();
    assert_eq!(&begun, b"running\n");
    let asked = Instant::now();
    let _revoked: Outcome = mesh.hubd(&["node", "revoke", "a", "--reason", "test"]).ok();
    let (status, text) = end(running, "the client");
    assert!(asked.elapsed() < Duration::from_secs(30), "{:?}", asked.elapsed());
    assert!(!status.success() && text.contains("the node was revoked"), "{text}");
    assert_eq!(mesh.shown("a")["state"], "revoked");
    mesh.kill_hub();
    mesh.start_hub();
    assert_eq!(mesh.shown("a")["state"], "revoked");
    // It comes back, and is told.
    until("the node knows", || {
        let status = node.agent(&["status", "-o", "json"]);
        status.code == 0
            && status.json()["link_problem"].as_str().is_some_and(|p| p.contains("revoked"))
    });
    node.stop();
}

#[test]
fn the_authority_is_replaced_under_two_nodes_and_an_operator() {
    let mut mesh = Mesh::start_with(&SHORT_LIFE);
    let nodes = [mesh.node("a", As::Me), mesh.node("b", As::Me)];
    let operator = mesh.operator("operator");
    let old_pin = mesh.pin();
    let works = || {
        let list = operator.agent(&["node", "list", "-o", "json"]).ok().json();
        let list = list.as_array().unwrap();
        assert!(list.iter().all(|node| node["online"] == true), "{list:?}");
        list.iter().map(|node| node["session_epoch"].clone()).collect::<Vec<_>>()
    };
    // The harness has an operator of its own, which follows as well if it calls now and then.
    let online = |mesh: &Mesh| ["a", "b"].map(|name| mesh.wait_online(name));
    let step = |mesh: &Mesh, stage: &str| {
        mesh.hubd(&["ca", "rotate", stage, "-o", "json"]).ok().json()["stage"].clone()
    };
    let sessions = works();
    assert_eq!(step(&mesh, "prepare"), "prepared");
    assert_eq!(mesh.pin().split(',').count(), 2, "invites show both");
    works();
    until("both nodes have heard of it", || {
        nodes.iter().all(|node| identity(node)["authorities"].as_array().unwrap().len() == 2)
    });
    assert_eq!(step(&mesh, "issue"), "issuing");
    let status = |mesh: &Mesh| mesh.hubd(&["ca", "status", "-o", "json"]).ok().json();
    until("both nodes have moved", || status(&mesh)["nodes_moved"] == 2);
    online(&mesh);
    assert_eq!(works(), sessions, "nobody had to connect anew");
    assert_eq!(step(&mesh, "trust-only"), "trust-only");
    works();
    // Everyone meets the hub as the new authority has signed it.
    mesh.kill_hub();
    mesh.start_hub();
    online(&mesh);
    works();
    assert_eq!(step(&mesh, "retire"), "single");
    assert_ne!(mesh.pin(), old_pin);
    assert!(!mesh.pin().contains(','));
    mesh.kill_hub();
    mesh.start_hub();
    online(&mesh);
    works();
    assert_eq!(mesh.audit("ca.rotated").len(), 4);
    let late = mesh.node("c", As::Me);
    assert_eq!(identity(&late)["authorities"], serde_json::json!([mesh.pin()]));
}
