//! Output under way: what was sent and not yet acknowledged can be sent again.
//!
//! Each hop of a command's output (node to hub, hub to reader) holds what it has sent in one of these
//! until the other side has acknowledged it, so that a broken stream is resumed at the exact byte.
//! How much it holds is bounded by whoever gives credit; this only keeps the books. In memory only.

use std::collections::VecDeque;

use bytes::{Bytes, BytesMut};

/// Pieces below this size are joined with a waiting neighbour.
const JOIN_BELOW_BYTES: usize = 8 * 1024;
/// Joined pieces do not grow beyond this.
const JOINED_BYTES: usize = 64 * 1024;
/// Waiting pieces from which on joining matters more than the exact interleaving of two streams.
const MANY_PIECES: usize = 1024;

/// A run of bytes of one stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Which stream: 0 or 1.
    pub stream: usize,
    /// How many bytes of this stream come before.
    pub offset: u64,
    /// The bytes; never empty.
    pub data: Bytes,
}

impl Piece {
    /// The offset after its last byte.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.offset + self.len()
    }

    fn len(&self) -> u64 {
        self.data.len() as u64
    }

    /// What is left of it from `offset` on; `None` if that is nothing.
    #[must_use]
    pub fn from(mut self, offset: u64) -> Option<Self> {
        let known = offset.saturating_sub(self.offset);
        if known >= self.len() {
            return None;
        }
        // Less than the length, which is a `usize`.
        drop(self.data.split_to(usize::try_from(known).ok()?));
        self.offset += known;
        Some(self)
    }
}

/// See the module.
#[derive(Debug, Default)]
pub struct Replay {
    pieces: VecDeque<Piece>,
    /// So many pieces from the front have been handed out.
    sent: usize,
    bytes: u64,
    sent_bytes: u64,
}

impl Replay {
    /// Bytes held, sent or not.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Bytes handed out and not acknowledged.
    #[must_use]
    pub fn sent_bytes(&self) -> u64 {
        self.sent_bytes
    }

    /// Whether something waits to be handed out.
    #[must_use]
    pub fn has_next(&self) -> bool {
        self.sent < self.pieces.len()
    }

    /// The first held byte of a stream; `None` if none of it is held.
    #[must_use]
    pub fn start(&self, stream: usize) -> Option<u64> {
        self.pieces.iter().find(|piece| piece.stream == stream).map(|piece| piece.offset)
    }

    /// Takes a piece. Small ones are joined with what waits, as long as they follow each other.
    pub fn push(&mut self, piece: Piece) {
        if piece.data.is_empty() {
            return;
        }
        self.bytes += piece.len();
        let waiting = self.pieces.len() - self.sent;
        // Something that alternates between its streams byte by byte, with a reader that stands still,
        // would fill the queue with tiny pieces: from some point on each stream is joined past the
        // other, and only their interleaving becomes coarser.
        let reach = if waiting < MANY_PIECES { 1 } else { 2 };
        let mut last = self.pieces.iter_mut().rev().take(reach.min(waiting));
        let neighbour = last.find(|last| {
            last.stream == piece.stream
                && piece.data.len() < JOIN_BELOW_BYTES
                && last.data.len() + piece.data.len() <= JOINED_BYTES
                && last.end() == piece.offset
        });
        match neighbour {
            Some(last) => append(&mut last.data, &piece.data),
            None => self.pieces.push_back(piece),
        }
    }

    /// The next piece to send, of at most `most` bytes.
    pub fn next(&mut self, most: u64) -> Option<Piece> {
        let waiting = self.pieces.get_mut(self.sent).filter(|_| most > 0)?;
        let piece = if waiting.len() > most {
            let length = usize::try_from(most).ok()?;
            let data = waiting.data.split_to(length);
            let piece = Piece { stream: waiting.stream, offset: waiting.offset, data };
            waiting.offset += most;
            self.pieces.insert(self.sent, piece.clone());
            piece
        } else {
            waiting.clone()
        };
        self.sent += 1;
        self.sent_bytes += piece.len();
        Some(piece)
    }

