//! One workspace of the hub: its store and its pack files, kept in step.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use cortex_shared::crash::crash_point;
use cortex_shared::durable;
use cortex_shared::entry::Digest;
use cortex_shared::ids::{NodeId, WorkspaceEpoch, WorkspaceId};
use cortex_shared::pack::Pack;
use cortex_shared::tasks::TaskScope;
use tokio::sync::{RwLock, watch};

use super::budget::{Budget, MemberRoom, Room};
use super::collection::Pressure;
use super::heads::HeadBoard;
use super::pack_files::{PackFileError, PackFiles};
use super::space::Space;
use super::{Opener, SyncError};
use crate::rate::{Bucket, Rate};
use crate::store::workspace::sqlite::SqliteWorkspaceStore;
use crate::store::workspace::{
    Answer, ChangesPage, Commit, CommitResult, Conflict, Found, Head, HeldMember, PackAdded,
    PackRecord, RejectReason, Summary, WorkspaceStore,
};

/// No limit for the content of a workspace.
const NO_QUOTA: u64 = u64::MAX;
/// How often a history is begun anew on members' word: after a hub was put back from a backup once is
/// enough, and one that lies must not make all others merge all the time.
const RESTARTS: Rate = Rate { burst: 4, per_second: 1.0 / 600.0 };
/// How often it is said that deletions are held.
const HOLD_TOLD: Duration = Duration::from_secs(60);

/// A pack that is durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PutPackAck {
    /// Its name.
    pub hash: Digest,
    /// Whether the hub had it already.
    pub duplicate: bool,
}

/// One workspace. All its operations may be called at the same time.
pub struct WorkspaceHub {
    id: WorkspaceId,
    pub(super) store: Arc<dyn WorkspaceStore>,
    pub(super) files: Arc<PackFiles>,
    budget: Arc<Budget>,
    space: Arc<Space>,
    pub(super) pressure: Arc<Pressure>,
    /// Bytes of all packs, and how many there may be. Packs that come at the same time may exceed the
    /// quota by what is on its way.
    pub(super) stored_bytes: AtomicU64,
    quota_bytes: AtomicU64,
    /// Shared by those that bring packs, from the look whether a pack is known to its record; alone
    /// for the collection, from forgetting packs to removing their files. Otherwise a pack that is
    /// sent anew just then would lose its new file.
    pub(super) collection: RwLock<()>,
    /// See [`RESTARTS`].
    restarts: tokio::sync::Mutex<Bucket>,
    /// When it was last said that deletions are held: not for each commit of who never ceases.
    hold_told: Mutex<Option<Instant>>,
    /// Shared by those that change the tree; alone for whoever needs it to stand still (`adopt`).
    pub(super) still: RwLock<()>,
}

impl WorkspaceHub {
    /// Opens the workspace in `folder`, or creates it, and brings files and store in step.
    pub(super) async fn open(
        id: WorkspaceId,
        folder: PathBuf,
        opener: &Opener,
    ) -> Result<Arc<Self>, SyncError> {
        let (opening, syncing) = (folder.clone(), folder.clone());
        let files = blocking(move || {
            durable::create_private_folder(&opening)
                .map_err(|error| PackFileError::new("create", &opening, error))?;
            Ok(PackFiles::open(&opening)?)
        })
        .await?;
        let store = SqliteWorkspaceStore::open(folder.join("ws.db"), &opener.databases).await?;
        blocking(move || {
            // The folder, the one of all workspaces and the one above may all be new.
            for folder in syncing.ancestors().take(3) {
                durable::sync_folder(folder)
                    .map_err(|error| PackFileError::new("flush", folder, error))?;
            }
            Ok(())
        })
        .await?;
        let hub = Arc::new(Self {
            id,
            store: Arc::new(store),
            files: Arc::new(files),
            budget: opener.budget.clone(),
            space: opener.space.clone(),
            pressure: opener.pressure.clone(),
            stored_bytes: AtomicU64::new(0),
            quota_bytes: AtomicU64::new(NO_QUOTA),
            collection: RwLock::new(()),
            restarts: tokio::sync::Mutex::new(Bucket::full(RESTARTS, tokio::time::Instant::now())),
            hold_told: Mutex::default(),
            still: RwLock::new(()),
        });
        hub.reconcile().await?;
        hub.count_bytes().await?;
        hub.set_quota(hub.store.settings().await?.quota_bytes);
        hub.forward_heads(opener.board.clone(), &opener.scope);
        Ok(hub)
    }

