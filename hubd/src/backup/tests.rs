use std::collections::BTreeSet;

use bytes::Bytes;
use cortex_shared::chunk::ChunkRef;
use cortex_shared::clock::unix_ms;
use cortex_shared::entry::{Digest, Entry};
use cortex_shared::ids::{CommitId, NodeId};
use cortex_shared::pack::PackBuilder;
use cortex_shared::secret::{InviteId, InviteToken};
use cortex_shared::tasks::TaskScope;
use rusqlite::Connection;
use std::sync::Arc;

use super::*;
use crate::authority::audit::AuditLog;
use crate::config::HubConfig;
use crate::hub::{HubData, StartError};
use crate::store::sqlite::SqliteStore;
use crate::store::workspace::contract::{file, op};
use crate::store::workspace::{Author, Commit, KnownRules, LogFilter};
use crate::store::{Actor, InviteKind, NewInvite, Scope, Store, Workspace};
use crate::sync::{ContentLimits, WorkspaceHub, Workspaces};

/// What a hub keeps, open for writing.
struct Data {
    layout: DataLayout,
    store: Arc<SqliteStore>,
    audit: Arc<AuditLog>,
    workspaces: Workspaces,
    workspace: Arc<WorkspaceHub>,
    id: WorkspaceId,
    scope: TaskScope,
}

fn hub() -> Actor {
    Actor::hub()
}

fn config(data: &Path) -> HubConfig {
    HubConfig::new(data.to_owned())
}

impl Data {
    async fn new(data: &Path) -> Self {
        HubData::open(&config(data)).await.unwrap().close().await;
        let id = WorkspaceId::new();
        let this = Self::open(data, id).await;
        this.audit.begin().await.unwrap();
        let workspace = Workspace {
            id,
            name: "w".into(),
            created_at_ms: 1,
            scope: Scope::default(),
            members: BTreeSet::new(),
        };
        let line = hub().audit(1, "workspace.created", "w", serde_json::json!({}));
        this.store.create_workspace(workspace, line).await.unwrap();
        this
    }

    async fn open(data: &Path, id: WorkspaceId) -> Self {
        let layout = DataLayout::new(data);
        let scope = TaskScope::new();
        let store = Arc::new(SqliteStore::open(layout.database(), &scope).await.unwrap());
        let audit = AuditLog::new(Arc::clone(&store) as _, layout.audit_mark());
        let limits = ContentLimits::default();
        let content = layout.workspaces();
        let workspaces = Workspaces::open(&content, limits, scope.clone(), scope.clone()).unwrap();
        let workspace = workspaces.workspace(id).await.unwrap();
        Self { layout, store, audit, workspaces, workspace, id, scope }
    }

    /// Puts a file at a path, whatever stands there, and returns the name of its pack.
    async fn write(&self, path: &str, content: &[u8]) -> Digest {
        let mut builder = PackBuilder::new(1).unwrap();
        builder.push(ChunkRef::of(content).unwrap(), content);
        let pack: Bytes = builder.finish().unwrap().1;
        let room = self.workspace.incoming_room(NodeId::new(), pack.len()).await;
        let hash = self.workspace.put_pack(pack, room).await.unwrap().hash;
        let stands = self.store_entry(path).await;
        let made = op(path, stands.as_ref(), Some(file(content)));
        let commit = Commit {
            id: CommitId::new(),
            author: Author::Operator("ann".into()),
            epoch: self.workspace.head().borrow().epoch,
            rules: KnownRules::Unsaid,
            ops: vec![Ok(made)],
        };
        let result = self.workspace.commit(commit).await.unwrap();
        assert!(result.rejected.is_empty(), "{:?}", result.rejected);
        hash
    }

    async fn store_entry(&self, path: &str) -> Option<Entry> {
        let page = self.workspace.changes(0, usize::MAX).await.unwrap();
        let mut changes = page.changes.into_iter();
        changes.find(|change| change.path.as_bytes() == path.as_bytes())?.entry
    }

    /// Loses a pack, and finds that out.
    async fn lose(&self, pack: Digest) {
        let packs = self.layout.workspaces().join(self.id.to_string()).join("packs");
        fs::remove_file(packs.join(pack.to_string())).unwrap();
        assert_eq!(self.workspace.read_pack(pack).await.unwrap(), None);
    }

