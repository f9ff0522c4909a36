//! Putting files together in the stage, from chunks in whatever order they come.

use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use cortex_shared::chunk::ChunkRef;
use cortex_shared::entry::{Digest, Entry, File};
use cortex_shared::pack::{InvalidPack, Pack};
use cortex_shared::wire_path::WirePath;
use tokio_util::sync::CancellationToken;

use crate::root_dir::{DirHandle, FileHandle};
use crate::sync::apply::{Attributes, Print};
use crate::sync::core::Core;
use crate::sync::index::IndexError;
use crate::sync::plan::LocalChange;
use crate::sync::private_dir::PrivateDir;
use crate::sync::problem::{Code, Finding};

use super::growing::Growing;
use super::lane::LARGE_BYTES;
use super::large::lock;

/// Local files that are tried as a source of the same content.
const SOURCES: u32 = 4;
/// What is copied or hashed between two looks whether to stop.
const PIECE_BYTES: usize = 8 * 1024 * 1024;
/// Before the umask.
const NEW_FILE_MODE: u32 = 0o666;

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
    /// Its content is known to be right as a whole.
    checked: bool,
    /// If it has several chunks: its length, and what is known of its content so far.
    growing: Option<(u64, Arc<Growing>)>,
    /// If it has one chunk: what it gets together with that.
    attributes: Option<Attributes>,
    /// What it looks like with them.
    print: Option<Print>,
}

