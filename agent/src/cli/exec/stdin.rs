//! Our own standard input, in pieces.

use std::io::{self, Read};
use std::os::fd::AsFd;

use bytes::Bytes;
use rustix::event::{PollFd, PollFlags, poll};
use tokio::sync::mpsc;

/// Pieces of input; the end of the channel is the end of the input. An error is the last that comes: what
/// would have been read after it is missing.
pub(super) type Input = mpsc::Receiver<io::Result<Bytes>>;

/// Largest piece of standard input.
pub(super) const STDIN_PIECE_BYTES: usize = 64 * 1024;

/// Reads standard input on a thread that may block for ever; it ends with the process.
pub(super) fn read_stdin() -> Input {
    let (pieces, receiver) = mpsc::channel(2);
    tokio::task::spawn_blocking(move || read(std::io::stdin().lock(), &pieces));
    receiver
}

/// Reads to the end, also where somebody else made the terminal or pipe non-blocking.
fn read(mut input: impl Read + AsFd, pieces: &mpsc::Sender<io::Result<Bytes>>) {
    let mut buffer = vec![0; STDIN_PIECE_BYTES];
    loop {
        let read = match input.read(&mut buffer) {
            Ok(0) => return,
            Ok(length) => Ok(Bytes::copy_from_slice(&buffer[..length])),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                match poll(&mut [PollFd::new(&input, PollFlags::IN)], None) {
                    Ok(_) | Err(rustix::io::Errno::INTR) => continue,
                    Err(error) => Err(error.into()),
                }
            }
            Err(error) => Err(error),
        };
        let last = read.is_err();
        if pieces.blocking_send(read).is_err() || last {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;
    use std::fs::File;
    use std::os::fd::BorrowedFd;

    use super::*;

    /// Reads of it fail so at first.
    struct Failing {
        errors: VecDeque<io::ErrorKind>,
        input: File,
    }

    impl Read for Failing {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            match self.errors.pop_front() {
                Some(kind) => Err(kind.into()),
                None => self.input.read(buffer),
            }
        }
    }

    impl AsFd for Failing {
        fn as_fd(&self) -> BorrowedFd<'_> {
            self.input.as_fd()
        }
    }

    fn pieces_of(errors: &[io::ErrorKind], text: &str) -> Vec<Result<Bytes, io::ErrorKind>> {
        let (input, pipe) = rustix::pipe::pipe().unwrap();
        rustix::io::write(&pipe, text.as_bytes()).unwrap();
        drop(pipe);
        let (pieces, mut receiver) = mpsc::channel(8);
        let errors = errors.iter().copied().collect();
        read(Failing { errors, input: File::from(input) }, &pieces);
        drop(pieces);
        std::iter::from_fn(|| receiver.blocking_recv())
            .map(|piece| piece.map_err(|error| error.kind()))
            .collect()
    }

    #[test]
    fn a_read_that_only_has_to_wait_cuts_no_input_and_one_that_fails_is_told() {
        use io::ErrorKind::{Interrupted, IsADirectory, WouldBlock};
        let text = || Ok(Bytes::from_static(b"text"));
        assert_eq!(pieces_of(&[], "text"), [text()]);
        assert_eq!(pieces_of(&[Interrupted, WouldBlock, WouldBlock], "text"), [text()]);
        assert_eq!(pieces_of(&[WouldBlock, IsADirectory], "text"), [Err(IsADirectory)]);
    }
}
