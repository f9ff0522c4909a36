//! `bench nodes|exec|fanout|flood|reconnect`: a hub in a process of its own under the load of emulated nodes.
//!
//! Hub and nodes share the machine, so every time is longer than with nodes elsewhere; the memory is the
//! hub's alone.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use cortex_proto::v1;
use cortex_proto::v1::operator_client::OperatorClient;
use cortex_shared::tasks::TaskScope;
use serde_json::{Value, json};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::transport::Channel;

use super::commander::{Reading, run};
use super::crowd::Crowd;
use super::executor::FLOOD;
use super::fanout::fanout;
use super::process::HubProcess;
use super::statistics::{Times, millis};
use super::{BenchError, descriptors_for};

/// A command that the emulated nodes end at once.
pub(super) const TRUE: &str = "true";
/// Commands of an open loop that may be under way: the hub takes this many streams on a connection.
pub(super) const UNDER_WAY: usize = 4000;
/// How often memory is looked at, and an operator asks something, while something else goes on.
const LOOK: Duration = Duration::from_millis(20);
/// How long an operator waits before it takes its call for failed.
const CALL_TIMEOUT: Duration = Duration::from_secs(30);
const MIB: f64 = 1024.0 * 1024.0;

/// What is to be done. Each with a hub and nodes of its own.
#[derive(Clone, Copy, Debug)]
pub enum Load {
    /// So many nodes connect and stay.
    Nodes {
        /// How many.
        count: u32,
        /// How long they stay.
        hold: Duration,
    },
    /// Commands in an open loop: each at its time, whatever became of those before.
    Exec {
        /// Nodes that take turns.
        count: u32,
        /// Commands a second.
        rate: u32,
        /// For how long.
        duration: Duration,
    },
    /// One command on all nodes at once.
    Fanout {
        /// Nodes.
        count: u32,
        /// How often.
        rounds: u32,
        /// Nodes beside them whose lines are dead in as many more rounds.
        black_holed: u32,
    },
    /// Commands that write without end, one of which nobody reads, and short ones beside them.
    Flood {
        /// Those that write.
        count: u32,
        /// For how long.
        duration: Duration,
    },
    /// The hub is killed and comes back.
    Reconnect {
        /// Nodes.
        count: u32,
    },
}

/// What came of it.
#[derive(Clone, Debug)]
pub struct LoadReport {
    pub(super) document: Value,
    pub(super) rows: Vec<(&'static str, String)>,
    pub(super) complete: bool,
}

impl LoadReport {
    /// As a document.
    #[must_use]
    pub fn document(&self) -> &Value {
        &self.document
    }

    /// As people read it.
    #[must_use]
    pub fn text(&self) -> String {
        let lines = self.rows.iter().map(|(name, value)| format!("{name:<14} {value}"));
        lines.collect::<Vec<_>>().join("\n")
    }

    /// Whether nothing was lost that should not be.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.complete
    }
}

pub(super) fn shown(times: &Times) -> String {
    let [p50, p99, max] = [50, 99, 100].map(|percent| {
        times.percentile(percent).map_or_else(|| "-".to_owned(), |t| format!("{:.1} ms", millis(t)))
    });
    format!("p50 {p50}, p99 {p99}, max {max} ({} measured)", times.len())
}

fn mib(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / MIB)
}

impl Load {
    /// How many nodes it connects.
    fn nodes(self) -> u32 {
        match self {
            Self::Nodes { count, .. } | Self::Exec { count, .. } | Self::Reconnect { count } => {
                count
            }
            Self::Fanout { count, black_holed, .. } => count + black_holed,
            // One for the flood that nobody reads, and one for the short commands.
            Self::Flood { count, .. } => count + 2,
        }
    }

