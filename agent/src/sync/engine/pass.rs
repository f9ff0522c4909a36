//! One pass: learn what changed at the hub, then plan and do until nothing is left to do.

use std::collections::{BTreeSet, HashSet};
use std::sync::{Arc, Mutex, PoisonError};

use cortex_shared::crash::crash_point;
use cortex_shared::entry::{Digest, Entry, same};
use cortex_shared::library::linked_skill;
use cortex_shared::wire_path::WirePath;
use tokio::time::Instant;

use super::hold::{REFUSED_RETRY, is_lost, must_hold};
use super::rules::{are_in_place, are_outdated, concerns_rules, is_rules, not_taken_over};
use super::{Engine, LATE_WRITES, PROBLEM_RETRY, Round, Work};
use crate::sync::apply::needs_stage;
use crate::sync::case::{self, hold_collisions};
use crate::sync::core::{Core, SyncError, waiting};
use crate::sync::hub::{Hub, HubError};
use crate::sync::index::{Index, IndexError};
use crate::sync::mode::MemberMode;
use crate::sync::moves::apply_moves;
use crate::sync::plan::{LocalChange, Options, Plan, conflict_of, plan};
use crate::sync::problem::{Code, Finding, Stage};
use crate::sync::scan::Scope;
use crate::sync::status::SyncState;
use crate::sync::transfer::{
    Large, Parcel, Pulled, Pushed, Refreshed, Session, download, pull, push, refresh, send_packs,
    supply,
};

/// Rows that are planned at once; bounds memory.
const WINDOW_ROWS: u32 = 20_000;
/// Passes over all windows in one round. Two members that change the same paths all the time make
/// more than a few; a mistake of ours must not make it endless.
const MAX_SWEEPS: usize = 50;
/// Times the hub is asked for news within one round though it had none the time before.
const MAX_IN_VAIN: usize = 3;
/// Links of one sweep that are told.
const MAX_LINKS_TOLD: usize = 100;
/// Names that differ only in case of one sweep that are told.
const MAX_COLLISIONS_TOLD: usize = 100;

/// A plan for one window.
struct Planned {
    plan: Plan,
    /// How many files the hub would lose by it whose content is nowhere else here.
    losses: usize,
    /// Directories that stay at the hub because something that is left out here is in them.
    kept_there: usize,
    /// New paths that are held because of others that differ only in case.
    collisions: Vec<WirePath>,
    /// Directories in whose place a link to a skill is to be put.
    skill_links: Vec<WirePath>,
    /// The last row of the window, if there are more.
    next: Option<WirePath>,
}

/// What one sweep over all windows did and found.
#[derive(Default)]
struct Sweep {
    progress: bool,
    interrupted: bool,
    /// Changes of the hub that are still not made here.
    unapplied: usize,
    unpushed: usize,
    /// Those of the unpushed whose files were changed before they were sent.
    changed: usize,
    /// Paths at which the hub turned out to have something else.
    learned: usize,
    held: usize,
    /// Directories that stay here though they are gone at the hub.
    kept: usize,
    /// Paths that stay different because of the member's mode.
    withheld: usize,
    held_links: Vec<WirePath>,
    /// Of names that differ only in case, those that are held.
    collisions: Vec<WirePath>,
    /// Directories in whose place a link to a skill is to be put, and those of them that stay until the
    /// skill is here.
    skill_links: BTreeSet<WirePath>,
    awaited_skills: BTreeSet<WirePath>,
    /// A path that is planned for has the name of a conflict copy.
    conflicts: bool,
    /// Large files on their way here: what was wrong with them is not known to be over.
    waiting: HashSet<WirePath>,
    push_findings: Vec<Finding>,
    apply_findings: Vec<Finding>,
}

impl Sweep {
    /// Whether all that was planned is done, but for files that were changed since.
    fn is_complete(&self) -> bool {
        self.unapplied == 0 && self.unpushed <= self.changed && self.learned == 0
    }
}

