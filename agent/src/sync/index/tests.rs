use cortex_shared::chunk::Recipe;
use cortex_shared::entry::File;
use cortex_shared::ids::CommitId;

use super::*;
use crate::sync::plan::PushOp;

fn path(text: &str) -> WirePath {
    WirePath::new(text).unwrap()
}

fn file(content: &str) -> Entry {
    Entry::File(File {
        content: Digest::of(content.as_bytes()),
        size: content.len() as u64,
        executable: false,
        mtime_ns: 0,
        recipe: Recipe::default(),
    })
}

fn seen(content: &str) -> Seen {
    Seen::Entry(file(content), None)
}

fn open() -> (tempfile::TempDir, Index) {
    let folder = tempfile::tempdir().unwrap();
    let index = Index::open(folder.path()).unwrap();
    (folder, index)
}

fn paths(rows: &[IndexRow]) -> Vec<String> {
    rows.iter().map(|found| found.row.path.to_string()).collect()
}

#[test]
fn rows_agree_once_both_sides_are_equal_and_vanish_once_nothing_is_left() {
    let (_folder, mut index) = open();
    let p = path("a");
    index.batch(|w| w.set_local(&p, seen("x"))).unwrap();
    assert_eq!(index.get(&p).unwrap().unwrap().row.base, None);
    assert_eq!(index.window(None, 10).unwrap().rows.len(), 1);
    index.batch(|w| w.set_remote(&p, Some(file("x")))).unwrap();
    assert_eq!(index.get(&p).unwrap().unwrap().row.base, Some(file("x")));
    assert!(index.window(None, 10).unwrap().rows.is_empty());
    assert_eq!(index.counts(), Counts { local: 1, base: 1 });
    index
        .batch(|w| {
            w.set_local(&p, Seen::Absent)?;
            w.set_remote(&p, None)
        })
        .unwrap();
    assert_eq!(index.get(&p).unwrap(), None);
    assert_eq!(index.counts(), Counts::default());
}

#[test]
fn children_are_found_without_what_lies_below_them() {
    let (_folder, mut index) = open();
    index
        .batch(|w| {
            for name in ["a", "a/x", "a/x/y", "a\u{1}", "a-b", "b/only-below", "c"] {
                w.set_local(&path(name), seen("x"))?;
            }
            Ok(())
        })
        .unwrap();
    assert_eq!(paths(&index.children(None).unwrap()), ["a", "a?", "a-b", "c"]);
    assert_eq!(paths(&index.children(Some(&path("a"))).unwrap()), ["a/x"]);
    let below = index.below(Some(&path("a")), None, 10).unwrap();
    assert_eq!(paths(&below), ["a/x", "a/x/y"]);
    let rest = index.below(None, Some(&path("a-b")), 10).unwrap();
    assert_eq!(paths(&rest), ["b/only-below", "c"]);
}

#[test]
fn a_window_brings_the_differing_ancestors_of_its_first_row() {
    let (_folder, mut index) = open();
    index
        .batch(|w| {
            w.set_local(&path("d"), Seen::Entry(Entry::Dir, None))?;
            w.set_local(&path("d/e"), Seen::Entry(Entry::Dir, None))?;
            w.set_remote(&path("d/e"), Some(Entry::Dir))?;
            w.set_local(&path("d/e/f"), seen("x"))?;
            w.set_local(&path("g"), seen("x"))
        })
        .unwrap();
    let window = index.window(Some(&path("d/e")), 1).unwrap();
    let shown: Vec<_> = window.rows.iter().map(|row| row.path.to_string()).collect();
    assert_eq!(shown, ["d", "d/e/f"]);
    assert_eq!((window.context, window.truncated), (1, true));
}

#[test]
fn what_cannot_be_read_keeps_what_was_known_and_is_planned_for() {
    let (_folder, mut index) = open();
    let p = path("a");
    index
        .batch(|w| {
            w.set_local(&p, seen("x"))?;
            w.set_remote(&p, Some(file("x")))?;
            w.set_local(&p, Seen::Unknown)
        })
        .unwrap();
    let window = index.window(None, 10).unwrap();
    assert_eq!(window.rows[0].local, Some(file("x")));
    assert!(window.rows[0].unknown);
}

#[test]
fn a_failed_batch_leaves_nothing_behind() {
    let (_folder, mut index) = open();
    let failed: Result<(), _> = index.batch(|w| {
        w.set_local(&path("a"), seen("x"))?;
        Err(IndexError::Damaged { what: "test" })
    });
    assert!(failed.is_err());
    assert_eq!(index.get(&path("a")).unwrap(), None);
    assert_eq!(index.counts(), Counts::default());
}

