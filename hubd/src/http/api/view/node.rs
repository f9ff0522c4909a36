//! Nodes in JSON.

use std::collections::BTreeMap;

use cortex_proto::v1;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{id, some, time};

/// How much a command may do.
#[derive(Clone, Copy, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub(in crate::http) enum Mode {
    Strict,
    Permissive,
}

impl Mode {
    pub(super) fn of(mode: v1::Mode) -> Self {
        match mode {
            v1::Mode::Strict => Self::Strict,
            v1::Mode::Permissive => Self::Permissive,
        }
    }

    pub(in crate::http) fn wire(self) -> v1::Mode {
        match self {
            Self::Strict => v1::Mode::Strict,
            Self::Permissive => v1::Mode::Permissive,
        }
    }
}

/// What a strict command may see of the network.
#[derive(Clone, Copy, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub(in crate::http) enum Network {
    None,
    Full,
}

impl Network {
    fn of(network: v1::Network) -> Self {
        match network {
            v1::Network::None => Self::None,
            v1::Network::Full => Self::Full,
        }
    }

    pub(in crate::http) fn wire(self) -> v1::Network {
        match self {
            Self::None => v1::Network::None,
            Self::Full => v1::Network::Full,
        }
    }
}

/// The hub's policy for a node.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::http) struct Policy {
    pub(in crate::http) mode: Mode,
    /// None unless told otherwise.
    pub(in crate::http) network: Option<Network>,
    /// Why; stands in the audit log. Needed for whatever is more than strict without network.
    #[serde(default)]
    pub(in crate::http) reason: String,
    /// How long, in milliseconds. One hour unless told otherwise where the mode is permissive, and for
    /// ever where only the network is allowed; at most the hub's `permissive_longest` (30 days).
    pub(in crate::http) for_ms: Option<u64>,
}

/// Some of the nodes.
#[derive(Serialize, JsonSchema)]
pub(in crate::http) struct Nodes {
    pub(in crate::http) nodes: Vec<Node>,
    /// For the next page; absent on the last.
    pub(in crate::http) next_cursor: Option<String>,
}

/// A node as the hub sees it.
#[derive(Serialize, JsonSchema)]
pub(in crate::http) struct Node {
    node_id: String,
    name: String,
    online: bool,
    /// Set by invites and operators; those below `self/` by the node itself.
    labels: BTreeMap<String, String>,
    owner: Option<String>,
    joined_at_ms: i64,
    /// When a session of it last began or ended.
    last_seen_ms: Option<i64>,
    agent_version: String,
    hostname: String,
    os: String,
    arch: String,
    /// What an unrestricted request would run in: the lesser of policy and ceiling.
    effective_mode: Mode,
    /// The hub's policy, as it is in force now.
    policy: Mode,
    policy_network: Network,
    /// When the policy ends by itself.
    policy_until_ms: Option<i64>,
    policy_reason: Option<String>,
    /// The bound that the node's owner has set.
    ceiling: Mode,
    ceiling_network: Network,
    running_tasks: u32,
    /// It gets no new commands.
    cordoned: bool,
    revoked_at_ms: Option<i64>,
    remote_address: Option<String>,
    certificate_not_after_ms: Option<i64>,
    generation: u64,
    /// The hub's clock minus the node's.
    clock_skew_ms: i64,
    /// Another machine has shown this node's identity, and was refused.
    clone: Option<ClonedBy>,
    /// Whether its kernel can enforce strict; absent until it has said.
    strict_available: Option<bool>,
    /// What its kernel lacks for that.
    missing: Vec<Missing>,
}

/// A machine that was refused.
#[derive(Serialize, JsonSchema)]
struct ClonedBy {
    at_ms: i64,
    remote_address: String,
    hostname: String,
    presented_generation: u64,
    current_generation: u64,
}

/// What a kernel lacks.
#[derive(Serialize, JsonSchema)]
struct Missing {
    what: String,
    why: String,
    remedy: String,
}

impl Node {
    pub(in crate::http) fn of(node: v1::NodeInfo) -> Self {
        let (effective_mode, policy, ceiling) =
            (Mode::of(node.effective_mode()), Mode::of(node.policy()), Mode::of(node.ceiling()));
        let policy_network = Network::of(node.policy_network());
        let ceiling_network = Network::of(node.ceiling_network());
        let strict_available = node.sandbox.as_ref().map(|report| report.strict_available);
        let missing = node.sandbox.map(|report| report.missing).unwrap_or_default();
        Self {
            node_id: id(&node.node_id),
            name: node.name,
            online: node.online,
            labels: node.labels.into_iter().collect(),
            owner: some(node.owner),
            joined_at_ms: node.joined_at_ms,
            last_seen_ms: time(node.last_seen_ms),
            agent_version: node.agent_version,
            hostname: node.hostname,
            os: node.os,
            arch: node.arch,
            effective_mode,
            policy,
            policy_network,
            policy_until_ms: time(node.policy_until_ms),
            policy_reason: some(node.policy_reason),
            ceiling,
            ceiling_network,
            running_tasks: node.running_tasks,
            cordoned: node.cordoned,
            revoked_at_ms: time(node.revoked_at_ms),
            remote_address: some(node.remote_address),
            certificate_not_after_ms: time(node.certificate_not_after_ms),
            generation: node.generation,
            clock_skew_ms: node.clock_skew_ms,
            clone: node.clone.map(|clone| ClonedBy {
                at_ms: clone.at_ms,
                remote_address: clone.remote_address,
                hostname: clone.machine.map(|machine| machine.hostname).unwrap_or_default(),
                presented_generation: clone.presented_generation,
                current_generation: clone.current_generation,
            }),
            strict_available,
            missing: missing
                .into_iter()
                .map(|piece| Missing { what: piece.what, why: piece.why, remedy: piece.remedy })
                .collect(),
        }
    }
}
