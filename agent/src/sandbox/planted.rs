//! Names that programs on the host obey and that came or changed while a command ran.
//!
//! What existed before is protected by [`super::protect`]. What did not exist cannot be, without
//! leaving empty files behind, nor can what somebody outside replaces; so it is noticed afterwards
//! and said.

use std::path::{Path, PathBuf};
use std::time::SystemTime;

use rustix::fs::{AtFlags, CWD, StatxFlags};

use super::survey::{Found, Seen, Survey};

/// Most names that are said; the rest is counted.
const MAX_NAMED: usize = 12;
/// Longest name as it is said.
const MAX_SHOWN_CHARACTERS: usize = 120;

/// Said instead of names that nobody looked at.
const TOO_MANY: &str = "while it ran, so many names came that programs outside the sandbox obey that not all \
                        were looked at";

/// What stood in a workspace before a command.
#[derive(Debug, Clone)]
pub struct Before {
    root: PathBuf,
    survey: Survey,
    at: SystemTime,
}

/// What became of a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Change {
    Created,
    Replaced,
    Changed,
    Removed,
}

impl Change {
    fn between(before: &Seen, after: &Seen) -> Option<Self> {
        match (before, after) {
            (before, after) if before == after => None,
            (Seen::Nothing, _) => Some(Self::Created),
            (_, Seen::Nothing) => Some(Self::Removed),
            (
                Seen::File { device, inode, .. },
                Seen::File { device: new_device, inode: new_inode, .. },
            ) if (device, inode) == (new_device, new_inode) => Some(Self::Changed),
            _ => Some(Self::Replaced),
        }
    }

    fn word(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Replaced => "replaced",
            Self::Changed => "changed",
            Self::Removed => "removed",
        }
    }
}

impl Before {
    /// Looks at a workspace, a path without links.
    pub(super) fn of(root: &Path) -> Self {
        let at = SystemTime::now();
        Self { root: root.to_owned(), survey: Survey::of(root), at }
    }

    pub(super) fn survey(&self) -> &Survey {
        &self.survey
    }

    /// What became of it since, for people; `None` if nothing did. Looks at the disk, so not to be
    /// called where waiting is forbidden.
    #[must_use]
    pub fn look_again(&self) -> Option<String> {
        let after = Survey::of(&self.root);
        let changes = self.changes(&after);
        // What stood there before was told, or not, with the command that brought it.
        let more = after.full && !self.survey.full;
        if changes.is_empty() {
            return more.then(|| TOO_MANY.to_owned());
        }
        let named = changes.iter().take(MAX_NAMED).map(|(name, change)| {
            let name: String = name.to_string_lossy().chars().take(MAX_SHOWN_CHARACTERS).collect();
            format!("{name} ({})", change.word())
        });
        let mut names = named.collect::<Vec<_>>().join(", ");
        if changes.len() > MAX_NAMED {
            names.push_str(&format!(" and {} more", changes.len() - MAX_NAMED));
        }
        let more = if more { format!(". And {TOO_MANY}") } else { String::new() };
        Some(format!(
            "while it ran, names in the workspace came or changed which programs outside the \
             sandbox obey: {names}. Look at them before using git, a shell or an editor there{more}"
        ))
    }

    fn changes(&self, after: &Survey) -> Vec<(PathBuf, Change)> {
        let mut changes: Vec<(PathBuf, Change)> = Vec::new();
        let names =
            self.survey.names.iter().chain(
                after.names.iter().filter(|(name, _)| !self.survey.names.contains_key(*name)),
            );
        let mut names: Vec<(&PathBuf, &Found)> = names.filter(|(_, found)| found.obeyed).collect();
        // A directory stands for all in it.
        names.sort_by_key(|(name, _)| *name);
        for (name, _) in names {
            // In the order of paths, what is below one follows it at once.
            if changes.last().is_some_and(|(above, _)| name.starts_with(above)) {
                continue;
            }
            let before = self.survey.names.get(name).map(|found| &found.seen);
            let now = match after.names.get(name) {
                Some(found) => found.seen.clone(),
                // The second look may have met a bound before it came there.
                None if exists(&self.root.join(name)) => continue,
                None => Seen::Nothing,
            };
            let is_old = before.is_none() && self.survey.truncated && self.is_older(name);
            let change = Change::between(before.unwrap_or(&Seen::Nothing), &now);
            if let Some(change) = change.filter(|_| !is_old) {
                changes.push((name.clone(), change));
            }
        }
        changes
    }

