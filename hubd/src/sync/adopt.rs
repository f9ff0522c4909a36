//! Taking content over from another workspace of this hub.
//!
//! Workspaces share no packs: who is a member of one must not be sent what lies beside its content in a
//! pack of another. So a pack of which everything is taken over is taken as it is, as a second name of the
//! same file, which costs no room; and of any other, what is wanted is put into packs of its own. Each
//! workspace lets go of its own names; the kernel keeps the bytes until the last one goes.
//!
//! A crash leaves packs that nothing names, which the collection lets go.

use std::collections::HashSet;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use cortex_shared::chunk::ChunkRef;
use cortex_shared::entry::{Digest, Entry};
use cortex_shared::pack::{Pack, PackBuilder, Pushed};
use cortex_shared::wire_path::WirePath;
use tokio::sync::RwLockWriteGuard;

use super::SyncError;
use super::workspace::{WorkspaceHub, blocking, record};
use crate::store::workspace::{
    Commit, CommitResult, Found, PackAdded, PackRecord, RestorePlan, StoreError, Subtree,
};

/// Chunks of one question to the store.
const CHUNKS_ASKED: usize = 8192;

/// What became of content that was to be taken over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Adopted {
    /// It is here.
    All {
        /// Packs that are the same files.
        linked: usize,
        /// Packs that were made of parts of others.
        made: usize,
    },
    /// The other workspace has lost some of it.
    Lost,
}

/// As long as this exists, nobody else changes the tree.
pub type HeldStill<'a> = RwLockWriteGuard<'a, ()>;

impl WorkspaceHub {
    /// Makes all who want to change the tree wait until the answer is dropped. [`Self::commit_whole`] does
    /// not wait: it is for whoever holds it.
    pub async fn hold_still(&self) -> HeldStill<'_> {
        self.still.write().await
    }

    /// Applies operations, all of them or none; see
    /// [`crate::store::workspace::WorkspaceStore::commit_whole`].
    ///
    /// # Errors
    /// Those of the store; [`StoreError::NotWhole`].
    pub async fn commit_whole(&self, commit: Commit) -> Result<CommitResult, SyncError> {
        self.write(|| self.store.commit_whole(commit.clone())).await
    }

    /// The directory at a path with everything below it; `None` if none stands there.
    ///
    /// # Errors
    /// Those of the store; [`StoreError::TooMuch`] beyond `limit`.
    pub async fn subtree(
        &self,
        path: WirePath,
        limit: usize,
    ) -> Result<Option<Subtree>, SyncError> {
        Ok(self.store.subtree(path, limit).await?)
    }

    /// What stands at a path.
    ///
    /// # Errors
    /// Those of the store.
    pub async fn entry(&self, path: WirePath) -> Result<Option<Entry>, SyncError> {
        Ok(self.store.entry(path).await?)
    }

    /// What would bring a path back to what it was before its last change.
    ///
    /// # Errors
    /// Those of the store; [`StoreError::NothingBefore`].
    pub async fn last_of(&self, path: WirePath) -> Result<RestorePlan, SyncError> {
        Ok(self.store.restore_plan(Some(path), None).await?)
    }

    /// Makes these chunks of `source` present here. What is present stays so for a while, even if nothing
    /// names it (see [`Self::have`]).
    ///
    /// # Errors
    /// Those of stores and disk; [`SyncError::Full`]. What was taken over by then is let go by itself.
    pub async fn adopt(
        &self,
        source: &Self,
        chunks: impl Iterator<Item = ChunkRef>,
    ) -> Result<Adopted, SyncError> {
        let wanted: HashSet<Digest> = chunks.map(|chunk| chunk.hash).collect();
        let mut missing = Vec::new();
        let all: Vec<Digest> = wanted.iter().copied().collect();
        for asked in all.chunks(CHUNKS_ASKED) {
            let present = self.store.have(asked.to_vec()).await?;
            missing
                .extend(asked.iter().zip(present).filter(|(_, has)| !has).map(|(hash, _)| *hash));
        }
        // The files must stay where they are until they have their second names, and those until they are
        // recorded.
        let (_source, _own) = (source.collection.read().await, self.collection.read().await);
        let found = source.store.packs_of(missing).await?;
        if !found.missing.is_empty() {
            return Ok(Adopted::Lost);
        }
        self.take_packs(source, found, wanted).await
    }

    async fn take_packs(
        &self,
        source: &Self,
        found: Found,
        wanted: HashSet<Digest>,
    ) -> Result<Adopted, SyncError> {
        let (mut linked, mut made) = (0, 0);
        let mut builder = PackBuilder::new(3).map_err(|_| SyncError::Failed)?;
        for (hash, chunks) in found.packs {
            let Some(bytes) = source.read_file(hash).await? else { return Ok(Adopted::Lost) };
            let pack = blocking(move || Ok(Pack::parse(bytes)?)).await?;
            if pack.index().iter().all(|indexed| wanted.contains(&indexed.chunk.hash)) {
                self.admit(pack.bytes().len())?;
                let (files, theirs, bytes) =
                    (self.files.clone(), source.files.clone(), pack.bytes().clone());
                blocking(move || Ok(files.link_from(&theirs, &hash, &bytes)?)).await?;
                self.record_pack(record(&pack)).await?;
                linked += 1;
                continue;
            }
            let (mut full, returned, intact) = blocking(move || {
                let chunks: HashSet<Digest> = chunks.into_iter().collect();
                let (mut full, mut taken) = (Vec::new(), 0);
                let read = pack.for_each_chunk(|chunk, data| {
                    if !chunks.contains(&chunk.hash) {
                        return;
                    }
                    if builder.push(chunk, data) == Pushed::Full {
                        full.extend(builder.finish().map(|(_, bytes)| bytes));
                        builder.push(chunk, data);
                    }
                    taken += 1;
                });
                Ok((full, builder, read.is_ok() && taken == chunks.len()))
            })
            .await?;
            builder = returned;
            if !intact {
                return Ok(Adopted::Lost);
            }
            made += full.len();
            for bytes in full.drain(..) {
                self.write_pack(bytes).await?;
            }
        }
        if let Some((_, bytes)) = builder.finish() {
            self.write_pack(bytes).await?;
            made += 1;
        }
        Ok(Adopted::All { linked, made })
    }

    async fn write_pack(&self, bytes: Bytes) -> Result<(), SyncError> {
        self.admit(bytes.len())?;
        let files = self.files.clone();
        let record = blocking(move || {
            let pack = Pack::parse(bytes)?;
            files.write(&pack)?;
            Ok(record(&pack))
        })
        .await?;
        self.record_pack(record).await
    }

    async fn record_pack(&self, record: PackRecord) -> Result<(), SyncError> {
        let bytes = record.bytes;
        if self.write(|| self.store.add_pack(record.clone())).await? == PackAdded::New {
            self.stored_bytes.fetch_add(bytes, Ordering::Relaxed);
        }
        Ok(())
    }
}

impl SyncError {
    /// Whether something stood in the way of what was to be done as a whole.
    #[must_use]
    pub fn is_not_whole(&self) -> bool {
        matches!(self, Self::Store(StoreError::NotWhole { .. }))
    }
}
