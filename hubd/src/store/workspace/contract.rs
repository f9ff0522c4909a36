//! What every engine of a workspace's store does. An engine's tests call [`contract_tests`].

mod fixture;
mod hold;
mod past;

use std::collections::BTreeMap;
use std::future::Future;
use std::path::Path;
use std::sync::Arc;

use cortex_shared::chunk::{ChunkRef, Recipe};
use cortex_shared::clock::unix_ms;
use cortex_shared::entry::{Digest, Entry, File};
use cortex_shared::ids::{NodeId, WorkspaceEpoch};
use cortex_shared::tasks::TaskScope;
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};

use self::fixture::{Fixture, assert_root, create, link, path, random_op, read_on};
pub(crate) use self::fixture::{file, op, root_digest};
pub(crate) use self::hold::*;
pub(crate) use self::past::*;
use super::*;

/// Opens stores of one kind.
pub(crate) trait Engine {
    /// Opens the store in a folder, which may hold one already.
    fn open(
        &self,
        folder: &Path,
        scope: &TaskScope,
    ) -> impl Future<Output = Arc<dyn WorkspaceStore>>;
}

/// A test per rule of the contract, for one engine.
macro_rules! contract_tests {
    ($engine:expr) => {
        contract_tests!(@ $engine,
            a_new_workspace_is_empty,
            compare_and_set_table,
            accepted_operations_are_numbered_and_become_visible_together,
            directories_come_before_and_go_after_what_is_in_them,
            content_must_be_present_before_its_entry,
            a_repeated_commit_returns_its_first_result,
            a_refused_commit_is_judged_anew,
            everything_is_there_after_reopening,
            the_epoch_is_checked,
            a_version_that_never_was_begins_a_new_epoch,
            cursors_never_go_back,
            conflicts_are_listed_while_their_copies_exist,
            packs_are_found_by_their_chunks,
            lost_chunks_are_wanted_until_they_are_here_again,
            a_useless_pack_that_is_touched_again_stays,
            changes_are_paged_by_size,
            results_stay_within_their_budget,
            a_reader_that_pages_while_the_head_moves_ends_with_the_tree_of_the_head,
            concurrent_commits_are_all_kept,
            what_is_replaced_or_deleted_can_be_brought_back,
            a_deleted_directory_comes_back_with_what_was_deleted_with_it,
            the_whole_tree_comes_back_and_nothing_goes,
            the_past_is_kept_for_so_long_and_so_many_versions,
            the_log_is_read_newest_first_in_pages,
            deletions_are_recorded_for_a_month_and_their_end_is_said,
            sparse_packs_are_replaced_unless_something_of_them_is_touched,
            settings_are_kept,
            who_goes_by_other_rules_changes_nothing_but_the_rules,
            too_many_deletions_of_a_member_are_held_and_all_else_goes_on,
            deletions_count_together_within_a_minute_however_they_are_cut,
            what_only_moves_is_no_loss,
            content_that_is_elsewhere_by_a_members_word_alone_is_lost_all_the_same,
            an_operators_word_lets_as_many_go_as_it_was_given_for,
            a_whole_commit_is_all_or_nothing,
            a_subtree_is_read_at_one_moment_with_its_digest,
        );
    };
    (@ $engine:expr, $($name:ident,)*) => {
        $(
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $name() {
                crate::store::workspace::contract::$name(&$engine).await;
            }
        )*
    };
}
pub(crate) use contract_tests;

pub(crate) async fn a_whole_commit_is_all_or_nothing(engine: &impl Engine) {
    let fixture = Fixture::new(engine).await;
    fixture.add_chunks(&[b"one"]).await;
    let one = file(b"one");
    let head = *fixture.store.watch_head().borrow();
    let lacking = vec![create("a", one.clone()), create("b", file(b"not here"))];
    let refused = fixture.store.commit_whole(fixture.batch(lacking)).await;
    let Err(StoreError::NotWhole { path, reason }) = refused else { panic!("it is refused") };
    assert_eq!((path.as_str(), reason), ("b", RejectReason::MissingChunks));
    assert!(fixture.tree(1000).await.is_empty());
    assert_eq!(*fixture.store.watch_head().borrow(), head);
    // A repetition that is accepted, and one of that.
    let whole = fixture.batch(vec![create("a", one.clone()), create("b", one)]);
    let result = fixture.store.commit_whole(whole.clone()).await.unwrap();
    assert_eq!(result.seqs, [1, 2]);
    assert_eq!(fixture.store.commit_whole(whole).await.unwrap(), result);
}

