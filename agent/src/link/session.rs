//! The session: this node's one live connection to its hub.
//!
//! One task owns both halves of the `Link` stream and everything about the connection. It sends by
//! a queue that never makes it wait: a queue that is full means a peer that has stopped reading,
//! and ends the session. Liveness in both directions is the last frame of any kind. Between
//! sessions the task waits, longer with each failure; what is to be known of it outside is the
//! latest [`LinkState`].

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use cortex_proto::v1::node_client::NodeClient;
use cortex_proto::v1::{self, hub_frame, node_frame};
use cortex_proto::{MAX_MESSAGE_BYTES, RETRY_AFTER_TRAILER};
use cortex_shared::backoff::Backoff;
use cortex_shared::policy::Mode;
use cortex_shared::tasks::TaskScope;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Code, Status, Streaming};

use super::dispatch::{Dispatcher, SessionContext};
use super::{mode_of, now_ms, proto_mode};
use crate::client::{ConnectError, HubClient, Purpose, certificate_refusal, connect_error_in};

/// Frames that may wait for the hub to read. Each is small.
const OUTBOX_FRAMES: usize = 256;
/// How long the hub may take to welcome a node.
const WELCOME_TIMEOUT: Duration = Duration::from_secs(15);
/// Bounds for what the hub may ask as heartbeat interval.
const HEARTBEAT_BOUNDS: (Duration, Duration) =
    (Duration::from_millis(100), Duration::from_secs(300));
/// A session this old was no accident: the next failure starts with a short wait again.
const STABLE: Duration = Duration::from_secs(60);
/// Longest wait the hub may ask for when it stops.
const MAX_DRAIN: Duration = Duration::from_secs(300);
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
    /// The node owner's bound.
    pub ceiling: Mode,
    /// What this kernel can enforce.
    pub sandbox: v1::SandboxReport,
}

impl Greeting {
    fn hello(&self) -> v1::Hello {
        let boot_id =
            std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        let hostname = rustix::system::uname().nodename().to_string_lossy().into_owned();
        v1::Hello {
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            instance_id: self.instance_id.to_vec().into(),
            boot_id: boot_id.trim().to_owned(),
            hostname,
            os: std::env::consts::OS.to_owned(),
            arch: std::env::consts::ARCH.to_owned(),
            ceiling: proto_mode(self.ceiling).into(),
            sandbox: Some(self.sandbox.clone()),
            ..v1::Hello::default()
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
    fn new(frames: mpsc::Sender<v1::NodeFrame>) -> Self {
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

/// Why a session ended, or did not begin; decides about the next attempt.
#[derive(Debug)]
enum End {
    /// This agent stops.
    Stopped,
    /// The hub stops and told when to return.
    Drained(Duration),
    /// Trouble that may pass by itself.
    Lost(String),
    /// The hub asked for patience.
    Busy(String, Duration),
    /// Somebody has to change something first.
    Refused(String),
}

/// Keeps a session with the hub until the scope is cancelled.
pub async fn keep_session(
    client: HubClient,
    greeting: Greeting,
    dispatcher: Dispatcher,
    state: watch::Sender<LinkState>,
    scope: TaskScope,
) {
    let keeper = Keeper { client, greeting, dispatcher, state, scope };
    keeper.run().await;
}

struct Keeper {
    client: HubClient,
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
        let stop = self.scope.token().clone();
        while !stop.is_cancelled() {
            let begun = Instant::now();
            let had_session;
            let end = tokio::select! {
                // Only before the session begins: a session ends itself, in order.
                () = stop.cancelled() => return,
                opened = self.open() => match opened {
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
            let (problem, delay) = match end {
                End::Stopped => return,
                End::Drained(delay) => ("the hub is restarting".to_owned(), delay),
                End::Lost(problem) => (problem, backoff.next_delay()),
                End::Busy(problem, delay) => (problem, delay + backoff.next_delay()),
                End::Refused(problem) => (problem, patience.next_delay()),
            };
            if problem != said {
                tracing::warn!(
                    hub = %self.client.address(),
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
                next_attempt_ms: now_ms().saturating_add(wait_ms),
            });
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(delay) => {}
            }
        }
    }

    /// Connects, greets, and waits to be welcomed.
    async fn open(&self) -> Result<Session<'_>, End> {
        let channel = self.client.connect(Purpose::Control).await.map_err(End::from)?;
        let client = NodeClient::new(channel)
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES);
        let (frames, queue) = mpsc::channel(OUTBOX_FRAMES);
        let outbox = Outbox::new(frames);
        outbox.send(node_frame::Frame::Hello(self.greeting.hello()));
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
        let interval = Duration::from_millis(welcome.heartbeat_interval_ms)
            .clamp(HEARTBEAT_BOUNDS.0, HEARTBEAT_BOUNDS.1);
        let info = SessionInfo {
            epoch: welcome.epoch,
            name: welcome.name,
            since_ms: now_ms(),
            client: client.clone(),
        };
        tracing::info!(
            hub = %self.client.address(), node = info.name, epoch = info.epoch, "session up"
        );
        self.state.send_replace(LinkState { session: Some(info), ..Default::default() });
        Ok(Session {
            inbound,
            outbox,
            client,
            interval,
            policy: mode_of(welcome.policy),
            state: &self.state,
        })
    }
}

struct Session<'a> {
    inbound: Streaming<v1::HubFrame>,
    outbox: Outbox,
    client: NodeClient<Channel>,
    interval: Duration,
    policy: Mode,
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
        // Tasks get a scope that this session ends: not the daemon's own, so that on a stop they
        // can still report how they ended.
        let tasks = TaskScope::new();
        let context = SessionContext {
            client: self.client.clone(),
            outbox: self.outbox.clone(),
            tasks: tasks.clone(),
        };
        dispatcher.begin_session(context, self.policy);
        let end = self.exchange(dispatcher, scope).await;
        dispatcher.end_session();
        tasks.cancel();
        match end {
            End::Stopped => {
                tokio::time::timeout(LEAVE_TIMEOUT, tasks.finish()).await.ok();
            }
            // They end on their own; the next session must not wait for them. The daemon does.
            _ => {
                scope.spawn("ending tasks", async move { tasks.finish().await });
            }
        }
        end
    }

