//! Reading a file whole while making sure that it did not change meanwhile.

use std::io::{self, Read};
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::thread;

use cortex_shared::chunk::{CutError, Cutter, Recipe};
use cortex_shared::entry::{Digest, Entry, File};
use cortex_shared::wire_path::WirePath;
use rustix::io::Errno;
use tokio_util::sync::CancellationToken;

use super::Clock;
use crate::root_dir::{DirHandle, FileHandle};
use crate::sync::index::Stamp;

/// Hashing is limited by memory bandwidth well before more threads would help.
const WORKERS: usize = 2;
/// Files that a worker is given at once, unless they are large: to wake it for each small one would cost
/// more than reading that.
const BATCH_FILES: usize = 16;
const BATCH_BYTES: u64 = 1024 * 1024;
/// Batches that wait for a worker; bounds the directory handles kept open.
const QUEUE: usize = 8;

/// A file to be read.
pub(super) struct Job {
    pub(super) path: WirePath,
    pub(super) parent: DirHandle,
    /// Its length when it was listed.
    pub(super) bytes: u64,
    /// It has been changing for long: what it begins with will do, if that stays the same.
    pub(super) prefix: bool,
    /// What it looked like when it was read last.
    pub(super) known: Option<Stamp>,
    /// How it was cut then.
    pub(super) earlier: Recipe,
}

/// What came of it.
pub(super) enum Outcome {
    Stable(Entry, Stamp),
    /// It only grows: this is what it held when the reading began.
    Prefix(Entry, Stamp),
    Vanished,
    /// It changed while it was read, or became something else.
    Unstable,
    Unreadable(io::Error),
    TooLarge,
}

pub(super) struct Hashed {
    pub(super) path: WirePath,
    pub(super) outcome: Outcome,
    pub(super) known: Option<Stamp>,
}

/// What reads files: two threads, or whoever asks. Lives within one scan.
pub(super) enum Pool<'a> {
    Threads(Threads),
    Inline(Reader<'a>),
}

/// The ends of the queues to and from two threads.
pub(super) struct Threads {
    jobs: SyncSender<Vec<Job>>,
    results: Receiver<thread::Result<Vec<Hashed>>>,
    /// Batches whose results have not come back.
    waiting: usize,
    /// The next batch.
    batch: Vec<Job>,
    bytes: u64,
}

impl<'a> Pool<'a> {
    /// Runs `work` with a pool; its threads have ended when this returns.
    pub(super) fn run<T>(
        clock: Clock,
        cancel: &'a CancellationToken,
        threads: bool,
        work: impl FnOnce(&mut Self) -> T,
    ) -> T {
        if !threads {
            return work(&mut Self::Inline(Reader::new(clock, cancel)));
        }
        thread::scope(|scope| {
            let (jobs, job_receiver) = sync_channel::<Vec<Job>>(QUEUE);
            let (result_sender, results) = sync_channel(QUEUE);
            let job_receiver = std::sync::Arc::new(Mutex::new(job_receiver));
            for _ in 0..WORKERS {
                let (jobs, results) = (job_receiver.clone(), result_sender.clone());
                scope.spawn(move || worker(&jobs, &results, Reader::new(clock, cancel)));
            }
            drop(result_sender);
            let (batch, bytes, waiting) = Default::default();
            let mut pool = Self::Threads(Threads { jobs, results, waiting, batch, bytes });
            let result = work(&mut pool);
            // Closes the queues, so that the workers end.
            drop(pool);
            result
        })
    }

    /// Queues a file and hands over results meanwhile.
    pub(super) fn submit(&mut self, job: Job, mut take: impl FnMut(Hashed)) {
        let threads = match self {
            Self::Threads(threads) => threads,
            Self::Inline(reader) => return take(reader.read(job)),
        };
        threads.bytes = threads.bytes.saturating_add(job.bytes);
        threads.batch.push(job);
        if threads.batch.len() == BATCH_FILES || threads.bytes >= BATCH_BYTES {
            threads.send(&mut take);
        }
        while let Ok(hashed) = threads.results.try_recv() {
            threads.waiting -= 1;
            whole(hashed).into_iter().for_each(&mut take);
        }
    }

    /// Hands over all results that are still to come.
    pub(super) fn finish(&mut self, mut take: impl FnMut(Hashed)) {
        let Self::Threads(threads) = self else { return };
        threads.send(&mut take);
        while threads.waiting > 0 {
            threads.receive(&mut take);
        }
    }
}

impl Threads {
    fn send(&mut self, take: &mut impl FnMut(Hashed)) {
        self.bytes = 0;
        let mut batch = std::mem::take(&mut self.batch);
        if batch.is_empty() {
            return;
        }
        loop {
            match self.jobs.try_send(batch) {
                Ok(()) => {
                    self.waiting += 1;
                    return;
                }
                Err(TrySendError::Full(back)) => {
                    batch = back;
                    self.receive(take);
                }
                Err(TrySendError::Disconnected(_)) => {
                    unreachable!("workers end only after the pool is dropped")
                }
            }
        }
    }

