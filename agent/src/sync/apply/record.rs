//! Telling the index what a batch has left.

use cortex_shared::entry::Entry;
use cortex_shared::wire_path::WirePath;

use super::{Applier, ApplyError, Report};
use crate::root_dir::{FileKind, Meta};
use crate::sync::index::{Seen, Stamp};
use crate::sync::plan::LocalChange;

/// What a file or link of ours looked like when nobody else could reach it. If it looks otherwise
/// later, somebody has worked on it since.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Print {
    kind: FileKind,
    dev: u64,
    ino: u64,
    size: u64,
    mtime_ns: i64,
    /// A change of it leaves all the others as they are.
    executable: bool,
}

impl Print {
    /// What something with these attributes looks like.
    #[must_use]
    pub fn of(meta: &Meta) -> Self {
        let Meta { kind, dev, ino, size, mtime_ns, .. } = *meta;
        Self { kind, dev, ino, size, mtime_ns, executable: meta.executable() }
    }
}

/// A change that has been made, and the prints of what it left at its path and aside.
pub(super) struct Made {
    pub(super) change: LocalChange,
    pub(super) print: Option<Print>,
    pub(super) aside: Option<Print>,
}

impl Applier<'_> {
    /// Tells the index what stands there now, with new stamps: our own renames changed the old ones.
    pub(super) fn record(
        &mut self,
        made: Vec<Made>,
        untouched: &[Vec<u8>],
        report: &mut Report,
    ) -> Result<(), ApplyError> {
        let clock = self.private.clock().map_err(ApplyError::Durability)?;
        let mut parents = self.root.parents();
        self.index.batch(|writer| {
            untouched.iter().try_for_each(|name| writer.forget_displaced(name))?;
            for Made { change, print, aside: aside_print } in made {
                let parent = parents.of(&change.path).map(|(parent, _)| parent);
                let stamp_of = |path: &WirePath| {
                    let meta = parent.as_ref().ok()?.lstat(path.name()).ok()?;
                    Some((meta, Stamp::new(&meta, clock.is_racy(&meta))))
                };
                let mut see = |path: &WirePath, entry: Option<&Entry>, print| match entry {
                    None => writer.set_local(path, Seen::Absent),
                    Some(Entry::Dir) => writer.set_local(path, Seen::Entry(Entry::Dir, None)),
                    Some(entry) => match stamp_of(path) {
                        Some((meta, stamp)) if print == Some(Print::of(&meta)) => {
                            writer.set_local(path, Seen::Entry(entry.clone(), Some(stamp)))
                        }
                        // Somebody was there already.
                        _ => {
                            report.dirty.insert(path.parent());
                            writer.set_local(path, Seen::Unknown)
                        }
                    },
                };
                if let Some(aside) = &change.aside {
                    see(aside, change.from.as_ref(), aside_print)?;
                }
                see(&change.path, change.to.as_ref(), print)?;
            }
            Ok(())
        })?;
        Ok(())
    }
}
