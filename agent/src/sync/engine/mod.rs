//! The engine of one workspace: one task that owns everything about it.
//!
//! It goes round: look where something may have changed, learn what changed at the hub, plan, send,
//! apply, until nothing is left to do; then it waits for a reason to go round again. It keeps no
//! queue: stopped at any instant, it finds its work again by looking.

mod attach;
mod hold;
mod pass;

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use cortex_shared::backoff::Backoff;
use cortex_shared::entry::Digest;
use cortex_shared::tasks::TaskScope;
use cortex_shared::wire_path::WirePath;
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::apply::rescue_late_writes;
use super::core::{CoreCell, SyncError};
use super::hub::Hub;
use super::index::{Cursor, Index};
use super::problem::{Finding, Problems, Stage};
use super::scan::{Directories, HotFile, Report, ScanError, Scanner, Scope};
use super::status::{Progress, SyncState};
use super::transfer::{Arrived, Lane};
use super::watch::{Dirty, Unwatched};
use super::{FlushError, WorkspaceConfig};
use crate::root_dir::DirIdentity;
use attach::{AttachError, Attached, attach, check_root};

/// How long it has to be quiet before changes are looked at, so that one look sees a whole save.
const QUIET: Duration = Duration::from_millis(50);
/// The longest a change waits for quiet.
const LONGEST_WAIT: Duration = Duration::from_secs(1);
/// Everything is looked at this often, whatever the hints say.
const FULL_SCAN: Duration = Duration::from_secs(600);
/// The same where not every directory can be watched.
const POLL: Duration = Duration::from_secs(30);
/// How often a halted workspace looks whether its root is back.
const HALTED_RETRY: Duration = Duration::from_secs(2);
/// When paths that could not be synced are tried again.
const PROBLEM_RETRY: Duration = Duration::from_secs(30);
/// First and longest wait before a file that is being written is looked at again.
const UNSTABLE_RETRY: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(30));
/// How long after files were displaced it is looked whether somebody still writes to them, besides
/// each look at everything.
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
}

pub(super) struct Engine<H> {
    pub(super) config: WorkspaceConfig,
    pub(super) hub: H,
    /// Another line to the same hub.
    pub(super) large: Arc<H>,
    pub(super) scope: TaskScope,
    pub(super) online: watch::Receiver<bool>,
    pub(super) head: watch::Receiver<u64>,
    pub(super) commands: mpsc::Receiver<Command>,
    pub(super) cancel: CancellationToken,
    pub(super) progress: Arc<Progress>,
}

/// What the engine holds while it works in a root.
struct Work {
    core: CoreCell,
    identity: DirIdentity,
    dirty: Arc<Dirty>,
    problems: Problems,
    /// How far the hub is known; `None` before the first contact of this run.
    cursor: Option<Cursor>,
    /// Remote may be behind the hub.
    outdated: bool,
    /// The hub said that its history is another one, and no pass has succeeded since.
    asked_anew: bool,
    acknowledged_seq: Option<u64>,
    next_full_scan: Instant,
    limited: bool,
    /// Directories to look at again, and when.
    revisits: Vec<(Instant, Scope)>,
    /// When to look for late writes in the trash.
    trash_looks: Vec<Instant>,
    /// Where a scan failed.
    unseen: Vec<Scope>,
    /// Files that are being written, and how long each is left alone after the last attempt.
    hot: HashMap<WirePath, (HotFile, Duration)>,
    hub_backoff: Backoff,
    retry_at: Option<Instant>,
    /// When to look again at paths with problems. Only wakes up: everything else goes on meanwhile.
    problem_retry_at: Option<Instant>,
    /// Chunks that the hub had lost and that were looked for here since the last look at everything.
    supplied: Vec<Digest>,
    /// Content of large files on its way to the hub; the paths of files that have changed meanwhile.
    upload: Lane<HashSet<WirePath>>,
    download: Lane<Arrived>,
    /// What the last download has brought, until a pass has taken it over.
    arrived: Option<Arrived>,
    /// One of the two has ended.
    transferred: Arc<Notify>,
    flushes: Vec<Flush>,
    /// Deletions that were sent lately.
    deletions: hold::Sent,
    /// How many wait for somebody's word.
    held: usize,
    deletions_confirmed: bool,
}

