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

/// One problem with one path, or with the workspace if there is none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The path.
    pub path: Option<WirePath>,
    /// Stable code for programs.
    pub code: &'static str,
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
    /// Stable code for programs.
    pub code: &'static str,
    /// Text for people.
    pub message: String,
}

impl Finding {
    /// A finding about a path.
    pub fn at(path: &WirePath, code: &'static str, message: impl ToString) -> Self {
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
            let first_seen_ms = old.get(&path).copied().unwrap_or_else(unix_ms);
            let problem = Problem { path: path.clone(), code, message, first_seen_ms };
            self.0.insert((stage, path), problem);
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
        let finding = |text: &str| Finding::at(&path(text), "unreadable", "no");
        problems.replace(Stage::Scan, |_| true, vec![finding("a"), finding("b")]);
        problems.0.values_mut().for_each(|problem| problem.first_seen_ms = 1);
        problems.replace(Stage::Scan, |p| p == Some(&path("a")), vec![finding("a")]);
        problems.replace(Stage::Push, |_| true, vec![]);
        assert!(problems.list().iter().all(|problem| problem.first_seen_ms == 1));
        problems.replace(Stage::Scan, |_| true, vec![finding("b")]);
        assert_eq!(problems.list().len(), 1);
    }
}
