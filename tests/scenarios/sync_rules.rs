//! Who may sync what where, and what people are told: on real nodes, by the command line.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use cortex_tests::is_root;
use cortex_tests::mesh::{As, Mesh, Node, Operator};
use cortex_tests::process::{Daemon, Outcome};
use cortex_tests::proxy::{Fault, Proxy};
use cortex_tests::tree;
use cortex_tests::wait::until;

/// A mesh with one workspace, and somebody who attaches nodes to it.
struct Shared {
    mesh: Mesh,
    operator: Operator,
}

impl Shared {
    fn start() -> Self {
        let mut mesh = Mesh::start();
        let operator = mesh.operator("operator");
        let _made: Outcome = operator.agent(&["workspace", "create", "w"]).ok();
        Self { mesh, operator }
    }

    fn member(&self, name: &str) -> Node {
        // Where possible others are of an unprivileged user: root is refused nothing.
        let user = if is_root() { As::Unprivileged } else { As::Me };
        let node = self.mesh.node(name, user);
        self.attach(name);
        node
    }

    fn attach(&self, name: &str) {
        let _done: Outcome =
            self.operator.agent(&["workspace", "attach", "w", "--node", name]).ok();
    }

    fn settle(&self) {
        let _done: Outcome = self.operator.agent(&["workspace", "status", "w", "--watch"]).ok();
    }
}

/// Writes as the workspace's owner would.
fn write(path: &Path, content: &[u8]) {
    let parent = path.parent().unwrap();
    fs::create_dir_all(parent).unwrap();
    fs::write(path, content).unwrap();
    let owner = fs::metadata(parent.parent().unwrap()).unwrap();
    for path in [parent, path] {
        std::os::unix::fs::chown(path, Some(owner.uid()), Some(owner.gid())).ok();
    }
}

fn local_status(node: &Node) -> serde_json::Value {
    node.agent(&["workspace", "status", "w", "--local", "-o", "json"]).ok().json()[0].clone()
}

#[test]
fn t33_what_an_owner_asks_is_answered_at_once_while_the_hub_is_silent() {
    let shared = Shared::start();
    let proxy = Proxy::start(shared.mesh.address().parse().unwrap());
    let node = shared.mesh.node_through("a", &proxy.address().to_string());
    shared.attach("a");
    let root = node.workspace("w");
    until("the workspace is there", || root.is_dir());
    fs::write(root.join("f"), b"x").unwrap();
    let flushed = node.agent(&["workspace", "flush", "w", "--patience", "20s", "-o", "json"]).ok();
    assert_eq!(flushed.json()["flushed"][0], "w");
    proxy.set(Fault::Stall);
    // In the middle of a transfer, and of a small change.
    let noise: Vec<u8> = (0..(24_u32 << 20) / 4).flat_map(|n| (n ^ 0x5555).to_le_bytes()).collect();
    fs::write(root.join("large"), &noise).unwrap();
    fs::write(root.join("g"), b"y").unwrap();
    until("it is sending", || local_status(&node)["state"] != "idle");
    let explained = |path: &str| {
        node.agent(&["workspace", "explain", "w", path, "-o", "json"]).ok().json()["code"].clone()
    };
    until("the change was seen", || explained("g") == "to_send");
    let asked = |arguments: &[&str], code: i32| {
        let begun = Instant::now();
        let outcome = node.agent(arguments);
        assert_eq!(outcome.code, code, "{arguments:?}: {}", outcome.stderr);
        let took = begun.elapsed();
        eprintln!("{arguments:?} took {took:?}");
        // Not a measurement on a machine that does other things as well: a line that went dead is
        // noticed after half a minute.
        assert!(took < Duration::from_secs(15), "{arguments:?} took {took:?}");
    };
    asked(&["workspace", "flush", "w"], 6);
    asked(&["workspace", "explain", "w", "large"], 0);
    asked(&["workspace", "status", "w", "--local"], 0);
    asked(&["workspace", "mode", "w"], 0);
    asked(&["workspace", "pause", "w"], 0);
    until("it is paused", || local_status(&node)["state"] == "paused");
    asked(&["workspace", "flush", "w"], 1);
    // A program is told what the matter is where people are.
    let flushed = node.agent(&["workspace", "flush", "w", "-o", "json"]);
    assert_eq!(flushed.json()["problems"][0]["code"], "paused", "{}", flushed.stderr);
    asked(&["workspace", "detach", "w", "--local"], 6);
    asked(&["workspace", "resume", "w"], 0);
    proxy.set(Fault::None);
    proxy.cut();
    let flush = ["workspace", "flush", "w", "--patience", "20s"];
    until("everything is at the hub", || node.agent(&flush).code == 0);
    assert_eq!(explained("g"), "synced");
}

