//! Letting go of what is of no use any more: old versions whose time is over, content that nothing names,
//! and what interrupted writes left.
//!
//! A worker (`crate::worker`) looks at all workspaces, one after another: when the hub starts, every hour, and at once
//! where content was turned away for want of room. A crash in the middle leaves files that the next start
//! adopts, and the next collection lets go again.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use cortex_shared::clock::unix_ms;
use cortex_shared::crash::crash_point;
use cortex_shared::entry::Digest;
use cortex_shared::ids::WorkspaceId;
use cortex_shared::pack::{MAX_RAW_BYTES, Pack, PackBuilder, Pushed};
use tokio::sync::Notify;
use tokio::time::Instant;

use super::workspace::{WorkspaceHub, blocking, record};
use super::{Opener, SyncError};
use crate::store::workspace::SparsePack;

/// How long content stays that nothing names, in milliseconds: the 72 hours for which members may
/// rely on what they were told, and one more, within which a touch is not always recorded anew. This is
/// also how long content waits for a commit that never comes.
const CONTENT_KEPT_MS: i64 = 73 * 3600 * 1000;
/// How long it stays where there is no room: longer than a push takes from its question to its commit. A
/// member that was told of content which went then is told so by the commit, and sends it again.
const CONTENT_KEPT_WITHOUT_ROOM_MS: i64 = 10 * 60 * 1000;
/// How soon another collection follows for want of room, if the last one made some; otherwise twice as
/// long each time, up to the second of these.
const NEXT_WITHOUT_ROOM: Duration = Duration::from_secs(60);
const LONGEST_WITHOUT_ROOM: Duration = Duration::from_secs(15 * 60);
/// A file that nobody has written to for this long was left by an interrupted write.
const WRITES_TAKE: Duration = Duration::from_secs(3600);
/// Packs that are let go in one transaction.
const PACKS_DROPPED: usize = 64;
/// Sparse packs that are read for one new one, while those who send packs wait: some tenths of a second.
const PACKS_GATHERED: usize = 64;

/// What a collection has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Collected {
    /// Old versions and records of deletions that went.
    pub trimmed: usize,
    /// Packs that went whole.
    pub dropped: usize,
    /// Packs that went after what was used of them had been put into others.
    pub rewritten: usize,
}

/// What makes a collection follow soon.
#[derive(Debug, Default)]
pub(super) struct Pressure {
    turned_away: Notify,
    asked: Notify,
    next: Mutex<NextCollection>,
}

/// What is known of the next collection.
#[derive(Clone, Copy, Debug)]
struct NextCollection {
    /// It is for want of room.
    for_room: bool,
    /// Not before this, for want of room.
    not_before: Option<Instant>,
    /// After the one before, the next for want of room had to wait so long.
    pause: Duration,
}

impl Default for NextCollection {
    fn default() -> Self {
        Self { for_room: false, not_before: None, pause: NEXT_WITHOUT_ROOM }
    }
}

impl Pressure {
    fn next(&self) -> MutexGuard<'_, NextCollection> {
        self.next.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Content was turned away.
    pub(super) fn no_room(&self) {
        self.turned_away.notify_one();
    }

    /// Somebody has said that less is to be kept.
    pub(super) fn keep_less(&self) {
        self.asked.notify_one();
    }

    /// Waits until a collection is to follow for want of room. For one waiter.
    pub(super) async fn wait(&self) {
        let not_before = self.next().not_before;
        let without_room = async {
            if let Some(not_before) = not_before {
                tokio::time::sleep_until(not_before).await;
            }
            self.turned_away.notified().await;
        };
        tokio::select! {
            () = without_room => {}
            () = self.asked.notified() => {}
        }
        self.next().for_room = true;
    }

    /// Notes that a collection has ended.
    fn ended(&self, for_room: bool, made_room: bool) {
        let mut next = self.next();
        // Where there is nothing to let go, looking again and again helps nobody.
        next.pause = if made_room || !for_room {
            NEXT_WITHOUT_ROOM
        } else {
            (next.pause * 2).min(LONGEST_WITHOUT_ROOM)
        };
        next.not_before = Some(Instant::now() + next.pause);
    }
}