impl<H: Hub> Engine<H> {
    pub(super) async fn pass(&self, work: &mut Work) -> Result<Round, SyncError> {
        self.collect_large(work).await?;
        // How often the hub was asked in vain: it refuses what fits to all that it told.
        let mut in_vain = 0;
        for _ in 0..MAX_SWEEPS {
            if work.outdated {
                let before = work.cursor;
                self.progress.state(SyncState::Downloading);
                let mut confirmed = false;
                let refreshed = refresh(&mut self.session(work), &mut confirmed).await;
                if confirmed {
                    (work.deletions_confirmed, work.refused_until) = (true, None);
                }
                let Refreshed { cursor, anew, wanted } = refreshed?;
                (work.outdated, work.asked_at) = (false, Instant::now());
                if anew && work.cursor.is_some() {
                    // What is here is all there is to compare with: it had better be seen afresh.
                    work.dirty.add(Scope::Tree(None));
                    work.acknowledged_seq = None;
                }
                work.cursor = Some(cursor);
                in_vain = if before == work.cursor { in_vain + 1 } else { 0 };
                self.supply(work, wanted).await?;
                // What the hub has may be what stands here already.
                if self.adopt_rules(work).await? {
                    return Ok(Round::More);
                }
            }
            let sweep = Box::pin(self.sweep(work)).await?;
            self.report(work, &sweep);
            if self.adopt_rules(work).await? {
                return Ok(Round::More);
            }
            if work.outdated && !sweep.progress && in_vain >= MAX_IN_VAIN {
                work.outdated = false;
                let text =
                    "the hub refuses changes that fit to all that it told; they are tried again";
                let refused =
                    Finding { path: None, code: Code::RefusedByHub, message: text.to_owned() };
                work.problems.replace(Stage::Plan, |_| false, vec![refused]);
                work.problem_retry_at = Some(Instant::now() + PROBLEM_RETRY);
                let problems = work.problems.list();
                self.progress.update(|status| status.problems = problems);
            }
            let settled = !sweep.interrupted && !work.outdated;
            if settled && sweep.is_complete() {
                // Said at once: where something is written all the time, the end never comes.
                self.acknowledge(work, &sweep).await?;
                work.flushed();
            }
            if sweep.interrupted || !work.dirty.is_empty() {
                return Ok(Round::More);
            }
            if settled && !sweep.progress {
                self.drop_arrived(work).await?;
                self.finish(work, &sweep).await?;
                work.flushed();
                return Ok(Round::Done);
            }
        }
        let finding = Finding {
            path: None,
            code: Code::NoEnd,
            message: "the workspace changes faster than it can be synced".to_owned(),
        };
        work.problems.replace(Stage::Plan, |_| true, vec![finding]);
        work.retry_at = Some(Instant::now() + PROBLEM_RETRY);
        Ok(Round::Done)
    }

    /// Sends again what the hub has lost, once for each list it asks for.
    async fn supply(&self, work: &mut Work, wanted: Vec<Digest>) -> Result<(), SyncError> {
        if wanted.is_empty() || work.supplied == wanted {
            return Ok(());
        }
        for scope in supply(&mut self.session(work), &wanted).await? {
            work.dirty.add(scope);
        }
        work.supplied = wanted;
        Ok(())
    }

    fn session<'a>(&'a self, work: &'a mut Work) -> Session<'a, H> {
        Session {
            hub: &self.hub,
            workspace: self.config.id,
            core: &mut work.core,
            cancel: &self.cancel,
            progress: &self.progress,
            occupancy: &self.occupancy,
            batches: self.ground.batches,
        }
    }

    /// Plans and does, window by window.
    async fn sweep(&self, work: &mut Work) -> Result<Sweep, SyncError> {
        let large = self.large(work).await?;
        let result = Box::pin(self.sweep_windows(work, &large)).await;
        self.fetch_large(work, &large, result.is_ok()).await?;
        result
    }

