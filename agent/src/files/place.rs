//! The workspace that a request is about.

use std::path::PathBuf;

use super::FileError;
use crate::root_dir::RootDir;
use crate::sandbox;
use crate::sync::WorkspaceConfig;
use crate::sync::private_dir::Incoming;

/// An open workspace, checked as it is for a command: one that would show what must stay hidden is
/// refused.
#[derive(Debug)]
pub struct Place {
    pub(super) root: RootDir,
    /// Whom new files belong to; `None` leaves them to the user the agent runs as.
    pub(super) owner: Option<(u32, u32)>,
    config: WorkspaceConfig,
}

impl Place {
    /// Opens a workspace in which nobody may see what is in `forbidden`.
    ///
    /// # Errors
    /// [`FileError::Unusable`].
    pub fn open(config: WorkspaceConfig, forbidden: &[PathBuf]) -> Result<Self, FileError> {
        let unusable = |error: &dyn std::fmt::Display, hint: &str| FileError::Unusable {
            reason: error.to_string(),
            hint: hint.to_owned(),
        };
        let checked = sandbox::check_workspace(&config.root, forbidden)
            .map_err(|refusal| unusable(&refusal, refusal.hint()))?;
        let root = RootDir::open(&checked.path);
        let meta = root.as_ref().map_err(|error| std::io::Error::from(error.kind()));
        let meta = meta.and_then(|root| root.top().meta());
        match (root, meta) {
            (Ok(root), Ok(meta)) if (meta.dev, meta.ino) == (checked.device, checked.inode) => {
                let owner = rustix::process::geteuid().is_root().then_some((meta.uid, meta.gid));
                Ok(Self { root, owner, config })
            }
            (Ok(_), Ok(_)) => Err(unusable(
                &"the workspace's directory has just become another one",
                "repeat the command",
            )),
            (Err(error), _) | (_, Err(error)) => Err(unusable(&error, "")),
        }
    }

    /// Where files are put together.
    pub(super) fn incoming(&self) -> Result<Incoming, FileError> {
        self.config.incoming(self.root.top()).map_err(|error| FileError::Unusable {
            reason: format!("there is no place to put a file together: {error}"),
            hint: String::new(),
        })
    }
}
