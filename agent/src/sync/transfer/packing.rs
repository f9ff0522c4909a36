//! Reading chunks from files here and sending them to the hub in packs.

use std::collections::HashSet;
use std::io;

use bytes::Bytes;
use cortex_shared::chunk::ChunkRef;
use cortex_shared::entry::Digest;
use cortex_shared::ids::WorkspaceId;
use cortex_shared::pack::{PackBuilder, Pushed as InPack};
use cortex_shared::wire_path::WirePath;
use futures_util::StreamExt as _;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;

use crate::root_dir::{FileHandle, RootDir};
use crate::sync::core::{SyncError, waiting};
use crate::sync::ground::Blocking;
use crate::sync::hub::{Hub, HubError};

/// Finished packs that wait for the line; with the one being built this bounds memory to 16 MiB.
const QUEUED_PACKS: usize = 2;
/// The fastest level worth its while: measured 470 MB/s at a ratio of 4.5 on source text.
const COMPRESSION_LEVEL: i32 = 1;

/// Chunks to be sent, and the files that hold them.
#[derive(Debug, Default)]
pub(in crate::sync) struct Parcel {
    pub(super) files: Vec<(WirePath, Vec<ChunkRef>)>,
    /// Those of their chunks that are to be sent.
    pub(super) missing: HashSet<Digest>,
}

impl Parcel {
    /// Whether there is nothing to be sent.
    pub(in crate::sync) fn is_empty(&self) -> bool {
        self.files.is_empty()
    }
}

/// Sends a parcel. Returns the paths whose files no longer hold what they should.
pub(in crate::sync) async fn send_packs<H: Hub>(
    hub: &H,
    workspace: WorkspaceId,
    blocking: Blocking,
    root: RootDir,
    cancel: &CancellationToken,
    parcel: Parcel,
) -> Result<HashSet<WirePath>, SyncError> {
    let (sender, receiver) = mpsc::channel(QUEUED_PACKS);
    let mut packer = Packer::new(root, cancel.clone(), parcel)?;
    let packed = async move {
        loop {
            let work = move || {
                let pack = packer.next_pack();
                (packer, pack)
            };
            let (back, pack) = blocking.run(work).await?;
            packer = back;
            let Some((name, pack)) = pack else { break };
            packer.sent.push(name);
            // If nobody wants it any more, who reads the answers knows why.
            if sender.send(pack).await.is_err() {
                break;
            }
        }
        Ok::<_, SyncError>((packer.sent, packer.failed))
    };
    let acknowledged = async move {
        let packs = ReceiverStream::new(receiver).boxed();
        let mut acks = waiting(cancel, hub, hub.put_packs(workspace, packs)).await?;
        let mut names = Vec::new();
        loop {
            let ack = async { acks.next().await.transpose() };
            match waiting(cancel, hub, ack).await? {
                Some(name) => names.push(name),
                None => break Ok::<_, SyncError>(names),
            }
        }
    };
    let (packed, acknowledged) = futures_util::future::join(packed, acknowledged).await;
    let (sent, failed) = packed?;
    if acknowledged? != sent {
        return Err(HubError::protocol("acknowledged other packs than were sent").into());
    }
    Ok(failed)
}

/// A file that is being read.
struct Open {
    path: WirePath,
    file: FileHandle,
    chunks: std::vec::IntoIter<ChunkRef>,
    /// Where the next chunk begins.
    offset: u64,
}

/// Makes one pack after the other.
struct Packer {
    root: RootDir,
    files: std::vec::IntoIter<(WirePath, Vec<ChunkRef>)>,
    open: Option<Open>,
    /// Chunks that are still to be packed.
    missing: HashSet<Digest>,
    builder: PackBuilder,
    buffer: Vec<u8>,
    /// Names of the packs handed over.
    sent: Vec<Digest>,
    /// Paths that could not be read as they should be.
    failed: HashSet<WirePath>,
    cancel: CancellationToken,
}

impl Packer {
    fn new(root: RootDir, cancel: CancellationToken, parcel: Parcel) -> io::Result<Self> {
        let Parcel { files, missing } = parcel;
        Ok(Self {
            root,
            files: files.into_iter(),
            open: None,
            missing,
            builder: PackBuilder::new(COMPRESSION_LEVEL)?,
            buffer: Vec::new(),
            sent: Vec::new(),
            failed: HashSet::new(),
            cancel,
        })
    }

    /// The next pack with its name; `None` after the last.
    fn next_pack(&mut self) -> Option<(Digest, Bytes)> {
        loop {
            if self.cancel.is_cancelled() {
                return None;
            }
            if self.open.is_none() && !self.open_next() {
                return self.builder.finish();
            }
            let open = self.open.as_mut()?;
            let Some(chunk) = open.chunks.next() else {
                self.open = None;
                continue;
            };
            let start = open.offset;
            open.offset += u64::from(chunk.len);
            if !self.missing.contains(&chunk.hash) {
                continue;
            }
            self.buffer.resize(chunk.len as usize, 0);
            let read = open.file.read_exact_at(&mut self.buffer, start);
            if read.is_err() || Digest::of(&self.buffer) != chunk.hash {
                self.failed.insert(open.path.clone());
                self.open = None;
                continue;
            }
            self.missing.remove(&chunk.hash);
            if self.builder.push(chunk, &self.buffer) == InPack::Full {
                let full = self.builder.finish();
                self.builder.push(chunk, &self.buffer);
                return full;
            }
        }
    }

    /// Opens the next file of which something is missing; false if there is none.
    fn open_next(&mut self) -> bool {
        for (path, chunks) in self.files.by_ref() {
            if !chunks.iter().any(|chunk| self.missing.contains(&chunk.hash)) {
                continue;
            }
            match self.root.parent_of(&path).and_then(|(dir, leaf)| dir.open_file(leaf)) {
                Ok(file) => {
                    self.open = Some(Open { path, file, chunks: chunks.into_iter(), offset: 0 });
                    return true;
                }
                Err(_) => {
                    self.failed.insert(path);
                }
            }
        }
        false
    }
}