    /// The receiver has dealt with so many more bytes, in the order they were sent. Returns how many of
    /// them were held.
    pub fn acknowledge(&mut self, bytes: u64) -> u64 {
        let counted = bytes.min(self.sent_bytes);
        let mut left = counted;
        while left > 0 {
            let Some(front) = self.pieces.pop_front() else { break };
            let length = front.len();
            match front.clone().from(front.offset + left) {
                Some(rest) => {
                    self.pieces.push_front(rest);
                    left = 0;
                }
                None => {
                    self.sent -= 1;
                    left -= length;
                }
            }
        }
        self.bytes -= counted;
        self.sent_bytes -= counted;
        counted
    }

    /// The receiver has everything before these offsets: the rest is to be sent again.
    pub fn rewind(&mut self, received: [u64; 2]) {
        let pieces = std::mem::take(&mut self.pieces);
        self.pieces = pieces
            .into_iter()
            .filter_map(|p| {
                let at = received[p.stream & 1];
                p.from(at)
            })
            .collect();
        self.sent = 0;
        self.sent_bytes = 0;
        self.bytes = self.pieces.iter().map(Piece::len).sum();
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        *self = Self::default();
    }
}

/// Joins what follows to a piece that waits; both are small.
fn append(last: &mut Bytes, more: &[u8]) {
    let mut joined = BytesMut::from(std::mem::take(last));
    joined.extend_from_slice(more);
    *last = joined.freeze();
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn piece(stream: usize, offset: u64, data: &[u8]) -> Piece {
        Piece { stream, offset, data: Bytes::copy_from_slice(data) }
    }

    #[test]
    fn tiny_pieces_of_alternating_streams_do_not_fill_memory() {
        let mut replay = Replay::default();
        for offset in 0..100_000 {
            replay.push(piece(0, offset, b"x"));
            replay.push(piece(1, offset, b"y"));
        }
        assert!(replay.pieces.len() < 2 * MANY_PIECES);
        assert_eq!(replay.bytes(), 200_000);
    }

    #[test]
    fn what_was_sent_is_not_joined_with_what_follows() {
        let mut replay = Replay::default();
        replay.push(piece(0, 0, b"ab"));
        assert_eq!(replay.next(9), Some(piece(0, 0, b"ab")));
        replay.push(piece(0, 2, b"c"));
        assert_eq!(replay.next(9), Some(piece(0, 2, b"c")));
        assert_eq!(replay.next(9), None);
        replay.rewind([1, 0]);
        assert_eq!(replay.next(9), Some(piece(0, 1, b"b")));
    }

    proptest! {
        /// However a stream is cut, acknowledged, broken and resumed: the receiver ends with each byte of
        /// both streams once, and the sender with nothing.
        #[test]
        fn any_run_of_breaks_loses_and_doubles_nothing(
            pieces in prop::collection::vec((0_usize..2, 1_usize..40), 1..60),
            steps in prop::collection::vec((0_u8..4, 1_u64..50), 0..200),
        ) {
            let mut replay = Replay::default();
            let mut written = [Vec::new(), Vec::new()];
            let mut received = [Vec::new(), Vec::new()];
            let mut unacknowledged = 0;
            let mut pieces = pieces.into_iter();
            let mut value = 0_u8;
            for (step, amount) in steps.into_iter().chain(std::iter::repeat_n((0, 60), 200)) {
                match step {
                    3 => {
                        // The acknowledgements under way are lost with the stream.
                        replay.rewind([received[0].len() as u64, received[1].len() as u64]);
                        unacknowledged = 0;
                    }
                    2 => {
                        let count = amount.min(unacknowledged);
                        prop_assert_eq!(replay.acknowledge(count), count);
                        unacknowledged -= count;
                    }
                    _ => {
                        if let Some((stream, length)) = pieces.next() {
                            let offset = written[stream].len() as u64;
                            let data: Vec<u8> = (0..length).map(|_| { value = value.wrapping_add(1); value }).collect();
                            written[stream].extend_from_slice(&data);
                            replay.push(piece(stream, offset, &data));
                        }
                        if let Some(piece) = replay.next(amount) {
                            prop_assert_eq!(piece.offset, received[piece.stream].len() as u64);
                            received[piece.stream].extend_from_slice(&piece.data);
                            unacknowledged += piece.data.len() as u64;
                        }
                    }
                }
            }
            while let Some(piece) = replay.next(1000) {
                received[piece.stream].extend_from_slice(&piece.data);
            }
            prop_assert_eq!(&received, &written);
            replay.rewind([written[0].len() as u64, written[1].len() as u64]);
            prop_assert_eq!(replay.bytes(), 0);
        }
    }
}
