//! What users do, and what must come of it.

use std::os::unix::fs::{MetadataExt as _, symlink};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use super::super::problem::Code;
use super::memory_hub::Taken;
use super::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t09_every_kind_of_file_arrives_and_a_second_run_does_nothing() {
    let mesh = Mesh::new();
    let mut a = mesh.stopped_node("a");
    a.write("dir/sub/file", "content");
    a.write("empty", "");
    a.write("dir/run", "#!/bin/sh\n");
    fs::set_permissions(a.path("dir/run"), fs::Permissions::from_mode(0o755)).unwrap();
    fs::create_dir(a.path("empty dir")).unwrap();
    symlink("../nowhere", a.path("dir/link")).unwrap();
    symlink("sub", a.path("dir/link to directory")).unwrap();
    fs::write(a.config.root.join(std::ffi::OsStr::from_bytes(b"not \xff utf-8")), "x").unwrap();
    a.write("-rf\n", "x");
    a.write(".git/config", "stays here");
    let big: Vec<u8> = (0..5_000_000_u32).flat_map(|n| (n / 3).to_le_bytes()).collect();
    a.write("big", &big);
    a.start();
    let b = mesh.node("b");
    a.flush().await;
    b.flush().await;
    let mut expected = a.tree();
    expected.retain(|name, _| !name.starts_with(b".git"));
    assert_eq!(b.tree(), expected);
    let time = |node: &Node| fs::metadata(node.path("big")).unwrap().modified().unwrap();
    assert_eq!(time(&a), time(&b));
    let traffic = mesh.hub.traffic();
    a.flush().await;
    b.flush().await;
    // Touching a file is no change.
    fs::File::open(a.path("empty")).unwrap().set_modified(std::time::SystemTime::now()).unwrap();
    a.flush().await;
    assert_eq!(mesh.hub.traffic(), traffic);
    let status = b.until_state(SyncState::Idle).await;
    assert_eq!(status.pending_push, 0);
    assert_eq!(status.applied_seq, status.head_seq);
    assert!(status.problems.is_empty(), "{:?}", status.problems);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_saved_file_is_noticed_and_reaches_the_other_node_by_itself() {
    let mesh = Mesh::new();
    let (a, b) = (mesh.node("a"), mesh.node("b"));
    settle(&[&a, &b]).await;
    let mut head = mesh.hub.subscribe();
    // Deep and new: the directories have to be noticed one by one.
    a.write("x/y/z/file", "content");
    let complete = |seq: &u64| *seq >= 4;
    let seq = *tokio::time::timeout(LIMIT, head.wait_for(complete)).await.unwrap().unwrap();
    b.handle().head_moved(seq);
    b.until(|status| status.applied_seq >= seq).await;
    assert_eq!(b.read("x/y/z/file"), "content");
    // A directory that is renamed is still watched below.
    fs::rename(a.path("x"), a.path("renamed")).unwrap();
    tokio::time::timeout(LIMIT, head.wait_for(|seq| *seq >= 12)).await.unwrap().unwrap();
    a.write("renamed/y/z/file", "changed");
    tokio::time::timeout(LIMIT, head.wait_for(|seq| *seq >= 13)).await.unwrap().unwrap();
    b.flush().await;
    assert_eq!(b.names(), ["renamed", "renamed/y", "renamed/y/z", "renamed/y/z/file"]);
    assert_eq!(b.read("renamed/y/z/file"), "changed");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t06_edits_deletions_and_type_changes_reach_the_other_node() {
    let mesh = Mesh::new();
    let (a, b) = (mesh.node("a"), mesh.node("b"));
    a.write("edited", "old");
    a.write("deleted", "x");
    a.write("deleted dir/sub/x", "x");
    a.write("file to dir", "x");
    a.write("dir to file/x", "x");
    a.write("file to link", "x");
    symlink("x", a.path("link to dir")).unwrap();
    a.write("made executable", "x");
    settle(&[&a, &b]).await;
    b.write("edited", "new");
    fs::remove_file(b.path("deleted")).unwrap();
    fs::remove_dir_all(b.path("deleted dir")).unwrap();
    fs::remove_file(b.path("file to dir")).unwrap();
    b.write("file to dir/x", "x");
    fs::remove_dir_all(b.path("dir to file")).unwrap();
    b.write("dir to file", "x");
    fs::remove_file(b.path("file to link")).unwrap();
    symlink("y", b.path("file to link")).unwrap();
    fs::remove_file(b.path("link to dir")).unwrap();
    fs::create_dir(b.path("link to dir")).unwrap();
    fs::set_permissions(b.path("made executable"), fs::Permissions::from_mode(0o755)).unwrap();
    let expected = b.tree();
    settle(&[&b, &a]).await;
    assert_eq!(a.tree(), expected);
    assert!(mesh.hub.0.conflicts.lock().unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t03_a_file_edited_on_both_sides_leaves_exactly_one_conflict_copy() {
    let mesh = Mesh::new();
    let (mut a, mut b) = (mesh.node("a"), mesh.node("b"));
    a.write("d/f.txt", "base");
    settle(&[&a, &b]).await;
    a.stop().await;
    b.stop().await;
    a.write("d/f.txt", "by a");
    b.write("d/f.txt", "by b");
    a.start();
    a.flush().await;
    b.start();
    settle(&[&a, &b]).await;
    let names = a.names();
    assert_eq!(names.len(), 3, "{names:?}");
    assert_eq!(a.read("d/f.txt"), "by a", "the committed version keeps the name");
    assert!(names[1].starts_with("d/f.conflict-") && names[1].ends_with(".txt"), "{names:?}");
    assert_eq!(a.read(&names[1]), "by b");
    assert_eq!(mesh.hub.0.conflicts.lock().unwrap().len(), 1);
    assert_eq!(b.status().conflicts, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t04_an_edit_beats_a_deletion_in_either_order() {
    let mesh = Mesh::new();
    let (mut a, mut b) = (mesh.node("a"), mesh.node("b"));
    for name in ["d/edited by a", "d/edited by b", "d/sub/x"] {
        a.write(name, "base");
    }
    settle(&[&a, &b]).await;
    a.stop().await;
    b.stop().await;
    fs::remove_file(a.path("d/edited by b")).unwrap();
    fs::remove_dir_all(a.path("d/sub")).unwrap();
    a.write("d/edited by a", "edit");
    fs::remove_file(b.path("d/edited by a")).unwrap();
    b.write("d/edited by b", "edit");
    a.start();
    a.flush().await;
    b.start();
    settle(&[&a, &b]).await;
    assert_eq!(a.names(), ["d", "d/edited by a", "d/edited by b"]);
    assert_eq!((a.read("d/edited by a"), a.read("d/edited by b")), ("edit".into(), "edit".into()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t23_renames_and_copies_move_no_content() {
    let mesh = Mesh::new();
    let (a, b) = (mesh.node("a"), mesh.node("b"));
    let content: Vec<u8> = (0..3_000_000_u32).flat_map(u32::to_le_bytes).collect();
    a.write("d/big", &content);
    settle(&[&a, &b]).await;
    let [_, received, sent] = mesh.hub.traffic();
    fs::rename(a.path("d"), a.path("e")).unwrap();
    fs::copy(a.path("e/big"), a.path("copy")).unwrap();
    settle(&[&a, &b]).await;
    assert_eq!(b.names(), ["copy", "e", "e/big"]);
    assert_eq!(mesh.hub.traffic()[1..], [received, sent]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t21_a_small_change_in_a_large_file_moves_little() {
    let mesh = Mesh::new();
    let (a, b) = (mesh.node("a"), mesh.node("b"));
    let mut content = noise(1, 24 << 20);
    a.write("big", &content);
    settle(&[&a, &b]).await;
    let before = mesh.hub.traffic();
    content.insert(1000, b'x');
    a.write("big", &content);
    settle(&[&a, &b]).await;
    let after = mesh.hub.traffic();
    assert!(after[1] - before[1] <= 2, "{before:?} {after:?}");
    assert!(after[2] - before[2] <= 2, "{before:?} {after:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t24_a_sparse_file_arrives_sparse() {
    let mesh = Mesh::new();
    let (a, b) = (mesh.node("a"), mesh.node("b"));
    fs::create_dir_all(&a.config.root).unwrap();
    let file = fs::File::create(a.path("sparse")).unwrap();
    file.set_len(1 << 30).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, b"middle", 500 << 20).unwrap();
    a.flush().await;
    b.flush().await;
    let meta = fs::metadata(b.path("sparse")).unwrap();
    assert_eq!(meta.len(), 1 << 30);
    assert!(meta.blocks() * 512 <= 16 << 20, "{} blocks", meta.blocks());
    let mut middle = [0; 6];
    let copy = fs::File::open(b.path("sparse")).unwrap();
    std::os::unix::fs::FileExt::read_exact_at(&copy, &mut middle, 500 << 20).unwrap();
    assert_eq!(&middle, b"middle");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t19_thousands_of_small_files_travel_in_few_packs() {
    let mesh = Mesh::new();
    let (mut a, b) = (mesh.stopped_node("a"), mesh.node("b"));
    for number in 0..2000 {
        a.write(&format!("d{}/f{number}", number % 20), format!("content {number}"));
    }
    a.start();
    settle(&[&a, &b]).await;
    let [commits, received, sent] = mesh.hub.traffic();
    assert!(commits <= 4 && received <= 4 && sent <= 4, "{:?}", mesh.hub.traffic());
    assert_eq!(b.status().entries, 2000);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn content_of_the_next_commit_is_on_its_way_while_one_is_made() {
    let mesh = Mesh::new();
    let (mut a, b) = (mesh.stopped_node("a"), mesh.node("b"));
    for number in 0..1500 {
        a.write(&format!("f{number}"), number.to_string());
    }
    // The first thousand are in one pack.
    mesh.hub.await_packs(2);
    a.start();
    settle(&[&a, &b]).await;
    assert_eq!(mesh.hub.traffic()[..2], [2, 2]);
    assert_eq!(b.status().entries, 1500);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t20_a_broken_line_and_a_restart_only_cost_time() {
    let mesh = Mesh::new();
    let mut a = mesh.stopped_node("a");
    for number in 0..12 {
        a.write(&format!("f{number}"), noise(number, 3 << 20));
    }
    mesh.hub.break_after_packs(4);
    a.start();
    a.until(|status| !status.problems.is_empty()).await;
    a.stop().await;
    let before = mesh.hub.traffic()[1];
    assert!(before <= 4);
    mesh.hub.break_after_packs(usize::MAX);
    mesh.hub.set_broken(false);
    a.start();
    let mut b = mesh.node("b");
    a.flush().await;
    // What had been acknowledged is not sent again: 36 MiB in packs of up to 4 MiB.
    assert!(mesh.hub.traffic()[1] <= 13, "{:?}", mesh.hub.traffic());
    b.stop().await;
    b.start();
    settle(&[&a, &b]).await;
    assert_eq!(b.names().len(), 12);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn offline_changes_are_seen_and_follow_later() {
    let mesh = Mesh::new();
    let (a, b) = (mesh.node("a"), mesh.node("b"));
    a.write("f", "old");
    settle(&[&a, &b]).await;
    a.online.send_replace(false);
    a.write("f", "new");
    a.write("g", "new");
    a.until(|status| status.state == SyncState::Offline && status.pending_push == 2).await;
    assert_eq!(a.handle().flush().await, Err(crate::sync::FlushError::Offline));
    a.online.send_replace(true);
    settle(&[&a, &b]).await;
    assert_eq!(b.read("f"), "new");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_comes_back_while_somebody_saves_all_the_time_learns_what_it_missed() {
    let mesh = Mesh::new();
    let (a, b) = (mesh.node("a"), mesh.node("b"));
    a.write("f", "f");
    settle(&[&a, &b]).await;
    b.online.send_replace(false);
    b.until_state(SyncState::Offline).await;
    a.write("g", "new");
    a.flush().await;
    // Whenever the line comes back, the engine waits for quiet or looks. There is nothing to send, so it
    // hears of what it missed only by asking.
    let (path, saved) = (b.path("g"), b.path("f"));
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                fs::write(&saved, "f").unwrap();
                thread::sleep(Duration::from_millis(1));
            }
        });
        b.online.send_replace(true);
        let deadline = std::time::Instant::now() + LIMIT;
        while !path.exists() && std::time::Instant::now() < deadline {
            thread::sleep(Duration::from_millis(5));
        }
        over.store(true, Ordering::Relaxed);
        assert!(path.exists(), "it has not asked");
    });
    b.until(|status| status.state == SyncState::Idle).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_root_that_vanished_or_was_replaced_is_not_believed() {
    let mesh = Mesh::new();
    let (a, b) = (mesh.node("a"), mesh.node("b"));
    a.write("f", "x");
    settle(&[&a, &b]).await;
    let (root, elsewhere) = (a.config.root.clone(), mesh.folder.path().join("elsewhere"));
    fs::rename(&root, &elsewhere).unwrap();
    let status = a.until_state(SyncState::Halted).await;
    assert!(status.halted_reason.contains("missing"), "{}", status.halted_reason);
    fs::create_dir(&root).unwrap();
    let status = a.until(|status| status.halted_reason.contains("another directory")).await;
    assert_eq!(status.state, SyncState::Halted);
    assert!(matches!(a.handle().flush().await, Err(crate::sync::FlushError::Halted { .. })));
    fs::remove_dir(&root).unwrap();
    fs::rename(&elsewhere, &root).unwrap();
    a.until_state(SyncState::Idle).await;
    settle(&[&a, &b]).await;
    assert_eq!(b.names(), ["f"]);
}

/// More files than may be deleted at once, on both.
async fn fill(a: &Node, b: &Node) {
    for number in 0..150 {
        a.write(&format!("d/f{number}"), format!("content {number}"));
    }
    settle(&[a, b]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn deleting_very_much_is_held_until_it_is_confirmed() {
    let mesh = Mesh::new();
    let (a, b) = (mesh.node("a"), mesh.node("b"));
    fill(&a, &b).await;
    fs::rename(a.path("d"), a.path("renamed")).unwrap();
    settle(&[&a, &b]).await;
    assert!(b.path("renamed/f0").exists() && !b.path("d").exists(), "a rename loses nothing");
    // At once: of a slow removal the first hundred deletions would not be held.
    fs::rename(a.path("renamed"), mesh.folder.path().join("gone")).unwrap();
    a.write("new", "other changes still travel");
    a.flush().await;
    b.flush().await;
    assert_eq!(b.names().len(), 152);
    let status = a.status();
    assert_eq!(status.problems[0].code, Code::MassDeleteHeld);
    assert_eq!(status.pending_push, 150, "the directory waits for its files");
    assert_eq!(a.handle().confirm_deletions().unwrap(), 150);
    settle(&[&a, &b]).await;
    assert_eq!(b.names(), ["new"]);
    assert!(a.status().problems.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_operators_word_is_not_lost_with_the_line_over_which_it_came() {
    let mesh = Mesh::new();
    let (a, b) = (mesh.node("a"), mesh.node("b"));
    fill(&a, &b).await;
    fs::rename(a.path("d"), mesh.folder.path().join("gone")).unwrap();
    a.flush().await;
    assert_eq!(a.status().held_deletions, 150);
    b.write("new", "so that there is something to ask for besides the word");
    b.flush().await;
    mesh.hub.break_after_word();
    mesh.hub.confirm_deletions();
    assert!(a.handle().flush().await.is_err());
    assert!(b.path("d/f0").exists());
    mesh.hub.set_broken(false);
    settle(&[&a, &b]).await;
    assert_eq!(b.names(), ["new"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_works_on_nothing_now_takes_no_word_for_deletions() {
    let mesh = Mesh::new();
    let (a, b) = (mesh.node("a"), mesh.node("b"));
    fill(&a, &b).await;
    fs::rename(a.path("d"), mesh.folder.path().join("gone")).unwrap();
    a.flush().await;
    a.handle().set_options(MemberOptions { paused: true, ..a.options });
    a.until_state(SyncState::Paused).await;
    let paused = Err(crate::sync::FlushError::Paused);
    assert_eq!(a.handle().confirm_deletions(), paused, "it would be swallowed");
    a.handle().set_options(a.options);
    a.until(|status| status.state == SyncState::Idle && status.held_deletions == 150).await;
    assert_eq!(a.handle().confirm_deletions(), Ok(150));
    settle(&[&a, &b]).await;
    assert!(b.names().is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn deletions_that_the_hub_holds_wait_for_an_operators_word_and_nothing_else_does() {
    /// Trees differ while something is held.
    async fn both(a: &Node, b: &Node) {
        for node in [a, b, a, b] {
            node.flush().await;
        }
    }
    let mesh = Mesh::new();
    let (a, b) = (mesh.node("a"), mesh.node("b"));
    for name in ["one", "two", "three"] {
        a.write(name, name);
    }
    settle(&[&a, &b]).await;
    mesh.hub.hold_deletions();
    fs::remove_file(a.path("one")).unwrap();
    a.write("new", "other changes still travel");
    both(&a, &b).await;
    assert_eq!(b.names(), ["new", "one", "three", "two"]);
    let status = a.status();
    assert_eq!(status.problems[0].code, Code::MassDeleteHeld);
    assert!(status.problems[0].message.contains("by the hub"), "{:?}", status.problems);
    assert_eq!((status.held_deletions, status.pending_push), (1, 1));
    assert_eq!(a.names(), ["new", "three", "two"], "it does not come back either");
    // The word of the node's owner is not the hub's.
    assert_eq!(a.handle().confirm_deletions().unwrap(), 1);
    both(&a, &b).await;
    assert_eq!((b.names().len(), a.status().held_deletions), (4, 1));
    mesh.hub.confirm_deletions();
    settle(&[&a, &b]).await;
    assert_eq!(b.names(), ["new", "three", "two"]);
    assert!(a.status().problems.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t35_two_agents_on_one_directory_are_refused() {
    let mesh = Mesh::new();
    let mut first = mesh.node("a");
    first.flush().await;
    let mut second = mesh.stopped_node("b");
    second.config.root = first.config.root.clone();
    second_waits(&mut first, &mut second).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_index_and_a_rolled_back_hub_merge_and_delete_nothing() {
    let mesh = Mesh::new();
    let (mut a, b) = (mesh.node("a"), mesh.node("b"));
    a.write("f", "x");
    settle(&[&a, &b]).await;
    let put_back = mesh.hub.backup();
    a.write("later", "x");
    settle(&[&a, &b]).await;
    put_back();
    settle(&[&a, &b]).await;
    assert_eq!(a.names(), ["f", "later"]);
    a.stop().await;
    let workspace = a.config.state_dir.join("workspaces").join(mesh.workspace.to_string());
    fs::write(workspace.join("index.db"), vec![0x55; 10_000]).unwrap();
    fs::remove_file(workspace.join("index.db-wal")).ok();
    fs::remove_file(a.path("f")).unwrap();
    a.start();
    settle(&[&a, &b]).await;
    assert_eq!(a.names(), ["f", "later"], "a deletion that nobody remembers is none");
    assert!(mesh.hub.0.conflicts.lock().unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t34_a_directory_that_still_holds_ignored_files_is_kept_and_told() {
    let mesh = Mesh::new();
    let (a, b) = (mesh.node("a"), mesh.node("b"));
    a.write("d/f", "x");
    settle(&[&a, &b]).await;
    b.write("d/.git/config", "precious");
    fs::remove_dir_all(a.path("d")).unwrap();
    a.flush().await;
    b.flush().await;
    assert_eq!(b.names(), ["d", "d/.git", "d/.git/config"]);
    let problems = b.status().problems;
    assert!(problems[0].message.contains("not synced"), "{problems:?}");
    fs::remove_dir_all(b.path("d/.git")).unwrap();
    b.flush().await;
    assert!(b.names().is_empty());
    assert!(b.status().problems.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t33_stopping_does_not_wait_for_the_end_of_a_scan() {
    let mesh = Mesh::new();
    let mut a = mesh.stopped_node("a");
    fs::create_dir_all(&a.config.root).unwrap();
    fs::File::create(a.path("huge")).unwrap().set_len(20 << 30).unwrap();
    a.start();
    a.until_state(SyncState::Scanning).await;
    let begun = std::time::Instant::now();
    a.stop().await;
    // Reading all of it takes several times as long.
    assert!(begun.elapsed() < Duration::from_secs(3), "{:?}", begun.elapsed());
}

/// Waits until `b` has everything the hub has, without making it look at its own tree.
async fn arrived(mesh: &Mesh, b: &Node) {
    let seq = *mesh.hub.subscribe().borrow();
    b.handle().head_moved(seq);
    b.until(|status| status.applied_seq >= seq && status.state == SyncState::Idle).await;
}

/// Waits until the hub has `path` or, if not `there`, has it no more.
async fn at_hub(mesh: &Mesh, path: &str, there: bool) {
    let path = cortex_shared::wire_path::WirePath::new(path).unwrap();
    let mut head = mesh.hub.subscribe();
    // Not in the closure of `wait_for`: that holds the head, and a commit holds the tree when it tells it.
    let reached = async {
        while mesh.hub.tree().contains_key(&path) != there {
            head.changed().await.unwrap();
        }
    };
    let found = tokio::time::timeout(Duration::from_secs(20), reached).await;
    found.unwrap_or_else(|_| panic!("{path} is not noticed"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_edit_in_a_directory_that_came_from_the_hub_is_noticed_by_itself() {
    let mesh = Mesh::new();
    let (a, b) = (mesh.node("a"), mesh.node("b"));
    settle(&[&a, &b]).await;
    a.write("d/e/f", "x");
    a.flush().await;
    arrived(&mesh, &b).await;
    b.write("d/e/new", "x");
    at_hub(&mesh, "d/e/new", true).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_directory_that_is_removed_and_made_again_is_noticed_by_itself() {
    let mesh = Mesh::new();
    let a = mesh.node("a");
    a.write("out/old", "x");
    a.flush().await;
    fs::remove_dir_all(a.path("out")).unwrap();
    fs::create_dir(a.path("out")).unwrap();
    fs::write(a.path("out/f"), "x").unwrap();
    at_hub(&mesh, "out/f", true).await;
    at_hub(&mesh, "out/old", false).await;
    a.write("out/g", "x");
    at_hub(&mesh, "out/g", true).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hub_put_back_from_a_backup_that_others_have_committed_to_loses_nothing() {
    let mesh = Mesh::new();
    let (mut a, mut b) = (mesh.node("a"), mesh.node("b"));
    let mut away = mesh.node("away");
    for name in ["kept", "deleted", "edited"] {
        a.write(name, "old");
    }
    settle(&[&a, &b, &away]).await;
    away.stop().await;
    let put_back = mesh.hub.backup();
    fs::remove_file(a.path("deleted")).unwrap();
    a.write("edited", "by a");
    a.write("new", "by a");
    settle(&[&a, &b]).await;
    a.stop().await;
    b.stop().await;
    let epoch = mesh.hub.epoch();
    put_back();
    // Who was away has seen nothing that is lost, and takes the same numbers for other changes: more
    // of them than were lost, so that nobody's number is beyond the head.
    away.start();
    away.flush().await;
    for number in 0..6 {
        away.write(&format!("by away {number}"), "x");
        away.flush().await;
    }
    assert_eq!(mesh.hub.epoch(), epoch, "nobody has proved a loss");
    a.start();
    b.start();
    settle(&[&a, &b, &away]).await;
    assert_ne!(mesh.hub.epoch(), epoch);
    let names = a.names();
    for name in ["kept", "deleted", "edited", "new", "by away 0", "by away 5"] {
        assert!(names.contains(&name.to_owned()), "{name} in {names:?}");
    }
    // Both versions of the edited file are there.
    assert_eq!(names.len(), 11, "{names:?}");
    let copy = names.iter().find(|name| name.starts_with("edited.conflict-")).unwrap();
    assert_eq!((a.read("edited"), a.read(copy)), ("old".into(), "by a".into()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connected_member_learns_of_a_new_history_at_its_next_commit() {
    let mesh = Mesh::new();
    let (a, b) = (mesh.node("a"), mesh.node("b"));
    a.write("f", "1");
    settle(&[&a, &b]).await;
    let put_back = mesh.hub.backup();
    a.write("f", "2");
    settle(&[&a, &b]).await;
    put_back();
    mesh.hub.put("other", Some(cortex_shared::entry::Entry::Dir));
    // It has no reason to ask for the head: the commit tells.
    a.write("later", "x");
    at_hub(&mesh, "later", true).await;
    settle(&[&a, &b]).await;
    assert_eq!(a.names().len(), 4, "{:?}", a.names());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn content_that_the_hub_has_lost_holds_up_only_its_file_and_is_sent_again() {
    let mesh = Mesh::new();
    let (mut a, b) = (mesh.node("a"), mesh.node("b"));
    settle(&[&a, &b]).await;
    let large = noise(7, 5 << 20);
    a.write("large", &large);
    a.write("small", "lost as well");
    a.flush().await;
    a.stop().await;
    let hub_entry = |name: &str| {
        let path = cortex_shared::wire_path::WirePath::new(name).unwrap();
        match mesh.hub.tree().remove(&path) {
            Some(cortex_shared::entry::Entry::File(file)) => file,
            other => panic!("{other:?}"),
        }
    };
    mesh.hub.lose_pack_of(&hub_entry("small").content);
    let second = hub_entry("large").chunks().nth(1).unwrap().hash;
    mesh.hub.lose_pack_of(&second);
    let c = mesh.node("c");
    c.write("other", "is sent");
    c.flush().await;
    b.flush().await;
    for node in [&b, &c] {
        assert_eq!(node.names(), ["other"], "{:?}", node.status().problems);
        let problems = node.status().problems;
        assert_eq!(problems.len(), 2, "{problems:?}");
        assert!(
            problems.iter().all(|problem| problem.code == Code::ContentMissing),
            "{problems:?}"
        );
    }
    a.start();
    settle(&[&a, &b, &c]).await;
    assert!(fs::read(c.path("large")).unwrap() == large);
    assert_eq!(b.read("small"), "lost as well");
    assert!(b.status().problems.is_empty() && c.status().problems.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_failed_scan_should_have_seen_is_looked_at_again() {
    let mesh = Mesh::new();
    let a = mesh.node("a");
    a.write("f", "old");
    a.flush().await;
    a.until_state(SyncState::Idle).await;
    let folder = a.config.state_dir.join("workspaces").join(mesh.workspace.to_string());
    let database = rusqlite::Connection::open(folder.join("index.db")).unwrap();
    database.execute_batch("BEGIN IMMEDIATE").unwrap();
    a.write("new", "x");
    let failed = |status: &SyncStatus| status.problems.iter().any(|p| p.code == Code::SyncFailed);
    a.until(failed).await;
    database.execute_batch("ROLLBACK").unwrap();
    at_hub(&mesh, "new", true).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_large_file_on_its_way_delays_no_small_one_and_a_flush_waits_for_it() {
    let mesh = Mesh::new();
    let (a, mut b) = (mesh.node("a"), mesh.node("b"));
    settle(&[&a, &b]).await;
    b.stop().await;
    mesh.hub.let_large_move(false);
    let large: Vec<Vec<u8>> = (0..3).map(|seed| noise(seed, 40 << 20)).collect();
    fs::create_dir(a.path("large")).unwrap();
    let aside = a.config.state_dir.join("aside");
    for (number, content) in large.iter().enumerate() {
        // What is seen while it is still short would be no large file.
        fs::write(&aside, content).unwrap();
        fs::rename(&aside, a.path(&format!("large/{number}"))).unwrap();
    }
    at_hub(&mesh, "large", true).await;
    a.until(|status| status.state == SyncState::Uploading && status.pending_push == 3).await;
    for number in 0..3 {
        let name = format!("small {number}");
        a.write(&name, "x");
        at_hub(&mesh, &name, true).await;
    }
    assert_eq!(mesh.hub.tree().len(), 4, "{:?}", mesh.hub.tree());
    let mut flush = Box::pin(a.handle().flush());
    let soon = tokio::time::timeout(Duration::from_millis(500), &mut flush).await;
    assert!(soon.is_err(), "flushed although three files are on their way");
    mesh.hub.let_large_move(true);
    tokio::time::timeout(LIMIT, flush).await.unwrap().unwrap();
    assert_eq!(mesh.hub.tree().len(), 7);

    // And the way back.
    mesh.hub.let_large_move(false);
    b.start();
    b.until(|status| status.entries == 3 && status.state == SyncState::Applying).await;
    a.write("small 3", "x");
    at_hub(&mesh, "small 3", true).await;
    b.handle().head_moved(*mesh.hub.subscribe().borrow());
    b.until(|status| status.entries == 4).await;
    assert!(!b.path("large/0").exists());
    assert_ne!(b.status().applied_seq, b.status().head_seq, "not all of it is here");
    mesh.hub.let_large_move(true);
    b.flush().await;
    for (number, content) in large.iter().enumerate() {
        assert!(&fs::read(b.path(&format!("large/{number}"))).unwrap() == content);
    }
    assert_eq!(b.status().applied_seq, b.status().head_seq);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_large_file_that_changes_while_it_is_on_its_way_ends_as_it_is_last() {
    let mesh = Mesh::new();
    let (a, b) = (mesh.node("a"), mesh.node("b"));
    settle(&[&a, &b]).await;
    mesh.hub.let_large_move(false);
    a.write("large", noise(1, 5 << 20));
    a.until(|status| status.state == SyncState::Uploading).await;
    let last = noise(2, 6 << 20);
    a.write("large", &last);
    mesh.hub.let_large_move(true);
    a.flush().await;
    mesh.hub.let_large_move(false);
    b.handle().head_moved(*mesh.hub.subscribe().borrow());
    b.until(|status| status.state == SyncState::Applying).await;
    a.write("large", "small now");
    a.flush().await;
    b.handle().head_moved(*mesh.hub.subscribe().borrow());
    b.until(|status| status.entries == 1).await;
    assert_eq!(b.read("large"), "small now");
    mesh.hub.let_large_move(true);
    settle(&[&a, &b]).await;
    assert_eq!(b.read("large"), "small now");
    let stage = b.config.state_dir.join("workspaces").join(mesh.workspace.to_string());
    assert_eq!(fs::read_dir(stage.join("files/stage")).unwrap().count(), 0, "nothing is left over");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_programs_obey_is_not_replaced_while_a_command_runs_and_follows_after_it() {
    let mesh = Mesh::new();
    let (a, b) = (mesh.node("a"), mesh.node("b"));
    for name in [".envrc", ".profile", "file"] {
        a.write(name, "old");
    }
    settle(&[&a, &b]).await;
    let before = fs::metadata(b.path(".envrc")).unwrap().ino();
    let (one, other) = (b.handle().occupancy().enter().await, b.handle().occupancy().enter().await);
    a.write(".envrc", "new");
    fs::remove_file(a.path(".profile")).unwrap();
    a.write("file", "new");
    a.write(".vscode/tasks.json", "new");
    a.flush().await;
    b.flush().await;
    assert_eq!(
        (b.read("file"), b.read(".envrc"), b.read(".profile")),
        ("new".into(), "old".into(), "old".into())
    );
    assert_eq!(fs::metadata(b.path(".envrc")).unwrap().ino(), before);
    let problems = b.status().problems;
    assert!(problems.iter().any(|problem| problem.code == Code::CommandRuns), "{problems:?}");
    drop(one);
    b.flush().await;
    assert_eq!(b.read(".envrc"), "old", "another command runs");
    drop(other);
    // By itself.
    b.until(|status| status.problems.is_empty() && status.applied_seq == status.head_seq).await;
    assert_eq!(b.read(".envrc"), "new");
    assert!(!b.path(".profile").exists() && b.path(".vscode/tasks.json").exists());
}

/// The line breaks when the hub is about to answer, or to take, what happens to a file on `a`.
async fn lose_commit(mesh: &Mesh, taken: Taken, happens: impl FnOnce()) {
    mesh.hub.lose_commit(taken);
    happens();
    tokio::time::timeout(LIMIT, mesh.hub.commit_lost()).await.unwrap();
}

/// The line works again. What failed of late may still be told once.
async fn line_works(mesh: &Mesh, nodes: [&Node; 2]) {
    mesh.hub.set_broken(false);
    for node in nodes {
        tokio::time::timeout(LIMIT, node.handle().flush()).await.unwrap().ok();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_changed_again_before_a_lost_answer_is_asked_for_is_no_conflict() {
    for taken in [Taken::Yes, Taken::No] {
        let mesh = Mesh::new();
        let (a, b) = (mesh.node("a"), mesh.node("b"));
        for name in ["edited", "gone", "back"] {
            a.write(name, "one");
        }
        settle(&[&a, &b]).await;
        lose_commit(&mesh, taken, || a.write("edited", "two")).await;
        a.write("edited", "three");
        line_works(&mesh, [&a, &b]).await;
        settle(&[&a, &b]).await;
        lose_commit(&mesh, taken, || a.write("new", "one")).await;
        fs::remove_file(a.path("new")).unwrap();
        line_works(&mesh, [&a, &b]).await;
        settle(&[&a, &b]).await;
        lose_commit(&mesh, taken, || fs::remove_file(a.path("gone")).unwrap()).await;
        a.write("gone", "again");
        line_works(&mesh, [&a, &b]).await;
        settle(&[&a, &b]).await;
        lose_commit(&mesh, taken, || a.write("back", "two")).await;
        a.write("back", "one");
        line_works(&mesh, [&a, &b]).await;
        settle(&[&a, &b]).await;
        assert_eq!(b.names(), ["back", "edited", "gone"], "{taken:?}");
        assert_eq!(["back", "edited", "gone"].map(|name| b.read(name)), ["one", "three", "again"]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_not_here_when_its_answer_was_lost_is_not_taken_for_ours() {
    let mesh = Mesh::new();
    let (a, b) = (mesh.node("a"), mesh.node("b"));
    a.write("run", "one");
    a.write("d/below", "one");
    settle(&[&a, &b]).await;
    // Put together of both sides: the content is fetched after that.
    a.online.send_replace(false);
    b.write("run", "two");
    b.flush().await;
    fs::set_permissions(a.path("run"), fs::Permissions::from_mode(0o755)).unwrap();
    lose_commit(&mesh, Taken::Yes, || {
        a.online.send_replace(true);
    })
    .await;
    line_works(&mesh, [&a, &b]).await;
    settle(&[&a, &b]).await;
    assert_eq!(b.read("run"), "two");
    assert_eq!(fs::metadata(b.path("run")).unwrap().permissions().mode() & 0o111, 0o111);

    // The conflict copy of what lost its name to a directory.
    a.online.send_replace(false);
    fs::remove_dir_all(b.path("d")).unwrap();
    b.write("d", "file");
    b.flush().await;
    a.write("d/below", "two");
    lose_commit(&mesh, Taken::Yes, || {
        a.online.send_replace(true);
    })
    .await;
    line_works(&mesh, [&a, &b]).await;
    settle(&[&a, &b]).await;
    assert_eq!(b.read("d/below"), "two");
    let copy = b.names().into_iter().find(|name| name.starts_with("d.conflict-")).unwrap();
    assert_eq!((a.read(&copy), b.read(&copy)), ("file".to_owned(), "file".to_owned()));

    // The same from somebody else, after it had gone here.
    lose_commit(&mesh, Taken::No, || a.write("same", "same")).await;
    a.online.send_replace(false);
    fs::remove_file(a.path("same")).unwrap();
    line_works(&mesh, [&a, &b]).await;
    b.write("same", "same");
    b.flush().await;
    a.online.send_replace(true);
    settle(&[&a, &b]).await;
    assert_eq!((a.read("same"), b.read("same")), ("same".to_owned(), "same".to_owned()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hub_put_back_right_after_it_told_what_it_took_loses_nothing() {
    let mesh = Mesh::new();
    let (a, b) = (mesh.node("a"), mesh.node("b"));
    a.write("f", "one");
    settle(&[&a, &b]).await;
    let put_back = mesh.hub.backup();
    b.online.send_replace(false);
    lose_commit(&mesh, Taken::Yes, || a.write("f", "two")).await;
    tokio::time::timeout(LIMIT, mesh.hub.break_after_answer()).await.unwrap();
    a.until_state(SyncState::Offline).await;
    put_back();
    b.online.send_replace(true);
    line_works(&mesh, [&a, &b]).await;
    settle(&[&a, &b]).await;
    assert!(mesh.hub.ever_had(b"two"));
    assert_eq!(a.tree(), b.tree());
    assert!(a.names().iter().any(|name| a.read(name) == "two"), "{:?}", a.tree());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_hub_tells_what_it_took() {
    let mesh = Mesh::new();
    let (a, b) = (mesh.node("a"), mesh.node("b"));
    a.write("f", "one");
    settle(&[&a, &b]).await;
    lose_commit(&mesh, Taken::Yes, || a.write("f", "two")).await;
    a.write("f", "three");
    mesh.hub.set_crammed(true);
    tokio::time::timeout(LIMIT, mesh.hub.break_after_answer()).await.unwrap();
    mesh.hub.set_crammed(false);
    line_works(&mesh, [&a, &b]).await;
    settle(&[&a, &b]).await;
    assert_eq!((b.names(), b.read("f")), (vec!["f".to_owned()], "three".to_owned()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_is_let_in_again_is_told_what_was_taken() {
    let mesh = Mesh::new();
    let (a, b) = (mesh.node("a"), mesh.node("b"));
    a.write("f", "one");
    settle(&[&a, &b]).await;
    lose_commit(&mesh, Taken::Yes, || a.write("f", "two")).await;
    mesh.hub.set_refuses(true);
    line_works(&mesh, [&a, &b]).await;
    a.write("f", "three");
    assert!(a.handle().flush().await.is_err());
    mesh.hub.set_refuses(false);
    line_works(&mesh, [&a, &b]).await;
    settle(&[&a, &b]).await;
    assert_eq!((b.names(), b.read("f")), (vec!["f".to_owned()], "three".to_owned()));
}
