//! The session: this node's one live connection to its hub.
//!
//! One task owns both halves of the `Link` stream and everything about the connection. It sends by
//! a queue that never makes it wait: a queue that is full means a peer that has stopped reading,
//! and ends the session. Liveness in both directions is the last frame of any kind. Between
//! sessions the task waits, longer with each failure; what is to be known of it outside is the
//! latest [`LinkState`].

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use cortex_proto::MAX_MESSAGE_BYTES;
use cortex_proto::v1::node_client::NodeClient;
use cortex_proto::v1::{self, hub_frame, node_frame};
use cortex_shared::backoff::Backoff;
use cortex_shared::clock::unix_ms;
use cortex_shared::ids::TaskId;
use cortex_shared::policy::Bound;
use cortex_shared::tasks::TaskScope;
use rand::RngExt as _;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Status, Streaming};

use super::authority::HubPolicy;
use super::dispatch::{Dispatcher, SessionContext, clocks};
use super::end::{End, MAX_DRAIN};
use super::renewal::{self, RenewError, Welcomed};
use super::{bound_of, proto_mode, proto_network};
use crate::client::{Purpose, Traffic, say_skew};
use crate::exec::CancelCause;
use crate::identity::MachineFacts;
use crate::identity::live::LiveIdentity;

/// Frames that may wait for the hub to read. Each is small.
const OUTBOX_FRAMES: usize = 256;
/// How long the hub may take to welcome a node.
const WELCOME_TIMEOUT: Duration = Duration::from_secs(15);
/// Bounds for what the hub may ask as heartbeat interval.
const HEARTBEAT_BOUNDS: (Duration, Duration) =
    (Duration::from_millis(100), Duration::from_secs(300));
/// A session this old was no accident: the next failure starts with a short wait again.
const STABLE: Duration = Duration::from_secs(60);
/// How long to leave a hub alone that takes this machine for a copy, and up to twice that: asking
/// often changes nothing, and somebody has to decide.
const CLONE_PATIENCE: Duration = Duration::from_secs(15 * 60);
/// A difference between the clocks that is worth a word.
pub const MAX_SKEW_MS: u64 = 30_000;
/// How long after the loss of a session with running commands the hub is tried often: some restarts of a
/// hub take longer than the grace that it gives from then on.
const HURRY: Duration = Duration::from_secs(120);
/// Longest wait between two attempts then.
const HURRIED_DELAY: Duration = Duration::from_secs(1);
/// How long ending tasks may take to report their end before the session closes.
const LEAVE_TIMEOUT: Duration = Duration::from_secs(5);

/// What is known of the connection.
#[derive(Clone, Debug, Default)]
pub struct LinkState {
    /// The session, if there is one.
    pub session: Option<SessionInfo>,
    /// Why there is none.
    pub problem: Option<String>,
    /// When the next attempt comes, in milliseconds since the epoch; 0 if it is under way.
    pub next_attempt_ms: i64,
}

/// A live session.
#[derive(Clone, Debug)]
pub struct SessionInfo {
    /// Grows by one with each session of this node.
    pub epoch: u64,
    /// The node's name at the hub.
    pub name: String,
    /// When it began, on this machine's clock.
    pub since_ms: i64,
    /// The connection, for questions to the hub.
    pub client: NodeClient<Channel>,
}

/// What this node says of itself at the beginning of each session.
#[derive(Clone, Debug)]
pub struct Greeting {
    /// Random for each start of the process.
    pub instance_id: [u8; 16],
    /// What this kernel can enforce.
    pub sandbox: v1::SandboxReport,
}

impl Greeting {
    fn hello(&self, ceiling: Bound, generation: u64, held: &[TaskId]) -> v1::Hello {
        let MachineFacts { machine_id, boot_id, hostname } = MachineFacts::of_this_machine();
        v1::Hello {
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            instance_id: self.instance_id.to_vec().into(),
            boot_id,
            hostname,
            os: std::env::consts::OS.to_owned(),
            arch: std::env::consts::ARCH.to_owned(),
            ceiling: proto_mode(ceiling.mode).into(),
            ceiling_network: proto_network(ceiling.network).into(),
            sandbox: Some(self.sandbox.clone()),
            machine_id,
            node_time_ms: unix_ms(),
            generation,
            held_tasks: held.iter().map(|id| id.as_bytes().to_vec().into()).collect(),
        }
    }
}

/// The way to the hub for small frames. Clones share one queue.
#[derive(Clone, Debug)]
pub struct Outbox {
    frames: mpsc::Sender<v1::NodeFrame>,
    last_sent: Arc<Mutex<Instant>>,
}

impl Outbox {
    pub(super) fn new(frames: mpsc::Sender<v1::NodeFrame>) -> Self {
        Self { frames, last_sent: Arc::new(Mutex::new(Instant::now())) }
    }

