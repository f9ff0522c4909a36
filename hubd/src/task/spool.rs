//! The latest output of each task, in files: what detached tasks, viewers and readers that come back
//! after a restart of the hub read.
//!
//! A folder for each task, in it segments of records; when a task has written more than its share, its
//! oldest segment goes, and when all have, the tasks that ended first go. What is missing shows in the
//! offsets of what follows. Written by one task of the hub's scope, beside the relay's path, for all tasks
//! in turn: one that floods delays its own output and nobody else's. A relay that is faster than the disk
//! leaves a gap here, except for detached tasks, which wait.
//!
//! Not synced: a crash of the hub loses nothing that was handed to the system, a loss of power loses
//! the last seconds, and each record carries a check, so that what is read was written.

mod queue;
mod segment;

use std::collections::{HashMap, VecDeque};
use std::fs;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cortex_shared::durable;
use cortex_shared::ids::TaskId;
use cortex_shared::replay::Piece;
use cortex_shared::tasks::TaskScope;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use self::queue::{Order, Queue};
pub use self::segment::SpoolReader;
use self::segment::{SegmentWriter, segments};

/// A task's share is kept in so many segments, of which the oldest goes when a new one begins.
const SEGMENTS: u64 = 8;

/// Records are not made smaller than this, however small a task's share is.
const LEAST_RECORD_BYTES: usize = 4096;

/// How much is kept.
#[derive(Clone, Copy, Debug)]
pub struct SpoolLimits {
    /// Bytes of one task.
    pub task_bytes: u64,
    /// Bytes of all.
    pub total_bytes: u64,
    /// Tasks.
    pub tasks: usize,
}

impl Default for SpoolLimits {
    /// A task's share is twice the largest window of a reader, so that one that comes back finds what it
    /// lacks; a gigabyte holds the whole share of 64 tasks, and the output of many thousands that say
    /// little.
    fn default() -> Self {
        Self { task_bytes: 16 << 20, total_bytes: 1 << 30, tasks: 10_000 }
    }
}

/// Called once the piece has been dealt with.
type Done = Box<dyn FnOnce() + Send>;

struct Kept {
    bytes: u64,
    ended: bool,
    changed: watch::Sender<u64>,
}

#[derive(Default)]
struct Index {
    tasks: HashMap<TaskId, Kept>,
    /// Those that have ended, in this order.
    ended: VecDeque<TaskId>,
    total_bytes: u64,
}

/// See the module.
pub struct Spool {
    root: PathBuf,
    limits: SpoolLimits,
    index: Mutex<Index>,
    queue: Queue,
}

impl Spool {
    /// Opens the folder, or creates it, and begins to write. What an earlier run left is kept; all of it
    /// counts as ended until [`Spool::reopen`] says otherwise. Ends with `scope`, once it has written what
    /// it had accepted.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn open(root: PathBuf, limits: SpoolLimits, scope: &TaskScope) -> io::Result<Arc<Self>> {
        durable::create_private_folder(&root)?;
        let mut found = Vec::new();
        for entry in fs::read_dir(&root)? {
            let entry = entry?;
            // Whatever else somebody put there is left alone.
            let Some(id) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else {
                continue;
            };
            let bytes = segments(&entry.path())?.iter().map(|(_, bytes)| bytes).sum();
            found.push((id, bytes));
        }
        // Ids grow with time.
        found.sort_by_key(|(id, _): &(TaskId, u64)| *id);
        let mut index = Index::default();
        for (id, bytes) in found {
            index.total_bytes += bytes;
            index.ended.push_back(id);
            index.tasks.insert(id, Kept { bytes, ended: true, changed: watch::Sender::new(0) });
        }
        let spool =
            Arc::new(Self { root, limits, index: Mutex::new(index), queue: Queue::default() });
        let writer = Writer { spool: Arc::clone(&spool), open: HashMap::new() };
        scope.spawn("spool", writer.run(scope.token().clone()));
        Ok(spool)
    }

    fn lock(&self) -> MutexGuard<'_, Index> {
        self.index.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn folder(&self, task: TaskId) -> PathBuf {
        self.root.join(task.to_string())
    }

    /// Keeps a piece of output, or, if the disk is too far behind, does not. `done` is called when it has
    /// been dealt with.
    pub fn append(&self, task: TaskId, piece: Piece, done: Option<Done>) {
        if let Err(Some(done)) = self.queue.append(task, piece, done) {
            done();
        }
    }

    /// Waits until everything that was appended to this task before is in its files.
    pub async fn flush(&self, task: TaskId) {
        self.queue.flush(task).await;
    }

    /// The task writes no more: what is kept of it may have to go.
    pub fn end(&self, task: TaskId) {
        self.queue.end(task);
    }

    /// The task goes on after a restart of the hub; returns how far each stream is in the files.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn reopen(&self, task: TaskId) -> io::Result<[u64; 2]> {
        {
            let mut index = self.lock();
            index.entry(task).ended = false;
            index.ended.retain(|id| *id != task);
        }
        let mut reader = self.reader(task);
        let mut ends = [0; 2];
        loop {
            let pieces = reader.read()?;
            if pieces.is_empty() {
                return Ok(ends);
            }
            for piece in pieces {
                ends[piece.stream] = piece.end();
            }
        }
    }

    /// Reads what is kept of a task from its beginning.
    #[must_use]
    pub fn reader(&self, task: TaskId) -> SpoolReader {
        SpoolReader::new(self.folder(task))
    }

    /// A task begins.
    pub fn begin(&self, task: TaskId) {
        self.lock().entry(task);
    }

    /// Changes whenever something was appended to a task, and is closed once nothing is kept of it.
    #[must_use]
    pub fn changes(&self, task: TaskId) -> watch::Receiver<u64> {
        match self.lock().tasks.get(&task) {
            Some(kept) => kept.changed.subscribe(),
            None => watch::Sender::new(0).subscribe(),
        }
    }
}