/// Somebody who waits until what was written before he asked is at the hub.
struct Flush {
    answer: oneshot::Sender<Result<(), FlushError>>,
    /// Everything has been looked at since.
    looked: bool,
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
        while !self.cancel.is_cancelled() {
            let dirty = Arc::new(Dirty::default());
            let reason = match self.attach(dirty.clone()).await {
                Ok(Attached { core, identity }) => {
                    let mut work = Work::new(CoreCell::new(core), identity, dirty);
                    let end = self.work(&mut work).await;
                    work.end_transfers().await;
                    for flush in work.flushes.drain(..) {
                        flush.answer.send(Err(FlushError::Stopped)).ok();
                    }
                    match end {
                        End::Stopped => return,
                        End::Halted(reason) => reason,
                        End::Again => continue,
                    }
                }
                Err(reason) => reason,
            };
            self.halted(reason).await;
        }
    }

    async fn attach(&self, dirty: Arc<Dirty>) -> Result<Attached, String> {
        let config = self.config.clone();
        tokio::task::spawn_blocking(move || attach(&config, dirty))
            .await
            .map_err(|error| error.to_string())?
            .map_err(|error| error.to_string())
    }

    /// Tells why nothing is done, and waits a while.
    async fn halted(&mut self, reason: String) {
        tracing::error!(workspace = %self.config.name, reason, "sync halted");
        self.progress.update(|status| {
            status.state = SyncState::Halted;
            status.halted_reason.clone_from(&reason);
        });
        let retry = tokio::time::sleep(HALTED_RETRY);
        tokio::pin!(retry);
        loop {
            tokio::select! {
                () = self.cancel.cancelled() => return,
                () = &mut retry => return,
                Some(command) = self.commands.recv() => {
                    if let Command::Flush(answer) = command {
                        answer.send(Err(FlushError::Halted { reason: reason.clone() })).ok();
                    }
                }
            }
        }
    }

    async fn work(&mut self, work: &mut Work) -> End {
        self.progress.update(|status| status.halted_reason.clear());
        work.dirty.add(Scope::Tree(None));
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
                if !self.settle(&work.dirty.clone()).await {
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
        let finding = Finding { path: None, code: "sync_failed", message: error.to_string() };
        work.problems.replace(Stage::Push, |_| true, vec![finding]);
        let problems = work.problems.list();
        self.progress.update(|status| status.problems = problems);
        work.outdated = true;
        let retry_at = Instant::now() + work.hub_backoff.next_delay();
        work.retry_at = Some(retry_at);
        work.revisits.extend(work.unseen.drain(..).map(|scope| (retry_at, scope)));
        None
    }

    async fn round(&mut self, work: &mut Work) -> Result<Round, RoundError> {
        self.check_root(work.identity).await?;
        self.look(work).await?;
        let problems = work.problems.list();
        self.progress.update(|status| status.problems = problems);
        let now = Instant::now();
        // A time that has come must not wake up again and again while there is no hub.
        work.problem_retry_at = None;
        work.retry_at = work.retry_at.filter(|at| *at > now);
        if !*self.online.borrow_and_update() || work.retry_at.is_some() {
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
        let config = self.config.clone();
        tokio::task::spawn_blocking(move || check_root(&config, identity))
            .await
            .map_err(|_| SyncError::Panicked)??;
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
        let everything = scopes.contains(&Scope::Tree(None));
        let mut scopes = scopes.into_iter();
        while let Some(scope) = scopes.next() {
            if let Err(error) = self.look_at(work, &scope).await {
                // Nobody else remembers that there is something to be seen.
                work.unseen.push(scope);
                work.unseen.extend(scopes);
                return Err(error);
            }
        }
        if everything {
            let pause = if work.limited { POLL } else { FULL_SCAN };
            work.next_full_scan = Instant::now() + pause;
            work.supplied.clear();
            work.flushes.iter_mut().for_each(|flush| flush.looked = true);
            work.core.run(|core| core.private.empty_trash()).await?;
        }
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

    async fn look_at(&mut self, work: &mut Work, scope: &Scope) -> Result<(), SyncError> {
        let cancel = self.cancel.clone();
        let scanned = scope.clone();
        let begun = std::time::Instant::now();
        let hot: HashMap<_, _> =
            work.hot.iter().map(|(path, (hot, _))| (path.clone(), *hot)).collect();
        let (report, entries, limited) = work
            .core
            .run(move |core| {
                let mut report = Report::default();
                // A file that was moved here is seen with its directory.
                let is_file = matches!(&scanned, Scope::Tree(Some(path))
                        if core.root.open_dir(Some(path)).is_err());
                if !is_file {
                    let mut unwatched = Unwatched;
                    let directories: &mut dyn Directories = match &mut core.watch {
                        Some(watch) => {
                            if scanned == Scope::Tree(None) {
                                watch.forget();
                            }
                            watch
                        }
                        None => &mut unwatched,
                    };
                    let scanner = Scanner {
                        root: &core.root,
                        index: &mut core.index,
                        ignore: &core.ignore,
                        clock: core.private.clock()?,
                        hot: &hot,
                        directories,
                        cancel: &cancel,
                    };
                    report = scanner.scan(&scanned)?;
                }
                let limited = core.watch.as_ref().is_none_or(|watch| watch.limited);
                Ok::<_, SyncError>((report, core.index.counts().local, limited))
            })
            .await?;
        if report.cancelled {
            return Err(SyncError::Cancelled);
        }
        work.limited = limited;
        work.seen(scope, begun, report);
        self.progress.update(|status| status.entries = entries);
        Ok(())
    }

    /// Waits for a reason to go round again; false if that is to stop.
    async fn wait(&mut self, work: &mut Work) -> bool {
        let due = work.next_due();
        tokio::select! {
            () = self.cancel.cancelled() => return false,
            () = work.dirty.changed() => return self.settle(&work.dirty.clone()).await,
            seq = next_value(&mut self.head) => {
                work.head_moved(seq);
            }
            online = next_value(&mut self.online) => {
                if online {
                    work.outdated = true;
                    work.retry_at = None;
                }
            }
            Some(command) = self.commands.recv() => work.obey(command),
            () = work.transferred.notified() => {}
            () = tokio::time::sleep_until(due) => work.collect_due(),
        }
        true
    }

    /// Takes what is asked and told without waiting for it: where something is written all the time,
    /// there is no time to wait.
    fn hear(&mut self, work: &mut Work) {
        if self.head.has_changed().unwrap_or(false) {
            work.head_moved(*self.head.borrow_and_update());
        }
        while let Ok(command) = self.commands.try_recv() {
            work.obey(command);
        }
    }

    /// Waits until nothing changes for a moment, but not for ever.
    async fn settle(&self, dirty: &Dirty) -> bool {
        let end = Instant::now() + LONGEST_WAIT;
        loop {
            let quiet = (Instant::now() + QUIET).min(end);
            tokio::select! {
                () = self.cancel.cancelled() => return false,
                () = tokio::time::sleep_until(quiet) => return true,
                () = dirty.changed() => {}
            }
        }
    }
}

/// The next value; never if there is nobody left to send one.
async fn next_value<T: Copy>(receiver: &mut watch::Receiver<T>) -> T {
    if receiver.changed().await.is_err() {
        std::future::pending::<()>().await;
    }
    *receiver.borrow_and_update()
}

impl Work {
    fn new(core: CoreCell, identity: DirIdentity, dirty: Arc<Dirty>) -> Self {
        let transferred = Arc::new(Notify::new());
        Self {
            upload: Lane::new(transferred.clone()),
            download: Lane::new(transferred.clone()),
            arrived: None,
            transferred,
            core,
            identity,
            dirty,
            problems: Problems::default(),
            cursor: None,
            outdated: true,
            asked_anew: false,
            acknowledged_seq: None,
            next_full_scan: Instant::now() + FULL_SCAN,
            limited: false,
            revisits: Vec::new(),
            trash_looks: Vec::new(),
            unseen: Vec::new(),
            hot: HashMap::new(),
            hub_backoff: Backoff::new(HUB_RETRY.0, HUB_RETRY.1),
            retry_at: None,
            problem_retry_at: None,
            supplied: Vec::new(),
            flushes: Vec::new(),
            deletions: hold::Sent::default(),
            held: 0,
            deletions_confirmed: false,
        }
    }

    fn head_moved(&mut self, seq: u64) {
        // A hub that was put back from a backup counts from a lower number.
        self.outdated |= self.cursor.is_none_or(|cursor| seq != cursor.seq);
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Flush(answer) => {
                self.flushes.push(Flush { answer, looked: false });
                // Whoever asks has finished writing.
                let now = std::time::Instant::now();
                self.hot.values_mut().for_each(|(hot, _)| hot.until = now);
                self.dirty.add(Scope::Tree(None));
                self.outdated = true;
                self.retry_at = None;
            }
            Command::ConfirmDeletions => self.deletions_confirmed = self.held > 0,
        }
    }

    fn is_transferring(&self) -> bool {
        self.upload.is_busy() || self.download.is_busy()
    }

    /// Ends what runs beside; returns once none of it touches the directory any more.
    async fn end_transfers(&mut self) {
        self.upload.end().await;
        let left = [self.download.end().await, self.arrived.take()];
        let clean = move || left.into_iter().flatten().for_each(|arrived| arrived.clean());
        if let Err(error) = tokio::task::spawn_blocking(clean).await {
            tracing::error!(%error, "the stage cannot be cleaned; the next start does");
        }
    }

    /// Takes over what a scan found besides the index.
    fn seen(&mut self, scope: &Scope, begun: std::time::Instant, report: Report) {
        let covered = |path: Option<&WirePath>| match path {
            Some(path) => scope.covers(path),
            None => *scope == Scope::Tree(None),
        };
        let mut findings = report.findings;
        if self.limited && *scope == Scope::Tree(None) {
            let message = "not every directory can be watched: raise fs.inotify.max_user_watches; \
                           changes are looked for every 30 s meanwhile";
            findings.push(Finding { path: None, code: "watch_limit", message: message.to_owned() });
        }
        let now = Instant::now();
        // What was looked at and did not change meanwhile is hot no more.
        self.hot.retain(|path, (hot, _)| {
            !scope.covers(path) || hot.until > begun || report.unstable.contains(path)
        });
        for path in report.unstable {
            let parent = path.parent();
            let first = (HotFile { until: begun, prefix: false }, UNSTABLE_RETRY.0 / 2);
            let (hot, delay) = self.hot.entry(path).or_insert(first);
            *delay = (*delay * 2).min(UNSTABLE_RETRY.1);
            *hot = HotFile {
                until: std::time::Instant::now() + *delay,
                prefix: *delay == UNSTABLE_RETRY.1,
            };
            self.revisits.push((now + *delay, Scope::Children(parent)));
        }
        for (path, _) in self
            .hot
            .iter()
            .filter(|(path, (_, delay))| *delay >= UNSTABLE_TOLD && scope.covers(path))
        {
            let text = "it is being written all the time; it is read again within half a minute";
            findings.push(Finding::at(path, "changing", text));
        }
        self.problems.replace(Stage::Scan, covered, findings);
        for scope in report.racy {
            self.revisits.push((now + QUIET * 2, scope));
        }
    }

    fn next_due(&self) -> Instant {
        let revisit = self.revisits.iter().map(|(at, _)| *at).min();
        let trash = self.trash_looks.iter().copied().min();
        [Some(self.next_full_scan), self.retry_at, self.problem_retry_at, revisit, trash]
            .into_iter()
            .flatten()
            .min()
            .unwrap_or(self.next_full_scan)
    }

    fn collect_due(&mut self) {
        let now = Instant::now();
        if self.next_full_scan <= now {
            self.dirty.add(Scope::Tree(None));
            // Hints of the hub can be lost as well.
            self.outdated = true;
        }
        let (due, later) = self.revisits.drain(..).partition(|(at, _)| *at <= now);
        self.revisits = later;
        let due: Vec<(Instant, Scope)> = due;
        for (_, scope) in due {
            self.dirty.add(scope);
        }
    }

    /// Tells those who wait that what they wait for is done. What is on its way belongs to it.
    fn flushed(&mut self) {
        if self.is_transferring() {
            return;
        }
        for flush in self.flushes.extract_if(.., |flush| flush.looked) {
            flush.answer.send(Ok(())).ok();
        }
    }

    /// Tells those who wait that it cannot be done now.
    fn answer_flushes(&mut self, round: &Result<Round, RoundError>) {
        let error = match round {
            Ok(Round::Offline) => FlushError::Offline,
            Ok(_) => return,
            Err(error) => FlushError::Failed { message: error.to_string() },
        };
        for flush in self.flushes.drain(..) {
            flush.answer.send(Err(error.clone())).ok();
        }
    }
}
