//! Skills: directories of workspaces that become part of the library, which every node has.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::ExitStatusExt as _;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use cortex_tests::is_root;
use cortex_tests::mesh::{As, Mesh, Node, Operator};
use cortex_tests::process::Outcome;
use cortex_tests::tree;
use cortex_tests::wait::until;
use serde_json::Value;

use super::sync::noise;

/// Three nodes, of which the first two have a workspace, and somebody who promotes.
struct Trio {
    mesh: Mesh,
    operator: Operator,
    admin: Operator,
    nodes: [Node; 3],
}

impl Trio {
    fn new() -> Self {
        let mut mesh = Mesh::start();
        let operator = mesh.operator("operator");
        let admin = mesh.operator("admin");
        let _made: Outcome = operator.agent(&["workspace", "create", "w"]).ok();
        // Where possible the second one is of an unprivileged user.
        let other = if is_root() { As::Unprivileged } else { As::Me };
        let nodes = [mesh.node("a", As::Me), mesh.node("b", other), mesh.node("c", As::Me)];
        for node in ["a", "b"] {
            let attach = ["workspace", "attach", "w", "--node", node];
            let _attached: Outcome = operator.agent(&attach).ok();
        }
        let trio = Self { mesh, operator, admin, nodes };
        trio.settle();
        trio
    }

    fn settle(&self) {
        let _settled: Outcome = self.operator.agent(&["workspace", "status", "w", "--watch"]).ok();
    }

    fn root(&self) -> PathBuf {
        self.nodes[0].workspace("w")
    }

    /// Nodes that have lost their hub again and again take their time to come back; a new process does not.
    fn start_nodes_anew(&mut self) {
        for node in &mut self.nodes {
            node.kill();
            node.run();
        }
        for node in &self.nodes {
            self.mesh.wait_online(&node.name);
        }
    }

    /// A file of a skill as a node has it placed.
    fn placed(&self, node: usize, path: &str) -> Option<String> {
        fs::read_to_string(self.nodes[node].workspace(".library").join(path)).ok()
    }

    fn until_all_have(&self, path: &str, text: Option<&str>) {
        for node in 0..self.nodes.len() {
            let what = format!("{path} is {text:?} on {}", self.nodes[node].name);
            until(&what, || self.placed(node, path).as_deref() == text);
        }
    }

    /// Writes a directory with a script into the first node's copy, and waits until it is at the hub.
    fn write(&self, path: &str, text: &str) {
        let folder = self.root().join(path);
        fs::create_dir_all(folder.join("data")).unwrap();
        fs::write(folder.join("run.sh"), format!("#!/bin/sh\necho {text}\n")).unwrap();
        fs::set_permissions(folder.join("run.sh"), fs::Permissions::from_mode(0o755)).unwrap();
        fs::write(folder.join("data/text"), text).unwrap();
        // A line that was lost for a moment is none of these tests' matter.
        let flush = || self.nodes[0].agent(&["workspace", "flush", "w", "--patience", "30s"]);
        until("it is at the hub", || flush().code == 0);
    }

    fn promote(&self, path: &str, skill: &str, more: &[&str]) -> Outcome {
        promote(&self.operator, path, skill, more)
    }

    fn versions(&self, skill: &str) -> Vec<Value> {
        let asked = self.operator.agent(&["skill", "versions", skill, "-o", "json"]);
        if asked.code == 3 {
            return Vec::new();
        }
        asked.ok().json().as_array().unwrap().clone()
    }
}

fn promote(operator: &Operator, path: &str, skill: &str, more: &[&str]) -> Outcome {
    let all = [&["workspace", "promote", "w", path, "--as", skill, "-o", "json"], more].concat();
    operator.agent(&all)
}

