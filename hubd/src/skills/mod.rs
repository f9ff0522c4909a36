//! The library of skills: directories promoted out of workspaces, which every node has, read-only.
//!
//! The library is a workspace of the hub's own ([`WorkspaceId::LIBRARY`]), so that it travels, rests and is
//! collected like any other; nodes read it and do not write. Its tree has the current version of each
//! skill at `SKILL/VERSION`, and what other versions were is its past. The record of versions
//! ([`SkillVersion`]) is in the hub's store.
//!
//! A promotion changes three databases: the record, the library's tree, and the tree of the workspace. Its
//! order makes it one step for whoever looks, and for a hub that dies in between:
//!
//! 1. the content is taken over ([`crate::sync::adopt`]), which nobody sees;
//! 2. the workspace stands still, and the directory is found to be what was taken over;
//! 3. the version is recorded as pending: this is where one of several promotions wins;
//! 4. the library's tree gets the new version and loses the old one, in one transaction;
//! 5. the workspace's tree gets the link in the place of the directory, in one transaction;
//! 6. the version is recorded as current, with its line in the audit log.
//!
//! Whoever comes next, at the start of the hub at the latest and before any member is served, looks for
//! what is pending (`settle`): before 4 it is forgotten, after it what is missing is done. So there
//! is no moment at which the files are neither in the workspace nor in the library.
//!
//! One change of the library at a time, for all skills (`Skills::order`). Nothing else of the hub waits
//! for it, but members of the workspace that is promoted from, who commit nothing during 3 to 5.

mod change;
mod check;
mod error;
mod settle;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use cortex_shared::ids::{NodeId, WorkspaceId};
use cortex_shared::wire_path::WirePath;
use tokio::sync::Mutex;

pub use self::change::{Promoted, Promotion};
pub use self::error::{SkillError, Surprise};
use crate::store::workspace::{Head, WorkspaceSettings};
use crate::store::{SkillVersion, Store};
use crate::sync::members::Members;
use crate::sync::{SyncError, WorkspaceHub, Workspaces};

/// Old versions of one path of the library: there is one at most, as each version has paths of its own.
const KEEP_VERSIONS: u32 = 20;

/// See the module.
pub struct Skills {
    store: Arc<dyn Store>,
    content: Arc<Workspaces>,
    members: Arc<Members>,
    /// How long a version is kept that was replaced or removed.
    keep_for: Duration,
    /// Held by whoever changes the library, from the look at what is current to the end.
    order: Mutex<()>,
}

impl Skills {
    /// The library, with what the last hub began finished or undone. To be called before members are
    /// served.
    ///
    /// # Errors
    /// Those of the store. What could not be finished for another reason is tried again later.
    pub async fn open(
        store: Arc<dyn Store>,
        content: Arc<Workspaces>,
        members: Arc<Members>,
        keep_for: Duration,
    ) -> Result<Self, SkillError> {
        let skills = Self { store, content, members, keep_for, order: Mutex::default() };
        let known = skills.store.skills(None).await?;
        if !known.is_empty() {
            match skills.settle(known).await {
                Err(error @ SkillError::Store(_)) => return Err(error),
                // A tree that cannot be opened now keeps nobody from the others; whoever changes the
                // library tries again.
                Err(error) => {
                    tracing::error!(%error, "what was begun in the library is not finished")
                }
                Ok(()) => {}
            }
            skills.members.membership.begin_library();
        }
        Ok(skills)
    }

    /// All versions of one skill, or of all: by name, then oldest first. None that is being made.
    ///
    /// # Errors
    /// Those of the store.
    pub async fn versions(&self, skill: Option<&str>) -> Result<Vec<SkillVersion>, SkillError> {
        let mut versions = self.store.skills(skill.map(str::to_owned)).await?;
        versions.retain(|version| !version.pending);
        Ok(versions)
    }

    /// Until when a version can be restored, in milliseconds since the Unix epoch; `None` for one that is
    /// current.
    #[must_use]
    pub fn kept_until_ms(&self, version: &SkillVersion) -> Option<i64> {
        let keep_ms = i64::try_from(self.keep_for.as_millis()).unwrap_or(i64::MAX);
        version.ended_at_ms.map(|ended| ended.saturating_add(keep_ms))
    }

    /// The newest version of the library as a whole.
    ///
    /// # Errors
    /// If it cannot be opened.
    pub async fn head(&self) -> Result<Head, SkillError> {
        Ok(*self.library().await?.head().borrow())
    }

    /// What of the library each node has applied that has any of it.
    ///
    /// # Errors
    /// If it cannot be opened or read.
    pub async fn applied(&self) -> Result<HashMap<NodeId, u64>, SkillError> {
        Ok(self.library().await?.applied_by_all().await?)
    }

    /// The library's tree and content.
    async fn library(&self) -> Result<Arc<WorkspaceHub>, SyncError> {
        let library = self.content.workspace(WorkspaceId::LIBRARY).await?;
        let wanted = WorkspaceSettings {
            quota_bytes: None,
            keep_for: self.keep_for,
            keep_versions: KEEP_VERSIONS,
        };
        if library.settings().await? != wanted {
            library.set_settings(wanted).await?;
        }
        Ok(library)
    }
}

/// A path in the library for one in another tree: `to` in the place of `from`. `None` if that is too long or
/// too deep.
fn rebased(path: &WirePath, from: &WirePath, to: &WirePath) -> Option<WirePath> {
    let rest = path.as_bytes().strip_prefix(from.as_bytes())?;
    WirePath::new([to.as_bytes(), rest].concat()).ok()
}
