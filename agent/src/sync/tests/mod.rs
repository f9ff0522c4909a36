//! Whole engines on real directories against a hub in memory.

mod batches;
mod left_out;
mod listing;
mod memory_hub;
mod random;
mod rules;
mod safety;
mod scenarios;
mod simulation;
mod skills;
mod trees;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use cortex_shared::ids::WorkspaceId;
use cortex_shared::tasks::TaskScope;
use tokio::sync::watch;

use super::ground::{Batches, Ground};
use super::mode::MemberOptions;
use super::problem::Code;
use super::status::{SyncState, SyncStatus};
use super::{WorkspaceConfig, WorkspaceHandle, start_on};
use memory_hub::MemoryHub;

/// The longest any wait may take before a test has failed.
const LIMIT: Duration = Duration::from_secs(60);
/// Within what anything ends that does not wait for something that never happens.
const SOON: Duration = Duration::from_secs(10);

/// A node with a copy of the workspace. Its engine can be stopped and started again.
pub(super) struct Node {
    config: WorkspaceConfig,
    options: MemberOptions,
    batches: Batches,
    hub: MemoryHub,
    online: watch::Sender<bool>,
    scope: TaskScope,
    handle: Option<WorkspaceHandle>,
}

impl Node {
    fn start(&mut self) {
        let handle = start_on(
            Ground { batches: self.batches, ..Ground::real() },
            self.config.clone(),
            self.options,
            self.hub.clone(),
            self.hub.large(),
            self.online.subscribe(),
            &self.scope,
        );
        self.handle = Some(handle);
    }

    async fn stop(&mut self) {
        let handle = self.handle.take().unwrap();
        tokio::time::timeout(LIMIT, handle.stop()).await.unwrap();
    }

    fn handle(&self) -> &WorkspaceHandle {
        self.handle.as_ref().unwrap()
    }

    async fn flush(&self) {
        tokio::time::timeout(LIMIT, self.handle().flush()).await.unwrap().unwrap();
    }

    fn status(&self) -> SyncStatus {
        self.handle().status().borrow().clone()
    }

    /// Waits until the status is as wanted.
    async fn until(&self, wanted: impl FnMut(&SyncStatus) -> bool) -> SyncStatus {
        let mut status = self.handle().status();
        // Looked at by one at a time: a second look waits behind whoever wants to change it, and he behind
        // the first.
        let found = tokio::time::timeout(LIMIT, status.wait_for(wanted)).await;
        let found = found.map(|status| status.unwrap().clone());
        found.unwrap_or_else(|_| panic!("status stays {:?}", self.status()))
    }

    async fn until_state(&self, state: SyncState) -> SyncStatus {
        self.until(|status| status.state == state).await
    }

    fn path(&self, name: &str) -> PathBuf {
        self.config.root.join(name)
    }

    fn write(&self, name: &str, content: impl AsRef<[u8]>) {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap()
    }

    /// Everything below the root, in a form that is easy to compare: path, kind, content.
    fn tree(&self) -> BTreeMap<Vec<u8>, String> {
        let mut tree = BTreeMap::new();
        collect(&self.config.root, &self.config.root, &mut tree);
        tree
    }

    fn names(&self) -> Vec<String> {
        self.tree().keys().map(|name| String::from_utf8_lossy(name).into_owned()).collect()
    }
}

/// Bytes that do not compress, the same for the same seed.
fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut bytes);
    bytes
}

fn collect(root: &Path, directory: &Path, tree: &mut BTreeMap<Vec<u8>, String>) {
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        let name = path.strip_prefix(root).unwrap().as_os_str().as_bytes().to_vec();
        let meta = fs::symlink_metadata(&path).unwrap();
        let shown = if meta.is_dir() {
            collect(root, &path, tree);
            "directory".to_owned()
        } else if meta.is_symlink() {
            format!("link to {}", fs::read_link(&path).unwrap().display())
        } else {
            let executable = meta.permissions().mode() & 0o100 != 0;
            let hash = blake3::hash(&fs::read(&path).unwrap());
            format!("file {} {executable} {hash}", meta.len())
        };
        tree.insert(name, shown);
    }
}

/// A hub and some nodes.
pub(super) struct Mesh {
    folder: tempfile::TempDir,
    hub: MemoryHub,
    scope: TaskScope,
    workspace: WorkspaceId,
}

impl Mesh {
    fn new() -> Self {
        Self {
            folder: tempfile::tempdir().unwrap(),
            hub: MemoryHub::new(),
            scope: TaskScope::new(),
            workspace: WorkspaceId::new(),
        }
    }

    /// Adds a node and starts it.
    fn node(&self, name: &str) -> Node {
        let mut node = self.stopped_node(name);
        node.start();
        node
    }

    fn stopped_node(&self, name: &str) -> Node {
        Node {
            config: WorkspaceConfig {
                id: self.workspace,
                name: "w".to_owned(),
                root: self.folder.path().join(name).join("root"),
                state_dir: self.folder.path().join(name).join("state"),
                roots: super::roots::Roots::default(),
                library: None,
            },
            options: MemberOptions::default(),
            batches: Batches::REAL,
            hub: self.hub.clone(),
            online: watch::Sender::new(true),
            scope: self.scope.clone(),
            handle: None,
        }
    }
}

/// The second of two agents with one root halts for as long as the first is there.
async fn second_waits(first: &mut Node, second: &mut Node) {
    second.start();
    let status = second.until_state(SyncState::Halted).await;
    assert!(status.halted_reason.contains("another agent"), "{}", status.halted_reason);
    first.stop().await;
    second.until_state(SyncState::Idle).await;
}

/// Lets all nodes sync until they agree: what one pushes in the first round the others have after
/// the second, and conflict copies they make of it are everywhere after the third.
async fn settle(nodes: &[&Node]) {
    for _ in 0..3 {
        for node in nodes {
            node.flush().await;
        }
    }
    for pair in nodes.windows(2) {
        assert_eq!(pair[0].tree(), pair[1].tree());
    }
}

/// Whether a status says a problem of this kind.
fn says(status: &SyncStatus, code: Code) -> bool {
    status.problems.iter().any(|problem| problem.code == code)
}

/// As [`settle`], where the trees differ by what is not synced.
async fn settle_names(nodes: &[&Node]) {
    for _ in 0..3 {
        for node in nodes {
            node.flush().await;
        }
    }
}

/// Waits until `b` has everything the hub has, without making it look at its own tree.
async fn arrived(mesh: &Mesh, b: &Node) -> SyncStatus {
    let seq = *mesh.hub.subscribe().borrow();
    b.handle().head_moved(seq);
    b.until(|status| status.applied_seq >= seq && status.state == SyncState::Idle).await
}

fn path(text: &str) -> cortex_shared::wire_path::WirePath {
    cortex_shared::wire_path::WirePath::new(text).unwrap()
}