#[test]
fn a_promoted_directory_is_on_every_node_and_commands_read_it_there() {
    let trio = Trio::new();
    trio.write("tools/lint", "one");
    fs::write(trio.root().join("tools/other"), b"stays").unwrap();
    let promoted = trio.promote("tools/lint/", "lint", &[]).ok().json();
    assert_eq!((&promoted["version"], &promoted["unchanged"]), (&1.into(), &false.into()));
    assert_eq!(promoted["link"], "../.cortex/library/lint");
    assert_eq!(promoted["entries"], 3);
    trio.until_all_have("lint/data/text", Some("one"));
    trio.settle();
    for node in &trio.nodes[..2] {
        let path = node.workspace("w").join("tools/lint");
        until("the link has come", || fs::read_link(&path).is_ok());
        until("it leads there", || fs::read(path.join("data/text")).is_ok_and(|t| t == b"one"));
        assert_eq!(fs::read(node.workspace("w").join("tools/other")).unwrap(), b"stays");
    }
    let run = |arguments: &[&str]| trio.operator.agent(&[&["exec"], arguments].concat());
    for node in ["a", "b", "c"] {
        let seen = run(&[node, "-s", "/library/lint/run.sh; $CORTEX_LIBRARY/lint/run.sh"]).ok();
        assert_eq!(seen.text(), "one\none\n");
        // Neither can what is there be changed, nor something be put there.
        for deed in [
            "echo x > /library/lint/data/text",
            "rm /library/lint",
            "echo x > /library/new",
            "chmod u+w /library/lint/data",
        ] {
            assert_ne!(run(&[node, "-s", deed]).code, 0, "{node}: {deed}");
        }
    }
    for node in ["a", "b"] {
        let seen = run(&[node, "--workspace", "w", "-s", "tools/lint/run.sh"]).ok();
        assert_eq!(seen.text(), "one\n", "over the link in the workspace");
    }
    trio.until_all_have("lint/data/text", Some("one"));
    let shown = trio.operator.agent(&["skill", "show", "lint", "-o", "json"]).ok().json();
    assert_eq!(shown["nodes"].as_array().unwrap().len(), 3);
    assert_eq!((&shown["workspace"], &shown["path"]), (&"w".into(), &"tools/lint".into()));
    let audit = trio.mesh.audit("skill.promoted");
    assert_eq!((&audit[0]["version"], &audit[0]["workspace"]), (&1.into(), &"w".into()));
    // Again, from where it is a link by now.
    let again = trio.promote("tools/lint", "lint", &[]).ok().json();
    assert_eq!((&again["version"], &again["unchanged"]), (&1.into(), &true.into()));
}

#[test]
fn versions_follow_one_another_and_come_back() {
    let mut trio = Trio::new();
    trio.write("lint", "one");
    let _first: Outcome = trio.promote("lint", "lint", &[]).ok();
    trio.write("lint2", "two");
    let refused = trio.promote("lint2", "lint", &[]);
    assert_eq!(refused.code, 7, "another directory: {}", refused.stderr);
    assert!(refused.stderr.contains("--expect 1"), "{}", refused.stderr);
    assert_eq!(trio.promote("lint2", "lint", &["--expect", "3"]).code, 7);
    let second = trio.promote("lint2", "lint", &["--expect", "1"]).ok().json();
    assert_eq!(second["version"], 2);
    trio.until_all_have("lint/data/text", Some("two"));
    // The same directory again, as somebody has changed it in the place of the link.
    trio.settle();
    fs::remove_file(trio.root().join("lint2")).unwrap();
    trio.write("lint2", "three");
    assert_eq!(trio.promote("lint2", "lint", &[]).ok().json()["version"], 3);
    trio.until_all_have("lint/data/text", Some("three"));
    // A copy, byte by byte, is the same version.
    trio.write("copy", "three");
    let copy = trio.promote("copy", "lint", &[]).ok().json();
    assert_eq!((&copy["version"], &copy["unchanged"]), (&3.into(), &true.into()));
    until("it is a link", || fs::read_link(trio.root().join("copy")).is_ok());

    let restored =
        trio.operator.agent(&["skill", "restore", "lint", "--version", "1", "-o", "json"]);
    let restored = restored.ok().json();
    assert_eq!((&restored["version"], &restored["restored_from"]), (&4.into(), &1.into()));
    trio.until_all_have("lint/data/text", Some("one"));
    assert_eq!(trio.operator.agent(&["skill", "remove", "lint", "--yes"]).code, 5);
    let _removed: Outcome = trio.admin.agent(&["skill", "remove", "lint", "--yes"]).ok();
    trio.until_all_have("lint/data/text", None);
    let listed = trio.operator.agent(&["skill", "list", "-o", "json"]).ok().json();
    assert_eq!(listed, Value::Array(Vec::new()));
    let _restored: Outcome = trio.operator.agent(&["skill", "restore", "lint"]).ok();
    trio.until_all_have("lint/data/text", Some("one"));
    // Everybody may look; who does not command all nodes changes nothing.
    let scoped = trio.mesh.operator_with("operator", &["--scope", "env=dev"]);
    for (operator, name) in [(trio.mesh.operator("viewer"), "viewer"), (scoped, "scoped")] {
        let shown = operator.agent(&["skill", "show", "lint", "-o", "json"]).ok().json();
        assert_eq!(shown["workspace"].is_null(), name == "scoped", "{shown}");
        let refused = operator.agent(&["skill", "restore", "lint", "--version", "2"]);
        assert_eq!(refused.code, 5, "{name}: {}", refused.stderr);
    }
    let numbers: Vec<u64> =
        trio.versions("lint").iter().map(|v| v["version"].as_u64().unwrap()).collect();
    assert_eq!(numbers, [5, 4, 3, 2, 1]);
    for (arguments, code) in [
        (&["skill", "show", "no-such"][..], 3),
        (&["skill", "restore", "no-such"], 3),
        (&["skill", "restore", "lint", "--version", "77"], 3),
        (&["skill", "restore", "lint", "--version", "5"], 7),
        (&["workspace", "promote", "w", "no/such", "--as", "x"], 3),
        (&["workspace", "promote", "w", ".", "--as", "x"], 2),
        (&["workspace", "promote", "w", "lint", "--as", "Not/A/Name"], 2),
    ] {
        let outcome = trio.operator.agent(arguments);
        assert_eq!(outcome.code, code, "{arguments:?}: {}", outcome.stderr);
    }
}

