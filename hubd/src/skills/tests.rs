//! Promotions on real databases: what changes, what is shared, and what is left after a stop in between.

use std::collections::{BTreeMap, HashSet};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use cortex_shared::chunk::ChunkRef;
use cortex_shared::clock::unix_ms;
use cortex_shared::entry::{Digest, Entry};
use cortex_shared::ids::{CommitId, NodeId};
use cortex_shared::library::link_target;
use cortex_shared::pack::{Pack, PackBuilder};
use cortex_shared::tasks::TaskScope;
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};

use super::change::{commit, place_of, put_link};
use super::check::{Content, create, digest_of};
use super::*;
use crate::events::{EventBus, EventLimits};
use crate::node::membership::Membership;
use crate::node::registry::Registry;
use crate::store::sqlite::SqliteStore;
use crate::store::workspace::contract::{file, op, root_digest};
use crate::store::workspace::{Author, Commit, KnownRules, Op};
use crate::store::{Actor, Scope, SkillOrigin, Workspace};
use crate::sync::ContentLimits;

/// A hub's library, with one workspace beside it.
struct Hub {
    scope: TaskScope,
    store: Arc<dyn Store>,
    content: Arc<Workspaces>,
    skills: Skills,
    workspace: Workspace,
}

fn path(text: &str) -> WirePath {
    WirePath::new(text).unwrap()
}

impl Hub {
    async fn open(folder: &Path) -> Self {
        Self::open_keeping(folder, Duration::from_secs(3600)).await
    }

    async fn open_keeping(folder: &Path, keep_for: Duration) -> Self {
        let scope = TaskScope::new();
        let store: Arc<dyn Store> =
            Arc::new(SqliteStore::open(folder.join("hub.db"), &scope).await.unwrap());
        let limits = ContentLimits::default();
        let content = Workspaces::open(&folder.join("ws"), limits, scope.clone(), scope.clone());
        let content = Arc::new(content.unwrap());
        let membership = Arc::new(Membership::default());
        membership.reload(&*store).await.unwrap();
        let registry = Arc::new(Registry::new(Vec::new()));
        let events = EventBus::in_memory(EventLimits::default());
        let members = Members::new(membership, registry, store.clone(), content.clone(), events);
        let members = Arc::new(members);
        let workspace = match members.membership.by_name("w") {
            Some(workspace) => workspace,
            None => members.create("w", Scope::default(), &ann()).await.unwrap(),
        };
        let opened = Skills::open(store.clone(), content.clone(), members, keep_for).await;
        Self { scope, store, content, skills: opened.unwrap(), workspace }
    }

    async fn close(self) {
        self.scope.cancel();
        self.scope.finish().await;
    }

    async fn source(&self) -> Arc<WorkspaceHub> {
        self.content.workspace(self.workspace.id).await.unwrap()
    }

    /// Sends files as one pack, and commits them as a member, with their directories.
    async fn write(&self, files: &[(&str, &[u8])]) {
        let source = self.source().await;
        let mut builder = PackBuilder::new(1).unwrap();
        for (_, data) in files {
            builder.push(ChunkRef::of(data).unwrap(), data);
        }
        let (_, bytes) = builder.finish().unwrap();
        let node = NodeId::new();
        let room = source.incoming_room(node, bytes.len()).await;
        source.put_pack(bytes, room).await.unwrap();
        let mut ops: Vec<Op> = Vec::new();
        for (name, data) in files {
            let mut above: Vec<WirePath> = path(name).ancestors().collect();
            above.reverse();
            ops.extend(above.into_iter().map(|path| create(path, Entry::Dir)));
            let before = source.entry(path(name)).await.unwrap();
            ops.push(op(name, before.as_ref(), Some(file(data))));
        }
        // What was there is there.
        let ops = ops.into_iter().map(Ok).collect();
        let epoch = source.head().borrow().epoch;
        let author = Author::Node(node);
        let result = source
            .commit(Commit { id: CommitId::new(), author, epoch, rules: KnownRules::Unsaid, ops })
            .await;
        assert!(result.unwrap().rejected.is_empty());
    }

    fn promotion(&self, at: &str, expected: Option<u64>) -> Promotion {
        let (workspace, path) = (self.workspace.clone(), path(at));
        Promotion { workspace, path, skill: "lint".to_owned(), expected, by: ann() }
    }

    async fn promote(&self, at: &str, expected: Option<u64>) -> Result<Promoted, SkillError> {
        self.skills.promote(self.promotion(at, expected)).await
    }

