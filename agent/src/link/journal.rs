//! The node's own journal of tasks: none runs twice, and how one ended is kept until the hub has it.
//!
//! An id is on disk before its command starts; after a crash or power loss a repeated order for the same
//! id is therefore refused. An end is handed to the system before it is sent, and on disk soon after; it
//! is forgotten once the hub has acknowledged it. What had begun and not ended when the process stopped
//! has ended with it, and is reported so. Acknowledgements are not waited for: losing one costs a
//! repeated report.
//!
//! What is known is in memory, under a lock that is never held over the disk: the session asks and
//! never waits. One task writes, in batches with one flush for all of them. The file is a run of
//! records, each with its length and a check, written anew when it has grown, and after any failure.
//! Behind the records it has room, of zeros: a record that is written into blocks that are there already
//! is durable with one write, while a file that grows needs the file system's journal as well.

use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::io::{self, Read as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cortex_proto::v1::{TaskExit, TaskVerdict};
use cortex_shared::durable;
use cortex_shared::ids::TaskId;
use cortex_shared::tasks::TaskScope;
use prost::Message as _;
use tokio::sync::{mpsc, oneshot};

/// Ids that are remembered at least: the hub orders a task once, within seconds of making its id.
const REMEMBERED: usize = 16_384;
/// Ends that wait for a hub at most; beyond that the oldest are forgotten.
const MAX_UNACKNOWLEDGED: usize = 4096;
/// From this size on the file is written anew.
const MAX_FILE_BYTES: u64 = 8 * 1024 * 1024;
/// How much room is made at a time: for some hundred commands.
const ROOM_BYTES: usize = 64 * 1024;
/// Length of the rest (4 bytes) and check of it (4).
const HEAD_BYTES: usize = 8;
/// Kind (1) and id (16).
const FIXED_BYTES: usize = 17;
/// Longest reason or hint that is kept.
const MAX_TEXT_BYTES: usize = 1024;
/// Records that may wait for the disk; more than commands that may run.
const QUEUE: usize = 1024;

const BEGUN: u8 = 1;
const ENDED: u8 = 2;
const DONE: u8 = 3;

#[derive(Debug, Clone, PartialEq)]
enum State {
    Begun,
    Ended(TaskExit),
    /// The hub has the end.
    Done,
}

impl State {
    /// States follow each other in this order; records of them may not, around a file written anew.
    fn kind(&self) -> u8 {
        match self {
            Self::Begun => BEGUN,
            Self::Ended(_) => ENDED,
            Self::Done => DONE,
        }
    }
}

#[derive(Debug, Default)]
struct Memory {
    order: VecDeque<TaskId>,
    tasks: HashMap<TaskId, State>,
}

/// Who waits for a record.
enum Waiting {
    Nobody,
    /// Until the system has it.
    Written(oneshot::Sender<Result<(), Arc<io::Error>>>),
    /// Until it survives a loss of power.
    Durable(oneshot::Sender<Result<(), Arc<io::Error>>>),
}

struct Order {
    record: Vec<u8>,
    waiting: Waiting,
}

/// See the module. Clones share it.
#[derive(Clone, Debug)]
pub(super) struct Journal {
    memory: Arc<Mutex<Memory>>,
    orders: mpsc::Sender<Order>,
}

impl Journal {
    /// Opens the journal, or begins one. Blocks for the disk; to be called within the runtime.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let mut memory = Memory::read(path)?;
        for state in memory.tasks.values_mut().filter(|state| **state == State::Begun) {
            *state = State::Ended(TaskExit {
                verdict: TaskVerdict::Failed.into(),
                reason: "the agent stopped while the command ran, and the command with it".into(),
                ..TaskExit::default()
            });
        }
        let memory = Arc::new(Mutex::new(memory));
        let writer = Writer::open(path, Arc::clone(&memory))?;
        let (orders, queue) = mpsc::channel(QUEUE);
        // Ends with the last clone: a command that ends while the daemon stops is still written down.
        TaskScope::new().spawn("task journal", writer.run(queue));
        Ok(Self { memory, orders })
    }

    fn lock(&self) -> MutexGuard<'_, Memory> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Records that a task starts, durably. `false` if it was recorded before: it must not run.
    ///
    /// # Errors
    /// Those of the file system; it must not run then, either.
    pub(super) async fn begin(&self, id: TaskId) -> io::Result<bool> {
        {
            let mut memory = self.lock();
            if memory.tasks.contains_key(&id) {
                return Ok(false);
            }
            if memory.order.len() >= 2 * REMEMBERED {
                memory.forget_oldest();
            }
            memory.order.push_back(id);
            memory.tasks.insert(id, State::Begun);
        }
        let written = self.write(id, &State::Begun, Waiting::Durable).await;
        if written.is_err() {
            let mut memory = self.lock();
            memory.tasks.remove(&id);
            memory.order.retain(|other| *other != id);
        }
        written.map(|()| true)
    }

    /// Records how a task ended, and hands it to the system; it is flushed soon after.
    ///
    /// # Errors
    /// Those of the file system. As long as this process lives, it is known all the same.
    pub(super) async fn end(&self, id: TaskId, exit: &TaskExit) -> io::Result<()> {
        let mut exit = exit.clone();
        cortex_shared::text::shorten(&mut exit.reason, MAX_TEXT_BYTES);
        cortex_shared::text::shorten(&mut exit.hint, MAX_TEXT_BYTES);
        let state = State::Ended(exit);
        self.lock().tasks.insert(id, state.clone());
        self.write(id, &state, Waiting::Written).await
    }

    /// The hub has a task's end.
    pub(super) fn acknowledged(&self, id: TaskId) {
        match self.lock().tasks.get_mut(&id) {
            Some(state @ State::Ended(_)) => *state = State::Done,
            _ => return,
        }
        let order = Order { record: record_of(id, &State::Done), waiting: Waiting::Nobody };
        // Full: the end is reported once more after the next start.
        self.orders.try_send(order).ok();
    }

    /// How a task ended, as long as the hub has not acknowledged it.
    pub(super) fn outcome(&self, id: TaskId) -> Option<TaskExit> {
        match self.lock().tasks.get(&id)? {
            State::Ended(exit) => Some(exit.clone()),
            State::Begun | State::Done => None,
        }
    }

    /// The tasks whose end the hub has not acknowledged, oldest first.
    pub(super) fn unacknowledged(&self) -> Vec<TaskId> {
        self.lock().unacknowledged()
    }

    async fn write(
        &self,
        id: TaskId,
        state: &State,
        waiting: impl FnOnce(oneshot::Sender<Result<(), Arc<io::Error>>>) -> Waiting,
    ) -> io::Result<()> {
        let (told, answer) = oneshot::channel();
        let order = Order { record: record_of(id, state), waiting: waiting(told) };
        let gone = || io::Error::other("the writer of the journal has ended");
        self.orders.send(order).await.map_err(|_| gone())?;
        match answer.await {
            Ok(written) => written.map_err(io::Error::other),
            Err(_) => Err(gone()),
        }
    }
}

