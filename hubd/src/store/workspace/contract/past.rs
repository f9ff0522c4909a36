//! What is remembered of the past, and how it comes back.

use std::time::Duration;

use cortex_shared::clock::unix_ms;
use cortex_shared::entry::{Digest, Entry};
use cortex_shared::wire_path::WirePath;

use super::super::*;
use super::Engine;
use super::fixture::{Fixture, create, file, link, op, path};

const DAY_MS: i64 = 24 * 3600 * 1000;

impl Fixture {
    /// Commits what brings an earlier state back.
    async fn restore(&self, at: Option<&str>, version: Option<u64>) -> RestorePlan {
        let plan = self.store.restore_plan(at.map(path), version).await.unwrap();
        self.set(plan.ops.clone()).await;
        plan
    }

    async fn log(&self, at: Option<&str>) -> Vec<LogEntry> {
        let filter = LogFilter { path: at.map(path), before: None, limit: 1000 };
        let page = self.store.log(filter).await.unwrap();
        assert_eq!(page.next_before, None);
        page.entries
    }

    /// Lets go of everything whose time is over at `now_ms`.
    async fn trim(&self, now_ms: i64) -> usize {
        let mut trimmed = 0;
        loop {
            match self.store.trim(now_ms).await.unwrap() {
                0 => return trimmed,
                some => trimmed += some,
            }
        }
    }
}

pub(crate) async fn what_is_replaced_or_deleted_can_be_brought_back(engine: &impl Engine) {
    let fixture = Fixture::new(engine).await;
    fixture.add_chunks(&[b"one", b"two"]).await;
    let (one, two) = (file(b"one"), file(b"two"));
    fixture.set(vec![create("f", one.clone())]).await;
    fixture.set(vec![op("f", Some(&one), Some(two.clone()))]).await;
    fixture.set(vec![op("f", Some(&two), None)]).await;
    let nothing = fixture.store.restore_plan(Some(path("never")), None).await;
    assert!(matches!(nothing, Err(StoreError::NothingBefore { .. })));

    let plan = fixture.restore(Some("f"), None).await;
    assert_eq!(plan.version, 2, "before its last change");
    assert_eq!(fixture.tree(1000).await[&path("f")], two);
    let plan = fixture.restore(Some("f"), Some(1)).await;
    assert_eq!((plan.version, plan.forgotten), (1, vec![]));
    assert_eq!(fixture.tree(1000).await[&path("f")], one);
    // What a restoration replaced is kept in turn.
    assert_eq!(fixture.restore(Some("f"), None).await.version, 4);
    assert_eq!(fixture.tree(1000).await[&path("f")], two);
    let beyond = fixture.store.restore_plan(Some(path("f")), Some(99)).await;
    assert!(matches!(beyond, Err(StoreError::BeyondHead { asked: 99, head: 6 })));
    assert_eq!(fixture.store.restore_plan(Some(path("f")), Some(6)).await.unwrap().ops, []);

    // Of another kind, below a directory that is gone, and after a restart of the store.
    fixture.set(vec![create("d", Entry::Dir), create("d/x", link("1"))]).await;
    fixture
        .set(vec![
            op("d/x", Some(&link("1")), None),
            op("d", Some(&Entry::Dir), None),
            create("d", link("2")),
        ])
        .await;
    let fixture = fixture.reopen(engine).await;
    let plan = fixture.store.restore_plan(Some(path("d/x")), None).await.unwrap();
    assert_eq!(plan.ops, [create("d/x", link("1"))]);
    let result = fixture.commit(plan.ops).await;
    assert_eq!(result.rejected[0].reason, RejectReason::NoParent, "a link is in the way");
    fixture.set(vec![op("d", Some(&link("2")), None)]).await;
    fixture.restore(Some("d/x"), None).await;
    let tree = fixture.tree(1000).await;
    assert_eq!((&tree[&path("d")], &tree[&path("d/x")]), (&Entry::Dir, &link("1")));
}

pub(crate) async fn a_deleted_directory_comes_back_with_what_was_deleted_with_it(
    engine: &impl Engine,
) {
    let fixture = Fixture::new(engine).await;
    let names = ["d", "d/a", "d/e", "d/e/b"];
    let entries = [Entry::Dir, link("a"), Entry::Dir, link("b")];
    let ops = names.iter().zip(&entries).map(|(name, entry)| create(name, entry.clone())).collect();
    fixture.set(ops).await;
    let full = fixture.tree(1000).await;
    // As members delete: deepest first, in several commits.
    for (name, entry) in names.iter().zip(&entries).rev() {
        fixture.set(vec![op(name, Some(entry), None)]).await;
    }
    fixture.set(vec![create("d-other", link("stays"))]).await;
    let plan = fixture.restore(Some("d"), None).await;
    assert_eq!(plan.version, 4);
    let mut tree = fixture.tree(1000).await;
    assert!(tree.remove(&path("d-other")).is_some());
    assert_eq!(tree, full);
}

