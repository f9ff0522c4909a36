//! A member that dies while it takes over what others have changed.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write as _;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;

use cortex_tests::tree::{self, Found};
use cortex_tests::wait::until;
use serde_json::Value;

use super::sync::{Pair, noise};

/// Where the member dies, in the order of D1 to D8 of the crash matrix. `:2` is the second time it passes
/// there: in the middle of a batch.
const POINTS: [&str; 14] = [
    // D1, the plan is made, which is not stored; D2, the files are assembled.
    "sync.apply.planned",
    "sync.apply.staged",
    // D3, they are synced; D4, what stands in their place is what was planned for.
    "sync.apply.synced",
    "sync.apply.checked",
    "sync.apply.checked:3",
    // D5, exchanged, moved to the trash, or placed where nothing stood; the displaced file not looked at.
    "sync.apply.exchanged",
    "sync.apply.exchanged:2",
    "sync.apply.displaced",
    "sync.apply.placed",
    "sync.apply.placed:4",
    // D6, the directories are synced; D7, the index knows.
    "sync.apply.durable",
    "sync.apply.recorded",
    // D8, the hub is being told, and was.
    "sync.apply.acknowledging",
    "sync.apply.acknowledged",
];

/// What `a` did in a round: new, replaced, large, gone, of another kind, renamed, executable.
fn change(root: &Path, round: usize) {
    let write = |name: &str, content: &[u8]| fs::write(root.join(name), content).unwrap();
    write(&format!("new-{round}"), format!("new in {round}").as_bytes());
    for name in ["edited", "too"] {
        write(name, format!("{name} in {round}").as_bytes());
    }
    write("large", &noise(round as u64, 3 << 20));
    fs::remove_file(root.join(format!("goes-{round}"))).unwrap();
    write(&format!("goes-{}", round + 1), format!("goes after {round}").as_bytes());
    let (old, new) = (format!("d-{round}"), format!("d-{}", round + 1));
    fs::rename(root.join(&old), root.join(&new)).unwrap();
    write(&format!("{new}/inside"), format!("inside in {round}").as_bytes());
    let changing = root.join("changing");
    if round.is_multiple_of(2) {
        fs::remove_file(&changing).unwrap();
        symlink("edited", &changing).unwrap();
    } else {
        fs::remove_file(&changing).unwrap();
        fs::write(&changing, format!("a file in {round}")).unwrap();
    }
    let mode = if round.is_multiple_of(2) { 0o755 } else { 0o644 };
    fs::set_permissions(root.join("tool"), fs::Permissions::from_mode(mode)).unwrap();
}

/// Everything in the trashes of a member, by content.
fn in_trash(state: &Path) -> Vec<Vec<u8>> {
    let mut contents = Vec::new();
    let mut folders = vec![state.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
            let path = entry.path();
            match entry.file_type() {
                Ok(kind) if kind.is_dir() => folders.push(path),
                Ok(kind) if kind.is_file() && folder.ends_with("trash") => {
                    contents.push(fs::read(path).unwrap());
                }
                _ => {}
            }
        }
    }
    contents
}

#[test]
fn d1_to_d8_a_member_that_is_killed_at_any_point_of_applying_loses_nothing() {
    let mut pair = Pair::new();
    let (a, b) = pair.roots();
    for name in ["edited", "too", "goes-0", "changing", "tool", "large"] {
        fs::write(a.join(name), format!("{name} at first")).unwrap();
    }
    fs::create_dir(a.join("d-0")).unwrap();
    fs::write(a.join("d-0/inside"), b"inside at first").unwrap();
    pair.converge();
    let beside = pair.b.home().join("beside");
    fs::write(&beside, b"nobody touches this").unwrap();
    let mut expected: BTreeMap<Vec<u8>, Found> = tree::read(&a);
    for (round, point) in POINTS.into_iter().enumerate() {
        pair.b.stop();
        let before = tree::read(&b);
        change(&a, round);
        let flushed = pair.a.agent(&["workspace", "flush", "w", "--patience", "20s"]);
        assert_eq!(flushed.code, 0, "{}", flushed.stderr);
        pair.b.run_to_crash_at(point);
        let ended = pair.b.daemon().wait();
        assert_eq!(ended.signal(), Some(9), "it passes {point}");
        // Each path has its old or its new content, whole.
        let after = tree::read(&a);
        for (path, found) in tree::read(&b) {
            let name = String::from_utf8_lossy(&path);
            let stood = [before.get(&path), after.get(&path)];
            assert!(stood.contains(&Some(&found)), "{point}: {name} is {found:?}");
        }
        // Somebody works on while the agent is gone.
        let own = format!("own-{round}");
        let mut file = fs::File::create(b.join(&own)).unwrap();
        file.write_all(own.as_bytes()).unwrap();
        give_to_owner(&b, &own);
        pair.b.run();
        pair.mesh.wait_online("b");
        until("the member's own file arrived", || a.join(&own).exists());
        pair.converge();
        let now = tree::read(&b);
        expected.clone_from(&now);
        assert_eq!(fs::read(b.join("edited")).unwrap(), format!("edited in {round}").as_bytes());
        assert_eq!(fs::read(b.join("large")).unwrap(), noise(round as u64, 3 << 20), "{point}");
        for (path, found) in &after {
            assert_eq!(now.get(path), Some(found), "{point}: {}", String::from_utf8_lossy(path));
        }
        let came: Vec<_> = now.keys().filter(|path| !after.contains_key(*path)).collect();
        let came: Vec<_> = came.into_iter().map(|path| String::from_utf8_lossy(path)).collect();
        assert_eq!(came, [own], "{point}: nothing else came, no copies");
        let conflicts = pair.operator.agent(&["workspace", "conflicts", "w", "-o", "json"]).ok();
        assert_eq!(conflicts.json(), Value::Array(Vec::new()), "{point}");
        let trash = in_trash(&pair.b.home().join("state"));
        let gone = match round {
            0 => b"goes-0 at first".to_vec(),
            _ => format!("goes after {}", round - 1).into_bytes(),
        };
        assert!(trash.contains(&gone), "{point}: what was deleted elsewhere is in the trash");
        assert_eq!(fs::read(&beside).unwrap(), b"nobody touches this", "{point}");
    }
    // And a member that starts once more has nothing left to do.
    let shown = || pair.operator.agent(&["workspace", "show", "w", "-o", "json"]).ok().json();
    let before = shown()["head_seq"].clone();
    pair.b.stop();
    pair.b.run();
    pair.mesh.wait_online("b");
    pair.converge();
    let shown = pair.operator.agent(&["workspace", "show", "w", "-o", "json"]).ok().json();
    assert_eq!(shown["head_seq"], before);
    assert_eq!(tree::read(&b), expected);
}

/// As the workspace's owner would have written it.
fn give_to_owner(root: &Path, name: &str) {
    use std::os::unix::fs::MetadataExt as _;
    let owner = fs::metadata(root).unwrap();
    std::os::unix::fs::chown(root.join(name), Some(owner.uid()), Some(owner.gid())).ok();
}
