//! Operations on files of nodes, each between its caller and its node.
//!
//! A call waits here until its node has opened a stream for it, and lives until the caller, the node or
//! its session is gone. Nothing of it is stored; a restart of the hub ends it. What is under way is
//! bounded by the window that both sides keep to, and checked where it passes: a caller or a node that
//! sends more ends its own operation.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cortex_proto::FILE_WINDOW_BYTES;
use cortex_proto::v1::{file_io_down, file_io_up};
use cortex_shared::ids::{NodeId, RequestId};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::task::limits::{Slot, Slots};

/// Operations that one caller may have under way. Each holds a window's worth of bytes at most.
pub const CALLS_OF_ONE: usize = 8;
/// Operations of all callers.
const CALLS: usize = 256;
/// Frames of a node that may wait for its caller: far more than a window of honest ones.
const FRAMES_TO_CALLER: usize = 256;
/// Frames of a caller that may wait for the node; only one that sends very small ones ever waits.
const FRAMES_TO_NODE: usize = 1024;

/// Bytes under way in one direction.
#[derive(Debug, Default)]
pub struct Window(AtomicU64);

impl Window {
    /// Takes room for bytes that have arrived; `false` if there is none.
    #[must_use]
    pub fn take(&self, bytes: u64) -> bool {
        self.0.fetch_add(bytes, Ordering::Relaxed).saturating_add(bytes) <= FILE_WINDOW_BYTES
    }

    /// Gives room back.
    pub fn give(&self, bytes: u64) {
        let less = |under_way: u64| Some(under_way.saturating_sub(bytes));
        // It never fails: there is always a next value.
        self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less).ok();
    }
}

/// What both ends of an operation share.
#[derive(Debug, Default)]
pub struct Flow {
    /// From the node.
    pub down: Window,
    /// From the caller.
    pub up: Window,
}

/// The node's end of an operation.
#[derive(Debug)]
pub struct NodeEnd {
    /// Frames for the caller.
    pub to_caller: mpsc::Sender<file_io_up::Frame>,
    /// Frames of the caller.
    pub from_caller: mpsc::Receiver<file_io_down::Frame>,
    /// What is under way.
    pub flow: Arc<Flow>,
    /// Cancelled when the operation is over.
    pub over: CancellationToken,
}

/// The caller's end of an operation, which is over when this is dropped.
pub struct Call {
    /// Its number.
    pub id: RequestId,
    /// Frames of the node; ends when the node's stream does.
    pub from_node: mpsc::Receiver<file_io_up::Frame>,
    /// Frames for the node.
    pub to_node: mpsc::Sender<file_io_down::Frame>,
    /// What is under way.
    pub flow: Arc<Flow>,
    over: CancellationToken,
    exchange: Arc<FileExchange>,
    _slot: Slot,
}

impl Call {
    /// Cancelled when the operation is over.
    #[must_use]
    pub fn over(&self) -> CancellationToken {
        self.over.clone()
    }

    /// Whether the node has not opened its stream yet.
    #[must_use]
    pub fn waits(&self) -> bool {
        self.exchange.lock().contains_key(&self.id)
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        self.over.cancel();
        self.exchange.lock().remove(&self.id);
    }
}

/// There are too many operations already.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TooManyCalls {
    /// Of this caller.
    #[error("you have {CALLS_OF_ONE} operations on files under way already")]
    Yours,
    /// Of all.
    #[error("the hub has {CALLS} operations on files under way already")]
    All,
}

/// See the module.
#[derive(Default)]
pub struct FileExchange {
    waiting: Mutex<HashMap<RequestId, (NodeId, NodeEnd)>>,
    slots: Arc<Slots>,
}

impl FileExchange {
    fn lock(&self) -> MutexGuard<'_, HashMap<RequestId, (NodeId, NodeEnd)>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins an operation of `actor` on a node.
    ///
    /// # Errors
    /// See [`TooManyCalls`].
    pub fn begin(self: &Arc<Self>, node: NodeId, actor: &str) -> Result<Call, TooManyCalls> {
        let slot = self.slots.take(actor, CALLS_OF_ONE).ok_or(TooManyCalls::Yours)?;
        if self.slots.total() > CALLS {
            return Err(TooManyCalls::All);
        }
        let (to_caller, from_node) = mpsc::channel(FRAMES_TO_CALLER);
        let (to_node, from_caller) = mpsc::channel(FRAMES_TO_NODE);
        let (flow, over, id) =
            (Arc::new(Flow::default()), CancellationToken::new(), RequestId::new());
        let end = NodeEnd { to_caller, from_caller, flow: Arc::clone(&flow), over: over.clone() };
        self.lock().insert(id, (node, end));
        Ok(Call { id, from_node, to_node, flow, over, exchange: Arc::clone(self), _slot: slot })
    }

    /// The node's end of an operation that waits for this node; once.
    pub fn take(&self, node: NodeId, id: RequestId) -> Option<NodeEnd> {
        let mut waiting = self.lock();
        if waiting.get(&id).is_none_or(|(wanted, _)| *wanted != node) {
            return None;
        }
        waiting.remove(&id).map(|(_, end)| end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_node_that_was_asked_gets_an_operation_and_only_once() {
        let exchange = Arc::new(FileExchange::default());
        let (node, other) = (NodeId::new(), NodeId::new());
        let call = exchange.begin(node, "ann").unwrap();
        assert!(exchange.take(other, call.id).is_none());
        assert!(call.waits());
        let end = exchange.take(node, call.id).unwrap();
        assert!(exchange.take(node, call.id).is_none());
        assert!(!end.over.is_cancelled() && !call.waits());
        drop(call);
        assert!(end.over.is_cancelled());
    }

    #[test]
    fn nothing_of_a_call_that_was_given_up_stays() {
        let exchange = Arc::new(FileExchange::default());
        let node = NodeId::new();
        let calls: Vec<Call> =
            (0..CALLS_OF_ONE).map(|_| exchange.begin(node, "ann").unwrap()).collect();
        assert_eq!(exchange.begin(node, "ann").err(), Some(TooManyCalls::Yours));
        assert!(exchange.begin(node, "bob").is_ok(), "another caller has places of its own");
        drop(calls);
        assert!(exchange.lock().is_empty());
        assert!(exchange.begin(node, "ann").is_ok());
    }

    #[test]
    fn more_than_a_window_is_never_under_way() {
        let window = Window::default();
        assert!(window.take(FILE_WINDOW_BYTES));
        window.give(10);
        assert!(window.take(10));
        assert!(!window.take(1));
        window.give(u64::MAX);
        assert!(window.take(FILE_WINDOW_BYTES));
    }
}
