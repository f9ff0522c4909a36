//! Looking at files: list, read, stat.

use std::collections::BinaryHeap;

use bytes::Bytes;
use cortex_shared::wire_path::WirePath;

use super::error::{IS_LINK, IS_SPECIAL};
use super::{Caller, Done, FileError, Info, Place};
use crate::root_dir::{DirHandle, FileHandle, FileKind, Meta};

/// Content in one piece.
const PIECE_BYTES: usize = 256 * 1024;
/// Entries in one piece, estimated.
const ENTRIES_BYTES: usize = 32 * 1024;
/// What an entry takes beside its names.
const ENTRY_BYTES: usize = 64;
/// Names of one directory that are held to be sorted. Half a million of a usual length.
const MAX_NAMES_BYTES: usize = 16 * 1024 * 1024;
/// What a name takes beside its bytes.
const NAME_BYTES: usize = 32;
/// Files up to this size are hashed unasked: as long as nobody waits for it.
const HASHED_BYTES: u64 = 16 * 1024 * 1024;

/// What an error calls a path.
fn shown(path: Option<&WirePath>) -> String {
    path.map_or_else(|| "the workspace's directory".to_owned(), WirePath::to_string)
}

impl Place {
    /// The directory above a path, and the name in it.
    pub(super) fn parent_of<'a>(
        &self,
        path: &'a WirePath,
    ) -> Result<(DirHandle, &'a [u8]), FileError> {
        self.root.parent_of(path).map_err(|error| FileError::of(path, error))
    }

    fn meta(&self, path: Option<&WirePath>) -> Result<Meta, FileError> {
        let meta = match path {
            None => self.root.top().meta(),
            Some(path) => self
                .parent_of(path)
                .and_then(|(parent, leaf)| {
                    parent.lstat(leaf).map_err(|error| FileError::of(path, error))
                })
                .map(Ok)?,
        };
        meta.map_err(|error| FileError::of(&shown(path), error))
    }
}

/// What there is to say of a name.
pub(super) fn info(name: &[u8], meta: &Meta, target: Vec<u8>) -> Info {
    Info {
        name: name.to_vec(),
        kind: meta.kind,
        size: meta.size,
        mode: meta.mode,
        mtime_ns: meta.mtime_ns,
        uid: meta.uid,
        gid: meta.gid,
        target,
        hash: None,
    }
}

fn info_in(directory: &DirHandle, name: &[u8]) -> std::io::Result<Option<Info>> {
    let Some(meta) = directory.try_lstat(name)? else { return Ok(None) };
    let target = match meta.kind {
        // It may have become something else just now.
        FileKind::Link => directory.read_link(name).unwrap_or_default(),
        FileKind::File | FileKind::Dir | FileKind::Other => Vec::new(),
    };
    Ok(Some(info(name, &meta, target)))
}

/// Lists a directory, or what is none.
pub(super) fn list(
    place: &Place,
    path: Option<&WirePath>,
    after: &[u8],
    limit: u64,
    caller: &mut dyn Caller,
) -> Result<Done, FileError> {
    if let Some(path) = path
        && place.meta(Some(path))?.kind != FileKind::Dir
    {
        let (parent, leaf) = place.parent_of(path)?;
        let entry = info_in(&parent, leaf).map_err(|error| FileError::of(path, error))?;
        caller.entries(entry.into_iter().collect())?;
        return Ok(Done::default());
    }
    let failed = |error| FileError::of(&shown(path), error);
    let directory = place.root.open_dir(path).map_err(failed)?;
    let (names, more) = names(&directory, path, after, limit, caller)?;
    let (mut piece, mut piece_bytes) = (Vec::new(), 0);
    for name in names {
        // One that is gone by now was not there.
        let Some(entry) = info_in(&directory, &name).map_err(failed)? else { continue };
        piece_bytes += entry.name.len() + entry.target.len() + ENTRY_BYTES;
        piece.push(entry);
        if piece_bytes >= ENTRIES_BYTES {
            caller.entries(std::mem::take(&mut piece))?;
            piece_bytes = 0;
        }
    }
    if !piece.is_empty() {
        caller.entries(piece)?;
    }
    Ok(Done { more, ..Done::default() })
}

/// The first `limit` names after one, sorted, and whether there are more.
fn names(
    directory: &DirHandle,
    path: Option<&WirePath>,
    after: &[u8],
    limit: u64,
    caller: &dyn Caller,
) -> Result<(Vec<Vec<u8>>, bool), FileError> {
    let failed = |error| FileError::of(&shown(path), error);
    let limit = if limit == 0 { usize::MAX } else { usize::try_from(limit).unwrap_or(usize::MAX) };
    let (mut first, mut held, mut more) = (BinaryHeap::new(), 0, false);
    for name in directory.iter().map_err(failed)? {
        let name = name.map_err(failed)?;
        if name.as_slice() <= after {
            continue;
        }
        held += name.len() + NAME_BYTES;
        first.push(name);
        if first.len() > limit {
            more = true;
            held -= first.pop().map_or(0, |name: Vec<u8>| name.len() + NAME_BYTES);
        }
        if held > MAX_NAMES_BYTES {
            let why = "too many names to sort; ask for a part of them, with --limit and --after";
            return Err(FileError::TooMuch { name: shown(path), why });
        }
        if first.len() % 1024 == 0 {
            caller.is_there()?;
        }
    }
    Ok((first.into_sorted_vec(), more))
}

