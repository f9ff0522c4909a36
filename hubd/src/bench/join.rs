//! `bench join`: a crowd that joins at once while the store stalls, and what connected nodes see of it.
//!
//! All joins are offered at the same moment, each by a task of its own with its own key and its own
//! TLS connection; a limited number of *connection attempts* are under way at a time, as the network
//! between real machines would see to. Each repeats as `cortex-agent join` does: what the hub asks for
//! is heeded, and after two minutes it gives up.
//!
//! Clients and hub share this process and its processors, so every figure is worse than what nodes of
//! their own would see, and the memory is that of both.

use std::collections::HashSet;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use cortex_proto::CODE_TRAILER;
use cortex_proto::v1;
use cortex_shared::patience::Patience;
use cortex_shared::tasks::TaskScope;
use serde_json::{Value, json};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::time::Instant;
use tonic::Code;

use super::client::{Key, Target};
use super::line::Line;
use super::node::{Beats, Phase, connect_all};
use super::statistics::{Times, millis};
use super::{BenchError, BenchHub, descriptors_for};
use crate::store::fault::Fault;

/// Connection attempts under way at the same time; the hub shakes hands with a quarter of so many of one address.
const CONNECTING: u32 = 512;
/// How long a client goes on asking, as the agent does.
const PATIENCE: Duration = Duration::from_secs(120);
/// Time of calm that is measured for comparison, in heartbeats.
const CALM_BEATS: u32 = 4;

/// What the store does meanwhile.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Trouble {
    /// It takes no calls.
    #[default]
    Stall,
    /// It carries calls out, but does not say so.
    Answers,
    /// It fails.
    Fail,
    /// Each call takes a tenth of a second longer.
    Slow,
}

impl Trouble {
    const ALL: [Self; 4] = [Self::Stall, Self::Answers, Self::Fail, Self::Slow];

    fn word(self) -> &'static str {
        match self {
            Self::Stall => "stall",
            Self::Answers => "answers",
            Self::Fail => "fail",
            Self::Slow => "slow",
        }
    }

    fn fault(self) -> Fault {
        match self {
            Self::Stall => Fault::Stall,
            Self::Answers => Fault::StallAnswers,
            Self::Fail => Fault::Fail,
            Self::Slow => Fault::Slow(Duration::from_millis(100)),
        }
    }
}

impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

impl FromStr for Trouble {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|trouble| trouble.word() == text);
        found.ok_or_else(|| "expected stall, answers, fail or slow".to_owned())
    }
}

/// What is to be done.
#[derive(Clone, Debug)]
pub struct JoinBench {
    /// Nodes that join at once.
    pub joins: u32,
    /// Nodes that are connected meanwhile.
    pub connected: u32,
    /// How long the store is in trouble.
    pub stall: Duration,
    /// What kind of trouble.
    pub trouble: Trouble,
    /// Heartbeat interval of the connected nodes.
    pub heartbeat: Duration,
}

/// What came of it.
#[derive(Clone, Debug)]
pub struct JoinReport {
    bench: JoinBench,
    joined: usize,
    lost: usize,
    doubled: usize,
    attempts: u64,
    busy: u64,
    slow: u64,
    first: Option<Duration>,
    last: Option<Duration>,
    sessions_lost: usize,
    calm: Beats,
    storm: Beats,
    peak_memory_bytes: Option<u64>,
}

/// What the clients count together.
#[derive(Default)]
struct Counts {
    attempts: AtomicU64,
    busy: AtomicU64,
    slow: AtomicU64,
}

impl JoinBench {
    /// Runs it. Ends by itself: each client's patience is limited.
    ///
    /// # Errors
    /// If nothing could be measured; a join that is lost is no error, but part of the report.
    pub async fn run(self) -> Result<JoinReport, BenchError> {
        // Both ends of each connection are in this process.
        descriptors_for(2 * (self.connected + self.joins.min(CONNECTING)))?;
        let hub = BenchHub::start(|config| config.heartbeat = self.heartbeat).await?;
        let report = self.measure(&hub).await;
        hub.faults.set(Fault::None);
        hub.stop().await;
        report
    }

