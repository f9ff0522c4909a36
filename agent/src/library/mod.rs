//! The library of skills on this node: what the hub sent, placed where commands and people find it.
//!
//! ```text
//! INCOMING/SKILL/VERSION/…          what a sync engine keeps equal to the hub, in mode mirror
//! PLACE/.versions/SKILL@VERSION/…   a version that is here whole: the same files, read-only
//! PLACE/SKILL                       a link to the current one of those
//! WORKSPACE/.cortex/library         the door: a link to PLACE, for the links that promotions leave behind
//! ```
//!
//! INCOMING is `.NAME.incoming` beside PLACE, so on the same file system. A sync engine brings file by file, so its directory is a mixture while it works. Only when it is at a
//! version of the library completely is anything placed, and a skill changes in one rename: whoever looks
//! sees the old version or the new one. A crash leaves one of them, and perhaps directories that nothing
//! leads to, which the next placement removes; without a hub, what was placed last stays.
//!
//! Placed files are second names of the engine's where the file system allows it, and copies otherwise.
//! Owner: the task that keeps this node's workspaces ([`crate::link::workspaces`]); nobody else calls
//! [`Library::place`].

mod door;
mod freshness;
mod tree;

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, symlink};
use std::path::{Path, PathBuf};

use cortex_shared::crash::crash_point;
use cortex_shared::durable;
use cortex_shared::library::version_at;

pub(crate) use self::door::hang_door;
pub use self::freshness::{Freshness, Ticket};
use self::tree::{is_copy_of, make_copy, remove_tree};

/// Where versions lie; no skill has this name.
const VERSIONS: &str = ".versions";
/// What begins the names of what is being made.
const UNFINISHED: &str = ".new-";

/// Why the library could not be placed.
#[derive(Debug, thiserror::Error)]
pub enum LibraryError {
    /// The file system.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Something that is not ours stands where a skill belongs.
    #[error("{} is not a link of the library: move it away", path.display())]
    InTheWay {
        /// Where.
        path: PathBuf,
    },
}

/// The library of one node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Library {
    place: PathBuf,
    incoming: PathBuf,
}

impl Library {
    /// A library that is placed in `place`, an absolute path, and arrives beside it.
    #[must_use]
    pub fn new(place: PathBuf) -> Self {
        let mut name = place.file_name().unwrap_or_default().to_owned();
        if !name.as_encoded_bytes().starts_with(b".") {
            name = OsString::from_iter([OsStr::new("."), &name]);
        }
        name.push(".incoming");
        Self { incoming: place.with_file_name(name), place }
    }

