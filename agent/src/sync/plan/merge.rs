//! The three-way merge of a single path.

use cortex_shared::entry::{Entry, File, same};

/// Whose content loses the name and becomes a conflict copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Loser {
    Nobody,
    Local,
    Remote,
    /// A directory keeps the name, and both sides have something else there.
    Both,
}

/// What shall stand at a path on both sides.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Wanted {
    pub(super) entry: Option<Entry>,
    pub(super) loser: Loser,
}

/// Merges what stood at a path when both sides last agreed with what stands there now.
pub(super) fn merge(base: Option<&Entry>, local: Option<&Entry>, remote: Option<&Entry>) -> Wanted {
    let take = |entry: Option<&Entry>, loser| Wanted { entry: entry.cloned(), loser };
    if same(local, remote) || same(local, base) {
        return take(remote, Loser::Nobody);
    }
    if same(remote, base) {
        return take(local, Loser::Nobody);
    }
    match (local, remote) {
        // An edit beats a deletion, whichever side it is on.
        (None, _) => take(remote, Loser::Nobody),
        (_, None) => take(local, Loser::Nobody),
        (Some(Entry::File(ours)), Some(Entry::File(theirs))) => {
            match merge_files(base, ours, theirs) {
                Some(file) => Wanted { entry: Some(Entry::File(file)), loser: Loser::Nobody },
                None => take(remote, Loser::Local),
            }
        }
        // A directory keeps its name, since what lies below it could not move along.
        (Some(Entry::Dir), Some(_)) => take(local, Loser::Remote),
        _ => take(remote, Loser::Local),
    }
}

/// Merges content and executable bit apart; `None` if both sides changed the content differently.
fn merge_files(base: Option<&Entry>, ours: &File, theirs: &File) -> Option<File> {
    let base = match base {
        Some(Entry::File(file)) => Some(file),
        _ => None,
    };
    let content_from = if ours.content == theirs.content {
        theirs
    } else {
        match base {
            Some(base) if base.content == ours.content => theirs,
            Some(base) if base.content == theirs.content => ours,
            _ => return None,
        }
    };
    let executable = match base {
        // Of two bits that differ exactly one differs from the old one: that is the change.
        Some(base) if ours.executable != theirs.executable => !base.executable,
        _ => theirs.executable,
    };
    Some(File { executable, ..content_from.clone() })
}