    /// Queues a frame; `false` if the session is over or the hub reads nothing.
    pub fn send(&self, frame: node_frame::Frame) -> bool {
        let sent = self.frames.try_send(v1::NodeFrame { frame: Some(frame) }).is_ok();
        if sent {
            *self.last_sent.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
        }
        sent
    }

    fn last_sent(&self) -> Instant {
        *self.last_sent.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Keeps a session with the hub until the scope is cancelled.
pub async fn keep_session(
    identity: LiveIdentity,
    greeting: Greeting,
    dispatcher: Dispatcher,
    state: watch::Sender<LinkState>,
    scope: TaskScope,
) {
    let keeper = Keeper { identity, greeting, dispatcher, state, scope };
    keeper.run().await;
}

struct Keeper {
    identity: LiveIdentity,
    greeting: Greeting,
    dispatcher: Dispatcher,
    state: watch::Sender<LinkState>,
    scope: TaskScope,
}

impl Keeper {
    async fn run(self) {
        let mut backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(60));
        let mut patience = Backoff::new(Duration::from_secs(30), Duration::from_secs(300));
        let mut said = String::new();
        let mut lost_at = Instant::now();
        let stop = self.scope.token().clone();
        while !stop.is_cancelled() {
            let begun = Instant::now();
            let had_session;
            let end = tokio::select! {
                // Only before the session begins: a session ends itself, in order.
                () = stop.cancelled() => return,
                opened = self.open_or_recover() => match opened {
                    Ok(session) => {
                        had_session = true;
                        said.clear();
                        session.run(&self.dispatcher, &self.scope).await
                    }
                    Err(end) => {
                        had_session = false;
                        end
                    }
                },
            };
            if had_session && begun.elapsed() >= STABLE {
                backoff.reset();
                patience.reset();
            }
            if had_session {
                lost_at = Instant::now();
            }
            let (problem, delay) = match end {
                End::Stopped => return,
                End::Drained(delay) => ("the hub is restarting".to_owned(), delay),
                End::Lost(problem) | End::Broken(problem) | End::Unreachable(problem) => {
                    (problem, backoff.next_delay())
                }
                End::Busy(problem, delay) => (problem, delay + backoff.next_delay()),
                End::Refused(problem) => (problem, patience.next_delay()),
                End::Expelled(problem) => {
                    self.dispatcher.end_commands(CancelCause::Expelled);
                    (problem, patience.next_delay())
                }
                End::Certificate(problem) => (self.with_clocks(&problem), patience.next_delay()),
                End::Cloned(problem) => {
                    renewal::note_clone(&self.identity, problem.clone()).await;
                    (problem, CLONE_PATIENCE.mul_f64(1.0 + rand::rng().random_range(0.0..1.0)))
                }
            };
            let delay = self.hurry(delay, lost_at);
            if problem != said {
                tracing::warn!(
                    hub = %self.identity.client().address(),
                    reason = problem,
                    "{}",
                    if had_session { "session lost" } else { "no session" }
                );
                said.clone_from(&problem);
            }
            let wait_ms = i64::try_from(delay.as_millis()).unwrap_or(i64::MAX);
            self.state.send_replace(LinkState {
                session: None,
                problem: Some(problem),
                next_attempt_ms: unix_ms().saturating_add(wait_ms),
            });
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(delay) => {}
                () = self.identity.retry_asked() => {}
            }
        }
    }

    /// As long as commands can be taken up again, there is no time to be patient.
    fn hurry(&self, delay: Duration, lost_at: Instant) -> Duration {
        if self.dispatcher.running_tasks() == 0 || lost_at.elapsed() > HURRY {
            return delay;
        }
        delay.min(HURRIED_DELAY.mul_f64(rand::rng().random_range(0.5..1.0)))
    }

