//! An operation on files that an operator wants: its stream, and the books of what is under way.
//!
//! The work itself blocks, and is done by [`crate::files`] on a thread of its own; this task reads the
//! stream in a loop that never waits for it, and sends what it has as far as the reader has given
//! credit. Both directions hold a window's worth of bytes at most. When the stream ends, the thread
//! finds nobody to talk to, and ends.

use std::path::PathBuf;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use cortex_proto::v1::node_client::NodeClient;
use cortex_proto::v1::{self, file_io_down, file_io_up, file_request};
use cortex_proto::{FILE_WINDOW_BYTES, MAX_OUTPUT_FRAME_BYTES};
use cortex_shared::ids::WorkspaceId;
use cortex_shared::wire_path::WirePath;
use prost::Message as _;
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Status, Streaming};

use super::request::Refusal;
use super::workspaces::Workspaces;
use crate::files::{self, Action, Caller, Done, Expected, FileError, Info, Piece, Place, Request};
use crate::root_dir::FileKind;

/// Operations at the same time; each has a thread, and a removal of a tree up to 200 descriptors.
pub(super) const MAX_FILE_WORK: usize = 32;
/// How long the hub may take to take the stream, and to say what is wanted.
const OPEN_TIMEOUT: Duration = Duration::from_secs(15);
/// How long the stream may take to end once everything is said.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(15);
/// Frames between the thread and the stream; their bytes are bounded by the window.
const FRAMES: usize = 4;
/// Content is acknowledged in portions of this size: a few of them make a window.
const PORTION_BYTES: u64 = FILE_WINDOW_BYTES / 4;

type Up = mpsc::Sender<v1::FileIoUp>;

/// What one operation needs of the daemon.
pub(super) struct FileWork {
    /// `None` if there are too many already.
    pub(super) slot: Option<OwnedSemaphorePermit>,
    pub(super) workspaces: Workspaces,
    /// What no workspace may show.
    pub(super) forbidden: Vec<PathBuf>,
}

impl FileWork {
    /// Opens the stream, does what is asked for, and says how it went.
    pub(super) async fn run(self, client: NodeClient<Channel>, request_id: Bytes) {
        let opening = open(client, request_id);
        let (up, mut down, request) = match tokio::time::timeout(OPEN_TIMEOUT, opening).await {
            Ok(Ok(opened)) => opened,
            Ok(Err(status)) => {
                return tracing::debug!(%status, "the hub did not take an operation on files");
            }
            Err(_) => return tracing::debug!("the hub did not say what it wants of files"),
        };
        let (frames, answers) = mpsc::channel(FRAMES);
        let (pieces, input) = mpsc::channel(FRAMES);
        let work = tokio::task::spawn_blocking(move || {
            let mut caller = BlockingCaller { frames, input, untold: 0 };
            let last = match self.perform(request, &mut caller) {
                Ok(done) => file_io_up::Frame::Done(wire_done(done)),
                Err(error) => {
                    tracing::debug!(%error, "an operation on files was not done");
                    file_io_up::Frame::Refused(refused(&error))
                }
            };
            // Nobody may be there to hear it.
            caller.frames.blocking_send(last).ok();
        });
        let books =
            Books { credit: FILE_WINDOW_BYTES, pending: BytesMut::new(), ..Books::default() };
        let finished = books.carry(&up, &mut down, answers, pieces).await;
        drop(up);
        if finished {
            // The hub closes the stream once it has read the last frame.
            let closed = async { while let Ok(Some(_)) = down.message().await {} };
            tokio::time::timeout(CLOSE_TIMEOUT, closed).await.ok();
        }
        drop(down);
        // The slot is free when the thread has ended.
        if work.await.is_err() {
            tracing::error!("an operation on files panicked");
        }
    }

    fn perform(
        self,
        request: v1::FileRequest,
        caller: &mut BlockingCaller,
    ) -> Result<Done, FileError> {
        let Some(_slot) = &self.slot else {
            let (name, why) = ("this node".to_owned(), "too many operations on files at a time");
            return Err(FileError::TooMuch { name, why });
        };
        let id = WorkspaceId::from_slice(&request.workspace_id)
            .map_err(|_| FileError::Invalid("workspace id"))?;
        let name = request.workspace.clone();
        let request = domain_request(request)?;
        let config = self.workspaces.files_of(id, &name, request.action.is_change());
        let config = config.map_err(|refusal| unusable(&refusal))?;
        let place = Place::open(config, &self.forbidden)?;
        files::perform(&place, &request, caller)
    }
}

fn unusable(refusal: &Refusal) -> FileError {
    FileError::Unusable { reason: refusal.to_string(), hint: refusal.hint() }
}