pub(crate) async fn the_whole_tree_comes_back_and_nothing_goes(engine: &impl Engine) {
    let fixture = Fixture::new(engine).await;
    fixture.set(vec![create("a", link("1")), create("d", Entry::Dir)]).await;
    fixture.set(vec![create("d/b", link("2")), create("same", link("s"))]).await;
    let before = fixture.tree(1000).await;
    fixture
        .set(vec![
            op("a", Some(&link("1")), Some(link("changed"))),
            op("d/b", Some(&link("2")), None),
            op("d", Some(&Entry::Dir), None),
            create("later", link("l")),
        ])
        .await;
    let unnamed = fixture.store.restore_plan(None, None).await;
    assert!(matches!(unnamed, Err(StoreError::NothingBefore { .. })));
    let plan = fixture.restore(None, Some(4)).await;
    assert_eq!(plan.ops.len(), 3, "only what differs");
    let mut tree = fixture.tree(1000).await;
    assert_eq!(tree.remove(&path("later")), Some(link("l")), "what came later stays");
    assert_eq!(tree, before);
}

pub(crate) async fn the_past_is_kept_for_so_long_and_so_many_versions(engine: &impl Engine) {
    let fixture = Fixture::new(engine).await;
    let store = &fixture.store;
    let keep_for = Duration::from_secs(24 * 3600);
    let settings = WorkspaceSettings { keep_versions: 3, keep_for, ..Default::default() };
    store.set_settings(settings).await.unwrap();
    fixture.add_chunks(&[b"old"]).await;
    fixture.set(vec![create("x", file(b"old")), create("f", link("0"))]).await;
    for round in 1..=5 {
        let (old, new) = (link(&(round - 1).to_string()), link(&round.to_string()));
        fixture.set(vec![op("f", Some(&old), Some(new))]).await;
    }
    // Versions 2 to 6 of "f" were replaced; the three newest are kept.
    assert_eq!(store.usage().await.unwrap().old_versions, 3);
    let plan = store.restore_plan(Some(path("f")), Some(4)).await.unwrap();
    assert_eq!(plan.ops, [op("f", Some(&link("5")), Some(link("2")))]);
    let plan = store.restore_plan(None, Some(3)).await.unwrap();
    assert_eq!((plan.ops, plan.forgotten), (vec![], vec![path("f")]), "that is said");

    // What a kept version names is not collected.
    fixture.set(vec![op("x", Some(&file(b"old")), None)]).await;
    let later = unix_ms() + 1000;
    let useless = async || store.unused_packs(None, later).await.unwrap().0.useless.len();
    assert_eq!(useless().await, 0);
    assert_eq!(fixture.trim(unix_ms()).await, 0, "its time is not over");
    assert_eq!(useless().await, 0);
    assert_eq!(fixture.trim(unix_ms() + 2 * DAY_MS).await, 4);
    assert_eq!(useless().await, 1);
    let usage = store.usage().await.unwrap();
    assert_eq!((usage.old_versions, usage.oldest_version), (0, 8));
    let gone = store.restore_plan(Some(path("f")), Some(7)).await;
    assert!(matches!(gone, Err(StoreError::VersionForgotten { asked: 7, oldest: 8 })));
    // Fewer than before, of what is there already; and none at all.
    for round in 6..=8 {
        let (old, new) = (link(&(round - 1).to_string()), link(&round.to_string()));
        fixture.set(vec![op("f", Some(&old), Some(new))]).await;
    }
    for keep_versions in [2, 0] {
        let settings = WorkspaceSettings { keep_versions, keep_for, ..Default::default() };
        store.set_settings(settings).await.unwrap();
        fixture.trim(unix_ms()).await;
        assert_eq!(store.usage().await.unwrap().old_versions, u64::from(keep_versions));
    }
    fixture.set(vec![op("f", Some(&link("8")), None)]).await;
    assert_eq!(store.usage().await.unwrap().old_versions, 0);
}

pub(crate) async fn the_log_is_read_newest_first_in_pages(engine: &impl Engine) {
    let fixture = Fixture::new(engine).await;
    fixture
        .set(vec![create("d", Entry::Dir), create("d/f", link("1")), create("g", link("1"))])
        .await;
    fixture.set(vec![op("d/f", Some(&link("1")), Some(link("2")))]).await;
    fixture.set(vec![op("d/f", Some(&link("2")), None)]).await;
    let mut again = fixture.batch(vec![create("d/f", link("3"))]);
    again.author = Author::Operator("ann".into());
    fixture.store.commit(again).await.unwrap();

    use LoggedChange::{Created, Deleted, Replaced};
    let log = fixture.log(None).await;
    let shown: Vec<_> = log
        .iter()
        .map(|entry| (entry.seq, entry.path.to_string(), entry.change, entry.current))
        .collect();
    let f = || "d/f".to_owned();
    assert_eq!(
        shown,
        [
            (6, f(), Created, true),
            (5, f(), Deleted, false),
            (4, f(), Replaced, false),
            (3, "g".to_owned(), Created, true),
            (2, f(), Created, false),
            (1, "d".to_owned(), Created, true),
        ]
    );
    assert_eq!(log[0].author, Some(Author::Operator("ann".into())));
    assert!(log[1..].iter().all(|entry| entry.author == Some(Author::Node(fixture.node))));
    assert!(log.iter().all(|entry| entry.at_ms > 0));
    let below: Vec<u64> = fixture.log(Some("d")).await.iter().map(|entry| entry.seq).collect();
    assert_eq!(below, [6, 5, 4, 2, 1]);
    let mut paged = Vec::new();
    let mut before = None;
    loop {
        let filter = LogFilter { path: None, before, limit: 2 };
        let page = fixture.store.log(filter).await.unwrap();
        paged.extend(page.entries);
        before = page.next_before;
        if before.is_none() {
            break;
        }
    }
    assert_eq!(paged, log);
    // What is forgotten is not called new.
    fixture.trim(unix_ms() + 30 * DAY_MS).await;
    assert_eq!(fixture.log(Some("d/f")).await[0].change, LoggedChange::Created);
    fixture.set(vec![op("g", Some(&link("1")), Some(link("2")))]).await;
    fixture.trim(unix_ms() + 60 * DAY_MS).await;
    let g = fixture.log(Some("g")).await;
    assert_eq!((g.len(), g[0].change), (1, LoggedChange::Written));
}