/// What a collection of all workspaces has done.
#[derive(Default)]
struct All {
    workspaces: usize,
    done: Collected,
    failed: Option<SyncError>,
}

/// Collects in all workspaces, one after another. What it did, in words.
pub(super) async fn collect_all(opener: &Opener) -> Result<String, SyncError> {
    let for_room = std::mem::take(&mut opener.pressure.next().for_room);
    let kept_ms = if for_room { CONTENT_KEPT_WITHOUT_ROOM_MS } else { CONTENT_KEPT_MS };
    let ballast = opener.space.clone();
    if let Err(error) = blocking(move || Ok(ballast.keep_ballast()?)).await {
        tracing::warn!(%error, "there is no ballast on this disk");
    }
    let mut all = All::default();
    for id in opener.on_disk().await {
        collect_one(opener, id, kept_ms, &mut all).await;
    }
    let All { workspaces, done: Collected { trimmed, dropped, rewritten }, failed } = all;
    opener.pressure.ended(for_room, dropped + rewritten > 0);
    match failed {
        Some(error) => Err(error),
        None => Ok(format!(
            "{workspaces} workspaces: {trimmed} old versions and {dropped} packs let go, {rewritten} rewritten"
        )),
    }
}

async fn collect_one(opener: &Opener, id: WorkspaceId, kept_ms: i64, all: &mut All) {
    let collected = async {
        let now_ms = unix_ms();
        opener.workspace(id).await?.collect(now_ms, now_ms - kept_ms).await
    };
    all.workspaces += 1;
    match collected.await {
        Ok(done) if done == Collected::default() => {}
        Ok(Collected { trimmed, dropped, rewritten }) => {
            tracing::info!(workspace = %id, trimmed, dropped, rewritten, "collected");
            all.done.trimmed += trimmed;
            all.done.dropped += dropped;
            all.done.rewritten += rewritten;
        }
        Err(SyncError::Deleted) => {}
        Err(error) => {
            tracing::error!(workspace = %id, %error, "collection failed");
            all.failed = Some(error);
        }
    }
}

impl WorkspaceHub {
    /// Lets go of old versions whose time is over at `now_ms`, and of content that neither an entry nor a kept
    /// version names and that nobody has touched since. Members go on meanwhile; only those that send
    /// packs wait, for a slice at a time.
    ///
    /// # Errors
    /// Those of store and disk. What was found by then has gone.
    pub async fn collect(
        &self,
        now_ms: i64,
        untouched_since_ms: i64,
    ) -> Result<Collected, SyncError> {
        let mut collected = Collected::default();
        let files = self.files.clone();
        blocking(move || Ok(files.sweep(WRITES_TAKE)?)).await?;
        loop {
            match self.store.trim(now_ms).await? {
                0 => break,
                trimmed => collected.trimmed += trimmed,
            }
        }
        let mut slice = None;
        loop {
            let (unused, next) = self.store.unused_packs(slice, untouched_since_ms).await?;
            for packs in unused.useless.chunks(PACKS_DROPPED) {
                collected.dropped += self.drop_packs(packs, untouched_since_ms).await?;
            }
            collected.rewritten += self.rewrite(unused.sparse, untouched_since_ms).await?;
            slice = next;
            if slice.is_none() {
                break;
            }
        }
        while self.store.drop_recipes().await? > 0 {}
        self.store.drop_wanted().await?;
        self.count_bytes().await?;
        Ok(collected)
    }

    async fn drop_packs(
        &self,
        packs: &[Digest],
        untouched_since_ms: i64,
    ) -> Result<usize, SyncError> {
        let _alone = self.collection.write().await;
        let dropped = self.store.drop_packs(packs.to_vec(), untouched_since_ms).await?;
        crash_point("sync.collect.forgotten");
        let (files, count) = (self.files.clone(), dropped.len());
        blocking(move || Ok(files.remove(&dropped)?)).await?;
        Ok(count)
    }

