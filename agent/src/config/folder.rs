//! Files of the state as root may open them: the folder belongs to the agent's user, who may put
//! anything there under any name. So a file is opened by name in a handle of the folder, never
//! through a link, and is only believed to be ours if it is a plain file with one name.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, Stat};

/// A handle of a state's folder.
pub(crate) struct Folder(OwnedFd);

impl Folder {
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Self(rustix::fs::open(path, flags, Mode::empty())?))
    }

    /// Opens a file, or creates it. Afterwards it is its owner's alone, and, if root created it,
    /// it belongs to the folder's owner.
    ///
    /// # Errors
    /// Those of the file system, or if the name stands for anything but a plain file.
    pub(crate) fn file(&self, name: &str, access: OFlags) -> io::Result<File> {
        // Without NONBLOCK, a pipe that somebody put there would hold us up.
        let flags = access | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let file = rustix::fs::openat(&self.0, name, flags, Mode::RUSR | Mode::WUSR)?;
        let (folder, stat) = (rustix::fs::fstat(&self.0)?, rustix::fs::fstat(&file)?);
        check_plain(&stat)?;
        let own = rustix::process::geteuid();
        if stat.st_mode & 0o077 != 0 && (own.is_root() || own.as_raw() == stat.st_uid) {
            // Whoever can read a lock can hold it.
            rustix::fs::fchmod(&file, Mode::RUSR | Mode::WUSR)?;
        }
        if own.is_root() && stat.st_uid == 0 && folder.st_uid != 0 {
            let (user, group) = owner_of(&folder);
            rustix::fs::fchown(&file, Some(user), Some(group))?;
        }
        Ok(File::from(file))
    }

    pub(crate) fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        Ok(rustix::fs::renameat(&self.0, from, &self.0, to)?)
    }

    /// Makes creations and renames survive power loss.
    pub(crate) fn sync(&self) -> io::Result<()> {
        Ok(rustix::fs::fsync(&self.0)?)
    }
}

/// Gives a file or folder that root wrote to the owner of its folder: root may administer the state
/// of an agent that runs as another user, which must be able to read it afterwards. (A crash in
/// between leaves a file that the agent cannot read, which makes it stricter, and the command can
/// be repeated.)
pub(crate) fn own_like_folder(path: &Path) -> io::Result<()> {
    if !rustix::process::geteuid().is_root() {
        return Ok(());
    }
    let Some(folder) = path.parent() else { return Ok(()) };
    let folder = rustix::fs::stat(folder)?;
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = rustix::fs::open(path, flags, Mode::empty())?;
    let stat = rustix::fs::fstat(&file)?;
    if (folder.st_uid, folder.st_gid) == (stat.st_uid, stat.st_gid) {
        return Ok(());
    }
    if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
        check_plain(&stat)?;
    }
    let (user, group) = owner_of(&folder);
    Ok(rustix::fs::chownat(&file, "", Some(user), Some(group), AtFlags::EMPTY_PATH)?)
}

fn owner_of(stat: &Stat) -> (rustix::fs::Uid, rustix::fs::Gid) {
    (rustix::fs::Uid::from_raw(stat.st_uid), rustix::fs::Gid::from_raw(stat.st_gid))
}

/// A second name could be anywhere, so the file could be anybody's.
fn check_plain(stat: &Stat) -> io::Result<()> {
    if FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile && stat.st_nlink <= 1 {
        return Ok(());
    }
    Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a plain file with one name"))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use super::*;

    #[test]
    fn what_somebody_else_put_under_the_name_is_neither_created_nor_opened() {
        let outside = tempfile::tempdir().unwrap();
        let (target, other) = (outside.path().join("new"), outside.path().join("other"));
        std::fs::write(&other, "theirs").unwrap();
        let state = tempfile::tempdir_in(outside.path()).unwrap();
        symlink(&target, state.path().join("link")).unwrap();
        std::fs::hard_link(&other, state.path().join("second-name")).unwrap();
        rustix::fs::mknodat(
            rustix::fs::CWD,
            state.path().join("pipe"),
            FileType::Fifo,
            Mode::RUSR | Mode::WUSR,
            0,
        )
        .unwrap();
        std::fs::create_dir(state.path().join("folder")).unwrap();
        let folder = Folder::open(state.path()).unwrap();
        for name in ["link", "second-name", "pipe", "folder"] {
            assert!(folder.file(name, OFlags::WRONLY).is_err(), "{name}");
        }
        assert!(!target.exists());
        assert_eq!(std::fs::read(&other).unwrap(), b"theirs");
        // A lock of an earlier version is closed to others.
        let lock = state.path().join("lock");
        std::fs::write(&lock, "").unwrap();
        std::fs::set_permissions(&lock, std::fs::Permissions::from_mode(0o644)).unwrap();
        for name in ["lock", "new-lock"] {
            let file = folder.file(name, OFlags::WRONLY).unwrap();
            assert_eq!(file.metadata().unwrap().permissions().mode() & 0o777, 0o600, "{name}");
        }
    }

    #[test]
    fn root_gives_what_it_wrote_to_the_folders_owner_and_nothing_else() {
        use std::os::unix::fs::{MetadataExt as _, chown};
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let state = tempfile::tempdir().unwrap();
        chown(state.path(), Some(64_001), Some(64_001)).unwrap();
        let owner = |path: &Path| std::fs::symlink_metadata(path).unwrap().uid();
        let outside = tempfile::NamedTempFile::new_in("/tmp").unwrap();
        let ours = state.path().join("ours");
        std::fs::write(&ours, "").unwrap();
        own_like_folder(&ours).unwrap();
        assert_eq!(owner(&ours), 64_001);
        for (name, link) in [("link", true), ("second-name", false)] {
            let path = state.path().join(name);
            if link {
                symlink(outside.path(), &path).unwrap();
            } else {
                std::fs::hard_link(outside.path(), &path).unwrap();
            }
            assert!(own_like_folder(&path).is_err(), "{name}");
            assert_eq!(owner(outside.path()), 0, "{name}");
        }
    }
}
