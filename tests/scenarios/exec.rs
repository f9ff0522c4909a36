//! Running commands: output, exit codes, cancelling, losing the node.

use std::fs::File;
use std::io::Read as _;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};

use cortex_tests::is_root;
use cortex_tests::mesh::{As, Mesh, Operator};
use cortex_tests::process::{Daemon, Outcome, end, run};
use cortex_tests::proxy::{Proxy, Towards};
use cortex_tests::wait::until;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;

fn exec(operator: &Operator, node: &str, script: &str) -> Outcome {
    operator.agent(&["exec", node, "-s", script])
}

#[test]
fn exit_codes_and_both_streams_come_back() {
    let mut mesh = Mesh::start();
    let operator = mesh.operator("operator");
    let users = if is_root() { vec![As::Me, As::Unprivileged] } else { vec![As::Me] };
    for (index, user) in users.into_iter().enumerate() {
        let name = format!("n{index}");
        let _node = mesh.node(&name, user);
        let outcome = exec(&operator, &name, "echo to out; echo to err >&2; exit 7");
        assert_eq!(outcome.code, 7, "{}", outcome.stderr);
        assert_eq!(outcome.text(), "to out\n");
        assert_eq!(outcome.stderr, "to err\n");
        assert_eq!(operator.agent(&["exec", &name, "--", "true"]).code, 0);
        assert_eq!(operator.agent(&["exec", &name, "--", "no-such-program"]).code, 127);
        assert_eq!(exec(&operator, &name, "kill -TERM $$").code, 128 + 15);
        let bytes = operator.agent(&["exec", &name, "--", "printf", r"\000\377\n"]).ok();
        assert_eq!(bytes.stdout, b"\x00\xff\n", "output is bytes");
        assert_eq!(exec(&operator, &name, "sleep 60 & exit 3").code, 3, "ends with its command");
    }
}

#[test]
fn every_byte_of_64_mib_arrives() {
    let mut mesh = Mesh::start();
    let operator = mesh.operator("operator");
    let _node = mesh.node("a", As::Me);
    let script = "head -c 67108864 /dev/zero | tr '\\0' x; head -c 1048576 /dev/zero >&2";
    let outcome = exec(&operator, "a", script);
    assert_eq!(outcome.code, 0);
    assert_eq!(outcome.stdout.len(), 64 << 20);
    assert!(outcome.stdout.iter().all(|&byte| byte == b'x'));
    assert_eq!(outcome.stderr.len(), 1 << 20);
}

#[test]
fn a_missing_node_a_misspelt_one_and_an_offline_one_are_different_answers() {
    let mut mesh = Mesh::start();
    let operator = mesh.operator("operator");
    let mut node = mesh.node("web-3", As::Me);
    let misspelt = exec(&operator, "wbe-3", "true");
    assert_eq!(misspelt.code, 125);
    assert!(misspelt.stderr.contains("did you mean \"web-3\""), "{}", misspelt.stderr);
    node.stop();
    until("the hub knows", || mesh.shown("web-3")["online"] == false);
    let offline = exec(&operator, "web-3", "true");
    assert_eq!(offline.code, 125);
    assert!(offline.stderr.contains("offline"), "{}", offline.stderr);
}

#[test]
fn interrupting_the_client_ends_the_command_on_the_node() {
    let mut mesh = Mesh::start();
    let operator = mesh.operator("operator");
    let _node = mesh.node("a", As::Me);
    let mark = format!("cortex-mark-{}", rand::random::<u64>());
    // Told by the marked process itself: before its exec it has no mark.
    let script = format!("exec -a {mark} bash -c 'echo started; sleep 300; true' & wait");
    let mut client = operator.begin(&["exec", "a", "-s", &script], &mesh.path("client.log"));
    assert!(runs(&mark), "the command runs");
    client.signal(Signal::INT);
    assert_eq!(client.wait().code(), Some(130));
    assert!(!runs(&mark), "nothing of it is left");
}

/// Whether a process of this name exists anywhere on the machine.
pub(super) fn runs(mark: &str) -> bool {
    let folders = std::fs::read_dir("/proc").unwrap().map_while(Result::ok);
    folders.filter_map(|folder| std::fs::read(folder.path().join("cmdline")).ok()).any(|line| {
        line.windows(mark.len()).any(|window| window == mark.as_bytes())
            && !line.windows(4).any(|window| window == b"exec")
    })
}

