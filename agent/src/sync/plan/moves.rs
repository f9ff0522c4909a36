//! Finding renames among the changes of the hub: what went at one path and came at another with the
//! same content. A renamed directory is found as one, so that what is in it and is not synced goes
//! along, and nothing is copied.
//!
//! Pure. Rows are taken in the order of their paths; only those that differ are needed, since
//! everything below a directory that is gone at the hub, or new there, differs.

use std::collections::HashMap;

use cortex_shared::entry::{Digest, Entry, same};
use cortex_shared::wire_path::WirePath;

use super::Row;

/// Most files and directories that are remembered; what comes after them is copied.
const MAX_CANDIDATES: usize = 100_000;

/// What stands at `from` here is to stand at `to`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Move {
    /// Where it is; nothing of it was changed here.
    pub from: WirePath,
    /// Where nothing stands.
    pub to: WirePath,
    /// It is a directory, with everything in it.
    pub directory: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    /// Here, unchanged, and gone at the hub.
    Gone,
    /// New at the hub.
    New,
    Neither,
}

fn side(row: &Row) -> Side {
    let Row { base, local, remote, unknown, .. } = row;
    match (base, local, remote) {
        _ if *unknown => Side::Neither,
        (Some(_), Some(_), None) if same(base.as_ref(), local.as_ref()) => Side::Gone,
        (None, None, Some(_)) => Side::New,
        _ => Side::Neither,
    }
}

/// A directory whose rows are being read.
struct Open {
    path: WirePath,
    side: Side,
    digest: blake3::Hasher,
    files: usize,
    /// All rows in it are of its side.
    pure: bool,
}

impl Open {
    fn child(&mut self, name: &[u8], digest: &Digest) {
        self.digest.update(&(name.len() as u64).to_be_bytes());
        self.digest.update(name);
        self.digest.update(digest.as_bytes());
    }
}

/// Takes rows and finds the renames among them.
#[derive(Default)]
pub struct MoveFinder {
    stack: Vec<Open>,
    gone: HashMap<(Digest, bool), Vec<WirePath>>,
    new: Vec<(WirePath, Digest, bool)>,
    candidates: usize,
}

impl MoveFinder {
    /// Takes the next row.
    pub fn add(&mut self, row: &Row) {
        while self.stack.last().is_some_and(|open| !row.path.is_below(&open.path)) {
            self.close();
        }
        let side = side(row);
        if let Some(open) = self.stack.last_mut()
            && (side != open.side || row.path.parent().as_ref() != Some(&open.path))
        {
            open.pure = false;
        }
        let entry = match side {
            Side::Gone => row.local.as_ref(),
            Side::New => row.remote.as_ref(),
            Side::Neither => None,
        };
        match entry {
            Some(Entry::Dir) => self.stack.push(Open {
                path: row.path.clone(),
                side,
                digest: blake3::Hasher::new(),
                files: 0,
                pure: true,
            }),
            Some(entry) => {
                let digest = entry.identity();
                if let Some(open) = self.stack.last_mut() {
                    open.child(row.path.name(), &digest);
                    open.files += 1;
                }
                if matches!(entry, Entry::File(file) if file.size > 0) {
                    self.candidate(row.path.clone(), side, digest, false);
                }
            }
            None => {}
        }
    }

    fn candidate(&mut self, path: WirePath, side: Side, digest: Digest, directory: bool) {
        if self.candidates >= MAX_CANDIDATES {
            return;
        }
        self.candidates += 1;
        match side {
            Side::Gone => self.gone.entry((digest, directory)).or_default().push(path),
            Side::New => self.new.push((path, digest, directory)),
            Side::Neither => {}
        }
    }

    fn close(&mut self) {
        let Some(open) = self.stack.pop() else { return };
        let digest: Digest = open.digest.finalize().into();
        if let Some(parent) = self.stack.last_mut() {
            parent.pure &= open.pure;
            parent.files += open.files;
            parent.child(open.path.name(), &digest);
        }
        // A directory without files is made faster than looked for.
        if open.pure && open.files > 0 {
            self.candidate(open.path, open.side, digest, true);
        }
    }

    /// The renames, none of them within another; directories before single files.
    #[must_use]
    pub fn finish(mut self) -> Vec<Move> {
        while !self.stack.is_empty() {
            self.close();
        }
        self.new.sort_by(|a, b| b.2.cmp(&a.2).then_with(|| a.0.cmp(&b.0)));
        let mut directories: Vec<Move> = Vec::new();
        let mut files = Vec::new();
        for (to, digest, directory) in self.new {
            if directories.iter().any(|moved| to.is_below(&moved.to)) {
                continue;
            }
            let Some(sources) = self.gone.get_mut(&(digest, directory)) else { continue };
            let free = |from: &WirePath| {
                !directories.iter().any(|moved| {
                    *from == moved.from || from.is_below(&moved.from) || moved.from.is_below(from)
                })
            };
            // Of several, the one that keeps its name.
            let found = sources
                .iter()
                .position(|from| from.name() == to.name() && free(from))
                .or_else(|| sources.iter().position(free));
            if let Some(found) = found {
                let moved = Move { from: sources.swap_remove(found), to, directory };
                if directory { &mut directories } else { &mut files }.push(moved);
            }
        }
        directories.append(&mut files);
        directories
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::rows;
    use super::*;

    fn moves(lines: &[&str]) -> Vec<String> {
        let mut finder = MoveFinder::default();
        rows(lines).iter().for_each(|row| finder.add(row));
        let show =
            |m: Move| format!("{} {}{}", m.from, m.to, if m.directory { " all" } else { "" });
        finder.finish().into_iter().map(show).collect()
    }

    #[test]
    fn renames_are_found_whole_and_only_where_nothing_else_changed() {
        for (what, lines, expected) in [
            ("a file", &["a a a -", "b - - a"][..], &["a b"][..]),
            ("another content", &["a a a -", "b - - b"], &[]),
            ("another attribute", &["a a a -", "b - - a*"], &[]),
            ("changed here", &["a a b -", "b - - a"], &[]),
            ("unknown here", &["a a a? -", "b - - a"], &[]),
            ("something stands there", &["a a a -", "b - b a"], &[]),
            (
                "a directory",
                &[
                    "d d d -",
                    "d/x a a -",
                    "d/y d d -",
                    "d/y/z b b -",
                    "e - - d",
                    "e/x - - a",
                    "e/y - - d",
                    "e/y/z - - b",
                ],
                &["d e all"],
            ),
            (
                "of a directory in which something was changed, its files",
                &["d d d -", "d/x a a -", "d/y b c -", "e - - d", "e/x - - a", "e/y - - b"],
                &["d/x e/x"],
            ),
            (
                "a directory within one that is not the same",
                &[
                    "d d d -",
                    "d/s d d -",
                    "d/s/x a a -",
                    "d/t b b -",
                    "e - - d",
                    "e/s - - d",
                    "e/s/x - - a",
                ],
                &["d/s e/s all"],
            ),
            ("names count", &["d d d -", "d/x a a -", "e - - d", "e/y - - a"], &["d/x e/y"]),
            (
                "each source once, the one of the same name first",
                &["a/f a a -", "b/g a a -", "n/g - - a", "n/h - - a", "n/i - - a"],
                &["b/g n/g", "a/f n/h"],
            ),
            ("into a part of itself", &["d/x a a -", "d/e/x - - a"], &["d/x d/e/x"]),
        ] {
            assert_eq!(moves(lines), expected, "{what}");
        }
    }
}
