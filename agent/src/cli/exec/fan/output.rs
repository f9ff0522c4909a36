//! The one writer of many commands' output, on a thread that may block.

use std::collections::HashMap;
use std::io;

use cortex_proto::v1::OutputStream;
use tokio::sync::oneshot;

use super::board::{Board, Lane, LaneEnd};
use crate::cli::exec::writer::{Captured, WriterEvent};

/// Where output goes. Called by one thread.
pub(super) trait Destination: Send {
    /// Some output of a node.
    fn write(&mut self, node: &str, stream: OutputStream, data: &[u8]) -> io::Result<()>;

    /// All output of a node is written; what of it is wanted as a document.
    fn end(&mut self, node: &str) -> io::Result<Captured>;

    /// One round of work is done: what was gathered is to be seen now.
    fn flush(&mut self) -> io::Result<()>;

    /// All nodes have ended.
    fn finish(&mut self) -> io::Result<()>;
}

struct Open {
    lane: Lane,
    end: LaneEnd,
    /// Output that may still be written.
    left: u64,
}

/// Writes until the board is closed and empty. Blocks; for a thread of its own. The first error is
/// told at once, and nothing is written after it; but everything is still taken, so that commands
/// can end.
pub(super) fn write_all(
    board: &Board,
    mut destination: Box<dyn Destination>,
    most_bytes: u64,
    failed: oneshot::Sender<io::Error>,
) {
    let mut failure = Failure { tell: Some(failed) };
    let mut lanes: HashMap<usize, Open> = HashMap::new();
    while let Some(turn) = board.next() {
        if let Some(lane) = turn.opened {
            lanes.insert(turn.lane, Open { lane, end: LaneEnd::default(), left: most_bytes });
        }
        let Some(open) = lanes.get_mut(&turn.lane) else { continue };
        let mut bytes = 0;
        for piece in turn.pieces {
            let check = match piece.stream {
                OutputStream::Stdout => &mut open.end.check.stdout,
                OutputStream::Stderr => &mut open.end.check.stderr,
            };
            check.take(piece.offset, &piece.data);
            bytes += u64::try_from(piece.data.len()).unwrap_or(u64::MAX);
            let shown = usize::try_from(open.left).unwrap_or(usize::MAX).min(piece.data.len());
            if shown < piece.data.len() && open.left > 0 {
                open.lane.events.blocking_send(WriterEvent::TooMuch).ok();
            }
            open.left -= u64::try_from(shown).unwrap_or(open.left);
            failure
                .unless(|| destination.write(&open.lane.name, piece.stream, &piece.data[..shown]));
        }
        failure.unless(|| destination.flush());
        board.done(turn.lane, bytes);
        if bytes > 0 {
            open.lane.events.blocking_send(WriterEvent::Written(bytes)).ok();
        }
        if turn.ended
            && let Some(Open { lane, mut end, .. }) = lanes.remove(&turn.lane)
        {
            failure.unless(|| {
                end.captured = destination.end(&lane.name)?;
                destination.flush()
            });
            // Nobody waits for it any more: then nobody is told.
            lane.done.send(end).ok();
        }
    }
    failure.unless(|| destination.finish());
}

struct Failure {
    tell: Option<oneshot::Sender<io::Error>>,
}

impl Failure {
    fn unless(&mut self, act: impl FnOnce() -> io::Result<()>) {
        if self.tell.is_some()
            && let Err(error) = act()
            && let Some(tell) = self.tell.take()
        {
            tell.send(error).ok();
        }
    }
}
