//! Making directories, and removing what is there.

use cortex_shared::wire_path::WirePath;

use super::look::info;
use super::{Caller, Done, FileError, Place};
use crate::root_dir::{DirHandle, FileKind, Names};

/// Deepest tree that is removed: each level has an open directory.
const MAX_DEPTH: usize = 100;
/// How often a directory that is not empty after all is gone through again, as long as that removes
/// something: others may put files into it meanwhile.
const ROUNDS: usize = 100;

/// Makes a directory.
pub(super) fn make_directory(
    place: &Place,
    path: &WirePath,
    parents: bool,
) -> Result<Done, FileError> {
    let mut made = 0;
    let mut above: Vec<WirePath> = if parents { path.ancestors().collect() } else { Vec::new() };
    above.reverse();
    for path in &above {
        made += u64::from(make_one(place, path, true)?);
    }
    made += u64::from(make_one(place, path, parents)?);
    let (parent, leaf) = place.parent_of(path)?;
    let meta = parent.lstat(leaf).map_err(|error| FileError::of(path, error))?;
    Ok(Done { info: Some(info(leaf, &meta, Vec::new())), count: made, ..Done::default() })
}

/// Makes one, or finds that it is there, which may be no failure.
fn make_one(place: &Place, path: &WirePath, may_exist: bool) -> Result<bool, FileError> {
    let (parent, leaf) = place.parent_of(path)?;
    let failed = |error| FileError::of(path, error);
    match parent.make_dir(leaf, 0o777) {
        Err(error) if may_exist && error.kind() == std::io::ErrorKind::AlreadyExists => {
            let kind = parent.lstat(leaf).map_err(failed)?.kind;
            return if kind == FileKind::Dir {
                Ok(false)
            } else {
                let why = "it stands where a directory is needed";
                Err(FileError::WrongKind { name: path.to_string(), why })
            };
        }
        result => result.map_err(failed)?,
    }
    if let Some((uid, gid)) = place.owner {
        parent.set_owner(leaf, uid, gid).map_err(failed)?;
    }
    parent.sync().map_err(failed)?;
    Ok(true)
}

/// Removes a file, a link, anything; a directory only with all that is in it.
pub(super) fn remove(
    place: &Place,
    path: &WirePath,
    recursive: bool,
    caller: &mut dyn Caller,
) -> Result<Done, FileError> {
    let (parent, leaf) = place.parent_of(path)?;
    let failed = |error| FileError::of(path, error);
    let count = match parent.lstat(leaf).map_err(failed)?.kind {
        FileKind::Dir if !recursive => {
            return Err(FileError::IsDirectory { name: path.to_string() });
        }
        FileKind::Dir => {
            let mut removed = 0;
            remove_tree(&parent, leaf, path, caller, &mut removed).map_err(
                |source| match removed {
                    0 => source,
                    removed => FileError::Partly { removed, source: Box::new(source) },
                },
            )?;
            removed
        }
        FileKind::File | FileKind::Link | FileKind::Other => {
            parent.remove_file(leaf).map_err(failed)?;
            1
        }
    };
    parent.sync().map_err(failed)?;
    Ok(Done { count, ..Done::default() })
}

/// A directory that is being emptied.
struct Level {
    name: Vec<u8>,
    handle: DirHandle,
    names: Names,
    removed: bool,
    rounds: usize,
}

impl Level {
    fn open(parent: &DirHandle, name: &[u8]) -> std::io::Result<Self> {
        let handle = parent.open_dir(name)?;
        let names = handle.iter()?;
        Ok(Self { name: name.to_vec(), handle, names, removed: false, rounds: 0 })
    }
}

/// Removes from the leaves up. Holds an open directory a level and no lists; each name is acted on in
/// the directory that was opened without following a link, so that one that is exchanged for a link
/// meanwhile leads to an error at most.
fn remove_tree(
    parent: &DirHandle,
    leaf: &[u8],
    path: &WirePath,
    caller: &dyn Caller,
    removed: &mut u64,
) -> Result<(), FileError> {
    let failed = |error| FileError::of(&format!("in {path}"), error);
    let mut levels = vec![Level::open(parent, leaf).map_err(|error| FileError::of(path, error))?];
    loop {
        let depth = levels.len();
        let Some(level) = levels.last_mut() else { return Ok(()) };
        let Some(name) = level.names.next() else {
            let Some(done) = levels.pop() else { return Ok(()) };
            let above = levels.last().map_or(parent, |level| &level.handle);
            match above.remove_dir(&done.name) {
                Ok(()) => {
                    *removed += 1;
                    if let Some(level) = levels.last_mut() {
                        level.removed = true;
                    }
                }
                Err(error)
                    if error.kind() == std::io::ErrorKind::DirectoryNotEmpty
                        && done.removed
                        && done.rounds < ROUNDS =>
                {
                    let names = done.handle.iter().map_err(failed)?;
                    let rounds = done.rounds + 1;
                    levels.push(Level { names, rounds, removed: false, ..done });
                }
                Err(error) => return Err(failed(error)),
            }
            continue;
        };
        let name = name.map_err(failed)?;
        caller.is_there()?;
        match level.handle.try_lstat(&name).map_err(failed)?.map(|meta| meta.kind) {
            None => {}
            Some(FileKind::Dir) => {
                if depth == MAX_DEPTH {
                    let why = "too deep a tree to be removed from afar";
                    return Err(FileError::TooMuch { name: path.to_string(), why });
                }
                let below = Level::open(&level.handle, &name).map_err(failed)?;
                levels.push(below);
            }
            Some(FileKind::File | FileKind::Link | FileKind::Other) => {
                match level.handle.remove_file(&name) {
                    Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                    result => {
                        result.map_err(failed)?;
                        *removed += 1;
                        level.removed = true;
                    }
                }
            }
        }
    }
}