    async fn invite(&self) -> InviteId {
        let token = InviteToken::generate();
        let invite = NewInvite {
            id: token.id().clone(),
            secret_hash: token.secret_hash(),
            kind: InviteKind::Node,
            max_uses: 1,
            expires_at_ms: unix_ms() + 3_600_000,
            created_at_ms: unix_ms(),
            created_by: "ann".into(),
            labels: Default::default(),
            name_pattern: String::new(),
            workspaces: BTreeSet::new(),
            sources: BTreeSet::new(),
            owner: String::new(),
            scope: Default::default(),
        };
        let line = hub().audit(1, "invite.created", "x", serde_json::json!({}));
        self.store.create_invite(invite, line).await.unwrap();
        token.id().clone()
    }

    async fn close(self) {
        self.audit.move_mark().await.unwrap();
        drop(self.workspaces);
        self.scope.cancel();
        self.scope.finish().await;
    }
}

fn back_up_quietly(data: &DataLayout, target: &Path) -> Result<Backup, BackupError> {
    back_up(data, target, &mut |_, _, _| {})
}

async fn restore_quietly(backup: &Path, data: &Path) -> Result<Restored, BackupError> {
    restore(backup, &DataLayout::new(data), &hub(), &mut |_, _, _| {}).await
}

fn problems_of(files: &StoreFiles, manifest: Option<&Manifest>) -> Vec<String> {
    let mut problems = Vec::new();
    let found = verify(files, manifest, &mut |_, _, _| {}, &mut |place, what| {
        problems.push(format!("{place}: {what}"));
    });
    assert_eq!(found.unwrap().problems, problems.len() as u64);
    problems
}

fn problems(data: &Path) -> Vec<String> {
    problems_of(&StoreFiles::live(&DataLayout::new(data)), None)
}

fn problems_of_backup(backup: &Path) -> Vec<String> {
    let manifest = Manifest::read(backup).unwrap();
    problems_of(&StoreFiles::of_backup(backup, &manifest), Some(&manifest))
}

#[tokio::test]
async fn a_backup_is_of_a_hub_that_goes_on_and_the_next_copies_only_what_is_new() {
    let folder = tempfile::tempdir().unwrap();
    let (live, target) = (folder.path().join("live"), folder.path().join("backup"));
    let data = Data::new(&live).await;
    let first = data.write("a", b"first").await;
    data.write("b", b"b").await;
    data.write("a", b"second").await;
    let made = back_up_quietly(&data.layout, &target).unwrap();
    assert_eq!((made.packs, made.packs_copied, made.lost.len()), (3, 3, 0));
    assert_eq!(problems_of_backup(&target), [""; 0]);

    let again = back_up_quietly(&data.layout, &target).unwrap();
    assert_eq!((again.packs, again.packs_copied), (3, 0));
    data.write("c", b"new").await;
    // What the hub has let go of goes from the backup, too.
    data.lose(first).await;
    let third = back_up_quietly(&data.layout, &target).unwrap();
    assert_eq!((third.packs, third.packs_copied), (3, 1));
    let packs = target.join("ws").join(data.id.to_string()).join("packs");
    assert_eq!(list(&packs).unwrap().len(), 3);
    let databases = list(&target).unwrap().into_iter().map(|entry| entry.file_name());
    let databases = databases.filter(|name| name.to_string_lossy().starts_with("databases-"));
    assert_eq!(databases.count(), 1, "the one before is gone");
    assert_eq!(problems_of_backup(&target), [""; 0], "chunks that are wanted are no news");
    assert_eq!(problems(&live), [""; 0], "while the hub has it open");
    data.close().await;
    assert_eq!(problems(&live), [""; 0]);
}