pub(crate) async fn a_subtree_is_read_at_one_moment_with_its_digest(engine: &impl Engine) {
    let fixture = Fixture::new(engine).await;
    fixture.add_chunks(&[b"one"]).await;
    let one = file(b"one");
    let made = ["d", "d/e", "d-not-in-it"].map(|name| create(name, Entry::Dir));
    fixture.set(made.to_vec()).await;
    fixture.set(vec![create("d/e/f", one.clone()), create("d/g", link("e/f"))]).await;
    let subtree = |at: &str, limit| fixture.store.subtree(path(at), limit);
    let found = subtree("d", 3).await.unwrap().unwrap();
    let expected = [("d/e", Entry::Dir), ("d/e/f", one), ("d/g", link("e/f"))];
    assert_eq!(found.entries, expected.clone().map(|(name, entry)| (path(name), entry)));
    let inside = expected.map(|(name, entry)| (path(name.strip_prefix("d/").unwrap()), entry));
    assert_eq!(found.digest, root_digest(&inside.into_iter().collect()));
    assert!(matches!(subtree("d", 2).await, Err(StoreError::TooMuch { limit: 2 })));
    for nothing in ["d/g", "d/e/f", "no", "no/such"] {
        assert_eq!(subtree(nothing, 9).await.unwrap(), None, "{nothing}");
    }
}

pub(crate) async fn a_new_workspace_is_empty(engine: &impl Engine) {
    let fixture = Fixture::new(engine).await;
    let summary = fixture.store.summary().await.unwrap();
    assert_eq!((summary.head.seq, summary.entries, summary.content_bytes), (0, 0, 0));
    assert_eq!(summary.head.root, Digest::ZERO);
    assert!(fixture.tree(1000).await.is_empty());
}

pub(crate) async fn compare_and_set_table(engine: &impl Engine) {
    use RejectReason::{Conflict, Invalid, MissingChunks, NoParent, NotEmpty};
    let (old, new, other) = (link("old"), link("new"), link("other"));
    let empty = file(b"");
    let mut touched = empty.clone();
    if let Entry::File(file) = &mut touched {
        file.mtime_ns = 99;
    }
    let absent_content = file(b"never sent");
    // What stands at "x", the operation's expectation and new entry, and the outcome: an accepted
    // change, an acceptance without one, or a refusal.
    let changed = Some(true);
    let equal = Some(false);
    for (what, before, expected, new_entry, outcome) in [
        ("create", None, None, Some(&new), Ok(changed)),
        ("create over another", Some(&old), None, Some(&new), Err(Conflict)),
        ("create what is there", Some(&new), None, Some(&new), Ok(equal)),
        ("replace", Some(&old), Some(&old), Some(&new), Ok(changed)),
        ("replace another", Some(&other), Some(&old), Some(&new), Err(Conflict)),
        ("replace what is gone", None, Some(&old), Some(&new), Err(Conflict)),
        ("replace by the same", Some(&new), Some(&old), Some(&new), Ok(equal)),
        ("delete", Some(&old), Some(&old), None, Ok(changed)),
        ("delete another", Some(&other), Some(&old), None, Err(Conflict)),
        ("delete what is gone", None, Some(&old), None, Ok(equal)),
        ("delete unseen", Some(&old), None, None, Err(Conflict)),
        ("time only", Some(&empty), Some(&empty), Some(&touched), Ok(equal)),
        ("link to directory", Some(&old), Some(&old), Some(&Entry::Dir), Ok(changed)),
        ("directory to link", Some(&Entry::Dir), Some(&Entry::Dir), Some(&old), Ok(changed)),
        ("empty file", None, None, Some(&empty), Ok(changed)),
        ("content that is not there", None, None, Some(&absent_content), Err(MissingChunks)),
    ] {
        let fixture = Fixture::new(engine).await;
        if let Some(before) = before {
            fixture.set(vec![create("x", before.clone())]).await;
        }
        let head = *fixture.store.watch_head().borrow();
        let result = fixture.commit(vec![op("x", expected, new_entry.cloned())]).await;
        match outcome {
            Ok(change) => {
                assert_eq!(result.rejected, [], "{what}");
                let seq = if change == changed { head.seq + 1 } else { 0 };
                assert_eq!(result.seqs, [seq], "{what}");
            }
            Err(reason) => {
                assert!(result.seqs.is_empty(), "{what}");
                assert_eq!(result.rejected[0].reason, reason, "{what}");
                assert_eq!(result.rejected[0].current.as_ref(), before, "{what}");
                assert_eq!(result.rejected[0].current_seq, head.seq, "{what}");
                assert_eq!(result.root, head.root, "{what}");
            }
        }
        let tree = fixture.tree(1000).await;
        let now = if outcome == Ok(changed) { new_entry } else { before };
        assert_eq!(tree.get(&path("x")), now, "{what}");
    }

    let fixture = Fixture::new(engine).await;
    fixture.set(vec![create("d", Entry::Dir), create("d/x", old.clone())]).await;
    for (what, op, reason) in [
        ("no parent", create("gone/x", new.clone()), NoParent),
        ("a link as parent", create("d/x/y", new.clone()), NoParent),
        ("delete with children", op("d", Some(&Entry::Dir), None), NotEmpty),
        ("replace with children", op("d", Some(&Entry::Dir), Some(new.clone())), NotEmpty),
    ] {
        let result = fixture.commit(vec![op]).await;
        assert_eq!(result.rejected[0].reason, reason, "{what}");
    }
    // Below what is no directory nothing stands, so there is nothing to delete.
    assert_eq!(fixture.set(vec![op("gone/x", Some(&old), None)]).await.seqs, [0]);
    let mut commit = fixture.batch(vec![create("y", new.clone())]);
    commit.ops.insert(0, Err(InvalidOp::Malformed));
    let result = fixture.store.commit(commit).await.unwrap();
    assert_eq!((result.rejected[0].index, result.rejected[0].reason), (0, Invalid));
    assert_eq!(result.seqs.len(), 1);
}

