//! The latest output of each node: a ring of segments for each, in a database of its own, so that its
//! writes hold up no command. What was appended survives power loss.

use std::path::PathBuf;

use cortex_shared::ids::{NodeId, TaskId};
use cortex_shared::tasks::TaskScope;
use rusqlite::{Connection, OptionalExtension as _, params};

use super::StoreError;
use super::database::{Database, DatabaseError, Settings};

const SETTINGS: Settings = Settings {
    migrations: &["\
CREATE TABLE rings (
    node        BLOB PRIMARY KEY,
    -- Segments from first to next - 1 are kept.
    first_seq   INTEGER NOT NULL,
    next_seq    INTEGER NOT NULL,
    bytes       INTEGER NOT NULL
) STRICT;
CREATE TABLE segments (
    node     BLOB NOT NULL,
    seq      INTEGER NOT NULL,
    at       INTEGER NOT NULL,
    task     BLOB NOT NULL,
    stream   INTEGER NOT NULL,
    -- Bytes before this segment that were not kept.
    skipped  INTEGER NOT NULL,
    data     BLOB NOT NULL
) STRICT;
CREATE UNIQUE INDEX segments_of_node ON segments (node, seq);
"],
    cache_kib: 8 * 1024,
};

/// How much is kept of each node.
#[derive(Clone, Copy, Debug)]
pub struct HistoryLimits {
    /// Bytes of output.
    pub bytes: u64,
    /// Segments: pieces of one stream of one task.
    pub segments: u64,
}

impl Default for HistoryLimits {
    /// Some 50,000 lines of a node, and 8 GiB for 2,000 nodes that all write all the time.
    fn default() -> Self {
        Self { bytes: 4 << 20, segments: 10_000 }
    }
}

/// A piece of a node's output.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// When it came.
    pub at_ms: i64,
    /// Of which task.
    pub task: TaskId,
    /// Of which stream: 0 or 1.
    pub stream: u8,
    /// Bytes of the node between the segment before and this one that were not kept.
    pub skipped: u64,
    /// The bytes.
    pub data: Vec<u8>,
}

/// See the module.
pub struct HistoryStore {
    database: Database,
}

impl HistoryStore {
    /// Opens or creates the database file. It ends with `scope`.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn open(path: PathBuf, scope: &TaskScope) -> Result<Self, StoreError> {
        Ok(Self { database: Database::open(path, SETTINGS, scope).await? })
    }

    /// Appends what came, in one transaction, and removes what no longer fits.
    ///
    /// # Errors
    /// Those of the database; nothing is kept then.
    pub async fn append(
        &self,
        batch: Vec<(NodeId, Vec<Segment>)>,
        limits: HistoryLimits,
    ) -> Result<(), StoreError> {
        let append = move |t: &Connection| {
            batch.iter().try_for_each(|(node, segments)| append(t, *node, segments, limits))
        };
        self.database.write(append).await
    }

    /// At most `limit` segments of a node with higher numbers than `after`, oldest first.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn after(
        &self,
        node: NodeId,
        after: u64,
        limit: u32,
    ) -> Result<Vec<(u64, Segment)>, StoreError> {
        self.read(node, "seq > ?2 ORDER BY seq", after, limit).await
    }

    /// At most `limit` segments with lower numbers than `before`, newest first.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn before(
        &self,
        node: NodeId,
        before: u64,
        limit: u32,
    ) -> Result<Vec<(u64, Segment)>, StoreError> {
        self.read(node, "seq < ?2 ORDER BY seq DESC", before, limit).await
    }

    /// Every node that something is kept of.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn nodes(&self) -> Result<Vec<NodeId>, StoreError> {
        let read = |c: &Connection| {
            let mut statement = c.prepare_cached("SELECT node FROM rings")?;
            let nodes = statement.query_and_then([], |row| -> Result<_, StoreError> {
                let id = NodeId::from_slice(&row.get::<_, Vec<u8>>(0)?);
                Ok(id.map_err(|_| DatabaseError::Damaged { what: "node id" })?)
            })?;
            nodes.collect()
        };
        self.database.read(read).await
    }

    /// Removes what is kept of a node.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn forget(&self, node: NodeId) -> Result<(), StoreError> {
        let forget = move |t: &Connection| -> Result<_, StoreError> {
            t.execute("DELETE FROM segments WHERE node = ?", [node.as_bytes().as_slice()])?;
            t.execute("DELETE FROM rings WHERE node = ?", [node.as_bytes().as_slice()])?;
            Ok(())
        };
        self.database.write(forget).await
    }

    async fn read(
        &self,
        node: NodeId,
        which: &'static str,
        seq: u64,
        limit: u32,
    ) -> Result<Vec<(u64, Segment)>, StoreError> {
        let read = move |c: &Connection| {
            let sql = format!(
                "SELECT seq, at, task, stream, skipped, data FROM segments WHERE node = ?1 AND {which} LIMIT ?3"
            );
            let mut statement = c.prepare_cached(&sql)?;
            let seq = i64::try_from(seq).unwrap_or(i64::MAX);
            let rows = statement.query_and_then(
                params![node.as_bytes().as_slice(), seq, limit],
                |row| -> Result<_, StoreError> {
                    let task = TaskId::from_slice(&row.get::<_, Vec<u8>>(2)?)
                        .map_err(|_| DatabaseError::Damaged { what: "task id" })?;
                    let segment = Segment {
                        at_ms: row.get(1)?,
                        task,
                        stream: row.get(3)?,
                        skipped: row.get::<_, i64>(4)?.cast_unsigned(),
                        data: row.get(5)?,
                    };
                    Ok((row.get::<_, i64>(0)?.cast_unsigned(), segment))
                },
            )?;
            rows.collect()
        };
        self.database.read(read).await
    }
}

