//! Commands for the running hub, over its administration socket.

use std::time::Duration;

use cortex_proto::v1;
use cortex_proto::v1::operator_client::OperatorClient;
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};
use tower::service_fn;

use super::authority;
use super::output::{self, Format, Unreachable};
use super::{HubConfig, InviteCommand, OperatorCommand};
use crate::config::DataLayout;

/// Time to reach the hub's socket, and for its answer: a hub that hangs must not hang the command.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const CALL_TIMEOUT: Duration = Duration::from_secs(30);

pub(super) async fn connect(config: &HubConfig) -> anyhow::Result<OperatorClient<Channel>> {
    connect_by(config, |hub| hub.timeout(CALL_TIMEOUT)).await
}

/// The same for a call that may take its time.
pub(super) async fn connect_for_long(
    config: &HubConfig,
) -> anyhow::Result<OperatorClient<Channel>> {
    connect_by(config, |hub| hub).await
}

async fn connect_by(
    config: &HubConfig,
    limit: impl FnOnce(Endpoint) -> Endpoint,
) -> anyhow::Result<OperatorClient<Channel>> {
    let path = DataLayout::new(&config.data).socket();
    let socket = path.clone();
    // The address is a formality: the connector goes to the socket.
    let channel = limit(Endpoint::from_static("http://hub"))
        .connect_timeout(CONNECT_TIMEOUT)
        .connect_with_connector(service_fn(move |_| {
            let path = path.clone();
            async move { UnixStream::connect(path).await.map(TokioIo::new) }
        }))
        .await
        .map_err(|source| Unreachable { socket, source })?;
    Ok(OperatorClient::new(channel))
}

pub(super) async fn status(config: &HubConfig, format: Format) -> anyhow::Result<()> {
    let status = connect(config).await?.hub_status(v1::HubStatusRequest {}).await?.into_inner();
    let document = json!({
        "version": status.version,
        "mesh_id": status.mesh_id,
        "started_at": time(status.started_at_ms),
        "nodes_known": status.nodes_known,
        "nodes_online": status.nodes_online,
        "running_tasks": status.running_tasks,
        "workspaces": status.workspaces,
        "grpc_address": status.grpc_address,
        "http_url": status.http_url,
        "http_pin": status.http_pin,
        "draining": status.draining,
    });
    let text = format!(
        "hub {} of mesh {}\naddress     {}\nhttp        {}\nup since    {}\nnodes       {} online of {}\ntasks       {} running{}\nworkspaces  {}",
        status.version,
        status.mesh_id,
        status.grpc_address,
        if status.http_url.is_empty() { "off" } else { &status.http_url },
        time(status.started_at_ms).unwrap_or_default(),
        status.nodes_online,
        status.nodes_known,
        status.running_tasks,
        if status.draining { ", and no new ones are taken" } else { "" },
        status.workspaces,
    );
    output::show(format, &document, &text);
    Ok(())
}

pub(super) async fn invite(command: InviteCommand) -> anyhow::Result<()> {
    match command {
        InviteCommand::Create {
            uses,
            ttl,
            labels,
            name_pattern,
            workspaces,
            from,
            owner,
            data,
            format,
        } => {
            let request = v1::CreateInviteRequest {
                uses,
                ttl_ms: u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX),
                labels: labels.into_iter().collect(),
                name_pattern,
                workspaces,
                source_cidrs: from,
                owner,
            };
            let invite = connect(&data.config()).await?.create_invite(request).await?.into_inner();
            let document = json!({
                "token": invite.token,
                "id": invite.id,
                "ca_pin": invite.ca_pin,
                "expires_at": time(invite.expires_at_ms),
                "command": invite.command,
                "join_command": invite.join_command,
            });
            output::show(format, &document, &invite.command);
            if invite.join_command != invite.command {
                output::note(&format!("where the agent is installed: {}", invite.join_command));
            }
        }
        InviteCommand::List { data, format } => {
            let invites = connect(&data.config())
                .await?
                .list_invites(v1::ListInvitesRequest {})
                .await?
                .into_inner()
                .invites;
            let items = invites.into_iter().map(invite_json).collect();
            let columns = ["id", "kind", "uses", "max_uses", "expires_at", "state", "created_by"];
            output::list(format, &columns, items);
        }
        InviteCommand::Revoke { id, data } => {
            connect(&data.config()).await?.revoke_invite(v1::RevokeInviteRequest { id }).await?;
        }
    }
    Ok(())
}

