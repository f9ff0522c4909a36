//! Real file trees, and whether two are equal.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::ffi::OsStrExt as _;
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

/// Everything below `root` by relative path (bytes), without the agent's private directory.
///
/// # Panics
/// If something cannot be read.
#[must_use]
pub fn read(root: &Path) -> BTreeMap<Vec<u8>, Found> {
    let mut found = BTreeMap::new();
    visit(root, root, &mut found);
    found
}

fn visit(root: &Path, folder: &Path, found: &mut BTreeMap<Vec<u8>, Found>) {
    for entry in fs::read_dir(folder).expect("the folder can be read") {
        let path = entry.expect("the folder can be read").path();
        let name = path.strip_prefix(root).expect("below the root").as_os_str().as_bytes();
        if name == b".cortex" {
            continue;
        }
        let metadata = fs::symlink_metadata(&path).expect("the entry exists");
        let entry = if metadata.is_symlink() {
            Found::Link(fs::read_link(&path).expect("a link").as_os_str().as_bytes().to_vec())
        } else if metadata.is_dir() {
            visit(root, &path, found);
            Found::Dir
        } else {
            let mut hasher = blake3::Hasher::new();
            let file = fs::File::open(&path).expect("the file can be read");
            hasher.update_reader(file).expect("the file can be read");
            let executable = metadata.permissions().mode() & 0o100 != 0;
            Found::File(metadata.len(), hasher.finalize().to_string(), executable)
        };
        found.insert(name.to_vec(), entry);
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