pub(crate) async fn accepted_operations_are_numbered_and_become_visible_together(
    engine: &impl Engine,
) {
    let fixture = Fixture::new(engine).await;
    let mut head = fixture.store.watch_head();
    let result = fixture
        .commit(vec![
            create("a", link("1")),
            create("b/c", link("2")),
            create("b", Entry::Dir),
            create("b/c", link("3")),
            op("a", Some(&link("1")), None),
        ])
        .await;
    assert_eq!(result.seqs, [1, 2, 3, 4]);
    assert_eq!(result.rejected.len(), 1);
    assert_eq!(result.rejected[0].index, 1);
    assert_eq!(result.seq, 4);
    assert!(head.has_changed().unwrap());
    let announced = *head.borrow_and_update();
    assert_eq!((announced.seq, announced.root), (4, result.root));
    assert_eq!(fixture.tree(1).await.len(), 2);
    let summary = fixture.store.summary().await.unwrap();
    assert_eq!((summary.head, summary.entries), (announced, 2));
    // What came again is no deletion any more.
    fixture.set(vec![create("a", link("4"))]).await;
    let page = fixture.store.changes(0, 1000).await.unwrap();
    let paths: Vec<_> = page.changes.iter().map(|change| change.path.to_string()).collect();
    assert_eq!(paths, ["b", "b/c", "a"]);
    head.mark_unchanged();
    // What changes nothing moves nothing.
    fixture.set(vec![create("b", Entry::Dir)]).await;
    assert!(!head.has_changed().unwrap());
}

pub(crate) async fn directories_come_before_and_go_after_what_is_in_them(engine: &impl Engine) {
    let fixture = Fixture::new(engine).await;
    let deep: Vec<String> = (1..=60).map(|depth| vec!["d"; depth].join("/")).collect();
    let mut ops: Vec<Op> = deep.iter().map(|path| create(path, Entry::Dir)).collect();
    ops.push(create(&format!("{}/leaf", deep[59]), link("x")));
    let full = fixture.set(ops).await;
    assert_eq!(fixture.tree(500).await.len(), 61);
    // A change at the bottom is seen at the top, and taking it back restores the digest.
    let leaf = format!("{}/leaf", deep[59]);
    let other = fixture.set(vec![op(&leaf, Some(&link("x")), Some(link("y")))]).await;
    assert_ne!(other.root, full.root);
    let back = fixture.set(vec![op(&leaf, Some(&link("y")), Some(link("x")))]).await;
    assert_eq!(back.root, full.root);
    let mut ops: Vec<Op> =
        deep.iter().rev().map(|path| op(path, Some(&Entry::Dir), None)).collect();
    ops.insert(0, op(&leaf, Some(&link("x")), None));
    // A directory that went and came again within one commit is an empty one.
    ops.push(create("d", Entry::Dir));
    ops.push(create("d/e", Entry::Dir));
    fixture.set(ops).await;
    assert_eq!(fixture.tree(500).await.len(), 2);
    let mut seen = BTreeMap::new();
    read_on(&*fixture.store, &mut seen, full.seq, 100).await;
    assert_eq!(seen.len(), 2);
}