async fn open(
    mut client: NodeClient<Channel>,
    request_id: Bytes,
) -> Result<(Up, Streaming<v1::FileIoDown>, v1::FileRequest), Status> {
    let (up, frames) = mpsc::channel(FRAMES);
    let hello = file_io_up::Frame::Hello(v1::FileIoHello { request_id });
    up.try_send(v1::FileIoUp { frame: Some(hello) }).expect("a new channel has room");
    let mut down = client.file_io(ReceiverStream::new(frames)).await?.into_inner();
    match down.message().await?.and_then(|first| first.frame) {
        Some(file_io_down::Frame::Request(request)) => Ok((up, down, request)),
        _ => Err(Status::invalid_argument("the first frame is the request")),
    }
}

/// What is under way, in both directions.
#[derive(Default)]
struct Books {
    /// What may be sent.
    credit: u64,
    /// The next frame, which has to wait for credit.
    held: Option<(u64, file_io_up::Frame)>,
    /// What has arrived and waits for the thread.
    pending: BytesMut,
    end: Option<Piece>,
    /// Content that has arrived and that the thread has not acknowledged.
    unacknowledged: u64,
}

impl Books {
    /// Carries frames between the thread and the hub; whether it ended with the last one.
    async fn carry(
        mut self,
        up: &Up,
        down: &mut Streaming<v1::FileIoDown>,
        mut answers: mpsc::Receiver<file_io_up::Frame>,
        pieces: mpsc::Sender<Piece>,
    ) -> bool {
        loop {
            let sendable = self.held.as_ref().is_some_and(|(cost, _)| *cost <= self.credit);
            let deliverable = !self.pending.is_empty() || self.end.is_some();
            tokio::select! {
                message = down.message() => match message {
                    Ok(Some(message)) => if !self.hear(message) {
                        tracing::warn!("an operation on files broke its bounds");
                        return false;
                    },
                    Ok(None) | Err(_) => return false,
                },
                permit = up.reserve(), if sendable => {
                    let (Ok(permit), Some((cost, frame))) = (permit, self.held.take()) else {
                        return false;
                    };
                    self.credit -= cost;
                    let last =
                        matches!(frame, file_io_up::Frame::Done(_) | file_io_up::Frame::Refused(_));
                    permit.send(v1::FileIoUp { frame: Some(frame) });
                    if last {
                        return true;
                    }
                }
                answer = answers.recv(), if self.held.is_none() => match answer {
                    Some(frame) => {
                        if let file_io_up::Frame::Credit(credit) = &frame {
                            self.unacknowledged = self.unacknowledged.saturating_sub(credit.bytes);
                        }
                        self.held = Some((cost(&frame), frame));
                    }
                    None => return false,
                },
                permit = pieces.reserve(), if deliverable && !pieces.is_closed() => match permit {
                    Ok(permit) if !self.pending.is_empty() => {
                        let most = self.pending.len().min(MAX_OUTPUT_FRAME_BYTES);
                        permit.send(Piece::Data(self.pending.split_to(most).freeze()));
                    }
                    Ok(permit) => if let Some(end) = self.end.take() {
                        permit.send(end);
                    },
                    // It has seen enough, and says so.
                    Err(_) => {}
                },
            }
        }
    }

    /// Takes a frame of the hub; `false` if it is more than there may be.
    fn hear(&mut self, message: v1::FileIoDown) -> bool {
        match message.frame {
            Some(file_io_down::Frame::Credit(credit)) => {
                self.credit = self.credit.saturating_add(credit.bytes).min(FILE_WINDOW_BYTES);
            }
            Some(file_io_down::Frame::Data(data)) => {
                self.unacknowledged += data.data.len() as u64;
                if self.unacknowledged > FILE_WINDOW_BYTES || self.end.is_some() {
                    return false;
                }
                self.pending.extend_from_slice(&data.data);
                if data.end {
                    let Ok(hash) = <[u8; 32]>::try_from(data.hash.as_ref()) else { return false };
                    self.end = Some(Piece::End { bytes: data.total_bytes, hash });
                }
            }
            Some(file_io_down::Frame::Request(_)) | None => {}
        }
        true
    }
}

/// What a frame takes of the window.
fn cost(frame: &file_io_up::Frame) -> u64 {
    let bytes = match frame {
        file_io_up::Frame::Data(data) => data.data.len(),
        file_io_up::Frame::Entries(entries) => entries.encoded_len(),
        _ => 0,
    };
    bytes as u64
}

/// The caller, as the thread sees it.
struct BlockingCaller {
    frames: mpsc::Sender<file_io_up::Frame>,
    input: mpsc::Receiver<Piece>,
    /// Content that was taken, of which nothing was said yet.
    untold: u64,
}

impl BlockingCaller {
    fn send(&mut self, frame: file_io_up::Frame) -> Result<(), FileError> {
        self.frames.blocking_send(frame).map_err(|_| FileError::Gone)
    }
}

impl Caller for BlockingCaller {
    fn entries(&mut self, entries: Vec<Info>) -> Result<(), FileError> {
        let entries = entries.into_iter().map(wire_info).collect();
        self.send(file_io_up::Frame::Entries(v1::FileEntries { entries }))
    }

