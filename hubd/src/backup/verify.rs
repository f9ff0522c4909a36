//! Checking everything durable: of a hub, running or not, or of a backup. Changes nothing.

use cortex_shared::entry::Digest;
use cortex_shared::ids::WorkspaceId;
use cortex_shared::pack::Pack;

use super::{BackupError, Kind, Manifest, StoreFiles, Tell, hash_of};
use crate::authority::audit::verify_file;
use crate::store::offline::{OfflineDatabase, Schema};
use crate::sync::pack_files::PackFiles;

/// What was looked at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Verified {
    /// Databases.
    pub databases: u64,
    /// Workspaces.
    pub workspaces: u64,
    /// Packs.
    pub packs: u64,
    /// Bytes of those.
    pub pack_bytes: u64,
    /// Entries of all trees.
    pub entries: u64,
    /// Old versions.
    pub old_versions: u64,
    /// Chunks that are known to be lost, and that members have been asked for.
    pub wanted: u64,
    /// Lines of the audit log.
    pub audit_lines: u64,
    /// Problems that were told.
    pub problems: u64,
}

/// Checks every file, every pack's and chunk's hash, that each piece of each file's content is there, and
/// the chain of the audit log. `problem` hears what is wrong, and where.
///
/// # Errors
/// If something cannot be looked at. A problem is no error.
pub fn verify(
    files: &StoreFiles,
    manifest: Option<&Manifest>,
    tell: Tell<'_>,
    problem: &mut dyn FnMut(&str, &str),
) -> Result<Verified, BackupError> {
    let hub = files.hub();
    if !hub.exists() {
        return Err(BackupError::NoHub { path: files.databases.clone() });
    }
    let mut looking = Looking { files, found: Verified::default(), problem };
    if let Some(manifest) = manifest {
        looking.manifest(manifest)?;
    }
    tell("the main database", 0, 0);
    if let Some(database) = looking.open("hub.db", &hub)
        && looking.schema("hub.db", database.main_schema().map_err(BackupError::database(&hub))?)
    {
        looking.authorities(&database)?;
        looking.audit(&database)?;
        looking.known_workspaces(&database)?;
    }
    let history = files.history();
    if history.exists() {
        tell("the history of nodes", 0, 0);
        looking.open("history.db", &history);
    }
    let workspaces = match manifest {
        Some(manifest) => manifest.workspaces.iter().map(|workspace| workspace.id).collect(),
        None => files.workspaces()?,
    };
    for id in workspaces {
        looking.workspace(id, tell)?;
    }
    Ok(looking.found)
}

struct Looking<'a> {
    files: &'a StoreFiles,
    found: Verified,
    problem: &'a mut dyn FnMut(&str, &str),
}

