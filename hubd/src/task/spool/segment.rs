//! The files of one task: segments of records, each with a check over all of it.
//!
//! The oldest segment becomes the newest, under its new number, and is written over: what overtakes its
//! own beginning again and again costs no new blocks and frees none. What is left of the old records does
//! not pass for new ones, since their checks hold under the old number only.

use std::fs::{self, File, OpenOptions};
use std::io::{self, IoSlice, Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use cortex_proto::MAX_OUTPUT_FRAME_BYTES;
use cortex_shared::durable;
use cortex_shared::replay::Piece;

/// Check (4 bytes), stream (1), nothing (3), length (4), offset (8).
const HEADER_BYTES: usize = 20;
/// Bytes that are read at once; the largest record fits.
const READ_BYTES: usize = MAX_OUTPUT_FRAME_BYTES + HEADER_BYTES;

/// The segments of a folder with their sizes, oldest first; none if there is no such folder.
pub(super) fn segments(folder: &Path) -> io::Result<Vec<(u64, u64)>> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry?;
        let number = entry.file_name().to_str().and_then(|name| name.parse().ok());
        match (number, entry.metadata()) {
            (Some(number), Ok(metadata)) => found.push((number, metadata.len())),
            // Removed meanwhile, or nothing of ours.
            (_, Err(_)) | (None, _) => {}
        }
    }
    found.sort_unstable();
    Ok(found)
}

fn path(folder: &Path, segment: u64) -> PathBuf {
    folder.join(format!("{segment:08}"))
}

fn header(segment: u64, piece: &Piece) -> [u8; HEADER_BYTES] {
    let mut header = [0; HEADER_BYTES];
    header[4] = u8::from(piece.stream == 1);
    // Frames are bounded far below 4 GiB where they come in.
    let length = u32::try_from(piece.data.len()).unwrap_or(u32::MAX);
    header[8..12].copy_from_slice(&length.to_be_bytes());
    header[12..].copy_from_slice(&piece.offset.to_be_bytes());
    let check = check(segment, &header[4..], &piece.data);
    header[..4].copy_from_slice(&check);
    header
}

/// Against what a crash tears, not against somebody who can write here.
fn check(segment: u64, header: &[u8], data: &[u8]) -> [u8; 4] {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&segment.to_be_bytes());
    hasher.update(header);
    hasher.update(data);
    hasher.finalize().to_be_bytes()
}

/// Appends to the segments of one task.
pub(super) struct SegmentWriter {
    folder: PathBuf,
    segment: u64,
    file: File,
    segment_bytes: u64,
    /// How much of a segment that was there before is still in the file.
    old_bytes: u64,
}

impl SegmentWriter {
    /// Begins a new segment behind those there are: the last of an earlier run may be torn.
    pub(super) fn open(folder: PathBuf) -> io::Result<Self> {
        durable::create_private_folder(&folder)?;
        let segment = segments(&folder)?.last().map_or(0, |(last, _)| last + 1);
        let file = open(&folder, segment, true)?;
        Ok(Self { folder, segment, file, segment_bytes: 0, old_bytes: 0 })
    }

    pub(super) fn segment_bytes(&self) -> u64 {
        self.segment_bytes
    }

    /// Begins the next segment, with the file of the oldest if there would be more than `most`. Returns
    /// how many bytes that freed.
    pub(super) fn next_segment(&mut self, most: u64) -> io::Result<u64> {
        self.cut();
        let next = self.segment + 1;
        let there = segments(&self.folder)?;
        let reused = match there.first() {
            Some(&(oldest, bytes)) if there.len() as u64 >= most && oldest < self.segment => {
                fs::rename(path(&self.folder, oldest), path(&self.folder, next))?;
                Some(bytes)
            }
            _ => None,
        };
        self.file = open(&self.folder, next, reused.is_none())?;
        (self.segment, self.segment_bytes) = (next, 0);
        self.old_bytes = reused.unwrap_or_default();
        Ok(self.old_bytes)
    }