/// Sends the content of a file.
pub(super) fn read(
    place: &Place,
    path: Option<&WirePath>,
    offset: u64,
    length: u64,
    caller: &mut dyn Caller,
) -> Result<Done, FileError> {
    let path = path.ok_or_else(|| FileError::IsDirectory { name: shown(None) })?;
    let failed = |error| FileError::of(path, error);
    let (file, before) = open(place, path)?;
    // No file is longer, and the kernel takes no offset beyond it.
    let (mut at, mut left) = (offset, length.min((i64::MAX as u64).saturating_sub(offset)));
    let mut hasher = blake3::Hasher::new();
    while left > 0 {
        let mut piece = vec![0; PIECE_BYTES.min(usize::try_from(left).unwrap_or(PIECE_BYTES))];
        let count = read_full(&file, &mut piece, at).map_err(failed)?;
        if count == 0 {
            break;
        }
        piece.truncate(count);
        hasher.update(&piece);
        at += count as u64;
        left -= count as u64;
        caller.data(Bytes::from(piece))?;
    }
    let after = file.meta().map_err(failed)?;
    Ok(Done {
        info: Some(info(path.name(), &before, Vec::new())),
        content: Some((at - offset, *hasher.finalize().as_bytes())),
        changed: stamp(&before) != stamp(&after),
        ..Done::default()
    })
}

/// Fills `piece`, but for the end of the file.
fn read_full(file: &FileHandle, piece: &mut [u8], at: u64) -> std::io::Result<usize> {
    let mut filled = 0;
    while filled < piece.len() {
        match file.read_at(&mut piece[filled..], at.saturating_add(filled as u64))? {
            0 => break,
            count => filled += count,
        }
    }
    Ok(filled)
}

/// What changes when the content does.
pub(super) fn stamp(meta: &Meta) -> (u64, u64, u64, i64) {
    (meta.dev, meta.ino, meta.size, meta.mtime_ns)
}

/// Opens a regular file, and says what it is otherwise.
fn open(place: &Place, path: &WirePath) -> Result<(FileHandle, Meta), FileError> {
    let (parent, leaf) = place.parent_of(path)?;
    let failed = |error| FileError::of(path, error);
    must_be_file(path, parent.lstat(leaf).map_err(failed)?.kind)?;
    let file = parent.open_file(leaf).map_err(failed)?;
    let meta = file.meta().map_err(failed)?;
    Ok((file, meta))
}

/// Refuses what is no regular file.
pub(super) fn must_be_file(path: &WirePath, kind: FileKind) -> Result<(), FileError> {
    let name = path.to_string();
    match kind {
        FileKind::File => Ok(()),
        FileKind::Dir => Err(FileError::IsDirectory { name }),
        FileKind::Link => Err(FileError::WrongKind { name, why: IS_LINK }),
        FileKind::Other => Err(FileError::WrongKind { name, why: IS_SPECIAL }),
    }
}

/// Says what stands at a path.
pub(super) fn stat(
    place: &Place,
    path: Option<&WirePath>,
    hash: bool,
    caller: &mut dyn Caller,
) -> Result<Done, FileError> {
    let meta = place.meta(path)?;
    let Some(path) = path else {
        return Ok(Done { info: Some(info(b"", &meta, Vec::new())), ..Done::default() });
    };
    let (parent, leaf) = place.parent_of(path)?;
    let found = info_in(&parent, leaf).map_err(|error| FileError::of(path, error))?;
    let mut found = found.ok_or_else(|| FileError::NotFound { name: path.to_string() })?;
    if found.kind == FileKind::File && (hash || found.size <= HASHED_BYTES) {
        match open(place, path) {
            Ok((file, meta)) => {
                found = info(leaf, &meta, Vec::new());
                found.hash = Some(hash_of(&file, path, caller)?);
            }
            // What may be looked at need not be readable.
            Err(FileError::Io { .. }) if !hash => {}
            Err(error) => return Err(error),
        }
    }
    Ok(Done { info: Some(found), ..Done::default() })
}

/// BLAKE3 of a file.
pub(super) fn hash_of(
    file: &FileHandle,
    path: &WirePath,
    caller: &dyn Caller,
) -> Result<[u8; 32], FileError> {
    let (mut hasher, mut piece, mut at) = (blake3::Hasher::new(), vec![0; PIECE_BYTES], 0);
    loop {
        caller.is_there()?;
        match read_full(file, &mut piece, at).map_err(|error| FileError::of(path, error))? {
            0 => return Ok(*hasher.finalize().as_bytes()),
            count => {
                hasher.update(&piece[..count]);
                at += count as u64;
            }
        }
    }
}
