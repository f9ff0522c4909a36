//! Hub and node die at every step of a command: it runs at most once, its caller is told the truth, and
//! nothing is said to run that does not.

use std::fs;
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;

use cortex_tests::mesh::{As, Mesh, Operator};
use cortex_tests::process::Daemon;
use cortex_tests::wait::until;

/// Where the hub dies: before a command is in its journal, and after; once it is on its way to the node;
/// before the verdict is in its journal, and after. With the code of the command line: the hub that comes
/// back answers for all but what may not have got to the node, which says so when it is back.
const OF_THE_HUB: [(&str, Option<i32>); 5] = [
    ("task.accepting", Some(0)),
    ("task.accepted", Some(125)),
    ("task.dispatched", None),
    ("task.ending", Some(0)),
    ("task.ended", Some(0)),
];
/// Where the node dies: before a command is in its journal, and after, which is before it runs; when it has
/// ended, and once that is in the journal and not yet told.
const OF_THE_NODE: [&str; 4] = ["task.told", "task.begun", "task.over", "task.over.recorded"];

/// Starts a command that leaves a line in a file of the workspace.
fn begin(operator: &Operator, mesh: &Mesh, point: &str) -> Daemon {
    let script = format!("echo ran >> 'ran-{point}'");
    let arguments = ["exec", "box", "--workspace", "w", "-s", script.as_str()];
    Daemon::start(
        "exec",
        &mut operator.command(&arguments),
        &mesh.path(&format!("exec-{point}.log")),
    )
}

/// What has to hold once everybody is back, whatever became of the command.
fn check(operator: &Operator, root: &Path, point: &str, code: Option<i32>, log: &str) {
    let states = || {
        let tasks = operator.agent(&["task", "list", "-o", "json"]).ok().json();
        let tasks = tasks.as_array().unwrap().clone();
        tasks.iter().map(|task| task["state"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    until("nothing is said to run", || {
        states().iter().all(|state| !matches!(state.as_str(), "accepted" | "running"))
    });
    let ran = fs::read_to_string(root.join(format!("ran-{point}"))).unwrap_or_default();
    assert!(ran.lines().count() <= 1, "{point}: it ran more than once: {ran:?}");
    match code {
        Some(0) => assert_eq!(ran, "ran\n", "{point}: it is said to have run\n{log}"),
        Some(125) => {}
        other => panic!("{point}: the command line ended with {other:?}\n{log}"),
    }
}

#[test]
fn a_detached_command_whose_acceptance_was_lost_is_asked_for_again_and_runs_once() {
    let mut mesh = Mesh::start();
    let mut node = mesh.node("box", As::Me);
    let operator = mesh.operator("admin");
    for targets in [&["box"] as &[&str], &["box", "box"]] {
        mesh.hub().terminate();
        mesh.start_hub_that_crashes_at("task.dispatched");
        node.stop();
        node.run();
        mesh.wait_online("box");
        let before = tasks(&operator).len();
        let arguments =
            [&["exec", "--detach", "-o", "jsonl"], targets, &["--", "sleep", "1"]].concat();
        let log = mesh.path("detached.log");
        let mut client = Daemon::start("exec", &mut operator.command(&arguments), &log);
        assert_eq!(mesh.hub().wait().signal(), Some(9));
        mesh.start_hub();
        let begun: serde_json::Value =
            client.line("its id", |line| serde_json::from_str(line).ok());
        assert_eq!(client.wait().code(), Some(0), "{:?}", fs::read_to_string(log));
        let tasks = tasks(&operator);
        assert_eq!(tasks.len(), before + 1, "{tasks:?}");
        assert_eq!(begun["task_id"], tasks[0]["task_id"]);
        assert_eq!(begun["known"], false, "it was begun by this very command line");
    }
}

fn tasks(operator: &Operator) -> Vec<serde_json::Value> {
    operator.agent(&["task", "list", "-o", "json"]).ok().json().as_array().unwrap().clone()
}

#[test]
fn a_command_runs_at_most_once_wherever_hub_or_node_die() {
    let mut mesh = Mesh::start();
    let mut node = mesh.node("box", As::Me);
    let operator = mesh.operator("admin");
    drop(operator.agent(&["workspace", "create", "w"]).ok());
    drop(operator.agent(&["workspace", "attach", "w", "--node", "box"]).ok());
    let root = node.workspace("w");
    until("the workspace is there", || root.is_dir());
    let log = |point: &str, mesh: &Mesh| {
        fs::read_to_string(mesh.path(&format!("exec-{point}.log"))).unwrap_or_default()
    };
    for (point, expected) in OF_THE_HUB {
        // In order: who has been here is written down then.
        mesh.hub().terminate();
        mesh.start_hub_that_crashes_at(point);
        // It has lost the hub again and again, and would take its time to come back.
        node.stop();
        node.run();
        mesh.wait_online("box");
        let mut command = begin(&operator, &mesh, point);
        assert_eq!(mesh.hub().wait().signal(), Some(9), "it passes {point}");
        mesh.start_hub();
        let code = command.wait().code();
        mesh.wait_online("box");
        check(&operator, &root, point, code, &log(point, &mesh));
        if expected.is_some() {
            assert_eq!(code, expected, "{point}: {}", log(point, &mesh));
        }
    }
    for point in OF_THE_NODE {
        node.stop();
        node.run_to_crash_at(point);
        mesh.wait_online("box");
        let mut command = begin(&operator, &mesh, point);
        assert_eq!(node.daemon().wait().signal(), Some(9), "it passes {point}");
        node.run();
        let code = command.wait().code();
        mesh.wait_online("box");
        check(&operator, &root, point, code, &log(point, &mesh));
    }
}
