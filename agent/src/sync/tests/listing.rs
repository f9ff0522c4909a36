//! Members that were away for longer than deletions are recorded.

use super::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_was_away_for_too_long_reads_the_whole_tree_and_deletes_what_is_gone() {
    let mesh = Mesh::new();
    let (a, mut b) = (mesh.node("a"), mesh.node("b"));
    for name in ["stays", "goes", "d/goes too", "edited there"] {
        a.write(name, name);
    }
    settle(&[&a, &b]).await;
    b.stop().await;
    for name in ["goes", "d/goes too", "edited there"] {
        fs::remove_file(a.path(name)).unwrap();
    }
    fs::remove_dir(a.path("d")).unwrap();
    a.write("new", "n");
    a.flush().await;
    mesh.hub.forget_deletions();
    a.write("newer", "n");
    a.flush().await;
    b.write("edited there", "an edit outlives a deletion");
    b.write("own", "o");
    b.start();
    settle(&[&a, &b]).await;
    assert_eq!(b.names(), ["edited there", "new", "newer", "own", "stays"]);
}
