//! Workspaces on real nodes: the same files everywhere, whatever happens in between.

use std::ffi::OsStr;
use std::fs;
use std::io::{Seek as _, SeekFrom, Write as _};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};

use cortex_tests::is_root;
use cortex_tests::mesh::{As, Mesh, Node, Operator};
use cortex_tests::process::Outcome;
use cortex_tests::tree;
use cortex_tests::wait::until;
use rand::{Rng as _, SeedableRng as _};

/// Two nodes with one workspace.
pub(crate) struct Pair {
    pub(crate) mesh: Mesh,
    pub(crate) operator: Operator,
    pub(crate) a: Node,
    pub(crate) b: Node,
}

impl Pair {
    pub(crate) fn new() -> Self {
        let mut mesh = Mesh::start();
        let operator = mesh.operator("operator");
        let _made: Outcome = operator.agent(&["workspace", "create", "w"]).ok();
        let a = mesh.node("a", As::Me);
        // Where possible the other one is of an unprivileged user.
        let b = mesh.node("b", if is_root() { As::Unprivileged } else { As::Me });
        let pair = Self { mesh, operator, a, b };
        for node in ["a", "b"] {
            let attach = ["workspace", "attach", "w", "--node", node];
            let _attached: Outcome = pair.operator.agent(&attach).ok();
        }
        pair.settle();
        pair
    }

    pub(crate) fn roots(&self) -> (PathBuf, PathBuf) {
        (self.a.workspace("w"), self.b.workspace("w"))
    }

    /// Waits until all members that are online say they are at the head.
    pub(crate) fn settle(&self) {
        let _settled: Outcome = self.operator.agent(&["workspace", "status", "w", "--watch"]).ok();
    }

    /// Nodes that have lost their hub again and again take their time to come back; a new process does not.
    pub(crate) fn start_nodes_anew(&mut self) {
        for node in [&mut self.a, &mut self.b] {
            node.stop();
            node.run();
        }
        for name in ["a", "b"] {
            self.mesh.wait_online(name);
        }
    }

    /// The newest change that the hub has.
    pub(crate) fn head(&self) -> u64 {
        let status = self.operator.agent(&["workspace", "status", "w", "-o", "json"]).ok().json();
        status["head_seq"].as_u64().unwrap()
    }

    /// Waits until both trees are equal and stay so.
    pub(crate) fn converge(&self) {
        let (a, b) = self.roots();
        until("both copies are equal", || tree::read(&a) == tree::read(&b));
        self.settle();
        tree::assert_equal(&a, &b);
    }
}

/// Bytes that do not compress, the same for the same seed.
pub(crate) fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    rand::rngs::StdRng::seed_from_u64(seed).fill_bytes(&mut bytes);
    bytes
}

fn allocated(path: &Path) -> u64 {
    fs::metadata(path).unwrap().blocks() * 512
}

#[test]
fn every_kind_of_file_arrives() {
    let pair = Pair::new();
    let (a, b) = pair.roots();
    fs::write(a.join("exactly-4-mib"), noise(1, 4 << 20)).unwrap();
    fs::write(a.join("empty"), b"").unwrap();
    fs::create_dir_all(a.join("deep/er/and/deeper")).unwrap();
    fs::write(a.join("deep/er/and/deeper/file"), b"x").unwrap();
    fs::create_dir(a.join("empty-folder")).unwrap();
    fs::write(a.join(OsStr::from_bytes(b"not-utf8-\xff\xfe")), b"name").unwrap();
    fs::write(a.join("-rf\n *"), b"unusual name").unwrap();
    fs::write(a.join("tool"), b"#!/bin/sh\n").unwrap();
    fs::set_permissions(a.join("tool"), fs::Permissions::from_mode(0o755)).unwrap();
    symlink("deep/er", a.join("link")).unwrap();
    symlink("nowhere", a.join("dangling")).unwrap();
    pair.converge();
    assert_eq!(fs::read(b.join("exactly-4-mib")).unwrap(), noise(1, 4 << 20));
    assert_eq!(fs::read_link(b.join("link")).unwrap(), Path::new("deep/er"));
    assert!(b.join(OsStr::from_bytes(b"not-utf8-\xff\xfe")).exists());
    let mode = fs::metadata(b.join("tool")).unwrap().permissions().mode();
    assert_eq!(mode & 0o111, 0o111 & mode, "executable");
    assert_ne!(mode & 0o100, 0);
    let owner = |path: &Path| fs::metadata(path).unwrap().uid();
    assert_eq!(owner(&b.join("empty")), owner(&b), "files belong to the workspace's owner");

    // And the other way: change, replace by another kind, delete.
    fs::write(b.join("empty"), b"no longer").unwrap();
    fs::remove_file(b.join("tool")).unwrap();
    fs::create_dir(b.join("tool")).unwrap();
    fs::write(b.join("tool/inside"), b"x").unwrap();
    fs::remove_dir_all(b.join("deep")).unwrap();
    fs::rename(b.join("exactly-4-mib"), b.join("renamed")).unwrap();
    until("the changes arrived", || !a.join("deep").exists() && a.join("renamed").exists());
    pair.converge();
    assert_eq!(fs::read(a.join("empty")).unwrap(), b"no longer");
    assert_eq!(fs::read(a.join("tool/inside")).unwrap(), b"x");
}

