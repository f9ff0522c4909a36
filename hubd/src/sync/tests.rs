//! What a hub still has after it stopped anywhere.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Command, Stdio};

use bytes::Bytes;
use cortex_shared::chunk::ChunkRef;
use cortex_shared::clock::unix_ms;
use cortex_shared::entry::{Digest, Entry};
use cortex_shared::ids::CommitId;
use cortex_shared::pack::{Pack, PackBuilder};
use cortex_shared::wire_path::WirePath;

use super::collection::Collected;
use super::pack_files::PackFiles;
use super::*;
use crate::store::database::DatabaseError;
use crate::store::workspace::contract::{file, op, root_digest};
use crate::store::workspace::{
    Author, Commit, CommitResult, Head, KnownRules, StoreError, WorkspaceSettings,
};

/// A hub's workspaces in a folder, with one workspace open.
struct Hub {
    scope: TaskScope,
    workspaces: Workspaces,
    workspace: Arc<WorkspaceHub>,
    node: NodeId,
}

impl Hub {
    async fn open(folder: &Path, id: WorkspaceId) -> Self {
        Self::open_with(folder, id, ContentLimits::default()).await
    }

    async fn open_with(folder: &Path, id: WorkspaceId, limits: ContentLimits) -> Self {
        let scope = TaskScope::new();
        let workspaces = Workspaces::open(folder, limits, scope.clone(), scope.clone()).unwrap();
        let workspace = workspaces.workspace(id).await.unwrap();
        Self { scope, workspaces, workspace, node: NodeId::new() }
    }

    async fn close(self) {
        self.scope.cancel();
        self.scope.finish().await;
    }

    async fn put(&self, pack: &Bytes) -> PutPackAck {
        self.try_put(pack).await.unwrap()
    }

    async fn try_put(&self, pack: &Bytes) -> Result<PutPackAck, SyncError> {
        let room = self.workspace.incoming_room(self.node, pack.len()).await;
        self.workspace.put_pack(pack.clone(), room).await
    }

    /// Whether a chunk can be had.
    async fn readable(&self, data: &[u8]) -> bool {
        let found = self.workspace.packs_of(vec![Digest::of(data)]).await.unwrap();
        let Some((pack, _)) = found.packs.first() else { return false };
        let Some(bytes) = self.workspace.read_pack(*pack).await.unwrap() else { return false };
        Pack::parse(bytes).unwrap().chunk(&Digest::of(data)).unwrap().unwrap() == data
    }

    async fn commit(&self, ops: Vec<crate::store::workspace::Op>) -> CommitResult {
        self.try_commit(ops).await.unwrap()
    }

    async fn try_commit(
        &self,
        ops: Vec<crate::store::workspace::Op>,
    ) -> Result<CommitResult, SyncError> {
        let epoch = self.workspace.head().borrow().epoch;
        let ops = ops.into_iter().map(Ok).collect();
        let author = Author::Node(self.node);
        let commit = Commit { id: CommitId::new(), author, epoch, rules: KnownRules::Unsaid, ops };
        self.workspace.commit(commit).await
    }

    async fn have(&self, data: &[u8]) -> bool {
        self.workspace.have(vec![Digest::of(data)]).await.unwrap()[0]
    }

    async fn tree(&self) -> BTreeMap<WirePath, Entry> {
        let page = self.workspace.changes(0, usize::MAX).await.unwrap();
        assert_eq!(page.last_seq, page.head.seq);
        let entries = page.changes.into_iter();
        let tree: BTreeMap<_, _> = entries.filter_map(|c| Some((c.path, c.entry?))).collect();
        assert!(page.head.seq == 0 || page.head.root == root_digest(&tree));
        tree
    }
}

fn pack_of(contents: &[&[u8]]) -> Bytes {
    let mut builder = PackBuilder::new(1).unwrap();
    for data in contents {
        builder.push(ChunkRef::of(data).unwrap(), data);
    }
    builder.finish().unwrap().1
}

