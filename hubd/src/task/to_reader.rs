//! Frames on their way to the reader of a task.
//!
//! The task's stream from the node is always read at once, so something has to hold what the reader
//! does not take yet, and what it has not acknowledged, so that a broken stream can be resumed. This
//! holds a bounded number of *bytes*: the node is never granted more than the reader's window has room
//! for. Credit and end are state, not queues. A node that sends more than it was granted breaks the
//! protocol, and its task is failed.
//!
//! The books: `node_credit` (what the node may still send) + `behind` (bytes before these that the
//! reader, or the spool, has yet to deal with) + what is held here never exceed `window` by a grant.

use std::sync::{Mutex, MutexGuard, PoisonError};

use cortex_proto::v1::{Output, OutputStream, StdinResume, TaskExit, TaskInterrupted, TaskStarted};
use cortex_proto::{MAX_OUTPUT_CREDIT, MAX_OUTPUT_FRAME_BYTES};
use cortex_shared::replay::{Piece, Replay};
use tokio::sync::Notify;

use crate::counters;

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
    /// The session with the node has ended.
    Interrupted(TaskInterrupted),
    /// The node is back.
    Resumed,
    /// Where the reader's input goes on.
    StdinResume(StdinResume),
    /// The end; nothing follows.
    End(End),
}

/// Who takes the output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Taker {
    /// One reader at a time, to which nothing is lost; at the moment perhaps none.
    Reader,
    /// The spool alone: the command runs detached.
    Spool,
    /// Nobody any more: the command is only to end.
    Nobody,
}

/// What the reader has not heard yet of the session with the node. Only the latest counts.
#[derive(Clone, Debug)]
enum News {
    Interrupted(TaskInterrupted),
    Resumed,
}

struct State {
    taker: Taker,
    /// Counts the readers, so that one whose stream broke notices that another took over.
    reader: u64,
    started: Option<TaskStarted>,
    news: Option<News>,
    replay: Replay,
    /// Bytes of each stream that came from the node.
    received: [u64; 2],
    /// The next piece of a stream may leave a gap: the hub was restarted, and what its last run had not
    /// written may be with the reader alone. Never otherwise: pieces that do not follow each other cannot
    /// be joined, and each costs memory that no credit counts.
    gap_allowed: [bool; 2],
    window: u64,
    /// What the window may grow to.
    most: u64,
    node_credit: u64,
    behind: u64,
    /// What may still be sent to the reader.
    reader_credit: u64,
    stdin_credit: u64,
    stdin_resume: Option<StdinResume>,
    /// The reader came back, and does not know yet where its input goes on.
    stdin_resume_due: bool,
    end: Option<End>,
    end_taken: bool,
}

impl State {
    /// Grants the node what there is room for; returns it.
    fn top_up(&mut self) -> u64 {
        let taken =
            self.node_credit.saturating_add(self.behind).saturating_add(self.replay.bytes());
        let more = self.window.saturating_sub(taken);
        self.node_credit += more;
        more
    }
}

/// A reader's place; see [`ToReader::attach`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attached {
    /// Tells the reader from later ones.
    pub reader: u64,
    /// Where each stream goes on from here. What the reader lacks before that is in the spool.
    pub live_from: [u64; 2],
}

/// See the module.
pub struct ToReader {
    state: Mutex<State>,
    ready: Notify,
}

impl ToReader {
    /// An empty mailbox; `credit` is what its reader takes at first, none for a detached command. No
    /// more than `most` bytes lie here.
    #[must_use]
    pub fn new(credit: Option<u64>, most: u64) -> Self {
        let taker = if credit.is_some() { Taker::Reader } else { Taker::Spool };
        let credit = credit.unwrap_or(cortex_proto::DEFAULT_OUTPUT_CREDIT).min(MAX_OUTPUT_CREDIT);
        let state = State {
            taker,
            reader: 1,
            started: None,
            news: None,
            replay: Replay::default(),
            received: [0; 2],
            gap_allowed: [false; 2],
            window: credit.min(most),
            most,
            node_credit: 0,
            behind: 0,
            reader_credit: credit,
            stdin_credit: 0,
            stdin_resume: None,
            stdin_resume_due: false,
            end: None,
            end_taken: false,
        };
        Self { state: Mutex::new(state), ready: Notify::new() }
    }

