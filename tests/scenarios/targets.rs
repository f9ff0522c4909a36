//! One command on several nodes.

use std::process::Stdio;
use std::time::Instant;

use cortex_tests::DEADLINE;
use cortex_tests::mesh::{As, Mesh, Node, Operator};
use cortex_tests::process::{Daemon, Outcome, run};
use cortex_tests::wait::until;
use rustix::process::Signal;

use super::exec::closed;

fn nodes(mesh: &Mesh, count: usize) -> Vec<Node> {
    (0..count).map(|n| mesh.node(&format!("n{n:02}"), As::Me)).collect()
}

fn label(operator: &Operator, node: &str, label: &str) {
    let _labelled: Outcome = operator.agent(&["node", "label", node, label]).ok();
}

#[test]
fn twelve_nodes_answer_in_whole_lines_and_the_summary_names_who_failed() {
    let mut mesh = Mesh::start();
    let operator = mesh.operator("admin");
    let mut nodes = nodes(&mesh, 12);
    label(&operator, "n03", "bad=yes");

    // Lines are written in two halves, and never tear.
    let script =
        "for i in $(seq 200); do printf 'line %s ' $i; printf 'end\\n'; echo err $i >&2; done";
    let outcome = operator.agent(&["exec", "--all", "-s", script]);
    assert_eq!(outcome.code, 0, "{}", outcome.stderr);
    let mut seen = std::collections::HashMap::<String, usize>::new();
    for line in outcome.text().lines() {
        let (node, rest) = line.split_once(": ").expect("a prefix");
        let count = seen.entry(node.to_owned()).or_default();
        *count += 1;
        assert_eq!(rest, format!("line {count} end"), "{node}");
    }
    assert_eq!(seen.len(), 12);
    assert!(seen.values().all(|count| *count == 200));
    assert_eq!(outcome.stderr.matches(": err ").count(), 12 * 200);
    assert!(outcome.stderr.contains("12 of 12 succeeded\n"), "{}", outcome.stderr);

    // One fails, one is offline, and both are named and told apart.
    nodes[7].stop();
    until("the hub knows", || mesh.shown("n07")["online"] == false);
    let script = "test $(hostname) = cortex; exit ${BAD:-0}";
    let all = operator.agent(&["exec", "--all", "-s", script]);
    assert_eq!(all.code, 125);
    assert!(all.stderr.contains("11 of 12 succeeded, 1 not reached\n"), "{}", all.stderr);
    assert!(all.stderr.contains("not reached: n07 (node \"n07\" is offline"), "{}", all.stderr);
    let bad = operator.agent(&["exec", "n00", "@bad=yes", "n00", "-s", "exit 3"]);
    assert_eq!(bad.code, 1);
    assert!(bad.stderr.contains("0 of 2 succeeded, 2 failed"), "each once: {}", bad.stderr);
    assert!(bad.stderr.contains("failed: n03 (exit code 3)"), "{}", bad.stderr);
    let both = operator.agent(&["exec", "n00", "n07", "-s", "exit 3"]);
    assert_eq!(both.code, 125, "not reached outweighs failed: {}", both.stderr);

    // A misspelt name, and a selector that fits nobody, run nothing anywhere.
    for target in ["n0O", "@bad=maybe"] {
        let outcome = operator.agent(&["exec", "n00", target, "--", "echo", "ran"]);
        assert_eq!(outcome.code, 125, "{}", outcome.stderr);
        assert!(outcome.stdout.is_empty());
        assert!(outcome.stderr.contains(target), "{}", outcome.stderr);
    }
    let misspelt = operator.agent(&["exec", "n00", "n0O", "--", "true"]);
    assert!(misspelt.stderr.contains("did you mean"), "{}", misspelt.stderr);

    // Equal output once.
    let grouped = operator.agent(&["exec", "--all", "--group", "--", "echo", "same"]);
    let names: Vec<String> = (0..12).filter(|n| *n != 7).map(|n| format!("n{n:02}")).collect();
    let expected = format!("== {} (11 nodes)\nsame\n", names.join(", "));
    assert_eq!(grouped.text(), expected, "{}", grouped.stderr);

    // Output that nobody takes is not passed over in silence, however late it is written.
    let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
    let mut unwritable = operator.command(&["exec", "n00", "n01", "--group", "--", "echo", "x"]);
    let ended = unwritable.stdout(full).stderr(Stdio::null()).status().unwrap();
    assert_eq!(ended.code(), Some(125));

    // Documents, one for each node, reached or not.
    let lines = operator.agent(&["exec", "--all", "-o", "jsonl", "--", "echo", "hi"]);
    let documents: Vec<serde_json::Value> =
        lines.text().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(documents.len(), 12);
    for document in &documents {
        let reached = document["node"] != "n07";
        assert_eq!(document["verdict"], if reached { "exited" } else { "not_reached" });
        assert_eq!(document["stdout"], if reached { "hi\n" } else { "" });
        assert_eq!(document["code"], if reached { 0 } else { 125 });
    }
    let array = operator.agent(&["exec", "n00", "n01", "-o", "json", "--", "true"]).ok().json();
    assert_eq!(array.as_array().unwrap().len(), 2);

    // Nothing runs in a dry run, and the targets are named.
    let dry = operator.agent(&["exec", "--all", "--dry-run", "--", "touch", "x"]).ok();
    assert_eq!(dry.text().lines().count(), 13);
    assert!(dry.text().contains("n07"), "{}", dry.text());
}

