//! What the reader of a task gets: what it lacks from the spool, then what comes.

use std::collections::VecDeque;
use std::sync::Arc;

use cortex_proto::v1;
use cortex_proto::v1::{ExecDown, exec_down};
use cortex_shared::replay::Piece;
use futures_util::{Stream, stream};
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::{Code, Status};

use crate::grpc::status::refuse;
use crate::task::relay::{Relay, Task};
use crate::task::spool::SpoolReader;
use crate::task::to_reader::{Attached, End, ReaderFrame, ToReader, wire};

/// The reader of a task, as long as its stream lasts.
pub(super) struct Reader {
    pub(super) to_reader: Arc<ToReader>,
    pub(super) number: u64,
    /// The running task, which has to know when its reader goes away; none for one that has ended.
    pub(super) running: Option<(Arc<Task>, Arc<Relay>)>,
    /// Cancelled when it goes away: who never ends its half of the call keeps nothing alive.
    pub(super) _gone: DropGuard,
}

impl Drop for Reader {
    fn drop(&mut self) {
        if let Some((task, relay)) = &self.running {
            relay.reader_lost(task, self.number);
        }
    }
}

/// What a reader that came back lacks of what came before.
pub(super) struct Missed {
    spool: SpoolReader,
    /// From these offsets of each stream on, up to those that come by themselves.
    has: [u64; 2],
    until: [u64; 2],
    pieces: VecDeque<Piece>,
    done: bool,
}

impl Missed {
    pub(super) fn new(spool: SpoolReader, has: [u64; 2], attached: Attached) -> Self {
        let until = attached.live_from;
        let done = has[0] >= until[0] && has[1] >= until[1];
        Self { spool, has, until, pieces: VecDeque::new(), done }
    }

    /// The next piece of it; `None` if there is none, or no more than what is kept.
    async fn next(self: Box<Self>) -> (Option<Box<Self>>, Option<Piece>) {
        let mut this = self;
        while !this.done {
            if let Some(piece) = this.pieces.pop_front() {
                let (has, until) = (this.has[piece.stream], this.until[piece.stream]);
                let Some(mut piece) = piece.from(has) else { continue };
                let left = until.saturating_sub(piece.offset);
                piece.data.truncate(usize::try_from(left).unwrap_or(usize::MAX));
                if !piece.data.is_empty() {
                    return (Some(this), Some(piece));
                }
                continue;
            }
            let read = tokio::task::spawn_blocking(move || {
                let pieces = this.spool.read();
                (this, pieces)
            });
            // Lost only by a panic, and then there is nothing more to be had from it.
            let Ok((back, pieces)) = read.await else { return (None, None) };
            this = back;
            match pieces {
                Ok(pieces) => {
                    this.done = pieces.is_empty();
                    this.pieces = pieces.into();
                }
                // What is missing shows in the offsets; the reader says that it is incomplete.
                Err(error) => {
                    tracing::warn!(%error, "the output of a task cannot be read");
                    this.done = true;
                }
            }
        }
        (None, None)
    }
}

struct State {
    reader: Reader,
    accepted: Option<v1::ExecAccepted>,
    missed: Option<Box<Missed>>,
    /// A piece from the spool that waits for the reader's credit.
    waiting: Option<Piece>,
    stop: CancellationToken,
    over: bool,
}

/// The frames of a reader, until the end, another reader, or the end of the hub.
pub(super) fn frames(
    reader: Reader,
    accepted: v1::ExecAccepted,
    missed: Option<Missed>,
    stop: CancellationToken,
) -> impl Stream<Item = Result<ExecDown, Status>> + Send {
    let state = State {
        reader,
        accepted: Some(accepted),
        missed: missed.map(Box::new),
        waiting: None,
        stop,
        over: false,
    };
    stream::unfold(state, |mut state| async move {
        if state.over {
            return None;
        }
        let stop = state.stop.clone();
        let next = tokio::select! {
            biased;
            next = next(&mut state) => next,
            () = stop.cancelled() => Some(Err(hub_stops())),
        };
        let frame = next?;
        state.over = frame.is_err();
        Some((frame.map(|frame| ExecDown { frame: Some(frame) }), state))
    })
}

/// Whoever gets this comes back to the next hub.
pub(in crate::grpc) fn hub_stops() -> Status {
    refuse(Code::Unavailable, "shutting_down", "the hub is shutting down; the command goes on")
}

async fn next(state: &mut State) -> Option<Result<exec_down::Frame, Status>> {
    if let Some(accepted) = state.accepted.take() {
        return Some(Ok(exec_down::Frame::Accepted(accepted)));
    }
    let (mailbox, number) = (Arc::clone(&state.reader.to_reader), state.reader.number);
    if state.waiting.is_none()
        && let Some(missed) = state.missed.take()
    {
        let (missed, piece) = missed.next().await;
        state.missed = missed;
        state.waiting = piece;
    }
    if let Some(piece) = &mut state.waiting {
        let credit = mailbox.take_credit(number, piece.data.len() as u64).await;
        let length = usize::try_from(credit).ok().filter(|length| *length > 0)?;
        let part = Piece { data: piece.data.split_to(length), ..*piece };
        piece.offset += credit;
        if piece.data.is_empty() {
            state.waiting = None;
        }
        return Some(Ok(exec_down::Frame::Output(wire(part))));
    }
    Some(Ok(match mailbox.next(number).await? {
        ReaderFrame::Started(started) => exec_down::Frame::Started(started),
        ReaderFrame::Output(output) => exec_down::Frame::Output(output),
        ReaderFrame::StdinCredit(bytes) => exec_down::Frame::StdinCredit(v1::Credit { bytes }),
        ReaderFrame::StdinResume(resume) => exec_down::Frame::StdinResume(resume),
        ReaderFrame::Interrupted(news) => exec_down::Frame::Interrupted(news),
        ReaderFrame::Resumed => exec_down::Frame::Resumed(v1::TaskResumed {}),
        ReaderFrame::End(End::Exit(exit)) => exec_down::Frame::Exit(exit),
        ReaderFrame::End(End::NotRecorded) => {
            return Some(Err(refuse(
                Code::Internal,
                "verdict_not_recorded",
                "the command ended, but the hub could not record how",
            )));
        }
    }))
}
