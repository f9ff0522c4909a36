use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::Path;

use super::*;

/// Remembers which directories were entered.
#[derive(Default)]
struct Entered(HashMap<WirePath, DirIdentity>);

impl Directories for Entered {
    fn enter(&mut self, directory: Option<&WirePath>, handle: &DirHandle) {
        if let Some(directory) = directory {
            self.0.insert(directory.clone(), handle.identity().unwrap());
        }
    }

    fn looks_after(&self, directory: &WirePath, identity: DirIdentity) -> bool {
        self.0.get(directory) == Some(&identity)
    }
}

/// Cancels the scan as soon as a directory is entered.
struct Cancelling<'a>(&'a CancellationToken);

impl Directories for Cancelling<'_> {
    fn enter(&mut self, _: Option<&WirePath>, _: &DirHandle) {
        self.0.cancel();
    }

    fn looks_after(&self, _: &WirePath, _: DirIdentity) -> bool {
        true
    }
}

/// A tree and its index. The clock is far ahead, so that nothing is racy unless a test says so.
struct Fixture {
    folder: tempfile::TempDir,
    _state: tempfile::TempDir,
    index: Index,
    now_ns: i64,
    hot: HashMap<WirePath, HotFile>,
    directories: Entered,
}

impl Fixture {
    fn new() -> Self {
        let state = tempfile::tempdir().unwrap();
        let index = Index::open(state.path()).unwrap();
        Self {
            folder: tempfile::tempdir().unwrap(),
            _state: state,
            index,
            now_ns: i64::MAX,
            hot: HashMap::new(),
            directories: Entered::default(),
        }
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.folder.path().join(name)
    }

    fn write(&self, name: &str, content: &str) {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }

    fn scan(&mut self, scope: &Scope) -> Report {
        let root = RootDir::open(self.folder.path()).unwrap();
        let scanner = Scanner {
            root: &root,
            index: &mut self.index,
            ignore: &Ignore::default(),
            clock: Clock { now_ns: self.now_ns, tick_ns: 10_000_000 },
            hot: &self.hot,
            directories: &mut self.directories,
            cancel: &CancellationToken::new(),
        };
        scanner.scan(scope, true).unwrap()
    }

    fn scan_all(&mut self) -> Report {
        self.scan(&Scope::Tree(None))
    }

    /// Paths and kinds of everything that is known to stand here; `?` marks the unknown.
    fn seen(&self) -> Vec<String> {
        let rows = self.index.below(None, None, 1000).unwrap();
        rows.iter()
            .filter(|found| found.row.local.is_some() || found.row.unknown)
            .map(|found| {
                let kind = match &found.row.local {
                    Some(Entry::Dir) => "/",
                    Some(Entry::Link { .. }) => "@",
                    Some(Entry::File(file)) if file.executable => "*",
                    _ => "",
                };
                format!("{}{kind}{}", found.row.path, if found.row.unknown { "?" } else { "" })
            })
            .collect()
    }
}

fn children(path: &str) -> Scope {
    Scope::Children(Some(WirePath::new(path).unwrap()))
}

#[test]
fn every_kind_of_file_is_seen_and_a_second_look_finds_nothing_new() {
    let mut tree = Fixture::new();
    tree.write("a/b/file", "x");
    tree.write("a-b", "x");
    tree.write("empty", "");
    tree.write(".git/config", "left out");
    tree.write("run", "x");
    fs::set_permissions(tree.path("run"), fs::Permissions::from_mode(0o755)).unwrap();
    symlink("/", tree.path("link")).unwrap();
    fs::write(tree.folder.path().join(Path::new(std::ffi::OsStr::from_bytes(b"\xff"))), "x")
        .unwrap();
    let report = tree.scan_all();
    assert!(report.findings.is_empty(), "{:?}", report.findings);
    assert_eq!(
        tree.seen(),
        ["a/", "a/b/", "a/b/file", "a-b", "empty", "link@", "run*", "\u{fffd}"]
    );
    assert_eq!(tree.scan_all().changed, 0);
}

