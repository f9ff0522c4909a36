//! What the engine of a workspace knows and has to do, and when.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use cortex_shared::backoff::Backoff;
use cortex_shared::entry::Digest;
use cortex_shared::wire_path::WirePath;
use tokio::sync::{Notify, oneshot};
use tokio::time::Instant;

use super::hold;
use super::looks::Looks;
use super::{
    Command, HUB_RETRY, LATE_WRITES, QUIET, Round, RoundError, UNSTABLE_RETRY, UNSTABLE_TOLD,
};
use crate::library::Ticket;
use crate::root_dir::DirIdentity;
use crate::sync::FlushError;
use crate::sync::core::CoreCell;
use crate::sync::index::Cursor;
use crate::sync::problem::{Code, Finding, Problems, Stage};
use crate::sync::scan::{HotFile, Report, Scope};
use crate::sync::transfer::{Arrived, Lane};
use crate::sync::watch::Dirty;

/// After so long without asking, the hub is asked for news with the next look at everything: hints of the hub can
/// be lost as well. Who looks every few seconds does not ask as often: they tell nothing of the tree here.
const ASK: Duration = Duration::from_secs(300);

/// What the engine holds while it works in a root.
pub(super) struct Work {
    pub(super) core: CoreCell,
    pub(super) identity: DirIdentity,
    pub(super) dirty: Arc<Dirty>,
    pub(super) problems: Problems,
    /// How far the hub is known; `None` before the first contact of this run.
    pub(super) cursor: Option<Cursor>,
    /// Remote may be behind the hub.
    pub(super) outdated: bool,
    /// When the hub was asked for news last.
    pub(super) asked_at: Instant,
    /// The hub said that its history is another one, and no pass has succeeded since.
    pub(super) asked_anew: bool,
    pub(super) acknowledged_seq: Option<u64>,
    pub(super) looks: Looks,
    /// Directories to look at again, and when.
    pub(super) revisits: Vec<(Instant, Scope)>,
    /// When to look for late writes in the trash.
    pub(super) trash_looks: Vec<Instant>,
    /// Where a scan failed.
    pub(super) unseen: Vec<Scope>,
    /// Files that are being written, and how long each is left alone after the last attempt.
    pub(super) hot: HashMap<WirePath, (HotFile, Duration)>,
    pub(super) hub_backoff: Backoff,
    pub(super) retry_at: Option<Instant>,
    /// When to look again at paths with problems. Only wakes up: everything else goes on meanwhile.
    pub(super) problem_retry_at: Option<Instant>,
    /// Chunks that the hub had lost and that were looked for here since the last look at everything.
    pub(super) supplied: Vec<Digest>,
    /// Content of large files on its way to the hub; the paths of files that have changed meanwhile.
    pub(super) upload: Lane<HashSet<WirePath>>,
    pub(super) download: Lane<Arrived>,
    /// The hub had no room for the content of large files, in its words, and until when it is not asked again.
    pub(super) full_for_large: Option<(Instant, String)>,
    /// What the last download has brought, until a pass has taken it over.
    pub(super) arrived: Option<Arrived>,
    /// One of the two has ended.
    pub(super) transferred: Arc<Notify>,
    pub(super) flushes: Vec<Flush>,
    /// Something waits for the commands that run here to end.
    pub(super) occupied: bool,
    /// Deletions that were sent lately.
    pub(super) deletions: hold::Sent,
    /// Directories in whose place a link to a skill is to be put, and since when.
    pub(super) awaited_skills: BTreeMap<WirePath, Ticket>,
    /// How many wait for somebody's word.
    pub(super) held: usize,
    pub(super) deletions_confirmed: bool,
    /// The hub refuses deletions because they are so many: until then it is not asked again.
    pub(super) refused_until: Option<Instant>,
    /// When changes were looked at last.
    pub(super) settled_at: Option<Instant>,
    /// There may be another number of conflict copies than before.
    pub(super) count_conflicts: bool,
}

/// Somebody who waits until what was written before he asked is at the hub.
pub(super) struct Flush {
    pub(super) answer: oneshot::Sender<Result<(), FlushError>>,
    /// Everything has been looked at since.
    pub(super) looked: bool,
}

