//! Carrying out the changes to the tree here: fetching what is not here yet, then applying.
//!
//! The changes of a plan are worked through in groups, in order. Each group is fetched and put together in
//! the stage while the one before it is applied; a pack that arrives serves later groups as well.
//! Large files are fetched by the lane (`lane`), and applied once they have arrived.

use std::collections::HashSet;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use cortex_shared::crash::crash_point;
use cortex_shared::entry::{Digest, Entry, same};
use cortex_shared::ids::WorkspaceId;
use cortex_shared::pack::InvalidPack;
use cortex_shared::wire_path::WirePath;
use futures_util::StreamExt as _;
use futures_util::future::join;
use futures_util::stream::FuturesUnordered;
use tokio_util::sync::CancellationToken;

use super::Session;
use super::lane::LARGE_BYTES;
use super::large::{Large, lock};
use super::stage::{Finished, Stage, StageError, take_pack};
use crate::sync::apply::{Applier, Staged, needs_stage};
use crate::sync::core::{CoreCell, SyncError, waiting};
use crate::sync::ground::Blocking;
use crate::sync::hub::{Fetched, Hub, MAX_HASHES};
use crate::sync::index::{Index, IndexError, IndexRow};
use crate::sync::occupancy::Occupancy;
use crate::sync::plan::LocalChange;
use crate::sync::problem::{Code, Finding};
use crate::sync::scan::Scope;
use crate::sync::status::Progress;

/// Content of one group, unless a single file is larger.
const GROUP_BYTES: u64 = 64 * 1024 * 1024;
/// What stays free on the file system, so that an application there can go on.
const RESERVE_BYTES: u64 = 64 * 1024 * 1024;
/// Files with the same content that are looked at to see whether one of them stays.
const HOLDERS: u32 = 16;

/// Why a change is left.
const HELD: &str = "programs outside the sandbox obey this name, so it is not replaced while a strict \
                    command runs here; it follows when the last one has ended";

/// What came of a pull.
#[derive(Debug, Default)]
pub(in crate::sync) struct Pulled {
    /// Changes that were made.
    pub(in crate::sync) applied: usize,
    /// Files that went to the trash.
    pub(in crate::sync) displaced: usize,
    /// Directories that stay here though they are gone at the hub.
    pub(in crate::sync) kept: usize,
    pub(in crate::sync) dirty: Vec<Scope>,
    pub(in crate::sync) findings: Vec<Finding>,
    /// Large files that are left to the lane.
    pub(in crate::sync) waiting: Vec<WirePath>,
    /// Something is left until no command runs here.
    pub(in crate::sync) occupied: bool,
    /// It ended early because something more urgent came up.
    pub(in crate::sync) interrupted: bool,
}

/// Makes changes, in order. Between groups, `urgent` may ask for an early end. Large files whose
/// content is not here are left to the lane: those that came with it are in `large`, those it is to
/// fetch next are put there.
///
/// What was done before a failure is in `pulled` as well.
pub(in crate::sync) async fn pull<H: Hub>(
    session: &mut Session<'_, H>,
    changes: Vec<LocalChange>,
    large: &Arc<Mutex<Large>>,
    urgent: impl Fn() -> bool,
    pulled: &mut Pulled,
) -> Result<(), SyncError> {
    let groups = groups(&changes, session.batches.group_changes);
    let changes = Arc::new(changes);
    let stage = {
        let changes = changes.clone();
        session
            .core
            .run(move |core| {
                Ok::<_, SyncError>(Stage::new(
                    core.private.clone(),
                    &changes,
                    needs_stage,
                    core.owner,
                ))
            })
            .await?
    };
    let stage = Arc::new(Mutex::new(stage));
    let plan = Plan { stage: stage.clone(), changes, large: large.clone() };
    let result = pull_groups(session, &plan, groups, urgent, pulled).await;
    pulled.interrupted |= result.is_err();
    session
        .core
        .run(move |_| {
            lock(&stage).clean();
            Ok::<_, SyncError>(())
        })
        .await?;
    result
}

