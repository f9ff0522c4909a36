//! Streams that end when what they show leaves the scope of whoever looks.

use std::sync::Arc;

use cortex_shared::ids::NodeId;
use futures_util::{StreamExt as _, stream};
use tonic::Status;

use super::auth::AdmittedOperator;
use super::operator::BoxStream;
use crate::node::registry::Registry;

/// The same frames, as long as the caller sees the node; then `gone`, which is what it would be told if it
/// asked now.
pub(super) fn while_seen<T: Send + 'static>(
    frames: BoxStream<T>,
    registry: &Arc<Registry>,
    caller: &AdmittedOperator,
    node: NodeId,
    gone: Status,
) -> BoxStream<T> {
    if caller.scope.is_everything() {
        return frames;
    }
    let leaving = Box::pin(leaves_scope(Arc::clone(registry), caller.clone(), node));
    Box::pin(stream::unfold(Some((frames, leaving, gone)), |state| async move {
        let (mut frames, mut leaving, gone) = state?;
        tokio::select! {
            biased;
            () = &mut leaving => Some((Err(gone), None)),
            frame = frames.next() => Some((frame?, Some((frames, leaving, gone)))),
        }
    }))
}

async fn leaves_scope(registry: Arc<Registry>, caller: AdmittedOperator, node: NodeId) {
    let mut changes = registry.changes();
    loop {
        changes.mark_unchanged();
        if registry.get(node).is_none_or(|view| !caller.sees(&view.node)) {
            return;
        }
        // The registry outlives every stream.
        changes.changed().await.ok();
    }
}
