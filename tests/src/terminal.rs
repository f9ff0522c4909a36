//! A person at a terminal: a program with a terminal of its own, what it shows, and keys for it.

use std::io::{Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use rustix::pty::OpenptFlags;
use rustix::termios::{Termios, Winsize};

use crate::DEADLINE;

type Shown = Arc<(Mutex<Vec<u8>>, Condvar)>;

/// See the module. Ended on drop.
pub struct Terminal {
    child: Child,
    master: std::fs::File,
    slave: OwnedFd,
    shown: Shown,
}

impl Terminal {
    /// Starts a program at a terminal of 24 lines of 80 characters.
    ///
    /// # Panics
    /// If there are no terminals, or it cannot be started.
    #[must_use]
    pub fn start(command: &Command) -> Self {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let master = rustix::pty::openpt(flags).expect("there are terminals");
        rustix::pty::unlockpt(&master).expect("our own terminal");
        let slave = rustix::pty::ioctl_tiocgptpeer(&master, flags).expect("our own terminal");
        let size = Winsize { ws_row: 24, ws_col: 80, ws_xpixel: 0, ws_ypixel: 0 };
        rustix::termios::tcsetwinsize(&master, size).expect("our own terminal");
        let end = || Stdio::from(slave.try_clone().expect("descriptors are left"));
        // It makes the terminal the controlling one, which signals of the terminal need.
        let mut with_terminal = Command::new("setsid");
        with_terminal.arg("--ctty").arg(command.get_program()).args(command.get_args());
        for (name, value) in command.get_envs() {
            match value {
                Some(value) => with_terminal.env(name, value),
                None => with_terminal.env_remove(name),
            };
        }
        let child = with_terminal
            .env("TERM", "xterm-256color")
            .stdin(end())
            .stdout(end())
            .stderr(end())
            .spawn()
            .expect("util-linux has setsid");
        let master = std::fs::File::from(master);
        let shown = Shown::default();
        let (mut reading, filling) =
            (master.try_clone().expect("descriptors are left"), Arc::clone(&shown));
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(count @ 1..) = reading.read(&mut buffer) {
                filling
                    .0
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .extend_from_slice(&buffer[..count]);
                filling.1.notify_all();
            }
        });
        Self { child, master, slave, shown }
    }

    /// Types.
    ///
    /// # Panics
    /// If the terminal is gone.
    pub fn keys(&mut self, keys: &str) {
        self.bytes(keys.as_bytes());
    }

    /// Types bytes.
    ///
    /// # Panics
    /// If the terminal is gone.
    pub fn bytes(&mut self, keys: &[u8]) {
        self.master.write_all(keys).expect("the terminal is there");
    }

    /// All that was shown so far.
    #[must_use]
    pub fn shown(&self) -> String {
        let shown = self.shown.0.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&shown).into_owned()
    }

    /// Waits until something is shown.
    ///
    /// # Panics
    /// If it never is.
    pub fn until(&self, text: &str) {
        assert!(self.shows_within(text, DEADLINE), "{text:?} is not in {:?}", self.shown());
    }

    /// Whether something is shown soon.
    #[must_use]
    pub fn shows_within(&self, text: &str, time: Duration) -> bool {
        let until = Instant::now() + time;
        let mut shown = self.shown.0.lock().unwrap_or_else(PoisonError::into_inner);
        while !String::from_utf8_lossy(&shown).contains(text) {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            let waited = self.shown.1.wait_timeout(shown, left);
            shown = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    /// Types keys again and again until their effect shows: whether the program they are for is in
    /// the foreground already cannot be seen from here.
    ///
    /// # Panics
    /// If it never does.
    pub fn press_until(&mut self, keys: &str, text: &str) {
        let until = Instant::now() + DEADLINE;
        while !self.shows_within(text, Duration::from_millis(200)) {
            assert!(Instant::now() < until, "{text:?} is not in {:?}", self.shown());
            self.keys(keys);
        }
    }

    /// Gives it another size.
    ///
    /// # Panics
    /// If the terminal is gone.
    pub fn resize(&self, rows: u16, columns: u16) {
        let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        rustix::termios::tcsetwinsize(&self.master, size).expect("the terminal is there");
    }

    /// Its settings.
    ///
    /// # Panics
    /// If the terminal is gone.
    #[must_use]
    pub fn settings(&self) -> Termios {
        rustix::termios::tcgetattr(&self.slave).expect("the terminal is there")
    }

    /// Sends the program a signal.
    pub fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.child.id()).ok().and_then(rustix::process::Pid::from_raw);
        if let Some(pid) = pid {
            rustix::process::kill_process(pid, signal).ok();
        }
    }

    /// Waits for the program's end.
    ///
    /// # Panics
    /// If it does not end.
    pub fn wait(&mut self) -> ExitStatus {
        let shown = self.shown();
        crate::process::wait(&mut self.child, &format!("the program that shows {shown:?}"))
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}
