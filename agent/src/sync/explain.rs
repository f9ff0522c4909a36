//! Why a path is, or is not, the same here and at the hub.
//!
//! Reads the index beside the engine and the file system itself, so that it answers at once whatever
//! the engine is waiting for.

use cortex_shared::entry::{Entry, same};
use cortex_shared::wire_path::WirePath;

use super::ignore::Ignore;
use super::index::{Index, IndexError, IndexRow, Stamp};
use super::mode::MemberMode;
use super::plan::{conflict_of, leaves_workspace};
use super::problem::{Code, Finding, Problem};
use super::status::{SyncState, SyncStatus};
use super::{WorkspaceConfig, case, plan};
use crate::root_dir::{Disk, FileKind, Meta, RootDir, exact};

/// What is known of a path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Explanation {
    /// Stable code for programs: `synced`, `to_send`, `to_apply`, `conflict`, `held`, `ignored`,
    /// `unknown`, `changed`, `withheld`, `not_here`, or that of the problem ([`Code`]) that stands in the
    /// way.
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
    disk: &dyn Disk,
    config: &WorkspaceConfig,
    status: &SyncStatus,
    path: &WirePath,
) -> Result<Explanation, ExplainError> {
    // Where names are one that differ only in case, another name is not what is asked for.
    let root = RootDir::new(exact(disk.open(&config.root).map_err(ExplainError::Root)?));
    let found = match Index::open_for_reading(&config.state_folder())? {
        Some(index) => index.get(path)?,
        None => None,
    };
    let meta = root.parent_of(path).and_then(|(parent, leaf)| parent.lstat(leaf)).ok();
    let ignore = Ignore::load(&root).map_err(ExplainError::Root)?;
    let is_dir = meta.is_some_and(|meta| meta.kind == FileKind::Dir);
    let rule = ignore.why(path, is_dir);
    let ignored = rule.is_some();
    let (mut code, mut text) = verdict(status, path, found.as_ref(), meta.as_ref(), rule);
    let row = found.as_ref().map(|found| &found.row);
    if let Some((why, said)) = reason(status, path)
        // Only so many of these are told.
        .or_else(|| collides(&root, path, row).then(|| of(&case::finding(path))))
        && !ignored
        && code != "synced"
    {
        (code, text) = (why.as_str(), said);
    }
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

/// The problem that keeps a path from being the same here and at the hub: its own, or one of a directory
/// above it that everything below waits for.
fn reason(status: &SyncStatus, path: &WirePath) -> Option<(Code, String)> {
    let concerns = |problem: &&Problem| match &problem.path {
        Some(of) if of == path => problem.code.is_reason(),
        Some(of) => problem.code.covers_below() && path.is_below(of),
        None => false,
    };
    let found = status.problems.iter().filter(concerns);
    // The nearest: sorted by themselves, paths come after those above them.
    let nearest = found.max_by(|a, b| a.path.cmp(&b.path))?;
    Some((nearest.code, nearest.message.clone()))
}

fn of(finding: &Finding) -> (Code, String) {
    (finding.code, finding.message.clone())
}

/// Whether a path of the hub, or a directory above it, is not here because another name is that differs
/// only in case.
fn collides(root: &RootDir, path: &WirePath, row: Option<&plan::Row>) -> bool {
    let waits = row.is_some_and(|row| row.local.is_none() && row.remote.is_some());
    let stands = |path: &WirePath| case::stands(root, path).unwrap_or(false);
    waits && (stands(path) || path.ancestors().any(|above| stands(&above)))
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

#[cfg(test)]
mod tests {
    use cortex_shared::ids::WorkspaceId;

    use super::*;
    use crate::root_dir::real_disk;
    use crate::sync::index::Seen;
    use crate::sync::roots::Roots;
    use crate::sync::status::Progress;

    /// Where a kind of problem is met, and what it answers.
    #[derive(Clone, Copy, PartialEq, Eq)]
    enum Met {
        /// At a path, of which it is the answer.
        Path,
        /// At a directory, of which it is the answer, and of all that is below it.
        Tree,
        /// At a path of which something else is the answer.
        Aside,
        /// By the workspace as a whole.
        Workspace,
    }

    /// Every kind is here: one that is new does not compile without.
    fn met(code: Code) -> Met {
        match code {
            Code::OtherFileSystem
            | Code::Unreadable
            | Code::CaseConflict
            | Code::SkillAwaited
            | Code::ApplyFailed => Met::Tree,
            Code::RulesOutdated
            | Code::SpecialFile
            | Code::TooLarge
            | Code::Changing
            | Code::LinkOutside
            | Code::HubFull
            | Code::MissingChunks
            | Code::Rejected
            | Code::CommandRuns
            | Code::NoSpace
            | Code::ContentMissing
            | Code::StageFailed
            | Code::Kept => Met::Path,
            Code::PathTooLong | Code::IgnoreRules | Code::LateWrite => Met::Aside,
            Code::MassDeleteHeld
            | Code::RefusedByHub
            | Code::NoEnd
            | Code::SyncFailed
            | Code::WatchLimit => Met::Workspace,
        }
    }

    fn path(text: &str) -> WirePath {
        WirePath::new(text).unwrap()
    }

    #[test]
    fn every_kind_of_problem_is_told_of_the_paths_that_it_concerns_and_written_down() {
        let folder = tempfile::tempdir().unwrap();
        let config = WorkspaceConfig {
            id: WorkspaceId::new(),
            name: "w".to_owned(),
            root: folder.path().join("root"),
            state_dir: folder.path().join("state"),
            roots: Roots::default(),
            library: None,
        };
        std::fs::create_dir(&config.root).unwrap();
        std::fs::create_dir_all(config.state_folder()).unwrap();
        // `d` and `d/f` are known here and not at the hub.
        for directory in ["d", "d/f"] {
            std::fs::create_dir(config.root.join(directory)).unwrap();
        }
        let mut index = Index::open(&config.state_folder()).unwrap();
        for known in ["d", "d/f"] {
            let seen = Seen::Entry(Entry::Dir, None);
            index.batch(|writer| writer.set_local(&path(known), seen)).unwrap();
        }
        let progress = Progress::new(config.id, config.name.clone(), config.root.clone());
        let disk = real_disk();
        let ask = |status: &SyncStatus, asked: &str| {
            explain(&*disk, &config, status, &path(asked)).unwrap()
        };
        let calm = progress.subscribe().borrow().clone();
        assert_eq!(ask(&calm, "d/f").code, "to_send");
        let docs = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/sync.md");
        let docs = std::fs::read_to_string(docs).unwrap();
        for &code in Code::ALL {
            let at = |at: Option<&str>| {
                let problem = Problem {
                    path: at.map(path),
                    code,
                    message: "because".to_owned(),
                    first_seen_ms: 1,
                };
                SyncStatus { problems: vec![problem], ..calm.clone() }
            };
            let met = met(code);
            let own = if met == Met::Workspace { None } else { Some("d/f") };
            let here = ask(&at(own), "d/f");
            assert!(here.problems.iter().any(|problem| problem.code == code), "{code} is not told");
            let answers = matches!(met, Met::Path | Met::Tree);
            assert_eq!(here.code == code.as_str(), answers, "{code}: {}", here.code);
            assert_eq!(here.text == "because", answers, "{code}: {}", here.text);
            let below = ask(&at(Some("d")), "d/f");
            assert_eq!(
                below.code == code.as_str(),
                met == Met::Tree,
                "below {code}: {}",
                below.code
            );
            let beside = ask(&at(Some("d/other")), "d/f");
            assert_eq!((beside.code, beside.problems.len()), ("to_send", 0), "beside {code}");
            assert!(docs.contains(&format!("`{code}`")), "docs/sync.md says nothing of {code}");
        }
    }
}
