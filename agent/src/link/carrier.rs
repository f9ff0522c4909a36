//! The books of one task: what was sent, acknowledged, granted and taken, over any number of streams.
//! Pure: [`super::task`] does what it says.

use std::collections::VecDeque;
use std::time::Duration;

use bytes::Bytes;
use cortex_proto::v1::{self, task_io_down, task_io_up};
use cortex_shared::ids::TaskId;
use cortex_shared::replay::{Piece, Replay};

use super::request::terminal_size;
use crate::exec::{self, CancelCause, CommandControl, CommandEvent, CommandExit};

/// Standard input that may lie here untaken: the callers' window and room for a late credit.
const MAX_QUEUED_INPUT_BYTES: usize = 1024 * 1024;
/// Signals and pieces of input that may lie here; more is not a reader but an attack.
const MAX_QUEUED_FRAMES: usize = 16 * 1024;
/// Credit of a command whose output is dropped.
const ENDLESS: u64 = u64::MAX / 2;

/// See the module.
pub(super) struct Carrier {
    /// Output that the hub has not acknowledged.
    replay: Replay,
    /// Output of the command so far.
    emitted: u64,
    /// Output that the command may have in all, by what it was granted.
    granted: u64,
    /// What was granted to the command beyond what the hub takes since the last resume.
    debt: u64,
    /// What may still be sent in this stream.
    send_credit: u64,
    /// The hub has opened this stream, and said where it goes on.
    ready: bool,
    resuming: bool,
    started: Option<v1::TaskStarted>,
    started_sent: bool,
    input_received: u64,
    input_taken: u64,
    input_taken_unsaid: u64,
    input_ended: bool,
    /// Orders for the command.
    orders: VecDeque<CommandControl>,
    queued_input: usize,
    /// What was granted and is to be passed to the command.
    grant: u64,
    exit: Option<v1::TaskExit>,
    exit_sent: bool,
    abandoned: bool,
}

impl Carrier {
    pub(super) fn new(initial_credit: u64) -> Self {
        Self {
            replay: Replay::default(),
            emitted: 0,
            granted: initial_credit,
            debt: 0,
            send_credit: initial_credit,
            ready: false,
            resuming: false,
            started: None,
            started_sent: false,
            input_received: 0,
            input_taken: 0,
            input_taken_unsaid: 0,
            input_ended: false,
            orders: VecDeque::new(),
            queued_input: 0,
            grant: 0,
            exit: None,
            exit_sent: false,
            abandoned: false,
        }
    }

    /// The first frame of a stream that is to be opened.
    pub(super) fn hello(&mut self, id: TaskId, resume: bool) -> v1::TaskIoHello {
        self.ready = false;
        self.resuming = resume;
        (self.started_sent, self.exit_sent) = (false, false);
        // The hub learns it from here.
        self.input_taken_unsaid = 0;
        v1::TaskIoHello {
            task_id: id.as_bytes().to_vec().into(),
            resume,
            stdin_received: self.input_received,
            stdin_taken: self.input_taken,
            stdin_ended: self.input_ended,
        }
    }

    pub(super) fn is_resuming(&self) -> bool {
        self.resuming
    }

    /// The first stream is open.
    pub(super) fn opened(&mut self) {
        self.ready = true;
    }

    pub(super) fn exit(&self) -> Option<&v1::TaskExit> {
        self.exit.as_ref()
    }

    pub(super) fn exit_sent(&self) -> bool {
        self.exit_sent
    }

    /// Something the command did, other than ending.
    pub(super) fn event(&mut self, event: CommandEvent) {
        match event {
            CommandEvent::Started { process_id, mode } => {
                let mode = super::proto_mode(mode).into();
                self.started = Some(v1::TaskStarted { mode, process_id });
            }
            CommandEvent::Output { stream, offset, data } => {
                self.emitted += data.len() as u64;
                if !self.abandoned {
                    let stream = match stream {
                        exec::OutputStream::Stdout => 0,
                        exec::OutputStream::Stderr => 1,
                    };
                    self.replay.push(Piece { stream, offset, data });
                }
            }
            CommandEvent::StdinTaken(bytes) => {
                self.input_taken += bytes;
                self.input_taken_unsaid += bytes;
            }
            CommandEvent::Exit(exit) => self.end(command_exit(exit)),
        }
    }

    /// It has ended.
    pub(super) fn end(&mut self, exit: v1::TaskExit) {
        self.exit.get_or_insert(exit);
    }

    /// The hub does not want the output any more: it is dropped, so that the command can end.
    pub(super) fn abandon(&mut self) {
        self.abandoned = true;
        self.replay.clear();
        self.grant = ENDLESS;
        // What input there is, is all there will be.
        if !self.input_ended {
            self.input_ended = true;
            self.orders.push_back(CommandControl::Stdin { data: Bytes::new(), end: true });
        }
    }

