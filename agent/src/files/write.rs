//! Replacing a file as a whole.
//!
//! What arrives is put together in the workspace's private directory, on the same file system but
//! outside of the tree: no command sees it and the sync engine does not look there. It is on the disk
//! before it takes the file's place, in one step, and the directory is on the disk before the caller
//! hears of it.
//!
//! A file that must be the one the caller has seen is exchanged, and what was displaced is looked at
//! then, when nobody can reach it by name any more: if it is another one after all, it is put back. Those
//! who write through this agent take turns at that: of three who exchange and put back at the same time one
//! would put back another's file that is to go, and take the one that is to stay.

use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::io;
use std::sync::{Mutex, PoisonError};

use cortex_shared::wire_path::WirePath;

use super::look::{hash_of, info, must_be_file, stamp};
use super::{Caller, Done, FileError, Piece, Place};
use crate::root_dir::{DirHandle, FileHandle, Meta};
use crate::sync::private_dir::{Draft, Incoming};

/// What must stand at a path for it to be replaced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expected {
    /// A regular file, or nothing.
    Anything,
    /// Nothing.
    Absent,
    /// A regular file whose content has this BLAKE3.
    Content([u8; 32]),
}

/// See the module.
pub(super) fn write(
    place: &Place,
    path: &WirePath,
    expected: &Expected,
    mode: Option<u32>,
    caller: &mut dyn Caller,
) -> Result<Done, FileError> {
    let (parent, leaf) = place.parent_of(path)?;
    // Before anything is sent in vain.
    let found = look(&parent, leaf, path, expected, caller)?;
    let incoming = place.incoming()?;
    let draft = incoming.begin().map_err(|error| FileError::of(path, error))?;
    let (bytes, hash) = receive(draft.file(), path, caller)?;
    dress(place, &incoming, &draft, mode.or(found.map(|meta| meta.mode & 0o777)))
        .and_then(|()| draft.file().sync())
        .map_err(|error| FileError::of(path, error))?;
    put(&incoming, draft, &parent, leaf, path, expected, caller)?;
    parent.sync().map_err(|error| FileError::of(path, error))?;
    let meta = parent.lstat(leaf).map_err(|error| FileError::of(path, error))?;
    Ok(Done {
        info: Some(super::Info { hash: Some(hash), ..info(leaf, &meta, Vec::new()) }),
        content: Some((bytes, hash)),
        ..Done::default()
    })
}

/// What stands at the path, if that is what must.
fn look(
    parent: &DirHandle,
    leaf: &[u8],
    path: &WirePath,
    expected: &Expected,
    caller: &dyn Caller,
) -> Result<Option<Meta>, FileError> {
    let failed = |error| FileError::of(path, error);
    let name = || path.to_string();
    let Some(meta) = parent.try_lstat(leaf).map_err(failed)? else {
        return match expected {
            Expected::Anything | Expected::Absent => Ok(None),
            Expected::Content(_) => Err(FileError::Changed { name: name(), now: None }),
        };
    };
    if *expected == Expected::Absent {
        return Err(FileError::Exists { name: name() });
    }
    must_be_file(path, meta.kind)?;
    let Expected::Content(wanted) = expected else { return Ok(Some(meta)) };
    let file = parent.open_file(leaf).map_err(failed)?;
    let meta = file.meta().map_err(failed)?;
    let now = hash_of(&file, path, caller)?;
    if now != *wanted {
        return Err(FileError::Changed { name: name(), now: Some(now) });
    }
    Ok(Some(meta))
}

/// Takes the content; its length and hash.
fn receive(
    file: &FileHandle,
    path: &WirePath,
    caller: &mut dyn Caller,
) -> Result<(u64, [u8; 32]), FileError> {
    let (mut hasher, mut taken) = (blake3::Hasher::new(), 0);
    loop {
        match caller.next()? {
            Piece::Data(data) => {
                file.write_all_at(&data, taken).map_err(|error| FileError::of(path, error))?;
                hasher.update(&data);
                taken += data.len() as u64;
                caller.taken(data.len() as u64)?;
            }
            Piece::End { bytes, hash } => {
                let found = *hasher.finalize().as_bytes();
                return if (bytes, hash) == (taken, found) {
                    Ok((taken, found))
                } else {
                    Err(FileError::Damaged)
                };
            }
        }
    }
}

/// Gives a new file its owner and permissions. By its handle: where the private directory lies in
/// somebody else's, the name may stand for another file by now.
fn dress(place: &Place, incoming: &Incoming, draft: &Draft, mode: Option<u32>) -> io::Result<()> {
    if let Some((uid, gid)) = place.owner {
        incoming.dir().set_owner(draft.name(), uid, gid)?;
    }
    if let Some(mode) = mode {
        draft.file().set_mode(mode)?;
    }
    Ok(())
}

