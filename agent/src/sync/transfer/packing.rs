//! Reading chunks from files here and sending them to the hub in packs.

use std::collections::HashSet;
use std::io;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use cortex_shared::chunk::ChunkRef;
use cortex_shared::entry::Digest;
use cortex_shared::ids::WorkspaceId;
use cortex_shared::pack::{MAX_CHUNKS, MAX_RAW_BYTES, PackBuilder};
use cortex_shared::wire_path::WirePath;
use futures_util::StreamExt as _;
use futures_util::stream::FuturesOrdered;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;

use super::large::lock;
use crate::root_dir::{FileHandle, Parents, RootDir};
use crate::sync::core::{SyncError, waiting};
use crate::sync::ground::Blocking;
use crate::sync::hub::{Hub, HubError};

/// Finished packs that wait for the line. With those that are being made, of which there is one for
/// each of the cores ([`Blocking::at_once`]), this bounds memory to 48 MiB.
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
    let packed = pack_all(blocking, root, cancel.clone(), parcel, sender);
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

/// Makes packs, several at once, and hands them over in order. Returns their names, and the paths whose
/// files could not be read as they should be. None of the files is touched any more then.
async fn pack_all(
    blocking: Blocking,
    root: RootDir,
    cancel: CancellationToken,
    parcel: Parcel,
    sender: mpsc::Sender<Bytes>,
) -> Result<(Vec<Digest>, HashSet<WirePath>), SyncError> {
    let packer = Arc::new(Packer { root, cancel: cancel.clone(), idle: Mutex::default() });
    let mut contents = Contents::new(parcel);
    let mut packing = FuturesOrdered::new();
    let mut sent = Vec::new();
    let at_once = blocking.at_once();
    let result = loop {
        while packing.len() < at_once
            && !cancel.is_cancelled()
            && let Some(content) = contents.next_pack()
        {
            let packer = packer.clone();
            packing.push_back(blocking.run(move || packer.pack(content)));
        }
        let Some(packed) = packing.next().await else { break Ok(()) };
        let Packed { pack, failed } = match packed.and_then(|packed| Ok(packed?)) {
            Ok(packed) => packed,
            Err(error) => break Err(error),
        };
        contents.could_not_read(failed);
        let Some((name, pack)) = pack else { continue };
        sent.push(name);
        // If nobody wants it any more, who reads the answers knows why.
        if sender.send(pack).await.is_err() {
            break Ok(());
        }
    };
    cancel_rest(packing).await;
    result.map(|()| (sent, contents.failed_paths()))
}

/// Waits for what nobody wants any more, since it reads files.
async fn cancel_rest<T>(mut rest: FuturesOrdered<impl Future<Output = T>>) {
    while rest.next().await.is_some() {}
}

/// A chunk and where it is read.
struct Piece {
    /// Number of the file in the parcel.
    file: usize,
    path: Arc<WirePath>,
    chunk: ChunkRef,
    offset: u64,
}

/// What is still to be packed, file by file.
struct Contents {
    files: Vec<(Arc<WirePath>, Vec<ChunkRef>)>,
    /// Files that do not hold what they should.
    failed: HashSet<usize>,
    missing: HashSet<Digest>,
    /// Chunks that could not be read: other files may hold them as well.
    returned: HashSet<Digest>,
    /// The next chunk: its file, its number and its place there.
    at: (usize, usize, u64),
}

impl Contents {
    fn new(Parcel { files, missing }: Parcel) -> Self {
        let files = files.into_iter().map(|(path, chunks)| (Arc::new(path), chunks)).collect();
        let (failed, returned) = Default::default();
        Self { files, failed, missing, returned, at: (0, 0, 0) }
    }

    /// The content of the next pack: as much as fits.
    fn next_pack(&mut self) -> Option<Vec<Piece>> {
        let mut pieces = Vec::new();
        let mut bytes = 0;
        loop {
            let (file, number, offset) = self.at;
            let Some((path, chunks)) = self.files.get(file) else {
                if pieces.is_empty() && !self.returned.is_empty() {
                    // What failed is left out this time, so this comes to an end.
                    self.missing.extend(self.returned.drain());
                    self.at = (0, 0, 0);
                    continue;
                }
                break;
            };
            let chunk = match chunks.get(number) {
                Some(chunk) if !self.failed.contains(&file) => *chunk,
                _ => {
                    self.at = (file + 1, 0, 0);
                    continue;
                }
            };
            if self.missing.contains(&chunk.hash) {
                if bytes + chunk.len as usize > MAX_RAW_BYTES || pieces.len() == MAX_CHUNKS {
                    break;
                }
                self.missing.remove(&chunk.hash);
                bytes += chunk.len as usize;
                pieces.push(Piece { file, path: path.clone(), chunk, offset });
            }
            self.at = (file, number + 1, offset + u64::from(chunk.len));
        }
        Some(pieces).filter(|pieces| !pieces.is_empty())
    }

    /// Takes back chunks that could not be read where they should be.
    fn could_not_read(&mut self, pieces: Vec<Piece>) {
        for Piece { file, chunk, .. } in pieces {
            self.failed.insert(file);
            self.returned.insert(chunk.hash);
        }
    }