#[test]
fn changes_are_found_whatever_they_are_and_by_either_scope() {
    for deep in [true, false] {
        let mut tree = Fixture::new();
        tree.write("d/kept", "x");
        tree.write("d/edited", "x");
        tree.write("d/gone", "x");
        tree.write("d/dir-gone/x/y", "x");
        tree.write("d/dir-to-file/x", "x");
        tree.write("d/file-to-dir", "x");
        tree.scan_all();
        tree.write("d/edited", "longer");
        fs::remove_file(tree.path("d/gone")).unwrap();
        fs::remove_dir_all(tree.path("d/dir-gone")).unwrap();
        fs::remove_dir_all(tree.path("d/dir-to-file")).unwrap();
        tree.write("d/dir-to-file", "x");
        fs::remove_file(tree.path("d/file-to-dir")).unwrap();
        tree.write("d/file-to-dir/x/y", "x");
        tree.scan(&if deep { Scope::Tree(None) } else { children("d") });
        let expected = [
            "d/",
            "d/dir-to-file",
            "d/edited",
            "d/file-to-dir/",
            "d/file-to-dir/x/",
            "d/file-to-dir/x/y",
            "d/kept",
        ];
        assert_eq!(tree.seen(), expected, "deep: {deep}");
        let row = tree.index.get(&WirePath::new("d/edited").unwrap()).unwrap().unwrap();
        assert!(matches!(row.row.local, Some(Entry::File(file)) if file.size == 6));
        assert_eq!(tree.scan_all().changed, 0, "deep: {deep}");
    }
}

#[test]
fn a_directory_that_vanished_is_noticed_from_above() {
    let mut tree = Fixture::new();
    tree.write("d/e/f", "x");
    tree.scan_all();
    fs::remove_dir_all(tree.path("d")).unwrap();
    tree.scan(&children("d/e"));
    assert!(tree.seen().is_empty());
}

#[test]
fn t15_a_change_that_restores_size_and_time_is_found_by_its_ctime() {
    let mut tree = Fixture::new();
    tree.write("f", "old");
    tree.scan_all();
    let modified = fs::metadata(tree.path("f")).unwrap().modified().unwrap();
    tree.write("f", "new");
    fs::File::options().write(true).open(tree.path("f")).unwrap().set_modified(modified).unwrap();
    assert_eq!(tree.scan_all().changed, 1);
}

#[test]
fn a_file_changed_just_now_is_read_again_even_if_it_looks_the_same() {
    let mut tree = Fixture::new();
    tree.write("f", "x");
    let meta = DirHandle::open_ambient(tree.folder.path()).unwrap().lstat(b"f").unwrap();
    tree.now_ns = meta.ctime_ns;
    let report = tree.scan_all();
    assert_eq!(report.racy, [Scope::Children(None)]);
    assert_eq!(tree.scan_all().changed, 1, "read again");
    tree.now_ns = meta.ctime_ns + 20_000_000;
    assert_eq!(tree.scan_all().changed, 1, "read again, and now believed");
    assert_eq!(tree.scan_all().changed, 0);
}

#[test]
fn sockets_and_pipes_are_passed_over_and_do_not_block() {
    let mut tree = Fixture::new();
    tree.write("f", "x");
    tree.scan_all();
    let listener = std::os::unix::net::UnixListener::bind(tree.path("socket")).unwrap();
    fs::remove_file(tree.path("f")).unwrap();
    let at = fs::File::open(tree.folder.path()).unwrap();
    let mode = rustix::fs::Mode::from_raw_mode(0o600);
    rustix::fs::mknodat(&at, "f", rustix::fs::FileType::Fifo, mode, 0).unwrap();
    let report = tree.scan_all();
    assert_eq!(tree.seen(), ["f?"]);
    assert_eq!(report.findings.len(), 2);
    drop(listener);
}

#[test]
fn t29_unreadable_is_not_deleted() {
    let mut tree = Fixture::new();
    tree.write("d/f", "x");
    tree.write("g", "x");
    tree.scan_all();
    tree.write("g", "changed");
    fs::set_permissions(tree.path("d"), fs::Permissions::from_mode(0o000)).unwrap();
    fs::set_permissions(tree.path("g"), fs::Permissions::from_mode(0o000)).unwrap();
    // Root reads everything: a thread, and those it starts, do without that privilege.
    let report = std::thread::scope(|scope| {
        let scan = scope.spawn(|| {
            let permitted = rustix::thread::capabilities(None).unwrap().permitted;
            let none = rustix::thread::CapabilitySet::empty();
            let sets =
                rustix::thread::CapabilitySets { effective: none, permitted, inheritable: none };
            rustix::thread::set_capabilities(None, sets).unwrap();
            assert!(fs::read(tree.path("g")).is_err(), "positive control: it is unreadable");
            tree.scan_all()
        });
        scan.join().unwrap()
    });
    assert_eq!(tree.seen(), ["d/?", "d/f", "g?"]);
    assert!(report.findings.iter().all(|finding| finding.code == Code::Unreadable));
    fs::set_permissions(tree.path("d"), fs::Permissions::from_mode(0o700)).unwrap();
    fs::set_permissions(tree.path("g"), fs::Permissions::from_mode(0o600)).unwrap();
    tree.scan_all();
    assert_eq!(tree.seen(), ["d/", "d/f", "g"]);
}

