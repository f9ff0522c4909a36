//! What a workspace is doing, for everyone who wants to know.

use std::path::PathBuf;

use cortex_shared::ids::WorkspaceId;
use tokio::sync::watch;

use super::problem::Problem;

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
    /// Conflict copies made here since the start.
    pub conflicts: u64,
    /// Local changes that the hub has not committed yet.
    pub pending_push: u64,
    /// Those of them that are deletions which wait for somebody's word because they are so many.
    pub held_deletions: u64,
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