#[test]
fn of_several_who_promote_to_one_name_one_wins_and_the_others_lose_nothing() {
    let trio = Trio::new();
    let paths: Vec<String> = (0..4).map(|number| format!("mine-{number}")).collect();
    for path in &paths {
        trio.write(path, path);
    }
    let operator = &trio.operator;
    let outcomes: Vec<Outcome> = std::thread::scope(|scope| {
        let promoting: Vec<_> = paths
            .iter()
            .map(|path| scope.spawn(move || promote(operator, path, "shared", &["--expect", "0"])))
            .collect();
        promoting.into_iter().map(|promoting| promoting.join().unwrap()).collect()
    });
    let winners: Vec<usize> = (0..4).filter(|number| outcomes[*number].code == 0).collect();
    assert_eq!(winners.len(), 1, "one wins");
    for (number, outcome) in outcomes.iter().enumerate().filter(|(n, _)| *n != winners[0]) {
        assert_eq!(outcome.code, 7, "{}", outcome.stderr);
        assert!(outcome.stderr.contains("version 1"), "{}", outcome.stderr);
        let kept = trio.root().join(&paths[number]).join("data/text");
        assert_eq!(fs::read_to_string(kept).unwrap(), paths[number]);
    }
    trio.until_all_have("shared/data/text", Some(&paths[winners[0]]));
}

#[test]
fn a_node_that_was_away_has_the_library_as_it_is_when_it_comes_back() {
    let mut trio = Trio::new();
    trio.write("one", "one");
    let _first: Outcome = trio.promote("one", "skill", &[]).ok();
    trio.until_all_have("skill/data/text", Some("one"));
    trio.nodes[2].kill();
    trio.write("two", "two");
    let _second: Outcome = trio.promote("two", "skill", &["--expect", "1"]).ok();
    trio.write("other", "other");
    let _other: Outcome = trio.promote("other", "other", &[]).ok();
    assert_eq!(trio.placed(2, "skill/data/text").as_deref(), Some("one"), "as it was");
    trio.nodes[2].run();
    trio.until_all_have("skill/data/text", Some("two"));
    trio.until_all_have("other/data/text", Some("other"));
}

/// Where the hub dies on the way of a promotion, in order, and whether it is done nevertheless.
const HUB_POINTS: [(&str, bool); 7] = [
    ("sync.pack.linked", false),
    ("skill.adopted", false),
    ("skill.begun", false),
    ("skill.in_library", true),
    ("skill.linked", true),
    ("skill.finished", true),
    ("skill.removed", true),
];