    fn failed_paths(&self) -> HashSet<WirePath> {
        self.failed.iter().map(|&file| WirePath::clone(&self.files[file].0)).collect()
    }
}

/// A pack with its name, if anything came into it, and what could not be read.
struct Packed {
    pack: Option<(Digest, Bytes)>,
    failed: Vec<Piece>,
}

/// Makes packs. Its work may be done on several threads at once.
struct Packer {
    root: RootDir,
    cancel: CancellationToken,
    /// What is used again: a builder and a buffer for each thread.
    idle: Mutex<Vec<(PackBuilder, Vec<u8>)>>,
}

impl Packer {
    fn pack(&self, pieces: Vec<Piece>) -> io::Result<Packed> {
        let (mut builder, mut buffer) = match lock(&self.idle).pop() {
            Some(idle) => idle,
            None => (PackBuilder::new(COMPRESSION_LEVEL)?, Vec::new()),
        };
        let mut failed = Vec::new();
        let mut parents = self.root.parents();
        let mut open: Option<(usize, io::Result<FileHandle>)> = None;
        for piece in pieces {
            if self.cancel.is_cancelled() {
                // Whoever reads the answers says so.
                return Ok(Packed { pack: None, failed });
            }
            let Piece { file: number, ref path, chunk, offset } = piece;
            let (_, file) = match open.take_if(|(opened, _)| *opened == number) {
                Some(opened) => open.insert(opened),
                None => open.insert((number, open_file(&mut parents, path))),
            };
            buffer.resize(chunk.len as usize, 0);
            let read = file.as_ref().is_ok_and(|file| {
                file.read_exact_at(&mut buffer, offset).is_ok() && Digest::of(&buffer) == chunk.hash
            });
            if read {
                builder.push(chunk, &buffer);
            } else {
                failed.push(piece);
            }
        }
        let pack = builder.finish();
        lock(&self.idle).push((builder, buffer));
        Ok(Packed { pack, failed })
    }
}

fn open_file(parents: &mut Parents, path: &WirePath) -> io::Result<FileHandle> {
    let (directory, leaf) = parents.of(path)?;
    directory.open_file(leaf)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chunk(number: u32, len: u32) -> ChunkRef {
        ChunkRef { hash: Digest::of(&number.to_be_bytes()), len }
    }

    fn of(files: &[&[ChunkRef]]) -> Parcel {
        let name = |number: usize| WirePath::new(format!("f{number}")).unwrap();
        let files: Vec<_> =
            files.iter().enumerate().map(|(n, chunks)| (name(n), chunks.to_vec())).collect();
        let missing = files.iter().flat_map(|(_, chunks)| chunks).map(|chunk| chunk.hash).collect();
        Parcel { files, missing }
    }

    fn places(pieces: &[Piece]) -> Vec<(usize, u64)> {
        pieces.iter().map(|piece| (piece.file, piece.offset)).collect()
    }

    #[test]
    fn packs_are_filled_in_order_and_each_chunk_is_sent_once() {
        let mib = 1 << 20;
        let (a, b, c) = (chunk(1, 2 * mib), chunk(2, mib), chunk(3, 3 * mib / 2));
        let mut parcel = of(&[&[a, b, a], &[b, c, a, chunk(4, 1)]]);
        parcel.missing.remove(&chunk(4, 1).hash);
        let mut contents = Contents::new(parcel);
        assert_eq!(places(&contents.next_pack().unwrap()), [(0, 0), (0, u64::from(2 * mib))]);
        assert_eq!(places(&contents.next_pack().unwrap()), [(1, u64::from(mib))]);
        assert!(contents.next_pack().is_none());
        let small: Vec<_> = (0..10_000).map(|number| chunk(number, 7)).collect();
        let mut contents = Contents::new(of(&[&small]));
        let packs: Vec<_> = std::iter::from_fn(|| contents.next_pack()).map(|p| p.len()).collect();
        assert_eq!(packs, [MAX_CHUNKS, 10_000 - MAX_CHUNKS]);
    }

    #[test]
    fn a_chunk_that_one_file_no_longer_holds_is_taken_from_another() {
        let (a, b, c) = (chunk(1, 10), chunk(2, 10), chunk(3, 10));
        let mut contents = Contents::new(of(&[&[a, b], &[c, a], &[a]]));
        let mut pieces = contents.next_pack().unwrap();
        assert_eq!(places(&pieces), [(0, 0), (0, 10), (1, 0)]);
        // The first file has changed.
        pieces.truncate(2);
        contents.could_not_read(pieces);
        let pieces = contents.next_pack().unwrap();
        assert_eq!(places(&pieces), [(1, 10)], "nobody else has the other one");
        contents.could_not_read(pieces);
        let pieces = contents.next_pack().unwrap();
        assert_eq!(places(&pieces), [(2, 0)]);
        contents.could_not_read(pieces);
        assert!(contents.next_pack().is_none());
        assert_eq!(contents.failed_paths().len(), 3);
    }
}
