//! What the hub keeps of workspaces: through `kill -9` at chosen points, in the past, and on a full disk.

use std::fs;
use std::os::unix::process::ExitStatusExt as _;

use cortex_tests::process::Outcome;
use cortex_tests::tree;
use cortex_tests::wait::until;
use serde_json::Value;

use super::sync::{Pair, noise};

/// Where the hub dies on the way of a change, in order: H1 to H6 of the crash matrix.
const POINTS: [&str; 6] = [
    // H1, the pack is received; H2, it has its name for good; H3 and H4, it is recorded and not yet
    // acknowledged.
    "sync.pack.received",
    "sync.pack.durable",
    "sync.pack.recorded",
    // H5, the commit is written and not yet durable; durable and not yet acknowledged; H6, acknowledged
    // and not yet told.
    "sync.commit.written",
    "sync.commit.durable",
    "sync.head.announce",
];

#[test]
fn h1_to_h6_a_hub_that_is_killed_at_any_point_of_a_change_loses_nothing() {
    let mut pair = Pair::new();
    let (a, b) = pair.roots();
    fs::write(a.join("edited"), b"0").unwrap();
    fs::write(a.join("goes-0"), b"x").unwrap();
    pair.converge();
    for (round, point) in POINTS.into_iter().enumerate() {
        pair.mesh.kill_hub();
        pair.mesh.start_hub_that_crashes_at(point);
        pair.start_nodes_anew();
        // New, large, changed and gone; from both sides.
        fs::write(a.join(format!("new-{round}")), format!("new {round}")).unwrap();
        fs::write(a.join(format!("large-{round}")), noise(round as u64, 5 << 20)).unwrap();
        fs::write(b.join("edited"), format!("{round} edited")).unwrap();
        fs::remove_file(a.join(format!("goes-{round}"))).unwrap();
        fs::write(b.join(format!("goes-{}", round + 1)), b"x").unwrap();
        let ended = pair.mesh.hub().wait();
        assert_eq!(ended.signal(), Some(9), "it passes {point}");
        // Work goes on meanwhile: whether the hub had it by then or not, that is no conflict.
        fs::write(a.join(format!("new-{round}")), format!("newer {round}")).unwrap();
        fs::write(b.join("edited"), format!("{round} edited again")).unwrap();
        pair.mesh.start_hub();
        pair.mesh.wait_online("a");
        pair.mesh.wait_online("b");
        // First, since a tree cannot be read while something of it goes.
        until("the deletion arrived", || !b.join(format!("goes-{round}")).exists());
        pair.converge();
        for root in [&a, &b] {
            let read = |name: &str| fs::read_to_string(root.join(name)).unwrap();
            assert_eq!(read("edited"), format!("{round} edited again"), "{point}");
            assert_eq!(read(&format!("new-{round}")), format!("newer {round}"), "{point}");
            assert_eq!(
                fs::read(root.join(format!("large-{round}"))).unwrap(),
                noise(round as u64, 5 << 20),
                "{point}"
            );
            assert!(!root.join(format!("goes-{round}")).exists(), "{point}");
        }
        assert_eq!(tree::read(&a).len(), 2 + 2 * (round + 1), "{point}: no copies");
        let conflicts = pair.operator.agent(&["workspace", "conflicts", "w", "-o", "json"]).ok();
        assert_eq!(conflicts.json(), Value::Array(Vec::new()), "{point}");
    }
    // And a hub that starts once more has nothing left to do.
    let shown = || pair.operator.agent(&["workspace", "show", "w", "-o", "json"]).ok().json();
    let before = shown();
    pair.mesh.kill_hub();
    pair.mesh.start_hub();
    pair.mesh.wait_online("a");
    pair.mesh.wait_online("b");
    pair.converge();
    let after = pair.operator.agent(&["workspace", "show", "w", "-o", "json"]).ok().json();
    assert_eq!(before["head_seq"], after["head_seq"]);
}

