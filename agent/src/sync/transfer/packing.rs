//! Reading chunks from files here and sending them to the hub in packs.

use std::collections::HashSet;
use std::io;
use std::os::unix::fs::FileExt as _;

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

use crate::root_dir::RootDir;
use crate::sync::core::{SyncError, waiting};
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
    root: RootDir,
    cancel: &CancellationToken,
    parcel: Parcel,
) -> Result<HashSet<WirePath>, SyncError> {
    let Parcel { files, missing } = parcel;
    let (sender, receiver) = mpsc::channel(QUEUED_PACKS);
    let packer = Packer {
        root,
        sender,
        missing,
        sent: Vec::new(),
        failed: HashSet::new(),
        cancel: cancel.clone(),
    };
    let packer = tokio::task::spawn_blocking(move || packer.run(files));
    let acknowledged = async {
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
    }
    .await;
    // The queue is closed by now, so the packer ends; its files are not left open behind us.
    let (sent, failed) = packer.await.map_err(|_| SyncError::Panicked)??;
    if acknowledged? != sent {
        return Err(HubError::protocol("acknowledged other packs than were sent").into());
    }
    Ok(failed)
}

struct Packer {
    root: RootDir,
    sender: mpsc::Sender<Bytes>,
    /// Chunks that are still to be packed.
    missing: HashSet<Digest>,
    /// Names of the packs handed over.
    sent: Vec<Digest>,
    failed: HashSet<WirePath>,
    cancel: CancellationToken,
}

impl Packer {
    /// Names of the packs, and the paths that could not be read as they should be.
    fn run(
        mut self,
        files: Vec<(WirePath, Vec<ChunkRef>)>,
    ) -> io::Result<(Vec<Digest>, HashSet<WirePath>)> {
        let mut builder = PackBuilder::new(COMPRESSION_LEVEL)?;
        let mut buffer = Vec::new();
        let mut open = true;
        for (path, chunks) in files {
            if !open || self.cancel.is_cancelled() {
                break;
            }
            if !chunks.iter().any(|chunk| self.missing.contains(&chunk.hash)) {
                continue;
            }
            let file = self.root.parent_of(&path).and_then(|(dir, leaf)| dir.open_file(leaf));
            let Ok(file) = file else {
                self.failed.insert(path);
                continue;
            };
            let mut offset = 0;
            for chunk in chunks {
                let start = offset;
                offset += u64::from(chunk.len);
                if !self.missing.contains(&chunk.hash) {
                    continue;
                }
                buffer.resize(chunk.len as usize, 0);
                let read = file.read_exact_at(&mut buffer, start);
                if read.is_err() || Digest::of(&buffer) != chunk.hash {
                    self.failed.insert(path);
                    break;
                }
                if builder.push(chunk, &buffer) == InPack::Full {
                    open = self.send(&mut builder);
                    builder.push(chunk, &buffer);
                }
                self.missing.remove(&chunk.hash);
                if !open {
                    break;
                }
            }
        }
        if open {
            self.send(&mut builder);
        }
        Ok((self.sent, self.failed))
    }

    /// Hands over a pack; false if nobody wants it any more.
    fn send(&mut self, builder: &mut PackBuilder) -> bool {
        let Some((name, pack)) = builder.finish() else { return true };
        self.sent.push(name);
        self.sender.blocking_send(pack).is_ok()
    }
}
