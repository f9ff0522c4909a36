//! Putting a backup back, where nothing is.
//!
//! Everything is put together and checked in `DATA/restoring`, and moved into place at the end; while that
//! folder is there no hub starts, and the same command begins anew.
//!
//! Nothing has to be said to the nodes. One that holds a newer certificate than the hub remembers proves by
//! it that the mesh's authority has given it (`store::identity`). A member of a workspace tells the newest
//! version it knows, and one that this history never had begins a new epoch: all merge anew, and nobody
//! deletes anything (`store::workspace::sqlite::history`). What a node or a member cannot repair is
//! decided here: invites that were open are revoked, since they may have been used up since; and the audit
//! log says that this is a hub put back, from when, and what was revoked.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::Path;
use std::sync::Arc;

use cortex_shared::clock::unix_ms;
use cortex_shared::ids::WorkspaceId;
use cortex_shared::secret::InviteId;
use cortex_shared::tasks::TaskScope;
use serde_json::json;

use super::make::put;
use super::{
    BackupError, FileRecord, Manifest, StoreFiles, Tell, create_folder, list, lock, remove,
    sync_folder,
};
use crate::authority::audit::AuditLog;
use crate::config::DataLayout;
use crate::store::offline::{OfflineDatabase, Schema};
use crate::store::sqlite::SqliteStore;
use crate::store::{Actor, Store, StoreError};
use crate::sync::pack_files::PackFiles;

/// What a restore leaves behind, and whatever else may be in a directory where nothing is.
const NO_CONTENT: [&str; 3] = ["lock", "restoring", "lost+found"];
/// What is moved into place, in this order: a main database is only there once all else is.
const IN_ORDER: [&str; 6] = ["ws", "ca", "http.key", "audit.head", "history.db", "hub.db"];

/// A backup that was put back.
#[derive(Debug)]
pub struct Restored {
    /// What it was.
    pub manifest: Manifest,
    /// Packs that were put back.
    pub packs: u64,
    /// Packs that the backup lacks, or that are damaged in it: the hub will ask its members for their
    /// content.
    pub lost: u64,
    /// Invites that were open, and are revoked now.
    pub invites_revoked: Vec<InviteId>,
}

/// Puts a backup back into a data directory that is empty, or does not exist yet.
///
/// # Errors
/// See [`BackupError`]. What was put together by then stays in `DATA/restoring`, for the next attempt to
/// remove.
pub async fn restore(
    backup: &Path,
    data: &DataLayout,
    by: &Actor,
    tell: Tell<'_>,
) -> Result<Restored, BackupError> {
    let manifest = Manifest::read(backup)?;
    let from = StoreFiles::of_backup(backup, &manifest);
    check_schema(&from)?;
    create_folder(data.root())?;
    let lock = lock(&data.lock())?;
    let staging = data.restoring();
    // Only a restore that was interrupted leaves that folder: then all else is its own, too.
    let again = staging.exists();
    let others = list(data.root())?;
    let empty = others.iter().all(|entry| {
        entry
            .file_name()
            .to_str()
            .is_some_and(|name| NO_CONTENT.contains(&name) || again && IN_ORDER.contains(&name))
    });
    if !empty {
        return Err(BackupError::NotEmpty { path: data.root().to_owned() });
    }
    remove_contents(&staging)?;
    for name in IN_ORDER {
        remove(&data.root().join(name))?;
    }
    create_folder(&staging)?;
    sync_folder(data.root())?;

    let staged = StoreFiles::live(&DataLayout::new(&staging));
    for (done, file) in (0..).zip(&manifest.files) {
        tell("databases", done, manifest.files.len() as u64);
        copy_file(&from, &staged, file)?;
    }
    let (mut packs, mut lost) = (0, 0);
    for workspace in &manifest.workspaces {
        let found = copy_packs(&from, &staged, workspace.id, tell)?;
        packs += found.0;
        lost += found.1;
    }
    let invites_revoked = mark(&DataLayout::new(&staging), &manifest, by).await?;
    let owner = fs::metadata(data.root()).map_err(BackupError::file("look at", data.root()))?;
    settle(&staging, (owner.uid(), owner.gid()))?;
    for name in IN_ORDER {
        let (staged, place) = (staging.join(name), data.root().join(name));
        match fs::rename(&staged, &place) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(BackupError::file("write", &place)(error));
            }
            _ => {}
        }
        sync_folder(data.root())?;
    }
    remove(&staging)?;
    sync_folder(data.root())?;
    give(&data.lock(), (owner.uid(), owner.gid()))?;
    drop(lock);
    Ok(Restored { manifest, packs, lost, invites_revoked })
}

/// A restore that is repeated empties the folder, so that it is there throughout.
fn remove_contents(folder: &Path) -> Result<(), BackupError> {
    list(folder)?.iter().try_for_each(|entry| remove(&entry.path()))
}

/// A backup made by a later program may hold what this one does not understand.
fn check_schema(from: &StoreFiles) -> Result<(), BackupError> {
    let hub = from.hub();
    let schema = OfflineDatabase::open(&hub).and_then(|database| database.main_schema());
    match schema.map_err(BackupError::database(&hub))? {
        Schema::Newer => Err(BackupError::NotABackup {
            path: hub,
            problem: "it was made by a newer cortex-hubd: use that".to_owned(),
        }),
        Schema::Current | Schema::Older => Ok(()),
    }
}