impl Work {
    pub(super) fn new(core: CoreCell, identity: DirIdentity, dirty: Arc<Dirty>) -> Self {
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
            asked_at: Instant::now(),
            asked_anew: false,
            acknowledged_seq: None,
            looks: Looks::new(Instant::now()),
            revisits: Vec::new(),
            // Somebody may have gone on writing while nobody looked, and may do so now.
            trash_looks: LATE_WRITES.map(|delay| Instant::now() + delay).to_vec(),
            unseen: Vec::new(),
            hot: HashMap::new(),
            hub_backoff: Backoff::new(HUB_RETRY.0, HUB_RETRY.1),
            retry_at: None,
            problem_retry_at: None,
            supplied: Vec::new(),
            full_for_large: None,
            flushes: Vec::new(),
            occupied: false,
            deletions: hold::Sent::default(),
            awaited_skills: BTreeMap::new(),
            held: 0,
            deletions_confirmed: false,
            refused_until: None,
            settled_at: None,
            count_conflicts: true,
        }
    }

    pub(super) fn head_moved(&mut self, seq: u64) {
        // A hub that was put back from a backup counts from a lower number.
        self.outdated |= self.cursor.is_none_or(|cursor| seq != cursor.seq);
    }

    /// Whoever comes back has missed what was told meanwhile.
    pub(super) fn line_changed(&mut self, online: bool) {
        if online {
            self.outdated = true;
            self.retry_at = None;
        }
    }

    pub(super) fn obey(&mut self, command: Command) {
        match command {
            Command::Flush(answer) => {
                self.flushes.push(Flush { answer, looked: false });
                // Whoever asks has finished writing.
                let now = Instant::now();
                self.hot.values_mut().for_each(|(hot, _)| hot.until = now);
                self.dirty.add_everything();
                self.outdated = true;
                self.full_for_large = None;
                self.retry_at = None;
            }
            Command::ConfirmDeletions => self.confirm_deletions(),
            // Whatever wakes it makes it plan.
            Command::PlanAgain => {}
        }
    }

    /// Somebody lets the deletions go that are held.
    pub(super) fn confirm_deletions(&mut self) {
        if self.held > 0 {
            (self.deletions_confirmed, self.refused_until) = (true, None);
        }
    }

    pub(super) fn is_transferring(&self) -> bool {
        self.upload.is_busy() || self.download.is_busy()
    }

    /// Ends what runs beside; returns once none of it touches the directory any more.
    pub(super) async fn end_transfers(&mut self) {
        self.upload.end().await;
        let left = [self.download.end().await, self.arrived.take()];
        let clean = move || left.into_iter().flatten().for_each(|arrived| arrived.clean());
        if let Err(error) = self.core.blocking().run(clean).await {
            tracing::error!(%error, "the stage cannot be cleaned; the next start does");
        }
    }

    /// Takes over what a scan found besides the index.
    pub(super) fn seen(&mut self, scope: &Scope, begun: Instant, report: Report) {
        let covered = |path: Option<&WirePath>| match path {
            Some(path) => scope.covers(path),
            None => *scope == Scope::Tree(None),
        };
        let mut findings = report.findings;
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
            *hot = HotFile { until: Instant::now() + *delay, prefix: *delay == UNSTABLE_RETRY.1 };
            self.revisits.push((now + *delay, Scope::Children(parent)));
        }
        for (path, _) in self
            .hot
            .iter()
            .filter(|(path, (_, delay))| *delay >= UNSTABLE_TOLD && scope.covers(path))
        {
            let text = "it is being written all the time; it is read again within half a minute";
            findings.push(Finding::at(path, Code::Changing, text));
        }
        self.problems.replace(Stage::Scan, covered, findings);
        for scope in report.racy {
            self.revisits.push((now + QUIET * 2, scope));
        }
    }

    /// Takes over whether the kernel tells of changes everywhere.
    pub(super) fn watched(&mut self, limited: bool) {
        let pause = self.looks.watched(limited, Instant::now());
        let finding = pause.map(|pause| {
            let message = format!(
                "not every directory can be watched: raise fs.inotify.max_user_watches (or \
                 max_user_instances); changes are looked for every {} s meanwhile",
                pause.as_secs()
            );
            Finding { path: None, code: Code::WatchLimit, message }
        });
        self.problems.replace(Stage::Watch, |_| true, finding.into_iter().collect());
    }

    pub(super) fn next_due(&self) -> Instant {
        let revisit = self.revisits.iter().map(|(at, _)| *at).min();
        let trash = self.trash_looks.iter().copied().min();
        [Some(self.looks.next()), self.retry_at, self.problem_retry_at, revisit, trash]
            .into_iter()
            .flatten()
            .min()
            .unwrap_or(self.looks.next())
    }

    pub(super) fn collect_due(&mut self) {
        let now = Instant::now();
        if self.looks.next() <= now {
            self.dirty.add(Scope::Tree(None));
            self.outdated |= now.saturating_duration_since(self.asked_at) >= ASK;
        }
        let (due, later) = self.revisits.drain(..).partition(|(at, _)| *at <= now);
        self.revisits = later;
        let due: Vec<(Instant, Scope)> = due;
        for (_, scope) in due {
            self.dirty.add(scope);
        }
    }

    /// Tells those who wait that what they wait for is done. What is on its way belongs to it.
    pub(super) fn flushed(&mut self) {
        if self.is_transferring() {
            return;
        }
        for flush in self.flushes.extract_if(.., |flush| flush.looked) {
            flush.answer.send(Ok(())).ok();
        }
    }

    /// Tells those who wait that it cannot be done now.
    pub(super) fn answer_flushes(&mut self, round: &Result<Round, RoundError>) {
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
