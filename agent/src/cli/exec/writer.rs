//! Puts output where it belongs, on a thread of its own that may block on a slow reader.
//!
//! The queue between is bounded in bytes by the credit that was granted: credit is given back only
//! for bytes that were written. So a slow reader here slows the command on the node, as a pipe
//! would, and nothing else.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::AsFd as _;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use cortex_proto::v1::{Output, OutputStream};
use tokio::sync::{mpsc, oneshot};

use super::check::OutputCheck;

/// Most output that is kept where it is wanted as one document.
const MAX_CAPTURED_BYTES: usize = 16 * 1024 * 1024;

/// What the writer has to tell.
#[derive(Debug)]
pub(super) enum WriterEvent {
    /// So many bytes have been dealt with: the command may write as many more.
    Written(u64),
    /// The command wrote more than is wanted.
    TooMuch,
    /// The reader of standard output went away.
    ReaderGone,
    /// Standard output or error cannot be written.
    Failed(io::Error),
}

/// Where output goes.
#[derive(Debug)]
pub(super) enum Sink {
    /// To our own standard output and error, byte for byte.
    Pass([File; 2]),
    /// Into memory, up to a limit.
    Capture(Captured),
}

/// Output that was kept.
#[derive(Debug, Default)]
pub(super) struct Captured {
    pub(super) stdout: Vec<u8>,
    pub(super) stderr: Vec<u8>,
    pub(super) truncated: bool,
}

impl Captured {
    /// Keeps what there is room for.
    pub(super) fn take(&mut self, stream: OutputStream, data: &[u8], most: usize) {
        let room = most.saturating_sub(self.stdout.len() + self.stderr.len());
        let kept = &data[..data.len().min(room)];
        self.truncated |= kept.len() < data.len();
        match stream {
            OutputStream::Stdout => self.stdout.extend_from_slice(kept),
            OutputStream::Stderr => self.stderr.extend_from_slice(kept),
        }
    }
}

/// Our own standard output and error, byte for byte: descriptors of their own, because the standard
/// library's buffer lines where bytes must pass.
pub(super) fn pass() -> io::Result<[File; 2]> {
    Ok([
        File::from(io::stdout().as_fd().try_clone_to_owned()?),
        File::from(io::stderr().as_fd().try_clone_to_owned()?),
    ])
}

/// Where a command's conversation puts its output. Never waits.
pub(super) trait OutputTo: Send {
    /// Takes a piece; `false` if more waits than `limit` bytes, which credit does not allow.
    fn push(&self, output: Output, limit: u64) -> bool;

    /// No more will come; the writer ends once it has written all.
    fn close(&self);
}

/// Where there is none: of a command that is left to itself.
pub(super) struct NoOutput;

impl OutputTo for NoOutput {
    fn push(&self, _: Output, _: u64) -> bool {
        true
    }

    fn close(&self) {}
}

impl Sink {
    /// To our own standard output and error.
    pub(super) fn pass() -> io::Result<Self> {
        Ok(Self::Pass(pass()?))
    }

    /// Into memory.
    pub(super) fn capture() -> Self {
        Self::Capture(Captured::default())
    }

    fn write(&mut self, stream: OutputStream, data: &[u8]) -> io::Result<()> {
        match self {
            Self::Pass(ours) => write_ours(ours, stream, data),
            Self::Capture(captured) => {
                captured.take(stream, data, MAX_CAPTURED_BYTES);
                Ok(())
            }
        }
    }
}

/// What came of writing to our standard error: somebody who closed it does not want to read it.
pub(in crate::cli) fn unless_closed(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        result => result,
    }
}

/// Writes to one of our own outputs, as [`pass`] gives them.
pub(super) fn write_ours(
    ours: &mut [File; 2],
    stream: OutputStream,
    data: &[u8],
) -> io::Result<()> {
    let [stdout, stderr] = ours;
    match stream {
        OutputStream::Stdout => write_all(stdout, data),
        OutputStream::Stderr => unless_closed(write_all(stderr, data)),
    }
}

