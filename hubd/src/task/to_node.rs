//! Frames on their way to the node of a task.
//!
//! Input never exceeds its window, and what the command has not taken yet is held, so that it can be
//! sent again in a new stream. Signals, resize, credit and end are state, not queues.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::{Bytes, BytesMut};
use cortex_proto::STDIN_WINDOW_BYTES;
use cortex_proto::v1::{StdinResume, TaskIoHello, TaskIoResume, TerminalSize};
use cortex_shared::replay::Piece;
use tokio::sync::Notify;

use super::to_reader::FlowViolation;
use crate::counters;

/// Signals that may wait for a node.
const MAX_SIGNALS: usize = 16;
/// Pieces of input below this size are joined with the one that waits.
const JOINED_BYTES: usize = 8 * 1024;

/// A frame for the node.
#[derive(Debug, Clone, PartialEq)]
pub enum NodeFrame {
    /// Where output goes on in a new stream.
    Resume(TaskIoResume),
    /// A signal for the command.
    Signal(u32),
    /// The terminal has another size.
    Resize(TerminalSize),
    /// The reader accepts this much more output.
    Credit(u64),
    /// Input; `true` closes it.
    Stdin(Bytes, bool),
}

/// Standard input, by its offsets: the command has taken what is before `taken`; from there to
/// `received` it is held here.
#[derive(Default)]
struct Input {
    pieces: VecDeque<Piece>,
    taken: u64,
    /// The first byte that was not sent to the node.
    next: u64,
    received: u64,
    ends: bool,
    end_sent: bool,
}

impl Input {
    fn push(&mut self, data: Bytes) {
        let offset = self.received;
        self.received += data.len() as u64;
        match self.pieces.back_mut() {
            Some(last)
                if last.offset >= self.next && last.data.len() + data.len() <= JOINED_BYTES =>
            {
                let mut joined = BytesMut::from(std::mem::take(&mut last.data));
                joined.extend_from_slice(&data);
                last.data = joined.freeze();
            }
            _ => self.pieces.push_back(Piece { stream: 0, offset, data }),
        }
    }

    fn next(&mut self) -> Option<(Bytes, bool)> {
        let ends_unsaid = self.ends && !self.end_sent;
        if self.next == self.received && !ends_unsaid {
            return None;
        }
        let waiting = self.pieces.iter().find(|piece| piece.end() > self.next);
        let data = waiting.cloned().and_then(|piece| piece.from(self.next)).map(|p| p.data);
        let data = data.unwrap_or_default();
        self.next += data.len() as u64;
        self.end_sent = self.ends && self.next == self.received;
        Some((data, self.end_sent))
    }

    fn take(&mut self, bytes: u64) {
        self.taken = self.taken.saturating_add(bytes).min(self.received);
        while self.pieces.front().is_some_and(|piece| piece.end() <= self.taken) {
            self.pieces.pop_front();
        }
    }
}

struct State {
    /// Counts the node's streams; only the latest one counts.
    stream: u64,
    resume: Option<TaskIoResume>,
    signals: VecDeque<u32>,
    resize: Option<TerminalSize>,
    credit: u64,
    input: Input,
    /// The hub was restarted, and the node has not said yet how much input it got.
    input_unknown: bool,
    closed: bool,
}

/// See the module.
pub struct ToNode {
    state: Mutex<State>,
    ready: Notify,
}

impl ToNode {
    /// An empty mailbox. `recovered` if the hub was restarted since the command began.
    #[must_use]
    pub fn new(recovered: bool) -> Self {
        let state = State {
            stream: 0,
            resume: None,
            signals: VecDeque::new(),
            resize: None,
            credit: 0,
            input: Input::default(),
            input_unknown: recovered,
            closed: false,
        };
        Self { state: Mutex::new(state), ready: Notify::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.lock());
        self.ready.notify_one();
    }

    /// The node opened its first stream; returns its number.
    pub fn open(&self) -> u64 {
        let mut state = self.lock();
        state.stream += 1;
        state.stream
    }

    /// The node opened another stream: `resume` goes first, and input goes on where the node stopped.
    /// Returns the stream's number, and input that the command has taken meanwhile.
    pub fn resume(&self, hello: &TaskIoHello, resume: TaskIoResume) -> (u64, u64) {
        let mut state = self.lock();
        state.stream += 1;
        state.resume = Some(resume);
        state.credit = 0;
        if std::mem::take(&mut state.input_unknown) {
            let taken = hello.stdin_taken.min(hello.stdin_received);
            let received = hello.stdin_received;
            state.input = Input { taken, next: received, received, ..Input::default() };
            state.input.ends = hello.stdin_ended;
        }
        let taken = hello.stdin_taken.saturating_sub(state.input.taken);
        state.input.take(taken);
        state.input.next = hello.stdin_received.clamp(state.input.taken, state.input.received);
        state.input.end_sent = hello.stdin_ended;
        let stream = state.stream;
        drop(state);
        self.ready.notify_waiters();
        (stream, taken)
    }

    /// The number of the node's latest stream; 0 if there was none.
    #[must_use]
    pub fn stream(&self) -> u64 {
        self.lock().stream
    }

    /// How far input has come; `None` as long as only the node knows.
    #[must_use]
    pub fn input(&self) -> Option<StdinResume> {
        let state = self.lock();
        let Input { taken, received, ends, .. } = state.input;
        (!state.input_unknown).then_some(StdinResume { received, taken, ended: ends })
    }

    /// Passes credit on.
    pub fn credit(&self, bytes: u64) {
        if bytes > 0 {
            self.change(|state| state.credit += bytes);
        }
    }