/// Copies a file of the manifest, which has to be what that says.
fn copy_file(from: &StoreFiles, to: &StoreFiles, file: &FileRecord) -> Result<(), BackupError> {
    let source = from.databases.join(&file.path);
    // Each workspace's database is beside its packs there.
    let id = file.path.strip_prefix("ws/").and_then(|name| name.strip_suffix(".db"));
    let target = match id.map(str::parse::<WorkspaceId>) {
        Some(Ok(id)) => to.workspace(id),
        Some(Err(_)) => return Err(BackupError::Damaged { path: source }),
        None => to.databases.join(&file.path),
    };
    if let Some(folder) = target.parent() {
        create_folder(folder)?;
    }
    let mut hasher = blake3::Hasher::new();
    let mut input = File::open(&source).map_err(BackupError::file("read", &source))?;
    let mut output = File::create_new(&target).map_err(BackupError::file("write", &target))?;
    let mut buffer = vec![0; 1 << 20];
    loop {
        use std::io::{Read as _, Write as _};
        let read = input.read(&mut buffer).map_err(BackupError::file("read", &source))?;
        if read == 0 {
            break;
        }
        hasher.update(&buffer[..read]);
        output.write_all(&buffer[..read]).map_err(BackupError::file("write", &target))?;
    }
    output.sync_all().map_err(BackupError::file("flush", &target))?;
    if (hasher.count(), hasher.finalize().to_string()) != (file.bytes, file.blake3.clone()) {
        return Err(BackupError::Damaged { path: source });
    }
    Ok(())
}

/// Copies the packs that a workspace's database names; returns how many, and how many could not be.
fn copy_packs(
    from: &StoreFiles,
    to: &StoreFiles,
    id: WorkspaceId,
    tell: Tell<'_>,
) -> Result<(u64, u64), BackupError> {
    let database = from.workspace(id);
    let needed = OfflineDatabase::open(&database).map_err(BackupError::database(&database))?;
    let needed = needed.packs().map_err(BackupError::database(&database))?;
    let source = PackFiles::of_another(&from.content(id));
    let folder = to.content(id).join("packs");
    create_folder(&folder)?;
    let (mut packs, mut lost) = (0, 0);
    let all = needed.len() as u64;
    for hash in needed {
        tell(&format!("workspace {id}: packs"), packs + lost, all);
        match source.read(&hash)? {
            Some(bytes) => {
                put(&folder, &hash, &bytes)?;
                packs += 1;
            }
            // The hub forgets it when it opens the workspace, and asks for its content.
            None => lost += 1,
        }
    }
    sync_folder(&folder)?;
    Ok((packs, lost))
}

/// Revokes open invites, and says in the audit log what happened.
async fn mark(
    staged: &DataLayout,
    manifest: &Manifest,
    by: &Actor,
) -> Result<Vec<InviteId>, BackupError> {
    let path = staged.database();
    let databases = TaskScope::new();
    let store = SqliteStore::open(path.clone(), &databases).await;
    let store: Arc<dyn Store> = Arc::new(store.map_err(BackupError::database(&path))?);
    let marking = async {
        let now_ms = unix_ms();
        let mut revoked = Vec::new();
        for found in store.invites().await? {
            let invite = &found.invite;
            let open = found.revoked_at_ms.is_none()
                && invite.expires_at_ms > now_ms
                && found.uses < invite.max_uses;
            if open {
                let detail = json!({ "reason": "the hub was restored from a backup" });
                let line = by.audit(now_ms, "invite.revoked", invite.id.to_string(), detail);
                store.revoke_invite(invite.id.clone(), now_ms, line).await?;
                revoked.push(invite.id.clone());
            }
        }
        let detail = json!({
            "backup_of_ms": manifest.created_at_ms,
            "hub_version": manifest.hub_version,
            "invites_revoked": revoked.len(),
        });
        store.record_audit(by.audit(now_ms, "hub.restored", "hub", detail)).await?;
        Ok::<_, StoreError>(revoked)
    };
    let revoked = marking.await.map_err(BackupError::database(&path));
    let marked = match &revoked {
        Ok(_) => AuditLog::new(Arc::clone(&store), staged.audit_mark()).move_mark().await,
        Err(_) => Ok(()),
    };
    databases.cancel();
    databases.finish().await;
    marked?;
    revoked
}

/// Gives everything that was put together to whom the data directory belongs, and flushes the folders.
fn settle(path: &Path, owner: (u32, u32)) -> Result<(), BackupError> {
    give(path, owner)?;
    for entry in list(path)? {
        let path = entry.path();
        if entry.file_type().map_err(BackupError::file("look at", &path))?.is_dir() {
            settle(&path, owner)?;
        } else {
            let private = fs::Permissions::from_mode(0o600);
            fs::set_permissions(&path, private).map_err(BackupError::file("change", &path))?;
            give(&path, owner)?;
        }
    }
    sync_folder(path)
}

fn give(path: &Path, (uid, gid): (u32, u32)) -> Result<(), BackupError> {
    let has = fs::metadata(path).map_err(BackupError::file("look at", path))?;
    if (has.uid(), has.gid()) == (uid, gid) || !rustix::process::geteuid().is_root() {
        return Ok(());
    }
    std::os::unix::fs::chown(path, Some(uid), Some(gid)).map_err(BackupError::file("change", path))
}