#[test]
fn forgetting_the_history_keeps_what_is_here() {
    let (_folder, mut index) = open();
    let cursor = Cursor { epoch: WorkspaceEpoch::new(), seq: 7 };
    index
        .batch(|w| {
            w.set_cursor(cursor)?;
            w.set_local(&path("here"), seen("x"))?;
            w.set_remote(&path("here"), Some(file("x")))?;
            w.set_remote(&path("there"), Some(file("x")))
        })
        .unwrap();
    assert_eq!(index.cursor().unwrap(), Some(cursor));
    index.batch(|w| w.forget_history()).unwrap();
    assert_eq!(index.cursor().unwrap(), None);
    let rows = index.window(None, 10).unwrap().rows;
    assert_eq!(rows.len(), 1);
    assert_eq!((&rows[0].base, &rows[0].remote), (&None, &None));
    assert_eq!(index.counts(), Counts { local: 1, base: 0 });
}

#[test]
fn a_damaged_index_is_moved_aside_and_totals_survive_reopening() {
    let (folder, mut index) = open();
    index.batch(|w| w.set_local(&path("a"), seen("x"))).unwrap();
    drop(index);
    let index = Index::open(folder.path()).unwrap();
    assert_eq!(index.counts().local, 1);
    drop(index);
    std::fs::remove_file(folder.path().join("index.db-wal")).ok();
    std::fs::write(folder.path().join(FILE_NAME), vec![b'x'; 8192]).unwrap();
    let index = Index::open(folder.path()).unwrap();
    assert_eq!(index.counts().local, 0);
    assert!(folder.path().join("index.db.damaged").exists());
}

/// SQLite does so whenever a `LIMIT` is bound, unless it is told not to.
#[test]
fn a_statement_is_planned_once_however_often_it_is_used() {
    let (_folder, index) = open();
    let sql = "SELECT key FROM entry WHERE key > ? ORDER BY key LIMIT ?";
    for limit in [10, 20, 30] {
        let mut statement = index.database.prepare_cached(sql).unwrap();
        let mut rows = statement.query(params![Vec::new(), limit]).unwrap();
        assert!(rows.next().unwrap().is_none());
        drop(rows);
        assert_eq!(statement.get_status(rusqlite::StatementStatus::RePrepare), 0, "{limit}");
    }
}

fn stamp(ctime_s: i64, racy: bool) -> Stamp {
    let ctime_ns = ctime_s * 1_000_000_000;
    Stamp { dev: 1, ino: 1, size: 1, mtime_ns: ctime_ns, ctime_ns, racy, distrusted: false }
}

/// An index of two starts of a machine: `name`, which the hub has as well, was seen at second 1000.
fn after_a_loss_of_power(name: &str, racy: bool) -> (tempfile::TempDir, Index) {
    let (folder, mut index) = open();
    index.begin_boot("first", 0).unwrap();
    index
        .batch(|w| {
            w.set_local(&path("long ago"), Seen::Entry(file("old"), Some(stamp(600, false))))?;
            w.set_local(&path("d"), Seen::Entry(Entry::Dir, None))?;
            w.set_local(&path(name), Seen::Entry(file("new"), Some(stamp(1000, racy))))?;
            w.set_local(&path("to come"), Seen::Entry(file("odd"), Some(stamp(9000, false))))?;
            for (name, entry) in [
                ("d", Entry::Dir),
                ("long ago", file("old")),
                (name, file("new")),
                ("to come", file("odd")),
            ] {
                w.set_remote(&path(name), Some(entry))?;
            }
            Ok(())
        })
        .unwrap();
    index.begin_boot("first", 2_000_000_000_000).unwrap();
    assert!(!index.get(&path(name)).unwrap().unwrap().stamp.unwrap().distrusted);
    index.begin_boot("second", 2_000_000_000_000).unwrap();
    (folder, index)
}

#[test]
fn after_a_loss_of_power_what_was_changed_last_and_is_gone_comes_back_and_older_deletions_count() {
    let (_folder, mut index) = after_a_loss_of_power("d/f", false);
    let distrusted = |index: &Index, name: &str| {
        index.get(&path(name)).unwrap().unwrap().stamp.is_some_and(|stamp| stamp.distrusted)
    };
    assert!(distrusted(&index, "d/f"));
    assert!(!distrusted(&index, "long ago") && !distrusted(&index, "to come"));
    // What cannot be read now is still distrusted when it can.
    index.batch(|w| w.set_local(&path("d/f"), Seen::Unknown)).unwrap();
    index
        .batch(|w| {
            w.set_local(&path("long ago"), Seen::Absent)?;
            w.set_local(&path("d"), Seen::Absent)?;
            w.set_absent_below(&path("d"))
        })
        .unwrap();
    let base = |name: &str| index.get(&path(name)).unwrap().unwrap().row.base;
    assert_eq!((base("d"), base("d/f")), (None, None), "nobody took them away");
    assert_eq!(base("long ago"), Some(file("old")), "somebody deleted it");
}

