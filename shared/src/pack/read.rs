//! Reading packs of which nothing is known.

use std::collections::HashMap;
use std::ops::Range;

use bytes::Bytes;

use super::{
    CODEC_STORED, CODEC_ZSTD, FRAME_BYTES, HEADER_BYTES, INDEX_BYTES, MAGIC, MAX_CHUNKS,
    MAX_ENCODED_BYTES, MAX_RAW_BYTES, SHARED_FRAME_BYTES, TRAILER_BYTES, VERSION,
};
use crate::chunk::ChunkRef;
use crate::entry::Digest;

/// Why bytes are not a pack.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InvalidPack {
    /// Longer than any pack, or shorter than its own tables.
    #[error("a pack cannot have {bytes} bytes")]
    Length {
        /// The length that was found.
        bytes: usize,
    },
    /// The first bytes are not those of a pack.
    #[error("not a pack")]
    Magic,
    /// A version this program does not know.
    #[error("pack version {version} is unknown")]
    Version {
        /// The version that was found.
        version: u8,
    },
    /// The trailer does not match: damaged or cut off.
    #[error("pack does not match its checksum")]
    Checksum,
    /// No chunk, more than [`MAX_CHUNKS`], or more frames than chunks.
    #[error("pack of {frames} frames and {chunks} chunks")]
    Counts {
        /// The number of frames that was found.
        frames: u32,
        /// The number of chunks that was found.
        chunks: u32,
    },
    /// A frame with lengths or a codec that cannot be.
    #[error("frame {frame} of the pack is invalid")]
    Frame {
        /// Its number, from 0.
        frame: usize,
    },
    /// A chunk that does not begin where the one before ended, or does not fit its frame.
    #[error("chunk {chunk} of the pack's index is out of place")]
    Index {
        /// Its number, from 0.
        chunk: usize,
    },
    /// A chunk that occurs twice.
    #[error("chunk {hash} occurs twice in the pack")]
    Duplicate {
        /// Its hash.
        hash: Digest,
    },
    /// A frame that cannot be decompressed to exactly its raw length.
    #[error("frame {frame} of the pack cannot be decompressed")]
    Compression {
        /// Its number, from 0.
        frame: usize,
    },
    /// A chunk whose bytes have another hash.
    #[error("chunk {hash} of the pack has other content")]
    ChunkHash {
        /// The hash that was promised.
        hash: Digest,
    },
}

#[derive(Clone, Debug)]
struct Frame {
    codec: u8,
    stored: Range<usize>,
    raw_len: usize,
    /// Which entries of the index lie in it.
    chunks: Range<usize>,
}

/// A chunk in the index of a pack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IndexedChunk {
    /// Hash and length.
    pub chunk: ChunkRef,
    /// The frame that holds it, from 0.
    pub frame: u32,
    /// Where it begins in the raw frame.
    pub offset: u32,
}

/// A pack whose structure has been checked. Cheap to clone but for its index.
#[derive(Clone, Debug)]
pub struct Pack {
    bytes: Bytes,
    hash: Digest,
    frames: Vec<Frame>,
    index: Vec<IndexedChunk>,
    by_hash: HashMap<Digest, usize>,
}

impl Pack {
    /// Checks the checksum and the structure of a pack. The content of its chunks is not checked:
    /// see [`Pack::verify`].
    ///
    /// # Errors
    /// See [`InvalidPack`]. Memory is only taken for tables that are present in `bytes`, at most
    /// about 1 MiB.
    pub fn parse(bytes: Bytes) -> Result<Self, InvalidPack> {
        let len = bytes.len();
        let invalid_length = InvalidPack::Length { bytes: len };
        if !(HEADER_BYTES + TRAILER_BYTES..=MAX_ENCODED_BYTES).contains(&len) {
            return Err(invalid_length);
        }
        if &bytes[..4] != MAGIC {
            return Err(InvalidPack::Magic);
        }
        if bytes[4] != VERSION || bytes[5..8] != [0; 3] {
            return Err(InvalidPack::Version { version: bytes[4] });
        }
        let (body, trailer) = bytes.split_at(len - TRAILER_BYTES);
        let hash = Digest::of(body);
        if hash.as_bytes() != trailer {
            return Err(InvalidPack::Checksum);
        }
        let (frames, chunks) = (number(&bytes[8..]), number(&bytes[12..]));
        let counts = InvalidPack::Counts { frames, chunks };
        let (frames, chunks) = (frames as usize, chunks as usize);
        if chunks == 0 || chunks > MAX_CHUNKS || frames == 0 || frames > chunks {
            return Err(counts);
        }
        let tables = frames * FRAME_BYTES + chunks * INDEX_BYTES;
        let payload_end = body.len().checked_sub(tables).ok_or(invalid_length)?;
        if payload_end < HEADER_BYTES {
            return Err(invalid_length);
        }
        let (table, index) = body[payload_end..].split_at(frames * FRAME_BYTES);
        let mut frames = parse_frames(table, HEADER_BYTES..payload_end)?;
        let (index, by_hash) = parse_index(index, &mut frames)?;
        Ok(Self { hash, frames, index, by_hash, bytes })
    }

