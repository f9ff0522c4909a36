//! Random correlated trees: plans are carried out by a small interpreter against a hub that compares
//! and sets, until nothing changes any more. Then all trees are equal and no content is lost.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;

type Tree = BTreeMap<WirePath, Entry>;

#[derive(Clone, Debug)]
struct Member {
    base: Tree,
    local: Tree,
}

fn rows_of(member: &Member, remote: &Tree) -> Vec<Row> {
    let paths: BTreeSet<_> =
        member.base.keys().chain(member.local.keys()).chain(remote.keys()).collect();
    paths
        .into_iter()
        .map(|path| Row {
            path: path.clone(),
            base: member.base.get(path).cloned(),
            local: member.local.get(path).cloned(),
            remote: remote.get(path).cloned(),
            unknown: false,
        })
        .filter(|row| {
            !(same(row.base.as_ref(), row.local.as_ref())
                && same(row.local.as_ref(), row.remote.as_ref()))
        })
        .collect()
}

fn has_children(tree: &Tree, path: &WirePath) -> bool {
    tree.keys().any(|other| other.is_below(path))
}

/// Puts an entry where the tree allows it.
fn set(tree: &mut Tree, path: &WirePath, entry: Option<Entry>) -> Result<(), String> {
    if let Some(parent) = path.parent()
        && entry.is_some()
        && !tree.get(&parent).is_some_and(Entry::is_dir)
    {
        return Err(format!("{path:?} has no parent"));
    }
    if !is_dir(entry.as_ref()) && has_children(tree, path) {
        return Err(format!("{path:?} has children"));
    }
    match entry {
        Some(entry) => tree.insert(path.clone(), entry),
        None => tree.remove(path),
    };
    Ok(())
}

/// Carries out one round of one member; true if anything was done.
fn round(member: &mut Member, hub: &mut Tree) -> Result<bool, String> {
    round_with(member, hub, Options::default())
}

fn round_with(member: &mut Member, hub: &mut Tree, options: Options) -> Result<bool, String> {
    let remote = hub.clone();
    settle(member, &remote);
    let rows = rows_of(member, &remote);
    let look_up = |path: &WirePath| {
        let row = Row {
            path: path.clone(),
            base: member.base.get(path).cloned(),
            local: member.local.get(path).cloned(),
            remote: remote.get(path).cloned(),
            unknown: false,
        };
        (row.local.is_some() || row.remote.is_some()).then_some(row)
    };
    let plan = plan(&rows, &look_up, options);
    for change in &plan.local {
        let current = member.local.get(&change.path).cloned();
        if current != change.from {
            return Err(format!("{:?} is not what the plan says", change.path));
        }
        if let Some(aside) = &change.aside {
            set(&mut member.local, &change.path, None)?;
            if member.local.contains_key(aside) {
                return Err(format!("{aside:?} is taken"));
            }
            set(&mut member.local, aside, current)?;
        } else if current.is_some() && is_dir(current.as_ref()) != is_dir(change.to.as_ref()) {
            set(&mut member.local, &change.path, None)?;
        }
        set(&mut member.local, &change.path, change.to.clone())?;
    }
    for op in &plan.push {
        if !same(hub.get(&op.path), op.expected.as_ref()) {
            return Err(format!("{:?} conflicts though nobody else committed", op.path));
        }
        set(hub, &op.path, op.new.clone())?;
    }
    settle(member, hub);
    Ok(!plan.is_empty())
}

fn settle(member: &mut Member, remote: &Tree) {
    for path in rows_of(member, remote).into_iter().map(|row| row.path) {
        let local = member.local.get(&path);
        let settled =
            settled_base(member.base.get(&path).cloned(), local, remote.get(&path), false);
        match settled {
            Some(entry) => member.base.insert(path, entry),
            None => member.base.remove(&path),
        };
    }
}

/// Content that somebody put where something else was agreed upon.
fn new_contents(base: &Tree, tree: &Tree) -> BTreeSet<Vec<u8>> {
    tree.iter()
        .filter(|(path, entry)| match (base.get(*path), entry) {
            (Some(Entry::File(old)), Entry::File(new)) => old.content != new.content,
            (old, new) => !same(old, Some(*new)),
        })
        .filter_map(|(_, entry)| content(entry))
        .collect()
}

fn content(entry: &Entry) -> Option<Vec<u8>> {
    match entry {
        Entry::File(file) => Some(file.content.as_bytes().to_vec()),
        Entry::Link { target } => Some(target.to_vec()),
        Entry::Dir => None,
    }
}

fn any_entry() -> impl Strategy<Value = Entry> {
    prop_oneof![
        3 => Just(Entry::Dir),
        4 => (0..5u8, any::<bool>()).prop_map(|(content, executable)| {
            tests::entry(&format!("{content}{}", if executable { "*" } else { "" })).unwrap()
        }),
        1 => (0..2u8).prop_map(|target| Entry::Link { target: [b't', target].into() }),
    ]
}

fn any_path() -> impl Strategy<Value = WirePath> {
    prop::collection::vec(prop::sample::select(vec!["a", "b", "a-b"]), 1..4)
        .prop_map(|names| WirePath::new(names.join("/")).unwrap())
}

#[derive(Clone, Debug)]
enum Edit {
    Put(WirePath, Entry),
    Remove(WirePath),
}

fn any_edits(count: usize) -> impl Strategy<Value = Vec<Edit>> {
    let edit = prop_oneof![
        3 => (any_path(), any_entry()).prop_map(|(path, entry)| Edit::Put(path, entry)),
        1 => any_path().prop_map(Edit::Remove),
    ];
    prop::collection::vec(edit, 0..count)
}