#[test]
fn losing_the_node_is_told_at_once_and_is_not_the_commands_failure() {
    let mut mesh = Mesh::start_with(&["--resume-grace", "20s"]);
    let operator = mesh.operator("operator");
    let mut node = mesh.node("a", As::Me);
    let mut client =
        operator.begin(&["exec", "a", "-s", "echo started; sleep 300"], &mesh.path("client.log"));
    node.kill();
    let (begun, log) = (std::time::Instant::now(), mesh.path("client.log"));
    let said =
        || std::fs::read_to_string(&log).unwrap().contains("connection to the node was lost");
    until("that the loss is said", said);
    let took = begun.elapsed();
    assert!(took.as_secs() < 15, "at once, not when the grace is over: {took:?}");
    assert_eq!(client.wait().code(), Some(125));
    let log = std::fs::read_to_string(mesh.path("client.log")).unwrap();
    assert!(log.contains("lost"), "{log}");
}

/// Exits when it is read by nobody: what comes to it fails.
pub(super) fn closed() -> Stdio {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    writer.into()
}

#[test]
fn signals_that_were_ignored_from_the_start_end_nothing() {
    let mut mesh = Mesh::start();
    let operator = mesh.operator("operator");
    let _node = mesh.node("a", As::Me);
    // Cancelled by somebody else: a code of its own.
    for (targets, code) in [(&["a"] as &[&str], 143), (&["a", "a", "--prefix", "never"], 1)] {
        let arguments = [&["exec"], targets, &["-s", "echo started; sleep 300"]].concat();
        let exec = operator.command(&arguments);
        // As `nohup` does, and a script with what it runs in the background.
        let mut command = Command::new("sh");
        command.args(["-c", "trap '' HUP INT; exec \"$0\" \"$@\""]).arg(exec.get_program());
        command.args(exec.get_args()).env_remove("CORTEX_TOKEN").env_remove("CORTEX_STATE");
        command.envs(exec.get_envs().filter_map(|(name, value)| Some((name, value?))));
        let log = mesh.path("client.log");
        let mut client = Daemon::start("client", &mut command, &log);
        client.line("that it started", |line| (line == "started").then_some(()));
        client.signal(Signal::HUP);
        client.signal(Signal::INT);
        let status = std::fs::read_to_string(format!("/proc/{}/status", client.id())).unwrap();
        assert!(status.lines().any(|line| line.starts_with("SigIgn:") && line.ends_with("3")));
        let listed = operator.agent(&["task", "list", "--limit", "1", "-o", "json"]).ok().json();
        let id = listed[0]["task_id"].as_str().unwrap().to_owned();
        let _cancelled: Outcome = operator.agent(&["task", "cancel", &id]).ok();
        assert_eq!(client.wait().code(), Some(code), "{}", std::fs::read_to_string(log).unwrap());
    }
}

#[test]
fn input_that_cannot_be_read_is_not_taken_for_its_end() {
    let mut mesh = Mesh::start();
    let operator = mesh.operator("operator");
    let _node = mesh.node("a", As::Me);
    let mut command = operator.command(&["exec", "a", "-i", "-s", "cat; echo all"]);
    let outcome = command.stdin(File::open("/").unwrap()).output().unwrap();
    let said = String::from_utf8_lossy(&outcome.stderr);
    assert_eq!(outcome.status.code(), Some(125), "{said}");
    assert!(said.contains("cannot read standard input"), "{said}");
    assert!(outcome.stdout.is_empty(), "it waited for the end");
}

#[test]
fn documents_that_cannot_be_written_are_told_as_output_is() {
    let mut mesh = Mesh::start();
    let operator = mesh.operator("operator");
    let _nodes = [mesh.node("a", As::Me), mesh.node("b", As::Me)];
    let full = || Stdio::from(File::options().write(true).open("/dev/full").unwrap());
    for nodes in [&["a"] as &[&str], &["a", "b"]] {
        for more in [&["-o", "json"] as &[&str], &["-o", "jsonl"], &["-o", "json", "--detach"]] {
            let arguments = [&["exec"], nodes, more, &["--", "true"]].concat();
            let ended = |output: Stdio| {
                let mut command = operator.command(&arguments);
                command.stdout(output).stderr(Stdio::null()).status().unwrap().code()
            };
            assert_eq!(ended(closed()), Some(141), "{arguments:?}");
            assert_eq!(ended(full()), Some(125), "{arguments:?}");
            assert_eq!(ended(Stdio::null()), Some(0), "{arguments:?}");
        }
    }
}

