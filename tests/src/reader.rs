//! A client whose output is read by the test, at a pace of its own: counted and hashed, never kept.

use std::io::Read as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::DEADLINE;
use crate::process::wait;

/// How fast its output is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pace {
    /// As fast as it comes.
    Full,
    /// So many bytes a second.
    BytesPerSecond(u64),
    /// Not at all, until [`Reader::set_pace`] says otherwise.
    Stalled,
}

struct State {
    seen: u64,
    pace: Pace,
    ended: bool,
}

#[derive(Clone)]
struct Shared(Arc<(Mutex<State>, Condvar)>);

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.lock());
        self.0.1.notify_all();
    }

    fn wait_while(&self, mut condition: impl FnMut(&State) -> bool) -> Pace {
        let mut state = self.lock();
        while condition(&state) {
            state = self.0.1.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.pace
    }
}

/// What came of it.
#[derive(Debug)]
pub struct Ended {
    /// The exit code; nothing if a signal ended it.
    pub code: Option<i32>,
    /// Bytes of standard output.
    pub bytes: u64,
    /// BLAKE3 of them.
    pub hash: blake3::Hash,
    /// What it wrote on standard error.
    pub errors: String,
}

/// See the module. Killed on drop.
pub struct Reader {
    child: Child,
    reading: Option<JoinHandle<blake3::Hash>>,
    shared: Shared,
    errors: std::path::PathBuf,
}

impl Reader {
    /// Starts the client; its standard error goes to the file `errors`.
    ///
    /// # Panics
    /// If it cannot be started.
    #[must_use]
    pub fn start(mut command: Command, pace: Pace, errors: &Path) -> Self {
        command.stdin(Stdio::null());
        Self::start_with_input(command, pace, errors)
    }

    /// The same, with whatever standard input the command was given.
    ///
    /// # Panics
    /// If it cannot be started.
    #[must_use]
    pub fn start_with_input(mut command: Command, pace: Pace, errors: &Path) -> Self {
        let log = std::fs::File::create(errors).expect("the scratch directory is writable");
        let mut child = command
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .unwrap_or_else(|error| panic!("cannot start the client: {error}"));
        let output = child.stdout.take().expect("its output is piped");
        let state = State { seen: 0, pace, ended: false };
        let shared = Shared(Arc::new((Mutex::new(state), Condvar::new())));
        let reading = shared.clone();
        let reading = Some(thread::spawn(move || read(output, &reading)));
        Self { child, reading, shared, errors: errors.to_owned() }
    }

    /// From now on.
    pub fn set_pace(&self, pace: Pace) {
        self.shared.change(|state| state.pace = pace);
    }

    /// Its process id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Bytes of its output that were read.
    #[must_use]
    pub fn seen(&self) -> u64 {
        self.shared.lock().seen
    }

    /// Waits until so many bytes were read.
    ///
    /// # Panics
    /// If its output ends before, or nothing of it comes for longer than anything takes.
    pub fn has_seen(&self, bytes: u64) {
        let mut state = self.shared.lock();
        let (mut seen, mut since) = (state.seen, Instant::now());
        while state.seen < bytes {
            assert!(
                !state.ended,
                "its output ended after {} of {bytes} bytes: {}",
                seen,
                self.said()
            );
            if state.seen > seen {
                (seen, since) = (state.seen, Instant::now());
            }
            assert!(
                since.elapsed() < DEADLINE,
                "stuck after {seen} of {bytes} bytes: {}",
                self.said()
            );
            let waited = self.shared.0.1.wait_timeout(state, Duration::from_secs(1));
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// What it has written on standard error.
    #[must_use]
    pub fn said(&self) -> String {
        std::fs::read_to_string(&self.errors).unwrap_or_default()
    }

    /// Waits for the end of its output, and its own.
    ///
    /// # Panics
    /// If nothing comes for longer than anything takes.
    #[must_use]
    pub fn end(mut self) -> Ended {
        while !self.shared.lock().ended {
            let seen = self.seen();
            let state = self.shared.lock();
            let stuck = |state: &mut State| !state.ended && state.seen == seen;
            let waited = self.shared.0.1.wait_timeout_while(state, DEADLINE, stuck);
            let (state, waited) = waited.unwrap_or_else(PoisonError::into_inner);
            assert!(!waited.timed_out(), "stuck after {} bytes: {}", state.seen, self.said());
        }
        let status = wait(&mut self.child, "the client");
        let reading = self.reading.take().expect("only the end takes it");
        let hash = reading.join().expect("the reader does not panic");
        Ended { code: status.code(), bytes: self.seen(), hash, errors: self.said() }
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        // It may have ended.
        self.child.kill().ok();
        self.child.wait().ok();
        self.set_pace(Pace::Full);
    }
}

fn read(mut output: impl std::io::Read, shared: &Shared) -> blake3::Hash {
    let (mut hasher, mut buffer) = (blake3::Hasher::new(), vec![0; 256 * 1024]);
    // What a pace allows is counted from when it was set, or from the last pause.
    let (mut begun, mut read_since) = (Instant::now(), 0_u64);
    loop {
        let pace = shared.wait_while(|state| state.pace == Pace::Stalled);
        let Ok(length @ 1..) = output.read(&mut buffer) else { break };
        hasher.update(&buffer[..length]);
        shared.change(|state| state.seen += length as u64);
        if let Pace::BytesPerSecond(rate) = pace {
            read_since += length as u64;
            let due = Duration::from_secs_f64(read_since as f64 / rate as f64);
            match due.checked_sub(begun.elapsed()) {
                Some(early) => thread::sleep(early),
                // Time in which nothing came is not made up for.
                None => (begun, read_since) = (Instant::now(), 0),
            }
        }
    }
    shared.change(|state| state.ended = true);
    hasher.finalize()
}

/// The size and hash of what a shell script prints.
///
/// # Panics
/// If it cannot be run.
#[must_use]
pub fn printed_by(script: &str) -> (u64, blake3::Hash) {
    let mut child = Command::new("bash")
        .args(["-c", script])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("cannot start bash: {error}"));
    let mut output = child.stdout.take().expect("its output is piped");
    let (mut hasher, mut bytes, mut buffer) = (blake3::Hasher::new(), 0, vec![0; 256 * 1024]);
    while let Ok(length @ 1..) = output.read(&mut buffer) {
        hasher.update(&buffer[..length]);
        bytes += length as u64;
    }
    child.wait().expect("a child can be waited for");
    (bytes, hasher.finalize())
}

/// Memory of a process that is resident now, in KiB.
///
/// # Panics
/// If there is no such process.
#[must_use]
pub fn resident_kib(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("it has memory");
    line.trim().trim_end_matches(" kB").parse().expect("a number")
}

/// A number that makes a scenario larger, from the environment (`scripts/stress` sets them).
///
/// # Panics
/// If it is set and no number.
#[must_use]
pub fn size(name: &str, usual: u64) -> u64 {
    std::env::var(name).map_or(usual, |text| {
        text.parse().unwrap_or_else(|_| panic!("{name} is no number: {text:?}"))
    })
}
