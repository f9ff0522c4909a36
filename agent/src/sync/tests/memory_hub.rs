//! A hub in memory that keeps to the protocol: compare-and-set per path, packs verified, changes in
//! order. For tests of the engine only.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use bytes::Bytes;
use cortex_shared::entry::{Digest, Entry, same};
use cortex_shared::ids::{CommitId, WorkspaceEpoch, WorkspaceId};
use cortex_shared::pack::Pack;
use cortex_shared::wire_path::{RULES_NAME, WirePath};
use futures_util::StreamExt as _;
use futures_util::stream::{self, BoxStream};
use tokio::sync::watch;

use crate::sync::hub::{
    Answers, Change, ChangesPage, Commit, CommitOp, Committed, Contact, Fetched, Head, Hub,
    HubError, RejectReason, Rejected,
};
use crate::sync::index::Cursor;

/// Small, so that reading many changes takes several pages.
const PAGE_CHANGES: usize = 100;

#[derive(Clone)]
struct State {
    epoch: WorkspaceEpoch,
    seq: u64,
    /// The heads there have been.
    roots: BTreeMap<u64, Digest>,
    entries: BTreeMap<WirePath, Entry>,
    /// The content of every file there ever was.
    contents: BTreeSet<Digest>,
    /// The last change of each path; `None` where it was deleted.
    changes: BTreeMap<u64, WirePath>,
    changed_at: HashMap<WirePath, u64>,
    packs: HashMap<Digest, Bytes>,
    chunks: HashMap<Digest, Digest>,
    /// Those of commits that changed something, by their keys.
    results: HashMap<CommitId, Committed>,
    /// Chunks that were lost.
    wanted: BTreeSet<Digest>,
    /// Deletions up to this one are no longer recorded.
    log_floor: u64,
    /// Deletions are held until somebody's word, which is told with the next head.
    holds_deletions: bool,
    word: bool,
}

/// Whether a commit whose answer is lost has been taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Taken {
    Yes,
    No,
}

pub(super) struct Shared {
    state: Mutex<State>,
    head: watch::Sender<u64>,
    broken: AtomicBool,
    refuses: AtomicBool,
    /// The line breaks with the next commit: before it is taken, or before it is answered.
    loses_commit: watch::Sender<Option<Taken>>,
    /// The line breaks right after the next answer that was lost.
    breaks_after_answer: watch::Sender<bool>,
    full_after: AtomicUsize,
    /// There is no room for names either.
    crammed: AtomicBool,
    /// The line breaks after so many packs of one answer.
    packs_of_an_answer: AtomicUsize,
    /// So many packs are still taken before the line breaks.
    packs_left: AtomicUsize,
    /// The line breaks once it has been told that deletions may go.
    breaks_after_word: AtomicBool,
    /// How often somebody asked for the head.
    pub(super) heads: AtomicUsize,
    pub(super) commits: AtomicUsize,
    packs_received: watch::Sender<usize>,
    pub(super) packs_sent: AtomicUsize,
    /// Commits are made once so many packs have come.
    packs_before_commits: watch::Sender<usize>,
    large_moves: watch::Sender<bool>,
    pub(super) conflicts: Mutex<Vec<(WirePath, WirePath)>>,
}

/// The second field tells whether this is the line of large files, which can be stopped.
#[derive(Clone)]
pub(super) struct MemoryHub(pub(super) Arc<Shared>, bool);

impl MemoryHub {
    pub(super) fn new() -> Self {
        Self(
            Arc::new(Shared {
                state: Mutex::new(State {
                    epoch: WorkspaceEpoch::new(),
                    seq: 0,
                    roots: BTreeMap::new(),
                    entries: BTreeMap::new(),
                    contents: BTreeSet::new(),
                    changes: BTreeMap::new(),
                    changed_at: HashMap::new(),
                    packs: HashMap::new(),
                    chunks: HashMap::new(),
                    results: HashMap::new(),
                    wanted: BTreeSet::new(),
                    log_floor: 0,
                    holds_deletions: false,
                    word: false,
                }),
                head: watch::Sender::new(0),
                broken: AtomicBool::new(false),
                refuses: AtomicBool::new(false),
                loses_commit: watch::Sender::new(None),
                breaks_after_answer: watch::Sender::new(false),
                full_after: AtomicUsize::new(usize::MAX),
                crammed: AtomicBool::new(false),
                packs_of_an_answer: AtomicUsize::new(usize::MAX),
                packs_left: AtomicUsize::new(usize::MAX),
                breaks_after_word: AtomicBool::new(false),
                heads: AtomicUsize::new(0),
                commits: AtomicUsize::new(0),
                packs_received: watch::Sender::new(0),
                packs_sent: AtomicUsize::new(0),
                packs_before_commits: watch::Sender::new(0),
                conflicts: Mutex::default(),
                large_moves: watch::Sender::new(true),
            }),
            false,
        )
    }

