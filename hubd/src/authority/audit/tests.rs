use rusqlite::Connection;
use serde_json::json;

use super::*;
use crate::store::Actor;
use crate::store::sqlite::SqliteStore;

struct Fixture {
    folder: tempfile::TempDir,
    store: Arc<SqliteStore>,
    log: Arc<AuditLog>,
}

/// A log of this many lines, more than one page of them for the larger ones.
async fn fixture(lines: u32) -> Fixture {
    let folder = tempfile::tempdir().unwrap();
    let store = SqliteStore::open(folder.path().join("hub.db"), &TaskScope::new()).await.unwrap();
    let store = Arc::new(store);
    let log = AuditLog::new(Arc::clone(&store) as _, folder.path().join("audit.head"));
    let fixture = Fixture { folder, store, log };
    fixture.append(lines).await;
    fixture
}

impl Fixture {
    async fn append(&self, lines: u32) {
        for n in 0..lines {
            let line = Actor::from("ann").audit(n.into(), "test.done", n.to_string(), json!({}));
            self.store.record_audit(line).await.unwrap();
        }
    }

    /// What somebody does who can write the database.
    fn tamper(&self, sql: &str) {
        let database = Connection::open(self.folder.path().join("hub.db")).unwrap();
        assert!(database.execute(sql, []).unwrap() > 0, "{sql} changes something");
    }

    async fn problem(&self) -> Option<AuditProblem> {
        self.log.verify().await.unwrap().problem
    }
}

#[tokio::test]
async fn an_untouched_log_verifies_over_page_boundaries() {
    for lines in [0, 1, PAGE_LINES, PAGE_LINES + 1] {
        let fixture = fixture(lines).await;
        let found = fixture.log.verify().await.unwrap();
        assert_eq!((found.problem, found.entries), (None, u64::from(lines)));
        assert_eq!(found.head, fixture.store.audit_head().await.unwrap());
    }
}

#[tokio::test]
async fn every_way_to_tamper_with_a_line_is_found() {
    use AuditProblem::{Edited, Numbering, Unchained};
    let before_hash = "(SELECT hash FROM audit WHERE seq = 1)";
    for (sql, expected) in [
        ("UPDATE audit SET actor = 'bob' WHERE seq = 3", Edited { seq: 3 }),
        ("UPDATE audit SET detail = '{\"x\":1}' WHERE seq = 3", Edited { seq: 3 }),
        ("UPDATE audit SET at = at + 1 WHERE seq = 1", Edited { seq: 1 }),
        ("UPDATE audit SET hash = x'00' WHERE seq = 3", Edited { seq: 3 }),
        ("UPDATE audit SET prev_hash = x'' WHERE seq = 1", Edited { seq: 1 }),
        ("UPDATE audit SET target = CAST(x'ff' AS TEXT) WHERE seq = 3", Edited { seq: 3 }),
        ("DELETE FROM audit WHERE seq = 3", Numbering { expected: 3, found: 4 }),
        ("DELETE FROM audit WHERE seq = 1", Numbering { expected: 1, found: 2 }),
        (
            "INSERT INTO audit SELECT 7, at, actor, action, target, detail, hash, hash FROM audit \
             WHERE seq = 6",
            Edited { seq: 7 },
        ),
        (
            &format!(
                "UPDATE audit SET prev_hash = {before_hash}, hash = {before_hash} WHERE seq = 3"
            ),
            Edited { seq: 3 },
        ),
    ] {
        let fixture = fixture(6).await;
        fixture.tamper(sql);
        assert_eq!(fixture.problem().await, Some(expected), "{sql}");
    }
    // A line before the first one, under a number that is never given.
    let fixture = fixture(2).await;
    fixture.tamper("INSERT INTO audit SELECT -1, at, actor, action, target, detail, prev_hash, hash FROM audit WHERE seq = 1");
    assert!(matches!(fixture.problem().await, Some(Numbering { expected: 1, .. })));
    // A line whose own hash was made to fit again.
    let fixture = self::fixture(6).await;
    let mut line = fixture.store.audit_page(Some(2), 1).await.unwrap().remove(0);
    line.actor = "bob".into();
    let hash = blake3::Hash::from_bytes(line.computed_hash()).to_string();
    fixture.tamper(&format!("UPDATE audit SET actor = 'bob', hash = x'{hash}' WHERE seq = 3"));
    assert_eq!(fixture.problem().await, Some(Unchained { seq: 4 }));
}

#[tokio::test]
async fn a_cut_tail_is_found_once_the_mark_was_beyond_it_and_the_evidence_stays() {
    let fixture = fixture(5).await;
    fixture.log.move_mark().await.unwrap();
    fixture.tamper("DELETE FROM audit WHERE seq > 3");
    let cut = Some(AuditProblem::CutOff { seq: 3, marked: 5 });
    assert_eq!(fixture.problem().await, cut);
    // Time passes, and the hub starts anew: the mark is not moved back.
    fixture.log.move_mark().await.unwrap();
    assert_eq!(fixture.problem().await, cut);
    // New lines take the place of the old ones: another log than the one that was marked.
    fixture.append(4).await;
    fixture.log.move_mark().await.unwrap();
    assert_eq!(fixture.problem().await, Some(AuditProblem::Rewritten { seq: 5 }));
}

#[tokio::test]
async fn lines_younger_than_the_mark_can_be_cut_off_unseen() {
    // The limit of what the mark covers, as the module says.
    let fixture = fixture(5).await;
    fixture.log.move_mark().await.unwrap();
    fixture.append(2).await;
    fixture.tamper("DELETE FROM audit WHERE seq > 5");
    assert_eq!(fixture.problem().await, None);
}

#[tokio::test]
async fn a_damaged_mark_is_said_and_not_replaced() {
    let fixture = fixture(2).await;
    let mark = fixture.folder.path().join("audit.head");
    std::fs::write(&mark, "{").unwrap();
    assert!(matches!(fixture.log.verify().await, Err(AuditError::Mark { .. })));
    assert!(matches!(fixture.log.move_mark().await, Err(AuditError::Mark { .. })));
    assert_eq!(std::fs::read_to_string(mark).unwrap(), "{");
}
