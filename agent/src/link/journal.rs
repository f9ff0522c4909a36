//! The node's own journal of tasks: none runs twice, and how one ended is kept until the hub has it.
//!
//! Owned by the dispatcher. An id is on disk before its command starts; after a crash or power loss a
//! repeated order for the same id is therefore refused. An end is handed to the system before it is
//! sent, and on disk soon after; it is forgotten once the hub has acknowledged it. What had begun and
//! not ended when the process stopped has ended with it, and is reported so. Acknowledgements are not
//! synced: losing one costs a repeated report.
//!
//! The file is a run of records, each with its length and a check, written anew when it has grown.

use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};

use cortex_proto::v1::{TaskExit, TaskVerdict};
use cortex_shared::durable;
use cortex_shared::ids::TaskId;
use prost::Message as _;

/// Ids that are remembered at least: the hub orders a task once, within seconds of making its id.
const REMEMBERED: usize = 16_384;
/// Ends that wait for a hub at most; beyond that the oldest are forgotten.
const MAX_UNACKNOWLEDGED: usize = 4096;
/// From this size on the file is written anew.
const MAX_FILE_BYTES: u64 = 8 * 1024 * 1024;
/// Length of the rest (4 bytes) and check of it (4).
const HEAD_BYTES: usize = 8;
/// Kind (1) and id (16).
const FIXED_BYTES: usize = 17;
/// Longest reason or hint that is kept.
const MAX_TEXT_BYTES: usize = 1024;

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

/// See the module.
#[derive(Debug)]
pub(super) struct Journal {
    path: PathBuf,
    file: File,
    file_bytes: u64,
    order: VecDeque<TaskId>,
    tasks: HashMap<TaskId, State>,
}