/// A file or link to which nothing is missing.
pub(super) struct Finished {
    /// Its name in the stage.
    pub(super) name: Vec<u8>,
    /// What it looks like, if it has its attributes.
    pub(super) print: Option<Print>,
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
    /// A stage for `changes`; `needed` tells which of them get a file or link, which is to belong to
    /// `owner`.
    pub(super) fn new(
        private: Arc<PrivateDir>,
        changes: &[LocalChange],
        needed: impl Fn(&LocalChange) -> bool,
        owner: Option<(u32, u32)>,
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
            let growing = match &change.to {
                Some(Entry::File(file)) if !file.recipe.is_empty() => {
                    Some((file.size, Arc::default()))
                }
                _ => None,
            };
            files.push(Some(StagedFile {
                name,
                sources: Vec::new(),
                created: false,
                waiting,
                broken: None,
                checked: false,
                attributes: Attributes::of_new(change, owner).filter(|_| growing.is_none()),
                growing,
                print: None,
            }));
        }
        Self { private, files, wanted }
    }

    /// A stage without files.
    pub(super) fn empty(private: Arc<PrivateDir>) -> Self {
        Self { private, files: Vec::new(), wanted: HashMap::new() }
    }

    /// Moves a file that has been begun to the end of another stage.
    pub(super) fn move_to(&mut self, number: usize, file: &File, other: &mut Self) {
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
    }

    /// Begins the file or link of a change and takes its content from here if all of it is, unless that
    /// may take long and can wait until [`take_from_here`]. Returns the chunks that are missing then.
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
        // A single chunk comes into a file that is made for it, unless there is nothing to come.
        let is_hole = file.recipe.is_empty() && file.chunks().any(|chunk| chunk.is_zero());
        if !file.recipe.is_empty() || is_hole || !self.is_waiting(number) {
            self.create(number, file.size)?;
            self.settle_zeros(number, file);
        }
        if self.is_waiting(number) {
            let sources = sources(file, &change.path, core)?;
            if let Some(staged) = &mut self.files[number] {
                staged.sources = sources;
            }
            if file.size <= LARGE_BYTES || !can_wait {
                self.take_whole(number, file, cancel)?;
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

    /// Makes a file, if it does not exist: of `len` bytes, so that holes can be read wherever they are.
    fn create(&mut self, number: usize, len: u64) -> io::Result<()> {
        if let Some(staged) = &mut self.files[number]
            && !staged.created
        {
            let file = self.private.stage().create_new(&staged.name, NEW_FILE_MODE)?;
            staged.created = true;
            if len > 0 {
                file.set_len(len)?;
            }
        }
        Ok(())
    }

    /// A file to which nothing is missing, or what is wrong with it.
    pub(super) fn finished(
        &mut self,
        number: usize,
        change: &LocalChange,
        cancel: &CancellationToken,
    ) -> Result<Finished, Finding> {
        let missing = || {
            let text =
                "the hub does not have all of its content at present; it asks the members for it";
            Finding::at(&change.path, Code::ContentMissing, text)
        };
        let failed = |error: &str| Finding::at(&change.path, Code::StageFailed, error);
        let staged = self.files[number].as_mut().ok_or_else(missing)?;
        if let Some(error) = &staged.broken {
            return Err(failed(error));
        }
        if !staged.created || staged.waiting > 0 {
            return Err(missing());
        }
        let Some(Entry::File(file)) = &change.to else { return Ok(staged.as_finished()) };
        let mut check = || -> io::Result<bool> {
            let whole = match &staged.growing {
                Some((size, growing)) if !staged.checked => {
                    let handle = self.private.stage().open_for_writing(&staged.name)?;
                    growing.finish(&handle, *size, cancel)? == Some(file.content)
                }
                // A single chunk is the content, and its hash has been checked.
                _ => true,
            };
            if whole {
                staged.name = self.private.whole(&staged.name)?;
            }
            Ok(whole)
        };
        match check() {
            Ok(true) => Ok(staged.as_finished()),
            Ok(false) => Err(failed("its chunks do not make up its content")),
            Err(error) => Err(failed(&error.to_string())),
        }
    }

    /// As [`Self::finished`], and forgets the file, since the caller takes it over.
    pub(super) fn take_finished(
        &mut self,
        number: usize,
        change: &LocalChange,
        cancel: &CancellationToken,
    ) -> Result<Finished, Finding> {
        let finished = self.finished(number, change, cancel)?;
        self.taken(number);
        Ok(finished)
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

    /// Hands out the places where a chunk is wanted. Whoever takes them tells when they are written.
    fn take_places(&mut self, hash: &Digest) -> Vec<Writing> {
        let mut writings = Vec::new();
        for place in self.wanted.remove(hash).unwrap_or_default() {
            let file = self.files[place.file].as_ref();
            // One of a single chunk is made by whoever writes that.
            let made = match file.and_then(|file| file.growing.as_ref()) {
                Some(&(len, _)) => self.create(place.file, len),
                None => Ok(()),
            };
            match made {
                Ok(()) => writings.extend(self.writing(place)),
                Err(error) => self.written(place, Err(error)),
            }
        }
        writings
    }

    fn writing(&self, place: Place) -> Option<Writing> {
        let staged = self.files[place.file].as_ref()?;
        let growing = staged.growing.as_ref().map(|(_, growing)| growing.clone());
        let (name, new) = (staged.name.clone(), !staged.created);
        Some(Writing { place, name, new, growing, attributes: staged.attributes })
    }

    /// Takes note of what came of a place. A file that cannot be written to is given up by itself.
    fn written(&mut self, place: Place, result: io::Result<Option<Print>>) {
        let Some(staged) = &mut self.files[place.file] else { return };
        staged.waiting -= 1;
        staged.created = true;
        match result {
            Ok(print) => staged.print = print,
            Err(error) => {
                staged.broken.get_or_insert(error.to_string());
            }
        }
    }

    /// Takes a place back in which nothing could be put.
    fn still_wanted(&mut self, hash: Digest, place: Place) {
        self.wanted.entry(hash).or_default().push(place);
    }

    fn settle_zeros(&mut self, number: usize, file: &File) {
        for (chunk, offset) in with_offsets(file).filter(|(chunk, _)| chunk.is_zero()) {
            if let Some(staged) = &self.files[number]
                && let Some((_, growing)) = &staged.growing
            {
                growing.add_hole(offset, chunk.len);
            }
            self.settle(number, &chunk.hash);
        }
    }

    /// Notes that a chunk is in its places in one file.
    fn settle(&mut self, number: usize, hash: &Digest) {
        let taken = self.take_places_in(number, hash, |_| true).len();
        if let Some(staged) = &mut self.files[number] {
            staged.waiting -= taken;
        }
    }

    /// Takes those places in one file where a chunk is wanted.
    fn take_places_in(
        &mut self,
        number: usize,
        hash: &Digest,
        which: impl Fn(&Place) -> bool,
    ) -> Vec<Place> {
        let Some(places) = self.wanted.get_mut(hash) else { return Vec::new() };
        let taken = places.extract_if(.., |place| place.file == number && which(place)).collect();
        if places.is_empty() {
            self.wanted.remove(hash);
        }
        taken
    }

    /// The chunks that are still wanted, in the order of the files: what comes in this order can be
    /// hashed as it comes.
    pub(super) fn needed(&self) -> Vec<Digest> {
        let first = |places: &[Place]| {
            places.iter().map(|place| (place.file, place.offset)).min().unwrap_or_default()
        };
        let mut needed: Vec<_> =
            self.wanted.iter().map(|(hash, places)| (first(places), *hash)).collect();
        needed.sort_unstable();
        needed.into_iter().map(|(_, hash)| hash).collect()
    }

    /// Takes the whole content from a source that holds it, which makes a rename or a copy cost no
    /// transfer.
    fn take_whole(
        &mut self,
        number: usize,
        file: &File,
        cancel: &CancellationToken,
    ) -> io::Result<()> {
        let Some(staged) = &mut self.files[number] else { return Ok(()) };
        let same = |source: &mut Source| source.held.content == file.content;
        let sources: Vec<_> = staged.sources.extract_if(.., same).collect();
        if sources.is_empty() {
            return Ok(());
        }
        self.create(number, 0)?;
        let Some(staged) = &mut self.files[number] else { return Ok(()) };
        let target = self.private.stage().open_for_writing(&staged.name)?;
        for Source { file: source, .. } in sources {
            if copy(&source, &target, file, cancel).unwrap_or(false) {
                staged.checked = true;
                for chunk in file.chunks() {
                    self.settle(number, &chunk.hash);
                }
                return Ok(());
            }
        }
        // What was copied of it is not wanted: zeros are not written where holes are expected.
        target.set_len(0)?;
        target.set_len(file.size)
    }

    /// What can be copied from other versions of the file, chunk by chunk.
    fn take_copies(&mut self, number: usize, file: &File) -> Vec<ChunkCopy> {
        let Some(staged) = &mut self.files[number] else { return Vec::new() };
        let mut copies = Vec::new();
        for Source { file: source, held } in std::mem::take(&mut staged.sources) {
            let at: HashMap<Digest, u64> =
                with_offsets(&held).map(|(chunk, offset)| (chunk.hash, offset)).collect();
            for (chunk, offset) in with_offsets(file) {
                let Some(&from) = at.get(&chunk.hash) else { continue };
                for place in self.take_places_in(number, &chunk.hash, |p| p.offset == offset) {
                    let Some(writing) = self.writing(place) else { continue };
                    copies.push(ChunkCopy { source: source.clone(), from, chunk, writing });
                }
            }
        }
        copies
    }
}

impl StagedFile {
    fn as_finished(&self) -> Finished {
        Finished { name: self.name.clone(), print: self.print }
    }
}

/// A place that is being written.
struct Writing {
    place: Place,
    name: Vec<u8>,
    /// Its file does not exist yet.
    new: bool,
    growing: Option<Arc<Growing>>,
    attributes: Option<Attributes>,
}

impl Writing {
    /// Writes a chunk that has been checked. If the file is whole with that, it gets its attributes; what
    /// it looks like then.
    fn write(&self, stage: &DirHandle, data: &[u8]) -> io::Result<Option<Print>> {
        let Place { offset, len, .. } = self.place;
        if len as usize != data.len() {
            return Err(io::Error::other("a chunk has another length than its file says"));
        }
        let file = if self.new {
            stage.create_new(&self.name, NEW_FILE_MODE)?
        } else {
            stage.open_for_writing(&self.name)?
        };
        if data.iter().any(|&b| b != 0) {
            file.write_all_at(data, offset)?;
        } else if self.new {
            // Zeros become a hole: a file of several chunks has its length from its beginning.
            file.set_len(u64::from(len))?;
        }
        if let Some(growing) = &self.growing {
            growing.add(&file, offset, data)?;
        }
        let give = |attributes: &Attributes| attributes.give(stage, &self.name, &file, None);
        self.attributes.as_ref().map(give).transpose()
    }
}

/// Writes every wanted chunk of a pack to its places. Several threads may do that at once.
///
/// # Errors
/// If the pack is not valid; what came before the damage has been taken.
pub(super) fn take_pack(stage: &Mutex<Stage>, pack: Bytes) -> Result<u64, InvalidPack> {
    let pack = Pack::parse(pack)?;
    let private = lock(stage).private.clone();
    let mut bytes = 0;
    pack.for_each_chunk(|chunk, data| {
        let writings = lock(stage).take_places(&chunk.hash);
        if !writings.is_empty() {
            bytes += data.len() as u64;
        }
        for writing in writings {
            let result = writing.write(private.stage(), data);
            lock(stage).written(writing.place, result);
        }
    })?;
    Ok(bytes)
}

/// A chunk that another version of a file here holds.
struct ChunkCopy {
    source: FileHandle,
    from: u64,
    chunk: ChunkRef,
    writing: Writing,
}

/// Chunks that are copied from other versions of files here, by several threads.
pub(super) struct Copies {
    stage: Arc<Mutex<Stage>>,
    copies: Vec<ChunkCopy>,
    next: AtomicUsize,
    cancel: CancellationToken,
}

impl Copies {
    /// Copies one chunk after the other until none is left.
    pub(super) fn work(&self) {
        let private = lock(&self.stage).private.clone();
        let mut buffer = Vec::new();
        while let Some(copy) = self.copies.get(self.next.fetch_add(1, Ordering::Relaxed)) {
            let ChunkCopy { source, from, chunk, writing } = copy;
            buffer.resize(chunk.len as usize, 0);
            // It may have been changed since it was hashed: the hash decides.
            let found = !self.cancel.is_cancelled()
                && source.read_exact_at(&mut buffer, *from).is_ok()
                && Digest::of(&buffer) == chunk.hash;
            let result = found.then(|| writing.write(private.stage(), &buffer));
            let mut stage = lock(&self.stage);
            match result {
                Some(result) => stage.written(writing.place, result),
                None => stage.still_wanted(chunk.hash, writing.place),
            }
        }
    }
}

/// Takes what files here hold of the content of files that have been begun: all of it, or some chunks,
/// whose copying is left to the caller. The numbers are those in the stage.
pub(super) fn take_from_here<'a>(
    stage: &Arc<Mutex<Stage>>,
    changes: impl Iterator<Item = (usize, &'a LocalChange)>,
    cancel: &CancellationToken,
) -> Copies {
    let mut taking = lock(stage);
    let mut copies = Vec::new();
    for (number, change) in changes {
        let Some(Entry::File(file)) = &change.to else { continue };
        if let Err(error) = taking.take_whole(number, file, cancel) {
            tracing::debug!(path = %change.path, %error, "cannot take content from here");
        }
        copies.extend(taking.take_copies(number, file));
    }
    let (stage, next, cancel) = (stage.clone(), AtomicUsize::new(0), cancel.clone());
    Copies { stage, copies, next, cancel }
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
    let (mut copied, growing) = (0, Growing::default());
    while copied < wanted.size {
        if cancel.is_cancelled() {
            return Err(stopped());
        }
        let piece = usize::try_from(wanted.size - copied).unwrap_or(usize::MAX).min(PIECE_BYTES);
        match target.copy_from(source, copied, piece)? {
            0 => break,
            more => {
                growing.add_copied(copied, more)?;
                copied += more as u64;
            }
        }
    }
    if growing.finish(target, wanted.size, cancel)? == Some(wanted.content) {
        return Ok(true);
    }
    target.set_len(0)?;
    Ok(false)
}

/// Told to nobody: whoever stops does not ask.
pub(super) fn stopped() -> io::Error {
    io::Error::other("stopped")
}

#[cfg(test)]
mod tests {
    use super::*;

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
    }
}
