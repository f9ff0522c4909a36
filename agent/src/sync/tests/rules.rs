//! Who may sync what where, and what people are told.

use super::*;
use crate::sync::roots::Roots;

/// Whether a status says a problem of this kind.
fn says(status: &SyncStatus, code: &str) -> bool {
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
        second.start();
        let status = second.until_state(SyncState::Halted).await;
        assert!(status.halted_reason.contains("another agent"), "{}", status.halted_reason);
        first.stop().await;
        second.until_state(SyncState::Idle).await;
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
    assert!(says(&status, "kept"), "{status:?}");
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
