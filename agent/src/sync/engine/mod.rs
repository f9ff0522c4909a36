//! The engine of one workspace: one task that owns everything about it.
//!
//! It goes round: look where something may have changed, learn what changed at the hub, plan, send,
//! apply, until nothing is left to do; then it waits for a reason to go round again. It keeps no
//! queue: stopped at any instant, it finds its work again by looking.

mod attach;
mod hold;
mod looks;
mod pass;
mod replica;
mod rules;
mod work;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use cortex_shared::tasks::TaskScope;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::apply::rescue_late_writes;
use super::core::{Core, CoreCell, SyncError};
use super::ground::{Blocking, Ground};
use super::hub::Hub;
use super::index::Index;
use super::mode::MemberOptions;
use super::occupancy::Occupancy;
use super::problem::{Code, Finding, Stage};
use super::scan::{Directories, Report, ScanError, Scanner, Scope};
use super::status::{Progress, SyncState};
use super::watch::{Dirty, Unwatched, Watch};
use super::{FlushError, WorkspaceConfig};
use crate::root_dir::DirIdentity;
use attach::{AttachError, Attached, attach, check_root};
use work::Work;

/// How long it has to be quiet before changes are looked at, so that one look sees a whole save.
const QUIET: Duration = Duration::from_millis(50);
/// The same after a file was closed or got its name: that is how a save ends.
const QUIET_FINISHED: Duration = Duration::from_millis(5);
/// That little is enough after a rest of this length: who saves all the time is not followed save by
/// save.
const RESTED: Duration = Duration::from_millis(100);
/// The longest a change waits for quiet.
const LONGEST_WAIT: Duration = Duration::from_secs(1);
/// How often a halted workspace looks whether its root is back.
const HALTED_RETRY: Duration = Duration::from_secs(2);
/// When paths that could not be synced are tried again.
const PROBLEM_RETRY: Duration = Duration::from_secs(30);
/// First and longest wait before a file that is being written is looked at again.
const UNSTABLE_RETRY: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(30));
/// How long after files were displaced, and after a start, it is looked whether somebody still writes to
/// them, besides each look at everything.
const LATE_WRITES: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(30)];
/// From this wait on, people are told.
const UNSTABLE_TOLD: Duration = Duration::from_secs(1);
/// Bounds of the wait before the hub is called again after a failure.
const HUB_RETRY: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(60));

/// What others ask of the engine.
pub(super) enum Command {
    /// Look at everything, sync, and tell when all is done.
    Flush(oneshot::Sender<Result<(), FlushError>>),
    /// Push the deletions that are held.
    ConfirmDeletions,
    /// What was waited for may have come.
    PlanAgain,
}

pub(super) struct Engine<H> {
    pub(super) ground: Ground,
    pub(super) config: WorkspaceConfig,
    pub(super) options: watch::Receiver<MemberOptions>,
    pub(super) hub: Arc<H>,
    /// Another line to the same hub.
    pub(super) large: Arc<H>,
    pub(super) scope: TaskScope,
    pub(super) online: watch::Receiver<bool>,
    pub(super) head: watch::Receiver<u64>,
    pub(super) commands: mpsc::Receiver<Command>,
    pub(super) cancel: CancellationToken,
    pub(super) progress: Arc<Progress>,
    pub(super) occupancy: Occupancy,
}

/// Why the engine stopped working in a root.
enum End {
    Stopped,
    Halted(String),
    /// The index was damaged.
    Again,
}

/// What a round came to.
enum Round {
    Done,
    /// There is more to do at once.
    More,
    /// The hub is not to be asked now.
    Offline,
}

