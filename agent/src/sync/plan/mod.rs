//! The planner: what has to be done so that the tree here and the tree at the hub become equal.
//!
//! Pure. It sees three trees: Base, on which both sides last agreed; Local, as last scanned; Remote,
//! as last heard from the hub. For every path where they differ it first decides what shall stand
//! there on both sides (`merge`), then lets children keep their parents alive, then derives the
//! changes to be made here and the operations to be sent. No plan is ever stored: after a crash the
//! trees are read again and planned again.
//!
//! | case | result |
//! |---|---|
//! | local = remote | agreed: Base follows, see [`settled_base`] |
//! | local unknown | nothing is pushed or overwritten |
//! | only remote changed | pulled |
//! | only local changed | pushed |
//! | one deleted, other changed | the change wins |
//! | files with the same content, or only one content changed | merged by attribute |
//! | both changed | remote keeps the name, local becomes a conflict copy |
//! | file or link against directory | the directory keeps the name, the other becomes the copy |
//! | directory gone on one side, change inside on the other | only the parents of the change return |
//! | a link that leaves the workspace | neither sent nor placed, see `links` |
//!
//! A member's [`MemberMode`] takes some of that back: what may not be sent, or not be changed here,
//! is left as it is on both sides.

mod conflict_name;
mod links;
mod merge;
mod moves;
#[cfg(test)]
mod property_tests;
#[cfg(test)]
mod tests;

use std::collections::HashMap;

use cortex_shared::entry::{Digest, Entry, same};
use cortex_shared::wire_path::{RULES_NAME, WirePath};

pub(in crate::sync) use conflict_name::{candidates as copy_names, conflict_of};
pub(in crate::sync) use links::leaves_workspace;
use merge::{Loser, Wanted, merge};
pub use moves::{Move, MoveFinder};

use super::mode::MemberMode;

/// What the three trees have at a path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    /// The path.
    pub path: WirePath,
    /// What stood there when both sides last agreed.
    pub base: Option<Entry>,
    /// What the last scan found; if `unknown`, what was found before.
    pub local: Option<Entry>,
    /// What stands there at the hub.
    pub remote: Option<Entry>,
    /// The last scan could not read it, or it changed while it was read.
    pub unknown: bool,
}

/// Base after both sides have been looked at: where they agree, that is what they agree on.
#[must_use]
pub fn settled_base(
    base: Option<Entry>,
    local: Option<&Entry>,
    remote: Option<&Entry>,
    unknown: bool,
) -> Option<Entry> {
    if !unknown && same(local, remote) { remote.cloned() } else { base }
}

/// A change to be made to the tree here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocalChange {
    /// Where.
    pub path: WirePath,
    /// What must stand there now; anything else means that somebody was faster.
    pub from: Option<Entry>,
    /// What shall stand there.
    pub to: Option<Entry>,
    /// Where `from` is moved to keep it, instead of into the trash.
    pub aside: Option<WirePath>,
}

/// An operation for the hub.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PushOp {
    /// Where.
    pub path: WirePath,
    /// What the hub has there, as far as is known here.
    pub expected: Option<Entry>,
    /// What it shall have.
    pub new: Option<Entry>,
    /// If this is a conflict copy: the path whose name its content lost.
    pub conflict_of: Option<WirePath>,
    /// It stands there here as well. What is put together of both sides does not yet, nor does the conflict copy
    /// of somebody else's.
    pub ours: bool,
}

/// How to plan.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// Do not push deletions: there are suspiciously many.
    pub hold_deletions: bool,
    /// Which changes go which way.
    pub mode: MemberMode,
    /// The rows end before the last difference. Directories that reach beyond the end are then
    /// neither removed nor replaced yet.
    pub truncated: bool,
    /// So many rows at the beginning are ancestors of the first real row, given only because it may
    /// need them: they have other descendants that are not among the rows.
    pub context: usize,
}

/// What is to be done, in an order in which it can be done.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Changes to be made here: first what is created, parents before children, then what is
    /// removed, children before parents.
    pub local: Vec<LocalChange>,
    /// Operations for the hub, ordered likewise.
    pub push: Vec<PushOp>,
    /// How many of them take something away.
    pub push_deletions: usize,
    /// Deletions that were held back.
    pub held_deletions: usize,
    /// Changes at the hub that are not made here, because what stands in their place is unknown.
    pub skipped: usize,
    /// Paths that stay different because the member's mode says so.
    pub withheld: usize,
    /// Links that are left alone because they leave the workspace.
    pub held_links: Vec<WirePath>,
}

impl Plan {
    /// Whether nothing is to be done.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.local.is_empty() && self.push.is_empty()
    }
}