#[tokio::test]
async fn what_is_put_back_is_what_was_there_and_nothing_that_was_open_can_be_used_again() {
    let folder = tempfile::tempdir().unwrap();
    let (live, target) = (folder.path().join("live"), folder.path().join("backup"));
    let data = Data::new(&live).await;
    data.write("a", b"old").await;
    data.write("a", b"new").await;
    let (open, revoked) = (data.invite().await, data.invite().await);
    let line = hub().audit(1, "invite.revoked", "x", serde_json::json!({}));
    data.store.revoke_invite(revoked, 5, line).await.unwrap();
    let (mesh, id) = (data.store.mesh().await.unwrap(), data.id);
    let head = *data.workspace.head().borrow();
    back_up_quietly(&data.layout, &target).unwrap();
    data.write("a", b"later").await;
    data.close().await;

    let restored = restore_quietly(&target, &folder.path().join("again")).await.unwrap();
    assert_eq!((restored.packs, restored.lost), (2, 0));
    assert_eq!(restored.invites_revoked, [open]);
    let again = folder.path().join("again");
    assert_eq!(problems(&again), [""; 0]);
    let pins = |data: &Path| crate::enroll::authorities::read_pins(&data.join("ca")).unwrap();
    assert_eq!(pins(&again), pins(&live));
    let data = Data::open(&again, id).await;
    assert_eq!(data.store.mesh().await.unwrap(), mesh);
    assert_eq!(*data.workspace.head().borrow(), head);
    let log = data.workspace.log(LogFilter { limit: 10, ..LogFilter::default() }).await.unwrap();
    assert_eq!(log.entries.len(), 2);
    assert!(data.store.invites().await.unwrap().iter().all(|i| i.revoked_at_ms.is_some()));
    let lines = data.store.audit_page(None, 100).await.unwrap();
    assert_eq!(lines.last().unwrap().action, "hub.restored");
    assert!(data.audit.verify().await.unwrap().problem.is_none());
    data.close().await;
    // And it is a hub that starts.
    HubData::open(&config(&again)).await.unwrap().close().await;
}

#[tokio::test]
async fn nothing_is_put_back_over_something_and_half_of_it_is_no_hub() {
    let folder = tempfile::tempdir().unwrap();
    let (live, target) = (folder.path().join("live"), folder.path().join("backup"));
    let data = Data::new(&live).await;
    data.write("a", b"a").await;
    back_up_quietly(&data.layout, &target).unwrap();
    data.close().await;
    let refused = restore_quietly(&target, &live).await;
    assert!(matches!(refused, Err(BackupError::NotEmpty { .. })), "{refused:?}");
    assert_eq!(problems(&live), [""; 0]);

    // Interrupted after some of it was moved into place.
    let half = folder.path().join("half");
    restore_quietly(&target, &half).await.unwrap();
    fs::create_dir(half.join("restoring")).unwrap();
    fs::rename(half.join("hub.db"), half.join("restoring/hub.db")).unwrap();
    let refused = HubData::open(&config(&half)).await.err();
    assert!(matches!(refused, Some(StartError::RestoreUnfinished { .. })), "{refused:?}");
    assert!(!half.join("hub.db").exists());
    let refused = back_up_quietly(&DataLayout::new(&half), &folder.path().join("other"));
    assert!(matches!(refused, Err(BackupError::NoHub { .. })), "{refused:?}");
    restore_quietly(&target, &half).await.unwrap();
    HubData::open(&config(&half)).await.unwrap().close().await;
    assert_eq!(problems(&half), [""; 0]);

    // While a hub runs on the directory, even on an empty one.
    let busy = folder.path().join("busy");
    create_folder(&busy).unwrap();
    let lock = super::lock(&busy.join("lock")).unwrap();
    assert!(matches!(restore_quietly(&target, &busy).await, Err(BackupError::Locked { .. })));
    drop(lock);
}

#[tokio::test]
async fn a_folder_with_something_else_is_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let (live, target) = (folder.path().join("live"), folder.path().join("backup"));
    let data = Data::new(&live).await;
    create_folder(&target).unwrap();
    fs::write(target.join("thesis.tex"), "x").unwrap();
    let refused = back_up_quietly(&data.layout, &target);
    assert!(matches!(refused, Err(BackupError::NotABackup { .. })), "{refused:?}");
    fs::remove_file(target.join("thesis.tex")).unwrap();
    // What an interrupted first one leaves is no obstacle.
    create_folder(&target.join("databases-1/ws")).unwrap();
    fs::write(target.join("databases-1/hub.db"), "half").unwrap();
    back_up_quietly(&data.layout, &target).unwrap();
    assert_eq!(problems_of_backup(&target), [""; 0]);

    let other = Data::new(&folder.path().join("other")).await;
    let refused = back_up_quietly(&other.layout, &target);
    assert!(matches!(refused, Err(BackupError::OtherMesh { .. })), "{refused:?}");
    assert_eq!(problems_of_backup(&target), [""; 0]);
    let nowhere = back_up_quietly(&DataLayout::new(&folder.path().join("none")), &target);
    assert!(matches!(nowhere, Err(BackupError::NoHub { .. })), "{nowhere:?}");
    data.close().await;
    other.close().await;
}