#[test]
fn a_pause_outlives_a_restart_and_loses_nothing() {
    let shared = Shared::start();
    let (a, mut b) = (shared.member("a"), shared.member("b"));
    shared.settle();
    let _done: Outcome = b.agent(&["workspace", "pause", "w"]).ok();
    until("it is paused", || local_status(&b)["state"] == "paused");
    b.stop();
    b.run();
    shared.mesh.wait_online("b");
    until("it is still paused", || local_status(&b)["state"] == "paused");
    write(&a.workspace("w").join("from-a"), b"1");
    write(&b.workspace("w").join("from-b"), b"2");
    let flush = ["workspace", "flush", "w", "--patience", "20s"];
    let _done: Outcome = a.agent(&flush).ok();
    assert!(!b.workspace("w").join("from-a").exists());
    // Who follows is told what would keep it waiting for ever.
    let watched = shared.operator.agent(&["workspace", "status", "w", "--watch"]);
    assert_eq!(watched.code, 1, "{}", watched.stderr);
    assert!(
        watched.stderr.contains("not equal everywhere: node b is paused"),
        "{}",
        watched.stderr
    );
    let _done: Outcome = b.agent(&["workspace", "resume", "w"]).ok();
    let both = |node: &Node| tree::read(&node.workspace("w")).len() == 2;
    until("both have both", || both(&a) && both(&b));
}

#[test]
fn a_hub_that_starts_anew_is_no_end_for_who_follows_a_workspace() {
    let mut shared = Shared::start();
    let a = shared.member("a");
    shared.settle();
    let _done: Outcome = a.agent(&["workspace", "pause", "w"]).ok();
    until("the hub knows", || {
        let shown = shared.operator.agent(&["workspace", "status", "w", "-o", "json"]).ok().json();
        shown["members"][0]["status"]["state"] == "paused"
    });
    let log = shared.mesh.path("watch.log");
    let mut follow =
        shared.operator.command(&["workspace", "status", "w", "--watch", "-o", "jsonl"]);
    let mut follow = Daemon::start("watch", &mut follow, &log);
    follow.line("a look", |line| line.contains("paused").then_some(()));
    // At once it knows nobody who is online, and nobody who is not equal.
    assert!(shared.mesh.hub().terminate().success());
    shared.mesh.start_hub();
    assert_eq!(follow.wait().code(), Some(1));
    let said = fs::read_to_string(log).unwrap();
    for part in ["connected to the hub again", "not equal everywhere: node a is paused"] {
        assert!(said.contains(part), "{part} is not in {said}");
    }
}

#[test]
fn t35_a_place_inside_or_around_another_workspace_is_refused_with_a_clear_message() {
    let shared = Shared::start();
    let node = shared.member("a");
    for name in ["inner", "outer", "later"] {
        let _made: Outcome = shared.operator.agent(&["workspace", "create", name]).ok();
    }
    let root = node.workspace("w");
    until("the workspace is there", || root.is_dir());
    let attach = |name: &str, path: PathBuf| {
        node.agent(&["workspace", "attach", name, "--local", "--path", path.to_str().unwrap()])
    };
    let above = root.parent().unwrap().to_owned();
    for (name, path) in [("inner", root.join("sub")), ("outer", above)] {
        let refused = attach(name, path);
        assert_ne!(refused.code, 0);
        assert!(refused.stderr.contains("overlaps with workspace \"w\""), "{}", refused.stderr);
    }
    // Neither is one by another name for the same directory, nor one that was chosen for later.
    let link = node.home().join("link");
    std::os::unix::fs::symlink(&root, &link).unwrap();
    assert!(attach("inner", link.join("sub")).stderr.contains("overlaps"));
    let placed = attach("later", node.home().join("chosen"));
    assert!(placed.stderr.contains("an operator can grant it"), "{}", placed.stderr);
    assert!(attach("inner", node.home().join("chosen/sub")).stderr.contains("overlaps"));
}

