//! The latest events, in a database of their own, so that their writes hold up no command. What was
//! appended survives power loss.

use std::path::PathBuf;

use cortex_shared::tasks::TaskScope;
use rusqlite::{Connection, params};

use super::StoreError;
use super::database::{Database, DatabaseError, Settings};
use crate::events::{Cursor, Event, NewEvent};

const SETTINGS: Settings = Settings {
    migrations: &["\
CREATE TABLE events (
    cursor  INTEGER PRIMARY KEY,
    at      INTEGER NOT NULL,
    kind    TEXT NOT NULL,
    -- The rest, as JSON.
    about   TEXT NOT NULL
) STRICT;
CREATE TABLE state (
    only   INTEGER PRIMARY KEY CHECK (only = 1),
    -- The newest event that was removed for its age or number; 0 if none was.
    floor  INTEGER NOT NULL,
    -- Whether the last hub on this has written everything before it ended.
    clean  INTEGER NOT NULL
) STRICT;
INSERT INTO state VALUES (1, 0, 1);
"],
    cache_kib: 4 * 1024,
};

/// How an earlier hub left it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Left {
    /// The newest event that is kept, or was.
    pub newest: Cursor,
    /// Whether every event of the last hub is in it.
    pub clean: bool,
}

/// Events after a cursor.
#[derive(Clone, Debug, PartialEq)]
pub struct EventPage {
    /// The newest event that is not kept any more.
    pub floor: Cursor,
    /// The events, oldest first.
    pub events: Vec<Event>,
    /// The last one that was looked at: some may be of kinds that this program does not know.
    pub read_to: Option<Cursor>,
}

/// See the module.
pub struct EventStore {
    database: Database,
}

