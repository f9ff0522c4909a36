//! One pass: learn what changed at the hub, then plan and do until nothing is left to do.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use cortex_shared::entry::{Digest, Entry};
use cortex_shared::wire_path::WirePath;
use tokio::time::Instant;

use super::hold::{is_lost, must_hold};
use super::{Engine, LATE_WRITES, PROBLEM_RETRY, Round, Work};
use crate::sync::apply::needs_stage;
use crate::sync::core::{Core, SyncError, waiting};
use crate::sync::hub::Hub;
use crate::sync::index::{Index, IndexError};
use crate::sync::plan::{Options, Plan, plan};
use crate::sync::problem::{Finding, Stage};
use crate::sync::scan::Scope;
use crate::sync::status::SyncState;
use crate::sync::transfer::{
    Large, Parcel, Pulled, Pushed, Refreshed, Session, download, pull, push, refresh, send_packs,
    supply,
};

/// Rows that are planned at once; bounds memory.
const WINDOW_ROWS: u32 = 20_000;
/// How long changes here wait for a pull that goes on: it is then interrupted between two groups.
const LONGEST_PULL: Duration = Duration::from_secs(5);
/// Passes over all windows in one round. Two members that change the same paths all the time make
/// more than a few; a mistake of ours must not make it endless.
const MAX_SWEEPS: usize = 50;

