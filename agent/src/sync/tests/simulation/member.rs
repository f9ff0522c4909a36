//! A member of a simulated mesh: its disk, its line, its users, and the engine that runs on them.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use cortex_shared::tasks::TaskScope;
use tokio::sync::watch;

use super::disk::SimDisk;
use super::hints::{Way, kernels};
use super::line::Line;
use super::user::{User, tree};
use crate::sync::ground::{Batches, Blocking, Ground};
use crate::sync::mode::MemberOptions;
use crate::sync::{FlushError, WorkspaceConfig, WorkspaceHandle, start_on};

/// The longest a flush may take, in virtual time.
const LIMIT: Duration = Duration::from_secs(3600);

/// See the module.
pub(super) struct Member {
    pub(super) config: WorkspaceConfig,
    pub(super) disk: SimDisk,
    pub(super) line: Line,
    pub(super) user: User,
    pub(super) online: watch::Sender<bool>,
    pub(super) handle: Option<WorkspaceHandle>,
    pub(super) begun: tokio::time::Instant,
    /// How hints come to it.
    pub(super) way: Way,
    /// How much it does at once.
    pub(super) batches: Batches,
    /// What their accidents are drawn from, each time anew.
    pub(super) seed: u64,
    /// The index as it was a while ago: what a power failure may bring back.
    pub(super) old_index: Option<Vec<(PathBuf, Vec<u8>)>>,
}

impl Member {
    pub(super) fn start(&mut self) {
        let line = self.line.clone();
        let begun = self.begun;
        let wall = move || {
            1_700_000_000_000 + i64::try_from(begun.elapsed().as_millis()).unwrap_or(i64::MAX / 2)
        };
        let disk = self.disk.engine();
        let power = self.disk.clone();
        self.seed += 1;
        let ground = Ground {
            kernels: kernels(disk.clone(), self.way, self.seed),
            disk: Arc::new(disk),
            blocking: Blocking::Inline,
            batches: self.batches,
            wall_ms: Arc::new(wall),
            boot_id: Arc::new(move || power.boot().to_string()),
            chance: Arc::new(move || line.chance()),
        };
        let (config, line, scope) = (self.config.clone(), self.line.clone(), TaskScope::new());
        let online = self.online.subscribe();
        self.handle = Some(start_on(
            ground,
            config,
            MemberOptions::default(),
            line.clone(),
            line,
            online,
            &scope,
        ));
    }

    pub(super) async fn stop(&mut self) {
        let Some(handle) = self.handle.take() else { return };
        tokio::time::timeout(Duration::from_secs(5), handle.stop()).await.expect("it stops");
    }

    pub(super) fn handle(&self) -> &WorkspaceHandle {
        self.handle.as_ref().expect("it runs")
    }

    fn index_files(&self) -> [PathBuf; 2] {
        ["index.db", "index.db-wal"].map(|name| self.config.state_folder().join(name))
    }

    pub(super) fn remember_index(&mut self) {
        let read = |path: PathBuf| std::fs::read(&path).ok().map(|bytes| (path, bytes));
        self.old_index = Some(self.index_files().into_iter().filter_map(read).collect());
    }

    pub(super) fn bring_back_index(&mut self) {
        let Some(files) = self.old_index.take() else { return };
        for path in self.index_files() {
            std::fs::remove_file(&path).ok();
        }
        for (path, bytes) in files {
            std::fs::write(path, bytes).unwrap();
        }
    }

    pub(super) async fn flush(&self) -> Result<(), FlushError> {
        tokio::time::timeout(LIMIT, self.handle().flush()).await.expect("a flush ends")
    }

    pub(super) fn tree(&self) -> Vec<(String, String)> {
        tree(&self.disk, &self.config.root)
    }
}