    /// Runs it. Ends by itself.
    ///
    /// # Errors
    /// If nothing could be measured.
    pub async fn run(self) -> Result<LoadReport, BenchError> {
        descriptors_for(self.nodes())?;
        let mut hub = HubProcess::start().await?;
        let scope = TaskScope::new();
        let report = match self {
            Self::Nodes { count, hold } => nodes(&mut hub, &scope, count, hold).await,
            Self::Exec { count, rate, duration } => exec(&hub, &scope, count, rate, duration).await,
            Self::Fanout { count, rounds, black_holed } => {
                fanout(&hub, &scope, count, rounds, black_holed).await
            }
            Self::Flood { count, duration } => flood(&hub, &scope, count, duration).await,
            Self::Reconnect { count } => reconnect(&mut hub, &scope, count).await,
        };
        scope.cancel();
        scope.finish().await;
        hub.stop().await?;
        report
    }
}

async fn nodes(
    hub: &mut HubProcess,
    scope: &TaskScope,
    count: u32,
    hold: Duration,
) -> Result<LoadReport, BenchError> {
    // What the first node sets up is not each node's.
    let _first = Crowd::gather(hub, 1, scope).await?;
    let (before, begun) = (hub.resident_bytes(), Instant::now());
    let mut crowd = Crowd::gather(hub, count, scope).await?;
    let (connected, took) = (hub.resident_bytes(), begun.elapsed());
    tokio::time::sleep(hold).await;
    let (held, lost) = (hub.resident_bytes(), crowd.lost());
    // Who joins does so once: what that left behind is not there after the next start of the hub.
    hub.kill_and_restart().await?;
    crowd.all_back(lost).await;
    tokio::time::sleep(hold).await;
    let again = hub.resident_bytes();
    let each = |bytes: u64| bytes.saturating_sub(before) / u64::from(count);
    let memory =
        |bytes: u64| format!("{}: {:.1} KiB a node", mib(bytes), each(bytes) as f64 / 1024.0);
    Ok(LoadReport {
        document: json!({
            "bench": "nodes", "count": count, "joined_ms": millis(took), "held_ms": millis(hold),
            "hub_bytes_before": before, "hub_bytes_connected": connected, "hub_bytes_held": held,
            "hub_bytes_per_node": each(held), "sessions_lost": lost,
            "hub_bytes_after_restart": again,
            "hub_bytes_per_node_after_restart": each(again),
        }),
        rows: vec![
            ("nodes", format!("{count} joined and connected in {:.1} s", took.as_secs_f64())),
            ("held", format!("{} s, {lost} sessions lost", hold.as_secs_f64())),
            ("hub memory", format!("{} with one node, {} connected", mib(before), mib(connected))),
            ("after joining", memory(held)),
            ("restarted", memory(again)),
        ],
        complete: lost == 0,
    })
}

/// What commands that run beside each other came to.
#[derive(Default)]
pub(super) struct Tally {
    pub(super) times: Times,
    pub(super) failed: u64,
    pub(super) error: Option<String>,
}

impl Tally {
    pub(super) fn add(&mut self, ran: Result<Duration, BenchError>) {
        match ran {
            Ok(time) => self.times.add(time),
            Err(error) => {
                self.failed += 1;
                self.error.get_or_insert_with(|| error.to_string());
            }
        }
    }

