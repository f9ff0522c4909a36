//! The supervisor: keeps what each worker is and does, and runs it.

use std::any::Any;
use std::collections::BTreeMap;
use std::fmt;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use cortex_shared::backoff::Backoff;
use cortex_shared::clock::unix_ms;
use cortex_shared::tasks::TaskScope;
use cortex_shared::text::shorten;
use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

use crate::error_id;
use crate::events::{EventBus, Kind, NewEvent};

/// Delay after the first run that failed, and longest one: but never longer than the period.
const AFTER_FAILURE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(300));
/// Of a longer result the beginning is kept.
const MAX_RESULT_BYTES: usize = 1024;

/// What a worker is.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Its name, as operators know it.
    pub name: &'static str,
    /// What it is there for, in a line.
    pub purpose: &'static str,
    /// Time from the end of one run to the next.
    pub period: Duration,
    /// Least time between two runs that nobody asked for.
    pub spacing: Duration,
    /// When the first run is.
    pub first: Due,
}

/// When something runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Due {
    /// At once.
    Now,
    /// Once the period is over.
    AfterPeriod,
}

/// What a run has done.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// For people, in a line.
    pub summary: String,
    /// When to run again, if that is before the end of the period.
    pub again_after: Option<Duration>,
}

impl Report {
    /// So many things were done.
    #[must_use]
    pub fn counted(count: usize, what: &str) -> Self {
        Self { summary: format!("{count} {what}"), again_after: None }
    }
}

/// Why a run failed.
pub type RunError = Box<dyn std::error::Error + Send + Sync>;

/// Waits until there is a reason for a run. Dropped and asked for anew at any time.
pub type Trigger = Box<dyn Fn() -> BoxFuture<'static, ()> + Send + Sync>;

/// How a worker is now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// It waits for its next run.
    Waiting,
    /// It runs, since this time.
    Running {
        /// Milliseconds since the Unix epoch.
        since_ms: i64,
    },
    /// Its last run failed; it waits for the next.
    Failing,
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Waiting => "waiting",
            Self::Running { .. } => "running",
            Self::Failing => "failing",
        })
    }
}

/// A run that has ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LastRun {
    /// When it began, milliseconds since the Unix epoch.
    pub began_ms: i64,
    /// How long it took.
    pub took: Duration,
    /// What it did, or why it failed.
    pub result: String,
    /// Of a failure, where the log tells more.
    pub error_id: Option<String>,
}

/// What is known of a worker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkerStatus {
    /// Its name.
    pub name: &'static str,
    /// What it is there for.
    pub purpose: &'static str,
    /// Time from the end of one run to the next.
    pub period: Duration,
    /// How it is.
    pub state: State,
    /// Runs that have ended since the hub started.
    pub runs: u64,
    /// Those of them that failed, panics among them.
    pub failures: u64,
    /// Those that panicked.
    pub panics: u64,
    /// The last run that has ended.
    pub last: Option<LastRun>,
    /// When the next run is due, milliseconds since the Unix epoch; none while it runs.
    pub next_run_ms: Option<i64>,
}

/// No worker of that name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("there is no worker {name:?}")]
pub struct NoSuchWorker {
    /// What was asked for.
    pub name: String,
}

struct Worker {
    status: Mutex<WorkerStatus>,
    asked: Notify,
    /// How many runs were asked for.
    asks: watch::Sender<u64>,
    /// All that were asked for up to this one have been served.
    served: watch::Sender<u64>,
}

impl Worker {
    fn status(&self) -> MutexGuard<'_, WorkerStatus> {
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// See the module above. Its workers end with the scope they were started in.
pub struct Supervisor {
    workers: Mutex<BTreeMap<&'static str, Arc<Worker>>>,
    events: Arc<EventBus>,
    scope: TaskScope,
}

impl Supervisor {
    /// Without workers; they will run in this scope.
    #[must_use]
    pub fn new(events: Arc<EventBus>, scope: TaskScope) -> Arc<Self> {
        Arc::new(Self { workers: Mutex::default(), events, scope })
    }