    fn data(&mut self, data: Bytes) -> Result<(), FileError> {
        self.send(file_io_up::Frame::Data(v1::FileData { data, ..Default::default() }))
    }

    fn taken(&mut self, bytes: u64) -> Result<(), FileError> {
        self.untold += bytes;
        if self.untold < PORTION_BYTES {
            return Ok(());
        }
        let bytes = std::mem::take(&mut self.untold);
        self.send(file_io_up::Frame::Credit(v1::Credit { bytes }))
    }

    fn next(&mut self) -> Result<Piece, FileError> {
        self.input.blocking_recv().ok_or(FileError::Gone)
    }

    fn is_there(&self) -> Result<(), FileError> {
        if self.frames.is_closed() { Err(FileError::Gone) } else { Ok(()) }
    }
}

/// A request, checked. Everything the hub sends is.
fn domain_request(request: v1::FileRequest) -> Result<Request, FileError> {
    let path = match request.path.as_ref() {
        [] => None,
        path => Some(WirePath::new(path).map_err(|_| FileError::Invalid("path"))?),
    };
    let action = match request.action.ok_or(FileError::Invalid("there is no action"))? {
        file_request::Action::List(list) => {
            Action::List { after: list.after.to_vec(), limit: list.limit }
        }
        file_request::Action::Read(read) => Action::Read {
            offset: read.offset,
            length: if read.length == 0 { u64::MAX } else { read.length },
        },
        file_request::Action::Stat(stat) => Action::Stat { hash: stat.hash },
        file_request::Action::Write(write) => {
            if write.mode > 0o777 {
                return Err(FileError::Invalid("permission bits"));
            }
            let expected = match (write.expected_hash.as_ref(), write.must_be_absent) {
                ([], false) => Expected::Anything,
                ([], true) => Expected::Absent,
                (hash, false) => {
                    Expected::Content(hash.try_into().map_err(|_| FileError::Invalid("hash"))?)
                }
                (_, true) => return Err(FileError::Invalid("absent, and with a hash")),
            };
            Action::Write { expected, mode: write.has_mode.then_some(write.mode) }
        }
        file_request::Action::Remove(remove) => Action::Remove { recursive: remove.recursive },
        file_request::Action::MakeDirectory(make) => {
            Action::MakeDirectory { parents: make.parents }
        }
    };
    Ok(Request { path, action })
}

fn wire_info(info: Info) -> v1::FileInfo {
    let kind = match info.kind {
        FileKind::File => v1::FileKind::File,
        FileKind::Dir => v1::FileKind::Directory,
        FileKind::Link => v1::FileKind::Link,
        FileKind::Other => v1::FileKind::Other,
    };
    v1::FileInfo {
        name: info.name.into(),
        kind: kind.into(),
        size: info.size,
        mode: info.mode,
        mtime_ns: info.mtime_ns,
        uid: info.uid,
        gid: info.gid,
        target: info.target.into(),
        hash: info.hash.map(|hash| hash.to_vec().into()).unwrap_or_default(),
    }
}

fn wire_done(done: Done) -> v1::FileDone {
    let (bytes, hash) = done.content.unzip();
    v1::FileDone {
        info: done.info.map(wire_info),
        bytes: bytes.unwrap_or_default(),
        hash: hash.map(|hash| hash.to_vec().into()).unwrap_or_default(),
        more: done.more,
        count: done.count,
        changed: done.changed,
    }
}

fn refused(error: &FileError) -> v1::FileRefused {
    v1::FileRefused {
        kind: kind(error).into(),
        reason: error.to_string(),
        hint: error.hint().to_owned(),
    }
}

fn kind(error: &FileError) -> v1::FileRefusal {
    match error {
        FileError::NotFound { .. } => v1::FileRefusal::NotFound,
        FileError::WrongKind { .. } | FileError::IsDirectory { .. } => v1::FileRefusal::WrongKind,
        FileError::Exists { .. } => v1::FileRefusal::Exists,
        FileError::Changed { .. } | FileError::Raced { .. } => v1::FileRefusal::Changed,
        FileError::Protected { .. } => v1::FileRefusal::Protected,
        FileError::TooMuch { .. } => v1::FileRefusal::TooMuch,
        FileError::Invalid(_) | FileError::TheWorkspaceItself => v1::FileRefusal::Invalid,
        FileError::Unusable { .. } => v1::FileRefusal::Unusable,
        FileError::Partly { source, .. } => kind(source),
        FileError::Damaged | FileError::Gone => v1::FileRefusal::Failed,
        FileError::Io { source, .. } => match source.kind() {
            std::io::ErrorKind::PermissionDenied => v1::FileRefusal::Denied,
            std::io::ErrorKind::StorageFull
            | std::io::ErrorKind::QuotaExceeded
            | std::io::ErrorKind::FileTooLarge => v1::FileRefusal::NoSpace,
            _ => v1::FileRefusal::Failed,
        },
    }
}
