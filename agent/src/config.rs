//! Where this agent keeps its state, and what its owner decided about it.
//!
//! | place | what | written by |
//! |---|---|---|
//! | `STATE/identity/` | key and certificates of this node, see [`crate::identity`] | `join`, `run`, `identity` |
//! | `STATE/audit*.jsonl` | what changed authority here, see [`crate::audit`] | all of them |
//! | `STATE/agent.json` | [`Settings`] | `join`, `ceiling set`, `workspace attach` |
//! | `STATE/agent.lock`, `STATE/agent.sock` | one daemon per state; its local socket | `run` |
//! | `STATE/workspaces/ID/` | index of a workspace, see [`crate::sync`] | `run` |
//! | `CONFIG/contexts/NAME/`, `CONFIG/current-context` | operators' logins, see [`contexts`] | `login` |
//!
//! Every file is replaced whole and durably; a crash leaves the old one or the new one.

mod ceiling;
pub mod contexts;
mod folder;

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use cortex_shared::durable;
use cortex_shared::library::LIBRARY_NAME;
use cortex_shared::policy::{Bound, Mode, Network};
use rustix::fs::OFlags;
use serde::{Deserialize, Serialize};

pub use ceiling::{Ceiling, Exposed};
pub(crate) use folder::{Folder, own_like_folder};

use crate::client::HubAddress;
use crate::sandbox::exposed::{self, MAX_EXPOSED};

/// Largest file of settings or identity that is read: far more than any of them needs.
const MAX_FILE_BYTES: u64 = 256 * 1024;

/// Less memory than this cannot even start a shell.
pub const LEAST_MEMORY_BYTES: u64 = 16 * 1024 * 1024;

/// Files of a state that go when a node leaves for good.
/// `started-tasks` is the journal of earlier versions.
const PURGED_FILES: [&str; 5] =
    ["agent.json", "agent.json.lock", "tasks", "started-tasks", "memberships.json"];