    /// The line for large files.
    pub(super) fn large(&self) -> Self {
        Self(self.0.clone(), true)
    }

    /// From now on nothing moves on the line of large files, or it does again.
    pub(super) fn let_large_move(&self, moves: bool) {
        self.0.large_moves.send_replace(moves);
    }

    /// Whether a file with this content has ever been committed.
    pub(super) fn ever_had(&self, content: &[u8]) -> bool {
        self.state().contents.contains(&blake3::hash(content).into())
    }

    /// From now on commits wait until so many packs have come.
    pub(super) fn await_packs(&self, packs: usize) {
        self.0.packs_before_commits.send_replace(packs);
    }

    /// Waits until so many packs have come.
    pub(super) async fn received(&self, packs: usize) {
        self.0.packs_received.subscribe().wait_for(|received| *received >= packs).await.unwrap();
    }

    async fn line(&self) {
        if self.1 {
            let mut moves = self.0.large_moves.subscribe();
            moves.wait_for(|moves| *moves).await.unwrap();
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap()
    }

    /// The head; wakes at every commit.
    pub(super) fn subscribe(&self) -> watch::Receiver<u64> {
        self.0.head.subscribe()
    }

    pub(super) fn tree(&self) -> BTreeMap<WirePath, Entry> {
        self.state().entries.clone()
    }

    /// What there is now, to be put back later.
    pub(super) fn backup(&self) -> impl FnOnce() + use<> {
        let (hub, state) = (self.clone(), self.state().clone());
        move || *hub.state() = state
    }

    /// Commits an entry as some other member would.
    pub(super) fn put(&self, path: &str, entry: Option<Entry>) {
        let mut state = self.state();
        state.put(&WirePath::new(path).unwrap(), entry);
        state.note_head();
        self.0.head.send_replace(state.seq);
    }

    /// From now on deletions are held.
    pub(super) fn hold_deletions(&self) {
        self.state().holds_deletions = true;
    }

    /// Somebody lets them go.
    pub(super) fn confirm_deletions(&self) {
        let mut state = self.state();
        (state.holds_deletions, state.word) = (false, true);
        state.seq += 1;
        state.note_head();
        self.0.head.send_replace(state.seq);
    }

    /// Ceases to record the deletions there have been so far.
    pub(super) fn forget_deletions(&self) {
        let mut state = self.state();
        state.log_floor = state.seq;
        let State { changes, entries, .. } = &mut *state;
        changes.retain(|_, path| entries.contains_key(path));
    }

    /// Loses the pack that holds a chunk. Members will be asked for its chunks.
    pub(super) fn lose_pack_of(&self, chunk: &Digest) {
        let mut state = self.state();
        let pack = state.chunks[chunk];
        state.packs.remove(&pack);
        let lost: Vec<_> = state.chunks.extract_if(|_, held_by| *held_by == pack).collect();
        state.wanted.extend(lost.into_iter().map(|(chunk, _)| chunk));
        state.seq += 1;
        state.note_head();
        self.0.head.send_replace(state.seq);
    }

    pub(super) fn epoch(&self) -> WorkspaceEpoch {
        self.state().epoch
    }

    /// Counters of commits, packs received, packs sent.
    pub(super) fn traffic(&self) -> [usize; 3] {
        let [commits, sent] =
            [&self.0.commits, &self.0.packs_sent].map(|c| c.load(Ordering::SeqCst));
        [commits, *self.0.packs_received.borrow(), sent]
    }

    /// From now on every call fails, or works again.
    pub(super) fn set_broken(&self, broken: bool) {
        self.0.broken.store(broken, Ordering::SeqCst);
    }

    /// From now on nobody is a member, or all are again.
    pub(super) fn set_refuses(&self, refuses: bool) {
        self.0.refuses.store(refuses, Ordering::SeqCst);
    }

    /// From now on the line breaks after so many packs of each answer.
    pub(super) fn break_answers_after(&self, packs: usize) {
        self.0.packs_of_an_answer.store(packs, Ordering::SeqCst);
    }

    /// From now on there is no room for packs, or there is again.
    pub(super) fn set_full(&self, full: bool) {
        self.full_after(if full { 0 } else { usize::MAX });
    }

    /// From now on there is no room for names either, or there is again.
    pub(super) fn set_crammed(&self, crammed: bool) {
        self.0.crammed.store(crammed, Ordering::SeqCst);
    }

    /// There is room until so many packs have come.
    pub(super) fn full_after(&self, packs: usize) {
        self.0.full_after.store(packs, Ordering::SeqCst);
    }

    /// The line breaks right after the next word that deletions may go.
    pub(super) fn break_after_word(&self) {
        self.0.breaks_after_word.store(true, Ordering::SeqCst);
    }

    /// The line breaks with the next commit.
    pub(super) fn lose_commit(&self, taken: Taken) {
        self.0.loses_commit.send_replace(Some(taken));
    }

    /// Waits until it has.
    pub(super) async fn commit_lost(&self) {
        self.0.loses_commit.subscribe().wait_for(Option::is_none).await.unwrap();
    }

    /// The line works again and breaks right after the next answer that was lost, and this waits until it has.
    pub(super) async fn break_after_answer(&self) {
        self.0.breaks_after_answer.send_replace(true);
        self.set_broken(false);
        self.0.breaks_after_answer.subscribe().wait_for(|breaks| !breaks).await.unwrap();
    }

    fn lose(&self, commit: Taken) -> Result<(), HubError> {
        let lost = self.0.loses_commit.send_if_modified(|lost| {
            let loses = lost.take_if(|lost| *lost == commit).is_some();
            // Whoever waits for this may mend it at once.
            loses.then(|| self.set_broken(true)).is_some()
        });
        if lost { Err(Self::broken()) } else { Ok(()) }
    }

    /// The line breaks after so many more packs.
    pub(super) fn break_after_packs(&self, packs: usize) {
        self.0.packs_left.store(packs, Ordering::SeqCst);
    }

    fn check(&self) -> Result<(), HubError> {
        if self.0.broken.load(Ordering::SeqCst) {
            return Err(Self::broken());
        }
        if self.0.refuses.load(Ordering::SeqCst) {
            let (code, message) = ("not_a_member".to_owned(), "refused by the test".to_owned());
            return Err(HubError::Refused { code, message });
        }
        Ok(())
    }

    fn broken() -> HubError {
        HubError::Unavailable { message: "broken by the test".to_owned() }
    }

    fn take_pack(&self, bytes: Bytes) -> Result<Digest, HubError> {
        let left = self
            .0
            .packs_left
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1));
        if left.is_err() {
            self.set_broken(true);
        }
        self.check()?;
        if self.0.full_after.load(Ordering::SeqCst) <= *self.0.packs_received.borrow() {
            return Err(HubError::Full { message: "the hub's disk is full".to_owned() });
        }
        let pack = Pack::parse(bytes).map_err(HubError::protocol)?;
        pack.verify().map_err(HubError::protocol)?;
        let mut state = self.state();
        for indexed in pack.index() {
            state.chunks.insert(indexed.chunk.hash, pack.hash());
            state.wanted.remove(&indexed.chunk.hash);
        }
        state.packs.insert(pack.hash(), pack.bytes().clone());
        self.0.packs_received.send_modify(|packs| *packs += 1);
        Ok(pack.hash())
    }
}