    async fn exchange(&mut self, dispatcher: &Dispatcher, scope: &TaskScope) -> End {
        let silence = self.interval * 3;
        let mut last_received = Instant::now();
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

impl From<ConnectError> for End {
    fn from(error: ConnectError) -> Self {
        let text = chain(&error);
        if error.is_permanent() { Self::Refused(text) } else { Self::Lost(text) }
    }
}

impl From<Status> for End {
    fn from(status: Status) -> Self {
        if let Some(error) = connect_error_in(&status) {
            return error.into();
        }
        if let Some(refusal) = certificate_refusal(&status) {
            return Self::Refused(refusal.to_owned());
        }
        let text = match status.message() {
            "" => status.code().description().to_owned(),
            text => text.to_owned(),
        };
        match status.code() {
            Code::Unauthenticated | Code::PermissionDenied | Code::FailedPrecondition => {
                Self::Refused(text)
            }
            Code::ResourceExhausted => {
                let delay = status
                    .metadata()
                    .get(RETRY_AFTER_TRAILER)
                    .and_then(|value| value.to_str().ok()?.parse().ok())
                    .map_or(Duration::ZERO, Duration::from_millis);
                Self::Busy(text, delay.min(MAX_DRAIN))
            }
            _ => Self::Lost(text),
        }
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        next = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_that_somebody_must_resolve_are_told_from_passing_trouble() {
        for (code, permanent) in [
            (Code::Unauthenticated, true),
            (Code::PermissionDenied, true),
            (Code::FailedPrecondition, true),
            (Code::Unavailable, false),
            (Code::Internal, false),
            (Code::Unknown, false),
            (Code::Cancelled, false),
        ] {
            let end = End::from(Status::new(code, "x"));
            assert_eq!(matches!(end, End::Refused(_)), permanent, "{code:?}");
        }
        let mut busy = Status::resource_exhausted("busy");
        busy.metadata_mut().insert(RETRY_AFTER_TRAILER, "2500".parse().unwrap());
        assert!(matches!(End::from(busy), End::Busy(_, d) if d == Duration::from_millis(2500)));
    }

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