/// Why state or settings cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The user has no home directory, and no directory was named.
    #[error("this user has no home directory, and no {what} was named")]
    NoHome {
        /// The directory in question.
        what: &'static str,
    },
    /// A file or directory cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The path.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A file or directory cannot be written.
    #[error("cannot write {}", path.display())]
    Write {
        /// The path.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A file does not hold what it should.
    #[error("{} is damaged: {problem}", path.display())]
    Damaged {
        /// The path.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// Somebody else's state.
    #[error("{} belongs to user {owner}, and this is user {own}", path.display())]
    NotOwner {
        /// The state directory.
        path: PathBuf,
        /// Whose it is.
        owner: u32,
        /// Who tried.
        own: u32,
    },
    /// Others than the owner may read a secret.
    #[error("{} may be read by others (mode {mode:o})", path.display())]
    TooOpen {
        /// The path.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// What the hub says of this login is not believed.
    #[error("the hub's answer is not believed: {problem}")]
    Refused {
        /// What is wrong with it.
        problem: String,
    },
    /// There is no such context.
    #[error("there is no context {0:?}")]
    NoSuchContext(String),
    /// Nobody has logged in here.
    #[error("not logged in")]
    NotLoggedIn,
    /// This node has not joined a mesh.
    #[error("this node has not joined a mesh (state in {})", state.display())]
    NotJoined {
        /// The state directory.
        state: PathBuf,
    },
}

/// The directory with everything this node must remember.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StateDir(PathBuf);

impl StateDir {
    /// The directory that was named, or the default: `/var/lib/cortex-agent` for root, the user's
    /// data directory otherwise.
    ///
    /// # Errors
    /// If none was named and the user has no home.
    pub fn resolve(named: Option<PathBuf>) -> Result<Self, ConfigError> {
        if let Some(path) = named {
            let path =
                std::path::absolute(&path).map_err(|source| ConfigError::Read { path, source })?;
            return Ok(Self(path));
        }
        if rustix::process::geteuid().is_root() {
            return Ok(Self(PathBuf::from("/var/lib/cortex-agent")));
        }
        Self::of_user()
    }

    /// This user's, also if it is root.
    ///
    /// # Errors
    /// If the user has no home.
    pub fn of_user() -> Result<Self, ConfigError> {
        directories::ProjectDirs::from("", "", "cortex-agent")
            .map(|dirs| Self(dirs.data_dir().to_owned()))
            .ok_or(ConfigError::NoHome { what: "state directory (--state)" })
    }

    /// Creates the directory, for its owner only.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn create(&self) -> Result<(), ConfigError> {
        durable::create_private_folder(&self.0)
            .map_err(|source| ConfigError::Write { path: self.0.clone(), source })
    }

    /// The directory itself.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Key and certificates.
    #[must_use]
    pub fn identity(&self) -> PathBuf {
        self.0.join("identity")
    }

    /// Where an identity is prepared that will replace the one in [`StateDir::identity`].
    #[must_use]
    pub fn new_identity(&self) -> PathBuf {
        self.0.join("identity.new")
    }

    /// The local socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.0.join("agent.sock")
    }

    /// The lock that one daemon holds.
    #[must_use]
    pub fn lock(&self) -> PathBuf {
        self.0.join("agent.lock")
    }

    /// Takes the lock that one process at a time may hold: the daemon, or a command that changes
    /// the identity. It ends with the file, so with the process, however it ends. `None` if another
    /// holds it.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn try_lock(&self) -> Result<Option<std::fs::File>, ConfigError> {
        let file = self.lock_file()?;
        match file.try_lock() {
            Ok(()) => Ok(Some(file)),
            Err(std::fs::TryLockError::WouldBlock) => Ok(None),
            Err(std::fs::TryLockError::Error(source)) => {
                Err(ConfigError::Write { path: self.lock(), source })
            }
        }
    }

    /// As [`StateDir::try_lock`], waiting for the other one. Blocks the thread.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn wait_for_lock(&self) -> Result<std::fs::File, ConfigError> {
        let file = self.lock_file()?;
        file.lock().map_err(|source| ConfigError::Write { path: self.lock(), source })?;
        Ok(file)
    }

    fn lock_file(&self) -> Result<std::fs::File, ConfigError> {
        let path = self.lock();
        Folder::open(&self.0)
            .and_then(|folder| folder.file("agent.lock", OFlags::WRONLY))
            .map_err(|source| ConfigError::Write { path, source })
    }

    /// Deletes keys, certificates, settings and indexes of a node that has left. The audit file
    /// stays, and so do the workspaces' files, which are elsewhere. The caller holds the lock.
    ///
    /// # Errors
    /// Those of the file system; repeating goes on where it stopped.
    pub fn purge(&self) -> Result<(), ConfigError> {
        let failed = |path: &Path, source| ConfigError::Write { path: path.to_owned(), source };
        let read = |source| ConfigError::Read { path: self.0.clone(), source };
        for entry in std::fs::read_dir(&self.0).map_err(read)? {
            let entry = entry.map_err(read)?;
            let (path, name) = (entry.path(), entry.file_name());
            let name = name.to_string_lossy();
            let folder = name == "workspaces" || name.starts_with("identity.");
            let file = PURGED_FILES.contains(&name.as_ref());
            match (folder, file) {
                (true, _) => std::fs::remove_dir_all(&path),
                (_, true) => std::fs::remove_file(&path),
                (false, false) => Ok(()),
            }
            .map_err(|source| failed(&path, source))?;
        }
        durable::sync_folder(&self.0).map_err(|source| failed(&self.0, source))
    }

    /// Whether this process may decide about this state: it is its owner's, or root's.
    ///
    /// # Errors
    /// [`ConfigError::NotOwner`], or if the directory cannot be looked at.
    pub fn check_owner(&self) -> Result<(), ConfigError> {
        let (owner, own) = (self.owner()?, rustix::process::geteuid().as_raw());
        if own == 0 || own == owner {
            return Ok(());
        }
        Err(ConfigError::NotOwner { path: self.0.clone(), owner, own })
    }

    /// The user whose state it is, which is the one the agent runs as.
    ///
    /// # Errors
    /// If the directory cannot be looked at.
    pub fn owner(&self) -> Result<u32, ConfigError> {
        use std::os::unix::fs::MetadataExt as _;
        std::fs::metadata(&self.0)
            .map(|metadata| metadata.uid())
            .map_err(|source| ConfigError::Read { path: self.0.clone(), source })
    }

    fn settings(&self) -> PathBuf {
        self.0.join("agent.json")
    }
}