fn copy_folder(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let to = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_folder(&entry.path(), &to);
        } else {
            std::fs::copy(entry.path(), to).unwrap();
        }
    }
}

/// After each step of an upload and a commit: what a hub that starts from the disk as it is
/// then knows.
#[tokio::test]
async fn what_was_acknowledged_is_there_after_a_stop_between_any_two_steps() {
    let folder = tempfile::tempdir().unwrap();
    let id = WorkspaceId::new();
    let hub = Hub::open(&folder.path().join("live"), id).await;
    let pack = pack_of(&[b"one", b"two"]);
    let mut copies = 0;
    let mut stop_here = || {
        copies += 1;
        let copy = folder.path().join(copies.to_string());
        copy_folder(&folder.path().join("live"), &copy);
        async move { Hub::open(&copy, id).await }
    };

    let stopped = stop_here().await;
    assert!(!stopped.have(b"one").await);
    stopped.close().await;

    assert!(!hub.put(&pack).await.duplicate);
    let stopped = stop_here().await;
    assert!(stopped.have(b"one").await && stopped.have(b"two").await);
    assert!(stopped.put(&pack).await.duplicate, "a repetition is answered at once");
    stopped.close().await;

    let result = hub.commit(vec![op("a", None, Some(file(b"one")))]).await;
    let stopped = stop_here().await;
    assert_eq!(stopped.tree().await.len(), 1);
    let head = *stopped.workspace.head().borrow();
    assert_eq!((head.seq, head.root), (result.seq, result.root));
    let packs = stopped.workspace.packs_of(vec![Digest::of(b"one")]).await.unwrap();
    assert_eq!(stopped.workspace.read_pack(packs.packs[0].0).await.unwrap(), Some(pack.clone()));
    let next = stopped.commit(vec![op("b", None, Some(file(b"two")))]).await;
    assert_eq!(next.seqs, [result.seq + 1]);
    stopped.close().await;
    hub.close().await;
}

#[tokio::test]
async fn a_start_sweeps_adopts_and_forgets() {
    let folder = tempfile::tempdir().unwrap();
    let id = WorkspaceId::new();
    let hub = Hub::open(folder.path(), id).await;
    let lost = hub.put(&pack_of(&[b"lost", b"shared"])).await.hash;
    let kept = hub.put(&pack_of(&[b"kept", b"shared"])).await.hash;
    hub.close().await;

    let home = folder.path().join(id.to_string());
    let path_of = |pack: Digest| home.join("packs").join(pack.to_string());
    // An interrupted write; one that stopped between the rename and the database; a pack that the
    // disk has damaged, and one that it has lost.
    std::fs::write(home.join("tmp").join("7"), b"half a pack").unwrap();
    let orphan = Pack::parse(pack_of(&[b"orphan"])).unwrap();
    PackFiles::open(&home).unwrap().write(&orphan).unwrap();
    let damaged = Pack::parse(pack_of(&[b"damaged"])).unwrap();
    PackFiles::open(&home).unwrap().write(&damaged).unwrap();
    let mut bytes = damaged.bytes().to_vec();
    bytes[20] ^= 1;
    std::fs::write(path_of(damaged.hash()), bytes).unwrap();
    std::fs::remove_file(path_of(lost)).unwrap();
    std::fs::write(home.join("packs").join("README"), b"not a pack").unwrap();

    let hub = Hub::open(folder.path(), id).await;
    assert_eq!(std::fs::read_dir(home.join("tmp")).unwrap().count(), 0);
    assert!(hub.have(b"orphan").await, "adopted");
    assert!(!hub.have(b"damaged").await, "not believed");
    assert!(home.join("damaged").join(damaged.hash().to_string()).exists(), "but not destroyed");
    assert!(!hub.have(b"lost").await, "asked for again");
    assert!(hub.have(b"kept").await);
    let packs = hub.workspace.packs_of(vec![Digest::of(b"shared")]).await.unwrap();
    assert_eq!(packs.packs[0].0, kept, "found in the pack that is left");
    // What is asked for again can be sent again.
    assert!(!hub.put(&pack_of(&[b"lost", b"shared"])).await.duplicate);
    assert!(!hub.put(damaged.bytes()).await.duplicate);
    assert!(hub.have(b"lost").await && hub.have(b"damaged").await);
    hub.close().await;
}

