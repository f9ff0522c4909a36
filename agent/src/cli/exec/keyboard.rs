//! The terminal on this side of a command with a terminal: raw mode, keys, size, escapes.
//!
//! Every key goes to the node as it is, but for escapes at the beginning of a line, which work also
//! while the node takes nothing. The terminal gets back its settings on every way out of this
//! process that runs any code of it: the guard's drop does it.

use std::io::{IsTerminal as _, Write as _};
use std::os::fd::{AsFd as _, OwnedFd};

use bytes::{Bytes, BytesMut};
use cortex_proto::v1;
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;

use super::stdin::{Input, STDIN_PIECE_BYTES, read_stdin};
use crate::cli::error::CliError;

/// Keys that may wait for the node, which is a very large paste. What comes beyond that while the
/// command takes nothing is dropped, and that is said: it has to be read, since escapes may be behind
/// it.
const MAX_WAITING_BYTES: usize = 16 * 1024 * 1024;

/// Signals that end a process that does not listen to them, and that nobody else here listens to.
const ENDING: [i32; 11] = [
    libc::SIGQUIT,
    libc::SIGUSR1,
    libc::SIGUSR2,
    libc::SIGALRM,
    libc::SIGVTALRM,
    libc::SIGPROF,
    libc::SIGIO,
    libc::SIGPWR,
    libc::SIGSTKFLT,
    libc::SIGXCPU,
    libc::SIGXFSZ,
];

const HELP: &str = "\
Escapes, at the beginning of a line:
  ~.   leave: hangs up on the command
  ~^Z  suspend this program
  ~?   this help
  ~~   the character ~
";

const DROPPED: &str =
    "the command takes no keys, and more wait than there is room for: the rest is lost";

/// Whether standard input is a terminal.
pub(super) fn is_there() -> bool {
    std::io::stdin().is_terminal()
}

/// Size and kind of the terminal here; of none, what programs assume then.
pub(super) fn size_and_kind() -> v1::TerminalSize {
    let size = size();
    let term = std::env::var("TERM").ok().filter(|term| !term.is_empty());
    v1::TerminalSize { term: term.unwrap_or_else(|| "xterm".to_owned()), ..size }
}

fn size() -> v1::TerminalSize {
    let found = tcgetwinsize(std::io::stdin())
        .or_else(|_| tcgetwinsize(std::io::stdout()))
        .or_else(|_| tcgetwinsize(std::io::stderr()));
    // What is not known is left to the node.
    let (rows, columns) = found.map_or((0, 0), |size| (size.ws_row.into(), size.ws_col.into()));
    v1::TerminalSize { rows, columns, term: String::new() }
}

/// Raw mode of the terminal at standard input, until dropped.
struct RawMode {
    terminal: OwnedFd,
    before: Termios,
}

impl RawMode {
    fn enter() -> std::io::Result<Self> {
        let terminal = std::io::stdin().as_fd().try_clone_to_owned()?;
        let before = tcgetattr(&terminal)?;
        let mode = Self { terminal, before };
        mode.resume()?;
        Ok(mode)
    }

    fn resume(&self) -> std::io::Result<()> {
        let mut raw = self.before.clone();
        raw.make_raw();
        Ok(tcsetattr(&self.terminal, OptionalActions::Now, &raw)?)
    }

    fn pause(&self) {
        // A terminal that is gone needs no settings.
        tcsetattr(&self.terminal, OptionalActions::Now, &self.before).ok();
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        self.pause();
    }
}

/// What a key or the terminal asks for.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum KeyEvent {
    /// The terminal has another size.
    Resized(v1::TerminalSize),
    /// Leave, whatever the command does.
    Leave,
}

/// See the module.
pub(super) struct Keyboard {
    raw: RawMode,
    keys: Input,
    keys_end: bool,
    /// Why they ended, where that was not their end; the command is told after the last of them.
    failure: Option<std::io::Error>,
    escapes: Escapes,
    waiting: BytesMut,
    dropped: bool,
    /// To the command; gone once the keys have ended and are all sent.
    forward: Option<Forward>,
    resized: Signal,
    stopped: Signal,
    ending: Vec<Signal>,
}

