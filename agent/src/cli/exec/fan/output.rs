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
    /// Output that may still be written; none once there was more.
    left: Option<u64>,
}

impl Open {
    /// How much of a piece is to be shown.
    fn show(&mut self, length: usize) -> usize {
        let Some(left) = self.left else { return 0 };
        let bytes = u64::try_from(length).unwrap_or(u64::MAX);
        self.left = left.checked_sub(bytes);
        if self.left.is_none() {
            self.lane.events.blocking_send(WriterEvent::TooMuch).ok();
            return usize::try_from(left).unwrap_or(length);
        }
        length
    }
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
            lanes.insert(turn.lane, Open { lane, end: LaneEnd::default(), left: Some(most_bytes) });
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
            let shown = open.show(piece.data.len());
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
            if !turn.abandoned {
                failure.unless(|| {
                    end.captured = destination.end(&lane.name)?;
                    destination.flush()
                });
            }
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

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use cortex_proto::v1::Output;
    use tokio::sync::mpsc;

    use super::super::captured::Documents;
    use super::*;
    use crate::cli::exec::writer::OutputTo as _;

    #[test]
    fn more_than_is_wanted_is_told_once_and_cut_wherever_pieces_end() {
        let cases: [(&[usize], usize, usize); 4] =
            [(&[4, 4], 8, 0), (&[4, 5], 8, 1), (&[8, 1, 1], 8, 1), (&[100], 8, 1)];
        for (pieces, kept, told) in cases {
            let board = Board::default();
            let (events, mut heard) = mpsc::channel(16);
            let (done, mut end) = oneshot::channel();
            let input = board.open(Lane { name: "a".to_owned(), events, done });
            let mut offset = 0;
            for length in pieces {
                let data = Bytes::from(vec![b'x'; *length]);
                input.push(Output { stream: 0, offset, data }, u64::MAX);
                offset += u64::try_from(*length).unwrap();
            }
            input.close();
            board.close();
            write_all(&board, Box::<Documents>::default(), 8, oneshot::channel().0);
            assert_eq!(end.try_recv().unwrap().captured.stdout.len(), kept, "{pieces:?}");
            let (mut too_much, mut written) = (0, 0);
            while let Ok(event) = heard.try_recv() {
                match event {
                    WriterEvent::TooMuch => too_much += 1,
                    WriterEvent::Written(bytes) => written += bytes,
                    other => panic!("{other:?}"),
                }
            }
            assert_eq!((too_much, written), (told, offset), "{pieces:?}");
        }
    }
}