#[test]
fn a_sparse_file_of_1_gib_arrives_and_stays_sparse() {
    let pair = Pair::new();
    let (a, b) = pair.roots();
    let size = 1 << 30;
    let mut file = fs::File::create(a.join("sparse")).unwrap();
    file.set_len(size).unwrap();
    file.seek(SeekFrom::Start(size / 2)).unwrap();
    file.write_all(b"in the middle of nothing").unwrap();
    drop(file);
    until("the file arrived", || b.join("sparse").exists());
    pair.converge();
    assert_eq!(fs::metadata(b.join("sparse")).unwrap().len(), size);
    let taken = allocated(&b.join("sparse"));
    assert!(taken < 64 << 20, "{taken} bytes are allocated");
}

#[test]
fn a_file_edited_on_both_sides_while_one_is_offline_leaves_one_conflict_copy_on_both() {
    let mut pair = Pair::new();
    let (a, b) = pair.roots();
    fs::write(a.join("notes.txt"), b"common").unwrap();
    until("the file arrived", || b.join("notes.txt").exists());
    pair.converge();
    pair.b.stop();
    let before = pair.head();
    fs::write(a.join("notes.txt"), b"edited on a").unwrap();
    fs::write(b.join("notes.txt"), b"edited on b").unwrap();
    until("a's edit is committed", || pair.head() > before);
    pair.b.run();
    let copies = |root: &Path| {
        let names = fs::read_dir(root).unwrap().map(|entry| entry.unwrap().file_name());
        let mut copies: Vec<_> =
            names.filter(|name| name.to_string_lossy().starts_with("notes.conflict-")).collect();
        copies.sort();
        copies
    };
    until("the conflict copy is on both", || copies(&a).len() == 1 && copies(&b).len() == 1);
    pair.converge();
    assert_eq!(copies(&a), copies(&b));
    assert_eq!(fs::read(a.join("notes.txt")).unwrap(), b"edited on a", "the committed one stays");
    assert_eq!(fs::read(a.join(&copies(&a)[0])).unwrap(), b"edited on b");
    let listed = pair.operator.agent(&["workspace", "conflicts", "w", "-o", "json"]).ok().json();
    assert_eq!(listed.as_array().unwrap().len(), 1);
    assert_eq!(listed[0]["path"], "notes.txt");
}

