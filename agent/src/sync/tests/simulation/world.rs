//! One history: what happens, and what has to be true in the end.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use cortex_shared::ids::WorkspaceId;
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use tokio::sync::watch;
use tokio::time::sleep;

use super::super::memory_hub::MemoryHub;
use super::disk::{Kind, SimDisk};
use super::hints::Way;
use super::line::Line;
use super::member::Member;
use super::user::{Ledger, User, bytes_of, tree};
use crate::root_dir::Disk as _;
use crate::sync::WorkspaceConfig;
use crate::sync::ground::Batches;
use crate::sync::problem::Code;
use crate::sync::roots::Roots;
use crate::sync::status::SyncState;

/// What a user does between calls of the engine before he is tired. He makes it look, so that he gets to do
/// something more; without an end they would keep each other busy for as long as time passes.
const INTRUSIONS: u32 = 200;
/// Storms of one history.
const STORMS: usize = 3;
/// The longest it may take until nothing moves any more, in virtual time.
const ROUNDS: usize = 60;
const ROUND: Duration = Duration::from_secs(31);
/// After so many of them everything has been looked at, whatever hints were lost.
const LOOKED_ROUNDS: usize = 22;
/// One in so many calms is waited for that long; in the others everybody is asked to look.
const PATIENT_EVERY: u64 = 7;
/// The same for ends of processes and failures of disks at one point after the other.
const APPLIED_PATIENTLY: u64 = 23;
/// The longest it may take until something is found.
const LIMIT: Duration = Duration::from_secs(3600);

/// What is the same whenever a seed is repeated.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Outcome {
    tree: Vec<(String, String)>,
    traffic: [usize; 3],
    changes: Vec<u64>,
    deeds: Vec<String>,
}

pub(super) struct World {
    random: StdRng,
    hub: MemoryHub,
    ledger: Arc<Mutex<Ledger>>,
    members: Vec<Member>,
    backup: Option<Box<dyn FnOnce()>>,
    /// Counts calms; which of them are waited for in patience follows from the seed as well.
    calms: u64,
    _folder: tempfile::TempDir,
}

/// Whether a tree on a disk that does not tell case is all of another one that it can be: what is missing
/// stands in the way of nothing, or something else does in its own.
fn is_folded(tree: &[(String, String)], whole: &[(String, String)]) -> bool {
    let here: BTreeSet<String> = tree.iter().map(|(path, _)| path.to_lowercase()).collect();
    tree.iter().all(|entry| whole.contains(entry))
        && whole.iter().all(|entry| {
            // Something of it, or above it, is there under another spelling.
            let parts = |path: &str| path.matches('/').count();
            let above = (0..=parts(&entry.0))
                .map(|depth| entry.0.split('/').take(depth + 1).collect::<Vec<_>>().join("/"));
            tree.contains(entry)
                || above.into_iter().any(|path| {
                    here.contains(&path.to_lowercase())
                        && !tree.iter().any(|(there, _)| *there == path)
                })
        })
}

impl World {
    pub(super) fn new(seed: u64) -> Self {
        let mut random = StdRng::seed_from_u64(seed);
        // Only the indexes are real files: in memory, if there is such a place.
        let folder = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
        let hub = MemoryHub::new();
        // Drawn from the seed itself, too.
        let ledger = Ledger { large: seed % 8 == 3, ..Ledger::default() };
        let ledger = Arc::new(Mutex::new(ledger));
        let workspace = WorkspaceId::new();
        // Of their own: the histories of those who have none stay what they were.
        let mut ways = StdRng::seed_from_u64(!seed);
        let members = (0..random.random_range(3..=5))
            .map(|number| {
                let kind = Kind {
                    grain_ns: [1, 1, 4_000_000, 2_000_000_000][random.random_range(0..4)],
                    reuses_numbers: random.random_bool(0.5),
                    // Drawn from the seed itself: the histories of all others stay what they were.
                    folds_case: number == 0 && seed % 8 == 5,
                };
                let disk = SimDisk::new(kind, random.random());
                let name = format!("n{number}");
                let home = folder.path().join(&name);
                let (root, aside) = (home.join("root"), home.join("aside"));
                disk.make_all(&root, 0o755).unwrap();
                disk.make_all(&aside, 0o755).unwrap();
                let beside = disk.open(&home).unwrap();
                let file = beside.create_new(b"beside", 0o600).unwrap();
                file.write_all_at(b"nobody touches this", 0).unwrap();
                disk.write_back();
                let state_dir = home.join("state");
                let config = WorkspaceConfig {
                    id: workspace,
                    name: "w".to_owned(),
                    root,
                    state_dir,
                    roots: Roots::default(),
                    library: None,
                };
                let user = User {
                    name,
                    root: config.root.clone(),
                    aside,
                    ledger: ledger.clone(),
                    open: Arc::default(),
                };
                let mut member = Member {
                    config,
                    disk,
                    line: Line::new(hub.clone(), random.random()),
                    user,
                    online: watch::Sender::new(true),
                    handle: None,
                    begun: tokio::time::Instant::now(),
                    way: Way::draw(&mut ways),
                    batches: match ways.random_range(0..4) {
                        // So that what is on its way beside a commit or a group happens at all.
                        0 => Batches {
                            commit_ops: 1,
                            group_changes: 2,
                            patience: Duration::from_millis(ways.random_range(0..500)),
                        },
                        1 => Batches { commit_ops: 3, group_changes: 1, ..Batches::REAL },
                        _ => Batches::REAL,
                    },
                    seed: ways.random_range(0..u64::MAX / 2),
                    old_index: None,
                };
                member.start();
                member
            })
            .collect();
        let world =
            Self { random, hub, ledger, members, backup: None, calms: seed, _folder: folder };
        for Member { user, disk, way, batches, .. } in &world.members {
            world.note(format!("{}: {:?}, {way:?}, {batches:?}", user.name, disk.kind()));
        }
        world
    }

