//! What operators do to a workspace: looking back, bringing something back, settling conflicts.
//!
//! The hub merges nothing: each of these is a commit like a member's, by compare-and-set against what
//! stands there, so that nobody's newer change is overwritten unseen. What a restoration replaces becomes
//! an old version in turn.

use cortex_shared::ids::CommitId;
use cortex_shared::wire_path::WirePath;

use super::SyncError;
use super::workspace::WorkspaceHub;
use crate::store::workspace::{
    Author, Commit, Conflict, KnownRules, LogFilter, LogPage, Op, RejectReason, Usage,
    WorkspaceSettings,
};

/// Operations of one commit.
const OPS: usize = 5000;
/// How often a commit that met another epoch is made again.
const ATTEMPTS: u32 = 3;

/// Why a path was not brought back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotRestored {
    /// That version is no longer kept.
    Forgotten,
    /// It changed just now.
    Changed,
    /// A directory with something in it stands there, or a file where a directory would have to be.
    InTheWay,
    /// Its content was lost with a damaged disk.
    ContentLost,
}

/// What was brought back.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Restored {
    /// The version whose state it is.
    pub version: u64,
    /// Paths that were brought back.
    pub restored: u64,
    /// Those that were not.
    pub skipped: Vec<(WirePath, NotRestored)>,
}

/// Which side of a conflict stays.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// The version that kept the name; the copy goes.
    Theirs,
    /// The copy, which takes the name.
    Mine,
    /// Both, as two files.
    Both,
}

/// What is said of a conflict that was not settled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unsettled {
    /// There is none at this path.
    None,
    /// There are several copies, and one has to be named.
    Several(Vec<WirePath>),
    /// Something changed meanwhile, or stands in the way.
    Refused(WirePath, NotRestored),
}

impl WorkspaceHub {
    /// Changes of the past, newest first.
    ///
    /// # Errors
    /// Those of the store.
    pub async fn log(&self, filter: LogFilter) -> Result<LogPage, SyncError> {
        Ok(self.store.log(filter).await?)
    }

    /// What is stored, and how far back.
    ///
    /// # Errors
    /// Those of the store.
    pub async fn usage(&self) -> Result<Usage, SyncError> {
        Ok(self.store.usage().await?)
    }

    /// How much of the past is kept, and how much may be stored.
    ///
    /// # Errors
    /// Those of the store.
    pub async fn settings(&self) -> Result<WorkspaceSettings, SyncError> {
        Ok(self.store.settings().await?)
    }

    /// Changes that, durably. What is to be kept no longer goes with the next collection, which is
    /// asked for.
    ///
    /// # Errors
    /// Those of the store.
    pub async fn set_settings(&self, settings: WorkspaceSettings) -> Result<(), SyncError> {
        self.store.set_settings(settings).await?;
        self.set_quota(settings.quota_bytes);
        self.pressure.keep_less();
        Ok(())
    }

    /// Brings a path and everything below it back to what it was at a version, as an operator; see
    /// [`crate::store::workspace::WorkspaceStore::restore_plan`].
    ///
    /// # Errors
    /// Those of the store. What was brought back by then stays.
    pub async fn restore(
        &self,
        path: Option<WirePath>,
        version: Option<u64>,
        operator: &str,
    ) -> Result<Restored, SyncError> {
        let plan = self.store.restore_plan(path, version).await?;
        let mut restored = Restored { version: plan.version, ..Restored::default() };
        restored
            .skipped
            .extend(plan.forgotten.into_iter().map(|path| (path, NotRestored::Forgotten)));
        for ops in plan.ops.chunks(OPS) {
            let refused = self.commit_as(operator, ops.to_vec()).await?;
            restored.restored += (ops.len() - refused.len()) as u64;
            restored.skipped.extend(refused);
        }
        Ok(restored)
    }

    /// Settles the conflict of a path, or the one of a copy, as an operator. Returns the copies that are
    /// settled.
    ///
    /// # Errors
    /// Those of the store.
    pub async fn resolve(
        &self,
        path: &WirePath,
        keep: Keep,
        operator: &str,
    ) -> Result<Result<Vec<WirePath>, Unsettled>, SyncError> {
        let of_path = |conflict: &Conflict| conflict.path == *path || conflict.copy == *path;
        let conflicts: Vec<Conflict> =
            self.store.conflicts().await?.into_iter().filter(of_path).collect();
        let copies: Vec<WirePath> = conflicts.iter().map(|c| c.copy.clone()).collect();
        match (keep, conflicts.as_slice()) {
            (_, []) => return Ok(Err(Unsettled::None)),
            (Keep::Both, _) => self.store.forget_conflicts(copies.clone()).await?,
            (Keep::Mine, [_, _, ..]) => return Ok(Err(Unsettled::Several(copies))),
            (Keep::Mine | Keep::Theirs, conflicts) => {
                let mut ops = Vec::new();
                for conflict in conflicts {
                    let Some(copy) = self.store.entry(conflict.copy.clone()).await? else {
                        continue;
                    };
                    let goes = Some(copy.identity());
                    if keep == Keep::Mine {
                        let stands = self.store.entry(conflict.path.clone()).await?;
                        ops.push(Op {
                            path: conflict.path.clone(),
                            expected: stands.map(|entry| entry.identity()),
                            new: Some(copy),
                            conflict_of: None,
                        });
                    }
                    ops.push(Op {
                        path: conflict.copy.clone(),
                        expected: goes,
                        new: None,
                        conflict_of: None,
                    });
                }
                // The copy goes only once its content has the name: the other way round, a refusal in
                // between would leave it nowhere.
                for op in ops {
                    if let Some((path, why)) = self.commit_as(operator, vec![op]).await?.pop() {
                        return Ok(Err(Unsettled::Refused(path, why)));
                    }
                }
                self.store.forget_conflicts(copies.clone()).await?;
            }
        }
        Ok(Ok(copies))
    }

    /// Commits as an operator; returns what was refused.
    async fn commit_as(
        &self,
        operator: &str,
        ops: Vec<Op>,
    ) -> Result<Vec<(WirePath, NotRestored)>, SyncError> {
        let mut attempts = 0;
        let result = loop {
            let commit = Commit {
                rules: KnownRules::Unsaid,
                id: CommitId::new(),
                author: Author::Operator(operator.to_owned()),
                epoch: self.head().borrow().epoch,
                ops: ops.iter().cloned().map(Ok).collect(),
            };
            attempts += 1;
            match self.commit(commit).await {
                Err(error) if error.is_wrong_epoch() && attempts < ATTEMPTS => {}
                result => break result?,
            }
        };
        let refused = result.rejected.into_iter().filter_map(|rejection| {
            let op = ops.get(rejection.index as usize)?;
            let why = match rejection.reason {
                // Deletions of operators are not held: they are somebody's word themselves.
                RejectReason::Conflict
                | RejectReason::Invalid
                | RejectReason::Held
                | RejectReason::Rules => NotRestored::Changed,
                RejectReason::NoParent | RejectReason::NotEmpty => NotRestored::InTheWay,
                RejectReason::MissingChunks => NotRestored::ContentLost,
            };
            Some((op.path.clone(), why))
        });
        Ok(refused.collect())
    }
}