    /// Puts what is used of sparse packs together into new ones. Returns how many packs went.
    async fn rewrite(
        &self,
        sparse: Vec<SparsePack>,
        untouched_since_ms: i64,
    ) -> Result<usize, SyncError> {
        let mut rewritten = 0;
        let mut sparse = sparse.into_iter().peekable();
        while sparse.peek().is_some() {
            // Held for as long as one new pack takes, since a pack that is sent anew just then would
            // lose its new file.
            let _alone = self.collection.write().await;
            let files = self.files.clone();
            let (rest, gathered) = blocking(move || {
                let gathered = gather(|hash| Ok(files.read(hash)?), &mut sparse)?;
                Ok((sparse, gathered))
            })
            .await?;
            sparse = rest;
            let Some((new, old)) = gathered else { continue };
            let (files, to_write) = (self.files.clone(), new.clone());
            blocking(move || Ok(files.write(&to_write)?)).await?;
            crash_point("sync.rewrite.written");
            let replaced =
                self.store.replace_packs(old.clone(), record(&new), untouched_since_ms).await?;
            let files = self.files.clone();
            if replaced {
                rewritten += old.len();
                crash_point("sync.rewrite.recorded");
                let old: Vec<Digest> = old.into_iter().filter(|old| *old != new.hash()).collect();
                blocking(move || Ok(files.remove(&old)?)).await?;
            } else if !self.store.has_pack(new.hash()).await? {
                blocking(move || Ok(files.remove(&[new.hash()])?)).await?;
            }
        }
        Ok(rewritten)
    }
}

/// A new pack, and the packs of which it has what is used.
type Gathered = (Arc<Pack>, Vec<Digest>);

/// A new pack of what is used of the next of the sparse ones, and those. One that cannot be read is left
/// out: whoever needs it finds that out, and the members are asked for its content.
fn gather(
    read: impl Fn(&Digest) -> Result<Option<bytes::Bytes>, SyncError>,
    sparse: &mut std::iter::Peekable<std::vec::IntoIter<SparsePack>>,
) -> Result<Option<Gathered>, SyncError> {
    let mut builder = PackBuilder::new(3).map_err(|_| SyncError::Failed)?;
    let mut old = Vec::new();
    while let Some(SparsePack { hash, used }) = sparse.peek().filter(|_| old.len() < PACKS_GATHERED)
    {
        let used: HashSet<Digest> = used.iter().copied().collect();
        let pack = read(hash)?.and_then(|bytes| Pack::parse(bytes).ok());
        if let Some(pack) = pack {
            let wanted =
                || pack.index().iter().filter(|indexed| used.contains(&indexed.chunk.hash));
            let bytes: usize = wanted().map(|indexed| indexed.chunk.len as usize).sum();
            if builder.raw_bytes() + bytes > MAX_RAW_BYTES && !builder.is_empty() {
                break;
            }
            let mut whole = true;
            let mut chunks = Vec::new();
            for indexed in wanted() {
                match pack.chunk(&indexed.chunk.hash) {
                    Ok(Some(data)) => chunks.push((indexed.chunk, data)),
                    _ => whole = false,
                }
            }
            if whole && chunks.len() == used.len() {
                let mut fits = true;
                for (chunk, data) in &chunks {
                    fits &= builder.push(*chunk, data) != Pushed::Full;
                }
                if !fits {
                    // More chunks than a pack holds: those that are in it already do no harm.
                    break;
                }
                old.push(*hash);
            }
        }
        sparse.next();
    }
    let Some((_, bytes)) = builder.finish().filter(|_| !old.is_empty()) else {
        // Whatever stopped it, the next one is another one.
        sparse.next();
        return Ok(None);
    };
    Ok(Some((Arc::new(Pack::parse(bytes)?), old)))
}
