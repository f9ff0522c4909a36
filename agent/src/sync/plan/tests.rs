//! The table of cases, one by one.

use cortex_shared::chunk::Recipe;
use cortex_shared::entry::{Digest, File};

use super::*;

/// `-` nothing, `d` a directory, `l:x` a link to x, `x` a file with content x, `x*` executable.
pub(super) fn entry(text: &str) -> Option<Entry> {
    match text {
        "-" => None,
        "d" => Some(Entry::Dir),
        _ => Some(match text.strip_prefix("l:") {
            Some(target) => Entry::Link { target: target.as_bytes().into() },
            None => Entry::File(File {
                content: Digest::of(text.trim_end_matches('*').as_bytes()),
                size: 1,
                executable: text.ends_with('*'),
                mtime_ns: 0,
                recipe: Recipe::default(),
            }),
        }),
    }
}

fn show(entry: Option<&Entry>) -> String {
    match entry {
        None => "-".into(),
        Some(Entry::Dir) => "d".into(),
        Some(Entry::Link { target }) => format!("l:{}", target.escape_ascii()),
        Some(Entry::File(file)) => {
            let name = ["a", "b", "c"]
                .into_iter()
                .find(|name| Digest::of(name.as_bytes()) == file.content)
                .unwrap_or("?");
            format!("{name}{}", if file.executable { "*" } else { "" })
        }
    }
}

/// Rows from lines of "path base local remote"; a local with a question mark is unknown.
pub(super) fn rows(lines: &[&str]) -> Vec<Row> {
    let mut rows: Vec<_> = lines
        .iter()
        .map(|line| {
            let words: Vec<_> = line.split_whitespace().collect();
            Row {
                path: WirePath::new(words[0]).unwrap(),
                base: entry(words[1]),
                local: entry(words[2].trim_end_matches('?')),
                remote: entry(words[3]),
                unknown: words[2].ends_with('?'),
            }
        })
        .collect();
    rows.sort_by(|a, b| a.path.cmp(&b.path));
    rows
}

fn hide_digits(path: &WirePath) -> String {
    let text = path.to_string();
    match text.find(".conflict-") {
        Some(at) => format!("{}!{}", &text[..at], &text[at + 18..]),
        None => text,
    }
}

/// A plan as text: local changes as "path from>to (aside)", then "|", then operations.
fn show_plan(plan: &Plan) -> String {
    let local = plan.local.iter().map(|change| {
        let aside = change.aside.as_ref().map(|p| format!("({})", hide_digits(p)));
        let (from, to) = (show(change.from.as_ref()), show(change.to.as_ref()));
        format!("{} {from}>{to}{}", hide_digits(&change.path), aside.unwrap_or_default())
    });
    let push = plan.push.iter().map(|op| {
        let (from, to) = (show(op.expected.as_ref()), show(op.new.as_ref()));
        let of = op.conflict_of.as_ref().map(|p| format!("({p})")).unwrap_or_default();
        format!("{} {from}>{to}{of}", hide_digits(&op.path))
    });
    let all: Vec<_> = local.chain(std::iter::once("|".to_owned())).chain(push).collect();
    all.join(" ")
}

fn plan_of(lines: &[&str]) -> String {
    show_plan(&plan(&rows(lines), &|_| None, Options::default()))
}

#[test]
fn a_single_path_follows_the_table() {
    for (row, expected) in [
        // agreed
        ("f - a a", "|"),
        ("f a - -", "|"),
        ("f a b b", "|"),
        // unknown
        ("f a a? -", "|"),
        ("f a b? c", "|"),
        ("f - -? a", "|"),
        // one side changed
        ("f a a b", "f a>b |"),
        ("f a a -", "f a>- |"),
        ("f - - a", "f ->a |"),
        ("f a b a", "| f a>b"),
        ("f a - a", "| f a>-"),
        ("f - a -", "| f ->a"),
        ("f a a a*", "f a>a* |"),
        ("f a a l:x", "f a>l:x |"),
        ("f a d a", "| f a>d"),
        ("f d a d", "| f d>a"),
        ("f d d a", "f d>a |"),
        // an edit beats a deletion
        ("f a - b", "f ->b |"),
        ("f a b -", "| f ->b"),
        ("f a d -", "| f ->d"),
        // attributes merge
        ("f a a* b", "f a*>b* | f b>b*"),
        ("f a b a*", "f b>b* | f a*>b*"),
        ("f a b* b", "| f b>b*"),
        ("f - a a*", "f a>a* |"),
        ("f a* b b*", "| f b*>b"),
        // both changed
        ("f a b c", "f b>c(f!) |"),
        ("f.txt - a b", "f.txt a>b(f!.txt) |"),
        ("f a l:x l:y", "f l:x>l:y(f!) |"),
        ("f a b l:y", "f b>l:y(f!) |"),
        // directory against something else
        ("f - d b", "| f! ->b(f) f b>d"),
        ("f - b d", "f b>d(f!) |"),
        ("f a l:x d", "f l:x>d(f!) |"),
    ] {
        let shown = plan_of(&[row]);
        assert_eq!(shown, expected, "{row}");
    }
}

