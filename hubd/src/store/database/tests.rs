use super::*;

const SETTINGS: Settings =
    Settings { migrations: &["CREATE TABLE t (x INTEGER PRIMARY KEY) STRICT"], cache_kib: 1024 };

/// A database in a folder of its own.
struct Fixture {
    folder: tempfile::TempDir,
    scope: TaskScope,
    database: Database,
}

impl Fixture {
    async fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let scope = TaskScope::new();
        let database = Database::open(folder.path().join("db"), SETTINGS, &scope).await.unwrap();
        Self { folder, scope, database }
    }

    async fn end(&self) {
        self.scope.cancel();
        self.scope.finish().await;
    }

    async fn rows(&self) -> Vec<i64> {
        self.database.read(rows).await.unwrap()
    }

    /// Holds the writer up within a request, which this returns with what lets it go on, so that
    /// whatever is asked for meanwhile shares the next transaction.
    async fn hold_up(
        &self,
    ) -> (std::sync::mpsc::Sender<()>, impl Future<Output = Result<(), DatabaseError>>) {
        let (started, has_started) = tokio::sync::oneshot::channel();
        let (go, wait) = std::sync::mpsc::channel();
        let mut held = Box::pin(self.database.write(move |_| {
            started.send(()).unwrap();
            wait.recv().unwrap();
            Ok(())
        }));
        tokio::select! {
            _ = &mut held => unreachable!("it waits"),
            started = has_started => started.unwrap(),
        }
        (go, held)
    }
}

fn insert(x: i64) -> impl FnOnce(&Connection) -> Result<(), DatabaseError> {
    move |connection| {
        connection.execute("INSERT INTO t VALUES (?)", [x])?;
        Ok(())
    }
}

fn rows(connection: &Connection) -> Result<Vec<i64>, DatabaseError> {
    let mut statement = connection.prepare("SELECT x FROM t ORDER BY x")?;
    Ok(statement.query_map([], |row| row.get(0))?.collect::<Result<_, _>>()?)
}

/// Whatever one request does to itself, its neighbours in the transaction are kept.
#[tokio::test]
async fn a_failing_request_takes_no_other_along() {
    let fixture = Fixture::new().await;
    let fails = |connection: &Connection| {
        insert(2)(connection)?;
        Err::<(), _>(DatabaseError::Damaged { what: "on purpose" })
    };
    let panics = |connection: &Connection| -> Result<(), DatabaseError> {
        insert(3)(connection)?;
        panic!("on purpose")
    };
    let (go, held) = fixture.hold_up().await;
    let database = &fixture.database;
    let (held, first, second, third, fourth, ()) = tokio::join!(
        held,
        database.write(insert(1)),
        database.write(fails),
        database.write(panics),
        database.write(insert(4)),
        async { go.send(()).unwrap() },
    );
    assert!(held.is_ok() && first.is_ok() && fourth.is_ok());
    assert!(matches!(second, Err(DatabaseError::Damaged { .. })));
    assert!(matches!(third, Err(DatabaseError::Writer)));
    assert_eq!(fixture.rows().await, [1, 4]);
    fixture.end().await;
}

/// SQLite undoes the whole transaction when the disk is full. None of those in it may be told that
/// it was kept, and nothing may be kept of which they were told that it was not.
#[tokio::test]
async fn a_full_disk_is_told_to_everyone_in_the_transaction_and_nothing_of_it_is_kept() {
    let fixture = Fixture::new().await;
    let database = &fixture.database;
    database.write(insert(1)).await.unwrap();
    let fill = |connection: &Connection| -> Result<(), DatabaseError> {
        let pages: i64 = connection.pragma_query_value(None, "page_count", |row| row.get(0))?;
        connection.pragma_update(None, "max_page_count", pages)?;
        for x in 1000.. {
            insert(x)(connection)?;
        }
        Ok(())
    };
    let (go, held) = fixture.hold_up().await;
    let (held, before, filling, after, ()) = tokio::join!(
        held,
        database.write(insert(2)),
        database.write(fill),
        database.write(insert(3)),
        async { go.send(()).unwrap() },
    );
    held.unwrap();
    for refused in [before, filling, after] {
        assert!(refused.unwrap_err().is_disk_full());
    }
    assert_eq!(fixture.rows().await, [1]);
    database.write(insert(4)).await.unwrap();
    assert_eq!(fixture.rows().await, [1, 4]);
    fixture.end().await;
}