    /// One member makes all kinds of changes, and the process of another ends after so many changes
    /// of its disk while it applies them. Whether it came to that.
    pub(super) async fn apply_until(changes: u64, power_loss: bool, exchanges: bool) -> bool {
        let mut world = Self::about_to_apply(changes).await;
        if !exchanges {
            world.members[1].disk.forbid_exchanges();
        }
        world.members[1].disk.set_fuse(changes);
        world.members[1].handle().head_moved(*world.hub.subscribe().borrow());
        sleep(ROUND).await;
        let ended = world.members[1].disk.is_dead();
        if ended {
            world.crash(1, power_loss).await;
        }
        world.end().await;
        ended
    }

    /// As [`Self::apply_until`], but one call to the disk fails, while its user works in the same files.
    /// Whether it came to that.
    pub(super) async fn apply_on_a_disk_that_fails_at(call: u64) -> bool {
        let mut world = Self::about_to_apply(call).await;
        let Member { user, disk, .. } = &world.members[1];
        let (user, mut random) = (user.clone(), StdRng::seed_from_u64(call));
        disk.set_failure(call);
        let paths: [&[&str]; 4] = [&["replaced"], &["deleted"], &["f"], &["d", "below"]];
        let intruder = move |disk: &SimDisk, _: &mut StdRng| {
            let path = paths[random.random_range(0..paths.len())];
            user.save(disk, path).ok();
        };
        disk.set_intruder(12, Box::new(intruder));
        world.members[1].handle().head_moved(*world.hub.subscribe().borrow());
        sleep(Duration::from_secs(1)).await;
        let failed = world.members[1].disk.has_failed();
        world.end().await;
        failed
    }

    /// A program goes on writing to a file that was displaced before a member has stopped, so long after
    /// that has started again: how long it takes until that is in the tree.
    pub(super) async fn find_a_late_write_after_a_start(after: Duration) -> Duration {
        let mut world = Self::new(7);
        let save = |world: &Self| {
            let member = &world.members[0];
            member.user.save(&member.disk, &["f"]).unwrap();
        };
        save(&world);
        world.calm().await;
        let Member { user, disk, .. } = &world.members[1];
        user.open(disk, &["f"]).unwrap();
        save(&world);
        world.calm().await;
        let member = &mut world.members[1];
        member.stop().await;
        // What is told of is only what happens in the tree, and nothing else makes it look there.
        member.way =
            Way { none: false, stalls: 0, twice: 0, lost: 0, room: 1000, directories: 1000 };
        member.start();
        sleep(after).await;
        member.user.write_open(true).unwrap();
        let (begun, before) = (tokio::time::Instant::now(), member.tree());
        while member.tree() == before {
            assert!(begun.elapsed() < LIMIT, "it is never found");
            sleep(Duration::from_millis(100)).await;
        }
        let taken = begun.elapsed();
        world.end().await;
        taken
    }

