//! Who may do what: modes and their two halves, roles and scopes, revocation, the audit log.

use std::os::unix::process::CommandExt as _;
use std::process::Command;

use cortex_tests::mesh::{As, Mesh, Operator};
use cortex_tests::process::{Outcome, run};
use cortex_tests::{is_root, wait};
use rustix::process::Signal;

const PERMISSIVE: [&str; 4] = ["--mode", "permissive", "--", "true"];

fn permissive(operator: &Operator, node: &str) -> Outcome {
    operator.agent(&[&["exec", node], &PERMISSIVE[..]].concat())
}

#[test]
fn permissive_takes_the_hubs_policy_and_the_owners_ceiling_and_ends_by_itself() {
    let mut mesh = Mesh::start();
    let admin = mesh.operator("admin");
    let users = if is_root() { vec![As::Me, As::Unprivileged] } else { vec![As::Me] };
    for (index, user) in users.into_iter().enumerate() {
        let name = format!("n{index}");
        let node = mesh.node(&name, user);
        // A file that the sandbox does not show.
        let outside = node.home().join("outside");
        std::fs::write(&outside, "seen").unwrap();
        let look = |mode| {
            let path = outside.to_str().unwrap();
            admin.agent(&["exec", &name, "--mode", mode, "--", "cat", path])
        };
        assert_eq!(look("strict").code, 1);

        let refused = permissive(&admin, &name);
        assert_eq!(refused.code, 126, "{}", refused.stderr);
        for half in ["policy set", "ceiling set permissive"] {
            assert!(refused.stderr.contains(half), "{half}: {}", refused.stderr);
        }
        let unexplained = admin.agent(&["policy", "set", &name, "permissive"]);
        assert_eq!(unexplained.code, 2, "{}", unexplained.stderr);
        let policy = |time| {
            let set = ["policy", "set", &name, "permissive", "--reason", "a test", "--for", time];
            let _set: Outcome = admin.agent(&set).ok();
        };
        policy("1h");
        let refused = permissive(&admin, &name);
        assert_eq!(refused.code, 126, "{}", refused.stderr);
        assert!(refused.stderr.contains("ceiling set"), "{}", refused.stderr);
        assert!(!refused.stderr.contains("policy set"), "{}", refused.stderr);

        // Counts at once, without a restart of the agent.
        let _set: Outcome = node.agent(&["ceiling", "set", "permissive"]).ok();
        wait::until("the ceiling is known at the hub", || permissive(&admin, &name).code == 0);
        assert_eq!(look("permissive").ok().text(), "seen");
        assert_eq!(look("strict").code, 1, "strict stays strict");

        policy("1s");
        wait::until("the policy has ended", || permissive(&admin, &name).code == 126);
        policy("1h");
        assert_eq!(permissive(&admin, &name).code, 0);
        let _set: Outcome = node.agent(&["ceiling", "set", "strict"]).ok();
        assert_eq!(permissive(&admin, &name).code, 126);
        let own = std::fs::read_to_string(node.home().join("state/audit.jsonl")).unwrap();
        for event in ["ceiling.set", "\"permissive\""] {
            assert!(own.contains(event), "{event}: {own}");
        }
    }
}

