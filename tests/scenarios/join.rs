//! Joining: who gets in, who does not, and what is kept.

use std::io::Read as _;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt as _;
use std::thread;

use cortex_tests::is_root;
use cortex_tests::mesh::{As, Mesh};
use cortex_tests::process::{Outcome, run};
use cortex_tests::wait::until;

#[test]
fn a_node_joins_and_its_identity_is_private() {
    let mesh = Mesh::start();
    let user = if is_root() { As::Unprivileged } else { As::Me };
    for (name, user) in [("mine", As::Me), ("theirs", user)] {
        let node = mesh.node(name, user);
        // The hub knows of the connection before the node has heard its welcome.
        until("the node knows that it is connected", || {
            let status = node.agent(&["status", "-o", "json"]).ok().json();
            assert_eq!(status["name"], name);
            status["connected"] == true
        });
        let key = node.home().join("state/identity/key.pem");
        let mode = std::fs::metadata(key).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }
}

#[test]
fn a_token_that_does_not_admit_gets_a_clear_error() {
    let mesh = Mesh::start();
    let pin = mesh.pin();
    let refused = |name: &str, token: &str| -> Outcome {
        let node = mesh.new_node(name, As::Me);
        let outcome = mesh.join(&node, token, &pin);
        assert_ne!(outcome.code, 0);
        assert!(!node.home().join("state/identity/cert.pem").exists());
        assert!(!outcome.stderr.contains(&token[token.len().saturating_sub(20)..]), "no secret");
        outcome
    };

    let used = mesh.invite(&[]);
    let _joined: Outcome = mesh.join(&mesh.new_node("first", As::Me), &used, &pin).ok();
    let outcome = refused("second", &used);
    assert!(outcome.stderr.contains("used up"), "{}", outcome.stderr);
    assert_eq!(outcome.code, 5);

    let expired = mesh.invite(&["--ttl", "1ms"]);
    let outcome = refused("third", &expired);
    assert!(outcome.stderr.contains("expired"), "{}", outcome.stderr);

    // Well formed, but of no invite of this hub.
    let mut wrong = mesh.invite(&[]).into_bytes();
    let last = wrong.len() - 2;
    wrong[last] = if wrong[last] == b'A' { b'B' } else { b'A' };
    let outcome = refused("fourth", &String::from_utf8(wrong).unwrap());
    assert!(outcome.stderr.contains("not valid"), "{}", outcome.stderr);
    assert!(outcome.stderr.contains("hint:"), "{}", outcome.stderr);

    let outcome = refused("fifth", "cxi_not_a_token_of_any_kind");
    assert!(outcome.stderr.contains("not an invite token"), "{}", outcome.stderr);
}

#[test]
fn a_wrong_pin_is_refused_before_the_token_is_sent() {
    let mesh = Mesh::start();
    let token = mesh.invite(&[]);
    let node = mesh.new_node("a", As::Me);
    let wrong = format!("sha256:{}", "0".repeat(64));
    let outcome = mesh.join(&node, &token, &wrong);
    assert_ne!(outcome.code, 0);
    assert!(outcome.stderr.contains(&wrong), "{}", outcome.stderr);
    assert!(outcome.stderr.contains(&mesh.pin()), "{}", outcome.stderr);
    // The hub has never seen it: the same token still admits.
    let invites = mesh.hubd(&["invite", "list", "-o", "json"]).ok().json();
    let uses: Vec<u64> = invites
        .as_array()
        .unwrap()
        .iter()
        .filter(|invite| invite["kind"] == "node")
        .map(|invite| invite["uses"].as_u64().unwrap())
        .collect();
    assert_eq!(uses, [0]);
    let _joined: Outcome = mesh.join(&node, &token, &mesh.pin()).ok();
}

#[test]
fn something_that_is_no_hub_never_sees_the_token() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let (sender, receiver) = std::sync::mpsc::channel();
    let eavesdropper = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut heard = [0; 4096];
        let length = stream.read(&mut heard).unwrap();
        sender.send(heard[..length].to_vec()).unwrap();
    });
    let mesh = Mesh::start();
    let token = mesh.invite(&[]);
    let node = mesh.new_node("a", As::Me);
    let arguments = ["join", address.as_str(), "--ca", &mesh.pin(), "--token-stdin"];
    let outcome = run(&mut node.command(&arguments), token.as_bytes());
    assert_eq!(outcome.code, 6, "{}", outcome.stderr);
    let heard = receiver.recv().unwrap();
    eavesdropper.join().unwrap();
    let secret = token.as_bytes();
    assert!(!heard.windows(secret.len()).any(|window| window == secret));
    assert!(!heard.is_empty(), "it began a handshake");
}

#[test]
fn a_killed_node_comes_back_as_itself() {
    let mut mesh = Mesh::start();
    let operator = mesh.operator("viewer");
    let mut node = mesh.node("a", As::Me);
    let identity = |mesh: &Mesh| {
        mesh.wait_online("a");
        let nodes = operator.agent(&["node", "list", "-o", "json"]).ok().json();
        assert_eq!(nodes.as_array().unwrap().len(), 1);
        nodes[0]["node_id"].clone()
    };
    let before = identity(&mesh);
    node.kill();
    let _offline: Outcome =
        operator.agent(&["node", "wait", "a", "--for", "offline", "--timeout", "60s"]).ok();
    node.run();
    assert_eq!(identity(&mesh), before);
    // And over a restart of the hub, without a join.
    mesh.kill_hub();
    mesh.start_hub();
    assert_eq!(identity(&mesh), before);
}

#[test]
fn a_join_that_comes_too_often_waits_and_says_so() {
    let mesh = Mesh::start_with(&["--join-rate", "1"]);
    let (token, pin) = (mesh.invite(&["--uses", "20"]), mesh.pin());
    // Four at once are allowed, and one a second after that: so many more than come in the time that all
    // of them together take to ask.
    let said: String = thread::scope(|scope| {
        let joins: Vec<_> = (0..12)
            .map(|number| {
                let node = mesh.new_node(&format!("n{number}"), As::Me);
                let arguments = ["join", mesh.address(), "--ca", &pin, "--token-stdin"];
                let (mut command, token) = (node.command(&arguments), token.as_bytes());
                command.args(["--name", &node.name]);
                scope.spawn(move || run(&mut command, token).ok().stderr)
            })
            .collect();
        joins.into_iter().map(|join| join.join().unwrap()).collect()
    });
    assert!(said.contains("too many attempts") && said.contains("trying again in"), "{said}");
}
