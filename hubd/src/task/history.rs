//! The history of each node: what its commands wrote last, across restarts of everything.
//!
//! The relay hands pieces over and never waits: they rest in a bounded queue for each node, from which a
//! task writes them to the store in batches, some times a second. A node that writes faster than that
//! loses the older part of what waits, and the gap is recorded. A crash of the hub loses what waits.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use cortex_shared::clock::unix_ms;
use cortex_shared::ids::{NodeId, TaskId};
use cortex_shared::replay::Piece;
use cortex_shared::tasks::TaskScope;
use tokio::sync::{Notify, watch};

use crate::store::history::{HistoryLimits, HistoryStore, Segment};

/// Bytes of one node that may wait.
const WAITING_BYTES: usize = 256 * 1024;
/// Pieces of one node that may wait.
const WAITING_PIECES: usize = 4096;
/// Bytes of all nodes together that may wait.
const ALL_WAITING_BYTES: usize = 32 * 1024 * 1024;
/// Segments do not grow beyond this.
const SEGMENT_BYTES: usize = 32 * 1024;
/// Between two batches.
const INTERVAL: Duration = Duration::from_millis(200);

#[derive(Default)]
struct Waiting {
    pieces: VecDeque<(TaskId, Piece)>,
    bytes: usize,
    skipped: u64,
}

#[derive(Default)]
struct AllWaiting {
    nodes: HashMap<NodeId, Waiting>,
    bytes: usize,
}

/// See the module.
pub struct History {
    waiting: Mutex<AllWaiting>,
    due: Notify,
    /// One batch at a time, so that they stay in order.
    writing: tokio::sync::Mutex<()>,
    written: watch::Sender<u64>,
    store: HistoryStore,
    limits: HistoryLimits,
}

impl History {
    /// A history in this store, written by a task of `scope`.
    #[must_use]
    pub fn start(store: HistoryStore, limits: HistoryLimits, scope: &TaskScope) -> Arc<Self> {
        let history = Arc::new(Self {
            waiting: Mutex::default(),
            due: Notify::new(),
            writing: tokio::sync::Mutex::default(),
            written: watch::Sender::new(0),
            store,
            limits,
        });
        let (writing, stop) = (Arc::clone(&history), scope.token().clone());
        scope.spawn("history", async move {
            while stop.run_until_cancelled(writing.due.notified()).await.is_some() {
                writing.flush().await;
                stop.run_until_cancelled(tokio::time::sleep(INTERVAL)).await;
            }
            writing.flush().await;
        });
        history
    }

    fn lock(&self) -> MutexGuard<'_, AllWaiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a piece of a node's output.
    pub fn append(&self, node: NodeId, task: TaskId, piece: Piece) {
        let mut lock = self.lock();
        let all = &mut *lock;
        let waiting = all.nodes.entry(node).or_default();
        waiting.bytes += piece.data.len();
        all.bytes += piece.data.len();
        waiting.pieces.push_back((task, piece));
        while waiting.bytes > WAITING_BYTES
            || waiting.pieces.len() > WAITING_PIECES
            || all.bytes > ALL_WAITING_BYTES
        {
            let Some((_, oldest)) = waiting.pieces.pop_front() else { break };
            waiting.bytes -= oldest.data.len();
            all.bytes -= oldest.data.len();
            waiting.skipped += oldest.data.len() as u64;
        }
        drop(lock);
        self.due.notify_one();
    }

    /// Writes what waits.
    pub async fn flush(&self) {
        let _one = self.writing.lock().await;
        let waiting = std::mem::take(&mut *self.lock()).nodes;
        if waiting.is_empty() {
            return;
        }
        let at_ms = unix_ms();
        let batch = waiting.into_iter().map(|(node, waiting)| (node, segments(waiting, at_ms)));
        if let Err(error) = self.store.append(batch.collect(), self.limits).await {
            tracing::warn!(%error, "output was not added to the history");
        }
        self.written.send_modify(|n| *n += 1);
    }

    /// Changes after each batch.
    #[must_use]
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.written.subscribe()
    }

    /// What is kept.
    #[must_use]
    pub fn store(&self) -> &HistoryStore {
        &self.store
    }
}

/// Joins what follows each other in one stream of one task.
fn segments(waiting: Waiting, at_ms: i64) -> Vec<Segment> {
    let mut segments: Vec<Segment> = Vec::new();
    let mut skipped = waiting.skipped;
    for (task, piece) in waiting.pieces {
        let stream = u8::from(piece.stream == 1);
        match segments.last_mut() {
            Some(last)
                if last.task == task
                    && last.stream == stream
                    && last.data.len() + piece.data.len() <= SEGMENT_BYTES =>
            {
                last.data.extend_from_slice(&piece.data);
            }
            _ => segments.push(Segment {
                at_ms,
                task,
                stream,
                skipped: std::mem::take(&mut skipped),
                data: piece.data.to_vec(),
            }),
        }
    }
    segments
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_flood_costs_a_bounded_batch_and_its_gap_is_recorded() {
        let folder = tempfile::tempdir().unwrap();
        let scope = TaskScope::new();
        let store = HistoryStore::open(folder.path().join("history.db"), &scope).await.unwrap();
        let history = History::start(store, HistoryLimits::default(), &scope);
        let (node, task) = (NodeId::new(), TaskId::new());
        let writing = history.writing.lock().await;
        for n in 0..100_u64 {
            let data = vec![b'x'; 10_000].into();
            history.append(node, task, Piece { stream: 0, offset: n * 10_000, data });
        }
        drop(writing);
        history.flush().await;
        let kept = history.store().after(node, 0, 1000).await.unwrap();
        let bytes: usize = kept.iter().map(|(_, segment)| segment.data.len()).sum();
        assert!(bytes <= WAITING_BYTES && bytes > WAITING_BYTES / 2, "{bytes}");
        assert_eq!(kept[0].1.skipped, 1_000_000 - bytes as u64);
        scope.cancel();
    }
}