#[test]
fn t05_only_the_parents_of_a_change_return() {
    let lines = ["d d - d", "d/keep a - b", "d/gone a - a", "d/sub d - d", "d/sub/gone a - a"];
    assert_eq!(plan_of(&lines), "d ->d d/keep ->b | d/sub/gone a>- d/sub d>- d/gone a>-");
    let mirrored = ["d d d -", "d/keep a b -", "d/gone a a -", "d/sub d d -", "d/sub/gone a a -"];
    assert_eq!(plan_of(&mirrored), "d/sub/gone a>- d/sub d>- d/gone a>- | d ->d d/keep ->b");
}

#[test]
fn a_directory_that_was_replaced_keeps_its_name_for_a_change_inside() {
    assert_eq!(plan_of(&["d d d a", "d/x a b -"]), "| d! ->a(d) d a>d d/x ->b");
    assert_eq!(plan_of(&["d d a d", "d/x a - b"]), "d a>d(d!) d/x ->b |");
}

#[test]
fn type_changes_come_in_an_order_that_works() {
    assert_eq!(plan_of(&["d d d a", "d/x a a -"]), "d/x a>- d d>a |");
    assert_eq!(plan_of(&["d d a d", "d/x a - a"]), "| d/x a>- d d>a");
    assert_eq!(plan_of(&["f a a d", "f/x - - b"]), "f a>d f/x ->b |");
    assert_eq!(plan_of(&["f a d a", "f/x - b -"]), "| f a>d f/x ->b");
}

/// A look while somebody replaces a directory by a file may find the new file and what was below the old
/// directory; and somebody else may have put another file there.
#[test]
fn two_files_that_lose_their_name_to_a_directory_are_both_kept() {
    assert_eq!(plan_of(&["f - a b", "f/x - c -"]), "f a>d(f!) | f! ->b(f) f b>d f/x ->c");
    assert_eq!(plan_of(&["f c a b", "f/x - c -"]), "f a>d(f!) | f! ->b(f) f b>d f/x ->c");
    assert_eq!(plan_of(&["f - l:x b", "f/x - c -"]), "f l:x>d(f!) | f! ->b(f) f b>d f/x ->c");
    assert_eq!(plan_of(&["f a a b", "f/x - c -"]), "f a>d | f! ->b(f) f b>d f/x ->c");
}

#[test]
fn what_cannot_be_read_keeps_its_directory() {
    assert_eq!(plan_of(&["d d d -", "d/x a a? -"]), "|");
    assert_eq!(plan_of(&["d d d a", "d/x a a? -"]), "|");
    // Below an unreadable directory nothing is touched, the rest goes on.
    assert_eq!(plan_of(&["d d d? -", "d/x a a -", "e - a -"]), "| e ->a");
}

#[test]
fn held_deletions_stay_at_the_hub_with_their_directories() {
    let rows = rows(&["d d - d", "d/x a - a", "e a b a", "f d a d", "f/x a - a"]);
    let options = Options { hold_deletions: true, ..Options::default() };
    let held = plan(&rows, &|_| None, options);
    assert_eq!(show_plan(&held), "| e a>b");
    // `f` is not counted: it waits for `f/x`, which is held.
    assert_eq!(held.held_deletions, 2);
    let free = plan(&rows, &|_| None, Options::default());
    assert_eq!(free.push_deletions, 4);
}

#[test]
fn a_directory_that_reaches_beyond_the_rows_is_not_removed_yet() {
    let rows = rows(&["d d d -", "d/x a a -"]);
    let options = Options { truncated: true, ..Options::default() };
    // `d/x` itself may be removed; only a directory could have more below it.
    assert_eq!(show_plan(&plan(&rows, &|_| None, options)), "d/x a>- |");
}

#[test]
fn equal_losers_make_one_copy_and_a_taken_name_is_avoided() {
    let loser = entry("b").unwrap();
    let path = WirePath::new("f").unwrap();
    let names: Vec<_> = conflict_name::candidates(&path, &loser).take(2).collect();
    let row_at = |path: &WirePath, local: &str, remote: &str| Row {
        path: path.clone(),
        base: None,
        local: entry(local),
        remote: entry(remote),
        unknown: false,
    };
    let aside = |copy: Row| {
        let plan = plan(
            &rows(&["f a b c"]),
            &|path| (*path == copy.path).then(|| copy.clone()),
            Options::default(),
        );
        plan.local[0].aside.clone()
    };
    assert_eq!(aside(row_at(&names[0], "b", "b")), None, "the copy exists already");
    assert_eq!(aside(row_at(&names[0], "-", "b")), None, "another member made it");
    assert_eq!(aside(row_at(&names[0], "-", "c")), Some(names[1].clone()), "taken");
    assert_eq!(aside(row_at(&names[0], "d", "-")), Some(names[1].clone()), "taken");
}

#[test]
fn a_new_conflict_copy_is_announced_as_one() {
    let loser = entry("b").unwrap();
    let path = WirePath::new("f.txt").unwrap();
    let copy = conflict_name::candidates(&path, &loser).next().unwrap();
    let row = Row { path: copy, base: None, local: Some(loser), remote: None, unknown: false };
    let plan = plan(&[row], &|_| None, Options::default());
    assert_eq!(plan.push[0].conflict_of, Some(path));
}
