//! Making a backup, beside the hub that goes on.

use std::collections::{BTreeMap, HashSet};
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use cortex_shared::clock::unix_ms;
use cortex_shared::durable;
use cortex_shared::entry::Digest;
use cortex_shared::ids::WorkspaceId;

use super::{
    BackupError, FORMAT, FileRecord, MANIFEST, Manifest, StoreFiles, Tell, WorkspaceRecord,
    create_folder, hash_of, list, lock, remove, sync_folder, write_new,
};
use crate::config::DataLayout;
use crate::store::offline::OfflineDatabase;
use crate::sync::pack_files::PackFiles;

/// How often a workspace is copied anew because content that its copy names was let go meanwhile. The
/// hub keeps content for hours after it became useless, so once is rare.
const ATTEMPTS: u32 = 10;
/// Largest file of the authority's folder.
const MAX_SMALL_FILE_BYTES: u64 = 1024 * 1024;

/// A backup that was made.
#[derive(Debug)]
pub struct Backup {
    /// What it holds.
    pub manifest: Manifest,
    /// Packs that are in it.
    pub packs: u64,
    /// Those of them that this one copied.
    pub packs_copied: u64,
    /// Bytes of those.
    pub bytes_copied: u64,
    /// Packs that the hub has lost, or that are damaged on its disk: their content is not in the backup
    /// unless an earlier one had it.
    pub lost: Vec<(WorkspaceId, Digest)>,
}

/// Copies everything durable of the hub on `data` into the folder `target`, whether it runs or not. In a
/// folder with an earlier backup of the same hub, only what is new is copied.
///
/// # Errors
/// See [`BackupError`]. An earlier backup is still whole then.
pub fn back_up(data: &DataLayout, target: &Path, tell: Tell<'_>) -> Result<Backup, BackupError> {
    let from = StoreFiles::live(data);
    if !from.hub().exists() || data.restoring().exists() {
        return Err(BackupError::NoHub { path: data.root().to_owned() });
    }
    create_folder(target)?;
    let earlier = match Manifest::read(target) {
        Ok(manifest) => Some(manifest),
        Err(BackupError::NotABackup { .. }) if is_unused(target)? => None,
        Err(error) => return Err(error),
    };
    let _lock = lock(&target.join("lock"))?;
    let mut making = Making::begin(from, target, earlier)?;
    let backup = making.all(tell)?;
    making.publish(&backup.manifest)?;
    Ok(backup)
}

/// Whether a folder holds nothing but what an interrupted first backup leaves.
fn is_unused(target: &Path) -> Result<bool, BackupError> {
    Ok(list(target)?.iter().all(|entry| {
        entry.file_name().to_str().is_some_and(|name| {
            matches!(name, "lock" | "ws" | "lost+found") || name.starts_with("databases-")
        })
    }))
}

struct Making<'a> {
    from: StoreFiles,
    target: &'a Path,
    earlier: Option<Manifest>,
    to: StoreFiles,
    manifest: Manifest,
    /// Packs that belong to it.
    needed: BTreeMap<WorkspaceId, HashSet<Digest>>,
}

impl<'a> Making<'a> {
    fn begin(
        from: StoreFiles,
        target: &'a Path,
        earlier: Option<Manifest>,
    ) -> Result<Self, BackupError> {
        let hub = from.hub();
        let database = OfflineDatabase::open(&hub).map_err(BackupError::database(&hub))?;
        let mesh = database.mesh().map_err(BackupError::database(&hub))?;
        let mesh = mesh.ok_or_else(|| BackupError::NoHub { path: from.databases.clone() })?;
        if let Some(other) = earlier.as_ref().map(|earlier| earlier.mesh).filter(|m| *m != mesh) {
            return Err(BackupError::OtherMesh { path: target.to_owned(), mesh: other });
        }
        let kept = earlier.as_ref().map(|earlier| earlier.databases.as_str());
        for entry in list(target)? {
            let name = entry.file_name();
            let left_over = name.to_str().is_some_and(|name| name.starts_with("databases-"))
                && name.to_str() != kept;
            if left_over {
                remove(&entry.path())?;
            }
        }
        let number: u64 = kept
            .and_then(|name| name.strip_prefix("databases-"))
            .and_then(|number| number.parse().ok())
            .unwrap_or(0);
        let manifest = Manifest {
            format: FORMAT,
            hub_version: env!("CARGO_PKG_VERSION").to_owned(),
            mesh,
            created_at_ms: unix_ms(),
            databases: format!("databases-{}", number.saturating_add(1)),
            files: Vec::new(),
            workspaces: Vec::new(),
        };
        let to = StoreFiles::of_backup(target, &manifest);
        create_folder(&to.databases)?;
        Ok(Self { from, target, earlier, to, manifest, needed: BTreeMap::new() })
    }