/// What the node's owner decided about the sandbox.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SandboxSettings {
    /// Refuse every command for which no control group can be created, which limits it as a whole.
    #[serde(default)]
    pub require_cgroup: bool,
    /// Directories and files of this machine that every strict command sees, read-only, at their own path;
    /// what is not there is not shown. At most [`MAX_EXPOSED`]; see [`exposed`] for what is refused.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub read_only_paths: Vec<PathBuf>,
}

impl SandboxSettings {
    /// What is wrong with it, if anything is.
    fn problem(&self) -> Option<String> {
        let paths = &self.read_only_paths;
        if paths.len() > MAX_EXPOSED {
            return Some(format!("sandbox.read_only_paths has more than {MAX_EXPOSED} paths"));
        }
        let refused = paths.iter().find_map(|path| exposed::check_name(path).err());
        refused.map(|refusal| format!("sandbox.read_only_paths: {refusal}"))
    }
}

/// What the node's owner decided about commands. What a command asks for beyond a bound is cut to it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CommandSettings {
    /// Seconds that commands may go on while the node is without a hub; none for as long as its certificate
    /// is good.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cut_off_limit_s: Option<u64>,
    /// Seconds that a command may run at most, below the 24 hours that it may anyway.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub time_limit_s: Option<u64>,
    /// Bytes of memory that a command gets at most, below the seven eighths of the machine's that it gets
    /// anyway.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_bytes: Option<u64>,
    /// Processes and threads that a command may have at most, below the 512 that it may unless it asks for
    /// more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub processes: Option<u32>,
}

impl CommandSettings {
    /// What is wrong with it, if anything is.
    fn problem(&self) -> Option<String> {
        let below = |name: &str, value: Option<u64>, least: u64| {
            let low = value.filter(|value| *value < least);
            low.map(|value| format!("commands.{name} is {value}, and at least {least} is needed"))
        };
        below("time_limit_s", self.time_limit_s, 1)
            .or_else(|| below("memory_bytes", self.memory_bytes, LEAST_MEMORY_BYTES))
            .or_else(|| below("processes", self.processes.map(u64::from), 1))
    }
}

/// Where the library of skills is placed on this node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum LibraryPlace {
    /// In `.library` below the directory of workspaces.
    #[default]
    Default,
    /// Nowhere, and nothing of it is fetched.
    Off,
    /// In this directory.
    At(PathBuf),
}

impl LibraryPlace {
    /// As it is stored and written: nothing, `off`, or a path.
    fn to_raw(&self) -> Option<PathBuf> {
        match self {
            Self::Default => None,
            Self::Off => Some("off".into()),
            Self::At(path) => Some(path.clone()),
        }
    }

    /// The place that is meant by what somebody has written: `default`, `off`, or an absolute path.
    ///
    /// # Errors
    /// If it is none of these.
    pub fn parse(text: &Path) -> Result<Self, String> {
        match text {
            text if text == Path::new("default") => Ok(Self::Default),
            text if text == Path::new("off") => Ok(Self::Off),
            text if text.is_absolute() => Ok(Self::At(text.to_owned())),
            text => Err(format!("{} is not an absolute path", text.display())),
        }
    }
}

