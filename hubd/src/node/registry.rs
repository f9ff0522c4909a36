//! Every known node and its live session, if it has one.
//!
//! The records are the store's, loaded at start, so that accepting a session of a node with a valid
//! certificate touches no database. What nodes report of themselves (sandbox, sync progress) is
//! kept as it came, checked for size at the door: it is shown to people and decides nothing.
//!
//! The lock covers map operations only.

mod authority;
mod identity;
mod nodes;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};

use cortex_proto::v1::{HubFrame, SandboxReport, Superseded, SyncState, SyncStatus, hub_frame};
use cortex_shared::clock::unix_ms;
use cortex_shared::ids::{NodeId, SessionId, WorkspaceId};
use cortex_shared::labels::Labels;
use cortex_shared::policy::Bound;
use cortex_shared::text::shorten;
use tokio::sync::{Notify, mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

pub use self::authority::{ForgetRefusal, NodeRefusal, policy_update};
use self::identity::Arrived;
pub use self::identity::{Arrival, ArrivalRefusal};
use self::nodes::Nodes;
use crate::counters;
use crate::rate::{Bucket, Rate};
use crate::store::{Node, Presented};

/// Frames that may wait for a node on its control stream. They are small and the node always reads
/// them; a full queue means a dead peer.
pub const OUTBOX_FRAMES: usize = 512;

/// Of a longer reason the beginning is told.
const MAX_REASON_BYTES: usize = 512;

/// How often one node's word of its workspaces becomes an event. At once as much as all the workspaces of
/// a node may have to say; and in the seven days that events are kept 60,000 more, so that no node alone
/// pushes the others' out of the 100,000 that are kept. Its sessions share it: a new one is soon begun.
const NEWS: Rate = Rate { burst: 256, per_second: 0.1 };

/// Longest text that can name a node: a name of 63 characters, or an id.
const MAX_WANTED_BYTES: usize = 64;

/// Frames on their way to a node. A queue has room for 32 of whatever is in it even while it is empty, and
/// the largest frame takes some hundred bytes: so it is one of pointers.
pub type Outbox = mpsc::Receiver<Box<HubFrame>>;

/// A handle to one session; clones share it.
#[derive(Clone, Debug)]
pub struct SessionHandle {
    /// Whose.
    pub node: NodeId,
    /// Which: tells a late farewell of an old session from the current one.
    pub id: SessionId,
    /// Grows with each session of the node.
    pub epoch: u64,
    outbox: mpsc::Sender<Box<HubFrame>>,
    cancel: CancellationToken,
}

impl SessionHandle {
    /// Queues a control frame. A session whose queue is full is ended: its peer no longer reads.
    ///
    /// # Errors
    /// If the session has ended, by this or otherwise.
    pub fn send(&self, frame: hub_frame::Frame) -> Result<(), SessionEnded> {
        if self.cancel.is_cancelled() {
            return Err(SessionEnded);
        }
        self.outbox.try_send(Box::new(HubFrame { frame: Some(frame) })).map_err(|error| {
            if matches!(error, mpsc::error::TrySendError::Full(_)) {
                tracing::warn!(node = %self.node, session = %self.id, "node reads no control frames, ending its session");
            }
            self.cancel.cancel();
            SessionEnded
        })
    }

    /// Ends the session.
    pub fn close(&self) {
        self.cancel.cancel();
    }

    /// Waits for its end.
    pub async fn ended(&self) {
        self.cancel.cancelled().await;
    }
}

/// The session is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the node is not connected")]
pub struct SessionEnded;

/// What the session task itself needs.
pub struct SessionEnds {
    /// The handle that others get.
    pub handle: SessionHandle,
    /// Frames to be sent to the node.
    pub outbox: Outbox,
    /// Cancelled when the session is to end.
    pub cancel: CancellationToken,
}

/// A node as others see it.
#[derive(Clone, Debug)]
pub struct NodeView {
    /// The record.
    pub node: Node,
    /// Its session, if it is connected.
    pub session: Option<SessionHandle>,
    /// What its kernel can enforce, by its own word.
    pub sandbox: Option<SandboxReport>,
    /// Where its last session since the hub's start came from.
    pub address: Option<SocketAddr>,
    /// The hub's clock minus the node's at the beginning of that session; 0 if it is not known.
    pub skew_ms: i64,
}

struct Known {
    node: Node,
    epoch: u64,
    session: Option<SessionHandle>,
    sandbox: Option<SandboxReport>,
    arrived: Arrived,
    sync: HashMap<WorkspaceId, SyncStatus>,
    /// See [`NEWS`].
    news: Bucket,
    /// Cancelled when the node is revoked or forgotten: its calls end with it.
    calls: CancellationToken,
    /// The record has changed since it was last written to the store.
    unsaved: bool,
}

/// See the module.
pub struct Registry {
    nodes: Mutex<Nodes>,
    changed: watch::Sender<u64>,
    /// Somebody set a policy: the next one to end may be another.
    policy_changed: Notify,
}

/// Why a name or prefix does not lead to one node.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NodeLookup {
    /// Nothing fits.
    #[error("no node matches {wanted:?}")]
    Unknown {
        /// What was asked for.
        wanted: String,
        /// A name that looks like it.
        similar: Option<String>,
    },
    /// More than one id begins like this.
    #[error("{wanted:?} is the beginning of more than one node id")]
    Ambiguous {
        /// What was asked for.
        wanted: String,
    },
}