/// What is worked through, group by group.
#[derive(Clone)]
struct Plan {
    stage: Arc<Mutex<Stage>>,
    changes: Arc<Vec<LocalChange>>,
    large: Arc<Mutex<Large>>,
}

/// While one group takes its place, the next one is fetched.
async fn pull_groups<H: Hub>(
    session: &mut Session<'_, H>,
    plan: &Plan,
    groups: Vec<Range<usize>>,
    urgent: impl Fn() -> bool,
    pulled: &mut Pulled,
) -> Result<(), SyncError> {
    let mut groups = groups.into_iter();
    let Some(first) = groups.next() else { return Ok(()) };
    let mut begun = begin(session.core, session.cancel, plan, first).await?;
    let (blocking, cancel) = (session.core.blocking(), session.cancel.clone());
    let Session { hub, workspace, core, progress, occupancy, .. } = session;
    let fetch = async |begun: &Begun, cancel: &CancellationToken| {
        fetch(*hub, *workspace, blocking, cancel, progress, &plan.stage, &begun.needed).await
    };
    let mut fetched = fetch(&begun, &cancel).await;
    loop {
        pulled.findings.append(&mut begun.findings);
        pulled.waiting.append(&mut begun.waiting);
        if let Err(SyncError::Cancelled) = fetched {
            return fetched;
        }
        let ends = urgent();
        let next = match groups.next() {
            Some(group) if fetched.is_ok() && !ends => {
                Some(begin(core, &cancel, plan, group).await)
            }
            _ => None,
        };
        let no_longer = cancel.child_token();
        let ahead = async {
            match &next {
                Some(Ok(next)) => fetch(next, &no_longer).await,
                _ => Ok(()),
            }
        };
        let apply = async {
            let applied =
                apply(core, occupancy, &cancel, plan, begun, fetched.is_err(), pulled).await;
            let ends_early = ends || applied.is_err() || urgent();
            if ends_early {
                no_longer.cancel();
            }
            applied.map(|count| (count, ends_early))
        };
        let (applied, fetched_ahead) = join(apply, ahead).await;
        let (count, ends_early) = applied?;
        progress.applied(count);
        // What has arrived before the line broke has been made use of: a line that breaks all the time
        // gets to its end that way.
        fetched?;
        if ends_early {
            pulled.interrupted = true;
            return Ok(());
        }
        let Some(next) = next else { return Ok(()) };
        (begun, fetched) = (next?, fetched_ahead);
    }
}

/// Puts what has arrived for a group into its place; how many changes were made.
async fn apply(
    core: &mut CoreCell,
    occupancy: &Occupancy,
    cancel: &CancellationToken,
    plan: &Plan,
    begun: Begun,
    // Then nothing is taken away for what is not here yet.
    broken: bool,
    pulled: &mut Pulled,
) -> Result<usize, SyncError> {
    let Plan { stage, changes, large } = plan.clone();
    let (cancel, occupancy) = (cancel.clone(), occupancy.clone());
    let Begun { group, skipped, ready, .. } = begun;
    let (report, occupied) = core
        .run(move |core| {
            let mut stage = lock(&stage);
            let mut batch = Vec::with_capacity(group.len());
            let mut findings = Vec::new();
            let concerned = group.clone().any(|number| Occupancy::concerns(&changes[number].path));
            // Held until all of the batch is in its place.
            let replacing = if concerned { occupancy.replace() } else { None };
            let mut occupied = false;
            for number in group.filter(|number| !skipped.contains(number)) {
                if cancel.is_cancelled() {
                    return Err(SyncError::Cancelled);
                }
                let change = changes[number].clone();
                let is_here = ready.contains(&number) || !stage.is_waiting(number);
                if broken && (change.to.is_none() || !is_here) {
                    continue;
                }
                if replacing.is_none() && Occupancy::concerns(&change.path) {
                    occupied = true;
                    findings.push(Finding::at(&change.path, Code::CommandRuns, HELD));
                    // What the lane brought is of no use then; the stage removes the rest itself.
                    if ready.contains(&number)
                        && let Some(name) = lock(&large).take(&change)
                    {
                        core.private.stage().remove_file(&name).ok();
                    }
                    continue;
                }
                if !needs_stage(&change) {
                    batch.push(Staged::new(change, None));
                } else if ready.contains(&number) {
                    // Not before: a group that is begun may not get that far.
                    let name = lock(&large).take(&change);
                    batch.extend(name.map(|name| Staged::new(change, Some(name))));
                } else {
                    match stage.take_finished(number, &change, &cancel) {
                        Ok(Finished { name, print }) => {
                            batch.push(Staged { change, stage_name: Some(name), print });
                        }
                        Err(finding) => findings.push(finding),
                    }
                }
            }
            drop(stage);
            if cancel.is_cancelled() {
                return Err(SyncError::Cancelled);
            }
            let applier = Applier {
                root: &core.root,
                private: &core.private,
                index: &mut core.index,
                owner: core.owner,
            };
            let mut report = applier.apply(batch)?;
            report.findings.extend(findings);
            Ok((report, occupied))
        })
        .await?;
    pulled.occupied |= occupied;
    pulled.applied += report.applied;
    pulled.displaced += report.displaced;
    pulled.kept += report.kept;
    pulled.dirty.extend(report.scopes());
    pulled.findings.extend(report.findings);
    Ok(report.applied)
}