/// Writes all, also where somebody else made the terminal or pipe non-blocking.
pub(super) fn write_all(file: &mut File, mut data: &[u8]) -> io::Result<()> {
    while !data.is_empty() {
        match file.write(data) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => data = &data[written..],
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                let mut wait = [rustix::event::PollFd::new(file, rustix::event::PollFlags::OUT)];
                match rustix::event::poll(&mut wait, None) {
                    Ok(_) | Err(rustix::io::Errno::INTR) => {}
                    Err(error) => return Err(error.into()),
                }
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// A piece of output.
pub(super) struct Piece {
    pub(super) stream: OutputStream,
    pub(super) offset: u64,
    pub(super) data: Bytes,
}

#[derive(Default)]
struct Waiting {
    pieces: VecDeque<Piece>,
    bytes: u64,
    closed: bool,
}

/// The queue to the writer's thread.
#[derive(Clone, Default)]
pub(super) struct OutputQueue {
    shared: Arc<(Mutex<Waiting>, Condvar)>,
}

impl OutputQueue {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.shared.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Everything that waits; `None` at the end.
    fn take(&self) -> Option<VecDeque<Piece>> {
        let mut waiting = self.lock();
        loop {
            if !waiting.pieces.is_empty() {
                return Some(std::mem::take(&mut waiting.pieces));
            }
            if waiting.closed {
                return None;
            }
            waiting = self.shared.1.wait(waiting).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn done(&self, bytes: u64) {
        self.lock().bytes -= bytes;
    }
}

impl OutputTo for OutputQueue {
    fn push(&self, output: Output, limit: u64) -> bool {
        let length = u64::try_from(output.data.len()).unwrap_or(u64::MAX);
        let mut waiting = self.lock();
        waiting.bytes = waiting.bytes.saturating_add(length);
        // An unknown stream is standard output: better shown than lost.
        let stream = OutputStream::try_from(output.stream).unwrap_or(OutputStream::Stdout);
        if length > 0 {
            waiting.pieces.push_back(Piece { stream, offset: output.offset, data: output.data });
        }
        self.shared.1.notify_one();
        waiting.bytes <= limit
    }

    fn close(&self) {
        self.lock().closed = true;
        self.shared.1.notify_one();
    }
}

/// What the writer comes to in the end; an error if it died.
pub(super) type Written = oneshot::Receiver<(OutputCheck, Captured)>;

/// A writer whose thread begins with the first output: many a command has none, and ends sooner than a
/// thread is made.
pub(super) struct LateWriter {
    queue: OutputQueue,
    /// Until it has begun.
    work: Mutex<Option<Box<dyn FnOnce() + Send>>>,
}

impl LateWriter {
    /// One that will write to `sink` and tell `events`.
    pub(super) fn new(sink: Sink, events: mpsc::Sender<WriterEvent>) -> (Self, Written) {
        let queue = OutputQueue::default();
        let (done, written) = oneshot::channel();
        let writing = queue.clone();
        // Who does not wait for it does not want to know.
        let work = move || drop(done.send(write_output(&writing, sink, &events)));
        (Self { queue, work: Mutex::new(Some(Box::new(work))) }, written)
    }

    fn take_work(&self) -> Option<Box<dyn FnOnce() + Send>> {
        self.work.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

impl OutputTo for LateWriter {
    fn push(&self, output: Output, limit: u64) -> bool {
        if let Some(work) = self.take_work() {
            tokio::task::spawn_blocking(work);
        }
        self.queue.push(output, limit)
    }

    fn close(&self) {
        self.queue.close();
        // There was nothing to write, and so this does not wait.
        if let Some(work) = self.take_work() {
            work();
        }
    }
}

/// Writes until the queue is closed and empty. Blocks; for a thread of its own.
pub(super) fn write_output(
    queue: &OutputQueue,
    mut sink: Sink,
    events: &mpsc::Sender<WriterEvent>,
) -> (OutputCheck, Captured) {
    let mut check = OutputCheck::default();
    let mut writing = true;
    while let Some(pieces) = queue.take() {
        for Piece { stream, offset, data } in pieces {
            match stream {
                OutputStream::Stdout => check.stdout.take(offset, &data),
                OutputStream::Stderr => check.stderr.take(offset, &data),
            }
            if writing && let Err(error) = sink.write(stream, &data) {
                writing = false;
                let event = match error.kind() {
                    io::ErrorKind::BrokenPipe => WriterEvent::ReaderGone,
                    _ => WriterEvent::Failed(error),
                };
                events.blocking_send(event).ok();
            }
            // What cannot be written is still granted back, so that the command can end.
            let length = u64::try_from(data.len()).unwrap_or(u64::MAX);
            queue.done(length);
            events.blocking_send(WriterEvent::Written(length)).ok();
        }
    }
    let captured = match sink {
        Sink::Capture(captured) => captured,
        Sink::Pass(_) => Captured::default(),
    };
    (check, captured)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn piece(offset: u64, data: &'static [u8]) -> Output {
        Output { stream: OutputStream::Stdout.into(), offset, data: Bytes::from_static(data) }
    }

    #[test]
    fn queue_refuses_more_than_was_granted_and_grants_back_what_was_written() {
        let queue = OutputQueue::default();
        assert!(queue.push(piece(0, b"1234"), 8));
        assert!(queue.push(piece(4, b"5678"), 8));
        assert!(!queue.push(piece(8, b"9"), 8));
        queue.close();
        let (events, mut told) = mpsc::channel(16);
        let (_, captured) = write_output(&queue, Sink::capture(), &events);
        assert_eq!(captured.stdout, b"123456789");
        let mut granted = 0;
        while let Ok(WriterEvent::Written(bytes)) = told.try_recv() {
            granted += bytes;
        }
        assert_eq!(granted, 9);
        assert_eq!(queue.lock().bytes, 0);
    }

    #[tokio::test]
    async fn a_writer_begins_with_the_first_output_and_ends_without_any() {
        let (events, _told) = mpsc::channel(16);
        let (silent, written) = LateWriter::new(Sink::capture(), events.clone());
        silent.close();
        assert_eq!(written.await.unwrap().1.stdout, b"");
        let (writer, written) = LateWriter::new(Sink::capture(), events);
        assert!(writer.push(piece(0, b"12"), 8) && writer.push(piece(2, b"34"), 8));
        writer.close();
        assert_eq!(written.await.unwrap().1.stdout, b"1234");
    }

    #[test]
    fn reader_that_went_away_is_told_once_and_everything_is_still_granted() {
        let (reader, pipe) = rustix::pipe::pipe().unwrap();
        drop(reader);
        let stderr = File::options().write(true).open("/dev/null").unwrap();
        let sink = Sink::Pass([File::from(pipe), stderr]);
        let queue = OutputQueue::default();
        queue.push(piece(0, b"12"), 8);
        queue.push(piece(2, b"34"), 8);
        queue.close();
        let (events, mut told) = mpsc::channel(16);
        write_output(&queue, sink, &events);
        assert!(matches!(told.try_recv(), Ok(WriterEvent::ReaderGone)));
        assert!(matches!(told.try_recv(), Ok(WriterEvent::Written(2))));
        assert!(matches!(told.try_recv(), Ok(WriterEvent::Written(2))));
        assert!(told.try_recv().is_err());
    }

    #[test]
    fn errors_that_nobody_reads_count_as_written_and_output_does_not() {
        let (reader, pipe) = rustix::pipe::pipe().unwrap();
        drop(reader);
        let closed = File::from(pipe);
        let mut ours = [closed.try_clone().unwrap(), closed];
        assert!(write_ours(&mut ours, OutputStream::Stderr, b"x").is_ok());
        let error = write_ours(&mut ours, OutputStream::Stdout, b"x").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
        // One that cannot be written for another reason is a failure still.
        ours[1] = File::options().write(true).open("/dev/full").unwrap();
        assert!(write_ours(&mut ours, OutputStream::Stderr, b"x").is_err());
    }

    #[test]
    fn captured_output_is_bounded() {
        let mut sink = Sink::capture();
        let half = vec![b'x'; MAX_CAPTURED_BYTES / 2 + 1];
        sink.write(OutputStream::Stdout, &half).unwrap();
        sink.write(OutputStream::Stderr, &half).unwrap();
        let Sink::Capture(captured) = sink else { panic!("it is the capturing one") };
        assert!(captured.truncated);
        assert_eq!(captured.stdout.len() + captured.stderr.len(), MAX_CAPTURED_BYTES);
    }
}