#[test]
fn a_hub_that_is_killed_at_any_point_of_a_promotion_has_done_it_or_not() {
    let mut trio = Trio::new();
    for (round, (point, done)) in HUB_POINTS.into_iter().enumerate() {
        let (path, skill) = (format!("dir-{round}"), format!("skill-{round}"));
        trio.write(&path, &skill);
        let content = trio.root().join(&path).join("large");
        fs::write(&content, noise(round as u64, 5 << 20)).unwrap();
        let _flushed: Outcome =
            trio.nodes[0].agent(&["workspace", "flush", "w", "--patience", "30s"]).ok();
        let removes = point == "skill.removed";
        if removes {
            let _promoted: Outcome = trio.promote(&path, &skill, &[]).ok();
        }
        trio.mesh.kill_hub();
        trio.mesh.start_hub_that_crashes_at(point);
        trio.start_nodes_anew();
        let outcome = if removes {
            trio.admin.agent(&["skill", "remove", &skill, "--yes"])
        } else {
            trio.promote(&path, &skill, &[])
        };
        assert_ne!(outcome.code, 0, "{point}");
        assert_eq!(trio.mesh.hub().wait().signal(), Some(9), "it passes {point}");
        trio.mesh.start_hub();
        trio.start_nodes_anew();
        if removes {
            trio.until_all_have(&format!("{skill}/run.sh"), None);
            continue;
        }
        let versions = trio.versions(&skill);
        assert_eq!(versions.len(), usize::from(done), "{point}");
        let link = || fs::read_link(trio.root().join(&path)).is_ok();
        if done {
            until("the link has come", link);
            assert_eq!(versions[0]["current"], true);
        } else {
            trio.settle();
            assert!(!link() && content.exists(), "{point}: as it was");
        }
        // Whoever did not hear of it asks again.
        let again = trio.promote(&path, &skill, &[]).ok().json();
        assert_eq!((&again["version"], &again["unchanged"]), (&1.into(), &done.into()), "{point}");
        trio.until_all_have(&format!("{skill}/data/text"), Some(&skill));
        for node in 0..3 {
            let large = trio.nodes[node].workspace(".library").join(&skill).join("large");
            assert_eq!(fs::read(large).unwrap(), noise(round as u64, 5 << 20), "{point}");
        }
        until("the link has come", link);
    }
    assert_eq!(trio.mesh.audit("skill.promoted").len(), HUB_POINTS.len());
}

/// Where an agent dies on the way of a new version.
const NODE_POINTS: [&str; 3] = ["library.copied", "library.placed", "library.linked"];

#[test]
fn a_node_that_is_killed_at_any_point_has_the_old_version_or_the_new_one() {
    let mut trio = Trio::new();
    trio.write("first", "0");
    let _first: Outcome = trio.promote("first", "skill", &[]).ok();
    trio.until_all_have("skill/data/text", Some("0"));
    for (round, point) in (1..).zip(NODE_POINTS) {
        trio.nodes[2].kill();
        trio.nodes[2].run_to_crash_at(point);
        trio.mesh.wait_online("c");
        let path = format!("next-{round}");
        trio.write(&path, &round.to_string());
        let expected = round.to_string();
        let _next: Outcome = trio.promote(&path, "skill", &["--expect", &expected]).ok();
        assert_eq!(trio.nodes[2].daemon().wait().signal(), Some(9), "it passes {point}");
        let library = trio.nodes[2].workspace(".library").join("skill");
        let text = fs::read_to_string(library.join("data/text")).unwrap();
        let script = fs::read_to_string(library.join("run.sh")).unwrap();
        assert_eq!(script, format!("#!/bin/sh\necho {text}\n"), "{point}: one version");
        trio.nodes[2].run();
        trio.until_all_have("skill/data/text", Some(&round.to_string()));
        let left = trio.nodes[2].workspace(".library").join(".versions");
        until("nothing is left over", || fs::read_dir(&left).unwrap().count() == 1);
    }
}

