//! Commands that outlive what carries them: lost sessions, restarts of the hub, readers that come back.

use std::io::Read as _;
use std::process::{Child, Command, Stdio};

use cortex_tests::mesh::{As, Mesh, Operator};
use cortex_tests::process::{Daemon, Outcome};
use cortex_tests::proxy::{Fault, Proxy};
use cortex_tests::wait;

/// So many numbered lines.
fn counted(lines: u32) -> Vec<u8> {
    (1..=lines).flat_map(|n| format!("{n}\n").into_bytes()).collect()
}

/// A client whose output is read by the test.
struct Client {
    child: Child,
    read: std::thread::JoinHandle<Vec<u8>>,
    seen: std::sync::Arc<std::sync::atomic::AtomicUsize>,
}

impl Client {
    fn start(mut command: Command, log: &std::path::Path) -> Self {
        let log = std::fs::File::create(log).unwrap();
        let mut child =
            command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log).spawn().unwrap();
        let mut output = child.stdout.take().unwrap();
        let seen = std::sync::Arc::new(std::sync::atomic::AtomicUsize::new(0));
        let counter = std::sync::Arc::clone(&seen);
        let read = std::thread::spawn(move || {
            let (mut all, mut buffer) = (Vec::new(), vec![0; 64 * 1024]);
            while let Ok(length @ 1..) = output.read(&mut buffer) {
                all.extend_from_slice(&buffer[..length]);
                counter.store(all.len(), std::sync::atomic::Ordering::Relaxed);
            }
            all
        });
        Self { child, read, seen }
    }

    fn has_seen(&self, bytes: usize) {
        wait::until("output", || self.seen.load(std::sync::atomic::Ordering::Relaxed) >= bytes);
    }

    fn end(mut self) -> (Option<i32>, Vec<u8>) {
        let output = self.read.join().unwrap();
        (self.child.wait().unwrap().code(), output)
    }
}

fn task_of(operator: &Operator, id: &str) -> serde_json::Value {
    operator.agent(&["task", "show", id, "-o", "json"]).ok().json()
}

fn newest(operator: &Operator) -> serde_json::Value {
    operator.agent(&["task", "list", "-o", "json"]).ok().json()[0].clone()
}

#[test]
fn a_hub_killed_under_a_command_loses_no_byte_of_it() {
    let mut mesh = Mesh::start();
    let operator = mesh.operator("operator");
    let _node = mesh.node("a", As::Me);
    let script = "seq 1 1000000; seq 1 1000000 >&2; sleep 2; seq 1 1000000; exit 7";
    let command = operator.command(&["exec", "a", "-s", script]);
    let client = Client::start(command, &mesh.path("client.log"));
    for seen in [1_000, 3_000_000] {
        client.has_seen(seen);
        mesh.kill_hub();
        mesh.start_hub();
    }
    let (code, output) = client.end();
    let log = std::fs::read_to_string(mesh.path("client.log")).unwrap();
    let said = ["note", "error", "cause", "hint"];
    let said = |line: &&str| said.iter().any(|word| line.starts_with(word));
    let notes: Vec<&str> = log.lines().filter(said).collect();
    let one = counted(1_000_000);
    assert_eq!(code, Some(7), "{notes:?}");
    assert!(output == [one.clone(), one].concat(), "{} bytes", output.len());
    assert!(notes.iter().any(|note| note.contains("connected to the hub again")), "{notes:?}");
    let task = newest(&operator);
    assert_eq!((&task["state"], &task["exit_code"]), (&"finished".into(), &7.into()));
}

#[test]
fn a_hub_that_is_restarted_in_order_leaves_commands_running() {
    let mut mesh = Mesh::start();
    let operator = mesh.operator("operator");
    let _node = mesh.node("a", As::Me);
    let script = "for n in $(seq 1 30); do echo $n; sleep 0.1; done; exit 5";
    let command = operator.command(&["exec", "a", "-s", script]);
    let client = Client::start(command, &mesh.path("client.log"));
    client.has_seen(10);
    assert!(mesh.hub().terminate().success());
    mesh.start_hub();
    let (code, output) = client.end();
    assert_eq!(code, Some(5), "{:?}", std::fs::read_to_string(mesh.path("client.log")));
    assert_eq!(output, counted(30));
}