#[tokio::test]
async fn a_pack_that_changed_on_disk_is_not_passed_on_but_wanted_until_it_is_sent_again() {
    let folder = tempfile::tempdir().unwrap();
    let id = WorkspaceId::new();
    let hub = Hub::open(folder.path(), id).await;
    let pack = pack_of(&[b"content"]);
    let hash = hub.put(&pack).await.hash;
    hub.commit(vec![op("f", None, Some(file(b"content")))]).await;
    assert!(hub.workspace.read_pack(hash).await.unwrap().is_some());
    let home = folder.path().join(id.to_string());
    let path = home.join("packs").join(hash.to_string());
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[17] ^= 0x10;
    std::fs::write(&path, bytes).unwrap();
    // Sending it again mends it, even before anybody has noticed.
    hub.put(&pack).await;
    assert!(hub.workspace.read_pack(hash).await.unwrap().is_some());
    std::fs::write(&path, b"damaged again").unwrap();
    assert_eq!(hub.workspace.read_pack(hash).await.unwrap(), None);
    assert!(home.join("damaged").join(hash.to_string()).exists());
    assert_eq!(hub.workspace.wanted().await.unwrap(), [Digest::of(b"content")]);
    let found = hub.workspace.packs_of(vec![Digest::of(b"content")]).await.unwrap();
    assert_eq!((found.packs.len(), found.missing.len()), (0, 1));
    // And what is still wanted after a restart is wanted then.
    hub.close().await;
    let hub = Hub::open(folder.path(), id).await;
    assert_eq!(hub.workspace.wanted().await.unwrap(), [Digest::of(b"content")]);
    assert!(!hub.put(&pack).await.duplicate);
    assert!(hub.workspace.wanted().await.unwrap().is_empty());
    std::fs::remove_file(&path).unwrap();
    assert_eq!(hub.workspace.read_pack(hash).await.unwrap(), None, "gone altogether");
    assert_eq!(hub.workspace.wanted().await.unwrap(), [Digest::of(b"content")]);
    hub.close().await;
}

#[tokio::test]
async fn a_pack_with_a_wrong_chunk_is_refused_and_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let id = WorkspaceId::new();
    let hub = Hub::open(folder.path(), id).await;
    let mut bytes = pack_of(&[b"honest"]).to_vec();
    bytes[16] ^= 1;
    let body = bytes.len() - 32;
    let seal = Digest::of(&bytes[..body]);
    bytes[body..].copy_from_slice(seal.as_bytes());
    let room = hub.workspace.incoming_room(hub.node, bytes.len()).await;
    let refused = hub.workspace.put_pack(bytes.into(), room).await;
    assert!(matches!(refused, Err(SyncError::Pack(_))));
    assert!(!hub.have(b"honest").await);
    let home = folder.path().join(id.to_string());
    assert_eq!(PackFiles::open(&home).unwrap().list().unwrap(), []);
    hub.close().await;
}

