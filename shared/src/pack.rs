//! Packs: the unit of wire, disk, fsync and acknowledgement.
//!
//! A pack holds up to 4 MiB of chunks: one large chunk, or thousands of small ones. It describes
//! itself, so that an index of packs can be rebuilt from the packs alone, and it is passed on as it
//! was received, byte for byte. All numbers are big-endian.
//!
//! ```text
//! header   "CXPK" · version u8 = 1 · three zero bytes · frames u32 · chunks u32          16 bytes
//! frames   their stored bytes, one after another
//! table    per frame: codec u8 (0 stored, 1 zstd) · stored length u32 · raw length u32    9 bytes
//! index    per chunk: BLAKE3 · frame u32 · offset in the frame u32 · length u32          44 bytes
//! trailer  BLAKE3 of everything before: the name of the pack                             32 bytes
//! ```
//!
//! Small chunks share frames of at most 1 MiB, so that source code compresses well and yet one
//! chunk is readable without unpacking the rest; a chunk that does not fit is a frame of its own. A
//! frame that zstd does not make at least 3 % smaller is stored as it is. The index lists the chunks
//! in the order in which they lie, each beginning where the one before ended: nothing overlaps,
//! nothing is unaccounted for, and no chunk occurs twice. Therefore a pack is never larger than its
//! 4 MiB of payload and [`MAX_OVERHEAD_BYTES`].
//!
//! [`Pack::parse`] checks all of that and the trailer; [`Pack::verify`] also unpacks every frame and
//! compares every chunk's hash, which is what a receiver does before it acknowledges.

mod build;
mod read;

pub use build::{PackBuilder, Pushed};
pub use read::{IndexedChunk, InvalidPack, Pack};

use crate::chunk::MAX_CHUNK_BYTES;

/// Largest sum of the raw chunks of a pack.
pub const MAX_RAW_BYTES: usize = MAX_CHUNK_BYTES;
/// Most chunks of a pack; bounds its index.
pub const MAX_CHUNKS: usize = 8192;
/// Largest frame of several chunks, before compression.
pub const SHARED_FRAME_BYTES: usize = 1024 * 1024;
/// Everything of a pack that is not payload, at most.
pub const MAX_OVERHEAD_BYTES: usize =
    HEADER_BYTES + MAX_CHUNKS * (FRAME_BYTES + INDEX_BYTES) + TRAILER_BYTES;
/// The largest possible pack.
pub const MAX_ENCODED_BYTES: usize = MAX_RAW_BYTES + MAX_OVERHEAD_BYTES;

const MAGIC: &[u8; 4] = b"CXPK";
const VERSION: u8 = 1;
const HEADER_BYTES: usize = 16;
const FRAME_BYTES: usize = 9;
const INDEX_BYTES: usize = 44;
const TRAILER_BYTES: usize = 32;
const CODEC_STORED: u8 = 0;
const CODEC_ZSTD: u8 = 1;

#[cfg(test)]
mod tests;