    /// Whether a frame for the hub waits.
    pub(super) fn has_frame(&self) -> bool {
        self.ready
            && ((self.started.is_some() && !self.started_sent)
                || (self.replay.has_next() && self.send_credit > 0)
                || self.input_taken_unsaid > 0
                || (self.exit.is_some() && !self.exit_sent && !self.replay.has_next()))
    }

    /// The next frame for the hub; the exit is the last one.
    pub(super) fn next_frame(&mut self) -> Option<task_io_up::Frame> {
        if !self.ready {
            return None;
        }
        if let Some(started) = self.started.filter(|_| !self.started_sent) {
            self.started_sent = true;
            return Some(task_io_up::Frame::Started(started));
        }
        if self.input_taken_unsaid > 0 {
            let bytes = std::mem::take(&mut self.input_taken_unsaid);
            return Some(task_io_up::Frame::StdinCredit(v1::Credit { bytes }));
        }
        if let Some(Piece { stream, offset, data }) = self.replay.next(self.send_credit) {
            self.send_credit -= data.len() as u64;
            let stream =
                if stream == 0 { v1::OutputStream::Stdout } else { v1::OutputStream::Stderr };
            return Some(task_io_up::Frame::Output(v1::Output {
                stream: stream.into(),
                offset,
                data,
            }));
        }
        let exit = self.exit.clone().filter(|_| !self.exit_sent && !self.replay.has_next())?;
        self.exit_sent = true;
        Some(task_io_up::Frame::Exit(exit))
    }

    /// Takes a frame of the hub; `false` if it exceeds what may lie here.
    pub(super) fn accept(&mut self, frame: task_io_down::Frame) -> bool {
        match frame {
            task_io_down::Frame::Resume(resume) => {
                self.replay.rewind([resume.stdout_offset, resume.stderr_offset]);
                self.send_credit = resume.credit;
                self.ready = true;
                // What the hub takes from here on, over what was emitted and need not be sent again.
                let sent = self.emitted - self.replay.bytes();
                let allowed = sent.saturating_add(resume.credit);
                self.debt = self.granted.saturating_sub(allowed);
                let more = allowed.saturating_sub(self.granted);
                self.granted += more;
                self.grant = self.grant.saturating_add(more);
            }
            task_io_down::Frame::Credit(credit) => {
                self.replay.acknowledge(credit.bytes);
                self.send_credit = self.send_credit.saturating_add(credit.bytes);
                let owed = credit.bytes.min(self.debt);
                self.debt -= owed;
                self.granted = self.granted.saturating_add(credit.bytes - owed);
                self.grant = self.grant.saturating_add(credit.bytes - owed);
            }
            task_io_down::Frame::Stdin(v1::Stdin { data, end }) => {
                self.queued_input += data.len();
                self.input_received += data.len() as u64;
                self.input_ended |= end;
                self.orders.push_back(CommandControl::Stdin { data, end });
            }
            task_io_down::Frame::Signal(signal) => {
                // Signals do not wait behind input that the command does not read.
                if let Ok(number @ 1..=64) = i32::try_from(signal.number) {
                    self.orders.push_front(CommandControl::Signal(number));
                }
            }
            task_io_down::Frame::Resize(size) => {
                // Only the latest counts, and it does not wait behind input either.
                self.orders.retain(|waiting| !matches!(waiting, CommandControl::Resize(_)));
                self.orders.push_front(CommandControl::Resize(terminal_size(&size)));
            }
        }
        self.queued_input <= MAX_QUEUED_INPUT_BYTES && self.orders.len() <= MAX_QUEUED_FRAMES
    }

    /// Ends the command: TERM, then KILL.
    pub(super) fn cancel(&mut self, grace: Duration, cause: CancelCause) {
        self.urgent(CommandControl::Cancel { signal: 15, grace, cause });
    }

    /// An order that does not wait behind others.
    pub(super) fn urgent(&mut self, order: CommandControl) {
        self.orders.push_front(order);
    }

    /// Whether the command is to be told something.
    pub(super) fn has_order(&self) -> bool {
        self.grant > 0 || !self.orders.is_empty()
    }

    /// The next thing to tell the command.
    pub(super) fn next_order(&mut self) -> Option<CommandControl> {
        if self.grant > 0 {
            return Some(CommandControl::Credit(std::mem::take(&mut self.grant)));
        }
        let order = self.orders.pop_front()?;
        if let CommandControl::Stdin { data, .. } = &order {
            self.queued_input -= data.len();
        }
        Some(order)
    }
}