pub(crate) async fn content_must_be_present_before_its_entry(engine: &impl Engine) {
    let fixture = Fixture::new(engine).await;
    let chunk = |data: &[u8]| ChunkRef::of(data).unwrap();
    let in_two = |second: ChunkRef| {
        let recipe = Recipe(vec![chunk(b"first"), second]);
        let size = 5 + u64::from(second.len);
        let content = Digest::of(b"firstsecond");
        Entry::File(File { content, size, executable: true, mtime_ns: 0, recipe })
    };
    let whole = in_two(chunk(b"second"));
    let result = fixture.commit(vec![create("f", whole.clone())]).await;
    assert_eq!(result.rejected[0].reason, RejectReason::MissingChunks);
    assert_eq!(result.rejected[0].missing, [chunk(b"first").hash, chunk(b"second").hash]);
    fixture.add_chunks(&[b"first"]).await;
    let result = fixture.commit(vec![create("f", whole.clone())]).await;
    assert_eq!(result.rejected[0].missing, [chunk(b"second").hash]);
    fixture.add_chunks(&[b"second"]).await;
    // A chunk of another length than the one that is present.
    let lie = ChunkRef { hash: chunk(b"second").hash, len: 7 };
    let result = fixture.commit(vec![create("f", in_two(lie))]).await;
    assert_eq!(result.rejected[0].reason, RejectReason::Invalid);
    fixture.set(vec![create("f", whole.clone()), create("g", file(b"first"))]).await;
    assert_eq!(fixture.tree(1000).await[&path("f")], whole);
    assert_eq!(fixture.store.summary().await.unwrap().content_bytes, 16);
    // Another member's recipe for the same content is kept as well, at its own path.
    fixture.add_chunks(&[b"firstsec", b"ond"]).await;
    let Entry::File(mut other) = whole.clone() else { unreachable!() };
    other.recipe = Recipe(vec![chunk(b"firstsec"), chunk(b"ond")]);
    fixture.set(vec![create("h", Entry::File(other.clone()))]).await;
    let tree = fixture.tree(1000).await;
    assert_eq!((&tree[&path("f")], &tree[&path("h")]), (&whole, &Entry::File(other)));
    fixture.set(vec![op("f", Some(&whole), None), op("g", Some(&file(b"first")), None)]).await;
    assert_eq!(fixture.store.summary().await.unwrap().content_bytes, 11);
}

pub(crate) async fn a_repeated_commit_returns_its_first_result(engine: &impl Engine) {
    let fixture = Fixture::new(engine).await;
    let recipe = Recipe(vec![ChunkRef::of(b"one").unwrap(), ChunkRef::of(b"two").unwrap()]);
    fixture.add_chunks(&[b"one", b"two"]).await;
    let content = Digest::of(b"onetwo");
    let large = File { content, size: 6, executable: false, mtime_ns: 5, recipe };
    fixture
        .set(vec![
            create("taken", link("theirs")),
            create("file", Entry::File(large)),
            create("dir", Entry::Dir),
        ])
        .await;
    let mut commit = fixture.batch(vec![
        create("new", link("mine")),
        create("taken", link("mine")),
        create("file", link("mine")),
        create("dir", link("mine")),
        create("absent", file(b"not sent")),
        create("no/parent", link("mine")),
    ]);
    commit.ops.push(Err(InvalidOp::Malformed));
    let first = fixture.store.commit(commit.clone()).await.unwrap();
    assert_eq!((first.seqs.len(), first.rejected.len()), (1, 6));
    // The world moves on; the answer does not.
    fixture
        .set(vec![
            op("new", Some(&link("mine")), None),
            op("taken", Some(&link("theirs")), Some(link("again"))),
        ])
        .await;
    let head = *fixture.store.watch_head().borrow();
    let again = fixture.store.commit(commit.clone()).await.unwrap();
    assert_eq!(again, first);
    assert_eq!(*fixture.store.watch_head().borrow(), head, "nothing was done twice");
    let fixture = fixture.reopen(engine).await;
    assert_eq!(fixture.store.commit(commit.clone()).await.unwrap(), first);
    commit.author = Author::Node(NodeId::new());
    let foreign = fixture.store.commit(commit).await;
    assert!(matches!(foreign, Err(StoreError::ForeignCommit { .. })));
}

