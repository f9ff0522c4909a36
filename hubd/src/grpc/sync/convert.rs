//! Sync messages to domain types and back. What comes in is checked here, once.

use bytes::Bytes;
use cortex_proto::v1;
use cortex_shared::chunk::Recipe;
use cortex_shared::entry::{Digest, Entry, File, InvalidEntry};
use cortex_shared::ids::{CommitId, NodeId, WorkspaceEpoch, WorkspaceId};
use cortex_shared::wire_path::WirePath;
use tonic::Status;

use crate::grpc::status::invalid;
use crate::store::workspace::{
    Author, Change, ChangesPage, Commit, CommitResult, Head, InvalidOp, KnownRules, Op,
    RejectReason, Rejection,
};

/// Most hashes in one question.
const MAX_HASHES: usize = 8192;
/// Most operations of one commit.
const MAX_OPS: usize = 5000;

pub(super) fn workspace_id(bytes: &[u8]) -> Result<WorkspaceId, Status> {
    WorkspaceId::from_slice(bytes).map_err(|error| invalid(error.to_string()))
}

pub(super) fn epoch(bytes: &[u8]) -> Result<WorkspaceEpoch, Status> {
    WorkspaceEpoch::from_slice(bytes).map_err(|error| invalid(error.to_string()))
}

/// The newest head that a member was told of.
pub(super) fn known(version: Option<&v1::Version>) -> Result<Option<Head>, Status> {
    let Some(version) = version else { return Ok(None) };
    let root = Digest::from_slice(&version.root_digest)
        .ok_or_else(|| invalid("a root digest is 32 bytes"))?;
    // Far beyond any real one, and still a number that the database can hold.
    if version.seq > u64::MAX >> 2 {
        return Err(invalid("there is no such version"));
    }
    Ok(Some(Head { epoch: epoch(&version.epoch)?, seq: version.seq, root }))
}

/// Hashes, concatenated.
pub(super) fn hashes(bytes: &[u8]) -> Result<Vec<Digest>, Status> {
    let (hashes, rest) = bytes.as_chunks::<32>();
    if !rest.is_empty() {
        return Err(invalid("hashes are 32 bytes each"));
    }
    if hashes.len() > MAX_HASHES {
        return Err(invalid(format!("at most {MAX_HASHES} hashes in one request")));
    }
    Ok(hashes.iter().map(|hash| Digest::from_bytes(*hash)).collect())
}

/// Hashes, to be sent.
pub(super) fn wire_hashes(hashes: &[Digest]) -> Bytes {
    hashes.iter().flat_map(|hash| *hash.as_bytes()).collect::<Vec<u8>>().into()
}

/// One bit for each answer, least significant first within a byte.
pub(super) fn bitmap(answers: &[bool]) -> Bytes {
    let byte = |answers: &[bool]| {
        answers.iter().rev().fold(0_u8, |byte, &answer| byte << 1 | u8::from(answer))
    };
    answers.chunks(8).map(byte).collect::<Vec<u8>>().into()
}

/// A commit of a node. Operations that are invalid by themselves are rejected one by one, later;
/// what is wrong with the request as a whole refuses it.
pub(super) fn commit(request: v1::CommitRequest, node: NodeId) -> Result<Commit, Status> {
    if request.ops.len() > MAX_OPS {
        return Err(invalid(format!("at most {MAX_OPS} operations in one commit")));
    }
    let id =
        CommitId::from_slice(&request.commit_id).map_err(|error| invalid(error.to_string()))?;
    let epoch = epoch(&request.epoch)?;
    let author = Author::Node(node);
    let rules = match request.rules {
        None => KnownRules::Unsaid,
        Some(rules) if rules.content.is_empty() => KnownRules::Nothing,
        Some(rules) => KnownRules::Content(
            Digest::from_slice(&rules.content).ok_or_else(|| invalid("malformed rules"))?,
        ),
    };
    Ok(Commit { id, author, epoch, rules, ops: request.ops.into_iter().map(op).collect() })
}

fn op(op: v1::Op) -> Result<Op, InvalidOp> {
    let optional = |bytes: Bytes| (!bytes.is_empty()).then_some(bytes);
    let digest = |bytes: Bytes| Digest::from_slice(&bytes).ok_or(InvalidOp::Malformed);
    Ok(Op {
        path: WirePath::new(op.path)?,
        expected: optional(op.expected).map(digest).transpose()?,
        new: op.new.map(entry).transpose()?,
        conflict_of: optional(op.conflict_of).map(WirePath::new).transpose()?,
    })
}

fn entry(entry: v1::Entry) -> Result<Entry, InvalidOp> {
    let entry = match entry.kind.ok_or(InvalidOp::Malformed)? {
        v1::entry::Kind::File(file) => Entry::File(File {
            content: Digest::from_slice(&file.content).ok_or(InvalidOp::Malformed)?,
            size: file.size,
            executable: file.executable,
            mtime_ns: file.mtime_ns,
            recipe: Recipe::parse(&file.recipe, file.size).map_err(InvalidEntry::from)?,
        }),
        v1::entry::Kind::Link(link) => Entry::Link { target: link.target[..].into() },
        v1::entry::Kind::Dir(v1::DirEntry {}) => Entry::Dir,
    };
    entry.check()?;
    Ok(entry)
}

pub(super) fn wire_digest(digest: &Digest) -> Bytes {
    Bytes::copy_from_slice(digest.as_bytes())
}