/// The end of a command as the protocol writes it.
pub(super) fn command_exit(exit: CommandExit) -> v1::TaskExit {
    let verdict = match exit.verdict {
        exec::CommandVerdict::Exited => v1::TaskVerdict::Exited,
        exec::CommandVerdict::Signalled => v1::TaskVerdict::Signalled,
        exec::CommandVerdict::TimeLimit => v1::TaskVerdict::TimeLimit,
        exec::CommandVerdict::Cancelled => v1::TaskVerdict::Cancelled,
        exec::CommandVerdict::Refused => v1::TaskVerdict::Refused,
        exec::CommandVerdict::NotFound => v1::TaskVerdict::NotFound,
        exec::CommandVerdict::Failed => v1::TaskVerdict::Failed,
    };
    v1::TaskExit {
        verdict: verdict.into(),
        exit_code: exit.exit_code.into(),
        signal: exit.signal.and_then(|n| u32::try_from(n).ok()).unwrap_or(0),
        stdout_bytes: exit.stdout_bytes,
        stdout_hash: Bytes::copy_from_slice(&exit.stdout_hash),
        stderr_bytes: exit.stderr_bytes,
        stderr_hash: Bytes::copy_from_slice(&exit.stderr_hash),
        reason: exit.reason.unwrap_or_default(),
        hint: exit.hint.unwrap_or_default(),
        duration_ms: u64::try_from(exit.duration.as_millis()).unwrap_or(u64::MAX),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(carrier: &mut Carrier, offset: u64, data: &'static [u8]) {
        let (stream, data) = (exec::OutputStream::Stdout, Bytes::from_static(data));
        carrier.event(CommandEvent::Output { stream, offset, data });
    }

    fn sent(carrier: &mut Carrier) -> Vec<(u64, Bytes)> {
        std::iter::from_fn(|| match carrier.next_frame() {
            Some(task_io_up::Frame::Output(output)) => Some((output.offset, output.data)),
            _ => None,
        })
        .collect()
    }

    fn resume(stdout_offset: u64, credit: u64) -> task_io_down::Frame {
        let resume = v1::TaskIoResume { stdout_offset, credit, stderr_offset: 0 };
        task_io_down::Frame::Resume(resume)
    }

    fn granted(carrier: &mut Carrier) -> u64 {
        match carrier.next_order() {
            Some(CommandControl::Credit(bytes)) => bytes,
            None => 0,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn output_goes_on_at_the_exact_byte_and_the_commands_credit_fits_the_new_stream() {
        let mut carrier = Carrier::new(8);
        carrier.opened();
        write(&mut carrier, 0, b"abcdef");
        assert_eq!(sent(&mut carrier), [(0, "abcdef".into())]);
        carrier.hello(TaskId::new(), true);
        write(&mut carrier, 6, b"gh");
        assert!(!carrier.has_frame(), "not before the hub has said where");
        // Four had arrived; the reader has dealt with three of them, and credit for that was lost.
        assert!(carrier.accept(resume(4, 7)));
        assert_eq!(sent(&mut carrier), [(4, "ef".into()), (6, "gh".into())]);
        assert_eq!(granted(&mut carrier), 3, "11 in all, 8 were granted");
        carrier.accept(task_io_down::Frame::Credit(v1::Credit { bytes: 2 }));
        assert_eq!(granted(&mut carrier), 2);
    }

    #[test]
    fn a_hub_that_takes_less_than_before_is_not_sent_more() {
        let mut carrier = Carrier::new(8);
        carrier.opened();
        write(&mut carrier, 0, b"abcdefgh");
        carrier.hello(TaskId::new(), true);
        assert!(carrier.accept(resume(0, 3)));
        assert_eq!(sent(&mut carrier), [(0, "abc".into())]);
        for _ in 0..5 {
            carrier.accept(task_io_down::Frame::Credit(v1::Credit { bytes: 1 }));
            assert_eq!(granted(&mut carrier), 0, "it has written that much already");
            assert_eq!(sent(&mut carrier).len(), 1);
        }
        carrier.accept(task_io_down::Frame::Credit(v1::Credit { bytes: 1 }));
        assert_eq!(granted(&mut carrier), 1);
    }

    #[test]
    fn the_end_is_said_again_in_each_stream_after_all_output() {
        let mut carrier = Carrier::new(8);
        carrier.opened();
        write(&mut carrier, 0, b"abc");
        carrier.end(v1::TaskExit::default());
        for _ in 0..2 {
            assert_eq!(sent(&mut carrier), [(0, "abc".into())]);
            assert!(carrier.exit_sent());
            carrier.hello(TaskId::new(), true);
            carrier.accept(resume(0, 8));
        }
    }

    #[test]
    fn a_task_that_nobody_waits_for_runs_to_its_end() {
        let mut carrier = Carrier::new(1);
        carrier.opened();
        write(&mut carrier, 0, b"a");
        carrier.abandon();
        assert_eq!(granted(&mut carrier), ENDLESS);
        write(&mut carrier, 1, b"bcd");
        assert_eq!(carrier.replay.bytes(), 0);
        assert!(matches!(carrier.next_order(), Some(CommandControl::Stdin { end: true, .. })));
    }
}
