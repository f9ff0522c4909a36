//! One output pipe of a command: read as far as credit allows, cut into frames, hashed.
//!
//! Not reading is the brake: the pipe fills, and the command waits in `write` as it would for any
//! slow reader. Small writes are gathered for a moment while output flows, and sent at once after a
//! pause, so that a prompt appears immediately and a flood of short lines does not become a flood
//! of frames.

use std::io;
use std::time::Duration;

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use tokio::net::unix::pipe;
use tokio::time::Instant;

/// Largest frame of output.
pub const MAX_FRAME_BYTES: usize = 128 * 1024;
/// What is asked for at least when the pipe is read.
const LEAST_READ_BYTES: usize = 4 * 1024;
/// A pipe in which this much lies has a writer that is faster than its reader: three quarters of what
/// the kernel gives a pipe at first.
const FULL_BYTES: usize = 48 * 1024;
/// What such a pipe holds from then on, so that its writer goes on while we are about something else.
/// Only those that need it have it: the kernel allows an ordinary user 64 MiB of pipes in all.
const WIDE_BYTES: usize = 1024 * 1024;
/// A frame of this size is worth sending, however short ago the last one was.
const WORTHWHILE_BYTES: usize = 64 * 1024;
/// A frame of that size keeps the memory it was read into; of a smaller one a copy is kept.
const KEPT_BYTES: usize = 16 * 1024;
/// Frames smaller than that follow each other no closer than this.
const GATHER_TIME: Duration = Duration::from_millis(2);

/// One output of a command.
#[derive(Debug)]
pub(super) struct OutputPipe {
    pipe: pipe::Receiver,
    /// It is a terminal's output, see [`super::terminal`].
    terminal: bool,
    /// It holds more than pipes do at first, or may not.
    widened: bool,
    /// Read and not yet handed out.
    buffer: BytesMut,
    /// Bytes that may still be read; known once every process of the command has ended.
    remaining: Option<u64>,
    ended: bool,
    last_frame: Option<Instant>,
    bytes: u64,
    hasher: blake3::Hasher,
}

impl OutputPipe {
    pub(super) fn new(pipe: pipe::Receiver) -> Self {
        Self {
            pipe,
            terminal: false,
            widened: false,
            buffer: BytesMut::new(),
            remaining: None,
            ended: false,
            last_frame: None,
            bytes: 0,
            hasher: blake3::Hasher::new(),
        }
    }

    /// With what a terminal shows as its only output.
    pub(super) fn of_terminal(pipe: pipe::Receiver) -> Self {
        Self { terminal: true, widened: true, ..Self::new(pipe) }
    }

    /// Bytes handed out so far.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// BLAKE3 of the bytes handed out so far.
    pub(super) fn hash(&self) -> [u8; 32] {
        *self.hasher.finalize().as_bytes()
    }

    /// Whether everything was handed out.
    pub(super) fn is_done(&self) -> bool {
        self.ended && self.buffer.is_empty()
    }

    /// Every process of the command has ended, so what lies in the pipe now is all there will be.
    /// End-of-file is not waited for: a process outside that was handed the pipe could hold it open
    /// for ever.
    pub(super) fn writers_are_gone(&mut self) {
        if self.terminal {
            // It cannot be asked for all: part of it may still be on its way through the kernel.
            self.remaining = Some(super::terminal::MOST_UNREAD_BYTES);
            return;
        }
        // A pipe that cannot be asked is treated as empty; the frames before are unaffected.
        self.remaining = Some(rustix::io::ioctl_fionread(&self.pipe).unwrap_or(0));
    }

    /// The next frame, of at most `credit` bytes; `None` when nothing more will come. Cancelling
    /// it loses nothing. Must not be called without credit.
    pub(super) async fn next_frame(&mut self, credit: u64) -> Option<Bytes> {
        debug_assert!(credit > 0, "without credit nothing may be read");
        let most = usize::try_from(credit).unwrap_or(usize::MAX).min(MAX_FRAME_BYTES);
        loop {
            self.fill(most);
            if self.buffer.is_empty() {
                if self.ended {
                    return None;
                }
                if self.pipe.readable().await.is_err() {
                    self.ended = true;
                }
                continue;
            }
            let due = self.last_frame.map(|last| last + GATHER_TIME);
            let due = due.filter(|due| Instant::now() < *due);
            match due {
                Some(due) if !self.ended && self.buffer.len() < most.min(WORTHWHILE_BYTES) => {
                    tokio::time::sleep_until(due).await;
                }
                _ => return Some(self.hand_out(most)),
            }
        }
    }

    /// Reads what is there, up to `most` bytes in the buffer.
    fn fill(&mut self, most: usize) {
        while !self.ended && self.buffer.len() < most {
            let room = most - self.buffer.len();
            let room = self
                .remaining
                .and_then(|left| usize::try_from(left).ok())
                .map_or(room, |left| room.min(left));
            if room == 0 {
                self.ended = true;
                return;
            }
            let room = self.worth_reading(room);
            self.buffer.reserve(room);
            match self.read(room) {
                Ok(0) => self.ended = true,
                Ok(count) => {
                    let count = u64::try_from(count).unwrap_or(u64::MAX);
                    self.remaining = self.remaining.map(|left| left.saturating_sub(count));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    // Nothing there, and nobody left to write anything.
                    self.ended = self.remaining.is_some();
                    return;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => self.ended = true,
            }
        }
    }

    /// Of `room` bytes, as many as there are to be read now. Memory is taken for no more: a command that
    /// says little costs little.
    fn worth_reading(&mut self, room: usize) -> usize {
        // A terminal cannot always be asked, and what it gives at a time is not more.
        let there = rustix::io::ioctl_fionread(&self.pipe).unwrap_or_default();
        let there = usize::try_from(there).unwrap_or(usize::MAX);
        if there >= FULL_BYTES && !self.widened {
            // Where the kernel refuses, it stays as it is.
            rustix::pipe::fcntl_setpipe_size(&self.pipe, WIDE_BYTES).ok();
            self.widened = true;
        }
        room.min(there.max(LEAST_READ_BYTES))
    }

    /// Reads up to `room` bytes into the buffer, which has room for them.
    fn read(&mut self, room: usize) -> io::Result<usize> {
        if !self.terminal || self.remaining.is_none() {
            return self.pipe.try_read_buf(&mut (&mut self.buffer).limit(room));
        }
        // The runtime may not have heard yet that there is something to read. The kernel waits for
        // what is on its way to a terminal only if it is asked itself.
        let mut piece = [0; 4096];
        let count = rustix::io::read(&self.pipe, &mut piece[..room.min(4096)])?;
        self.buffer.put_slice(&piece[..count]);
        Ok(count)
    }

    fn hand_out(&mut self, most: usize) -> Bytes {
        let length = self.buffer.len().min(most);
        // A frame that shares the buffer's memory keeps all of it for as long as it lives, which
        // may be long in a history; a copy of a small one is cheaper.
        let frame = if length < KEPT_BYTES {
            let frame = Bytes::copy_from_slice(&self.buffer[..length]);
            self.buffer.advance(length);
            frame
        } else {
            self.buffer.split_to(length).freeze()
        };
        self.hasher.update(&frame);
        self.bytes += u64::try_from(frame.len()).unwrap_or(u64::MAX);
        self.last_frame = Some(Instant::now());
        frame
    }
}
