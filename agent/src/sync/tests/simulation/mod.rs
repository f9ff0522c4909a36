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
//! many to pass; `scripts/simulate` sets them.

mod disk;
mod line;
mod user;
mod world;

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use disk::{Kind, SimDisk};
use tokio_util::sync::CancellationToken;

use crate::root_dir::{Disk as _, RootDir};
use crate::sync::ignore::Ignore;
use crate::sync::index::Index;
use crate::sync::scan::{Clock, Scanner, Scope};
use crate::sync::watch::Unwatched;
use world::{Outcome, World};

/// Seeds of an ordinary test run.
const SEEDS: u64 = 60;

/// In one thread, where time passes only while everybody waits.
fn run<T>(history: impl Future<Output = T>) -> T {
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    runtime.enable_time().start_paused(true).build().unwrap().block_on(history)
}

fn simulate(seed: u64) -> Outcome {
    run(async { World::new(seed).live().await })
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap())
}

#[test]
#[allow(clippy::print_stderr)] // the seed of a failure
fn meshes_in_a_storm_converge_and_lose_nothing() {
    let seeds = match (number("CORTEX_SIM_SEED"), number("CORTEX_SIM_SEEDS")) {
        (Some(seed), count) => seed..seed + count.unwrap_or(1),
        (None, count) => 0..count.unwrap_or(SEEDS),
    };
    let mut failed = Vec::new();
    for seed in seeds {
        if catch_unwind(AssertUnwindSafe(|| simulate(seed))).is_err() {
            eprintln!("CORTEX_SIM_SEED={seed} fails");
            failed.push(seed);
        }
    }
    assert!(failed.is_empty(), "seeds that fail: {failed:?}");
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
    assert_eq!(codes, ["other_file_system"]);
    assert_eq!(index.below(None, None, 10).unwrap(), []);
}

#[test]
fn of_names_that_differ_only_in_case_one_is_held_where_they_are_one_and_none_is_lost() {
    run(World::live_with_names_that_differ_only_in_case());
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

/// D1 to D8 of the crash matrix: the process of a member ends at each single change it makes to its
/// disk while it applies, is started again, and everything is as if nothing had happened.
#[test]
fn d1_to_d8_a_process_may_end_at_every_change_it_makes_while_it_applies() {
    for power_loss in [false, true] {
        for changes in 0.. {
            if !run(async { World::apply_until(changes, power_loss).await }) {
                assert!(changes > 20, "there is something to be done: {changes}");
                break;
            }
        }
    }
}

#[test]
fn a_seed_makes_one_history() {
    for seed in [1, 2, 3] {
        assert_eq!(simulate(seed), simulate(seed), "{seed}");
    }
}