fn invite_json(invite: v1::InviteInfo) -> Value {
    let state = if invite.revoked {
        "revoked"
    } else if invite.expires_at_ms <= cortex_shared::clock::unix_ms() {
        "expired"
    } else if invite.uses >= invite.max_uses {
        "used up"
    } else {
        "valid"
    };
    json!({
        "id": invite.id,
        "kind": invite.kind,
        "uses": invite.uses,
        "max_uses": invite.max_uses,
        "expires_at": time(invite.expires_at_ms),
        "created_at": time(invite.created_at_ms),
        "created_by": invite.created_by,
        "state": state,
        "labels": invite.labels,
        "name_pattern": invite.name_pattern,
        "workspaces": invite.workspaces,
        "source_cidrs": invite.source_cidrs,
        "owner": invite.owner,
    })
}

pub(super) async fn operator(command: OperatorCommand) -> anyhow::Result<()> {
    let (name, role, ttl, scope, data, format) = match command {
        OperatorCommand::Create { name, role, ttl, scope, data, format } => {
            (name, role, ttl, scope, data, format)
        }
        OperatorCommand::List { data, format } => return authority::operators(&data, format).await,
        OperatorCommand::Revoke { name, data } => {
            return authority::revoke_operator(name, &data).await;
        }
    };
    let request = v1::CreateOperatorRequest {
        name,
        role: role.to_string(),
        ttl_ms: u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX),
        scope: scope.into_iter().collect(),
    };
    let invite = connect(&data.config()).await?.create_operator(request).await?.into_inner();
    let document = json!({
        "token": invite.token,
        "ca_pin": invite.ca_pin,
        "expires_at": time(invite.expires_at_ms),
        "command": invite.command,
    });
    output::show(format, &document, &invite.command);
    Ok(())
}

/// A link that logs a browser in as the hub's own administrator.
pub(super) async fn login_link(config: &HubConfig, format: Format) -> anyhow::Result<()> {
    let mut hub = connect(config).await?;
    let link = hub.create_login_link(v1::CreateLoginLinkRequest {}).await?.into_inner();
    let document = json!({
        "url": link.url,
        "code": link.code,
        "expires_at": time(link.expires_at_ms),
        "http_pin": link.http_pin,
    });
    output::show(format, &document, &link.url);
    Ok(())
}

pub(super) fn node_json(node: v1::NodeInfo) -> Value {
    let mode = |mode: v1::Mode| if mode == v1::Mode::Strict { "strict" } else { "permissive" };
    let network = |network: v1::Network| if network == v1::Network::Full { "full" } else { "none" };
    let state = match (node.revoked_at_ms, node.online, node.cordoned) {
        (0, true, false) => "online",
        (0, true, true) => "online, cordoned",
        (0, false, false) => "offline",
        (0, false, true) => "offline, cordoned",
        _ => "revoked",
    };
    let node_id = cortex_shared::ids::NodeId::from_slice(&node.node_id);
    let machine = |machine: v1::MachineFacts| {
        json!({
            "hostname": machine.hostname,
            "machine_id": machine.machine_id,
            "boot_id": machine.boot_id,
        })
    };
    let clone = node.clone.clone().map(|clone| {
        json!({
            "at": time(clone.at_ms),
            "remote_address": clone.remote_address,
            "machine": clone.machine.map(machine),
            "presented_generation": clone.presented_generation,
            "current_generation": clone.current_generation,
        })
    });
    json!({
        "online": node.online,
        "state": state,
        "effective_mode": mode(node.effective_mode()),
        "policy": mode(node.policy()),
        "policy_network": network(node.policy_network()),
        "policy_until": time(node.policy_until_ms),
        "policy_reason": node.policy_reason,
        "ceiling": mode(node.ceiling()),
        "ceiling_network": network(node.ceiling_network()),
        "cordoned": node.cordoned,
        "revoked_at": time(node.revoked_at_ms),
        "node_id": node_id.map(|id| id.to_string()).unwrap_or_default(),
        "name": node.name,
        "labels": node.labels,
        "last_seen": time(node.last_seen_ms),
        "joined_at": time(node.joined_at_ms),
        "hostname": node.hostname,
        "agent_version": node.agent_version,
        "running_tasks": node.running_tasks,
        "owner": node.owner,
        "remote_address": node.remote_address,
        "machine": node.machine.map(machine),
        "certificate_until": time(node.certificate_not_after_ms),
        "generation": node.generation,
        "clock_skew_ms": node.clock_skew_ms,
        "clone": clone,
    })
}

/// A time as RFC 3339 with seconds; `None` for never.
pub(super) fn time(ms: i64) -> Option<String> {
    if ms == 0 {
        return None;
    }
    jiff::Timestamp::from_millisecond(ms).ok().map(|time| format!("{time:.0}"))
}
