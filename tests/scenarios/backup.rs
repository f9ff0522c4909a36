//! `cortex-hubd db`: a backup made while members write, and a hub put back from it.

use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};

use cortex_tests::process::Outcome;
use cortex_tests::tree;
use cortex_tests::wait::until;

use super::sync::{Pair, noise};

/// Files that are written while the backup is made, in a few directories.
const FILES: u64 = 120;

/// Says that something is over, however it ends.
struct SetOnDrop<'a>(&'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn a_hub_put_back_from_a_backup_made_under_load_loses_nothing_that_members_have() {
    let mut pair = Pair::new();
    let (a, b) = pair.roots();
    fs::write(a.join("deleted-since"), b"x").unwrap();
    fs::write(a.join("edited"), b"before").unwrap();
    fs::write(a.join("large"), noise(1, 9 << 20)).unwrap();
    pair.converge();
    let backup = pair.mesh.path("backup").display().to_string();

    // Made while a writes and b takes: of whatever moment, it is whole.
    let done = AtomicBool::new(false);
    let made = std::thread::scope(|scope| {
        scope.spawn(|| {
            // Also when it fails, which ends the test.
            let _done = SetOnDrop(&done);
            for n in 0..FILES {
                let folder = a.join(format!("d{}", n % 7));
                fs::create_dir_all(&folder).unwrap();
                fs::write(folder.join(n.to_string()), noise(n, 60_000)).unwrap();
            }
        });
        let mut made = 0;
        // Some of them while nothing is written any more, and the rest is on its way.
        while made < 3 || !done.load(Ordering::Relaxed) {
            let _made: Outcome = pair.mesh.hubd(&["db", "backup", &backup]).ok();
            made += 1;
        }
        made
    });
    let sound = pair.mesh.hubd(&["db", "verify", &backup, "-o", "json"]).ok().json();
    assert_eq!(sound["intact"], true, "after {made}: {sound}");
    until("all files arrived", || tree::read(&b).len() == tree::read(&a).len());
    pair.converge();
    let running = pair.mesh.hubd(&["db", "verify"]).ok();
    assert!(running.text().contains("all sound"), "{}", running.text());

    // What the backup does not know: new, changed and deleted on either side, and conflicts with it.
    fs::write(b.join("new-since"), noise(5000, 3 << 20)).unwrap();
    fs::write(b.join("edited"), b"after").unwrap();
    fs::remove_file(a.join("deleted-since")).unwrap();
    until("the deletion arrived", || !b.join("deleted-since").exists());
    until("the edit arrived", || fs::read(a.join("edited")).unwrap() == b"after");
    pair.converge();
    let before = tree::read(&a);

    let pin_of = |pair: &Pair| {
        let status = pair.mesh.hubd(&["status", "-o", "json"]).ok().json();
        status["http_pin"].as_str().unwrap().to_owned()
    };
    let pin = pin_of(&pair);
    let data = pair.mesh.path("hub");
    let refused = pair.mesh.hubd(&["db", "restore", &backup]);
    assert_eq!(refused.code, 7, "over a hub that runs: {}", refused.stderr);
    assert!(pair.mesh.hub().terminate().success());
    assert_eq!(pair.mesh.hubd(&["status"]).code, 6, "there is none to ask");
    let refused = pair.mesh.hubd(&["db", "restore", &backup]);
    assert_eq!(refused.code, 7, "over data: {}", refused.stderr);
    // The hub's machine burns down; only the backup is left.
    fs::remove_dir_all(&data).unwrap();
    let restored = pair.mesh.hubd(&["db", "restore", &backup]).ok();
    assert!(restored.text().contains("1 workspaces"), "{}", restored.text());
    pair.mesh.start_hub();
    assert_eq!(pin_of(&pair), pin, "lines that pin the HTTP side's key stay good");
    pair.mesh.wait_online("a");
    pair.mesh.wait_online("b");
    until("it is all there again", || {
        let (at_a, at_b) = (tree::read(&a), tree::read(&b));
        // What was edited since the backup is beside what the hub has, under another name.
        let edited = |path: &[u8]| path == b"edited";
        let has = |(path, found): (&Vec<u8>, &tree::Found)| {
            at_a.get(path) == Some(found)
                || edited(path) && at_a.values().any(|other| other == found)
        };
        at_a == at_b && before.iter().all(has)
    });
    pair.converge();
    assert_eq!(fs::read(a.join("edited")).unwrap(), b"before");
    // Nobody deletes anything, and what was deleted comes back; there are no copies of what is equal.
    let after = tree::read(&a);
    let more = after.keys().filter(|path| !before.contains_key(*path));
    let more: Vec<_> = more.map(|path| String::from_utf8_lossy(path).into_owned()).collect();
    assert_eq!(more.len(), 2, "{more:?}");
    assert!(more[0] == "deleted-since" && more[1].starts_with("edited.conflict-"), "{more:?}");
    // And the mesh goes on: files, commands, and a sound hub.
    fs::write(a.join("goes-on"), b"x").unwrap();
    until("a new file arrived", || b.join("goes-on").exists());
    let ran = pair.operator.agent(&["exec", "a", "-s", "echo ran"]).ok();
    assert_eq!(ran.text(), "ran\n");
    pair.converge();
    let _sound: Outcome = pair.mesh.hubd(&["db", "verify"]).ok();
    let _audited: Outcome = pair.mesh.hubd(&["audit", "verify"]).ok();
    let log = pair.mesh.hubd(&["audit", "list", "-o", "json", "--action", "hub.restored"]).ok();
    assert_eq!(log.json().as_array().map(Vec::len), Some(1));
}

#[test]
fn every_verb_that_asks_a_hub_ends_with_6_where_none_runs() {
    let mut mesh = cortex_tests::mesh::Mesh::start();
    assert!(mesh.hub().terminate().success());
    for arguments in [
        &["status"][..],
        &["invite", "create"],
        &["invite", "list"],
        &["invite", "revoke", "x"],
        &["operator", "create", "x", "--role", "viewer"],
        &["operator", "list"],
        &["operator", "revoke", "x"],
        &["node", "list"],
        &["node", "show", "x"],
        &["node", "cordon", "x"],
        &["node", "revoke", "x"],
        &["policy", "show", "x"],
        &["policy", "set", "x", "strict"],
        &["audit", "list"],
        &["audit", "verify"],
        &["ca", "status"],
        &["ca", "rotate", "prepare"],
    ] {
        let refused = mesh.hubd(arguments);
        assert_eq!(refused.code, 6, "{arguments:?}: {}", refused.stderr);
        assert!(refused.stderr.contains("no hub answers on"), "{}", refused.stderr);
        assert!(refused.stderr.contains("\nhint: "), "{}", refused.stderr);
    }
    // Nor is one asked for what makes no sense.
    let wrong = mesh.hubd(&["policy", "set", "x", "strict", "--for", "1h"]);
    assert_eq!(wrong.code, 2, "{}", wrong.stderr);
    // What asks none works.
    let _pin: Outcome = mesh.hubd(&["ca", "pin"]).ok();
    let _sound: Outcome = mesh.hubd(&["db", "verify"]).ok();
}
