//! When deletions are so many that they wait for somebody's word.
//!
//! A directory that is emptied by mistake, by a disk that fails or by a broken program must not empty
//! every other member. A member holds such deletions back before it sends them; the hub, which does not
//! rely on that, judges what comes from each member by the same figures.
//!
//! What counts is a *loss*: the deletion of a file that is not empty and whose content is nowhere else in
//! the tree. A file that only got another name is none.

use std::time::Duration;

/// Losses within the window that need nobody's word, whatever the size of the workspace.
pub const FREE_LOSSES: u64 = 100;
/// Losses that came within this time count together.
pub const WINDOW: Duration = Duration::from_secs(60);

/// Whether so many losses are too many for a tree that had so many entries before the first of them:
/// more than a hundred and more than a quarter of it.
#[must_use]
pub const fn is_too_many(losses: u64, entries: u64) -> bool {
    losses > FREE_LOSSES && losses > entries / 4
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn too_many_is_more_than_a_hundred_and_more_than_a_quarter() {
        for (losses, entries, too_many) in [
            (0, 0, false),
            (100, 100, false),
            (101, 101, true),
            (101, 404, false),
            (101, 403, true),
            (250, 1000, false),
            (251, 1000, true),
            (u64::MAX, u64::MAX, true),
        ] {
            assert_eq!(is_too_many(losses, entries), too_many, "{losses} of {entries}");
        }
    }
}