    async fn sweep_windows(
        &self,
        work: &mut Work,
        large: &Arc<Mutex<Large>>,
    ) -> Result<Sweep, SyncError> {
        let mut sweep = Sweep::default();
        if self.options.borrow().mode != MemberMode::SendOnly {
            let moved = work.core.run(apply_moves).await?;
            sweep.progress |= moved.paths > 0;
            self.progress.applied(moved.paths);
            moved.dirty.into_iter().for_each(|scope| work.dirty.add(scope));
        }
        let mut after = None;
        let hold = self.must_hold(work).await?;
        let outdated_rules = work.core.run(are_outdated).await?;
        loop {
            let Planned { mut plan, losses, kept_there, skill_links, collisions, next } =
                self.plan(work, after, hold).await?;
            if outdated_rules {
                let planned = plan.push.len();
                plan.push.retain(concerns_rules);
                sweep.unpushed += planned - plan.push.len();
                let first = plan.local.extract_if(.., |change| is_rules(&change.path)).collect();
                if self.take_rules_over(work, first, large, &mut sweep).await? {
                    // All else is to be seen by them.
                    sweep.unapplied += plan.local.len();
                    return Ok(sweep);
                }
            }
            self.await_skills(work, skill_links, &mut sweep);
            sweep.held += plan.held_deletions;
            sweep.unapplied += plan.skipped;
            sweep.withheld += plan.withheld;
            sweep.kept += kept_there;
            sweep.conflicts |= has_conflict_names(&plan);
            let room = MAX_COLLISIONS_TOLD.saturating_sub(sweep.collisions.len());
            sweep.collisions.extend(collisions.into_iter().take(room));
            let room = MAX_LINKS_TOLD.saturating_sub(sweep.held_links.len());
            sweep.held_links.extend(plan.held_links.iter().take(room).cloned());
            work.count_conflicts |= sweep.conflicts;
            let (unpushed, unapplied) = (plan.push.len(), plan.local.len());
            let fetched = plan.local.iter().filter(|change| needs_stage(change));
            let fetched = fetched.map(|change| bytes_of(change.to.as_ref()));
            let sent = plan.push.iter().map(|op| bytes_of(op.new.as_ref()));
            self.progress.plan((unpushed + unapplied) as u64, fetched.chain(sent).sum());
            self.progress
                .update(|status| status.pending_push = (unpushed + plan.held_deletions) as u64);
            if !plan.push.is_empty() {
                self.progress.state(SyncState::Uploading);
                let Some(cursor) = work.cursor else { return Ok(sweep) };
                work.full_for_large.take_if(|(until, _)| *until <= Instant::now());
                let full = work.full_for_large.as_ref().map(|(_, message)| message.clone());
                let mut session = self.session(work);
                let mut pushed = push(&mut session, cursor.epoch, plan.push, full).await?;
                self.send_large(work, std::mem::take(&mut pushed.large)).await?;
                if pushed.held > 0 {
                    work.refused_until = Some(Instant::now() + REFUSED_RETRY);
                    work.deletions_confirmed = false;
                    // So that another sweep counts and tells what is held now.
                    sweep.progress = true;
                } else if losses > 0 {
                    work.deletions.add(Instant::now(), losses);
                }
                sweep.unpushed += unpushed - pushed.accepted.min(unpushed);
                self.take_pushed(work, pushed, &mut sweep).await?;
            }
            if !plan.local.is_empty() {
                self.progress.state(SyncState::Applying);
                // Our own changes make hints as well, so a hint alone is no reason to stop.
                let (dirty, begun) = (work.dirty.clone(), Instant::now());
                let patience = self.ground.batches.patience;
                let urgent = move || begun.elapsed() > patience && !dirty.is_empty();
                self.pull(work, plan.local, large, urgent, &mut sweep).await?;
            }
            match next {
                Some(next) if !sweep.interrupted => after = Some(next),
                _ => break,
            }
        }
        if outdated_rules && !sweep.interrupted && !work.core.run(are_in_place).await? {
            sweep.push_findings.push(not_taken_over());
        }
        work.awaited_skills.retain(|path, _| sweep.skill_links.contains(path));
        Ok(sweep)
    }

    /// Makes changes here.
    async fn pull(
        &self,
        work: &mut Work,
        changes: Vec<LocalChange>,
        large: &Arc<Mutex<Large>>,
        urgent: impl Fn() -> bool,
        sweep: &mut Sweep,
    ) -> Result<(), SyncError> {
        let (mut pulled, count) = (Pulled::default(), changes.len());
        let result = pull(&mut self.session(work), changes, large, urgent, &mut pulled).await;
        sweep.unapplied += count.saturating_sub(pulled.applied + pulled.kept);
        // Of what was done before a line broke, too, somebody has to look at what was displaced.
        take_pulled(work, pulled, sweep);
        result
    }

    /// Puts the newest rules in their place before anything else; whether they are there then.
    async fn take_rules_over(
        &self,
        work: &mut Work,
        changes: Vec<LocalChange>,
        large: &Arc<Mutex<Large>>,
        sweep: &mut Sweep,
    ) -> Result<bool, SyncError> {
        if changes.is_empty() {
            return Ok(false);
        }
        self.pull(work, changes, large, || false, sweep).await?;
        work.core.run(are_in_place).await
    }

    /// Asks for the skills that links lead to which are to be put in the place of directories.
    fn await_skills(&self, work: &mut Work, links: Vec<WirePath>, sweep: &mut Sweep) {
        let Some(library) = &self.config.library else { return };
        for path in links {
            let ticket = *work.awaited_skills.entry(path.clone()).or_insert_with(|| library.ask());
            if !library.is_done(ticket) {
                sweep.awaited_skills.insert(path.clone());
            }
            sweep.skill_links.insert(path);
        }
    }