    /// How often the hub is asked for news within an hour in which nothing happens, while members without a
    /// watcher look at everything all the time.
    pub(super) async fn ask_while_nothing_happens() -> usize {
        let mut world = Self::new(7);
        for member in &mut world.members {
            member.stop().await;
            member.way.none = true;
            member.start();
        }
        world.rest(0).await;
        let asked = || world.hub.0.heads.load(Ordering::SeqCst);
        let before = asked();
        sleep(Duration::from_secs(3600)).await;
        let times = asked() - before;
        world.end().await;
        times.div_ceil(world.members.len())
    }

    /// Everybody is left alone and looked at, and stops.
    async fn end(&mut self) {
        self.calm().await;
        self.check().await;
        for member in &mut self.members {
            member.stop().await;
        }
    }

    /// One member has made all kinds of changes, of which the others do not know yet. How patient the end is
    /// follows from the number.
    async fn about_to_apply(number: u64) -> Self {
        let mut world = Self::new(7);
        world.calms = if number.is_multiple_of(APPLIED_PATIENTLY) { PATIENT_EVERY - 1 } else { 0 };
        world.rest(0).await;
        let save = |world: &Self, path: &[&str]| {
            let member = &world.members[0];
            member.user.save(&member.disk, path).unwrap();
        };
        for path in [["replaced"].as_slice(), &["deleted"], &["d", "below"], &["f"], &["kept"]] {
            save(&world, path);
        }
        world.rest(0).await;
        save(&world, &["replaced"]);
        save(&world, &["new"]);
        save(&world, &["e", "deep", "new"]);
        let Member { user, disk, .. } = &world.members[0];
        user.remove(disk, &["deleted"]).unwrap();
        user.remove(disk, &["d"]).unwrap();
        user.remove(disk, &["f"]).unwrap();
        user.make_directory(disk, &["f"]).unwrap();
        user.link(disk, &["link"]).unwrap();
        user.toggle_executable(disk, &["kept"]).unwrap();
        world.members[0].flush().await.unwrap();
        world
    }

    /// Only one member's user works, while messages get lost and processes end: what he made is never touched,
    /// and nothing of it is a conflict. What the hub took without being able to say so came from him.
    pub(super) async fn work_alone(seed: u64) {
        const ALONE: usize = 1;
        let mut world = Self::new(seed);
        for _ in 0..world.random.random_range(20..60) {
            let (choice, chance) =
                (world.random.random_range(0..100), world.random.random_bool(0.5));
            let member = &mut world.members[ALONE];
            match choice {
                0..60 => member.user.act(&member.disk, &mut world.random),
                60..75 => member.line.set_loss(if chance { choice - 57 } else { 0 }),
                75..80 => {
                    member.line.set_up(chance);
                    member.online.send_replace(chance);
                }
                80..90 => {
                    world.note("it is killed".to_owned());
                    world.crash(ALONE, false).await;
                }
                _ => sleep(Duration::from_secs(10)).await,
            }
            let made = world.members[ALONE].tree();
            let pause = [20, 100, 1000][world.random.random_range(0..3)];
            sleep(Duration::from_millis(world.random.random_range(0..=pause))).await;
            world.tend().await;
            let (found, deeds) = (world.members[ALONE].tree(), &world.ledger().deeds);
            assert_eq!(made, found, "nobody else has done anything\n{deeds:#?}");
        }
        let made = world.members[ALONE].tree();
        world.end().await;
        assert_eq!(made, world.members[ALONE].tree(), "{:#?}", world.ledger().deeds);
    }

    /// Many small files, and then a few: how often a member waits for its disk while it makes them.
    pub(super) async fn sync_small_files(files: usize, directories: usize) -> u64 {
        let mut world = Self::new(7);
        world.rest(0).await;
        let Member { user, disk, .. } = &world.members[0];
        let names: Vec<_> =
            (0..files).map(|n| [format!("d{}", n % directories), format!("f{n}")]).collect();
        for [directory, name] in &names {
            user.save(disk, &[directory, name]).unwrap();
        }
        world.members[0].flush().await.unwrap();
        let before = world.members[1].disk.syncs();
        world.members[1].flush().await.unwrap();
        assert_eq!(world.members[1].tree(), world.members[0].tree());
        let syncs = world.members[1].disk.syncs() - before;
        for member in &mut world.members {
            member.stop().await;
        }
        syncs
    }

