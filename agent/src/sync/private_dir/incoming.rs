//! Where files are put together that operators write: a part of the private directory, of which the
//! engine knows nothing.
//!
//! What a crash leaves here is of two kinds, told by their names. A draft that was not complete is
//! nobody's and is removed. One that was about to change places with a file of the workspace may be
//! that file: it goes to the trash.

use std::collections::HashSet;
use std::io;
use std::path::PathBuf;
use std::sync::{LazyLock, Mutex, PoisonError};

use cortex_shared::clock::unix_ms;
use cortex_shared::ids::RequestId;

use super::{TRASH, in_candidates, make_parts, trash_name};
use crate::root_dir::{DirHandle, FileHandle, real_disk};
use crate::sync::WorkspaceConfig;

const INCOMING: &[u8] = b"incoming";
/// How the names of complete drafts begin.
const COMPLETE: &[u8] = b"complete-";

/// The directories from which this process has removed what an earlier one left. What lies there now is
/// being written.
static SWEPT: LazyLock<Mutex<HashSet<PathBuf>>> = LazyLock::new(Mutex::default);

/// An open part of the private directory.
#[derive(Clone, Debug)]
pub struct Incoming {
    dir: DirHandle,
    trash: DirHandle,
}

impl WorkspaceConfig {
    /// Where files are put together for the workspace whose root this is. Blocking.
    ///
    /// # Errors
    /// If there is no place for it on the root's file system.
    pub fn incoming(&self, root: &DirHandle) -> io::Result<Incoming> {
        let folder = self.state_folder();
        cortex_shared::durable::create_private_folder(&folder)?;
        in_candidates(&*real_disk(), self.id, &folder, &self.root, root, |path, top| {
            make_parts(top, &[INCOMING, TRASH])?;
            let incoming = Incoming { dir: top.open_dir(INCOMING)?, trash: top.open_dir(TRASH)? };
            let mut swept = SWEPT.lock().unwrap_or_else(PoisonError::into_inner);
            if !swept.contains(path) {
                incoming.sweep()?;
                swept.insert(path.to_owned());
            }
            Ok(incoming)
        })
    }
}

impl Incoming {
    /// The directory of the drafts.
    #[must_use]
    pub fn dir(&self) -> &DirHandle {
        &self.dir
    }

    fn sweep(&self) -> io::Result<()> {
        for name in self.dir.names()? {
            if name.starts_with(COMPLETE) {
                self.discard(&name)?;
            } else {
                self.dir.remove_file(&name)?;
            }
        }
        Ok(())
    }

    fn discard(&self, name: &[u8]) -> io::Result<()> {
        let now_ms = unix_ms().max(0).unsigned_abs();
        self.dir.rename_new(name, &self.trash, &trash_name(now_ms, RequestId::new()))
    }

    /// A new, empty file.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn begin(&self) -> io::Result<Draft> {
        let name = RequestId::new().to_string().into_bytes();
        let file = self.dir.create_new(&name, 0o666)?;
        Ok(Draft { incoming: self.clone(), name, file, rest: Rest::Incomplete })
    }
}

/// What is to become of what stands at a draft's name.
#[derive(Debug, PartialEq, Eq)]
enum Rest {
    Incomplete,
    /// It may be a file of the workspace.
    Somebodys,
    /// Nothing stands there.
    None,
}

/// A file that is being put together. Dropped before its end, it leaves nothing behind.
#[derive(Debug)]
pub struct Draft {
    incoming: Incoming,
    name: Vec<u8>,
    file: FileHandle,
    rest: Rest,
}

impl Draft {
    /// The file.
    #[must_use]
    pub fn file(&self) -> &FileHandle {
        &self.file
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &[u8] {
        &self.name
    }

    /// It is complete, and about to change places with a file of the workspace: from now on nothing of
    /// this name is removed unasked, after a crash neither.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn keep(&mut self) -> io::Result<()> {
        let kept = [COMPLETE, &self.name].concat();
        self.incoming.dir.rename_new(&self.name, &self.incoming.dir, &kept)?;
        self.incoming.dir.sync()?;
        (self.name, self.rest) = (kept, Rest::Somebodys);
        Ok(())
    }

    /// It stands somewhere else now.
    pub fn moved(mut self) {
        self.rest = Rest::None;
    }

    /// Removes what stands at its name.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn remove(mut self) -> io::Result<()> {
        self.incoming.dir.remove_file(&self.name)?;
        self.rest = Rest::None;
        Ok(())
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        let result = match self.rest {
            Rest::None => Ok(()),
            Rest::Incomplete => self.incoming.dir.remove_file(&self.name),
            Rest::Somebodys => self.incoming.discard(&self.name),
        };
        if let Err(error) = result {
            tracing::warn!(%error, "a file that was not written lies in the private directory");
        }
    }
}

#[cfg(test)]
mod tests {
    use cortex_shared::ids::WorkspaceId;

    use super::*;

    fn config(folder: &std::path::Path) -> (WorkspaceConfig, DirHandle) {
        let root = folder.join("root");
        std::fs::create_dir_all(&root).unwrap();
        let handle = DirHandle::open_ambient(&root).unwrap();
        let config = WorkspaceConfig {
            id: WorkspaceId::new(),
            name: "w".to_owned(),
            root,
            state_dir: folder.join("state"),
            roots: Default::default(),
            library: None,
        };
        (config, handle)
    }

    #[test]
    fn drafts_of_an_earlier_process_are_removed_and_what_may_be_somebodys_is_kept() {
        let folder = tempfile::tempdir().unwrap();
        let (config, root) = config(folder.path());
        let private = config.state_folder().join("files");
        std::fs::create_dir_all(private.join("incoming")).unwrap();
        std::fs::write(private.join("incoming/half"), b"half").unwrap();
        std::fs::write(private.join("incoming/complete-x"), b"theirs").unwrap();
        let incoming = config.incoming(&root).unwrap();
        assert!(incoming.dir().names().unwrap().is_empty());
        let trash = std::fs::read_dir(private.join("trash")).unwrap();
        let kept: Vec<Vec<u8>> =
            trash.map(|entry| std::fs::read(entry.unwrap().path()).unwrap()).collect();
        assert_eq!(kept, [b"theirs".to_vec()]);
        // One that is being written is no leftover.
        let draft = incoming.begin().unwrap();
        assert_eq!(config.incoming(&root).unwrap().dir().names().unwrap(), [draft.name()]);
    }

    #[test]
    fn a_draft_that_is_given_up_leaves_nothing_and_one_that_may_be_somebodys_is_kept() {
        let folder = tempfile::tempdir().unwrap();
        let (config, root) = config(folder.path());
        let incoming = config.incoming(&root).unwrap();
        drop(incoming.begin().unwrap());
        let mut draft = incoming.begin().unwrap();
        draft.keep().unwrap();
        drop(draft);
        assert!(incoming.dir().names().unwrap().is_empty());
        assert_eq!(incoming.trash.names().unwrap().len(), 1);
    }
}