#[derive(Clone, Debug)]
enum Decision {
    /// Leave both sides as they are.
    Skip,
    Want(Wanted),
}

/// What the rows below a directory ask of it.
#[derive(Clone, Copy, Default)]
struct Needs {
    directory: bool,
    /// Something below stays here, whatever becomes of the directory.
    stays_local: bool,
    /// Something below stays at the hub.
    stays_remote: bool,
}

/// Plans for `rows`, which must be in the order of their paths and hold every path where the trees
/// differ (up to the last row, if truncated) and those of its ancestors that differ. Other rows do no
/// harm. `look_up` finds the row of any other path, for the names of conflict copies.
pub fn plan(rows: &[Row], look_up: &dyn Fn(&WirePath) -> Option<Row>, options: Options) -> Plan {
    debug_assert!(rows.is_sorted_by(|a, b| a.path < b.path));
    let mut planner =
        Planner { rows, look_up, options, plan: Plan::default(), copies: HashMap::new() };
    let decisions = planner.decide();
    planner.emit(decisions);
    planner.plan
}

struct Planner<'a> {
    rows: &'a [Row],
    look_up: &'a dyn Fn(&WirePath) -> Option<Row>,
    options: Options,
    plan: Plan,
    /// Names given to conflict copies in this plan, and what will stand there.
    copies: HashMap<WirePath, Entry>,
}

fn is_dir(entry: Option<&Entry>) -> bool {
    entry.is_some_and(Entry::is_dir)
}

