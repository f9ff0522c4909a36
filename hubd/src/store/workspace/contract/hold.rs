//! What a member deletes is judged, whatever it says; and by which rules it went.

use cortex_shared::chunk::{ChunkRef, Recipe};
use cortex_shared::entry::Entry;
use cortex_shared::ids::NodeId;

use super::super::*;
use super::Engine;
use super::fixture::{Fixture, create, file, op, path};

/// Content of a file, not equal to that of another.
fn content(number: usize) -> Vec<u8> {
    format!("content {number}").into_bytes()
}

fn entry(number: usize) -> Entry {
    file(&content(number))
}

fn name(number: usize) -> String {
    format!("f{number}")
}

/// A workspace with so many files.
async fn filled(engine: &impl Engine, files: usize) -> Fixture {
    let fixture = Fixture::new(engine).await;
    let contents: Vec<_> = (0..files).map(content).collect();
    let contents: Vec<_> = contents.iter().map(Vec::as_slice).collect();
    fixture.add_chunks(&contents).await;
    fixture.set((0..files).map(|number| create(&name(number), entry(number))).collect()).await;
    fixture
}

fn deletions(numbers: std::ops::Range<usize>) -> Vec<Op> {
    numbers.map(|number| op(&name(number), Some(&entry(number)), None)).collect()
}

fn held(result: &CommitResult) -> usize {
    result.rejected.iter().filter(|rejected| rejected.reason == RejectReason::Held).count()
}

pub(crate) async fn content_that_is_elsewhere_by_a_members_word_alone_is_lost_all_the_same(
    engine: &impl Engine,
) {
    for lies in [true, false] {
        let fixture = filled(engine, 150).await;
        fixture.add_chunks(&[b"t"]).await;
        let tiny = ChunkRef::of(b"t").unwrap();
        let others = (0..150).map(|number| {
            let mut copy = entry(number);
            if let Entry::File(file) = &mut copy
                && lies
            {
                // What is there is something else, of the same size even.
                file.recipe = Recipe(vec![tiny; usize::try_from(file.size).unwrap()]);
            }
            create(&format!("copy{number}"), copy)
        });
        fixture.set(others.collect()).await;
        let result = fixture.commit(deletions(0..150)).await;
        assert_eq!(held(&result), if lies { 150 } else { 0 });
    }
}

pub(crate) async fn too_many_deletions_of_a_member_are_held_and_all_else_goes_on(
    engine: &impl Engine,
) {
    for (files, removed, is_held) in [
        (1, 1, false),
        (2, 2, true),
        (2, 1, false),
        (150, 100, false),
        (150, 101, true),
        (600, 150, false),
        (600, 151, true),
    ] {
        let fixture = filled(engine, files).await;
        let mut ops = deletions(0..removed);
        // Where something stays anyway, something may come.
        let also = usize::from(files > 2);
        ops.extend((also == 1).then(|| create("also", Entry::Dir)));
        let result = fixture.commit(ops).await;
        let expected = if is_held { removed } else { 0 };
        assert_eq!(held(&result), expected, "{removed} of {files}");
        assert_eq!(result.rejected.len(), expected, "{removed} of {files}");
        let left = fixture.tree(1000).await.len();
        assert_eq!(left, files + also - removed + expected, "{removed} of {files}");
        let summary = fixture.store.summary().await.unwrap();
        assert_eq!(summary.entries, left as u64, "counted as it is");
        let known = fixture.store.held_members().await.unwrap();
        assert_eq!(known.len(), usize::from(is_held));
        if let [member] = known.as_slice() {
            assert_eq!((member.node, member.losses), (fixture.node, removed as u64));
        }
    }
    // Directories and empty files are no losses; nor is what an operator deletes held.
    let fixture = Fixture::new(engine).await;
    fixture.set((0..150).map(|number| create(&name(number), Entry::Dir)).collect()).await;
    fixture.set((0..150).map(|number| op(&name(number), Some(&Entry::Dir), None)).collect()).await;
    let fixture = filled(engine, 150).await;
    let author = Author::Operator("somebody".to_owned());
    let commit = Commit { author, ..fixture.batch(deletions(0..150)) };
    assert_eq!(fixture.store.commit(commit).await.unwrap().rejected, []);
}

pub(crate) async fn deletions_count_together_within_a_minute_however_they_are_cut(
    engine: &impl Engine,
) {
    let fixture = filled(engine, 150).await;
    for part in 0..10 {
        fixture.set(deletions(part * 10..(part + 1) * 10)).await;
    }
    let fixture = fixture.reopen(engine).await;
    assert_eq!(held(&fixture.commit(deletions(100..101)).await), 1, "the hundred and first");
    // What it does besides is not held, and neither is another member.
    fixture.set(vec![create("new", Entry::Dir)]).await;
    let other =
        Commit { author: Author::Node(NodeId::new()), ..fixture.batch(deletions(100..101)) };
    assert_eq!(fixture.store.commit(other).await.unwrap().rejected, []);
}

