//! The agent's side of a command's terminal.
//!
//! Its output is read and its input written like those of a pipe. The command's side is held open
//! here, too: a command that closes its terminal and opens it again would otherwise end its output in
//! between.

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};

use rustix::pty::OpenptFlags;
use tokio::net::unix::pipe;

use crate::sandbox::TerminalSize;

/// What a terminal can hold that was written to it and not read: the kernel's own limits are lower.
pub(super) const MOST_UNREAD_BYTES: u64 = 64 * 1024;
/// Typed in place of the end of input: a terminal has none, but whoever reads lines from one takes
/// this for it.
pub(super) const END_OF_INPUT: u8 = 0x04;

/// Keeps a terminal; without it, it hangs up as soon as both its pipes are gone.
#[derive(Debug)]
pub(super) struct Terminal {
    master: OwnedFd,
    _slave: OwnedFd,
}

impl Terminal {
    /// Takes the agent's side over, and gives what to read from and what to write to.
    ///
    /// # Errors
    /// If it is no such thing, or this process has no descriptors left.
    pub(super) fn new(master: OwnedFd) -> io::Result<(Self, pipe::Receiver, pipe::Sender)> {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let slave = rustix::pty::ioctl_tiocgptpeer(&master, flags)?;
        // Of the open file, so that it holds for every descriptor of it.
        rustix::io::ioctl_fionbio(&master, true)?;
        let output = pipe::Receiver::from_owned_fd_unchecked(master.try_clone()?)?;
        let input = pipe::Sender::from_owned_fd_unchecked(master.try_clone()?)?;
        Ok((Self { master, _slave: slave }, output, input))
    }

    /// Gives it another size, of which its foreground processes hear by SIGWINCH.
    pub(super) fn resize(&self, size: TerminalSize) {
        if let Err(error) = rustix::termios::tcsetwinsize(self.master.as_fd(), size.to_kernel()) {
            tracing::debug!(%error, "a terminal was not resized");
        }
    }
}