    async fn large(&self, work: &mut Work) -> Result<Arc<Mutex<Large>>, SyncError> {
        let (busy, arrived) = (work.download.is_busy(), work.arrived.take());
        let large = move |core: &mut Core| {
            Ok::<_, SyncError>(Large::new(core.private.clone(), busy, arrived))
        };
        Ok(Arc::new(Mutex::new(work.core.run(large).await?)))
    }

    /// Has the content of large files sent beside everything else.
    async fn send_large(&self, work: &mut Work, parcel: Parcel) -> Result<(), SyncError> {
        if parcel.is_empty() || work.upload.is_busy() {
            return Ok(());
        }
        let root = work.core.run(|core| Ok::<_, SyncError>(core.root.clone())).await?;
        let (hub, workspace) = (self.large.clone(), self.config.id);
        let blocking = self.ground.blocking;
        work.upload.start(&self.scope, "large uploads", |cancel| async move {
            send_packs(&*hub, workspace, blocking, root, &cancel, parcel).await
        });
        Ok(())
    }

    /// Has the next large files fetched beside everything else.
    async fn fetch_large(
        &self,
        work: &mut Work,
        large: &Mutex<Large>,
        go_on: bool,
    ) -> Result<(), SyncError> {
        let (next, arrived) = large.lock().unwrap_or_else(PoisonError::into_inner).end();
        work.arrived = arrived;
        let Some(batch) = next else { return Ok(()) };
        if !go_on {
            let clean = move |_: &mut Core| {
                batch.clean();
                Ok::<_, SyncError>(())
            };
            return work.core.run(clean).await;
        }
        let (hub, workspace) = (self.large.clone(), self.config.id);
        let (progress, blocking) = (self.progress.clone(), self.ground.blocking);
        work.download.start(&self.scope, "large downloads", |cancel| {
            download(hub, workspace, blocking, cancel, progress, batch)
        });
        Ok(())
    }

    /// Takes what the lane of large files has done. What came before and nobody wanted is dropped.
    async fn collect_large(&self, work: &mut Work) -> Result<(), SyncError> {
        match work.upload.collect() {
            // Everything else goes on.
            Some(Err(SyncError::Hub(HubError::Full { message }))) => {
                work.full_for_large = Some((Instant::now() + PROBLEM_RETRY, message));
            }
            Some(result) => {
                for path in result? {
                    work.dirty.add(Scope::Children(path.parent()));
                }
            }
            None => {}
        }
        if let Some(result) = work.download.collect() {
            let arrived = result?;
            self.drop_arrived(work).await?;
            work.arrived = Some(arrived);
        }
        Ok(())
    }

    async fn drop_arrived(&self, work: &mut Work) -> Result<(), SyncError> {
        let Some(arrived) = work.arrived.take() else { return Ok(()) };
        work.core
            .run(move |_| {
                arrived.clean();
                Ok::<_, SyncError>(())
            })
            .await
    }

    async fn take_pushed(
        &self,
        work: &mut Work,
        pushed: Pushed,
        sweep: &mut Sweep,
    ) -> Result<(), SyncError> {
        sweep.progress |= pushed.accepted > 0 || pushed.learned > 0;
        sweep.push_findings.extend(pushed.findings);
        sweep.changed += pushed.changed;
        sweep.learned += pushed.learned;
        work.outdated |= pushed.outdated;
        for scope in pushed.dirty {
            work.dirty.add(scope);
        }
        if !pushed.outdated {
            work.cursor = work.core.run(|core| core.index.cursor()).await?;
        }
        Ok(())
    }

    /// Plans for the next window of rows that differ.
    async fn plan(
        &self,
        work: &mut Work,
        after: Option<WirePath>,
        hold: bool,
    ) -> Result<Planned, SyncError> {
        let mode = self.options.borrow().mode;
        let options = Options { hold_deletions: hold, mode, ..Options::default() };
        let library = self.config.library.clone();
        let tickets = work.awaited_skills.clone();
        let waits = move |path: &WirePath| match (&library, tickets.get(path)) {
            (Some(library), Some(ticket)) => !library.is_done(*ticket),
            (Some(_), None) => true,
            (None, _) => false,
        };
        let plan = move |core: &mut Core| {
            let mut planned = plan_window(&core.index, after.as_ref(), options, &waits)?;
            if core.folds_case {
                planned.collisions = hold_collisions(&core.root, &mut planned.plan)?;
            }
            Ok::<_, SyncError>(planned)
        };
        work.core.run(plan).await
    }