    /// One that goes on where an earlier run of the hub stopped: `received` bytes are in the spool.
    #[must_use]
    pub fn recovered(received: [u64; 2], detached: bool, most: u64) -> Self {
        let credit = cortex_proto::DEFAULT_OUTPUT_CREDIT;
        let mailbox = Self::new((!detached).then_some(credit), most);
        {
            let mut state = mailbox.lock();
            state.received = received;
            state.gap_allowed = [true; 2];
            state.reader_credit = 0;
        }
        mailbox
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the node may send at first.
    pub fn first_credit(&self) -> u64 {
        let mut state = self.lock();
        state.top_up();
        state.node_credit
    }

    /// The node opens the stream anew: where it goes on, and what it may send from there.
    pub fn resume(&self) -> ([u64; 2], u64) {
        let mut state = self.lock();
        // What it was granted before, and perhaps never heard of, does not count any more.
        state.node_credit = 0;
        state.top_up();
        (state.received, state.node_credit)
    }

    /// The reader has dealt with so many more bytes, or takes so many more than before; returns what
    /// the node is to be granted for it.
    pub fn grant(&self, bytes: u64) -> u64 {
        let mut state = self.lock();
        let before = bytes.min(state.behind);
        state.behind -= before;
        let held = state.replay.acknowledge(bytes - before);
        let extra = bytes - before - held;
        state.window = state.window.saturating_add(extra).min(state.most);
        state.reader_credit = state.reader_credit.saturating_add(bytes).min(MAX_OUTPUT_CREDIT);
        let more = if state.taker == Taker::Reader { state.top_up() } else { 0 };
        drop(state);
        self.ready.notify_one();
        more
    }

    /// The spool has dealt with so many more bytes of a detached command; returns what the node is to
    /// be granted.
    pub fn spooled(&self, bytes: u64) -> u64 {
        let mut state = self.lock();
        if state.taker != Taker::Spool {
            return 0;
        }
        state.behind = state.behind.saturating_sub(bytes);
        state.top_up()
    }

    /// A reader comes back, which has everything before these offsets and takes `credit` bytes from
    /// there; it will yet acknowledge `unacknowledged` bytes before them. `None` for a detached command,
    /// or one that nobody reads any more.
    pub fn attach(&self, has: [u64; 2], credit: u64, unacknowledged: u64) -> Option<Attached> {
        let mut state = self.lock();
        if state.taker != Taker::Reader {
            return None;
        }
        state.reader += 1;
        state.end_taken = false;
        // What it was told of its input is said anew, as a whole.
        state.stdin_credit = 0;
        state.stdin_resume_due = true;
        state.replay.rewind(has);
        // A hub that was restarted may have less than the reader: that need not come again.
        state.received = [0, 1].map(|stream| state.received[stream].max(has[stream]));
        state.behind = unacknowledged.min(MAX_OUTPUT_CREDIT);
        state.reader_credit = credit.min(MAX_OUTPUT_CREDIT);
        state.window = state.window.max(state.reader_credit).min(state.most);
        let live_from = [0, 1].map(|stream| {
            let start = state.replay.start(stream).unwrap_or(state.received[stream]);
            start.max(has[stream])
        });
        let attached = Attached { reader: state.reader, live_from };
        drop(state);
        // The reader before it, if it still waits, has to notice.
        self.ready.notify_waiters();
        Some(attached)
    }

    /// Nobody takes the output any more: what is held and what comes is dropped, so that the command
    /// can end. Returns what the node is to be granted.
    pub fn discard(&self) -> u64 {
        let mut state = self.lock();
        state.taker = Taker::Nobody;
        state.replay.clear();
        state.behind = 0;
        let more = state.top_up();
        drop(state);
        self.ready.notify_waiters();
        more
    }

    /// How many bytes of each stream came from the node.
    #[must_use]
    pub fn received(&self) -> [u64; 2] {
        self.lock().received
    }

    /// Whether this reader is still the one, and has not been given the end.
    #[must_use]
    pub fn is_read_by(&self, reader: u64) -> bool {
        let state = self.lock();
        state.taker == Taker::Reader && state.reader == reader
    }

    /// The command has started.
    pub fn started(&self, started: TaskStarted) {
        self.lock().started = Some(started);
        self.ready.notify_one();
    }

    /// The session with the node has ended.
    pub fn interrupted(&self, interrupted: TaskInterrupted) {
        self.lock().news = Some(News::Interrupted(interrupted));
        self.ready.notify_one();
    }

    /// The node is back.
    pub fn resumed(&self) {
        self.lock().news = Some(News::Resumed);
        self.ready.notify_one();
    }

    /// Takes a piece of output from the node; returns what of it is new, and what the node is to be
    /// granted at once.
    ///
    /// # Errors
    /// If it is more than was granted, not a frame, or leaves out what comes before it.
    pub fn output(&self, output: Output) -> Result<(Option<Piece>, u64), FlowViolation> {
        let mut state = self.lock();
        let bytes = output.data.len() as u64;
        // A frame without bytes costs no credit, so nothing would bound how many wait.
        let stream = match OutputStream::try_from(output.stream) {
            Ok(OutputStream::Stdout) if bytes > 0 => 0,
            Ok(OutputStream::Stderr) if bytes > 0 => 1,
            _ => return Err(FlowViolation),
        };
        if bytes > MAX_OUTPUT_FRAME_BYTES as u64 || bytes > state.node_credit {
            return Err(FlowViolation);
        }
        state.node_credit -= bytes;
        let piece = Piece { stream, offset: output.offset, data: output.data };
        let end = piece.offset.checked_add(bytes).ok_or(FlowViolation)?;
        // A node that could not know what had arrived sends some of it again. What is missing before
        // a piece shows in its offset, to whoever reads it.
        let known = state.received[stream];
        let gap_allowed = std::mem::take(&mut state.gap_allowed[stream]);
        if piece.offset > known && !gap_allowed {
            return Err(FlowViolation);
        }
        state.received[stream] = known.max(end);
        let Some(piece) = piece.from(known) else { return Ok((None, state.top_up())) };
        match state.taker {
            Taker::Reader => state.replay.push(piece.clone()),
            Taker::Spool => state.behind += piece.data.len() as u64,
            Taker::Nobody => {}
        }
        // What was known already, or is wanted by nobody, takes no room.
        let more = state.top_up();
        drop(state);
        counters::OUTPUT_BYTES.add(piece.data.len() as u64);
        self.ready.notify_one();
        Ok((Some(piece), more))
    }

    /// The command has taken input.
    pub fn stdin_credit(&self, bytes: u64) {
        let mut state = self.lock();
        state.stdin_credit = state.stdin_credit.saturating_add(bytes);
        drop(state);
        self.ready.notify_one();
    }

    /// A reader that came back is told where its input goes on, if it has not been told.
    pub fn input_known(&self, resume: StdinResume) {
        let mut state = self.lock();
        if std::mem::take(&mut state.stdin_resume_due) {
            state.stdin_credit = 0;
            state.stdin_resume = Some(resume);
        }
        drop(state);
        self.ready.notify_one();
    }

    /// Ends the stream after what is queued; a second end changes nothing.
    pub fn end(&self, end: End) {
        self.lock().end.get_or_insert(end);
        self.ready.notify_one();
    }

    /// Takes from the reader's credit for bytes that it gets from the spool: at least one, at most so
    /// many. 0 if another reader took over.
    pub async fn take_credit(&self, reader: u64, most: u64) -> u64 {
        loop {
            let notified = self.ready.notified();
            {
                let mut state = self.lock();
                if state.reader != reader || state.taker != Taker::Reader {
                    return 0;
                }
                let taken = most.min(state.reader_credit);
                if taken > 0 {
                    state.reader_credit -= taken;
                    state.behind += taken;
                    return taken;
                }
            }
            notified.await;
        }
    }

    /// The next frame; `None` after the end, or once another reader took over.
    pub async fn next(&self, reader: u64) -> Option<ReaderFrame> {
        loop {
            let notified = self.ready.notified();
            {
                let mut state = self.lock();
                if state.end_taken || state.reader != reader {
                    return None;
                }
                if let Some(started) = state.started.take() {
                    return Some(ReaderFrame::Started(started));
                }
                match state.news.take() {
                    Some(News::Interrupted(news)) => return Some(ReaderFrame::Interrupted(news)),
                    Some(News::Resumed) => return Some(ReaderFrame::Resumed),
                    None => {}
                }
                if let Some(resume) = state.stdin_resume.take() {
                    return Some(ReaderFrame::StdinResume(resume));
                }
                if state.stdin_credit > 0 && !state.stdin_resume_due {
                    return Some(ReaderFrame::StdinCredit(std::mem::take(&mut state.stdin_credit)));
                }
                let credit = state.reader_credit;
                if let Some(piece) = state.replay.next(credit) {
                    state.reader_credit -= piece.data.len() as u64;
                    return Some(ReaderFrame::Output(wire(piece)));
                }
                if !state.replay.has_next()
                    && let Some(end) = state.end.clone()
                {
                    state.end_taken = true;
                    return Some(ReaderFrame::End(end));
                }
            }
            notified.await;
        }
    }
}

/// A piece as the protocol writes it.
#[must_use]
pub fn wire(piece: Piece) -> Output {
    let stream = if piece.stream == 0 { OutputStream::Stdout } else { OutputStream::Stderr };
    Output { stream: stream.into(), offset: piece.offset, data: piece.data }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    fn output(offset: u64, data: &'static [u8]) -> Output {
        Output { stream: 0, offset, data: Bytes::from_static(data) }
    }

    fn reading(window: u64) -> ToReader {
        let mailbox = ToReader::new(Some(window), MAX_OUTPUT_CREDIT);
        assert_eq!(mailbox.first_credit(), window.min(MAX_OUTPUT_CREDIT));
        mailbox
    }

    #[tokio::test]
    async fn a_node_cannot_send_more_than_it_was_granted() {
        let mailbox = reading(4);
        mailbox.output(output(0, b"abc")).unwrap();
        assert_eq!(mailbox.output(output(3, b"de")), Err(FlowViolation));
        assert_eq!(mailbox.grant(1), 1, "a reader may take more than it said at first");
        mailbox.output(output(3, b"de")).unwrap();
        assert_eq!(mailbox.next(1).await, Some(ReaderFrame::Output(output(0, b"abcde"))));
        assert_eq!(mailbox.output(output(5, b"")), Err(FlowViolation), "costs no credit");
        let unknown = Output { stream: 7, ..output(0, b"x") };
        assert_eq!(mailbox.output(unknown), Err(FlowViolation));
    }

    #[test]
    fn credit_has_a_ceiling() {
        let mailbox = reading(u64::MAX);
        assert_eq!(mailbox.grant(1), 0);
        let mailbox = reading(0);
        assert_eq!(mailbox.grant(u64::MAX), MAX_OUTPUT_CREDIT);
    }

    #[test]
    fn pieces_that_do_not_follow_each_other_are_taken_once_after_a_restart_and_never_again() {
        let mailbox = ToReader::recovered([10, 0], false, MAX_OUTPUT_CREDIT);
        mailbox.resume();
        assert!(mailbox.output(output(14, b"ab")).is_ok(), "the reader has what is missing");
        assert_eq!(mailbox.output(output(18, b"ab")), Err(FlowViolation));
        assert!(mailbox.output(output(16, b"ab")).is_ok());
    }

    #[test]
    fn no_more_lies_here_than_the_hub_has_room_for() {
        let mailbox = ToReader::new(Some(100), 8);
        assert_eq!(mailbox.first_credit(), 8);
        assert_eq!(mailbox.grant(50), 0);
        assert_eq!(mailbox.attach([0; 2], 100, 0).unwrap().reader, 2);
        assert_eq!(mailbox.resume().1, 8);
    }

    #[tokio::test]
    async fn output_is_joined_only_with_its_own_neighbour_and_the_end_comes_last() {
        let mailbox = reading(100);
        mailbox.end(End::NotRecorded);
        mailbox.output(output(0, b"ab")).unwrap();
        mailbox.output(Output { stream: 1, ..output(0, b"x") }).unwrap();
        mailbox.output(output(2, b"c")).unwrap();
        assert_eq!(mailbox.output(output(9, b"gap")), Err(FlowViolation));
        let mut frames = Vec::new();
        while let Some(frame) = mailbox.next(1).await {
            frames.push(frame);
        }
        assert_eq!(
            frames,
            [
                ReaderFrame::Output(output(0, b"ab")),
                ReaderFrame::Output(Output { stream: 1, ..output(0, b"x") }),
                ReaderFrame::Output(output(2, b"c")),
                ReaderFrame::End(End::NotRecorded),
            ]
        );
    }

    #[tokio::test]
    async fn a_reader_that_comes_back_goes_on_at_its_byte_and_the_one_before_ends() {
        let mailbox = reading(8);
        mailbox.output(output(0, b"abcdef")).unwrap();
        assert_eq!(mailbox.next(1).await, Some(ReaderFrame::Output(output(0, b"abcdef"))));
        // It got four of them, has written one, and the credit for that was lost.
        let attached = mailbox.attach([4, 0], 5, 3).unwrap();
        assert_eq!(attached, Attached { reader: 2, live_from: [4, 0] });
        assert_eq!(mailbox.next(1).await, None);
        assert_eq!(mailbox.next(2).await, Some(ReaderFrame::Output(output(4, b"ef"))));
        assert_eq!(mailbox.resume(), ([6, 0], 3), "window 8, 3 behind, 2 under way");
        assert_eq!(mailbox.grant(3), 3);
        assert_eq!(mailbox.grant(2), 2);
        mailbox.output(output(6, b"ghijklmn")).unwrap();
    }

    #[tokio::test]
    async fn a_node_that_comes_back_goes_on_at_the_exact_byte() {
        let mailbox = reading(8);
        mailbox.output(output(0, b"abcd")).unwrap();
        assert_eq!(mailbox.resume(), ([4, 0], 4));
        // It does not know what had arrived before a restart of the hub, and sends more.
        assert_eq!(mailbox.output(output(2, b"cdef")).unwrap().0.unwrap().data, "ef");
        assert_eq!(mailbox.next(1).await, Some(ReaderFrame::Output(output(0, b"abcdef"))));
    }

    #[tokio::test]
    async fn after_a_restart_of_the_hub_a_reader_gets_the_rest_from_the_spool_within_its_credit() {
        let mailbox = ToReader::recovered([10, 0], false, MAX_OUTPUT_CREDIT);
        let (from, credit) = mailbox.resume();
        assert_eq!((from, credit), ([10, 0], cortex_proto::DEFAULT_OUTPUT_CREDIT));
        mailbox.output(output(10, b"live")).unwrap();
        let attached = mailbox.attach([6, 0], 5, 0).unwrap();
        assert_eq!(attached.live_from, [10, 0]);
        assert_eq!(mailbox.take_credit(2, 4).await, 4);
        assert_eq!(mailbox.next(2).await, Some(ReaderFrame::Output(output(10, b"l"))));
        assert_eq!(mailbox.grant(4), 0, "what is behind gives the node no credit");
        assert_eq!(mailbox.next(2).await, Some(ReaderFrame::Output(output(11, b"ive"))));
    }

    #[tokio::test]
    async fn a_reader_that_has_more_than_the_spool_gets_nothing_twice() {
        for node_first in [true, false] {
            let mailbox = ToReader::recovered([4, 0], false, MAX_OUTPUT_CREDIT);
            if node_first {
                assert_eq!(mailbox.resume().0, [4, 0]);
            }
            let attached = mailbox.attach([7, 0], 100, 0).unwrap();
            assert_eq!(attached.live_from, [7, 0]);
            if !node_first {
                assert_eq!(mailbox.resume().0, [7, 0]);
            }
            let credit = mailbox.lock().node_credit;
            assert_eq!(mailbox.output(output(5, b"5678")).unwrap().1, 2);
            assert_eq!(mailbox.lock().node_credit, credit - 2);
            assert_eq!(mailbox.next(2).await, Some(ReaderFrame::Output(output(7, b"78"))));
        }
    }

    #[test]
    fn a_detached_command_waits_for_the_spool_and_nobody_else() {
        let mailbox = ToReader::new(None, MAX_OUTPUT_CREDIT);
        let window = mailbox.first_credit();
        mailbox.output(output(0, b"abcd")).unwrap();
        assert_eq!(mailbox.lock().node_credit, window - 4);
        assert_eq!(mailbox.spooled(4), 4);
        assert_eq!(mailbox.attach([0, 0], 1, 0), None);
    }

    #[test]
    fn output_that_nobody_wants_does_not_keep_a_command_from_ending() {
        let mailbox = reading(4);
        mailbox.output(output(0, b"abcd")).unwrap();
        assert_eq!(mailbox.discard(), 4);
        let (_, more) = mailbox.output(output(4, b"abcd")).unwrap();
        assert_eq!(more, 4);
    }
}
