//! Listing and watching: which nodes are meant, which of them the caller sees, and streams of the
//! latest state.

use std::time::Duration;

use cortex_proto::v1;
use cortex_shared::labels::MAX_LABELS;
use cortex_shared::tasks::TaskScope;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::auth::AdmittedOperator;
use super::operator::{BoxStream, OperatorService, node_info};
use super::status::{from_lookup, invalid};
use super::stopping::until_stopped;
use super::workspaces;
use crate::node::registry::{NodeView, Registry};
use crate::task::relay::Relay;

/// Least time between two messages of a watched status.
const STATUS_INTERVAL: Duration = Duration::from_millis(100);

/// A stream of what `read` gives, at once and after each change, until it is an error or the hub
/// stops. Between two messages there is at least [`STATUS_INTERVAL`].
pub(super) fn watch<T, F>(
    scope: &TaskScope,
    mut changes: tokio::sync::watch::Receiver<u64>,
    mut read: impl FnMut() -> F + Send + 'static,
) -> BoxStream<T>
where
    T: Send + 'static,
    F: Future<Output = Result<T, Status>> + Send,
{
    let (sender, receiver) = mpsc::channel(1);
    let cancel = scope.token().clone();
    scope.spawn("watch", async move {
        loop {
            changes.mark_unchanged();
            let message = read().await;
            let last = message.is_err();
            // A reader that is slow gets fewer messages, each of them the latest.
            if sender.send(message).await.is_err() || last {
                return;
            }
            tokio::select! {
                () = cancel.cancelled() => return,
                () = sender.closed() => return,
                () = async {
                    tokio::time::sleep(STATUS_INTERVAL).await;
                    // The registry outlives every stream.
                    changes.changed().await.ok();
                } => {}
            }
        }
    });
    until_stopped(scope.token().clone(), ReceiverStream::new(receiver))
}

/// Which nodes are meant.
pub(super) enum Selector {
    All,
    /// A name, or a unique prefix of an id.
    One(String),
    /// Labels, all of which must hold.
    Labels(Vec<(String, String)>),
}

impl Selector {
    /// Reads a name, a prefix of an id, or `@key=value,…`; empty for all.
    pub(super) fn parse(text: &str) -> Result<Self, Status> {
        let Some(labels) = text.strip_prefix('@') else {
            return Ok(if text.is_empty() { Self::All } else { Self::One(text.to_owned()) });
        };
        let term = |term: &str| {
            let (key, value) = term
                .split_once('=')
                .ok_or_else(|| invalid(format!("{term:?} is not a label selector: @key=value")))?;
            Ok((key.to_owned(), value.to_owned()))
        };
        if labels.split(',').count() > MAX_LABELS {
            return Err(invalid(format!("a selector has {MAX_LABELS} labels at most")));
        }
        labels.split(',').map(term).collect::<Result<_, _>>().map(Self::Labels)
    }
}

/// The nodes that are meant, of those that the caller sees: one pass over the registry, and one over
/// the commands that run.
pub(super) fn list_nodes(
    registry: &Registry,
    relay: &Relay,
    selector: &Selector,
    caller: &AdmittedOperator,
) -> Result<v1::ListNodesResponse, Status> {
    let views = select(registry, selector, caller)?;
    Ok(v1::ListNodesResponse { nodes: with_tasks(relay, views) })
}

fn select(
    registry: &Registry,
    selector: &Selector,
    caller: &AdmittedOperator,
) -> Result<Vec<NodeView>, Status> {
    let mut views = match selector {
        Selector::All | Selector::Labels(_) => registry.all(),
        Selector::One(node) => {
            vec![registry.find(node, |node| caller.sees(node)).map_err(from_lookup)?]
        }
    };
    views.retain(|view| caller.sees(&view.node));
    if let Selector::Labels(wanted) = selector {
        views.retain(|view| wanted.iter().all(|(k, v)| view.node.labels.get(k) == Some(v)));
    }
    Ok(views)
}

fn with_tasks(relay: &Relay, views: Vec<NodeView>) -> Vec<v1::NodeInfo> {
    let running = relay.running_by_node();
    let info = |view: NodeView| {
        let count = running.get(&view.node.id).copied().unwrap_or_default();
        node_info(view, u32::try_from(count).unwrap_or(u32::MAX))
    };
    views.into_iter().map(info).collect()
}

/// Some of a list that is sorted by name, and the name after which the next ones come.
pub(crate) struct Page<T> {
    /// The items.
    pub(crate) items: Vec<T>,
    /// Absent on the last page.
    pub(crate) next: Option<String>,
}

impl<T> Page<T> {
    /// At most `limit` of all that come after the name `after`.
    fn cut(all: Vec<T>, name: impl Fn(&T) -> &str, after: &str, limit: usize) -> Self {
        let mut items: Vec<T> = all.into_iter().filter(|item| name(item) > after).collect();
        let more = items.len() > limit;
        items.truncate(limit);
        let next = items.last().filter(|_| more).map(|item| name(item).to_owned());
        Self { items, next }
    }
}

impl OperatorService {
    /// Some of the nodes that a selector means, of those that the caller sees and, if it says so, of
    /// those that are online or not; sorted by name, from the one after `after`.
    ///
    /// # Errors
    /// As for listing all of them.
    pub(crate) fn page_of_nodes(
        &self,
        caller: &AdmittedOperator,
        selector: &str,
        online: Option<bool>,
        after: &str,
        limit: usize,
    ) -> Result<Page<v1::NodeInfo>, Status> {
        let mut views = select(&self.registry, &Selector::parse(selector)?, caller)?;
        views.retain(|view| online.is_none_or(|online| view.session.is_some() == online));
        let page = Page::cut(views, |view| &view.node.name, after, limit);
        Ok(Page { items: with_tasks(&self.relay, page.items), next: page.next })
    }

    /// Some of the workspaces that the caller sees, likewise.
    ///
    /// # Errors
    /// Those of the content's databases.
    pub(crate) async fn page_of_workspaces(
        &self,
        caller: &AdmittedOperator,
        after: &str,
        limit: usize,
    ) -> Result<Page<v1::WorkspaceInfo>, Status> {
        let visible = workspaces::visible(self, caller);
        let page = Page::cut(visible, |workspace| &workspace.name, after, limit);
        let mut items = Vec::with_capacity(page.items.len());
        for workspace in page.items {
            items.push(workspaces::describe(self, &workspace, caller).await?);
        }
        Ok(Page { items, next: page.next })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_selector_has_no_more_terms_than_a_node_has_labels() {
        let labels = |count: usize| format!("@{}", vec!["k=v"; count].join(","));
        assert!(matches!(Selector::parse(&labels(MAX_LABELS)), Ok(Selector::Labels(_))));
        for bad in [labels(MAX_LABELS + 1), format!("@{}", ",".repeat(100_000)), "@k".into()] {
            let refused = Selector::parse(&bad).err().unwrap();
            assert_eq!(refused.code(), tonic::Code::InvalidArgument);
        }
    }
}
