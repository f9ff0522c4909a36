//! Commands that are to end while their node is away, reasons that are true, and those who follow.

use std::time::{Duration, Instant};

use cortex_tests::mesh::{As, Mesh, Node, Operator};
use cortex_tests::process::{Daemon, Outcome};
use cortex_tests::proxy::{Fault, Proxy};
use cortex_tests::wait;
use rustix::process::Signal;
use serde_json::Value;

use super::exec::runs;

/// A name that a process of this test has and no other.
fn mark() -> String {
    format!("cortex-mark-{}", rand::random::<u64>())
}

/// A script whose process has this name, and says so.
fn sleeper(mark: &str) -> String {
    format!("exec -a {mark} sleep 300 & echo started; wait")
}

/// A node behind a line that can be cut.
fn distant(mesh: &Mesh) -> (Proxy, Node) {
    let proxy = Proxy::start(mesh.address().parse().unwrap());
    let node = mesh.node_through("a", &proxy.address().to_string());
    (proxy, node)
}

fn leave(proxy: &Proxy) {
    proxy.set(Fault::Refuse);
    proxy.cut();
}

fn task_of(operator: &Operator, id: &str) -> Value {
    operator.agent(&["task", "show", id, "-o", "json"]).ok().json()
}

fn newest(operator: &Operator) -> Value {
    operator.agent(&["task", "list", "--limit", "1", "-o", "json"]).ok().json()[0].clone()
}

fn detached(operator: &Operator, script: &str) -> String {
    let begun = operator.agent(&["exec", "a", "--detach", "-o", "json", "-s", script]).ok().json();
    begun["task_id"].as_str().unwrap().to_owned()
}

/// Revoked after a wait of this kind, whose node is away and comes back only later.
fn revoked(options: &[&str], wanted: impl Fn(&Value) -> bool) {
    let mut mesh = Mesh::start_with(options);
    let (operator, admin) = (mesh.operator("operator"), mesh.operator("admin"));
    let (proxy, _node) = distant(&mesh);
    let mark = mark();
    let id = detached(&operator, &sleeper(&mark));
    wait::until("the command", || runs(&mark));
    leave(&proxy);
    wait::until("the loss", || wanted(&task_of(&admin, &id)));
    let _revoked: Outcome = mesh.hubd(&["operator", "revoke", "operator-1"]).ok();
    wait::until("the verdict", || !task_of(&admin, &id)["verdict"].is_null());
    assert!(runs(&mark), "nobody could tell it");
    // Also by a hub that knows of it by its journal alone.
    mesh.kill_hub();
    mesh.start_hub();
    proxy.set(Fault::None);
    wait::until("its end", || !runs(&mark));
    wait::until("the node's word", || !task_of(&admin, &id)["late_outcome"].is_null());
    assert_eq!(task_of(&admin, &id)["late_outcome"]["verdict"], "cancelled");
}

#[test]
fn a_revoked_operators_command_ends_on_a_node_that_was_away() {
    revoked(&[], |task| task["state"] != "running");
}

#[test]
fn one_that_was_given_up_before_ends_there_too() {
    revoked(&["--resume-grace", "1s"], |task| task["verdict"] == "stream_lost");
}

#[test]
fn what_is_cancelled_after_its_stream_was_lost_ends_when_the_node_is_back() {
    let mut mesh = Mesh::start_with(&["--resume-grace", "1s"]);
    let operator = mesh.operator("operator");
    let (proxy, _node) = distant(&mesh);
    let mark = mark();
    let id = detached(&operator, &sleeper(&mark));
    wait::until("the command", || runs(&mark));
    leave(&proxy);
    wait::until("the verdict", || task_of(&operator, &id)["verdict"] == "stream_lost");
    let asked = operator.agent(&["task", "cancel", &id]).ok();
    assert!(asked.text().contains("when it is back"), "{}", asked.text());
    assert_eq!(task_of(&operator, &id)["cancel_pending"], true);
    proxy.set(Fault::None);
    wait::until("its end", || !runs(&mark));
    wait::until("the node's word", || task_of(&operator, &id)["cancel_pending"] == false);
}