fn wire_entry(entry: Entry) -> v1::Entry {
    let kind = match entry {
        Entry::File(file) => v1::entry::Kind::File(v1::FileEntry {
            content: wire_digest(&file.content),
            size: file.size,
            executable: file.executable,
            mtime_ns: file.mtime_ns,
            recipe: file.recipe.encode().into(),
        }),
        Entry::Link { target } => {
            v1::entry::Kind::Link(v1::LinkEntry { target: Vec::from(target).into() })
        }
        Entry::Dir => v1::entry::Kind::Dir(v1::DirEntry {}),
    };
    v1::Entry { kind: Some(kind) }
}

pub(super) fn wire_result(result: CommitResult) -> v1::CommitResponse {
    v1::CommitResponse {
        seq: result.seq,
        root_digest: wire_digest(&result.root),
        rejected: result.rejected.into_iter().map(wire_rejection).collect(),
        seqs: result.seqs,
    }
}

fn wire_rejection(rejection: Rejection) -> v1::OpRejected {
    let reason = match rejection.reason {
        RejectReason::Conflict => v1::RejectReason::Conflict,
        RejectReason::NoParent => v1::RejectReason::NoParent,
        RejectReason::NotEmpty => v1::RejectReason::NotEmpty,
        RejectReason::MissingChunks => v1::RejectReason::MissingChunks,
        RejectReason::Invalid => v1::RejectReason::Invalid,
        RejectReason::Held => v1::RejectReason::Held,
        RejectReason::Rules => v1::RejectReason::Rules,
    };
    v1::OpRejected {
        index: rejection.index,
        reason: reason.into(),
        current: rejection.current.map(wire_entry),
        current_seq: rejection.current_seq,
        missing: wire_hashes(&rejection.missing),
    }
}

pub(super) fn wire_page(page: ChangesPage, complete: bool) -> v1::ChangesPage {
    let wire_change = |change: Change| v1::Change {
        seq: change.seq,
        path: change.path.as_bytes().to_vec().into(),
        entry: change.entry.map(wire_entry),
    };
    v1::ChangesPage {
        changes: page.changes.into_iter().map(wire_change).collect(),
        last_seq: page.last_seq,
        head_seq: page.head.seq,
        root_digest: wire_digest(&page.head.root),
        complete,
    }
}

#[cfg(test)]
mod tests {
    use cortex_shared::chunk::ChunkRef;

    use super::*;

    #[test]
    fn bits_come_least_significant_first() {
        for (answers, bytes) in [
            (vec![], vec![]),
            (vec![true], vec![1]),
            (vec![false, true, false, false, false, false, false, true], vec![0x82]),
            (vec![false, false, false, false, false, false, false, false, true], vec![0, 1]),
        ] {
            assert_eq!(bitmap(&answers), bytes);
        }
    }

    #[test]
    fn entries_survive_the_wire() {
        let chunk = ChunkRef::of(b"x").unwrap();
        let file = |recipe, size| {
            let content = Digest::of(b"content");
            Entry::File(File { content, size, executable: true, mtime_ns: -5, recipe })
        };
        for original in [
            Entry::Dir,
            Entry::Link { target: b"\xff/../x"[..].into() },
            file(Recipe::default(), 7),
            file(Recipe(vec![chunk, chunk]), 2),
        ] {
            assert_eq!(entry(wire_entry(original.clone())), Ok(original));
        }
    }

    #[test]
    fn operations_that_cannot_be_are_invalid() {
        let good = v1::Op {
            path: "a/b".into(),
            expected: Bytes::new(),
            new: Some(wire_entry(Entry::Dir)),
            conflict_of: Bytes::new(),
        };
        assert!(op(good.clone()).is_ok());
        let link = |target: &'static [u8]| {
            let link = v1::LinkEntry { target: target.into() };
            Some(v1::Entry { kind: Some(v1::entry::Kind::Link(link)) })
        };
        let file = |content: &'static [u8], size, recipe: &'static [u8]| {
            let file = v1::FileEntry {
                content: content.into(),
                size,
                executable: false,
                mtime_ns: 0,
                recipe: recipe.into(),
            };
            Some(v1::Entry { kind: Some(v1::entry::Kind::File(file)) })
        };
        for bad in [
            v1::Op { path: "../x".into(), ..good.clone() },
            v1::Op { path: Bytes::new(), ..good.clone() },
            v1::Op { expected: "short".into(), ..good.clone() },
            v1::Op { conflict_of: "/x".into(), ..good.clone() },
            v1::Op { new: Some(v1::Entry { kind: None }), ..good.clone() },
            v1::Op { new: link(b""), ..good.clone() },
            v1::Op { new: link(b"a\0b"), ..good.clone() },
            v1::Op { new: file(b"short", 1, b""), ..good.clone() },
            v1::Op { new: file(&[1; 32], 0, b""), ..good.clone() },
            v1::Op { new: file(&[1; 32], u64::MAX, b""), ..good.clone() },
            v1::Op { new: file(&[1; 32], 5, &[0; 36]), ..good.clone() },
            v1::Op { new: file(&[1; 32], 5, &[0; 35]), ..good },
        ] {
            assert!(op(bad.clone()).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn lists_are_bounded() {
        assert_eq!(hashes(&[0; MAX_HASHES * 32]).unwrap().len(), MAX_HASHES);
        assert!(hashes(&[0; (MAX_HASHES + 1) * 32]).is_err());
        assert!(hashes(&[0; 33]).is_err());
        let request = v1::CommitRequest {
            commit_id: CommitId::new().as_bytes().to_vec().into(),
            epoch: WorkspaceEpoch::new().as_bytes().to_vec().into(),
            ops: vec![v1::Op::default(); MAX_OPS + 1],
            ..Default::default()
        };
        assert!(commit(request, NodeId::new()).is_err());
    }
}
