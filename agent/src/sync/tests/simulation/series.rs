//! Many histories of one kind, one after the other. Each kind is passed in a few tests, so that every core has
//! something to do until the end.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use super::world::World;
use super::{run, simulate};

/// Of so many calls to a disk one fails in an ordinary test run.
const FAILURES_APART: u64 = 5;
/// Seeds of an ordinary test run.
const SEEDS: u64 = 60;
/// Tests of one kind.
const PARTS: u64 = 4;

/// Every [`PARTS`]th of all numbers, beginning with that of the part.
#[derive(Clone, Copy)]
struct Part(u64);

impl Part {
    /// Passes all storms of this part that an ordinary test run has, or those that are asked for.
    fn storms(self) {
        self.seeds(|seed| drop(simulate(seed)));
    }

    /// The same of those who work alone.
    fn alone(self) {
        self.seeds(|seed| run(World::work_alone(seed)));
    }

    fn seeds(self, one: impl Fn(u64)) {
        let asked = |name| std::env::var(name).ok().map(|text: String| text.parse().unwrap());
        let seeds = match (asked("CORTEX_SIM_SEED"), asked("CORTEX_SIM_SEEDS")) {
            (Some(seed), count) => seed..seed + count.unwrap_or(1),
            (None, count) => 0..count.unwrap_or(SEEDS),
        };
        let mut failed = Vec::new();
        for seed in seeds.filter(|seed| seed % PARTS == self.0) {
            if catch_unwind(AssertUnwindSafe(|| one(seed))).is_err() {
                tell(&format!("CORTEX_SIM_SEED={seed} fails"));
                failed.push(seed);
            }
        }
        assert!(failed.is_empty(), "seeds that fail: {failed:?}");
    }

    /// Does it for every so many numbers until there is nothing left to be done.
    fn until_over(self, apart: u64, least: u64, one: impl Fn(u64) -> bool) {
        for number in (0..).map(|number| (number * PARTS + self.0) * apart) {
            match catch_unwind(AssertUnwindSafe(|| one(number))) {
                Ok(true) => {}
                Ok(false) => {
                    assert!(number > least, "there is something to be done: {number}");
                    return;
                }
                Err(panic) => {
                    tell(&format!("number {number} fails"));
                    resume_unwind(panic);
                }
            }
        }
    }

    /// The process of a member ends at each single change it makes to its disk while it applies, is started
    /// again, and everything is as if nothing had happened.
    fn ends(self, power_loss: bool, exchanges: bool) {
        self.until_over(1, 20, |changes| run(World::apply_until(changes, power_loss, exchanges)));
    }

    /// A call fails while a member applies and its user saves into the same files.
    fn failures(self) {
        self.until_over(FAILURES_APART, 100, |call| {
            run(World::apply_on_a_disk_that_fails_at(call))
        });
    }
}

#[allow(clippy::print_stderr)] // which one has failed
fn tell(what: &str) {
    eprintln!("{what}");
}

macro_rules! parts {
    ($($(#[$attribute:meta])* $kind:ident: |$part:ident| $body:expr;)*) => {$(
        $(#[$attribute])*
        mod $kind {
            use super::Part;

            fn pass($part: Part) {
                $body;
            }

            #[test]
            fn part_1() {
                pass(Part(0));
            }

            #[test]
            fn part_2() {
                pass(Part(1));
            }

            #[test]
            fn part_3() {
                pass(Part(2));
            }

            #[test]
            fn part_4() {
                pass(Part(3));
            }
        }
    )*};
}

parts! {
    meshes_in_a_storm_converge_and_lose_nothing: |part| part.storms();

    who_works_alone_is_left_alone: |part| part.alone();

    /// D1 to D8 of the crash matrix.
    d1_to_d8_a_process_may_end_at_every_change_it_makes_while_it_applies: |part| part.ends(false, true);

    d1_to_d8_the_power_may_fail_at_every_change_as_well: |part| part.ends(true, true);

    /// What is displaced goes to the trash before the new file gets the name, so that a process may leave both
    /// under one name.
    so_a_process_may_end_where_files_cannot_change_places: |part| part.ends(false, false);

    a_disk_may_fail_at_any_call_while_changes_are_applied: |part| part.failures();
}
