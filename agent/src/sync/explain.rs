//! Why a path is, or is not, the same here and at the hub.
//!
//! Reads the index beside the engine and the file system itself, so that it answers at once whatever
//! the engine is waiting for.

use cortex_shared::entry::{Entry, same};
use cortex_shared::wire_path::WirePath;

use super::WorkspaceConfig;
use super::ignore::Ignore;
use super::index::{Index, IndexError, IndexRow, Stamp};
use super::mode::MemberMode;
use super::plan::{conflict_of, leaves_workspace};
use super::problem::Problem;
use super::status::{SyncState, SyncStatus};
use crate::root_dir::{FileKind, Meta, RootDir};

/// What is known of a path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Explanation {
    /// Stable code for programs: `synced`, `to_send`, `to_apply`, `conflict`, `held`, `ignored`,
    /// `unknown`, `changed`, `withheld`, `link_outside`, `not_here`.
    pub code: &'static str,
    /// The answer in one sentence.
    pub text: String,
    /// What else people may want to know.
    pub details: Vec<String>,
    /// What stands here, at the hub, and what both agreed on last; empty for nothing.
    pub here: String,
    /// See `here`.
    pub hub: String,
    /// See `here`.
    pub agreed: String,
    /// What stands in the way of it, of something above it, or of the workspace as a whole.
    pub problems: Vec<Problem>,
}

/// Why nothing can be said.
#[derive(Debug, thiserror::Error)]
pub enum ExplainError {
    /// The index cannot be read.
    #[error("the index cannot be read")]
    Index(#[from] IndexError),
    /// The root cannot be read.
    #[error("the root directory cannot be read")]
    Root(#[source] std::io::Error),
}

pub(super) fn explain(
    config: &WorkspaceConfig,
    status: &SyncStatus,
    path: &WirePath,
) -> Result<Explanation, ExplainError> {
    let root = RootDir::open(&config.root).map_err(ExplainError::Root)?;
    let found = match Index::open_for_reading(&config.state_folder())? {
        Some(index) => index.get(path)?,
        None => None,
    };
    let meta = root.parent_of(path).and_then(|(parent, leaf)| parent.lstat(leaf)).ok();
    let ignore = Ignore::load(&root).map_err(ExplainError::Root)?;
    let is_dir = meta.is_some_and(|meta| meta.kind == FileKind::Dir);
    let rule = ignore.why(path, is_dir);
    let (code, text) = verdict(status, path, found.as_ref(), meta.as_ref(), rule);
    let row = found.as_ref().map(|found| &found.row);
    let concerns =
        |problem: &&Problem| problem.path.as_ref().is_none_or(|of| of == path || path.is_below(of));
    Ok(Explanation {
        code,
        text,
        details: details(config, status, path, found.as_ref()),
        here: show(row.and_then(|row| row.local.as_ref())),
        hub: show(row.and_then(|row| row.remote.as_ref())),
        agreed: show(row.and_then(|row| row.base.as_ref())),
        problems: status.problems.iter().filter(concerns).cloned().collect(),
    })
}

fn verdict(
    status: &SyncStatus,
    path: &WirePath,
    found: Option<&IndexRow>,
    meta: Option<&Meta>,
    rule: Option<String>,
) -> (&'static str, String) {
    if let Some(rule) = rule {
        return ("ignored", format!("left out by {rule}; it is neither sent nor changed here"));
    }
    let Some(IndexRow { row, stamp }) = found else {
        return match meta {
            Some(_) => ("changed", "it stands here and has not been looked at yet".to_owned()),
            None => ("not_here", "nothing stands here, and nothing at the hub".to_owned()),
        };
    };
    if row.unknown {
        let text =
            "it cannot be read now, or changes while it is read: nothing is concluded from that";
        return ("unknown", text.to_owned());
    }
    let (local, remote, base) = (row.local.as_ref(), row.remote.as_ref(), row.base.as_ref());
    let changed = match (meta, stamp) {
        (None, _) => local.is_some(),
        (Some(meta), Some(stamp)) => *stamp != Stamp::new(meta, stamp.racy),
        (Some(meta), None) => (meta.kind == FileKind::Dir) != local.is_some_and(Entry::is_dir),
    };
    if changed {
        return ("changed", "it was changed here since it was looked at last".to_owned());
    }
    if same(local, remote) {
        return ("synced", "it is the same here and at the hub".to_owned());
    }
    if leaves_workspace(path, local) || leaves_workspace(path, remote) {
        let text = "it is a link that leaves the workspace: it is neither sent nor placed";
        return ("link_outside", text.to_owned());
    }
    if same(remote, base) {
        return match (local, status.mode) {
            (_, MemberMode::ReceiveOnly) => {
                ("withheld", "changed here, and this member only receives".to_owned())
            }
            (_, MemberMode::Mirror) => {
                ("to_apply", "changed here, and this member is a mirror: it is undone".to_owned())
            }
            (None, _) if status.held_deletions > 0 => {
                let text = "deleted here; the deletion is held because they are so many";
                ("held", text.to_owned())
            }
            (None, _) => ("to_send", "deleted here; the hub is not told yet".to_owned()),
            _ => ("to_send", "changed here; the hub does not have it yet".to_owned()),
        };
    }
    if same(local, base) {
        return match (remote, status.mode) {
            (_, MemberMode::SendOnly) => {
                ("withheld", "changed at the hub, and this member only sends".to_owned())
            }
            (None, _) => ("to_apply", "deleted at the hub, and not yet here".to_owned()),
            _ => ("to_apply", "changed at the hub, and not yet here".to_owned()),
        };
    }
    ("conflict", "changed here and at the hub; both versions will be kept".to_owned())
}

fn details(
    config: &WorkspaceConfig,
    status: &SyncStatus,
    path: &WirePath,
    found: Option<&IndexRow>,
) -> Vec<String> {
    let mut details = Vec::new();
    match status.state {
        SyncState::Halted => {
            details.push(format!("the workspace is halted: {}", status.halted_reason))
        }
        SyncState::Paused => details.push(format!(
            "the workspace is paused: cortex-agent workspace resume {}",
            config.name
        )),
        SyncState::Offline => details.push("the hub cannot be reached now".to_owned()),
        _ => {}
    }
    if status.mode != MemberMode::TwoWay {
        details.push(format!("the mode of this member is {}", status.mode));
    }
    if found.is_some_and(|found| found.stamp.is_some_and(|stamp| stamp.racy)) {
        details.push("it was changed just before it was read, and is read once more".to_owned());
    }
    let local = found.and_then(|found| found.row.local.as_ref());
    if let Some(of) = local.and_then(|entry| conflict_of(path, entry)) {
        details.push(format!("it is the conflict copy of {of}: delete it once it is of no use"));
    }
    if status.applied_seq < status.head_seq {
        details
            .push(format!("this member has version {} of {}", status.applied_seq, status.head_seq));
    }
    details
}

fn show(entry: Option<&Entry>) -> String {
    match entry {
        None => String::new(),
        Some(Entry::Dir) => "directory".to_owned(),
        Some(Entry::Link { target }) => format!("link to {}", target.escape_ascii()),
        Some(Entry::File(file)) => format!(
            "file of {} bytes{}, {:.8}",
            file.size,
            if file.executable { ", executable" } else { "" },
            file.content.to_string()
        ),
    }
}