    async fn tree(&self, id: WorkspaceId) -> BTreeMap<String, Entry> {
        let page = self.content.workspace(id).await.unwrap().changes(0, usize::MAX).await.unwrap();
        let tree: BTreeMap<_, _> =
            page.changes.into_iter().filter_map(|c| Some((c.path, c.entry?))).collect();
        assert!(page.head.seq == 0 || page.head.root == root_digest(&tree));
        tree.into_iter().map(|(path, entry)| (path.to_string(), entry)).collect()
    }

    async fn library(&self) -> Vec<String> {
        self.tree(WorkspaceId::LIBRARY).await.into_keys().collect()
    }

    async fn is_link(&self, at: &str) -> bool {
        let target = link_target(&path(at), "lint").into();
        self.source().await.entry(path(at)).await.unwrap() == Some(Entry::Link { target })
    }

    /// A version as it is recorded before anything of it is done.
    async fn begun(&self, at: &str) -> (SkillVersion, Content) {
        let tree = self.source().await.subtree(path(at), 100).await.unwrap().unwrap();
        let content = Content::check(path(at), tree.digest, tree.entries).unwrap();
        let version = SkillVersion {
            id: CommitId::new(),
            skill: "lint".to_owned(),
            version: 1,
            origin: SkillOrigin { workspace: self.workspace.id, path: path(at) },
            restored_from: None,
            digest: content.digest,
            entries: content.entries.len() as u64,
            content_bytes: content.bytes,
            by: ann(),
            at_ms: unix_ms(),
            pending: true,
            ended_at_ms: None,
        };
        self.store.begin_skill(version.clone()).await.unwrap();
        (version, content)
    }

    /// Goes on as far as the library's tree.
    async fn in_library(&self, version: &SkillVersion, content: &Content) {
        let library = self.content.workspace(WorkspaceId::LIBRARY).await.unwrap();
        library.adopt(&*self.source().await, content.chunks()).await.unwrap();
        let (top, place) = place_of(version).unwrap();
        let mut ops = vec![create(top, Entry::Dir)];
        ops.extend(content.put_at(&place).unwrap());
        library.commit_whole(commit(&library, version.id, &ann(), ops)).await.unwrap();
    }

    async fn audited(&self, action: &str) -> usize {
        let lines = self.store.audit_page(None, 1000).await.unwrap();
        lines.iter().filter(|line| line.action == action).count()
    }
}

fn ann() -> Actor {
    Actor::from("ann")
}

#[tokio::test]
async fn a_directory_becomes_a_version_and_a_link_and_nothing_else_changes() {
    let folder = tempfile::tempdir().unwrap();
    let hub = Hub::open(folder.path()).await;
    hub.write(&[("tools/lint/a", b"a"), ("tools/lint/sub/b", b"b"), ("tools/other", b"c")]).await;
    let promoted = hub.promote("tools/lint", None).await.unwrap();
    assert_eq!((promoted.version.version, promoted.unchanged), (1, false));
    assert!(promoted.version.is_current());
    assert_eq!(hub.library().await, ["lint", "lint/1", "lint/1/a", "lint/1/sub", "lint/1/sub/b"]);
    assert!(hub.is_link("tools/lint").await);
    let left: Vec<String> = hub.tree(hub.workspace.id).await.into_keys().collect();
    assert_eq!(left, ["tools", "tools/lint", "tools/other"]);
    // Asking again changes nothing.
    let head = hub.source().await.head().borrow().seq;
    assert!(hub.promote("tools/lint", None).await.unwrap().unchanged);
    assert_eq!(hub.source().await.head().borrow().seq, head);
    assert_eq!(hub.audited("skill.promoted").await, 1);
    hub.close().await;
}

#[tokio::test]
async fn packs_are_shared_only_where_the_skill_is_all_that_is_in_them() {
    let folder = tempfile::tempdir().unwrap();
    let hub = Hub::open(folder.path()).await;
    hub.write(&[("lint/a", b"in a pack of its own"), ("lint/b", b"so is this")]).await;
    hub.write(&[("lint/c", b"beside a secret"), ("secret", b"not for everybody")]).await;
    hub.promote("lint", None).await.unwrap();
    let packs = |id: WorkspaceId| folder.path().join(format!("ws/{id}/packs"));
    let skill: HashSet<Digest> = [&b"in a pack of its own"[..], b"so is this", b"beside a secret"]
        .into_iter()
        .map(Digest::of)
        .collect();
    let mut shared = 0;
    let mut found = HashSet::new();
    for entry in std::fs::read_dir(packs(WorkspaceId::LIBRARY)).unwrap() {
        let entry = entry.unwrap();
        shared += usize::from(entry.metadata().unwrap().nlink() == 2);
        let pack = Pack::parse(std::fs::read(entry.path()).unwrap().into()).unwrap();
        pack.verify().unwrap();
        found.extend(pack.index().iter().map(|indexed| indexed.chunk.hash));
    }
    assert_eq!(shared, 1, "one is the same file");
    assert_eq!(found, skill, "and nothing of the workspace's other content is there");
    // The library does not need the workspace any more.
    hub.content.delete(hub.workspace.id).await.unwrap();
    let library = hub.content.workspace(WorkspaceId::LIBRARY).await.unwrap();
    library.collect(unix_ms(), unix_ms() + 1).await.unwrap();
    for hash in skill {
        let packs = library.packs_of(vec![hash]).await.unwrap();
        assert!(library.read_pack(packs.packs[0].0).await.unwrap().is_some());
    }
    hub.close().await;
}