    /// A member whose disk does not tell case among others that do.
    pub(super) async fn live_with_names_that_differ_only_in_case() {
        let mut world = Self::new(5);
        assert!(world.members[0].disk.folds_case() && !world.members[1].disk.folds_case());
        world.calm().await;
        let user = |world: &Self, number: usize| {
            let member = &world.members[number];
            (member.user.clone(), member.disk.clone())
        };
        let (elsewhere, disk) = user(&world, 1);
        for path in [["a"].as_slice(), &["A"], &["D", "x"], &["d", "y"], &["D", "e", "z"], &["b"]] {
            elsewhere.save(&disk, path).unwrap();
        }
        world.calm().await;
        world.check().await;
        let here = |world: &Self| -> BTreeSet<String> {
            world.members[0].tree().into_iter().map(|(path, _)| path).collect()
        };
        let problems = |world: &Self| {
            let problems = world.members[0].handle().status().borrow().problems.clone();
            let codes: Vec<_> = problems.iter().map(|problem| problem.code).collect();
            codes.into_iter().filter(|code| *code == Code::CaseConflict).count()
        };
        assert_eq!(problems(&world), 2, "each is told once, not what is below it");
        let explained = |world: &Self, path: &str| {
            let path = cortex_shared::wire_path::WirePath::new(path).unwrap();
            world.members[0].handle().explain(&path).unwrap().code
        };
        let one_of = |names: [&str; 2], there: &BTreeSet<String>| {
            let found: Vec<_> = names.into_iter().filter(|name| there.contains(*name)).collect();
            assert_eq!(found.len(), 1, "{names:?} in {there:?}");
            (
                found[0].to_owned(),
                names.into_iter().find(|name| *name != found[0]).unwrap().to_owned(),
            )
        };
        let (file, other_file) = one_of(["a", "A"], &here(&world));
        let (folder, other_folder) = one_of(["d", "D"], &here(&world));
        for (path, code) in [
            (file.as_str(), "synced"),
            (&other_file, "case_conflict"),
            (&folder, "synced"),
            (&other_folder, "case_conflict"),
            (if other_folder == "D" { "D/e/z" } else { "d/y" }, "case_conflict"),
        ] {
            assert_eq!(explained(&world, path), code, "{path}");
        }
        // Work goes on in what is there, under the name it has there.
        let (own, own_disk) = user(&world, 0);
        own.save(&own_disk, &[file.as_str()]).unwrap();
        own.save(&own_disk, &[folder.as_str(), "new"]).unwrap();
        elsewhere.save(&disk, &[other_folder.as_str(), "late"]).unwrap();
        world.calm().await;
        world.check().await;
        assert_eq!(problems(&world), 2);
        // The way is free once the first ones are gone; a name that only changes its case follows.
        elsewhere.remove(&disk, &[file.as_str()]).unwrap();
        elsewhere.remove(&disk, &[folder.as_str()]).unwrap();
        elsewhere.rename(&disk, &["b"], &["B"]).unwrap();
        world.calm().await;
        world.check().await;
        assert_eq!(problems(&world), 0);
        assert_eq!(world.members[0].tree(), world.members[1].tree());
        let there = here(&world);
        assert!(there.contains(&other_file) && there.contains(&format!("{other_folder}/late")));
        assert!(there.contains("B"));
        // So does one that its own user changes.
        own.rename(&own_disk, &["B"], &["other"]).unwrap();
        own.rename(&own_disk, &["other"], &["b"]).unwrap();
        world.calm().await;
        world.check().await;
        assert!(world.members[1].tree().iter().any(|(path, _)| path == "b"));
        for member in &mut world.members {
            member.stop().await;
        }
    }

    /// Storms and calms.
    pub(super) async fn live(&mut self) -> Outcome {
        for _ in 0..STORMS {
            for _ in 0..self.random.random_range(5..40) {
                self.step().await;
            }
            self.calm().await;
            self.check().await;
            self.members.iter().for_each(|member| member.disk.stir());
        }
        let outcome = Outcome {
            tree: self.members[0].tree(),
            traffic: self.hub.traffic(),
            changes: self.members.iter().map(|member| member.disk.changes()).collect(),
            deeds: std::mem::take(&mut self.ledger().deeds),
        };
        for member in &mut self.members {
            member.stop().await;
        }
        outcome
    }