#[test]
fn a_cancelled_scan_concludes_nothing_about_what_it_did_not_see() {
    let mut tree = Fixture::new();
    tree.write("f", "x");
    tree.scan_all();
    fs::remove_file(tree.path("f")).unwrap();
    let root = RootDir::open(tree.folder.path()).unwrap();
    let cancel = CancellationToken::new();
    let report = Scanner {
        root: &root,
        index: &mut tree.index,
        ignore: &Ignore::default(),
        clock: Clock { now_ns: 0, tick_ns: 0 },
        hot: &HashMap::new(),
        // Cancelled after the directory has been opened and before it is listed.
        directories: &mut Cancelling(&cancel),
        cancel: &cancel,
    }
    .scan(&Scope::Tree(None), true)
    .unwrap();
    assert!(report.cancelled);
    assert_eq!(tree.seen(), ["f"]);
}

#[test]
fn a_file_that_grows_all_the_time_is_left_alone_and_then_taken_by_its_beginning() {
    use std::io::Write as _;
    let mut tree = Fixture::new();
    let name = WirePath::new("log").unwrap();
    tree.write("log", &"a line\n".repeat(2_000_000));
    let stop = CancellationToken::new();
    let mut log = fs::File::options().append(true).open(tree.path("log")).unwrap();
    let writer = {
        let stop = stop.clone();
        std::thread::spawn(move || {
            while !stop.is_cancelled() {
                log.write_all(b"a line\n").unwrap();
            }
        })
    };
    // Who writes may not get to run while it is read.
    let end = Instant::now() + std::time::Duration::from_secs(60);
    let scan_until_it_is_seen_to_change = |tree: &mut Fixture| {
        while tree.scan_all().unstable != std::slice::from_ref(&name) {
            assert!(Instant::now() < end, "never seen to change");
        }
    };
    scan_until_it_is_seen_to_change(&mut tree);
    assert_eq!(tree.seen(), ["log?"]);
    let hour = std::time::Duration::from_secs(3600);
    let now = Instant::now();
    tree.hot.insert(name.clone(), HotFile { until: now + hour, prefix: false });
    assert!(tree.scan_all().unstable.is_empty(), "not read at all");
    assert_eq!(tree.seen(), ["log?"]);
    tree.hot.insert(name.clone(), HotFile { until: now, prefix: true });
    // Its beginning is taken; it is to be read again later.
    scan_until_it_is_seen_to_change(&mut tree);
    stop.cancel();
    writer.join().unwrap();
    let Some(Entry::File(file)) = tree.index.get(&name).unwrap().unwrap().row.local else {
        panic!("not taken")
    };
    let size = usize::try_from(file.size).unwrap();
    let content = fs::read(tree.path("log")).unwrap();
    assert!(size < content.len());
    assert_eq!(file.content, cortex_shared::entry::Digest::of(&content[..size]));
}

#[test]
fn a_known_directory_that_nobody_looks_after_is_read_whole() {
    let mut tree = Fixture::new();
    tree.write("d/old", "x");
    tree.scan_all();
    tree.write("d/unseen", "x");
    tree.scan(&Scope::Children(None));
    assert_eq!(tree.seen(), ["d/", "d/old"], "it is looked after, so it was not entered");
    // Another directory takes its name; both exist at once, so their numbers differ.
    tree.write("other/sub/new", "x");
    fs::rename(tree.path("d"), tree.path(".cortex")).unwrap();
    fs::rename(tree.path("other"), tree.path("d")).unwrap();
    tree.scan(&Scope::Children(None));
    assert_eq!(tree.seen(), ["d/", "d/sub/", "d/sub/new"]);
}

