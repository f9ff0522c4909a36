//! The two mailboxes of a running task: frames on their way to its reader, and to its node.
//!
//! Streams are always read at once, so something has to hold what the other side does not take yet.
//! These hold a bounded number of *bytes*: output never exceeds the credit the reader granted, input
//! never exceeds the window the node grants, and small frames are joined, so that neither a slow
//! reader nor a chatty program makes them grow. Credit, resize and end are state, not queues. A
//! peer that sends more than it was granted breaks the protocol, and its task is failed.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::{Bytes, BytesMut};
use cortex_proto::v1::{Output, TaskExit, TaskStarted, TerminalSize};
use cortex_proto::{MAX_OUTPUT_CREDIT, MAX_OUTPUT_FRAME_BYTES, STDIN_WINDOW_BYTES};
use tokio::sync::Notify;

/// Frames below this size are joined with a waiting neighbour.
const JOIN_BELOW_BYTES: usize = 8 * 1024;
/// Joined frames do not grow beyond this.
const JOINED_BYTES: usize = 64 * 1024;
/// Signals that may wait for a node.
const MAX_SIGNALS: usize = 16;

/// A peer sent more than it was granted, or a frame that is too large.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the peer broke the task's flow control")]
pub struct FlowViolation;

/// How a task's stream to its reader ends.
#[derive(Debug, Clone, PartialEq)]
pub enum End {
    /// With the exit of the command.
    Exit(TaskExit),
    /// The verdict could not be made durable, so none is given.
    NotRecorded,
}

/// A frame for the reader.
#[derive(Debug, Clone, PartialEq)]
pub enum ReaderFrame {
    /// The command runs.
    Started(TaskStarted),
    /// A piece of output.
    Output(Output),
    /// The command has taken this much input.
    StdinCredit(u64),
    /// The end; nothing follows.
    End(End),
}

#[derive(Default)]
struct ReaderState {
    started: Option<TaskStarted>,
    output: VecDeque<Output>,
    /// Output the node may still send.
    credit: u64,
    stdin_credit: u64,
    end: Option<End>,
    done: bool,
}

/// Frames on their way to the reader.
#[derive(Default)]
pub struct ToReader {
    state: Mutex<ReaderState>,
    ready: Notify,
}

