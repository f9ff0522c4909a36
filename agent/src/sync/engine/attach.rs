//! Beginning to work in a root directory, or refusing to.
//!
//! A root that is missing, or is another directory than the one whose files are in the index, would
//! look like a user who deleted everything. So it is not read at all: the workspace halts and says
//! why.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use super::super::WorkspaceConfig;
use super::super::core::Core;
use super::super::ground::Ground;
use super::super::ignore::Ignore;
use super::super::index::{Index, IndexError};
use super::super::private_dir::PrivateDir;
use super::super::roots::{HeldRoot, RootTaken, overlap, real_path_on};
use super::super::watch::{Dirty, Watch};
use super::replica::{Replica, ReplicaError, check_replica};
use crate::root_dir::{DirIdentity, RootDir, exact, folds_case};

/// Why a workspace cannot be worked in.
#[derive(Debug, thiserror::Error)]
pub(super) enum AttachError {
    #[error(
        "the root directory {} is missing; bring it back (is a disk not mounted?), or detach the \
         workspace and attach it again to begin anew", path.display()
    )]
    Missing { path: PathBuf },
    #[error(
        "another directory stands at {} than the one that was synced; bring the old one back, or \
         detach the workspace and attach it again to merge with this one", path.display()
    )]
    Replaced { path: PathBuf },
    #[error(
        "the directory at {} does not carry the token of the one that was synced: it may be an older \
         copy of it; bring the right one back, or detach the workspace and attach it again to merge \
         with this one", path.display()
    )]
    OtherReplica { path: PathBuf },
    #[error(transparent)]
    Taken(#[from] RootTaken),
    #[error("{} overlaps with this agent's own state in {}", path.display(), state.display())]
    OwnState { path: PathBuf, state: PathBuf },
    #[error("cannot use the root directory {}: {source}", path.display())]
    Root { path: PathBuf, source: io::Error },
    #[error("cannot use the state directory {}: {source}", path.display())]
    State { path: PathBuf, source: io::Error },
    #[error("no place for the private directory on the file system of {}: {source}", path.display())]
    Private { path: PathBuf, source: io::Error },
    #[error("cannot read .cortexignore in {}: {source}", path.display())]
    Rules { path: PathBuf, source: io::Error },
    #[error("cannot use the index: {0}")]
    Index(#[from] IndexError),
}

/// The open root, and which directory it is.
pub(super) struct Attached {
    pub(super) held: HeldRoot,
    pub(super) core: Core,
    pub(super) identity: DirIdentity,
}

impl WorkspaceConfig {
    /// Where the index and, if it is on the same file system, the private directory are.
    pub(in crate::sync) fn state_folder(&self) -> PathBuf {
        self.state_dir.join("workspaces").join(self.id.to_string())
    }
}

/// Opens everything. Blocking.
pub(super) fn attach(
    ground: &Ground,
    config: &WorkspaceConfig,
    dirty: Arc<Dirty>,
) -> Result<Attached, AttachError> {
    let disk = &*ground.disk;
    let path = || config.root.clone();
    let folder = config.state_folder();
    disk.make_all(&folder, 0o700)
        .map_err(|source| AttachError::State { path: folder.clone(), source })?;
    let (top, made) = match disk.open(&config.root) {
        Ok(top) => (top, false),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            if Index::open(&folder)?.root()?.is_some() {
                return Err(AttachError::Missing { path: path() });
            }
            let made = disk.make_all(&config.root, 0o777).and_then(|()| disk.open(&config.root));
            (made.map_err(|source| AttachError::Root { path: path(), source })?, true)
        }
        Err(source) => return Err(AttachError::Root { path: path(), source }),
    };
    let held = config.roots.hold(disk, &config.name, &config.root, &top)?;
    if overlap(&real_path_on(disk, &config.root), &real_path_on(disk, &config.state_dir)) {
        return Err(AttachError::OwnState { path: path(), state: config.state_dir.clone() });
    }
    let identity = top.identity().map_err(|source| AttachError::Root { path: path(), source })?;
    let mut index = Index::open(&folder)?;
    match index.root()? {
        Some(known) if known != identity && !made => {
            return Err(AttachError::Replaced { path: path() });
        }
        Some(_) => {}
        None => index.batch(|writer| writer.set_root(identity))?,
    }
    match check_replica(&top, &mut index) {
        Ok(Replica::Ours) => {}
        Ok(Replica::Other) => return Err(AttachError::OtherReplica { path: path() }),
        Err(ReplicaError::Index(error)) => return Err(error.into()),
        Err(ReplicaError::Root(source)) => return Err(AttachError::Root { path: path(), source }),
    }
    let private = PrivateDir::open(ground, config.id, &folder, &config.root, &top)
        .map_err(|source| AttachError::Private { path: path(), source })?;
    tracing::debug!(workspace = %config.name, private = ?private.path(), "attached");
    let clock = private
        .clock_of_readers()
        .map_err(|source| AttachError::Private { path: path(), source })?;
    index.begin_boot(&(ground.boot_id)(), clock.now_ns.saturating_add(clock.tick_ns))?;
    let meta = top.meta().map_err(|source| AttachError::Root { path: path(), source })?;
    let owner = rustix::process::geteuid().is_root().then_some((meta.uid, meta.gid));
    let folds_case =
        folds_case(&top).map_err(|source| AttachError::Root { path: path(), source })?;
    let root = RootDir::new(if folds_case { exact(top) } else { top });
    // Before the first look: what is left out is not even read.
    let ignore =
        Ignore::load(&root).map_err(|source| AttachError::Rules { path: path(), source })?;
    index.set_ignore(ignore.clone())?;
    dirty.set_ignore(ignore.clone());
    let watch = Watch::new(&ground.kernels, &config.root, dirty)
        .inspect_err(|error| tracing::warn!(%error, "cannot watch; looking from time to time"))
        .ok();
    // Until the first look it is not known what they come from.
    let rules_base = None;
    let core = Core {
        root,
        folds_case,
        private: Arc::new(private),
        index,
        ignore,
        rules_base,
        watch,
        owner,
    };
    Ok(Attached { held, core, identity })
}

/// Checks that the root is still what it was. Blocking.
pub(super) fn check_root(
    ground: &Ground,
    config: &WorkspaceConfig,
    identity: DirIdentity,
) -> Result<(), AttachError> {
    match ground.disk.open(&config.root).and_then(|top| top.identity()) {
        Ok(now) if now == identity => Ok(()),
        Ok(_) => Err(AttachError::Replaced { path: config.root.clone() }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            Err(AttachError::Missing { path: config.root.clone() })
        }
        Err(source) => Err(AttachError::Root { path: config.root.clone(), source }),
    }
}