    async fn measure(self, hub: &BenchHub) -> Result<JoinReport, BenchError> {
        let target = Arc::new(Target {
            address: hub.hub.address(),
            authority: hub.hub.authority_certificate(),
            line: Line::default(),
        });
        let token = invite(hub, self.joins + self.connected).await?;
        let make = |count: u32| (0..count).map(|_| Key::make()).collect::<Result<Vec<_>, _>>();
        let nodes = connect_all(&target, &token, &make(self.connected)?).await?;
        let keys = make(self.joins)?;

        let scope = TaskScope::new();
        let (phase, phases) = watch::channel(Phase::Calm);
        let (seen, mut beats) = mpsc::channel(nodes.len().max(1));
        for (index, node) in (0_u32..).zip(nodes) {
            // Evenly over the interval, as machines that have started at some time are.
            let offset = self.heartbeat * index / self.connected.max(1);
            let (phases, seen) = (phases.clone(), seen.clone());
            scope.spawn("emulated node", async move {
                seen.send(node.beat(offset, phases).await).await.ok();
            });
        }
        drop(seen);
        tokio::time::sleep(self.heartbeat * CALM_BEATS).await;

        phase.send_replace(Phase::Storm);
        hub.faults.set(self.trouble.fault());
        let start = Instant::now();
        let counts = Arc::new(Counts::default());
        let mut joined = offer(&scope, &target, &token, keys, &counts);
        let faults = hub.faults.clone();
        let stall = self.stall;
        scope.spawn("trouble", async move {
            tokio::time::sleep(stall).await;
            faults.set(Fault::None);
        });
        let (mut ids, mut times, mut lost, mut doubled) = (HashSet::new(), Times::default(), 0, 0);
        while let Some(result) = joined.recv().await {
            match result {
                Some(id) if ids.insert(id.clone()) => times.add(start.elapsed()),
                // Two keys were given one node.
                Some(_) => doubled += 1,
                None => lost += 1,
            }
        }
        phase.send_replace(Phase::Over);
        let (mut calm, mut storm, mut sessions_lost) = (Beats::default(), Beats::default(), 0);
        while let Some(seen) = beats.recv().await {
            match seen {
                Ok([before, during]) => {
                    calm.join(before);
                    storm.join(during);
                }
                Err(error) => {
                    tracing::warn!(%error, "an emulated node ended early");
                    sessions_lost += 1;
                }
            }
        }
        scope.finish().await;

        // Nodes that nobody was told of are doubled, too: somebody joined twice.
        let known = admin(hub).await?.list_nodes(v1::ListNodesRequest::default()).await?;
        let known = known.into_inner().nodes.len();
        doubled += known.saturating_sub(ids.len() + self.connected as usize + lost);
        Ok(JoinReport {
            joined: ids.len(),
            lost,
            doubled,
            attempts: counts.attempts.load(Ordering::Relaxed),
            busy: counts.busy.load(Ordering::Relaxed),
            slow: counts.slow.load(Ordering::Relaxed),
            first: times.percentile(0),
            last: times.percentile(100),
            sessions_lost,
            calm,
            storm,
            peak_memory_bytes: peak_memory_bytes(),
            bench: self,
        })
    }
}

/// Offers all joins at once; gives the id of each node, or nothing for one that gave up.
fn offer(
    scope: &TaskScope,
    target: &Arc<Target>,
    token: &str,
    keys: Vec<Key>,
    counts: &Arc<Counts>,
) -> mpsc::Receiver<Option<bytes::Bytes>> {
    let (done, results) = mpsc::channel(keys.len().max(1));
    let connecting = Arc::new(Semaphore::new(CONNECTING as usize));
    for key in keys {
        let (target, token) = (Arc::clone(target), token.to_owned());
        let (counts, done) = (Arc::clone(counts), done.clone());
        let connecting = Arc::clone(&connecting);
        scope.spawn("emulated join", async move {
            let result = join(&target, &token, &key, &counts, &connecting).await;
            if let Err(error) = &result {
                tracing::warn!(%error, "a join was lost");
            }
            done.send(result.ok()).await.ok();
        });
    }
    results
}

async fn join(
    target: &Target,
    token: &str,
    key: &Key,
    counts: &Counts,
    connecting: &Semaphore,
) -> Result<bytes::Bytes, BenchError> {
    let mut patience = Patience::new(PATIENCE, std::time::Instant::now());
    loop {
        counts.attempts.fetch_add(1, Ordering::Relaxed);
        let channel = {
            // Never closed; without a place it would only connect at once.
            let _place = connecting.acquire().await.ok();
            target.connect(None).await
        };
        let error = match channel {
            Ok(channel) => match target.join(channel, token, key).await {
                Ok(joined) => return Ok(joined.node_id),
                Err(error) => error,
            },
            Err(error) => error,
        };
        let asked = match &error {
            BenchError::Refused(status) => {
                let word = status.metadata().get(CODE_TRAILER).and_then(|w| w.to_str().ok());
                match word {
                    Some("busy") => counts.busy.fetch_add(1, Ordering::Relaxed),
                    Some("store_slow") => counts.slow.fetch_add(1, Ordering::Relaxed),
                    _ => 0,
                };
                let again = matches!(
                    status.code(),
                    Code::ResourceExhausted | Code::Unavailable | Code::Internal
                );
                if !again {
                    return Err(error);
                }
                cortex_proto::retry_after(status.metadata())
            }
            // Cut off on the way: the hub recognises the key.
            BenchError::Connect(_) => None,
            _ => return Err(error),
        };
        match patience.next_delay(asked, std::time::Instant::now()) {
            Some(delay) => tokio::time::sleep(delay).await,
            None => return Err(error),
        }
    }
}