#[test]
fn a_line_that_is_cut_again_and_again_costs_time_and_nothing_else() {
    let mut mesh = Mesh::start();
    let operator = mesh.operator("operator");
    let proxy = Proxy::start(mesh.address().parse().unwrap());
    let _node = mesh.node_through("a", &proxy.address().to_string());
    let command = operator.command(&["exec", "a", "-s", "seq 1 2000000; exit 3"]);
    let client = Client::start(command, &mesh.path("client.log"));
    for seen in [1, 4_000_000, 9_000_000] {
        client.has_seen(seen);
        proxy.cut();
    }
    let (code, output) = client.end();
    let log = std::fs::read_to_string(mesh.path("client.log")).unwrap();
    assert_eq!(code, Some(3), "{log}");
    assert!(output == counted(2_000_000));
    assert!(log.contains("the node is back"), "{log}");
}

#[test]
fn a_node_that_stays_away_fails_its_command_in_time_and_its_word_is_added_later() {
    let mut mesh = Mesh::start_with(&["--resume-grace", "1s"]);
    let operator = mesh.operator("operator");
    let proxy = Proxy::start(mesh.address().parse().unwrap());
    let _node = mesh.node_through("a", &proxy.address().to_string());
    let mark = format!("cortex-mark-{}", rand::random::<u64>());
    let script = format!("exec -a {mark} bash -c 'echo started; sleep 5; exit 9'");
    let mut client = operator.begin(&["exec", "a", "-s", &script], &mesh.path("client.log"));
    proxy.set(Fault::Refuse);
    proxy.cut();
    assert_eq!(client.wait().code(), Some(125));
    let log = std::fs::read_to_string(mesh.path("client.log")).unwrap();
    assert!(log.contains("connection to the node was lost"), "{log}");
    let task = newest(&operator);
    assert_eq!((&task["state"], &task["verdict"]), (&"failed".into(), &"stream_lost".into()));
    wait::until("its end on the node", || !super::exec::runs(&mark));
    proxy.set(Fault::None);
    let id = task["task_id"].as_str().unwrap();
    wait::until("the late outcome", || !task_of(&operator, id)["late_outcome"].is_null());
    let task = task_of(&operator, id);
    assert_eq!(task["verdict"], "stream_lost", "never rewritten");
    assert_eq!(task["late_outcome"]["exit_code"], 9);
}

#[test]
fn kill_on_disconnect_ends_the_command_on_the_node() {
    let mut mesh = Mesh::start();
    let operator = mesh.operator("operator");
    let proxy = Proxy::start(mesh.address().parse().unwrap());
    let node = mesh.node_through("a", &proxy.address().to_string());
    let mark = format!("cortex-mark-{}", rand::random::<u64>());
    let script = format!("exec -a {mark} sleep 300 & echo started; wait");
    let mut client = operator
        .begin(&["exec", "a", "--on-disconnect", "kill", "-s", &script], &mesh.path("client.log"));
    proxy.cut();
    let code = client.wait().code();
    assert_eq!(code, Some(125), "nobody cancelled it: {}", node.log());
    assert!(!super::exec::runs(&mark));
    let task = newest(&operator);
    assert_eq!(task["state"], "failed");
    assert!(task["reason"].as_str().unwrap().contains("lost its connection"), "{task}");
}

#[test]
fn an_agent_that_died_is_not_waited_for() {
    let mut mesh = Mesh::start();
    let operator = mesh.operator("operator");
    let mut node = mesh.node("a", As::Me);
    let mut client =
        operator.begin(&["exec", "a", "-s", "echo started; sleep 300"], &mesh.path("client.log"));
    node.kill();
    node.run();
    assert_eq!(client.wait().code(), Some(125));
    let task = newest(&operator);
    assert_eq!(task["state"], "failed");
    assert!(task["reason"].as_str().unwrap().contains("agent stopped"), "{task}");
}