    fn workers(&self) -> MutexGuard<'_, BTreeMap<&'static str, Arc<Worker>>> {
        self.workers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps a worker that runs by its period and when it is asked to. A second of the same name takes
    /// the place of the first in lists.
    pub fn keep<F>(&self, plan: Plan, work: impl Fn() -> F + Send + Sync + 'static)
    where
        F: Future<Output = Result<Report, RunError>> + Send + 'static,
    {
        self.keep_on(plan, Box::new(|| Box::pin(std::future::pending())), work);
    }

    /// The same for one that also runs when `trigger` ends.
    pub fn keep_on<F>(
        &self,
        plan: Plan,
        trigger: Trigger,
        work: impl Fn() -> F + Send + Sync + 'static,
    ) where
        F: Future<Output = Result<Report, RunError>> + Send + 'static,
    {
        let status = WorkerStatus {
            name: plan.name,
            purpose: plan.purpose,
            period: plan.period,
            state: State::Waiting,
            runs: 0,
            failures: 0,
            panics: 0,
            last: None,
            next_run_ms: None,
        };
        let worker = Arc::new(Worker {
            status: Mutex::new(status),
            asked: Notify::new(),
            asks: watch::Sender::new(0),
            served: watch::Sender::new(0),
        });
        self.workers().insert(plan.name, Arc::clone(&worker));
        let keeper = Keeper { plan, worker, trigger, events: Arc::clone(&self.events) };
        let stop = self.scope.token().clone();
        self.scope.spawn(plan.name, async move {
            stop.run_until_cancelled(keeper.keep(work)).await;
        });
    }

    /// How all of them are, by name.
    #[must_use]
    pub fn list(&self) -> Vec<WorkerStatus> {
        self.workers().values().map(|worker| worker.status().clone()).collect()
    }

    /// Runs a worker now, and waits until a run that began after this call has ended. Whoever stops
    /// waiting does not stop the run.
    ///
    /// # Errors
    /// See [`NoSuchWorker`]. That the run failed stands in the status.
    pub async fn run(&self, name: &str) -> Result<WorkerStatus, NoSuchWorker> {
        let worker = self.workers().get(name).cloned();
        let worker = worker.ok_or_else(|| NoSuchWorker { name: name.to_owned() })?;
        let mut number = 0;
        worker.asks.send_modify(|asks| {
            *asks += 1;
            number = *asks;
        });
        worker.asked.notify_one();
        let mut served = worker.served.subscribe();
        // The sender is in `worker`: it does not go away meanwhile.
        served.wait_for(|served| *served >= number).await.ok();
        let status = worker.status().clone();
        Ok(status)
    }
}

/// Runs one worker.
struct Keeper {
    plan: Plan,
    worker: Arc<Worker>,
    trigger: Trigger,
    events: Arc<EventBus>,
}

impl Keeper {
    async fn keep<F>(self, work: impl Fn() -> F)
    where
        F: Future<Output = Result<Report, RunError>> + Send + 'static,
    {
        let mut backoff = Backoff::new(AFTER_FAILURE.0, AFTER_FAILURE.1);
        let mut wait = match self.plan.first {
            Due::Now => Duration::ZERO,
            Due::AfterPeriod => self.plan.period,
        };
        loop {
            self.pause(wait).await;
            let asks = *self.worker.asks.borrow();
            wait = match self.run(&work).await {
                Ok(report) => {
                    backoff.reset();
                    report.again_after.map_or(self.plan.period, |soon| soon.min(self.plan.period))
                }
                Err(()) => backoff.next_delay().min(self.plan.period),
            };
            self.worker.served.send_replace(asks);
        }
    }

    /// Waits for the next run.
    async fn pause(&self, wait: Duration) {
        let next = unix_ms().saturating_add(i64::try_from(wait.as_millis()).unwrap_or(i64::MAX));
        self.worker.status().next_run_ms = Some(next);
        let asked = async {
            loop {
                if *self.worker.asks.borrow() > *self.worker.served.borrow() {
                    return;
                }
                self.worker.asked.notified().await;
            }
        };
        let triggered = async {
            tokio::time::sleep(self.plan.spacing.min(wait)).await;
            (self.trigger)().await;
        };
        tokio::select! {
            () = asked => {}
            () = tokio::time::sleep(wait) => {}
            () = triggered => {}
        }
    }

    async fn run<F>(&self, work: &impl Fn() -> F) -> Result<Report, ()>
    where
        F: Future<Output = Result<Report, RunError>> + Send + 'static,
    {
        let (began_ms, began) = (unix_ms(), Instant::now());
        {
            let mut status = self.worker.status();
            status.state = State::Running { since_ms: began_ms };
            status.next_run_ms = None;
        }
        // A panic has nothing to leave half done: what a worker works on is behind the store's
        // transactions and locks that survive poisoning.
        let run = async { work().await };
        let outcome = AssertUnwindSafe(run).catch_unwind().await;
        let took = began.elapsed();
        let panicked = outcome.is_err();
        let outcome = outcome.unwrap_or_else(|panic| Err(words_of(&*panic).into()));
        let (result, error_id) = match &outcome {
            Ok(report) => (report.summary.clone(), None),
            Err(error) => {
                let error: &(dyn std::error::Error + 'static) = &**error;
                let what = if panicked { "a worker panicked" } else { "a worker failed" };
                let id = error_id::report_of(what, &[("worker", self.plan.name)], error);
                (error_id::chain(error), Some(id))
            }
        };
        let was_failing = self.note(began_ms, took, result, error_id, panicked);
        match (was_failing, outcome) {
            (true, Ok(report)) => {
                tracing::info!(worker = self.plan.name, "a worker is well again");
                self.tell(Kind::WorkerRecovered);
                Ok(report)
            }
            (false, Ok(report)) => Ok(report),
            (was_failing, Err(_)) => {
                if !was_failing {
                    self.tell(Kind::WorkerFailed);
                }
                Err(())
            }
        }
    }

    /// Notes a run that has ended; whether the one before it failed.
    fn note(
        &self,
        began_ms: i64,
        took: Duration,
        mut result: String,
        error_id: Option<String>,
        panicked: bool,
    ) -> bool {
        shorten(&mut result, MAX_RESULT_BYTES);
        let mut status = self.worker.status();
        let was_failing = status.last.as_ref().is_some_and(|last| last.error_id.is_some());
        status.runs += 1;
        status.failures += u64::from(error_id.is_some());
        status.panics += u64::from(panicked);
        status.state = if error_id.is_some() { State::Failing } else { State::Waiting };
        status.last = Some(LastRun { began_ms, took, result, error_id });
        was_failing
    }

    fn tell(&self, kind: Kind) {
        let about = NewEvent::of_mesh().with("worker", self.plan.name);
        let last = self.worker.status().last.clone();
        let about = match last {
            Some(LastRun { error_id: Some(id), .. }) => about.with("error_id", id),
            _ => about,
        };
        self.events.publish(kind, about);
    }
}

/// What a panic said.
fn words_of(panic: &(dyn Any + Send)) -> String {
    let words = panic.downcast_ref::<&str>().map(|words| (*words).to_owned());
    let words = words.or_else(|| panic.downcast_ref::<String>().cloned());
    format!("panicked: {}", words.unwrap_or_else(|| "without words".to_owned()))
}

#[cfg(test)]
mod tests;
