//! A sandbox made beforehand for the next command.
//!
//! Most of what a command's start costs does not depend on the command: a process, its namespaces
//! and its file system. So when a command runs, one such sandbox is made for the one that may
//! follow, and waits. It is used once. It is not used, but a fresh one made, if anything it was made
//! of is not what the command wants, if the mounts of the machine have changed since (it has a copy
//! of them), or if it has died.
//!
//! It does not wait for long: its copy of the mounts keeps a file system busy that is unmounted
//! outside, and an agent at rest should have nothing lying about. Owned by the launcher; gone with
//! the agent, whose end of its socket it watches.

use std::fs::File;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use cortex_shared::tasks::TaskScope;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use super::cgroup::ControlGroups;
use super::spec::Confinement;
use super::stage_handle::Stage;

/// How long one waits for a command.
const KEPT_FOR: Duration = Duration::from_secs(30);
/// From the start of a command to the making of the next sandbox, unless the command ends before: one
/// that ends at once is not to share the processors with it.
const MADE_AFTER: Duration = Duration::from_millis(20);
/// From the end of a command to the making of the next sandbox: its end is on its way to the hub and
/// the operator then, and whoever runs the next one at once is back in a few milliseconds.
const MADE_AFTER_END: Duration = Duration::from_millis(1);

/// The sandbox kept for the next command, if there is one.
#[derive(Debug, Default)]
pub(super) struct Spares {
    slot: Mutex<Slot>,
    tasks: TaskScope,
}

#[derive(Debug, Default)]
struct Slot {
    spare: Option<Spare>,
    /// One is being made.
    making: bool,
}

#[derive(Debug)]
struct Spare {
    stage: Stage,
    confinement: Confinement,
    mounts: MountTable,
    /// What its socket and process are registered with.
    runtime: tokio::runtime::Id,
    /// Ends the task that would end it for its age.
    _keeper: oneshot::Sender<()>,
}

impl Spares {
    /// Takes the spare sandbox if it is as `wanted`. Any other is ended.
    pub(super) fn take(&self, wanted: &Confinement) -> Option<Stage> {
        let spare = self.slot().spare.take()?;
        let fits = spare.confinement == *wanted
            && spare.runtime == tokio::runtime::Handle::current().id()
            && !spare.mounts.have_changed();
        if fits {
            return Some(spare.stage);
        }
        self.end(spare);
        None
    }

    /// Ends the spare sandbox, and waits until nothing is left of it. None is made afterwards.
    pub(super) async fn close(&self) {
        self.tasks.cancel();
        self.clear().await;
        self.tasks.finish().await;
    }

    async fn clear(&self) {
        let spare = self.slot().spare.take();
        if let Some(spare) = spare {
            spare.stage.end().await;
        }
    }

    fn end(&self, spare: Spare) {
        self.tasks.spawn("end of a spare sandbox", spare.stage.end());
    }

    fn slot(&self) -> std::sync::MutexGuard<'_, Slot> {
        self.slot.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How the next sandbox is to be made.
#[derive(Debug)]
pub(super) struct NextSpare {
    pub(super) spares: Weak<Spares>,
    pub(super) program: PathBuf,
    pub(super) groups: Arc<ControlGroups>,
    pub(super) confinement: Confinement,
}

impl NextSpare {
    /// Has it made soon, unless there is one: after a moment, or when `over` tells that the command
    /// is.
    pub(super) fn make(self, over: oneshot::Receiver<()>) {
        let Some(spares) = self.spares.upgrade() else { return };
        {
            let mut slot = spares.slot();
            if slot.making || slot.spare.is_some() || spares.tasks.token().is_cancelled() {
                return;
            }
            slot.making = true;
        }
        let making = Making(self.spares.clone());
        let stop = spares.tasks.token().clone();
        spares.tasks.spawn("spare sandbox", self.make_and_keep(making, over, stop));
    }

    async fn make_and_keep(
        self,
        making: Making,
        over: oneshot::Receiver<()>,
        stop: CancellationToken,
    ) {
        let over = async {
            over.await.ok();
            tokio::time::sleep(MADE_AFTER_END).await;
        };
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(MADE_AFTER) => {}
            () = over => {}
        }
        let (keeper, mut gone) = oneshot::channel();
        match self.start(keeper) {
            Ok(spare) => {
                let Some(spares) = self.spares.upgrade() else { return };
                spares.slot().spare = Some(spare);
            }
            Err(error) => {
                tracing::debug!(%error, "no sandbox was made beforehand");
                return;
            }
        }
        drop(making);
        tokio::select! {
            _ = &mut gone => return,
            () = stop.cancelled() => {}
            () = tokio::time::sleep(KEPT_FOR) => {}
        }
        // Another may have come in its place at this moment; its age matters as little.
        if let Some(spares) = self.spares.upgrade() {
            spares.clear().await;
        }
    }

    fn start(&self, keeper: oneshot::Sender<()>) -> std::io::Result<Spare> {
        // What is mounted from here on shows as a change.
        let mounts = MountTable::open()?;
        let group = self.groups.new_group()?.unwrap_or_default();
        let stage = Stage::start(&self.program, self.confinement.clone(), group)?;
        let runtime = tokio::runtime::Handle::current().id();
        let confinement = self.confinement.clone();
        Ok(Spare { stage, confinement, mounts, runtime, _keeper: keeper })
    }
}

/// Says, however its task ends, that none is being made any more.
#[derive(Debug)]
struct Making(Weak<Spares>);

impl Drop for Making {
    fn drop(&mut self) {
        if let Some(spares) = self.0.upgrade() {
            spares.slot().making = false;
        }
    }
}

/// Knows whether anything was mounted or unmounted since it was opened.
#[derive(Debug)]
struct MountTable {
    file: File,
}

impl MountTable {
    fn open() -> std::io::Result<Self> {
        Ok(Self { file: File::open("/proc/self/mountinfo")? })
    }

    fn have_changed(&self) -> bool {
        let mut ready = [PollFd::new(&self.file, PollFlags::PRI)];
        let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
        // What cannot be asked may have changed.
        poll(&mut ready, Some(&at_once)).map_or(true, |changed| changed > 0)
    }
}