#[test]
fn output_directory_gets_files_of_each_node_and_follows_no_link() {
    let mut mesh = Mesh::start();
    let operator = mesh.operator("admin");
    let _nodes = nodes(&mesh, 3);
    let directory = mesh.path("out");
    std::fs::create_dir(&directory).unwrap();
    let victim = mesh.path("victim");
    std::fs::write(&victim, "untouched").unwrap();
    std::os::unix::fs::symlink(&victim, directory.join("n01.stdout")).unwrap();
    std::fs::write(directory.join("n02.stdout"), "of an earlier run, and longer").unwrap();
    let path = directory.to_str().unwrap();
    let script = "echo out; echo err >&2; head -c 1000000 /dev/zero";
    let outcome = operator.agent(&["exec", "--all", "--output-dir", path, "-s", script]);
    assert_eq!(outcome.code, 0, "{}", outcome.stderr);
    assert!(outcome.stdout.is_empty());
    for node in ["n00", "n01", "n02"] {
        let read =
            |stream: &str| std::fs::read(directory.join(format!("{node}.{stream}"))).unwrap();
        assert_eq!(read("stdout").len(), 4 + 1_000_000);
        assert!(read("stdout").starts_with(b"out\n\0"));
        assert_eq!(read("stderr"), b"err\n");
    }
    assert_eq!(std::fs::read_to_string(victim).unwrap(), "untouched");
}

#[test]
fn whoever_closes_standard_error_still_gets_the_output() {
    let mut mesh = Mesh::start();
    let operator = mesh.operator("admin");
    let _nodes = nodes(&mesh, 2);
    let script = "echo err >&2; echo out; exit 3";
    let quietly = |arguments: &[&str]| {
        let mut command = operator.command(arguments);
        let ended = command.stdin(Stdio::null()).stderr(closed()).output().unwrap();
        (ended.status.code(), String::from_utf8(ended.stdout).unwrap())
    };
    let (code, text) = quietly(&["exec", "n00", "n01", "-s", script]);
    assert_eq!((code, text.matches(": out\n").count()), (Some(1), 2), "{text}");
    let grouped = quietly(&["exec", "n00", "n01", "--group", "-s", script]);
    assert_eq!(grouped, (Some(1), "== n00, n01 (2 nodes)\nout\n".to_owned()));
    let begun = operator.agent(&["exec", "n00", "--detach", "-o", "json", "-s", script]).ok();
    let id = begun.json()["task_id"].as_str().unwrap().to_owned();
    assert_eq!(quietly(&["task", "attach", &id]), (Some(3), "out\n".to_owned()));
    assert_eq!(quietly(&["task", "logs", &id]), (Some(0), "out\n".to_owned()));
}

