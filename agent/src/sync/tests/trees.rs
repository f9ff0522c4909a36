//! How the trees of several members come together, whatever is done to them.

use std::os::unix::fs::{MetadataExt as _, symlink};

use super::*;

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
    let there = async {
        while !mesh.hub.tree().contains_key(&path) {
            head.changed().await.unwrap();
        }
    };
    // The next look at everything comes after ten minutes.
    tokio::time::timeout(Duration::from_secs(20), there).await.unwrap();
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
