//! An emulated node: a session that beats, and pretends to run what it is told to.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use cortex_proto::v1;
use cortex_proto::v1::node_client::NodeClient;
use cortex_proto::v1::{hub_frame, node_frame};
use cortex_shared::clock::unix_ms;
use cortex_shared::tasks::TaskScope;
use rand::RngExt as _;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, interval_at};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::Streaming;
use tonic::transport::Channel;

use super::BenchError;
use super::client::{Login, Target};
use super::executor::carry_out;
use super::statistics::Times;

/// What of a benchmark goes on now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// Everything is as usual.
    Calm,
    /// What is to be measured.
    Storm,
    /// It is over.
    Over,
}

/// What a node saw of its heartbeats in one phase.
#[derive(Clone, Debug, Default)]
pub(super) struct Beats {
    /// From a heartbeat to its answer.
    pub(super) round_trips: Times,
    /// From one answer to the next: the interval, if all is well.
    pub(super) gaps: Times,
}

impl Beats {
    pub(super) fn join(&mut self, other: Self) {
        self.round_trips.join(other.round_trips);
        self.gaps.join(other.gaps);
    }
}

/// A session that has been welcomed.
pub(super) struct EmulatedNode {
    client: NodeClient<Channel>,
    up: mpsc::Sender<v1::NodeFrame>,
    down: Streaming<v1::HubFrame>,
    interval: Duration,
}

impl EmulatedNode {
    /// Begins a session.
    pub(super) async fn connect(
        target: &Target,
        login: &Login,
        generation: u64,
    ) -> Result<Self, BenchError> {
        let mut client = NodeClient::new(target.connect(Some(login)).await?);
        let (up, frames) = mpsc::channel(4);
        let hello = hello(login.number(), generation);
        send(&up, node_frame::Frame::Hello(hello)).await?;
        let mut down = client.link(ReceiverStream::new(frames)).await?.into_inner();
        let welcome = loop {
            match next(&mut down).await? {
                hub_frame::Frame::Welcome(welcome) => break welcome,
                _ => continue,
            }
        };
        let interval = Duration::from_millis(welcome.heartbeat_interval_ms);
        Ok(Self { client, up, down, interval })
    }

    /// Beats until it is over; returns what it saw in the calm and in the storm.
    pub(super) async fn beat(
        mut self,
        offset: Duration,
        phase: watch::Receiver<Phase>,
    ) -> Result<[Beats; 2], BenchError> {
        let mut beats = [Beats::default(), Beats::default()];
        let mut ticks = interval_at(Instant::now() + offset, self.interval);
        let mut answered: Option<Instant> = None;
        loop {
            ticks.tick().await;
            let current = *phase.borrow();
            let seen = match current {
                Phase::Calm => &mut beats[0],
                Phase::Storm => &mut beats[1],
                Phase::Over => return Ok(beats),
            };
            let sent = Instant::now();
            send(&self.up, node_frame::Frame::Heartbeat(v1::Heartbeat {})).await?;
            while !matches!(next(&mut self.down).await?, hub_frame::Frame::Heartbeat(_)) {}
            let now = Instant::now();
            seen.round_trips.add(now - sent);
            if let Some(before) = answered.replace(now) {
                seen.gaps.add(now - before);
            }
        }
    }
}

impl EmulatedNode {
    /// Beats and carries out commands until the session ends, which is an error of whatever kind.
    pub(super) async fn serve(mut self) -> Result<(), BenchError> {
        // Each at a time of its own, as machines that have started at some time.
        let first = self.interval.mul_f64(rand::rng().random_range(0.0..1.0));
        let mut ticks = interval_at(Instant::now() + first, self.interval);
        let tasks = TaskScope::new();
        let _ends_with_the_session = tasks.token().clone().drop_guard();
        let mut cancels: HashMap<Bytes, CancellationToken> = HashMap::new();
        loop {
            let frame = tokio::select! {
                frame = next(&mut self.down) => frame?,
                _ = ticks.tick() => {
                    send(&self.up, node_frame::Frame::Heartbeat(v1::Heartbeat {})).await?;
                    continue;
                }
            };
            match frame {
                hub_frame::Frame::StartTask(start) => {
                    cancels.retain(|_, cancel| !cancel.is_cancelled());
                    let (cancel, over) = (CancellationToken::new(), tasks.token().clone());
                    cancels.insert(start.task_id.clone(), cancel.clone());
                    let client = self.client.clone();
                    tasks.spawn("emulated command", async move {
                        let carried = carry_out(client, start, cancel.clone());
                        if let Some(Err(status)) = over.run_until_cancelled(carried).await {
                            tracing::debug!(%status, "an emulated command was lost");
                        }
                        cancel.cancel();
                    });
                }
                hub_frame::Frame::CancelTask(order) => {
                    if let Some(cancel) = cancels.get(&order.task_id) {
                        cancel.cancel();
                    }
                }
                _ => {}
            }
        }
    }
}

/// What an agent says of itself, in as many words: the hub keeps it.
fn hello(number: u64, generation: u64) -> v1::Hello {
    let missing = v1::MissingPiece {
        what: "limits by cgroup".to_owned(),
        why: "the agent's cgroup is not delegated to it".to_owned(),
        remedy: "run it as a service: cortex-agent service install".to_owned(),
    };
    v1::Hello {
        agent_version: env!("CARGO_PKG_VERSION").to_owned(),
        instance_id: number.to_be_bytes().repeat(2).into(),
        // The same at each of its connections: another machine would be taken for a copy.
        boot_id: format!("{number:08x}-0000-4000-8000-{number:012x}"),
        machine_id: format!("{number:032x}"),
        hostname: format!("bench-{number}.example.org"),
        os: "Debian GNU/Linux 12 (bookworm)".to_owned(),
        arch: "x86_64".to_owned(),
        ceiling: v1::Mode::Strict.into(),
        sandbox: Some(v1::SandboxReport {
            strict_available: true,
            missing: vec![missing],
            landlock_abi: 6,
            cgroup: "none".to_owned(),
            seccomp: true,
            user_namespaces: true,
            root: false,
        }),
        node_time_ms: unix_ms(),
        generation,
        ..v1::Hello::default()
    }
}

async fn send(
    up: &mpsc::Sender<v1::NodeFrame>,
    frame: node_frame::Frame,
) -> Result<(), BenchError> {
    let frame = v1::NodeFrame { frame: Some(frame) };
    up.send(frame).await.map_err(|_| BenchError::SessionLost)
}

async fn next(down: &mut Streaming<v1::HubFrame>) -> Result<hub_frame::Frame, BenchError> {
    let frame = down.message().await?.ok_or(BenchError::SessionLost)?;
    // One that this version does not know is skipped.
    frame.frame.ok_or(BenchError::SessionLost)
}

/// Joins nodes, connects them, and lets them beat, evenly spread over the interval.
pub(super) async fn connect_all(
    target: &Arc<Target>,
    token: &str,
    keys: &[super::client::Key],
) -> Result<Vec<EmulatedNode>, BenchError> {
    let mut nodes = Vec::with_capacity(keys.len());
    for key in keys {
        let channel = target.connect(None).await?;
        let joined = target.join(channel, token, key).await?;
        let login = key.certified(&joined.certificate_der);
        nodes.push(EmulatedNode::connect(target, &login, joined.generation).await?);
    }
    Ok(nodes)
}
