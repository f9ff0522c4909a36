//! The line of a member to the hub: everything takes its time, calls and answers get lost.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use cortex_shared::entry::Digest;
use cortex_shared::ids::WorkspaceId;
use futures_util::StreamExt as _;
use futures_util::stream::{self, BoxStream};
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};

use super::super::memory_hub::MemoryHub;
use crate::sync::hub::{
    Answers, ChangesPage, Commit, Committed, Contact, Fetched, Head, Hub, HubError,
};
use crate::sync::index::Cursor;

struct State {
    random: Mutex<StdRng>,
    up: AtomicBool,
    /// One in so many messages gets lost, and the line with it; none for 0.
    loss: AtomicU32,
}

/// See the module. Cheap to clone.
#[derive(Clone)]
pub(super) struct Line {
    hub: MemoryHub,
    state: Arc<State>,
}

impl Line {
    pub(super) fn new(hub: MemoryHub, seed: u64) -> Self {
        let random = Mutex::new(StdRng::seed_from_u64(seed));
        let state = State { random, up: AtomicBool::new(true), loss: AtomicU32::new(0) };
        Self { hub, state: Arc::new(state) }
    }

    pub(super) fn set_up(&self, up: bool) {
        self.state.up.store(up, Ordering::SeqCst);
    }

    pub(super) fn set_loss(&self, rate: u32) {
        self.state.loss.store(rate, Ordering::SeqCst);
    }

    /// A number from 0 to 1.
    pub(super) fn chance(&self) -> f64 {
        let mut random = self.state.random.lock().unwrap_or_else(PoisonError::into_inner);
        random.random_range(0.0..1.0)
    }

    /// A message on its way.
    async fn travel(&self) -> Result<(), HubError> {
        let (delay, lost) = {
            let mut random = self.state.random.lock().unwrap_or_else(PoisonError::into_inner);
            let loss = self.state.loss.load(Ordering::SeqCst);
            (random.random_range(0..20_000), loss > 0 && random.random_range(0..loss) == 0)
        };
        tokio::time::sleep(Duration::from_micros(delay)).await;
        if lost || !self.state.up.load(Ordering::SeqCst) {
            return Err(HubError::Unavailable { message: "lost".to_owned() });
        }
        Ok(())
    }

    async fn call<T>(
        &self,
        call: impl Future<Output = Result<T, HubError>> + Send,
    ) -> Result<T, HubError> {
        self.travel().await?;
        let answer = call.await;
        self.travel().await?;
        answer
    }

    fn answers<T: Send + 'static>(&self, answers: Answers<T>) -> Answers<T> {
        stream::unfold(Some((self.clone(), answers)), |state| async move {
            let (line, mut answers) = state?;
            let answer = answers.next().await?;
            match line.travel().await {
                Ok(()) => Some((answer, Some((line, answers)))),
                Err(error) => Some((Err(error), None)),
            }
        })
        .boxed()
    }
}

impl Hub for Line {
    fn moved_bytes(&self) -> u64 {
        0
    }

    async fn head(&self, workspace: WorkspaceId, known: Option<Head>) -> Result<Contact, HubError> {
        self.call(self.hub.head(workspace, known)).await
    }

    async fn have(&self, workspace: WorkspaceId, chunks: &[Digest]) -> Result<Vec<bool>, HubError> {
        self.call(self.hub.have(workspace, chunks)).await
    }

    async fn put_packs(
        &self,
        workspace: WorkspaceId,
        packs: BoxStream<'static, Bytes>,
    ) -> Result<Answers<Digest>, HubError> {
        let answers = self.call(self.hub.put_packs(workspace, packs)).await?;
        Ok(self.answers(answers))
    }

    async fn commit(&self, workspace: WorkspaceId, commit: Commit) -> Result<Committed, HubError> {
        self.call(self.hub.commit(workspace, commit)).await
    }

    async fn changes(
        &self,
        workspace: WorkspaceId,
        after: u64,
        known: Option<Head>,
    ) -> Result<Answers<ChangesPage>, HubError> {
        let answers = self.call(self.hub.changes(workspace, after, known)).await?;
        Ok(self.answers(answers))
    }

    async fn get_packs(
        &self,
        workspace: WorkspaceId,
        chunks: &[Digest],
    ) -> Result<Answers<Fetched>, HubError> {
        let answers = self.call(self.hub.get_packs(workspace, chunks)).await?;
        Ok(self.answers(answers))
    }

    async fn ack_applied(&self, workspace: WorkspaceId, cursor: Cursor) -> Result<(), HubError> {
        self.call(self.hub.ack_applied(workspace, cursor)).await
    }
}