    fn all(&mut self, tell: Tell<'_>) -> Result<Backup, BackupError> {
        let mut copied = Copied::default();
        // The mark may be behind the log that is copied after it, and never beyond it.
        let small = [self.from.audit_mark(), self.from.http_key()];
        for path in small.into_iter().filter(|path| path.exists()) {
            self.copy_small(&path)?;
        }
        self.copy_authorities()?;
        for id in self.from.workspaces()? {
            self.copy_workspace(id, &mut copied, tell)?;
        }
        let (history, hub) =
            ((self.from.history(), self.to.history()), (self.from.hub(), self.to.hub()));
        if history.0.exists() {
            copy_database(&history.0, &history.1, "history", tell)?;
        }
        // Last: whatever it names is older.
        copy_database(&hub.0, &hub.1, "hub", tell)?;
        // An authority that was made meanwhile.
        self.copy_authorities()?;
        let known = OfflineDatabase::open(&hub.1)
            .map_err(BackupError::database(&hub.1))?
            .workspaces()
            .map_err(BackupError::database(&hub.1))?;
        for id in
            known.iter().filter(|id| !self.needed.contains_key(id)).copied().collect::<Vec<_>>()
        {
            // One without content yet has no folder.
            self.copy_workspace(id, &mut copied, tell)?;
        }
        for id in self.needed.keys().filter(|id| !known.contains(id)).copied().collect::<Vec<_>>() {
            // Deleted meanwhile.
            self.needed.remove(&id);
            remove(&self.to.workspace(id))?;
        }
        self.record()?;
        Ok(Backup {
            manifest: self.manifest.clone(),
            packs: self.needed.values().map(|packs| packs.len() as u64).sum(),
            packs_copied: copied.packs,
            bytes_copied: copied.bytes,
            lost: copied.lost,
        })
    }

    /// Copies a file of some hundred bytes.
    fn copy_small(&self, path: &Path) -> Result<(), BackupError> {
        use std::io::Read as _;
        let below = path.strip_prefix(&self.from.databases).unwrap_or(path);
        let target = self.to.databases.join(below);
        let mut bytes = Vec::new();
        File::open(path)
            .and_then(|file| file.take(MAX_SMALL_FILE_BYTES).read_to_end(&mut bytes))
            .map_err(BackupError::file("read", path))?;
        remove(&target)?;
        write_new(&target, &bytes)
    }

    /// What is there already stays: the files of an authority never change, but may go.
    fn copy_authorities(&self) -> Result<(), BackupError> {
        create_folder(&self.to.ca())?;
        for entry in list(&self.from.ca())? {
            let target = self.to.ca().join(entry.file_name());
            let temporary = entry.file_name().as_encoded_bytes().starts_with(b".");
            if !temporary && !target.exists() {
                self.copy_small(&entry.path())?;
            }
        }
        Ok(())
    }

    fn copy_workspace(
        &mut self,
        id: WorkspaceId,
        copied: &mut Copied,
        tell: Tell<'_>,
    ) -> Result<(), BackupError> {
        let (from, to) = (self.from.workspace(id), self.to.workspace(id));
        if !from.exists() {
            return Ok(());
        }
        let source = PackFiles::of_another(&self.from.content(id));
        let packs = self.to.content(id).join("packs");
        create_folder(&packs)?;
        create_folder(to.parent().unwrap_or(&to))?;
        let mut present = HashSet::new();
        for entry in list(&packs)? {
            match entry.file_name().to_str().and_then(crate::sync::pack_files::parse_name) {
                Some(hash) => drop(present.insert(hash)),
                None => remove(&entry.path())?,
            }
        }
        let what = format!("workspace {id}");
        for _ in 0..ATTEMPTS {
            copy_database(&from, &to, &what, tell)?;
            let database = OfflineDatabase::open(&to).map_err(BackupError::database(&to))?;
            let needed = database.packs().map_err(BackupError::database(&to))?;
            let mut missing: Vec<Digest> = needed.difference(&present).copied().collect();
            missing.sort_unstable_by_key(|hash| *hash.as_bytes());
            let (mut lost, mut let_go) = (Vec::new(), false);
            let all = missing.len() as u64;
            for (done, hash) in (0..).zip(missing) {
                tell(&format!("{what}: packs"), done, all);
                if let Some(bytes) = source.read(&hash)? {
                    put(&packs, &hash, &bytes)?;
                    present.insert(hash);
                    copied.packs += 1;
                    copied.bytes += bytes.len() as u64;
                    continue;
                }
                let live = OfflineDatabase::open(&from).map_err(BackupError::database(&from))?;
                if live.still_has_pack(&hash).map_err(BackupError::database(&from))? {
                    lost.push((id, hash));
                } else {
                    let_go = true;
                }
            }
            if !let_go {
                sync_folder(&packs)?;
                copied.lost.extend(lost);
                self.needed.insert(id, needed);
                return Ok(());
            }
        }
        if !from.exists() {
            return remove(&to);
        }
        Err(BackupError::TooFast { workspace: id })
    }