pub(crate) async fn a_refused_commit_is_judged_anew(engine: &impl Engine) {
    let fixture = Fixture::new(engine).await;
    let commit = fixture.batch(vec![create("f", file(b"late"))]);
    let refused = fixture.store.commit(commit.clone()).await.unwrap();
    assert_eq!(refused.rejected[0].reason, RejectReason::MissingChunks);
    fixture.add_chunks(&[b"late"]).await;
    assert_eq!(fixture.store.commit(commit.clone()).await.unwrap().seqs, [1]);
    assert_eq!(fixture.store.commit(commit).await.unwrap().seqs, [1]);
}

pub(crate) async fn everything_is_there_after_reopening(engine: &impl Engine) {
    let fixture = Fixture::new(engine).await;
    let pack = fixture.add_chunks(&[b"content"]).await;
    fixture
        .set(vec![create("d", Entry::Dir), create("d/f", file(b"content")), create("l", link("x"))])
        .await;
    fixture.set(vec![op("l", Some(&link("x")), None)]).await;
    let epoch = fixture.epoch;
    fixture.store.ack_applied(fixture.node, epoch, 3).await.unwrap();
    let head = *fixture.store.watch_head().borrow();
    let tree = fixture.tree(1000).await;
    let summary = fixture.store.summary().await.unwrap();
    let fixture = fixture.reopen(engine).await;
    assert_eq!(*fixture.store.watch_head().borrow(), head);
    assert_eq!(head.epoch, epoch);
    assert_eq!(fixture.tree(1000).await, tree);
    assert_eq!(fixture.store.summary().await.unwrap(), summary);
    assert_eq!(fixture.store.applied(fixture.node).await.unwrap(), 3);
    assert!(fixture.store.has_pack(pack).await.unwrap());
    assert_eq!(fixture.store.have(vec![Digest::of(b"content")]).await.unwrap(), [true]);
    let more = fixture.set(vec![create("m", link("y"))]).await;
    assert_eq!(more.seqs, [head.seq + 1], "numbers go on");
}

pub(crate) async fn the_epoch_is_checked(engine: &impl Engine) {
    let fixture = Fixture::new(engine).await;
    let mut commit = fixture.batch(vec![create("x", link("y"))]);
    commit.epoch = WorkspaceEpoch::new();
    let refused = fixture.store.commit(commit).await;
    assert!(matches!(refused, Err(StoreError::WrongEpoch { .. })));
    let acked = fixture.store.ack_applied(fixture.node, WorkspaceEpoch::new(), 0).await;
    assert!(matches!(acked, Err(StoreError::WrongEpoch { .. })));
    assert!(fixture.tree(1000).await.is_empty());
}

pub(crate) async fn a_version_that_never_was_begins_a_new_epoch(engine: &impl Engine) {
    for (what, seq, root) in [
        ("beyond the head", 11, None),
        ("in the middle of a commit", 3, None),
        ("with another root", 2, Some(Digest::of(b"another"))),
    ] {
        let fixture = Fixture::new(engine).await;
        let mut heads = vec![*fixture.store.watch_head().borrow()];
        for name in ["a", "b", "c"] {
            fixture
                .set(vec![create(name, link("x")), create(&format!("{name}2"), link("x"))])
                .await;
            heads.push(*fixture.store.watch_head().borrow());
        }
        let last = heads[3];
        for known in &heads {
            let head = fixture.check_history(*known).await;
            assert_eq!(head, last, "a head there was");
        }
        let made_up = Head { seq: last.seq + (1 << 40), ..last };
        let refused = fixture.store.restart_if_lost(made_up).await;
        assert!(matches!(refused, Err(StoreError::BeyondHead { .. })), "{refused:?}");
        assert_eq!(*fixture.store.watch_head().borrow(), last, "nobody lost so many");
        let foreign = Head { epoch: WorkspaceEpoch::new(), seq: 99, root: Digest::of(b"x") };
        let head = fixture.check_history(foreign).await;
        assert_eq!(head, last, "another epoch proves nothing");

        let known = Head { epoch: last.epoch, seq, root: root.unwrap_or(last.root) };
        let head = fixture.check_history(known).await;
        assert_ne!(head.epoch, last.epoch, "{what}");
        assert!(head.seq > known.seq && head.seq > last.seq, "{what}");
        assert_eq!(head.root, last.root, "{what}");
        assert_eq!(*fixture.store.watch_head().borrow(), head, "{what}");
        for known in [known, last, head] {
            assert_eq!(fixture.check_history(known).await, head, "{what}: once");
        }
        assert_eq!(fixture.tree(1000).await.len(), 6, "{what}");
        let stale = fixture.store.commit(fixture.batch(vec![create("d", link("x"))])).await;
        assert!(matches!(stale, Err(StoreError::WrongEpoch { .. })), "{what}");
        let mut fixture = fixture.reopen(engine).await;
        assert_eq!(*fixture.store.watch_head().borrow(), head, "{what}: durable");
        fixture.epoch = head.epoch;
        assert_eq!(fixture.set(vec![create("d", link("x"))]).await.seq, head.seq + 1, "{what}");
    }
}

