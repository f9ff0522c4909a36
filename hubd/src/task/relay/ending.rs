//! How a task gets its verdict: out of the table, into the journal, then to its reader and its node.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use cortex_proto::v1::{TaskAck, TaskExit, TaskVerdict, hub_frame};
use cortex_shared::clock::sleep_until;
use cortex_shared::crash::crash_point;
use cortex_shared::ids::{NodeId, TaskId};
use cortex_shared::tasks::TaskScope;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::task::task_tracker::TaskTrackerToken;

use super::{Relay, Task, about, ended};
use crate::counters;
use crate::events::{EventBus, Kind};
use crate::node::registry::SessionHandle;
use crate::store::{LateReport, Store};
use crate::task::to_reader::End;
use crate::task::verdict::{journal_entry, tidy};

/// Late reports of nodes that may wait for the journal. What does not fit is repeated by its node.
pub(super) const LATE_REPORTS: usize = 256;

/// How long after a report came before its verdict it is looked at again, and how often: a verdict is in the
/// journal within seconds, or its disk fails. What is still too early then, the node repeats in its next
/// session.
const LATE_AGAIN: Duration = Duration::from_secs(1);
const LATE_TRIES: u32 = 5;

/// How long a verdict waits for the output before it to be in the spool. A disk that takes longer delays
/// no verdict; only who comes back after a crash in this very moment may then lack something.
const SPOOL_PATIENCE: Duration = Duration::from_secs(2);

/// What is known of a command at its verdict.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Known {
    /// Its node says how it ended.
    Ended,
    PerhapsBegun,
    /// It was not begun, and cannot be any more: asking again with the same key is not asking twice.
    NeverBegun,
}

/// A node's word on a task that may have its verdict already.
pub(super) struct Report {
    task: TaskId,
    session: SessionHandle,
    exit: TaskExit,
    tries: u32,
}

/// A task that is out of the table, and whose verdict is not yet where its reader takes it.
pub(super) struct Ending {
    task: Arc<Task>,
    _counted: TaskTrackerToken,
}

impl Relay {
    pub(super) fn fail(&self, id: TaskId, verdict: TaskVerdict, reason: &str) {
        self.fail_as(id, verdict, reason, Known::PerhapsBegun);
    }

    /// The same for one that its node cannot begin any more, and has not begun.
    pub(super) fn fail_unbegun(&self, id: TaskId, verdict: TaskVerdict, reason: &str) {
        self.fail_as(id, verdict, reason, Known::NeverBegun);
    }

    fn fail_as(&self, id: TaskId, verdict: TaskVerdict, reason: &str, known: Known) {
        if let Some(ending) = self.take(id, |_| true) {
            // What came is known, though nobody says whether it is all.
            let [stdout_bytes, stderr_bytes] = ending.task.to_reader.received();
            let exit = TaskExit {
                verdict: verdict.into(),
                reason: reason.to_owned(),
                stdout_bytes,
                stderr_bytes,
                ..TaskExit::default()
            };
            self.conclude(ending, exit, known);
        }
    }

    /// Gives a task the verdict its node reports; whether it had none.
    pub fn finish(&self, id: TaskId, node: NodeId, exit: TaskExit) -> bool {
        let ending = self.take(id, |task| task.record.node == node);
        ending.map(|ending| self.conclude(ending, exit, Known::Ended)).is_some()
    }

    /// A node reports how a task ended, whose stream may be gone and which may have its verdict already.
    pub fn outcome(&self, id: TaskId, session: &SessionHandle, exit: TaskExit) {
        if !self.finish(id, session.node, exit.clone()) {
            // Full: the node repeats what is not acknowledged.
            self.late
                .try_send(Report { task: id, session: session.clone(), exit, tries: LATE_TRIES })
                .ok();
        }
    }

    fn take(&self, id: TaskId, wanted: impl FnOnce(&Task) -> bool) -> Option<Ending> {
        let mut tasks = self.lock();
        if !wanted(&tasks.get(&id)?.task) {
            return None;
        }
        // While the table is held: it is in one place or the other for whoever counts.
        let ending = self.ending_of(tasks.remove(&id)?.task);
        self.unwanted.concluded(&ending.task);
        Some(ending)
    }

    pub(super) fn ending_of(&self, task: Arc<Task>) -> Ending {
        Ending { task, _counted: self.ending.token() }
    }