impl Index {
    fn entry(&mut self, task: TaskId) -> &mut Kept {
        self.tasks.entry(task).or_insert_with(|| Kept {
            bytes: 0,
            ended: false,
            changed: watch::Sender::new(0),
        })
    }
}

/// The one that writes.
struct Writer {
    spool: Arc<Spool>,
    open: HashMap<TaskId, SegmentWriter>,
}

impl Writer {
    /// Works until the token is cancelled, and then until nothing waits any more.
    async fn run(mut self, stop: CancellationToken) {
        loop {
            let spool = Arc::clone(&self.spool);
            let batch = tokio::select! {
                batch = spool.queue.next_batch() => batch,
                () = stop.cancelled(), if !spool.queue.is_closed() => {
                    spool.queue.close();
                    continue;
                }
            };
            let Some(batch) = batch else { return };
            let written = tokio::task::spawn_blocking(move || {
                batch.into_iter().for_each(|(task, order)| self.carry_out(task, order));
                self
            });
            self = match written.await {
                Ok(writer) => writer,
                // Its files are opened anew, behind what it wrote.
                Err(error) => {
                    tracing::error!(%error, "the writer of the spool failed");
                    Self { spool, open: HashMap::new() }
                }
            };
        }
    }

    fn carry_out(&mut self, task: TaskId, order: Order) {
        match order {
            Order::Append(piece, done) => {
                if let Err(error) = self.append(task, &piece) {
                    tracing::warn!(%task, %error, "output of a task was not kept");
                    self.open.remove(&task);
                }
                if let Some(done) = done {
                    done();
                }
            }
            Order::End => {
                self.open.remove(&task);
                let mut index = self.spool.lock();
                if let Some(kept) = index.tasks.get_mut(&task) {
                    kept.changed.send_modify(|n| *n += 1);
                    if kept.bytes == 0 {
                        index.tasks.remove(&task);
                    } else if !std::mem::replace(&mut kept.ended, true) {
                        index.ended.push_back(task);
                    }
                }
                drop(index);
                self.make_room(None);
            }
            Order::Flush(written) => {
                written.send(()).ok();
            }
        }
    }

    fn append(&mut self, task: TaskId, piece: &Piece) -> io::Result<()> {
        let folder = self.spool.folder(task);
        let segment_bytes = self.spool.limits.task_bytes / SEGMENTS;
        let writer = match self.open.entry(task) {
            std::collections::hash_map::Entry::Occupied(entry) => entry.into_mut(),
            std::collections::hash_map::Entry::Vacant(entry) => {
                entry.insert(SegmentWriter::open(folder)?)
            }
        };
        let (mut freed, mut written) = (0, 0);
        let mut rest = piece.clone();
        while !rest.data.is_empty() {
            // A piece may be larger than a segment is to be.
            let most = usize::try_from(segment_bytes).unwrap_or(usize::MAX).max(LEAST_RECORD_BYTES);
            let data = rest.data.split_to(most.min(rest.data.len()));
            let part = Piece { data, ..rest };
            rest.offset = part.end();
            let full = writer.segment_bytes() + part.data.len() as u64 > segment_bytes;
            if full && writer.segment_bytes() > 0 {
                freed += writer.next_segment(SEGMENTS)?;
            }
            written += writer.append(&part)?;
        }
        let mut index = self.spool.lock();
        index.total_bytes = index.total_bytes.saturating_add(written).saturating_sub(freed);
        let kept = index.entry(task);
        kept.bytes = kept.bytes.saturating_add(written).saturating_sub(freed);
        kept.changed.send_modify(|n| *n += 1);
        drop(index);
        self.make_room(Some(task));
        Ok(())
    }