impl Journal {
    /// Opens the journal, or begins one.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let mut bytes = Vec::new();
        match File::open(path) {
            Ok(file) => {
                file.take(2 * MAX_FILE_BYTES).read_to_end(&mut bytes)?;
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        let (mut order, mut tasks) = (VecDeque::new(), HashMap::new());
        let mut rest = bytes.as_slice();
        // A torn last record belongs to a command that did not start, or whose end is not known.
        while let Some((id, state, next)) = read_record(rest) {
            if tasks.insert(id, state).is_none() {
                order.push_back(id);
            }
            rest = next;
        }
        for state in tasks.values_mut().filter(|state| **state == State::Begun) {
            *state = State::Ended(TaskExit {
                verdict: TaskVerdict::Failed.into(),
                reason: "the agent stopped while the command ran, and the command with it".into(),
                ..TaskExit::default()
            });
        }
        let file = File::options().create(true).append(true).open(path)?;
        let mut journal = Self { path: path.to_owned(), file, file_bytes: 0, order, tasks };
        journal.write_anew()?;
        Ok(journal)
    }

    /// Records that a task starts, durably. `false` if it was recorded before: it must not run.
    pub(super) fn begin(&mut self, id: TaskId) -> io::Result<bool> {
        if self.tasks.contains_key(&id) {
            return Ok(false);
        }
        if self.order.len() >= 2 * REMEMBERED || self.file_bytes > MAX_FILE_BYTES {
            self.forget_oldest();
            self.write_anew()?;
        }
        self.append(id, &State::Begun)?;
        self.file.sync_data()?;
        self.order.push_back(id);
        self.tasks.insert(id, State::Begun);
        Ok(true)
    }

    /// Records how a task ended. Returns what makes it survive a loss of power, too.
    pub(super) fn end(&mut self, id: TaskId, exit: &TaskExit) -> io::Result<File> {
        let mut exit = exit.clone();
        cortex_shared::text::shorten(&mut exit.reason, MAX_TEXT_BYTES);
        cortex_shared::text::shorten(&mut exit.hint, MAX_TEXT_BYTES);
        let state = State::Ended(exit);
        // Also where the disk refuses it: as long as this process lives, it is known.
        let appended = self.append(id, &state);
        self.tasks.insert(id, state);
        appended?;
        self.file.try_clone()
    }

    /// The hub has a task's end.
    pub(super) fn acknowledged(&mut self, id: TaskId) {
        if let Some(state @ State::Ended(_)) = self.tasks.get_mut(&id) {
            *state = State::Done;
            if let Err(error) = self.append(id, &State::Done) {
                tracing::warn!(%error, "an acknowledgement was not written down");
            }
        }
    }

    /// How a task ended, as long as the hub has not acknowledged it.
    pub(super) fn outcome(&self, id: TaskId) -> Option<TaskExit> {
        match self.tasks.get(&id)? {
            State::Ended(exit) => Some(exit.clone()),
            State::Begun | State::Done => None,
        }
    }

    /// The tasks whose end the hub has not acknowledged, oldest first.
    pub(super) fn unacknowledged(&self) -> Vec<TaskId> {
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

    fn write_anew(&mut self) -> io::Result<()> {
        let surplus = self.unacknowledged().len().saturating_sub(MAX_UNACKNOWLEDGED);
        for id in self.unacknowledged().into_iter().take(surplus) {
            self.tasks.insert(id, State::Done);
        }
        let mut bytes = Vec::new();
        for id in &self.order {
            if let Some(state) = self.tasks.get(id) {
                write_record(&mut bytes, *id, state);
            }
        }
        durable::write_file(&self.path, &bytes, 0o600)?;
        self.file = File::options().append(true).open(&self.path)?;
        self.file_bytes = bytes.len() as u64;
        Ok(())
    }

    fn append(&mut self, id: TaskId, state: &State) -> io::Result<()> {
        let mut bytes = Vec::new();
        write_record(&mut bytes, id, state);
        self.file.write_all(&bytes)?;
        self.file_bytes += bytes.len() as u64;
        Ok(())
    }
}

fn write_record(bytes: &mut Vec<u8>, id: TaskId, state: &State) {
    let (kind, payload) = match state {
        State::Begun => (BEGUN, Vec::new()),
        State::Ended(exit) => (ENDED, exit.encode_to_vec()),
        State::Done => (DONE, Vec::new()),
    };
    let mut rest = vec![kind];
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

    #[test]
    fn no_task_begins_twice_even_after_a_crash_that_tore_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tasks");
        let (first, second) = (TaskId::new(), TaskId::new());
        let mut journal = Journal::open(&path).unwrap();
        assert!(journal.begin(first).unwrap());
        assert!(!journal.begin(first).unwrap());
        drop(journal);
        let mut record = Vec::new();
        write_record(&mut record, second, &State::Begun);
        for torn in 0..record.len() {
            let whole = std::fs::read(&path).unwrap();
            std::fs::write(&path, [&whole, &record[..torn]].concat()).unwrap();
            let mut journal = Journal::open(&path).unwrap();
            assert!(!journal.begin(first).unwrap());
            assert!(!journal.tasks.contains_key(&second), "{torn}");
        }
        let mut journal = Journal::open(&path).unwrap();
        assert!(journal.begin(second).unwrap());
        drop(journal);
        assert!(!Journal::open(&path).unwrap().begin(second).unwrap());
    }

    #[test]
    fn an_end_is_kept_until_it_is_acknowledged_and_a_stop_is_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tasks");
        let [ended, acknowledged, running] = [TaskId::new(), TaskId::new(), TaskId::new()];
        let mut journal = Journal::open(&path).unwrap();
        for id in [ended, acknowledged, running] {
            journal.begin(id).unwrap();
        }
        journal.end(ended, &exit(3)).unwrap();
        journal.end(acknowledged, &exit(4)).unwrap();
        journal.acknowledged(acknowledged);
        journal.acknowledged(running);
        drop(journal);
        for _ in 0..2 {
            let journal = Journal::open(&path).unwrap();
            assert_eq!(journal.unacknowledged(), [ended, running]);
            assert_eq!(journal.outcome(ended), Some(exit(3)));
            assert_eq!(journal.outcome(running).unwrap().verdict(), TaskVerdict::Failed);
            assert_eq!(journal.outcome(acknowledged), None);
        }
    }

    #[test]
    fn journal_is_bounded_and_forgets_the_oldest_but_nothing_that_runs() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tasks");
        let ids: Vec<TaskId> = (0..2 * REMEMBERED).map(|_| TaskId::new()).collect();
        let mut bytes = Vec::new();
        for id in &ids {
            write_record(&mut bytes, *id, &State::Ended(exit(1)));
        }
        std::fs::write(&path, bytes).unwrap();
        let mut journal = Journal::open(&path).unwrap();
        assert_eq!(journal.unacknowledged().len(), MAX_UNACKNOWLEDGED);
        journal.tasks.insert(ids[0], State::Begun);
        assert!(journal.begin(TaskId::new()).unwrap());
        assert_eq!(journal.order.len(), REMEMBERED + 1);
        assert!(!journal.begin(ids[0]).unwrap(), "it runs");
        assert!(!journal.begin(ids[2 * REMEMBERED - 1]).unwrap());
        assert!(journal.begin(ids[1]).unwrap());
    }
}