impl Memory {
    fn read(path: &Path) -> io::Result<Self> {
        let mut bytes = Vec::new();
        match File::open(path) {
            Ok(file) => {
                file.take(2 * MAX_FILE_BYTES).read_to_end(&mut bytes)?;
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        let mut memory = Self::default();
        let mut rest = bytes.as_slice();
        // A torn last record belongs to a command that did not start, or whose end is not known.
        while let Some((id, state, next)) = read_record(rest) {
            match memory.tasks.get_mut(&id) {
                Some(known) if known.kind() <= state.kind() => *known = state,
                Some(_) => {}
                None => {
                    memory.order.push_back(id);
                    memory.tasks.insert(id, state);
                }
            }
            rest = next;
        }
        Ok(memory)
    }

    fn unacknowledged(&self) -> Vec<TaskId> {
        let ended = |id: &&TaskId| matches!(self.tasks.get(id), Some(State::Ended(_)));
        self.order.iter().filter(ended).copied().collect()
    }

    fn forget_oldest(&mut self) {
        while self.order.len() > REMEMBERED
            && let Some(id) = self.order.pop_front()
        {
            // What runs is not forgotten: it goes to the end.
            if self.tasks.get(&id) == Some(&State::Begun) {
                self.order.push_back(id);
                if self.tasks.values().filter(|s| **s == State::Begun).count() > REMEMBERED {
                    return;
                }
            } else {
                self.tasks.remove(&id);
            }
        }
    }

    /// All that is known, as records.
    fn records(&mut self) -> Vec<u8> {
        let unacknowledged = self.unacknowledged();
        let surplus = unacknowledged.len().saturating_sub(MAX_UNACKNOWLEDGED);
        for id in unacknowledged.into_iter().take(surplus) {
            self.tasks.insert(id, State::Done);
        }
        let mut bytes = Vec::new();
        for id in &self.order {
            if let Some(state) = self.tasks.get(id) {
                write_record(&mut bytes, *id, state);
            }
        }
        bytes
    }
}

/// The one that writes.
struct Writer {
    path: PathBuf,
    file: File,
    /// Where the records end.
    file_bytes: u64,
    /// Where the file does.
    room_to: u64,
    /// A write failed: the file may lack records that are in memory.
    stale: bool,
    memory: Arc<Mutex<Memory>>,
}

impl Writer {
    fn open(path: &Path, memory: Arc<Mutex<Memory>>) -> io::Result<Self> {
        let file = File::options().create(true).append(true).open(path)?;
        let (file_bytes, room_to) = (0, 0);
        let mut writer =
            Self { path: path.to_owned(), file, file_bytes, room_to, stale: false, memory };
        writer.write_anew()?;
        Ok(writer)
    }

    async fn run(mut self, mut queue: mpsc::Receiver<Order>) {
        let mut batch = Vec::new();
        while queue.recv_many(&mut batch, QUEUE).await > 0 {
            let orders = std::mem::take(&mut batch);
            let writing = tokio::task::spawn_blocking(move || {
                self.carry_out(orders);
                self
            });
            // Lost only by a panic: then no command begins any more.
            let Ok(back) = writing.await else { return };
            self = back;
        }
    }

    /// Writes a batch, and tells those who wait what became of it.
    fn carry_out(&mut self, orders: Vec<Order>) {
        let anew = self.stale || self.file_bytes > MAX_FILE_BYTES;
        // Memory is ahead of the queue: what is written anew has these records already.
        let written = if anew { self.write_anew() } else { self.append(&orders) };
        let written = written.map_err(Arc::new);
        if let Err(error) = &written {
            tracing::error!(%error, "the journal of tasks cannot be written");
        }
        let (mut durable, mut flush) = (Vec::new(), false);
        for order in orders {
            match order.waiting {
                Waiting::Nobody => {}
                // Nobody waits any more: the daemon stops.
                Waiting::Written(told) => {
                    flush = true;
                    told.send(written.clone()).ok();
                }
                Waiting::Durable(told) => durable.push(told),
            }
        }
        let flushed = match written {
            Ok(()) if !anew && (flush || !durable.is_empty()) => {
                self.file.sync_data().map_err(Arc::new)
            }
            other => other,
        };
        self.stale |= flushed.is_err();
        for told in durable {
            told.send(flushed.clone()).ok();
        }
    }

    fn append(&mut self, orders: &[Order]) -> io::Result<()> {
        let mut bytes: Vec<u8> = orders.iter().flat_map(|order| &order.record).copied().collect();
        let end = self.file_bytes + bytes.len() as u64;
        if end > self.room_to {
            bytes.resize(bytes.len() + ROOM_BYTES, 0);
        }
        match self.file.write_all_at(&bytes, self.file_bytes) {
            Ok(()) => {
                self.room_to = self.room_to.max(self.file_bytes + bytes.len() as u64);
                self.file_bytes = end;
                Ok(())
            }
            Err(error) => {
                self.stale = true;
                // Half a record would hide all that follow it.
                self.file.set_len(self.file_bytes).ok();
                Err(error)
            }
        }
    }

    fn write_anew(&mut self) -> io::Result<()> {
        let bytes = self.memory.lock().unwrap_or_else(PoisonError::into_inner).records();
        durable::write_file(&self.path, &bytes, 0o600)?;
        self.file = File::options().write(true).open(&self.path)?;
        (self.file_bytes, self.room_to) = (bytes.len() as u64, bytes.len() as u64);
        self.stale = false;
        Ok(())
    }
}

fn record_of(id: TaskId, state: &State) -> Vec<u8> {
    let mut bytes = Vec::new();
    write_record(&mut bytes, id, state);
    bytes
}

fn write_record(bytes: &mut Vec<u8>, id: TaskId, state: &State) {
    let payload = match state {
        State::Ended(exit) => exit.encode_to_vec(),
        State::Begun | State::Done => Vec::new(),
    };
    let mut rest = vec![state.kind()];
    rest.extend_from_slice(id.as_bytes());
    rest.extend_from_slice(&payload);
    // Texts are bounded, so this is a few kilobytes.
    bytes.extend_from_slice(&u32::try_from(rest.len()).unwrap_or(u32::MAX).to_be_bytes());
    bytes.extend_from_slice(&blake3::hash(&rest).as_bytes()[..4]);
    bytes.extend_from_slice(&rest);
}

fn read_record(bytes: &[u8]) -> Option<(TaskId, State, &[u8])> {
    let (head, rest) = bytes.split_at_checked(HEAD_BYTES)?;
    let length = usize::try_from(u32::from_be_bytes(head[..4].try_into().ok()?)).ok()?;
    let (record, next) = rest.split_at_checked(length)?;
    if record.len() < FIXED_BYTES || blake3::hash(record).as_bytes()[..4] != head[4..] {
        return None;
    }
    let id = TaskId::from_slice(&record[1..FIXED_BYTES]).ok()?;
    let state = match record[0] {
        BEGUN => State::Begun,
        ENDED => State::Ended(TaskExit::decode(&record[FIXED_BYTES..]).ok()?),
        _ => State::Done,
    };
    Some((id, state, next))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exit(code: u32) -> TaskExit {
        TaskExit { exit_code: code, ..TaskExit::default() }
    }

    /// Where the records end.
    fn records_in(bytes: &[u8]) -> usize {
        let mut rest = bytes;
        while let Some((_, _, next)) = read_record(rest) {
            rest = next;
        }
        bytes.len() - rest.len()
    }

    #[tokio::test]
    async fn records_are_written_into_room_that_is_there_and_read_up_to_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tasks");
        let journal = Journal::open(&path).unwrap();
        let size = || std::fs::metadata(&path).unwrap().len();
        assert_eq!(size(), 0);
        let mut ids = Vec::new();
        let mut sizes = std::collections::BTreeSet::new();
        while sizes.len() < 2 {
            let id = TaskId::new();
            assert!(journal.begin(id).await.unwrap());
            journal.end(id, &exit(7)).await.unwrap();
            ids.push(id);
            sizes.insert(size());
        }
        let records = u64::try_from(ids.len()).unwrap();
        assert!(records > 300, "the file seldom grows: {sizes:?} for {records} commands");
        drop(journal);
        assert_eq!(Journal::open(&path).unwrap().unacknowledged(), ids);
    }

    #[tokio::test]
    async fn no_task_begins_twice_even_after_a_crash_that_tore_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tasks");
        let (first, second) = (TaskId::new(), TaskId::new());
        let journal = Journal::open(&path).unwrap();
        assert!(journal.begin(first).await.unwrap());
        assert!(!journal.begin(first).await.unwrap());
        drop(journal);
        let record = record_of(second, &State::Begun);
        for torn in 0..record.len() {
            let mut whole = std::fs::read(&path).unwrap();
            whole.truncate(records_in(&whole));
            std::fs::write(&path, [&whole, &record[..torn]].concat()).unwrap();
            let journal = Journal::open(&path).unwrap();
            assert!(!journal.begin(first).await.unwrap());
            assert!(!journal.lock().tasks.contains_key(&second), "{torn}");
        }
        let journal = Journal::open(&path).unwrap();
        assert!(journal.begin(second).await.unwrap());
        drop(journal);
        assert!(!Journal::open(&path).unwrap().begin(second).await.unwrap());
    }