fn edited(tree: &Tree, edits: Vec<Edit>) -> Tree {
    let mut tree = tree.clone();
    for edit in edits {
        match edit {
            Edit::Remove(path) => tree.retain(|other, _| *other != path && !other.is_below(&path)),
            Edit::Put(path, entry) => {
                let mut ancestors: Vec<_> = path.ancestors().collect();
                ancestors.reverse();
                for ancestor in ancestors {
                    if !tree.get(&ancestor).is_some_and(Entry::is_dir) {
                        tree.insert(ancestor, Entry::Dir);
                    }
                }
                if !entry.is_dir() {
                    tree.retain(|other, _| !other.is_below(&path));
                }
                tree.insert(path, entry);
            }
        }
    }
    tree
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn t07_trees_become_equal_and_nothing_is_lost(
        base in any_edits(12),
        edits in prop::collection::vec(any_edits(6), 3),
        hub_edits in any_edits(6),
        rejoining in any::<bool>(),
    ) {
        let base = edited(&Tree::new(), base);
        let mut hub = edited(&base, hub_edits);
        let mut members: Vec<_> = edits
            .into_iter()
            .map(|edits| Member { base: base.clone(), local: edited(&base, edits) })
            .collect();
        let mut kept = new_contents(&base, &hub);
        for member in &members {
            kept.extend(new_contents(&base, &member.local));
        }
        if rejoining {
            // This one lost its index: it may bring things back, but never lose any.
            members[0].base.clear();
        }
        let mut rounds = 0;
        loop {
            let mut busy = false;
            for member in &mut members {
                busy |= round(member, &mut hub).map_err(TestCaseError::fail)?;
            }
            if !busy {
                break;
            }
            rounds += 1;
            prop_assert!(rounds <= 20, "no end: {members:?} {hub:?}");
        }
        for member in &members {
            prop_assert!(rows_of(member, &hub).is_empty(), "{member:?} {hub:?}");
        }
        let present: BTreeSet<_> = hub.values().filter_map(content).collect();
        prop_assert!(kept.is_subset(&present), "lost: {:?}", kept.difference(&present));
    }

    #[test]
    fn members_keep_to_their_mode_and_lose_nothing_they_may_not(
        base in any_edits(12),
        local in any_edits(6),
        remote in any_edits(6),
        number in 1..4usize,
    ) {
        let mode = MemberMode::ALL[number];
        let base = edited(&Tree::new(), base);
        let mut member = Member { local: edited(&base, local), base: base.clone() };
        let mut hub = edited(&base, remote);
        let (before, hub_before) = (member.local.clone(), hub.clone());
        let options = Options { mode, ..Options::default() };
        let mut rounds = 0;
        while round_with(&mut member, &mut hub, options).map_err(TestCaseError::fail)? {
            rounds += 1;
            prop_assert!(rounds <= 20, "no end: {member:?} {hub:?}");
        }
        let contents = |tree: &Tree| tree.values().filter_map(content).collect::<BTreeSet<_>>();
        match mode {
            MemberMode::TwoWay => {}
            MemberMode::SendOnly => {
                prop_assert_eq!(&member.local, &before);
                // Of what others have made, nothing goes.
                let theirs = new_contents(&base, &hub_before);
                prop_assert!(theirs.is_subset(&contents(&hub)));
            }
            MemberMode::ReceiveOnly => {
                prop_assert_eq!(&hub, &hub_before);
                let ours = new_contents(&base, &before);
                prop_assert!(ours.is_subset(&contents(&member.local)), "{ours:?}");
            }
            MemberMode::Mirror => {
                prop_assert_eq!(&hub, &hub_before);
                prop_assert!(rows_of(&member, &hub).is_empty(), "{member:?} {hub:?}");
            }
        }
    }

    #[test]
    fn windows_of_rows_lead_to_the_same_end(
        base in any_edits(12),
        local in any_edits(6),
        remote in any_edits(6),
        window in 1..5usize,
    ) {
        let base = edited(&Tree::new(), base);
        let member = Member { local: edited(&base, local), base };
        let hub = edited(&member.base, remote);
        let whole = plan(&rows_of(&member, &hub), &|_| None, Options::default());
        let rows = rows_of(&member, &hub);
        let mut local_paths = BTreeSet::new();
        let mut push_paths = BTreeSet::new();
        for start in (0..rows.len()).step_by(window) {
            let end = (start + window).min(rows.len());
            // The rows of a window, preceded by the ancestors of its first row.
            let mut part: Vec<_> = rows[..start]
                .iter()
                .filter(|row| rows[start].path.is_below(&row.path))
                .cloned()
                .collect();
            let context = part.len();
            part.extend_from_slice(&rows[start..end]);
            let truncated = end < rows.len();
            let options = Options { truncated, context, ..Options::default() };
            let plan = plan(&part, &|_| None, options);
            local_paths.extend(plan.local.into_iter().map(|change| change.path));
            push_paths.extend(plan.push.into_iter().map(|op| op.path));
        }
        // What windows postpone is done later; they never do what the whole plan would not.
        let whole_local: BTreeSet<_> = whole.local.into_iter().map(|change| change.path).collect();
        let whole_push: BTreeSet<_> = whole.push.into_iter().map(|op| op.path).collect();
        prop_assert!(local_paths.is_subset(&whole_local));
        prop_assert!(push_paths.is_subset(&whole_push));
    }
}
