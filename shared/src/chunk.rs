//! Chunks: how content is cut, and recipes: how it is put together again.
//!
//! Content of up to 1 MiB is one chunk. Larger content is cut by FastCDC (2020) with 256 KiB,
//! 1 MiB and 4 MiB as smallest, average and largest size, so that an insertion moves only the cuts
//! around it. These numbers are part of the format: members that cut differently agree on content
//! all the same, but share fewer chunks.
//!
//! Content that turns out to be one chunk has an empty [`Recipe`], since the chunk's hash is then
//! the content's. Empty content has no chunk at all. Long runs of zero bytes become repetitions of
//! one well-known chunk ([`ChunkRef::is_zero`]), which travels once and compresses to nothing.

use std::io::{self, Read};
use std::sync::LazyLock;

use fastcdc::v2020::FastCDC;

use crate::entry::Digest;

/// Content up to this size is a single chunk.
pub const SINGLE_CHUNK_BYTES: usize = 1024 * 1024;
/// Smallest chunk of larger content, except the last.
pub const MIN_CHUNK_BYTES: usize = 256 * 1024;
/// Average chunk of larger content.
pub const AVERAGE_CHUNK_BYTES: usize = 1024 * 1024;
/// Largest chunk.
pub const MAX_CHUNK_BYTES: usize = 4 * 1024 * 1024;
/// Most chunks of one content: what fits a message of the protocol, about 100 GiB of content.
pub const MAX_RECIPE_CHUNKS: usize = 110_000;
/// Bytes of one chunk in an encoded recipe: its hash and its length as a big-endian 32-bit number.
pub const CHUNK_REF_BYTES: usize = 36;

/// How much of the content is in memory while it is cut. A cut needs [`MAX_CHUNK_BYTES`] in sight;
/// twice as much keeps the copying at the window's border below one byte per byte read.
const WINDOW_BYTES: usize = 2 * MAX_CHUNK_BYTES;

static ZERO_CHUNK_HASH: LazyLock<Digest> = LazyLock::new(|| Digest::of(&vec![0; MAX_CHUNK_BYTES]));

/// A piece of a recipe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkRef {
    /// BLAKE3 of the chunk.
    pub hash: Digest,
    /// Length in bytes, at most [`MAX_CHUNK_BYTES`].
    pub len: u32,
}

impl ChunkRef {
    /// Names `data` as a chunk; `None` unless it has 1 to [`MAX_CHUNK_BYTES`] bytes.
    #[must_use]
    pub fn of(data: &[u8]) -> Option<Self> {
        if data.is_empty() || data.len() > MAX_CHUNK_BYTES {
            return None;
        }
        Some(Self { hash: Digest::of(data), len: u32::try_from(data.len()).ok()? })
    }

    /// Whether this is the chunk into which runs of zero bytes are cut: [`MAX_CHUNK_BYTES`] zero
    /// bytes. Whoever writes it to a file may leave a hole instead.
    #[must_use]
    pub fn is_zero(&self) -> bool {
        self.len as usize == MAX_CHUNK_BYTES && self.hash == *ZERO_CHUNK_HASH
    }
}

/// The ordered chunks of a file's content. Empty for content that is a single chunk (its hash is
/// the content's) or empty.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Recipe(pub Vec<ChunkRef>);

/// Why bytes are not a recipe of content of a certain size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InvalidRecipe {
    /// Not a whole number of chunks.
    #[error("recipe of {bytes} bytes is not a multiple of {CHUNK_REF_BYTES}")]
    Length {
        /// The length that was found.
        bytes: usize,
    },
    /// More than [`MAX_RECIPE_CHUNKS`].
    #[error("recipe has {chunks} chunks, more than {MAX_RECIPE_CHUNKS}")]
    TooManyChunks {
        /// The number that was found.
        chunks: usize,
    },
    /// A chunk of no bytes, or of more than [`MAX_CHUNK_BYTES`].
    #[error("chunk of {bytes} bytes is not between 1 and {MAX_CHUNK_BYTES}")]
    ChunkSize {
        /// The size that was found.
        bytes: u32,
    },
    /// A single chunk must be written as an empty recipe, so that content has one recipe only.
    #[error("recipe of a single chunk must be empty")]
    SingleChunk,
    /// No recipe, though the content is larger than a chunk can be.
    #[error("content of {size} bytes needs a recipe")]
    Missing {
        /// The content's size.
        size: u64,
    },
    /// The chunks are together not as long as the content.
    #[error("chunks add up to {sum} bytes instead of {size}")]
    Sum {
        /// Sum of the chunks' lengths.
        sum: u64,
        /// The content's size.
        size: u64,
    },
}

impl Recipe {
    /// Reads a recipe of content of `size` bytes.
    ///
    /// # Errors
    /// See [`InvalidRecipe`]. Nothing is allocated before the length has been checked.
    pub fn parse(bytes: &[u8], size: u64) -> Result<Self, InvalidRecipe> {
        if !bytes.len().is_multiple_of(CHUNK_REF_BYTES) {
            return Err(InvalidRecipe::Length { bytes: bytes.len() });
        }
        let chunks = bytes.len() / CHUNK_REF_BYTES;
        if chunks > MAX_RECIPE_CHUNKS {
            return Err(InvalidRecipe::TooManyChunks { chunks });
        }
        let chunks = bytes
            .as_chunks::<CHUNK_REF_BYTES>()
            .0
            .iter()
            .map(|chunk| {
                let (hash, len) = chunk.split_at(32);
                ChunkRef {
                    hash: Digest::from_slice(hash).expect("the split leaves 32 bytes"),
                    len: u32::from_be_bytes(len.try_into().expect("the split leaves 4 bytes")),
                }
            })
            .collect();
        let recipe = Self(chunks);
        recipe.check(size)?;
        Ok(recipe)
    }