#[tokio::test]
async fn who_may_take_the_place_of_a_version_is_who_knows_it() {
    let folder = tempfile::tempdir().unwrap();
    let hub = Hub::open(folder.path()).await;
    hub.write(&[("one/a", b"one"), ("two/a", b"two"), ("same/a", b"one")]).await;
    assert!(matches!(hub.promote("one", Some(4)).await, Err(SkillError::SkillChanged { .. })));
    hub.promote("one", Some(0)).await.unwrap();
    for expected in [None, Some(0), Some(2)] {
        let refused = hub.promote("two", expected).await;
        let Err(SkillError::SkillChanged { surprise }) = refused else { panic!("{expected:?}") };
        assert_eq!(surprise.current().unwrap().version, 1);
        assert!(!hub.is_link("two").await);
    }
    let same = hub.promote("same", None).await.unwrap();
    assert!(same.unchanged && hub.is_link("same").await, "what is equal takes nobody's place");
    assert_eq!(hub.promote("two", Some(1)).await.unwrap().version.version, 2);
    assert_eq!(hub.library().await, ["lint", "lint/2", "lint/2/a"], "nodes have one version");
    hub.close().await;
}

#[tokio::test]
async fn what_cannot_be_a_skill_is_refused_and_stays() {
    let folder = tempfile::tempdir().unwrap();
    let hub = Hub::open(folder.path()).await;
    hub.write(&[("dir/sub/a", b"a"), ("file", b"b")]).await;
    let source = hub.source().await;
    let link = |target: &str| Entry::Link { target: target.as_bytes().into() };
    for (target, allowed) in [("../../file", false), ("/etc", false), ("../sub/a", true)] {
        let ops = vec![create(path("dir/sub/link"), link(target))];
        source.commit_whole(commit(&source, CommitId::new(), &ann(), ops)).await.unwrap();
        let promoted = hub.promote("dir", None).await;
        assert_eq!(promoted.is_ok(), allowed, "{target}");
        if !allowed {
            assert!(matches!(promoted, Err(SkillError::LinkOutside { .. })));
            let stands = link(target);
            let ops = vec![op("dir/sub/link", Some(&stands), None)];
            source.commit_whole(commit(&source, CommitId::new(), &ann(), ops)).await.unwrap();
        }
    }
    for nothing in ["file", "no/such", "dir/sub"] {
        let refused = hub.promote(nothing, None).await;
        assert!(matches!(refused, Err(SkillError::NotADirectory { .. })), "{nothing}");
    }
    hub.close().await;
}

#[tokio::test]
async fn a_promotion_that_stopped_in_between_is_undone_or_finished_by_the_next_start() {
    for (stage, done) in [(0, false), (1, true), (2, true)] {
        let folder = tempfile::tempdir().unwrap();
        let hub = Hub::open(folder.path()).await;
        hub.write(&[("dir/a", b"a"), ("dir/sub/b", b"b")]).await;
        let (version, content) = hub.begun("dir").await;
        if stage > 0 {
            hub.in_library(&version, &content).await;
        }
        if stage > 1 {
            put_link(&*hub.source().await, &content, "lint", &ann()).await.unwrap();
        }
        hub.close().await;
        let hub = Hub::open(folder.path()).await;
        let versions = hub.skills.versions(None).await.unwrap();
        assert_eq!(versions.len(), usize::from(done), "{stage}");
        assert_eq!(hub.is_link("dir").await, done, "{stage}");
        assert_eq!(hub.audited("skill.promoted").await, usize::from(done), "{stage}");
        assert_eq!(hub.library().await.len(), if done { 5 } else { 0 }, "{stage}");
        let again = hub.promote("dir", None).await.unwrap();
        assert_eq!((again.version.version, again.unchanged), (1, done), "{stage}");
        hub.close().await;
    }
}

