//! The Operator service: looking, inviting, workspaces. Commands are in [`super::exec`].

use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use cortex_proto::v1;
use cortex_proto::v1::operator_server::Operator;
use cortex_shared::clock::unix_ms;
use cortex_shared::labels::Labels;
use cortex_shared::policy::{Mode, Role};
use cortex_shared::secret::InviteToken;
use futures_util::Stream;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Response, Status, Streaming};

use super::auth::{AdmittedOperator, admitted};
use super::status::{from_lookup, from_store, internal, invalid, refuse, with_hint};
use super::{convert, exec};
use crate::enroll::ca::CertificateAuthority;
use crate::node::registry::{NodeView, Registry};
use crate::store::{Invite, InviteKind, NewInvite, Store, StoreError, Workspace};
use crate::sync::Workspaces;
use crate::sync::members::Members;
use crate::task::relay::Relay;

/// Life of an invite unless told otherwise.
const DEFAULT_INVITE_TTL: Duration = Duration::from_secs(3600);
/// Longest life of an invite.
const MAX_INVITE_TTL: Duration = Duration::from_secs(7 * 24 * 3600);
/// Most uses of one invite.
const MAX_INVITE_USES: u32 = 10_000;
/// Least time between two messages of a watched status.
const STATUS_INTERVAL: Duration = Duration::from_millis(100);

/// See the module.
pub struct OperatorService {
    /// The store.
    pub store: Arc<dyn Store>,
    /// Nodes.
    pub registry: Arc<Registry>,
    /// Commands.
    pub relay: Arc<Relay>,
    /// Workspaces and their members.
    pub members: Arc<Members>,
    /// Workspace content.
    pub content: Arc<Workspaces>,
    /// The mesh.
    pub authority: Arc<CertificateAuthority>,
    /// Owns streams that outlive their call.
    pub scope: cortex_shared::tasks::TaskScope,
    /// Where nodes reach this hub.
    pub address: HubAddress,
    /// When the hub started.
    pub started_at_ms: i64,
}

/// Where nodes reach this hub.
#[derive(Clone, Debug)]
pub struct HubAddress {
    /// What is listened on.
    pub bound: SocketAddr,
    /// The host name to tell them, if another than the bound address.
    pub advertise: Option<String>,
}

impl std::fmt::Display for HubAddress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.advertise {
            Some(host) => write!(f, "{host}:{}", self.bound.port()),
            None => write!(f, "{}", self.bound),
        }
    }
}

type BoxStream<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

impl OperatorService {
    fn workspace(&self, name: &str) -> Result<Workspace, Status> {
        self.members.membership.by_name(name).ok_or_else(|| {
            with_hint(
                refuse(
                    Code::NotFound,
                    "workspace_not_found",
                    format!("there is no workspace {name:?}"),
                ),
                &format!("make it: cortex-agent workspace create {name}"),
            )
        })
    }

    async fn describe(&self, workspace: &Workspace) -> Result<v1::WorkspaceInfo, Status> {
        self.members.describe(workspace).await.map_err(|error| internal(&error))
    }

    async fn record_invite(
        &self,
        kind: InviteKind,
        ttl_ms: u64,
        max_uses: u32,
        created_by: String,
        fill: impl FnOnce(&mut NewInvite),
    ) -> Result<(InviteToken, i64), Status> {
        let ttl = match ttl_ms {
            0 => DEFAULT_INVITE_TTL,
            ms => Duration::from_millis(ms),
        };
        if ttl > MAX_INVITE_TTL {
            return Err(invalid("an invite lives for 7 days at most"));
        }
        if max_uses > MAX_INVITE_USES {
            return Err(invalid(format!("an invite has {MAX_INVITE_USES} uses at most")));
        }
        let token = InviteToken::generate();
        let now = unix_ms();
        let expires_at_ms = now + i64::try_from(ttl.as_millis()).unwrap_or(i64::MAX);
        let mut invite = NewInvite {
            id: token.id().clone(),
            secret_hash: token.secret_hash(),
            kind,
            max_uses: max_uses.max(1),
            expires_at_ms,
            created_at_ms: now,
            created_by,
            labels: Labels::new(),
            name_pattern: String::new(),
            workspaces: Default::default(),
        };
        fill(&mut invite);
        self.store.create_invite(invite).await.map_err(from_store)?;
        tracing::info!(invite = %token.id(), ?kind, "invite created");
        Ok((token, expires_at_ms))
    }
}