    #[tokio::test]
    async fn an_end_is_kept_until_it_is_acknowledged_and_a_stop_is_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tasks");
        let [ended, acknowledged, running] = [TaskId::new(), TaskId::new(), TaskId::new()];
        let journal = Journal::open(&path).unwrap();
        for id in [ended, acknowledged, running] {
            journal.begin(id).await.unwrap();
        }
        journal.end(ended, &exit(3)).await.unwrap();
        journal.end(acknowledged, &exit(4)).await.unwrap();
        journal.acknowledged(acknowledged);
        journal.acknowledged(running);
        let last = TaskId::new();
        journal.begin(last).await.unwrap();
        drop(journal);
        for _ in 0..2 {
            let journal = Journal::open(&path).unwrap();
            assert_eq!(journal.unacknowledged(), [ended, running, last]);
            assert_eq!(journal.outcome(ended), Some(exit(3)));
            assert_eq!(journal.outcome(running).unwrap().verdict(), TaskVerdict::Failed);
            assert_eq!(journal.outcome(acknowledged), None);
        }
    }

    #[tokio::test]
    async fn journal_is_bounded_and_forgets_the_oldest_but_nothing_that_runs() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tasks");
        let ids: Vec<TaskId> = (0..2 * REMEMBERED).map(|_| TaskId::new()).collect();
        let mut bytes = Vec::new();
        for id in &ids {
            write_record(&mut bytes, *id, &State::Ended(exit(1)));
        }
        std::fs::write(&path, bytes).unwrap();
        let journal = Journal::open(&path).unwrap();
        assert_eq!(journal.unacknowledged().len(), MAX_UNACKNOWLEDGED);
        journal.lock().tasks.insert(ids[0], State::Begun);
        assert!(journal.begin(TaskId::new()).await.unwrap());
        assert_eq!(journal.lock().order.len(), REMEMBERED + 1);
        assert!(!journal.begin(ids[0]).await.unwrap(), "it runs");
        assert!(!journal.begin(ids[2 * REMEMBERED - 1]).await.unwrap());
        assert!(journal.begin(ids[1]).await.unwrap());
    }

    #[tokio::test]
    async fn a_record_that_could_not_be_written_hides_none_that_follow() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tasks");
        let [first, failed, ended, last] = [(); 4].map(|()| TaskId::new());
        let memory = Arc::new(Mutex::new(Memory::default()));
        let mut writer = Writer::open(&path, Arc::clone(&memory)).unwrap();
        let remember = |id, state| {
            let mut memory = memory.lock().unwrap();
            if memory.tasks.insert(id, state).is_none() {
                memory.order.push_back(id);
            }
        };
        let order = |id, state: State| {
            let (told, answer) = oneshot::channel();
            (Order { record: record_of(id, &state), waiting: Waiting::Durable(told) }, answer)
        };
        remember(first, State::Begun);
        let (begin, mut told) = order(first, State::Begun);
        writer.carry_out(vec![begin]);
        assert!(told.try_recv().unwrap().is_ok());
        // A disk that takes half a record and then no more.
        let whole = writer.file_bytes;
        std::fs::write(&path, [std::fs::read(&path).unwrap(), vec![0, 0, 0, 9]].concat()).unwrap();
        writer.file = File::open(&path).unwrap();
        remember(ended, State::Ended(exit(5)));
        let (begin, mut told) = order(failed, State::Begun);
        writer.carry_out(vec![begin]);
        assert!(told.try_recv().unwrap().is_err());
        assert_eq!(writer.file_bytes, whole);
        // It takes records again.
        remember(last, State::Begun);
        let (begin, mut told) = order(last, State::Begun);
        writer.carry_out(vec![begin]);
        assert!(told.try_recv().unwrap().is_ok());
        let journal = Journal::open(&path).unwrap();
        assert_eq!(journal.outcome(ended), Some(exit(5)), "an end that had not been written, too");
        for id in [first, last] {
            assert!(!journal.begin(id).await.unwrap());
        }
        assert!(journal.begin(failed).await.unwrap());
    }

    #[tokio::test]
    async fn an_older_record_behind_a_newer_one_changes_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tasks");
        let id = TaskId::new();
        let records = [State::Ended(exit(5)), State::Begun].map(|state| record_of(id, &state));
        std::fs::write(&path, records.concat()).unwrap();
        assert_eq!(Journal::open(&path).unwrap().outcome(id), Some(exit(5)));
    }
}
