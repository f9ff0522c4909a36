//! Which nodes are meant.

use std::collections::HashSet;

use cortex_proto::v1;
use cortex_proto::v1::operator_client::OperatorClient;
use cortex_shared::ids::NodeId;
use cortex_shared::labels::check_name;
use futures_util::StreamExt as _;
use tonic::transport::Channel;

use crate::cli::error::{CliError, Exit};
use crate::cli::hub;

/// Questions about names that are under way at the same time.
const QUESTIONS: usize = 16;

/// What was asked for.
#[derive(Debug)]
pub(in crate::cli::exec) struct Targets {
    selectors: Vec<String>,
    all: bool,
}

/// A node that the command goes to.
#[derive(Debug, Clone)]
pub(super) struct Target {
    /// It is named by its id to the hub, so that it is this node even if names change meanwhile.
    pub(super) id: NodeId,
    /// Its name, fit for a terminal and a file; its id where the hub tells none that is.
    pub(super) name: String,
    pub(super) online: bool,
}

impl Targets {
    pub(in crate::cli::exec) fn new(selectors: Vec<String>, all: bool) -> Self {
        Self { selectors, all }
    }

    /// The one node that was named, if it was.
    pub(in crate::cli::exec) fn single(&self) -> Option<&str> {
        match self.selectors.as_slice() {
            [one] if !self.all && !one.starts_with('@') => Some(one),
            _ => None,
        }
    }

    /// The nodes, each once, in the order they were asked for. Being offline is no reason to leave
    /// one out: whoever asks for it wants to hear that it was not reached.
    ///
    /// # Errors
    /// If a name leads nowhere, or a selector fits no node: then nothing is to run anywhere.
    pub(super) async fn resolve(
        &self,
        client: &OperatorClient<Channel>,
    ) -> Result<Vec<Target>, CliError> {
        let selectors: Vec<String> =
            if self.all { vec![String::new()] } else { self.selectors.clone() };
        let ask = |selector: String| {
            let mut client = client.clone();
            async move {
                let request = v1::ListNodesRequest { selector: selector.clone() };
                let answer = client.list_nodes(hub::question(request)).await?.into_inner();
                let nodes = answer.nodes.into_iter().filter(|node| node.revoked_at_ms == 0);
                let targets: Vec<Target> = nodes.filter_map(target).collect();
                if targets.is_empty() {
                    let what = if selector.is_empty() { "there are no nodes" } else { "no node" };
                    let text = match selector.as_str() {
                        "" => what.to_owned(),
                        selector => format!("{what} matches {selector:?}"),
                    };
                    return Err(CliError::new(Exit::NotFound, text).hint("cortex-agent node list"));
                }
                Ok(targets)
            }
        };
        let mut answers = futures_util::stream::iter(selectors).map(ask).buffered(QUESTIONS);
        let (mut found, mut known) = (Vec::new(), HashSet::new());
        while let Some(answer) = answers.next().await {
            found.extend(answer?.into_iter().filter(|target| known.insert(target.id)));
        }
        // Names are what output is told apart by.
        let mut names = HashSet::new();
        for target in &mut found {
            if !names.insert(target.name.clone()) {
                target.name = target.id.to_string();
            }
        }
        Ok(found)
    }
}

fn target(node: v1::NodeInfo) -> Option<Target> {
    let id = NodeId::from_slice(&node.node_id).ok()?;
    let name = if check_name(&node.name).is_ok() { node.name } else { id.to_string() };
    Some(Target { id, name, online: node.online })
}