#[test]
fn a_cancel_that_was_said_into_a_dead_line_still_arrives() {
    let mut mesh = Mesh::start();
    let operator = mesh.operator("operator");
    let (proxy, _node) = distant(&mesh);
    let mark = mark();
    let id = detached(&operator, &sleeper(&mark));
    wait::until("the command", || runs(&mark));
    proxy.set(Fault::Stall);
    let _asked: Outcome = operator.agent(&["task", "cancel", &id]).ok();
    // What lay in the line is lost with it.
    proxy.cut();
    proxy.set(Fault::None);
    assert_eq!(operator.agent(&["task", "wait", &id]).code, 143);
    assert_eq!(task_of(&operator, &id)["state"], "cancelled");
    assert!(!runs(&mark));
}

#[test]
fn without_a_grace_a_command_ends_with_its_line() {
    let mut mesh = Mesh::start_with(&["--resume-grace", "0s"]);
    let operator = mesh.operator("operator");
    let (proxy, _node) = distant(&mesh);
    let mark = mark();
    let mut client =
        operator.begin(&["exec", "a", "-s", &sleeper(&mark)], &mesh.path("client.log"));
    leave(&proxy);
    assert_eq!(client.wait().code(), Some(125));
    wait::until("its end", || !runs(&mark));
    let log = std::fs::read_to_string(mesh.path("client.log")).unwrap();
    assert!(!log.contains("waiting up to"), "{log}");
}

#[test]
fn a_client_that_was_away_for_too_long_is_told_so_and_of_no_cancel() {
    let mut mesh = Mesh::start_with(&["--resume-grace", "1s"]);
    let admin = mesh.operator("admin");
    let proxy = Proxy::start(mesh.address().parse().unwrap());
    let operator = mesh.operator_through("operator", &proxy.address().to_string());
    let _node = mesh.node("a", As::Me);
    let mark = mark();
    let log = mesh.path("client.log");
    let mut client = operator.begin(&["exec", "a", "-s", &sleeper(&mark)], &log);
    leave(&proxy);
    wait::until("its end on the node", || !runs(&mark));
    let id = newest(&admin)["task_id"].as_str().unwrap().to_owned();
    wait::until("the node's word", || !task_of(&admin, &id)["late_outcome"].is_null());
    proxy.set(Fault::None);
    assert_eq!(client.wait().code(), Some(125));
    let log = std::fs::read_to_string(log).unwrap();
    assert!(log.contains("away for longer than the resume grace"), "{log}");
    assert!(!log.contains("cancelled"), "{log}");
    let task = task_of(&admin, &id);
    assert_eq!((&task["state"], &task["verdict"]), (&"failed".into(), &"failed".into()));
    assert!(task["reason"].as_str().unwrap().contains("was away"), "{task}");
}

#[test]
fn an_agent_that_is_stopped_is_not_the_commands_doing() {
    let mut mesh = Mesh::start();
    let operator = mesh.operator("operator");
    let mut node = mesh.node("a", As::Me);
    let mark = mark();
    let mut client =
        operator.begin(&["exec", "a", "-s", &sleeper(&mark)], &mesh.path("client.log"));
    node.stop();
    assert_eq!(client.wait().code(), Some(125));
    assert!(!runs(&mark));
    let task = newest(&operator);
    assert_eq!((&task["state"], &task["verdict"]), (&"failed".into(), &"failed".into()));
    assert!(task["reason"].as_str().unwrap().contains("stopped"), "{task}");
}

#[test]
fn what_is_known_of_a_lost_command_is_told_and_nothing_else() {
    let mut mesh = Mesh::start_with(&["--resume-grace", "1s"]);
    let operator = mesh.operator("operator");
    let (proxy, _node) = distant(&mesh);
    let script = "seq 1 1000; sleep 300";
    let mut command = operator.command(&["exec", "a", "-s", script]);
    let mut client = Daemon::start("client", &mut command, &mesh.path("client.log"));
    client.line("all of it", |line| (line == "1000").then_some(()));
    leave(&proxy);
    assert_eq!(client.wait().code(), Some(125));
    let task = newest(&operator);
    assert_eq!(task["verdict"], "stream_lost");
    assert_eq!(task["end"]["stdout_bytes"], 3893);
    assert!(task["end"]["exit_code"].is_null() && task["end"]["duration_ms"].is_null(), "{task}");
    let id = task["task_id"].as_str().unwrap();
    let shown = operator.agent(&["task", "show", id]).ok().text();
    assert!(shown.contains("3893 bytes") && !shown.contains("exit code"), "{shown}");
    assert_eq!(operator.agent(&["task", "logs", id]).ok().stdout.len(), 3893);
}