/// What the node's owner decided.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Where the hub is.
    pub hub: HubAddress,
    /// Where workspaces live unless told otherwise.
    pub workspace_root: PathBuf,
    /// The owner's upper bound for what commands may do, as it is stored; [`Ceiling`] says what
    /// counts.
    pub ceiling: Bound,
    /// Workspaces that live elsewhere, by name.
    pub workspace_paths: BTreeMap<String, PathBuf>,
    /// Where the library of skills is placed.
    pub library: LibraryPlace,
    /// About the sandbox.
    pub sandbox: SandboxSettings,
    /// About commands.
    pub commands: CommandSettings,
    /// What the daemon logs, such as `debug` or `info,cortex_agent::sync=debug`; `info,notify=error` if it is not said.
    /// `CORTEX_LOG` goes before it. Read again on SIGHUP.
    pub log: Option<String>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawSettings {
    hub: String,
    workspace_root: PathBuf,
    #[serde(default)]
    ceiling: Mode,
    #[serde(default)]
    ceiling_network: Network,
    #[serde(default)]
    workspace_paths: BTreeMap<String, PathBuf>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    library: Option<PathBuf>,
    #[serde(default)]
    sandbox: SandboxSettings,
    #[serde(default)]
    commands: CommandSettings,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    log: Option<String>,
}

impl Settings {
    /// Reads the settings of a joined node.
    ///
    /// # Errors
    /// If there are none, or they are damaged.
    pub fn load(state: &StateDir) -> Result<Self, ConfigError> {
        let path = state.settings();
        let raw: RawSettings = read_json(&path)?
            .ok_or_else(|| ConfigError::NotJoined { state: state.path().to_owned() })?;
        let damaged = |problem: String| ConfigError::Damaged { path: path.clone(), problem };
        let settings = Self {
            hub: raw.hub.parse().map_err(|error| damaged(format!("{error}")))?,
            workspace_root: raw.workspace_root,
            ceiling: Bound { mode: raw.ceiling, network: raw.ceiling_network },
            workspace_paths: raw.workspace_paths,
            library: match raw.library {
                Some(text) => LibraryPlace::parse(&text).map_err(damaged)?,
                None => LibraryPlace::Default,
            },
            sandbox: raw.sandbox,
            commands: raw.commands,
            log: raw.log,
        };
        if let Some(problem) = settings.sandbox.problem().or_else(|| settings.commands.problem()) {
            return Err(damaged(problem));
        }
        let roots = settings.workspace_paths.values().chain([&settings.workspace_root]);
        for root in roots {
            if !root.is_absolute() {
                return Err(damaged(format!("{} is not an absolute path", root.display())));
            }
        }
        Ok(settings)
    }

    /// Writes the settings durably.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn save(&self, state: &StateDir) -> Result<(), ConfigError> {
        let raw = RawSettings {
            hub: self.hub.to_string(),
            workspace_root: self.workspace_root.clone(),
            ceiling: self.ceiling.mode,
            ceiling_network: self.ceiling.network,
            workspace_paths: self.workspace_paths.clone(),
            library: self.library.to_raw(),
            sandbox: self.sandbox.clone(),
            commands: self.commands,
            log: self.log.clone(),
        };
        write_json(&state.settings(), &raw)
    }

    /// Changes the settings durably. Changes of several processes follow one another.
    ///
    /// # Errors
    /// If there are no settings yet, they are damaged, or the file system refuses.
    pub fn update(state: &StateDir, change: impl FnOnce(&mut Self)) -> Result<Self, ConfigError> {
        let path = state.path().join("agent.json.lock");
        let failed = |source| ConfigError::Write { path: path.clone(), source };
        let lock = Folder::open(state.path())
            .and_then(|folder| folder.file("agent.json.lock", OFlags::WRONLY))
            .map_err(failed)?;
        // Held for milliseconds; ends with the file.
        lock.lock().map_err(failed)?;
        let mut settings = Self::load(state)?;
        change(&mut settings);
        settings.save(state)?;
        Ok(settings)
    }

    /// Where the library of skills is placed; `None` if it is not.
    #[must_use]
    pub fn library_dir(&self) -> Option<PathBuf> {
        match &self.library {
            LibraryPlace::Default => Some(self.workspace_root.join(LIBRARY_NAME)),
            LibraryPlace::Off => None,
            LibraryPlace::At(path) => Some(path.clone()),
        }
    }

    /// What is never shown to commands by [`SandboxSettings::read_only_paths`]: the agent's state, and
    /// directories that commands or other machines write.
    #[must_use]
    pub fn apart(&self, state: &StateDir) -> Vec<PathBuf> {
        let workspaces = self.workspace_paths.values().chain([&self.workspace_root]);
        let library = self.library_dir();
        [state.path().to_owned()].into_iter().chain(workspaces.cloned()).chain(library).collect()
    }

    /// Where the workspace of this name lives. The name has been checked, so it is one component.
    #[must_use]
    pub fn workspace_path(&self, name: &str) -> PathBuf {
        self.workspace_paths.get(name).cloned().unwrap_or_else(|| self.workspace_root.join(name))
    }
}

