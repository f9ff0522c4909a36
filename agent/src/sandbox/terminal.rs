//! The terminal of a command.
//!
//! A sandbox has a devpts of its own, in which pid 1 opens the pair: the command's side becomes its
//! controlling terminal, the other goes to the agent beside a report, and stays nowhere inside. So no
//! terminal of the host is ever visible or controlling inside, and what a command can do to its
//! terminal reaches the bytes of its own output and input, which it has in its hands anyway. A
//! permissive command has a pair of the host's devpts.

use std::os::fd::{AsFd as _, OwnedFd};

use rustix::fs::{Mode, OFlags};
use rustix::pty::OpenptFlags;
use rustix::termios::{InputModes, OptionalActions, Winsize};
use serde::{Deserialize, Serialize};

use super::channel;
use super::spec::{Context as _, Report, SetupError, Step};

/// The size of a terminal, in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TerminalSize {
    /// Lines.
    pub rows: u16,
    /// Characters of a line.
    pub columns: u16,
}

impl TerminalSize {
    pub(crate) fn to_kernel(self) -> Winsize {
        Winsize { ws_row: self.rows, ws_col: self.columns, ws_xpixel: 0, ws_ypixel: 0 }
    }
}

/// Opens a terminal in the devpts at `/dev/pts` and hands the agent's side to the agent. Returns
/// the command's side.
pub(super) fn open(size: TerminalSize, control: &OwnedFd) -> Result<OwnedFd, SetupError> {
    let step = Step::Terminal;
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
    let master = rustix::fs::open("/dev/ptmx", flags, Mode::empty())
        .step(step, "open a terminal of the private devpts")?;
    let prepare = || -> rustix::io::Result<OwnedFd> {
        rustix::pty::unlockpt(&master)?;
        // By the descriptor, not by a name: it is this terminal whatever is mounted where.
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let slave = rustix::pty::ioctl_tiocgptpeer(&master, flags)?;
        rustix::termios::tcsetwinsize(&slave, size.to_kernel())?;
        // Erasing a character erases all bytes of it.
        let mut settings = rustix::termios::tcgetattr(&slave)?;
        settings.input_modes |= InputModes::IUTF8;
        rustix::termios::tcsetattr(&slave, OptionalActions::Now, &settings)?;
        Ok(slave)
    };
    let slave = prepare().step(step, "prepare the terminal")?;
    channel::send_with_descriptor(control, &Report::Terminal, master.as_fd())
        .step(step, "hand the terminal to the agent")?;
    Ok(slave)
}

/// Makes a terminal the controlling one of this process, which leads a session without one, and its
/// standard input, output and error.
pub(super) fn take(slave: &OwnedFd) -> Result<(), SetupError> {
    let take = || -> rustix::io::Result<()> {
        rustix::process::ioctl_tiocsctty(slave)?;
        rustix::stdio::dup2_stdin(slave)?;
        rustix::stdio::dup2_stdout(slave)?;
        rustix::stdio::dup2_stderr(slave)
    };
    take().step(Step::Terminal, "take the terminal")
}
