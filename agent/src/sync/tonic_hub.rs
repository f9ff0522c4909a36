//! The hub over the protocol. Messages become domain types here and are checked once; nothing past
//! this module sees a message.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::{Bytes, BytesMut};
use cortex_proto::v1;
use cortex_proto::v1::sync_client::SyncClient;
use cortex_shared::chunk::Recipe;
use cortex_shared::entry::{Digest, Entry, File};
use cortex_shared::ids::{WorkspaceEpoch, WorkspaceId};
use cortex_shared::wire_path::WirePath;
use futures_util::StreamExt as _;
use futures_util::stream::{BoxStream, Stream};
use tonic::transport::Channel;
use tonic::{Code, Status};

use super::hub::{
    Answers, Change, ChangesPage, Commit, CommitOp, Committed, Contact, Fetched, Head, Hub,
    HubError, MAX_HASHES, RejectReason, Rejected,
};
use super::index::Cursor;
use crate::client::Traffic;

/// The hub at the other end of a channel. Cheap to clone.
#[derive(Clone, Debug)]
pub struct TonicHub {
    client: SyncClient<Channel>,
    traffic: Arc<Traffic>,
}

impl TonicHub {
    /// Speaks over `channel`, which should be one of its own: bulk must not delay commands.
    #[must_use]
    pub fn new((channel, traffic): (Channel, Arc<Traffic>)) -> Self {
        let client = SyncClient::new(channel)
            .max_decoding_message_size(cortex_proto::MAX_MESSAGE_BYTES)
            .max_encoding_message_size(cortex_proto::MAX_MESSAGE_BYTES);
        Self { client, traffic }
    }

    /// A client of its own for one call: calls take it by unique reference.
    fn client(&self) -> SyncClient<Channel> {
        self.client.clone()
    }
}

impl From<Status> for HubError {
    fn from(status: Status) -> Self {
        let message = status.message().to_owned();
        match status.code() {
            Code::Unavailable
            | Code::DeadlineExceeded
            | Code::Cancelled
            | Code::Unknown
            | Code::Aborted
            | Code::Internal => Self::Unavailable { message },
            // Other limits are over in a moment.
            Code::ResourceExhausted => match code_of(&status).as_str() {
                "disk_full" | "quota_exceeded" => Self::Full { message },
                _ => Self::Unavailable { message },
            },
            _ => Self::Refused { code: code_of(&status), message },
        }
    }
}

fn code_of(status: &Status) -> String {
    let code = status.metadata().get(cortex_proto::CODE_TRAILER);
    code.and_then(|code| code.to_str().ok()).unwrap_or_default().to_owned()
}

fn workspace_bytes(workspace: WorkspaceId) -> Bytes {
    Bytes::copy_from_slice(workspace.as_bytes())
}

fn concatenated(hashes: &[Digest]) -> Bytes {
    let mut bytes = BytesMut::with_capacity(hashes.len() * 32);
    for hash in hashes {
        bytes.extend_from_slice(hash.as_bytes());
    }
    bytes.freeze()
}

fn separated(bytes: &[u8]) -> Result<Vec<Digest>, HubError> {
    let (hashes, rest) = bytes.as_chunks::<32>();
    if !rest.is_empty() || hashes.len() > MAX_HASHES {
        return Err(HubError::protocol("a list of hashes that is none, or too long"));
    }
    Ok(hashes.iter().map(|hash| Digest::from_bytes(*hash)).collect())
}

fn domain_fetched(answer: v1::Pack) -> Result<Fetched, HubError> {
    Ok(match separated(&answer.missing)? {
        missing if missing.is_empty() => Fetched::Pack(answer.pack),
        missing => Fetched::Missing(missing),
    })
}

fn digest(bytes: &[u8], what: &str) -> Result<Digest, HubError> {
    Digest::from_slice(bytes)
        .ok_or_else(|| HubError::protocol(format!("{what} is not 32 bytes long")))
}

fn wire_version(head: Head) -> v1::Version {
    v1::Version {
        epoch: Bytes::copy_from_slice(head.epoch.as_bytes()),
        seq: head.seq,
        root_digest: Bytes::copy_from_slice(head.root.as_bytes()),
    }
}

fn wire_entry(entry: &Entry) -> v1::Entry {
    use v1::entry::Kind;
    let kind = match entry {
        Entry::File(file) => Kind::File(v1::FileEntry {
            content: Bytes::copy_from_slice(file.content.as_bytes()),
            size: file.size,
            executable: file.executable,
            mtime_ns: file.mtime_ns,
            recipe: file.recipe.encode().into(),
        }),
        Entry::Link { target } => {
            Kind::Link(v1::LinkEntry { target: Bytes::copy_from_slice(target) })
        }
        Entry::Dir => Kind::Dir(v1::DirEntry {}),
    };
    v1::Entry { kind: Some(kind) }
}