    /// The name of the pack: BLAKE3 of all but its last 32 bytes, which are this hash.
    #[must_use]
    pub fn hash(&self) -> Digest {
        self.hash
    }

    /// The pack as it travels and rests.
    #[must_use]
    pub fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// Its chunks, in the order in which they lie.
    #[must_use]
    pub fn index(&self) -> &[IndexedChunk] {
        &self.index
    }

    /// Sum of the raw chunks.
    #[must_use]
    pub fn raw_bytes(&self) -> u64 {
        self.frames.iter().map(|frame| frame.raw_len as u64).sum()
    }

    /// Unpacks everything, one frame at a time, and hands each chunk to `take` once its hash has
    /// been found right. Holds one raw frame, at most 4 MiB.
    ///
    /// # Errors
    /// [`InvalidPack::Compression`] and [`InvalidPack::ChunkHash`]; chunks before the bad one have
    /// been handed out by then.
    pub fn for_each_chunk(&self, mut take: impl FnMut(ChunkRef, &[u8])) -> Result<(), InvalidPack> {
        let mut buffer = Vec::new();
        for number in 0..self.frames.len() {
            let raw = self.unpack(number, &mut buffer)?;
            for indexed in &self.index[self.frames[number].chunks.clone()] {
                let data = checked(indexed, raw)?;
                take(indexed.chunk, data);
            }
        }
        Ok(())
    }

    /// Checks the content of every chunk.
    ///
    /// # Errors
    /// [`InvalidPack::Compression`] and [`InvalidPack::ChunkHash`].
    pub fn verify(&self) -> Result<(), InvalidPack> {
        self.for_each_chunk(|_, _| {})
    }

    /// The content of a chunk, checked; `None` if the pack has no such chunk. Unpacks its frame: who
    /// wants more than a few chunks takes [`Pack::for_each_chunk`].
    ///
    /// # Errors
    /// [`InvalidPack::Compression`] and [`InvalidPack::ChunkHash`].
    pub fn chunk(&self, hash: &Digest) -> Result<Option<Bytes>, InvalidPack> {
        let Some(&position) = self.by_hash.get(hash) else { return Ok(None) };
        let indexed = &self.index[position];
        let number = indexed.frame as usize;
        let frame = &self.frames[number];
        if frame.codec == CODEC_STORED {
            let data = checked(indexed, &self.bytes[frame.stored.clone()])?;
            return Ok(Some(self.bytes.slice_ref(data)));
        }
        let mut buffer = Vec::new();
        self.unpack(number, &mut buffer)?;
        let raw = Bytes::from(buffer);
        let data = checked(indexed, &raw)?;
        Ok(Some(raw.slice_ref(data)))
    }

    /// Whether the pack has a chunk.
    #[must_use]
    pub fn contains(&self, hash: &Digest) -> bool {
        self.by_hash.contains_key(hash)
    }

    fn unpack<'a>(
        &'a self,
        number: usize,
        buffer: &'a mut Vec<u8>,
    ) -> Result<&'a [u8], InvalidPack> {
        let frame = &self.frames[number];
        let stored = &self.bytes[frame.stored.clone()];
        if frame.codec == CODEC_STORED {
            return Ok(stored);
        }
        // A slice, not the vector: zstd then cannot write more than the declared length, whatever
        // the frame's own header says.
        buffer.resize(frame.raw_len, 0);
        let written = zstd::bulk::decompress_to_buffer(stored, buffer.as_mut_slice())
            .map_err(|_| InvalidPack::Compression { frame: number })?;
        if written != frame.raw_len {
            return Err(InvalidPack::Compression { frame: number });
        }
        Ok(buffer)
    }
}

