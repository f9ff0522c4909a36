//! Restarts of the hub that nobody notices, and hubs that drain.

use std::fs;
use std::io::PipeWriter;
use std::os::unix::net::UnixDatagram;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use cortex_tests::mesh::{As, Mesh, Operator};
use cortex_tests::process::{Daemon, Outcome};
use cortex_tests::program;
use cortex_tests::tree;
use cortex_tests::wait::until;
use rustix::process::{Pid, Signal, kill_process};

use super::sync::noise;

/// How often the hub is restarted under load.
const RESTARTS: usize = 3;
/// What each long command writes: enough to be under way all the time.
const LINES: usize = 400;
/// How many files each side writes while one short command runs: some hundreds in all.
const FILES_PER_COMMAND: u64 = 12;

/// What a long command writes on standard output.
fn lines(of: usize) -> Vec<u8> {
    (1..=LINES).flat_map(|n| format!("{of} {n} {}\n", "x".repeat(200)).into_bytes()).collect()
}

fn script(of: usize) -> String {
    let x = "x".repeat(200);
    format!("for n in $(seq 1 {LINES}); do echo {of} $n {x}; sleep 0.02; done; exit {}", of + 3)
}

fn digest(bytes: &[u8]) -> blake3::Hash {
    blake3::hash(bytes)
}

#[test]
fn a_hub_restarted_three_times_under_load_loses_no_output_no_commit_and_no_task() {
    let mut mesh = Mesh::start_with_socket(&[]);
    let operator = mesh.operator("operator");
    let _made: Outcome = operator.agent(&["workspace", "create", "w"]).ok();
    let (a, b) = (mesh.node("a", As::Me), mesh.node("b", As::Me));
    for node in ["a", "b"] {
        let _attached: Outcome = operator.agent(&["workspace", "attach", "w", "--node", node]).ok();
    }
    let _settled: Outcome = operator.agent(&["workspace", "status", "w", "--watch"]).ok();
    let (root_a, root_b) = (a.workspace("w"), b.workspace("w"));
    let stop = AtomicBool::new(false);
    let short = AtomicUsize::new(0);
    let mut detached = Vec::new();
    for of in 0..3 {
        let exec = ["exec", "a", "--detach", "-o", "json", "-s", &script(of)];
        let begun = operator.agent(&exec).ok().json();
        detached.push(begun["task_id"].as_str().unwrap().to_owned());
    }
    std::thread::scope(|scope| {
        let (operator, stop, short) = (&operator, &stop, &short);
        // Attached commands on both nodes, whose output is under way all the time.
        let long: Vec<_> = ["a", "b", "a", "b"]
            .into_iter()
            .enumerate()
            .map(|(of, node)| {
                scope.spawn(move || operator.agent(&["exec", node, "-s", &script(of)]))
            })
            .collect();
        // Commands that begin at any moment, also while there is no hub: each runs once, and is told.
        let starters: Vec<_> = ["a", "b", "a"]
            .into_iter()
            .map(|node| {
                scope.spawn(move || {
                    let mut number = 0;
                    while !stop.load(Ordering::Relaxed) {
                        number += 1;
                        let script = format!("echo {number}; exit 4");
                        let outcome = operator.agent(&["exec", node, "-s", &script]);
                        let said = (outcome.code, outcome.text());
                        assert_eq!(said, (4, format!("{number}\n")), "{}", outcome.stderr);
                        short.fetch_add(1, Ordering::Relaxed);
                    }
                })
            })
            .collect();
        // Files, on both sides.
        for (root, side) in [(&root_a, "a"), (&root_b, "b")] {
            scope.spawn(move || {
                let mut number = 0_u64;
                while !stop.load(Ordering::Relaxed) {
                    std::thread::park_timeout(Duration::from_millis(10));
                    // No more of them than commands run: where those are slow, so is the sync.
                    if number >= FILES_PER_COMMAND * (1 + short.load(Ordering::Relaxed) as u64) {
                        continue;
                    }
                    number += 1;
                    fs::write(root.join(format!("{side}-{number}")), noise(number, 40_000))
                        .unwrap();
                    if number.is_multiple_of(5) {
                        fs::remove_file(root.join(format!("{side}-{}", number - 4))).unwrap();
                    }
                }
            });
        }
        let mut took = Vec::new();
        for _ in 0..RESTARTS {
            let before = short.load(Ordering::Relaxed);
            until("some commands ran", || short.load(Ordering::Relaxed) >= before + 8);
            let begun = Instant::now();
            assert!(mesh.hub().terminate().success(), "it stops in order");
            mesh.start_hub();
            took.push(begun.elapsed());
        }
        let before = short.load(Ordering::Relaxed);
        until("some commands ran", || short.load(Ordering::Relaxed) >= before + 8);
        stop.store(true, Ordering::Relaxed);
        eprintln!("restarts took {took:?}; {} short commands ran", short.load(Ordering::Relaxed));
        for starter in starters {
            starter.join().unwrap();
        }
        for (of, client) in long.into_iter().enumerate() {
            let outcome = client.join().unwrap();
            let wanted = i32::try_from(of).unwrap() + 3;
            assert_eq!(outcome.code, wanted, "{}", outcome.stderr);
            assert_eq!(
                digest(&outcome.stdout),
                digest(&lines(of)),
                "{} bytes",
                outcome.stdout.len()
            );
        }
    });
    for (of, id) in detached.iter().enumerate() {
        let waited = operator.agent(&["task", "wait", id]);
        let shown = operator.agent(&["task", "show", id, "-o", "json"]).ok().json();
        assert_eq!(shown["state"], "finished", "{shown} {}", waited.stderr);
        assert_eq!(shown["exit_code"], of + 3, "{shown}");
        let kept = operator.agent(&["task", "logs", id]).ok();
        assert_eq!(digest(&kept.stdout), digest(&lines(of)), "{} bytes", kept.stdout.len());
    }
    let open = operator.agent(&["task", "list", "-o", "json"]).ok().json();
    let open: Vec<_> =
        open.as_array().unwrap().iter().filter(|task| task["state"] != "finished").collect();
    assert!(open.is_empty(), "each task has its end: {open:?}");
    until("both copies are equal", || tree::read(&root_a) == tree::read(&root_b));
    let _settled: Outcome = operator.agent(&["workspace", "status", "w", "--watch"]).ok();
    tree::assert_equal(&root_a, &root_b);
    let conflicts = operator.agent(&["workspace", "conflicts", "w", "-o", "json"]).ok();
    assert_eq!(conflicts.json(), serde_json::Value::Array(Vec::new()));
    let _sound: Outcome = mesh.hubd(&["db", "verify"]).ok();
}

