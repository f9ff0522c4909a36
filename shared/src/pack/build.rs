//! Making packs.

use std::collections::HashSet;
use std::io::{self, Cursor};

use bytes::Bytes;
use zstd::bulk::Compressor;

use super::{
    CODEC_STORED, CODEC_ZSTD, HEADER_BYTES, MAGIC, MAX_CHUNKS, MAX_RAW_BYTES, SHARED_FRAME_BYTES,
    TRAILER_BYTES, VERSION,
};
use crate::chunk::{ChunkRef, MAX_CHUNK_BYTES};
use crate::entry::Digest;

/// What became of a chunk that was pushed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pushed {
    /// It is in the pack.
    Added,
    /// The pack has it already.
    Duplicate,
    /// It does not fit: finish this pack and push the chunk again.
    Full,
}

/// Collects chunks until a pack is full. Reuses its compressor and buffers from pack to pack, and
/// holds at most about twice the size of a pack.
pub struct PackBuilder {
    compressor: Compressor<'static>,
    /// Raw chunks of the frame that is still open.
    open_frame: Vec<u8>,
    open_frame_number: u32,
    /// Header and finished frames.
    encoded: Vec<u8>,
    table: Vec<u8>,
    index: Vec<u8>,
    hashes: HashSet<Digest>,
    raw_bytes: usize,
}

impl PackBuilder {
    /// An empty pack, to be compressed at a zstd level (1 is the fastest that is worth it; clamped to
    /// 1 to 19).
    ///
    /// # Errors
    /// If zstd cannot be set up, for want of memory.
    pub fn new(level: i32) -> io::Result<Self> {
        Ok(Self {
            compressor: Compressor::new(level.clamp(1, 19))?,
            open_frame: Vec::new(),
            open_frame_number: 0,
            encoded: Vec::new(),
            table: Vec::new(),
            index: Vec::new(),
            hashes: HashSet::new(),
            raw_bytes: 0,
        })
    }

    /// Changes the level for frames that are not finished yet.
    ///
    /// # Errors
    /// If zstd refuses; the old level then stays.
    pub fn set_level(&mut self, level: i32) -> io::Result<()> {
        self.compressor.set_compression_level(level.clamp(1, 19))
    }

    /// Adds a chunk. The caller vouches that `data` is the chunk of that hash, which it has just
    /// computed; whoever receives the pack computes it again.
    ///
    /// # Panics
    /// If `data` is not as long as the chunk says, or is no valid chunk.
    pub fn push(&mut self, chunk: ChunkRef, data: &[u8]) -> Pushed {
        assert_eq!(chunk.len as usize, data.len(), "a chunk has the length that names it");
        assert!(!data.is_empty() && data.len() <= MAX_CHUNK_BYTES, "a chunk keeps to its limits");
        if self.hashes.contains(&chunk.hash) {
            return Pushed::Duplicate;
        }
        if self.raw_bytes + data.len() > MAX_RAW_BYTES || self.hashes.len() == MAX_CHUNKS {
            return Pushed::Full;
        }
        if !self.open_frame.is_empty() && self.open_frame.len() + data.len() > SHARED_FRAME_BYTES {
            self.close_frame();
        }
        if self.encoded.is_empty() {
            self.encoded.resize(HEADER_BYTES, 0);
        }
        let offset = u32::try_from(self.open_frame.len()).expect("a frame is at most 4 MiB");
        self.index.extend_from_slice(chunk.hash.as_bytes());
        self.index.extend_from_slice(&self.open_frame_number.to_be_bytes());
        self.index.extend_from_slice(&offset.to_be_bytes());
        self.index.extend_from_slice(&chunk.len.to_be_bytes());
        self.hashes.insert(chunk.hash);
        self.raw_bytes += data.len();
        if data.len() >= SHARED_FRAME_BYTES {
            // Nothing can share this frame, so the chunk need not be copied first.
            self.add_frame(data);
        } else {
            self.open_frame.extend_from_slice(data);
        }
        Pushed::Added
    }

    /// Sum of the raw chunks so far.
    #[must_use]
    pub fn raw_bytes(&self) -> usize {
        self.raw_bytes
    }

    /// Whether there is no chunk so far.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.hashes.is_empty()
    }

    /// The pack with its name, and an empty builder for the next one; `None` if there is no chunk.
    pub fn finish(&mut self) -> Option<(Digest, Bytes)> {
        if self.is_empty() {
            return None;
        }
        self.close_frame();
        let chunks = u32::try_from(self.hashes.len()).expect("at most MAX_CHUNKS");
        let header = &mut self.encoded[..HEADER_BYTES];
        header[..4].copy_from_slice(MAGIC);
        header[4] = VERSION;
        header[8..12].copy_from_slice(&self.open_frame_number.to_be_bytes());
        header[12..].copy_from_slice(&chunks.to_be_bytes());
        self.encoded.reserve_exact(self.table.len() + self.index.len() + TRAILER_BYTES);
        self.encoded.extend_from_slice(&self.table);
        self.encoded.extend_from_slice(&self.index);
        let hash = Digest::of(&self.encoded);
        self.encoded.extend_from_slice(hash.as_bytes());
        let encoded = Bytes::from(std::mem::take(&mut self.encoded));
        self.table.clear();
        self.index.clear();
        self.hashes.clear();
        self.raw_bytes = 0;
        self.open_frame_number = 0;
        Some((hash, encoded))
    }

    fn close_frame(&mut self) {
        if !self.open_frame.is_empty() {
            let mut frame = std::mem::take(&mut self.open_frame);
            self.add_frame(&frame);
            frame.clear();
            self.open_frame = frame;
        }
    }

    fn add_frame(&mut self, raw: &[u8]) {
        let start = self.encoded.len();
        // If it is not at least 3 % smaller, storing it is better.
        let limit = raw.len() - raw.len() / 32 - 1;
        self.encoded.reserve(raw.len());
        let mut room = Cursor::new(&mut self.encoded);
        room.set_position(start as u64);
        let compressed = self.compressor.compress_to_buffer(raw, &mut room);
        let codec = match compressed {
            Ok(bytes) if bytes <= limit => CODEC_ZSTD,
            _ => CODEC_STORED,
        };
        if codec == CODEC_STORED {
            self.encoded.truncate(start);
            self.encoded.extend_from_slice(raw);
        }
        let stored = self.encoded.len() - start;
        self.table.push(codec);
        for len in [stored, raw.len()] {
            let len = u32::try_from(len).expect("a frame is at most 4 MiB");
            self.table.extend_from_slice(&len.to_be_bytes());
        }
        self.open_frame_number += 1;
    }
}