#[test]
fn a_hub_killed_in_the_middle_of_a_sync_loses_nothing() {
    let mut pair = Pair::new();
    let (a, b) = pair.roots();
    // Made beside the workspace and moved into it, so that all of it is there to be sent at once.
    let made = pair.mesh.path("parts");
    fs::create_dir(&made).unwrap();
    for number in 0..50 {
        fs::write(made.join(format!("part-{number}")), noise(number, 4 << 20)).unwrap();
    }
    fs::rename(&made, a.join("parts")).unwrap();
    // In the middle: the hub has content, and not all of it.
    let packs = pair.mesh.path("hub/ws");
    until("some content is at the hub", || files(&packs) > 12);
    pair.mesh.kill_hub();
    let parts = b.join("parts");
    assert!(files(&parts) < 50, "the sync was over before the hub was killed");
    pair.mesh.start_hub();
    pair.mesh.wait_online("a");
    pair.mesh.wait_online("b");
    until("all files arrived", || files(&parts) >= 50);
    pair.converge();
    for number in 0..50 {
        let path = parts.join(format!("part-{number}"));
        assert!(fs::read(path).unwrap() == noise(number, 4 << 20), "part {number}");
    }
}

/// How many files there are below a folder, without looking into them.
fn files(folder: &Path) -> usize {
    let Ok(entries) = fs::read_dir(folder) else { return 0 };
    let count = |entry: fs::DirEntry| match entry.file_type() {
        Ok(kind) if kind.is_dir() => files(&entry.path()),
        _ => 1,
    };
    entries.map_while(Result::ok).map(count).sum()
}

#[test]
fn what_was_written_while_a_node_was_dead_arrives_after_its_start() {
    let mut pair = Pair::new();
    let (a, b) = pair.roots();
    pair.b.kill();
    fs::write(a.join("from-a"), b"1").unwrap();
    fs::write(b.join("from-b"), b"2").unwrap();
    pair.b.run();
    until("both arrived", || a.join("from-b").exists() && b.join("from-a").exists());
    pair.converge();
}

#[test]
fn a_command_sees_the_synced_files_and_what_it_writes_is_synced() {
    let pair = Pair::new();
    let (a, _) = pair.roots();
    fs::write(a.join("input"), b"3\n1\n2\n").unwrap();
    until("the input arrived", || pair.b.workspace("w").join("input").exists());
    let script =
        ["exec", "b", "--workspace", "w", "-s", "sort input > output; mkdir d; cat output"];
    let outcome = pair.operator.agent(&script).ok();
    assert_eq!(outcome.text(), "1\n2\n3\n");
    until("the output came back", || a.join("output").exists() && a.join("d").is_dir());
    pair.converge();
}

#[test]
fn edits_in_directories_that_were_received_or_made_again_arrive() {
    let pair = Pair::new();
    let (a, b) = pair.roots();
    fs::create_dir_all(a.join("d/e")).unwrap();
    fs::write(a.join("d/e/f"), b"1").unwrap();
    until("the directory arrived", || b.join("d/e/f").exists());
    pair.converge();
    fs::write(b.join("d/e/f"), b"edited").unwrap();
    fs::write(b.join("d/new"), b"new").unwrap();
    until("edits came back", || {
        a.join("d/new").exists() && fs::read(a.join("d/e/f")).unwrap() == b"edited"
    });
    pair.converge();
    fs::remove_dir_all(a.join("d")).unwrap();
    fs::create_dir(a.join("d")).unwrap();
    fs::write(a.join("d/again"), b"x").unwrap();
    until("the new directory arrived", || b.join("d/again").exists() && !b.join("d/e").exists());
    pair.converge();
}

#[test]
fn a_path_that_cannot_be_applied_holds_up_nothing_else() {
    let pair = Pair::new();
    let (a, b) = pair.roots();
    fs::create_dir(a.join("d")).unwrap();
    fs::write(a.join("d/tracked"), b"x").unwrap();
    until("the directory arrived", || b.join("d/tracked").exists());
    pair.converge();
    // What is not synced keeps its directory from being deleted.
    fs::create_dir(b.join("d/.git")).unwrap();
    fs::write(b.join("d/.git/own"), b"x").unwrap();
    fs::remove_dir_all(a.join("d")).unwrap();
    until("the tracked file went", || !b.join("d/tracked").exists());
    for round in 0..3 {
        let begun = std::time::Instant::now();
        fs::write(a.join("other"), format!("{round}")).unwrap();
        let arrived =
            || fs::read(b.join("other")).is_ok_and(|c| c == format!("{round}").as_bytes());
        until("the other file arrived", arrived);
        // Not a measurement: it took half a minute where the problem gated everything.
        assert!(begun.elapsed().as_secs() < 25, "{:?}", begun.elapsed());
    }
    assert!(b.join("d/.git/own").exists());
}

