//! The private socket between agent and stage: whole messages, descriptors beside the first.
//!
//! The stage's ends here block; the agent's end is in [`super::launch`]. End of file means that
//! the other side is gone, which ends the command.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::memory_file;
use super::spec::{MAX_MESSAGE_BYTES, MAX_SPEC_BYTES};

/// Most descriptors beside one message: a long specification, standard output, error and input, the
/// script, the workspace.
const MAX_DESCRIPTORS: usize = 6;

/// Sends one message.
pub(super) fn send<M: Serialize>(socket: impl AsFd, message: &M) -> io::Result<()> {
    let bytes = serde_json::to_vec(message)?;
    if bytes.len() > MAX_MESSAGE_BYTES {
        return Err(io::Error::other("message for the control socket is too long"));
    }
    rustix::net::send(socket, &bytes, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// Receives one message; `None` at the end of the stream.
pub(super) fn receive<M: DeserializeOwned>(
    socket: impl AsFd,
    flags: RecvFlags,
) -> io::Result<Option<M>> {
    let mut buffer = vec![0; MAX_MESSAGE_BYTES];
    let (length, _) = rustix::net::recv(socket, buffer.as_mut_slice(), flags)?;
    if length == 0 {
        return Ok(None);
    }
    Ok(Some(serde_json::from_slice(&buffer[..length])?))
}

/// Sends one message with a descriptor beside it.
pub(super) fn send_with_descriptor<M: Serialize>(
    socket: impl AsFd,
    message: &M,
    fd: BorrowedFd<'_>,
) -> io::Result<()> {
    let bytes = serde_json::to_vec(message)?;
    send_beside(socket, &bytes, &[fd])
}

/// Receives one message and the descriptor beside it, if there is one; `None` at the end of the
/// stream.
pub(super) fn receive_with_descriptor<M: DeserializeOwned>(
    socket: impl AsFd,
) -> io::Result<Option<(M, Option<OwnedFd>)>> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut buffer = vec![0; MAX_MESSAGE_BYTES];
    let received = loop {
        let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
        match rustix::net::recvmsg(
            &socket,
            &mut [IoSliceMut::new(&mut buffer)],
            &mut control,
            flags,
        ) {
            // The other side left without reading all. Said once; what it wrote itself comes next.
            Err(rustix::io::Errno::CONNRESET | rustix::io::Errno::INTR) => {}
            result => break result?,
        }
    };
    if received.bytes == 0 {
        return Ok(None);
    }
    let message = serde_json::from_slice(&buffer[..received.bytes])?;
    let fd = descriptors(&mut control).next();
    Ok(Some((message, fd)))
}

/// A message of any length, ready to be sent.
#[derive(Debug)]
pub(super) enum Document {
    Short(Vec<u8>),
    /// It travels in a memory file.
    Long(OwnedFd),
}

impl Document {
    /// Writes `content`; `None` if that is longer than [`MAX_SPEC_BYTES`].
    pub(super) fn new(content: &impl Serialize) -> io::Result<Option<Self>> {
        let bytes = serde_json::to_vec(content)?;
        Ok(match u64::try_from(bytes.len()) {
            Ok(length) if length <= MAX_SPEC_BYTES => Some(if bytes.len() <= MAX_MESSAGE_BYTES {
                Self::Short(bytes)
            } else {
                Self::Long(memory_file::sealed(&bytes)?)
            }),
            _ => None,
        })
    }

    /// Sends it with descriptors beside it.
    pub(super) fn send(&self, socket: impl AsFd, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        match self {
            Self::Short(bytes) => send_beside(socket, bytes, fds),
            Self::Long(file) => {
                let fds: Vec<_> =
                    std::iter::once(file.as_fd()).chain(fds.iter().copied()).collect();
                send_beside(socket, IN_A_FILE, &fds)
            }
        }
    }
}

/// The message beside a document that is in a memory file. No document begins so.
const IN_A_FILE: &[u8] = &[0];

/// Receives what [`Document::send`] sent; `None` at the end of the stream.
pub(super) fn receive_document<M: DeserializeOwned>(
    socket: impl AsFd,
) -> io::Result<Option<(M, Vec<OwnedFd>)>> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut buffer = vec![0; MAX_MESSAGE_BYTES];
    let received = loop {
        let flags = RecvFlags::CMSG_CLOEXEC;
        match rustix::net::recvmsg(
            &socket,
            &mut [IoSliceMut::new(&mut buffer)],
            &mut control,
            flags,
        ) {
            Err(rustix::io::Errno::INTR) => {}
            result => break result?,
        }
    };
    if received.bytes == 0 {
        return Ok(None);
    }
    let mut fds: Vec<_> = descriptors(&mut control).collect();
    let bytes = &buffer[..received.bytes];
    let content = if bytes == IN_A_FILE && !fds.is_empty() {
        serde_json::from_slice(&memory_file::read_sealed(&fds.remove(0), MAX_SPEC_BYTES)?)?
    } else {
        serde_json::from_slice(bytes)?
    };
    Ok(Some((content, fds)))
}

fn send_beside(socket: impl AsFd, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(io::Error::other("too many descriptors for one message"));
    }
    rustix::net::sendmsg(socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)?;
    Ok(())
}

fn descriptors(control: &mut RecvAncillaryBuffer<'_>) -> impl Iterator<Item = OwnedFd> {
    control
        .drain()
        .filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => Some(fds),
            _ => None,
        })
        .flatten()
}