fn checked<'a>(indexed: &IndexedChunk, raw: &'a [u8]) -> Result<&'a [u8], InvalidPack> {
    let start = indexed.offset as usize;
    let data = &raw[start..start + indexed.chunk.len as usize];
    let hash = indexed.chunk.hash;
    if Digest::of(data) == hash { Ok(data) } else { Err(InvalidPack::ChunkHash { hash }) }
}

fn number(bytes: &[u8]) -> u32 {
    u32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
}

fn parse_frames(table: &[u8], payload: Range<usize>) -> Result<Vec<Frame>, InvalidPack> {
    let mut frames = Vec::with_capacity(table.len() / FRAME_BYTES);
    let mut position = payload.start;
    let mut raw_total = 0;
    for (number, row) in table.as_chunks::<FRAME_BYTES>().0.iter().enumerate() {
        let invalid = InvalidPack::Frame { frame: number };
        let codec = row[0];
        let (stored_len, raw_len) =
            (self::number(&row[1..]) as usize, self::number(&row[5..]) as usize);
        let lengths_fit = match codec {
            CODEC_STORED => stored_len == raw_len,
            CODEC_ZSTD => stored_len < raw_len,
            _ => false,
        };
        // Checked before it is added to anything, so that no sum below can overflow.
        if !lengths_fit || stored_len == 0 || raw_len > MAX_RAW_BYTES - raw_total {
            return Err(invalid);
        }
        raw_total += raw_len;
        let stored = position..position + stored_len;
        if stored.end > payload.end {
            return Err(invalid);
        }
        position = stored.end;
        frames.push(Frame { codec, stored, raw_len, chunks: 0..0 });
    }
    if position == payload.end {
        Ok(frames)
    } else {
        Err(InvalidPack::Frame { frame: frames.len() })
    }
}

/// Reads the index and notes in each frame which chunks it holds. The chunks must tile the frames
/// exactly.
fn parse_index(
    index: &[u8],
    frames: &mut [Frame],
) -> Result<(Vec<IndexedChunk>, HashMap<Digest, usize>), InvalidPack> {
    let mut chunks: Vec<IndexedChunk> = Vec::with_capacity(index.len() / INDEX_BYTES);
    let mut by_hash = HashMap::with_capacity(index.len() / INDEX_BYTES);
    let mut frame = 0;
    let mut offset = 0;
    for (position, row) in index.as_chunks::<INDEX_BYTES>().0.iter().enumerate() {
        let invalid = InvalidPack::Index { chunk: position };
        if offset == frames[frame].raw_len {
            (frame, offset) = (frame + 1, 0);
            frames.get_mut(frame).ok_or(invalid)?.chunks = position..position;
        }
        let indexed = IndexedChunk {
            chunk: ChunkRef {
                hash: Digest::from_slice(&row[..32]).expect("a row holds a hash"),
                len: number(&row[40..]),
            },
            frame: number(&row[32..]),
            offset: number(&row[36..]),
        };
        let len = indexed.chunk.len as usize;
        let current = &mut frames[frame];
        if indexed.frame as usize != frame
            || indexed.offset as usize != offset
            || len == 0
            || len > current.raw_len - offset
        {
            return Err(invalid);
        }
        offset += len;
        current.chunks.end = position + 1;
        // A large frame of many chunks would make reading any of them expensive.
        if current.raw_len > SHARED_FRAME_BYTES && current.chunks.len() > 1 {
            return Err(invalid);
        }
        if by_hash.insert(indexed.chunk.hash, position).is_some() {
            return Err(InvalidPack::Duplicate { hash: indexed.chunk.hash });
        }
        chunks.push(indexed);
    }
    if frame + 1 == frames.len() && offset == frames[frame].raw_len {
        Ok((chunks, by_hash))
    } else {
        Err(InvalidPack::Index { chunk: chunks.len() })
    }
}