impl Keyboard {
    /// Takes the terminal over. The keys come out of the second half.
    pub(super) fn open() -> Result<(Self, Input), CliError> {
        let failed = |error: std::io::Error| {
            super::stream::lost("the terminal cannot be used").because(error)
        };
        let listen = |kind| signal(kind).map_err(failed);
        let (forward, input) = mpsc::channel(2);
        let keyboard = Self {
            resized: listen(SignalKind::window_change())?,
            stopped: listen(SignalKind::from_raw(libc::SIGTSTP))?,
            ending: ENDING
                .into_iter()
                .map(|number| listen(SignalKind::from_raw(number)))
                .collect::<Result<_, _>>()?,
            raw: RawMode::enter().map_err(failed)?,
            keys: read_stdin(),
            keys_end: false,
            failure: None,
            escapes: Escapes::default(),
            waiting: BytesMut::new(),
            dropped: false,
            forward: Some(forward),
        };
        Ok((keyboard, input))
    }

    /// Says something to the person at the terminal.
    pub(super) fn say(&self, text: &str) {
        let text: String = text.lines().map(|line| format!("\r{line}\r\n")).collect();
        std::io::stderr().write_all(text.as_bytes()).ok();
    }

    /// The next event; keys are passed on meanwhile. Cancelling it loses nothing.
    pub(super) async fn next(&mut self) -> KeyEvent {
        loop {
            if self.keys_end && self.waiting.is_empty() && self.failure.is_none() {
                self.forward = None;
            }
            tokio::select! {
                piece = self.keys.recv(), if !self.keys_end => match piece {
                    Some(Ok(piece)) => {
                        let escape = self.escapes.take(&piece, &mut self.waiting);
                        if self.waiting.len() > MAX_WAITING_BYTES {
                            self.waiting.truncate(MAX_WAITING_BYTES);
                            if !std::mem::replace(&mut self.dropped, true) {
                                self.say(DROPPED);
                            }
                        }
                        match escape {
                            Some(Escape::Leave) => return KeyEvent::Leave,
                            Some(Escape::Suspend) => return self.suspend(),
                            Some(Escape::Help) => self.say(HELP),
                            None => {}
                        }
                    }
                    Some(Err(error)) => (self.keys_end, self.failure) = (true, Some(error)),
                    None => self.keys_end = true,
                },
                permit = room(&self.forward),
                    if !self.waiting.is_empty() || self.failure.is_some() => match permit {
                    Some(permit) if self.waiting.is_empty() => {
                        if let Some(error) = self.failure.take() {
                            permit.send(Err(error));
                        }
                    }
                    Some(permit) => {
                        let most = self.waiting.len().min(STDIN_PIECE_BYTES);
                        permit.send(Ok(self.waiting.split_to(most).freeze()));
                        self.dropped = false;
                    }
                    // The command takes no more.
                    None => {
                        self.waiting.clear();
                        self.failure = None;
                    }
                },
                _ = self.resized.recv() => return KeyEvent::Resized(size()),
                _ = self.stopped.recv() => return self.suspend(),
                () = next_of(&mut self.ending) => return KeyEvent::Leave,
            }
        }
    }

    /// Gives the terminal back and stops this process, until somebody continues it.
    fn suspend(&self) -> KeyEvent {
        self.raw.pause();
        // The shell that started us learns of it as of any program that is stopped.
        rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::STOP)
            .ok();
        if self.raw.resume().is_err() {
            return KeyEvent::Leave;
        }
        KeyEvent::Resized(size())
    }
}

/// The next of several signals.
async fn next_of(signals: &mut [Signal]) {
    std::future::poll_fn(|context| {
        let heard = signals.iter_mut().any(|signal| signal.poll_recv(context).is_ready());
        if heard { std::task::Poll::Ready(()) } else { std::task::Poll::Pending }
    })
    .await;
}

/// Where keys go to the command.
type Forward = mpsc::Sender<std::io::Result<Bytes>>;