pub(crate) async fn cursors_never_go_back(engine: &impl Engine) {
    let fixture = Fixture::new(engine).await;
    fixture.set(vec![create("a", link("1")), create("b", link("2"))]).await;
    let store = &fixture.store;
    for (acked, applied) in [(1, 1), (2, 2), (1, 2)] {
        store.ack_applied(fixture.node, fixture.epoch, acked).await.unwrap();
        assert_eq!(store.applied(fixture.node).await.unwrap(), applied);
    }
    let beyond = store.ack_applied(fixture.node, fixture.epoch, 3).await;
    assert!(matches!(beyond, Err(StoreError::BeyondHead { asked: 3, head: 2 })));
    assert_eq!(store.applied(NodeId::new()).await.unwrap(), 0);
    let other = NodeId::new();
    store.ack_applied(other, fixture.epoch, 1).await.unwrap();
    let all = std::collections::HashMap::from([(fixture.node, 2), (other, 1)]);
    assert_eq!(store.applied_by_all().await.unwrap(), all);
}

pub(crate) async fn conflicts_are_listed_while_their_copies_exist(engine: &impl Engine) {
    let fixture = Fixture::new(engine).await;
    let mut copy = create("f.conflict-1", link("lost"));
    copy.conflict_of = Some(path("f"));
    fixture.set(vec![create("f", link("won")), copy.clone()]).await;
    // Another member with the same losing content makes the same copy.
    let mut same = fixture.batch(vec![copy]);
    same.author = Author::Node(NodeId::new());
    fixture.store.commit(same).await.unwrap();
    let listed = fixture.store.conflicts().await.unwrap();
    assert_eq!(listed.len(), 1);
    assert_eq!((&listed[0].path, &listed[0].copy), (&path("f"), &path("f.conflict-1")));
    assert_eq!(listed[0].author, Author::Node(fixture.node));
    fixture.set(vec![op("f.conflict-1", Some(&link("lost")), None)]).await;
    assert_eq!(fixture.store.conflicts().await.unwrap(), []);
}

pub(crate) async fn packs_are_found_by_their_chunks(engine: &impl Engine) {
    let fixture = Fixture::new(engine).await;
    let first = fixture.add_chunks(&[b"a", b"b"]).await;
    let second = fixture.add_chunks(&[b"c", b"b"]).await;
    let hash = |data: &[u8]| Digest::of(data);
    let store = &fixture.store;
    let have = store.have(vec![hash(b"a"), hash(b"x"), hash(b"c")]).await.unwrap();
    assert_eq!(have, [true, false, true]);
    let packs = store.packs_of(vec![hash(b"c"), hash(b"b"), hash(b"a")]).await.unwrap();
    let both = vec![hash(b"b"), hash(b"a")];
    assert_eq!(packs.packs, [(second, vec![hash(b"c")]), (first, both)]);
    assert!(packs.missing.is_empty());
    let found = store.packs_of(vec![hash(b"x"), hash(b"a"), hash(b"y")]).await.unwrap();
    assert_eq!(found.packs, [(first, vec![hash(b"a")])]);
    assert_eq!(found.missing, [hash(b"x"), hash(b"y")]);
    assert_eq!(store.packs().await.unwrap().len(), 2);
    let again = PackRecord { hash: first, bytes: 1, chunks: vec![ChunkRef::of(b"a").unwrap()] };
    assert_eq!(store.add_pack(again).await.unwrap(), PackAdded::Known);
    store.forget_packs(vec![first]).await.unwrap();
    assert_eq!(store.have(vec![hash(b"a"), hash(b"c")]).await.unwrap(), [false, true]);
    assert!(!store.has_pack(first).await.unwrap());
}