pub(crate) async fn deletions_are_recorded_for_a_month_and_their_end_is_said(engine: &impl Engine) {
    let fixture = Fixture::new(engine).await;
    fixture.set(vec![create("a", link("1")), create("b", link("1"))]).await;
    fixture.set(vec![op("a", Some(&link("1")), None)]).await;
    fixture.set(vec![create("c", link("1"))]).await;
    let floor = async || fixture.store.changes(2, 1000).await.unwrap().log_floor;
    fixture.trim(unix_ms() + 20 * DAY_MS).await;
    assert_eq!(floor().await, 0);
    assert_eq!(fixture.store.changes(2, 1000).await.unwrap().changes.len(), 2);
    fixture.trim(unix_ms() + 31 * DAY_MS).await;
    assert_eq!(floor().await, 3);
    assert_eq!(fixture.tree(1000).await.len(), 2);
    let fixture = fixture.reopen(engine).await;
    assert_eq!(fixture.store.changes(3, 1000).await.unwrap().log_floor, 3);
}

pub(crate) async fn sparse_packs_are_replaced_unless_something_of_them_is_touched(
    engine: &impl Engine,
) {
    let fixture = Fixture::new(engine).await;
    let store = &fixture.store;
    let sparse = fixture.add_chunks(&[b"used", b"useless and long", b"also useless"]).await;
    let dense = fixture.add_chunks(&[b"used, most of it", b"not"]).await;
    let other = fixture.add_chunks(&[b"more", b"this is not used either"]).await;
    fixture
        .set(vec![
            create("f", file(b"used")),
            create("g", file(b"used, most of it")),
            create("h", file(b"more")),
        ])
        .await;
    let hash = |data: &[u8]| Digest::of(data);
    let later = unix_ms() + 1000;
    let unused = async || store.unused_packs(None, later).await.unwrap().0;
    let used_of = |pack, data: &[u8]| SparsePack { hash: pack, used: vec![hash(data)] };
    assert_eq!(unused().await.sparse, [used_of(sparse, b"used"), used_of(other, b"more")]);

    let chunks =
        [&b"used"[..], b"more"].map(|data| cortex_shared::chunk::ChunkRef::of(data).unwrap());
    let new = PackRecord { hash: hash(b"new pack"), bytes: 8, chunks: chunks.into() };
    let replace = |since| store.replace_packs(vec![sparse, other], new.clone(), since);
    assert!(!replace(0).await.unwrap(), "what it leaves out was touched since");
    assert!(store.has_pack(sparse).await.unwrap() && !store.has_pack(new.hash).await.unwrap());
    assert!(replace(later).await.unwrap());
    let found = store.packs_of(vec![hash(b"used"), hash(b"more")]).await.unwrap();
    assert_eq!(found.packs, [(new.hash, vec![hash(b"used"), hash(b"more")])]);
    assert_eq!(store.have(vec![hash(b"also useless")]).await.unwrap(), [false]);
    let packs = store.packs().await.unwrap();
    assert!(packs.contains(&dense) && packs.contains(&new.hash) && packs.len() == 2);
    assert_eq!(unused().await, UnusedPacks::default());
    assert!(store.wanted().await.unwrap().is_empty(), "nothing is lost by it");
}

pub(crate) async fn settings_are_kept(engine: &impl Engine) {
    let fixture = Fixture::new(engine).await;
    assert_eq!(fixture.store.settings().await.unwrap(), WorkspaceSettings::default());
    let settings = WorkspaceSettings {
        quota_bytes: Some(1 << 40),
        keep_for: Duration::from_secs(5),
        keep_versions: 7,
    };
    fixture.store.set_settings(settings).await.unwrap();
    let entry: Option<Entry> =
        fixture.store.entry(WirePath::new("no/such").unwrap()).await.unwrap();
    assert_eq!(entry, None);
    let fixture = fixture.reopen(engine).await;
    assert_eq!(fixture.store.settings().await.unwrap(), settings);
}