    /// Opens a session. If the hub does not accept the newest certificate, that is tried with the
    /// one before it; if the certificate's time is over, with one recovered by the key alone. The
    /// hub's word decides, because it is the hub's clock that counts: a node whose own clock is
    /// wrong would recover for nothing, or not at all.
    async fn open_or_recover(&self) -> Result<Session<'_>, End> {
        let mut opened = self.open_or_learn_why().await;
        if matches!(opened, Err(End::Certificate(_))) && self.identity.fall_back() {
            opened = self.open_or_learn_why().await;
        }
        let end = match opened {
            Ok(session) => return Ok(session),
            Err(end @ End::Certificate(_)) => end,
            // A refusal that got lost on the way; the end of the certificate says the same.
            Err(end @ End::Broken(_)) if self.identity.is_expired() => end,
            Err(end) => return Err(end),
        };
        match renewal::recover(&self.identity).await {
            Ok(()) => self.open().await,
            // The clocks say more than that there is no connection.
            Err(RenewError::Connect(_)) => Err(end),
            Err(error) => Err(error.into()),
        }
    }

    /// Opens a session. Where the connection breaks, a refusal of our certificate may have been lost
    /// with it, so the hub is asked for it.
    async fn open_or_learn_why(&self) -> Result<Session<'_>, End> {
        match self.open().await {
            Err(End::Broken(problem)) => match self.identity.client().certificate_refused().await {
                Some(refusal) => Err(End::Certificate(refusal.to_owned())),
                None => Err(End::Broken(problem)),
            },
            opened => opened,
        }
    }

    /// A refusal of the certificate, with what this machine knows of the time.
    fn with_clocks(&self, problem: &str) -> String {
        let not_after = self.identity.snapshot().credentials.not_after_ms();
        let skew = match describe_skew(self.identity.skew_ms()) {
            Some(skew) => format!("; in the last session it was {skew}"),
            None => String::new(),
        };
        format!(
            "{problem} (it ends at {}, this machine's clock says {}{skew})",
            timestamp(not_after),
            timestamp(unix_ms()),
        )
    }

    /// Connects, greets, and waits to be welcomed.
    async fn open(&self) -> Result<Session<'_>, End> {
        let presented = self.identity.presented();
        let hub = self.identity.client();
        let (channel, traffic) = hub.connect_counted(Purpose::Control).await.map_err(End::from)?;
        let client = NodeClient::new(channel)
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES);
        let (frames, queue) = mpsc::channel(OUTBOX_FRAMES);
        let outbox = Outbox::new(frames);
        let hello = self.greeting.hello(
            self.dispatcher.ceiling().await,
            presented.generation,
            &self.dispatcher.held_tasks(),
        );
        let greeted_ms = hello.node_time_ms;
        outbox.send(node_frame::Frame::Hello(hello));
        let mut link = client.clone();
        let welcomed = async move {
            let mut inbound = link.link(ReceiverStream::new(queue)).await?.into_inner();
            let first = inbound.message().await?;
            Ok::<_, Status>((inbound, first.and_then(|message| message.frame)))
        };
        let (inbound, first) = tokio::time::timeout(WELCOME_TIMEOUT, welcomed)
            .await
            .map_err(|_| End::Lost("the hub did not welcome this node in time".to_owned()))??;
        let Some(hub_frame::Frame::Welcome(welcome)) = first else {
            return Err(End::Lost("the hub's first frame was not a welcome".to_owned()));
        };
        self.compare_clocks(greeted_ms, welcome.hub_time_ms);
        let interval = Duration::from_millis(welcome.heartbeat_interval_ms)
            .clamp(HEARTBEAT_BOUNDS.0, HEARTBEAT_BOUNDS.1);
        let info = SessionInfo {
            epoch: welcome.epoch,
            name: welcome.name,
            since_ms: unix_ms(),
            client: client.clone(),
        };
        tracing::info!(
            hub = %self.identity.client().address(), node = info.name, epoch = info.epoch, "session up"
        );
        self.state.send_replace(LinkState { session: Some(info), ..Default::default() });
        Ok(Session {
            inbound,
            outbox,
            client,
            resume_grace: Duration::from_millis(welcome.resume_grace_ms),
            traffic,
            interval,
            policy: HubPolicy::told(
                bound_of(welcome.policy, welcome.policy_network),
                welcome.policy_until_ms,
                clocks(&self.identity),
            ),
            welcomed: Welcomed {
                generation: presented.generation,
                authorities: welcome.trusted_cas_der,
                renew_now: welcome.renew_now,
            },
            identity: &self.identity,
            state: &self.state,
        })
    }

    /// Measures how far the clocks are apart, to half of the time between greeting and welcome.
    fn compare_clocks(&self, greeted_ms: i64, hub_time_ms: i64) {
        if hub_time_ms == 0 {
            return;
        }
        let waited_ms = unix_ms().saturating_sub(greeted_ms);
        let skew_ms = hub_time_ms.saturating_sub(greeted_ms.saturating_add(waited_ms / 2));
        self.identity.set_skew_ms(skew_ms);
        if let Some(skew) = describe_skew(skew_ms) {
            tracing::warn!(
                skew_ms,
                "this machine's clock is {skew}: certificates may seem expired or not yet valid"
            );
        }
    }
}

/// Which way and how far this machine's clock is wrong, if that is worth a word.
fn describe_skew(skew_ms: i64) -> Option<String> {
    let apart_ms = skew_ms.unsigned_abs();
    let direction = if skew_ms > 0 { "behind" } else { "ahead of" };
    (apart_ms > MAX_SKEW_MS)
        .then(|| format!("{} {direction} the hub's", say_skew(Duration::from_millis(apart_ms))))
}