#[test]
fn after_a_loss_of_power_what_is_as_it_was_before_gives_way_and_what_was_changed_since_is_kept() {
    for (found, at, racy, wanted) in [
        ("older", 900, false, Some(file("older"))),
        ("cut off", 1000, false, Some(file("cut off"))),
        // It may have been changed within the same tick.
        ("either", 1000, true, None),
        ("newer", 1900, false, None),
        ("new", 1000, false, Some(file("new"))),
    ] {
        let (_folder, mut index) = after_a_loss_of_power("f", racy);
        let seen = Seen::Entry(file(found), Some(stamp(at, false)));
        index.batch(|w| w.set_local(&path("f"), seen)).unwrap();
        let row = index.get(&path("f")).unwrap().unwrap();
        assert_eq!((row.row.base, row.row.local), (wanted, Some(file(found))), "{found}");
        assert!(!row.stamp.unwrap().distrusted, "it has been seen again");
    }
    // A directory that was there before the file that took its place.
    let (_folder, mut index) = after_a_loss_of_power("f", false);
    let seen = Seen::Entry(Entry::Dir, Some(stamp(900, false)));
    index.batch(|w| w.set_local(&path("f"), seen)).unwrap();
    let row = index.get(&path("f")).unwrap().unwrap();
    assert_eq!((row.row.base, row.stamp), (Some(Entry::Dir), None));
    // What the hub does not have yet is as the disk has it.
    let (_folder, mut index) = after_a_loss_of_power("f", false);
    index.batch(|w| w.set_remote(&path("f"), Some(file("the hub's")))).unwrap();
    let seen = Seen::Entry(file("older"), Some(stamp(900, false)));
    index.batch(|w| w.set_local(&path("f"), seen)).unwrap();
    assert_eq!(index.get(&path("f")).unwrap().unwrap().row.base, Some(file("new")));
}

fn op(at: &str, new: Option<Entry>, ours: bool) -> PushOp {
    PushOp { path: path(at), expected: None, new, conflict_of: None, ours }
}

#[test]
fn a_commit_that_was_not_answered_is_known_until_it_no_longer_holds() {
    let (folder, mut index) = open();
    let (first, second) = (CommitId::new(), CommitId::new());
    let ops =
        [op("a", Some(file("x")), true), op("d/b", None, true), op("d", Some(Entry::Dir), false)];
    index.batch(|w| w.note_sent(first, &[op("other", None, true)])).unwrap();
    index.batch(|w| w.note_sent(second, &ops)).unwrap();
    drop(index);
    let mut index = Index::open(folder.path()).unwrap();
    let sent = ops.map(|PushOp { path, new, ours, .. }| SentOp { path, new, ours });
    let noted = Unanswered { id: second, ops: sent.to_vec() };
    assert_eq!(index.unanswered().unwrap(), Some(noted), "the last one alone");
    // A process that starts again on the same machine knows it; after a loss of power it says nothing.
    index.begin_boot("first", 0).unwrap();
    assert!(index.unanswered().unwrap().is_some());
    index.begin_boot("second", 0).unwrap();
    assert_eq!(index.unanswered().unwrap(), None);
    index.batch(|w| w.note_sent(first, &[])).unwrap();
    index.batch(|w| w.forget_history()).unwrap();
    assert_eq!(index.unanswered().unwrap(), None, "the hub's history is another one");
}

#[test]
fn what_the_hub_took_is_what_both_sides_had_but_of_what_is_left_out_here() {
    let (_folder, mut index) = open();
    let (kept, left_out) = (path("a"), path("left.out"));
    for at in [&kept, &left_out] {
        index.batch(|w| w.set_local(at, seen("later"))).unwrap();
    }
    index.set_ignore(Ignore::parse(b"*.out")).unwrap();
    for at in [&kept, &left_out] {
        index.batch(|w| w.set_taken(at, Some(file("sent")))).unwrap();
    }
    let trees = |index: &Index, at| {
        let row = index.get(at).unwrap().unwrap().row;
        (row.base, row.local, row.remote)
    };
    let (sent, later) = (Some(file("sent")), Some(file("later")));
    assert_eq!(trees(&index, &kept), (sent.clone(), later, sent.clone()));
    assert_eq!(
        trees(&index, &left_out),
        (None, None, sent),
        "it is merged like new once it is let in"
    );
}

#[test]
fn a_damaged_note_of_a_commit_is_found_out() {
    for cut in 0.. {
        let (_folder, mut index) = open();
        let ops = [op("a", Some(file("x")), true)];
        index.batch(|w| w.note_sent(CommitId::new(), &ops)).unwrap();
        let cut_off = "UPDATE unanswered SET ops = substr(ops, 1, length(ops) - ?1 - 1)";
        index.database.execute(cut_off, [cut]).unwrap();
        let length = "SELECT length(ops) FROM unanswered";
        let length: i64 = index.database.query_row(length, [], |row| row.get(0)).unwrap();
        if length == 0 {
            assert!(cut > 32);
            break;
        }
        assert!(index.unanswered().is_err_and(|error| error.is_damage()), "{length} bytes left");
    }
}