#[tokio::test]
async fn the_key_of_the_http_side_is_put_back_and_a_backup_without_one_is_as_good() {
    use std::os::unix::fs::PermissionsExt as _;
    let folder = tempfile::tempdir().unwrap();
    let (live, target) = (folder.path().join("live"), folder.path().join("backup"));
    let data = Data::new(&live).await;
    back_up_quietly(&data.layout, &target).unwrap();
    let without = folder.path().join("without");
    restore_quietly(&target, &without).await.unwrap();
    assert!(!DataLayout::new(&without).http_key().exists());

    cortex_shared::durable::write_file(&data.layout.http_key(), b"a key", 0o600).unwrap();
    back_up_quietly(&data.layout, &target).unwrap();
    data.close().await;
    assert_eq!(problems_of_backup(&target), [""; 0]);
    let again = folder.path().join("again");
    restore_quietly(&target, &again).await.unwrap();
    let key = DataLayout::new(&again).http_key();
    assert_eq!(fs::read(&key).unwrap(), b"a key");
    assert_eq!(fs::metadata(&key).unwrap().permissions().mode() & 0o777, 0o600);

    let manifest = Manifest::read(&target).unwrap();
    fs::write(StoreFiles::of_backup(&target, &manifest).http_key(), b"another").unwrap();
    let refused = restore_quietly(&target, &folder.path().join("never")).await;
    assert!(matches!(refused, Err(BackupError::Damaged { .. })), "{refused:?}");
}

/// Damage, and the words by which it is told.
type Damage = (&'static str, fn(&Path, WorkspaceId), &'static str);

fn change(database: &Path, sql: &str) {
    Connection::open(database).unwrap().execute_batch(sql).unwrap();
}

fn some_pack(data: &Path, id: WorkspaceId) -> PathBuf {
    list(&data.join("ws").join(id.to_string()).join("packs")).unwrap()[0].path()
}

fn ws_db(data: &Path, id: WorkspaceId) -> PathBuf {
    data.join("ws").join(id.to_string()).join("ws.db")
}

const DAMAGE: [Damage; 12] = [
    ("nothing", |_, _| {}, ""),
    (
        "a pack is gone",
        |data, id| fs::remove_file(some_pack(data, id)).unwrap(),
        "is missing or damaged",
    ),
    (
        "a bit of a pack",
        |data, id| {
            let path = some_pack(data, id);
            let mut bytes = fs::read(&path).unwrap();
            bytes[20] ^= 1;
            fs::write(path, bytes).unwrap();
        },
        "is missing or damaged",
    ),
    (
        "a chunk is not known",
        |data, id| change(&ws_db(data, id), "DELETE FROM chunks"),
        "is missing",
    ),
    (
        "the digest of a directory",
        |data, id| {
            change(&ws_db(data, id), "UPDATE entries SET digest = zeroblob(32) WHERE kind = 4")
        },
        "is not what its digest says",
    ),
    (
        "the name of an entry",
        |data, id| change(&ws_db(data, id), "UPDATE entries SET name = x'78' WHERE name = x'61'"),
        "is not what its digest says",
    ),
    (
        "the head",
        |data, id| change(&ws_db(data, id), "UPDATE head SET root = zeroblob(32)"),
        "the head is not the digest of the tree",
    ),
    (
        "the counters",
        |data, id| change(&ws_db(data, id), "UPDATE head SET entries = 7"),
        "counts 7 entries",
    ),
    (
        "the audit log",
        |data, _| change(&data.join("hub.db"), "UPDATE audit SET actor = 'eve' WHERE seq = 1"),
        "line 1 was changed",
    ),
    (
        "the end of the audit log",
        |data, _| change(&data.join("hub.db"), "DELETE FROM audit WHERE seq = 1"),
        "audit log: the log ends",
    ),
    ("a key", |data, _| fs::remove_file(data.join("ca/ca.key")).unwrap(), "ca.key is missing"),
    (
        "a page",
        |data, _| {
            let path = data.join("hub.db");
            let mut bytes = fs::read(&path).unwrap();
            let end = bytes.len();
            bytes[end - 8192..].fill(0x5a);
            fs::write(path, bytes).unwrap();
        },
        "hub.db: ",
    ),
];