pub(crate) async fn lost_chunks_are_wanted_until_they_are_here_again(engine: &impl Engine) {
    let fixture = Fixture::new(engine).await;
    let store = &fixture.store;
    let hash = |data: &[u8]| Digest::of(data);
    let seq = || store.watch_head().borrow().seq;
    let lost = fixture.add_chunks(&[b"used", b"unused"]).await;
    let kept = fixture.add_chunks(&[b"kept"]).await;
    fixture.set(vec![create("f", file(b"used")), create("g", file(b"kept"))]).await;
    assert!(store.wanted().await.unwrap().is_empty());
    store.forget_packs(vec![lost]).await.unwrap();
    let mut wanted = store.wanted().await.unwrap();
    wanted.sort();
    let mut expected = vec![hash(b"used"), hash(b"unused")];
    expected.sort();
    assert_eq!((wanted, seq()), (expected, 3), "members are made to look");
    store.forget_packs(vec![lost]).await.unwrap();
    assert_eq!(seq(), 3, "no news");
    store.drop_wanted().await.unwrap();
    assert_eq!(store.wanted().await.unwrap(), [hash(b"used")], "the other one nobody names");
    fixture.add_chunks(&[b"something else"]).await;
    assert_eq!(seq(), 3);
    fixture.add_chunks(&[b"used", b"more"]).await;
    assert_eq!((store.wanted().await.unwrap(), seq()), (vec![], 4), "waiting members try again");
    let head = *store.watch_head().borrow();
    assert_eq!(fixture.check_history(head).await, head);
    assert_eq!(fixture.tree(1000).await.len(), 2);
    // What is collected is not lost.
    store.drop_packs(vec![kept], unix_ms() + 1).await.unwrap();
    assert!(store.wanted().await.unwrap().is_empty());
}

pub(crate) async fn a_useless_pack_that_is_touched_again_stays(engine: &impl Engine) {
    let fixture = Fixture::new(engine).await;
    let store = &fixture.store;
    let now_ms = unix_ms;
    let (used, useless, again) = (
        fixture.add_chunks(&[b"used", b"beside"]).await,
        fixture.add_chunks(&[b"useless"]).await,
        fixture.add_chunks(&[b"again"]).await,
    );
    fixture.set(vec![create("f", file(b"used"))]).await;
    let last_ms = now_ms();
    while now_ms() <= last_ms {
        tokio::task::yield_now().await;
    }
    let since_ms = last_ms + 1;
    assert_eq!(store.unused_packs(None, 0).await.unwrap(), (UnusedPacks::default(), None));
    let (unused, next) = store.unused_packs(None, since_ms).await.unwrap();
    let mut found = unused.useless;
    found.sort();
    let mut expected = vec![useless, again];
    expected.sort();
    assert_eq!((found, next), (expected, None));
    assert_eq!(fixture.add_chunks(&[b"again"]).await, again);
    let dropped = store.drop_packs(vec![useless, again], since_ms).await.unwrap();
    assert_eq!(dropped, [useless]);
    let packs = store.packs().await.unwrap();
    assert!(packs.contains(&used) && packs.contains(&again) && !packs.contains(&useless));
    assert_eq!(store.drop_recipes().await.unwrap(), 0);
}

pub(crate) async fn changes_are_paged_by_size(engine: &impl Engine) {
    let fixture = Fixture::new(engine).await;
    let ops = (0..100).map(|n| create(&format!("{n:050}"), link("target"))).collect();
    fixture.set(ops).await;
    let page = fixture.store.changes(0, 1000).await.unwrap();
    assert!((2..20).contains(&page.changes.len()), "{}", page.changes.len());
    assert!(page.last_seq < page.head.seq);
    assert_eq!(fixture.tree(1000).await.len(), 100);
    // A budget below a single change still moves on.
    assert_eq!(fixture.store.changes(7, 0).await.unwrap().changes.len(), 1);
    let all = fixture.store.changes(0, 1 << 20).await.unwrap();
    assert_eq!((all.changes.len(), all.last_seq), (100, 100));
    let none = fixture.store.changes(100, 1000).await.unwrap();
    assert_eq!((none.changes.len(), none.last_seq), (0, 100));
    let beyond = fixture.store.changes(101, 1000).await;
    assert!(matches!(beyond, Err(StoreError::BeyondHead { asked: 101, head: 100 })));
}