#[test]
fn a_time_in_the_future_is_not_looked_at_again_and_again() {
    let mut tree = Fixture::new();
    tree.write("f", "x");
    let now = std::time::SystemTime::now();
    let hour = std::time::Duration::from_secs(3600);
    fs::File::open(tree.path("f")).unwrap().set_modified(now + hour).unwrap();
    let meta = RootDir::open(tree.folder.path()).unwrap().top().lstat(b"f").unwrap();
    // Set by somebody: the kernel's own time tells when that was.
    tree.now_ns = meta.ctime_ns + 20_000_000;
    assert!(tree.scan_all().racy.is_empty());
    assert_eq!(tree.scan_all().changed, 0);
    // The clock was set back since the file was changed.
    tree.write("f", "y");
    tree.now_ns -= 3_600_000_000_000;
    assert_eq!(tree.scan_all().racy, [Scope::Children(None)]);
    assert!(tree.scan_all().racy.is_empty());
}

#[test]
fn a_directory_that_comes_in_many_parts_is_seen_whole_with_what_is_below_in_between() {
    let mut tree = Fixture::new();
    // More than a part before, between and behind the directories, and more than a batch in all.
    let mut all = Vec::new();
    for (letter, names) in [("a", 300), ("c", 700), ("f", 300)] {
        for number in 0..names {
            let name = format!("{letter}{number:04}");
            tree.write(&name, "x");
            all.push(name);
        }
    }
    for name in ["b/x", "b/y/z", "d/x", "e/x", "g/x"] {
        tree.write(name, "x");
    }
    let below = ["b/", "b/x", "b/y/", "b/y/z", "d/", "d/x", "e/", "e/x", "g/", "g/x"];
    all.extend(below.map(String::from));
    all.sort_by_key(|name| name.trim_end_matches('/').replace('/', "\0"));
    let seen = |tree: &Fixture| {
        let rows = tree.index.below(None, None, 10_000).unwrap();
        let dir = |row: &IndexRow| if row.row.local == Some(Entry::Dir) { "/" } else { "" };
        let there = rows.iter().filter(|row| row.row.local.is_some());
        there.map(|row| format!("{}{}", row.row.path, dir(row))).collect::<Vec<_>>()
    };
    assert_eq!(tree.scan_all().changed, all.len() as u64);
    assert_eq!(seen(&tree), all);
    assert_eq!(tree.scan_all().changed, 0, "a second look finds nothing new");
    for name in ["a0010", "c0256", "f0299", "g/x"] {
        fs::remove_file(tree.path(name)).unwrap();
    }
    assert_eq!(tree.scan_all().changed, 4);
    all.retain(|name| !["a0010", "c0256", "f0299", "g/x"].contains(&name.as_str()));
    assert_eq!(seen(&tree), all);
}

#[test]
fn a_time_that_is_still_to_come_may_hide_a_write_as_well_as_one_of_the_last_tick() {
    let tick_ns = 2_000_000_000;
    let clock = Clock { now_ns: 1_700_000_000_000_000_000, tick_ns };
    for (ahead, hides) in [
        (-tick_ns, false),
        (1 - tick_ns, true),
        (0, true),
        (tick_ns, true),
        (3600 * 1_000_000_000, true),
        // Displaced files are kept for a day.
        (25 * 3600 * 1_000_000_000, false),
        (i64::MIN, false),
        (i64::MAX, false),
    ] {
        let mtime_ns = clock.now_ns.saturating_add(ahead);
        assert_eq!(clock.may_hide_a_write(mtime_ns), hides, "{ahead}");
        assert!(!Clock { tick_ns: 0, ..clock }.may_hide_a_write(mtime_ns), "all are told apart");
    }
}

/// A hint of it may come from what had its name before.
#[test]
fn what_is_in_a_directory_is_not_known_before_the_directory_is() {
    let mut tree = Fixture::new();
    tree.write("d", "x");
    tree.write("e/f", "x");
    tree.scan_all();
    fs::remove_file(tree.path("d")).unwrap();
    tree.write("d/below/deep", "x");
    tree.scan(&children("d"));
    assert_eq!(tree.seen(), ["d/", "d/below/", "d/below/deep", "e/", "e/f"]);
    fs::remove_dir_all(tree.path("e")).unwrap();
    fs::write(tree.path("e"), "x").unwrap();
    tree.scan(&Scope::Children(None));
    fs::remove_file(tree.path("e")).unwrap();
    fs::create_dir(tree.path("e")).unwrap();
    tree.write("e/new/file", "x");
    for looked_at in [children("e/new"), children("e"), Scope::Children(None)] {
        tree.scan(&looked_at);
        fs::remove_dir_all(tree.path("e")).ok();
        fs::write(tree.path("e"), "x").unwrap();
    }
    assert_eq!(tree.seen(), ["d/", "d/below/", "d/below/deep", "e"]);
}
