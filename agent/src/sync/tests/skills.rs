//! Links to skills that take the place of directories.

use std::os::unix::fs::symlink;

use super::super::problem::Code;
use super::*;
use crate::library::Freshness;

fn awaits(status: &SyncStatus) -> bool {
    status.problems.iter().any(|problem| problem.code == Code::SkillAwaited)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_directory_stays_until_the_skill_is_here_that_takes_its_place() {
    let mesh = Mesh::new();
    let a = mesh.node("a");
    let mut b = mesh.stopped_node("b");
    let library = Freshness::default();
    b.config.library = Some(library.clone());
    b.start();
    a.write("d/tool/run", "x");
    a.write("d/tool/deep/er/file", "y");
    a.write("other", "z");
    settle(&[&a, &b]).await;
    let before = b.names();

    fs::remove_dir_all(a.path("d/tool")).unwrap();
    symlink("../.cortex/library/tool", a.path("d/tool")).unwrap();
    a.write("other", "changed");
    a.flush().await;
    let seq = *mesh.hub.subscribe().borrow();
    b.handle().head_moved(seq);
    let status = b.until(|status| awaits(status) && status.state == SyncState::Idle).await;
    assert!(status.applied_seq < seq, "not all of it is here");
    assert_eq!(b.names(), before, "nothing of it was touched");
    assert_eq!(b.read("other"), "changed", "and nothing else waits for it");
    // Again and again, whatever else is looked at.
    b.flush().await;
    assert_eq!(b.names(), before);

    let ticket = tokio::time::timeout(LIMIT, library.asked()).await.unwrap();
    library.finish(ticket);
    b.handle().plan_again();
    b.until(|status| status.applied_seq == seq && status.problems.is_empty()).await;
    assert_eq!(fs::read_link(b.path("d/tool")).unwrap(), Path::new("../.cortex/library/tool"));
    settle(&[&a, &b]).await;

    // Whoever puts a directory in the place of the link waits for nothing.
    fs::remove_file(b.path("d/tool")).unwrap();
    b.write("d/tool/run", "mine");
    settle(&[&b, &a]).await;
    assert_eq!(a.read("d/tool/run"), "mine");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn where_there_is_no_library_and_for_other_links_nothing_waits() {
    let mesh = Mesh::new();
    let a = mesh.node("a");
    let without = mesh.node("without");
    let mut b = mesh.stopped_node("b");
    b.config.library = Some(Freshness::default());
    b.start();
    a.write("skill/run", "x");
    a.write("moved/run", "x");
    settle(&[&a, &without, &b]).await;
    fs::remove_dir_all(a.path("moved")).unwrap();
    symlink("skill", a.path("moved")).unwrap();
    settle(&[&a, &without, &b]).await;
    fs::remove_dir_all(a.path("skill")).unwrap();
    symlink(".cortex/library/skill", a.path("skill")).unwrap();
    settle(&[&a, &without]).await;
    assert!(fs::read_link(without.path("skill")).is_ok());
    // A member that has nothing there has nothing to lose.
    let mut late = mesh.stopped_node("late");
    late.config.library = Some(Freshness::default());
    late.start();
    settle(&[&a, &late]).await;
    assert!(fs::read_link(late.path("skill")).is_ok());
}