impl EventStore {
    /// Opens or creates the database file. It ends with `scope`.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn open(path: PathBuf, scope: &TaskScope) -> Result<Self, StoreError> {
        Ok(Self { database: Database::open(path, SETTINGS, scope).await? })
    }

    /// How an earlier hub left it. From now on it is not clean.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn begin(&self) -> Result<Left, StoreError> {
        let begin = |t: &Connection| -> Result<_, StoreError> {
            let read = "SELECT max(floor, coalesce((SELECT max(cursor) FROM events), 0)), clean FROM state";
            let (newest, clean): (i64, bool) =
                t.query_row(read, [], |row| Ok((row.get(0)?, row.get(1)?)))?;
            t.execute("UPDATE state SET clean = 0", [])?;
            Ok(Left { newest: Cursor(newest.cast_unsigned()), clean })
        };
        self.database.write(begin).await
    }

    /// Notes that every event is in it.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn end(&self) -> Result<(), StoreError> {
        let end = |t: &Connection| -> Result<_, StoreError> {
            t.execute("UPDATE state SET clean = 1", [])?;
            Ok(())
        };
        self.database.write(end).await
    }

    /// Appends events, in one transaction. One that is there already stays as it is.
    ///
    /// # Errors
    /// Those of the database; nothing is kept then.
    pub async fn append(&self, batch: Vec<std::sync::Arc<Event>>) -> Result<(), StoreError> {
        let append = move |t: &Connection| -> Result<_, StoreError> {
            let mut insert = t.prepare_cached("INSERT OR IGNORE INTO events VALUES (?,?,?,?)")?;
            for event in &batch {
                let about = serde_json::to_string(&event.about)
                    .map_err(|_| DatabaseError::Damaged { what: "event" })?;
                let cursor = event.cursor.0.cast_signed();
                insert.execute(params![cursor, event.at_ms, event.kind.word(), about])?;
            }
            Ok(())
        };
        self.database.write(append).await
    }

    /// Removes all but so many of the newest, and what happened before a time. How many went.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn trim(&self, keep: u64, before_ms: i64) -> Result<usize, StoreError> {
        let trim = move |t: &Connection| -> Result<_, StoreError> {
            let by_number = "SELECT coalesce(max(cursor), 0) FROM \
                             (SELECT cursor FROM events ORDER BY cursor DESC LIMIT 1 OFFSET ?1)";
            let keep = i64::try_from(keep).unwrap_or(i64::MAX);
            let by_number: i64 = t.query_row(by_number, [keep], |row| row.get(0))?;
            // From the oldest on: clocks are set, and one young event keeps those after it.
            let young =
                "SELECT coalesce(min(cursor), 9223372036854775807) FROM events WHERE at >= ?1";
            let young: i64 = t.query_row(young, [before_ms], |row| row.get(0))?;
            let old = "SELECT coalesce(max(cursor), 0) FROM events WHERE cursor < ?1";
            let by_age: i64 = t.query_row(old, [young], |row| row.get(0))?;
            let floor = by_number.max(by_age);
            let gone = t.execute("DELETE FROM events WHERE cursor <= ?1", [floor])?;
            t.execute("UPDATE state SET floor = max(floor, ?1)", [floor])?;
            Ok(gone)
        };
        self.database.write(trim).await
    }

    /// At most `limit` events after one cursor and before another, oldest first.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn between(
        &self,
        after: Cursor,
        before: Cursor,
        limit: u32,
    ) -> Result<EventPage, StoreError> {
        let number = |cursor: Cursor| i64::try_from(cursor.0).unwrap_or(i64::MAX);
        let (after, before) = (number(after), number(before));
        let read = move |c: &Connection| -> Result<_, StoreError> {
            let floor: i64 = c.query_row("SELECT floor FROM state", [], |row| row.get(0))?;
            let mut statement = c.prepare_cached(
                "SELECT cursor, at, kind, about FROM events WHERE cursor > ?1 AND cursor < ?2 \
                 ORDER BY cursor LIMIT ?3",
            )?;
            let mut rows = statement.query(params![after, before, limit])?;
            let floor = Cursor(floor.cast_unsigned());
            let mut page = EventPage { floor, events: Vec::new(), read_to: None };
            while let Some(row) = rows.next()? {
                let cursor = Cursor(row.get::<_, i64>(0)?.cast_unsigned());
                page.read_to = Some(cursor);
                // What a newer program wrote is not for this one to show.
                let kind = row.get_ref(2)?.as_str().ok().and_then(|word| word.parse().ok());
                let about = row.get_ref(3)?.as_str().ok();
                let about = about.and_then(|text| serde_json::from_str::<NewEvent>(text).ok());
                if let (Some(kind), Some(about)) = (kind, about) {
                    page.events.push(Event { cursor, at_ms: row.get(1)?, kind, about });
                }
            }
            Ok(page)
        };
        self.database.read(read).await
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::events::Kind;

    fn event(cursor: u64, at_ms: i64) -> Arc<Event> {
        let about = NewEvent::of_hub().with("n", cursor);
        Arc::new(Event { cursor: Cursor(cursor), at_ms, kind: Kind::HubStarted, about })
    }

    async fn cursors(store: &EventStore, after: u64, before: u64, limit: u32) -> Vec<u64> {
        let page = store.between(Cursor(after), Cursor(before), limit).await.unwrap();
        page.events.iter().map(|event| event.cursor.0).collect()
    }

    #[tokio::test]
    async fn what_was_appended_is_there_after_reopening_and_knows_how_it_was_left() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("events.db");
        let scope = TaskScope::new();
        let store = EventStore::open(path.clone(), &scope).await.unwrap();
        assert_eq!(store.begin().await.unwrap(), Left { newest: Cursor(0), clean: true });
        store.append((5..10).map(|n| event(n, 1)).collect()).await.unwrap();
        store.append(vec![event(9, 99), event(10, 1)]).await.unwrap();
        // A crash.
        scope.cancel();
        scope.finish().await;
        let scope = TaskScope::new();
        let store = EventStore::open(path.clone(), &scope).await.unwrap();
        assert_eq!(store.begin().await.unwrap(), Left { newest: Cursor(10), clean: false });
        let page = store.between(Cursor(8), Cursor(11), 10).await.unwrap();
        assert_eq!(page.events, [(*event(9, 1)).clone(), (*event(10, 1)).clone()]);
        store.end().await.unwrap();
        scope.cancel();
        scope.finish().await;
        let store = EventStore::open(path, &TaskScope::new()).await.unwrap();
        assert_eq!(store.begin().await.unwrap(), Left { newest: Cursor(10), clean: true });
    }

    #[tokio::test]
    async fn the_oldest_go_by_number_and_by_age_and_the_floor_says_so() {
        let folder = tempfile::tempdir().unwrap();
        let store = EventStore::open(folder.path().join("e"), &TaskScope::new()).await.unwrap();
        store.append((1..=10).map(|n| event(n, n.cast_signed() * 10)).collect()).await.unwrap();
        assert_eq!(store.trim(100, 0).await.unwrap(), 0);
        assert_eq!(store.between(Cursor(0), Cursor(99), 9).await.unwrap().floor, Cursor(0));
        assert_eq!(store.trim(8, 0).await.unwrap(), 2);
        assert_eq!(cursors(&store, 0, 7, 99).await, [3, 4, 5, 6]);
        assert_eq!(store.trim(100, 50).await.unwrap(), 2);
        assert_eq!(cursors(&store, 0, 99, 2).await, [5, 6]);
        assert_eq!(store.between(Cursor(0), Cursor(99), 1).await.unwrap().floor, Cursor(4));
        assert_eq!(store.trim(100, 1000).await.unwrap(), 6);
        assert_eq!(store.begin().await.unwrap().newest, Cursor(10), "numbers are not given twice");
    }
}
