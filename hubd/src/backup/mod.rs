//! Backups of everything durable that a hub has: made while it runs, put back, and checked.
//!
//! A backup is a folder:
//!
//! ```text
//! manifest.json                  what belongs to it, with hashes; written last, replaced whole
//! databases-<n>/hub.db           copies of one moment each, complete without a log
//!              /history.db
//!              /ws/<id>.db
//!              /ca/…  http.key  audit.head
//! ws/<id>/packs/<hash>           content, named by its hash: what is there already is not copied again
//! lock                           one backup at a time
//! ```
//!
//! Making another one in the same folder copies the databases and the packs that are new, and then lets
//! go of what only the one before needed. A crash at any point leaves the one before, whole.
//!
//! The set is consistent: a workspace's packs are those that its database copy names (one that is
//! collected meanwhile makes its database be copied anew), and the main database is copied last, after
//! the audit log's mark. What commands wrote and is still to be read (`DATA/tasks`) is not in a backup, nor
//! are the latest events (`DATA/events.db`): they belong to the last hours; the history of nodes is.
//!
//! The work is done by the process that is asked, on the files of the hub, so it takes the rights of
//! root or of the hub's user and no running hub.

mod make;
mod restore;
#[cfg(test)]
mod tests;
mod verify;

use std::fs::{self, File};
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use cortex_shared::ids::{MeshId, WorkspaceId};
use serde::{Deserialize, Serialize};

use crate::config::DataLayout;
use crate::store::workspace::StoreError as WorkspaceError;
use crate::store::{DatabaseError, StoreError};
use crate::sync::PackFileError;

pub use self::make::{Backup, back_up};
pub use self::restore::{Restored, restore};
pub use self::verify::{Verified, verify};

/// Kind of backup that this program makes, and the only one that it reads.
const FORMAT: u32 = 1;
/// A manifest has a line for each workspace and some for the rest: this is more than 100,000 of them.
const MAX_MANIFEST_BYTES: u64 = 64 * 1024 * 1024;
const MANIFEST: &str = "manifest.json";

/// Hears what is being done, and how many bytes of how many of it are.
pub type Tell<'a> = &'a mut dyn FnMut(&str, u64, u64);

/// Why a backup could not be made, put back or checked.
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    /// A file or folder.
    #[error("cannot {action} {}", path.display())]
    File {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A pack.
    #[error(transparent)]
    Pack(#[from] PackFileError),
    /// A database.
    #[error("cannot use the database {}", path.display())]
    Database {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: StoreError,
    },
    /// There is no hub's data.
    #[error("no hub has ever run on {}", path.display())]
    NoHub {
        /// Where there should be.
        path: PathBuf,
    },
    /// The folder holds something else.
    #[error("{} is not a backup of a hub: {problem}", path.display())]
    NotABackup {
        /// Which.
        path: PathBuf,
        /// What it lacks.
        problem: String,
    },
    /// The folder holds the backup of another hub.
    #[error("{} holds a backup of another mesh ({mesh})", path.display())]
    OtherMesh {
        /// Which folder.
        path: PathBuf,
        /// Whose it is.
        mesh: MeshId,
    },
    /// Something is where a backup shall be put back.
    #[error("{} is not empty: a backup is only put back where nothing is", path.display())]
    NotEmpty {
        /// Where.
        path: PathBuf,
    },
    /// Somebody works there.
    #[error("{} is in use by another process", path.display())]
    Locked {
        /// Where.
        path: PathBuf,
    },
    /// A file of the backup is not what was put there.
    #[error("{} is damaged: it is not what the manifest says", path.display())]
    Damaged {
        /// Which.
        path: PathBuf,
    },
    /// The hub let content go faster than it could be copied.
    #[error("workspace {workspace} changed too fast to be copied")]
    TooFast {
        /// Which.
        workspace: WorkspaceId,
    },
    /// What follows putting the files back.
    #[error("cannot write in the audit log that this is a restored hub")]
    Audit(#[from] crate::authority::audit::AuditError),
}

impl BackupError {
    fn file(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::File { action, path, source }
    }

    fn database<E: Into<StoreErrors>>(path: &Path) -> impl FnOnce(E) -> Self {
        let path = path.to_owned();
        move |source| Self::Database { path, source: source.into().0 }
    }

    /// Whether something stands in the way that the caller has to move.
    #[must_use]
    pub fn is_conflict(&self) -> bool {
        matches!(self, Self::NotEmpty { .. } | Self::Locked { .. } | Self::OtherMesh { .. })
    }

    /// Whether what was named is not there.
    #[must_use]
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::NoHub { .. } | Self::NotABackup { .. })
    }
}