#[test]
fn a_hub_put_back_from_an_old_backup_loses_nothing_of_anybody() {
    let mut pair = Pair::new();
    let (a, b) = pair.roots();
    for name in ["kept", "deleted", "edited"] {
        fs::write(a.join(name), b"old").unwrap();
    }
    until("the files arrived", || tree::read(&b).len() == 3);
    pair.converge();
    // A copy of the hub's workspaces as they are, made while it does not run.
    pair.b.stop();
    pair.mesh.hub().terminate();
    let (live, backup) = (pair.mesh.path("hub/ws"), pair.mesh.path("backup"));
    tree::copy(&live, &backup);
    pair.mesh.start_hub();
    pair.mesh.wait_online("a");
    // This is lost.
    let before = pair.head();
    fs::write(a.join("edited"), b"by a").unwrap();
    fs::remove_file(a.join("deleted")).unwrap();
    fs::write(a.join("new"), b"by a").unwrap();
    until("the changes are committed", || pair.head() >= before + 3);
    pair.settle();
    pair.a.stop();
    pair.mesh.hub().terminate();
    fs::remove_dir_all(&live).unwrap();
    tree::copy(&backup, &live);
    pair.mesh.start_hub();
    // The other member saw none of it, and takes the same numbers for changes of its own.
    pair.b.run();
    pair.mesh.wait_online("b");
    for number in 0..5 {
        fs::write(b.join(format!("by-b-{number}")), b"by b").unwrap();
    }
    until("b's changes are committed", || pair.head() >= before + 5);
    let told = |pair: &Pair| {
        fs::read_to_string(pair.mesh.path("hub.log")).unwrap().contains("put back from a backup")
    };
    assert!(!told(&pair), "nobody has proved the loss yet");
    pair.a.run();
    pair.mesh.wait_online("a");
    until("both have everything", || tree::read(&a).len() == 10 && tree::read(&b).len() == 10);
    pair.converge();
    assert!(told(&pair));
    assert_eq!(fs::read(b.join("new")).unwrap(), b"by a");
    assert_eq!(fs::read(b.join("edited")).unwrap(), b"old", "the hub's version keeps the name");
    let names = fs::read_dir(&b).unwrap().map(|entry| entry.unwrap().path());
    let copies: Vec<_> =
        names.filter(|path| path.to_string_lossy().contains("edited.conflict-")).collect();
    assert_eq!(copies.len(), 1);
    assert_eq!(fs::read(&copies[0]).unwrap(), b"by a");
    assert_eq!(fs::read(b.join("deleted")).unwrap(), b"old", "its deletion was lost, too");
}

#[test]
fn packs_that_the_hub_has_lost_hold_up_nothing_and_come_back_from_the_members() {
    let mut pair = Pair::new();
    let (a, _) = pair.roots();
    for number in 0..3 {
        fs::write(a.join(format!("file-{number}")), noise(number, 3 << 20)).unwrap();
    }
    pair.converge();
    // The members that could help are away; the disk has damaged one pack and lost another.
    pair.a.stop();
    pair.b.stop();
    let mut packs: Vec<PathBuf> = Vec::new();
    for path in tree::read(&pair.mesh.path("hub/ws")).into_keys() {
        let path = pair.mesh.path("hub/ws").join(OsStr::from_bytes(&path));
        if path.is_file() && path.components().any(|part| part.as_os_str() == "packs") {
            packs.push(path);
        }
    }
    assert!(packs.len() >= 2, "{packs:?}");
    fs::write(&packs[0], b"damaged").unwrap();
    fs::remove_file(&packs[1]).unwrap();
    let c = pair.mesh.node("c", As::Me);
    let _attached: Outcome = pair.operator.agent(&["workspace", "attach", "w", "--node", "c"]).ok();
    let root = c.workspace("w");
    let problems = || {
        let status = c.agent(&["workspace", "status", "w", "--local", "-o", "json"]);
        String::from_utf8_lossy(&status.stdout).into_owned()
    };
    until("the problem is told", || problems().contains("content_missing"));
    // Everything else goes on, both ways.
    fs::write(root.join("other"), b"from c").unwrap();
    pair.a.run();
    until("the other file arrived", || a.join("other").exists());
    until("all files arrived", || tree::read(&root) == tree::read(&a));
    until("the problem has vanished", || !problems().contains("content_missing"));
}

