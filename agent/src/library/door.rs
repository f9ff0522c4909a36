//! The door of a workspace: the link in its private directory over which links to skills lead.
//!
//! Commands write into workspaces, so nothing on the way is followed: neither a `.cortex` that is a link,
//! nor a door that somebody has put there.

use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use cortex_shared::library::DOOR_NAME;
use cortex_shared::wire_path::PRIVATE_NAME;

use crate::root_dir::{DirHandle, FileKind, RootDir};

/// What the door is called while it is being changed.
const NEW_DOOR: &[u8] = b"library.new";

/// Makes the door of the workspace at `root` lead to `place`. Blocking.
///
/// # Errors
/// Those of the file system; something that is no link is left alone, and is one of them.
pub(crate) fn hang_door(root: &Path, place: &Path) -> io::Result<()> {
    let target = place.as_os_str().as_bytes();
    let root = RootDir::open(root)?;
    match hang(root.top(), target) {
        // Whoever looked whether names are told apart by case has just removed the private directory again.
        Err(error) if error.kind() == io::ErrorKind::NotFound => hang(root.top(), target),
        result => result,
    }
}

fn hang(root: &DirHandle, target: &[u8]) -> io::Result<()> {
    let private = private_dir(root)?;
    match private.try_lstat(DOOR_NAME)? {
        None => private.make_link(DOOR_NAME, target),
        Some(found) if found.kind == FileKind::Link => {
            if private.read_link(DOOR_NAME)? == target {
                return Ok(());
            }
            if private.try_lstat(NEW_DOOR)?.is_some() {
                private.remove_file(NEW_DOOR)?;
            }
            private.make_link(NEW_DOOR, target)?;
            private.exchange(NEW_DOOR, &private, DOOR_NAME)?;
            private.remove_file(NEW_DOOR)
        }
        Some(_) => Err(io::ErrorKind::AlreadyExists.into()),
    }
}

fn private_dir(root: &DirHandle) -> io::Result<DirHandle> {
    match root.make_dir(PRIVATE_NAME, 0o755) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        _ => root.open_dir(PRIVATE_NAME),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn the_door_leads_where_the_library_is_and_follows_it() {
        let folder = tempfile::tempdir().unwrap();
        let door = folder.path().join(".cortex/library");
        for place in ["/srv/library", "/srv/library", "/home/ann/library"] {
            hang_door(folder.path(), Path::new(place)).unwrap();
            assert_eq!(fs::read_link(&door).unwrap(), Path::new(place));
        }
        assert_eq!(fs::read_dir(folder.path().join(".cortex")).unwrap().count(), 1);
    }

    #[test]
    fn nothing_that_somebody_put_there_is_followed_or_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let outside = folder.path().join("outside");
        let root = folder.path().join("root");
        fs::create_dir(&outside).unwrap();
        fs::create_dir(&root).unwrap();
        symlink(&outside, root.join(".cortex")).unwrap();
        assert!(hang_door(&root, Path::new("/srv/library")).is_err());
        assert_eq!(fs::read_dir(&outside).unwrap().count(), 0);
        fs::remove_file(root.join(".cortex")).unwrap();
        fs::create_dir_all(root.join(".cortex/library")).unwrap();
        assert!(hang_door(&root, Path::new("/srv/library")).is_err());
    }
}