#[test]
fn what_had_come_outlives_the_failure_of_the_mesh_and_its_task_is_named() {
    // Without a grace a broken connection is the end of it.
    let mut mesh = Mesh::start_with(&["--resume-grace", "0s"]);
    let proxy = Proxy::start(mesh.address().parse().unwrap());
    let operator = mesh.operator_through("operator", &proxy.address().to_string());
    let _node = mesh.node("a", As::Me);
    let newest = |operator: &Operator| {
        let listed = operator.agent(&["task", "list", "--limit", "1", "-o", "json"]).ok().json();
        listed[0].clone()
    };
    let script = "head -c 3000000 /dev/zero | tr '\\0' x; sleep 300";
    for format in ["json", "table"] {
        proxy.cut_after(Towards::Client, 2_000_000);
        let mut command = operator.command(&["exec", "a", "-o", format, "-s", script]);
        let mut client = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        until("the cut", || proxy.has_cut());
        until("that it is noticed", || newest(&operator)["state"] == "failed");
        let id = newest(&operator)["task_id"].as_str().unwrap().to_owned();
        // Nobody has read anything before.
        let mut output = Vec::new();
        client.stdout.take().unwrap().read_to_end(&mut output).unwrap();
        let (status, said) = end(client, "client");
        assert_eq!(status.code(), Some(125), "{said}");
        let hint = format!("cortex-agent task show {id}");
        assert!(said.contains(&format!("hint: {hint}\n")), "{said}");
        let shown = if format == "json" {
            let document: serde_json::Value = serde_json::from_slice(&output).unwrap();
            assert_eq!((&document["task_id"], &document["hint"]), (&json!(id), &json!(hint)));
            assert_eq!((&document["verdict"], &document["code"]), (&json!("unknown"), &json!(125)));
            assert_eq!(document["complete"], false);
            assert!(document["reason"].as_str().unwrap().contains("lost"), "{document}");
            document["stdout"].as_str().unwrap().to_owned().into_bytes()
        } else {
            output
        };
        // More than any pipe holds; a part of the rest was still under way.
        assert!(shown.len() > 200_000, "{}", shown.len());
        assert!(shown.iter().all(|byte| *byte == b'x'));
    }
}

#[test]
fn who_interrupts_twice_waits_for_no_reader() {
    let mut mesh = Mesh::start();
    let operator = mesh.operator("operator");
    let _node = mesh.node("a", As::Me);
    let mut command = operator.command(&["exec", "a", "--", "yes"]);
    let mut stalled = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let pid = Pid::from_raw(stalled.id().try_into().unwrap()).unwrap();
    let state = || operator.agent(&["task", "list", "-o", "json"]).ok().json()[0]["state"].clone();
    until("that it runs", || state() == "running");
    kill_process(pid, Signal::INT).unwrap();
    until("that it is cancelled", || state() == "cancelled");
    assert!(stalled.try_wait().unwrap().is_none(), "what came is still to be read");
    kill_process(pid, Signal::INT).unwrap();
    assert_eq!(end(stalled, "client").0.code(), Some(130));
}

#[test]
fn a_document_tells_of_a_command_that_did_not_begin() {
    let mut mesh = Mesh::start();
    let (operator, viewer) = (mesh.operator("operator"), mesh.operator("viewer"));
    let mut node = mesh.node("a", As::Me);
    let told = |operator: &Operator, code: i32, verdict: &str| {
        let outcome = operator.agent(&["exec", "a", "-o", "json", "--", "true"]);
        assert_eq!(outcome.code, code, "{}", outcome.stderr);
        assert!(outcome.stderr.contains("error: "), "{}", outcome.stderr);
        let document = outcome.json();
        let found = (&document["verdict"], &document["node"], &document["task_id"]);
        assert_eq!(found, (&json!(verdict), &json!("a"), &json!("")), "{document}");
        assert_eq!((&document["code"], &document["complete"]), (&json!(code), &json!(false)));
        assert!(!document["reason"].as_str().unwrap().is_empty(), "{document}");
    };
    told(&viewer, 126, "refused");
    node.stop();
    until("the hub knows", || mesh.shown("a")["online"] == false);
    told(&operator, 125, "not_reached");
    mesh.kill_hub();
    told(&operator, 125, "not_reached");
}

#[test]
fn a_viewer_runs_nothing_and_an_agent_token_only_in_workspaces() {
    let mut mesh = Mesh::start();
    let (viewer, token) = (mesh.operator("viewer"), mesh.operator("agent-token"));
    let _node = mesh.node("a", As::Me);
    let outcome = exec(&viewer, "a", "true");
    assert_eq!(outcome.code, 126, "{}", outcome.stderr);
    assert!(outcome.stderr.contains("viewer"), "{}", outcome.stderr);
    let outcome = exec(&token, "a", "true");
    assert_eq!(outcome.code, 126, "{}", outcome.stderr);
    assert!(outcome.stderr.contains("workspace"), "{}", outcome.stderr);
}

#[test]
fn permissive_is_refused_where_nobody_allowed_it() {
    let mut mesh = Mesh::start();
    let operator = mesh.operator("admin");
    let _node = mesh.node("a", As::Me);
    let outcome = operator.agent(&["exec", "a", "--mode", "permissive", "--", "true"]);
    assert_eq!(outcome.code, 126, "{}", outcome.stderr);
    assert!(outcome.stderr.contains("policy"), "{}", outcome.stderr);
}