    /// Whether the deletions that are to be sent now are held back.
    async fn must_hold(&self, work: &mut Work) -> Result<bool, SyncError> {
        let now = Instant::now();
        work.refused_until = work.refused_until.filter(|until| *until > now);
        if work.refused_until.is_some() {
            return Ok(true);
        }
        let recent = work.deletions.recent(now);
        let confirmed = work.deletions_confirmed;
        work.core.run(move |core| must_hold(&mut core.index, recent, confirmed)).await
    }

    /// Tells what stands in the way now.
    fn report(&self, work: &mut Work, sweep: &Sweep) {
        // One that ended early has not looked at everything: nothing is cured because it was not seen.
        let whole = !sweep.interrupted;
        work.held = if whole { sweep.held } else { work.held.max(sweep.held) };
        if work.held == 0 && whole {
            // The word was for those that were held, not for the next ones.
            work.deletions_confirmed = false;
        }
        let mut plan_findings = Vec::new();
        if work.held > 0 {
            let (held, name) = (work.held, &self.config.name);
            let by = if work.refused_until.is_some() { " by the hub" } else { "" };
            let message = format!(
                "{held} deletions are held back{by} because they are so many; an operator can confirm \
                 them (cortex-agent workspace confirm-deletes {name}), or restore the files"
            );
            plan_findings.push(Finding { path: None, code: Code::MassDeleteHeld, message });
        }
        plan_findings.extend(sweep.held_links.iter().map(|path| {
            let text = "a link that leaves the workspace is neither sent nor placed";
            Finding::at(path, Code::LinkOutside, text)
        }));
        plan_findings.extend(sweep.collisions.iter().map(case::finding));
        plan_findings.extend(sweep.awaited_skills.iter().take(MAX_LINKS_TOLD).map(|path| {
            let text = "it becomes a link to a skill, once the library here is new enough";
            Finding::at(path, Code::SkillAwaited, text)
        }));
        work.problems.replace(Stage::Plan, |_| whole, plan_findings);
        work.problems.replace(Stage::Push, |_| whole, sweep.push_findings.clone());
        let told_again =
            |path: Option<&WirePath>| whole && path.is_none_or(|p| !sweep.waiting.contains(p));
        work.problems.replace(Stage::Apply, told_again, sweep.apply_findings.clone());
        let problems = work.problems.list();
        self.progress.update(|status| {
            status.problems = problems;
            status.held_deletions = work.held as u64;
            if whole {
                status.kept = sweep.kept as u64;
                status.withheld = sweep.withheld as u64;
            }
        });
    }

    /// Tells the hub what is applied here.
    async fn acknowledge(&self, work: &mut Work, sweep: &Sweep) -> Result<(), SyncError> {
        let Some(cursor) = work.cursor else { return Ok(()) };
        if sweep.unapplied == 0 && work.acknowledged_seq != Some(cursor.seq) {
            crash_point("sync.apply.acknowledging");
            waiting(&self.cancel, &*self.hub, self.hub.ack_applied(self.config.id, cursor)).await?;
            crash_point("sync.apply.acknowledged");
            work.acknowledged_seq = Some(cursor.seq);
            self.progress.update(|status| {
                status.applied_seq = cursor.seq;
                status.head_seq = status.head_seq.max(cursor.seq);
            });
        }
        Ok(())
    }