pub(crate) async fn results_stay_within_their_budget(engine: &impl Engine) {
    let fixture = Fixture::new(engine).await;
    fixture.add_chunks(&[b"c"]).await;
    // 60,000 chunks are a recipe of 2 MB; three of them exceed a message.
    let chunk = ChunkRef::of(b"c").unwrap();
    let recipe = Recipe(vec![chunk; 60_000]);
    let content = Digest::of(b"large");
    let large = Entry::File(File { content, size: 60_000, executable: false, mtime_ns: 0, recipe });
    let names = ["a", "b", "c"];
    fixture.set(names.map(|name| create(name, large.clone())).into()).await;
    let result = fixture.commit(names.map(|name| create(name, link("x"))).into()).await;
    let known = result.rejected.iter().filter(|rejection| rejection.current.is_some()).count();
    assert_eq!((result.rejected.len(), known), (3, 1));
    assert!(result.rejected.iter().all(|rejection| rejection.current_seq > 0));
    // Missing chunks share the budget, and each rejection names at least one.
    let absent = |n: u32| ChunkRef { hash: Digest::of(&n.to_be_bytes()), len: 1 };
    let recipe = Recipe((0..100_000).map(absent).collect());
    let entry =
        Entry::File(File { content, size: 100_000, executable: false, mtime_ns: 0, recipe });
    let result = fixture.commit(["d", "e"].map(|name| create(name, entry.clone())).into()).await;
    let missing: Vec<usize> = result.rejected.iter().map(|r| r.missing.len()).collect();
    assert_eq!(missing[0], 100_000);
    assert!((1..100_000).contains(&missing[1]), "{missing:?}");
}

pub(crate) async fn a_reader_that_pages_while_the_head_moves_ends_with_the_tree_of_the_head(
    engine: &impl Engine,
) {
    let seed = rand::random();
    // Captured by the test runner, and shown if the test fails.
    #[allow(clippy::print_stdout)]
    {
        println!("seed {seed}");
    }
    let mut rng = StdRng::seed_from_u64(seed);
    let mut fixture = Fixture::new(engine).await;
    let mut model = BTreeMap::new();
    let mut member = BTreeMap::new();
    let mut cursor = 0;
    for round in 0..200 {
        let mut ops = Vec::new();
        for _ in 0..rng.random_range(1..20) {
            ops.extend(random_op(&mut rng, &mut model));
        }
        let result = fixture.set(ops).await;
        let head = Head { epoch: fixture.epoch, seq: result.seq, root: result.root };
        if head.seq > 0 {
            assert_root(&model, &head);
        }
        // The member reads a page only, so it is always in the middle of something.
        let page = fixture.store.changes(cursor, rng.random_range(0..400)).await.unwrap();
        for change in page.changes {
            match change.entry {
                Some(entry) => drop(member.insert(change.path, entry)),
                None => drop(member.remove(&change.path)),
            }
        }
        cursor = page.last_seq;
        if round % 50 == 49 {
            read_on(&*fixture.store, &mut member, cursor, 300).await;
            assert_eq!(member, model);
            assert_eq!(fixture.tree(300).await, model);
            let entries = fixture.store.summary().await.unwrap().entries;
            assert_eq!(entries, model.len() as u64);
            fixture = fixture.reopen(engine).await;
            cursor = fixture.store.watch_head().borrow().seq;
        }
    }
}

pub(crate) async fn concurrent_commits_are_all_kept(engine: &impl Engine) {
    let fixture = Arc::new(Fixture::new(engine).await);
    let tasks: Vec<_> = (0..64)
        .map(|n| {
            let fixture = fixture.clone();
            tokio::spawn(async move {
                fixture.set(vec![create(&format!("file-{n}"), link("x"))]).await.seqs[0]
            })
        })
        .collect();
    let mut seqs = Vec::new();
    for task in tasks {
        seqs.push(task.await.unwrap());
    }
    seqs.sort_unstable();
    assert_eq!(seqs, (1..=64).collect::<Vec<u64>>());
    assert_eq!(fixture.store.watch_head().borrow().seq, 64);
    assert_eq!(fixture.tree(1000).await.len(), 64);
}