#[test]
fn t31_changes_reach_a_directory_that_was_made_read_only_and_leave_it_so() {
    let shared = Shared::start();
    let (a, b) = (shared.member("a"), shared.member("b"));
    let (from, to) = (a.workspace("w"), b.workspace("w"));
    for name in ["d/edited", "d/deleted"] {
        write(&from.join(name), b"1");
    }
    until("the files arrived", || to.join("d/edited").exists() && to.join("d/deleted").exists());
    shared.settle();
    fs::set_permissions(to.join("d"), fs::Permissions::from_mode(0o555)).unwrap();
    write(&from.join("d/edited"), b"2");
    write(&from.join("d/new"), b"2");
    fs::remove_file(from.join("d/deleted")).unwrap();
    until("the changes arrived", || {
        to.join("d/new").exists()
            && fs::read(to.join("d/edited")).unwrap() == b"2"
            && !to.join("d/deleted").exists()
    });
    shared.settle();
    let mode = fs::metadata(to.join("d")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o555);
    assert_eq!(local_status(&b)["problems"].as_array().unwrap().len(), 0);
    fs::set_permissions(to.join("d"), fs::Permissions::from_mode(0o755)).unwrap();
}

#[test]
fn t29_what_is_below_an_unreadable_directory_is_deleted_nowhere() {
    let shared = Shared::start();
    let (a, b) = (shared.member("a"), shared.member("b"));
    let (from, to) = (a.workspace("w"), b.workspace("w"));
    write(&from.join("d/f"), b"1");
    until("the file arrived", || to.join("d/f").exists());
    shared.settle();
    fs::set_permissions(to.join("d"), fs::Permissions::from_mode(0o000)).unwrap();
    write(&to.join("other"), b"1");
    let _flushed = b.agent(&["workspace", "flush", "w", "--patience", "20s"]);
    until("other changes travel", || from.join("other").exists());
    assert_eq!(fs::read(from.join("d/f")).unwrap(), b"1");
    until("it is told", || local_status(&b).to_string().contains("unreadable"));
    fs::set_permissions(to.join("d"), fs::Permissions::from_mode(0o755)).unwrap();
    let _flushed = b.agent(&["workspace", "flush", "w", "--patience", "20s"]);
    until("it is told no more", || !local_status(&b).to_string().contains("unreadable"));
    shared.settle();
    tree::assert_equal(&from, &to);
}

#[test]
fn modes_and_rules_are_chosen_on_the_node_and_in_the_workspace() {
    let shared = Shared::start();
    let (a, b) = (shared.member("a"), shared.member("b"));
    let (from, to) = (a.workspace("w"), b.workspace("w"));
    write(&from.join("f"), b"1");
    write(&from.join(".cortexignore"), b"*.tmp\n");
    until("the rules arrived", || to.join(".cortexignore").exists());
    let mode = b.agent(&["workspace", "mode", "w", "mirror", "-o", "json"]).ok().json();
    assert_eq!(mode["mode"], "mirror");
    assert_ne!(b.agent(&["workspace", "mode", "w", "nonsense"]).code, 0);
    write(&to.join("f"), b"changed in the mirror");
    write(&to.join("extra"), b"x");
    write(&to.join("x.tmp"), b"x");
    until("the mirror is one", || {
        fs::read(to.join("f")).is_ok_and(|content| content == b"1") && !to.join("extra").exists()
    });
    assert!(to.join("x.tmp").exists(), "what is left out is not undone either");
    shared.settle();
    let explained = b.agent(&["workspace", "explain", "w", "x.tmp"]).ok().text();
    assert!(explained.contains("ignored") && explained.contains("*.tmp"), "{explained}");
    assert_eq!(local_status(&b)["mode"], "mirror");
    assert!(!from.join("x.tmp").exists() && !from.join("extra").exists());
}
