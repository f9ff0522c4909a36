//! Whole meshes in one thread: a hub, a few members with disks of their own, lines that lose things,
//! users, crashes and power failures, all from one seed. After each storm everybody is left alone
//! until nothing moves any more; then
//!
//! - all trees are equal, without anybody having been asked to look;
//! - every content that somebody wrote is in the tree, unless somebody removed it who had it before
//!   him; nothing is there that nobody wrote;
//! - nothing outside of the roots has changed;
//! - looking at everything once more sends nothing and changes nothing.
//!
//! A seed always makes the same history. `CORTEX_SIM_SEED` repeats one, `CORTEX_SIM_SEEDS` tells how
//! many to pass; `scripts/simulate` sets them. The tests that pass many histories are in [`series`].

mod disk;
mod hints;
mod line;
mod member;
mod series;
mod user;
mod world;

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use cortex_shared::chunk::Recipe;
use cortex_shared::entry::{Digest, Entry, File};
use cortex_shared::ids::WorkspaceId;
use cortex_shared::wire_path::WirePath;
use disk::{Kind, SimDisk};
use tokio_util::sync::CancellationToken;

use crate::root_dir::{Disk as _, RootDir};
use crate::sync::apply::{Applier, Report, Staged, rescue_late_writes};
use crate::sync::ground::{Batches, Blocking, Ground};
use crate::sync::ignore::Ignore;
use crate::sync::index::{Index, Seen, Stamp};
use crate::sync::plan::LocalChange;
use crate::sync::private_dir::PrivateDir;
use crate::sync::problem::Code;
use crate::sync::scan::{Clock, Scanner, Scope};
use crate::sync::watch::{Kernels, Unwatched};
use world::{Outcome, World};

/// In one thread, where time passes only while everybody waits.
fn run<T>(history: impl Future<Output = T>) -> T {
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    runtime.enable_time().start_paused(true).build().unwrap().block_on(history)
}

fn simulate(seed: u64) -> Outcome {
    run(async { World::new(seed).live().await })
}

#[test]
fn what_is_mounted_below_a_root_is_not_looked_at() {
    let folder = tempfile::tempdir().unwrap();
    let kind = Kind { grain_ns: 1, reuses_numbers: false, folds_case: false };
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let _entered = runtime.enter();
    let disk = SimDisk::new(kind, 0);
    let root = Path::new("/root");
    disk.make_all(&root.join("d/below"), 0o755).unwrap();
    disk.mount(&root.join("d"));
    let mut index = Index::open(folder.path()).unwrap();
    let scanner = Scanner {
        root: &RootDir::new(disk.open(root).unwrap()),
        index: &mut index,
        ignore: &Ignore::default(),
        clock: Clock { now_ns: i64::MAX, tick_ns: 1 },
        hot: &HashMap::new(),
        directories: &mut Unwatched,
        cancel: &CancellationToken::new(),
    };
    let report = scanner.scan(&Scope::Tree(None), false).unwrap();
    let codes: Vec<_> = report.findings.iter().map(|finding| finding.code).collect();
    assert_eq!(codes, [Code::OtherFileSystem]);
    assert_eq!(index.below(None, None, 10).unwrap(), []);
}

/// What changes are applied to, without an engine.
struct Setup {
    root: RootDir,
    private: PrivateDir,
    index: Index,
    _folder: tempfile::TempDir,
}

impl Setup {
    fn new(kind: Kind) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let disk = SimDisk::new(kind, 0);
        let (root, state) = (Path::new("/home/root"), Path::new("/home/state"));
        disk.make_all(root, 0o755).unwrap();
        disk.make_all(state, 0o755).unwrap();
        let ground = Ground {
            kernels: Kernels::real(),
            disk: Arc::new(disk.clone()),
            blocking: Blocking::Inline,
            batches: Batches::REAL,
            wall_ms: Arc::new(|| 1),
            boot_id: Arc::new(|| "the only one".to_owned()),
            chance: Arc::new(|| 0.5),
        };
        let top = disk.open(root).unwrap();
        let private = PrivateDir::open(&ground, WorkspaceId::new(), state, root, &top).unwrap();
        let index = Index::open(folder.path()).unwrap();
        Self { root: RootDir::new(top), private, index, _folder: folder }
    }

    /// Makes a change that needs no staged file.
    fn apply(&mut self, change: LocalChange) -> Report {
        let Self { root, private, index, .. } = self;
        let applier = Applier { root, private, index, owner: None };
        applier.apply(vec![Staged::new(change, None)]).unwrap()
    }

    fn look_into_trash(&mut self) {
        rescue_late_writes(&self.root, &self.private, &mut self.index).unwrap();
    }
}

