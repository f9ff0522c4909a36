use super::super::contract::{Engine, contract_tests};
use super::*;

struct Sqlite;

impl Engine for Sqlite {
    async fn open(&self, folder: &Path, scope: &TaskScope) -> Arc<dyn WorkspaceStore> {
        Arc::new(SqliteWorkspaceStore::open(folder.join("ws.db"), scope).await.unwrap())
    }
}

contract_tests!(Sqlite);

#[tokio::test]
async fn a_database_of_a_newer_program_is_refused_and_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ws.db");
    let scope = TaskScope::new();
    drop(SqliteWorkspaceStore::open(path.clone(), &scope).await.unwrap());
    scope.cancel();
    scope.finish().await;
    let connection = Connection::open(&path).unwrap();
    connection.pragma_update(None, "user_version", 1000).unwrap();
    drop(connection);
    let opened = SqliteWorkspaceStore::open(path, &TaskScope::new()).await;
    assert!(matches!(opened, Err(StoreError::TooNew { found: 1000, .. })));
}

#[tokio::test]
async fn every_answered_change_is_flushed() {
    let folder = tempfile::tempdir().unwrap();
    let connection = open_writer(&folder.path().join("ws.db")).unwrap();
    let mode: String =
        connection.pragma_query_value(None, "journal_mode", |row| row.get(0)).unwrap();
    let synchronous: i64 =
        connection.pragma_query_value(None, "synchronous", |row| row.get(0)).unwrap();
    assert_eq!((mode.as_str(), synchronous), ("wal", 2));
}

/// One request that fails, or whose code fails, is undone alone; its neighbours in the transaction
/// are kept.
#[tokio::test]
async fn a_failing_request_takes_no_other_along() {
    let folder = tempfile::tempdir().unwrap();
    let scope = TaskScope::new();
    let store = SqliteWorkspaceStore::open(folder.path().join("ws.db"), &scope).await.unwrap();
    let node = NodeId::new();
    let note = |node: NodeId| {
        move |connection: &Connection| {
            connection.execute(
                "INSERT INTO cursors (node, epoch, applied_seq, at_ms) VALUES (?1, x'', 7, 0)",
                [node.as_bytes()],
            )?;
            Ok(())
        }
    };
    let fails = move |connection: &Connection| {
        note(NodeId::new())(connection)?;
        Err::<(), _>(damaged("on purpose"))
    };
    let panics = move |connection: &Connection| -> Result<(), StoreError> {
        note(NodeId::new())(connection)?;
        panic!("on purpose")
    };
    // Joined, so that they are in one batch or in several, as it comes.
    let (first, second, third, fourth) = tokio::join!(
        store.writer.write(note(node)),
        store.writer.write(fails),
        store.writer.write(panics),
        store.writer.write(note(NodeId::new())),
    );
    assert!(first.is_ok() && fourth.is_ok());
    assert!(matches!(second, Err(StoreError::Damaged { .. })));
    assert!(matches!(third, Err(StoreError::Writer)));
    let rows: i64 = store
        .readers
        .read(|connection| {
            Ok(connection.query_row("SELECT count(*) FROM cursors", [], |r| r.get(0))?)
        })
        .await
        .unwrap();
    assert_eq!(rows, 2);
    scope.cancel();
    scope.finish().await;
    assert!(matches!(store.writer.write(|_| Ok(())).await, Err(StoreError::Closed)));
}
