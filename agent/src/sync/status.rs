//! What a workspace is doing, for everyone who wants to know.

use std::path::PathBuf;
use std::time::Duration;

use cortex_shared::ids::WorkspaceId;
use tokio::sync::watch;

use super::mode::MemberMode;
use super::problem::Problem;

/// How often the rate is measured.
const RATE_PERIOD: Duration = Duration::from_secs(1);

/// What the engine is doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SyncState {
    /// Everything is equal, as far as is known.
    Idle,
    /// Reading the tree here.
    #[default]
    Scanning,
    /// Sending to the hub.
    Uploading,
    /// Learning what changed at the hub.
    Downloading,
    /// Fetching content and changing the tree here.
    Applying,
    /// The hub cannot be reached; changes here are noticed and kept for later.
    Offline,
    /// Stopped by its owner.
    Paused,
    /// Stopped by itself: see [`SyncStatus::halted_reason`].
    Halted,
}

/// Progress and condition of one workspace on this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SyncStatus {
    /// Which workspace.
    pub workspace_id: WorkspaceId,
    /// Its name.
    pub workspace: String,
    /// What the engine is doing.
    pub state: SyncState,
    /// The version that is applied here completely and durably.
    pub applied_seq: u64,
    /// The newest version known.
    pub head_seq: u64,
    /// Paths done of the current plan.
    pub files_done: u64,
    /// Paths of the current plan.
    pub files_total: u64,
    /// Bytes of content fetched for the current plan.
    pub bytes_done: u64,
    /// Bytes of content of the current plan.
    pub bytes_total: u64,
    /// Files and links here.
    pub entries: u64,
    /// What stands in the way.
    pub problems: Vec<Problem>,
    /// The root directory.
    pub root_path: PathBuf,
    /// Why it halted, with the remedy; empty otherwise.
    pub halted_reason: String,
    /// Conflict copies that lie here; who has dealt with one deletes it.
    pub conflicts: u64,
    /// Local changes that the hub has not committed yet.
    pub pending_push: u64,
    /// Those of them that are deletions which wait for somebody's word because they are so many.
    pub held_deletions: u64,
    /// What this member does with its own changes and those of others.
    pub mode: MemberMode,
    /// Directories that are gone on one side and stay on the other, for what is left out in them.
    pub kept: u64,
    /// Paths that stay different because of the mode.
    pub withheld: u64,
    /// Bytes moved in the last second, in both directions.
    pub bytes_per_second: u64,
    /// How long the current plan takes at this rate, if that can be told.
    pub eta: Option<Duration>,
    /// When what failed is tried again, milliseconds since the Unix epoch; 0 if nothing waits.
    pub next_retry_ms: i64,
}

impl SyncStatus {
    /// Everything that changes when something is done.
    pub(super) fn progress(&self) -> (SyncState, [u64; 6]) {
        let Self { applied_seq, head_seq, files_done, bytes_done, entries, pending_push, .. } =
            *self;
        (self.state, [applied_seq, head_seq, files_done, bytes_done, entries, pending_push])
    }

    /// Whether nothing is under way, nor will be before something else happens.
    pub(crate) fn is_at_rest(&self) -> bool {
        match self.state {
            SyncState::Idle => self.applied_seq == self.head_seq,
            SyncState::Offline | SyncState::Paused | SyncState::Halted => true,
            _ => false,
        }
    }

    /// Whether content is being moved.
    fn is_moving(&self) -> bool {
        use SyncState::{Applying, Downloading, Uploading};
        matches!(self.state, Uploading | Downloading | Applying)
    }
}

/// Where the engine reports.
#[derive(Debug)]
pub struct Progress(watch::Sender<SyncStatus>);

impl Progress {
    pub(super) fn new(workspace_id: WorkspaceId, workspace: String, root_path: PathBuf) -> Self {
        Self(watch::Sender::new(SyncStatus {
            workspace_id,
            workspace,
            state: SyncState::default(),
            applied_seq: 0,
            head_seq: 0,
            files_done: 0,
            files_total: 0,
            bytes_done: 0,
            bytes_total: 0,
            entries: 0,
            problems: Vec::new(),
            root_path,
            halted_reason: String::new(),
            conflicts: 0,
            pending_push: 0,
            held_deletions: 0,
            mode: MemberMode::default(),
            kept: 0,
            withheld: 0,
            bytes_per_second: 0,
            eta: None,
            next_retry_ms: 0,
        }))
    }

    pub(super) fn subscribe(&self) -> watch::Receiver<SyncStatus> {
        self.0.subscribe()
    }

    /// Changes the status; those who watch are woken only if it is another one then.
    pub(super) fn update(&self, change: impl FnOnce(&mut SyncStatus)) {
        self.0.send_if_modified(|status| {
            let before = status.clone();
            change(status);
            *status != before
        });
    }

    /// Measures the rate while something is being moved; `moved` counts bytes. Never ends.
    pub(super) async fn measure(&self, moved: impl Fn() -> u64) {
        let mut status = self.subscribe();
        while status.wait_for(SyncStatus::is_moving).await.is_ok() {
            let (begun, before) = (tokio::time::Instant::now(), moved());
            tokio::time::sleep(RATE_PERIOD).await;
            let millis = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX).max(1);
            let rate = moved().saturating_sub(before).saturating_mul(1000) / millis;
            self.update(|status| {
                let moving = status.is_moving();
                let left = status.bytes_total.saturating_sub(status.bytes_done);
                status.bytes_per_second = if moving { rate } else { 0 };
                status.eta = (moving && rate > 0 && left > 0)
                    .then(|| Duration::from_secs(left.div_ceil(rate)));
            });
        }
    }

    pub(super) fn state(&self, state: SyncState) {
        self.update(|status| status.state = state);
    }

    pub(super) fn head(&self, seq: u64) {
        self.update(|status| status.head_seq = status.head_seq.max(seq));
    }

    pub(super) fn plan(&self, files: u64, bytes: u64) {
        self.update(|status| {
            (status.files_done, status.files_total) = (0, files);
            (status.bytes_done, status.bytes_total) = (0, bytes);
        });
    }

    pub(super) fn pushed(&self, operations: usize) {
        self.update(|status| {
            status.files_done += operations as u64;
            status.pending_push = status.pending_push.saturating_sub(operations as u64);
        });
    }

    pub(super) fn applied(&self, changes: usize) {
        self.update(|status| status.files_done += changes as u64);
    }

    pub(super) fn fetched(&self, bytes: u64) {
        self.update(|status| status.bytes_done += bytes);
    }
}