/// The errors of both kinds of store, as one.
struct StoreErrors(StoreError);

impl From<StoreError> for StoreErrors {
    fn from(error: StoreError) -> Self {
        Self(error)
    }
}

impl From<DatabaseError> for StoreErrors {
    fn from(error: DatabaseError) -> Self {
        Self(error.into())
    }
}

impl From<WorkspaceError> for StoreErrors {
    fn from(error: WorkspaceError) -> Self {
        Self(match error {
            WorkspaceError::Database(error) => error.into(),
            // Of what is only read, nothing else is ever said.
            _ => DatabaseError::Damaged { what: "the workspace" }.into(),
        })
    }
}

/// What belongs to a backup.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// See [`FORMAT`].
    format: u32,
    /// Version of the program that made it.
    pub hub_version: String,
    /// The mesh.
    pub mesh: MeshId,
    /// When it was begun, milliseconds since the Unix epoch.
    pub created_at_ms: i64,
    /// Folder with the databases.
    databases: String,
    /// Files in that folder.
    files: Vec<FileRecord>,
    /// Workspaces, each with a database.
    pub workspaces: Vec<WorkspaceRecord>,
}

/// A file of a backup.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct FileRecord {
    /// Below the folder of databases.
    path: String,
    /// Its size.
    bytes: u64,
    /// Its BLAKE3 hash.
    blake3: String,
}

/// A workspace of a backup.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WorkspaceRecord {
    /// Which.
    pub id: WorkspaceId,
    /// How many packs it has.
    pub packs: u64,
}

impl Manifest {
    /// Reads the manifest of a backup.
    ///
    /// # Errors
    /// [`BackupError::NotABackup`], and those of the file system.
    pub fn read(backup: &Path) -> Result<Self, BackupError> {
        let path = backup.join(MANIFEST);
        let wrong = |problem: String| BackupError::NotABackup { path: backup.to_owned(), problem };
        let file = match File::open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(wrong(format!("it has no {MANIFEST}")));
            }
            file => file.map_err(BackupError::file("read", &path))?,
        };
        let mut text = Vec::new();
        file.take(MAX_MANIFEST_BYTES)
            .read_to_end(&mut text)
            .map_err(BackupError::file("read", &path))?;
        let manifest: Self =
            serde_json::from_slice(&text).map_err(|error| wrong(format!("{MANIFEST}: {error}")))?;
        if manifest.format != FORMAT {
            return Err(wrong(format!("it has format {}, not {FORMAT}", manifest.format)));
        }
        let names = manifest.files.iter().map(|file| &file.path).chain([&manifest.databases]);
        if let Some(name) = names.into_iter().find(|name| !is_plain(name)) {
            return Err(wrong(format!("{MANIFEST} names {name:?}")));
        }
        Ok(manifest)
    }
}

/// A path below a folder that leads nowhere else.
fn is_plain(path: &str) -> bool {
    let plain = |name: &str| {
        !name.is_empty()
            && !name.starts_with('.')
            && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
    };
    path.split('/').all(plain)
}

/// Where the files of a hub are: of one that runs, or in a backup.
#[derive(Clone, Debug)]
pub struct StoreFiles {
    databases: PathBuf,
    content: PathBuf,
    kind: Kind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Live,
    Backup,
}