impl Looking<'_> {
    fn tell(&mut self, place: &str, what: &str) {
        self.found.problems += 1;
        (self.problem)(place, what);
    }

    fn manifest(&mut self, manifest: &Manifest) -> Result<(), BackupError> {
        for file in &manifest.files {
            let path = self.files.databases.join(&file.path);
            if !path.exists() {
                self.tell(&file.path, "it is missing");
            } else if hash_of(&path)? != (file.bytes, file.blake3.clone()) {
                self.tell(&file.path, "it is not what the manifest says");
            }
        }
        Ok(())
    }

    /// Opens a database if it is sound enough to be read.
    fn open(&mut self, place: &str, path: &std::path::Path) -> Option<OfflineDatabase> {
        self.found.databases += 1;
        let checked = OfflineDatabase::open(path)
            .and_then(|database| database.integrity().map(|problems| (database, problems)));
        match checked {
            Ok((database, problems)) => {
                problems.iter().for_each(|what| self.tell(place, what));
                Some(database)
            }
            Err(error) => {
                let why = std::error::Error::source(&error).map(ToString::to_string);
                self.tell(place, &format!("{error}: {}", why.unwrap_or_default()));
                None
            }
        }
    }

    /// Whether tables are those that this program knows.
    fn schema(&mut self, place: &str, schema: Schema) -> bool {
        match schema {
            Schema::Current => return true,
            Schema::Older => self.tell(place, "it is of an older cortex-hubd: start the hub once"),
            Schema::Newer => self.tell(place, "it is of a newer cortex-hubd: use that"),
        }
        false
    }

    fn authorities(&mut self, database: &OfflineDatabase) -> Result<(), BackupError> {
        let hub = self.files.hub();
        let state = database.authorities().map_err(BackupError::database(&hub))?;
        let names = state.into_iter().flat_map(|state| [Some(state.established), state.next]);
        for name in names.flatten() {
            let (key, certificate) = crate::enroll::ca::files(&self.files.ca(), &name);
            for path in [key, certificate].into_iter().filter(|path| !path.exists()) {
                self.tell("ca", &format!("{} is missing", path.display()));
            }
        }
        Ok(())
    }

    fn audit(&mut self, database: &OfflineDatabase) -> Result<(), BackupError> {
        let mark = self.files.audit_mark();
        let found = verify_file(&mark, |after, limit| database.audit_page(after, limit))?;
        self.found.audit_lines = found.entries;
        if let Some(problem) = found.problem {
            self.tell("audit log", &problem.to_string());
        }
        Ok(())
    }

    /// Each workspace of a backup has its content. At a hub one that nobody has written to has none.
    fn known_workspaces(&mut self, database: &OfflineDatabase) -> Result<(), BackupError> {
        let hub = self.files.hub();
        for id in database.workspaces().map_err(BackupError::database(&hub))? {
            let content = self.files.content(id);
            if content.exists() && !self.files.workspace(id).exists() {
                self.tell(&format!("workspace {id}"), "its database is missing");
            }
        }
        Ok(())
    }

    fn workspace(&mut self, id: WorkspaceId, tell: Tell<'_>) -> Result<(), BackupError> {
        let place = format!("workspace {id}");
        let path = self.files.workspace(id);
        tell(&place, 0, 0);
        if !path.exists() {
            if self.files.kind == Kind::Backup {
                self.tell(&place, "its database is missing");
            }
            return Ok(());
        }
        self.found.workspaces += 1;
        let Some(database) = self.open(&place, &path) else { return Ok(()) };
        let schema = database.workspace_schema().map_err(BackupError::database(&path))?;
        if !self.schema(&place, schema) {
            return Ok(());
        }
        let checked = database.check_workspace(&mut |what| self.tell(&place, &what));
        let checked = checked.map_err(BackupError::database(&path))?;
        self.found.entries += checked.entries;
        self.found.old_versions += checked.old_versions;
        self.found.wanted += checked.wanted;

        let packs = PackFiles::of_another(&self.files.content(id));
        let known = database.packs().map_err(BackupError::database(&path))?;
        let all = known.len() as u64;
        for (done, hash) in (0..).zip(known) {
            tell(&format!("{place}: packs"), done, all);
            let chunks = database.chunks_in(&hash).map_err(BackupError::database(&path))?;
            let what = match check_pack(&packs, &hash, &chunks)? {
                Ok(bytes) => {
                    self.found.packs += 1;
                    self.found.pack_bytes += bytes;
                    continue;
                }
                Err(what) => what,
            };
            // A hub that runs may have let it go since.
            if database.still_has_pack(&hash).map_err(BackupError::database(&path))? {
                self.tell(&place, &format!("pack {hash} {what}"));
            }
        }
        Ok(())
    }
}

/// The size of a pack that is sound, or what is wrong with it.
fn check_pack(
    packs: &PackFiles,
    hash: &Digest,
    chunks: &[Digest],
) -> Result<Result<u64, &'static str>, BackupError> {
    let Some(bytes) = packs.read(hash)? else { return Ok(Err("is missing or damaged")) };
    let len = bytes.len() as u64;
    let pack = match Pack::parse(bytes) {
        Ok(pack) if pack.verify().is_ok() => pack,
        _ => return Ok(Err("holds what is not its content")),
    };
    let whole = chunks.iter().all(|chunk| pack.contains(chunk));
    Ok(if whole { Ok(len) } else { Err("lacks chunks that it should have") })
}
