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

mod cuts;
mod cutter;

use std::sync::LazyLock;

pub use self::cutter::{CutContent, CutError, Cutter};
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

#[cfg(test)]
mod tests;