    /// Learns anew how much is stored.
    pub(super) async fn count_bytes(&self) -> Result<(), SyncError> {
        self.stored_bytes.store(self.store.usage().await?.pack_bytes, Ordering::Relaxed);
        Ok(())
    }

    pub(super) fn set_quota(&self, quota_bytes: Option<u64>) {
        self.quota_bytes.store(quota_bytes.unwrap_or(NO_QUOTA), Ordering::Relaxed);
    }

    /// Turns content away for which there is no room.
    pub(super) fn admit(&self, bytes: usize) -> Result<(), SyncError> {
        let quota_bytes = self.quota_bytes.load(Ordering::Relaxed);
        let stored_bytes = self.stored_bytes.load(Ordering::Relaxed);
        let refusal = if stored_bytes.saturating_add(bytes as u64) > quota_bytes {
            SyncError::OverQuota { stored_bytes, quota_bytes }
        } else if self.space.has_room_for(bytes) {
            return Ok(());
        } else {
            SyncError::Full
        };
        self.pressure.no_room();
        Err(refusal)
    }

    /// Writes to the store, and once more without the ballast if the disk is full to its end.
    pub(super) async fn write<'a, T>(
        &'a self,
        write: impl Fn() -> Answer<'a, T>,
    ) -> Result<T, SyncError> {
        match write().await {
            Err(error) if error.is_disk_full() && self.space.give_up_ballast() => {
                self.pressure.no_room();
                Ok(write().await?)
            }
            result => Ok(result?),
        }
    }

    /// Brings the store in step with the files on disk.
    async fn reconcile(&self) -> Result<(), SyncError> {
        let files = self.files.clone();
        let on_disk: HashSet<Digest> =
            blocking(move || Ok(files.list()?)).await?.into_iter().collect();
        let recorded = self.store.packs().await?;
        let lost: Vec<Digest> = recorded.difference(&on_disk).copied().collect();
        let mut to_record: Vec<Digest> = on_disk.difference(&recorded).copied().collect();
        if !lost.is_empty() {
            tracing::error!(
                workspace = %self.id, lost = lost.len(),
                "packs are missing on disk; their content will be asked for again"
            );
            self.store.forget_packs(lost).await?;
            // A lost pack may have shadowed chunks that others hold as well.
            to_record = on_disk.into_iter().collect();
        }
        for hash in to_record {
            let files = self.files.clone();
            let pack = blocking(move || {
                let pack = files.read(&hash)?.and_then(|bytes| Pack::parse(bytes).ok());
                let intact = pack.filter(|pack| pack.verify().is_ok());
                if intact.is_none() {
                    files.set_aside(&hash)?;
                }
                Ok(intact)
            })
            .await?;
            match pack {
                Some(pack) => drop(self.store.add_pack(record(&pack)).await?),
                None => {
                    tracing::error!(workspace = %self.id, pack = %hash, "set a damaged pack aside");
                    self.store.forget_packs(vec![hash]).await?;
                }
            }
        }
        Ok(())
    }

    fn forward_heads(&self, board: Arc<HeadBoard>, scope: &TaskScope) {
        let id = self.id;
        let mut heads = self.store.watch_head();
        let token = scope.token().clone();
        scope.spawn("workspace heads", async move {
            loop {
                let head = *heads.borrow_and_update();
                board.announce(id, head);
                tokio::select! {
                    moved = heads.changed() => if moved.is_err() { return },
                    () = token.cancelled() => return,
                }
                crash_point("sync.head.announce");
            }
        });
    }

    /// Which workspace this is.
    #[must_use]
    pub fn id(&self) -> WorkspaceId {
        self.id
    }

    /// The newest durable head, now and whenever it moves.
    #[must_use]
    pub fn head(&self) -> watch::Receiver<Head> {
        self.store.watch_head()
    }

    /// Compares the newest version a member knows with this history, and begins a new epoch if that
    /// proves that versions were lost; see [`WorkspaceStore::restart_if_lost`].
    ///
    /// # Errors
    /// Those of the store, and [`SyncError::RestartedTooOften`].
    pub async fn check_history(&self, member: NodeId, known: Head) -> Result<Head, SyncError> {
        if self.store.is_known(known).await? {
            return Ok(*self.store.watch_head().borrow());
        }
        let mut restarts = self.restarts.lock().await;
        // Many members may come at once, of whom the first one has said it.
        if self.store.is_known(known).await? {
            return Ok(*self.store.watch_head().borrow());
        }
        let taken = restarts.take(RESTARTS, tokio::time::Instant::now());
        tracing::error!(
            workspace = %self.id, %member, epoch = %known.epoch, known.seq, restarts = taken.is_ok(),
            "a member knows a version that is not here: this history was put back from a backup"
        );
        taken.map_err(|wait| SyncError::RestartedTooOften { wait })?;
        Ok(self.store.restart_if_lost(known).await?)
    }

    /// Head and size.
    ///
    /// # Errors
    /// Those of the store.
    pub async fn summary(&self) -> Result<Summary, SyncError> {
        Ok(self.store.summary().await?)
    }

    /// For each chunk whether it is present. A "yes" protects it from collection for 72 hours.
    ///
    /// # Errors
    /// Those of the store.
    pub async fn have(&self, chunks: Vec<Digest>) -> Result<Vec<bool>, SyncError> {
        Ok(self.store.have(chunks).await?)
    }

    /// Waits until `bytes` from a member may be worked on. Given back when dropped.
    pub async fn incoming_room(&self, member: NodeId, bytes: usize) -> Room {
        self.budget.incoming(member, bytes).await
    }

    /// Waits until `bytes` may lie in memory for a member to take them. Given back when dropped.
    pub async fn outgoing_room(&self, member: NodeId, bytes: usize) -> MemberRoom {
        self.budget.outgoing(member, bytes).await
    }

    /// Takes a pack: checks every chunk, writes it, and records it. When this returns it survives
    /// power loss. `room` is that of its bytes.
    ///
    /// # Errors
    /// [`SyncError::Pack`] if it is not valid, and those of disk and store.
    pub async fn put_pack(&self, bytes: Bytes, room: Room) -> Result<PutPackAck, SyncError> {
        let pack = Arc::new(blocking(move || Ok(Pack::parse(bytes)?)).await?);
        let hash = pack.hash();
        let _no_collection = self.collection.read().await;
        if self.store.has_pack(hash).await? && matches!(self.read_file(hash).await, Ok(Some(_))) {
            // Some of its chunks may have been found in another pack, which is lost by now.
            self.store.add_pack(record(&pack)).await?;
            return Ok(PutPackAck { hash, duplicate: true });
        }
        self.admit(pack.bytes().len())?;
        let room = Arc::new(room);
        let (files, to_write, held) = (self.files.clone(), pack.clone(), room.clone());
        blocking(move || {
            // The thread goes on if the caller goes away, and so do the bytes.
            let _held = held;
            to_write.verify()?;
            Ok(files.write(&to_write)?)
        })
        .await?;
        let added = self.write(|| self.store.add_pack(record(&pack))).await?;
        if added == PackAdded::New {
            self.stored_bytes.fetch_add(pack.bytes().len() as u64, Ordering::Relaxed);
        }
        crash_point("sync.pack.recorded");
        drop(room);
        Ok(PutPackAck { hash, duplicate: added == PackAdded::Known })
    }

    /// The packs that hold these chunks.
    ///
    /// # Errors
    /// Those of the store.
    pub async fn packs_of(&self, chunks: Vec<Digest>) -> Result<Found, SyncError> {
        Ok(self.store.packs_of(chunks).await?)
    }

    /// Lets members delete so much though it is much. The head moves, so that they ask for it, and are
    /// told then.
    ///
    /// # Errors
    /// Those of the store.
    pub async fn confirm_deletes(&self, members: &[(NodeId, u64)]) -> Result<(), SyncError> {
        for (node, losses) in members {
            self.store.allow_deletions(*node, *losses).await?;
        }
        Ok(self.store.repeat_head().await?)
    }

    /// Whether a member has to be told that it may send the deletions it holds. Says so for a minute, or until it
    /// sends some.
    ///
    /// # Errors
    /// Those of the store.
    pub async fn take_word(&self, member: NodeId) -> Result<bool, SyncError> {
        Ok(self.store.take_word(member).await?)
    }

    /// The members whose deletions were held here lately.
    ///
    /// # Errors
    /// Those of the store.
    pub async fn held_members(&self) -> Result<Vec<HeldMember>, SyncError> {
        Ok(self.store.held_members().await?)
    }

    /// Chunks that were lost, for members to send again.
    ///
    /// # Errors
    /// Those of the store.
    pub async fn wanted(&self) -> Result<Vec<Digest>, SyncError> {
        Ok(self.store.wanted().await?)
    }

    /// A pack as it was received; `None` if it cannot be had now. One that is lost or damaged is
    /// forgotten, and its chunks are wanted from then on.
    ///
    /// # Errors
    /// Those of the store.
    pub async fn read_pack(&self, pack: Digest) -> Result<Option<Bytes>, SyncError> {
        match self.read_file(pack).await {
            Ok(Some(bytes)) => return Ok(Some(bytes)),
            Err(SyncError::Files(error)) if !error.is_lost() => {
                tracing::error!(workspace = %self.id, %pack, %error, "a pack cannot be read now");
                return Ok(None);
            }
            Ok(None) | Err(SyncError::Files(_)) => {}
            Err(error) => return Err(error),
        }
        let _alone = self.collection.write().await;
        // Somebody may just have sent it again.
        if let Ok(Some(bytes)) = self.read_file(pack).await {
            return Ok(Some(bytes));
        }
        tracing::error!(
            workspace = %self.id, %pack,
            "an acknowledged pack is missing or damaged on disk; members are asked for its content"
        );
        if let Err(error) = self.set_aside(pack).await {
            tracing::error!(workspace = %self.id, %pack, %error, "it cannot be set aside");
        }
        self.store.forget_packs(vec![pack]).await?;
        Ok(None)
    }

    pub(super) async fn read_file(&self, pack: Digest) -> Result<Option<Bytes>, SyncError> {
        let files = self.files.clone();
        blocking(move || Ok(files.read(&pack)?)).await
    }

    async fn set_aside(&self, pack: Digest) -> Result<(), SyncError> {
        let files = self.files.clone();
        blocking(move || Ok(files.set_aside(&pack)?)).await
    }

    /// Applies operations; see [`WorkspaceStore::commit`].
    ///
    /// # Errors
    /// Those of the store.
    pub async fn commit(&self, commit: Commit) -> Result<CommitResult, SyncError> {
        let _moving = self.still.read().await;
        let author = commit.author.clone();
        // Names and recipes need room as well; what also deletes may make some, and a question needs none.
        let only_names = commit.ops.iter().flatten().all(|op| op.new.is_some());
        if only_names && !commit.ops.is_empty() && !self.space.has_room_for_names() {
            self.pressure.no_room();
            return Err(SyncError::Full);
        }
        let result = self.write(|| self.store.commit(commit.clone())).await?;
        let held = result.rejected.iter().filter(|op| op.reason == RejectReason::Held).count();
        if held > 0 && self.tells_of_holds() {
            tracing::warn!(
                workspace = %self.id, ?author, held,
                "deletions are held back because they are so many; an operator can let them go"
            );
        }
        Ok(result)
    }

    fn tells_of_holds(&self) -> bool {
        let mut told = self.hold_told.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        let tells = told.is_none_or(|at| now - at >= HOLD_TOLD);
        if tells {
            *told = Some(now);
        }
        tells
    }

    /// The changes after a version; see [`WorkspaceStore::changes`].
    ///
    /// # Errors
    /// Those of the store.
    pub async fn changes(
        &self,
        after_seq: u64,
        budget_bytes: usize,
    ) -> Result<ChangesPage, SyncError> {
        Ok(self.store.changes(after_seq, budget_bytes).await?)
    }

    /// The version a member has applied completely; 0 if it never said so.
    ///
    /// # Errors
    /// Those of the store.
    pub async fn applied(&self, member: NodeId) -> Result<u64, SyncError> {
        Ok(self.store.applied(member).await?)
    }

    /// The same of every member that said so, by one reading.
    ///
    /// # Errors
    /// Those of the store.
    pub async fn applied_by_all(&self) -> Result<HashMap<NodeId, u64>, SyncError> {
        Ok(self.store.applied_by_all().await?)
    }

    /// Notes that a member has applied everything up to a version.
    ///
    /// # Errors
    /// Those of the store.
    pub async fn ack_applied(
        &self,
        member: NodeId,
        epoch: WorkspaceEpoch,
        seq: u64,
    ) -> Result<(), SyncError> {
        self.write(|| self.store.ack_applied(member, epoch, seq)).await
    }

    /// The conflict copies that still exist.
    ///
    /// # Errors
    /// Those of the store.
    pub async fn conflicts(&self) -> Result<Vec<Conflict>, SyncError> {
        Ok(self.store.conflicts().await?)
    }
}

pub(super) fn record(pack: &Pack) -> PackRecord {
    PackRecord {
        hash: pack.hash(),
        bytes: pack.bytes().len() as u64,
        chunks: pack.index().iter().map(|indexed| indexed.chunk).collect(),
    }
}

pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, SyncError> + Send + 'static,
) -> Result<T, SyncError> {
    tokio::task::spawn_blocking(work).await.map_err(|_| SyncError::Failed)?
}