#[test]
fn the_network_takes_the_hubs_policy_and_the_owners_ceiling() {
    let mut mesh = Mesh::start();
    let admin = mesh.operator("admin");
    let node = mesh.node("n", As::Me);
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let call = format!("exec 7<>/dev/tcp/127.0.0.1/{port} && echo reached");
    let online = || admin.agent(&["exec", "n", "--net", "full", "-s", &call]);
    let ceiling = |net| {
        let _set: Outcome = node.agent(&["ceiling", "set", "strict", "--net", net]).ok();
    };
    let policy = |net, reason| {
        admin.agent(&["policy", "set", "n", "strict", "--net", net, "--reason", reason])
    };
    let refused = |halves: [bool; 2]| {
        let refused = online();
        assert_eq!(refused.code, 126, "{}", refused.stderr);
        for (half, named) in ["policy set", "ceiling set"].into_iter().zip(halves) {
            assert_eq!(refused.stderr.contains(half), named, "{half}: {}", refused.stderr);
        }
    };
    refused([true, true]);
    assert_eq!(policy("full", "").code, 2, "without a reason");
    let _set: Outcome = policy("full", "packages").ok();
    refused([false, true]);
    ceiling("full");
    wait::until("the ceiling is known at the hub", || online().code == 0);
    assert_eq!(online().ok().text(), "reached\n");
    let shown = admin.agent(&["policy", "show", "n"]).ok().text();
    assert!(shown.contains("strict, network full: packages"), "{shown}");
    assert_eq!(admin.agent(&["exec", "n", "-s", &call]).code, 1, "only for those who ask");
    assert_eq!(permissive(&admin, "n").code, 126, "the network is no mode");

    // The owner's word counts at once, whatever the hub believes.
    ceiling("none");
    assert_eq!(online().code, 126);
    ceiling("full");
    wait::until("the ceiling is known at the hub", || online().code == 0);
    let _set: Outcome = policy("none", "").ok();
    refused([true, false]);
    assert_eq!(node.agent(&["ceiling", "show"]).ok().text().trim(), "strict, network full");
}

#[test]
fn only_the_owner_raises_a_ceiling() {
    if !is_root() {
        eprintln!("skipped: takes root, to act as two users");
        return;
    }
    let mesh = Mesh::start();
    let node = mesh.node("a", As::Unprivileged);
    let mut other = node.command(&["ceiling", "set", "permissive"]);
    other.uid(54_322).gid(54_322);
    let refused = run(&mut other, b"");
    assert_ne!(refused.code, 0, "{}", refused.stderr);
    assert_eq!(node.agent(&["ceiling", "show"]).ok().text().trim(), "strict");
    let _set: Outcome = node.agent(&["ceiling", "set", "permissive"]).ok();
    assert_eq!(node.agent(&["ceiling", "show"]).ok().text().trim(), "permissive");
}

#[test]
fn a_scope_hides_all_other_nodes() {
    let mut mesh = Mesh::start();
    let mut nodes = Vec::new();
    for (name, env) in [("dev", "env=dev"), ("prod", "env=prod")] {
        let token = mesh.invite(&["--label", env]);
        let mut node = mesh.new_node(name, As::Me);
        let _joined: Outcome = mesh.join(&node, &token, &mesh.pin()).ok();
        node.run();
        mesh.wait_online(name);
        nodes.push(node);
    }
    let scoped = mesh.operator_with("operator", &["--scope", "env=dev"]);
    let listed = scoped.agent(&["node", "list", "-o", "json"]).ok().json();
    let names: Vec<_> = listed.as_array().unwrap().iter().map(|n| n["name"].clone()).collect();
    assert_eq!(names, ["dev"]);
    assert_eq!(scoped.agent(&["exec", "dev", "--", "true"]).code, 0);
    let hidden = scoped.agent(&["exec", "prod", "--", "true"]);
    assert_eq!(hidden.code, 125, "{}", hidden.stderr);
    assert!(!hidden.stderr.contains("did you mean"), "{}", hidden.stderr);
    let widening = scoped.agent(&["node", "label", "dev", "env=prod"]);
    assert_ne!(widening.code, 0, "a label that a scope is made of is not its holder's to change");
}