#[test]
fn a_key_leads_to_one_task_whose_output_comes_again() {
    let mut mesh = Mesh::start();
    let operator = mesh.operator("operator");
    let node = mesh.node("a", As::Me);
    let keyed = |script: &str| -> Outcome {
        operator.agent(&["exec", "a", "--idempotency-key", "deploy-1", "-s", script])
    };
    let script = "date +%N; exit 4";
    let (first, second) = (keyed(script), keyed(script));
    assert_eq!((first.code, second.code), (4, 4), "{} {}", first.stderr, second.stderr);
    assert_eq!(first.text(), second.text(), "it ran once");
    let other = keyed("true");
    assert_eq!(other.code, 125);
    assert!(other.stderr.contains("another command"), "{}", other.stderr);
    drop(node);
}

#[test]
fn a_stalled_reader_stops_its_own_command_only_and_a_cancel_still_arrives() {
    let mut mesh = Mesh::start();
    let operator = mesh.operator("operator");
    let _node = mesh.node("a", As::Me);
    // Never read: its pipe fills, and everything behind it.
    let stalled: Vec<Child> = (0..4)
        .map(|_| {
            operator.command(&["exec", "a", "--", "yes"]).stdout(Stdio::piped()).spawn().unwrap()
        })
        .collect();
    wait::until("that they run", || {
        let list = operator.agent(&["task", "list", "--status", "running", "-o", "json"]).ok();
        list.json().as_array().unwrap().len() == 4
    });
    let fast = operator.agent(&["exec", "a", "-s", "head -c 50000000 /dev/zero"]).ok();
    assert_eq!(fast.stdout.len(), 50_000_000);
    for task in operator
        .agent(&["task", "list", "--status", "running", "-o", "json"])
        .ok()
        .json()
        .as_array()
        .unwrap()
    {
        let id = task["task_id"].as_str().unwrap();
        let begun = std::time::Instant::now();
        let _cancelled: Outcome = operator.agent(&["task", "cancel", id]).ok();
        let waited = operator.agent(&["task", "wait", id, "-o", "json"]);
        assert!(waited.text().contains("cancelled"), "{}", waited.text());
        assert!(begun.elapsed().as_secs() < 20);
    }
    for mut child in stalled {
        child.kill().unwrap();
        child.wait().unwrap();
    }
}

#[test]
fn a_detached_task_is_looked_at_waited_for_and_repeated() {
    let mut mesh = Mesh::start();
    let operator = mesh.operator("operator");
    let _node = mesh.node("a", As::Me);
    let script = "echo one; sleep 1; echo two; echo err >&2; exit 6";
    let begun = operator.agent(&["exec", "a", "--detach", "-o", "json", "-s", script]).ok().json();
    let id = begun["task_id"].as_str().unwrap().to_owned();
    let followed = operator.agent(&["task", "logs", &id, "-f"]);
    assert_eq!(followed.code, 0, "{}", followed.stderr);
    assert_eq!((followed.text().as_str(), followed.stderr.as_str()), ("one\ntwo\n", "err\n"));
    let attached = operator.agent(&["task", "attach", &id[id.len() - 8..]]);
    assert_eq!((attached.code, attached.text().as_str()), (6, "one\ntwo\n"));
    let waited = operator.agent(&["task", "wait", &id]);
    assert_eq!(waited.code, 6, "{}", waited.stderr);
    let repeated = operator.agent(&["task", "retry", &id]);
    assert_eq!((repeated.code, repeated.text().as_str()), (6, "one\ntwo\n"), "{}", repeated.stderr);
    let task = newest(&operator);
    assert_eq!(task["retry_of"], id.as_str());
    assert_ne!(task["task_id"], id.as_str());
    let unknown = operator.agent(&["task", "show", "00000000"]);
    assert_eq!(unknown.code, 3, "{}", unknown.stderr);
}

