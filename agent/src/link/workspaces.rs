//! The workspaces this node is a member of, and the sync engine of each.
//!
//! The hub says which they are; the last list is kept on disk, so that scanning goes on without a
//! hub. One task (spawned by [`Workspaces::start`]) starts and stops engines as the list changes;
//! others look up in a table. Where a workspace lives is decided on this node alone.

mod library;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use cortex_proto::v1;
use cortex_shared::ids::WorkspaceId;
use cortex_shared::labels;
use cortex_shared::library::LIBRARY_NAME;
use cortex_shared::tasks::TaskScope;
use cortex_shared::wire_path::WirePath;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use super::report;
use super::request::Refusal;
use crate::client::{HubClient, Purpose};
use crate::config::{ConfigError, Settings, StateDir, read_json, write_json};
use crate::library::{Freshness, Library};
use crate::sync::mode::{MemberMode, MemberOptions};
use crate::sync::problem::Code;
use crate::sync::roots::{Roots, overlap, real_path};
use crate::sync::status::{SyncState, SyncStatus};
use crate::sync::tonic_hub::TonicHub;
use crate::sync::{
    self, ExplainError, Explanation, FlushError, Occupied, WorkspaceConfig, WorkspaceHandle,
};

/// Most workspaces of one node; a hub that sends more is not believed.
const MAX_WORKSPACES: usize = 1024;

/// A workspace this node is a member of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Membership {
    /// Its id.
    pub id: WorkspaceId,
    /// Its name: one harmless path component.
    pub name: String,
}

impl Membership {
    /// Reads what the hub sent.
    pub(super) fn from_wire(wire: &v1::Membership) -> Result<Self, &'static str> {
        let id = WorkspaceId::from_slice(&wire.workspace_id).map_err(|_| "workspace id")?;
        if id == WorkspaceId::LIBRARY {
            return Err("workspace id");
        }
        labels::check_name(&wire.name).map_err(|_| "workspace name")?;
        Ok(Self { id, name: wire.name.clone() })
    }

    /// That of the library, of which every node is a member.
    fn library() -> Self {
        Self { id: WorkspaceId::LIBRARY, name: LIBRARY_NAME.to_owned() }
    }

    fn is_library(&self) -> bool {
        self.id == WorkspaceId::LIBRARY
    }
}

/// All workspaces of this node. Clones share the same state.
#[derive(Clone)]
pub struct Workspaces {
    inner: Arc<Inner>,
}

struct Inner {
    state: StateDir,
    hub: HubClient,
    settings: Mutex<Settings>,
    wanted: watch::Sender<Vec<Membership>>,
    online: watch::Sender<bool>,
    /// Counts changes of any status, so that one receiver sees all.
    changes: watch::Sender<u64>,
    engines: Mutex<BTreeMap<WorkspaceId, Engine>>,
    roots: Roots,
    /// Where skills are placed, unless the owner wants none.
    library: Option<Library>,
    /// For whoever needs it to be as new as something else.
    freshness: Freshness,
    /// Held by whoever places it.
    placing: tokio::sync::Mutex<()>,
    /// Held by whoever makes a workspace's links to skills lead there.
    hanging: tokio::sync::Mutex<()>,
    /// What the owner decided, by name; also of workspaces this node is no member of yet.
    options: Mutex<BTreeMap<String, MemberOptions>>,
}

