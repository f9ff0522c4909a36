//! Nodes, and the hub's policy for them.

use cortex_proto::v1;
use cortex_proto::v1::operator_server::Operator as _;
use schemars::JsonSchema;
use serde::Deserialize;

use super::{Api, page_size, view};
use crate::http::error::Problem;
use crate::http::routes::{Call, NoQuery};

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::http) struct Filter {
    /// A name, the beginning of an id, or labels: `@key=value,key=value`. Without it, all.
    selector: Option<String>,
    /// Only those that are connected, or only those that are not.
    online: Option<bool>,
    /// Items of a page: 1 to 1000, 100 unless told otherwise.
    limit: Option<u32>,
    /// `next_cursor` of the page before.
    cursor: Option<String>,
}

pub(in crate::http) async fn list(
    api: &Api,
    call: &Call,
    filter: Filter,
) -> Result<view::Nodes, Problem> {
    let limit = usize::try_from(page_size(filter.limit)).unwrap_or(usize::MAX);
    let page = api.service.page_of_nodes(
        call.caller()?,
        &filter.selector.unwrap_or_default(),
        filter.online,
        &filter.cursor.unwrap_or_default(),
        limit,
    )?;
    let nodes = page.items.into_iter().map(view::Node::of).collect();
    Ok(view::Nodes { nodes, next_cursor: page.next })
}

pub(in crate::http) async fn show(
    api: &Api,
    call: &Call,
    _: NoQuery,
) -> Result<view::Node, Problem> {
    let name = call.part("node");
    // Neither of these is a node, and as a selector both would mean several.
    let missing = || {
        let status = http::StatusCode::NOT_FOUND;
        Problem::new(status, "node_not_found", format!("no node matches {name:?}"))
    };
    if name.is_empty() || name.starts_with('@') {
        return Err(missing());
    }
    let page = api.service.page_of_nodes(call.caller()?, &name, None, "", 1)?;
    page.items.into_iter().next().map(view::Node::of).ok_or_else(missing)
}

pub(in crate::http) async fn set_policy(
    api: &Api,
    call: &Call,
    _: NoQuery,
    policy: view::Policy,
) -> Result<view::Node, Problem> {
    let request = v1::SetNodePolicyRequest {
        node: call.part("node"),
        mode: policy.mode.wire().into(),
        network: policy.network.unwrap_or(view::Network::None).wire().into(),
        reason: policy.reason,
        for_ms: policy.for_ms.unwrap_or_default(),
    };
    let node = api.service.set_node_policy(call.request(request)?).await?;
    Ok(view::Node::of(node.into_inner()))
}

pub(in crate::http) async fn clear_policy(
    api: &Api,
    call: &Call,
    _: NoQuery,
) -> Result<view::Node, Problem> {
    let request = v1::SetNodePolicyRequest { node: call.part("node"), ..Default::default() };
    let node = api.service.set_node_policy(call.request(request)?).await?;
    Ok(view::Node::of(node.into_inner()))
}