    fn receive(&mut self, take: &mut impl FnMut(Hashed)) {
        self.waiting -= 1;
        let results = self.results.recv().expect("workers end only after the pool is dropped");
        whole(results).into_iter().for_each(take);
    }
}

/// Goes on with the panic of a reader.
fn whole(hashed: thread::Result<Vec<Hashed>>) -> Vec<Hashed> {
    hashed.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

fn worker(
    jobs: &Mutex<Receiver<Vec<Job>>>,
    results: &SyncSender<thread::Result<Vec<Hashed>>>,
    mut reader: Reader<'_>,
) {
    loop {
        let next = jobs.lock().unwrap_or_else(std::sync::PoisonError::into_inner).recv();
        let Ok(batch) = next else { return };
        let read = || batch.into_iter().map(|job| reader.read(job)).collect();
        // Whoever waits for its answer would wait for ever.
        let hashed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(read));
        let panic = hashed.as_ref().is_err();
        if results.send(hashed).is_err() || panic {
            return;
        }
    }
}

/// Reads one file after the other.
pub(super) struct Reader<'a> {
    cutter: Cutter,
    clock: Clock,
    cancel: &'a CancellationToken,
}

impl<'a> Reader<'a> {
    fn new(clock: Clock, cancel: &'a CancellationToken) -> Self {
        Self { cutter: Cutter::new(), clock, cancel }
    }

    fn read(&mut self, job: Job) -> Hashed {
        if self.cancel.is_cancelled() {
            let outcome = Outcome::Unreadable(io::Error::other("cancelled"));
            return Hashed { path: job.path, outcome, known: job.known };
        }
        let outcome = read_stably(&job, &mut self.cutter, self.clock, self.cancel);
        Hashed { path: job.path, outcome, known: job.known }
    }
}

/// Reads that end early once the scan is cancelled: a large file must not delay a stop.
struct Cancellable<'a, R> {
    inner: R,
    cancel: &'a CancellationToken,
}

impl<R: Read> Read for Cancellable<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.cancel.is_cancelled() {
            return Err(io::Error::other("cancelled"));
        }
        let piece = buffer.len().min(1024 * 1024);
        self.inner.read(&mut buffer[..piece])
    }
}

/// Hashes and cuts a file in one pass. The attributes are read before and after, through the handle
/// and by name: if any of them differ, the content is not believed.
fn read_stably(
    Job { path, parent, prefix, earlier, .. }: &Job,
    cutter: &mut Cutter,
    clock: Clock,
    cancel: &CancellationToken,
) -> Outcome {
    let name = path.name();
    let result = (|| {
        let file = parent.open_file(name)?;
        let before = file.meta()?;
        let reader = Cancellable { inner: file.reader().take(before.size), cancel };
        let taker = |_, _: &[u8]| Ok::<_, std::convert::Infallible>(());
        let cut = match cutter.cut_again(reader, earlier, taker) {
            Ok(cut) => cut,
            Err(CutError::Read(error)) => return Err(error),
            Err(CutError::TooLarge) => return Ok(Outcome::TooLarge),
        };
        let (after, named) = (file.meta()?, parent.lstat(name)?);
        let entry = Entry::File(File {
            content: cut.content,
            size: cut.size,
            executable: before.executable(),
            mtime_ns: before.mtime_ns,
            recipe: cut.recipe,
        });
        if cut.size != before.size {
            return Ok(Outcome::Unstable);
        }
        if before == after && before == named {
            let stamp = Stamp::new(&before, clock.is_racy(&before));
            return Ok(Outcome::Stable(entry, stamp));
        }
        let grows = after.size >= before.size && named.ino == before.ino;
        if *prefix && grows && hash_again(&file, before.size, cancel)? == cut.content {
            return Ok(Outcome::Prefix(entry, Stamp::new(&before, true)));
        }
        Ok(Outcome::Unstable)
    })();
    result.unwrap_or_else(|error| match Errno::from_io_error(&error) {
        Some(Errno::NOENT | Errno::NOTDIR) => Outcome::Vanished,
        // It became a link or something else since it was listed.
        Some(Errno::LOOP | Errno::NXIO) => Outcome::Unstable,
        _ if error.kind() == io::ErrorKind::InvalidInput => Outcome::Unstable,
        _ => Outcome::Unreadable(error),
    })
}

fn hash_again(file: &FileHandle, size: u64, cancel: &CancellationToken) -> io::Result<Digest> {
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(Cancellable { inner: file.reader().take(size), cancel })?;
    Ok(hasher.finalize().into())
}
