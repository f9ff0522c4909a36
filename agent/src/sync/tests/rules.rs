//! Who may sync what where, and what people are told.

#![allow(clippy::print_stderr)] // a skipped test says so

use std::os::unix::fs::symlink;

use super::super::problem::Code;
use super::*;
use crate::sync::FlushError;
use crate::sync::mode::MemberMode;
use crate::sync::roots::Roots;

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