struct Engine {
    config: WorkspaceConfig,
    name: String,
    root: PathBuf,
    handle: Arc<WorkspaceHandle>,
    scope: TaskScope,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Workspaces {
    /// Begins with the last known memberships, offline.
    ///
    /// # Errors
    /// If the list on disk is damaged.
    pub fn start(
        state: StateDir,
        settings: Settings,
        hub: HubClient,
        scope: &TaskScope,
    ) -> Result<Self, ConfigError> {
        let known: Vec<Membership> = read_json(&list_path(&state))?.unwrap_or_default();
        let options = read_json(&options_path(&state))?.unwrap_or_default();
        let library = settings.library_dir().map(Library::new);
        let workspaces = Self {
            inner: Arc::new(Inner {
                state,
                hub,
                settings: Mutex::new(settings),
                wanted: watch::Sender::new(known),
                online: watch::Sender::new(false),
                changes: watch::Sender::new(0),
                engines: Mutex::new(BTreeMap::new()),
                roots: Roots::default(),
                library,
                freshness: Freshness::default(),
                placing: tokio::sync::Mutex::default(),
                hanging: tokio::sync::Mutex::default(),
                options: Mutex::new(options),
            }),
        };
        let keeper = workspaces.clone();
        let own_scope = scope.clone();
        scope.spawn("workspaces", async move { keeper.keep(own_scope).await });
        let (refresher, stop) = (workspaces.clone(), scope.token().clone());
        scope.spawn("library", async move {
            stop.run_until_cancelled(refresher.refresh_library()).await;
        });
        Ok(workspaces)
    }

    /// The hub's complete list, with the library if it says that there is one. Engines are started and
    /// stopped soon after.
    pub(super) fn set_memberships(&self, mut list: Vec<Membership>, library: bool) {
        if list.len() > MAX_WORKSPACES {
            tracing::error!(count = list.len(), "the hub sent too many memberships");
            list.truncate(MAX_WORKSPACES);
        }
        self.inner.wanted.send_if_modified(|wanted| {
            // A hub that says nothing of a library takes none away.
            if library || wanted.iter().any(Membership::is_library) {
                list.push(Membership::library());
            }
            let changed = *wanted != list;
            if changed {
                *wanted = list;
            }
            changed
        });
    }

    pub(super) fn set_online(&self, online: bool) {
        self.inner.online.send_replace(online);
    }

    pub(super) fn head_moved(&self, id: WorkspaceId, seq: u64) {
        if let Some(engine) = lock(&self.inner.engines).get(&id) {
            engine.handle.head_moved(seq);
        }
    }

    /// The root of a workspace, by id or, without one, by name.
    pub(super) fn root_of(&self, id: Option<WorkspaceId>, name: &str) -> Result<PathBuf, Refusal> {
        let engines = lock(&self.inner.engines);
        let engine = match id {
            Some(id) => engines.get(&id),
            None => engines.values().find(|engine| engine.name == name),
        };
        // Nobody works in what arrives for the library.
        let engine = engine.filter(|engine| engine.config.id != WorkspaceId::LIBRARY);
        let engine = engine.ok_or_else(|| Refusal::NoSuchWorkspace { name: name.to_owned() })?;
        if !engine.root.is_dir() {
            let reason = format!("{} is not a directory", engine.root.display());
            return Err(Refusal::WorkspaceUnusable { reason });
        }
        Ok(engine.root.clone())
    }

    /// What is known of a workspace whose files somebody wants to look at or to change; a workspace that
    /// has halted, since it is perhaps not the directory that it was, is not changed.
    pub(super) fn files_of(
        &self,
        id: WorkspaceId,
        name: &str,
        change: bool,
    ) -> Result<WorkspaceConfig, Refusal> {
        let engines = lock(&self.inner.engines);
        let engine = engines.get(&id).filter(|_| id != WorkspaceId::LIBRARY);
        let engine = engine.ok_or_else(|| Refusal::NoSuchWorkspace { name: name.to_owned() })?;
        let status = engine.handle.status();
        let status = status.borrow();
        if change && status.state == SyncState::Halted {
            return Err(Refusal::WorkspaceUnusable { reason: status.halted_reason.clone() });
        }
        Ok(engine.config.clone())
    }

    /// Lets a command into the workspace that lives there, until the answer is dropped: what the command
    /// must not lose is not replaced under it. `None` if no workspace lives there any more.
    pub(super) async fn enter(&self, root: &Path) -> Option<Occupied> {
        let occupancy = {
            let engines = lock(&self.inner.engines);
            engines.values().find(|engine| engine.root == root)?.handle.occupancy()
        };
        Some(occupancy.enter().await)
    }

    /// The state of each workspace, by name.
    #[must_use]
    pub fn statuses(&self) -> Vec<v1::SyncStatus> {
        let engines = lock(&self.inner.engines);
        let mut list: Vec<v1::SyncStatus> = engines
            .values()
            .map(|engine| report::sync_status(&engine.handle.status().borrow()))
            .collect();
        list.sort_by(|a, b| a.workspace.cmp(&b.workspace));
        list
    }

    /// Lets the deletions of a workspace go that are held because they are so many; how many they
    /// are. `None` if this node is no member.
    pub fn confirm_deletions(&self, name: &str) -> Option<Result<u64, FlushError>> {
        let engines = lock(&self.inner.engines);
        let engine = engines.values().find(|engine| engine.name == name)?;
        Some(engine.handle.confirm_deletions())
    }

    /// What this node does with a workspace.
    #[must_use]
    pub fn options(&self, name: &str) -> MemberOptions {
        options_of(&lock(&self.inner.options), name)
    }

    /// Tells a workspace what is decided, if it is there: while nobody decides otherwise, or the later word
    /// could be overtaken by the earlier one.
    fn tell_options(&self, name: &str, table: &BTreeMap<String, MemberOptions>) -> MemberOptions {
        let options = options_of(table, name);
        if let Some(handle) = self.handle_of(name) {
            handle.set_options(options);
        }
        options
    }

    /// Decides what this node does with a workspace; durable, and kept even if it is no member now.
    ///
    /// # Errors
    /// If the decision cannot be stored.
    pub fn set_options(
        &self,
        name: &str,
        change: impl FnOnce(&mut MemberOptions),
    ) -> Result<MemberOptions, ConfigError> {
        // Held while it is stored: of two decisions the later one has to be the one that is kept.
        let mut table = lock(&self.inner.options);
        let mut changed = table.clone();
        let options = changed.entry(name.to_owned()).or_default();
        change(options);
        let options = *options;
        if options == MemberOptions::default() {
            changed.remove(name);
        }
        write_json(&options_path(&self.inner.state), &changed)?;
        *table = changed;
        Ok(self.tell_options(name, &table))
    }

    /// The names of this node's workspaces.
    #[must_use]
    pub fn names(&self) -> Vec<String> {
        lock(&self.inner.engines).values().map(|engine| engine.name.clone()).collect()
    }

    /// Waits until a workspace and the hub are equal; gives up after the hub was silent for
    /// `patience`. `None` if this node is no member.
    pub async fn flush(&self, name: &str, patience: Duration) -> Option<Result<(), FlushError>> {
        let handle = self.handle_of(name)?;
        Some(handle.flush_within(patience).await)
    }

    /// What is known of a path. Blocking. `None` if this node is no member.
    pub fn explain(
        &self,
        name: &str,
        path: &WirePath,
    ) -> Option<Result<Explanation, ExplainError>> {
        Some(self.handle_of(name)?.explain(path))
    }

    fn handle_of(&self, name: &str) -> Option<Arc<WorkspaceHandle>> {
        let engines = lock(&self.inner.engines);
        engines.values().find(|engine| engine.name == name).map(|engine| engine.handle.clone())
    }

    /// Counts changes of any status.
    pub(super) fn changes(&self) -> watch::Receiver<u64> {
        self.inner.changes.subscribe()
    }

    /// Whether none of them does anything, or is about to.
    pub(super) fn are_at_rest(&self) -> bool {
        lock(&self.inner.engines)
            .values()
            .all(|engine| engine.handle.status().borrow().is_at_rest())
    }

    /// Chooses where a workspace will live on this node; durable, and kept even if this node does
    /// not become a member now: an operator may make it one later.
    ///
    /// # Errors
    /// If the place cannot be used, or the settings cannot be written.
    pub fn place(&self, name: &str, path: Option<&Path>) -> Result<PathBuf, PlaceError> {
        let wanted = match path {
            Some(path) => path.to_owned(),
            None => lock(&self.inner.settings).workspace_path(name),
        };
        if !wanted.is_absolute() {
            return Err(PlaceError::NotAbsolute(wanted));
        }
        if let Some(engine) = lock(&self.inner.engines).values().find(|e| e.name == name) {
            let current = engine.root.clone();
            return if current == wanted {
                Ok(current)
            } else {
                Err(PlaceError::Elsewhere { current })
            };
        }
        let real = real_path(&wanted);
        for (other, root) in self.placed().into_iter().filter(|(other, _)| other != name) {
            if overlap(&real, &real_path(&root)) {
                return Err(PlaceError::Overlaps { other, root });
            }
        }
        if overlap(&real, &real_path(self.inner.state.path())) {
            return Err(PlaceError::OwnState(wanted));
        }
        if path.is_some() {
            let changed = Settings::update(&self.inner.state, |settings| {
                settings.workspace_paths.insert(name.to_owned(), wanted.clone());
            })?;
            *lock(&self.inner.settings) = changed;
        }
        Ok(wanted)
    }

    /// Where the workspaces of this node live, and where those will that have a place already.
    fn placed(&self) -> BTreeMap<String, PathBuf> {
        let mut placed: BTreeMap<String, PathBuf> =
            lock(&self.inner.engines).values().map(|e| (e.name.clone(), e.root.clone())).collect();
        let settings = lock(&self.inner.settings);
        for membership in self.inner.wanted.borrow().iter() {
            let path = settings.workspace_path(&membership.name);
            placed.entry(membership.name.clone()).or_insert(path);
        }
        for (name, path) in &settings.workspace_paths {
            placed.entry(name.clone()).or_insert_with(|| path.clone());
        }
        placed
    }

    async fn keep(&self, scope: TaskScope) {
        let mut wanted = self.inner.wanted.subscribe();
        loop {
            let list = wanted.borrow_and_update().clone();
            self.follow(&list, &scope).await;
            tokio::select! {
                () = scope.token().cancelled() => break,
                changed = wanted.changed() => if changed.is_err() { break },
            }
        }
        self.follow(&[], &scope).await;
    }

    /// Makes the running engines those of the list.
    async fn follow(&self, list: &[Membership], scope: &TaskScope) {
        if !scope.token().is_cancelled()
            && let Err(error) = write_json(&list_path(&self.inner.state), &list)
        {
            tracing::warn!(%error, "the list of workspaces cannot be stored");
        }
        let leaving: Vec<Engine> = {
            let mut engines = lock(&self.inner.engines);
            let gone: Vec<WorkspaceId> = engines
                .iter()
                .filter(|(id, engine)| !list.iter().any(|m| m.id == **id && m.name == engine.name))
                .map(|(id, _)| *id)
                .collect();
            gone.iter().filter_map(|id| engines.remove(id)).collect()
        };
        for engine in leaving {
            engine.scope.cancel();
            engine.handle.stop().await;
            tracing::info!(workspace = engine.name, "workspace stopped");
            if !scope.token().is_cancelled() && !list.iter().any(|m| m.id == engine.config.id) {
                let config = engine.config;
                let forgotten = tokio::task::spawn_blocking(move || config.forget()).await;
                if let Ok(Err(error)) = forgotten {
                    tracing::error!(%error, "the index of a workspace that was left stays");
                }
            }
        }
        for membership in list {
            if lock(&self.inner.engines).contains_key(&membership.id)
                || (membership.is_library() && self.inner.library.is_none())
            {
                continue;
            }
            let engine = self.start_engine(membership, scope);
            lock(&self.inner.engines).insert(membership.id, engine);
            // Somebody may have decided otherwise before it was there to be told.
            self.tell_options(&membership.name, &lock(&self.inner.options));
        }
        self.inner.changes.send_modify(|count| *count += 1);
    }

    fn start_engine(&self, membership: &Membership, scope: &TaskScope) -> Engine {
        let root = match &self.inner.library {
            Some(library) if membership.is_library() => library.incoming().to_owned(),
            _ => lock(&self.inner.settings).workspace_path(&membership.name),
        };
        tracing::info!(workspace = membership.name, root = %root.display(), "workspace started");
        let config = WorkspaceConfig {
            id: membership.id,
            name: membership.name.clone(),
            root: root.clone(),
            state_dir: self.inner.state.path().to_owned(),
            roots: self.inner.roots.clone(),
            library: self.inner.library.as_ref().map(|_| self.inner.freshness.clone()),
        };
        if membership.is_library()
            && !root.exists()
            && let Err(error) = config.forget()
        {
            // It was moved. What is known of the old place says nothing of the new one.
            tracing::error!(%error, "the index of the library stays");
        }
        let line = || TonicHub::new(self.inner.hub.connect_lazy_counted(Purpose::Bulk));
        let scope = scope.child();
        let online = self.inner.online.subscribe();
        let options = self.options(&membership.name);
        let handle = sync::start_workspace(config.clone(), options, line(), line(), online, &scope);
        let mut status = handle.status();
        let changes = self.inner.changes.clone();
        let stop = scope.token().clone();
        let follower = self.clone();
        let (is_library, own_root) = (membership.is_library(), root.clone());
        scope.spawn("workspace status", async move {
            let mut settled = None;
            let follow = async {
                while status.changed().await.is_ok() {
                    changes.send_modify(|count| *count += 1);
                    let now = settled_at(&status.borrow_and_update());
                    if now.is_some() && now != settled && is_library {
                        // What was given up because the engine went on is done once it rests again, be
                        // it at the same version.
                        let placed = follower.place_library(status.clone()).await;
                        settled = now.filter(|_| placed);
                        continue;
                    }
                    if now.is_some() && now != settled {
                        follower.hang_door(own_root.clone()).await;
                    }
                    settled = now;
                }
            };
            stop.run_until_cancelled(follow).await;
        });
        Engine { config, name: membership.name.clone(), root, handle: Arc::new(handle), scope }
    }
}

/// The version at which a workspace is here completely, as long as there is nothing left to do.
fn settled_at(status: &SyncStatus) -> Option<u64> {
    // That the kernel does not tell of changes here does not concern what comes from the hub.
    let complete = status.state == SyncState::Idle
        && status.applied_seq == status.head_seq
        && status.problems.iter().all(|problem| problem.code == Code::WatchLimit);
    complete.then_some(status.applied_seq)
}

fn options_of(table: &BTreeMap<String, MemberOptions>, name: &str) -> MemberOptions {
    let options = table.get(name).copied().unwrap_or_default();
    if name == LIBRARY_NAME {
        // What is changed there is undone, whatever somebody has decided.
        return MemberOptions { mode: MemberMode::Mirror, ..options };
    }
    options
}

fn options_path(state: &StateDir) -> PathBuf {
    state.path().join("workspaces.json")
}

fn list_path(state: &StateDir) -> PathBuf {
    state.path().join("memberships.json")
}

/// Why a workspace cannot live in a place.
#[derive(Debug, thiserror::Error)]
pub enum PlaceError {
    /// The path depends on who reads it.
    #[error("{} is not an absolute path", .0.display())]
    NotAbsolute(PathBuf),
    /// It lives somewhere else already.
    #[error("the workspace lives in {} already", current.display())]
    Elsewhere {
        /// Where.
        current: PathBuf,
    },
    /// It would contain, or be inside, what this agent keeps.
    #[error("{} overlaps with this agent's own state", .0.display())]
    OwnState(PathBuf),
    /// Two workspaces would share files.
    #[error("the place overlaps with workspace {other:?} in {}", root.display())]
    Overlaps {
        /// The other one.
        other: String,
        /// Where it lives.
        root: PathBuf,
    },
    /// The decision cannot be stored.
    #[error(transparent)]
    Config(#[from] ConfigError),
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::client::Trust;
    use cortex_shared::policy::Bound;

    /// Those of a node that has never reached its hub, and whose state is in `folder`.
    pub(in crate::link) fn workspaces(folder: &Path, scope: &TaskScope) -> Workspaces {
        let state = StateDir::resolve(Some(folder.join("state"))).unwrap();
        state.create().unwrap();
        let settings = Settings {
            hub: "127.0.0.1:1".parse().unwrap(),
            workspace_root: folder.join("ws"),
            ceiling: Bound::LEAST,
            workspace_paths: BTreeMap::new(),
            library: crate::config::LibraryPlace::Default,
            sandbox: crate::config::SandboxSettings::default(),
            commands: crate::config::CommandSettings::default(),
            log: None,
        };
        settings.save(&state).unwrap();
        let hub = HubClient::new(settings.hub.clone(), Trust::Pins(Vec::new()), None).unwrap();
        Workspaces::start(state, settings, hub, scope).unwrap()
    }

    fn member(name: &str) -> Membership {
        Membership { id: WorkspaceId::new(), name: name.to_owned() }
    }

    async fn until_names_are(workspaces: &Workspaces, names: &[&str]) {
        let mut changes = workspaces.inner.changes.subscribe();
        let reached = changes.wait_for(|_| {
            lock(&workspaces.inner.engines)
                .values()
                .map(|e| e.name.as_str())
                .eq(names.iter().copied())
        });
        tokio::time::timeout(Duration::from_secs(20), reached).await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn places_are_absolute_apart_from_each_other_and_from_our_own_state() {
        let folder = tempfile::tempdir().unwrap();
        let scope = TaskScope::new();
        let workspaces = workspaces(folder.path(), &scope);
        workspaces.set_memberships(vec![member("app")], false);
        until_names_are(&workspaces, &["app"]).await;
        let at = |path: &str| folder.path().join(path);
        assert_eq!(workspaces.place("app", None).unwrap(), at("ws/app"));
        let elsewhere = workspaces.place("app", Some(&at("other")));
        assert!(matches!(elsewhere, Err(PlaceError::Elsewhere { .. })));
        for bad in ["ws", "ws/app", "ws/app/inner", "state", "state/x", ""] {
            assert!(workspaces.place("web", Some(&at(bad))).is_err(), "{bad}");
        }
        assert!(matches!(
            workspaces.place("web", Some(Path::new("relative"))),
            Err(PlaceError::NotAbsolute(_))
        ));
        // A chosen place is kept for the day on which the node becomes a member.
        assert_eq!(workspaces.place("web", Some(&at("web"))).unwrap(), at("web"));
        workspaces.set_memberships(vec![member("web")], false);
        until_names_are(&workspaces, &["web"]).await;
        assert!(workspaces.root_of(None, "app").is_err());
        assert_eq!(workspaces.place("web", None).unwrap(), at("web"));
        scope.cancel();
        scope.finish().await;
    }

    #[tokio::test]
    async fn memberships_survive_a_restart_without_a_hub() {
        let folder = tempfile::tempdir().unwrap();
        let scope = TaskScope::new();
        let first = workspaces(folder.path(), &scope);
        first.set_memberships(vec![member("app")], false);
        until_names_are(&first, &["app"]).await;
        scope.cancel();
        scope.finish().await;
        let scope = TaskScope::new();
        let second = workspaces(folder.path(), &scope);
        until_names_are(&second, &["app"]).await;
        scope.cancel();
        scope.finish().await;
    }

    #[test]
    fn a_name_that_could_leave_the_workspace_root_is_not_believed() {
        for name in ["../etc", "..", "", "a/b", "/abs"] {
            let wire = v1::Membership {
                workspace_id: WorkspaceId::new().as_bytes().to_vec().into(),
                name: name.to_owned(),
                ..Default::default()
            };
            assert!(Membership::from_wire(&wire).is_err(), "{name}");
        }
    }
}