fn domain_entry(entry: v1::Entry) -> Result<Entry, HubError> {
    use v1::entry::Kind;
    let entry = match entry.kind {
        Some(Kind::File(file)) => Entry::File(File {
            content: digest(&file.content, "content")?,
            size: file.size,
            executable: file.executable,
            mtime_ns: file.mtime_ns,
            recipe: Recipe::parse(&file.recipe, file.size).map_err(HubError::protocol)?,
        }),
        Some(Kind::Link(link)) => Entry::Link { target: link.target.to_vec().into() },
        Some(Kind::Dir(v1::DirEntry {})) => Entry::Dir,
        None => return Err(HubError::protocol("entry of no known kind")),
    };
    entry.check().map_err(HubError::protocol)?;
    Ok(entry)
}

fn wire_op(op: &CommitOp) -> v1::Op {
    let path_bytes = |path: &WirePath| Bytes::copy_from_slice(path.as_bytes());
    v1::Op {
        path: path_bytes(&op.path),
        expected: op
            .expected
            .as_ref()
            .map(|digest| Bytes::copy_from_slice(digest.as_bytes()))
            .unwrap_or_default(),
        new: op.new.as_ref().map(wire_entry),
        conflict_of: op.conflict_of.as_ref().map(path_bytes).unwrap_or_default(),
    }
}

/// Packs on their way. A type of its own: with a closure in it, the compiler cannot prove that a
/// future which holds the stream is `Send`.
struct WirePacks {
    workspace_id: Bytes,
    packs: BoxStream<'static, Bytes>,
}

impl Stream for WirePacks {
    type Item = v1::PutPack;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let next = self.packs.poll_next_unpin(context);
        next.map(|pack| {
            pack.map(|pack| v1::PutPack { workspace_id: self.workspace_id.clone(), pack })
        })
    }
}

fn domain_rejected(rejected: v1::OpRejected) -> Result<Rejected, HubError> {
    let reason = match rejected.reason() {
        v1::RejectReason::Conflict => RejectReason::Conflict,
        v1::RejectReason::NoParent => RejectReason::NoParent,
        v1::RejectReason::NotEmpty => RejectReason::NotEmpty,
        v1::RejectReason::MissingChunks => RejectReason::MissingChunks,
        v1::RejectReason::Held => RejectReason::Held,
        v1::RejectReason::Rules => RejectReason::Rules,
        // A reason that is not known yet is no reason to repeat the operation.
        v1::RejectReason::Invalid | v1::RejectReason::Unspecified => RejectReason::Invalid,
    };
    let index = usize::try_from(rejected.index).map_err(HubError::protocol)?;
    let current = rejected.current.map(domain_entry).transpose()?;
    Ok(Rejected { index, reason, current })
}

fn domain_page(page: v1::ChangesPage) -> Result<ChangesPage, HubError> {
    let changes = page
        .changes
        .into_iter()
        .map(|change| {
            let path = WirePath::new(Vec::from(change.path)).map_err(HubError::protocol)?;
            let entry = change.entry.map(domain_entry).transpose()?;
            Ok(Change { path, entry })
        })
        .collect::<Result<_, HubError>>()?;
    let root = digest(&page.root_digest, "root digest")?;
    let v1::ChangesPage { last_seq, head_seq, complete, .. } = page;
    Ok(ChangesPage { changes, last_seq, head_seq, root, complete })
}

/// One bit per hash, least significant first.
fn bits(bitmap: &[u8], count: usize) -> Result<Vec<bool>, HubError> {
    if bitmap.len() != count.div_ceil(8) {
        return Err(HubError::protocol("bitmap of another length than the question"));
    }
    Ok((0..count).map(|index| bitmap[index / 8] >> (index % 8) & 1 == 1).collect())
}

impl Hub for TonicHub {
    fn moved_bytes(&self) -> u64 {
        self.traffic.bytes()
    }

    async fn head(&self, workspace: WorkspaceId, known: Option<Head>) -> Result<Contact, HubError> {
        let request = v1::HeadRequest {
            workspace_id: workspace_bytes(workspace),
            known: known.map(wire_version),
        };
        let head = self.client().head(request).await?.into_inner();
        let epoch = WorkspaceEpoch::from_slice(&head.epoch).map_err(HubError::protocol)?;
        let root = digest(&head.root_digest, "root digest")?;
        Ok(Contact {
            head: Head { epoch, seq: head.seq, root },
            wanted: separated(&head.wanted)?,
            confirm_deletes: head.confirm_deletes,
        })
    }

