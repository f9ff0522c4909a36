//! Files on nodes from afar: `ls`, `cat`, `stat`, `write`, `rm`, `mkdir` through a real hub.

use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::process::{Command, Stdio};

use cortex_tests::is_root;
use cortex_tests::mesh::{As, Mesh, Node, Operator};
use cortex_tests::process::{end, run, wait};
use cortex_tests::proxy::{Fault, Proxy};
use cortex_tests::wait::until;
use rand::{Rng as _, SeedableRng as _};

const MIB: usize = 1024 * 1024;

/// A workspace on a node.
fn attach(operator: &Operator, node: &Node, workspace: &str) {
    let _made = operator.agent(&["workspace", "create", workspace]);
    let _attached = operator.agent(&["workspace", "attach", workspace, "--node", &node.name]).ok();
    until("the workspace is there", || node.workspace(workspace).is_dir());
}

fn write(
    operator: &Operator,
    arguments: &[&str],
    content: &[u8],
) -> cortex_tests::process::Outcome {
    run(&mut operator.command(&[&["write"], arguments].concat()), content)
}

/// Most memory a process had so far, in KiB.
fn peak_kib(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// Content that cannot be compressed, the same each time.
fn noise(bytes: usize) -> Vec<u8> {
    let mut content = vec![0; bytes];
    rand::rngs::SmallRng::seed_from_u64(5).fill_bytes(&mut content);
    content
}

/// What lies in the private directory of the only workspace of a node.
fn drafts(node: &Node) -> Vec<std::path::PathBuf> {
    let below = |path: &Path| -> Vec<std::path::PathBuf> {
        let entries = std::fs::read_dir(path).into_iter().flatten();
        entries.map(|entry| entry.unwrap().path()).collect()
    };
    let workspaces = below(&node.home().join("state/workspaces"));
    workspaces.iter().flat_map(|path| below(&path.join("files/incoming"))).collect()
}

#[test]
fn files_are_written_read_listed_and_removed_as_whoever_owns_the_workspace() {
    let mut mesh = Mesh::start();
    let operator = mesh.operator("operator");
    let users = if is_root() { vec![As::Me, As::Unprivileged] } else { vec![As::Me] };
    for (index, user) in users.into_iter().enumerate() {
        let node = mesh.node(&format!("n{index}"), user);
        attach(&operator, &node, "app");
        let at = |path: &str| format!("n{index}:app/{path}");
        let _made = operator.agent(&["mkdir", "-p", &at("src/deep")]).ok();
        let written = write(&operator, &[&at("src/deep/f"), "-o", "json"], b"content").ok();
        let hash = blake3::hash(b"content").to_hex().to_string();
        assert_eq!(
            (&written.json()["hash"], &written.json()["bytes"]),
            (&hash.clone().into(), &7.into())
        );
        assert_eq!(operator.agent(&["cat", &at("src/deep/f")]).ok().text(), "content");
        let part = ["cat", &at("src/deep/f"), "--offset", "3", "--length", "2"];
        assert_eq!(operator.agent(&part).ok().text(), "te");
        let stat = operator.agent(&["stat", &at("src/deep/f"), "-o", "json"]).ok().json();
        assert_eq!((&stat["hash"], &stat["kind"]), (&hash.clone().into(), &"file".into()));
        let root = std::fs::metadata(node.workspace("app")).unwrap();
        for path in ["src", "src/deep", "src/deep/f"] {
            let made = std::fs::metadata(node.workspace("app").join(path)).unwrap();
            assert_eq!((made.uid(), made.gid()), (root.uid(), root.gid()), "{path}");
        }
        let run = write(&operator, &[&at("run.sh"), "--mode", "755"], b"#!/bin/sh\necho ran\n");
        assert_eq!(run.ok().text().lines().count(), 2);
        let exec = ["exec", &node.name, "--workspace", "app", "--", "./run.sh"];
        assert_eq!(operator.agent(&exec).ok().text(), "ran\n");
        let list = operator.agent(&["ls", &at(""), "-o", "json"]).ok().json();
        let names: Vec<_> = list.as_array().unwrap().iter().map(|entry| &entry["name"]).collect();
        assert_eq!(names, ["run.sh", "src"]);
        let table = operator.agent(&["ls", &at("")]).ok().text();
        assert!(table.contains("-rwxr-xr-x") && table.contains(" src/\n"), "{table}");
        assert_eq!(operator.agent(&["rm", &at("src")]).code, 7);
        let removed = operator.agent(&["rm", "-r", &at("src"), "-o", "json"]).ok().json();
        assert_eq!(removed["removed"], 3);
        assert!(!node.workspace("app").join("src").exists());
    }
}

#[test]
fn what_is_written_reaches_the_other_members_and_what_is_removed_is_gone_there_too() {
    let mut mesh = Mesh::start();
    let operator = mesh.operator("operator");
    let (a, b) = (mesh.node("a", As::Me), mesh.node("b", As::Me));
    attach(&operator, &a, "app");
    attach(&operator, &b, "app");
    let _written = write(&operator, &["a:app/f"], b"from afar").ok();
    let there = || std::fs::read(b.workspace("app").join("f")).ok();
    until("the file is at the other member", || there().as_deref() == Some(b"from afar"));
    let _removed = operator.agent(&["rm", "b:app/f"]).ok();
    until("it is gone", || !a.workspace("app").join("f").exists());
}

#[test]
fn every_failure_says_what_failed_and_has_its_own_code() {
    let mut mesh = Mesh::start();
    let operator = mesh.operator("operator");
    let node = mesh.node("a", As::Me);
    attach(&operator, &node, "app");
    let _f = write(&operator, &["a:app/f"], b"one").ok();
    std::os::unix::fs::symlink("/etc", node.workspace("app").join("link")).unwrap();
    let zeros = "0".repeat(64);
    let table: [(&[&str], i32, &str); 19] = [
        (&["cat", "a:app/none"], 3, "no such file"),
        (&["cat", "a:app/link/passwd"], 7, "symbolic link"),
        (&["cat", "a:app"], 7, "is a directory"),
        (&["cat", "a:app/../../../etc/passwd"], 2, "'.' or '..'"),
        (&["cat", "a:app//etc/passwd"], 2, "empty component"),
        (&["cat", "a:nope/f"], 3, "has no workspace"),
        (&["cat", "b:app/f"], 3, "no node matches"),
        (&["cat", "a"], 2, "NODE:WORKSPACE/path"),
        (&["ls", "a:app/.cortex"], 2, "reserved"),
        (&["stat", "a:app/none"], 3, "cortex-agent ls"),
        (&["write", "a:app/none/f"], 3, "no such file"),
        (&["write", "a:app/f", "--if-absent"], 7, "exists already"),
        (&["write", "a:app/f", "--if-hash", &zeros], 7, "its hash is"),
        (&["write", "a:app/f", "--mode", "4755"], 2, "permission bits"),
        (&["write", "a:app/.git/hooks/pre-commit"], 5, "programs on the node obey"),
        (&["write", "a:app/f", "--from", "/does/not/exist"], 1, "nothing was written"),
        (&["mkdir", "a:app/f"], 7, "exists already"),
        (&["rm", "a:app"], 2, "stays as it is"),
        (&["rm", "-r", "a:app/.git"], 5, "programs on the node obey"),
    ];
    for (arguments, code, text) in table {
        let outcome = run(&mut operator.command(arguments), b"x");
        assert_eq!(outcome.code, code, "{arguments:?}: {}", outcome.stderr);
        assert!(outcome.stderr.contains(text), "{arguments:?}: {}", outcome.stderr);
    }
    assert_eq!(std::fs::read(node.workspace("app").join("f")).unwrap(), b"one");
    // With the hash that is there, it is replaced.
    let hash = operator.agent(&["stat", "a:app/f", "-o", "json"]).ok().json()["hash"].clone();
    let _two = write(&operator, &["a:app/f", "--if-hash", hash.as_str().unwrap()], b"two").ok();
    assert_eq!(std::fs::read(node.workspace("app").join("f")).unwrap(), b"two");
}

#[test]
fn role_scope_cordon_and_absence_count_and_every_change_is_in_the_audit_log() {
    let mut mesh = Mesh::start();
    let admin = mesh.operator("admin");
    let mut node = mesh.node("a", As::Me);
    attach(&admin, &node, "app");
    let (viewer, bot) = (mesh.operator("viewer"), mesh.operator("agent-token"));
    let elsewhere = mesh.operator_with("operator", &["--scope", "env=prod"]);
    let _written = write(&bot, &["a:app/f", "-o", "json"], b"by a program").ok();
    let _hooks = write(&bot, &["a:app/.git/hooks/post-checkout"], b"evil");
    assert_eq!(viewer.agent(&["cat", "a:app/f"]).ok().text(), "by a program");
    assert_eq!(write(&viewer, &["a:app/f"], b"x").code, 5);
    assert_eq!(viewer.agent(&["rm", "a:app/f"]).code, 5);
    assert_eq!(viewer.agent(&["mkdir", "a:app/d"]).code, 5);
    for arguments in [&["cat", "a:app/f"][..], &["rm", "a:app/f"]] {
        assert_eq!(elsewhere.agent(arguments).code, 3, "what it does not see is not there");
    }
    let _removed = admin.agent(&["rm", "a:app/f"]).ok();
    let writes = mesh.audit("file.write");
    assert_eq!(writes.len(), 2);
    assert_eq!((&writes[0]["path"], &writes[0]["workspace"]), (&"f".into(), &"app".into()));
    until("the ends are in the log", || mesh.audit("file.ended").len() == 3);
    let ends = mesh.audit("file.ended");
    let hash = blake3::hash(b"by a program").to_hex().to_string();
    assert_eq!((&ends[0]["outcome"], &ends[0]["hash"]), (&"done".into(), &hash.into()));
    assert_eq!(ends[1]["outcome"], "refused");
    assert_eq!((&ends[2]["action"], &ends[2]["count"]), (&"file.remove".into(), &1.into()));
    assert_eq!(mesh.audit("file.remove").len(), 1);
    let _cordoned = admin.agent(&["node", "cordon", "a"]).ok();
    assert_eq!(admin.agent(&["ls", "a:app"]).code, 7);
    assert_eq!(write(&admin, &["a:app/f"], b"x").code, 7);
    // Nobody waits for such a line.
    until("the refusal is in the log", || mesh.audit("file.refused").len() == 1);
    let _uncordoned = admin.agent(&["node", "uncordon", "a"]).ok();
    node.kill();
    until("the hub knows", || mesh.shown("a")["online"] == false);
    let outcome = admin.agent(&["cat", "a:app/f"]);
    assert_eq!(outcome.code, 6, "{}", outcome.stderr);
}

#[test]
fn large_files_pass_both_ways_whole_and_in_little_memory() {
    let mut mesh = Mesh::start();
    let operator = mesh.operator("operator");
    let mut node = mesh.node("a", As::Me);
    attach(&operator, &node, "app");
    // What the programs take anyway, with a conversation of each kind behind them.
    let small = noise(4 * MIB);
    let _written = write(&operator, &["a:app/small"], &small).ok();
    assert_eq!(operator.agent(&["cat", "a:app/small"]).ok().stdout, small);
    let source = mesh.path("source");
    std::fs::write(&source, noise(200 * MIB)).unwrap();
    // The workspace is left, so that only these operations are measured, not the sync of the file.
    let before = (peak_kib(mesh.hub().id()), peak_kib(node.daemon().id()));
    let from = source.to_str().unwrap();
    let mut writing = operator.command(&["write", "a:app/large", "--from", from]);
    let mut writing = writing.stdout(Stdio::null()).spawn().unwrap();
    assert!(wait(&mut writing, "the client").success());
    let hub_grew = peak_kib(mesh.hub().id()) - before.0;
    let back = mesh.path("back");
    let mut reading = operator.command(&["cat", "a:app/large"]);
    let mut reading = reading.stdout(std::fs::File::create(&back).unwrap()).spawn().unwrap();
    assert!(wait(&mut reading, "the client").success());
    let same = run(Command::new("cmp").arg(&source).arg(&back), b"");
    assert_eq!(same.code, 0, "{}", same.text());
    let node_grew = peak_kib(node.daemon().id()) - before.1;
    eprintln!("the hub's memory grew by {hub_grew} KiB, the agent's by {node_grew} KiB");
    assert!(hub_grew < 48 * 1024, "{hub_grew} KiB");
    assert!(node_grew < 96 * 1024, "{node_grew} KiB");
}

#[test]
fn a_directory_of_a_hundred_thousand_names_is_listed_whole_and_in_pages() {
    let mut mesh = Mesh::start();
    let operator = mesh.operator("operator");
    let node = mesh.node("a", As::Me);
    attach(&operator, &node, "app");
    // Where the sync engine does not look: it has nothing to do with this.
    let folder = node.workspace("app").join(".git");
    std::fs::create_dir(&folder).unwrap();
    for n in 0..100_000 {
        std::fs::File::create(folder.join(format!("{n:06}"))).unwrap();
    }
    let all = operator.agent(&["ls", "a:app/.git", "-o", "jsonl"]).ok().text();
    assert_eq!(all.lines().count(), 100_000);
    assert!(all.lines().is_sorted());
    let page = ["ls", "a:app/.git", "--limit", "10", "--after", "012344", "-o", "json"];
    let page = operator.agent(&page).ok();
    let names = page.json();
    assert_eq!((&names[0]["name"], &names[9]["name"]), (&"012345".into(), &"012354".into()));
    assert!(page.stderr.contains("--after '012354'"), "{}", page.stderr);
    let table = operator.agent(&["ls", "a:app/.git"]).ok().text();
    assert_eq!(table.lines().count(), 100_001);
}

#[test]
fn a_write_whose_node_or_hub_is_lost_in_the_middle_leaves_the_old_file_and_nothing_else() {
    let mut mesh = Mesh::start();
    let operator = mesh.operator("operator");
    let proxy = Proxy::start(mesh.address().parse().unwrap());
    let mut node = mesh.node_through("a", &proxy.address().to_string());
    attach(&operator, &node, "app");
    let _old = write(&operator, &["a:app/f"], b"old").ok();
    type Loss = fn(&mut Mesh, &mut Node, &Proxy);
    let losses: [(&str, Loss); 3] = [
        ("the line", |_, _, proxy| proxy.cut()),
        ("the agent", |_, node, _| node.kill()),
        ("the hub", |mesh, _, _| mesh.kill_hub()),
    ];
    for (what, lose) in losses {
        let mut writing = operator.command(&["write", "a:app/f"]);
        let mut writing = writing.stdin(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut input = writing.stdin.take().unwrap();
        std::io::Write::write_all(&mut input, &noise(MIB)).unwrap();
        until("it is under way", || !drafts(&node).is_empty());
        lose(&mut mesh, &mut node, &proxy);
        let (status, said) = end(writing, "the client");
        assert_eq!(status.code(), Some(6), "{what}: {said}");
        assert!(
            said.contains("not known") && said.contains("hint: cortex-agent stat")
                || said.contains("look at the file"),
            "{said}"
        );
        drop(input);
        match what {
            "the agent" => node.run(),
            "the hub" => mesh.start_hub(),
            _ => {}
        }
        mesh.wait_online("a");
        until("the workspace is back", || operator.agent(&["stat", "a:app/f"]).code == 0);
        assert_eq!(operator.agent(&["cat", "a:app/f"]).ok().text(), "old", "{what}");
        // What a killed agent left goes before the next write.
        let _next = write(&operator, &["a:app/other"], b"x").ok();
        until("nothing is left", || drafts(&node).is_empty());
    }
    let names: Vec<_> = std::fs::read_dir(node.workspace("app")).unwrap().collect();
    assert_eq!(names.len(), 2);
}

#[test]
fn a_reader_who_stalls_holds_up_nobody_else() {
    let mut mesh = Mesh::start();
    let operator = mesh.operator("operator");
    let node = mesh.node("a", As::Me);
    attach(&operator, &node, "app");
    std::fs::write(node.workspace("app").join("large"), vec![0; 64 * MIB]).unwrap();
    let stalled: Vec<_> = (0..8)
        .map(|_| {
            let mut reading = operator.command(&["cat", "a:app/large"]);
            let mut reading = reading.stdout(Stdio::piped()).spawn().unwrap();
            // It is under way; no more is read.
            std::io::Read::read_exact(reading.stdout.as_mut().unwrap(), &mut [0]).unwrap();
            reading
        })
        .collect();
    let ninth = operator.agent(&["ls", "a:app"]);
    assert!(ninth.code == 6 && ninth.stderr.contains("8 operations"), "{}", ninth.stderr);
    let other = mesh.operator("operator");
    assert_eq!(other.agent(&["ls", "a:app", "-o", "json"]).ok().json()[0]["name"], "large");
    let _small = write(&other, &["a:app/small"], b"x").ok();
    assert_eq!(other.agent(&["exec", "a", "--", "echo", "there"]).ok().text(), "there\n");
    for mut reading in stalled {
        reading.kill().unwrap();
        reading.wait().unwrap();
    }
    until("their places are free", || operator.agent(&["ls", "a:app"]).code == 0);
}

#[test]
fn a_node_that_is_revoked_ends_what_is_under_way() {
    let mut mesh = Mesh::start();
    let admin = mesh.operator("admin");
    let node = mesh.node("a", As::Me);
    attach(&admin, &node, "app");
    let mut writing = admin.command(&["write", "a:app/f"]);
    let mut writing = writing.stdin(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut input = writing.stdin.take().unwrap();
    std::io::Write::write_all(&mut input, b"begun").unwrap();
    until("it is under way", || !drafts(&node).is_empty());
    let _revoked = admin.agent(&["node", "revoke", "a", "--reason", "test", "--yes"]).ok();
    let (status, said) = end(writing, "the client");
    assert_eq!(status.code(), Some(6), "{said}");
    assert!(!node.workspace("app").join("f").exists());
    drop(input);
}

#[test]
fn a_line_that_stalls_delays_an_operation_and_loses_nothing() {
    let mut mesh = Mesh::start();
    let operator = mesh.operator("operator");
    let proxy = Proxy::start(mesh.address().parse().unwrap());
    let node = mesh.node_through("a", &proxy.address().to_string());
    attach(&operator, &node, "app");
    let content = noise(3 * MIB);
    proxy.set(Fault::Bandwidth(2_000_000));
    let _written = write(&operator, &["a:app/f"], &content).ok();
    assert_eq!(operator.agent(&["cat", "a:app/f"]).ok().stdout, content);
}