#[tokio::test]
async fn content_goes_when_nothing_names_it_and_nobody_touched_it_lately() {
    let folder = tempfile::tempdir().unwrap();
    let id = WorkspaceId::new();
    let hub = Hub::open(folder.path(), id).await;
    let now_ms = unix_ms();
    let (long_ago, any_time) = (now_ms - 1000, now_ms + 1_000_000);
    let named = pack_of(&[b"named", b"by"]);
    let unnamed = pack_of(&[b"unnamed"]);
    let parts = pack_of(&[b"first ", b"part"]);
    for pack in [&named, &unnamed, &parts] {
        hub.put(pack).await;
    }
    let recipe = [&b"first "[..], b"part"].map(|data| ChunkRef::of(data).unwrap());
    let large = Entry::File(cortex_shared::entry::File {
        content: Digest::of(b"first part"),
        size: 10,
        executable: false,
        mtime_ns: 0,
        recipe: cortex_shared::chunk::Recipe(recipe.into()),
    });
    let small = file(b"named");
    hub.commit(vec![
        op("small", None, Some(small.clone())),
        op("large", None, Some(large.clone())),
    ])
    .await;

    assert_eq!(
        hub.workspace.collect(unix_ms(), long_ago).await.unwrap().dropped,
        0,
        "all was touched lately"
    );
    assert!(hub.have(b"unnamed").await);
    assert_eq!(hub.workspace.collect(unix_ms(), any_time).await.unwrap().dropped, 1);
    assert!(!hub.have(b"unnamed").await);
    assert!(hub.have(b"named").await && hub.have(b"by").await && hub.have(b"part").await);
    let lost = hub.commit(vec![op("new", None, Some(file(b"unnamed")))]).await;
    assert_eq!(lost.rejected[0].reason, crate::store::workspace::RejectReason::MissingChunks);
    assert!(!hub.put(&unnamed).await.duplicate, "it can come again");
    assert_eq!(hub.commit(vec![op("new", None, Some(file(b"unnamed")))]).await.seqs, [3]);

    hub.commit(vec![op("small", Some(&small), None), op("large", Some(&large), None)]).await;
    assert_eq!(
        hub.workspace.collect(unix_ms(), any_time).await.unwrap(),
        Collected::default(),
        "the past"
    );
    let none = WorkspaceSettings { keep_versions: 0, ..WorkspaceSettings::default() };
    hub.workspace.set_settings(none).await.unwrap();
    assert_eq!(hub.workspace.collect(unix_ms(), any_time).await.unwrap().dropped, 2);
    assert!(hub.have(b"unnamed").await && !hub.have(b"named").await && !hub.have(b"part").await);
    let files = PackFiles::open(&folder.path().join(id.to_string())).unwrap();
    assert_eq!(files.list().unwrap().len(), 1, "the files went as well");
    hub.close().await;
}

/// A hub that takes only so much content.
async fn limited_hub(folder: &Path, id: WorkspaceId, reserve_bytes: u64) -> Hub {
    let limits = ContentLimits { reserve_bytes: Some(reserve_bytes), ..ContentLimits::default() };
    Hub::open_with(folder, id, limits).await
}

#[tokio::test]
async fn sparse_packs_are_put_together_and_keep_what_is_used() {
    let folder = tempfile::tempdir().unwrap();
    let id = WorkspaceId::new();
    let hub = Hub::open(folder.path(), id).await;
    let names: Vec<String> = (0..5).map(|n| format!("used-{n}")).collect();
    for name in &names {
        let unused = format!("of no use, and longer than what is used: {name}");
        hub.put(&pack_of(&[name.as_bytes(), unused.as_bytes()])).await;
        hub.commit(vec![op(name, None, Some(file(name.as_bytes())))]).await;
    }
    let before = hub.workspace.usage().await.unwrap();
    let any_time = unix_ms() + 1_000_000;
    let collected = hub.workspace.collect(unix_ms(), any_time).await.unwrap();
    assert_eq!((collected.dropped, collected.rewritten), (0, 5));
    let after = hub.workspace.usage().await.unwrap();
    assert_eq!((before.packs, after.packs), (5, 1));
    assert!(after.pack_bytes < before.pack_bytes);
    let files = PackFiles::open(&folder.path().join(id.to_string())).unwrap();
    assert_eq!(files.list().unwrap().len(), 1);
    assert_eq!(
        hub.workspace.collect(unix_ms(), any_time).await.unwrap(),
        Collected::default(),
        "once"
    );
    hub.close().await;
    let hub = Hub::open(folder.path(), id).await;
    for name in &names {
        assert!(hub.readable(name.as_bytes()).await, "{name}");
    }
    hub.close().await;
}

