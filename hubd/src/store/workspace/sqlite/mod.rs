//! A workspace's store in a SQLite database of its own, so that a large commit in one workspace
//! holds up no other.
//!
//! What has been answered survives power loss; a crash loses the requests that were not answered yet,
//! and nothing else (`store::database`).

mod changes;
mod check;
mod collect;
mod commit;
mod content;
mod history;
mod hold;
mod log;
mod past;
mod schema;
#[cfg(test)]
mod tests;
mod tree;

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::sync::Arc;

use cortex_shared::clock::unix_ms;
use cortex_shared::crash::crash_point;
use cortex_shared::entry::{Digest, Entry};
use cortex_shared::ids::{NodeId, WorkspaceEpoch};
use cortex_shared::tasks::TaskScope;
use cortex_shared::wire_path::WirePath;
use rusqlite::{Connection, OptionalExtension as _, params};
use tokio::sync::watch;

pub use self::check::Checked;
pub(in crate::store) use self::check::{check, chunks_in};
use self::content::Presence;
pub(in crate::store) use self::content::packs as known_packs;
use self::tree::{damaged, digest, signed, unsigned};
use super::super::database::{Database, Settings};
use super::{
    Answer, ChangesPage, CollectionSlice, Commit, CommitResult, Conflict, Found, Head, HeldMember,
    LogFilter, LogPage, PackAdded, PackRecord, RestorePlan, StoreError, Subtree, Summary,
    UnusedPacks, Usage, WorkspaceSettings, WorkspaceStore,
};

/// Page cache of a workspace's writer, in KiB. The database of 100,000 files is about 40 MiB; 8 MiB
/// hold its inner pages and what one batch of commits changes. The main database has more, but there
/// is only one of it: with this, 50 workspaces in full use take 400 MiB at most.
const CACHE_KIB: u32 = 8 * 1024;
/// Most wanted chunks in one answer: as many as members can ask about in one question.
const WANTED_LISTED: u32 = 8192;
/// Most conflicts in one answer.
const CONFLICTS_LISTED: i64 = 10_000;

/// Version of the tables of this program.
pub(in crate::store) const SCHEMA_VERSION: usize = schema::MIGRATIONS.len();

/// The store of one workspace. Must be opened once only at a time.
pub struct SqliteWorkspaceStore {
    database: Database,
    head: Arc<watch::Sender<Head>>,
}

impl SqliteWorkspaceStore {
    /// Opens the database at `path`, or creates it with an empty tree and a new epoch. Its folder
    /// must exist.
    ///
    /// The database ends with `scope`, once it has written what it had accepted.
    ///
    /// # Errors
    /// [`StoreError::Database`].
    pub async fn open(path: PathBuf, scope: &TaskScope) -> Result<Self, StoreError> {
        let settings = Settings { migrations: schema::MIGRATIONS, cache_kib: CACHE_KIB };
        let database = Database::open(path, settings, scope).await?;
        let head = database
            .write(|connection| {
                schema::begin(connection)?;
                head_of(&read_head(connection)?)
            })
            .await?;
        Ok(Self { database, head: Arc::new(watch::Sender::new(head)) })
    }

    fn write_commit(
        &self,
        commit: Commit,
        write: fn(&Connection, &Commit, i64) -> Result<CommitResult, StoreError>,
    ) -> Answer<'_, CommitResult> {
        let publish = self.publish();
        let epoch = commit.epoch;
        let write = move |connection: &Connection| write(connection, &commit, unix_ms());
        let head_of = move |result: &CommitResult| {
            crash_point("sync.commit.durable");
            publish(&Head { epoch, seq: result.seq, root: result.root });
        };
        Box::pin(self.database.write_then(write, head_of))
    }

    /// Tells of a head once it is durable.
    fn publish(&self) -> impl FnOnce(&Head) + Send + 'static {
        let sender = self.head.clone();
        move |new: &Head| {
            sender.send_if_modified(|head| {
                // A repeated commit returns an older version, which must not take the head back. A
                // new epoch begins above all numbers of the one before.
                let newer = new.seq > head.seq;
                if newer {
                    *head = *new;
                }
                newer
            });
        }
    }
}

/// The row of the head table.
#[derive(Clone)]
struct HeadRow {
    epoch: Vec<u8>,
    seq: u64,
    root: Digest,
    entries: u64,
    content_bytes: u64,
}

