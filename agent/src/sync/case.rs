//! Names that differ only in case, where the file system takes them for one.
//!
//! Of such names only one can stand there. What comes second is held, with everything below it: it is
//! neither made nor taken for deleted, and follows once the other name is free. Which directory entries
//! are in the way is found out by looking ([`crate::root_dir::exact`]), not by knowing how the file
//! system compares; among what is new at the same time, by [`folded`].

use std::collections::HashSet;
use std::io;

use cortex_shared::wire_path::WirePath;

use super::plan::Plan;
use super::problem::{Code, Finding};
use crate::root_dir::RootDir;

/// A name as a file system may see it that does not tell case: what is equal here may be one there.
fn folded(name: &[u8]) -> Vec<u8> {
    match std::str::from_utf8(name) {
        Ok(text) => text.to_lowercase().into_bytes(),
        Err(_) => name.to_ascii_lowercase(),
    }
}

/// Takes what collides out of a plan, and returns where. Blocking.
///
/// # Errors
/// Those of the file system.
pub(super) fn hold_collisions(root: &RootDir, plan: &mut Plan) -> io::Result<Vec<WirePath>> {
    let mut held: HashSet<WirePath> = HashSet::new();
    let mut collisions = Vec::new();
    let mut taken: HashSet<(Option<WirePath>, Vec<u8>)> = HashSet::new();
    let mut stays = Vec::with_capacity(plan.local.len());
    for change in &plan.local {
        let creates = change.from.is_none() && change.to.is_some();
        let path = &change.path;
        let below = path.ancestors().any(|above| held.contains(&above));
        let collides = creates
            && !below
            && (!taken.insert((path.parent(), folded(path.name()))) || stands(root, path)?);
        if collides {
            collisions.push(path.clone());
        }
        if below || collides {
            held.insert(path.clone());
        }
        stays.push(!below && !collides);
    }
    let mut stays = stays.into_iter();
    plan.local.retain(|_| stays.next().unwrap_or(true));
    Ok(collisions)
}

/// Whether another spelling of a path's name stands there.
pub(super) fn stands(root: &RootDir, path: &WirePath) -> io::Result<bool> {
    match root.parent_of(path) {
        Ok((parent, name)) => parent.other_spelling(name),
        // Its directory is new, or gone: whatever that means is found out when it is made.
        Err(_) => Ok(false),
    }
}

/// Tells of a name that is held.
pub(super) fn finding(path: &WirePath) -> Finding {
    let text = "a name that differs only in case stands here already, and this file system takes both for \
                one: rename one of them on another member";
    Finding::at(path, Code::CaseConflict, text)
}