#[test]
fn a_late_write_that_leaves_length_and_time_as_they_were_is_found() {
    run(async {
        // Within one step of its clock nothing tells one write from another.
        let kind = Kind { grain_ns: 2_000_000_000, reuses_numbers: false, folds_case: false };
        let mut setup = Setup::new(kind);
        let top = setup.root.top().clone();
        let path = WirePath::new("f").unwrap();
        for written in [true, false] {
            let open = top.create_new(b"f", 0o644).unwrap();
            open.write_all_at(b"one", 0).unwrap();
            let meta = open.meta().unwrap();
            let entry = Entry::File(File {
                content: Digest::of(b"one"),
                size: 3,
                executable: false,
                mtime_ns: meta.mtime_ns,
                recipe: Recipe::default(),
            });
            let seen = Seen::Entry(entry.clone(), Some(Stamp::new(&meta, true)));
            setup.index.batch(|writer| writer.set_local(&path, seen)).unwrap();
            let change =
                LocalChange { path: path.clone(), from: Some(entry), to: None, aside: None };
            let report = setup.apply(change);
            assert_eq!((report.applied, report.displaced), (1, 1), "{report:?}");
            if written {
                open.write_all_at(b"two", 0).unwrap();
                assert_eq!(open.meta().unwrap().mtime_ns, meta.mtime_ns, "nothing tells it");
            }
            setup.look_into_trash();
            assert_eq!(top.try_lstat(b"f").unwrap().is_some(), written);
            if written {
                assert_eq!(user::read(&top.open_file(b"f").unwrap()), "two");
                top.remove_file(b"f").unwrap();
                continue;
            }
            // Read once more when it is old enough, and not again after that.
            assert!(setup.index.displaced(None, 10).unwrap()[0].content.is_some());
            tokio::time::sleep(Duration::from_secs(10)).await;
            setup.look_into_trash();
            assert_eq!(setup.index.displaced(None, 10).unwrap()[0].content, None);
            open.write_all_at(b"two", 0).unwrap();
            setup.look_into_trash();
            assert_eq!(user::read(&top.open_file(b"f").unwrap()), "two");
        }
    });
}

#[test]
fn of_names_that_differ_only_in_case_one_is_held_where_they_are_one_and_none_is_lost() {
    run(World::live_with_names_that_differ_only_in_case());
}

#[test]
fn a_disk_that_does_not_tell_case_is_found_out_while_somebody_works_there() {
    run(async {
        for (folds_case, call, removes) in [false, true].into_iter().flat_map(|folds_case| {
            let calls = (0..12).flat_map(|call| [(call, false), (call, true)]);
            calls.map(move |(call, removes)| (folds_case, call, removes))
        }) {
            let kind = Kind { grain_ns: 1, reuses_numbers: true, folds_case };
            let disk = SimDisk::new(kind, 0);
            let root = Path::new("/root");
            disk.make_all(root, 0o755).unwrap();
            let files = disk.open(root).unwrap();
            files.create_new(b"name", 0o644).unwrap();
            let top = disk.engine().open(root).unwrap();
            let mut left = call;
            let intruder = move |_: &SimDisk, _: &mut rand::rngs::StdRng| {
                if left == 0 {
                    files.remove_file(b"name").unwrap();
                    if !removes {
                        files.create_new(b"name", 0o644).unwrap();
                    }
                }
                left -= 1;
            };
            disk.set_intruder(1, Box::new(intruder));
            let found = crate::root_dir::folds_case(&top).unwrap();
            assert_eq!(found, folds_case, "call {call}, removed for good: {removes}");
        }
    });
}

/// A single directory may be so, in one that tells case. It does not come to rest by looking again.
#[test]
fn what_collides_where_nobody_knew_that_case_is_not_told_is_said_and_not_looked_at_again() {
    run(async {
        for (folds_case, codes, looks) in [(true, vec![Code::CaseConflict], 0), (false, vec![], 0)]
        {
            let kind = Kind { grain_ns: 1, reuses_numbers: false, folds_case };
            let mut setup = Setup::new(kind);
            setup.root.top().create_new(b"name", 0o644).unwrap();
            let path = WirePath::new("Name").unwrap();
            let change = LocalChange { path, from: None, to: Some(Entry::Dir), aside: None };
            let report = setup.apply(change);
            let found: Vec<_> = report.findings.iter().map(|finding| finding.code).collect();
            assert_eq!((found, report.dirty.len()), (codes, looks), "{folds_case}");
        }
    });
}

