//! Our own standard input, in pieces.

use std::io::Read as _;

use bytes::Bytes;
use tokio::sync::mpsc;

/// Pieces of input; the end of the channel is the end of the input.
pub(super) type Input = mpsc::Receiver<Bytes>;

/// Largest piece of standard input.
pub(super) const STDIN_PIECE_BYTES: usize = 64 * 1024;

/// Reads standard input on a thread that may block for ever; it ends with the process.
pub(super) fn read_stdin() -> Input {
    let (pieces, receiver) = mpsc::channel(2);
    tokio::task::spawn_blocking(move || {
        let mut stdin = std::io::stdin().lock();
        let mut buffer = vec![0; STDIN_PIECE_BYTES];
        loop {
            match stdin.read(&mut buffer) {
                Ok(0) | Err(_) => return,
                Ok(length) => {
                    if pieces.blocking_send(Bytes::copy_from_slice(&buffer[..length])).is_err() {
                        return;
                    }
                }
            }
        }
    });
    receiver
}