#[derive(Debug, thiserror::Error)]
enum RoundError {
    #[error(transparent)]
    Root(#[from] AttachError),
    #[error(transparent)]
    Sync(#[from] SyncError),
}

impl<H: Hub> Engine<H> {
    /// Runs until it is cancelled.
    pub(super) async fn run(mut self) {
        let stop = self.cancel.clone();
        // Why it was halted before: the same reason is said once.
        let mut told = None;
        while !stop.is_cancelled() {
            let options = *self.options.borrow_and_update();
            self.progress.update(|status| status.mode = options.mode);
            if options.paused {
                self.paused(&stop).await;
                continue;
            }
            // A pause ends the work in the root like a stop, so it waits for nothing either.
            self.cancel = stop.child_token();
            let dirty = Arc::new(Dirty::default());
            let reason = match self.attach(dirty.clone()).await {
                Ok(Attached { held, core, identity }) => {
                    let core = CoreCell::new(core, self.ground.blocking);
                    let mut work = Work::new(core, identity, dirty);
                    told = None;
                    let pausing = pausing(self.options.clone(), self.cancel.clone());
                    let end = tokio::select! {
                        biased;
                        never = pausing => match never {},
                        end = self.work(&mut work) => end,
                    };
                    work.end_transfers().await;
                    drop(held);
                    for flush in work.flushes.drain(..) {
                        flush.answer.send(Err(self.stopped())).ok();
                    }
                    match end {
                        End::Stopped => continue,
                        End::Halted(reason) => reason,
                        End::Again => continue,
                    }
                }
                Err(reason) => reason,
            };
            if told.as_ref() != Some(&reason) {
                tracing::error!(workspace = %self.config.name, reason, "sync halted");
            }
            self.halted(&reason).await;
            told = Some(reason);
        }
    }

    async fn attach(&self, dirty: Arc<Dirty>) -> Result<Attached, String> {
        let (ground, config) = (self.ground.clone(), self.config.clone());
        let attached = self.ground.blocking.run(move || attach(&ground, &config, dirty)).await;
        attached.map_err(|error| error.to_string())?.map_err(|error| error.to_string())
    }

    /// A time to come, in milliseconds since the Unix epoch.
    fn when_ms(&self, at: Instant) -> i64 {
        let wait = at.saturating_duration_since(Instant::now());
        (self.ground.wall_ms)().saturating_add(i64::try_from(wait.as_millis()).unwrap_or(i64::MAX))
    }

    /// Why a flush that was begun before comes to no end.
    fn stopped(&self) -> FlushError {
        if self.options.borrow().paused { FlushError::Paused } else { FlushError::Stopped }
    }

    /// Does nothing until it is told to go on.
    async fn paused(&mut self, stop: &CancellationToken) {
        self.progress.update(|status| {
            status.state = SyncState::Paused;
            status.halted_reason.clear();
        });
        loop {
            tokio::select! {
                // Who resumes and then flushes is not told that it is paused.
                biased;
                () = stop.cancelled() => return,
                options = next_value(&mut self.options) => if !options.paused {
                    // What it does first takes a while where the disk is slow.
                    return self.progress.state(SyncState::Scanning);
                },
                Some(command) = self.commands.recv() => {
                    if let Command::Flush(answer) = command {
                        answer.send(Err(FlushError::Paused)).ok();
                    }
                }
            }
        }
    }

    /// Tells why nothing is done, and waits a while.
    async fn halted(&mut self, reason: &str) {
        self.progress.update(|status| {
            status.state = SyncState::Halted;
            reason.clone_into(&mut status.halted_reason);
        });
        let retry = tokio::time::sleep(HALTED_RETRY);
        tokio::pin!(retry);
        loop {
            tokio::select! {
                biased;
                () = self.cancel.cancelled() => return,
                () = &mut retry => return,
                _ = next_value(&mut self.options) => return,
                Some(command) = self.commands.recv() => {
                    if let Command::Flush(answer) = command {
                        answer.send(Err(FlushError::Halted { reason: reason.to_owned() })).ok();
                    }
                }
            }
        }
    }

    async fn work(&mut self, work: &mut Work) -> End {
        self.progress.update(|status| {
            status.halted_reason.clear();
            // Not known yet; nobody is to confirm what an earlier run had held, or to be told of it.
            status.held_deletions = 0;
            status.problems.clear();
        });
        work.dirty.add(Scope::Tree(None));
        if let Err(error) = self.tell_rules(work).await {
            tracing::error!(workspace = %self.config.name, %error, "sync failed");
        }
        loop {
            let round = Box::pin(self.round(work)).await;
            let more = match &round {
                Ok(Round::More) => true,
                Ok(Round::Done | Round::Offline) => false,
                Err(RoundError::Root(error)) => return End::Halted(error.to_string()),
                Err(RoundError::Sync(error)) => match self.failed(work, error) {
                    Some(end) => return end,
                    None => false,
                },
            };
            if more {
                // Not at once: something that writes all the time must not keep us busy all the time.
                if !self.settle(work).await {
                    return End::Stopped;
                }
                self.hear(work);
                continue;
            }
            work.answer_flushes(&round);
            if !self.wait(work).await {
                return End::Stopped;
            }
        }
    }

    /// Decides what a failure means: the end of the work in this root, or another try later.
    fn failed(&self, work: &mut Work, error: &SyncError) -> Option<End> {
        match error {
            SyncError::Cancelled => return Some(End::Stopped),
            SyncError::Panicked => return Some(End::Halted(error.to_string())),
            SyncError::Scan(ScanError::Root(source)) => {
                return Some(End::Halted(format!("the root directory cannot be read: {source}")));
            }
            SyncError::Index(index) | SyncError::Scan(ScanError::Index(index))
                if index.is_damage() =>
            {
                tracing::error!(workspace = %self.config.name, %error, "index is damaged");
                work.core.close();
                return match Index::set_aside(&self.config.state_folder()) {
                    Ok(()) => Some(End::Again),
                    Err(error) => Some(End::Halted(error.to_string())),
                };
            }
            SyncError::Hub(_) => {
                tracing::warn!(workspace = %self.config.name, %error, "hub failed");
                self.progress.state(SyncState::Offline);
            }
            _ => tracing::error!(workspace = %self.config.name, %error, "sync failed"),
        }
        let finding = Finding { path: None, code: Code::SyncFailed, message: error.to_string() };
        work.problems.replace(Stage::Push, |_| true, vec![finding]);
        let problems = work.problems.list();
        self.progress.update(|status| status.problems = problems);
        work.outdated = true;
        let retry_at = Instant::now() + work.hub_backoff.next_delay_of((self.ground.chance)());
        work.retry_at = Some(retry_at);
        self.progress.update(|status| status.next_retry_ms = self.when_ms(retry_at));
        work.revisits.extend(work.unseen.drain(..).map(|scope| (retry_at, scope)));
        None
    }

    async fn round(&mut self, work: &mut Work) -> Result<Round, RoundError> {
        self.check_root(work.identity).await?;
        self.look(work).await?;
        if self.adopt_rules(work).await? {
            self.look(work).await?;
        }
        let problems = work.problems.list();
        self.progress.update(|status| status.problems = problems);
        let now = Instant::now();
        // A time that has come must not wake up again and again while there is no hub.
        work.problem_retry_at = None;
        work.retry_at = work.retry_at.filter(|at| *at > now);
        // That it has changed is for `wait` or `hear` to see, and then the hub is asked what was missed.
        if !*self.online.borrow() || work.retry_at.is_some() {
            // Some of it may have to be pulled rather than pushed; which is known once the hub is.
            let pending = work.core.run(|core| core.index.differing()).await?;
            self.progress.update(|status| {
                status.state = SyncState::Offline;
                status.pending_push = pending;
            });
            return Ok(Round::Offline);
        }
        // Nothing of what was just seen is believed if the root was swapped meanwhile.
        self.check_root(work.identity).await?;
        let round = match self.pass(work).await {
            // The next round asks for the head, and knows then. It waits like for any other failure
            // if it is told the same again.
            Err(SyncError::Hub(error)) if error.is_other_history() && !work.asked_anew => {
                tracing::warn!(workspace = %self.config.name, %error, "asking the hub anew");
                (work.outdated, work.asked_anew) = (true, true);
                return Ok(Round::More);
            }
            result => result?,
        };
        work.asked_anew = false;
        work.hub_backoff.reset();
        Ok(round)
    }

    async fn check_root(&self, identity: DirIdentity) -> Result<(), RoundError> {
        let (ground, config) = (self.ground.clone(), self.config.clone());
        self.ground.blocking.run(move || check_root(&ground, &config, identity)).await??;
        Ok(())
    }

    /// Scans where something may have changed.
    async fn look(&mut self, work: &mut Work) -> Result<(), SyncError> {
        let due = Instant::now();
        let late = work.trash_looks.extract_if(.., |at| *at <= due).count() > 0;
        if late || work.dirty.is_everything() {
            self.look_into_trash(work).await?;
        }
        let scopes = work.dirty.take();
        if scopes.is_empty() {
            return Ok(());
        }
        self.progress.state(SyncState::Scanning);
        let begun = Instant::now();
        let everything = scopes.contains(&Scope::Tree(None));
        let mut watched_anew = false;
        let mut scopes = scopes.into_iter();
        while let Some(scope) = scopes.next() {
            match self.look_at(work, &scope).await {
                Ok(anew) => watched_anew |= anew,
                Err(error) => {
                    // Nobody else remembers that there is something to be seen.
                    work.unseen.push(scope);
                    work.unseen.extend(scopes);
                    return Err(error);
                }
            }
        }
        if everything {
            work.looks.done(begun, Instant::now(), watched_anew);
            work.supplied.clear();
            work.flushes.iter_mut().for_each(|flush| flush.looked = true);
            work.core.run(|core| core.private.empty_trash()).await?;
        }
        let watched = |core: &mut Core| {
            Ok::<_, SyncError>(core.watch.as_ref().is_none_or(|watch| watch.limited))
        };
        let limited = work.core.run(watched).await?;
        work.watched(limited);
        Ok(())
    }

    /// Puts back what somebody has written to after it was displaced.
    async fn look_into_trash(&self, work: &mut Work) -> Result<(), SyncError> {
        let late = work
            .core
            .run(|core| rescue_late_writes(&core.root, &core.private, &mut core.index))
            .await?;
        work.problems.replace(Stage::Trash, |_| true, late.findings);
        for directory in late.dirty {
            work.dirty.add(Scope::Children(directory));
        }
        Ok(())
    }

    /// Looks at a scope; whether all of its directories are watched anew.
    async fn look_at(&mut self, work: &mut Work, scope: &Scope) -> Result<bool, SyncError> {
        let cancel = self.cancel.clone();
        let scanned = scope.clone();
        let threads = self.ground.blocking == Blocking::Threads;
        let kernels = self.ground.kernels.clone();
        let begun = Instant::now();
        let moved = scanned == Scope::Tree(None) && work.dirty.take_moved();
        let (root, dirty) = (self.config.root.clone(), work.dirty.clone());
        let hot: HashMap<_, _> =
            work.hot.iter().map(|(path, (hot, _))| (path.clone(), *hot)).collect();
        let (report, entries) = work
            .core
            .run(move |core| {
                let mut report = Report::default();
                if core.watch.is_none() && scanned == Scope::Tree(None) {
                    // There may be room for a watcher by now.
                    core.watch = Watch::new(&kernels, &root, dirty).ok();
                }
                // A file that was moved here is seen with its directory.
                let is_file = matches!(&scanned, Scope::Tree(Some(path))
                        if core.root.open_dir(Some(path)).is_err());
                let left_out =
                    scanned.directory().is_some_and(|path| core.ignore.ignores(path, true));
                if !is_file && !left_out {
                    let mut unwatched = Unwatched;
                    let directories: &mut (dyn Directories + Send) = match &mut core.watch {
                        Some(watch) => {
                            watch.begin(&scanned, moved);
                            watch
                        }
                        None => &mut unwatched,
                    };
                    let scanner = Scanner {
                        root: &core.root,
                        index: &mut core.index,
                        ignore: &core.ignore,
                        clock: core.private.clock_of_readers()?,
                        hot: &hot,
                        directories,
                        cancel: &cancel,
                    };
                    report = scanner.scan(&scanned, threads)?;
                }
                Ok::<_, SyncError>((report, core.index.counts().local))
            })
            .await?;
        if report.cancelled {
            return Err(SyncError::Cancelled);
        }
        work.seen(scope, begun, report);
        self.progress.update(|status| status.entries = entries);
        Ok(moved)
    }

    /// Waits for a reason to go round again; false if that is to stop.
    async fn wait(&mut self, work: &mut Work) -> bool {
        let due = work.next_due();
        tokio::select! {
            biased;
            () = self.cancel.cancelled() => return false,
            () = work.dirty.changed() => {
                let goes_on = self.settle(work).await;
                self.hear(work);
                return goes_on;
            }
            seq = next_value(&mut self.head) => {
                work.head_moved(seq);
            }
            online = next_value(&mut self.online) => {
                work.line_changed(online);
            }
            Some(command) = self.commands.recv() => work.obey(command),
            // Another mode plans otherwise.
            options = next_value(&mut self.options) => {
                self.progress.update(|status| status.mode = options.mode);
            }
            () = work.transferred.notified() => {}
            () = self.occupancy.left(), if work.occupied => work.occupied = false,
            () = tokio::time::sleep_until(due) => work.collect_due(),
        }
        true
    }

    /// Takes what is asked, told and due without waiting for it: where something is written all the time,
    /// there is no time to wait.
    fn hear(&mut self, work: &mut Work) {
        if self.head.has_changed().unwrap_or(false) {
            work.head_moved(*self.head.borrow_and_update());
        }
        if self.online.has_changed().unwrap_or(false) {
            let online = *self.online.borrow_and_update();
            work.line_changed(online);
        }
        if self.options.has_changed().unwrap_or(false) {
            let mode = self.options.borrow_and_update().mode;
            self.progress.update(|status| status.mode = mode);
        }
        work.collect_due();
        while let Ok(command) = self.commands.try_recv() {
            work.obey(command);
        }
    }

    /// Waits until nothing changes for a moment, but not for ever.
    async fn settle(&self, work: &mut Work) -> bool {
        let dirty = work.dirty.clone();
        let begun = Instant::now();
        let end = begun + LONGEST_WAIT;
        let rested = work.settled_at.is_none_or(|at| begun - at >= RESTED);
        loop {
            let quiet = if rested && dirty.is_finished() { QUIET_FINISHED } else { QUIET };
            let quiet = (Instant::now() + quiet).min(end);
            tokio::select! {
                biased;
                () = self.cancel.cancelled() => return false,
                () = tokio::time::sleep_until(quiet) => {
                    work.settled_at = Some(Instant::now());
                    return true;
                }
                () = dirty.changed() => {}
            }
        }
    }
}

/// Cancels the work in the root once it is to pause.
async fn pausing(
    mut options: watch::Receiver<MemberOptions>,
    work: CancellationToken,
) -> std::convert::Infallible {
    if options.wait_for(|options| options.paused).await.is_ok() {
        work.cancel();
    }
    std::future::pending().await
}

/// The next value; never if there is nobody left to send one.
async fn next_value<T: Copy>(receiver: &mut watch::Receiver<T>) -> T {
    if receiver.changed().await.is_err() {
        std::future::pending::<()>().await;
    }
    *receiver.borrow_and_update()
}