#[test]
fn what_a_member_changed_in_a_directory_that_was_promoted_meanwhile_is_not_lost() {
    let mut trio = Trio::new();
    trio.write("lint", "one");
    let b = trio.nodes[1].workspace("w");
    until("it has come", || b.join("lint/data/text").exists());
    trio.settle();
    trio.nodes[1].kill();
    fs::write(b.join("lint/data/text"), b"edited by b").unwrap();
    fs::write(b.join("lint/new"), b"made by b").unwrap();
    let _promoted: Outcome = trio.promote("lint", "lint", &[]).ok();
    trio.nodes[1].run();
    trio.mesh.wait_online("b");
    let holds = |root: &std::path::Path, text: &str| {
        let hash = blake3::hash(text.as_bytes()).to_string();
        tree::read(root)
            .into_values()
            .any(|found| matches!(found, tree::Found::File(_, h, _) if h == hash))
    };
    for text in ["edited by b", "made by b"] {
        until("it is on all members", || holds(&b, text) && holds(&trio.root(), text));
    }
    trio.until_all_have("lint/data/text", Some("one"));
}

/// Looks for a file in these places, one after another, all the time until it is told to stop; says how
/// often it was in none.
fn watch_closely(places: &[PathBuf], stop: &AtomicBool) -> usize {
    let mut missing = 0;
    while !stop.load(Ordering::Relaxed) {
        // Where it goes to is looked at last, so that it cannot move on in between.
        missing += usize::from(!places.iter().any(|place| fs::read(place).is_ok()));
    }
    missing
}

#[test]
fn on_every_member_the_files_are_in_the_workspace_or_in_the_library_all_the_time() {
    let trio = Trio::new();
    for round in 0..5 {
        let (path, skill) = (format!("dir-{round}"), format!("skill-{round}"));
        trio.write(&path, &skill);
        fs::write(trio.root().join(&path).join("large"), noise(round, 8 << 20)).unwrap();
        let _flushed: Outcome =
            trio.nodes[0].agent(&["workspace", "flush", "w", "--patience", "30s"]).ok();
        let b = trio.nodes[1].workspace("w").join(&path);
        until("b has it", || b.join("large").exists());
        trio.settle();
        let stop = AtomicBool::new(false);
        let places = [0, 1].map(|node| {
            let node = &trio.nodes[node];
            [
                node.workspace("w").join(&path).join("run.sh"),
                node.workspace(".library").join(&skill).join("run.sh"),
            ]
        });
        let missing: usize = std::thread::scope(|scope| {
            let watching = places.map(|places| {
                let stop = &stop;
                scope.spawn(move || watch_closely(&places, stop))
            });
            let _promoted: Outcome = trio.promote(&path, &skill, &[]).ok();
            for node in 0..2 {
                let path = trio.nodes[node].workspace("w").join(&path);
                until("it is a link", || fs::read_link(&path).is_ok());
            }
            stop.store(true, Ordering::Relaxed);
            watching.into_iter().map(|watching| watching.join().unwrap()).sum()
        });
        assert_eq!(missing, 0, "round {round}");
        for node in 0..2 {
            let large = trio.nodes[node].workspace("w").join(&path).join("large");
            assert_eq!(fs::read(large).unwrap(), noise(round, 8 << 20), "over the link");
        }
    }
}

#[test]
fn an_owner_places_the_library_elsewhere_or_nowhere() {
    let mut trio = Trio::new();
    let elsewhere = trio.nodes[0].home().join("skills");
    let place = elsewhere.to_str().unwrap().to_owned();
    let _placed: Outcome = trio.nodes[0].agent(&["skill", "place", &place]).ok();
    let _off: Outcome = trio.nodes[2].agent(&["skill", "place", "off"]).ok();
    for node in [0, 2] {
        trio.nodes[node].stop();
        trio.nodes[node].run();
    }
    trio.mesh.wait_online("a");
    trio.mesh.wait_online("c");
    trio.write("lint", "one");
    let _promoted: Outcome = trio.promote("lint", "lint", &[]).ok();
    until("it is there", || elsewhere.join("lint/data/text").exists());
    until("the link leads there", || trio.root().join("lint/data/text").exists());
    until("b has it", || trio.placed(1, "lint/data/text").is_some());
    let seen = trio.operator.agent(&["exec", "a", "--workspace", "w", "-s", "lint/run.sh"]).ok();
    assert_eq!(seen.text(), "one\n");
    assert_eq!(trio.placed(2, "lint/data/text"), None);
    assert_ne!(trio.operator.agent(&["exec", "c", "-s", "ls /library"]).code, 0);
}
