//! What waits for the writer of the spool: a queue for each task, served in turn.
//!
//! Bounded in bytes, for each task by what the others leave. Nobody waits to put something in.

use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};

use cortex_shared::ids::TaskId;
use cortex_shared::replay::Piece;
use tokio::sync::{Notify, oneshot};

use super::Done;

/// Bytes of all tasks together that may wait, as far as nobody has less than its least share.
const BACKLOG_BYTES: u64 = 32 * 1024 * 1024;
/// What each task may have waiting, whatever the others have.
const LEAST_SHARE_BYTES: u64 = 256 * 1024;
/// Beyond this nothing more waits.
const MOST_BYTES: u64 = 2 * BACKLOG_BYTES;
/// Pieces of one task that may wait.
const PIECES: usize = 4096;
/// What is taken of one task before it is the next one's turn.
const TURN_BYTES: u64 = 256 * 1024;
/// Orders that are carried out at once.
const BATCH: usize = 256;

/// Something to be done for a task.
pub(super) enum Order {
    Append(Piece, Option<Done>),
    End,
    Flush(oneshot::Sender<()>),
}

#[derive(Default)]
struct OfTask {
    orders: VecDeque<Order>,
    bytes: u64,
}

#[derive(Default)]
struct State {
    tasks: HashMap<TaskId, OfTask>,
    /// Those that have orders, in turn.
    turns: VecDeque<TaskId>,
    bytes: u64,
    closed: bool,
}

impl State {
    /// Whether a piece of so many bytes finds room.
    fn has_room(&self, task: TaskId, bytes: u64) -> bool {
        let (own, pieces) = self.tasks.get(&task).map_or((0, 0), |t| (t.bytes, t.orders.len()));
        // Half of what is left, so that whoever comes next finds something, too.
        let share = (BACKLOG_BYTES.saturating_sub(self.bytes) / 2).max(LEAST_SHARE_BYTES);
        !self.closed && own + bytes <= share && self.bytes + bytes <= MOST_BYTES && pieces < PIECES
    }

    fn push(&mut self, task: TaskId, order: Order) {
        let of_task = self.tasks.entry(task).or_default();
        if of_task.orders.is_empty() {
            self.turns.push_back(task);
        }
        if let Order::Append(piece, _) = &order {
            of_task.bytes += piece.data.len() as u64;
            self.bytes += piece.data.len() as u64;
        }
        of_task.orders.push_back(order);
    }

    fn batch(&mut self) -> Vec<(TaskId, Order)> {
        let mut batch = Vec::new();
        let mut turns = self.turns.len();
        while batch.len() < BATCH
            && turns > 0
            && let Some(task) = self.turns.pop_front()
        {
            turns -= 1;
            let Some(of_task) = self.tasks.get_mut(&task) else { continue };
            let mut taken = 0;
            while taken < TURN_BYTES
                && batch.len() < BATCH
                && let Some(order) = of_task.orders.pop_front()
            {
                if let Order::Append(piece, _) = &order {
                    let bytes = piece.data.len() as u64;
                    taken += bytes;
                    of_task.bytes -= bytes;
                    self.bytes -= bytes;
                }
                batch.push((task, order));
            }
            if of_task.orders.is_empty() {
                self.tasks.remove(&task);
            } else {
                self.turns.push_back(task);
            }
        }
        batch
    }
}

/// See the module.
#[derive(Default)]
pub(super) struct Queue {
    state: Mutex<State>,
    ready: Notify,
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Queues a piece; what is to be called once it was dealt with comes back if there is no room.
    pub(super) fn append(
        &self,
        task: TaskId,
        piece: Piece,
        done: Option<Done>,
    ) -> Result<(), Option<Done>> {
        let mut state = self.lock();
        if !state.has_room(task, piece.data.len() as u64) {
            return Err(done);
        }
        state.push(task, Order::Append(piece, done));
        drop(state);
        self.ready.notify_one();
        Ok(())
    }

    /// The task writes no more.
    pub(super) fn end(&self, task: TaskId) {
        self.order(task, Order::End);
    }

    /// Waits until what was queued for this task before has been dealt with.
    pub(super) async fn flush(&self, task: TaskId) {
        let (written, waiting) = oneshot::channel();
        self.order(task, Order::Flush(written));
        // A hub that stops does not answer, and nobody waits for it.
        waiting.await.ok();
    }

    fn order(&self, task: TaskId, order: Order) {
        let mut state = self.lock();
        if !state.closed {
            state.push(task, order);
        }
        drop(state);
        self.ready.notify_one();
    }

    /// Takes nothing more.
    pub(super) fn close(&self) {
        self.lock().closed = true;
        self.ready.notify_one();
    }

    pub(super) fn is_closed(&self) -> bool {
        self.lock().closed
    }

    /// What is to be done next; none once it is closed and empty.
    pub(super) async fn next_batch(&self) -> Option<Vec<(TaskId, Order)>> {
        loop {
            {
                let mut state = self.lock();
                let batch = state.batch();
                if !batch.is_empty() {
                    return Some(batch);
                }
                if state.closed {
                    return None;
                }
            }
            self.ready.notified().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn piece(offset: u64, bytes: usize) -> Piece {
        Piece { stream: 0, offset, data: vec![0; bytes].into() }
    }

    #[tokio::test]
    async fn one_that_floods_delays_the_others_by_a_turn_and_leaves_them_room() {
        let queue = Queue::default();
        let (flood, quiet) = (TaskId::new(), TaskId::new());
        let mut offset = 0;
        while queue.append(flood, piece(offset, 100_000), None).is_ok() {
            offset += 100_000;
        }
        assert!(offset > BACKLOG_BYTES / 3 && offset < BACKLOG_BYTES, "{offset}");
        assert!(queue.append(quiet, piece(0, 100_000), None).is_ok());
        queue.end(quiet);
        let batch = queue.next_batch().await.unwrap();
        let of_quiet = batch.iter().position(|(task, _)| *task == quiet).unwrap();
        let before: u64 = batch[..of_quiet]
            .iter()
            .map(|(_, order)| match order {
                Order::Append(piece, _) => piece.data.len() as u64,
                Order::End | Order::Flush(_) => 0,
            })
            .sum();
        assert!(before <= TURN_BYTES + 100_000, "{before}");
        assert!(matches!(batch[of_quiet + 1].1, Order::End), "in order for each task");
    }

    #[tokio::test]
    async fn what_was_queued_is_still_dealt_with_after_it_was_closed_and_nothing_else() {
        let queue = Queue::default();
        let task = TaskId::new();
        queue.append(task, piece(0, 10), None).ok();
        queue.close();
        assert!(queue.append(task, piece(10, 10), None).is_err());
        queue.flush(task).await;
        assert_eq!(queue.next_batch().await.unwrap().len(), 1);
        assert!(queue.next_batch().await.is_none());
        let state = queue.lock();
        assert!(state.bytes == 0 && state.tasks.is_empty());
    }
}