/// Whose turn it is to put something at a path. Few enough to be there always, and so many that different
/// paths seldom wait for each other; one name in two workspaces shares its turns.
fn turn_of(path: &WirePath) -> &'static Mutex<()> {
    static TURNS: [Mutex<()>; 64] = [const { Mutex::new(()) }; 64];
    let mut hasher = DefaultHasher::new();
    path.as_bytes().hash(&mut hasher);
    &TURNS[(hasher.finish() % 64) as usize]
}

/// Puts a complete file in its place.
fn put(
    incoming: &Incoming,
    mut draft: Draft,
    parent: &DirHandle,
    leaf: &[u8],
    path: &WirePath,
    expected: &Expected,
    caller: &dyn Caller,
) -> Result<(), FileError> {
    let failed = |error| FileError::of(path, error);
    // Guards no data, so a panic elsewhere spoils nothing.
    let _turn = turn_of(path).lock().unwrap_or_else(PoisonError::into_inner);
    // The last moment at which it can be left as it was.
    caller.is_there()?;
    let found = look(parent, leaf, path, expected, caller)?;
    let Some(before) = found else {
        incoming.dir().rename_new(draft.name(), parent, leaf).map_err(failed)?;
        draft.moved();
        return Ok(());
    };
    // From here on the draft's name may stand for somebody's file: it is kept after a crash.
    draft.keep().map_err(failed)?;
    let ours = draft.file().meta().map_err(failed)?;
    incoming.dir().exchange(draft.name(), parent, leaf).map_err(failed)?;
    let displaced = incoming.dir().lstat(draft.name()).map_err(failed)?;
    let unseen = match expected {
        Expected::Content(_) => stamp(&displaced) != stamp(&before),
        // Whatever file it was; but a directory that took its place meanwhile is nobody's to replace.
        Expected::Anything | Expected::Absent => displaced.kind != before.kind,
    };
    if unseen {
        put_back(incoming, draft, &ours, parent, leaf).map_err(failed)?;
        let why = "it was changed at the very moment at which it was to be replaced";
        return Err(FileError::Raced { name: path.to_string(), why });
    }
    // The new file has to be there for good before the old one goes.
    parent.sync().and_then(|()| draft.remove()).map_err(failed)
}

/// Puts a file back that a draft has displaced. Somebody may have saved his over the draft meanwhile, or
/// written into it: then that is what stays, and what it would have replaced goes to the trash.
fn put_back(
    incoming: &Incoming,
    draft: Draft,
    ours: &Meta,
    parent: &DirHandle,
    leaf: &[u8],
) -> io::Result<()> {
    incoming.dir().exchange(draft.name(), parent, leaf)?;
    if stamp(&incoming.dir().lstat(draft.name())?) == stamp(ours) {
        parent.sync()?;
        return draft.remove();
    }
    incoming.dir().exchange(draft.name(), parent, leaf)?;
    // What a draft leaves that is not ours is kept.
    parent.sync()
}

#[cfg(test)]
mod tests {
    use cortex_shared::ids::WorkspaceId;

    use super::*;
    use crate::sync::WorkspaceConfig;

    #[test]
    fn what_was_saved_over_a_draft_before_another_file_is_put_back_stays() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("root");
        std::fs::create_dir(&root).unwrap();
        let config = WorkspaceConfig {
            id: WorkspaceId::new(),
            name: "w".to_owned(),
            root: root.clone(),
            state_dir: folder.path().join("state"),
            roots: Default::default(),
            library: None,
        };
        let parent = DirHandle::open_ambient(&root).unwrap();
        let incoming = config.incoming(&parent).unwrap();
        let path = root.join("f");
        type Meanwhile = fn(&std::path::Path);
        let cases: [(Meanwhile, &[u8], usize); 3] = [
            (|_| {}, b"theirs", 0),
            (
                |path| {
                    std::fs::write(path.with_extension("n"), b"newest").unwrap();
                    std::fs::rename(path.with_extension("n"), path).unwrap();
                },
                b"newest",
                1,
            ),
            (|path| std::fs::write(path, b"written into ours").unwrap(), b"written into ours", 1),
        ];
        let mut expected = 0;
        for (meanwhile, stays, kept) in cases {
            std::fs::write(&path, b"theirs").unwrap();
            let mut draft = incoming.begin().unwrap();
            draft.file().write_all_at(b"ours", 0).unwrap();
            draft.keep().unwrap();
            let ours = draft.file().meta().unwrap();
            incoming.dir().exchange(draft.name(), &parent, b"f").unwrap();
            meanwhile(&path);
            put_back(&incoming, draft, &ours, &parent, b"f").unwrap();
            assert_eq!(std::fs::read(&path).unwrap(), stays);
            assert!(incoming.dir().names().unwrap().is_empty());
            expected += kept;
            let trash = config.state_dir.join("workspaces").join(config.id.to_string());
            let trash = std::fs::read_dir(trash.join("files/trash")).unwrap();
            let trash: Vec<_> = trash.map(|e| std::fs::read(e.unwrap().path()).unwrap()).collect();
            assert_eq!(trash.len(), expected, "{stays:?}");
            assert!(trash.iter().all(|content| content == b"theirs"));
        }
    }
}