/// A client that has said that its command began, and what ends that command when it is dropped.
fn long(operator: &Operator, mesh: &Mesh) -> (Daemon, PipeWriter) {
    let (input, keyboard) = std::io::pipe().unwrap();
    let script = "echo started; read -r; echo ended";
    let exec = ["exec", "-i", "a", "-s", script];
    (operator.begin_with(&exec, &mesh.path("long.log"), input.into()), keyboard)
}

/// A drain that waits, once it has begun.
fn begin_drain(mesh: &Mesh) -> Daemon {
    let mut command = mesh.hubd_command(&["drain", "--wait", "60s", "-o", "jsonl"]);
    let drain = Daemon::start("drain", &mut command, &mesh.path("drain.log"));
    until("it drains", || mesh.hubd(&["status", "-o", "json"]).ok().json()["draining"] == true);
    drain
}

#[test]
fn a_hub_that_drains_lets_commands_end_and_hands_new_ones_to_the_next() {
    let mut mesh = Mesh::start_with_socket(&[]);
    let operator = mesh.operator("operator");
    let _node = mesh.node("a", As::Me);
    let (mut running, keyboard) = long(&operator, &mesh);
    let mut drain = begin_drain(&mesh);
    // Refused, with the time after which to ask again; the client does so by itself.
    let log = mesh.path("waiting.log");
    // With input, all of which has to reach the command that the next hub takes.
    let input = mesh.path("input");
    fs::write(&input, noise(1, 300_000)).unwrap();
    let mut command = operator.command(&["exec", "-i", "a", "-s", "cksum; echo ran"]);
    let input = fs::File::open(&input).unwrap().into();
    let mut waiting = Daemon::start_with("client", &mut command, &log, input);
    until("it is told", || {
        fs::read_to_string(&log).unwrap_or_default().contains("the hub is being restarted")
    });
    drop(keyboard);
    running.line("the end", |line| (line == "ended").then_some(()));
    assert!(running.wait().success(), "what ran has ended");
    let drained: serde_json::Value =
        drain.line("what became of it", |line| serde_json::from_str(line).ok());
    assert!(drain.wait().success());
    assert_eq!((&drained["stopped"], &drained["handed_over"]), (&true.into(), &0.into()));
    assert!(mesh.hub().wait().success());
    mesh.start_hub();
    let sum = waiting.line("its output", |line| line.ends_with(" 300000").then(|| line.to_owned()));
    let here = std::process::Command::new("cksum")
        .stdin(fs::File::open(mesh.path("input")).unwrap())
        .output()
        .unwrap();
    assert_eq!(sum.trim(), String::from_utf8_lossy(&here.stdout).trim());
    waiting.line("its end", |line| (line == "ran").then_some(()));
    assert!(waiting.wait().success());
    let listed = mesh.hubd(&["audit", "list", "-o", "json", "--action", "hub.drained"]).ok();
    assert_eq!(listed.json().as_array().map(Vec::len), Some(1));
}