impl Planner<'_> {
    /// A decision for each row. Runs from the last row to the first, so that children come before
    /// the directories they may need.
    fn decide(&mut self) -> Vec<Decision> {
        let below_unknown = below_unknown(self.rows);
        let mut needs: HashMap<&WirePath, Needs> = HashMap::new();
        let last = self.rows.last().map(|row| &row.path);
        let rows = self.rows;
        let mut decisions = Vec::with_capacity(rows.len());
        for (index, (row, below_unknown)) in rows.iter().zip(below_unknown).enumerate().rev() {
            let need = needs.remove(&row.path).unwrap_or_default();
            let reaches_end =
                last.is_some_and(|last| *last == row.path || last.is_below(&row.path));
            let open = index < self.options.context || (self.options.truncated && reaches_end);
            let decision = if row.unknown || below_unknown {
                let remote_changed = !same(row.base.as_ref(), row.remote.as_ref());
                self.plan.skipped += usize::from(remote_changed);
                Decision::Skip
            } else {
                self.decide_row(row, need, open)
            };
            if let Some(parent) = row.path.parent()
                && let Ok(index) = rows.binary_search_by(|row| row.path.cmp(&parent))
            {
                let need = needs.entry(&rows[index].path).or_default();
                match &decision {
                    Decision::Want(wanted) => need.directory |= wanted.entry.is_some(),
                    Decision::Skip => {
                        need.stays_local |= row.local.is_some() || row.unknown;
                        need.stays_remote |= row.remote.is_some();
                    }
                }
            }
            decisions.push(decision);
        }
        decisions.reverse();
        if self.options.mode == MemberMode::SendOnly {
            self.keep_below_what_is_kept(&mut decisions);
        }
        decisions
    }

    /// Where others have put something else in the place of a directory, what is new in it here
    /// cannot be sent either.
    fn keep_below_what_is_kept(&mut self, decisions: &mut [Decision]) {
        let mut kept: Option<&WirePath> = None;
        for (row, decision) in self.rows.iter().zip(decisions) {
            if kept.is_some_and(|kept| row.path.is_below(kept)) {
                if !matches!(decision, Decision::Skip) {
                    *decision = Decision::Skip;
                    self.plan.withheld += 1;
                }
            } else if matches!(decision, Decision::Skip)
                && is_dir(row.local.as_ref())
                && !is_dir(row.remote.as_ref())
            {
                kept = Some(&row.path);
            }
        }
    }

    fn decide_row(&mut self, row: &Row, need: Needs, open: bool) -> Decision {
        let (local, remote) = (row.local.as_ref(), row.remote.as_ref());
        let mut wanted = match self.merge(row) {
            Some(wanted) => wanted,
            // Something comes from the hub into a directory that was deleted or replaced here.
            None if need.directory && is_dir(remote) && !is_dir(local) => {
                let loser = if local.is_some() { Loser::Local } else { Loser::Nobody };
                Wanted { entry: Some(Entry::Dir), loser }
            }
            None => {
                self.plan.withheld += 1;
                return Decision::Skip;
            }
        };
        let link = wanted.entry.as_ref();
        if (!same(link, local) || !same(link, remote)) && leaves_workspace(&row.path, link) {
            self.plan.held_links.push(row.path.clone());
            return Decision::Skip;
        }
        let wants_dir = is_dir(wanted.entry.as_ref());
        if need.directory && !wants_dir && self.options.mode == MemberMode::TwoWay {
            // A change below keeps the directory alive. What would have taken its name moves aside.
            wanted.loser = match &wanted.entry {
                None => Loser::Nobody,
                // Also if nothing stands at the hub: a look while somebody replaces a directory by a
                // file may find the new file and what was below the old directory.
                Some(entry) if local.is_some_and(|local| same_content(local, entry)) => {
                    Loser::Local
                }
                // What the other side would have taken the name from loses it as well.
                Some(_) if wanted.loser == Loser::Local => Loser::Both,
                Some(_) => Loser::Remote,
            };
            wanted.entry = Some(Entry::Dir);
            return Decision::Want(wanted);
        }
        if wants_dir {
            return Decision::Want(wanted);
        }
        let loses_dir = is_dir(local) || is_dir(remote);
        let stays = (need.stays_local && is_dir(local)) || (need.stays_remote && is_dir(remote));
        if stays || (open && loses_dir) {
            return Decision::Skip;
        }
        let deletes_remote =
            remote.is_some() && (wanted.entry.is_none() || (is_dir(remote) && !is_dir(local)));
        if deletes_remote && !same(remote, wanted.entry.as_ref()) && self.options.hold_deletions {
            self.plan.held_deletions += 1;
            return Decision::Skip;
        }
        Decision::Want(wanted)
    }

    /// Merges a row as the member's mode allows; `None` if it is to stay as it is on both sides.
    fn merge(&self, row: &Row) -> Option<Wanted> {
        let (base, local, remote) = (row.base.as_ref(), row.local.as_ref(), row.remote.as_ref());
        let theirs = |loser| Wanted { entry: row.remote.clone(), loser };
        // Rules are everybody's: who went by others than the hub has could send nothing.
        let is_rules = row.path.as_bytes() == RULES_NAME;
        match self.options.mode {
            MemberMode::SendOnly if is_rules => Some(merge(base, local, remote)),
            MemberMode::TwoWay => Some(merge(base, local, remote)),
            MemberMode::Mirror => Some(theirs(Loser::Nobody)),
            MemberMode::SendOnly if same(local, remote) => Some(theirs(Loser::Nobody)),
            MemberMode::SendOnly => same(remote, base)
                .then(|| Wanted { entry: row.local.clone(), loser: Loser::Nobody }),
            MemberMode::ReceiveOnly
                if same(local, remote) || same(local, base) || local.is_none() =>
            {
                // What was deleted here comes back once it is changed elsewhere.
                let withheld = !same(local, remote) && same(remote, base) && !same(local, base);
                (!withheld).then(|| theirs(Loser::Nobody))
            }
            MemberMode::ReceiveOnly => match remote {
                // Changed here, gone or unchanged there: it stays here.
                None => None,
                Some(_) if same(remote, base) => None,
                // A directory of ours does not move aside, since what is in it could not.
                Some(_) if is_dir(local) && !is_dir(remote) => None,
                Some(_) => match (local, remote) {
                    (Some(ours), Some(new)) if same_content(ours, new) => {
                        Some(theirs(Loser::Nobody))
                    }
                    _ if is_dir(local) => Some(theirs(Loser::Nobody)),
                    _ => Some(theirs(Loser::Local)),
                },
            },
        }
    }

    fn emit(&mut self, decisions: Vec<Decision>) {
        // What takes a directory away has to wait until its children are gone.
        let mut last_local = Vec::new();
        let mut last_push = Vec::new();
        for (row, decision) in self.rows.iter().zip(decisions) {
            let Decision::Want(wanted) = decision else { continue };
            let mut aside = None;
            if matches!(wanted.loser, Loser::Local | Loser::Both)
                && let Some(loser) = &row.local
            {
                match self.place_copy(&row.path, loser) {
                    Copy::At(path) => aside = Some(path),
                    Copy::Exists => {}
                    Copy::Impossible => continue,
                }
            }
            if matches!(wanted.loser, Loser::Remote | Loser::Both)
                && let Some(loser) = &row.remote
            {
                match self.place_copy(&row.path, loser) {
                    Copy::At(path) => self.plan.push.push(PushOp {
                        path,
                        expected: None,
                        new: Some(loser.clone()),
                        conflict_of: Some(row.path.clone()),
                        ours: false,
                    }),
                    Copy::Exists => {}
                    Copy::Impossible => continue,
                }
            }
            let to = wanted.entry;
            if !same(row.remote.as_ref(), to.as_ref()) {
                let removes = to.is_none() || (is_dir(row.remote.as_ref()) && !is_dir(to.as_ref()));
                self.plan.push_deletions += usize::from(removes);
                let conflict_of = match (&row.base, &row.remote, &to) {
                    (None, None, Some(new)) => conflict_name::conflict_of(&row.path, new),
                    _ => None,
                };
                let list = if removes { &mut last_push } else { &mut self.plan.push };
                list.push(PushOp {
                    path: row.path.clone(),
                    expected: row.remote.clone(),
                    new: to.clone(),
                    conflict_of,
                    ours: same(row.local.as_ref(), to.as_ref()),
                });
            }
            if !same(row.local.as_ref(), to.as_ref()) {
                let removes = to.is_none() || (is_dir(row.local.as_ref()) && !is_dir(to.as_ref()));
                let list = if removes { &mut last_local } else { &mut self.plan.local };
                list.push(LocalChange {
                    path: row.path.clone(),
                    from: row.local.clone(),
                    to,
                    aside,
                });
            }
        }
        self.plan.local.extend(last_local.into_iter().rev());
        self.plan.push.extend(last_push.into_iter().rev());
        pair_renames(&mut self.plan.push);
    }

    /// Finds the name for a conflict copy.
    fn place_copy(&mut self, path: &WirePath, loser: &Entry) -> Copy {
        for candidate in conflict_name::candidates(path, loser) {
            match self.copies.get(&candidate) {
                Some(copy) if same_content(copy, loser) => return Copy::Exists,
                Some(_) => continue,
                None => {}
            }
            let row = match self.rows.binary_search_by(|row| row.path.cmp(&candidate)) {
                Ok(index) => Some(self.rows[index].clone()),
                Err(_) => (self.look_up)(&candidate),
            };
            let Some(row) = row else {
                self.copies.insert(candidate.clone(), loser.clone());
                return Copy::At(candidate);
            };
            if row.unknown {
                continue;
            }
            match (&row.local, &row.remote) {
                (None, None) => {
                    self.copies.insert(candidate.clone(), loser.clone());
                    return Copy::At(candidate);
                }
                // The copy has been made here or has arrived from elsewhere; in both cases nothing
                // that is planned for its own path can lose it.
                (Some(a), Some(b)) if same_content(a, loser) && same_content(b, loser) => {
                    return Copy::Exists;
                }
                (Some(a), None) | (None, Some(a))
                    if same_content(a, loser) && row.base.is_none() =>
                {
                    return Copy::Exists;
                }
                _ => {}
            }
        }
        Copy::Impossible
    }
}

