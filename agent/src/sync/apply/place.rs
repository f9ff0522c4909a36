//! Putting one change in its place, where nothing unseen may be replaced.

use std::io;

use cortex_shared::crash::crash_point;
use cortex_shared::entry::{Entry, File, same};

use super::attributes::with_executable;
use super::record::Print;
use super::{Applier, Staged, Touched, exists, vanished};
use crate::root_dir::{DirHandle, FileKind, Meta};
use crate::sync::index::{IndexError, Stamp};
use crate::sync::plan::LocalChange;

pub(super) enum Placed {
    Done,
    /// Not what the plan was made for.
    Surprise,
    /// The same, and somebody's newest work lies in the trash: the next look there puts it back,
    /// since it is not what was noted under its name.
    ToBeRescued,
    /// A directory that still holds what is not synced: it stays, and nothing more is to be done.
    Kept,
    /// Its directory does not exist: it could not be made, which has been said, or somebody has just
    /// removed it, which the kernel tells. Looking again at once would find nothing new.
    Blocked,
}

#[derive(Debug, thiserror::Error)]
pub(super) enum PlaceError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error(transparent)]
    Index(#[from] IndexError),
}

impl From<io::ErrorKind> for PlaceError {
    fn from(kind: io::ErrorKind) -> Self {
        Self::Io(kind.into())
    }
}

#[derive(Clone, Copy)]
pub(super) struct Current {
    pub(super) meta: Meta,
    pub(super) stamp: Stamp,
}

impl Applier<'_> {
    /// As [`Self::place`], also in a directory that its owner, who we are, has made read-only: that is
    /// meant for those who edit in it, and is not kept from others by this member's mode. It is
    /// read-only again afterwards.
    pub(super) fn place_anyway(
        &mut self,
        staged: &Staged,
        touched: &mut Touched,
        stood: &mut Option<Print>,
        trash_name: Option<&[u8]>,
    ) -> Result<Placed, PlaceError> {
        let result = self.place(staged, touched, stood, trash_name);
        let denied = |error: &io::Error| error.kind() == io::ErrorKind::PermissionDenied;
        if !matches!(&result, Err(PlaceError::Io(error)) if denied(error)) {
            return result;
        }
        let Ok((parent, _)) = self.root.parent_of(&staged.change.path) else { return result };
        let Ok(meta) = parent.meta() else { return result };
        if meta.mode & 0o300 == 0o300 || parent.set_mode(meta.mode | 0o300).is_err() {
            return result;
        }
        let result = self.place(staged, touched, stood, trash_name);
        parent.set_mode(meta.mode)?;
        result
    }

    /// Makes one change; tells in `stood` what was found there. What is displaced gets the name in
    /// the trash.
    fn place(
        &mut self,
        staged: &Staged,
        touched: &mut Touched,
        stood: &mut Option<Print>,
        trash_name: Option<&[u8]>,
    ) -> Result<Placed, PlaceError> {
        let change = &staged.change;
        let (parent, leaf) = match touched.parent_of(change) {
            Ok(found) => found,
            Err(error) if vanished(&error) => return Ok(Placed::Blocked),
            Err(error) => return Err(error.into()),
        };
        let Some(current) = self.expected(change, &parent, leaf)? else {
            return Ok(Placed::Surprise);
        };
        crash_point("sync.apply.checked");
        // What was changed just before it was read has to be read again at its new place.
        let is_known = |current: &Current| change.aside.is_none() || !current.stamp.racy;
        *stood = current.filter(is_known).map(|current| Print::of(&current.meta));
        let mut from = change.from.as_ref();
        if let Some(aside) = &change.aside {
            // Moves whatever stands there, so nothing can be lost.
            match parent.rename_new(leaf, &parent, aside.name()) {
                Err(error) if exists(&error) || vanished(&error) => return Ok(Placed::Surprise),
                result => result?,
            }
            from = None;
        }
        match (from, &change.to) {
            (None, None) => Ok(Placed::Done),
            (Some(Entry::Dir), None) => self.remove_directory(change, &parent, leaf),
            (Some(_), None) => self.displace(change, &parent, leaf, &current, trash_name),
            (None, Some(Entry::Dir)) => self.make_directory(&parent, leaf),
            (Some(Entry::Dir), Some(Entry::Dir)) => Ok(Placed::Done),
            (Some(_), Some(Entry::Dir)) => {
                match self.displace(change, &parent, leaf, &current, trash_name)? {
                    Placed::Done => self.make_directory(&parent, leaf),
                    undone => Ok(undone),
                }
            }
            (Some(Entry::File(_)), Some(Entry::File(to))) if staged.stage_name.is_none() => {
                match set_executable(&parent, leaf, &current, to)? {
                    Some(set) => {
                        *stood = Some(Print::of(&set));
                        Ok(Placed::Done)
                    }
                    None => Ok(Placed::Surprise),
                }
            }
            (from, Some(_)) => {
                let stage_name = staged.stage_name.as_deref().ok_or(io::ErrorKind::InvalidInput)?;
                match from {
                    None => self.place_new(stage_name, &parent, leaf),
                    Some(Entry::Dir) => match self.remove_directory(change, &parent, leaf)? {
                        Placed::Done => self.place_new(stage_name, &parent, leaf),
                        Placed::Kept => Err(PlaceError::Io(io::Error::new(
                            io::ErrorKind::DirectoryNotEmpty,
                            "a directory that still holds files that are not synced is in its place",
                        ))),
                        undone => Ok(undone),
                    },
                    Some(_) => self.replace(stage_name, change, &parent, leaf, &current),
                }
            }
        }
    }

    /// What stands at the path, if that is what the plan was made for; the inner `Option` is `None`
    /// for nothing.
    fn expected(
        &self,
        change: &LocalChange,
        parent: &DirHandle,
        leaf: &[u8],
    ) -> Result<Option<Option<Current>>, PlaceError> {
        let meta = parent.try_lstat(leaf)?;
        Ok(match (&change.from, meta) {
            (None, None) => Some(None),
            (Some(Entry::Dir), Some(meta)) if meta.kind == FileKind::Dir => {
                Some(Some(Current { meta, stamp: Stamp::new(&meta, false) }))
            }
            (Some(Entry::File(_) | Entry::Link { .. }), Some(meta)) => {
                // The index may know of a newer edit than the plan does.
                let found = self.index.get(&change.path)?.filter(|found| {
                    !found.row.unknown && same(found.row.local.as_ref(), change.from.as_ref())
                });
                found
                    .and_then(|found| found.stamp)
                    .filter(|stamp| *stamp == Stamp::new(&meta, stamp.racy))
                    .map(|stamp| Some(Current { meta, stamp }))
            }
            _ => None,
        })
    }

    fn make_directory(&self, parent: &DirHandle, leaf: &[u8]) -> Result<Placed, PlaceError> {
        match make_owned(parent, leaf, self.owner) {
            Err(error) if exists(&error) => Ok(Placed::Surprise),
            result => Ok(result.map(|()| Placed::Done)?),
        }
    }

    pub(super) fn place_new(
        &self,
        stage_name: &[u8],
        parent: &DirHandle,
        leaf: &[u8],
    ) -> Result<Placed, PlaceError> {
        match self.private.stage().rename_new(stage_name, parent, leaf) {
            Err(error) if exists(&error) || vanished(&error) => Ok(Placed::Surprise),
            result => {
                result?;
                Ok(Placed::Done)
            }
        }
    }
}