    /// Removes what ended first until the limits hold; if nothing ended is left, the beginning of the
    /// task that has just written.
    fn make_room(&mut self, writing: Option<TaskId>) {
        loop {
            let mut index = self.spool.lock();
            let limits = self.spool.limits;
            if index.total_bytes <= limits.total_bytes && index.tasks.len() <= limits.tasks {
                return;
            }
            let Some(task) = index.ended.pop_front() else { break };
            let kept = index.tasks.remove(&task);
            index.total_bytes = index.total_bytes.saturating_sub(kept.map_or(0, |k| k.bytes));
            drop(index);
            if let Err(error) = fs::remove_dir_all(self.spool.folder(task)) {
                tracing::warn!(%task, %error, "the output of an old task was not removed");
            }
        }
        let Some(task) = writing else { return };
        let freed = match self.open.get_mut(&task).map(|writer| writer.drop_oldest()) {
            Some(Ok(freed)) => freed,
            Some(Err(_)) | None => 0,
        };
        let mut index = self.spool.lock();
        index.total_bytes = index.total_bytes.saturating_sub(freed);
        let kept = index.entry(task);
        kept.bytes = kept.bytes.saturating_sub(freed);
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    fn piece(stream: usize, offset: u64, length: usize) -> Piece {
        Piece {
            stream,
            offset,
            data: Bytes::from(vec![b'a' + u8::try_from(offset % 26).unwrap(); length]),
        }
    }

    fn everything(reader: &mut SpoolReader) -> Vec<Piece> {
        let mut all = Vec::new();
        loop {
            let pieces = reader.read().unwrap();
            if pieces.is_empty() {
                return all;
            }
            all.extend(pieces);
        }
    }

    #[tokio::test]
    async fn what_was_kept_is_read_again_also_after_a_crash_that_tore_the_end() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("tasks");
        let (scope, task) = (TaskScope::new(), TaskId::new());
        let spool = Spool::open(root.clone(), SpoolLimits::default(), &scope).unwrap();
        let pieces = [piece(0, 0, 100), piece(1, 0, 5), piece(0, 100, 70_000)];
        for piece in &pieces {
            spool.append(task, piece.clone(), None);
        }
        spool.flush(task).await;
        assert_eq!(everything(&mut spool.reader(task)), pieces);
        // A second writer's torn record, and half of a header behind it.
        let segment = root.join(task.to_string()).join("00000000");
        let mut bytes = std::fs::read(&segment).unwrap();
        bytes.extend_from_slice(&bytes.clone()[..30]);
        std::fs::write(&segment, bytes).unwrap();
        let spool = Spool::open(root, SpoolLimits::default(), &scope).unwrap();
        assert_eq!(spool.reopen(task).unwrap(), [70_100, 5]);
        spool.append(task, piece(1, 5, 7), None);
        spool.flush(task).await;
        let read = everything(&mut spool.reader(task));
        assert_eq!((read.len(), read[3].clone()), (4, piece(1, 5, 7)));
    }

    #[tokio::test]
    async fn a_task_keeps_the_end_of_its_output_and_all_of_them_no_more_than_the_limit() {
        let folder = tempfile::tempdir().unwrap();
        let scope = TaskScope::new();
        let limits = SpoolLimits { task_bytes: 80_000, total_bytes: 130_000, tasks: 10 };
        let spool = Spool::open(folder.path().join("tasks"), limits, &scope).unwrap();
        let (first, second) = (TaskId::new(), TaskId::new());
        for task in [first, second] {
            for n in 0..100 {
                spool.append(task, piece(0, n * 1000, 1000), None);
            }
            spool.flush(task).await;
            let read = everything(&mut spool.reader(task));
            let kept: usize = read.iter().map(|piece| piece.data.len()).sum();
            assert!((60_000..=80_000).contains(&kept), "{kept}");
            assert_eq!(read.last().unwrap().end(), 100_000);
            assert!(read.windows(2).all(|two| two[0].end() == two[1].offset));
            spool.end(task);
        }
        spool.flush(second).await;
        assert!(everything(&mut spool.reader(first)).is_empty(), "the first to end had to go");
        assert!(!everything(&mut spool.reader(second)).is_empty());
        assert!(spool.lock().total_bytes <= 130_000);
    }

    #[tokio::test]
    async fn a_reader_that_follows_sees_what_comes_and_skips_what_went() {
        let folder = tempfile::tempdir().unwrap();
        let scope = TaskScope::new();
        let limits = SpoolLimits { task_bytes: 8_000, total_bytes: 1 << 30, tasks: 10 };
        let spool = Spool::open(folder.path().join("tasks"), limits, &scope).unwrap();
        let task = TaskId::new();
        spool.begin(task);
        let mut changes = spool.changes(task);
        let mut reader = spool.reader(task);
        assert!(reader.read().unwrap().is_empty());
        spool.append(task, piece(0, 0, 10), None);
        changes.changed().await.unwrap();
        assert_eq!(everything(&mut reader), [piece(0, 0, 10)]);
        for n in 0..50 {
            spool.append(task, piece(0, 10 + n * 1000, 1000), None);
        }
        spool.flush(task).await;
        let rest = everything(&mut reader);
        assert!(rest[0].offset > 10, "a gap, which its offset tells");
        assert_eq!(rest.last().unwrap().end(), 50_010);
    }
}