impl State {
    fn head(&self) -> Head {
        let root = self.roots.last_key_value().map_or(Digest::ZERO, |(_, root)| *root);
        Head { epoch: self.epoch, seq: self.seq, root }
    }

    fn note_head(&mut self) {
        let mut hasher = blake3::Hasher::new();
        for (path, entry) in &self.entries {
            hasher.update(path.as_bytes()).update(entry.identity().as_bytes());
        }
        self.roots.insert(self.seq, hasher.finalize().into());
    }

    /// As the hub does.
    fn check_history(&mut self, known: Option<Head>) -> Result<(), HubError> {
        let Some(known) = known else { return Ok(()) };
        if known.epoch == self.epoch
            && known.seq > 0
            && self.roots.get(&known.seq) != Some(&known.root)
        {
            self.epoch = WorkspaceEpoch::new();
            self.seq = self.seq.max(known.seq) + 1;
            self.roots.clear();
            self.note_head();
        }
        if known.epoch == self.epoch {
            return Ok(());
        }
        let code = "epoch_changed".to_owned();
        Err(HubError::Refused { code, message: "another epoch".to_owned() })
    }

    fn put(&mut self, path: &WirePath, entry: Option<Entry>) {
        self.seq += 1;
        if let Some(old) = self.changed_at.insert(path.clone(), self.seq) {
            self.changes.remove(&old);
        }
        self.changes.insert(self.seq, path.clone());
        if let Some(Entry::File(file)) = &entry {
            self.contents.insert(file.content);
        }
        match entry {
            Some(entry) => self.entries.insert(path.clone(), entry),
            None => self.entries.remove(path),
        };
    }

