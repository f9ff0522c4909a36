//! The table of tasks that run, and the moment at which none does.
//!
//! An agent that is to be restarted without ending a command closes the table when it is empty: what would
//! begin after that is refused, and not ended a moment later.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use cortex_shared::ids::TaskId;
use tokio::sync::Notify;

/// Tasks that run at the same time.
const MAX_RUNNING: usize = 256;
/// How often what is no task is asked whether it is over, while the table is to be closed.
const LOOK: Duration = Duration::from_secs(1);

/// See the module. `H` is what is known of a task.
pub(super) struct RunningTasks<H> {
    table: Mutex<Table<H>>,
    ended: Notify,
}

struct Table<H> {
    tasks: HashMap<TaskId, H>,
    closed: bool,
}

/// Why a task does not begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NotBegun {
    /// It is in the table.
    Here,
    /// The table is full.
    Full,
    /// The agent is about to restart.
    Closed,
}

impl<H> RunningTasks<H> {
    pub(super) fn new() -> Self {
        let table = Table { tasks: HashMap::new(), closed: false };
        Self { table: Mutex::new(table), ended: Notify::new() }
    }

    fn lock(&self) -> MutexGuard<'_, Table<H>> {
        // Every critical section leaves the data whole, so a panic elsewhere does not spoil it.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.lock().tasks.len()
    }

    /// Which there are.
    pub(super) fn ids<C: FromIterator<TaskId>>(&self) -> C {
        self.lock().tasks.keys().copied().collect()
    }

    /// Puts a task into the table.
    pub(super) fn begin(&self, id: TaskId, handle: H) -> Result<(), NotBegun> {
        let mut table = self.lock();
        if table.tasks.contains_key(&id) {
            return Err(NotBegun::Here);
        }
        if table.closed {
            return Err(NotBegun::Closed);
        }
        if table.tasks.len() >= MAX_RUNNING {
            return Err(NotBegun::Full);
        }
        table.tasks.insert(id, handle);
        Ok(())
    }

    /// Takes a task out of it.
    pub(super) fn end(&self, id: TaskId) {
        self.lock().tasks.remove(&id);
        self.ended.notify_waiters();
    }

    /// Does something with a task, if it is there.
    pub(super) fn with(&self, id: TaskId, act: impl FnOnce(&H)) {
        if let Some(handle) = self.lock().tasks.get(&id) {
            act(handle);
        }
    }

    /// Does something with every task.
    pub(super) fn each(&self, act: impl FnMut(&H)) {
        self.lock().tasks.values().for_each(act);
    }

    /// Waits until there is no task, and nothing of what `also` tells; closes the table at that moment. Safe
    /// to give up: the table is then open.
    pub(super) async fn close_when_empty(&self, also: impl Fn() -> bool) {
        loop {
            let ended = self.ended.notified();
            {
                let mut table = self.lock();
                if table.tasks.is_empty() && also() {
                    table.closed = true;
                    return;
                }
            }
            // The task that ends after the look above is noticed: the future was there before it.
            tokio::time::timeout(LOOK, ended).await.ok();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    fn id(number: u8) -> TaskId {
        TaskId::from_slice(&[number; 16]).unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn the_table_closes_when_the_last_task_and_whatever_else_is_over() {
        let running = Arc::new(RunningTasks::new());
        running.begin(id(1), ()).unwrap();
        assert_eq!(running.begin(id(1), ()), Err(NotBegun::Here));
        let busy = Arc::new(AtomicBool::new(true));
        let (table, other) = (Arc::clone(&running), Arc::clone(&busy));
        let also = move || !other.load(Ordering::Relaxed);
        let closing = tokio::spawn(async move { table.close_when_empty(also).await });
        tokio::task::yield_now().await;
        running.begin(id(2), ()).unwrap();
        running.end(id(1));
        tokio::task::yield_now().await;
        assert!(!closing.is_finished(), "one runs that began meanwhile");
        running.end(id(2));
        tokio::task::yield_now().await;
        assert!(!closing.is_finished(), "something else is under way");
        busy.store(false, Ordering::Relaxed);
        closing.await.unwrap();
        assert_eq!(running.begin(id(3), ()), Err(NotBegun::Closed));
        assert_eq!(running.len(), 0);
    }

    #[test]
    fn the_table_has_an_end() {
        let running = RunningTasks::new();
        for number in 0..MAX_RUNNING {
            let mut bytes = [0; 16];
            bytes[..8].copy_from_slice(&number.to_le_bytes());
            running.begin(TaskId::from_slice(&bytes).unwrap(), ()).unwrap();
        }
        assert_eq!(running.begin(id(255), ()), Err(NotBegun::Full));
        running.end(id(0));
        assert_eq!(running.begin(id(255), ()), Ok(()));
    }
}
