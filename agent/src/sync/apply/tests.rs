//! What happens when somebody is faster.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;

use cortex_shared::chunk::Recipe;
use cortex_shared::entry::{Digest, File};
use cortex_shared::ids::WorkspaceId;

use super::*;
use crate::sync::index::{Seen, Stamp};

struct Fixture {
    folder: tempfile::TempDir,
    root: RootDir,
    private: PrivateDir,
    index: Index,
}

fn path(text: &str) -> WirePath {
    WirePath::new(text).unwrap()
}

fn file(content: &str) -> Entry {
    Entry::File(File {
        content: Digest::of(content.as_bytes()),
        size: content.len() as u64,
        executable: false,
        mtime_ns: 1_000_000_001,
        recipe: Recipe::default(),
    })
}

impl Fixture {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (root_path, state) = (folder.path().join("root"), folder.path().join("state"));
        fs::create_dir(&root_path).unwrap();
        fs::create_dir(&state).unwrap();
        let root = RootDir::open(&root_path).unwrap();
        let ground = super::super::ground::Ground::real();
        let private =
            PrivateDir::open(&ground, WorkspaceId::new(), &state, &root_path, root.top()).unwrap();
        Self { index: Index::open(&state).unwrap(), folder, root, private }
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.folder.path().join("root").join(name)
    }

    /// Writes a file and tells the index of it, as a scan would.
    fn known(&mut self, name: &str, content: &str, racy: bool) {
        fs::write(self.path(name), content).unwrap();
        let meta = self.root.top().lstat(name.as_bytes()).unwrap();
        let seen = Seen::Entry(file(content), Some(Stamp::new(&meta, racy)));
        self.index.batch(|writer| writer.set_local(&path(name), seen)).unwrap();
    }

    fn change(&self, name: &str, from: Option<Entry>, to: Option<&str>) -> Staged {
        let stage_name = to.map(|content| {
            let name = self.private.stage_name();
            let staged = self.private.stage().create_new(&name, 0o666).unwrap();
            staged.write_all_at(content.as_bytes(), 0).unwrap();
            name
        });
        let change = LocalChange { path: path(name), from, to: to.map(file), aside: None };
        Staged::new(change, stage_name)
    }

    fn apply(&mut self, staged: Staged) -> Report {
        let applier = Applier {
            root: &self.root,
            private: &self.private,
            index: &mut self.index,
            owner: None,
        };
        applier.apply(vec![staged]).unwrap()
    }

    fn read(&self, name: &str) -> Option<String> {
        fs::read_to_string(self.path(name)).ok()
    }

    fn trash(&self) -> Vec<String> {
        let folder = self.private.path().join("trash");
        let names = self.private.trash().names().unwrap();
        names
            .into_iter()
            .map(|name| fs::read_to_string(folder.join(String::from_utf8(name).unwrap())).unwrap())
            .collect()
    }
}

#[test]
fn a_replaced_file_keeps_its_mode_takes_the_time_and_is_found_in_the_trash() {
    let mut tree = Fixture::new();
    tree.known("f", "old", false);
    fs::set_permissions(tree.path("f"), fs::Permissions::from_mode(0o640)).unwrap();
    let meta = tree.root.top().lstat(b"f").unwrap();
    let seen = Seen::Entry(file("old"), Some(Stamp::new(&meta, false)));
    tree.index.batch(|writer| writer.set_local(&path("f"), seen)).unwrap();
    let change = tree.change("f", Some(file("old")), Some("new"));
    let report = tree.apply(change);
    assert_eq!((report.applied, report.findings.len()), (1, 0));
    assert_eq!(tree.read("f").unwrap(), "new");
    assert_eq!(tree.trash(), ["old"]);
    let meta = tree.root.top().lstat(b"f").unwrap();
    assert_eq!((meta.mode, meta.mtime_ns), (0o640, 1_000_000_001));
    let row = tree.index.get(&path("f")).unwrap().unwrap();
    assert_eq!(row.row.local, Some(file("new")));
    assert!(row.stamp.unwrap().fits_renamed(&meta));
}

#[test]
fn t30_an_edit_between_plan_and_apply_is_left_alone() {
    for to in [Some("new"), None] {
        let mut tree = Fixture::new();
        tree.known("f", "old", false);
        let change = tree.change("f", Some(file("old")), to);
        fs::write(tree.path("f"), "the user's").unwrap();
        let report = tree.apply(change);
        assert_eq!(report.applied, 0);
        assert!(report.dirty.contains(&None));
        assert_eq!(tree.read("f").unwrap(), "the user's");
        assert!(tree.private.stage().names().unwrap().is_empty());
    }
}

#[test]
fn t30_an_edit_that_looks_the_same_is_found_out_after_it_was_displaced_and_put_back() {
    for to in [Some("new"), None] {
        let mut tree = Fixture::new();
        tree.known("f", "edit", true);
        // The index believes in other content, as it would after an edit within one tick.
        let meta = tree.root.top().lstat(b"f").unwrap();
        let seen = Seen::Entry(file("base"), Some(Stamp::new(&meta, true)));
        tree.index.batch(|writer| writer.set_local(&path("f"), seen)).unwrap();
        let change = tree.change("f", Some(file("base")), to);
        let report = tree.apply(change);
        assert_eq!(report.applied, 0, "{to:?}");
        assert_eq!(tree.read("f").unwrap(), "edit");
        assert!(tree.trash().is_empty());
        assert!(tree.private.stage().names().unwrap().is_empty());
    }
}

#[test]
fn an_edit_that_the_index_knows_and_the_plan_does_not_is_left_alone() {
    let mut tree = Fixture::new();
    tree.known("f", "old", false);
    let change = tree.change("f", Some(file("old")), Some("new"));
    tree.known("f", "seen meanwhile", false);
    assert_eq!(tree.apply(change).applied, 0);
    assert_eq!(tree.read("f").unwrap(), "seen meanwhile");
}

