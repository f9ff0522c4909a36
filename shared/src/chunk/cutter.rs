//! Reading content and cutting it.

use std::collections::HashMap;
use std::io::{self, Read};
use std::panic::resume_unwind;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;

use super::cuts::first_cut;
use super::{ChunkRef, MAX_CHUNK_BYTES, MAX_RECIPE_CHUNKS, Recipe, SINGLE_CHUNK_BYTES};
use crate::entry::Digest;

/// How much of the content is in memory while it is cut. A cut needs [`MAX_CHUNK_BYTES`] in sight;
/// twice as much keeps the copying at the window's border below one byte per byte read.
pub(super) const WINDOW_BYTES: usize = 2 * MAX_CHUNK_BYTES;
/// Large content is read ahead in pieces of this size, and so many of them.
const BLOCK_BYTES: usize = 1024 * 1024;
const READ_AHEAD_BLOCKS: usize = 4;

/// Content that has been read and cut.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CutContent {
    /// BLAKE3 of the whole content.
    pub content: Digest,
    /// Its length in bytes.
    pub size: u64,
    /// Its chunks, if they are more than one.
    pub recipe: Recipe,
}

/// Why content could not be cut.
#[derive(Debug, thiserror::Error)]
pub enum CutError<E> {
    /// It could not be read.
    #[error("cannot read the content")]
    Read(#[source] io::Error),
    /// It has more than [`MAX_RECIPE_CHUNKS`] chunks.
    #[error("the content is too large: more than {MAX_RECIPE_CHUNKS} chunks")]
    TooLarge,
    /// Whoever took the chunks refused one.
    #[error(transparent)]
    Taker(E),
}

/// Reads content, hashes it and cuts it into chunks, in one pass.
///
/// Holds a buffer of at most 8 MiB, which grows with the content and is reused for the next one. The
/// rest of larger content is read and hashed as a whole by a thread of its own, beside the cutting, 4 MiB
/// ahead of it.
#[derive(Debug, Default)]
pub struct Cutter {
    window: Vec<u8>,
}

impl Cutter {
    /// A cutter without a buffer yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Reads `reader` to its end and hands each chunk to `take`, in order.
    ///
    /// The cuts are those that FastCDC makes over the content as a whole.
    ///
    /// # Errors
    /// Those of the reader and of `take`, and content of more than [`MAX_RECIPE_CHUNKS`] chunks.
    pub fn cut<E>(
        &mut self,
        reader: impl Read + Send,
        take: impl FnMut(ChunkRef, &[u8]) -> Result<(), E>,
    ) -> Result<CutContent, CutError<E>> {
        self.cut_again(reader, &Recipe::default(), take)
    }

    /// The same for content of which an earlier version was cut so. Where that has not changed, the
    /// hashes of its chunks prove that they end where they did, and no cut is looked for.
    ///
    /// # Errors
    /// As for [`Self::cut`].
    pub fn cut_again<E>(
        &mut self,
        mut reader: impl Read + Send,
        earlier: &Recipe,
        take: impl FnMut(ChunkRef, &[u8]) -> Result<(), E>,
    ) -> Result<CutContent, CutError<E>> {
        self.window.clear();
        let more = fill(&mut self.window, WINDOW_BYTES, &mut reader).map_err(CutError::Read)?;
        let cutting =
            Cutting { window: &mut self.window, start: 0, guide: Guide::new(&earlier.0), take };
        if more {
            cutting.cut_large(reader)
        } else {
            // The end is in sight: the common case of a small file, hashed once.
            cutting.cut_last_window()
        }
    }
}

/// Reads until `buffer` holds `size` bytes or the content ends. Returns whether there may be more.
fn fill(buffer: &mut Vec<u8>, size: usize, reader: &mut impl Read) -> io::Result<bool> {
    let room = size - buffer.len();
    Ok(reader.take(room as u64).read_to_end(buffer)? == room)
}

/// Content that is being cut.
struct Cutting<'a, T> {
    window: &'a mut Vec<u8>,
    /// What lies before it in the window has been cut.
    start: usize,
    guide: Guide<'a>,
    take: T,
}