async fn admin(
    hub: &BenchHub,
) -> Result<v1::operator_client::OperatorClient<tonic::transport::Channel>, BenchError> {
    Ok(super::client::local(hub.hub.socket()).await?)
}

/// An invite for all of them.
async fn invite(hub: &BenchHub, uses: u32) -> Result<String, BenchError> {
    let request = v1::CreateInviteRequest { uses, ..v1::CreateInviteRequest::default() };
    Ok(admin(hub).await?.create_invite(request).await?.into_inner().token)
}

/// The most memory this process has had, as the kernel counts it.
fn peak_memory_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

impl JoinReport {
    /// Whether everybody is in, once.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.lost == 0 && self.doubled == 0 && self.sessions_lost == 0
    }

    /// As a document.
    #[must_use]
    pub fn document(&self) -> Value {
        let beats = |beats: &Beats| json!({ "round_trip": beats.round_trips.summary(), "gap": beats.gaps.summary() });
        json!({
            "joins": self.bench.joins,
            "connected": self.bench.connected,
            "trouble": self.bench.trouble.word(),
            "stall_ms": millis(self.bench.stall),
            "heartbeat_ms": millis(self.bench.heartbeat),
            "joined": self.joined,
            "lost": self.lost,
            "doubled": self.doubled,
            "sessions_lost": self.sessions_lost,
            "attempts": self.attempts,
            "answered_busy": self.busy,
            "answered_store_slow": self.slow,
            "first_ms": self.first.map(millis),
            "last_ms": self.last.map(millis),
            "heartbeats_before": beats(&self.calm),
            "heartbeats_during": beats(&self.storm),
            "peak_memory_bytes": self.peak_memory_bytes,
        })
    }

    /// As people read it.
    #[must_use]
    pub fn text(&self) -> String {
        let ms = |time: Option<Duration>| {
            time.map_or_else(|| "-".to_owned(), |time| format!("{:.1} ms", millis(time)))
        };
        let times = |times: &Times| {
            let [p50, p99, max] = [50, 99, 100].map(|percent| ms(times.percentile(percent)));
            format!("p50 {p50}, p99 {p99}, max {max} ({} measured)", times.len())
        };
        let memory = self.peak_memory_bytes.map_or(0, |bytes| bytes / (1024 * 1024));
        format!(
            "joined      {} of {} ({} lost, {} doubled), the last after {}\n\
             attempts    {} ({} told busy, {} told that the store is slow)\n\
             store       {} for {} s from the start\n\
             connected   {} nodes, heartbeat every {} s, {} sessions lost\n\
             before      round trip {}\n            gap {}\n\
             during      round trip {}\n            gap {}\n\
             memory      {memory} MiB at its peak, hub and clients together",
            self.joined,
            self.bench.joins,
            self.lost,
            self.doubled,
            ms(self.last),
            self.attempts,
            self.busy,
            self.slow,
            self.bench.trouble,
            self.bench.stall.as_secs_f64(),
            self.bench.connected,
            self.bench.heartbeat.as_secs_f64(),
            self.sessions_lost,
            times(&self.calm.round_trips),
            times(&self.calm.gaps),
            times(&self.storm.round_trips),
            times(&self.storm.gaps),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn nobody_is_lost_or_doubled_whatever_the_store_does() {
        for trouble in Trouble::ALL {
            let bench = JoinBench {
                joins: 20,
                connected: 3,
                stall: Duration::from_millis(1000),
                trouble,
                // A busy machine must not be taken for a lost session.
                heartbeat: Duration::from_millis(500),
            };
            let report = bench.run().await.unwrap();
            assert!(report.is_complete() && report.joined == 20, "{trouble}: {}", report.text());
            assert_eq!(report.document()["joined"], 20);
            assert!(report.storm.gaps.len() > 0 && report.attempts >= 20);
        }
    }
}