impl Registry {
    /// A registry of these nodes, none of them connected.
    #[must_use]
    pub fn new(nodes: Vec<Node>) -> Self {
        let mut known = Nodes::default();
        for node in nodes {
            known.add(node);
        }
        Self {
            nodes: Mutex::new(known),
            changed: watch::Sender::new(0),
            policy_changed: Notify::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Nodes> {
        self.nodes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes whenever a node connects, leaves, reports or has applied a version; only the latest state matters.
    #[must_use]
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// Tells watchers that something they show has changed.
    pub fn notify(&self) {
        self.changed.send_modify(|version| *version += 1);
    }

    /// Makes a node known; whether it was not before.
    pub fn add(&self, node: Node) -> bool {
        let new = self.lock().add(node);
        self.notify();
        new
    }

    /// All nodes by name.
    #[must_use]
    pub fn all(&self) -> Vec<NodeView> {
        let mut all: Vec<_> = self.lock().values().map(Known::view).collect();
        all.sort_by(|a, b| a.node.name.cmp(&b.node.name));
        all
    }

    /// The node of this id.
    #[must_use]
    pub fn get(&self, id: NodeId) -> Option<NodeView> {
        self.lock().get(id).map(Known::view)
    }

    /// The labels of a node.
    #[must_use]
    pub fn labels_of(&self, id: NodeId) -> Option<Labels> {
        self.lock().get(id).map(|known| known.node.labels.clone())
    }

    /// The node of this name, or the only one whose id begins like this, of those that the caller may
    /// see: the others are not there for it, not even as a similar name.
    ///
    /// # Errors
    /// See [`NodeLookup`].
    pub fn find(
        &self,
        wanted: &str,
        visible: impl Fn(&Node) -> bool,
    ) -> Result<NodeView, NodeLookup> {
        if wanted.len() > MAX_WANTED_BYTES {
            let wanted: String = wanted.chars().take(16).chain(['…']).collect();
            return Err(NodeLookup::Unknown { wanted, similar: None });
        }
        let nodes = self.lock();
        // What is an id means the node with it: another one may have been given it as a name.
        let by_id = wanted.parse().ok().and_then(|id| nodes.get(id));
        let named = by_id.or_else(|| nodes.named(wanted));
        if let Some(known) = named.filter(|known| visible(&known.node)) {
            return Ok(known.view());
        }
        // Fewer characters would make a typing error run a command somewhere else.
        let long_enough = wanted.len() >= 4;
        let fits = |known: &&Known| {
            long_enough && known.node.id.to_string().starts_with(wanted) && visible(&known.node)
        };
        let fitting: Vec<&Known> = nodes.values().filter(fits).take(2).collect();
        match fitting[..] {
            [known] => Ok(known.view()),
            [_, ..] => Err(NodeLookup::Ambiguous { wanted: wanted.to_owned() }),
            [] => {
                let visible = nodes.values().filter(|known| visible(&known.node));
                let names: Vec<String> = visible.map(|known| known.node.name.clone()).collect();
                // Comparing takes a while: nobody else waits for it.
                drop(nodes);
                let similar = most_similar(wanted, names.iter().map(String::as_str));
                Err(NodeLookup::Unknown { wanted: wanted.to_owned(), similar })
            }
        }
    }

    /// Begins a session of a known node that is not revoked, unless its certificate belongs to another
    /// machine by now; an older session is told and ended. Also says how its certificate stands to the
    /// newest.
    ///
    /// # Errors
    /// See [`ArrivalRefusal`]; a session that goes on is not touched then.
    pub fn begin_session(
        &self,
        id: NodeId,
        arrival: Arrival,
        cancel: CancellationToken,
    ) -> Result<(SessionEnds, Node, Presented), ArrivalRefusal> {
        let (outbox, receiver) = mpsc::channel(OUTBOX_FRAMES);
        let mut nodes = self.lock();
        let known = nodes.get_mut(id).ok_or(NodeRefusal::Unknown)?;
        if known.node.revoked_at_ms.is_some() {
            return Err(NodeRefusal::Revoked.into());
        }
        let presented = match known.judge(&arrival) {
            Ok(presented) => presented,
            Err(refusal) => {
                drop(nodes);
                self.notify();
                return Err(refusal);
            }
        };
        // Beginning at the time keeps epochs growing over restarts of the hub without a write.
        known.epoch = (known.epoch + 1).max(unix_ms().unsigned_abs());
        let handle = SessionHandle {
            node: id,
            id: SessionId::new(),
            epoch: known.epoch,
            outbox,
            cancel: cancel.clone(),
        };
        let older = known.session.replace(handle.clone());
        known.arrive(arrival, presented);
        known.sync.clear();
        known.seen();
        let node = known.node.clone();
        nodes.online += usize::from(older.is_none());
        drop(nodes);
        counters::SESSIONS_BEGUN.add(1);
        if let Some(older) = older {
            // It may be gone already, which is as good.
            older.send(hub_frame::Frame::Superseded(Superseded { by_epoch: handle.epoch })).ok();
            older.close();
        }
        self.notify();
        Ok((SessionEnds { handle, outbox: receiver, cancel }, node, presented))
    }

    /// Ends a session, if it is still the node's current one; returns whether it was.
    pub fn end_session(&self, node: NodeId, session: SessionId) -> bool {
        let mut nodes = self.lock();
        let Some(known) = of_session(&mut nodes, node, session) else { return false };
        known.session = None;
        known.seen();
        nodes.online -= 1;
        drop(nodes);
        self.notify();
        true
    }

    /// Keeps a node's new ceiling, if it is told in its current session.
    pub fn set_ceiling(&self, node: NodeId, session: SessionId, ceiling: Bound) {
        let mut nodes = self.lock();
        let Some(known) = of_session(&mut nodes, node, session) else { return };
        known.node.ceiling = ceiling;
        known.seen();
        drop(nodes);
        self.notify();
    }

    /// Keeps what a node reports of its workspaces, if the report is of its current session. Returns what
    /// of it somebody may have to do something about, unless the node has had too much to say.
    pub fn report_sync(
        &self,
        node: NodeId,
        session: SessionId,
        reports: Vec<SyncStatus>,
        now: Instant,
    ) -> Vec<(WorkspaceId, SyncNews)> {
        let mut nodes = self.lock();
        let Some(known) = of_session(&mut nodes, node, session) else { return Vec::new() };
        let reports: HashMap<WorkspaceId, SyncStatus> = reports
            .into_iter()
            .filter_map(|r| Some((WorkspaceId::from_slice(&r.workspace_id).ok()?, r)))
            .collect();
        let news = reports.iter().flat_map(|(id, status)| {
            let news = sync_news(known.sync.get(id), status);
            news.into_iter().map(|news| (*id, news))
        });
        let mut news: Vec<_> = news.collect();
        news.retain(|_| known.news.take(NEWS, now).is_ok());
        known.sync = reports;
        drop(nodes);
        self.notify();
        news
    }

    /// Whether something that a node has done to a workspace may be told as an event; counts it.
    #[must_use]
    pub fn may_tell(&self, node: NodeId, now: Instant) -> bool {
        let mut nodes = self.lock();
        nodes.get_mut(node).is_some_and(|known| known.news.take(NEWS, now).is_ok())
    }

    /// What a node last reported of a workspace in its current session.
    #[must_use]
    pub fn sync_status(&self, node: NodeId, workspace: WorkspaceId) -> Option<SyncStatus> {
        self.lock().get(node)?.sync.get(&workspace).cloned()
    }

    /// Records that were not written to the store since the last call.
    #[must_use]
    pub fn take_unsaved(&self) -> Vec<Node> {
        let mut nodes = self.lock();
        nodes
            .values_mut()
            .filter_map(|known| std::mem::take(&mut known.unsaved).then(|| known.node.clone()))
            .collect()
    }

    /// Writing these did not succeed: they are to be written again.
    pub fn save_again(&self, ids: &[NodeId]) {
        let mut nodes = self.lock();
        for id in ids {
            if let Some(known) = nodes.get_mut(*id) {
                known.unsaved = true;
            }
        }
    }

    /// Waits until there are records to be written.
    pub async fn unsaved(&self) {
        let mut changes = self.changed.subscribe();
        loop {
            changes.mark_unchanged();
            if self.lock().values().any(|known| known.unsaved) {
                return;
            }
            // The sender is in `self`: it does not go away meanwhile.
            changes.changed().await.ok();
        }
    }

    /// How many nodes are connected.
    #[must_use]
    pub fn online(&self) -> usize {
        self.lock().online
    }

    /// All live sessions.
    #[must_use]
    pub fn sessions(&self) -> Vec<SessionHandle> {
        self.lock().values().filter_map(|known| known.session.clone()).collect()
    }
}

/// What a member reports that somebody may have to do something about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SyncNews {
    /// It holds so many deletions.
    Held(u64),
    /// It holds none any more.
    Released,
    /// It has halted, for this reason.
    Halted(String),
}

fn sync_news(before: Option<&SyncStatus>, now: &SyncStatus) -> Vec<SyncNews> {
    let held = |status: &SyncStatus| status.held_deletions > 0;
    let halted = |status: &SyncStatus| status.state() == SyncState::Halted;
    let was = |what: fn(&SyncStatus) -> bool| before.is_some_and(what);
    let mut news = Vec::new();
    match (was(held), held(now)) {
        (false, true) => news.push(SyncNews::Held(now.held_deletions)),
        (true, false) => news.push(SyncNews::Released),
        _ => {}
    }
    if halted(now) && !was(halted) {
        let mut reason = now.halted_reason.clone();
        shorten(&mut reason, MAX_REASON_BYTES);
        news.push(SyncNews::Halted(reason));
    }
    news
}

/// A node, if this is its current session: an older one has nothing to say any more.
fn of_session(nodes: &mut Nodes, node: NodeId, session: SessionId) -> Option<&mut Known> {
    let current = |known: &&mut Known| known.session.as_ref().is_some_and(|s| s.id == session);
    nodes.get_mut(node).filter(current)
}

impl Known {
    fn new(node: Node) -> Self {
        Self {
            node,
            epoch: 0,
            session: None,
            sandbox: None,
            arrived: Arrived::default(),
            sync: HashMap::new(),
            news: Bucket::full(NEWS, Instant::now()),
            calls: CancellationToken::new(),
            unsaved: false,
        }
    }

    fn view(&self) -> NodeView {
        NodeView {
            node: self.node.clone(),
            session: self.session.clone(),
            sandbox: self.sandbox.clone(),
            address: self.arrived.address,
            skew_ms: self.arrived.skew_ms,
        }
    }

    fn seen(&mut self) {
        self.node.last_seen_ms = unix_ms();
        self.unsaved = true;
    }
}

/// The candidate that differs from `wanted` by the fewest edits, if they are few.
#[must_use]
pub fn most_similar<'a>(wanted: &str, candidates: impl Iterator<Item = &'a str>) -> Option<String> {
    let limit = (wanted.len() / 3).max(1) + 1;
    candidates
        .filter(|name| name.len().abs_diff(wanted.len()) <= limit)
        .map(|name| (edit_distance(wanted.as_bytes(), name.as_bytes()), name))
        .filter(|(distance, _)| *distance <= limit)
        .min()
        .map(|(_, name)| name.to_owned())
}

/// Insertions, deletions, replacements and swaps of neighbours that lead from `a` to `b`.
fn edit_distance(a: &[u8], b: &[u8]) -> usize {
    let mut rows = vec![vec![0; b.len() + 1]; a.len() + 1];
    for i in 0..=a.len() {
        for j in 0..=b.len() {
            rows[i][j] = if i == 0 || j == 0 {
                i + j
            } else {
                let replace = rows[i - 1][j - 1] + usize::from(a[i - 1] != b[j - 1]);
                let mut best = replace.min(rows[i - 1][j] + 1).min(rows[i][j - 1] + 1);
                if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                    best = best.min(rows[i - 2][j - 2] + 1);
                }
                best
            };
        }
    }
    rows[a.len()][b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;
    pub(super) use crate::store::fixtures::node;

    pub(super) fn begin(registry: &Registry, id: NodeId) -> SessionEnds {
        let arrival = Arrival { generation: 1, ..Arrival::default() };
        registry.begin_session(id, arrival, CancellationToken::new()).unwrap().0
    }

    #[test]
    fn late_farewell_does_not_evict_the_newer_session() {
        let one = node("a");
        let id = one.id;
        let registry = Registry::new(vec![one]);
        let mut old = begin(&registry, id);
        let new = begin(&registry, id);
        assert!(old.cancel.is_cancelled());
        assert!(matches!(
            old.outbox.try_recv().unwrap().frame,
            Some(hub_frame::Frame::Superseded(_))
        ));
        assert!(new.handle.epoch > old.handle.epoch);
        assert!(!registry.end_session(id, old.handle.id));
        assert_eq!(registry.get(id).unwrap().session.unwrap().id, new.handle.id);
        assert!(registry.end_session(id, new.handle.id));
        assert!(registry.get(id).unwrap().session.is_none());
    }

    #[test]
    fn revoked_and_unknown_nodes_get_no_session() {
        let mut gone = node("a");
        gone.revoked_at_ms = Some(1);
        let id = gone.id;
        let registry = Registry::new(vec![gone]);
        for id in [id, NodeId::new()] {
            let (arrival, token) = (Arrival::default(), CancellationToken::new());
            assert!(registry.begin_session(id, arrival, token).is_err());
        }
    }

    #[test]
    fn a_node_that_reads_nothing_loses_its_session() {
        let one = node("a");
        let id = one.id;
        let registry = Registry::new(vec![one]);
        let ends = begin(&registry, id);
        let frame = || hub_frame::Frame::Heartbeat(cortex_proto::v1::Heartbeat {});
        for _ in 0..OUTBOX_FRAMES {
            ends.handle.send(frame()).unwrap();
        }
        assert_eq!(ends.handle.send(frame()), Err(SessionEnded));
        assert!(ends.cancel.is_cancelled());
    }

    #[test]
    fn holds_and_halts_of_members_are_news_once() {
        let one = node("a");
        let id = one.id;
        let registry = Registry::new(vec![one]);
        let session = begin(&registry, id).handle.id;
        let workspace = WorkspaceId::new();
        let report = |held_deletions, state: SyncState| {
            let status = SyncStatus {
                workspace_id: workspace.as_bytes().to_vec().into(),
                state: state.into(),
                held_deletions,
                halted_reason: "x".repeat(10_000),
                ..SyncStatus::default()
            };
            let news = registry.report_sync(id, session, vec![status], Instant::now());
            news.into_iter().map(|(_, news)| news).collect::<Vec<_>>()
        };
        assert_eq!(report(0, SyncState::Idle), []);
        assert_eq!(report(7, SyncState::Idle), [SyncNews::Held(7)]);
        assert_eq!(report(8, SyncState::Idle), []);
        let halted = SyncNews::Halted("x".repeat(MAX_REASON_BYTES));
        assert_eq!(report(0, SyncState::Halted), [SyncNews::Released, halted]);
        assert_eq!(report(0, SyncState::Halted), []);
    }

    #[test]
    fn a_node_that_always_has_news_is_soon_heard_no_more_and_its_status_is_kept() {
        let (liar, other) = (node("a"), node("b"));
        let ids = [liar.id, other.id];
        let registry = Registry::new(vec![liar, other]);
        let workspaces: Vec<_> = (0..100).map(|_| WorkspaceId::new()).collect();
        let now = Instant::now();
        let report = |id: NodeId, session: SessionId, held_deletions| {
            let status = |workspace: &WorkspaceId| SyncStatus {
                workspace_id: workspace.as_bytes().to_vec().into(),
                held_deletions,
                ..SyncStatus::default()
            };
            let reports = workspaces.iter().map(status).collect();
            registry.report_sync(id, session, reports, now).len()
        };
        let mut told = 0;
        for _ in 0..10 {
            // A new session does not give it more.
            let session = begin(&registry, ids[0]).handle.id;
            told += report(ids[0], session, 7) + report(ids[0], session, 0);
        }
        assert_eq!(told, NEWS.burst as usize);
        let session = begin(&registry, ids[0]).handle.id;
        assert_eq!(report(ids[0], session, 9), 0);
        assert_eq!(registry.sync_status(ids[0], workspaces[0]).unwrap().held_deletions, 9);
        assert!(!registry.may_tell(ids[0], now) && registry.may_tell(ids[1], now));
        let session = begin(&registry, ids[1]).handle.id;
        assert_eq!(report(ids[1], session, 9), 100, "others are heard");
        let later = now + std::time::Duration::from_secs(10);
        assert!(registry.may_tell(ids[0], later) && !registry.may_tell(ids[0], later));
    }

    #[test]
    fn nodes_are_found_by_name_and_by_unique_prefix_of_the_id() {
        let (a, b) = (node("web-3"), node("db"));
        let prefix = a.id.to_string();
        let all = |_: &Node| true;
        // Its name is the id of another one, from a time when it could be.
        let impostor = node(&prefix);
        let registry = Registry::new(vec![a, b, impostor]);
        let unseen = registry.find(&prefix, |node| node.name != "web-3").unwrap_err();
        assert!(matches!(unseen, NodeLookup::Unknown { .. }), "{unseen:?}");
        assert_eq!(registry.find("db", all).unwrap().node.name, "db");
        assert_eq!(registry.find(&prefix, all).unwrap().node.name, "web-3");
        // Version 7 ids of the same second begin alike.
        assert!(matches!(registry.find(&prefix[..4], all), Err(NodeLookup::Ambiguous { .. })));
        let Err(NodeLookup::Unknown { similar, .. }) = registry.find("wbe-3", all) else {
            panic!()
        };
        assert_eq!(similar.as_deref(), Some("web-3"));
        let hidden = registry.find("web-3", |node| node.name != "web-3").unwrap_err();
        assert_eq!(hidden, NodeLookup::Unknown { wanted: "web-3".into(), similar: None });
        let Err(NodeLookup::Unknown { similar, .. }) = registry.find("zzzzzzzz", all) else {
            panic!()
        };
        assert_eq!(similar, None);
        let endless = registry.find(&"a".repeat(5_000_000), all).unwrap_err().to_string();
        assert!(endless.len() < 200, "{}", endless.len());
    }
}