    /// Writes down and flushes what belongs to it.
    fn record(&mut self) -> Result<(), BackupError> {
        let mut folders = vec![self.to.databases.clone()];
        let mut files = Vec::new();
        while let Some(folder) = folders.pop() {
            for entry in list(&folder)? {
                let path = entry.path();
                if path.is_dir() {
                    folders.push(path);
                    continue;
                }
                let (bytes, blake3) = hash_of(&path)?;
                let below = path.strip_prefix(&self.to.databases).unwrap_or(&path);
                files.push(FileRecord { path: below.display().to_string(), bytes, blake3 });
            }
            sync_folder(&folder)?;
        }
        files.sort_by(|a, b| a.path.cmp(&b.path));
        self.manifest.files = files;
        let record = |(id, packs): (&WorkspaceId, &HashSet<Digest>)| WorkspaceRecord {
            id: *id,
            packs: packs.len() as u64,
        };
        self.manifest.workspaces = self.needed.iter().map(record).collect();
        for id in self.needed.keys() {
            sync_folder(&self.to.content(*id))?;
        }
        for folder in [&self.to.content, &self.target.to_owned()] {
            if folder.exists() {
                sync_folder(folder)?;
            }
        }
        Ok(())
    }

    /// Makes it the backup that is in the folder, and removes what only the one before needed.
    fn publish(&self, manifest: &Manifest) -> Result<(), BackupError> {
        let path = self.target.join(MANIFEST);
        let failed = BackupError::file("write", &path);
        let text = serde_json::to_vec_pretty(manifest).map_err(|error| failed(error.into()))?;
        durable::write_file(&path, &text, 0o600).map_err(BackupError::file("write", &path))?;
        if let Some(earlier) = &self.earlier {
            remove(&self.target.join(&earlier.databases))?;
        }
        for id in self.to.workspaces()? {
            let Some(needed) = self.needed.get(&id) else {
                remove(&self.to.content(id))?;
                continue;
            };
            for entry in list(&self.to.content(id).join("packs"))? {
                let hash = entry.file_name().to_str().and_then(crate::sync::pack_files::parse_name);
                if hash.is_none_or(|hash| !needed.contains(&hash)) {
                    remove(&entry.path())?;
                }
            }
        }
        Ok(())
    }
}

#[derive(Default)]
struct Copied {
    packs: u64,
    bytes: u64,
    lost: Vec<(WorkspaceId, Digest)>,
}

fn copy_database(from: &Path, to: &PathBuf, what: &str, tell: Tell<'_>) -> Result<(), BackupError> {
    // Of an attempt before.
    remove(to)?;
    let database = OfflineDatabase::open(from).map_err(BackupError::database(from))?;
    let progress = |done, all| tell(&format!("{what}: database"), done, all);
    database.copy_to(to, progress).map_err(BackupError::database(from))?;
    let private = |file: &File| {
        use std::os::unix::fs::PermissionsExt as _;
        file.set_permissions(fs::Permissions::from_mode(0o600))?;
        file.sync_all()
    };
    File::open(to).and_then(|file| private(&file)).map_err(BackupError::file("flush", to))
}

/// Puts a pack into a folder, whole or not at all. The folder is flushed once for all of them.
pub(super) fn put(folder: &Path, hash: &Digest, bytes: &[u8]) -> Result<(), BackupError> {
    let temporary = folder.join(format!(".{}", std::process::id()));
    let path = folder.join(hash.to_string());
    remove(&temporary)?;
    write_new(&temporary, bytes)?;
    fs::rename(&temporary, &path).map_err(BackupError::file("write", &path))
}