#[test]
fn standard_input_is_passed_on_and_ends() {
    let mut mesh = Mesh::start();
    let operator = mesh.operator("operator");
    let _node = mesh.node("a", As::Me);
    let input: Vec<u8> = (0..3_000_000_u32).map(|n| n as u8).collect();
    let outcome = run(&mut operator.command(&["exec", "a", "-i", "--", "cat"]), &input).ok();
    assert!(outcome.stdout == input);
    let without = run(&mut operator.command(&["exec", "a", "--", "cat"]), b"ignored").ok();
    assert!(without.stdout.is_empty());
}

#[test]
fn a_reader_that_goes_away_ends_its_command() {
    let mut mesh = Mesh::start();
    let operator = mesh.operator("operator");
    let _node = mesh.node("a", As::Me);
    let mut flood =
        operator.command(&["exec", "a", "--", "yes"]).stdout(Stdio::piped()).spawn().unwrap();
    let output = flood.stdout.take().unwrap();
    let head = Command::new("head").arg("-n1").stdin(output).output().unwrap();
    assert_eq!(head.stdout, b"y\n");
    // It ends by itself, without an error of its own making.
    assert!(flood.wait().unwrap().code().is_some());
    let listed = operator.agent(&["node", "list", "-o", "json"]).ok().json();
    assert_eq!(listed[0]["online"], true);
}

/// Whether a directory and all that lead to it may be passed by any user.
fn everybody_gets_to(place: &Path) -> bool {
    let open = |folder: &Path| {
        std::fs::metadata(folder).is_ok_and(|metadata| metadata.permissions().mode() & 0o001 != 0)
    };
    place.canonicalize().is_ok_and(|place| place.ancestors().all(open))
}

#[test]
fn a_nodes_owner_shows_commands_more_and_gives_them_less() {
    // Not among temporary files, of which nothing is shown; and where every user gets to.
    let places = [env!("CARGO_TARGET_TMPDIR"), "/srv", "/opt"].map(Path::new).into_iter();
    let mut places = places.filter(|place| {
        !place.starts_with("/tmp") && !place.starts_with("/var/tmp") && everybody_gets_to(place)
    });
    let Some(folder) = places.find_map(|place| tempfile::tempdir_in(place).ok()) else {
        eprintln!("skipped: this user has no place for files to show");
        return;
    };
    let mut mesh = Mesh::start();
    let operator = mesh.operator("operator");
    let users = if is_root() { vec![As::Me, As::Unprivileged] } else { vec![As::Me] };
    let root = folder.path().canonicalize().unwrap();
    std::fs::set_permissions(&root, PermissionsExt::from_mode(0o755)).unwrap();
    std::fs::write(root.join("model"), "weights\n").unwrap();
    for (index, user) in users.into_iter().enumerate() {
        let name = format!("n{index}");
        let node = mesh.node(&name, user);
        let settings = node.home().join("state/agent.json");
        let change = |field: &str, value: serde_json::Value| {
            let text = std::fs::read(&settings).unwrap();
            let mut all: serde_json::Value = serde_json::from_slice(&text).unwrap();
            all[field] = value;
            std::fs::write(&settings, all.to_string()).unwrap();
        };
        let read = format!("cat {}/model", root.display());
        assert_ne!(exec(&operator, &name, &read).code, 0, "nothing is shown unless told");
        // Each command reads it anew.
        change("sandbox", json!({ "read_only_paths": [root] }));
        change("commands", json!({ "processes": 40 }));
        assert_eq!(exec(&operator, &name, &read).ok().text(), "weights\n");
        let write = format!("echo x >> {}/model", root.display());
        assert_ne!(exec(&operator, &name, &write).code, 0);
        let doctor = node.agent(&["doctor"]).text();
        assert!(doctor.contains(&root.display().to_string()), "{doctor}");
        change("commands", json!({ "time_limit_s": 2, "processes": 40 }));
        let late = ["exec", &name, "--time-limit", "60s", "--", "sleep", "60"];
        assert_eq!(operator.agent(&late).code, 124, "its time is the owner's");
        change("commands", json!({ "processes": 40 }));

        // Workspaces are written by commands and other machines: what lies there is nobody's to show.
        change("workspace_paths", json!({ "w": root.join("w") }));
        let refused = exec(&operator, &name, "true");
        assert_eq!(refused.code, 126, "{}", refused.stderr);
        assert!(refused.stderr.contains("would show"), "{}", refused.stderr);
        assert_eq!(node.agent(&["doctor"]).code, 1);
        change("sandbox", json!({ "read_only_paths": ["/etc/shadow"] }));
        let doctor = node.agent(&["doctor"]);
        assert_eq!(doctor.code, 1);
        assert!(doctor.text().contains("read_only_paths"), "{}", doctor.text());
        let blind = exec(&operator, &name, &read);
        assert_ne!(blind.code, 0, "settings that cannot be read show nothing");
    }
}