    /// Whether it changed anything.
    fn apply(&mut self, op: &CommitOp) -> Result<bool, RejectReason> {
        let current = self.entries.get(&op.path);
        if same(current, op.new.as_ref()) {
            return Ok(false);
        }
        if current.map(Entry::identity) != op.expected {
            return Err(RejectReason::Conflict);
        }
        if op.new.is_none() && self.holds_deletions {
            return Err(RejectReason::Held);
        }
        if op.new.is_some()
            && op
                .path
                .parent()
                .is_some_and(|parent| !self.entries.get(&parent).is_some_and(Entry::is_dir))
        {
            return Err(RejectReason::NoParent);
        }
        let has_children = self
            .entries
            .range(op.path.clone()..)
            .nth(1)
            .is_some_and(|(path, _)| path.is_below(&op.path));
        if has_children && !op.new.as_ref().is_some_and(Entry::is_dir) {
            return Err(RejectReason::NotEmpty);
        }
        if let Some(entry) = &op.new {
            if entry.check().is_err() {
                return Err(RejectReason::Invalid);
            }
            if let Entry::File(file) = entry
                && file.chunks().any(|chunk| !self.chunks.contains_key(&chunk.hash))
            {
                return Err(RejectReason::MissingChunks);
            }
        }
        self.put(&op.path, op.new.clone());
        Ok(true)
    }
}

impl Hub for MemoryHub {
    fn moved_bytes(&self) -> u64 {
        0
    }

    async fn head(&self, _: WorkspaceId, known: Option<Head>) -> Result<Contact, HubError> {
        self.0.heads.fetch_add(1, Ordering::SeqCst);
        self.check()?;
        let mut state = self.state();
        state.check_history(known).ok();
        let wanted = state.wanted.iter().copied().collect();
        let confirm_deletes = std::mem::take(&mut state.word);
        if confirm_deletes && self.0.breaks_after_word.swap(false, Ordering::SeqCst) {
            self.set_broken(true);
        }
        Ok(Contact { head: state.head(), wanted, confirm_deletes })
    }

    async fn have(&self, _: WorkspaceId, chunks: &[Digest]) -> Result<Vec<bool>, HubError> {
        self.check()?;
        let state = self.state();
        Ok(chunks.iter().map(|chunk| state.chunks.contains_key(chunk)).collect())
    }

    async fn put_packs(
        &self,
        _: WorkspaceId,
        packs: BoxStream<'static, Bytes>,
    ) -> Result<Answers<Digest>, HubError> {
        self.line().await;
        self.check()?;
        let hub = self.clone();
        Ok(packs.map(move |pack| hub.take_pack(pack)).boxed())
    }

