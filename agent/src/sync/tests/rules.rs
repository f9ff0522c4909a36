//! Who may sync what where, and what people are told.

#![allow(clippy::print_stderr)] // a skipped test says so

use std::os::unix::fs::{MetadataExt as _, symlink};

use super::super::problem::Code;
use super::*;
use crate::sync::FlushError;
use crate::sync::mode::MemberMode;
use crate::sync::roots::Roots;

/// Whether a status says a problem of this kind.
fn says(status: &SyncStatus, code: Code) -> bool {
    status.problems.iter().any(|problem| problem.code == code)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t35_overlapping_roots_of_two_workspaces_are_refused_until_one_of_them_goes() {
    let mesh = Mesh::new();
    let other = Mesh::new();
    let mut outer = mesh.stopped_node("a");
    let mut inner = other.stopped_node("a");
    let roots = Roots::default();
    outer.config.roots = roots.clone();
    inner.config.roots = roots;
    inner.config.name = "inner".to_owned();
    inner.config.root = outer.path("sub/inner");
    inner.start();
    inner.write("f", "of the inner one");
    inner.flush().await;
    outer.start();
    let status = outer.until_state(SyncState::Halted).await;
    assert!(status.halted_reason.contains("overlaps with workspace"), "{}", status.halted_reason);
    assert!(mesh.hub.tree().is_empty(), "nothing leaked");
    inner.stop().await;
    outer.until_state(SyncState::Idle).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t35_overlapping_roots_of_two_agents_are_refused_whichever_was_first() {
    for inner_first in [true, false] {
        let mesh = Mesh::new();
        let mut outer = mesh.stopped_node("a");
        let mut inner = mesh.stopped_node("b");
        inner.config.root = outer.path("sub/inner");
        fs::create_dir_all(&inner.config.root).unwrap();
        let (first, second) =
            if inner_first { (&mut inner, &mut outer) } else { (&mut outer, &mut inner) };
        first.start();
        first.until_state(SyncState::Idle).await;
        second_waits(first, second).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t34_a_directory_kept_for_what_is_ignored_in_it_is_a_state_and_acknowledged() {
    let mesh = Mesh::new();
    let (a, b) = (mesh.node("a"), mesh.node("b"));
    a.write("d/e/f", "x");
    settle(&[&a, &b]).await;
    b.write("d/e/.git/config", "precious");
    fs::remove_dir_all(a.path("d")).unwrap();
    a.flush().await;
    let seq = *mesh.hub.subscribe().borrow();
    b.handle().head_moved(seq);
    let status = b.until(|s| s.applied_seq == seq && s.state == SyncState::Idle).await;
    assert!(says(&status, Code::Kept), "{status:?}");
    assert_eq!(b.names(), ["d", "d/e", "d/e/.git", "d/e/.git/config"]);
    // What is put there after all brings the directory back, with nothing that is ignored.
    b.write("d/e/new", "x");
    settle_names(&[&b, &a]).await;
    assert_eq!(a.names(), ["d", "d/e", "d/e/new"]);
    fs::remove_dir_all(b.path("d/e/.git")).unwrap();
    settle(&[&a, &b]).await;
    assert!(b.status().problems.is_empty(), "{:?}", b.status().problems);
}

/// As [`settle`], where the trees differ by what is not synced.
async fn settle_names(nodes: &[&Node]) {
    for _ in 0..3 {
        for node in nodes {
            node.flush().await;
        }
    }
}

/// Waits until `b` has everything the hub has, without making it look at its own tree.
async fn arrived(mesh: &Mesh, b: &Node) -> SyncStatus {
    let seq = *mesh.hub.subscribe().borrow();
    b.handle().head_moved(seq);
    b.until(|status| status.applied_seq >= seq && status.state == SyncState::Idle).await
}

fn inode(node: &Node, name: &str) -> u64 {
    fs::symlink_metadata(node.path(name)).unwrap().ino()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t01_members_that_begin_with_different_files_have_the_union_and_common_ones_do_not_travel()
{
    let mesh = Mesh::new();
    let mut nodes = ["a", "b", "c"].map(|name| mesh.stopped_node(name));
    for (number, node) in nodes.iter().enumerate() {
        node.write("common", noise(1, 100_000));
        node.write(&format!("d/only {number}"), number.to_string());
    }
    nodes.iter_mut().for_each(Node::start);
    let [a, b, c] = &nodes;
    settle(&[a, b, c]).await;
    assert_eq!(a.names(), ["common", "d", "d/only 0", "d/only 1", "d/only 2"]);
    assert!(mesh.hub.0.conflicts.lock().unwrap().is_empty());
    let sent = mesh.hub.traffic()[2];
    assert!(sent <= 6, "{sent} packs: the common file is in none of them");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t02_the_same_content_on_two_members_is_no_conflict_and_does_not_travel() {
    let mesh = Mesh::new();
    let (a, mut b) = (mesh.node("a"), mesh.stopped_node("b"));
    let content = noise(2, 300_000);
    a.write("f", &content);
    b.write("f", &content);
    let old = std::time::SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000);
    fs::File::open(b.path("f")).unwrap().set_modified(old).unwrap();
    a.flush().await;
    let before = mesh.hub.traffic();
    b.start();
    settle(&[&a, &b]).await;
    assert_eq!(b.names(), ["f"]);
    assert_eq!(mesh.hub.traffic(), before, "neither content nor a commit");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t05_of_a_directory_deleted_here_and_changed_there_only_the_change_remains() {
    let mesh = Mesh::new();
    let (mut a, mut b) = (mesh.node("a"), mesh.node("b"));
    for name in ["d/e/f/edited", "d/e/f/other", "d/e/old", "d/x/y", "stays"] {
        a.write(name, "old");
    }
    settle(&[&a, &b]).await;
    a.stop().await;
    b.stop().await;
    fs::remove_dir_all(a.path("d")).unwrap();
    b.write("d/e/f/edited", "new");
    b.write("d/e/g/added", "new");
    a.start();
    a.flush().await;
    b.start();
    settle(&[&b, &a]).await;
    let names = ["d", "d/e", "d/e/f", "d/e/f/edited", "d/e/g", "d/e/g/added", "stays"];
    assert_eq!(a.names(), names);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t06_kinds_that_change_while_the_other_side_edits_lose_nothing() {
    let mesh = Mesh::new();
    let (mut a, mut b) = (mesh.node("a"), mesh.node("b"));
    for name in ["to dir", "to link", "from dir/x"] {
        a.write(name, "old");
    }
    settle(&[&a, &b]).await;
    a.stop().await;
    b.stop().await;
    fs::remove_file(a.path("to dir")).unwrap();
    a.write("to dir/inside", "by a");
    fs::remove_file(a.path("to link")).unwrap();
    symlink("from dir", a.path("to link")).unwrap();
    fs::remove_dir_all(a.path("from dir")).unwrap();
    a.write("from dir", "a file now");
    for name in ["to dir", "to link", "from dir/x"] {
        b.write(name, "edited by b");
    }
    a.start();
    a.flush().await;
    b.start();
    settle(&[&b, &a]).await;
    let edits = a.names().into_iter().filter(|name| {
        let path = a.path(name);
        path.is_file() && !path.is_symlink() && a.read(name) == "edited by b"
    });
    assert_eq!(edits.count(), 3, "{:?}", a.names());
    assert_eq!(a.read("to dir/inside"), "by a");
    assert!(a.path("from dir/x").exists(), "the edit keeps its directory");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t10_a_file_at_the_end_of_directories_made_in_one_burst_is_noticed_by_itself() {
    let mesh = Mesh::new();
    let a = mesh.node("a");
    a.flush().await;
    let mut head = mesh.hub.subscribe();
    a.write("a/b/c/d/e/f", "x");
    let path = cortex_shared::wire_path::WirePath::new("a/b/c/d/e/f").unwrap();
    let there = head.wait_for(|_| mesh.hub.tree().contains_key(&path));
    // The next look at everything comes after ten minutes.
    tokio::time::timeout(Duration::from_secs(20), there).await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t12_the_ways_in_which_editors_save_make_one_file_and_no_conflict_copy() {
    let mesh = Mesh::new();
    let (a, b) = (mesh.node("a"), mesh.node("b"));
    for name in ["in place", "replaced", "backed up", "made again"] {
        a.write(name, "0");
    }
    settle(&[&a, &b]).await;
    let commits = mesh.hub.traffic()[0];
    for round in 1..=5 {
        let text = round.to_string();
        a.write("in place", &text);
        a.write(".replaced.swp", &text);
        fs::rename(a.path(".replaced.swp"), a.path("replaced")).unwrap();
        fs::rename(a.path("backed up"), a.path("backed up~")).unwrap();
        a.write("backed up", &text);
        fs::remove_file(a.path("made again")).unwrap();
        a.write("made again", &text);
    }
    settle(&[&a, &b]).await;
    assert_eq!(b.names(), ["backed up", "backed up~", "in place", "made again", "replaced"]);
    for name in ["backed up", "in place", "made again", "replaced"] {
        assert_eq!(b.read(name), "5", "{name}");
    }
    assert!(mesh.hub.0.conflicts.lock().unwrap().is_empty());
    let commits = mesh.hub.traffic()[0] - commits;
    assert!(commits <= 25, "{commits} commits for five saves of four files");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t14_files_that_shrink_or_vanish_before_they_are_read_delay_only_themselves() {
    let mesh = Mesh::new();
    let (a, b) = (mesh.node("a"), mesh.node("b"));
    settle(&[&a, &b]).await;
    mesh.hub.let_large_move(false);
    for (seed, name) in ["shrinks", "vanishes", "stays"].into_iter().enumerate() {
        a.write(name, noise(seed as u64, 5 << 20));
    }
    a.until(|status| status.state == SyncState::Uploading && status.pending_push == 3).await;
    fs::OpenOptions::new().write(true).open(a.path("shrinks")).unwrap().set_len(10).unwrap();
    fs::remove_file(a.path("vanishes")).unwrap();
    a.write("small", "goes on");
    mesh.hub.let_large_move(true);
    settle(&[&a, &b]).await;
    assert_eq!(b.names(), ["shrinks", "small", "stays"]);
    assert_eq!(fs::metadata(b.path("shrinks")).unwrap().len(), 10);
    assert!(a.status().problems.is_empty(), "{:?}", a.status().problems);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t16_changes_of_modes_that_are_not_synced_make_no_commit() {
    let mesh = Mesh::new();
    let (a, b) = (mesh.node("a"), mesh.node("b"));
    for number in 0..1000 {
        a.write(&format!("d/{number}"), number.to_string());
    }
    settle(&[&a, &b]).await;
    let before = mesh.hub.traffic();
    for number in 0..1000 {
        let mode = fs::Permissions::from_mode(0o640);
        fs::set_permissions(a.path(&format!("d/{number}")), mode).unwrap();
    }
    settle(&[&a, &b]).await;
    assert_eq!(mesh.hub.traffic(), before);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t22_a_renamed_directory_is_renamed_elsewhere_with_what_is_ignored_in_it() {
    let mesh = Mesh::new();
    let (a, b) = (mesh.node("a"), mesh.node("b"));
    for number in 0..300 {
        a.write(&format!("old/{}/{number}", number % 7), noise(number, 2000));
    }
    a.write("other/f", "x");
    settle(&[&a, &b]).await;
    b.write("old/3/.git/config", "goes along");
    let before = inode(&b, "old/3/3");
    let [_, received, sent] = mesh.hub.traffic();
    fs::create_dir(a.path("new")).unwrap();
    fs::rename(a.path("old"), a.path("new/place")).unwrap();
    fs::rename(a.path("other/f"), a.path("other/g")).unwrap();
    a.flush().await;
    arrived(&mesh, &b).await;
    assert!(!b.path("old").exists());
    assert_eq!(inode(&b, "new/place/3/3"), before, "renamed, not copied");
    assert_eq!(b.read("new/place/3/.git/config"), "goes along");
    assert_eq!(mesh.hub.traffic()[1..], [received, sent]);
    fs::remove_dir_all(b.path("new/place/3/.git")).unwrap();
    settle(&[&a, &b]).await;
    // It is still looked after.
    b.write("new/place/3/3", "edited");
    b.flush().await;
    settle(&[&a, &b]).await;
    assert_eq!(a.read("new/place/3/3"), "edited");
    assert!(b.status().problems.is_empty(), "{:?}", b.status().problems);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t22_what_was_written_to_a_directory_that_is_renamed_elsewhere_is_not_lost() {
    let mesh = Mesh::new();
    let (a, mut b) = (mesh.node("a"), mesh.node("b"));
    for number in 0..20 {
        a.write(&format!("old/{number}"), number.to_string());
    }
    settle(&[&a, &b]).await;
    b.stop().await;
    b.write("old/3", "edited");
    b.write("old/new", "made");
    fs::rename(a.path("old"), a.path("new")).unwrap();
    a.flush().await;
    b.start();
    settle(&[&b, &a]).await;
    let texts: Vec<String> =
        a.names().iter().filter(|name| a.path(name).is_file()).map(|name| a.read(name)).collect();
    assert!(
        texts.contains(&"edited".to_owned()) && texts.contains(&"made".to_owned()),
        "{texts:?}"
    );
    assert!(texts.contains(&"3".to_owned()), "the renamed one is there as well: {texts:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t32_unusual_names_arrive_as_they_are() {
    let mesh = Mesh::new();
    let (a, b) = (mesh.node("a"), mesh.node("b"));
    let long = "n".repeat(255);
    let names = ["-rf", "a\nb", "a\tb", " leading", "trailing.", "CON", "😀", "*", "$(x)", &long];
    for name in names {
        a.write(name, name);
        a.write(&format!("{name}.d/{name}").replace(&long, "long"), name);
    }
    settle(&[&a, &b]).await;
    for name in names {
        assert_eq!(b.read(name), name);
    }
    // A conflict copy of the longest name still fits.
    a.online.send_replace(false);
    b.online.send_replace(false);
    a.write(&long, "by a");
    b.write(&long, "by b");
    a.online.send_replace(true);
    a.flush().await;
    b.online.send_replace(true);
    settle(&[&b, &a]).await;
    let copies = a.names().into_iter().filter(|name| name.contains(".conflict-"));
    assert_eq!(copies.count(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t33_pause_flush_and_stop_do_not_wait_for_the_end_of_a_transfer() {
    let mesh = Mesh::new();
    let mut a = mesh.node("a");
    a.flush().await;
    mesh.hub.let_large_move(false);
    a.write("large", noise(1, 8 << 20));
    a.until(|status| status.state == SyncState::Uploading).await;
    let begun = std::time::Instant::now();
    let flushed = a.handle().flush_within(Duration::from_millis(500)).await;
    assert_eq!(flushed, Err(FlushError::Silent));
    assert!(begun.elapsed() < SOON, "{:?}", begun.elapsed());
    let begun = std::time::Instant::now();
    let mut pending = Box::pin(a.handle().flush());
    assert!(tokio::time::timeout(Duration::from_millis(50), &mut pending).await.is_err());
    a.handle().set_options(MemberOptions { paused: true, ..MemberOptions::default() });
    a.until_state(SyncState::Paused).await;
    assert_eq!((&mut pending).await, Err(FlushError::Paused));
    drop(pending);
    assert!(begun.elapsed() < SOON, "{:?}", begun.elapsed());
    assert_eq!(a.handle().flush().await, Err(FlushError::Paused));
    // Nothing is touched meanwhile, and nothing is forgotten.
    a.write("while paused", "x");
    mesh.hub.let_large_move(true);
    assert!(mesh.hub.tree().is_empty());
    a.handle().set_options(MemberOptions::default());
    a.flush().await;
    assert_eq!(mesh.hub.tree().len(), 2);
    mesh.hub.let_large_move(false);
    a.write("large", noise(2, 8 << 20));
    a.until(|status| status.state == SyncState::Uploading).await;
    let begun = std::time::Instant::now();
    a.stop().await;
    assert!(begun.elapsed() < SOON, "{:?}", begun.elapsed());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rules_of_what_is_left_out_hold_on_all_members_and_delete_nothing() {
    let mesh = Mesh::new();
    let (a, b) = (mesh.node("a"), mesh.node("b"));
    for name in ["src/main", "build/out", "build/deep/er", "notes.log"] {
        a.write(name, "x");
    }
    settle(&[&a, &b]).await;
    // With the rules comes something that they leave out: it is never sent.
    a.write("secret.log", "x");
    a.write(".cortexignore", "build/\n*.log\n");
    a.flush().await;
    arrived(&mesh, &b).await;
    assert!(!b.path("secret.log").exists());
    for node in [&a, &b] {
        assert!(node.path("build/out").exists() && node.path("notes.log").exists());
    }
    // Neither edits nor deletions of what is left out travel, in either direction.
    a.write("build/out", "by a");
    fs::remove_file(a.path("notes.log")).unwrap();
    b.write("build/new", "by b");
    settle_names(&[&a, &b]).await;
    assert_eq!((a.read("build/out"), b.read("build/out")), ("by a".into(), "x".into()));
    assert!(b.path("notes.log").exists() && !a.path("build/new").exists());
    let explained = a.handle().explain(&path("build/out")).unwrap();
    assert_eq!(explained.code, "ignored");
    assert!(explained.text.contains("build/"), "{}", explained.text);
    // What is no longer left out is merged: nobody's version is lost.
    b.write(".cortexignore", "*.log\n");
    b.flush().await;
    settle_names(&[&a, &b, &a, &b]).await;
    assert_eq!(a.read("build/new"), "by b");
    let copies = |node: &Node| node.names().iter().filter(|n| n.contains(".conflict-")).count();
    assert_eq!((copies(&a), copies(&b)), (1, 1));
    assert_eq!(a.read("build/out"), b.read("build/out"));
    assert!(a.status().problems.is_empty(), "{:?}", a.status().problems);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_comes_to_a_workspace_with_rules_goes_by_them_before_it_sends_anything() {
    let mesh = Mesh::new();
    let (a, mut b, mut c) = (mesh.node("a"), mesh.stopped_node("b"), mesh.stopped_node("c"));
    a.write(".cortexignore", "build/\n");
    a.flush().await;
    let before = mesh.hub.traffic();
    b.write("build/out", noise(1, 5 << 20));
    // Rules of its own are merged like any file.
    c.write(".cortexignore", "other/\n");
    c.write("build/out", "x");
    c.write("other/out", "x");
    // One that only sends takes over the rules nevertheless: it could not send otherwise.
    c.options.mode = MemberMode::SendOnly;
    b.start();
    c.start();
    settle_names(&[&b, &c, &b]).await;
    for entry in mesh.hub.tree().into_keys() {
        assert!(!entry.as_bytes().starts_with(b"build"), "{entry:?}");
    }
    assert_eq!(c.read(".cortexignore"), "build/\n");
    assert_eq!(b.read("other/out"), "x");
    assert!(b.names().iter().any(|name| name.starts_with(".cortexignore.conflict-")));
    let after = mesh.hub.traffic();
    assert!(after[1] - before[1] <= 2, "nothing of what is left out was even sent: {after:?}");
    for node in [&a, &b, &c] {
        assert!(node.status().problems.is_empty(), "{:?}", node.status().problems);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn deletions_of_what_is_left_out_by_now_are_not_sent_by_who_was_away() {
    let mesh = Mesh::new();
    let (a, mut b) = (mesh.node("a"), mesh.node("b"));
    for name in ["cache", "kept", "gone"] {
        a.write(name, name);
    }
    settle(&[&a, &b]).await;
    b.stop().await;
    a.write(".cortexignore", "cache\n");
    a.flush().await;
    fs::remove_file(b.path("cache")).unwrap();
    fs::remove_file(b.path("gone")).unwrap();
    b.start();
    settle_names(&[&b, &a]).await;
    let at_hub = |name: &str| mesh.hub.tree().contains_key(&path(name));
    assert!(at_hub("cache") && a.path("cache").exists() && !b.path("cache").exists());
    assert!(!at_hub("gone") && !a.path("gone").exists());
    // Let in again, it comes back.
    fs::remove_file(a.path(".cortexignore")).unwrap();
    settle(&[&a, &b]).await;
    assert_eq!(b.read("cache"), "cache");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t34_what_may_be_removed_with_its_directory_goes_to_the_trash_with_it() {
    let mesh = Mesh::new();
    let (a, b) = (mesh.node("a"), mesh.node("b"));
    a.write(".cortexignore", "(?d)*.o\n(?d)cache/\n*.log\n");
    for name in ["goes/f", "stays/f", "repository/f"] {
        a.write(name, "x");
    }
    settle(&[&a, &b]).await;
    for name in ["goes/f.o", "goes/cache/deep/x", "stays/f.o", "stays/f.log"] {
        b.write(name, name);
    }
    b.write("repository/cache/.git/config", "precious");
    for name in ["goes", "stays", "repository"] {
        fs::remove_dir_all(a.path(name)).unwrap();
    }
    a.flush().await;
    arrived(&mesh, &b).await;
    assert!(!b.path("goes").exists(), "{:?}", b.names());
    assert!(b.path("stays/f.o").exists() && b.path("stays/f.log").exists());
    assert!(b.path("repository/cache/.git/config").exists());
    let trash = b.config.state_folder().join("files/trash");
    let contents = fs::read_dir(trash)
        .unwrap()
        .filter_map(|file| fs::read_to_string(file.unwrap().path()).ok());
    let contents: Vec<_> = contents.collect();
    for name in ["goes/f.o", "goes/cache/deep/x"] {
        assert!(contents.contains(&name.to_owned()), "{name} {contents:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_directory_whose_left_out_files_the_hub_has_is_kept_there_and_holds_up_nothing() {
    let mesh = Mesh::new();
    let (a, b) = (mesh.node("a"), mesh.node("b"));
    a.write("d/f", "x");
    a.write("d/f.o", "x");
    settle(&[&a, &b]).await;
    a.write(".cortexignore", "*.o\n");
    settle(&[&a, &b]).await;
    fs::remove_dir_all(a.path("d")).unwrap();
    a.write("other", "x");
    a.flush().await;
    let status = arrived(&mesh, &b).await;
    assert!(!b.path("d/f").exists() && b.path("d/f.o").exists() && b.path("other").exists());
    assert!(!says(&status, Code::NoEnd) && !says(&a.status(), Code::NoEnd));
    assert_eq!(a.status().kept, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_only_sends_is_not_changed_and_one_that_only_receives_changes_nothing() {
    let mesh = Mesh::new();
    let (mut a, b, mut c) = (mesh.stopped_node("a"), mesh.node("b"), mesh.stopped_node("c"));
    a.options.mode = MemberMode::SendOnly;
    c.options.mode = MemberMode::ReceiveOnly;
    a.write("by a", "1");
    a.write("both", "1");
    a.start();
    a.flush().await;
    c.start();
    settle_names(&[&b, &c]).await;
    b.write("by b", "1");
    b.write("both", "changed by b");
    b.flush().await;
    c.write("by c", "1");
    c.write("by a", "changed by c");
    fs::remove_file(c.path("both")).unwrap();
    a.write("by a", "2");
    settle_names(&[&a, &b, &c, &a]).await;
    assert_eq!((a.names(), a.read("both")), (vec!["both".into(), "by a".into()], "1".into()));
    assert_eq!(a.status().withheld, 2);
    assert_eq!(b.names(), ["both", "by a", "by b"]);
    assert_eq!((b.read("both"), b.read("by a")), ("changed by b".into(), "2".into()));
    // What was edited on both sides: theirs keeps the name, ours stays beside it, here alone.
    assert_eq!(c.read("by a"), "2");
    assert_eq!((c.read("both"), c.read("by b")), ("changed by b".into(), "1".into()));
    let copy = c.names().into_iter().find(|name| name.starts_with("by a.conflict-")).unwrap();
    assert_eq!(c.read(&copy), "changed by c");
    assert_eq!(c.status().withheld, 2, "by c, and the copy");
    for node in [&a, &b, &c] {
        let status = node.status();
        assert_eq!(status.applied_seq, status.head_seq, "{status:?}");
    }
    // Once it goes both ways, all of it does.
    a.handle().set_options(MemberOptions::default());
    c.handle().set_options(MemberOptions::default());
    settle(&[&a, &c, &b]).await;
    assert_eq!(a.names().len(), 5, "{:?}", a.names());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mirror_is_an_exact_copy_and_what_was_changed_in_it_lies_in_the_trash() {
    let mesh = Mesh::new();
    let (a, mut m) = (mesh.node("a"), mesh.stopped_node("m"));
    a.write("d/f", "1");
    a.write("g", "1");
    a.flush().await;
    m.options.mode = MemberMode::Mirror;
    m.write("extra/x", "only here");
    m.start();
    m.flush().await;
    m.write("d/f", "edited here");
    fs::remove_file(m.path("g")).unwrap();
    m.write("d/new", "only here");
    m.flush().await;
    m.until_state(SyncState::Idle).await;
    assert_eq!(m.tree(), a.tree());
    a.flush().await;
    assert_eq!(a.names(), ["d", "d/f", "g"]);
    let trash = m.config.state_dir.join("workspaces").join(mesh.workspace.to_string());
    let trash = fs::read_dir(trash.join("files/trash")).unwrap();
    let kept: Vec<String> =
        trash.map(|entry| fs::read_to_string(entry.unwrap().path()).unwrap()).collect();
    assert!(kept.contains(&"edited here".to_owned()), "{kept:?}");
    assert_eq!(kept.iter().filter(|text| *text == "only here").count(), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn links_that_leave_the_workspace_are_neither_sent_nor_placed_and_told() {
    let mesh = Mesh::new();
    let (a, b) = (mesh.node("a"), mesh.node("b"));
    a.write("d/f", "x");
    symlink("f", a.path("d/inside")).unwrap();
    symlink("/etc/passwd", a.path("d/absolute")).unwrap();
    symlink("../../elsewhere", a.path("d/out")).unwrap();
    settle_names(&[&a, &b]).await;
    assert_eq!(b.names(), ["d", "d/f", "d/inside"]);
    let told = a.status().problems.iter().filter(|p| p.code == Code::LinkOutside).count();
    assert_eq!(told, 2);
    assert_eq!(a.handle().explain(&path("d/out")).unwrap().code, "link_outside");
    let hostile = cortex_shared::entry::Entry::Link { target: b"/etc"[..].into() };
    mesh.hub.put("hostile", Some(hostile));
    let status = arrived(&mesh, &b).await;
    assert!(!b.path("hostile").is_symlink());
    assert!(says(&status, Code::LinkOutside), "{status:?}");
    for name in ["d/absolute", "d/out"] {
        fs::remove_file(a.path(name)).unwrap();
    }
    mesh.hub.put("hostile", None);
    settle(&[&a, &b]).await;
    assert!(a.status().problems.is_empty() && b.status().problems.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_root_without_its_token_is_not_believed() {
    let mesh = Mesh::new();
    let (a, mut b) = (mesh.node("a"), mesh.node("b"));
    a.write("f", "x");
    settle(&[&a, &b]).await;
    b.stop().await;
    if rustix::fs::removexattr(&b.config.root, c"user.cortex.replica").is_err() {
        eprintln!("skipped: no extended attributes here");
        return;
    }
    fs::remove_file(b.path("f")).unwrap();
    b.start();
    let status = b.until_state(SyncState::Halted).await;
    assert!(status.halted_reason.contains("token"), "{}", status.halted_reason);
    a.flush().await;
    assert_eq!(a.names(), ["f"]);
    // Attached anew it merges.
    b.stop().await;
    b.config.forget().unwrap();
    b.start();
    settle(&[&a, &b]).await;
    assert_eq!(b.names(), ["f"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_conflict_that_was_dealt_with_is_told_no_more_and_a_path_explains_itself() {
    let mesh = Mesh::new();
    let (a, b) = (mesh.node("a"), mesh.node("b"));
    a.write("f", "base");
    settle(&[&a, &b]).await;
    a.online.send_replace(false);
    b.online.send_replace(false);
    a.write("f", "by a");
    b.write("f", "by b");
    b.until(|status| status.pending_push == 1).await;
    assert_eq!(b.handle().explain(&path("f")).unwrap().code, "to_send");
    a.online.send_replace(true);
    a.flush().await;
    b.online.send_replace(true);
    settle(&[&b, &a]).await;
    assert_eq!((a.status().conflicts, b.status().conflicts), (1, 1));
    let copy = a.names().into_iter().find(|name| name.contains(".conflict-")).unwrap();
    let explained = a.handle().explain(&path(&copy)).unwrap();
    assert_eq!(explained.code, "synced");
    assert!(explained.details.iter().any(|detail| detail.contains("conflict copy of f")));
    fs::remove_file(a.path(&copy)).unwrap();
    settle(&[&a, &b]).await;
    assert_eq!((a.status().conflicts, b.status().conflicts), (0, 0));
    for (name, code) in [("f", "synced"), ("nothing", "not_here"), (".git/x", "ignored")] {
        assert_eq!(a.handle().explain(&path(name)).unwrap().code, code, "{name}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t08_making_a_file_executable_moves_no_content() {
    let mesh = Mesh::new();
    let (a, b) = (mesh.node("a"), mesh.node("b"));
    a.write("tool", noise(8, 500_000));
    settle(&[&a, &b]).await;
    let (moved, before) = (mesh.hub.traffic(), inode(&b, "tool"));
    fs::set_permissions(a.path("tool"), fs::Permissions::from_mode(0o755)).unwrap();
    settle(&[&a, &b]).await;
    assert_eq!(mesh.hub.traffic()[1..], moved[1..]);
    assert_eq!(inode(&b, "tool"), before, "the same file, with another mode");
    assert_ne!(fs::metadata(b.path("tool")).unwrap().permissions().mode() & 0o100, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t17_switching_between_two_branches_moves_what_differs_once_and_makes_no_conflict() {
    let mesh = Mesh::new();
    let (a, b) = (mesh.node("a"), mesh.node("b"));
    let switch = |branch: u64| {
        for number in 0..600_u64 {
            // A third differs, some are on one branch only (few enough not to be held).
            let name = format!("src/{}/{number}", number % 20);
            match number % 3 {
                0 => a.write(&name, format!("{branch} of {number}")),
                1 if branch == 1 && number % 9 == 1 => drop(fs::remove_file(a.path(&name))),
                _ => a.write(&name, format!("{number}")),
            }
        }
    };
    switch(0);
    settle(&[&a, &b]).await;
    switch(1);
    settle(&[&a, &b]).await;
    let [_, received, _] = mesh.hub.traffic();
    for branch in [0, 1, 0] {
        switch(branch);
        settle(&[&a, &b]).await;
    }
    assert_eq!(mesh.hub.traffic()[1], received, "the hub has both branches already");
    assert!(mesh.hub.0.conflicts.lock().unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t18_a_wide_directory_and_a_deep_path_arrive() {
    let mesh = Mesh::new();
    let (a, b) = (mesh.node("a"), mesh.node("b"));
    for number in 0..5000 {
        a.write(&format!("wide/{number}"), "");
    }
    let deep = (0..60).map(|level| format!("l{level}")).collect::<Vec<_>>().join("/");
    a.write(&format!("{deep}/f"), "x");
    a.flush().await;
    arrived(&mesh, &b).await;
    assert_eq!(b.names().len(), 1 + 5000 + 60 + 1);
    assert_eq!(b.read(&format!("{deep}/f")), "x");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t26_files_of_every_size_around_the_limits_of_chunks_arrive() {
    let mesh = Mesh::new();
    let (a, b) = (mesh.node("a"), mesh.node("b"));
    fs::create_dir_all(a.path("empty directory")).unwrap();
    let sizes = [0, 1, 256 << 10, 1 << 20, 4 << 20]
        .into_iter()
        .flat_map(|size: usize| [size.saturating_sub(1), size, size + 1]);
    for size in sizes {
        a.write(&format!("{size}"), noise(size as u64, size));
    }
    settle(&[&a, &b]).await;
    assert!(b.path("empty directory").is_dir());
}

fn path(text: &str) -> cortex_shared::wire_path::WirePath {
    cortex_shared::wire_path::WirePath::new(text).unwrap()
}