#[test]
fn those_who_follow_survive_a_hub_that_is_killed() {
    let mut mesh = Mesh::start();
    let operator = mesh.operator("operator");
    let _node = mesh.node("a", As::Me);
    let id = detached(&operator, "for n in $(seq 1 60); do echo $n; sleep 0.1; done; exit 4");
    let follow = |name: &str, arguments: &[&str]| {
        let mut command = operator.command(arguments);
        Daemon::start(name, &mut command, &mesh.path(&format!("{name}.log")))
    };
    let mut logs = follow("logs", &["task", "logs", &id, "-f"]);
    let mut attached = follow("attached", &["task", "attach", &id]);
    let mut waiting = follow("waiting", &["task", "wait", &id]);
    let mut history = follow("history", &["history", "a", "-f"]);
    for follower in [&mut logs, &mut attached, &mut history] {
        // Late enough for the one that says nothing to be there, too.
        follower.line("a beginning", |line| (line == "25").then_some(()));
    }
    mesh.kill_hub();
    mesh.start_hub();
    for follower in [&mut logs, &mut attached] {
        let mut due = 26;
        follower.line("the rest, each line once", |line| {
            assert_eq!(line, due.to_string());
            due += 1;
            (due == 61).then_some(())
        });
    }
    assert_eq!(logs.wait().code(), Some(0));
    assert_eq!(attached.wait().code(), Some(4));
    assert_eq!(waiting.wait().code(), Some(4));
    history.line("the end", |line| (line == "60").then_some(()));
}

#[test]
fn a_hub_that_stays_away_is_unreachable_and_said_to_be() {
    let mut mesh = Mesh::start();
    let operator = mesh.operator("operator");
    // This machine is no node, which is no fault of a login's.
    let doctor = operator.agent(&["doctor"]).ok().text();
    for part in ["this machine is no node", "hub accepts login  yes", "operator-1 (operator)"] {
        assert!(doctor.contains(part), "{part} is not in {doctor}");
    }
    mesh.kill_hub();
    let list = operator.agent(&["task", "list"]);
    assert_eq!(list.code, 6, "{}", list.stderr);
    assert!(list.stderr.contains("hint:"), "{}", list.stderr);
    // What the hint names looks closer indeed.
    let doctor = operator.agent(&["doctor"]);
    assert_eq!(doctor.code, 1, "{}", doctor.text());
    assert!(doctor.text().contains("fail    hub address"), "{}", doctor.text());
}

#[test]
fn a_misspelt_task_is_said_before_others_are_waited_for() {
    let mut mesh = Mesh::start();
    let operator = mesh.operator("operator");
    let _node = mesh.node("a", As::Me);
    let id = detached(&operator, "sleep 300");
    let outcome = operator.agent(&["task", "wait", &id, "0123456789ab"]);
    assert_eq!(outcome.code, 3, "{}", outcome.stderr);
    let state = operator.agent(&["task", "list", "--state", "running"]);
    assert_eq!(state.code, 2, "that flag is another: {}", state.stderr);
    assert!(state.stderr.contains("--status running"), "{}", state.stderr);
}

#[test]
fn a_cancelled_command_whose_reader_stands_still_has_its_verdict_soon() {
    let mut mesh = Mesh::start();
    let operator = mesh.operator("operator");
    let _node = mesh.node("a", As::Me);
    let mut command = operator.command(&["exec", "a", "--", "yes"]);
    let stalled = command.stdout(std::process::Stdio::piped()).spawn().unwrap();
    wait::until("that it runs", || newest(&operator)["state"] == "running");
    let id = newest(&operator)["task_id"].as_str().unwrap().to_owned();
    let begun = Instant::now();
    let _cancelled: Outcome = operator.agent(&["task", "cancel", &id]).ok();
    assert_eq!(operator.agent(&["task", "wait", &id]).code, 143);
    let took = begun.elapsed();
    // Two seconds of grace and three for its output; the reader would stand still for ever.
    assert!(took < Duration::from_secs(20), "{took:?}");
    let mut stalled = stalled;
    stalled.kill().unwrap();
    stalled.wait().unwrap();
}

