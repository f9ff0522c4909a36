//! A store to test with, and what a member makes of its answers.

use std::collections::BTreeMap;
use std::sync::Arc;

use cortex_shared::chunk::{ChunkRef, Recipe};
use cortex_shared::entry::{Digest, DirDigest, Entry, File};
use cortex_shared::ids::{CommitId, NodeId, WorkspaceEpoch};
use cortex_shared::tasks::TaskScope;
use cortex_shared::wire_path::WirePath;
use rand::RngExt as _;
use rand::rngs::StdRng;

use super::super::{
    Author, Commit, CommitResult, Head, KnownRules, Op, PackRecord, WorkspaceStore,
};
use super::Engine;

/// A store in a folder of its own.
pub(super) struct Fixture {
    pub(super) folder: tempfile::TempDir,
    pub(super) scope: TaskScope,
    pub(super) store: Arc<dyn WorkspaceStore>,
    pub(super) epoch: WorkspaceEpoch,
    pub(super) node: NodeId,
}

impl Fixture {
    pub(super) async fn new(engine: &impl Engine) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let scope = TaskScope::new();
        let store = engine.open(folder.path(), &scope).await;
        let epoch = store.watch_head().borrow().epoch;
        Self { folder, scope, store, epoch, node: NodeId::new() }
    }

    /// What a member that was told of this version learns, and what follows.
    pub(super) async fn check_history(&self, known: Head) -> Head {
        match self.store.is_known(known).await.unwrap() {
            true => *self.store.watch_head().borrow(),
            false => self.store.restart_if_lost(known).await.unwrap(),
        }
    }

    pub(super) async fn reopen(self, engine: &impl Engine) -> Self {
        let Self { folder, scope, store, epoch, node } = self;
        scope.cancel();
        scope.finish().await;
        drop(store);
        let scope = TaskScope::new();
        let store = engine.open(folder.path(), &scope).await;
        Self { folder, scope, store, epoch, node }
    }

    pub(super) fn batch(&self, ops: Vec<Op>) -> Commit {
        let ops = ops.into_iter().map(Ok).collect();
        let author = Author::Node(self.node);
        let rules = KnownRules::Unsaid;
        Commit { id: CommitId::new(), author, epoch: self.epoch, rules, ops }
    }

    pub(super) async fn commit(&self, ops: Vec<Op>) -> CommitResult {
        self.store.commit(self.batch(ops)).await.unwrap()
    }

    /// Commits what must be accepted.
    pub(super) async fn set(&self, ops: Vec<Op>) -> CommitResult {
        let result = self.commit(ops).await;
        assert_eq!(result.rejected, [], "all accepted");
        result
    }

    /// Makes chunks present, as one pack.
    pub(super) async fn add_chunks(&self, contents: &[&[u8]]) -> Digest {
        let chunks: Vec<_> = contents.iter().map(|data| ChunkRef::of(data).unwrap()).collect();
        let hash = Digest::of(&chunks.iter().flat_map(|c| *c.hash.as_bytes()).collect::<Vec<_>>());
        let record = PackRecord { hash, bytes: 100, chunks };
        self.store.add_pack(record).await.unwrap();
        hash
    }

    /// The whole tree, read in pages of about `budget` bytes, checked against the root digest.
    pub(super) async fn tree(&self, budget: usize) -> BTreeMap<WirePath, Entry> {
        let mut tree = BTreeMap::new();
        let page = read_on(&*self.store, &mut tree, 0, budget).await;
        assert_root(&tree, &page);
        tree
    }
}

pub(super) fn assert_root(tree: &BTreeMap<WirePath, Entry>, head: &Head) {
    let expected = if head.seq == 0 { Digest::ZERO } else { root_digest(tree) };
    assert_eq!(head.root, expected, "root digest at {}", head.seq);
}

/// Reads from `after` to the head and applies it; returns that head.
pub(super) async fn read_on(
    store: &dyn WorkspaceStore,
    tree: &mut BTreeMap<WirePath, Entry>,
    mut after: u64,
    budget: usize,
) -> Head {
    loop {
        let page = store.changes(after, budget).await.unwrap();
        for change in page.changes {
            assert!(change.seq > after && change.seq <= page.last_seq);
            after = change.seq;
            match change.entry {
                Some(entry) => drop(tree.insert(change.path, entry)),
                None => drop(tree.remove(&change.path)),
            }
        }
        after = page.last_seq;
        if after == page.head.seq {
            return page.head;
        }
    }
}

/// The digest of a tree, computed from nothing but the tree.
pub(crate) fn root_digest(tree: &BTreeMap<WirePath, Entry>) -> Digest {
    fn digest_of(tree: &BTreeMap<WirePath, Entry>, parent: Option<&WirePath>) -> Digest {
        let mut builder = DirDigest::new();
        // The order of paths is that of a walk, so children come sorted by name.
        for (path, entry) in tree.iter().filter(|(path, _)| path.parent().as_ref() == parent) {
            let digest = match entry {
                Entry::Dir => digest_of(tree, Some(path)),
                _ => entry.identity(),
            };
            builder.child(path.name(), entry.kind(), &digest);
        }
        builder.finish()
    }
    digest_of(tree, None)
}

pub(super) fn path(text: &str) -> WirePath {
    WirePath::new(text).unwrap()
}

pub(crate) fn file(content: &[u8]) -> Entry {
    Entry::File(File {
        content: Digest::of(content),
        size: content.len() as u64,
        executable: false,
        mtime_ns: 1,
        recipe: Recipe::default(),
    })
}

pub(super) fn link(target: &str) -> Entry {
    Entry::Link { target: target.as_bytes().into() }
}

pub(crate) fn op(at: &str, expected: Option<&Entry>, new: Option<Entry>) -> Op {
    let expected = expected.map(Entry::identity);
    Op { path: path(at), expected, new, conflict_of: None }
}

pub(super) fn create(at: &str, new: Entry) -> Op {
    op(at, None, Some(new))
}

/// A random operation that is valid for the tree, and what it makes of the tree.
pub(super) fn random_op(rng: &mut StdRng, tree: &mut BTreeMap<WirePath, Entry>) -> Option<Op> {
    let names = ["a", "b", "c", "a-b"];
    let depth = rng.random_range(1..=3);
    let text: Vec<_> = (0..depth).map(|_| names[rng.random_range(0..names.len())]).collect();
    let path = path(&text.join("/"));
    if path.ancestors().any(|above| tree.get(&above) != Some(&Entry::Dir)) {
        return None;
    }
    let current = tree.get(&path).cloned();
    let has_children = tree.keys().any(|other| other.is_below(&path));
    let new = match rng.random_range(0..4) {
        0 => None,
        1 => Some(Entry::Dir),
        _ => Some(link(&rng.random_range(0..50).to_string())),
    };
    if has_children && new != Some(Entry::Dir) {
        return None;
    }
    match &new {
        Some(entry) => drop(tree.insert(path.clone(), entry.clone())),
        None => drop(tree.remove(&path)),
    }
    let expected = current.as_ref().map(Entry::identity);
    Some(Op { path, expected, new, conflict_of: None })
}