#[tonic::async_trait]
impl Operator for OperatorService {
    type ExecStream = BoxStream<v1::ExecDown>;
    type WorkspaceStatusStream = BoxStream<v1::WorkspaceStatusResponse>;

    async fn who_am_i(
        &self,
        request: Request<v1::WhoAmIRequest>,
    ) -> Result<Response<v1::WhoAmIResponse>, Status> {
        let operator: AdmittedOperator = admitted(&request)?;
        Ok(Response::new(v1::WhoAmIResponse {
            name: operator.name,
            role: operator.role.to_string(),
            mesh_id: self.authority.mesh().to_string(),
            hub_version: env!("CARGO_PKG_VERSION").to_owned(),
            certificate_not_after_ms: operator.certificate_not_after_ms.unwrap_or_default(),
        }))
    }

    async fn hub_status(
        &self,
        _: Request<v1::HubStatusRequest>,
    ) -> Result<Response<v1::HubStatusResponse>, Status> {
        let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        Ok(Response::new(v1::HubStatusResponse {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            mesh_id: self.authority.mesh().to_string(),
            started_at_ms: self.started_at_ms,
            nodes_known: count(self.registry.all().len()),
            nodes_online: count(self.registry.sessions().len()),
            running_tasks: count(self.relay.running()),
            workspaces: count(self.members.membership.all().len()),
            grpc_address: self.address.to_string(),
        }))
    }

    async fn list_nodes(
        &self,
        request: Request<v1::ListNodesRequest>,
    ) -> Result<Response<v1::ListNodesResponse>, Status> {
        let selector = request.into_inner().selector;
        let nodes = if let Some(labels) = selector.strip_prefix('@') {
            let wanted = parse_selector(labels)?;
            let mut nodes = self.registry.all();
            nodes.retain(|view| wanted.iter().all(|(k, v)| view.node.labels.get(k) == Some(v)));
            nodes
        } else if selector.is_empty() {
            self.registry.all()
        } else {
            vec![self.registry.find(&selector).map_err(from_lookup)?]
        };
        let nodes = nodes.into_iter().map(|view| self.node_info(view)).collect();
        Ok(Response::new(v1::ListNodesResponse { nodes }))
    }

    async fn exec(
        &self,
        request: Request<Streaming<v1::ExecUp>>,
    ) -> Result<Response<Self::ExecStream>, Status> {
        let operator: AdmittedOperator = admitted(&request)?;
        let stream = exec::begin(self, operator, request.into_inner()).await?;
        Ok(Response::new(Box::pin(stream)))
    }

    async fn create_invite(
        &self,
        request: Request<v1::CreateInviteRequest>,
    ) -> Result<Response<v1::CreateInviteResponse>, Status> {
        let operator: AdmittedOperator = admitted(&request)?;
        let request = request.into_inner();
        let labels = convert::checked_labels(request.labels)?;
        if request.name_pattern.len() > 63 {
            return Err(invalid("the name pattern is longer than 63 characters"));
        }
        let mut workspaces = std::collections::BTreeSet::new();
        for name in &request.workspaces {
            workspaces.insert(self.workspace(name)?.id);
        }
        let (token, expires_at_ms) = self
            .record_invite(
                InviteKind::Node,
                request.ttl_ms,
                request.uses,
                operator.name,
                |invite| {
                    invite.labels = labels;
                    invite.name_pattern = request.name_pattern;
                    invite.workspaces = workspaces;
                },
            )
            .await?;
        let ca_pin = self.authority.pin().to_string();
        // The token goes in by the environment: arguments are visible to every user of the node.
        let command = format!(
            "CORTEX_TOKEN={} cortex-agent join {} --ca {ca_pin}",
            token.expose(),
            self.address
        );
        Ok(Response::new(v1::CreateInviteResponse {
            token: token.expose(),
            id: token.id().to_string(),
            ca_pin,
            expires_at_ms,
            command,
        }))
    }

