//! The state of a workspace as the protocol writes it.

use std::os::unix::ffi::OsStrExt as _;

use bytes::Bytes;
use cortex_proto::v1;

use crate::sync::problem::Problem;
use crate::sync::status::{SyncState, SyncStatus};

/// Problems of one workspace that are reported. The link carries small frames only, and who has
/// more than these problems will not read the others before these are solved.
const MAX_PROBLEMS: usize = 20;
/// Characters of one problem's text.
const MAX_MESSAGE_CHARS: usize = 500;

pub(super) fn sync_status(status: &SyncStatus) -> v1::SyncStatus {
    let state = match status.state {
        SyncState::Idle => v1::SyncState::Idle,
        SyncState::Scanning => v1::SyncState::Scanning,
        SyncState::Uploading => v1::SyncState::Uploading,
        SyncState::Downloading => v1::SyncState::Downloading,
        SyncState::Applying => v1::SyncState::Applying,
        SyncState::Offline => v1::SyncState::Offline,
        SyncState::Paused => v1::SyncState::Paused,
        SyncState::Halted => v1::SyncState::Halted,
    };
    v1::SyncStatus {
        workspace_id: status.workspace_id.as_bytes().to_vec().into(),
        workspace: status.workspace.clone(),
        state: state.into(),
        applied_seq: status.applied_seq,
        head_seq: status.head_seq,
        files_done: status.files_done,
        files_total: status.files_total,
        bytes_done: status.bytes_done,
        bytes_total: status.bytes_total,
        entries: status.entries,
        problems: status.problems.iter().take(MAX_PROBLEMS).map(sync_problem).collect(),
        root_path: Bytes::copy_from_slice(status.root_path.as_os_str().as_bytes()),
        halted_reason: status.halted_reason.clone(),
        conflicts: status.conflicts,
        pending_push: status.pending_push,
    }
}

fn sync_problem(problem: &Problem) -> v1::SyncProblem {
    v1::SyncProblem {
        path: problem
            .path
            .as_ref()
            .map_or_else(Bytes::new, |path| Bytes::copy_from_slice(path.as_bytes())),
        code: problem.code.to_owned(),
        message: problem.message.chars().take(MAX_MESSAGE_CHARS).collect(),
        first_seen_ms: problem.first_seen_ms,
    }
}