impl<T> Cutting<'_, T> {
    fn cut_large<E>(mut self, mut reader: impl Read + Send) -> Result<CutContent, CutError<E>>
    where
        T: FnMut(ChunkRef, &[u8]) -> Result<(), E>,
    {
        let mut whole = blake3::Hasher::new();
        whole.update(self.window);
        let mut size = self.window.len() as u64;
        let (full, blocks) = sync_channel::<Vec<u8>>(READ_AHEAD_BLOCKS);
        let (used, empty) = sync_channel::<Vec<u8>>(READ_AHEAD_BLOCKS);
        thread::scope(|scope| {
            let read_ahead = move || {
                let mut made = 0;
                loop {
                    let mut block = if made < READ_AHEAD_BLOCKS {
                        made += 1;
                        Vec::new()
                    } else {
                        // Whoever cuts has ended early, and tells why.
                        let Ok(block) = empty.recv() else { break };
                        block
                    };
                    block.clear();
                    let more = fill(&mut block, BLOCK_BYTES, &mut reader)?;
                    whole.update(&block);
                    size += block.len() as u64;
                    if full.send(block).is_err() || !more {
                        break;
                    }
                }
                Ok((whole.finalize().into(), size))
            };
            let named = thread::Builder::new().name("read ahead".to_owned());
            let reading = named.spawn_scoped(scope, read_ahead).map_err(CutError::Read)?;
            // Takes the channels along, so that the other side ends.
            let chunks = self.cut_blocks(blocks, used);
            let read: io::Result<(Digest, u64)> =
                reading.join().unwrap_or_else(|panic| resume_unwind(panic));
            let (content, size) = read.map_err(CutError::Read)?;
            Ok(CutContent { content, size, recipe: Recipe(chunks?) })
        })
    }

    /// Cuts what is in the window and then what comes in blocks, which it gives back.
    fn cut_blocks<E>(
        &mut self,
        blocks: Receiver<Vec<u8>>,
        used: SyncSender<Vec<u8>>,
    ) -> Result<Vec<ChunkRef>, CutError<E>>
    where
        T: FnMut(ChunkRef, &[u8]) -> Result<(), E>,
    {
        let mut chunks = Vec::new();
        let mut more = true;
        loop {
            while more && self.window.len() - self.start < MAX_CHUNK_BYTES {
                self.window.drain(..self.start);
                self.start = 0;
                while more && self.window.len() + BLOCK_BYTES <= WINDOW_BYTES {
                    let Ok(block) = blocks.recv() else {
                        more = false;
                        break;
                    };
                    self.window.extend_from_slice(&block);
                    // Nobody wants it any more once the content has been read.
                    used.send(block).ok();
                }
            }
            if self.start == self.window.len() {
                return Ok(chunks);
            }
            if chunks.len() == MAX_RECIPE_CHUNKS {
                return Err(CutError::TooLarge);
            }
            chunks.push(self.next_chunk(!more)?);
        }
    }

    fn cut_last_window<E>(mut self) -> Result<CutContent, CutError<E>>
    where
        T: FnMut(ChunkRef, &[u8]) -> Result<(), E>,
    {
        let content = Digest::of(self.window);
        let size = self.window.len();
        let mut chunks = Vec::new();
        let single = |len| u32::try_from(len).ok().map(|len| ChunkRef { hash: content, len });
        if size <= SINGLE_CHUNK_BYTES {
            if let Some(chunk) = single(size).filter(|_| size > 0) {
                (self.take)(chunk, self.window).map_err(CutError::Taker)?;
            }
        } else {
            while self.start < size {
                chunks.push(self.next_chunk(true)?);
            }
            if chunks.len() == 1 {
                chunks.clear();
            }
        }
        Ok(CutContent { content, size: size as u64, recipe: Recipe(chunks) })
    }

    /// Cuts the next chunk from what is in the window: the rest of the content, or at least
    /// [`MAX_CHUNK_BYTES`] of it, since FastCDC looks no further.
    fn next_chunk<E>(&mut self, is_rest: bool) -> Result<ChunkRef, CutError<E>>
    where
        T: FnMut(ChunkRef, &[u8]) -> Result<(), E>,
    {
        let data = &self.window[self.start..];
        let chunk = self.guide.find(data, is_rest).unwrap_or_else(|| {
            let end = first_cut(data);
            let chunk = ChunkRef::of(&data[..end]).expect("FastCDC keeps to its limits");
            self.guide.found(&chunk);
            chunk
        });
        let data = &data[..chunk.len as usize];
        self.start += data.len();
        (self.take)(chunk, data).map_err(CutError::Taker)?;
        Ok(chunk)
    }
}

/// Where an earlier version of the content was cut. A chunk begins and ends the same way wherever it
/// stands, so from the first one on that is found again, the next ones are likely to follow.
struct Guide<'a> {
    chunks: &'a [ChunkRef],
    by_hash: HashMap<Digest, usize>,
    /// Which one is expected.
    next: Option<usize>,
}

impl<'a> Guide<'a> {
    fn new(chunks: &'a [ChunkRef]) -> Self {
        let by_hash =
            chunks.iter().enumerate().map(|(number, chunk)| (chunk.hash, number)).collect();
        Self { chunks, by_hash, next: Some(0) }
    }

    /// The expected chunk, if `data` begins with it.
    fn find(&mut self, data: &[u8], is_rest: bool) -> Option<ChunkRef> {
        let number = self.next.take()?;
        let expected = *self.chunks.get(number)?;
        // The last one ended with the content, and not where a cut was found.
        let is_last = number + 1 == self.chunks.len();
        if is_last && !(is_rest && data.len() == expected.len as usize) {
            return None;
        }
        let begins = data.get(..expected.len as usize)?;
        if Digest::of(begins) != expected.hash {
            return None;
        }
        self.next = Some(number + 1);
        Some(expected)
    }

    /// Takes note of a chunk that was cut anew.
    fn found(&mut self, chunk: &ChunkRef) {
        self.next = self.by_hash.get(&chunk.hash).map(|number| number + 1);
    }
}