/// Makes a directory for the owner of the tree. One that cannot be given to him stays nevertheless, as his files cannot
/// either and say so: removed again it would be seen coming and going, and made again at once.
pub(in crate::sync) fn make_owned(
    parent: &DirHandle,
    leaf: &[u8],
    owner: Option<(u32, u32)>,
) -> io::Result<()> {
    parent.make_dir(leaf, 0o777)?;
    let given = owner.map_or(Ok(()), |(uid, gid)| parent.set_owner(leaf, uid, gid));
    if let Err(error) = given {
        let name = leaf.escape_ascii();
        tracing::warn!(%name, ?owner, %error, "a new directory cannot be given to the owner of the tree");
    }
    Ok(())
}

/// Removes a directory if it is empty.
pub(super) fn remove_empty(parent: &DirHandle, leaf: &[u8]) -> Result<Placed, PlaceError> {
    match parent.remove_dir(leaf) {
        Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => Ok(Placed::Kept),
        Err(error) if vanished(&error) => Ok(Placed::Surprise),
        result => {
            result?;
            Ok(Placed::Done)
        }
    }
}

/// Sets whether a file may be executed; what it looks like then, or `None` if it is another one.
fn set_executable(
    parent: &DirHandle,
    leaf: &[u8],
    current: &Option<Current>,
    to: &File,
) -> Result<Option<Meta>, PlaceError> {
    let file = parent.open_file(leaf)?;
    let meta = file.meta()?;
    if current.is_none_or(|current| current.meta != meta) {
        return Ok(None);
    }
    file.set_mode(with_executable(meta.mode & 0o777, to.executable))?;
    // As the file system shows it, which may be another way than it was set.
    let set = file.meta()?;
    file.sync()?;
    // Somebody wrote to it in between: that has to be read.
    let is_same = (set.size, set.mtime_ns) == (meta.size, meta.mtime_ns);
    Ok(Some(set).filter(|_| is_same))
}