async fn room(forward: &Option<Forward>) -> Option<mpsc::Permit<'_, std::io::Result<Bytes>>> {
    match forward {
        Some(forward) => forward.reserve().await.ok(),
        None => None,
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Escape {
    Leave,
    Suspend,
    Help,
}

/// Finds escapes among keys. Pure.
#[derive(Debug, Default)]
struct Escapes {
    state: Position,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Position {
    #[default]
    LineStart,
    /// After a `~` at the beginning of a line, which has not been passed on.
    Tilde,
    Within,
}

impl Escapes {
    /// Passes `keys` on to `out` but for escapes; the last escape among them. Nothing after
    /// `~.` counts.
    fn take(&mut self, keys: &[u8], out: &mut BytesMut) -> Option<Escape> {
        let mut found = None;
        for &key in keys {
            let escape = match (self.state, key) {
                (Position::LineStart, b'~') => {
                    self.state = Position::Tilde;
                    continue;
                }
                (Position::Tilde, b'.') => return Some(Escape::Leave),
                (Position::Tilde, 0x1a) => Some(Escape::Suspend),
                (Position::Tilde, b'?') => Some(Escape::Help),
                (Position::Tilde, b'~') => {
                    out.extend_from_slice(b"~");
                    self.state = Position::Within;
                    continue;
                }
                (Position::Tilde, _) => {
                    out.extend_from_slice(b"~");
                    None
                }
                (Position::LineStart | Position::Within, _) => None,
            };
            if escape.is_some() {
                found = escape;
                self.state = Position::LineStart;
                continue;
            }
            out.extend_from_slice(&[key]);
            self.state = match key {
                b'\r' | b'\n' => Position::LineStart,
                _ => Position::Within,
            };
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn typed(pieces: &[&[u8]]) -> (Vec<u8>, Option<Escape>) {
        let (mut escapes, mut out, mut found) = (Escapes::default(), BytesMut::new(), None);
        for piece in pieces {
            found = escapes.take(piece, &mut out).or(found);
        }
        (out.to_vec(), found)
    }

    #[test]
    fn escapes_count_at_the_beginning_of_a_line_only() {
        type Case = (&'static [&'static [u8]], &'static [u8], Option<Escape>);
        let cases: [Case; 12] = [
            (&[b"ls\r"], b"ls\r", None),
            (&[b"~."], b"", Some(Escape::Leave)),
            (&[b"~", b"."], b"", Some(Escape::Leave)),
            (&[b"ls\r~."], b"ls\r", Some(Escape::Leave)),
            (&[b"ls\n~."], b"ls\n", Some(Escape::Leave)),
            (&[b"a~."], b"a~.", None),
            (&[b"~~."], b"~.", None),
            (&[b"~/bin\r"], b"~/bin\r", None),
            (&[b"~?x"], b"x", Some(Escape::Help)),
            (&[b"~?~."], b"", Some(Escape::Leave)),
            (&[b"~\x1a"], b"", Some(Escape::Suspend)),
            (&[b"~\r~."], b"~\r", Some(Escape::Leave)),
        ];
        for (keys, passed, escape) in cases {
            assert_eq!(typed(keys), (passed.to_vec(), escape), "{keys:?}");
        }
    }

    proptest! {
        #[test]
        fn keys_without_tilde_pass_as_they_are(keys in proptest::collection::vec(any::<u8>(), 0..99)) {
            let keys: Vec<u8> = keys.into_iter().filter(|key| *key != b'~').collect();
            prop_assert_eq!(typed(&[&keys]), (keys.clone(), None));
        }

        #[test]
        fn pieces_make_no_difference(
            keys in proptest::collection::vec(prop_oneof!["~", r"\r", "a", r"\?"], 0..20),
        ) {
            let whole: Vec<u8> = keys.concat().replace("\\r", "\r").replace("\\?", "?").into();
            let single: Vec<&[u8]> = whole.chunks(1).collect();
            prop_assert_eq!(typed(&[&whole]), typed(&single));
        }
    }
}