    async fn commit(&self, _: WorkspaceId, commit: Commit) -> Result<Committed, HubError> {
        self.check()?;
        let mut before = self.0.packs_before_commits.subscribe();
        loop {
            let packs = *before.borrow_and_update();
            if *self.0.packs_received.borrow() >= packs {
                break;
            }
            tokio::select! {
                () = self.received(packs) => {}
                changed = before.changed() => changed.unwrap(),
            }
        }
        self.check()?;
        let only_names = commit.ops.iter().all(|op| op.new.is_some());
        if only_names && !commit.ops.is_empty() && self.0.crammed.load(Ordering::SeqCst) {
            return Err(HubError::Full { message: "the hub's disk is full".to_owned() });
        }
        self.lose(Taken::No)?;
        let mut state = self.state();
        state.check_history(commit.known)?;
        if let Some(first) = state.results.get(&commit.id) {
            self.0.breaks_after_answer.send_if_modified(|breaks| {
                let breaks = std::mem::take(breaks);
                breaks.then(|| self.set_broken(true)).is_some()
            });
            return Ok(first.clone());
        }
        if commit.epoch != state.epoch {
            assert!(commit.ops.is_empty(), "a member that says what it knows is told before");
            let code = "epoch_changed".to_owned();
            return Err(HubError::Refused { code, message: "another history".to_owned() });
        }
        // What became of another one is only asked.
        self.0.commits.fetch_add(usize::from(!commit.ops.is_empty()), Ordering::SeqCst);
        let (mut rejected, mut seqs) = (Vec::new(), Vec::new());
        let rules = WirePath::new(RULES_NAME).unwrap();
        let now = match state.entries.get(&rules) {
            Some(Entry::File(file)) => Some(file.content),
            _ => None,
        };
        for (index, op) in commit.ops.iter().enumerate() {
            let may = now == commit.rules
                || [Some(&op.path), op.conflict_of.as_ref()].contains(&Some(&rules));
            match if may { state.apply(op) } else { Err(RejectReason::Rules) } {
                Ok(changed) => {
                    seqs.push(if changed { state.seq } else { 0 });
                    if let Some(original) = &op.conflict_of {
                        self.0.conflicts.lock().unwrap().push((original.clone(), op.path.clone()));
                    }
                }
                Err(reason) => {
                    let current = state.entries.get(&op.path).cloned();
                    rejected.push(Rejected { index, reason, current });
                }
            }
        }
        let changes = seqs.iter().any(|seq| *seq != 0);
        if changes {
            state.note_head();
        }
        self.0.head.send_replace(state.seq);
        let Head { seq, root, .. } = state.head();
        let result = Committed { seq, root, rejected, seqs };
        if changes {
            state.results.insert(commit.id, result.clone());
        }
        drop(state);
        self.lose(Taken::Yes)?;
        Ok(result)
    }

    async fn changes(
        &self,
        _: WorkspaceId,
        after: u64,
        known: Option<Head>,
    ) -> Result<Answers<ChangesPage>, HubError> {
        self.check()?;
        let mut state = self.state();
        state.check_history(known)?;
        let Head { seq: head_seq, root, .. } = state.head();
        let complete = after > 0 && after < state.log_floor;
        let after = if complete { 0 } else { after };
        let all: Vec<_> = state
            .changes
            .range(after + 1..)
            .map(|(seq, path)| {
                let entry = state.entries.get(path).cloned();
                (*seq, Change { path: path.clone(), entry })
            })
            .collect();
        let mut pages: Vec<_> = all
            .chunks(PAGE_CHANGES)
            .map(|part| ChangesPage {
                changes: part.iter().map(|(_, change)| change.clone()).collect(),
                last_seq: part[part.len() - 1].0,
                head_seq,
                root,
                complete,
            })
            .collect();
        if pages.is_empty() {
            let (changes, last_seq) = (Vec::new(), head_seq);
            pages.push(ChangesPage { changes, last_seq, head_seq, root, complete });
        }
        if let Some(last) = pages.last_mut() {
            last.last_seq = head_seq;
        }
        Ok(stream::iter(pages.into_iter().map(Ok)).boxed())
    }

    async fn get_packs(
        &self,
        _: WorkspaceId,
        chunks: &[Digest],
    ) -> Result<Answers<Fetched>, HubError> {
        self.line().await;
        self.check()?;
        let state = self.state();
        let missing: Vec<_> =
            chunks.iter().filter(|chunk| !state.chunks.contains_key(*chunk)).copied().collect();
        let mut names: Vec<_> =
            chunks.iter().filter_map(|chunk| state.chunks.get(chunk)).copied().collect();
        names.sort();
        names.dedup();
        let mut packs: Vec<_> =
            names.iter().map(|name| Ok(Fetched::Pack(state.packs[name].clone()))).collect();
        if !missing.is_empty() {
            packs.insert(0, Ok(Fetched::Missing(missing)));
        }
        let whole = self.0.packs_of_an_answer.load(Ordering::SeqCst);
        if packs.len() > whole {
            packs.truncate(whole);
            packs.push(Err(HubError::Unavailable { message: "broken".to_owned() }));
        }
        let sent = packs.iter().filter(|answer| matches!(answer, Ok(Fetched::Pack(_)))).count();
        self.0.packs_sent.fetch_add(sent, Ordering::SeqCst);
        Ok(stream::iter(packs).boxed())
    }

    async fn ack_applied(&self, _: WorkspaceId, cursor: Cursor) -> Result<(), HubError> {
        self.check()?;
        // As the real one: it was put back from a backup since.
        if cursor.seq > self.state().seq {
            let code = "beyond_head".to_owned();
            return Err(HubError::Refused { code, message: "beyond the head".to_owned() });
        }
        Ok(())
    }
}