    /// Where commands and people find it.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.place
    }

    /// The directory that is kept equal to the hub.
    #[must_use]
    pub fn incoming(&self) -> &Path {
        &self.incoming
    }

    /// Whether something has been placed.
    #[must_use]
    pub fn is_placed(&self) -> bool {
        self.place.join(VERSIONS).is_dir()
    }

    /// Makes what is placed equal to what has arrived; false if that has changed meanwhile, so that part of it
    /// was not placed. Blocking.
    ///
    /// `complete` tells whether what has arrived is still the same complete version of the library as when
    /// this was called: nothing is placed that may be a mixture.
    ///
    /// # Errors
    /// The first of those that were met; everything else has been done.
    pub fn place(&self, complete: &dyn Fn() -> bool) -> Result<bool, LibraryError> {
        let wanted = self.arrived()?;
        if !complete() {
            return Ok(false);
        }
        if wanted.is_empty() && !self.is_placed() {
            return Ok(true);
        }
        let versions = self.place.join(VERSIONS);
        let mut builder = fs::DirBuilder::new();
        builder.recursive(true).mode(0o755).create(&versions).map_err(at("create", &versions))?;
        let mut result = Ok(true);
        for (skill, version) in &wanted {
            match self.place_version(skill, *version, complete) {
                Ok(true) => {}
                // What else there was to be done belongs to a version that is over.
                Ok(false) => return result.and(Ok(false)),
                error => result = result.and(error),
            }
        }
        result.and(self.remove_others(&wanted).map(|()| true))
    }

    /// The version of each skill that has arrived.
    fn arrived(&self) -> Result<BTreeMap<String, u64>, LibraryError> {
        let mut wanted: BTreeMap<String, u64> = BTreeMap::new();
        for skill in names(&self.incoming)? {
            let folder = self.incoming.join(&skill);
            if !is_dir(&folder) {
                continue;
            }
            for version in names(&folder)? {
                use std::os::unix::ffi::OsStrExt as _;
                if let Some((name, number)) = version_at(skill.as_bytes(), version.as_bytes())
                    && is_dir(&folder.join(&version))
                {
                    // There is one of each; of two, the newer one is what somebody wanted last.
                    let newest = wanted.entry(name).or_default();
                    *newest = number.max(*newest);
                }
            }
        }
        Ok(wanted)
    }

    /// False if what has arrived has changed.
    fn place_version(
        &self,
        skill: &str,
        version: u64,
        complete: &dyn Fn() -> bool,
    ) -> Result<bool, LibraryError> {
        let source = self.incoming.join(skill).join(version.to_string());
        let versions = self.place.join(VERSIONS);
        let name = version_name(skill, version);
        let placed = versions.join(&name);
        let link = self.place.join(skill);
        let target = Path::new(VERSIONS).join(&name);
        match fs::read_link(&link) {
            Ok(found) if is_ours(&found) => {
                if found == target && is_copy_of(&placed, &source) {
                    return Ok(true);
                }
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            _ => return Err(LibraryError::InTheWay { path: link }),
        }
        if !is_copy_of(&placed, &source) {
            let new = versions.join(format!("{UNFINISHED}{name}"));
            remove_tree(&new).map_err(at("remove", &new))?;
            let copied = make_copy(&source, &new).map_err(at("copy the skill to", &new));
            if !complete() {
                remove_tree(&new).map_err(at("remove", &new))?;
                return Ok(false);
            }
            copied?;
            crash_point("library.copied");
            put_in_place(&new, &placed).map_err(at("place", &placed))?;
            remove_tree(&new).map_err(at("remove", &new))?;
            durable::sync_folder(&versions).map_err(at("flush", &versions))?;
        }
        crash_point("library.placed");
        let new = versions.join(format!("{UNFINISHED}link"));
        remove_tree(&new).map_err(at("remove", &new))?;
        symlink(&target, &new).map_err(at("create", &new))?;
        fs::rename(&new, &link).map_err(at("place", &link))?;
        durable::sync_folder(&self.place).map_err(at("flush", &self.place))?;
        crash_point("library.linked");
        tracing::info!(skill, version, "a skill is here");
        Ok(true)
    }

    /// Removes the links of skills that are no more, and then the versions that nothing leads to.
    fn remove_others(&self, wanted: &BTreeMap<String, u64>) -> Result<(), LibraryError> {
        for name in names(&self.place)? {
            let link = self.place.join(&name);
            let skill = name.to_str().filter(|name| wanted.contains_key(*name));
            if skill.is_none() && fs::read_link(&link).is_ok_and(|target| is_ours(&target)) {
                fs::remove_file(&link).map_err(at("remove", &link))?;
                tracing::info!(skill = %name.display(), "a skill was taken out of the library");
            }
        }
        let used: Vec<PathBuf> =
            wanted.keys().filter_map(|skill| fs::read_link(self.place.join(skill)).ok()).collect();
        let versions = self.place.join(VERSIONS);
        for name in names(&versions)? {
            if !used.contains(&Path::new(VERSIONS).join(&name)) {
                let unused = versions.join(&name);
                remove_tree(&unused).map_err(at("remove", &unused))?;
            }
        }
        Ok(())
    }
}

/// Puts a directory where another one may stand, in one step; what stood there is where it was.
fn put_in_place(new: &Path, placed: &Path) -> io::Result<()> {
    use rustix::fs::{CWD, RenameFlags, renameat_with};
    match renameat_with(CWD, new, CWD, placed, RenameFlags::EXCHANGE) {
        Ok(()) => Ok(()),
        // Nothing stands there; or the file system cannot exchange, and for an instant nothing does.
        Err(rustix::io::Errno::NOENT) => fs::rename(new, placed),
        Err(rustix::io::Errno::INVAL) => {
            remove_tree(placed)?;
            fs::rename(new, placed)
        }
        Err(error) => Err(error.into()),
    }
}

fn version_name(skill: &str, version: u64) -> String {
    format!("{skill}@{version}")
}

/// Whether a link of this target is one of the library's own.
fn is_ours(target: &Path) -> bool {
    target.starts_with(VERSIONS)
}

fn is_dir(path: &Path) -> bool {
    path.symlink_metadata().is_ok_and(|found| found.is_dir())
}

fn names(folder: &Path) -> Result<Vec<OsString>, LibraryError> {
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(at("list", folder))?,
    };
    entries.map(|entry| Ok(entry.map_err(at("list", folder))?.file_name())).collect()
}