pub(crate) async fn what_only_moves_is_no_loss(engine: &impl Engine) {
    let fixture = filled(engine, 300).await;
    // First the copies and then the deletions, in one commit and in two; and the other way round.
    let moved = |numbers: std::ops::Range<usize>| {
        numbers.map(|number| create(&format!("g{number}"), entry(number)))
    };
    fixture.set(moved(0..100).chain(deletions(0..100)).collect()).await;
    fixture.set(moved(100..200).collect()).await;
    fixture.set(deletions(100..200)).await;
    fixture.set(deletions(200..300).into_iter().chain(moved(200..300)).collect()).await;
    assert_eq!(fixture.tree(1000).await.len(), 300);
    // Two with the same content are the last ones together.
    fixture.set((0..300).map(|number| create(&name(number), entry(number))).collect()).await;
    let both = |numbers: std::ops::Range<usize>| {
        numbers.flat_map(|number| {
            let copy = op(&format!("g{number}"), Some(&entry(number)), None);
            [deletions(number..number + 1).remove(0), copy]
        })
    };
    assert_eq!(held(&fixture.commit(both(0..120).collect()).await), 240);
}

pub(crate) async fn an_operators_word_lets_as_many_go_as_it_was_given_for(engine: &impl Engine) {
    let fixture = filled(engine, 400).await;
    assert_eq!(held(&fixture.commit(deletions(0..200)).await), 200);
    // Who tries again in smaller parts gets no further.
    assert_eq!(held(&fixture.commit(deletions(0..1)).await), 1);
    let (store, node) = (fixture.store.clone(), fixture.node);
    assert!(!store.take_word(node).await.unwrap());
    // Who makes use of a word before it is told may wait for it with others.
    store.allow_deletions(node, 1).await.unwrap();
    fixture.set(deletions(399..400)).await;
    assert!(store.take_word(node).await.unwrap());
    store.allow_deletions(node, 200).await.unwrap();
    assert_eq!(store.held_members().await.unwrap(), []);
    drop(store);
    let fixture = fixture.reopen(engine).await;
    assert!(!fixture.store.take_word(NodeId::new()).await.unwrap());
    assert!(fixture.store.take_word(node).await.unwrap());
    assert!(fixture.store.take_word(node).await.unwrap(), "the answer may have been lost");
    fixture.set(deletions(0..150)).await;
    assert!(!fixture.store.take_word(node).await.unwrap(), "it was heard");
    fixture.set(deletions(150..200)).await;
    // It was for those; the next ones are judged like any.
    fixture.set(deletions(200..300)).await;
    assert_eq!(held(&fixture.commit(deletions(300..301)).await), 1);
}

pub(crate) async fn who_goes_by_other_rules_changes_nothing_but_the_rules(engine: &impl Engine) {
    let fixture = filled(engine, 2).await;
    let (first, second) = (content(0), content(1));
    let (old, new) = (file(&first), file(&second));
    let by = |rules: KnownRules, ops: Vec<Op>| Commit { rules, ..fixture.batch(ops) };
    let content_of = |entry: &Entry| match entry {
        Entry::File(file) => KnownRules::Content(file.content),
        _ => KnownRules::Nothing,
    };
    let rules = ".cortexignore";
    let copy =
        Op { conflict_of: Some(path(rules)), ..create(".cortexignore.conflict-1", Entry::Dir) };
    // What stands there, what the member went by, what it does, and whether it may. What is deeper down
    // is a file like any other.
    let below = ("d/.cortexignore", None, KnownRules::Nothing, true);
    for (at, stands, knows, may) in [
        (rules, None, KnownRules::Nothing, true),
        (rules, None, content_of(&old), false),
        (rules, Some(&old), content_of(&old), true),
        (rules, Some(&old), content_of(&new), false),
        (rules, Some(&old), KnownRules::Nothing, false),
        (rules, Some(&old), KnownRules::Unsaid, true),
        (rules, Some(&Entry::Dir), KnownRules::Nothing, true),
        below,
    ] {
        let fixture = filled(engine, 2).await;
        fixture.set(vec![create("d", Entry::Dir), create("d/.cortexignore", old.clone())]).await;
        let stands: Vec<_> = stands.map(|entry| create(at, entry.clone())).into_iter().collect();
        fixture.set(stands).await;
        let ops = vec![create("x", Entry::Dir), op("f0", Some(&old), None), copy.clone()];
        let commit = Commit { rules: knows, ..fixture.batch(ops) };
        let result = fixture.store.commit(commit.clone()).await.unwrap();
        let refused: Vec<_> = result.rejected.iter().map(|r| (r.index, r.reason)).collect();
        let all = [(0, RejectReason::Rules), (1, RejectReason::Rules)];
        assert_eq!(refused, if may { &[][..] } else { &all }, "{at} {knows:?}");
        assert_eq!(fixture.store.commit(commit).await.unwrap(), result, "repeated");
    }
    // Who changes the rules may do more in the same commit, by what stood there before.
    let change = by(
        content_of(&old),
        vec![op(rules, Some(&old), Some(new.clone())), create("y", Entry::Dir)],
    );
    fixture.set(vec![create(rules, old.clone())]).await;
    assert_eq!(fixture.store.commit(change).await.unwrap().rejected, []);
    let late = by(content_of(&old), vec![op(rules, Some(&old), None)]);
    let late = fixture.store.commit(late).await.unwrap();
    assert_eq!(late.rejected[0].reason, RejectReason::Conflict, "the rules are compared and set");
}
