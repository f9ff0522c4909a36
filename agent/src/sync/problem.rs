//! What stands in the way of a single path, told to people; gone once it is cured.

use std::collections::BTreeMap;

use cortex_shared::clock::unix_ms;
use cortex_shared::wire_path::WirePath;

/// Most problems that are remembered; more of them say nothing new.
const MAX_PROBLEMS: usize = 1000;

/// Which part of the work met the problem, and so which repetition of it cures the problem.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Stage {
    /// Reading the tree here.
    Scan,
    /// Being told of changes.
    Watch,
    /// What is left out.
    Rules,
    /// Planning, for the workspace as a whole.
    Plan,
    /// Sending to the hub.
    Push,
    /// Changing the tree here.
    Apply,
    /// Looking for late writes to what was displaced.
    Trash,
}

/// Of what kind problems are: `Name = "code for programs"`.
macro_rules! codes {
    ($($(#[$doc:meta])+ $name:ident = $text:literal,)+) => {
        /// Of what kind a problem is.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Code {
            $($(#[$doc])+ $name,)+
        }

        impl Code {
            /// All kinds.
            pub const ALL: &'static [Self] = &[$(Self::$name,)+];

            /// Stable name for programs.
            #[must_use]
            pub fn as_str(self) -> &'static str {
                match self {
                    $(Self::$name => $text,)+
                }
            }
        }
    };
}

codes! {
    /// So much would be deleted that somebody has to confirm it.
    MassDeleteHeld = "mass_delete_held",
    /// The hub refuses what fits to all that it told.
    RefusedByHub = "refused_by_hub",
    /// Changes come faster than they can be synced.
    NoEnd = "no_end",
    /// The hub or the file system failed as a whole.
    SyncFailed = "sync_failed",
    /// The kernel does not tell of all changes.
    WatchLimit = "watch_limit",
    /// Some lines of `.cortexignore` are not obeyed.
    IgnoreRules = "ignore_rules",
    /// The newest `.cortexignore` cannot be put in its place.
    RulesOutdated = "rules_outdated",
    /// A name in a directory is too long as a path.
    PathTooLong = "path_too_long",
    /// Another file system is mounted there.
    OtherFileSystem = "other_file_system",
    /// A socket, pipe or device.
    SpecialFile = "special_file",
    /// Too large to be synced.
    TooLarge = "too_large",
    /// The file system does not let it be read.
    Unreadable = "unreadable",
    /// It is being written all the time.
    Changing = "changing",
    /// Its name differs only in case from one that stands here.
    CaseConflict = "case_conflict",
    /// A link that leaves the workspace.
    LinkOutside = "link_outside",
    /// A directory becomes a link to a skill that is not here yet.
    SkillAwaited = "skill_awaited",
    /// The hub has no room for it.
    HubFull = "hub_full",
    /// The hub misses chunks that were sent to it.
    MissingChunks = "missing_chunks",
    /// The hub refuses it.
    Rejected = "rejected",
    /// A command runs here that must not see it change.
    CommandRuns = "command_runs",
    /// There is no room for it here.
    NoSpace = "no_space",
    /// The hub has lost its content.
    ContentMissing = "content_missing",
    /// It cannot be put together here.
    StageFailed = "stage_failed",
    /// It cannot be put in its place here.
    ApplyFailed = "apply_failed",
    /// A directory stays for what is left out in it.
    Kept = "kept",
    /// It was written to after it was replaced, and cannot be put back.
    LateWrite = "late_write",
}

impl Code {
    /// Whether what is below such a path waits with it.
    pub(super) fn covers_below(self) -> bool {
        matches!(
            self,
            Self::OtherFileSystem
                | Self::Unreadable
                | Self::CaseConflict
                | Self::SkillAwaited
                | Self::ApplyFailed
        )
    }

    /// Whether it says why a path is not the same here and at the hub. The others tell of something else:
    /// of names in it, of lines in it, or of a version of it that lies aside.
    pub(super) fn is_reason(self) -> bool {
        !matches!(self, Self::PathTooLong | Self::IgnoreRules | Self::LateWrite)
    }
}

impl std::fmt::Display for Code {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// One problem with one path, or with the workspace if there is none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The path.
    pub path: Option<WirePath>,
    /// Of what kind it is.
    pub code: Code,
    /// Text for people.
    pub message: String,
    /// When it was first seen, milliseconds since the Unix epoch.
    pub first_seen_ms: i64,
}

/// A problem before it is dated.
#[derive(Clone, Debug)]
pub struct Finding {
    /// The path.
    pub path: Option<WirePath>,
    /// Of what kind it is.
    pub code: Code,
    /// Text for people.
    pub message: String,
}

impl Finding {
    /// A finding about a path.
    pub fn at(path: &WirePath, code: Code, message: impl ToString) -> Self {
        Self { path: Some(path.clone()), code, message: message.to_string() }
    }
}

/// The problems of one workspace, owned by its engine.
#[derive(Debug, Default)]
pub struct Problems(BTreeMap<(Stage, Option<WirePath>), Problem>);

impl Problems {
    /// Replaces what a stage had found before about the paths for which `repeated` holds.
    pub fn replace(
        &mut self,
        stage: Stage,
        repeated: impl Fn(Option<&WirePath>) -> bool,
        findings: Vec<Finding>,
    ) {
        let mut old = BTreeMap::new();
        self.0.retain(|key, problem| {
            let cured = key.0 == stage && repeated(key.1.as_ref());
            if cured {
                old.insert(key.1.clone(), problem.first_seen_ms);
            }
            !cured
        });
        for Finding { path, code, message } in findings {
            if self.0.len() >= MAX_PROBLEMS {
                break;
            }
            let key = (stage, path);
            let lasting = self.0.get(&key).map(|problem| problem.first_seen_ms);
            let first_seen_ms = lasting.or(old.get(&key.1).copied()).unwrap_or_else(unix_ms);
            let problem = Problem { path: key.1.clone(), code, message, first_seen_ms };
            self.0.insert(key, problem);
        }
    }

    /// All of them, those of the workspace as a whole first.
    #[must_use]
    pub fn list(&self) -> Vec<Problem> {
        let mut problems: Vec<Problem> = self.0.values().cloned().collect();
        problems.sort_by_key(|problem| problem.path.is_some());
        problems
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cured_problems_vanish_and_lasting_ones_keep_their_date() {
        let path = |text: &str| WirePath::new(text).unwrap();
        let mut problems = Problems::default();
        let finding = |text: &str| Finding::at(&path(text), Code::Unreadable, "no");
        problems.replace(Stage::Scan, |_| true, vec![finding("a"), finding("b")]);
        problems.0.values_mut().for_each(|problem| problem.first_seen_ms = 1);
        problems.replace(Stage::Scan, |p| p == Some(&path("a")), vec![finding("a")]);
        problems.replace(Stage::Push, |_| true, vec![]);
        assert!(problems.list().iter().all(|problem| problem.first_seen_ms == 1));
        problems.replace(Stage::Scan, |_| true, vec![finding("b")]);
        assert_eq!(problems.list().len(), 1);
    }
}
