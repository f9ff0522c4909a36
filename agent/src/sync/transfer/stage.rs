//! Putting files together in the stage, from chunks in whatever order they come.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;

use bytes::Bytes;
use cortex_shared::chunk::ChunkRef;
use cortex_shared::entry::{Digest, Entry, File};
use cortex_shared::pack::{InvalidPack, Pack};
use cortex_shared::wire_path::WirePath;
use tokio_util::sync::CancellationToken;

use crate::root_dir::FileHandle;
use crate::sync::core::Core;
use crate::sync::index::IndexError;
use crate::sync::plan::LocalChange;
use crate::sync::private_dir::PrivateDir;
use crate::sync::problem::Finding;

use super::lane::LARGE_BYTES;

/// Local files that are tried as a source of the same content.
const SOURCES: u32 = 4;
/// What is copied or hashed between two looks whether to stop.
const PIECE_BYTES: usize = 8 * 1024 * 1024;

/// A file here that holds some or all of the content that is wanted. It is open, so that it can be
/// read even if it is taken away meanwhile.
struct Source {
    file: FileHandle,
    /// What it held when it was hashed.
    held: File,
}

struct StagedFile {
    name: Vec<u8>,
    sources: Vec<Source>,
    created: bool,
    /// Places in the file that wait for a chunk.
    waiting: usize,
    /// Why it cannot be put together.
    broken: Option<String>,
}

#[derive(Clone, Copy)]
struct Place {
    file: usize,
    offset: u64,
    len: u32,
}

/// The files and links of a plan that are being put together. Knows every place where a chunk is
/// wanted, so that a pack that arrives serves all of them, and none is fetched twice.
pub(super) struct Stage {
    private: Arc<PrivateDir>,
    /// By number of the change; `None` for changes that need no file.
    files: Vec<Option<StagedFile>>,
    wanted: HashMap<Digest, Vec<Place>>,
}

impl Stage {
    /// A stage for `changes`; `needed` tells which of them get a file or link.
    pub(super) fn new(
        private: Arc<PrivateDir>,
        changes: &[LocalChange],
        needed: impl Fn(&LocalChange) -> bool,
    ) -> Self {
        let mut files = Vec::with_capacity(changes.len());
        let mut wanted: HashMap<Digest, Vec<Place>> = HashMap::new();
        for (number, change) in changes.iter().enumerate() {
            if !needed(change) {
                files.push(None);
                continue;
            }
            let mut waiting = 0;
            if let Some(Entry::File(file)) = &change.to {
                for (chunk, offset) in with_offsets(file) {
                    let place = Place { file: number, offset, len: chunk.len };
                    wanted.entry(chunk.hash).or_default().push(place);
                    waiting += 1;
                }
            }
            let large = matches!(&change.to, Some(Entry::File(file)) if file.size > LARGE_BYTES);
            let name = if large { private.part_name() } else { private.stage_name() };
            files.push(Some(StagedFile {
                name,
                sources: Vec::new(),
                created: false,
                waiting,
                broken: None,
            }));
        }
        Self { private, files, wanted }
    }

    /// A stage without files.
    pub(super) fn empty(private: Arc<PrivateDir>) -> Self {
        Self { private, files: Vec::new(), wanted: HashMap::new() }
    }

    /// Moves a file that has been begun to another stage, and tells its number there.
    pub(super) fn move_to(&mut self, number: usize, file: &File, other: &mut Self) -> usize {
        let moved = other.files.len();
        for chunk in file.chunks() {
            let Some(places) = self.wanted.get_mut(&chunk.hash) else { continue };
            let own = places.extract_if(.., |place| place.file == number);
            let own: Vec<Place> = own.map(|place| Place { file: moved, ..place }).collect();
            if places.is_empty() {
                self.wanted.remove(&chunk.hash);
            }
            if !own.is_empty() {
                other.wanted.entry(chunk.hash).or_default().extend(own);
            }
        }
        other.files.push(self.files[number].take());
        moved
    }

