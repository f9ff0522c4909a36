use cortex_shared::tasks::TaskScope;
use rusqlite::Connection;
use serde_json::json;

use super::*;
use crate::store::Actor;
use crate::store::sqlite::SqliteStore;

struct Fixture {
    folder: tempfile::TempDir,
    store: Arc<SqliteStore>,
    log: Arc<AuditLog>,
    scope: TaskScope,
}

/// A log of this many lines, more than one page of them for the larger ones.
async fn fixture(lines: u32) -> Fixture {
    let fixture = open(tempfile::tempdir().unwrap()).await;
    fixture.append(lines).await;
    fixture
}

async fn open(folder: tempfile::TempDir) -> Fixture {
    let scope = TaskScope::new();
    let store = SqliteStore::open(folder.path().join("hub.db"), &scope).await.unwrap();
    let store = Arc::new(store);
    let log = AuditLog::new(Arc::clone(&store) as _, folder.path().join("audit.head"));
    log.begin().await.unwrap();
    Fixture { folder, store, log, scope }
}

impl Fixture {
    async fn append(&self, lines: u32) {
        for n in 0..lines {
            let line = Actor::from("ann").audit(n.into(), "test.done", n.to_string(), json!({}));
            self.store.record_audit(line).await.unwrap();
        }
    }

    /// The same data, opened by a hub that starts anew.
    async fn restart(self) -> Self {
        let Self { folder, store, log, scope } = self;
        scope.cancel();
        scope.finish().await;
        drop((store, log));
        open(folder).await
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
async fn a_cut_tail_is_found_and_nothing_is_written_after_it_until_somebody_accepts_it() {
    let fixture = fixture(5).await;
    fixture.log.move_mark().await.unwrap();
    let line = || Actor::from("ann").audit(9, "test.done", "x", json!({}));
    fixture.store.record_audit(line()).await.unwrap();
    fixture.store.record_audit(line()).await.unwrap();
    // Younger than the mark, but the hub remembers what it wrote.
    fixture.tamper("DELETE FROM audit WHERE seq > 5");
    let cut = Some(AuditProblem::CutOff { seq: 5, marked: 7 });
    assert_eq!(fixture.problem().await, cut);
    let refused = fixture.store.record_audit(line()).await.unwrap_err();
    assert!(matches!(refused, StoreError::AuditAltered { found: 5, written: 7 }), "{refused}");
    // Time passes: the evidence stays.
    fixture.log.move_mark().await.unwrap();
    assert_eq!(fixture.problem().await, cut);
    // Of a hub that starts anew, the mark speaks.
    let fixture = fixture.restart().await;
    assert_eq!(fixture.problem().await, cut);
    fixture.append(3).await;
    fixture.log.move_mark().await.unwrap();
    assert_eq!(fixture.problem().await, Some(AuditProblem::Rewritten { seq: 7 }));
    let found = fixture.log.accept("restored a backup", &Actor::from("ann")).await.unwrap();
    assert_eq!((found.problem, found.entries), (None, 9));
    let last = fixture.store.audit_page(Some(8), 9).await.unwrap().remove(0);
    assert_eq!((last.actor.as_str(), last.action.as_str()), ("ann", "audit.accepted"));
    assert!(last.detail.contains("restored a backup") && last.detail.contains("line 7"));
    let again = fixture.log.accept("again", &Actor::from("ann")).await.unwrap();
    assert_eq!(again.entries, 9, "there was nothing to accept");
}

#[tokio::test]
async fn lines_that_the_hub_did_not_write_are_found_and_the_running_hub_accepts_them_too() {
    let fixture = fixture(3).await;
    let head = fixture.store.audit_head().await.unwrap();
    let forged = Actor::from("bob").audit(1, "test.forged", "x", json!({}));
    let forged = AuditLine::after(head, &forged);
    let hex = |hash| blake3::Hash::from_bytes(hash).to_string();
    fixture.tamper(&format!(
        "INSERT INTO audit VALUES (4, 1, 'bob', 'test.forged', 'x', '{{}}', x'{}', x'{}')",
        hex(forged.prev_hash),
        hex(forged.hash)
    ));
    assert_eq!(fixture.problem().await, Some(AuditProblem::Foreign { seq: 4 }));
    fixture.log.accept("bob's script", &Actor::from("ann")).await.unwrap();
    fixture.append(1).await;
    assert_eq!(fixture.problem().await, None);
}

#[tokio::test]
async fn a_log_that_does_not_fit_together_cannot_be_accepted() {
    let fixture = fixture(5).await;
    fixture.tamper("DELETE FROM audit WHERE seq = 3");
    let found = fixture.log.accept("never mind", &Actor::from("ann")).await.unwrap();
    assert_eq!(found.problem, Some(AuditProblem::Numbering { expected: 3, found: 4 }));
    assert_eq!(fixture.store.audit_page(Some(5), 1).await.unwrap(), []);
}

#[tokio::test]
async fn a_mark_that_is_missing_or_damaged_is_said_and_not_replaced_by_itself() {
    let fixture = fixture(2).await;
    fixture.log.move_mark().await.unwrap();
    let mark = fixture.folder.path().join("audit.head");
    for text in ["{", "", "\u{0}\u{ff}"] {
        std::fs::write(&mark, text).unwrap();
        fixture.log.move_mark().await.unwrap();
        assert!(
            matches!(fixture.problem().await, Some(AuditProblem::MarkDamaged { .. })),
            "{text}"
        );
        assert_eq!(std::fs::read_to_string(&mark).unwrap(), text);
    }
    std::fs::remove_file(&mark).unwrap();
    let fixture = fixture.restart().await;
    fixture.log.move_mark().await.unwrap();
    let missing = fixture.problem().await.unwrap();
    assert!(missing.to_string().contains("audit.head is missing"), "{missing}");
    assert!(!mark.exists());
    let found = fixture.log.accept("the disk was full", &Actor::from("ann")).await.unwrap();
    assert_eq!(found.problem, None);
    assert!(mark.exists());
}