#[test]
fn who_begins_commands_on_several_nodes_and_waits_for_a_hub_can_leave_and_is_told_what_is_known() {
    let mut mesh = Mesh::start_with_socket(&[]);
    let operator = mesh.operator("operator");
    let _node = mesh.node("a", As::Me);
    let (_running, _keyboard) = long(&operator, &mesh);
    let _drain = begin_drain(&mesh);
    let log = mesh.path("waiting.log");
    let said = || fs::read_to_string(&log).unwrap();
    let mut client = operator
        .command(&["exec", "a", "a", "--detach", "-o", "json", "--", "true"])
        .stdout(std::process::Stdio::piped())
        .stderr(fs::File::create(&log).unwrap())
        .spawn()
        .unwrap();
    until("it is told", || said().contains("the hub is being restarted"));
    let pid = Pid::from_raw(client.id().try_into().unwrap()).unwrap();
    // The first begins no more, a second one leaves.
    until("that it leaves", || {
        kill_process(pid, Signal::INT).unwrap();
        client.try_wait().unwrap().is_some()
    });
    let ended = client.wait_with_output().unwrap();
    assert_eq!(ended.status.code(), Some(130), "{}", said());
    assert_eq!(ended.stdout, b"[]\n");
    assert!(said().contains("0 of 1 accepted, 1 asked and not waited for"), "{}", said());
}

#[test]
fn a_drain_that_waits_no_longer_hands_over_what_runs_and_one_that_is_undone_ends_nothing() {
    let mut mesh = Mesh::start_with_socket(&[]);
    let operator = mesh.operator("operator");
    let _node = mesh.node("a", As::Me);
    let (mut running, keyboard) = long(&operator, &mesh);
    let mut drain = begin_drain(&mesh);
    let _undone: Outcome = mesh.hubd(&["drain", "--undo"]).ok();
    assert_eq!(drain.wait().code(), Some(1));
    let said = fs::read_to_string(mesh.path("drain.log")).unwrap();
    assert!(said.contains("somebody took it back"), "{said}");
    let _runs: Outcome = operator.agent(&["exec", "a", "--", "true"]).ok();
    let drained = mesh.hubd(&["drain", "--wait", "100ms", "-o", "json"]).ok().json();
    assert_eq!(drained["handed_over"], 1, "{drained}");
    assert!(mesh.hub().wait().success());
    mesh.start_hub();
    drop(keyboard);
    running.line("the end", |line| (line == "ended").then_some(()));
    assert!(running.wait().success());
}

#[test]
fn a_node_is_drained_by_the_hub_s_own_command_line_too() {
    let mut mesh = Mesh::start();
    let operator = mesh.operator("operator");
    let _node = mesh.node("a", As::Me);
    let (mut running, keyboard) = long(&operator, &mesh);
    let early = mesh.hubd(&["node", "drain", "a", "--timeout", "300ms"]);
    assert_eq!(early.code, 6, "{}", early.stderr);
    assert!(early.stderr.contains("hint: cortex-hubd node uncordon"), "{}", early.stderr);
    let refused = operator.agent(&["exec", "a", "--", "true"]);
    assert!(refused.stderr.contains("cordoned"), "{}", refused.stderr);
    let mut drain = mesh.hubd_command(&["node", "drain", "a"]);
    let mut drain = Daemon::start("drain", &mut drain, &mesh.path("drain.log"));
    drop(keyboard);
    running.line("the end", |line| (line == "ended").then_some(()));
    assert!(running.wait().success(), "no command was ended");
    assert!(drain.wait().success());
    let _back: Outcome = mesh.hubd(&["node", "uncordon", "a"]).ok();
    let _runs: Outcome = operator.agent(&["exec", "a", "--", "true"]).ok();
}