#[test]
fn a_revoked_operator_loses_running_commands_at_once_and_for_good() {
    let mut mesh = Mesh::start();
    let operator = mesh.operator("operator");
    let _node = mesh.node("a", As::Me);
    let mut client =
        operator.begin(&["exec", "a", "-s", "echo started; sleep 300"], &mesh.path("client.log"));
    let _revoked: Outcome = mesh.hubd(&["operator", "revoke", "operator-1"]).ok();
    assert_ne!(client.wait().code(), Some(0));
    let listed = mesh.hubd(&["node", "list", "-o", "json"]).ok().json();
    assert_eq!(listed[0]["running_tasks"], 0, "{listed}");
    let refused = operator.agent(&["node", "list"]);
    assert_ne!(refused.code, 0);
    assert!(refused.stderr.contains("revoked"), "{}", refused.stderr);
    mesh.hub().signal(Signal::TERM);
    mesh.hub().wait();
    mesh.start_hub();
    let refused = operator.agent(&["node", "list"]);
    assert!(refused.stderr.contains("revoked"), "{}", refused.stderr);
}

#[test]
fn the_audit_log_tells_who_did_what_and_notices_a_hand_in_it() {
    let mut mesh = Mesh::start();
    let operator = mesh.operator("admin");
    let _node = mesh.node("a", As::Me);
    assert_eq!(operator.agent(&["exec", "a", "-s", "exit 7"]).code, 7);
    let log = mesh.hubd(&["audit", "list", "-o", "json"]).ok().json();
    let lines = log.as_array().unwrap();
    let find = |action: &str| {
        let found = lines.iter().find(|line| line["action"] == action);
        found.unwrap_or_else(|| panic!("no {action} in {log}"))
    };
    assert_eq!(find("invite.created")["actor"], "local");
    assert_eq!(find("operator.login")["target"], "admin-1");
    assert_eq!(find("node.joined")["target"], "a");
    assert_eq!(find("task.accepted")["actor"], "admin-1");
    assert_eq!(find("task.ended")["detail"]["exit_code"], 7);
    let _intact: Outcome = operator.agent(&["audit", "verify"]).ok();

    for (what, statement) in [
        ("edited", "UPDATE audit SET actor = 'nobody' WHERE seq = 2"),
        ("removed", "DELETE FROM audit WHERE seq = 3"),
        ("cut off", "DELETE FROM audit WHERE seq >= 4"),
    ] {
        mesh.hub().signal(Signal::TERM);
        mesh.hub().wait();
        let database = mesh.path("hub/hub.db");
        let kept = mesh.path("kept.db");
        std::fs::copy(&database, &kept).unwrap();
        edit(&database, statement);
        mesh.start_hub();
        let found = mesh.hubd(&["audit", "verify"]);
        assert_ne!(found.code, 0, "{what}: {}", found.stderr);
        mesh.hub().signal(Signal::TERM);
        mesh.hub().wait();
        std::fs::copy(&kept, &database).unwrap();
        mesh.start_hub();
    }
    assert_eq!(mesh.hubd(&["audit", "verify"]).code, 0, "as it was");
}

/// Changes the hub's database behind its back.
fn edit(database: &std::path::Path, statement: &str) {
    let program = "import sqlite3, sys
with sqlite3.connect(sys.argv[1]) as database: database.execute(sys.argv[2])";
    let mut python = Command::new("python3");
    let _edited: Outcome = run(python.args(["-c", program]).arg(database).arg(statement), b"").ok();
}

#[test]
fn the_administration_socket_answers_its_own_user_and_root_only() {
    if !is_root() {
        eprintln!("skipped: takes root, to act as another user");
        return;
    }
    let mesh = Mesh::start();
    // Both barriers one by one: the mode of the way there, and the credentials.
    for folder in [mesh.path("hub"), mesh.path("hub/admin.sock")] {
        let open = std::os::unix::fs::PermissionsExt::from_mode(0o777);
        std::fs::set_permissions(folder, open).unwrap();
    }
    let program = mesh.readable_hubd();
    let mut command = Command::new(program);
    command.args(["node", "list", "--data"]).arg(mesh.path("hub"));
    assert_eq!(run(&mut command, b"").code, 0);
    command.uid(54_322).gid(54_322);
    let refused = run(&mut command, b"");
    assert_ne!(refused.code, 0, "{}", refused.text());
}