#[test]
fn a_slow_node_and_a_flooding_one_delay_nobody() {
    let mut mesh = Mesh::start();
    let operator = mesh.operator("admin");
    let _nodes = nodes(&mesh, 4);
    let script = "echo ready; sleep 300";
    let mut command = operator.command(&["exec", "n01", "n02", "n03", "-s", script]);
    let mut client = Daemon::start("client", &mut command, &mesh.path("client.log"));
    let mut ready = std::collections::HashSet::new();
    client.line("that all three are ready", |line| {
        ready.insert(line.to_owned());
        (ready.len() == 3).then_some(())
    });
    // While those sleep, others come and go on the same nodes.
    let outcome = operator.agent(&["exec", "n01", "n02", "--", "echo", "quick"]).ok();
    assert_eq!(outcome.text().lines().count(), 2);
    client.signal(Signal::INT);
    assert_eq!(client.wait().code(), Some(130));
    let log = std::fs::read_to_string(mesh.path("client.log")).unwrap();
    assert!(log.contains("3 interrupted"), "{log}");

    // `yes` on all nodes, and a reader that leaves after many lines: every node had its turn.
    let mut flood = operator
        .command(&["exec", "--all", "--", "yes"])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let output = std::io::BufReader::new(flood.stdout.take().unwrap());
    // Counted from when all of them run.
    let mut begun = std::collections::HashSet::new();
    let mut counts = std::collections::HashMap::<String, usize>::new();
    let (mut counted, since) = (0, Instant::now());
    let mut lines = std::io::BufRead::lines(output).map_while(Result::ok);
    while counted < 2_000_000 {
        let line = lines.next().expect("`yes` goes on");
        let (node, rest) = line.split_once(": ").expect("a prefix");
        assert_eq!(rest, "y");
        if begun.len() == 4 {
            *counts.entry(node.to_owned()).or_default() += 1;
            counted += 1;
        } else {
            assert!(since.elapsed() < DEADLINE, "only {begun:?} came to print");
            begun.insert(node.to_owned());
        }
    }
    drop(lines);
    assert_eq!(flood.wait().unwrap().code(), Some(141), "its reader left");
    assert_eq!(counts.len(), 4, "{counts:?}");
    let (most, least) = (counts.values().max().unwrap(), counts.values().min().unwrap());
    assert!(least * 20 > *most, "nobody starves: {counts:?}");
}

#[test]
fn enough_failures_start_no_more_and_too_much_output_ends_a_command() {
    let mut mesh = Mesh::start();
    let operator = mesh.operator("admin");
    let _nodes = nodes(&mesh, 5);
    let stopped =
        operator.agent(&["exec", "--all", "--parallel", "1", "--max-fail", "2", "--", "false"]);
    assert_eq!(stopped.code, 1);
    let summary = "0 of 5 succeeded, 2 failed, 3 not started\n";
    assert!(stopped.stderr.contains(summary), "{}", stopped.stderr);
    for name in ["failed: n00", "failed: n01", "not started: n02", "not started: n04"] {
        assert!(stopped.stderr.contains(name), "{}", stopped.stderr);
    }
    let flood = operator.agent(&[
        "exec",
        "n00",
        "n01",
        "--max-output",
        "64K",
        "--prefix",
        "never",
        "--",
        "yes",
    ]);
    assert_eq!(flood.code, 1, "{}", flood.stderr);
    assert!(flood.stderr.contains("2 failed"), "{}", flood.stderr);
    assert!(flood.stderr.contains("--max-output"), "{}", flood.stderr);
    assert_eq!(flood.stdout.len(), 2 * 64 * 1024);
    // A single node that is named ends with its command's own code, whatever shows its output.
    let one = operator.agent(&["exec", "n00", "--prefix", "always", "-s", "echo x; exit 42"]);
    assert_eq!((one.code, one.text().as_str()), (42, "n00: x\n"), "{}", one.stderr);
    let input = run(&mut operator.command(&["exec", "n00", "n01", "-i", "--", "cat"]), b"x");
    assert_eq!(input.code, 2, "input goes to one target: {}", input.stderr);
}