#[test]
fn sighup_renews_certificates_changes_what_is_logged_and_ends_nothing() {
    let mut mesh = Mesh::start();
    let operator = mesh.operator("operator");
    let mut node = mesh.node("a", As::Me);
    let (mut running, keyboard) = long(&operator, &mesh);
    mesh.hub().signal(Signal::HUP);
    let log = mesh.path("hub.log");
    until("the hub has another certificate", || {
        fs::read_to_string(&log).unwrap().contains("the hub has a new certificate")
    });
    let status = node.agent(&["status", "-o", "json"]).ok().json();
    let before = status["generation"].as_u64().unwrap_or_else(|| panic!("{status}"));
    let settings = node.home().join("state/agent.json");
    let mut changed: serde_json::Value =
        serde_json::from_slice(&fs::read(&settings).unwrap()).unwrap();
    changed["log"] = "debug".into();
    fs::write(&settings, changed.to_string()).unwrap();
    node.daemon().signal(Signal::HUP);
    until("the node has another certificate", || {
        node.log().contains("the certificate was renewed")
    });
    let status = node.agent(&["status", "-o", "json"]).ok().json();
    assert_eq!(status["generation"], before + 1, "{status}");
    assert!(node.log().contains("filter=\"debug\""), "{}", node.log());
    drop(keyboard);
    running.line("the end", |line| (line == "ended").then_some(()));
    assert!(running.wait().success());
    // Connections that begin now are those of the new certificates.
    node.stop();
    node.run();
    mesh.wait_online("a");
    let _ran: Outcome = operator.agent(&["exec", "a", "--", "true"]).ok();
}

/// What an upgrade of the agent relies on: systemd starts it again when it has ended.
#[test]
fn an_agent_that_is_asked_to_ends_when_no_command_runs_and_ends_none() {
    let mut mesh = Mesh::start();
    let operator = mesh.operator("operator");
    let mut node = mesh.node("a", As::Me);
    let (mut running, keyboard) = long(&operator, &mesh);
    node.daemon().signal(Signal::USR1);
    until("it has heard", || node.log().contains("stopping as soon as no command runs"));
    let meanwhile = operator.agent(&["exec", "a", "--", "echo", "meanwhile"]).ok();
    assert_eq!(meanwhile.text(), "meanwhile\n");
    drop(keyboard);
    running.line("the end", |line| (line == "ended").then_some(()));
    assert!(running.wait().success());
    assert!(node.daemon().wait().success(), "{}", node.log());
    assert!(node.log().contains("no command runs: stopping"), "{}", node.log());
    node.run();
    mesh.wait_online("a");
    let _ran: Outcome = operator.agent(&["exec", "a", "--", "true"]).ok();
    // With nothing that runs, it is at once.
    node.daemon().signal(Signal::USR1);
    assert!(node.daemon().wait().success(), "{}", node.log());
}

/// What a service manager hears of a hub: that a reload failed, and how long a stop may take, which only the
/// settings know.
#[test]
fn the_service_manager_is_told_of_a_reload_that_failed_and_of_the_time_that_a_stop_may_take() {
    let folder = tempfile::tempdir().unwrap();
    let socket = UnixDatagram::bind(folder.path().join("notify")).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let heard = |wanted: &str| {
        let mut bytes = [0; 4096];
        loop {
            let count = socket.recv(&mut bytes).unwrap_or_else(|error| panic!("{wanted}: {error}"));
            let said = std::str::from_utf8(&bytes[..count]).unwrap().to_owned();
            if said.lines().any(|line| line.starts_with(wanted)) {
                return said;
            }
        }
    };
    let settings = folder.path().join("hubd.toml");
    fs::write(&settings, "shutdown_grace = \"100s\"\ngrpc = \"127.0.0.1:0\"\nhttp = \"off\"\n")
        .unwrap();
    let mut command = Command::new(program("hubd-under-test"));
    command
        .arg("serve")
        .arg("--config")
        .arg(&settings)
        .arg("--data")
        .arg(folder.path().join("data"));
    command.env("NOTIFY_SOCKET", folder.path().join("notify"));
    let mut hub = Daemon::start("hub", &mut command, &folder.path().join("log"));
    heard("READY=1");
    fs::write(&settings, "shutdown_grace = \"soon\"\n").unwrap();
    hub.signal(Signal::HUP);
    let failed = heard("READY=1");
    assert!(failed.contains("STATUS=configuration not changed: "), "{failed}");
    assert!(failed.contains("shutdown_grace"), "{failed}");
    hub.signal(Signal::TERM);
    let stopping = heard("STOPPING=1");
    let given = stopping.lines().find_map(|line| line.strip_prefix("EXTEND_TIMEOUT_USEC="));
    let given: u64 = given.unwrap_or_else(|| panic!("{stopping}")).parse().unwrap();
    // Each of its parts may take the grace.
    assert!((300_000_000..600_000_000).contains(&given), "{given}");
    assert!(hub.wait().success());
}