#[test]
fn a_file_that_appeared_where_nothing_was_is_not_replaced() {
    let mut tree = Fixture::new();
    let change = tree.change("f", None, Some("new"));
    fs::write(tree.path("f"), "the user's").unwrap();
    assert_eq!(tree.apply(change).applied, 0);
    assert_eq!(tree.read("f").unwrap(), "the user's");
}

#[test]
fn a_parent_that_became_a_link_leads_nowhere() {
    let mut tree = Fixture::new();
    let outside = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink(outside.path(), tree.path("d")).unwrap();
    let change = tree.change("d/f", None, Some("new"));
    let report = tree.apply(change);
    assert_eq!(report.applied, 0);
    assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 0);
}

#[test]
fn a_directory_with_unknown_files_is_kept_and_the_rest_of_the_batch_goes_on() {
    let mut tree = Fixture::new();
    fs::create_dir(tree.path("d")).unwrap();
    fs::write(tree.path("d/precious"), "x").unwrap();
    let remove = LocalChange { path: path("d"), from: Some(Entry::Dir), to: None, aside: None };
    let make = LocalChange { path: path("e"), from: None, to: Some(Entry::Dir), aside: None };
    let applier =
        Applier { root: &tree.root, private: &tree.private, index: &mut tree.index, owner: None };
    let batch = [remove, make].map(|change| Staged::new(change, None));
    let report = applier.apply(batch.into()).unwrap();
    assert_eq!((report.applied, report.findings.len()), (1, 1));
    assert!(tree.path("d/precious").exists() && tree.path("e").is_dir());
}

#[test]
fn a_loser_moves_aside_and_the_winner_takes_its_name() {
    let mut tree = Fixture::new();
    tree.known("f", "loser", false);
    let mut staged = tree.change("f", Some(file("loser")), Some("winner"));
    staged.change.aside = Some(path("f.conflict"));
    assert_eq!(tree.apply(staged).applied, 1);
    assert_eq!(tree.read("f").unwrap(), "winner");
    assert_eq!(tree.read("f.conflict").unwrap(), "loser");
    assert!(tree.trash().is_empty());
    let copy = tree.index.get(&path("f.conflict")).unwrap().unwrap();
    assert_eq!(copy.row.local, Some(file("loser")));
}

#[test]
fn an_edit_of_the_same_length_before_the_index_is_told_is_not_taken_for_ours() {
    for aside in [false, true] {
        let mut tree = Fixture::new();
        tree.known("f", "loser", false);
        let mut staged = tree.change("f", Some(file("loser")), Some("ours!"));
        staged.change.aside = aside.then(|| path("f.conflict"));
        let mut applier = Applier {
            root: &tree.root,
            private: &tree.private,
            index: &mut tree.index,
            owner: None,
        };
        let mut report = Report::default();
        let (made, untouched) = applier.make(vec![staged], &mut report).unwrap();
        for name in ["f", "f.conflict"] {
            if tree.folder.path().join("root").join(name).exists() {
                fs::write(tree.folder.path().join("root").join(name), "USER!").unwrap();
            }
        }
        applier.record(made, &untouched, &mut report).unwrap();
        assert!(report.dirty.contains(&None));
        for name in ["f", "f.conflict"].into_iter().take(1 + usize::from(aside)) {
            assert!(tree.index.get(&path(name)).unwrap().unwrap().row.unknown, "{name}");
        }
    }
}

#[test]
fn a_displaced_file_is_remembered_before_a_crash_can_come_in_between() {
    for to in [Some("new"), None] {
        let mut tree = Fixture::new();
        tree.known("f", "old", false);
        let staged = tree.change("f", Some(file("old")), to);
        let applier = Applier {
            root: &tree.root,
            private: &tree.private,
            index: &mut tree.index,
            owner: None,
        };
        let mut applier = applier;
        applier.make(vec![staged], &mut Report::default()).unwrap();
        // The process ends here: the index is told nothing more.
        let trash = tree.folder.path().join("state/files/trash");
        let name = tree.private.trash().names().unwrap().remove(0);
        fs::write(trash.join(String::from_utf8(name).unwrap()), "written late").unwrap();
        rescue_late_writes(&tree.root, &tree.private, &mut tree.index).unwrap();
        assert!(tree.trash().is_empty(), "{to:?}");
        let there = tree.root.top().names().unwrap();
        let contents: Vec<_> =
            there.iter().map(|name| tree.read(std::str::from_utf8(name).unwrap())).collect();
        assert!(contents.contains(&Some("written late".to_owned())), "{to:?} {contents:?}");
    }
}

#[test]
fn what_is_taken_away_is_looked_for_where_the_plan_says_and_not_in_a_directory_that_was_there() {
    let fixture = Fixture::new();
    fs::create_dir(fixture.path("d")).unwrap();
    fs::write(fixture.path("d/new"), "x").unwrap();
    let mut touched = Touched::new(fixture.root.parents());
    let change = |name: &str, from: Option<Entry>| fixture.change(name, from, None).change;
    let made = LocalChange { to: Some(file("y")), ..change("d/another", None) };
    touched.parent_of(&made).unwrap();
    // Somebody moves the directory in the middle of a batch.
    fs::rename(fixture.path("d"), fixture.path("kept")).unwrap();
    touched.parent_of(&made).unwrap();
    let gone = touched.parent_of(&change("d/new", Some(file("x")))).unwrap_err();
    assert!(vanished(&gone), "{gone}");
    assert!(touched.parent_of(&made).is_err(), "it was looked for anew");
}