#[test]
fn a_workspace_that_is_emptied_is_emptied_elsewhere_only_on_somebodys_word() {
    let pair = Pair::new();
    let (a, b) = pair.roots();
    let fill = |files: usize| {
        fs::create_dir(a.join("d")).unwrap();
        for number in 0..files {
            fs::write(a.join(format!("d/file-{number}")), format!("content {number}")).unwrap();
        }
    };
    let status = || pair.operator.agent(&["workspace", "status", "w"]).ok().text();
    let operators = ["workspace", "confirm-deletes", "w"];
    let owners = ["workspace", "confirm-deletes", "w", "--local"];
    for by_owner in [true, false] {
        fill(3);
        until("the files arrived", || tree::read(&b).len() == 4);
        pair.converge();
        // All at once.
        fs::rename(a.join("d"), pair.a.home().join(format!("gone-{by_owner}"))).unwrap();
        until("the hold is told", || status().contains("confirm-deletes w"));
        // Everything else still travels, and the deletions do not.
        fs::write(b.join("other"), b"x").unwrap();
        until("the other file arrived", || a.join("other").exists());
        assert_eq!(tree::read(&b).len(), 5);
        let told = if by_owner { pair.a.agent(&owners) } else { pair.operator.agent(&operators) };
        let said = told.ok().text();
        assert!(said.contains("deletions go now") || said.contains("a may delete now"), "{said}");
        until("the files are deleted", || tree::read(&b).len() == 1);
        until("the hold is over", || !status().contains("confirm-deletes w"));
        fs::remove_file(a.join("other")).unwrap();
        pair.converge();
    }
    // Of many, the word of the node's owner ends the node's own hold only: the hub has one as well.
    fill(150);
    until("the files arrived", || tree::read(&b).len() == 151);
    pair.converge();
    fs::rename(a.join("d"), pair.a.home().join("gone")).unwrap();
    fs::write(b.join("other"), b"x").unwrap();
    until("the hold is told", || status().contains("150 deletions are held back because"));
    until("the other file arrived", || a.join("other").exists());
    let _said = pair.a.agent(&owners).ok();
    until("the hub's hold is told", || status().contains("held back by the hub"));
    assert_eq!(tree::read(&b).len(), 152);
    assert!(pair.operator.agent(&operators).ok().text().contains("a may delete now"));
    until("the files are deleted", || tree::read(&b).len() == 1);
    until("the hold is over", || !status().contains("confirm-deletes w"));
    assert_eq!(pair.mesh.audit("workspace.deletes_confirmed").len(), 2);
    let nothing = pair.operator.agent(&["workspace", "confirm-deletes", "w", "-o", "json"]).ok();
    assert_eq!(nothing.json()["nodes"].as_array().unwrap().len(), 0);
}

#[test]
fn who_leaves_a_workspace_and_comes_back_merges_and_deletes_nothing() {
    let pair = Pair::new();
    let (a, b) = pair.roots();
    for name in ["one", "two", "three"] {
        fs::write(a.join(name), b"x").unwrap();
    }
    until("the files arrived", || tree::read(&b).len() == 3);
    pair.converge();
    let as_member = |verb: &str| {
        let _done: Outcome = pair.operator.agent(&["workspace", verb, "w", "--node", "b"]).ok();
    };
    let knows = || {
        let found = pair.b.agent(&["workspace", "status", "--local", "-o", "json"]).ok().json();
        found.as_array().unwrap().len()
    };
    as_member("detach");
    until("it has left", || knows() == 0);
    fs::remove_file(b.join("one")).unwrap();
    fs::write(b.join("own"), b"x").unwrap();
    as_member("attach");
    until("both were merged", || tree::read(&a).len() == 4 && tree::read(&b).len() == 4);
    pair.converge();
}