    /// Journals the verdict, and only then tells the reader; and the node, if it is the node's word. After a
    /// verdict of the hub's own the node keeps what it knows, until it has reported that, too.
    pub(super) fn conclude(&self, ending: Ending, mut exit: TaskExit, known: Known) {
        let task = Arc::clone(&ending.task);
        tidy(&mut exit);
        task.ended.cancel();
        task.to_node.close();
        let mut end = journal_entry(&exit, task.started_at_ms());
        end.never_begun = known == Known::NeverBegun;
        end.cancel_wanted = task.is_cancelled() && !end.is_nodes_word();
        let unwanted = Arc::clone(&self.unwanted);
        let (store, spool) = (Arc::clone(&self.store), Arc::clone(&self.spool));
        let (unrecorded, events) = (Arc::clone(&self.unrecorded), Arc::clone(&self.events));
        self.scope.spawn("task verdict", async move {
            // A reader that comes back finds the rest of the output there.
            if exit.stdout_bytes + exit.stderr_bytes > 0 {
                tokio::time::timeout(SPOOL_PATIENCE, spool.flush(task.id())).await.ok();
            }
            counters::TASKS_ENDED[end.verdict.state() as usize].add(1);
            crash_point("task.ending");
            let to_tell = || task.session().filter(|_| known == Known::Ended);
            let end = match store.end_task(task.id(), end.clone()).await {
                Ok(()) => {
                    crash_point("task.ended");
                    events.publish(Kind::TaskEnded, ended(about(&task.record), &end));
                    unwanted.journalled(task.id());
                    if let Some(session) = to_tell() {
                        acknowledge(&session, task.id());
                    }
                    End::Exit(exit)
                }
                Err(error) => {
                    tracing::error!(task = %task.id(), %error, "verdict not journalled");
                    unrecorded.keep(task.id(), to_tell(), end);
                    End::NotRecorded
                }
            };
            task.to_reader.end(end);
            drop(ending);
            spool.end(task.id());
        });
    }
}

/// The node need not keep the task's end any longer. One that is gone hears it in its next session.
pub(in crate::task) fn acknowledge(session: &SessionHandle, id: TaskId) {
    let task_id = id.as_bytes().to_vec().into();
    session.send(hub_frame::Frame::TaskAck(TaskAck { task_id })).ok();
}

/// Adds what nodes report late to the journal, one after the other.
pub(super) async fn record_late(
    store: Arc<dyn Store>,
    events: Arc<EventBus>,
    mut reports: mpsc::Receiver<Report>,
    scope: TaskScope,
) {
    // All wait equally long: the first is the next.
    let mut early: VecDeque<(Instant, Report)> = VecDeque::new();
    loop {
        let next = early.front().map(|(at, _)| *at);
        let report = tokio::select! {
            () = scope.token().cancelled() => return,
            report = reports.recv() => report,
            () = sleep_until(next) => early.pop_front().map(|(_, report)| report),
        };
        let Some(mut report) = report else { return };
        tidy(&mut report.exit);
        if record(&store, &events, &report).await == Some(LateReport::TooEarly) {
            report.tries -= 1;
            if report.tries > 0 && early.len() < LATE_REPORTS {
                early.push_back((Instant::now() + LATE_AGAIN, report));
            }
        }
    }
}

async fn record(store: &Arc<dyn Store>, events: &EventBus, report: &Report) -> Option<LateReport> {
    let Report { task, session, exit, .. } = report;
    let outcome = journal_entry(exit, None);
    let known = match store.add_late_outcome(*task, session.node, outcome.clone()).await {
        Ok(known) => known,
        Err(error) => {
            tracing::warn!(%task, %error, "a late outcome was not journalled");
            return None;
        }
    };
    match known {
        // The journal is about to have the verdict. If that is the node's word, whoever journals it
        // acknowledges it, too, though perhaps to an earlier session; if it is the hub's own, nobody does.
        LateReport::TooEarly => {
            tracing::debug!(%task, node = %session.node, "reported before its verdict is journalled");
            return Some(known);
        }
        LateReport::Added => {
            if let Ok(Some(record)) = store.task(*task).await {
                events.publish(Kind::TaskLateOutcome, ended(about(&record), &outcome));
            }
            tracing::info!(%task, node = %session.node, "a lost task's end became known");
        }
        LateReport::Known => {}
    }
    acknowledge(session, *task);
    Some(known)
}