fn append(
    t: &Connection,
    node: NodeId,
    segments: &[Segment],
    limits: HistoryLimits,
) -> Result<(), StoreError> {
    let node = node.as_bytes().as_slice();
    let ring = t
        .prepare_cached("SELECT first_seq, next_seq, bytes FROM rings WHERE node = ?")?
        .query_row([node], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))
        .optional()?;
    let (mut first, mut next, mut bytes): (i64, i64, i64) = ring.unwrap_or((1, 1, 0));
    let mut insert = t.prepare_cached("INSERT INTO segments VALUES (?,?,?,?,?,?,?)")?;
    let length = |data: &[u8]| i64::try_from(data.len()).unwrap_or(i64::MAX);
    for segment in segments {
        insert.execute(params![
            node,
            next,
            segment.at_ms,
            segment.task.as_bytes().as_slice(),
            segment.stream,
            segment.skipped.cast_signed(),
            segment.data,
        ])?;
        next += 1;
        bytes += length(&segment.data);
    }
    let most_bytes = i64::try_from(limits.bytes).unwrap_or(i64::MAX);
    let most_segments = i64::try_from(limits.segments).unwrap_or(i64::MAX);
    let mut remove =
        t.prepare_cached("DELETE FROM segments WHERE node = ? AND seq = ? RETURNING length(data)")?;
    // As many as came, over time: nothing is searched.
    while first < next && (bytes > most_bytes || next - first > most_segments) {
        let removed = remove.query_row(params![node, first], |row| row.get(0)).optional()?;
        bytes -= removed.unwrap_or(0);
        first += 1;
    }
    t.prepare_cached("INSERT OR REPLACE INTO rings VALUES (?,?,?,?)")?
        .execute(params![node, first, next, bytes])?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn each_node_keeps_the_end_of_its_output_within_both_limits() {
        let folder = tempfile::tempdir().unwrap();
        let scope = TaskScope::new();
        let store = HistoryStore::open(folder.path().join("history.db"), &scope).await.unwrap();
        let (one, two, task) = (NodeId::new(), NodeId::new(), TaskId::new());
        let segment = |n: u8| Segment { at_ms: 1, task, stream: 0, skipped: 0, data: vec![n; 10] };
        let limits = HistoryLimits { bytes: 45, segments: 6 };
        for n in 0..20 {
            store.append(vec![(one, vec![segment(n)])], limits).await.unwrap();
        }
        let small = |n: u8| Segment { data: vec![n], ..segment(n) };
        store.append(vec![(two, (0..20).map(small).collect())], limits).await.unwrap();
        let kept = |found: Vec<(u64, Segment)>| -> Vec<u8> {
            found.into_iter().map(|(_, segment)| segment.data[0]).collect()
        };
        assert_eq!(kept(store.after(one, 0, 100).await.unwrap()), [16, 17, 18, 19]);
        assert_eq!(kept(store.after(two, 0, 100).await.unwrap()), [14, 15, 16, 17, 18, 19]);
        let newest = store.before(two, u64::MAX, 2).await.unwrap();
        let before = store.before(two, newest[1].0, 2).await.unwrap();
        assert_eq!((kept(newest), kept(before)), (vec![19, 18], vec![17, 16]));
        store.forget(one).await.unwrap();
        assert_eq!(store.nodes().await.unwrap(), [two]);
        assert_eq!(kept(store.after(one, 0, 100).await.unwrap()), [0_u8; 0]);
        assert_eq!(kept(store.after(two, 0, 100).await.unwrap()).len(), 6);
    }
}