    async fn list_invites(
        &self,
        _: Request<v1::ListInvitesRequest>,
    ) -> Result<Response<v1::ListInvitesResponse>, Status> {
        let invites = self.store.invites().await.map_err(from_store)?;
        let invites = invites.into_iter().map(|invite| self.invite_info(invite)).collect();
        Ok(Response::new(v1::ListInvitesResponse { invites }))
    }

    async fn revoke_invite(
        &self,
        request: Request<v1::RevokeInviteRequest>,
    ) -> Result<Response<v1::RevokeInviteResponse>, Status> {
        let operator: AdmittedOperator = admitted(&request)?;
        let id = request.into_inner().id;
        let id: cortex_shared::secret::InviteId = id.parse().map_err(|_| {
            from_store(StoreError::NotFound { what: "invite", name: id.chars().take(16).collect() })
        })?;
        self.store.revoke_invite(id.clone(), unix_ms()).await.map_err(from_store)?;
        tracing::info!(invite = %id, by = %operator.name, "invite revoked");
        Ok(Response::new(v1::RevokeInviteResponse {}))
    }

    async fn create_operator(
        &self,
        request: Request<v1::CreateOperatorRequest>,
    ) -> Result<Response<v1::CreateOperatorResponse>, Status> {
        let operator: AdmittedOperator = admitted(&request)?;
        let request = request.into_inner();
        let name = convert::name(request.name)?;
        if name == "local" {
            return Err(invalid("the name \"local\" is the administration socket's"));
        }
        let role: Role = request
            .role
            .parse()
            .map_err(|e: cortex_shared::policy::UnknownWord| invalid(e.to_string()))?;
        let (token, expires_at_ms) = self
            .record_invite(InviteKind::Operator(role), request.ttl_ms, 1, operator.name, |invite| {
                invite.name_pattern = name
            })
            .await?;
        let ca_pin = self.authority.pin().to_string();
        let command = format!(
            "CORTEX_TOKEN={} cortex-agent login {} --ca {ca_pin}",
            token.expose(),
            self.address
        );
        Ok(Response::new(v1::CreateOperatorResponse {
            token: token.expose(),
            ca_pin,
            command,
            expires_at_ms,
        }))
    }

    async fn create_workspace(
        &self,
        request: Request<v1::CreateWorkspaceRequest>,
    ) -> Result<Response<v1::WorkspaceInfo>, Status> {
        let name = convert::name(request.into_inner().name)?;
        let workspace = self.members.create(&name).await.map_err(from_store)?;
        Ok(Response::new(self.describe(&workspace).await?))
    }

    async fn list_workspaces(
        &self,
        _: Request<v1::ListWorkspacesRequest>,
    ) -> Result<Response<v1::ListWorkspacesResponse>, Status> {
        let mut workspaces = Vec::new();
        for workspace in self.members.membership.all() {
            workspaces.push(self.describe(&workspace).await?);
        }
        Ok(Response::new(v1::ListWorkspacesResponse { workspaces }))
    }

    async fn attach_workspace(
        &self,
        request: Request<v1::AttachWorkspaceRequest>,
    ) -> Result<Response<v1::AttachWorkspaceResponse>, Status> {
        let request = request.into_inner();
        let workspace = self.workspace(&request.workspace)?;
        let node = self.registry.find(&request.node).map_err(from_lookup)?.node;
        self.members.attach(workspace.id, node.id).await.map_err(from_store)?;
        Ok(Response::new(v1::AttachWorkspaceResponse {
            workspace_id: workspace.id.as_bytes().to_vec().into(),
            node_id: node.id.as_bytes().to_vec().into(),
        }))
    }

    async fn detach_workspace(
        &self,
        request: Request<v1::DetachWorkspaceRequest>,
    ) -> Result<Response<v1::DetachWorkspaceResponse>, Status> {
        let request = request.into_inner();
        let workspace = self.workspace(&request.workspace)?;
        let node = self.registry.find(&request.node).map_err(from_lookup)?.node;
        self.members.detach(workspace.id, node.id).await.map_err(from_store)?;
        Ok(Response::new(v1::DetachWorkspaceResponse {}))
    }