/// Brings the deletion of a file right behind the creation of one with the same content, so that
/// both get into one commit and the other members see a rename rather than a copy. Deletions of
/// directories stay where they are, at the end.
fn pair_renames(ops: &mut Vec<PushOp>) {
    let is_file = |entry: &Option<Entry>| matches!(entry, Some(Entry::File(_)));
    let mut gone: HashMap<Digest, Vec<usize>> = HashMap::new();
    for (number, op) in ops.iter().enumerate().rev() {
        if op.new.is_none() && is_file(&op.expected) {
            let identity = op.expected.as_ref().map(Entry::identity);
            identity.into_iter().for_each(|id| gone.entry(id).or_default().push(number));
        }
    }
    if gone.is_empty() {
        return;
    }
    let mut order = Vec::with_capacity(ops.len());
    let mut taken = vec![false; ops.len()];
    for (number, op) in ops.iter().enumerate() {
        if taken[number] {
            continue;
        }
        taken[number] = true;
        order.push(number);
        let created = op.new.as_ref().filter(|_| op.expected.is_none() && is_file(&op.new));
        let pair = created.and_then(|new| gone.get_mut(&new.identity())?.pop());
        if let Some(pair) = pair.filter(|pair| !std::mem::replace(&mut taken[*pair], true)) {
            order.push(pair);
        }
    }
    let mut all: Vec<Option<PushOp>> = std::mem::take(ops).into_iter().map(Some).collect();
    ops.extend(order.into_iter().filter_map(|number| all[number].take()));
}

enum Copy {
    At(WirePath),
    /// The same content stands under a conflict name already.
    Exists,
    /// No name is free, or none is short enough: both sides keep what they have.
    Impossible,
}

fn same_content(a: &Entry, b: &Entry) -> bool {
    match (a, b) {
        (Entry::File(a), Entry::File(b)) => a.content == b.content,
        _ => a.same_identity(b),
    }
}

/// For each row, whether it lies below one that is unknown.
fn below_unknown(rows: &[Row]) -> Vec<bool> {
    let mut unknown: Option<&WirePath> = None;
    rows.iter()
        .map(|row| {
            let below = unknown.is_some_and(|unknown| row.path.is_below(unknown));
            if !below && row.unknown {
                unknown = Some(&row.path);
            }
            below
        })
        .collect()
}