    /// Passes a signal on. Beyond a few that wait, more of them say nothing new and are dropped.
    pub fn signal(&self, number: u32) {
        self.change(|state| {
            if state.signals.len() < MAX_SIGNALS {
                state.signals.push_back(number);
            }
        });
    }

    /// Passes the latest size of the terminal on.
    pub fn resize(&self, size: TerminalSize) {
        self.change(|state| state.resize = Some(size));
    }

    /// Takes input from the caller; `end` closes it.
    ///
    /// # Errors
    /// If it is more than the window, comes after the end, or before it is known where it goes on.
    pub fn stdin(&self, data: Bytes, end: bool) -> Result<(), FlowViolation> {
        let mut state = self.lock();
        let untaken = state.input.received - state.input.taken + data.len() as u64;
        if untaken > STDIN_WINDOW_BYTES || state.input.ends || state.input_unknown {
            return Err(FlowViolation);
        }
        counters::INPUT_BYTES.add(data.len() as u64);
        if !data.is_empty() {
            state.input.push(data);
        }
        state.input.ends = end;
        drop(state);
        self.ready.notify_one();
        Ok(())
    }

    /// The command has taken input.
    pub fn stdin_taken(&self, bytes: u64) {
        self.lock().input.take(bytes);
    }

    /// Nothing more is to be sent.
    pub fn close(&self) {
        self.change(|state| state.closed = true);
        self.ready.notify_waiters();
    }

    /// The next frame for a stream; `None` once closed, or if the node has opened a later one.
    pub async fn next(&self, stream: u64) -> Option<NodeFrame> {
        loop {
            let notified = self.ready.notified();
            {
                let mut state = self.lock();
                if state.closed || state.stream != stream {
                    return None;
                }
                if let Some(resume) = state.resume.take() {
                    return Some(NodeFrame::Resume(resume));
                }
                if let Some(signal) = state.signals.pop_front() {
                    return Some(NodeFrame::Signal(signal));
                }
                if let Some(size) = state.resize.take() {
                    return Some(NodeFrame::Resize(size));
                }
                if state.credit > 0 {
                    return Some(NodeFrame::Credit(std::mem::take(&mut state.credit)));
                }
                if let Some((data, end)) = state.input.next() {
                    return Some(NodeFrame::Stdin(data, end));
                }
            }
            notified.await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(text: &'static str) -> Bytes {
        Bytes::from_static(text.as_bytes())
    }

    #[tokio::test]
    async fn a_signal_overtakes_input_and_credits_add_up() {
        let mailbox = ToNode::new(false);
        let stream = mailbox.open();
        mailbox.stdin(text("in"), true).unwrap();
        mailbox.credit(1);
        mailbox.credit(2);
        mailbox.signal(15);
        assert_eq!(mailbox.next(stream).await, Some(NodeFrame::Signal(15)));
        assert_eq!(mailbox.next(stream).await, Some(NodeFrame::Credit(3)));
        assert_eq!(mailbox.next(stream).await, Some(NodeFrame::Stdin(text("in"), true)));
        assert_eq!(mailbox.stdin(Bytes::new(), true), Err(FlowViolation), "after the end");
        mailbox.close();
        assert_eq!(mailbox.next(stream).await, None);
    }

    #[test]
    fn input_stays_within_its_window() {
        let mailbox = ToNode::new(false);
        let window = usize::try_from(STDIN_WINDOW_BYTES).unwrap();
        mailbox.stdin(Bytes::from(vec![0; window]), false).unwrap();
        assert_eq!(mailbox.stdin(text("x"), false), Err(FlowViolation));
        mailbox.stdin_taken(1);
        mailbox.stdin(text("x"), false).unwrap();
    }

    #[tokio::test]
    async fn input_goes_on_where_the_node_stopped() {
        let mailbox = ToNode::new(false);
        let first = mailbox.open();
        mailbox.stdin(text("abcd"), false).unwrap();
        assert_eq!(mailbox.next(first).await, Some(NodeFrame::Stdin(text("abcd"), false)));
        mailbox.stdin(text("ef"), true).unwrap();
        let hello = TaskIoHello { stdin_received: 3, stdin_taken: 2, ..TaskIoHello::default() };
        let (second, taken) = mailbox.resume(&hello, TaskIoResume::default());
        assert_eq!(taken, 2);
        assert_eq!(mailbox.next(first).await, None);
        assert_eq!(mailbox.next(second).await, Some(NodeFrame::Resume(TaskIoResume::default())));
        assert_eq!(mailbox.next(second).await, Some(NodeFrame::Stdin(text("d"), false)));
        assert_eq!(mailbox.next(second).await, Some(NodeFrame::Stdin(text("ef"), true)));
    }

    #[tokio::test]
    async fn after_a_restart_only_the_node_knows_how_far_input_came() {
        let mailbox = ToNode::new(true);
        assert_eq!(mailbox.input(), None);
        assert_eq!(mailbox.stdin(text("x"), false), Err(FlowViolation));
        let hello = TaskIoHello { stdin_received: 9, stdin_taken: 4, ..TaskIoHello::default() };
        let (stream, _) = mailbox.resume(&hello, TaskIoResume::default());
        let resume = StdinResume { received: 9, taken: 4, ended: false };
        assert_eq!(mailbox.input(), Some(resume));
        mailbox.stdin(text("x"), false).unwrap();
        mailbox.next(stream).await;
        assert_eq!(mailbox.next(stream).await, Some(NodeFrame::Stdin(text("x"), false)));
    }
}