#[tokio::test]
async fn work_of_a_caller_that_gave_up_is_done_all_the_same() {
    let fixture = Fixture::new().await;
    let (go, held) = fixture.hold_up().await;
    drop(held);
    let (done, is_done) = tokio::sync::oneshot::channel();
    let mut abandoned = Box::pin(fixture.database.write_then(insert(7), |()| {
        done.send(()).unwrap();
    }));
    assert!(futures_util::poll!(&mut abandoned).is_pending());
    drop(abandoned);
    go.send(()).unwrap();
    is_done.await.unwrap();
    assert_eq!(fixture.rows().await, [7]);
    fixture.end().await;
}

#[tokio::test]
async fn ending_writes_what_was_accepted_waits_for_readings_and_leaves_one_complete_file() {
    let fixture = Fixture::new().await;
    let database = &fixture.database;
    database.write(insert(1)).await.unwrap();
    let (started, has_started) = tokio::sync::oneshot::channel();
    let (finish_reading, wait) = std::sync::mpsc::channel();
    let reading = async {
        let read = move |connection: &Connection| -> Result<_, DatabaseError> {
            started.send(()).unwrap();
            wait.recv().unwrap();
            rows(connection)
        };
        database.read(read).await
    };
    let steps = async {
        has_started.await.unwrap();
        let (go, held) = fixture.hold_up().await;
        let mut accepted = Box::pin(database.write(insert(2)));
        assert!(futures_util::poll!(&mut accepted).is_pending());
        fixture.scope.cancel();
        go.send(()).unwrap();
        held.await.unwrap();
        accepted.await.unwrap();
        finish_reading.send(()).unwrap();
    };
    let (read, ()) = tokio::join!(reading, steps);
    read.unwrap();
    fixture.scope.finish().await;
    assert!(matches!(database.write(insert(3)).await, Err(DatabaseError::Closed)));
    assert!(matches!(database.read(rows).await, Err(DatabaseError::Closed)));
    let files: Vec<_> = std::fs::read_dir(fixture.folder.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    assert_eq!(files, ["db"], "the log has been folded");
    let connection = Connection::open(fixture.folder.path().join("db")).unwrap();
    assert_eq!(rows(&connection).unwrap(), [1, 2]);
}

#[tokio::test]
async fn a_reading_sees_one_moment_and_cannot_write() {
    let fixture = Fixture::new().await;
    let (looked, has_looked) = tokio::sync::oneshot::channel();
    let (go, wait) = std::sync::mpsc::channel();
    let database = &fixture.database;
    let reading = database.read(move |connection| {
        let first = rows(connection)?;
        looked.send(()).unwrap();
        wait.recv().unwrap();
        Ok::<_, DatabaseError>((first, rows(connection)?))
    });
    let writing = async {
        has_looked.await.unwrap();
        database.write(insert(1)).await.unwrap();
        go.send(()).unwrap();
    };
    let (read, ()) = tokio::join!(reading, writing);
    assert_eq!(read.unwrap(), (vec![], vec![]));
    assert_eq!(fixture.rows().await, [1]);
    assert!(matches!(database.read(insert(2)).await, Err(DatabaseError::Sqlite(_))));
    fixture.end().await;
}

#[tokio::test]
async fn a_reading_that_panics_leaves_the_others_alone() {
    let fixture = Fixture::new().await;
    for _ in 0..10 {
        let read = fixture.database.read(|_| -> Result<(), DatabaseError> { panic!("on purpose") });
        assert!(matches!(read.await, Err(DatabaseError::Writer)));
    }
    assert_eq!(fixture.rows().await, [0; 0]);
    fixture.end().await;
}

#[tokio::test]
async fn every_answered_change_is_flushed() {
    let fixture = Fixture::new().await;
    let pragmas = |connection: &Connection| -> Result<(String, i64, bool), DatabaseError> {
        Ok((
            connection.pragma_query_value(None, "journal_mode", |row| row.get(0))?,
            connection.pragma_query_value(None, "synchronous", |row| row.get(0))?,
            connection.pragma_query_value(None, "foreign_keys", |row| row.get(0))?,
        ))
    };
    let pragmas = fixture.database.write(pragmas).await.unwrap();
    assert_eq!(pragmas, ("wal".to_owned(), 2, true));
    fixture.end().await;
}

#[tokio::test]
async fn a_database_of_a_newer_program_is_refused_and_left_alone() {
    let fixture = Fixture::new().await;
    let newer = |connection: &Connection| {
        Ok::<_, DatabaseError>(connection.pragma_update(None, "user_version", 1000)?)
    };
    fixture.database.write(newer).await.unwrap();
    fixture.end().await;
    let path = fixture.folder.path().join("db");
    let before = std::fs::read(&path).unwrap();
    let opened = Database::open(path.clone(), SETTINGS, &TaskScope::new()).await;
    assert!(matches!(opened.err(), Some(DatabaseError::TooNew { found: 1000, known: 1 })));
    assert_eq!(std::fs::read(&path).unwrap(), before);
}

#[tokio::test]
async fn migrations_run_once_each_and_one_that_fails_leaves_its_predecessor() {
    const FIRST: &str = "CREATE TABLE t (x INTEGER PRIMARY KEY)";
    const ADD: &str = "INSERT INTO t SELECT coalesce(max(x), 0) + 1 FROM t";
    const BROKEN: &str = "INSERT INTO t VALUES (50); INSERT INTO absent VALUES (1)";
    let folder = tempfile::tempdir().unwrap();
    let open = async |migrations: &'static [&'static str]| {
        let scope = TaskScope::new();
        let settings = Settings { migrations, ..SETTINGS };
        let opened = Database::open(folder.path().join("db"), settings, &scope).await;
        let rows = match &opened {
            Ok(database) => Ok(database.read(rows).await.unwrap()),
            Err(_) => Err(()),
        };
        scope.cancel();
        scope.finish().await;
        rows
    };
    assert_eq!(open(&[FIRST, ADD]).await, Ok(vec![1]));
    assert_eq!(open(&[FIRST, ADD]).await, Ok(vec![1]), "no step twice");
    assert_eq!(open(&[FIRST, ADD, ADD, BROKEN]).await, Err(()));
    assert_eq!(open(&[FIRST, ADD, ADD]).await, Ok(vec![1, 2]), "the step before it stays");
    assert_eq!(open(&[FIRST, ADD, ADD, ADD]).await, Ok(vec![1, 2, 3]));
}

/// SQLite plans one with a `LIMIT` anew whenever that is bound, unless it is told not to.
#[tokio::test]
async fn a_statement_is_planned_once_however_often_it_is_used() {
    let fixture = Fixture::new().await;
    let planned = |connection: &Connection| -> Result<i32, DatabaseError> {
        let mut again = 0;
        for limit in [10, 20, 30] {
            let mut statement =
                connection.prepare_cached("SELECT x FROM t WHERE x > ? ORDER BY x LIMIT ?")?;
            assert!(statement.query([0, limit])?.next()?.is_none());
            again += statement.get_status(rusqlite::StatementStatus::RePrepare);
        }
        Ok(again)
    };
    assert_eq!(fixture.database.write(planned).await.unwrap(), 0);
    assert_eq!(fixture.database.read(planned).await.unwrap(), 0);
    fixture.end().await;
}
