//! Chunks: how content is cut, and recipes: how it is put together again.
//!
//! Content of up to 1 MiB is one chunk. Larger content is cut by FastCDC (2020) with 256 KiB,
//! 1 MiB and 4 MiB as smallest, average and largest size, so that an insertion moves only the cuts
//! around it. These numbers are part of the format: members that cut differently agree on content
//! all the same, but share fewer chunks.

use crate::entry::Digest;

/// Content up to this size is a single chunk.
pub const SINGLE_CHUNK_BYTES: usize = 1024 * 1024;
/// Smallest chunk of larger content, except the last.
pub const MIN_CHUNK_BYTES: usize = 256 * 1024;
/// Average chunk of larger content.
pub const AVERAGE_CHUNK_BYTES: usize = 1024 * 1024;
/// Largest chunk.
pub const MAX_CHUNK_BYTES: usize = 4 * 1024 * 1024;

/// A piece of a recipe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkRef {
    /// BLAKE3 of the chunk.
    pub hash: Digest,
    /// Length in bytes, at most [`MAX_CHUNK_BYTES`].
    pub len: u32,
}

/// The ordered chunks of a file's content. Empty for content that is a single chunk (its hash is
/// the content's) or empty.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Recipe(pub Vec<ChunkRef>);