#[tokio::test]
async fn t27_an_upload_that_is_never_committed_expires_and_may_come_again() {
    let folder = tempfile::tempdir().unwrap();
    let id = WorkspaceId::new();
    let hub = Hub::open(folder.path(), id).await;
    let (first, second) = (pack_of(&[b"first half"]), pack_of(&[b"second half"]));
    let quota = WorkspaceSettings {
        quota_bytes: Some(first.len() as u64 + 10),
        ..WorkspaceSettings::default()
    };
    hub.workspace.set_settings(quota).await.unwrap();
    hub.put(&first).await;
    let refused = hub.try_put(&second).await;
    assert!(matches!(refused, Err(SyncError::OverQuota { .. })));
    // What an interrupted write left, long ago and just now.
    let tmp = folder.path().join(id.to_string()).join("tmp");
    std::fs::write(tmp.join("old"), b"half a pack").unwrap();
    std::fs::write(tmp.join("new"), b"half a pack").unwrap();
    let long_ago = std::time::SystemTime::now() - std::time::Duration::from_secs(7200);
    std::fs::File::open(tmp.join("old")).unwrap().set_modified(long_ago).unwrap();

    assert_eq!(hub.workspace.collect(unix_ms(), unix_ms() - 1_000_000).await.unwrap().dropped, 0);
    assert_eq!(hub.workspace.collect(unix_ms(), unix_ms() + 1_000_000).await.unwrap().dropped, 1);
    assert!(!tmp.join("old").exists() && tmp.join("new").exists());
    assert_eq!(hub.workspace.usage().await.unwrap().pack_bytes, 0, "the quota is free again");
    hub.put(&second).await;
    assert_eq!(hub.commit(vec![op("f", None, Some(file(b"second half")))]).await.rejected, []);
    hub.close().await;
}

#[tokio::test]
async fn a_full_hub_takes_no_content_but_deletions_which_make_room() {
    let folder = tempfile::tempdir().unwrap();
    let id = WorkspaceId::new();
    let hub = limited_hub(folder.path(), id, 0).await;
    let pack = pack_of(&[b"content"]);
    hub.put(&pack).await;
    let content = file(b"content");
    hub.commit(vec![op("f", None, Some(content.clone()))]).await;
    hub.close().await;

    let hub = limited_hub(folder.path(), id, u64::MAX).await;
    let refused = hub.try_put(&pack_of(&[b"more"])).await;
    assert!(matches!(&refused, Err(error @ SyncError::Full) if error.is_disk_full()));
    assert!(hub.put(&pack).await.duplicate, "what is there needs no room");
    assert!(hub.readable(b"content").await);
    let named = hub.try_commit(vec![op("g", None, Some(content.clone()))]).await;
    assert!(matches!(named, Err(SyncError::Full)), "names fill a disk as well: {named:?}");
    assert_eq!(hub.commit(Vec::new()).await.rejected, [], "what became of a commit is told");
    let deleted = hub.commit(vec![op("f", Some(&content), None)]).await;
    assert_eq!(deleted.rejected, []);
    hub.close().await;
}

#[tokio::test]
async fn a_member_that_lies_about_versions_cannot_make_the_others_merge_all_the_time() {
    let folder = tempfile::tempdir().unwrap();
    let hub = Hub::open(folder.path(), WorkspaceId::new()).await;
    hub.put(&pack_of(&[b"content"])).await;
    hub.commit(vec![op("f", None, Some(file(b"content")))]).await;
    let head = || *hub.workspace.head().borrow();
    let lie = async |seq| {
        let known = Head { seq, root: Digest::of(b"never"), ..head() };
        hub.workspace.check_history(hub.node, known).await
    };
    let refused = lie(1 << 61).await;
    assert!(matches!(refused, Err(SyncError::Store(StoreError::BeyondHead { .. }))), "{refused:?}");
    let (first, mut epochs) = (head(), 0);
    while let Ok(restarted) = lie(head().seq + 1).await {
        assert_ne!(restarted.epoch, first.epoch);
        epochs += 1;
    }
    assert!((1..10).contains(&epochs), "{epochs}");
    let refused = lie(head().seq + 1).await;
    assert!(matches!(refused, Err(SyncError::RestartedTooOften { .. })), "{refused:?}");
    // Whoever tells the truth is not concerned.
    let now = head();
    assert_eq!(hub.workspace.check_history(hub.node, now).await.unwrap(), now);
    hub.commit(vec![op("f", Some(&file(b"content")), None)]).await;
    hub.close().await;
}