#[test]
fn what_was_overwritten_and_deleted_comes_back_on_all_members() {
    let pair = Pair::new();
    let (a, b) = pair.roots();
    let operator = |arguments: &[&str]| pair.operator.agent(arguments);
    fs::create_dir_all(a.join("src/deep")).unwrap();
    fs::write(a.join("src/main.rs"), b"first").unwrap();
    fs::write(a.join("src/deep/lib.rs"), noise(7, 3 << 20)).unwrap();
    fs::write(a.join("stays"), b"x").unwrap();
    until("the files arrived", || tree::read(&b).len() == 5);
    pair.converge();
    let full = tree::read(&a);
    fs::write(b.join("src/main.rs"), b"second").unwrap();
    until("the edit arrived", || fs::read(a.join("src/main.rs")).unwrap() == b"second");
    pair.converge();

    let log = operator(&["workspace", "log", "w", "src/main.rs", "-o", "json"]).ok().json();
    let log = log.as_array().unwrap();
    let changes: Vec<_> = log.iter().map(|change| change["change"].as_str().unwrap()).collect();
    assert_eq!(changes, ["replaced", "created"]);
    assert_eq!((&log[0]["by"], &log[1]["by"]), (&"b".into(), &"a".into()));
    let first = log[1]["version"].to_string();

    let restored = operator(&["workspace", "restore", "w", "src/main.rs"]).ok().text();
    assert!(restored.contains("1 path is as it was"), "{restored}");
    until("it came back", || fs::read(b.join("src/main.rs")).unwrap() == b"first");
    pair.converge();
    assert_eq!(tree::read(&a), full);
    // A whole directory, deleted on one member while the other is away.
    fs::remove_dir_all(a.join("src")).unwrap();
    until("it is gone", || !b.join("src").exists());
    pair.converge();
    let _restored: Outcome = operator(&["workspace", "restore", "w", "src/"]).ok();
    until("it came back", || tree::read(&a) == full && tree::read(&b) == full);
    pair.converge();
    // By version; with a version that never was; what never was; the whole without a version.
    fs::write(a.join("stays"), b"changed").unwrap();
    pair.converge();
    let _same: Outcome = operator(&["workspace", "restore", "w", ".", "--version", &first]).ok();
    for (arguments, code) in [
        (&["restore", "w", "src", "--version", "99999"][..], 3),
        (&["restore", "w", "no/such"], 3),
        (&["restore", "w", "."], 2),
        (&["restore", "no-such", "x"], 3),
        (&["resolve", "w", "stays", "--keep", "mine"], 3),
        (&["delete", "w"], 2),
        (&["set", "w"], 2),
    ] {
        let refused = operator(&[&["workspace"], arguments].concat());
        assert_eq!(refused.code, code, "{arguments:?}: {}", refused.stderr);
    }
    let line = &pair.mesh.audit("workspace.restored")[0];
    assert!(line["path"].is_string(), "{line}");
}

#[test]
fn a_workspace_is_deleted_at_the_hub_and_stays_with_its_members() {
    let mut pair = Pair::new();
    let (a, b) = pair.roots();
    fs::write(a.join("file"), b"x").unwrap();
    pair.converge();
    let operator = |arguments: &[&str]| pair.operator.agent(arguments);
    let refused = operator(&["workspace", "delete", "w", "--yes"]);
    assert_eq!(refused.code, 5, "an operator may not: {}", refused.stderr);
    let admin = pair.mesh.operator("admin");
    let _deleted: Outcome = admin.agent(&["workspace", "delete", "w", "--yes"]).ok();
    assert_eq!(operator(&["workspace", "show", "w"]).code, 3);
    let knows = || {
        let found = pair.b.agent(&["workspace", "status", "--local", "-o", "json"]).ok().json();
        found.as_array().unwrap().len()
    };
    until("it has left", || knows() == 0);
    assert!(a.join("file").exists() && b.join("file").exists());
    let left: Vec<_> = fs::read_dir(pair.mesh.path("hub/ws")).unwrap().flatten().collect();
    assert!(left.iter().all(|left| left.file_name() == "ballast"), "{left:?}");
    // The name is free, and the new one is another workspace.
    let _made: Outcome = operator(&["workspace", "create", "w"]).ok();
    let shown = operator(&["workspace", "show", "w", "-o", "json"]).ok().json();
    assert_eq!((&shown["head_seq"], &shown["members"]), (&0.into(), &Value::Array(Vec::new())));
    assert_eq!(pair.mesh.audit("workspace.deleted").len(), 1);
}

#[test]
fn a_workspace_over_its_quota_takes_deletions_and_says_what_is_the_matter() {
    let mut pair = Pair::new();
    let (a, b) = pair.roots();
    fs::write(a.join("first"), noise(1, 1 << 20)).unwrap();
    until("the file arrived", || b.join("first").exists());
    pair.converge();
    let admin = pair.mesh.operator("admin");
    let set = |arguments: &[&str]| {
        admin.agent(&[&["workspace", "set", "w", "-o", "json"], arguments].concat()).ok().json()
    };
    assert_eq!(set(&["--quota", "1200K"])["quota_bytes"], 1_228_800);
    fs::write(a.join("second"), noise(2, 1 << 20)).unwrap();
    let log = || {
        let status = pair.a.agent(&["workspace", "status", "w", "--local", "-o", "json"]);
        format!("{} {}", String::from_utf8_lossy(&status.stdout), pair.a.log())
    };
    until("the quota is told", || log().contains("that it may have"));
    // What needs no room goes on: the other member's deletion, above all.
    fs::remove_file(b.join("first")).unwrap();
    let newest = || {
        let log = pair.operator.agent(&["workspace", "log", "w", "--limit", "1", "-o", "json"]);
        log.ok().json()[0]["change"].clone()
    };
    until("the deletion is taken", || newest() == "deleted");
    let cut = pair.operator.agent(&["workspace", "log", "w", "--limit", "1", "-o", "json"]).ok();
    assert!(cut.stderr.contains("there is more"), "{}", cut.stderr);
    assert_eq!(set(&["--quota", "none"])["quota_bytes"], Value::Null);
    until("the file arrived", || b.join("second").exists());
    pair.converge();
}