#[tokio::test]
async fn damage_of_every_kind_is_found_and_told() {
    let folder = tempfile::tempdir().unwrap();
    let live = folder.path().join("live");
    let data = Data::new(&live).await;
    let id = data.id;
    data.write("a", b"some content that is long enough").await;
    data.close().await;
    let backup = folder.path().join("backup");
    back_up_quietly(&DataLayout::new(&live), &backup).unwrap();
    for (number, (what, damage, told)) in DAMAGE.into_iter().enumerate() {
        let copy = folder.path().join(number.to_string());
        // Each on a copy of its own, without the restore's own line in the log.
        copy_folder(&live, &copy);
        damage(&copy, id);
        let found = problems(&copy);
        if told.is_empty() {
            assert_eq!(found, [""; 0], "{what}");
        } else {
            assert!(found.iter().any(|problem| problem.contains(told)), "{what}: {found:?}");
        }
    }
}

#[tokio::test]
async fn a_backup_that_was_damaged_is_not_put_back_but_one_that_lacks_content_is() {
    let folder = tempfile::tempdir().unwrap();
    let (live, target) = (folder.path().join("live"), folder.path().join("backup"));
    let data = Data::new(&live).await;
    let gone = data.write("a", b"a").await;
    data.write("b", b"b").await;
    let id = data.id;
    back_up_quietly(&data.layout, &target).unwrap();
    data.close().await;
    let pack = target.join("ws").join(id.to_string()).join("packs").join(gone.to_string());
    fs::remove_file(pack).unwrap();
    assert_eq!(problems_of_backup(&target).len(), 1);
    let again = folder.path().join("again");
    let restored = restore_quietly(&target, &again).await.unwrap();
    assert_eq!((restored.packs, restored.lost), (1, 1));
    let data = Data::open(&again, id).await;
    assert_eq!(data.workspace.wanted().await.unwrap(), [Digest::of(b"a")], "members are asked");
    data.close().await;

    let manifest = Manifest::read(&target).unwrap();
    let hub_db = StoreFiles::of_backup(&target, &manifest).hub();
    change(&hub_db, "UPDATE nodes SET name = 'x'; CREATE TABLE t (x)");
    assert!(problems_of_backup(&target).iter().any(|p| p.contains("not what the manifest says")));
    let never = folder.path().join("never");
    let refused = restore_quietly(&target, &never).await;
    assert!(matches!(refused, Err(BackupError::Damaged { .. })), "{refused:?}");
    let refused = HubData::open(&config(&never)).await.err();
    assert!(matches!(refused, Some(StartError::RestoreUnfinished { .. })), "{refused:?}");
}

/// A hub that has lost a pack says so, and a pack that it lets go of while it is copied is no loss.
#[tokio::test]
async fn content_that_the_hub_has_lost_is_told_apart_from_content_that_it_let_go() {
    let folder = tempfile::tempdir().unwrap();
    let (live, target) = (folder.path().join("live"), folder.path().join("backup"));
    let data = Data::new(&live).await;
    let lost = data.write("a", b"a").await;
    let let_go = data.write("b", b"b").await;
    let packs = live.join("ws").join(data.id.to_string()).join("packs");
    fs::remove_file(packs.join(lost.to_string())).unwrap();
    let mut once = true;
    let workspace = Arc::clone(&data.workspace);
    let made = tokio::task::spawn_blocking({
        let layout = data.layout.clone();
        let runtime = tokio::runtime::Handle::current();
        move || {
            back_up(&layout, &target, &mut |what, _, _| {
                if what.ends_with("packs") && std::mem::take(&mut once) {
                    // As a collection does, between the copy of the database and that of the packs.
                    fs::remove_file(packs.join(let_go.to_string())).unwrap();
                    assert_eq!(runtime.block_on(workspace.read_pack(let_go)).unwrap(), None);
                }
            })
        }
    });
    let made = made.await.unwrap().unwrap();
    assert_eq!(made.lost, [(data.id, lost)]);
    assert_eq!(made.packs, 1, "the other one is in no database any more");
    data.close().await;
}

fn copy_folder(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in list(from).unwrap() {
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy_folder(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}

#[test]
fn names_in_a_manifest_lead_nowhere_else() {
    for (name, plain) in [
        ("hub.db", true),
        ("ws/0192-a.db", true),
        ("ca/ca.key", true),
        ("", false),
        ("/etc/passwd", false),
        ("../x", false),
        ("a/../x", false),
        ("a//b", false),
        (".hidden", false),
        ("a b", false),
        ("a\0", false),
    ] {
        assert_eq!(is_plain(name), plain, "{name:?}");
    }
}