    /// Begins the file or link of a change and takes what can be had from here, unless that may take
    /// long and can wait until [`Self::take_sources`]. Returns the chunks that are missing then.
    pub(super) fn begin(
        &mut self,
        number: usize,
        change: &LocalChange,
        core: &Core,
        can_wait: bool,
        cancel: &CancellationToken,
    ) -> Result<Vec<Digest>, StageError> {
        if self.files[number].is_none() {
            return Ok(Vec::new());
        }
        let file = match &change.to {
            Some(Entry::File(file)) => file,
            Some(Entry::Link { target }) => {
                if let Some(staged) = &mut self.files[number] {
                    self.private.stage().make_link(&staged.name, target)?;
                    staged.created = true;
                }
                return Ok(Vec::new());
            }
            Some(Entry::Dir) | None => return Ok(Vec::new()),
        };
        self.create(number)?;
        self.settle_zeros(number, file);
        if self.is_waiting(number) {
            let sources = sources(file, &change.path, core)?;
            if let Some(staged) = &mut self.files[number] {
                staged.sources = sources;
            }
            if file.size <= LARGE_BYTES || !can_wait {
                self.take_sources(number, file, cancel)?;
            }
        }
        if !self.is_waiting(number) {
            return Ok(Vec::new());
        }
        let is_here = |chunk: &ChunkRef| {
            self.wanted
                .get(&chunk.hash)
                .is_some_and(|places| places.iter().any(|place| place.file == number))
        };
        Ok(file.chunks().filter(is_here).map(|chunk| chunk.hash).collect())
    }

    /// Whether something is still missing to a file.
    pub(super) fn is_waiting(&self, number: usize) -> bool {
        self.files[number].as_ref().is_some_and(|file| file.waiting > 0)
    }

    fn create(&mut self, number: usize) -> io::Result<()> {
        if let Some(staged) = &mut self.files[number]
            && !staged.created
        {
            self.private.stage().create_new(&staged.name, 0o666)?;
            staged.created = true;
        }
        Ok(())
    }

    /// The name in the stage of a file to which nothing is missing, or what is wrong with it.
    pub(super) fn finished(
        &mut self,
        number: usize,
        change: &LocalChange,
        cancel: &CancellationToken,
    ) -> Result<Vec<u8>, Finding> {
        let missing = || {
            let text =
                "the hub does not have all of its content at present; it asks the members for it";
            Finding::at(&change.path, "content_missing", text)
        };
        let failed = |error: &str| Finding::at(&change.path, "stage_failed", error);
        let staged = self.files[number].as_mut().ok_or_else(missing)?;
        if let Some(error) = &staged.broken {
            return Err(failed(error));
        }
        if !staged.created || staged.waiting > 0 {
            return Err(missing());
        }
        let Some(Entry::File(file)) = &change.to else { return Ok(staged.name.clone()) };
        let mut check = || -> io::Result<bool> {
            let handle = self.private.stage().open_for_writing(&staged.name)?;
            // Also makes the hole at the end, if there is one.
            handle.set_len(file.size)?;
            // A single chunk is the content, and its hash has been checked.
            let whole = file.recipe.is_empty() || hash_of(&handle, cancel)? == file.content;
            if whole {
                staged.name = self.private.whole(&staged.name)?;
            }
            Ok(whole)
        };
        match check() {
            Ok(true) => Ok(staged.name.clone()),
            Ok(false) => Err(failed("its chunks do not make up its content")),
            Err(error) => Err(failed(&error.to_string())),
        }
    }

    /// As [`Self::finished`], and forgets the name, since the caller takes the file over.
    pub(super) fn take_finished(
        &mut self,
        number: usize,
        change: &LocalChange,
        cancel: &CancellationToken,
    ) -> Result<Vec<u8>, Finding> {
        let name = self.finished(number, change, cancel)?;
        self.taken(number);
        Ok(name)
    }

    /// Forgets the name of a file that has been taken over.
    pub(super) fn taken(&mut self, number: usize) {
        self.files[number] = None;
    }

    /// Removes what has not been taken over.
    pub(super) fn clean(&self) {
        for staged in self.files.iter().flatten().filter(|staged| staged.created) {
            // What stays is removed at the next start.
            self.private.stage().remove_file(&staged.name).ok();
        }
    }