    /// Cuts off what is left of an older segment. Its size counts; its content is nothing to anybody.
    fn cut(&mut self) {
        if self.old_bytes > self.segment_bytes {
            self.file.set_len(self.segment_bytes).ok();
        }
        self.old_bytes = 0;
    }

    /// Removes the oldest segment, unless it is the one that is written. Returns how many bytes that
    /// freed.
    pub(super) fn drop_oldest(&mut self) -> io::Result<u64> {
        match segments(&self.folder)?.first() {
            Some((oldest, bytes)) if *oldest < self.segment => {
                fs::remove_file(path(&self.folder, *oldest))?;
                Ok(*bytes)
            }
            _ => Ok(0),
        }
    }

    /// Appends a record; returns its size.
    pub(super) fn append(&mut self, piece: &Piece) -> io::Result<u64> {
        let header = header(self.segment, piece);
        let mut parts = [IoSlice::new(&header), IoSlice::new(&piece.data)];
        let mut parts = &mut parts[..];
        while !parts.is_empty() {
            match self.file.write_vectored(parts) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => IoSlice::advance_slices(&mut parts, written),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        let bytes = (HEADER_BYTES + piece.data.len()) as u64;
        self.segment_bytes += bytes;
        Ok(bytes)
    }
}

impl Drop for SegmentWriter {
    fn drop(&mut self) {
        self.cut();
    }
}

fn open(folder: &Path, segment: u64, new: bool) -> io::Result<File> {
    OpenOptions::new().write(true).create_new(new).mode(0o600).open(path(folder, segment))
}

/// Reads what is kept of one task, from its beginning on. Blocks.
pub struct SpoolReader {
    folder: PathBuf,
    segment: u64,
    position: u64,
}

impl SpoolReader {
    pub(super) fn new(folder: PathBuf) -> Self {
        Self { folder, segment: 0, position: 0 }
    }

    /// The next pieces; none if nothing more is there yet.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn read(&mut self) -> io::Result<Vec<Piece>> {
        loop {
            // Listed before it is read: if there is a later one by then, this one is complete.
            let list = segments(&self.folder)?;
            let Some((current, _)) = list.iter().find(|(number, _)| *number >= self.segment) else {
                return Ok(Vec::new());
            };
            if *current != self.segment {
                (self.segment, self.position) = (*current, 0);
            }
            let pieces = self.read_segment()?;
            let is_last = list.last().is_some_and(|(last, _)| *last == self.segment);
            if !pieces.is_empty() || is_last {
                return Ok(pieces);
            }
            (self.segment, self.position) = (self.segment + 1, 0);
        }
    }

    fn read_segment(&mut self) -> io::Result<Vec<Piece>> {
        let mut file = match File::open(path(&self.folder, self.segment)) {
            Ok(file) => file,
            // It had to go in this very moment.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error),
        };
        file.seek(SeekFrom::Start(self.position))?;
        let mut bytes = Vec::new();
        file.take(READ_BYTES as u64).read_to_end(&mut bytes)?;
        let bytes = Bytes::from(bytes);
        let mut pieces = Vec::new();
        let mut at = 0;
        while let Some((piece, next)) = record(self.segment, &bytes, at) {
            pieces.push(piece);
            at = next;
        }
        self.position += at as u64;
        Ok(pieces)
    }
}

/// The record that begins at `at`, and where the next one does; `None` if it is not complete.
fn record(segment: u64, bytes: &Bytes, at: usize) -> Option<(Piece, usize)> {
    let header = bytes.get(at..at + HEADER_BYTES)?;
    let length = u32::from_be_bytes(header[8..12].try_into().ok()?);
    let (start, length) = (at + HEADER_BYTES, usize::try_from(length).ok()?);
    let end = start.checked_add(length)?;
    let data = bytes.get(start..end)?;
    if length == 0 || header[..4] != check(segment, &header[4..], data) {
        return None;
    }
    let offset = u64::from_be_bytes(header[12..].try_into().ok()?);
    let stream = usize::from(header[4] == 1);
    Some((Piece { stream, offset, data: bytes.slice(start..end) }, end))
}