fn timestamp(ms: i64) -> String {
    jiff::Timestamp::from_millisecond(ms)
        .map_or_else(|_| "an unknown time".to_owned(), |time| format!("{time:.0}"))
}

struct Session<'a> {
    inbound: Streaming<v1::HubFrame>,
    outbox: Outbox,
    client: NodeClient<Channel>,
    resume_grace: Duration,
    traffic: Arc<Traffic>,
    interval: Duration,
    policy: HubPolicy,
    welcomed: Welcomed,
    identity: &'a LiveIdentity,
    state: &'a watch::Sender<LinkState>,
}

impl Drop for Session<'_> {
    /// Whatever way the session ends, nobody goes on believing in it.
    fn drop(&mut self) {
        self.state.send_modify(|state| state.session = None);
    }
}

impl Session<'_> {
    async fn run(mut self, dispatcher: &Dispatcher, scope: &TaskScope) -> End {
        // What belongs to this session alone. Commands are the dispatcher's, and outlive it.
        let tasks = TaskScope::new();
        let context = SessionContext {
            client: self.client.clone(),
            outbox: self.outbox.clone(),
            tasks: tasks.clone(),
            resume_grace: self.resume_grace,
        };
        tasks.spawn(
            "renewal",
            renewal::keep_fresh(
                self.identity.clone(),
                self.client.clone(),
                std::mem::take(&mut self.welcomed),
                tasks.token().clone(),
            ),
        );
        dispatcher.begin_session(context, self.policy);
        let end = self.exchange(dispatcher, scope).await;
        if matches!(end, End::Stopped) {
            // Commands end and are reported while there is a session to report them in.
            tokio::time::timeout(LEAVE_TIMEOUT, dispatcher.stop_commands()).await.ok();
        }
        dispatcher.end_session();
        tasks.cancel();
        scope.spawn("ending session", async move { tasks.finish().await });
        end
    }

    async fn exchange(&mut self, dispatcher: &Dispatcher, scope: &TaskScope) -> End {
        let silence = self.interval * 3;
        let mut last_received = Instant::now();
        // Frames of tasks are a sign of life, too, and on a slow line a heartbeat waits behind them.
        let mut received = self.traffic.received();
        let mut look = tokio::time::interval(self.interval);
        look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut reports = dispatcher.reports();
        loop {
            tokio::select! {
                biased;
                () = scope.token().cancelled() => return End::Stopped,
                () = tokio::time::sleep_until(self.outbox.last_sent() + self.interval) => {
                    // Somebody else may have sent meanwhile, which is as good.
                    if self.outbox.last_sent().elapsed() >= self.interval
                        && !self.outbox.send(node_frame::Frame::Heartbeat(v1::Heartbeat {}))
                    {
                        return End::Lost("the hub stopped reading".to_owned());
                    }
                }
                message = self.inbound.message() => {
                    last_received = Instant::now();
                    match message {
                        Ok(Some(message)) => match message.frame {
                            Some(hub_frame::Frame::Drain(drain)) => {
                                let delay = Duration::from_millis(drain.reconnect_after_ms);
                                return End::Drained(delay.min(MAX_DRAIN));
                            }
                            Some(hub_frame::Frame::Superseded(_)) => {
                                return End::Refused(
                                    "another session of this node has taken over: is its state copied to another machine?".to_owned(),
                                );
                            }
                            Some(frame) => dispatcher.handle(frame),
                            // A frame of a newer hub.
                            None => {}
                        },
                        Ok(None) => return End::Lost("the hub closed the session".to_owned()),
                        Err(status) => return End::from(status),
                    }
                }
                _ = look.tick() => {
                    if std::mem::replace(&mut received, self.traffic.received()) != received {
                        last_received = Instant::now();
                    }
                }
                () = tokio::time::sleep_until(last_received + silence) => {
                    return End::Lost(format!("nothing heard from the hub for {silence:?}"));
                }
                report = reports.next() => {
                    if !self.outbox.send(node_frame::Frame::SyncReport(report)) {
                        return End::Lost("the hub stopped reading".to_owned());
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn full_outbox_refuses_instead_of_waiting_and_counts_only_what_was_sent() {
        let (frames, mut queue) = mpsc::channel(1);
        let outbox = Outbox::new(frames);
        assert!(outbox.send(node_frame::Frame::Heartbeat(v1::Heartbeat {})));
        let sent = outbox.last_sent();
        assert!(!outbox.send(node_frame::Frame::Heartbeat(v1::Heartbeat {})));
        assert_eq!(outbox.last_sent(), sent);
        assert!(queue.recv().await.is_some());
        assert!(outbox.send(node_frame::Frame::Heartbeat(v1::Heartbeat {})));
    }
}
