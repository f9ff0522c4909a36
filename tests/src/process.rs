//! Child processes that end with the test.

use std::ffi::OsStr;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::DEADLINE;

/// A process in the background whose lines can be waited for. Killed on drop.
pub struct Daemon {
    child: Child,
    name: String,
    stdout: Receiver<String>,
}

impl Daemon {
    /// Starts it. Its standard error goes to `log`.
    ///
    /// # Panics
    /// If it cannot be started.
    #[must_use]
    pub fn start(name: &str, command: &mut Command, log: &Path) -> Self {
        Self::start_with(name, command, log, Stdio::null())
    }

    /// The same, with this as its standard input.
    ///
    /// # Panics
    /// If it cannot be started.
    #[must_use]
    pub fn start_with(name: &str, command: &mut Command, log: &Path, input: Stdio) -> Self {
        let log = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(log)
            .expect("the scratch directory is writable");
        let mut child = command
            .stdin(input)
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .unwrap_or_else(|error| panic!("cannot start {name}: {error}"));
        let stdout = lines(child.stdout.take().expect("its output is piped"));
        Self { child, name: name.to_owned(), stdout }
    }

    /// Waits for a line of its standard output for which `wanted` gives something.
    ///
    /// # Panics
    /// If it ends first, or says nothing of the kind before the deadline.
    pub fn line<T>(&mut self, what: &str, mut wanted: impl FnMut(&str) -> Option<T>) -> T {
        let until = Instant::now() + DEADLINE;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            match self.stdout.recv_timeout(left) {
                Ok(line) => {
                    if let Some(found) = wanted(&line) {
                        return found;
                    }
                }
                Err(error) => panic!("{} never said {what}: {error}", self.name),
            }
        }
    }

    /// Its process id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw);
        if let Some(pid) = pid {
            // It may have ended, which is what most signals are for.
            kill_process(pid, signal).ok();
        }
    }

    /// `kill -9`, and waits until it is gone.
    pub fn kill(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }

    /// SIGTERM, and waits for its end.
    ///
    /// # Panics
    /// If it does not end.
    pub fn terminate(&mut self) -> ExitStatus {
        self.signal(Signal::TERM);
        wait(&mut self.child, &self.name)
    }

    /// Waits for its end.
    ///
    /// # Panics
    /// If it does not end.
    pub fn wait(&mut self) -> ExitStatus {
        wait(&mut self.child, &self.name)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.kill();
    }
}

fn lines(output: impl std::io::Read + Send + 'static) -> Receiver<String> {
    let (sender, receiver) = channel();
    thread::spawn(move || {
        for line in BufReader::new(output).lines().map_while(Result::ok) {
            if sender.send(line).is_err() {
                // Nobody listens any more; the pipe is still drained, so that nothing blocks.
                continue;
            }
        }
    });
    receiver
}

/// Waits for the end of a child whose standard error is piped, and has said no more than a pipe holds.
///
/// # Panics
/// If it does not end before the deadline.
#[must_use]
pub fn end(mut child: Child, name: &str) -> (ExitStatus, String) {
    let status = wait(&mut child, name);
    let mut said = Vec::new();
    child.stderr.expect("its error output is piped").read_to_end(&mut said).ok();
    (status, String::from_utf8_lossy(&said).into_owned())
}

/// Waits for a child's end with the deadline of tests.
///
/// # Panics
/// If it does not end before.
pub fn wait(child: &mut Child, name: &str) -> ExitStatus {
    let until = Instant::now() + DEADLINE;
    loop {
        match child.try_wait().expect("a child can be waited for") {
            Some(status) => return status,
            None if Instant::now() > until => {
                child.kill().ok();
                panic!("{name} did not end");
            }
            // There is no wait with a deadline in std; this only polls for an event.
            None => thread::park_timeout(Duration::from_millis(5)),
        }
    }
}

/// What a program that ran to its end said.
#[derive(Debug)]
pub struct Outcome {
    /// Exit code, or 128 + signal.
    pub code: i32,
    /// Standard output.
    pub stdout: Vec<u8>,
    /// Standard error, as text.
    pub stderr: String,
}

impl Outcome {
    /// Standard output as text.
    #[must_use]
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Fails the test unless the program succeeded.
    ///
    /// # Panics
    /// If it did not.
    #[must_use]
    pub fn ok(self) -> Self {
        assert_eq!(self.code, 0, "{}\n{}", self.stderr, self.text());
        self
    }

    /// Standard output as JSON.
    ///
    /// # Panics
    /// If it is none.
    #[must_use]
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.stdout)
            .unwrap_or_else(|error| panic!("not JSON ({error}): {}\n{}", self.text(), self.stderr))
    }
}

/// Runs a program to its end.
///
/// # Panics
/// If it cannot be started, or does not end before the deadline.
pub fn run(command: &mut Command, stdin: &[u8]) -> Outcome {
    use std::os::unix::process::ExitStatusExt as _;
    let shown = shown(command);
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("cannot start {shown}: {error}"));
    let mut input = child.stdin.take().expect("its input is piped");
    let stdin = stdin.to_vec();
    // A program that reads no input closes the pipe, which is its right.
    let feed = thread::spawn(move || input.write_all(&stdin).ok());
    let mut error = child.stderr.take().expect("its error output is piped");
    let errors = thread::spawn(move || {
        let mut bytes = Vec::new();
        error.read_to_end(&mut bytes).ok();
        bytes
    });
    let mut output = child.stdout.take().expect("its output is piped");
    let outputs = thread::spawn(move || {
        let mut bytes = Vec::new();
        output.read_to_end(&mut bytes).ok();
        bytes
    });
    let status = wait(&mut child, &shown);
    feed.join().ok();
    Outcome {
        code: status.code().or(status.signal().map(|s| 128 + s)).unwrap_or(-1),
        stdout: outputs.join().expect("the reader does not panic"),
        stderr: String::from_utf8_lossy(&errors.join().expect("the reader does not panic"))
            .into_owned(),
    }
}

fn shown(command: &Command) -> String {
    std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(OsStr::to_string_lossy)
        .collect::<Vec<_>>()
        .join(" ")
}