impl ToReader {
    /// An empty mailbox whose reader accepts `credit` bytes at first.
    #[must_use]
    pub fn new(credit: u64) -> Self {
        let credit = credit.min(MAX_OUTPUT_CREDIT);
        Self {
            state: Mutex::new(ReaderState { credit, ..ReaderState::default() }),
            ready: Notify::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, ReaderState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds credit; returns how much of it counts, which is to be passed on to the node.
    pub fn grant(&self, bytes: u64) -> u64 {
        let mut state = self.lock();
        let counted = bytes.min(MAX_OUTPUT_CREDIT - state.credit);
        state.credit += counted;
        counted
    }

    /// The command has started.
    pub fn started(&self, started: TaskStarted) {
        self.lock().started = Some(started);
        self.ready.notify_one();
    }

    /// Takes a piece of output from the node.
    ///
    /// # Errors
    /// If it is more than was granted.
    pub fn output(&self, output: Output) -> Result<(), FlowViolation> {
        let mut state = self.lock();
        let bytes = output.data.len();
        if bytes > MAX_OUTPUT_FRAME_BYTES || bytes as u64 > state.credit {
            return Err(FlowViolation);
        }
        state.credit -= bytes as u64;
        match state.output.back_mut() {
            Some(last)
                if last.stream == output.stream
                    && bytes < JOIN_BELOW_BYTES
                    && last.data.len() + bytes <= JOINED_BYTES
                    && last.offset + last.data.len() as u64 == output.offset =>
            {
                append(&mut last.data, &output.data);
            }
            _ => state.output.push_back(output),
        }
        drop(state);
        self.ready.notify_one();
        Ok(())
    }

    /// The command has taken input.
    pub fn stdin_credit(&self, bytes: u64) {
        let mut state = self.lock();
        state.stdin_credit = state.stdin_credit.saturating_add(bytes);
        drop(state);
        self.ready.notify_one();
    }

    /// Ends the stream after what is queued; a second end changes nothing.
    pub fn end(&self, end: End) {
        self.lock().end.get_or_insert(end);
        self.ready.notify_one();
    }

    /// The next frame; `None` after the end. For one reader at a time.
    pub async fn next(&self) -> Option<ReaderFrame> {
        loop {
            {
                let mut state = self.lock();
                if state.done {
                    return None;
                }
                if let Some(started) = state.started.take() {
                    return Some(ReaderFrame::Started(started));
                }
                if state.stdin_credit > 0 {
                    return Some(ReaderFrame::StdinCredit(std::mem::take(&mut state.stdin_credit)));
                }
                if let Some(output) = state.output.pop_front() {
                    return Some(ReaderFrame::Output(output));
                }
                if let Some(end) = state.end.take() {
                    state.done = true;
                    return Some(ReaderFrame::End(end));
                }
            }
            self.ready.notified().await;
        }
    }
}

/// A frame for the node.
#[derive(Debug, Clone, PartialEq)]
pub enum NodeFrame {
    /// A signal for the command.
    Signal(u32),
    /// The terminal has another size.
    Resize(TerminalSize),
    /// The reader accepts this much more output.
    Credit(u64),
    /// Input; `true` closes it.
    Stdin(Bytes, bool),
}

#[derive(Default)]
struct NodeState {
    signals: VecDeque<u32>,
    resize: Option<TerminalSize>,
    credit: u64,
    stdin: VecDeque<Bytes>,
    /// Input that is queued here or under way, and that the command has not taken.
    stdin_untaken: u64,
    stdin_ends: bool,
    stdin_end_sent: bool,
    closed: bool,
}

/// Frames on their way to the node.
#[derive(Default)]
pub struct ToNode {
    state: Mutex<NodeState>,
    ready: Notify,
}

impl ToNode {
    fn lock(&self) -> MutexGuard<'_, NodeState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut NodeState)) {
        change(&mut self.lock());
        self.ready.notify_one();
    }

    /// Passes credit on.
    pub fn credit(&self, bytes: u64) {
        self.change(|state| state.credit += bytes);
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
    /// If it is more than the window, or comes after the end.
    pub fn stdin(&self, data: Bytes, end: bool) -> Result<(), FlowViolation> {
        let mut state = self.lock();
        let untaken = state.stdin_untaken + data.len() as u64;
        if untaken > STDIN_WINDOW_BYTES || state.stdin_ends {
            return Err(FlowViolation);
        }
        state.stdin_untaken = untaken;
        state.stdin_ends = end;
        if !data.is_empty() {
            match state.stdin.back_mut() {
                Some(last) if last.len() + data.len() <= JOIN_BELOW_BYTES => {
                    append(last, &data);
                }
                _ => state.stdin.push_back(data),
            }
        }
        drop(state);
        self.ready.notify_one();
        Ok(())
    }

    /// The command has taken input.
    pub fn stdin_taken(&self, bytes: u64) {
        let mut state = self.lock();
        state.stdin_untaken = state.stdin_untaken.saturating_sub(bytes);
    }

    /// Nothing more is to be sent.
    pub fn close(&self) {
        self.change(|state| state.closed = true);
    }

    /// The next frame; `None` once closed. For one sender at a time.
    pub async fn next(&self) -> Option<NodeFrame> {
        loop {
            {
                let mut state = self.lock();
                if state.closed {
                    return None;
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
                let ends_unsaid = state.stdin_ends && !state.stdin_end_sent;
                if !state.stdin.is_empty() || ends_unsaid {
                    let data = state.stdin.pop_front().unwrap_or_default();
                    let end = state.stdin_ends && state.stdin.is_empty();
                    state.stdin_end_sent = end;
                    return Some(NodeFrame::Stdin(data, end));
                }
            }
            self.ready.notified().await;
        }
    }
}

/// Joins what follows to a frame that waits; both are small.
fn append(last: &mut Bytes, more: &[u8]) {
    let mut joined = BytesMut::from(std::mem::take(last));
    joined.extend_from_slice(more);
    *last = joined.freeze();
}

#[cfg(test)]
mod tests {
    use super::*;

    fn output(offset: u64, data: &'static [u8]) -> Output {
        Output { stream: 0, offset, data: Bytes::from_static(data) }
    }

    #[tokio::test]
    async fn a_node_cannot_send_more_than_it_was_granted() {
        let mailbox = ToReader::new(4);
        mailbox.output(output(0, b"abc")).unwrap();
        assert_eq!(mailbox.output(output(3, b"de")), Err(FlowViolation));
        assert_eq!(mailbox.grant(1), 1);
        mailbox.output(output(3, b"de")).unwrap();
        assert_eq!(mailbox.next().await, Some(ReaderFrame::Output(output(0, b"abcde"))));
    }

    #[test]
    fn credit_has_a_ceiling() {
        let mailbox = ToReader::new(u64::MAX);
        assert_eq!(mailbox.grant(1), 0);
        let mailbox = ToReader::new(0);
        assert_eq!(mailbox.grant(u64::MAX), MAX_OUTPUT_CREDIT);
    }

    #[tokio::test]
    async fn output_is_joined_only_with_its_own_neighbour_and_the_end_comes_last() {
        let mailbox = ToReader::new(100);
        mailbox.end(End::NotRecorded);
        mailbox.output(output(0, b"ab")).unwrap();
        mailbox.output(Output { stream: 1, ..output(0, b"x") }).unwrap();
        mailbox.output(output(2, b"c")).unwrap();
        mailbox.output(output(9, b"gap")).unwrap();
        let mut frames = Vec::new();
        while let Some(frame) = mailbox.next().await {
            frames.push(frame);
        }
        assert_eq!(
            frames,
            [
                ReaderFrame::Output(output(0, b"ab")),
                ReaderFrame::Output(Output { stream: 1, ..output(0, b"x") }),
                ReaderFrame::Output(output(2, b"c")),
                ReaderFrame::Output(output(9, b"gap")),
                ReaderFrame::End(End::NotRecorded),
            ]
        );
    }

    #[tokio::test]
    async fn a_signal_overtakes_input_and_credits_add_up() {
        let mailbox = ToNode::default();
        mailbox.stdin(Bytes::from_static(b"in"), true).unwrap();
        mailbox.credit(1);
        mailbox.credit(2);
        mailbox.signal(15);
        assert_eq!(mailbox.next().await, Some(NodeFrame::Signal(15)));
        assert_eq!(mailbox.next().await, Some(NodeFrame::Credit(3)));
        assert_eq!(mailbox.next().await, Some(NodeFrame::Stdin(Bytes::from_static(b"in"), true)));
        assert_eq!(mailbox.stdin(Bytes::new(), true), Err(FlowViolation), "after the end");
        mailbox.close();
        assert_eq!(mailbox.next().await, None);
    }

    #[test]
    fn input_stays_within_its_window() {
        let mailbox = ToNode::default();
        let window = usize::try_from(STDIN_WINDOW_BYTES).unwrap();
        mailbox.stdin(Bytes::from(vec![0; window]), false).unwrap();
        assert_eq!(mailbox.stdin(Bytes::from_static(b"x"), false), Err(FlowViolation));
        mailbox.stdin_taken(1);
        mailbox.stdin(Bytes::from_static(b"x"), false).unwrap();
    }
}
