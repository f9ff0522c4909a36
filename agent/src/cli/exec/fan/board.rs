//! Output of many commands on its way to one writer: a lane for each, served in turn.
//!
//! A lane is bounded in bytes by the credit its command was granted, and the writer takes a bounded
//! share of a lane before it turns to the next, so a command that floods delays the others by that
//! share at most, and memory does not grow with the number of nodes beyond those that run.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use cortex_proto::v1::{Output, OutputStream};
use tokio::sync::{mpsc, oneshot};

use crate::cli::exec::check::OutputCheck;
use crate::cli::exec::writer::{Captured, OutputTo, Piece, WriterEvent};

/// Bytes that the writer takes from one lane in one turn.
const TURN_BYTES: usize = 64 * 1024;

/// What the writer has to know of a command.
pub(super) struct Lane {
    /// The node's name.
    pub(super) name: String,
    /// To the command's conversation.
    pub(super) events: mpsc::Sender<WriterEvent>,
    /// Told once everything of the command is written.
    pub(super) done: oneshot::Sender<LaneEnd>,
}

/// What the writer found out about a command's output.
#[derive(Debug, Default)]
pub(super) struct LaneEnd {
    pub(super) check: OutputCheck,
    pub(super) captured: Captured,
}

/// What the writer does next.
pub(super) struct Turn {
    pub(super) lane: usize,
    /// The lane is new.
    pub(super) opened: Option<Lane>,
    pub(super) pieces: Vec<Piece>,
    /// Nothing more comes in this lane.
    pub(super) ended: bool,
    /// Its command never began: there is nothing to show, not even that there was no output.
    pub(super) abandoned: bool,
}

#[derive(Default)]
struct Waiting {
    opened: Option<Lane>,
    pieces: VecDeque<Piece>,
    bytes: u64,
    closed: bool,
    abandoned: bool,
    /// It stands in the queue of turns.
    in_turn: bool,
}

#[derive(Default)]
struct State {
    lanes: HashMap<usize, Waiting>,
    turns: VecDeque<usize>,
    next: usize,
    closed: bool,
}

impl State {
    fn give_turn(&mut self, lane: usize) {
        if let Some(waiting) = self.lanes.get_mut(&lane).filter(|waiting| !waiting.in_turn) {
            waiting.in_turn = true;
            self.turns.push_back(lane);
        }
    }
}

/// See the module. Clones share it.
#[derive(Clone, Default)]
pub(super) struct Board {
    shared: Arc<(Mutex<State>, Condvar)>,
}

impl Board {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.shared.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A lane for another command.
    pub(super) fn open(&self, lane: Lane) -> LaneInput {
        let mut state = self.lock();
        let number = state.next;
        state.next += 1;
        state.lanes.insert(number, Waiting { opened: Some(lane), ..Waiting::default() });
        state.give_turn(number);
        drop(state);
        self.shared.1.notify_one();
        LaneInput { board: self.clone(), lane: number }
    }

    /// No more lanes come: the writer ends once all are written.
    pub(super) fn close(&self) {
        self.lock().closed = true;
        self.shared.1.notify_one();
    }

    /// Waits for something to do; `None` at the end. For the one writer's thread.
    pub(super) fn next(&self) -> Option<Turn> {
        let mut state = self.lock();
        loop {
            if let Some(lane) = state.turns.pop_front() {
                return Some(take_turn(&mut state, lane));
            }
            if state.closed && state.lanes.is_empty() {
                return None;
            }
            state = self.shared.1.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// So many bytes of a lane have been dealt with.
    pub(super) fn done(&self, lane: usize, bytes: u64) {
        if let Some(waiting) = self.lock().lanes.get_mut(&lane) {
            waiting.bytes -= bytes;
        }
    }
}

fn take_turn(state: &mut State, lane: usize) -> Turn {
    let mut turn = Turn { lane, opened: None, pieces: Vec::new(), ended: true, abandoned: true };
    let Some(waiting) = state.lanes.get_mut(&lane) else { return turn };
    waiting.in_turn = false;
    turn.opened = waiting.opened.take();
    let mut bytes = 0;
    while bytes < TURN_BYTES
        && let Some(piece) = waiting.pieces.pop_front()
    {
        bytes += piece.data.len();
        turn.pieces.push(piece);
    }
    turn.ended = waiting.closed && waiting.pieces.is_empty();
    turn.abandoned = waiting.abandoned;
    if turn.ended {
        state.lanes.remove(&lane);
    } else if !waiting.pieces.is_empty() {
        state.give_turn(lane);
    }
    turn
}

/// The end of a lane that a command's conversation has. Dropping it unclosed abandons the lane.
pub(super) struct LaneInput {
    board: Board,
    lane: usize,
}

impl LaneInput {
    /// Without effect on a lane that is closed.
    fn close_as(&self, abandoned: bool) {
        let mut state = self.board.lock();
        if let Some(waiting) = state.lanes.get_mut(&self.lane).filter(|lane| !lane.closed) {
            waiting.closed = true;
            waiting.abandoned = abandoned;
            state.give_turn(self.lane);
        }
        drop(state);
        self.board.shared.1.notify_one();
    }
}

impl OutputTo for LaneInput {
    fn push(&self, output: Output, limit: u64) -> bool {
        let length = u64::try_from(output.data.len()).unwrap_or(u64::MAX);
        let mut state = self.board.lock();
        let Some(waiting) = state.lanes.get_mut(&self.lane) else { return true };
        waiting.bytes = waiting.bytes.saturating_add(length);
        let within = waiting.bytes <= limit;
        if length > 0 {
            // An unknown stream is standard output: better shown than lost.
            let stream = OutputStream::try_from(output.stream).unwrap_or(OutputStream::Stdout);
            let data: Bytes = output.data;
            waiting.pieces.push_back(Piece { stream, offset: output.offset, data });
        }
        state.give_turn(self.lane);
        drop(state);
        self.board.shared.1.notify_one();
        within
    }

    fn close(&self) {
        self.close_as(false);
    }
}

impl Drop for LaneInput {
    fn drop(&mut self) {
        self.close_as(true);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lane(name: &str) -> Lane {
        let (events, _) = mpsc::channel(1);
        Lane { name: name.to_owned(), events, done: oneshot::channel().0 }
    }

    fn output(bytes: usize) -> Output {
        Output { stream: 0, offset: 0, data: Bytes::from(vec![b'x'; bytes]) }
    }

    #[test]
    fn a_lane_that_floods_waits_for_its_turn() {
        let board = Board::default();
        let (flood, quiet) = (board.open(lane("flood")), board.open(lane("quiet")));
        for _ in 0..16 {
            assert!(flood.push(output(TURN_BYTES), u64::MAX));
        }
        quiet.push(output(1), u64::MAX);
        let order: Vec<usize> = (0..4).map(|_| board.next().unwrap().lane).collect();
        assert_eq!(order, [0, 1, 0, 0], "the quiet one waited for one share of the other");
        drop((flood, quiet));
        board.close();
        let mut ends = 0;
        while let Some(turn) = board.next() {
            ends += usize::from(turn.ended);
        }
        assert_eq!(ends, 2);
    }

    #[test]
    fn a_lane_refuses_more_than_was_granted_and_takes_again_what_is_done() {
        let board = Board::default();
        let input = board.open(lane("a"));
        assert!(input.push(output(8), 8));
        assert!(!input.push(output(1), 8));
        board.done(0, 9);
        assert!(input.push(output(8), 8));
    }
}
