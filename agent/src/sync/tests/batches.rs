//! Several commits of one push: what happens to one while the content of the next is on its way.

use std::fs;

use super::super::ground::Batches;
use super::super::problem::Code;
use super::super::status::SyncState;
use super::{Mesh, Node, arrived, says, settle};

/// A stopped node with this many files that sends each in a commit of its own.
fn one_by_one(mesh: &Mesh, files: usize) -> Node {
    let mut node = mesh.stopped_node("a");
    node.batches = Batches { commit_ops: 1, ..Batches::REAL };
    for number in 0..files {
        node.write(&format!("f{number}"), number.to_string());
    }
    node
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_commit_that_fails_while_content_of_the_next_is_sent_costs_only_time() {
    let mesh = Mesh::new();
    let mut a = one_by_one(&mesh, 5);
    mesh.hub.await_packs(usize::MAX);
    a.start();
    mesh.hub.received(2).await;
    mesh.hub.set_broken(true);
    mesh.hub.await_packs(0);
    a.until_state(SyncState::Offline).await;
    assert_eq!(mesh.hub.traffic()[..2], [0, 2]);
    mesh.hub.set_broken(false);
    let b = mesh.node("b");
    settle(&[&a, &b]).await;
    assert_eq!(b.names(), ["f0", "f1", "f2", "f3", "f4"]);
    // What had been acknowledged was not sent again.
    assert_eq!(mesh.hub.traffic()[..2], [5, 5]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_while_a_commit_is_made_and_content_of_the_next_is_sent_is_no_wait_and_no_loss() {
    let mesh = Mesh::new();
    let mut a = one_by_one(&mesh, 5);
    mesh.hub.await_packs(usize::MAX);
    a.start();
    mesh.hub.received(2).await;
    a.stop().await;
    mesh.hub.await_packs(0);
    fs::write(a.path("f0"), "changed meanwhile").unwrap();
    fs::remove_file(a.path("f1")).unwrap();
    a.start();
    let b = mesh.node("b");
    settle(&[&a, &b]).await;
    assert_eq!(b.names(), ["f0", "f2", "f3", "f4"]);
    assert_eq!(b.read("f0"), "changed meanwhile");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hub_that_gets_full_between_two_commits_has_the_first_and_is_asked_again_for_the_others()
{
    let mesh = Mesh::new();
    let mut a = one_by_one(&mesh, 4);
    fs::create_dir(a.path("z")).unwrap();
    mesh.hub.full_after(2);
    a.start();
    let status = a.until(|status| says(status, Code::HubFull)).await;
    let mut lacking: Vec<_> =
        status.problems.iter().filter_map(|problem| problem.path.clone()).collect();
    lacking.sort();
    let at_hub: Vec<_> = mesh.hub.tree().into_keys().collect();
    assert_eq!(at_hub, ["f0", "f1", "z"].map(super::path), "what needs no room goes on");
    assert_eq!(lacking, ["f2", "f3"].map(super::path));
    mesh.hub.set_full(false);
    let b = mesh.node("b");
    settle(&[&a, &b]).await;
    assert_eq!(b.names(), ["f0", "f1", "f2", "f3", "z"]);
    assert!(a.status().problems.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hub_without_room_for_names_keeps_nobody_from_what_others_did() {
    let mesh = Mesh::new();
    let a = mesh.node("a");
    let b = mesh.node("b");
    settle(&[&a, &b]).await;
    a.online.send_replace(false);
    fs::create_dir(a.path("of-a")).unwrap();
    b.write("of-b", "of b");
    b.flush().await;
    mesh.hub.set_crammed(true);
    a.online.send_replace(true);
    a.until(|status| says(status, Code::HubFull)).await;
    a.until(|status| status.applied_seq == 1).await;
    assert_eq!(a.read("of-b"), "of b");
    assert_eq!(mesh.hub.tree().into_keys().collect::<Vec<_>>(), [super::path("of-b")]);
    mesh.hub.set_crammed(false);
    settle(&[&a, &b]).await;
    assert_eq!(b.names(), ["of-a", "of-b"]);
    assert!(a.status().problems.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn deletions_of_several_commits_that_the_hub_holds_are_counted_and_go_together() {
    let mesh = Mesh::new();
    let mut a = one_by_one(&mesh, 5);
    a.start();
    let b = mesh.node("b");
    settle(&[&a, &b]).await;
    mesh.hub.hold_deletions();
    a.online.send_replace(false);
    for name in ["f0", "f2", "f4"] {
        fs::remove_file(a.path(name)).unwrap();
    }
    a.write("new", "is not held");
    a.online.send_replace(true);
    a.flush().await;
    assert_eq!(a.status().held_deletions, 3);
    assert_eq!(mesh.hub.tree().len(), 6);
    mesh.hub.confirm_deletions();
    arrived(&mesh, &a).await;
    settle(&[&a, &b]).await;
    assert_eq!(b.names(), ["f1", "f3", "new"]);
}
