//! Large files on their way here: what the lane is to fetch next, and what it has brought.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use cortex_shared::backoff::Backoff;
use cortex_shared::entry::Entry;
use cortex_shared::ids::WorkspaceId;
use futures_util::future::join_all;
use tokio_util::sync::CancellationToken;

use super::lane::JOB_BYTES;
use super::pull::fetch;
use super::stage::{Stage, take_from_here};
use crate::sync::core::SyncError;
use crate::sync::ground::Blocking;
use crate::sync::hub::{Hub, HubError};
use crate::sync::plan::LocalChange;
use crate::sync::private_dir::PrivateDir;
use crate::sync::problem::Finding;
use crate::sync::status::Progress;

/// How often content is asked for without anything arriving, and the pauses in between.
const ATTEMPTS: u32 = 5;
const RETRY: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(5));

/// Locks what blocking threads share; whoever panicked has left nothing in it by halves that is not thrown away.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Files for one job of the lane.
pub(in crate::sync) struct Batch {
    stage: Stage,
    /// By number in the stage.
    changes: Vec<LocalChange>,
    bytes: u64,
}

impl Batch {
    /// Removes what has been begun. Blocking.
    pub(in crate::sync) fn clean(&self) {
        self.stage.clean();
    }
}

/// Files that a job of the lane has fetched, or could not.
pub(in crate::sync) struct Arrived {
    stage: Stage,
    files: Vec<(LocalChange, Option<Outcome>)>,
}

/// A name in the stage, or what is wrong.
type Outcome = Result<Vec<u8>, Finding>;

fn number_of(files: &[(LocalChange, Option<Outcome>)], change: &LocalChange) -> Option<usize> {
    files.iter().position(|(other, _)| other.path == change.path && other.to == change.to)
}

impl Arrived {
    /// Removes what nobody has taken. Blocking.
    pub(in crate::sync) fn clean(&self) {
        self.stage.clean();
    }
}

/// What the engine has to do with the lane in one pass.
pub(in crate::sync) struct Large {
    private: Arc<PrivateDir>,
    /// The lane works on something else.
    busy: bool,
    arrived: Option<Arrived>,
    next: Option<Batch>,
}

impl Large {
    pub(in crate::sync) fn new(
        private: Arc<PrivateDir>,
        busy: bool,
        arrived: Option<Arrived>,
    ) -> Self {
        Self { private, busy, arrived, next: None }
    }

    /// Whether the file of this change has arrived, or why it could not; `None` if it was not fetched.
    pub(super) fn arrived(&self, change: &LocalChange) -> Option<Result<(), Finding>> {
        let Arrived { files, .. } = self.arrived.as_ref()?;
        let number = number_of(files, change)?;
        let outcome = files[number].1.as_ref()?;
        Some(outcome.as_ref().map(drop).map_err(Finding::clone))
    }

    /// Takes the file of this change over, if it has arrived: its name in the stage.
    pub(super) fn take(&mut self, change: &LocalChange) -> Option<Vec<u8>> {
        let Arrived { stage, files } = self.arrived.as_mut()?;
        let number = number_of(files, change)?;
        let name = files[number].1.take_if(|outcome| outcome.is_ok())?.ok()?;
        stage.taken(number);
        Some(name)
    }

    /// Whether the next job can take a file of this size.
    pub(super) fn has_room(&self, bytes: u64) -> bool {
        let fits = |batch: &Batch| batch.bytes.saturating_add(bytes) <= JOB_BYTES;
        !self.busy && self.next.as_ref().is_none_or(fits)
    }

    /// Leaves a file that has been begun to the next job.
    pub(super) fn add(&mut self, stage: &mut Stage, number: usize, change: LocalChange) {
        let Some(Entry::File(file)) = &change.to else { return };
        let batch = self.next.get_or_insert_with(|| Batch {
            stage: Stage::empty(self.private.clone()),
            changes: Vec::new(),
            bytes: 0,
        });
        stage.move_to(number, file, &mut batch.stage);
        batch.bytes = batch.bytes.saturating_add(file.size);
        batch.changes.push(change);
    }

    /// The next job, and what is left of what has arrived.
    pub(in crate::sync) fn end(&mut self) -> (Option<Batch>, Option<Arrived>) {
        (self.next.take(), self.arrived.take())
    }
}

/// The job: takes the content from here as far as it is here, fetches the rest, and checks it.
pub(in crate::sync) async fn download<H: Hub>(
    hub: Arc<H>,
    workspace: WorkspaceId,
    blocking: Blocking,
    cancel: CancellationToken,
    progress: Arc<Progress>,
    batch: Batch,
) -> Result<Arrived, SyncError> {
    let Batch { stage, changes, .. } = batch;
    let stage = Arc::new(Mutex::new(stage));
    let (from, stop) = (stage.clone(), cancel.clone());
    let take = move || {
        let copies = take_from_here(&from, changes.iter().enumerate(), &stop);
        (copies, changes)
    };
    let (copies, changes) = blocking.run(take).await?;
    let copies = Arc::new(copies);
    let copying = (0..blocking.at_once()).map(|_| {
        let copies = copies.clone();
        blocking.run(move || copies.work())
    });
    join_all(copying).await.into_iter().collect::<Result<(), _>>()?;
    drop(copies);
    let mut pauses = Backoff::new(RETRY.0, RETRY.1);
    let (mut missing, mut attempts) = (usize::MAX, 0);
    // A line that breaks costs what was on its way, not what has arrived.
    let fetched = loop {
        let needed = lock(&stage).needed();
        if needed.len() < missing {
            (missing, attempts) = (needed.len(), 0);
            pauses.reset();
        }
        attempts += 1;
        match fetch(&*hub, workspace, blocking, &cancel, &progress, &stage, &needed).await {
            Err(SyncError::Hub(HubError::Unavailable { .. })) if attempts < ATTEMPTS => {
                let pause = tokio::time::sleep(pauses.next_delay_of(1.0));
                if cancel.run_until_cancelled(pause).await.is_none() {
                    break Err(SyncError::Cancelled);
                }
            }
            result => break result,
        }
    };
    let finish = move || {
        let Ok(stage) = Arc::try_unwrap(stage) else { return Err(SyncError::Panicked) };
        let mut stage = stage.into_inner().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = fetched {
            stage.clean();
            return Err(error);
        }
        let files = changes
            .into_iter()
            .enumerate()
            .map(|(number, change)| {
                let finished = stage.finished(number, &change, &cancel).map(|file| file.name);
                (change, Some(finished))
            })
            .collect();
        Ok(Arrived { stage, files })
    };
    blocking.run(finish).await?
}
