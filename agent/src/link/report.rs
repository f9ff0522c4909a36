//! The state of a workspace as the protocol writes it.

use std::os::unix::ffi::OsStrExt as _;

use bytes::Bytes;
use cortex_proto::v1;

use crate::sync::Explanation;
use crate::sync::mode::MemberMode;
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
        held_deletions: status.held_deletions,
        mode: mode_to_wire(status.mode).into(),
        kept: status.kept,
        withheld: status.withheld,
        bytes_per_second: status.bytes_per_second,
        eta_ms: status.eta.map_or(0, |eta| u64::try_from(eta.as_millis()).unwrap_or(u64::MAX)),
        next_retry_ms: status.next_retry_ms,
    }
}

pub(crate) fn mode_to_wire(mode: MemberMode) -> v1::MemberMode {
    match mode {
        MemberMode::TwoWay => v1::MemberMode::TwoWay,
        MemberMode::SendOnly => v1::MemberMode::SendOnly,
        MemberMode::ReceiveOnly => v1::MemberMode::ReceiveOnly,
        MemberMode::Mirror => v1::MemberMode::Mirror,
    }
}

/// `None` for one that was not given, or that is not known here.
pub(crate) fn mode_from_wire(mode: i32) -> Option<MemberMode> {
    match v1::MemberMode::try_from(mode).ok()? {
        v1::MemberMode::TwoWay => Some(MemberMode::TwoWay),
        v1::MemberMode::SendOnly => Some(MemberMode::SendOnly),
        v1::MemberMode::ReceiveOnly => Some(MemberMode::ReceiveOnly),
        v1::MemberMode::Mirror => Some(MemberMode::Mirror),
        v1::MemberMode::Unspecified => None,
    }
}

pub(crate) fn explanation(found: &Explanation) -> v1::ExplainLocalResponse {
    v1::ExplainLocalResponse {
        code: found.code.to_owned(),
        text: found.text.clone(),
        details: found.details.clone(),
        here: found.here.clone(),
        hub: found.hub.clone(),
        agreed: found.agreed.clone(),
        problems: found.problems.iter().take(MAX_PROBLEMS).map(sync_problem).collect(),
    }
}

fn sync_problem(problem: &Problem) -> v1::SyncProblem {
    v1::SyncProblem {
        path: problem
            .path
            .as_ref()
            .map_or_else(Bytes::new, |path| Bytes::copy_from_slice(path.as_bytes())),
        code: problem.code.as_str().to_owned(),
        message: problem.message.chars().take(MAX_MESSAGE_CHARS).collect(),
        first_seen_ms: problem.first_seen_ms,
    }
}