fn at(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> LibraryError {
    let path = path.to_owned();
    move |source| LibraryError::Io { action, path, source }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};

    use super::*;

    struct Shelf {
        _folder: tempfile::TempDir,
        library: Library,
    }

    impl Shelf {
        fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            let library = Library::new(folder.path().join("place/library"));
            fs::create_dir_all(&library.incoming).unwrap();
            assert_eq!(library.incoming, folder.path().join("place/.library.incoming"));
            Self { _folder: folder, library }
        }

        fn arrive(&self, path: &str, text: &str) {
            let path = self.library.incoming.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }

        fn read(&self, path: &str) -> Option<String> {
            fs::read_to_string(self.library.dir().join(path)).ok()
        }

        fn versions(&self) -> Vec<String> {
            let mut names: Vec<String> = names(&self.library.place.join(VERSIONS))
                .unwrap()
                .into_iter()
                .map(|name| name.into_string().unwrap())
                .collect();
            names.sort();
            names
        }
    }

    #[test]
    fn a_skill_changes_as_a_whole_and_goes_when_it_is_gone() {
        let shelf = Shelf::new();
        assert!(shelf.library.place(&|| true).unwrap());
        assert!(!shelf.library.is_placed(), "nothing for nothing");
        shelf.arrive("lint/1/run.sh", "one");
        shelf.arrive("lint/1/data/x", "x");
        shelf.arrive("Not A Skill/1/x", "x");
        shelf.arrive("lint/01/x", "x");
        assert!(shelf.library.place(&|| true).unwrap());
        assert_eq!(shelf.read("lint/run.sh").as_deref(), Some("one"));
        assert_eq!(shelf.read("lint/data/x").as_deref(), Some("x"));
        let run = shelf.library.dir().join("lint/run.sh");
        assert_eq!(run.metadata().unwrap().permissions().mode() & 0o777, 0o444);
        let before = run.metadata().unwrap().ino();
        assert!(shelf.library.place(&|| true).unwrap());
        assert_eq!(run.metadata().unwrap().ino(), before, "what is right is left alone");

        fs::remove_dir_all(shelf.library.incoming.join("lint/1")).unwrap();
        shelf.arrive("lint/2/run.sh", "two");
        assert!(shelf.library.place(&|| true).unwrap());
        assert_eq!(shelf.read("lint/run.sh").as_deref(), Some("two"));
        assert_eq!(shelf.versions(), ["lint@2"]);

        fs::remove_dir_all(shelf.library.incoming.join("lint")).unwrap();
        assert!(shelf.library.place(&|| true).unwrap());
        assert_eq!(shelf.read("lint/run.sh"), None);
        assert!(shelf.versions().is_empty());
    }

    #[test]
    fn what_changes_while_it_is_copied_is_not_placed() {
        let shelf = Shelf::new();
        shelf.arrive("lint/1/run.sh", "one");
        assert!(shelf.library.place(&|| true).unwrap());
        shelf.arrive("lint/2/run.sh", "two");
        assert!(!shelf.library.place(&|| false).unwrap(), "not complete when it was listed");
        let asked = std::cell::Cell::new(0);
        let while_it_is_listed = || asked.replace(asked.get() + 1) == 0;
        assert!(!shelf.library.place(&while_it_is_listed).unwrap());
        assert_eq!(asked.get(), 2);
        assert_eq!(shelf.read("lint/run.sh").as_deref(), Some("one"));
        assert_eq!(shelf.versions(), ["lint@1"]);
        assert!(shelf.library.place(&|| true).unwrap());
        assert_eq!(shelf.read("lint/run.sh").as_deref(), Some("two"));
    }

    #[test]
    fn what_somebody_did_to_a_placed_skill_is_undone() {
        let shelf = Shelf::new();
        shelf.arrive("lint/1/run.sh", "one");
        shelf.arrive("lint/1/sub/x", "x");
        assert!(shelf.library.place(&|| true).unwrap());
        let sub = shelf.library.dir().join("lint/sub");
        fs::set_permissions(&sub, fs::Permissions::from_mode(0o755)).unwrap();
        fs::remove_file(sub.join("x")).unwrap();
        fs::write(sub.join("y"), "more").unwrap();
        assert!(shelf.library.place(&|| true).unwrap());
        assert_eq!(shelf.read("lint/sub/x").as_deref(), Some("x"));
        assert_eq!(shelf.read("lint/sub/y"), None);
        // Another file of the same name, with the same text.
        let run = shelf.library.dir().join("lint/run.sh");
        let top = shelf.library.dir().join("lint");
        fs::set_permissions(&top, fs::Permissions::from_mode(0o755)).unwrap();
        fs::remove_file(&run).unwrap();
        fs::write(&run, "two").unwrap();
        assert!(shelf.library.place(&|| true).unwrap());
        assert_eq!(shelf.read("lint/run.sh").as_deref(), Some("one"));
    }

    #[test]
    fn somebodys_own_directory_is_not_replaced_and_the_other_skills_are_placed() {
        let shelf = Shelf::new();
        shelf.arrive("a/1/x", "a");
        shelf.arrive("b/1/x", "b");
        fs::create_dir_all(shelf.library.dir().join("a")).unwrap();
        fs::write(shelf.library.dir().join("a/mine"), "mine").unwrap();
        assert!(matches!(shelf.library.place(&|| true), Err(LibraryError::InTheWay { .. })));
        assert_eq!(shelf.read("a/mine").as_deref(), Some("mine"));
        assert_eq!(shelf.read("b/x").as_deref(), Some("b"));
    }

    #[test]
    fn what_an_interrupted_placement_left_is_removed() {
        let shelf = Shelf::new();
        shelf.arrive("lint/1/x", "one");
        let versions = shelf.library.dir().join(VERSIONS);
        fs::create_dir_all(versions.join(".new-lint@1/deep")).unwrap();
        fs::create_dir_all(versions.join("lint@1")).unwrap();
        symlink("x", versions.join(".new-link")).unwrap();
        assert!(shelf.library.place(&|| true).unwrap());
        assert_eq!(shelf.read("lint/x").as_deref(), Some("one"));
        assert_eq!(shelf.versions(), ["lint@1"]);
    }
}