/// A group that has been begun.
#[derive(Default)]
struct Begun {
    group: Range<usize>,
    /// Chunks to be fetched, each once.
    needed: Vec<Digest>,
    /// Changes that cannot be made now.
    skipped: HashSet<usize>,
    /// Those whose files came by the lane.
    ready: HashSet<usize>,
    findings: Vec<Finding>,
    /// Those of the skipped that are left to the lane.
    waiting: Vec<WirePath>,
}

/// Begins the files of a group with what is here.
async fn begin(
    core: &mut CoreCell,
    cancel: &CancellationToken,
    plan: &Plan,
    group: Range<usize>,
) -> Result<Begun, SyncError> {
    crash_point("sync.apply.planned");
    let (Plan { stage, changes, large }, cancel) = (plan.clone(), cancel.clone());
    core.run(move |core| {
        let mut begun = Begun { group: group.clone(), ..Begun::default() };
        let mut asked = HashSet::new();
        let mut room = Room::new(core.root.top().file_system()?.free_bytes);
        let (mut stage, mut large) = (lock(&stage), lock(&large));
        for number in group {
            if cancel.is_cancelled() {
                return Err(SyncError::Cancelled);
            }
            let change = &changes[number];
            let bytes = size_of(change);
            let mut can_wait = true;
            if bytes > LARGE_BYTES {
                match large.arrived(change) {
                    Some(Ok(())) => {
                        begun.ready.insert(number);
                        continue;
                    }
                    Some(Err(finding)) => {
                        begun.findings.push(finding);
                        begun.skipped.insert(number);
                        continue;
                    }
                    None if large.has_room(bytes) => {}
                    // What can be copied here has to be copied before its source goes.
                    None if goes_from_here(&core.index, change)? => can_wait = false,
                    None => {
                        begun.skipped.insert(number);
                        begun.waiting.push(change.path.clone());
                        continue;
                    }
                }
            }
            if !room.take(bytes) {
                let text = format!(
                    "its {bytes} bytes do not fit: {} bytes are free, and {RESERVE_BYTES} stay so",
                    room.free
                );
                begun.findings.push(Finding::at(&change.path, Code::NoSpace, text));
                begun.skipped.insert(number);
                continue;
            }
            match stage.begin(number, change, core, can_wait, &cancel) {
                Ok(needed) if bytes > LARGE_BYTES && !needed.is_empty() => {
                    begun.skipped.insert(number);
                    begun.waiting.push(change.path.clone());
                    if large.has_room(bytes) {
                        large.add(&mut stage, number, change.clone());
                    }
                }
                Ok(needed) => {
                    begun.needed.extend(needed.into_iter().filter(|hash| asked.insert(*hash)));
                }
                Err(StageError::Io(error)) => {
                    begun.findings.push(Finding::at(&change.path, Code::StageFailed, error));
                    begun.skipped.insert(number);
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(begun)
    })
    .await
}

/// Room on the file system.
struct Room {
    free: u64,
}

impl Room {
    fn new(free: u64) -> Self {
        Self { free }
    }

    /// Takes room for a file; false if it does not fit, which is nothing to those that do.
    fn take(&mut self, bytes: u64) -> bool {
        let fits = bytes == 0 || self.free >= bytes.saturating_add(RESERVE_BYTES);
        if fits {
            self.free -= bytes;
        }
        fits
    }
}

/// Fetches chunks and puts them where they are wanted. None of the files is touched any more when this
/// returns.
pub(super) async fn fetch<H: Hub>(
    hub: &H,
    workspace: WorkspaceId,
    blocking: Blocking,
    cancel: &CancellationToken,
    progress: &Progress,
    stage: &Arc<Mutex<Stage>>,
    needed: &[Digest],
) -> Result<(), SyncError> {
    let unpack = |pack| {
        let stage = stage.clone();
        blocking.run(move || take_pack(&stage, pack))
    };
    let taken = |taken: Result<Result<u64, InvalidPack>, SyncError>| {
        match taken? {
            Ok(bytes) => progress.fetched(bytes),
            // Its chunks are as good as missing; the others are not.
            Err(error) => tracing::error!(%workspace, %error, "the hub sent a damaged pack"),
        }
        Ok(())
    };
    let mut unpacking = FuturesUnordered::new();
    let fetched = async {
        for part in needed.chunks(MAX_HASHES) {
            let mut packs = waiting(cancel, hub, hub.get_packs(workspace, part)).await?;
            loop {
                // While some are unpacked, the next one may come.
                let has_room = unpacking.len() < blocking.at_once();
                let pack = async { packs.next().await.transpose() };
                tokio::select! {
                    biased;
                    Some(unpacked) = unpacking.next() => taken(unpacked)?,
                    pack = waiting(cancel, hub, pack), if has_room => match pack? {
                        Some(Fetched::Pack(pack)) => unpacking.push(unpack(pack)),
                        // Files that need them are told when they turn out not to be whole.
                        Some(Fetched::Missing(_)) => {}
                        None => break,
                    },
                }
            }
        }
        Ok(())
    };
    let mut result: Result<(), SyncError> = fetched.await;
    while let Some(unpacked) = unpacking.next().await {
        result = result.and(taken(unpacked));
    }
    result
}

/// Whether the content of a change is here, but only in files that are about to go.
fn goes_from_here(index: &Index, change: &LocalChange) -> Result<bool, IndexError> {
    let Some(Entry::File(file)) = &change.to else { return Ok(false) };
    let holders = index.with_content(&file.content, HOLDERS)?;
    let stays = |row: &IndexRow| same(row.row.local.as_ref(), row.row.remote.as_ref());
    Ok(!holders.is_empty() && !holders.iter().any(stays))
}

fn size_of(change: &LocalChange) -> u64 {
    match &change.to {
        Some(Entry::File(file)) if needs_stage(change) => file.size,
        _ => 0,
    }
}

fn groups(changes: &[LocalChange], most: usize) -> Vec<Range<usize>> {
    let mut groups = Vec::new();
    let (mut start, mut bytes) = (0, 0);
    for (number, change) in changes.iter().enumerate() {
        let size = size_of(change);
        if number > start && (number - start == most || bytes + size > GROUP_BYTES) {
            groups.push(start..number);
            (start, bytes) = (number, 0);
        }
        bytes += size;
    }
    if start < changes.len() {
        groups.push(start..changes.len());
    }
    groups
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn t28_a_file_that_does_not_fit_leaves_the_others_their_room() {
        let mib = 1 << 20;
        let mut room = Room::new(RESERVE_BYTES + 10 * mib);
        let sizes = [4 * mib, 7 * mib, 0, u64::MAX, 6 * mib, 1];
        assert_eq!(sizes.map(|size| room.take(size)), [true, false, true, false, true, false]);
        let mut full = Room::new(RESERVE_BYTES / 2);
        assert!(full.take(0) && !full.take(1));
    }
}
