//! Many emulated nodes, each with its own key, connection and session, that come back when they are lost.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use cortex_shared::backoff::Backoff;
use cortex_shared::tasks::TaskScope;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::time::Instant;

use super::BenchError;
use super::client::{Key, Login, Target};
use super::node::EmulatedNode;
use super::process::HubProcess;

/// Nodes that join or connect for the first time at once. Reconnecting is bounded by nothing here.
const ARRIVING: usize = 64;
/// Bounds of the delay before a node comes back, as the agent has them.
const BACKOFF: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

/// What all of them tell.
#[derive(Default)]
pub(super) struct Seen {
    online: watch::Sender<usize>,
    lost: AtomicU64,
    returns: Mutex<Vec<Instant>>,
}

/// See the module. Its nodes end with the scope they were started in.
pub(super) struct Crowd {
    seen: Arc<Seen>,
    online: watch::Receiver<usize>,
    names: Vec<String>,
}

impl Crowd {
    /// Joins and connects so many nodes, and keeps them.
    pub(super) async fn gather(
        hub: &HubProcess,
        count: u32,
        scope: &TaskScope,
    ) -> Result<Self, BenchError> {
        Self::gather_over(hub, Arc::clone(hub.target()), count, scope).await
    }

    /// The same, over a line of their own.
    pub(super) async fn gather_over(
        hub: &HubProcess,
        target: Arc<Target>,
        count: u32,
        scope: &TaskScope,
    ) -> Result<Self, BenchError> {
        let token: Arc<str> = hub.invite(count).await?.into();
        let (sender, online) = watch::channel(0);
        let seen = Arc::new(Seen { online: sender, ..Seen::default() });
        let arriving = Arc::new(Semaphore::new(ARRIVING));
        let (joined, mut joins) = mpsc::channel(ARRIVING);
        for _ in 0..count {
            let (target, token, joined) = (Arc::clone(&target), Arc::clone(&token), joined.clone());
            let (seen, arriving) = (Arc::clone(&seen), Arc::clone(&arriving));
            let stop = scope.token().clone();
            scope.spawn("emulated node", async move {
                let place = arriving.acquire().await;
                let arrived = join(target, &token).await;
                drop(place);
                match arrived {
                    Err(error) => joined.send(Err(error)).await.unwrap_or_default(),
                    Ok((member, node)) => {
                        // Whoever waited for it has met another's error.
                        joined.send(Ok(member.name.clone())).await.ok();
                        drop(joined);
                        stop.run_until_cancelled(member.keep(node, &seen)).await;
                    }
                }
            });
        }
        drop(joined);
        let mut names = Vec::with_capacity(count as usize);
        while let Some(name) = joins.recv().await {
            names.push(name?);
        }
        let mut crowd = Self { seen, online, names };
        crowd.all_online().await;
        Ok(crowd)
    }

    /// The names of its nodes.
    pub(super) fn names(&self) -> &[String] {
        &self.names
    }

    /// Sessions that ended and were not asked to.
    pub(super) fn lost(&self) -> u64 {
        self.seen.lost.load(Ordering::Relaxed)
    }

    /// Waits until all of them have a session.
    pub(super) async fn all_online(&mut self) {
        let count = self.names.len();
        // The sender lives as long as this.
        self.online.wait_for(|online| *online == count).await.ok();
    }

    /// Waits until each of them has lost a session since `lost` were, and has another one. When each
    /// of those was welcomed.
    pub(super) async fn all_back(&mut self, lost: u64) -> Vec<Instant> {
        let (count, seen) = (self.names.len(), Arc::clone(&self.seen));
        let all = |online: &usize| {
            let gone = seen.lost.load(Ordering::Relaxed) - lost;
            *online == count && gone >= count as u64
        };
        self.online.wait_for(all).await.ok();
        std::mem::take(&mut *self.seen.returns.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// One of them.
struct Member {
    target: Arc<Target>,
    login: Login,
    generation: u64,
    name: String,
}

async fn join(target: Arc<Target>, token: &str) -> Result<(Member, EmulatedNode), BenchError> {
    let key = Key::make()?;
    let channel = target.connect(None).await?;
    let joined = target.join(channel, token, &key).await?;
    let login = key.certified(&joined.certificate_der);
    let node = EmulatedNode::connect(&target, &login, joined.generation).await?;
    let member = Member { target, login, generation: joined.generation, name: joined.name };
    Ok((member, node))
}

impl Member {
    /// Keeps a session for ever.
    async fn keep(self, first: EmulatedNode, seen: &Seen) {
        let mut backoff = Backoff::new(BACKOFF.0, BACKOFF.1);
        let mut node = Some(first);
        loop {
            if let Some(node) = node.take() {
                let _online = Online::new(seen);
                let begun = Instant::now();
                if let Err(error) = node.serve().await {
                    tracing::debug!(node = self.name, %error, "an emulated node lost its session");
                }
                seen.lost.fetch_add(1, Ordering::Relaxed);
                if begun.elapsed() >= BACKOFF.1 {
                    backoff.reset();
                }
            }
            tokio::time::sleep(backoff.next_delay()).await;
            node = EmulatedNode::connect(&self.target, &self.login, self.generation).await.ok();
            if node.is_some() {
                let mut returns = seen.returns.lock().unwrap_or_else(PoisonError::into_inner);
                returns.push(Instant::now());
            }
        }
    }
}

/// Counted as connected, as long as this exists.
struct Online<'a>(&'a Seen);

impl<'a> Online<'a> {
    fn new(seen: &'a Seen) -> Self {
        seen.online.send_modify(|online| *online += 1);
        Self(seen)
    }
}

impl Drop for Online<'_> {
    fn drop(&mut self) {
        self.0.online.send_modify(|online| *online -= 1);
    }
}
