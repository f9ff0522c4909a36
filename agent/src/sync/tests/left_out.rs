//! What rules leave out: it is neither sent nor deleted.

use super::super::problem::Code;
use super::*;
use crate::sync::mode::MemberMode;

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
