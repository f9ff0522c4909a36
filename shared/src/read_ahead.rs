//! Reading a connection in large pieces while much comes over it.
//!
//! rustls asks its connection for 4 KiB at a time, which is right for one that says little: ten thousand
//! of them cost a hub almost nothing. Under a flood it means four system calls for each record. So a
//! connection that had all that it was asked for is read ahead, into memory that it has until it says
//! little again.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf as _, BufMut as _, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_util::io::poll_read_buf;

/// What is read ahead at most: four of the largest TLS records.
const AHEAD_BYTES: usize = 64 * 1024;

/// A read that brings less says that the flood is over.
const LITTLE_BYTES: usize = 4 * 1024;

/// A connection that is read ahead under load. What is written goes straight through.
#[derive(Debug)]
pub struct ReadAhead<S> {
    stream: S,
    /// Read, and not asked for yet. Without memory unless much comes.
    ahead: BytesMut,
    /// Much comes: a read brought all that was asked for, and those since then not little.
    flows: bool,
}

impl<S> ReadAhead<S> {
    /// Nothing is read before somebody asks.
    pub fn new(stream: S) -> Self {
        Self { stream, ahead: BytesMut::new(), flows: false }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for ReadAhead<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let asked = buffer.remaining();
        if this.ahead.is_empty() {
            if !this.flows || asked >= AHEAD_BYTES {
                let poll = Pin::new(&mut this.stream).poll_read(context, buffer);
                this.flows = asked > 0 && buffer.remaining() == 0;
                return poll;
            }
            this.ahead.reserve(AHEAD_BYTES);
            let mut room = (&mut this.ahead).limit(AHEAD_BYTES);
            let read = ready!(poll_read_buf(Pin::new(&mut this.stream), context, &mut room))?;
            this.flows = read >= LITTLE_BYTES;
        }
        let piece = asked.min(this.ahead.len());
        buffer.put_slice(&this.ahead[..piece]);
        this.ahead.advance(piece);
        if !this.flows && this.ahead.is_empty() {
            this.ahead = BytesMut::new();
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for ReadAhead<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, pieces)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, duplex};

    use super::*;

    /// Reads in pieces of `piece` until the end.
    async fn read_all(mut stream: impl AsyncRead + Unpin, piece: usize) -> Vec<u8> {
        let (mut all, mut buffer) = (Vec::new(), vec![0; piece]);
        loop {
            match stream.read(&mut buffer).await.unwrap() {
                0 => return all,
                read => all.extend_from_slice(&buffer[..read]),
            }
        }
    }

    #[tokio::test]
    async fn every_byte_comes_once_and_in_order_however_it_is_asked_for() {
        let sent: Vec<u8> = (0..1_000_003_u32).map(|number| (number % 251) as u8).collect();
        for (piece, held) in [(1, 7), (4096, 200_000), (5, 1 << 20), (100_000, 4096), (4096, 4096)]
        {
            let (mut writer, reader) = duplex(held);
            let sending = async {
                writer.write_all(&sent).await.unwrap();
                drop(writer);
            };
            let ((), got) = tokio::join!(sending, read_all(ReadAhead::new(reader), piece));
            assert_eq!(got.len(), sent.len(), "{piece} of {held}");
            assert!(got == sent, "{piece} of {held}");
        }
    }

    #[tokio::test]
    async fn memory_is_had_only_while_much_comes() {
        let (mut writer, reader) = duplex(1 << 20);
        let mut stream = ReadAhead::new(reader);
        let mut buffer = [0; 4096];
        for _ in 0..3 {
            writer.write_all(&[1; 4095]).await.unwrap();
            assert_eq!(stream.read(&mut buffer).await.unwrap(), 4095);
            assert_eq!(stream.ahead.capacity(), 0, "little comes");
        }
        writer.write_all(&[2; 100_000]).await.unwrap();
        assert_eq!(stream.read(&mut buffer).await.unwrap(), 4096);
        assert_eq!(stream.read(&mut buffer).await.unwrap(), 4096);
        assert_eq!(stream.ahead.len(), AHEAD_BYTES - 4096, "much comes");
        let mut rest = vec![0; 100_000 - 8192];
        stream.read_exact(&mut rest).await.unwrap();
        assert!(stream.ahead.capacity() >= AHEAD_BYTES, "more may come at any moment");
        writer.write_all(&[3; 10]).await.unwrap();
        assert_eq!(stream.read(&mut buffer).await.unwrap(), 10);
        assert_eq!(stream.ahead.capacity(), 0, "little comes again");
    }
}