    async fn have(&self, workspace: WorkspaceId, chunks: &[Digest]) -> Result<Vec<bool>, HubError> {
        let request = v1::HaveRequest {
            workspace_id: workspace_bytes(workspace),
            chunks: concatenated(chunks),
        };
        let answer = self.client().have(request).await?.into_inner();
        bits(&answer.bitmap, chunks.len())
    }

    async fn put_packs(
        &self,
        workspace: WorkspaceId,
        packs: BoxStream<'static, Bytes>,
    ) -> Result<Answers<Digest>, HubError> {
        let request = WirePacks { workspace_id: workspace_bytes(workspace), packs };
        let answers = self.client().put_packs(request).await?.into_inner();
        Ok(answers.map(|ack| digest(&ack?.pack_hash, "pack hash")).boxed())
    }

    async fn commit(&self, workspace: WorkspaceId, commit: Commit) -> Result<Committed, HubError> {
        let request = v1::CommitRequest {
            workspace_id: workspace_bytes(workspace),
            commit_id: Bytes::copy_from_slice(commit.id.as_bytes()),
            epoch: Bytes::copy_from_slice(commit.epoch.as_bytes()),
            ops: commit.ops.iter().map(wire_op).collect(),
            known: commit.known.map(wire_version),
            rules: Some(v1::Rules {
                content: commit
                    .rules
                    .map(|content| Bytes::copy_from_slice(content.as_bytes()))
                    .unwrap_or_default(),
            }),
        };
        let answer = self.client().commit(request).await?.into_inner();
        let rejected =
            answer.rejected.into_iter().map(domain_rejected).collect::<Result<_, _>>()?;
        let root = digest(&answer.root_digest, "root digest")?;
        Ok(Committed { seq: answer.seq, root, rejected, seqs: answer.seqs })
    }

    async fn changes(
        &self,
        workspace: WorkspaceId,
        after: u64,
        known: Option<Head>,
    ) -> Result<Answers<ChangesPage>, HubError> {
        let request = v1::ChangesRequest {
            workspace_id: workspace_bytes(workspace),
            after_seq: after,
            known: known.map(wire_version),
        };
        let pages = self.client().changes(request).await?.into_inner();
        Ok(pages.map(|page| domain_page(page?)).boxed())
    }

    async fn get_packs(
        &self,
        workspace: WorkspaceId,
        chunks: &[Digest],
    ) -> Result<Answers<Fetched>, HubError> {
        let request = v1::GetPacksRequest {
            workspace_id: workspace_bytes(workspace),
            chunks: concatenated(chunks),
        };
        let packs = self.client().get_packs(request).await?.into_inner();
        Ok(packs.map(|answer| domain_fetched(answer?)).boxed())
    }

    async fn ack_applied(&self, workspace: WorkspaceId, cursor: Cursor) -> Result<(), HubError> {
        let request = v1::AckAppliedRequest {
            workspace_id: workspace_bytes(workspace),
            epoch: Bytes::copy_from_slice(cursor.epoch.as_bytes()),
            seq: cursor.seq,
        };
        self.client().ack_applied(request).await?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use cortex_shared::chunk::ChunkRef;

    use super::*;

    #[test]
    fn entries_survive_the_wire_and_damaged_ones_are_refused() {
        let chunk = ChunkRef { hash: Digest::of(b"c"), len: 4 };
        let file = File {
            content: Digest::of(b"content"),
            size: 8,
            executable: true,
            mtime_ns: -1,
            recipe: Recipe(vec![chunk, chunk]),
        };
        for entry in
            [Entry::File(file.clone()), Entry::Link { target: b"\xff"[..].into() }, Entry::Dir]
        {
            assert_eq!(domain_entry(wire_entry(&entry)).unwrap(), entry);
        }
        let too_long = Entry::File(File { size: 9, ..file });
        assert!(domain_entry(wire_entry(&too_long)).is_err());
        assert!(domain_entry(v1::Entry { kind: None }).is_err());
        let link = v1::LinkEntry { target: Bytes::from_static(b"a\0b") };
        let hostile = v1::Entry { kind: Some(v1::entry::Kind::Link(link)) };
        assert!(domain_entry(hostile).is_err());
    }

    #[test]
    fn hostile_paths_do_not_pass() {
        for path in [&b"../x"[..], b"/x", b".cortex/x", b""] {
            let change = v1::Change { seq: 1, path: Bytes::from_static(path), entry: None };
            let page = v1::ChangesPage { changes: vec![change], ..Default::default() };
            assert!(domain_page(page).is_err(), "{}", path.escape_ascii());
        }
    }

    #[test]
    fn a_bitmap_has_one_bit_for_each_question() {
        assert_eq!(bits(&[0b101, 0b1], 9).unwrap().iter().filter(|bit| **bit).count(), 3);
        assert!(bits(&[0], 9).is_err());
        assert!(bits(&[0, 0], 8).is_err());
    }
}
