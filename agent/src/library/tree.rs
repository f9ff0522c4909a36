//! Read-only copies of directories that share their files, made and compared. Blocking; follows no link.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::path::Path;

use cortex_shared::durable;

/// Mode of directories, of files that may be executed, and of others: nobody writes.
const DIRECTORY: u32 = 0o555;
const EXECUTABLE: u32 = 0o555;
const FILE: u32 = 0o444;

/// Makes `to` a copy of the directory `from`: files by second names, or, where that cannot be, by
/// content. Durable when this returns, but for its own name.
pub(super) fn make_copy(from: &Path, to: &Path) -> io::Result<()> {
    fs::create_dir(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let (source, target) = (entry.path(), to.join(entry.file_name()));
        let kind = entry.file_type()?;
        if kind.is_dir() {
            make_copy(&source, &target)?;
        } else if kind.is_symlink() {
            symlink(fs::read_link(&source)?, &target)?;
        } else if kind.is_file() {
            share(&source, &target)?;
        }
    }
    fs::set_permissions(to, Permissions::from_mode(DIRECTORY))?;
    durable::sync_folder(to)
}

fn share(source: &Path, target: &Path) -> io::Result<()> {
    let executable = source.symlink_metadata()?.mode() & 0o111 != 0;
    let mode = Permissions::from_mode(if executable { EXECUTABLE } else { FILE });
    if fs::hard_link(source, target).is_ok() {
        // A file that was changed between the look and the link would get its mode, and no more: the
        // engine changes what it brought only by putting another file in its place.
        if target.symlink_metadata()?.mode() & 0o777 != mode.mode() {
            fs::set_permissions(target, mode)?;
        }
        return Ok(());
    }
    fs::copy(source, target)?;
    let copy = fs::File::open(target)?;
    copy.set_modified(source.symlink_metadata()?.modified()?)?;
    copy.set_permissions(mode)?;
    copy.sync_all()
}

/// Whether a directory is what [`make_copy`] makes of another. Reads no content: a file is the same if it
/// is the same file, or a copy of the same size and time.
pub(super) fn is_copy_of(copy: &Path, of: &Path) -> bool {
    compare(copy, of).unwrap_or(false)
}

fn compare(copy: &Path, of: &Path) -> io::Result<bool> {
    let own = copy.symlink_metadata()?;
    if !own.is_dir() || own.mode() & 0o777 != DIRECTORY {
        return Ok(false);
    }
    let mut count = 0;
    for entry in fs::read_dir(of)? {
        let entry = entry?;
        let (source, target) = (entry.path(), copy.join(entry.file_name()));
        let kind = entry.file_type()?;
        let same = if kind.is_dir() {
            compare(&target, &source)?
        } else if kind.is_symlink() {
            fs::read_link(&target)? == fs::read_link(&source)?
        } else if kind.is_file() {
            same_file(&target.symlink_metadata()?, &source.symlink_metadata()?)
        } else {
            continue;
        };
        if !same {
            return Ok(false);
        }
        count += 1;
    }
    Ok(fs::read_dir(copy)?.count() == count)
}

fn same_file(copy: &fs::Metadata, of: &fs::Metadata) -> bool {
    let shared = (copy.dev(), copy.ino()) == (of.dev(), of.ino());
    let equal = copy.is_file()
        && copy.len() == of.len()
        && (copy.mtime(), copy.mtime_nsec()) == (of.mtime(), of.mtime_nsec());
    let mode = if of.mode() & 0o111 != 0 { EXECUTABLE } else { FILE };
    (shared || equal) && copy.mode() & 0o777 == mode
}

/// Removes what stands at a path, if anything does, read-only directories as well.
pub(super) fn remove_tree(path: &Path) -> io::Result<()> {
    let found = match path.symlink_metadata() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        found => found?,
    };
    if !found.is_dir() {
        return fs::remove_file(path);
    }
    fs::set_permissions(path, Permissions::from_mode(0o700))?;
    for entry in fs::read_dir(path)? {
        remove_tree(&entry?.path())?;
    }
    fs::remove_dir(path)
}