    fn ledger(&self) -> std::sync::MutexGuard<'_, Ledger> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note(&self, deed: String) {
        self.ledger().deeds.push(deed);
    }

    async fn step(&mut self) {
        let number = self.random.random_range(0..self.members.len());
        let choice = self.random.random_range(0..100);
        let (chance, amount) = (self.random.random_bool(0.5), self.random.random_range(0..40_u32));
        let member = &mut self.members[number];
        let name = member.user.name.clone();
        match choice {
            0..50 => member.user.act(&member.disk, &mut self.random),
            50..56 => {
                self.note(format!("{name}: line {chance}"));
                self.members[number].line.set_up(chance);
                self.members[number].online.send_replace(chance);
            }
            56..60 => self.members[number].line.set_loss(if chance { amount } else { 0 }),
            60..66 => {
                // An offline member answers at once that it is.
                member.flush().await.ok();
            }
            66..72 => {
                self.note(format!("{name}: ends after {amount} changes"));
                self.members[number].disk.set_fuse(u64::from(amount));
            }
            72..76 => {
                self.note(format!("{name}: is killed, power loss {chance}"));
                self.crash(number, chance).await;
            }
            76..79 => {
                member.stop().await;
                member.start();
            }
            79..81 => member.disk.write_back(),
            91..93 if chance => {
                self.note(format!("{name}: disk fails once in {}", 20 + amount * 10));
                self.members[number].disk.set_error_rate(20 + amount * 10);
            }
            91..93 => {
                member.remember_index();
                self.note(format!("{name}: the index is remembered"));
            }
            93..94 => self.backup = Some(Box::new(self.hub.backup())),
            94..96 => {
                if let Some(restore) = self.backup.take() {
                    self.note("the hub is put back from a backup".to_owned());
                    restore();
                    self.forget_what_only_the_hub_had();
                }
            }
            81..91 | 96..98 => {
                let user = member.user.clone();
                let mut left = INTRUSIONS;
                let intruder = move |disk: &SimDisk, random: &mut StdRng| {
                    if left > 0 {
                        left -= 1;
                        user.intrude(disk, random);
                    }
                };
                member.disk.set_intruder(3 + 2 * amount, Box::new(intruder));
            }
            _ => sleep(Duration::from_secs(10) * amount).await,
        }
        let pause = [0, 20, 100, 1000, 10_000][self.random.random_range(0..5)];
        sleep(Duration::from_millis(self.random.random_range(0..=pause))).await;
        self.tend().await;
    }

    /// Starts those again whose process has ended, and tells all what the hub tells.
    async fn tend(&mut self) {
        for number in 0..self.members.len() {
            self.members[number].disk.write_back_in_time();
            if self.members[number].disk.is_dead() {
                let power = self.random.random_bool(0.5);
                self.note(format!("{}: ended, power loss {power}", self.members[number].user.name));
                self.crash(number, power).await;
            }
        }
        let seq = *self.hub.subscribe().borrow();
        for member in &self.members {
            if *member.online.borrow() {
                member.handle().head_moved(seq);
            }
        }
    }

    async fn crash(&mut self, number: usize, power: bool) {
        let old_index = power && self.random.random_bool(0.5);
        let member = &mut self.members[number];
        member.disk.kill();
        member.stop().await;
        if old_index && member.old_index.is_some() {
            let name = member.user.name.clone();
            self.note(format!("{name}: finds the index remembered"));
        }
        let member = &mut self.members[number];
        if power {
            member.disk.lose_power();
            member.user.lose_power(&member.disk, |content| self.hub.ever_had(content));
            // No program that had a file open outlives that.
            *member.user.open.lock().unwrap_or_else(PoisonError::into_inner) = None;
            // No machine starts within one step of its disk's clock: nothing that is saved after it has the
            // stamps of what was saved before.
            sleep(member.disk.tick()).await;
        }
        let member = &mut self.members[number];
        if old_index {
            member.bring_back_index();
        }
        member.start();
    }

    /// After a backup of the hub was put back: what a loss of power had taken before, and nobody but the hub had,
    /// is nowhere.
    fn forget_what_only_the_hub_had(&self) {
        let disks = self.members.iter().flat_map(|member| tree(&member.disk, Path::new("/")));
        let there: BTreeSet<String> =
            disks.map(|(_, shown)| shown.trim_end_matches('*').to_owned()).collect();
        let mut ledger = self.ledger();
        let Ledger { at_hub, removed, .. } = &mut *ledger;
        let is_gone =
            |content: &String| !there.contains(content) && !self.hub.ever_had(&bytes_of(content));
        removed.extend(at_hub.extract_if(.., is_gone));
    }

    /// Everything works, and nobody does anything, until nothing moves any more, and everybody has looked at
    /// everything since: what nobody was told of is only found so, and so are late writes.
    async fn calm(&mut self) {
        self.rest(0).await;
        self.calms += 1;
        if self.members.iter().all(|member| member.way.none) {
            // They have done nothing else.
            return;
        }
        if self.calms.is_multiple_of(PATIENT_EVERY) {
            return self.rest(LOOKED_ROUNDS).await;
        }
        for member in &self.members {
            member.flush().await.unwrap();
        }
        self.rest(0).await;
    }

    /// Everything works, and nobody does anything, for a while at least, and until all are equal and none of
    /// them knows of anything to be done.
    async fn rest(&mut self, least_rounds: usize) {
        self.note("rest".to_owned());
        for member in &self.members {
            member.line.set_up(true);
            member.line.set_loss(0);
            member.online.send_replace(true);
            member.disk.calm();
        }
        for round in 0.. {
            sleep(ROUND).await;
            self.tend().await;
            let mut held = 0;
            for member in &self.members {
                held += member.handle().confirm_deletions().unwrap();
            }
            let trees: Vec<_> = self.members.iter().map(Member::tree).collect();
            let idle = |member: &Member| {
                let status = member.handle().status().borrow().clone();
                status.state == SyncState::Idle && status.applied_seq == status.head_seq
            };
            let still = held == 0 && self.are_equal(&trees) && self.members.iter().all(idle);
            if still && round >= least_rounds {
                return;
            }
            if round >= ROUNDS {
                let states: Vec<_> =
                    self.members.iter().map(|m| m.handle().status().borrow().clone()).collect();
                panic!("no end:\n{trees:#?}\n{states:#?}\n{:#?}", self.ledger().deeds);
            }
        }
    }

    /// Whether all members have the same, but for what differs only in case where that is one.
    fn are_equal(&self, trees: &[Vec<(String, String)>]) -> bool {
        let Some(whole) = trees.last() else { return true };
        self.members.iter().zip(trees).all(|(member, tree)| match member.disk.folds_case() {
            false => tree == whole,
            true => is_folded(tree, whole),
        })
    }

    /// What has to be true when nothing moves.
    async fn check(&mut self) {
        let before: Vec<_> = self.members.iter().map(Member::tree).collect();
        let traffic = self.hub.traffic();
        for member in &self.members {
            member.flush().await.unwrap();
        }
        let after: Vec<_> = self.members.iter().map(Member::tree).collect();
        let ledger = self.ledger();
        let deeds = &ledger.deeds;
        assert_eq!(before, after, "a second look changes nothing\n{deeds:#?}");
        assert_eq!(traffic, self.hub.traffic(), "a second look sends nothing\n{deeds:#?}");
        // The last one tells case.
        let present: BTreeSet<String> = after[after.len() - 1]
            .iter()
            .map(|(_, shown)| shown.trim_end_matches('*').to_owned())
            .filter(|shown| shown != "directory" && !shown.starts_with("link to "))
            .collect();
        let made_up: Vec<_> = present.difference(&ledger.written).collect();
        assert!(made_up.is_empty(), "nobody wrote {made_up:?}\n{deeds:#?}");
        let lost: Vec<_> = ledger.written.iter().filter(|c| !ledger.removed.contains(*c)).collect();
        let lost: Vec<_> = lost.into_iter().filter(|c| !present.contains(*c)).collect();
        let places: Vec<_> = self
            .members
            .iter()
            .flat_map(|member| tree(&member.disk, Path::new("/")))
            .filter(|(_, shown)| lost.iter().any(|lost| shown.starts_with(lost.as_str())))
            .collect();
        assert!(lost.is_empty(), "lost {lost:?}: {places:?}\n{:#?}\n{deeds:#?}", after[0]);
        for member in &self.members {
            let home = member.config.root.parent().expect("it has one");
            let beside = tree(&member.disk, home);
            let strange: Vec<_> = beside
                .iter()
                .map(|(path, _)| path.split('/').next().unwrap_or_default())
                .filter(|name| !["root", "aside", "beside", "state"].contains(name))
                .collect();
            assert!(strange.is_empty(), "outside of the root: {strange:?}");
            assert!(beside.contains(&("beside".to_owned(), "nobody touches this".to_owned())));
            let problems = member.handle().status().borrow().problems.clone();
            let problems = problems.iter().filter(|problem| problem.code != Code::WatchLimit);
            let folds = member.disk.folds_case();
            let problems: Vec<_> =
                problems.filter(|problem| !folds || problem.code != Code::CaseConflict).collect();
            assert!(problems.is_empty(), "{problems:?}\n{deeds:#?}");
        }
    }
}