    /// Writes every wanted chunk of a pack to its places. A file that cannot be written to is given
    /// up by itself.
    ///
    /// # Errors
    /// If the pack is not valid; what came before the damage has been taken.
    pub(super) fn take_pack(&mut self, pack: Bytes) -> Result<u64, InvalidPack> {
        let pack = Pack::parse(pack)?;
        let mut bytes = 0;
        pack.for_each_chunk(|chunk, data| {
            let Some(places) = self.wanted.remove(&chunk.hash) else { return };
            bytes += data.len() as u64;
            for place in places {
                if let Err(error) = self.write(place, data)
                    && let Some(staged) = &mut self.files[place.file]
                {
                    staged.broken.get_or_insert(error.to_string());
                }
            }
        })?;
        Ok(bytes)
    }

    fn write(&mut self, place: Place, data: &[u8]) -> io::Result<()> {
        self.create(place.file)?;
        let Some(staged) = &mut self.files[place.file] else { return Ok(()) };
        staged.waiting -= 1;
        if place.len as usize != data.len() {
            staged.broken = Some("a chunk has another length than its file says".to_owned());
            return Ok(());
        }
        // Zeros become a hole, since the length is set at the end.
        if data.iter().any(|&b| b != 0) {
            let file = self.private.stage().open_for_writing(&staged.name)?;
            file.write_all_at(data, place.offset)?;
        }
        Ok(())
    }

    fn settle_zeros(&mut self, number: usize, file: &File) {
        for chunk in file.chunks().filter(ChunkRef::is_zero) {
            self.settle(number, &chunk.hash, None);
        }
    }

    /// Notes that a chunk is in its places in one file, or only in that at `offset`.
    fn settle(&mut self, number: usize, hash: &Digest, offset: Option<u64>) {
        let Some(places) = self.wanted.get_mut(hash) else { return };
        let before = places.len();
        places.retain(|place| {
            place.file != number || offset.is_some_and(|offset| place.offset != offset)
        });
        let settled = before - places.len();
        if places.is_empty() {
            self.wanted.remove(hash);
        }
        if let Some(staged) = &mut self.files[number] {
            staged.waiting -= settled;
        }
    }

    /// The chunks that are still wanted.
    pub(super) fn needed(&self) -> Vec<Digest> {
        let mut needed: Vec<_> = self.wanted.keys().copied().collect();
        needed.sort_unstable();
        needed
    }

    /// Takes what the sources hold: the whole content, which makes a rename or a copy cost no
    /// transfer, or some chunks.
    pub(super) fn take_sources(
        &mut self,
        number: usize,
        file: &File,
        cancel: &CancellationToken,
    ) -> io::Result<()> {
        let Some(staged) = &mut self.files[number] else { return Ok(()) };
        let sources = std::mem::take(&mut staged.sources);
        if sources.is_empty() {
            return Ok(());
        }
        let target = self.private.stage().open_for_writing(&staged.name)?;
        for Source { file: source, held } in sources {
            if held.content == file.content {
                if copy(&source, &target, file, cancel).unwrap_or(false) {
                    for chunk in file.chunks() {
                        self.settle(number, &chunk.hash, None);
                    }
                    return Ok(());
                }
            } else {
                self.copy_shared_chunks(number, file, (&source, &held), &target, cancel)?;
            }
        }
        Ok(())
    }

    /// Copies chunks from another version of the file.
    fn copy_shared_chunks(
        &mut self,
        number: usize,
        file: &File,
        (source, held): (&FileHandle, &File),
        target: &FileHandle,
        cancel: &CancellationToken,
    ) -> io::Result<()> {
        let at: HashMap<Digest, u64> =
            with_offsets(held).map(|(chunk, offset)| (chunk.hash, offset)).collect();
        let mut buffer = Vec::new();
        for (chunk, offset) in with_offsets(file) {
            let Some(&from) = at.get(&chunk.hash) else { continue };
            if cancel.is_cancelled() {
                return Err(stopped());
            }
            buffer.resize(chunk.len as usize, 0);
            // It may have been changed since it was hashed: the hash decides.
            if source.read_exact_at(&mut buffer, from).is_ok() && Digest::of(&buffer) == chunk.hash
            {
                target.write_all_at(&buffer, offset)?;
                self.settle(number, &chunk.hash, Some(offset));
            }
        }
        Ok(())
    }
}

