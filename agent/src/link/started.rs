//! Which tasks this node has begun, so that none runs twice.
//!
//! Owned by the session's dispatcher. An id is on disk before its command starts; after a crash or
//! power loss a repeated order for the same id is therefore refused. The file is a plain run of
//! 16-byte ids in the order of starting, of which the oldest are dropped in halves.

use std::collections::{HashSet, VecDeque};
use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};

use cortex_shared::durable;
use cortex_shared::ids::TaskId;

/// Ids that are remembered at least: the hub orders a task once, within seconds of making its id.
const REMEMBERED: usize = 16_384;
const ID_BYTES: usize = 16;

/// The ids of started tasks.
#[derive(Debug)]
pub(super) struct StartedTasks {
    path: PathBuf,
    file: File,
    order: VecDeque<TaskId>,
    known: HashSet<TaskId>,
}

impl StartedTasks {
    /// Opens the record, or begins one.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let mut bytes = Vec::new();
        match File::open(path) {
            Ok(file) => {
                let limit = u64::try_from(2 * REMEMBERED * ID_BYTES).unwrap_or(u64::MAX);
                file.take(limit).read_to_end(&mut bytes)?;
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        // A torn last id belongs to a command that did not start: the write comes first.
        let order: VecDeque<TaskId> =
            bytes.chunks_exact(ID_BYTES).filter_map(|id| TaskId::from_slice(id).ok()).collect();
        let known = order.iter().copied().collect();
        let file = Self::write_all(path, &order)?;
        Ok(Self { path: path.to_owned(), file, order, known })
    }

    /// Records that a task starts, durably. `false` if it was recorded before: it must not run.
    pub(super) fn begin(&mut self, id: TaskId) -> io::Result<bool> {
        if self.known.contains(&id) {
            return Ok(false);
        }
        if self.order.len() >= 2 * REMEMBERED {
            for old in self.order.drain(..REMEMBERED) {
                self.known.remove(&old);
            }
            self.file = Self::write_all(&self.path, &self.order)?;
        }
        self.file.write_all(id.as_bytes())?;
        self.file.sync_data()?;
        self.order.push_back(id);
        self.known.insert(id);
        Ok(true)
    }

    fn write_all(path: &Path, ids: &VecDeque<TaskId>) -> io::Result<File> {
        let bytes: Vec<u8> = ids.iter().flat_map(|id| *id.as_bytes()).collect();
        durable::write_file(path, &bytes, 0o600)?;
        File::options().append(true).open(path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_task_begins_twice_even_after_a_restart() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("started");
        let (first, second) = (TaskId::new(), TaskId::new());
        let mut started = StartedTasks::open(&path).unwrap();
        assert!(started.begin(first).unwrap());
        assert!(!started.begin(first).unwrap());
        drop(started);
        // A crash in the middle of a write leaves a torn id.
        let mut torn = File::options().append(true).open(&path).unwrap();
        torn.write_all(&second.as_bytes()[..7]).unwrap();
        let mut started = StartedTasks::open(&path).unwrap();
        assert!(!started.begin(first).unwrap());
        assert!(started.begin(second).unwrap());
        drop(started);
        assert!(!StartedTasks::open(&path).unwrap().begin(second).unwrap());
    }

    #[test]
    fn record_is_bounded_and_forgets_the_oldest() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("started");
        let ids: Vec<TaskId> = (0..2 * REMEMBERED).map(|_| TaskId::new()).collect();
        let bytes: Vec<u8> = ids.iter().flat_map(|id| *id.as_bytes()).collect();
        std::fs::write(&path, bytes).unwrap();
        let mut started = StartedTasks::open(&path).unwrap();
        assert!(started.begin(TaskId::new()).unwrap());
        assert_eq!(started.order.len(), REMEMBERED + 1);
        assert!(!started.begin(ids[REMEMBERED]).unwrap());
        assert!(started.begin(ids[0]).unwrap());
    }
}