#[tokio::test]
async fn all_workspaces_on_disk_are_collected_whether_they_are_open_or_not() {
    let folder = tempfile::tempdir().unwrap();
    let id = WorkspaceId::new();
    let hub = Hub::open(folder.path(), id).await;
    let tmp = folder.path().join(id.to_string()).join("tmp");
    hub.close().await;
    std::fs::write(tmp.join("left"), b"over").unwrap();
    std::fs::create_dir(folder.path().join("not-a-workspace")).unwrap();
    let scope = TaskScope::new();
    let limits = ContentLimits::default();
    let workspaces = Workspaces::open(folder.path(), limits, scope.clone(), scope.clone()).unwrap();
    // Nobody asks for it: only the collection opens it, which sweeps.
    let done = workspaces.collect().await.unwrap();
    assert!(done.starts_with("1 workspaces: "), "{done}");
    assert!(!tmp.join("left").exists());
    scope.cancel();
    scope.finish().await;
}

#[tokio::test]
async fn a_deleted_workspace_leaves_nothing_and_does_not_come_back() {
    let folder = tempfile::tempdir().unwrap();
    let id = WorkspaceId::new();
    let hub = Hub::open(folder.path(), id).await;
    hub.put(&pack_of(&[b"content"])).await;
    hub.workspaces.delete(id).await.unwrap();
    hub.workspaces.delete(id).await.unwrap();
    let left: Vec<_> = std::fs::read_dir(folder.path()).unwrap().flatten().collect();
    assert!(left.iter().all(|left| left.file_name() == "ballast"), "{left:?}");
    assert!(matches!(hub.workspaces.workspace(id).await, Err(SyncError::Deleted)));
    hub.close().await;
}

#[tokio::test]
async fn conflicts_are_settled_by_either_side_or_both() {
    use crate::sync::past::{Keep, Unsettled};
    for (keep, at_path, copies) in
        [(Keep::Theirs, &b"theirs"[..], 0), (Keep::Mine, b"mine", 0), (Keep::Both, b"theirs", 1)]
    {
        let folder = tempfile::tempdir().unwrap();
        let hub = Hub::open(folder.path(), WorkspaceId::new()).await;
        hub.put(&pack_of(&[b"theirs", b"mine", b"mine too"])).await;
        let path = |text: &str| WirePath::new(text).unwrap();
        let mut copy = op("f.conflict-1", None, Some(file(b"mine")));
        copy.conflict_of = Some(path("f"));
        hub.commit(vec![op("f", None, Some(file(b"theirs"))), copy.clone()]).await;
        let resolve = async |at: &str| hub.workspace.resolve(&path(at), keep, "ann").await.unwrap();
        assert_eq!(resolve("g").await, Err(Unsettled::None));
        if keep == Keep::Mine {
            let mut other = op("f.conflict-2", None, Some(file(b"mine too")));
            other.conflict_of = Some(path("f"));
            hub.commit(vec![other]).await;
            let both = vec![path("f.conflict-1"), path("f.conflict-2")];
            assert_eq!(resolve("f").await, Err(Unsettled::Several(both)));
            assert_eq!(resolve("f.conflict-2").await, Ok(vec![path("f.conflict-2")]));
        }
        assert_eq!(resolve("f").await, Ok(vec![path("f.conflict-1")]), "{keep:?}");
        let tree = hub.tree().await;
        assert_eq!(tree[&path("f")], file(at_path), "{keep:?}");
        assert_eq!(tree.len() - 1, copies, "{keep:?}");
        assert_eq!(hub.workspace.conflicts().await.unwrap(), []);
        hub.close().await;
    }
}

