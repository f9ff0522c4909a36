//! Standard input of one command: a bounded queue before its pipe.

use std::collections::VecDeque;
use std::io;

use bytes::{Buf as _, Bytes};
use tokio::net::unix::pipe;

use super::terminal::END_OF_INPUT;

/// Most bytes that wait for the command to read. A sender that keeps its own window of
/// unacknowledged bytes below this is never refused.
const MAX_QUEUED_BYTES: usize = 1024 * 1024;

/// The sender sent more than it may.
#[derive(Debug, thiserror::Error)]
#[error(
    "more than {MAX_QUEUED_BYTES} bytes of standard input were sent before the command took them"
)]
pub(super) struct QueueFull;

/// Where input goes.
#[derive(Debug)]
enum Target {
    /// To a terminal that is not open yet.
    Awaited,
    Open(pipe::Sender),
    /// The command or the sender closed it.
    Gone,
}

/// What goes into a command's standard input.
#[derive(Debug)]
pub(super) struct Stdin {
    target: Target,
    queue: VecDeque<Bytes>,
    queued_bytes: usize,
    ended: bool,
    /// Written after the last input, where closing the pipe would end nothing.
    end_mark: Option<u8>,
    /// Taken, and not yet told to the sender.
    taken: u64,
}

impl Stdin {
    pub(super) fn new(pipe: Option<pipe::Sender>) -> Self {
        Self {
            target: pipe.map_or(Target::Gone, Target::Open),
            queue: VecDeque::new(),
            queued_bytes: 0,
            ended: false,
            end_mark: None,
            taken: 0,
        }
    }

    /// What is typed at a terminal. It is kept until there is one.
    pub(super) fn of_terminal() -> Self {
        Self { target: Target::Awaited, end_mark: Some(END_OF_INPUT), ..Self::new(None) }
    }

    /// The terminal is there.
    pub(super) fn open(&mut self, pipe: pipe::Sender) {
        if matches!(self.target, Target::Awaited) {
            self.target = Target::Open(pipe);
        }
    }

    /// Queues bytes. What comes after the end, or after the command closed its side, is dropped and
    /// counts as taken, so that the sender does not wait for ever.
    pub(super) fn push(&mut self, data: Bytes, end: bool) -> Result<(), QueueFull> {
        if matches!(self.target, Target::Gone) || self.ended {
            self.taken += length(&data);
        } else if data.len() > MAX_QUEUED_BYTES - self.queued_bytes {
            return Err(QueueFull);
        } else if !data.is_empty() {
            self.queued_bytes += data.len();
            self.queue.push_back(data);
        }
        self.ended |= end;
        self.close_if_done();
        Ok(())
    }

    /// Whether [`Stdin::write`] has anything to do.
    pub(super) fn wants_to_write(&self) -> bool {
        let something = !self.queue.is_empty() || (self.ended && self.end_mark.is_some());
        matches!(self.target, Target::Open(_)) && something
    }

    /// Writes some of what is queued. Cancelling it loses nothing.
    pub(super) async fn write(&mut self) {
        let Target::Open(pipe) = &self.target else { return };
        let end_mark = self.end_mark.as_slice();
        let data: &[u8] = self.queue.front().map_or(end_mark, |data| data);
        let written = match pipe.writable().await {
            Ok(()) => pipe.try_write(data),
            Err(error) => Err(error),
        };
        match written {
            Ok(count) => {
                self.wrote(count);
                self.close_if_done();
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            // The command closed its standard input, or is gone.
            Err(_) => self.close(),
        }
    }

    fn wrote(&mut self, count: usize) {
        let Some(data) = self.queue.front_mut() else {
            // The mark is of our own making: the sender need not hear of it.
            self.end_mark = None;
            return;
        };
        data.advance(count);
        if data.is_empty() {
            self.queue.pop_front();
        }
        self.queued_bytes -= count;
        self.taken += u64::try_from(count).unwrap_or(u64::MAX);
    }

    /// Drops the pipe and what waits for it.
    pub(super) fn close(&mut self) {
        self.target = Target::Gone;
        self.taken += self.queue.drain(..).map(|data| length(&data)).sum::<u64>();
        self.queued_bytes = 0;
    }

    /// Bytes taken since the last call.
    pub(super) fn take_taken(&mut self) -> u64 {
        std::mem::take(&mut self.taken)
    }

    /// Whether the sender must be told something.
    pub(super) fn has_taken(&self) -> bool {
        self.taken > 0
    }

    fn close_if_done(&mut self) {
        if self.ended && self.queue.is_empty() && self.end_mark.is_none() {
            self.target = Target::Gone;
        }
    }
}

fn length(data: &Bytes) -> u64 {
    u64::try_from(data.len()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_the_command_took_is_counted_and_the_end_closes_the_pipe() {
        let (sender, receiver) = pipe::pipe().unwrap();
        let mut stdin = Stdin::new(Some(sender));
        stdin.push(Bytes::from_static(b"hello "), false).unwrap();
        stdin.push(Bytes::from_static(b"world"), true).unwrap();
        while stdin.wants_to_write() {
            stdin.write().await;
        }
        assert_eq!(stdin.take_taken(), 11);
        let mut text = Vec::new();
        tokio::io::AsyncReadExt::read_to_end(&mut { receiver }, &mut text).await.unwrap();
        assert_eq!(text, b"hello world");
    }

    #[tokio::test]
    async fn what_is_typed_early_waits_for_the_terminal_and_its_end_is_typed_too() {
        let (sender, mut receiver) = pipe::pipe().unwrap();
        let mut stdin = Stdin::of_terminal();
        stdin.push(Bytes::from_static(b"ls"), false).unwrap();
        stdin.push(Bytes::from_static(b"\r"), true).unwrap();
        assert!(!stdin.wants_to_write() && !stdin.has_taken());
        stdin.open(sender);
        while stdin.wants_to_write() {
            stdin.write().await;
        }
        assert_eq!(stdin.take_taken(), 3, "the end mark is not the sender's");
        let mut text = Vec::new();
        tokio::io::AsyncReadExt::read_to_end(&mut receiver, &mut text).await.unwrap();
        assert_eq!(text, b"ls\r\x04");
    }

    #[tokio::test]
    async fn a_closed_reader_swallows_everything() {
        let (sender, receiver) = pipe::pipe().unwrap();
        drop(receiver);
        let mut stdin = Stdin::new(Some(sender));
        stdin.push(Bytes::from_static(b"lost"), false).unwrap();
        stdin.write().await;
        stdin.push(Bytes::from_static(b"too"), false).unwrap();
        assert!(!stdin.wants_to_write());
        assert_eq!(stdin.take_taken(), 7);
    }

    #[tokio::test]
    async fn a_sender_without_a_window_is_stopped() {
        let (sender, _receiver) = pipe::pipe().unwrap();
        let mut stdin = Stdin::new(Some(sender));
        let frame = Bytes::from(vec![0; MAX_QUEUED_BYTES]);
        stdin.push(frame.clone(), false).unwrap();
        assert!(stdin.push(Bytes::from_static(b"x"), false).is_err());
    }
}