    /// Nothing more can be done now.
    async fn finish(&self, work: &mut Work, sweep: &Sweep) -> Result<(), SyncError> {
        if sweep.unapplied > 0 || sweep.kept > 0 || !sweep.push_findings.is_empty() {
            work.problem_retry_at = Some(Instant::now() + PROBLEM_RETRY);
        }
        if sweep.held > 0 {
            // They may be held only because of others that came shortly before.
            let due = match work.refused_until {
                Some(until) => [work.problem_retry_at, Some(until)],
                None => [work.problem_retry_at, work.deletions.next_forgotten()],
            };
            work.problem_retry_at = due.into_iter().flatten().min();
        }
        self.acknowledge(work, sweep).await?;
        let Some(cursor) = work.cursor else { return Ok(()) };
        // Counting reads every row, and is done when there may be another number.
        let count = std::mem::take(&mut work.count_conflicts);
        let (entries, conflicts) = work
            .core
            .run(move |core| {
                let conflicts = count.then(|| core.index.conflict_copies()).transpose()?;
                Ok::<_, SyncError>((core.index.counts().local, conflicts))
            })
            .await?;
        let next_retry = work.problem_retry_at;
        let pending = (sweep.unpushed + sweep.held) as u64;
        self.progress.update(|status| {
            status.state = match (work.upload.is_busy(), work.download.is_busy()) {
                (false, false) => SyncState::Idle,
                (true, false) => SyncState::Uploading,
                (_, true) => SyncState::Applying,
            };
            status.applied_seq = work.acknowledged_seq.unwrap_or(0);
            // It may be lower than it was: the hub may have been put back from a backup.
            status.head_seq = cursor.seq;
            status.entries = entries;
            status.pending_push = pending;
            status.conflicts = conflicts.unwrap_or(status.conflicts);
            status.next_retry_ms = next_retry.map_or(0, |at| self.when_ms(at));
            if status.state == SyncState::Idle {
                (status.files_done, status.files_total) = (0, 0);
                (status.bytes_done, status.bytes_total) = (0, 0);
            }
        });
        Ok(())
    }
}

fn take_pulled(work: &mut Work, pulled: Pulled, sweep: &mut Sweep) {
    sweep.progress |= pulled.applied > 0;
    sweep.interrupted |= pulled.interrupted;
    sweep.kept += pulled.kept;
    work.occupied |= pulled.occupied;
    if pulled.displaced > 0 {
        let now = Instant::now();
        work.trash_looks.extend(LATE_WRITES.map(|delay| now + delay));
    }
    sweep.apply_findings.extend(pulled.findings);
    sweep.waiting.extend(pulled.waiting);
    for scope in pulled.dirty {
        work.dirty.add(scope);
    }
}

fn bytes_of(entry: Option<&Entry>) -> u64 {
    match entry {
        Some(Entry::File(file)) => file.size,
        _ => 0,
    }
}

/// Whether a plan makes or removes something that is named like a conflict copy.
fn has_conflict_names(plan: &Plan) -> bool {
    let is_copy = |path: &WirePath, entries: [Option<&Entry>; 2]| {
        entries.into_iter().flatten().any(|entry| conflict_of(path, entry).is_some())
    };
    plan.local.iter().any(|change| {
        change.aside.is_some() || is_copy(&change.path, [change.from.as_ref(), change.to.as_ref()])
    }) || plan.push.iter().any(|op| is_copy(&op.path, [op.expected.as_ref(), op.new.as_ref()]))
}

/// Plans one window.
fn plan_window(
    index: &Index,
    after: Option<&WirePath>,
    options: Options,
    waits: &dyn Fn(&WirePath) -> bool,
) -> Result<Planned, IndexError> {
    let mut window = index.window(after, WINDOW_ROWS)?;
    let mut skill_links = Vec::new();
    for row in &mut window.rows {
        if let (Some(Entry::Dir), Some(Entry::Link { target })) = (&row.local, &row.remote)
            && linked_skill(&row.path, target).is_some()
            && !same(row.base.as_ref(), row.remote.as_ref())
        {
            skill_links.push(row.path.clone());
            // Neither it nor what is below is touched, as if nobody knew what is there.
            row.unknown |= waits(&row.path);
        }
    }
    let options = Options { truncated: window.truncated, context: window.context, ..options };
    let failure = std::cell::RefCell::new(None);
    let look_up = |path: &WirePath| match index.get(path) {
        Ok(found) => found.map(|found| found.row),
        Err(error) => {
            *failure.borrow_mut() = Some(error);
            None
        }
    };
    let mut plan = plan(&window.rows, &look_up, options);
    if let Some(error) = failure.into_inner() {
        return Err(error);
    }
    // The hub keeps a directory for what is in it, whether or not that is left out here.
    let mut kept_there = Vec::new();
    for op in plan.push.iter().filter(|op| op.new.is_none() && op.expected == Some(Entry::Dir)) {
        if index.has_left_out_below(&op.path)? {
            kept_there.push(op.path.clone());
        }
    }
    plan.push.retain(|op| op.new.is_some() || !kept_there.contains(&op.path));
    let mut losses = 0;
    for op in plan.push.iter().filter(|op| op.new.is_none()) {
        losses += usize::from(is_lost(index, op.expected.as_ref())?);
    }
    let next = window.truncated.then(|| window.rows.last().map(|row| row.path.clone())).flatten();
    let kept_there = kept_there.len();
    Ok(Planned { plan, losses, kept_there, skill_links, collisions: Vec::new(), next })
}