fn read_head(connection: &Connection) -> Result<HeadRow, StoreError> {
    let mut statement =
        connection.prepare_cached("SELECT epoch, seq, root, entries, content_bytes FROM head")?;
    let mut rows = statement.query([])?;
    let row = rows.next()?.ok_or(damaged("no head"))?;
    Ok(HeadRow {
        epoch: row.get(0)?,
        seq: unsigned(row.get(1)?)?,
        root: digest(&row.get::<_, Vec<u8>>(2)?)?,
        entries: unsigned(row.get(3)?)?,
        content_bytes: unsigned(row.get(4)?)?,
    })
}

fn head_of(row: &HeadRow) -> Result<Head, StoreError> {
    let epoch = WorkspaceEpoch::from_slice(&row.epoch).map_err(|_| damaged("the epoch"))?;
    Ok(Head { epoch, seq: row.seq, root: row.root })
}

impl WorkspaceStore for SqliteWorkspaceStore {
    fn watch_head(&self) -> watch::Receiver<Head> {
        self.head.subscribe()
    }

    fn is_known(&self, known: Head) -> Answer<'_, bool> {
        let read = move |connection: &Connection| history::is_known(connection, &known);
        Box::pin(self.database.read(read))
    }

    fn restart_if_lost(&self, known: Head) -> Answer<'_, Head> {
        let write =
            move |connection: &Connection| history::restart_if_lost(connection, &known, unix_ms());
        Box::pin(self.database.write_then(write, self.publish()))
    }

    fn repeat_head(&self) -> Answer<'_, ()> {
        let write = |connection: &Connection| history::repeat_head_if(connection, true, unix_ms());
        let publish = self.publish();
        Box::pin(async move {
            let after = move |head: &Option<Head>| {
                head.as_ref().inspect(|head| publish(head));
            };
            self.database.write_then::<_, StoreError>(write, after).await.map(drop)
        })
    }

    fn summary(&self) -> Answer<'_, Summary> {
        Box::pin(self.database.read(|connection| {
            let row = read_head(connection)?;
            let head = head_of(&row)?;
            Ok(Summary { head, entries: row.entries, content_bytes: row.content_bytes })
        }))
    }

    fn have(&self, chunks: Vec<Digest>) -> Answer<'_, Vec<bool>> {
        Box::pin(async move {
            let now_ms = unix_ms();
            let asked = chunks.clone();
            let presence = self
                .database
                .read(move |connection| content::presence(connection, &asked, now_ms))
                .await?;
            let stale: Vec<Digest> = chunks
                .iter()
                .zip(&presence)
                .filter(|(_, presence)| matches!(presence, Presence::Stale))
                .map(|(hash, _)| *hash)
                .collect();
            // The writer has the last word on these: a collection may have come in between.
            let mut touched = if stale.is_empty() {
                Vec::new()
            } else {
                let write =
                    move |connection: &Connection| content::touch(connection, &stale, now_ms);
                self.database.write(write).await?
            }
            .into_iter();
            let present = presence.into_iter().map(|presence| match presence {
                Presence::Absent => false,
                Presence::Present => true,
                Presence::Stale => touched.next().unwrap_or(false),
            });
            Ok(present.collect())
        })
    }

    fn has_pack(&self, pack: Digest) -> Answer<'_, bool> {
        Box::pin(self.database.read(move |connection| content::has_pack(connection, &pack)))
    }

    fn add_pack(&self, pack: PackRecord) -> Answer<'_, PackAdded> {
        let write = move |connection: &Connection| {
            let now_ms = unix_ms();
            let added = content::add_pack(connection, &pack, now_ms)?;
            let chunks = pack.chunks.iter().map(|chunk| chunk.hash);
            let came_back = content::no_longer_wanted(connection, chunks)?;
            Ok((added, history::repeat_head_if(connection, came_back, now_ms)?))
        };
        let publish = self.publish();
        Box::pin(async move {
            let after = move |(_, head): &(PackAdded, Option<Head>)| {
                head.as_ref().inspect(|head| publish(head));
            };
            Ok(self.database.write_then::<_, StoreError>(write, after).await?.0)
        })
    }

    fn forget_packs(&self, packs: Vec<Digest>) -> Answer<'_, ()> {
        let write = move |connection: &Connection| {
            let news = content::lose_packs(connection, &packs)?;
            history::repeat_head_if(connection, news, unix_ms())
        };
        let publish = self.publish();
        Box::pin(async move {
            let after = move |head: &Option<Head>| {
                head.as_ref().inspect(|head| publish(head));
            };
            self.database.write_then::<_, StoreError>(write, after).await.map(drop)
        })
    }

    fn wanted(&self) -> Answer<'_, Vec<Digest>> {
        Box::pin(self.database.read(|connection| content::wanted(connection, WANTED_LISTED)))
    }

    fn drop_wanted(&self) -> Answer<'_, ()> {
        Box::pin(async move {
            let useless = self.database.read(collect::useless_wanted).await?;
            if useless.is_empty() {
                return Ok(());
            }
            let write = move |connection: &Connection| {
                content::no_longer_wanted(connection, useless.iter().copied()).map(drop)
            };
            self.database.write(write).await
        })
    }

    fn unused_packs(
        &self,
        slice: Option<CollectionSlice>,
        untouched_since_ms: i64,
    ) -> Answer<'_, (UnusedPacks, Option<CollectionSlice>)> {
        let after = slice.map_or(0, |slice| slice.0);
        Box::pin(async move {
            let (packs, next) = self
                .database
                .read(move |connection| {
                    collect::unused_packs(connection, after, untouched_since_ms)
                })
                .await?;
            Ok((packs, next.map(CollectionSlice)))
        })
    }

    fn replace_packs(
        &self,
        old: Vec<Digest>,
        new: PackRecord,
        untouched_since_ms: i64,
    ) -> Answer<'_, bool> {
        Box::pin(self.database.write(move |connection| {
            collect::replace_packs(connection, &old, &new, untouched_since_ms, unix_ms())
        }))
    }

    fn drop_packs(&self, packs: Vec<Digest>, untouched_since_ms: i64) -> Answer<'_, Vec<Digest>> {
        Box::pin(
            self.database.write(move |connection| {
                collect::drop_packs(connection, &packs, untouched_since_ms)
            }),
        )
    }

    fn drop_recipes(&self) -> Answer<'_, usize> {
        Box::pin(self.database.write(collect::drop_recipes))
    }

    fn packs(&self) -> Answer<'_, HashSet<Digest>> {
        Box::pin(self.database.read(content::packs))
    }

    fn packs_of(&self, chunks: Vec<Digest>) -> Answer<'_, Found> {
        Box::pin(self.database.read(move |connection| content::packs_of(connection, &chunks)))
    }

    fn commit(&self, commit: Commit) -> Answer<'_, CommitResult> {
        self.write_commit(commit, commit::commit)
    }

    fn commit_whole(&self, commit: Commit) -> Answer<'_, CommitResult> {
        self.write_commit(commit, commit::commit_whole)
    }

    fn subtree(&self, path: WirePath, limit: usize) -> Answer<'_, Option<Subtree>> {
        Box::pin(self.database.read(move |connection| tree::subtree(connection, &path, limit)))
    }

    fn allow_deletions(&self, node: NodeId, losses: u64) -> Answer<'_, ()> {
        Box::pin(
            self.database.write(move |connection| hold::allow(connection, node, losses, unix_ms())),
        )
    }

    fn take_word(&self, node: NodeId) -> Answer<'_, bool> {
        Box::pin(async move {
            let read = move |connection: &Connection| hold::word(connection, node, unix_ms());
            let word = self.database.read(read).await?;
            if word == hold::Word::New {
                let told =
                    move |connection: &Connection| hold::word_told(connection, node, unix_ms());
                self.database.write(told).await?;
            }
            Ok(word != hold::Word::None)
        })
    }

    fn held_members(&self) -> Answer<'_, Vec<HeldMember>> {
        Box::pin(self.database.read(|connection| hold::held(connection, unix_ms())))
    }

    fn changes(&self, after_seq: u64, budget_bytes: usize) -> Answer<'_, ChangesPage> {
        let read =
            move |connection: &Connection| changes::changes(connection, after_seq, budget_bytes);
        Box::pin(self.database.read(read))
    }

    fn applied(&self, node: NodeId) -> Answer<'_, u64> {
        Box::pin(self.database.read(move |connection| {
            let applied: Option<i64> = connection
                .prepare_cached(
                    "SELECT applied_seq FROM cursors JOIN head USING (epoch) WHERE node = ?1",
                )?
                .query_row([node.as_bytes()], |row| row.get(0))
                .optional()?;
            unsigned(applied.unwrap_or(0))
        }))
    }

    fn applied_by_all(&self) -> Answer<'_, HashMap<NodeId, u64>> {
        Box::pin(self.database.read(|connection| {
            let mut cursors = connection
                .prepare_cached("SELECT node, applied_seq FROM cursors JOIN head USING (epoch)")?;
            let applied = cursors.query_and_then([], |row| {
                let node = NodeId::from_slice(&row.get::<_, Vec<u8>>(0)?);
                Ok((node.map_err(|_| damaged("a member"))?, unsigned(row.get(1)?)?))
            })?;
            applied.collect()
        }))
    }

    fn ack_applied(&self, node: NodeId, epoch: WorkspaceEpoch, seq: u64) -> Answer<'_, ()> {
        Box::pin(self.database.write(move |connection| {
            let head = head_of(&read_head(connection)?)?;
            if head.epoch != epoch {
                return Err(StoreError::WrongEpoch { asked: epoch, current: head.epoch });
            }
            if seq > head.seq {
                return Err(StoreError::BeyondHead { asked: seq, head: head.seq });
            }
            connection
                .prepare_cached(
                    "INSERT INTO cursors (node, epoch, applied_seq, at_ms) VALUES (?1, ?2, ?3, ?4)
                     ON CONFLICT (node) DO UPDATE SET epoch = excluded.epoch,
                     applied_seq = excluded.applied_seq, at_ms = excluded.at_ms
                     WHERE epoch != excluded.epoch OR applied_seq < excluded.applied_seq",
                )?
                .execute(params![node.as_bytes(), epoch.as_bytes(), signed(seq), unix_ms()])?;
            Ok(())
        }))
    }

    fn conflicts(&self) -> Answer<'_, Vec<Conflict>> {
        Box::pin(self.database.read(|connection| {
            let mut statement = connection.prepare_cached(
                "SELECT path, copy, node, at_ms FROM conflicts ORDER BY at_ms, copy LIMIT ?1",
            )?;
            let conflicts = statement.query_and_then([CONFLICTS_LISTED], |row| {
                Ok(Conflict {
                    path: past::path_of(row, 0)?,
                    copy: past::path_of(row, 1)?,
                    author: past::author(row, 2)?.ok_or(damaged("no author"))?,
                    at_ms: row.get(3)?,
                })
            })?;
            conflicts.collect()
        }))
    }

    fn forget_conflicts(&self, copies: Vec<WirePath>) -> Answer<'_, ()> {
        Box::pin(self.database.write(move |connection| {
            let mut delete = connection.prepare_cached("DELETE FROM conflicts WHERE copy = ?1")?;
            for copy in &copies {
                delete.execute([copy.as_bytes()])?;
            }
            Ok(())
        }))
    }

    fn entry(&self, path: WirePath) -> Answer<'_, Option<Entry>> {
        Box::pin(self.database.read(move |connection| past::entry(connection, &path)))
    }

    fn log(&self, filter: LogFilter) -> Answer<'_, LogPage> {
        Box::pin(self.database.read(move |connection| log::log(connection, &filter)))
    }

    fn restore_plan(
        &self,
        path: Option<WirePath>,
        version: Option<u64>,
    ) -> Answer<'_, RestorePlan> {
        Box::pin(
            self.database
                .read(move |connection| past::restore_plan(connection, path.as_ref(), version)),
        )
    }

    fn settings(&self) -> Answer<'_, WorkspaceSettings> {
        Box::pin(self.database.read(past::settings))
    }

    fn set_settings(&self, settings: WorkspaceSettings) -> Answer<'_, ()> {
        Box::pin(self.database.write(move |connection| past::set_settings(connection, &settings)))
    }

    fn usage(&self) -> Answer<'_, Usage> {
        Box::pin(self.database.read(past::usage))
    }

    fn trim(&self, now_ms: i64) -> Answer<'_, usize> {
        Box::pin(self.database.write(move |connection| past::trim(connection, now_ms)))
    }
}
