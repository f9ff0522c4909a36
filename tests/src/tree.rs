//! Real file trees, and whether two are equal.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

/// What stands at a path, as far as it is synced.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    /// A file: length, hash of the content, executable.
    File(u64, String, bool),
    /// A link and its target.
    Link(Vec<u8>),
    /// A directory.
    Dir,
}

/// Everything below `root` by relative path (bytes), without the agent's private directory and without
/// what is deleted or replaced while it is read.
///
/// # Panics
/// If `root` is no directory, or something that is there cannot be read.
#[must_use]
pub fn read(root: &Path) -> BTreeMap<Vec<u8>, Found> {
    assert!(root.is_dir(), "{} is a directory", root.display());
    let mut found = BTreeMap::new();
    visit(root, root, &mut found);
    found
}

fn visit(root: &Path, folder: &Path, found: &mut BTreeMap<Vec<u8>, Found>) {
    let Some(entries) = there(fs::read_dir(folder)) else { return };
    for entry in entries {
        let path = entry.expect("the folder can be read").path();
        let name = path.strip_prefix(root).expect("below the root").as_os_str().as_bytes();
        if name == b".cortex" {
            continue;
        }
        if let Some(entry) = there(look(&path)) {
            if entry == Found::Dir {
                visit(root, &path, found);
            }
            found.insert(name.to_vec(), entry);
        }
    }
}

fn look(path: &Path) -> io::Result<Found> {
    let metadata = fs::symlink_metadata(path)?;
    if metadata.is_symlink() {
        return Ok(Found::Link(fs::read_link(path)?.into_os_string().into_vec()));
    }
    if metadata.is_dir() {
        return Ok(Found::Dir);
    }
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(fs::File::open(path)?)?;
    let executable = metadata.permissions().mode() & 0o100 != 0;
    Ok(Found::File(metadata.len(), hasher.finalize().to_string(), executable))
}

/// `None` of what has been deleted since it was listed, or has become of another kind.
fn there<T>(looked_at: io::Result<T>) -> Option<T> {
    use io::ErrorKind::{InvalidInput, IsADirectory, NotADirectory, NotFound};
    let changed = [NotFound, IsADirectory, NotADirectory, InvalidInput];
    match looked_at {
        Err(error) if changed.contains(&error.kind()) => None,
        looked_at => Some(looked_at.expect("what is there can be read")),
    }
}

/// Copies a folder with everything in it; links are not expected there.
///
/// # Panics
/// If that fails.
pub fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("the place is writable");
    for entry in fs::read_dir(from).expect("the folder can be read") {
        let entry = entry.expect("the folder can be read");
        let target = to.join(entry.file_name());
        if entry.file_type().expect("the entry exists").is_dir() {
            copy(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).expect("there is room for a copy");
        }
    }
}

/// Fails the test unless both trees are equal, naming what differs.
///
/// # Panics
/// If they are not.
pub fn assert_equal(a: &Path, b: &Path) {
    let (left, right) = (read(a), read(b));
    let differing: Vec<String> = left
        .keys()
        .chain(right.keys())
        .filter(|path| left.get(*path) != right.get(*path))
        .map(|path| {
            format!("{}: {:?} / {:?}", path.escape_ascii(), left.get(path), right.get(path))
        })
        .take(10)
        .collect();
    assert!(differing.is_empty(), "trees differ:\n{}", differing.join("\n"));
}