#[test]
fn what_is_not_kept_is_said() {
    let mut mesh = Mesh::start_with(&["--task-output", "65536"]);
    let operator = mesh.operator("operator");
    let _node = mesh.node("a", As::Me);
    let script = "seq 1 100000";
    let begun = operator.agent(&["exec", "a", "--detach", "-o", "json", "-s", script]).ok().json();
    let id = begun["task_id"].as_str().unwrap();
    assert_eq!(operator.agent(&["task", "wait", id]).code, 0);
    let logs = operator.agent(&["task", "logs", id]).ok();
    assert!(logs.text().ends_with("\n99999\n100000\n"), "the end is kept");
    assert!(logs.stderr.contains("bytes were not kept"), "{}", logs.stderr);
    let attached = operator.agent(&["task", "attach", id]);
    assert_eq!(attached.code, 125, "not complete, so no success");
}

#[test]
fn tasks_are_seen_within_a_scope_and_cancelled_by_those_who_may() {
    let mut mesh = Mesh::start();
    let (one, two) = (mesh.operator("operator"), mesh.operator("operator"));
    let scoped = mesh.operator_with("operator", &["--scope", "env=dev"]);
    let viewer = mesh.operator("viewer");
    let _node = mesh.node("a", As::Me);
    let begun =
        one.agent(&["exec", "a", "--detach", "-o", "json", "--", "sleep", "300"]).ok().json();
    let id = begun["task_id"].as_str().unwrap();
    assert_eq!(viewer.agent(&["task", "show", id]).code, 0);
    assert_eq!(viewer.agent(&["task", "cancel", id]).code, 5);
    assert_eq!(scoped.agent(&["task", "show", id]).code, 3);
    assert_eq!(scoped.agent(&["task", "list", "-o", "json"]).ok().json(), serde_json::json!([]));
    assert_eq!(
        two.agent(&["task", "list", "--mine", "-o", "json"]).ok().json(),
        serde_json::json!([])
    );
    let shown = || one.agent(&["task", "show", id, "-o", "json"]).ok().json();
    // Before that there is nothing that a signal could reach.
    wait::until("it runs", || shown()["state"] == "running");
    assert_eq!(two.agent(&["task", "cancel", id, "--signal", "INT"]).code, 0);
    assert_eq!(one.agent(&["task", "wait", id]).code, 130);
}

#[test]
fn a_nodes_history_outlives_restarts_and_is_told_without_escape_sequences_unless_raw() {
    let mut mesh = Mesh::start();
    let (operator, token) = (mesh.operator("operator"), mesh.operator("agent-token"));
    let mut node = mesh.node("a", As::Me);
    // The last line comes when the others have arrived.
    let red = r"printf 'one\n\033[31mtwo\033[0m\n'; read -r; echo three >&2";
    let mut command = operator.command(&["exec", "-i", "a", "-s", red]);
    let (input, keyboard) = std::io::pipe().unwrap();
    let log = mesh.path("client.log");
    let mut client = Daemon::start_with("client", &mut command, &log, input.into());
    client.line("two lines", |line| line.contains("two").then_some(()));
    drop(keyboard);
    assert_eq!(client.wait().code(), Some(0));
    let read = |arguments: &[&str]| -> String {
        operator.agent(&[&["history", "a"], arguments].concat()).ok().text()
    };
    assert_eq!(read(&[]), "one\ntwo\nthree\n");
    mesh.kill_hub();
    node.kill();
    mesh.start_hub();
    node.run();
    mesh.wait_online("a");
    assert_eq!(read(&["--raw", "--lines", "2"]), "\u{1b}[31mtwo\u{1b}[0m\nthree\n");
    assert_eq!(token.agent(&["history", "a"]).code, 5);
    let mut command = operator.command(&["history", "a", "--lines", "1", "-f"]);
    let mut follower = Daemon::start("follower", &mut command, &mesh.path("follower.log"));
    follower.line("the last line", |line| (line == "three").then_some(()));
    assert_eq!(operator.agent(&["exec", "a", "--", "echo", "four"]).code, 0);
    follower.line("what comes", |line| (line == "four").then_some(()));
}