impl StoreFiles {
    /// Those of a data directory.
    #[must_use]
    pub fn live(data: &DataLayout) -> Self {
        Self { databases: data.root().to_owned(), content: data.workspaces(), kind: Kind::Live }
    }

    /// Those of a backup.
    #[must_use]
    pub fn of_backup(backup: &Path, manifest: &Manifest) -> Self {
        Self {
            databases: backup.join(&manifest.databases),
            content: backup.join("ws"),
            kind: Kind::Backup,
        }
    }

    fn hub(&self) -> PathBuf {
        self.databases.join("hub.db")
    }

    fn history(&self) -> PathBuf {
        self.databases.join("history.db")
    }

    fn audit_mark(&self) -> PathBuf {
        self.databases.join("audit.head")
    }

    /// The key of the HTTP side; none where that has no certificate of the mesh's own making.
    fn http_key(&self) -> PathBuf {
        self.databases.join("http.key")
    }

    fn ca(&self) -> PathBuf {
        self.databases.join("ca")
    }

    /// The folder of a workspace's packs, and what else it has.
    fn content(&self, id: WorkspaceId) -> PathBuf {
        self.content.join(id.to_string())
    }

    fn workspace(&self, id: WorkspaceId) -> PathBuf {
        match self.kind {
            Kind::Live => self.content(id).join("ws.db"),
            Kind::Backup => self.databases.join("ws").join(format!("{id}.db")),
        }
    }

    /// The workspaces that have content here.
    fn workspaces(&self) -> Result<Vec<WorkspaceId>, BackupError> {
        let mut found = Vec::new();
        for entry in list(&self.content)? {
            found.extend(
                entry.file_name().to_str().and_then(|name| name.parse::<WorkspaceId>().ok()),
            );
        }
        found.sort();
        Ok(found)
    }
}

/// What a folder holds; nothing if it is not there.
fn list(folder: &Path) -> Result<Vec<fs::DirEntry>, BackupError> {
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(BackupError::file("list", folder))?,
    };
    entries.collect::<Result<_, _>>().map_err(BackupError::file("list", folder))
}

/// Creates a folder that only its owner may enter, and those above it.
fn create_folder(path: &Path) -> Result<(), BackupError> {
    cortex_shared::durable::create_private_folder(path).map_err(BackupError::file("create", path))
}

fn sync_folder(path: &Path) -> Result<(), BackupError> {
    cortex_shared::durable::sync_folder(path).map_err(BackupError::file("flush", path))
}

/// Removes a folder with all that is in it, or a file; none is no error.
fn remove(path: &Path) -> Result<(), BackupError> {
    let removed = match fs::symlink_metadata(path) {
        Ok(meta) if meta.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    match removed {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(BackupError::file("remove", path)(error))
        }
        _ => Ok(()),
    }
}

/// Takes a lock that ends with the file, so with the process.
fn lock(path: &Path) -> Result<File, BackupError> {
    let file = File::create(path).map_err(BackupError::file("create", path))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(fs::TryLockError::WouldBlock) => {
            let folder = path.parent().unwrap_or(path).to_owned();
            Err(BackupError::Locked { path: folder })
        }
        Err(fs::TryLockError::Error(error)) => Err(BackupError::file("lock", path)(error)),
    }
}

/// Writes a new file as one that survives power loss once its folder is flushed, too.
fn write_new(path: &Path, bytes: &[u8]) -> Result<(), BackupError> {
    use std::io::Write as _;
    use std::os::unix::fs::OpenOptionsExt as _;
    let write = || {
        let mut file =
            fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
        file.write_all(bytes)?;
        file.sync_all()
    };
    write().map_err(BackupError::file("write", path))
}

/// The size and the BLAKE3 hash of a file.
fn hash_of(path: &Path) -> Result<(u64, String), BackupError> {
    let mut hasher = blake3::Hasher::new();
    let mut file = File::open(path).map_err(BackupError::file("read", path))?;
    io::copy(&mut file, &mut hasher).map_err(BackupError::file("read", path))?;
    Ok((hasher.count(), hasher.finalize().to_string()))
}