    /// Checks that this is a recipe of content of `size` bytes.
    ///
    /// # Errors
    /// See [`InvalidRecipe`].
    pub fn check(&self, size: u64) -> Result<(), InvalidRecipe> {
        let sum = match self.0.as_slice() {
            [] if size > MAX_CHUNK_BYTES as u64 => return Err(InvalidRecipe::Missing { size }),
            [] => return Ok(()),
            [_] => return Err(InvalidRecipe::SingleChunk),
            chunks if chunks.len() > MAX_RECIPE_CHUNKS => {
                return Err(InvalidRecipe::TooManyChunks { chunks: chunks.len() });
            }
            chunks => chunks.iter().try_fold(0, |sum, chunk| {
                if chunk.len == 0 || chunk.len as usize > MAX_CHUNK_BYTES {
                    return Err(InvalidRecipe::ChunkSize { bytes: chunk.len });
                }
                Ok(sum + u64::from(chunk.len))
            })?,
        };
        if sum == size { Ok(()) } else { Err(InvalidRecipe::Sum { sum, size }) }
    }

    /// The form of wire and store: [`CHUNK_REF_BYTES`] for each chunk.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.0.len() * CHUNK_REF_BYTES);
        for chunk in &self.0 {
            bytes.extend_from_slice(chunk.hash.as_bytes());
            bytes.extend_from_slice(&chunk.len.to_be_bytes());
        }
        bytes
    }

    /// Whether there is no chunk: the content is a single chunk, or empty.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

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
/// Holds a buffer of at most 8 MiB, which grows with the content and is reused for the next one.
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
        mut reader: impl Read,
        mut take: impl FnMut(ChunkRef, &[u8]) -> Result<(), E>,
    ) -> Result<CutContent, CutError<E>> {
        self.window.clear();
        if !self.refill(0, &mut reader).map_err(CutError::Read)? {
            // The end is in sight: the common case of a small file, hashed once.
            return self.cut_last_window(take);
        }
        let mut whole = blake3::Hasher::new();
        let mut size = 0;
        let mut chunks = Vec::new();
        let mut start = 0;
        let mut more = true;
        loop {
            if more && self.window.len() - start < MAX_CHUNK_BYTES {
                more = self.refill(start, &mut reader).map_err(CutError::Read)?;
                start = 0;
            }
            if start == self.window.len() {
                break;
            }
            if chunks.len() == MAX_RECIPE_CHUNKS {
                return Err(CutError::TooLarge);
            }
            let data = first_chunk(&self.window[start..]);
            let chunk = ChunkRef::of(data).expect("FastCDC keeps to its limits");
            whole.update(data);
            size += u64::from(chunk.len);
            start += data.len();
            chunks.push(chunk);
            take(chunk, data).map_err(CutError::Taker)?;
        }
        Ok(CutContent { content: whole.finalize().into(), size, recipe: Recipe(chunks) })
    }

    /// Moves what lies after `start` to the front, and reads until the window is full or the
    /// content ends. Returns whether there may be more.
    fn refill(&mut self, start: usize, reader: &mut impl Read) -> io::Result<bool> {
        self.window.drain(..start);
        let room = WINDOW_BYTES - self.window.len();
        let read = reader.take(room as u64).read_to_end(&mut self.window)?;
        Ok(read == room)
    }

    fn cut_last_window<E>(
        &self,
        mut take: impl FnMut(ChunkRef, &[u8]) -> Result<(), E>,
    ) -> Result<CutContent, CutError<E>> {
        let content = Digest::of(&self.window);
        let size = self.window.len() as u64;
        let mut rest = self.window.as_slice();
        let mut chunks = Vec::new();
        while !rest.is_empty() {
            let single = chunks.is_empty() && rest.len() <= SINGLE_CHUNK_BYTES;
            let data = if single { rest } else { first_chunk(rest) };
            let chunk = if data.len() == self.window.len() {
                ChunkRef { hash: content, len: u32::try_from(size).unwrap_or(u32::MAX) }
            } else {
                ChunkRef::of(data).expect("FastCDC keeps to its limits")
            };
            rest = &rest[data.len()..];
            chunks.push(chunk);
            take(chunk, data).map_err(CutError::Taker)?;
        }
        if chunks.len() == 1 {
            chunks.clear();
        }
        Ok(CutContent { content, size, recipe: Recipe(chunks) })
    }
}

/// The chunk at the beginning of `data`, which is either the rest of the content or at least
/// [`MAX_CHUNK_BYTES`] of it: FastCDC looks no further.
fn first_chunk(data: &[u8]) -> &[u8] {
    let (_, end) = FastCDC::new(data, MIN_CHUNK_BYTES, AVERAGE_CHUNK_BYTES, MAX_CHUNK_BYTES)
        .cut(0, data.len());
    &data[..end]
}

#[cfg(test)]
mod tests;
