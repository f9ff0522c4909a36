//! The content of a large file in the stage, which comes in pieces and in any order.
//!
//! It is hashed from its beginning as far as it is there, mostly while the pieces are still in memory,
//! and written back to the disk from time to time: when the last piece has come, little is left to be
//! read, and little to be flushed.

use std::collections::BTreeMap;
use std::io;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use cortex_shared::entry::Digest;
use tokio_util::sync::CancellationToken;

use super::large::lock;
use super::stage::stopped;
use crate::root_dir::FileHandle;

/// What is written before the disk is given something to do.
const WRITE_BACK_BYTES: u64 = 32 * 1024 * 1024;
/// What is read again at most, because it came too early, when a piece comes in its turn: more than a
/// piece has, so that the rest gets less.
const CATCH_UP_BYTES: u64 = 8 * 1024 * 1024;

/// See the module. May be used by several threads at once.
#[derive(Default)]
pub(super) struct Growing {
    hashed: Mutex<Hashed>,
    not_written_back: AtomicU64,
}

#[derive(Default)]
struct Hashed {
    hasher: blake3::Hasher,
    /// So many bytes from the beginning have been hashed.
    upto: u64,
    /// Pieces beyond: where they begin, and their lengths.
    beyond: BTreeMap<u64, u32>,
}

impl Growing {
    /// Takes note of a piece that has been written.
    ///
    /// # Errors
    /// Those of the file system.
    pub(super) fn add(&self, file: &FileHandle, offset: u64, data: &[u8]) -> io::Result<()> {
        let len = data.len() as u64;
        {
            let mut hashed = lock(&self.hashed);
            if hashed.upto == offset {
                hashed.hasher.update(data);
                hashed.upto += len;
                hashed.catch_up(file, CATCH_UP_BYTES)?;
            } else {
                hashed.beyond.insert(offset, u32::try_from(len).map_err(io::Error::other)?);
            }
        }
        if self.not_written_back.fetch_add(len, Ordering::Relaxed) + len >= WRITE_BACK_BYTES {
            self.not_written_back.store(0, Ordering::Relaxed);
            file.write_back()?;
        }
        Ok(())
    }

    /// Takes note of a hole.
    pub(super) fn add_hole(&self, offset: u64, len: u32) {
        lock(&self.hashed).beyond.insert(offset, len);
    }

    /// Takes note of a piece that was copied from another file: its bytes have to be read to be hashed.
    ///
    /// # Errors
    /// If it is longer than any piece is.
    pub(super) fn add_copied(&self, offset: u64, len: usize) -> io::Result<()> {
        self.add_hole(offset, u32::try_from(len).map_err(io::Error::other)?);
        Ok(())
    }

    /// The hash of all that is there, if that is everything up to `size`.
    ///
    /// # Errors
    /// Those of the file system.
    pub(super) fn finish(
        &self,
        file: &FileHandle,
        size: u64,
        cancel: &CancellationToken,
    ) -> io::Result<Option<Digest>> {
        let mut hashed = lock(&self.hashed);
        while hashed.catch_up(file, CATCH_UP_BYTES)? {
            if cancel.is_cancelled() {
                return Err(stopped());
            }
        }
        Ok((hashed.upto == size).then(|| hashed.hasher.finalize().into()))
    }
}

impl Hashed {
    /// Reads and hashes what has come too early and is next now, up to about a limit. Whether there is
    /// more.
    fn catch_up(&mut self, file: &FileHandle, limit: u64) -> io::Result<bool> {
        let mut buffer = Vec::new();
        let mut left = limit;
        while left > 0 {
            let Some(len) = self.beyond.remove(&self.upto) else { return Ok(false) };
            buffer.resize(len as usize, 0);
            file.read_exact_at(&mut buffer, self.upto)?;
            self.hasher.update(&buffer);
            self.upto += u64::from(len);
            left = left.saturating_sub(u64::from(len));
        }
        Ok(self.beyond.contains_key(&self.upto))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::root_dir::DirHandle;

    #[test]
    fn content_is_hashed_whole_in_whatever_order_its_pieces_come() {
        let folder = tempfile::tempdir().unwrap();
        let top = DirHandle::open_ambient(folder.path()).unwrap();
        let data: Vec<u8> = (0..300_000_u32).flat_map(u32::to_le_bytes).collect();
        let (piece, size) = (100_000, data.len() as u64);
        let pieces = data.len() / piece;
        let orders: [Vec<usize>; 4] = [
            (0..pieces).collect(),
            (0..pieces).rev().collect(),
            (0..pieces).map(|number| number ^ 1).collect(),
            (0..pieces).map(|number| number * 5 % pieces).collect(),
        ];
        for (number, order) in orders.iter().enumerate() {
            let name = format!("f{number}");
            let file = top.create_new(name.as_bytes(), 0o600).unwrap();
            file.set_len(size).unwrap();
            let growing = Growing::default();
            let go_on = CancellationToken::new();
            for &number in order {
                assert_eq!(growing.finish(&file, size, &go_on).unwrap(), None);
                let at = number * piece;
                file.write_all_at(&data[at..at + piece], at as u64).unwrap();
                growing.add(&file, at as u64, &data[at..at + piece]).unwrap();
            }
            let whole = growing.finish(&file, size, &go_on).unwrap();
            assert_eq!(whole, Some(Digest::of(&data)), "{order:?}");
        }
    }

    #[test]
    fn holes_are_hashed_when_their_turn_comes_and_no_longer_than_it_is_wanted() {
        let folder = tempfile::tempdir().unwrap();
        let top = DirHandle::open_ambient(folder.path()).unwrap();
        let file = top.create_new(b"f", 0o600).unwrap();
        let hole = 4 * 1024 * 1024;
        let size = 8 * u64::from(hole) + 3;
        file.set_len(size).unwrap();
        let growing = Growing::default();
        for number in 0..8 {
            growing.add_hole(3 + number * u64::from(hole), hole);
        }
        file.write_all_at(b"abc", 0).unwrap();
        growing.add(&file, 0, b"abc").unwrap();
        let stop = CancellationToken::new();
        stop.cancel();
        assert!(growing.finish(&file, size, &stop).is_err());
        let mut data = b"abc".to_vec();
        data.resize(usize::try_from(size).unwrap(), 0);
        let whole = growing.finish(&file, size, &CancellationToken::new()).unwrap();
        assert_eq!(whole, Some(Digest::of(&data)));
    }
}