    pub(super) fn rows(&self, rows: &mut Vec<(&'static str, String)>) {
        rows.push(("latency", shown(&self.times)));
        if let Some(error) = &self.error {
            rows.push(("failed", format!("{}, first: {error}", self.failed)));
        }
    }
}

async fn exec(
    hub: &HubProcess,
    scope: &TaskScope,
    count: u32,
    rate: u32,
    duration: Duration,
) -> Result<LoadReport, BenchError> {
    let crowd = Crowd::gather(hub, count, scope).await?;
    let operator = hub.operator().await?;
    let never = CancellationToken::new();
    // The first pays for what all share.
    run(operator.clone(), &crowd.names()[0], TRUE, Reading::All, &never).await?;
    let millis_long = u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    let offered = u64::from(rate).saturating_mul(millis_long) / 1000;
    let (done, mut results) = mpsc::channel(UNDER_WAY);
    let (names, begun): (Arc<[String]>, _) = (crowd.names().into(), Instant::now());
    let loading = scope.child();
    loading.spawn("open loop", {
        let loading = loading.clone();
        async move {
            for number in 0..offered {
                let due = begun + Duration::from_secs_f64(number as f64 / f64::from(rate));
                tokio::time::sleep_until(due).await;
                let Ok(place) = done.clone().reserve_owned().await else { return };
                let (names, operator) = (Arc::clone(&names), operator.clone());
                let never = CancellationToken::new();
                loading.spawn("emulated caller", async move {
                    let node = &names[usize::try_from(number).unwrap_or(0) % names.len()];
                    let ran = run(operator, node, TRUE, Reading::All, &never).await;
                    // From when it should have begun: a hub that is behind is not excused.
                    place.send(ran.map(|_| due.elapsed()));
                });
            }
        }
    });
    let mut tally = Tally::default();
    while let Some(ran) = results.recv().await {
        tally.add(ran);
    }
    let took = begun.elapsed();
    let reached = tally.times.len() as f64 / took.as_secs_f64();
    let mut rows = vec![
        ("nodes", count.to_string()),
        ("offered", format!("{rate} commands a second for {} s", duration.as_secs_f64())),
        ("carried out", format!("{} ({reached:.0} a second)", tally.times.len())),
    ];
    tally.rows(&mut rows);
    Ok(LoadReport {
        document: json!({
            "bench": "exec", "count": count, "rate": rate, "offered": offered,
            "completed": tally.times.len(), "failed": tally.failed, "first_error": tally.error,
            "took_ms": millis(took), "completed_per_second": reached,
            "latency": tally.times.summary(), "sessions_lost": crowd.lost(),
        }),
        rows,
        complete: tally.failed == 0 && crowd.lost() == 0,
    })
}

async fn flood(
    hub: &HubProcess,
    scope: &TaskScope,
    count: u32,
    duration: Duration,
) -> Result<LoadReport, BenchError> {
    let crowd = Crowd::gather(hub, count + 2, scope).await?;
    let operator = hub.operator().await?;
    let before = hub.resident_bytes();
    let (cancel, begun) = (CancellationToken::new(), Instant::now());
    let (done, mut results) = mpsc::channel(crowd.names().len());
    let (quiet, flooding) = crowd.names().split_first().ok_or(BenchError::SessionLost)?;
    for (number, name) in flooding.iter().enumerate() {
        let reading = if number == 0 { Reading::Nothing } else { Reading::All };
        let (name, cancel, done) = (name.clone(), cancel.clone(), done.clone());
        let operator = operator.clone();
        scope.spawn("emulated caller", async move {
            done.send(run(operator, &name, FLOOD, reading, &cancel).await).await.ok();
        });
    }
    drop(done);
    let (mut tally, mut peak) = (Tally::default(), before);
    while begun.elapsed() < duration {
        let never = CancellationToken::new();
        let ran = run(operator.clone(), quiet, TRUE, Reading::All, &never).await;
        tally.add(ran.map(|ran| ran.took));
        peak = peak.max(hub.resident_bytes());
        tokio::time::sleep(LOOK).await;
    }
    cancel.cancel();
    let (stopping, took) = (Instant::now(), begun.elapsed());
    let (mut bytes, mut failed) = (0, 0);
    while let Some(ran) = results.recv().await {
        match ran {
            Ok(ran) => bytes += ran.bytes,
            Err(error) => {
                failed += 1;
                tally.error.get_or_insert_with(|| error.to_string());
            }
        }
    }
    let (ended, rate) = (stopping.elapsed(), bytes as f64 / took.as_secs_f64() / 1e6);
    let mut rows = vec![
        ("floods", format!("{count}, and one that nobody reads; {failed} failed")),
        ("read", format!("{rate:.0} MB/s for {:.1} s", took.as_secs_f64())),
        ("ended", format!("{:.1} ms after their cancel", millis(ended))),
        ("hub memory", format!("{} before, {} at most", mib(before), mib(peak))),
    ];
    tally.rows(&mut rows);
    Ok(LoadReport {
        document: json!({
            "bench": "flood", "count": count, "duration_ms": millis(took), "bytes": bytes,
            "megabytes_per_second": rate, "ended_ms": millis(ended), "hub_bytes_before": before,
            "hub_bytes_peak": peak, "beside": tally.times.summary(),
            "failed": failed + tally.failed, "first_error": tally.error,
            "sessions_lost": crowd.lost(),
        }),
        rows,
        complete: failed + tally.failed == 0 && crowd.lost() == 0,
    })
}

async fn reconnect(
    hub: &mut HubProcess,
    scope: &TaskScope,
    count: u32,
) -> Result<LoadReport, BenchError> {
    let mut crowd = Crowd::gather(hub, count, scope).await?;
    let asking = Asking::begin(hub, crowd.names()[0].clone()).await?;
    let (lost, killed) = (crowd.lost(), Instant::now());
    hub.kill_and_restart().await?;
    let back = Instant::now();
    asking.go_on.cancel();
    let returns = crowd.all_back(lost).await;
    let (calls, failed) = asking.end().await?;
    let mut times = Times::default();
    returns.into_iter().for_each(|at| times.add(at.duration_since(back)));
    let down = back.duration_since(killed);
    let memory = hub.resident_bytes();
    let each = memory as f64 / 1024.0 / f64::from(count);
    Ok(LoadReport {
        document: json!({
            "bench": "reconnect", "count": count, "down_ms": millis(down),
            "returned": times.summary(), "operator_calls": calls.summary(),
            "operator_calls_failed": failed, "hub_bytes": memory,
        }),
        rows: vec![
            ("nodes", format!("{count}, {each:.1} KiB of the whole hub each")),
            ("hub", format!("killed, and listening again after {:.1} ms", millis(down))),
            ("all back", shown(&times)),
            ("operator", format!("{}, {failed} failed", shown(&calls))),
        ],
        complete: times.len() >= count as usize,
    })
}

/// An operator that asks for a node all the while, on a thread of its own: among the tasks of thousands of
/// nodes it would wait for them, and not for the hub.
struct Asking {
    /// To be cancelled when it is to begin.
    go_on: CancellationToken,
    stop: CancellationToken,
    result: JoinHandle<Result<(Times, u64), BenchError>>,
    /// The thread ends with this, wherever it is left.
    _guards: [DropGuard; 2],
}

impl Asking {
    /// Connects.
    async fn begin(hub: &HubProcess, node: String) -> Result<Self, BenchError> {
        let (target, login) = (Arc::clone(hub.target()), hub.operator_login().await?);
        let (go_on, stop) = (CancellationToken::new(), CancellationToken::new());
        let (connected, is_connected) = oneshot::channel();
        let (going, stopped) = (go_on.clone(), stop.clone());
        let result = tokio::task::spawn_blocking(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(async {
                let client = target.operator(&login).await?;
                // Whoever waits for it knows it from the channel as well.
                connected.send(()).ok();
                going.cancelled().await;
                let (mut times, mut failed) = (Times::default(), 0);
                while !stopped.is_cancelled() {
                    let begun = Instant::now();
                    match ask(client.clone(), &node).await {
                        Ok(()) => times.add(begun.elapsed()),
                        Err(error) => {
                            tracing::debug!(%error, "an operator's call failed");
                            failed += 1;
                        }
                    }
                    tokio::time::sleep(LOOK).await;
                }
                Ok((times, failed))
            })
        });
        // If it could not connect, its result says why.
        is_connected.await.ok();
        let _guards = [&go_on, &stop].map(|token| token.clone().drop_guard());
        Ok(Self { go_on, stop, result, _guards })
    }

    /// How long its calls took, and how many failed.
    async fn end(self) -> Result<(Times, u64), BenchError> {
        self.stop.cancel();
        self.result.await.map_err(io::Error::other)?
    }
}

/// What an operator does all day: looks at a node.
async fn ask(mut client: OperatorClient<Channel>, node: &str) -> Result<(), BenchError> {
    let request = v1::ListNodesRequest { selector: node.to_owned() };
    let asking = client.list_nodes(request);
    match tokio::time::timeout(CALL_TIMEOUT, asking).await {
        Ok(answer) => Ok(answer.map(drop)?),
        Err(_) => Err(tonic::Status::deadline_exceeded("no answer in time").into()),
    }
}