#[test]
fn a_line_that_went_dead_without_a_word_is_noticed_in_time() {
    let mut mesh = Mesh::start();
    let operator = mesh.operator("operator");
    let (proxy, node) = distant(&mesh);
    let log = mesh.path("client.log");
    let mut client = operator.begin(&["exec", "a", "-s", "echo started; sleep 300"], &log);
    proxy.set(Fault::Stall);
    let begun = Instant::now();
    let said =
        || std::fs::read_to_string(&log).unwrap().contains("connection to the node was lost");
    wait::until("that the loss is said", said);
    let took = begun.elapsed();
    assert!(took < Duration::from_secs(40), "{took:?}");
    wait::until("that the node notices, too", || node.log().contains("session lost"));
    let took = begun.elapsed();
    assert!(took < Duration::from_secs(50), "{took:?}");
    proxy.set(Fault::None);
    client.signal(Signal::INT);
    client.wait();
}

#[test]
fn several_nodes_each_begin_a_task_of_their_own() {
    let mut mesh = Mesh::start();
    let operator = mesh.operator("operator");
    let (_one, mut two) = (mesh.node("a", As::Me), mesh.node("b", As::Me));
    let script = "echo $LEVEL; exit 3";
    let exec = ["exec", "a", "b", "--detach", "--env", "LEVEL=7", "-o", "json", "-s", script];
    let begun = operator.agent(&exec).ok().json();
    // As they answered.
    let mut nodes = [&begun[0]["node"], &begun[1]["node"]];
    nodes.sort_by_key(|node| node.as_str());
    assert_eq!(nodes, ["a", "b"]);
    for one in begun.as_array().unwrap() {
        let id = one["task_id"].as_str().unwrap();
        assert_eq!(operator.agent(&["task", "wait", id]).code, 3);
        // What its variables held is not kept.
        let refused = operator.agent(&["task", "retry", id]);
        assert_eq!(refused.code, 125, "{}", refused.stderr);
        assert!(refused.stderr.contains("--env LEVEL="), "{}", refused.stderr);
        let again = operator.agent(&["task", "retry", id, "--env", "LEVEL=8"]);
        assert_eq!((again.code, again.text().as_str()), (3, "8\n"), "{}", again.stderr);
    }
    // What is left out of a list is said, and only then: there are two of each node.
    for (limit, more) in [("3", true), ("4", false), ("0", false)] {
        let some = operator.agent(&["task", "list", "--limit", limit, "-o", "json"]).ok();
        assert_eq!(some.stderr.contains("--limit 0 lists all"), more, "{limit}: {}", some.stderr);
        assert_eq!(some.json().as_array().unwrap().len(), if more { 3 } else { 4 });
    }
    two.stop();
    wait::until("the hub knows", || mesh.shown("b")["online"] == false);
    let partly = operator.agent(&["exec", "a", "b", "--detach", "--", "true"]);
    assert_eq!(partly.code, 125);
    assert!(partly.stderr.contains("1 of 2 accepted"), "{}", partly.stderr);
    assert!(partly.stderr.contains("not reached: b"), "{}", partly.stderr);
}

#[test]
fn one_who_follows_hears_no_more_once_the_node_has_left_the_scope() {
    let mut mesh = Mesh::start();
    let admin = mesh.operator("admin");
    let scoped = mesh.operator_with("operator", &["--scope", "env=dev"]);
    let _node = mesh.node("a", As::Me);
    let _labelled: Outcome = admin.agent(&["node", "label", "a", "env=dev"]).ok();
    let id = detached(&scoped, "echo started; sleep 300");
    let mut follower = Daemon::start(
        "follower",
        &mut scoped.command(&["task", "logs", &id, "-f"]),
        &mesh.path("follower.log"),
    );
    follower.line("that it started", |line| (line == "started").then_some(()));
    let mut history = Daemon::start(
        "history",
        &mut scoped.command(&["history", "a", "-f"]),
        &mesh.path("history.log"),
    );
    history.line("that it started", |line| (line == "started").then_some(()));
    let _labelled: Outcome = admin.agent(&["node", "label", "a", "env=prod"]).ok();
    assert_eq!(follower.wait().code(), Some(3));
    assert_eq!(history.wait().code(), Some(3));
}