/// Where workspaces live unless told otherwise: `~/cortex`.
///
/// # Errors
/// If the user has no home.
pub fn default_workspace_root() -> Result<PathBuf, ConfigError> {
    directories::BaseDirs::new()
        .map(|dirs| dirs.home_dir().join("cortex"))
        .ok_or(ConfigError::NoHome { what: "workspace directory (--workspace-root)" })
}

/// Reads a small file; `None` if it does not exist.
pub(crate) fn read_bounded(path: &Path) -> Result<Option<Vec<u8>>, ConfigError> {
    use std::io::Read as _;
    let failed = |source| ConfigError::Read { path: path.to_owned(), source };
    let file = match std::fs::File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed(error)),
    };
    // Most are smaller, and then here with one read.
    let mut contents = Vec::with_capacity(2048);
    file.take(MAX_FILE_BYTES + 1).read_to_end(&mut contents).map_err(failed)?;
    if u64::try_from(contents.len()).is_ok_and(|length| length > MAX_FILE_BYTES) {
        return Err(ConfigError::Damaged {
            path: path.to_owned(),
            problem: format!("larger than {MAX_FILE_BYTES} bytes"),
        });
    }
    Ok(Some(contents))
}

pub(crate) fn read_json<T: for<'de> Deserialize<'de>>(
    path: &Path,
) -> Result<Option<T>, ConfigError> {
    let Some(contents) = read_bounded(path)? else { return Ok(None) };
    serde_json::from_slice(&contents)
        .map(Some)
        .map_err(|error| ConfigError::Damaged { path: path.to_owned(), problem: error.to_string() })
}

pub(crate) fn write_json<T: Serialize>(path: &Path, value: &T) -> Result<(), ConfigError> {
    let mut text = serde_json::to_vec_pretty(value)
        .map_err(|error| ConfigError::Write { path: path.to_owned(), source: error.into() })?;
    text.push(b'\n');
    write_private(path, &text)
}