#[tokio::test]
async fn moved_heads_are_announced_and_a_closed_hub_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let id = WorkspaceId::new();
    let hub = Hub::open(folder.path(), id).await;
    let mut moved = hub.workspaces.moved();
    let result = hub.commit(vec![op("d", None, Some(Entry::Dir))]).await;
    // Opening announces the head as well, so the commit may come as the second news.
    loop {
        let heads = moved.next().await.unwrap();
        if heads.iter().any(|(at, head)| *at == id && head.seq == result.seq) {
            break;
        }
    }
    hub.scope.cancel();
    hub.scope.finish().await;
    let epoch = hub.workspace.head().borrow().epoch;
    let author = Author::Node(hub.node);
    let commit =
        Commit { id: CommitId::new(), author, epoch, rules: KnownRules::Unsaid, ops: Vec::new() };
    let refused = hub.workspace.commit(commit).await;
    assert!(matches!(refused, Err(SyncError::Store(StoreError::Database(DatabaseError::Closed)))));
}

#[tokio::test]
async fn concurrent_openings_share_one_workspace() {
    let folder = tempfile::tempdir().unwrap();
    let scope = TaskScope::new();
    let workspaces =
        Workspaces::open(folder.path(), ContentLimits::default(), scope.clone(), scope.clone())
            .unwrap();
    let id = WorkspaceId::new();
    let (a, b) = tokio::join!(workspaces.workspace(id), workspaces.workspace(id));
    assert!(Arc::ptr_eq(&a.unwrap(), &b.unwrap()));
    assert_eq!(workspaces.summary(id).await.unwrap().entries, 0);
    assert_eq!(workspaces.applied(id, NodeId::new()).await.unwrap(), 0);
    scope.cancel();
    scope.finish().await;
}

const CHILD_FOLDER: &str = "CORTEX_TEST_CHILD_FOLDER";
const CHILD_WORKSPACE: &str = "CORTEX_TEST_CHILD_WORKSPACE";
/// The child ends by itself after this many rounds, should nobody kill it.
const CHILD_ROUNDS: u32 = 3000;

/// A hub that works until it is killed, and says on its output what has been acknowledged.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "the child process of killed_at_any_instant_nothing_acknowledged_is_lost"]
async fn hub_that_works_until_it_is_killed() {
    let folder = std::env::var(CHILD_FOLDER).unwrap();
    let id = std::env::var(CHILD_WORKSPACE).unwrap().parse().unwrap();
    let hub = Arc::new(Hub::open(Path::new(&folder), id).await);
    let start = hub.workspace.head().borrow().seq;
    let workers: Vec<_> = (0..4)
        .map(|worker| {
            let hub = hub.clone();
            tokio::spawn(async move {
                for round in 0..CHILD_ROUNDS {
                    let name = format!("{start}-{worker}-{round}");
                    hub.put(&pack_of(&[name.as_bytes()])).await;
                    writeln!(std::io::stdout(), "acked pack {name}").unwrap();
                    let file = Some(file(name.as_bytes()));
                    let result = hub.commit(vec![op(&name, None, file)]).await;
                    writeln!(std::io::stdout(), "acked file {name} {}", result.seq).unwrap();
                }
            })
        })
        .collect();
    for worker in workers {
        worker.await.unwrap();
    }
}

/// A hub that collects, and is killed on the way.
#[tokio::test]
#[ignore = "the child process of a_collection_that_is_killed_at_any_point_loses_nothing_that_is_used"]
async fn hub_that_collects_until_it_is_killed() {
    let folder = std::env::var(CHILD_FOLDER).unwrap();
    let id = std::env::var(CHILD_WORKSPACE).unwrap().parse().unwrap();
    let hub = Hub::open(Path::new(&folder), id).await;
    hub.workspace.collect(unix_ms(), unix_ms() + 1_000_000).await.unwrap();
}