/// Opens the files here that hold the content, and the version of the file that stands here.
fn sources(file: &File, path: &WirePath, core: &Core) -> Result<Vec<Source>, StageError> {
    let mut rows = core.index.with_content(&file.content, SOURCES)?;
    if !file.recipe.is_empty() {
        rows.extend(core.index.get(path)?);
    }
    let open = |row: crate::sync::index::IndexRow| {
        let (parent, leaf) = core.root.parent_of(&row.row.path).ok()?;
        match row.row.local {
            Some(Entry::File(held)) => Some(Source { file: parent.open_file(leaf).ok()?, held }),
            _ => None,
        }
    };
    Ok(rows.into_iter().filter_map(open).collect())
}

/// Why files cannot be put together, as opposed to a single one.
#[derive(Debug, thiserror::Error)]
pub(super) enum StageError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error(transparent)]
    Index(#[from] IndexError),
}

impl From<StageError> for crate::sync::core::SyncError {
    fn from(error: StageError) -> Self {
        match error {
            StageError::Io(error) => error.into(),
            StageError::Index(error) => error.into(),
        }
    }
}

fn with_offsets(file: &File) -> impl Iterator<Item = (ChunkRef, u64)> + '_ {
    let mut next = 0;
    file.chunks().map(move |chunk| {
        let offset = next;
        next += u64::from(chunk.len);
        (chunk, offset)
    })
}

/// Copies a whole file; false if it turns out not to have the wanted content.
fn copy(
    source: &FileHandle,
    target: &FileHandle,
    wanted: &File,
    cancel: &CancellationToken,
) -> io::Result<bool> {
    let mut copied = 0;
    while copied < wanted.size {
        if cancel.is_cancelled() {
            return Err(stopped());
        }
        let piece = usize::try_from(wanted.size - copied).unwrap_or(usize::MAX).min(PIECE_BYTES);
        match target.copy_from(source, copied, piece)? {
            0 => break,
            more => copied += more as u64,
        }
    }
    if copied == wanted.size && hash_of(target, cancel)? == wanted.content {
        return Ok(true);
    }
    target.set_len(0)?;
    Ok(false)
}

fn hash_of(file: &FileHandle, cancel: &CancellationToken) -> io::Result<Digest> {
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; 256 * 1024];
    let mut offset = 0;
    loop {
        if cancel.is_cancelled() {
            return Err(stopped());
        }
        let read = file.read_at(&mut buffer, offset)?;
        if read == 0 {
            return Ok(hasher.finalize().into());
        }
        hasher.update(&buffer[..read]);
        offset += read as u64;
    }
}

/// Told to nobody: whoever stops does not ask.
fn stopped() -> io::Error {
    io::Error::other("stopped")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::root_dir::DirHandle;

    #[test]
    fn copying_a_file_ends_as_soon_as_it_is_told_to() {
        let folder = tempfile::tempdir().unwrap();
        let top = DirHandle::open_ambient(folder.path()).unwrap();
        let content = vec![7; 3 * PIECE_BYTES];
        let source = top.create_new(b"source", 0o600).unwrap();
        source.write_all_at(&content, 0).unwrap();
        let (size, recipe) = (content.len() as u64, cortex_shared::chunk::Recipe::default());
        let content = Digest::of(&content);
        let wanted = File { content, size, executable: false, mtime_ns: 0, recipe };
        let go_on = CancellationToken::new();
        let target = top.create_new(b"target", 0o600).unwrap();
        assert!(copy(&source, &target, &wanted, &go_on).unwrap());
        let stop = CancellationToken::new();
        stop.cancel();
        let other = top.create_new(b"other", 0o600).unwrap();
        assert!(copy(&source, &other, &wanted, &stop).is_err());
        assert!(hash_of(&target, &stop).is_err());
    }
}