pub(crate) fn write_private(path: &Path, contents: &[u8]) -> Result<(), ConfigError> {
    durable::write_file(path, contents, 0o600)
        .and_then(|()| own_like_folder(path))
        .map_err(|source| ConfigError::Write { path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings() -> Settings {
        Settings {
            hub: "hub:7443".parse().unwrap(),
            workspace_root: "/srv/cortex".into(),
            ceiling: Bound { network: Network::Full, ..Bound::LEAST },
            workspace_paths: BTreeMap::from([("app".to_owned(), PathBuf::from("/home/ann/app"))]),
            library: LibraryPlace::At("/srv/skills".into()),
            sandbox: SandboxSettings {
                require_cgroup: true,
                read_only_paths: vec!["/opt/models".into()],
            },
            commands: CommandSettings {
                cut_off_limit_s: Some(3600),
                time_limit_s: Some(60),
                memory_bytes: Some(1 << 30),
                processes: Some(64),
            },
            log: None,
        }
    }

    #[test]
    fn settings_survive_the_disk_and_choose_paths() {
        let folder = tempfile::tempdir().unwrap();
        let state = StateDir::resolve(Some(folder.path().to_owned())).unwrap();
        assert!(matches!(Settings::load(&state), Err(ConfigError::NotJoined { .. })));
        settings().save(&state).unwrap();
        let loaded = Settings::load(&state).unwrap();
        assert_eq!(loaded, settings());
        assert_eq!(loaded.workspace_path("app"), Path::new("/home/ann/app"));
        assert_eq!(loaded.workspace_path("web"), Path::new("/srv/cortex/web"));
    }

    #[test]
    fn concurrent_changes_of_settings_are_all_kept() {
        let folder = tempfile::tempdir().unwrap();
        let state = StateDir::resolve(Some(folder.path().to_owned())).unwrap();
        settings().save(&state).unwrap();
        std::thread::scope(|scope| {
            for n in 0..8 {
                let state = &state;
                scope.spawn(move || {
                    Settings::update(state, |settings| {
                        settings.workspace_paths.insert(format!("w{n}"), "/w".into());
                    })
                    .unwrap();
                });
            }
        });
        assert_eq!(Settings::load(&state).unwrap().workspace_paths.len(), 9);
    }

    #[test]
    fn second_holder_of_the_state_is_refused_until_the_first_ends() {
        let folder = tempfile::tempdir().unwrap();
        let state = StateDir::resolve(Some(folder.path().to_owned())).unwrap();
        let first = state.try_lock().unwrap();
        assert!(first.is_some());
        assert!(state.try_lock().unwrap().is_none());
        drop(first);
        assert!(state.try_lock().unwrap().is_some());
    }

    #[test]
    fn purging_keeps_the_audit_file_and_what_is_not_ours() {
        let folder = tempfile::tempdir().unwrap();
        let state = StateDir::resolve(Some(folder.path().to_owned())).unwrap();
        for folder in ["identity.old-1", "workspaces/w"] {
            std::fs::create_dir_all(state.path().join(folder)).unwrap();
        }
        for file in
            PURGED_FILES.iter().chain(&["audit.jsonl", "audit.1.jsonl", "notes", "agent.lock"])
        {
            std::fs::write(state.path().join(file), "x").unwrap();
        }
        state.purge().unwrap();
        let mut left: Vec<_> = std::fs::read_dir(folder.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        left.sort();
        assert_eq!(left, ["agent.lock", "audit.1.jsonl", "audit.jsonl", "notes"]);
    }

    #[test]
    fn settings_without_a_ceiling_are_strict_and_unknown_keys_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let state = StateDir::resolve(Some(folder.path().to_owned())).unwrap();
        let write = |text: &str| std::fs::write(state.settings(), text).unwrap();
        write(r#"{"hub":"hub:7443","workspace_root":"/w"}"#);
        assert_eq!(Settings::load(&state).unwrap().ceiling, Bound::LEAST);
        for bad in [
            r#"{"hub":"hub:7443","workspace_root":"/w","cieling":"permissive"}"#,
            r#"{"hub":"hub:7443","workspace_root":"w"}"#,
            r#"{"hub":"hub","workspace_root":"/w"}"#,
            r#"{"hub":"hub:7443","workspace_root":"/w","ceiling":"none"}"#,
            r#"{"hub":"hub:7443","workspace_root":"/w","sandbox":{"read_only_paths":["/etc"]}}"#,
            r#"{"hub":"hub:7443","workspace_root":"/w","sandbox":{"read_only_paths":["data"]}}"#,
            r#"{"hub":"hub:7443","workspace_root":"/w","commands":{"time_limit_s":0}}"#,
            r#"{"hub":"hub:7443","workspace_root":"/w","commands":{"memory_bytes":1}}"#,
            r#"{"hub":"hub:7443","workspace_root":"/w","commands":{"processes":0}}"#,
            "",
        ] {
            write(bad);
            assert!(matches!(Settings::load(&state), Err(ConfigError::Damaged { .. })), "{bad}");
        }
    }
}