#[test]
fn a_disk_that_does_not_tell_case_is_found_out_and_seen_exactly() {
    run(async {
        for folds_case in [true, false] {
            let kind = Kind { grain_ns: 1, reuses_numbers: false, folds_case };
            let disk = SimDisk::new(kind, 0);
            let root = Path::new("/root");
            disk.make_all(root, 0o755).unwrap();
            let top = disk.open(root).unwrap();
            assert_eq!(folds_case, crate::root_dir::folds_case(&top).unwrap(), "empty");
            assert!(top.names().unwrap().is_empty());
            top.make_dir(b"123", 0o755).unwrap();
            assert_eq!(folds_case, crate::root_dir::folds_case(&top).unwrap(), "no letters");
            top.make_dir(b"Dir", 0o755).unwrap();
            assert_eq!(folds_case, crate::root_dir::folds_case(&top).unwrap());
        }
        // What is made within one step of a coarse clock is there at once.
        let kind = Kind { grain_ns: 2_000_000_000, reuses_numbers: false, folds_case: true };
        let disk = SimDisk::new(kind, 0);
        disk.make_all(Path::new("/root/seen"), 0o755).unwrap();
        let exact = crate::root_dir::exact(disk.open(Path::new("/root")).unwrap());
        assert!(exact.try_lstat(b"seen").unwrap().is_some());
        exact.make_dir(b"made", 0o755).unwrap();
        assert!(exact.try_lstat(b"made").unwrap().is_some());
        assert!(
            exact.try_lstat(b"Made").unwrap().is_none() && exact.other_spelling(b"Made").unwrap()
        );
        // One that ended while it tried leaves nothing in the tree for good, and what is in use stays.
        let kind = Kind { grain_ns: 1, reuses_numbers: false, folds_case: false };
        let disk = SimDisk::new(kind, 0);
        disk.make_all(Path::new("/root/.cortex"), 0o700).unwrap();
        let top = disk.open(Path::new("/root")).unwrap();
        assert!(!crate::root_dir::folds_case(&top).unwrap());
        assert!(top.names().unwrap().is_empty(), "its own directory is left behind");
        disk.make_all(Path::new("/root/.cortex/stage"), 0o700).unwrap();
        assert!(!crate::root_dir::folds_case(&top).unwrap());
        assert_eq!(top.names().unwrap(), [b".cortex"]);
        let kind = Kind { grain_ns: 1, reuses_numbers: false, folds_case: true };
        let disk = SimDisk::new(kind, 0);
        disk.make_all(Path::new("/root/Dir/below"), 0o755).unwrap();
        let top = disk.open(Path::new("/root")).unwrap();
        let root = RootDir::new(crate::root_dir::exact(top.clone()));
        let path = |text: &str| cortex_shared::wire_path::WirePath::new(text).unwrap();
        assert!(top.open_dir(b"dir").is_ok());
        for (text, found) in
            [("Dir", true), ("dir", false), ("Dir/below", true), ("Dir/Below", false)]
        {
            assert_eq!(root.open_dir(Some(&path(text))).is_ok(), found, "{text}");
        }
        let exact = root.top();
        assert!(exact.other_spelling(b"DIR").unwrap() && !exact.other_spelling(b"Dir").unwrap());
        assert!(!exact.other_spelling(b"nothing").unwrap());
        let made = exact.make_dir(b"DIR", 0o755).unwrap_err();
        assert_eq!(made.kind(), std::io::ErrorKind::AlreadyExists);
        assert!(exact.try_lstat(b"DIR").unwrap().is_none());
        assert!(exact.rename_new(b"dir", exact, b"other").is_err());
        exact.rename_new(b"Dir", exact, b"other").unwrap();
        exact.make_dir(b"DIR", 0o755).unwrap();
        assert!(
            exact.try_lstat(b"DIR").unwrap().is_some()
                && exact.try_lstat(b"Dir").unwrap().is_none()
        );
    });
}

#[test]
fn a_late_write_is_found_soon_after_a_start_as_well() {
    for (after_ms, most_ms) in [(300, 1000), (5000, 26_000)] {
        let taken = run(World::find_a_late_write_after_a_start(Duration::from_millis(after_ms)));
        assert!(taken <= Duration::from_millis(most_ms), "after {after_ms} ms: {taken:?}");
    }
}

#[test]
fn who_looks_all_the_time_does_not_ask_the_hub_all_the_time() {
    let times = run(World::ask_while_nothing_happens());
    assert!((6..=12).contains(&times), "{times} times in an hour");
}

/// A group of changes is made durable at once: its files by one call for all, or one each if they are few,
/// and each directory by one.
#[test]
fn t19_small_files_are_made_durable_together() {
    for (files, directories, groups) in [(4200, 20, 3), (2000, 1, 1), (40, 40, 1), (30, 3, 1)] {
        let syncs = run(World::sync_small_files(files, directories));
        let of_files = if files / groups > 32 { 1 } else { files };
        // Of many directories the whole file system takes the place, as well; the root has new ones.
        let of_directories = if directories + 1 > 32 { 1 } else { directories + 1 };
        let most = (groups * (of_files + of_directories)) as u64;
        assert!((1..=most).contains(&syncs), "{files} files: {syncs} calls, {most} at most");
    }
}

#[test]
fn a_seed_makes_one_history() {
    for seed in [1, 2, 3] {
        assert_eq!(simulate(seed), simulate(seed), "{seed}");
    }
}