#[tokio::test]
async fn a_directory_that_changed_after_a_stop_in_between_stays_what_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let hub = Hub::open(folder.path()).await;
    hub.write(&[("dir/a", b"a")]).await;
    let (version, content) = hub.begun("dir").await;
    hub.in_library(&version, &content).await;
    let source = hub.source().await;
    let ops = vec![op("dir/a", Some(&file(b"a")), None)];
    source.commit_whole(commit(&source, CommitId::new(), &ann(), ops)).await.unwrap();
    hub.close().await;
    let hub = Hub::open(folder.path()).await;
    assert!(!hub.is_link("dir").await);
    assert_eq!(hub.skills.versions(None).await.unwrap().len(), 1);
    hub.close().await;
}

#[tokio::test]
async fn a_version_comes_back_for_as_long_as_it_is_kept() {
    let folder = tempfile::tempdir().unwrap();
    let hub = Hub::open(folder.path()).await;
    hub.write(&[("one/a", b"one"), ("one/deep/er/b", b"b"), ("two/a", b"two")]).await;
    hub.promote("one", None).await.unwrap();
    hub.promote("two", Some(1)).await.unwrap();
    let library = hub.content.workspace(WorkspaceId::LIBRARY).await.unwrap();
    // Nobody has touched it, but it is kept.
    library.collect(unix_ms(), unix_ms() + 1).await.unwrap();
    let back = hub.skills.restore("lint", None, Some(2), &ann()).await.unwrap();
    assert_eq!((back.version, back.restored_from), (3, Some(1)));
    let names = ["lint", "lint/3", "lint/3/a", "lint/3/deep", "lint/3/deep/er", "lint/3/deep/er/b"];
    assert_eq!(hub.library().await, names);
    let current = hub.skills.restore("lint", Some(3), None, &ann()).await;
    assert!(matches!(current, Err(SkillError::IsCurrent { .. })));
    let unexpected = hub.skills.remove("lint", Some(2), &ann()).await;
    assert!(matches!(unexpected, Err(SkillError::SkillChanged { .. })));
    assert_eq!(hub.skills.remove("lint", Some(3), &ann()).await.unwrap().version, 3);
    assert!(hub.library().await.is_empty());
    let gone = hub.skills.remove("lint", None, &ann()).await;
    assert!(matches!(gone, Err(SkillError::NoSuchSkill { .. })));
    assert_eq!(hub.skills.restore("lint", Some(2), None, &ann()).await.unwrap().version, 4);
    // Its time is over.
    let later = unix_ms() + 2 * 3600 * 1000;
    library.collect(later, later).await.unwrap();
    let forgotten = hub.skills.restore("lint", Some(1), None, &ann()).await;
    assert!(matches!(forgotten, Err(SkillError::Forgotten { .. })));
    hub.close().await;
}

#[tokio::test]
async fn a_removal_that_stopped_in_between_is_finished() {
    let folder = tempfile::tempdir().unwrap();
    let hub = Hub::open(folder.path()).await;
    hub.write(&[("one/a", b"one")]).await;
    let version = hub.promote("one", None).await.unwrap().version;
    let audit = ann().audit(5, "skill.removed", "lint", serde_json::json!({}));
    hub.store.remove_skill(version.id, 5, audit).await.unwrap();
    assert_eq!(hub.library().await.len(), 3);
    hub.close().await;
    let hub = Hub::open(folder.path()).await;
    assert!(hub.library().await.is_empty());
    hub.close().await;
}

#[test]
fn the_digest_of_a_directory_is_that_of_the_tree_wherever_it_stands() {
    let seed: u64 = rand::random();
    println_seed(seed);
    let mut random = StdRng::seed_from_u64(seed);
    for _ in 0..50 {
        let mut directories = vec![String::new()];
        let mut entries: BTreeMap<WirePath, Entry> = BTreeMap::new();
        for number in 0..random.random_range(0..30) {
            let parent = directories[random.random_range(0..directories.len())].clone();
            let name = format!("{parent}{}-{number}", random.random_range(0..3));
            if random.random_bool(0.4) {
                directories.push(format!("{name}/"));
                entries.insert(path(&name), Entry::Dir);
            } else {
                entries.insert(path(&name), file(name.as_bytes()));
            }
        }
        let inside: Vec<(WirePath, Entry)> = entries
            .iter()
            .map(|(p, entry)| (path(&format!("at/here/{p}")), entry.clone()))
            .collect();
        assert_eq!(digest_of(&path("at/here"), &inside), root_digest(&entries));
    }
}

#[allow(clippy::print_stderr)] // a random test says how to repeat it
fn println_seed(seed: u64) {
    eprintln!("seed {seed}");
}