#[tokio::test]
async fn a_collection_that_is_killed_at_any_point_loses_nothing_that_is_used() {
    for point in [
        "sync.collect.forgotten",
        "sync.pack.durable",
        "sync.rewrite.written",
        "sync.rewrite.recorded",
    ] {
        let folder = tempfile::tempdir().unwrap();
        let id = WorkspaceId::new();
        let hub = Hub::open(folder.path(), id).await;
        for name in ["a", "b"] {
            let unused = format!("much longer than what is used of it: {name}");
            hub.put(&pack_of(&[name.as_bytes(), unused.as_bytes()])).await;
            hub.commit(vec![op(name, None, Some(file(name.as_bytes())))]).await;
        }
        hub.put(&pack_of(&[b"useless"])).await;
        hub.close().await;
        let status = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "sync::tests::hub_that_collects_until_it_is_killed", "--ignored"])
            .env(CHILD_FOLDER, folder.path())
            .env(CHILD_WORKSPACE, id.to_string())
            .env(cortex_shared::crash::CRASH_AT, point)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .unwrap();
        assert_eq!(status.signal(), Some(9), "it passes {point}");
        let hub = Hub::open(folder.path(), id).await;
        for name in ["a", "b"] {
            assert!(hub.readable(name.as_bytes()).await, "{point}: {name}");
        }
        hub.workspace.collect(unix_ms(), unix_ms() + 1_000_000).await.unwrap();
        for name in ["a", "b"] {
            assert!(hub.readable(name.as_bytes()).await, "{point}: {name}");
        }
        assert!(hub.workspace.wanted().await.unwrap().is_empty(), "{point}");
        assert!(hub.workspace.usage().await.unwrap().packs <= 2, "{point}");
        hub.close().await;
    }
}

#[tokio::test]
async fn killed_at_any_instant_nothing_acknowledged_is_lost() {
    let folder = tempfile::tempdir().unwrap();
    let id = WorkspaceId::new();
    let seed: u64 = rand::random();
    let mut packs = Vec::new();
    let mut files = Vec::new();
    let mut newest = 0;
    for round in 0..6_u64 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "sync::tests::hub_that_works_until_it_is_killed"])
            .args(["--ignored", "--nocapture"])
            .env(CHILD_FOLDER, folder.path())
            .env(CHILD_WORKSPACE, id.to_string())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        // Any number of acknowledgements, so that the kill comes in the middle of anything.
        let wanted = 1 + Digest::of(&seed.wrapping_add(round).to_be_bytes()).as_bytes()[0] as usize;
        let output = BufReader::new(child.stdout.take().unwrap());
        let mut acked = 0;
        for line in output.lines() {
            let line = line.unwrap();
            // The test runner's own words may stand before the first one, without a line's end.
            let Some((_, news)) = line.split_once("acked ") else { continue };
            match news.split(' ').collect::<Vec<_>>()[..] {
                ["pack", name] => packs.push(name.to_owned()),
                ["file", name, seq] => {
                    files.push(name.to_owned());
                    newest = newest.max(seq.parse().unwrap());
                }
                _ => continue,
            }
            acked += 1;
            if acked == wanted {
                child.kill().unwrap();
            }
        }
        child.wait().unwrap();
        assert!(acked >= wanted, "seed {seed}: the child ended early");

        let hub = Hub::open(folder.path(), id).await;
        let tree = hub.tree().await;
        assert!(hub.workspace.head().borrow().seq >= newest, "seed {seed}");
        for name in &packs {
            assert!(hub.have(name.as_bytes()).await, "seed {seed}: pack {name}");
        }
        for name in &files {
            let path = WirePath::new(name.as_str()).unwrap();
            assert_eq!(tree.get(&path), Some(&file(name.as_bytes())), "seed {seed}: {name}");
        }
        // Every entry's content can be read, acknowledged or not.
        for entry in tree.values() {
            let Entry::File(file) = entry else { continue };
            let packs = hub.workspace.packs_of(vec![file.content]).await.unwrap();
            let pack = hub.workspace.read_pack(packs.packs[0].0).await.unwrap().unwrap();
            let pack = Pack::parse(pack).unwrap();
            assert!(pack.chunk(&file.content).unwrap().is_some());
        }
        hub.close().await;
    }
}
