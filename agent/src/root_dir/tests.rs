use std::os::unix::fs::symlink;

use super::*;

fn path(text: &str) -> WirePath {
    WirePath::new(text).unwrap()
}

#[test]
fn no_way_of_opening_follows_a_link_out_of_the_root() {
    let outside = tempfile::tempdir().unwrap();
    std::fs::create_dir(outside.path().join("dir")).unwrap();
    std::fs::write(outside.path().join("dir/secret"), b"s").unwrap();
    let inside = tempfile::tempdir().unwrap();
    symlink(outside.path(), inside.path().join("link")).unwrap();
    std::fs::create_dir(inside.path().join("real")).unwrap();
    symlink("../real", inside.path().join("real/up")).unwrap();
    symlink(outside.path().join("dir/secret"), inside.path().join("file")).unwrap();
    let root = RootDir::open(inside.path()).unwrap();
    // Positive control: the very same directories open where no link is in the way.
    assert!(std::fs::metadata(inside.path().join("link/dir")).unwrap().is_dir());
    root.open_dir(Some(&path("real"))).unwrap();
    for hostile in ["link", "link/dir", "real/up", "real/up/real"] {
        assert!(root.top().0.open_below(&path(hostile)).is_err(), "{hostile}");
        assert!(root.open_by_steps(&path(hostile)).is_err(), "{hostile}");
    }
    assert!(root.top().open_file(b"file").is_err());
    assert!(root.top().open_for_writing(b"file").is_err());
    assert!(root.top().open_file(b"../secret").is_err());
    assert!(root.top().lstat(b"..").is_err());
    assert_eq!(root.top().lstat(b"file").unwrap().kind, FileKind::Link);
}

#[test]
fn both_ways_of_opening_agree() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir_all(folder.path().join("a/b/c")).unwrap();
    let root = RootDir::open(folder.path()).unwrap();
    let deep = path("a/b/c");
    let at_once = root.top().0.open_below(&deep).unwrap().meta().unwrap();
    assert_eq!(at_once, root.open_by_steps(&deep).unwrap().meta().unwrap());
    assert_eq!(root.open_dir(Some(&path("a/x"))).unwrap_err().kind(), io::ErrorKind::NotFound);
}

#[test]
fn renames_replace_nothing_and_exchange_swaps() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("a"), b"A").unwrap();
    std::fs::write(folder.path().join("b"), b"B").unwrap();
    let top = RootDir::open(folder.path()).unwrap().top().clone();
    assert_eq!(top.rename_new(b"a", &top, b"b").unwrap_err().kind(), io::ErrorKind::AlreadyExists);
    top.exchange(b"a", &top, b"b").unwrap();
    assert_eq!(std::fs::read(folder.path().join("a")).unwrap(), b"B");
    assert_eq!(top.names().unwrap(), [b"a".to_vec(), b"b".to_vec()]);
}