    /// Whether something that the first look may have missed was made before it. Where the file
    /// system does not say, it was not.
    fn is_older(&self, name: &Path) -> bool {
        let flags = AtFlags::SYMLINK_NOFOLLOW;
        let found = rustix::fs::statx(CWD, self.root.join(name), flags, StatxFlags::BTIME);
        let before = self.at.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |age| age.as_secs());
        found.is_ok_and(|found| {
            found.stx_mask & StatxFlags::BTIME.bits() != 0
                && u64::try_from(found.stx_btime.tv_sec).is_ok_and(|born| born < before)
        })
    }
}

fn exists(path: &Path) -> bool {
    path.symlink_metadata().is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn changes(before: &Before) -> Vec<(String, Change)> {
        let named = |(name, change): (PathBuf, _)| (name.display().to_string(), change);
        before.changes(&Survey::of(&before.root)).into_iter().map(named).collect()
    }

    #[test]
    fn what_came_changed_went_or_was_replaced_is_found_and_nothing_else() {
        let workspace = tempfile::TempDir::new().unwrap();
        let path = |name: &str| workspace.path().join(name);
        std::fs::create_dir_all(path(".git/hooks")).unwrap();
        for name in [".envrc", ".profile", ".zshrc", "file"] {
            std::fs::write(path(name), "same size").unwrap();
        }
        std::os::unix::fs::symlink("a", path(".bashrc")).unwrap();
        let before = Before::of(workspace.path());
        assert_eq!(before.look_again(), None);
        std::fs::write(path(".git/commondir"), "").unwrap();
        std::fs::write(path(".git/index"), "").unwrap();
        std::fs::write(path(".git/hooks/x"), "").unwrap();
        std::fs::write(path("file"), "x").unwrap();
        std::fs::write(path(".profile"), "size same").unwrap();
        std::fs::remove_file(path(".zshrc")).unwrap();
        std::fs::remove_file(path(".bashrc")).unwrap();
        std::os::unix::fs::symlink("b", path(".bashrc")).unwrap();
        std::fs::rename(path("file"), path(".envrc")).unwrap();
        let expected = [
            (".bashrc", Change::Replaced),
            (".envrc", Change::Replaced),
            (".git/commondir", Change::Created),
            (".profile", Change::Changed),
            (".zshrc", Change::Removed),
        ];
        assert_eq!(changes(&before), expected.map(|(name, change)| (name.to_owned(), change)));
        assert!(before.look_again().unwrap().contains(".profile (changed)"));
    }

    #[test]
    fn a_new_git_directory_is_named_once_at_any_depth_that_is_looked_at() {
        let workspace = tempfile::TempDir::new().unwrap();
        let before = Before::of(workspace.path());
        for name in [".git/hooks", "a/b/.git/hooks", "node_modules/m/.git"] {
            std::fs::create_dir_all(workspace.path().join(name)).unwrap();
        }
        let expected = [".git", "a/b/.git", "node_modules/m/.git"];
        assert_eq!(changes(&before), expected.map(|name| (name.to_owned(), Change::Created)));
    }

    #[test]
    fn a_new_bare_repository_is_named_by_what_git_obeys_in_it() {
        let workspace = tempfile::TempDir::new().unwrap();
        let path = |name: &str| workspace.path().join(name);
        std::fs::create_dir_all(path("src/objects")).unwrap();
        std::fs::write(path("src/main.c"), "").unwrap();
        let before = Before::of(workspace.path());
        std::fs::create_dir(path("src/refs")).unwrap();
        std::fs::write(path("src/HEAD"), "ref: refs/heads/main").unwrap();
        std::fs::write(path("src/config"), "[core]\nfsmonitor = evil").unwrap();
        for name in ["objects", "refs"] {
            std::fs::create_dir_all(path(name)).unwrap();
        }
        std::fs::write(path("HEAD"), "ref: refs/heads/main").unwrap();
        std::fs::write(path("config"), "").unwrap();
        let created = |name: &str| (name.to_owned(), Change::Created);
        assert_eq!(changes(&before), ["config", "src/config"].map(created));
        // Once it is there, it is like any other.
        let before = Before::of(workspace.path());
        assert_eq!(
            before.survey.names[Path::new("src/config")].hold,
            super::super::survey::Hold::ReadOnly
        );
        std::fs::write(path("src/config"), "[core]\nfsmonitor = worse").unwrap();
        assert_eq!(changes(&before), [("src/config".to_owned(), Change::Changed)]);
    }

    /// So long a way below so many submodules that there is no room for names elsewhere, if it were kept
    /// one by one.
    fn fill_with_ways(workspace: &Path) {
        for number in 0..9 {
            let deep = std::iter::repeat_n("x", 240).collect::<PathBuf>();
            let deep = workspace.join(".git/modules").join(number.to_string()).join(deep);
            std::fs::create_dir_all(&deep).unwrap();
            std::fs::write(deep.join("HEAD"), "").unwrap();
        }
    }

    #[test]
    fn nothing_takes_the_room_of_other_names() {
        let workspace = tempfile::TempDir::new().unwrap();
        let path = |name: &str| workspace.path().join(name);
        std::fs::create_dir_all(path("nested/.git")).unwrap();
        std::fs::write(path(".envrc"), "").unwrap();
        let before = Before::of(workspace.path());
        fill_with_ways(workspace.path());
        std::fs::write(path(".profile"), "").unwrap();
        std::fs::write(path("nested/.git/config"), "").unwrap();
        let created = |name: &str| (name.to_owned(), Change::Created);
        assert_eq!(changes(&before), [".git", ".profile", "nested/.git/config"].map(created));
        let before = Before::of(workspace.path());
        assert!(!before.survey.full, "{}", before.survey.names.len());
        std::fs::write(path(".envrc"), "evil").unwrap();
        std::fs::write(path("nested/.git/config"), "evil").unwrap();
        let changed = |name: &str| (name.to_owned(), Change::Changed);
        assert_eq!(changes(&before), [".envrc", "nested/.git/config"].map(changed));
    }

    #[test]
    fn more_names_than_are_looked_at_are_said() {
        let workspace = tempfile::TempDir::new().unwrap();
        let before = Before::of(workspace.path());
        for one in 0..40 {
            let git = workspace.path().join(format!("{one}/.git"));
            std::fs::create_dir_all(&git).unwrap();
            let mut config = String::new();
            for two in 0..120 {
                let way = "way/".repeat(20);
                config.push_str(&format!("[include]\npath = ../{two}/{way}file\n"));
            }
            std::fs::write(git.join("config"), config).unwrap();
        }
        assert!(before.look_again().unwrap().contains("not all were looked at"));
    }

    #[test]
    fn repositories_that_the_first_look_could_not_reach_are_not_called_new() {
        let workspace = tempfile::TempDir::new().unwrap();
        for number in 0..300 {
            std::fs::create_dir_all(workspace.path().join(format!("{number}/.git"))).unwrap();
        }
        let before = Before {
            at: SystemTime::now() + std::time::Duration::from_secs(5),
            ..Before::of(workspace.path())
        };
        assert!(before.survey.truncated);
        for number in 0..100 {
            std::fs::remove_dir_all(workspace.path().join(format!("{number}"))).unwrap();
        }
        let found = changes(&before);
        assert!(found.iter().all(|(_, change)| *change == Change::Removed), "{found:?}");
    }
}