    async fn workspace_status(
        &self,
        request: Request<v1::WorkspaceStatusRequest>,
    ) -> Result<Response<Self::WorkspaceStatusStream>, Status> {
        let request = request.into_inner();
        let name = request.workspace;
        let first = self.describe(&self.workspace(&name)?).await?;
        let (sender, receiver) = mpsc::channel(1);
        let mut changes = self.registry.changes();
        let (members, cancel) = (Arc::clone(&self.members), self.scope.token().clone());
        // The queue is empty and its other end is in this function.
        sender.try_send(Ok(v1::WorkspaceStatusResponse { workspace: Some(first) })).ok();
        if request.watch {
            self.scope.spawn("workspace status", async move {
                loop {
                    let changed = tokio::select! {
                        () = cancel.cancelled() => return,
                        () = sender.closed() => return,
                        changed = changes.changed() => changed,
                    };
                    let Some(workspace) = members.membership.by_name(&name) else { return };
                    let next = members.describe(&workspace).await.map_err(|e| internal(&e));
                    let next = next.map(|w| v1::WorkspaceStatusResponse { workspace: Some(w) });
                    // A reader that is slow gets fewer messages, each of them the latest.
                    if changed.is_err() || sender.send(next).await.is_err() {
                        return;
                    }
                    tokio::time::sleep(STATUS_INTERVAL).await;
                }
            });
        }
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    async fn list_conflicts(
        &self,
        request: Request<v1::ListConflictsRequest>,
    ) -> Result<Response<v1::ListConflictsResponse>, Status> {
        let workspace = self.workspace(&request.into_inner().workspace)?;
        let conflicts =
            self.content.conflicts(workspace.id).await.map_err(|error| internal(&error))?;
        let conflicts = conflicts
            .into_iter()
            .map(|conflict| v1::ConflictInfo {
                path: conflict.path.as_bytes().to_vec().into(),
                copy: conflict.copy.as_bytes().to_vec().into(),
                node_id: conflict.node.as_bytes().to_vec().into(),
                node_name: self
                    .registry
                    .get(conflict.node)
                    .map(|view| view.node.name)
                    .unwrap_or_default(),
                at_ms: conflict.at_ms,
            })
            .collect();
        Ok(Response::new(v1::ListConflictsResponse { conflicts }))
    }
}

impl OperatorService {
    fn node_info(&self, view: NodeView) -> v1::NodeInfo {
        let NodeView { node, session, sandbox } = view;
        v1::NodeInfo {
            node_id: node.id.as_bytes().to_vec().into(),
            running_tasks: u32::try_from(self.relay.running_on(node.id)).unwrap_or(u32::MAX),
            name: node.name,
            labels: node.labels.into_iter().collect(),
            online: session.is_some(),
            joined_at_ms: node.joined_at_ms,
            last_seen_ms: node.last_seen_ms,
            agent_version: node.facts.agent_version,
            hostname: node.facts.hostname,
            os: node.facts.os,
            arch: node.facts.arch,
            effective_mode: convert::wire_mode(Mode::strictest([node.policy, node.ceiling])).into(),
            policy: convert::wire_mode(node.policy).into(),
            ceiling: convert::wire_mode(node.ceiling).into(),
            sandbox,
            session_epoch: session.map_or(0, |session| session.epoch),
        }
    }

    fn invite_info(&self, invite: Invite) -> v1::InviteInfo {
        let Invite { invite, uses, revoked_at_ms } = invite;
        let names = self.members.membership.all();
        v1::InviteInfo {
            id: invite.id.to_string(),
            kind: match invite.kind {
                InviteKind::Node => "node".to_owned(),
                InviteKind::Operator(role) => role.to_string(),
            },
            uses,
            max_uses: invite.max_uses,
            expires_at_ms: invite.expires_at_ms,
            created_at_ms: invite.created_at_ms,
            created_by: invite.created_by,
            revoked: revoked_at_ms.is_some(),
            labels: invite.labels.into_iter().collect(),
            name_pattern: invite.name_pattern,
            workspaces: names
                .into_iter()
                .filter(|w| invite.workspaces.contains(&w.id))
                .map(|w| w.name)
                .collect(),
        }
    }
}

/// `k=v,k2=v2`, all of which must hold.
fn parse_selector(text: &str) -> Result<Vec<(String, String)>, Status> {
    text.split(',')
        .map(|term| {
            let (key, value) = term
                .split_once('=')
                .ok_or_else(|| invalid(format!("{term:?} is not a label selector: @key=value")))?;
            Ok((key.to_owned(), value.to_owned()))
        })
        .collect()
}
