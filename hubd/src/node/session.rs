//! One live connection of one node, from welcome to close.
//!
//! The session task owns both halves of the control stream. It ends when the stream ends, when
//! nothing came for three heartbeat intervals, when a newer session takes over, or when the hub
//! stops. Every way out passes [`SessionGuard`], which takes the session out of the registry (if it
//! is still the current one) and tells everyone who waits for one of its tasks.

use std::sync::Arc;
use std::time::Duration;

use cortex_proto::v1::{Heartbeat, NodeFrame, hub_frame, node_frame};
use cortex_shared::ids::{TaskId, WorkspaceId};
use futures_util::{Stream, StreamExt as _};
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use super::membership::Membership;
use super::registry::{Registry, SessionHandle, SyncNews};
use crate::events::{EventBus, Kind, NewEvent};
use crate::grpc::convert;
use crate::task::relay::Relay;

/// Ends the session wherever its task leaves.
pub struct SessionGuard {
    handle: SessionHandle,
    registry: Arc<Registry>,
    membership: Arc<Membership>,
    relay: Arc<Relay>,
    events: Arc<EventBus>,
}

impl SessionGuard {
    /// Guards a session that has just begun.
    #[must_use]
    pub fn new(
        handle: SessionHandle,
        registry: Arc<Registry>,
        membership: Arc<Membership>,
        relay: Arc<Relay>,
        events: Arc<EventBus>,
    ) -> Self {
        Self { handle, registry, membership, relay, events }
    }

    /// Whether the node is a member of the workspace of this id. Of others it has nothing to say.
    fn is_of_member(&self, workspace_id: &[u8]) -> bool {
        WorkspaceId::from_slice(workspace_id)
            .is_ok_and(|workspace| self.membership.is_member(self.handle.node, workspace))
    }

    fn tell(&self, workspace: WorkspaceId, news: SyncNews) {
        let Some(view) = self.registry.get(self.handle.node) else { return };
        // By the hub's own record: a node may call a workspace what it likes.
        let name = self.membership.name_of(workspace).unwrap_or_default();
        let about = NewEvent::of_workspace(workspace, &name).of_member(&view.node);
        match news {
            SyncNews::Held(deletions) => {
                self.events.publish(Kind::WorkspaceHold, about.with("deletions", deletions));
            }
            SyncNews::Released => self.events.publish(Kind::WorkspaceReleased, about),
            SyncNews::Halted(reason) => {
                self.events.publish(Kind::WorkspaceHalted, about.with("reason", reason));
            }
        }
    }
}

impl Drop for SessionGuard {
    fn drop(&mut self) {
        self.handle.close();
        let current = self.registry.end_session(self.handle.node, self.handle.id);
        let view = self.registry.get(self.handle.node).filter(|_| current);
        if let Some(view) = view {
            self.events.publish(Kind::NodeOffline, NewEvent::of_node(&view.node));
        }
        self.relay.session_lost(self.handle.id);
        tracing::info!(node = %self.handle.node, session = %self.handle.id, current, "node left");
    }
}

/// Reads the node's frames until the session ends.
pub async fn run<S, E>(
    guard: SessionGuard,
    mut inbound: S,
    cancel: CancellationToken,
    heartbeat: Duration,
) where
    S: Stream<Item = Result<NodeFrame, E>> + Unpin,
    E: std::fmt::Display,
{
    let silence = heartbeat * 3;
    let mut deadline = Instant::now() + silence;
    loop {
        let frame = tokio::select! {
            // A cancel overtakes whatever the node has to say.
            biased;
            () = cancel.cancelled() => return,
            frame = inbound.next() => frame,
            () = sleep_until(deadline) => {
                // Its task streams are liveness, too: a busy node is not a dead one.
                match guard.relay.last_frame(guard.handle.id) {
                    Some(last) if last + silence > Instant::now() => {
                        deadline = last + silence;
                        continue;
                    }
                    _ => {
                        tracing::warn!(node = %guard.handle.node, "nothing heard for {silence:?}");
                        return;
                    }
                }
            }
        };
        let frame = match frame {
            None => return,
            Some(Err(error)) => {
                tracing::debug!(node = %guard.handle.node, %error, "control stream ended");
                return;
            }
            Some(Ok(frame)) => frame,
        };
        deadline = Instant::now() + silence;
        if handle(&guard, frame).is_err() {
            return;
        }
    }
}

fn handle(guard: &SessionGuard, frame: NodeFrame) -> Result<(), super::registry::SessionEnded> {
    match frame.frame {
        Some(node_frame::Frame::Heartbeat(_)) => {
            guard.handle.send(hub_frame::Frame::Heartbeat(Heartbeat {}))?;
        }
        Some(node_frame::Frame::TaskRefused(refused)) => {
            if let (Ok(task), Some(exit)) = (TaskId::from_slice(&refused.task_id), refused.exit) {
                guard.relay.outcome(task, &guard.handle, exit);
            }
        }
        Some(node_frame::Frame::TaskOutcome(outcome)) => {
            if let (Ok(task), Some(exit)) = (TaskId::from_slice(&outcome.task_id), outcome.exit) {
                guard.relay.outcome(task, &guard.handle, exit);
            }
        }
        Some(node_frame::Frame::SyncReport(mut report)) => {
            report.workspaces.retain(|status| guard.is_of_member(&status.workspace_id));
            let (node, session) = (guard.handle.node, guard.handle.id);
            let now = Instant::now();
            for (id, news) in guard.registry.report_sync(node, session, report.workspaces, now) {
                guard.tell(id, news);
            }
        }
        Some(node_frame::Frame::CeilingChanged(changed)) => {
            let ceiling = convert::bound(changed.ceiling, changed.network);
            guard.registry.set_ceiling(guard.handle.node, guard.handle.id, ceiling);
        }
        // A second Hello is meaningless; a frame this version does not know is skipped.
        Some(node_frame::Frame::Hello(_)) | None => {}
    }
    Ok(())
}