/// A plan for one window.
struct Planned {
    plan: Plan,
    /// How many files the hub would lose by it whose content is nowhere else here.
    losses: usize,
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
        for _ in 0..MAX_SWEEPS {
            if work.outdated {
                self.progress.state(SyncState::Downloading);
                let Refreshed { cursor, anew, wanted, confirm_deletes } =
                    refresh(&mut self.session(work)).await?;
                work.deletions_confirmed |= confirm_deletes && work.held > 0;
                work.outdated = false;
                if anew && work.cursor.is_some() {
                    // What is here is all there is to compare with: it had better be seen afresh.
                    work.dirty.add(Scope::Tree(None));
                    work.acknowledged_seq = None;
                }
                work.cursor = Some(cursor);
                self.supply(work, wanted).await?;
            }
            let sweep = Box::pin(self.sweep(work)).await?;
            self.report(work, &sweep);
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
            code: "no_end",
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
        let mut after = None;
        let hold = self.must_hold(work).await?;
        loop {
            let Planned { plan, losses, next } = self.plan(work, after, hold).await?;
            sweep.held += plan.held_deletions;
            sweep.unapplied += plan.skipped;
            let (unpushed, unapplied) = (plan.push.len(), plan.local.len());
            let bytes = plan.local.iter().filter(|change| needs_stage(change)).map(bytes_of).sum();
            self.progress.plan((unpushed + unapplied) as u64, bytes);
            self.progress
                .update(|status| status.pending_push = (unpushed + plan.held_deletions) as u64);
            if !plan.push.is_empty() {
                self.progress.state(SyncState::Uploading);
                let Some(cursor) = work.cursor else { return Ok(sweep) };
                let mut pushed = push(&mut self.session(work), cursor.epoch, plan.push).await?;
                self.send_large(work, std::mem::take(&mut pushed.large)).await?;
                if losses > 0 {
                    work.deletions.add(Instant::now(), losses);
                }
                sweep.unpushed += unpushed - pushed.accepted.min(unpushed);
                self.take_pushed(work, pushed, &mut sweep).await?;
            }
            if !plan.local.is_empty() {
                self.progress.state(SyncState::Applying);
                // Our own changes make hints as well, so a hint alone is no reason to stop.
                let (dirty, begun) = (work.dirty.clone(), Instant::now());
                let urgent = move || begun.elapsed() > LONGEST_PULL && !dirty.is_empty();
                let pulled = pull(&mut self.session(work), plan.local, large, urgent).await?;
                sweep.unapplied += unapplied - pulled.applied.min(unapplied);
                take_pulled(work, pulled, &mut sweep);
            }
            match next {
                Some(next) if !sweep.interrupted => after = Some(next),
                _ => return Ok(sweep),
            }
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
        if let Some(result) = work.upload.collect() {
            for path in result? {
                work.dirty.add(Scope::Children(path.parent()));
            }
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
        self.progress.update(|status| status.conflicts += pushed.conflicts as u64);
        Ok(())
    }

    /// Plans for the next window of rows that differ.
    async fn plan(
        &self,
        work: &mut Work,
        after: Option<WirePath>,
        hold: bool,
    ) -> Result<Planned, SyncError> {
        work.core.run(move |core| plan_window(&core.index, after.as_ref(), hold)).await
    }

    /// Whether the deletions that are to be sent now are held back.
    async fn must_hold(&self, work: &mut Work) -> Result<bool, SyncError> {
        let recent = work.deletions.recent(Instant::now());
        let confirmed = work.deletions_confirmed;
        work.core.run(move |core| must_hold(&mut core.index, recent, confirmed)).await
    }

    /// Tells what stands in the way now.
    fn report(&self, work: &mut Work, sweep: &Sweep) {
        work.held = sweep.held;
        if sweep.held == 0 && !sweep.interrupted {
            // The word was for those that were held, not for the next ones.
            work.deletions_confirmed = false;
        }
        let mut plan_findings = Vec::new();
        if sweep.held > 0 {
            let message = format!(
                "{} deletions are held back because they are so many; confirm them \
                 (cortex-agent workspace confirm-deletes {}), or restore the files",
                sweep.held, self.config.name
            );
            plan_findings.push(Finding { path: None, code: "mass_delete_held", message });
        }
        work.problems.replace(Stage::Plan, |_| true, plan_findings);
        work.problems.replace(Stage::Push, |_| true, sweep.push_findings.clone());
        let told_again = |path: Option<&WirePath>| path.is_none_or(|p| !sweep.waiting.contains(p));
        work.problems.replace(Stage::Apply, told_again, sweep.apply_findings.clone());
        let problems = work.problems.list();
        self.progress.update(|status| {
            status.problems = problems;
            status.held_deletions = sweep.held as u64;
        });
    }

    /// Tells the hub what is applied here.
    async fn acknowledge(&self, work: &mut Work, sweep: &Sweep) -> Result<(), SyncError> {
        let Some(cursor) = work.cursor else { return Ok(()) };
        if sweep.unapplied == 0 && work.acknowledged_seq != Some(cursor.seq) {
            waiting(&self.cancel, &self.hub, self.hub.ack_applied(self.config.id, cursor)).await?;
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
        if sweep.unapplied > 0 || !sweep.push_findings.is_empty() {
            work.problem_retry_at = Some(Instant::now() + PROBLEM_RETRY);
        }
        if sweep.held > 0 {
            // They may be held only because of others that came shortly before.
            let due = [work.problem_retry_at, work.deletions.next_forgotten()];
            work.problem_retry_at = due.into_iter().flatten().min();
        }
        self.acknowledge(work, sweep).await?;
        let Some(cursor) = work.cursor else { return Ok(()) };
        let entries = work.core.run(|core| Ok::<_, SyncError>(core.index.counts().local)).await?;
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

fn bytes_of(change: &crate::sync::plan::LocalChange) -> u64 {
    match &change.to {
        Some(Entry::File(file)) => file.size,
        _ => 0,
    }
}

/// Plans one window.
fn plan_window(index: &Index, after: Option<&WirePath>, hold: bool) -> Result<Planned, IndexError> {
    let window = index.window(after, WINDOW_ROWS)?;
    let options =
        Options { truncated: window.truncated, context: window.context, hold_deletions: hold };
    let failure = std::cell::RefCell::new(None);
    let look_up = |path: &WirePath| match index.get(path) {
        Ok(found) => found.map(|found| found.row),
        Err(error) => {
            *failure.borrow_mut() = Some(error);
            None
        }
    };
    let plan = plan(&window.rows, &look_up, options);
    if let Some(error) = failure.into_inner() {
        return Err(error);
    }
    let mut losses = 0;
    for op in plan.push.iter().filter(|op| op.new.is_none()) {
        losses += usize::from(is_lost(index, op.expected.as_ref())?);
    }
    let next = window.truncated.then(|| window.rows.last().map(|row| row.path.clone())).flatten();
    Ok(Planned { plan, losses, next })
}
