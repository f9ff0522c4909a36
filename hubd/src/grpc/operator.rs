//! The Operator service: looking. Commands, invites, workspaces and authority are in files of their
//! own.

use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use cortex_proto::v1;
use cortex_proto::v1::operator_server::Operator;
use cortex_shared::clock::unix_ms;
use cortex_shared::policy::Bound;
use futures_util::Stream;
use tonic::{Request, Response, Status, Streaming};

use super::auth::{AdmittedOperator, Peer, admitted};
use super::listing::{Selector, list_nodes, watch};
use super::place::HttpPlace;
use super::status::{self, from_lookup, internal};
use super::{
    authority, convert, draining, events, exec, files, history, invites, login_link, past,
    rotation, skills, tasks, workers, workspaces,
};
use crate::authority::audit::AuditLog;
use crate::authority::nodes::NodeDecisions;
use crate::authority::operators::Operators;
use crate::authority::refused::RefusalLog;
use crate::authority::sessions::Sessions;
use crate::enroll::authorities::Authorities;
use crate::events::EventFeed;
use crate::node::files::FileExchange;
use crate::node::registry::{NodeView, Registry, SessionHandle};
use crate::skills::Skills;
use crate::store::{Node, Store};
use crate::sync::Workspaces;
use crate::sync::members::Members;
use crate::task::relay::Relay;
use crate::worker::Supervisor;

/// See the module. Clones share everything.
#[derive(Clone)]
pub struct OperatorService {
    /// Where refusals are recorded.
    pub refusals: Arc<RefusalLog>,
    /// The store.
    pub store: Arc<dyn Store>,
    /// Nodes.
    pub registry: Arc<Registry>,
    /// Commands.
    pub relay: Arc<Relay>,
    /// Operations on files.
    pub files: Arc<FileExchange>,
    /// Workspaces and their members.
    pub members: Arc<Members>,
    /// Workspace content.
    pub content: Arc<Workspaces>,
    /// The library.
    pub skills: Arc<Skills>,
    /// Decisions about nodes.
    pub decisions: Arc<NodeDecisions>,
    /// Who may call.
    pub operators: Arc<Operators>,
    /// The audit log.
    pub audit: Arc<AuditLog>,
    /// The mesh.
    pub authorities: Arc<Authorities>,
    /// Background work.
    pub workers: Arc<Supervisor>,
    /// What happens.
    pub events: EventFeed,
    /// Owns streams that outlive their call.
    pub scope: cortex_shared::tasks::TaskScope,
    /// How long a command waits to be journalled.
    pub accept_deadline: Duration,
    /// Where nodes reach this hub.
    pub address: HubAddress,
    /// Where its HTTP side is reached, if it has one.
    pub http: Option<HttpPlace>,
    /// Sessions at the HTTP side.
    pub sessions: Arc<Sessions>,
    /// When the hub started.
    pub started_at_ms: i64,
    /// Until when nodes that were there before it started come back.
    pub arrivals_until: tokio::time::Instant,
    /// How long a drain waits for commands that run, unless its caller says.
    pub drain_wait: Duration,
    /// Longest time for which commands may be allowed more than STRICT.
    pub permissive_longest: Duration,
}

/// Where nodes reach this hub.
#[derive(Clone, Debug)]
pub struct HubAddress {
    /// What is listened on.
    pub bound: SocketAddr,
    /// The host name to tell them, if another than the bound address.
    pub advertise: Option<String>,
}

impl HubAddress {
    /// What others call this machine: a name, or an address as it stands in a URL.
    #[must_use]
    pub fn host(&self) -> String {
        let whole = self.to_string();
        whole.rsplit_once(':').map_or_else(|| whole.clone(), |(host, _)| host.to_owned())
    }
}

impl std::fmt::Display for HubAddress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.advertise {
            // A host with a port of its own: the hub stands behind a forwarded one.
            Some(host)
                if host.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok())
                    && (host.starts_with('[') || host.matches(':').count() == 1) =>
            {
                f.write_str(host)
            }
            Some(host) if host.contains(':') => write!(f, "[{host}]:{}", self.bound.port()),
            Some(host) => write!(f, "{host}:{}", self.bound.port()),
            // Nobody can dial "any address": the machine's own name is the better guess.
            None if self.bound.ip().is_unspecified() => {
                let name = rustix::system::uname();
                write!(f, "{}:{}", name.nodename().to_string_lossy(), self.bound.port())
            }
            None => write!(f, "{}", self.bound),
        }
    }
}

pub(super) type BoxStream<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

impl OperatorService {
    /// The node that is meant, of those that the caller sees.
    pub(super) fn node(&self, wanted: &str, caller: &AdmittedOperator) -> Result<NodeView, Status> {
        self.registry.find(wanted, |node| caller.sees(node)).map_err(from_lookup)
    }

    /// Begins a command that runs without a reader, as `exec` does for one that is detached. The task is
    /// durable when this returns.
    pub(crate) async fn begin_detached(
        &self,
        caller: &AdmittedOperator,
        start: v1::ExecStart,
    ) -> Result<v1::ExecAccepted, Status> {
        exec::detached(self, caller, start).await
    }

    /// The session of a node that is not connected, but may be on its way back because the hub was just
    /// restarted: nobody who asks for it then shall notice. Any other is offline, or has gone because this
    /// hub is about to stop.
    pub(super) async fn returning(&self, node: &Node) -> Result<SessionHandle, Status> {
        let mut changes = self.registry.changes();
        let coming = async {
            loop {
                let view = self.registry.get(node.id)?;
                let was_here = view.address.is_some() || view.node.last_seen_ms == 0;
                if view.session.is_some() || was_here {
                    return view.session;
                }
                changes.changed().await.ok()?;
            }
        };
        let session = tokio::select! {
            biased;
            () = self.relay.draining().begun() => None,
            session = tokio::time::timeout_at(self.arrivals_until, coming) => session.ok().flatten(),
        };
        session.ok_or_else(|| match self.relay.draining().until() {
            Some(until) => {
                let wait = until - tokio::time::Instant::now();
                status::draining(wait, "the hub is being restarted; nothing was begun")
            }
            None => status::offline(&node.name),
        })
    }
}

#[tonic::async_trait]
impl Operator for OperatorService {
    type ExecStream = BoxStream<v1::ExecDown>;
    type ReadFilesStream = BoxStream<v1::FileDown>;
    type ChangeFilesStream = BoxStream<v1::FileDown>;
    type ReadHistoryStream = BoxStream<v1::ReadHistoryResponse>;
    type ReadTaskStream = BoxStream<v1::ReadTaskResponse>;
    type ListAuditStream = BoxStream<v1::AuditEntry>;
    type WatchEventsStream = BoxStream<v1::EventFrame>;
    type WatchNodesStream = BoxStream<v1::ListNodesResponse>;
    type WorkspaceStatusStream = BoxStream<v1::WorkspaceStatusResponse>;

    async fn who_am_i(
        &self,
        request: Request<v1::WhoAmIRequest>,
    ) -> Result<Response<v1::WhoAmIResponse>, Status> {
        let operator: AdmittedOperator = admitted(&request)?;
        let ring = self.authorities.ring();
        let certificate = match request.extensions().get::<Peer>() {
            Some(Peer::Certified { certificate, .. }) => ring
                .issuing()
                .sign_anew(&operator.name, operator.role, certificate, unix_ms())
                .map_err(|error| internal(&error))?,
            Some(Peer::Anonymous(_) | Peer::Local { .. } | Peer::Session { .. }) | None => None,
        };
        Ok(Response::new(v1::WhoAmIResponse {
            name: operator.name,
            role: operator.role.to_string(),
            mesh_id: self.authorities.mesh().to_string(),
            hub_version: env!("CARGO_PKG_VERSION").to_owned(),
            certificate_not_after_ms: operator.certificate_not_after_ms.unwrap_or_default(),
            scope: operator.scope.0.into_iter().collect(),
            trusted_cas_der: ring.trusted_der(),
            certificate_der: certificate.map(|der| der.to_vec().into()).unwrap_or_default(),
        }))
    }

    async fn hub_status(
        &self,
        request: Request<v1::HubStatusRequest>,
    ) -> Result<Response<v1::HubStatusResponse>, Status> {
        let operator: AdmittedOperator = admitted(&request)?;
        let mut nodes = self.registry.all();
        nodes.retain(|view| operator.sees(&view.node));
        let running = if operator.scope.is_everything() {
            self.relay.running()
        } else {
            nodes.iter().map(|view| self.relay.running_on(view.node.id)).sum()
        };
        let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        Ok(Response::new(v1::HubStatusResponse {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            mesh_id: self.authorities.mesh().to_string(),
            started_at_ms: self.started_at_ms,
            nodes_known: count(nodes.len()),
            nodes_online: count(nodes.iter().filter(|view| view.session.is_some()).count()),
            running_tasks: count(running),
            workspaces: count(workspaces::visible(self, &operator).len()),
            grpc_address: self.address.to_string(),
            http_url: self.http.as_ref().map(|http| http.url().to_owned()).unwrap_or_default(),
            http_pin: login_link::pin(self),
            draining: self.relay.draining().until().is_some(),
        }))
    }

    async fn create_login_link(
        &self,
        request: Request<v1::CreateLoginLinkRequest>,
    ) -> Result<Response<v1::CreateLoginLinkResponse>, Status> {
        let operator: AdmittedOperator = admitted(&request)?;
        let holder = request.extensions().get::<Peer>().and_then(Peer::session_holder);
        login_link::create(self, &operator, holder).await.map(Response::new)
    }

    async fn drain_hub(
        &self,
        request: Request<v1::DrainHubRequest>,
    ) -> Result<Response<v1::DrainHubResponse>, Status> {
        let operator = admitted(&request)?;
        draining::drain_hub(self, &operator, request.into_inner()).await.map(Response::new)
    }

    async fn list_nodes(
        &self,
        request: Request<v1::ListNodesRequest>,
    ) -> Result<Response<v1::ListNodesResponse>, Status> {
        let operator: AdmittedOperator = admitted(&request)?;
        let selector = Selector::parse(&request.into_inner().selector)?;
        Ok(Response::new(list_nodes(&self.registry, &self.relay, &selector, &operator)?))
    }

    async fn watch_nodes(
        &self,
        request: Request<v1::ListNodesRequest>,
    ) -> Result<Response<Self::WatchNodesStream>, Status> {
        let operator: AdmittedOperator = admitted(&request)?;
        let selector = Selector::parse(&request.into_inner().selector)?;
        let changes = self.registry.changes();
        let (registry, relay) = (Arc::clone(&self.registry), Arc::clone(&self.relay));
        let stream = watch(&self.scope, changes, move || {
            let nodes = list_nodes(&registry, &relay, &selector, &operator);
            std::future::ready(nodes)
        });
        Ok(Response::new(stream))
    }

    async fn exec(
        &self,
        request: Request<Streaming<v1::ExecUp>>,
    ) -> Result<Response<Self::ExecStream>, Status> {
        let operator: AdmittedOperator = admitted(&request)?;
        exec::begin(self, operator, request.into_inner()).await.map(Response::new)
    }

    async fn list_tasks(
        &self,
        request: Request<v1::ListTasksRequest>,
    ) -> Result<Response<v1::ListTasksResponse>, Status> {
        let operator = admitted(&request)?;
        tasks::list(self, &operator, request.into_inner()).await.map(Response::new)
    }

    async fn get_task(
        &self,
        request: Request<v1::GetTaskRequest>,
    ) -> Result<Response<v1::TaskInfo>, Status> {
        let operator = admitted(&request)?;
        tasks::show(self, &operator, &request.into_inner().task).await.map(Response::new)
    }

    async fn wait_task(
        &self,
        request: Request<v1::GetTaskRequest>,
    ) -> Result<Response<v1::TaskInfo>, Status> {
        let operator = admitted(&request)?;
        tasks::wait(self, &operator, &request.into_inner().task).await.map(Response::new)
    }

    async fn read_task(
        &self,
        request: Request<v1::ReadTaskRequest>,
    ) -> Result<Response<Self::ReadTaskStream>, Status> {
        let operator = admitted(&request)?;
        tasks::read(self, &operator, request.into_inner()).await.map(Response::new)
    }

    async fn cancel_task(
        &self,
        request: Request<v1::CancelTaskRequest>,
    ) -> Result<Response<v1::TaskInfo>, Status> {
        let operator = admitted(&request)?;
        tasks::cancel(self, &operator, request.into_inner()).await.map(Response::new)
    }

    async fn read_history(
        &self,
        request: Request<v1::ReadHistoryRequest>,
    ) -> Result<Response<Self::ReadHistoryStream>, Status> {
        let operator = admitted(&request)?;
        history::read(self, &operator, request.into_inner()).await.map(Response::new)
    }

    async fn read_files(
        &self,
        request: Request<Streaming<v1::FileUp>>,
    ) -> Result<Response<Self::ReadFilesStream>, Status> {
        let operator = admitted(&request)?;
        let purpose = files::Purpose::Look;
        files::begin(self, operator, request.into_inner(), purpose).await.map(Response::new)
    }

    async fn change_files(
        &self,
        request: Request<Streaming<v1::FileUp>>,
    ) -> Result<Response<Self::ChangeFilesStream>, Status> {
        let operator = admitted(&request)?;
        let purpose = files::Purpose::Change;
        files::begin(self, operator, request.into_inner(), purpose).await.map(Response::new)
    }

    async fn label_node(
        &self,
        request: Request<v1::LabelNodeRequest>,
    ) -> Result<Response<v1::NodeInfo>, Status> {
        let operator = admitted(&request)?;
        authority::label_node(self, &operator, request.into_inner()).await.map(Response::new)
    }

    async fn rename_node(
        &self,
        request: Request<v1::RenameNodeRequest>,
    ) -> Result<Response<v1::NodeInfo>, Status> {
        let operator = admitted(&request)?;
        authority::rename_node(self, &operator, request.into_inner()).await.map(Response::new)
    }

    async fn cordon_node(
        &self,
        request: Request<v1::CordonNodeRequest>,
    ) -> Result<Response<v1::NodeInfo>, Status> {
        let operator = admitted(&request)?;
        authority::cordon_node(self, &operator, request.into_inner()).await.map(Response::new)
    }

    async fn revoke_node(
        &self,
        request: Request<v1::RevokeNodeRequest>,
    ) -> Result<Response<v1::NodeInfo>, Status> {
        let operator = admitted(&request)?;
        authority::revoke_node(self, &operator, request.into_inner()).await.map(Response::new)
    }

    async fn forget_node(
        &self,
        request: Request<v1::ForgetNodeRequest>,
    ) -> Result<Response<v1::ForgetNodeResponse>, Status> {
        let operator = admitted(&request)?;
        authority::forget_node(self, &operator, request.into_inner()).await.map(Response::new)
    }

    async fn set_node_policy(
        &self,
        request: Request<v1::SetNodePolicyRequest>,
    ) -> Result<Response<v1::NodeInfo>, Status> {
        let operator = admitted(&request)?;
        authority::set_node_policy(self, &operator, request.into_inner()).await.map(Response::new)
    }

    async fn list_operators(
        &self,
        _: Request<v1::ListOperatorsRequest>,
    ) -> Result<Response<v1::ListOperatorsResponse>, Status> {
        authority::list_operators(self).await.map(Response::new)
    }

    async fn revoke_operator(
        &self,
        request: Request<v1::RevokeOperatorRequest>,
    ) -> Result<Response<v1::RevokeOperatorResponse>, Status> {
        let operator = admitted(&request)?;
        authority::revoke_operator(self, &operator, request.into_inner()).await.map(Response::new)
    }

    async fn verify_audit(
        &self,
        request: Request<v1::VerifyAuditRequest>,
    ) -> Result<Response<v1::VerifyAuditResponse>, Status> {
        let operator = admitted(&request)?;
        authority::verify_audit(self, &operator, request.into_inner()).await.map(Response::new)
    }

    async fn ca_status(
        &self,
        _: Request<v1::CaStatusRequest>,
    ) -> Result<Response<v1::CaStatusResponse>, Status> {
        Ok(Response::new(rotation::status(self)))
    }

    async fn rotate_ca(
        &self,
        request: Request<v1::RotateCaRequest>,
    ) -> Result<Response<v1::CaStatusResponse>, Status> {
        let operator = admitted(&request)?;
        rotation::rotate(self, &operator, request.into_inner()).await.map(Response::new)
    }

    async fn list_audit(
        &self,
        request: Request<v1::ListAuditRequest>,
    ) -> Result<Response<Self::ListAuditStream>, Status> {
        authority::list_audit(self, request.into_inner()).map(Response::new)
    }

    async fn create_invite(
        &self,
        request: Request<v1::CreateInviteRequest>,
    ) -> Result<Response<v1::CreateInviteResponse>, Status> {
        let operator = admitted(&request)?;
        invites::create(self, &operator, request.into_inner()).await.map(Response::new)
    }

    async fn list_invites(
        &self,
        _: Request<v1::ListInvitesRequest>,
    ) -> Result<Response<v1::ListInvitesResponse>, Status> {
        invites::list(self).await.map(Response::new)
    }

    async fn revoke_invite(
        &self,
        request: Request<v1::RevokeInviteRequest>,
    ) -> Result<Response<v1::RevokeInviteResponse>, Status> {
        let operator = admitted(&request)?;
        invites::revoke(self, &operator, request.into_inner()).await.map(Response::new)
    }

    async fn create_operator(
        &self,
        request: Request<v1::CreateOperatorRequest>,
    ) -> Result<Response<v1::CreateOperatorResponse>, Status> {
        let operator = admitted(&request)?;
        invites::create_operator(self, &operator, request.into_inner()).await.map(Response::new)
    }

    async fn create_workspace(
        &self,
        request: Request<v1::CreateWorkspaceRequest>,
    ) -> Result<Response<v1::WorkspaceInfo>, Status> {
        let operator = admitted(&request)?;
        workspaces::create(self, &operator, request.into_inner()).await.map(Response::new)
    }

    async fn list_workspaces(
        &self,
        request: Request<v1::ListWorkspacesRequest>,
    ) -> Result<Response<v1::ListWorkspacesResponse>, Status> {
        let operator = admitted(&request)?;
        workspaces::list(self, &operator).await.map(Response::new)
    }

    async fn attach_workspace(
        &self,
        request: Request<v1::AttachWorkspaceRequest>,
    ) -> Result<Response<v1::AttachWorkspaceResponse>, Status> {
        let operator = admitted(&request)?;
        workspaces::attach(self, &operator, request.into_inner()).await.map(Response::new)
    }

    async fn detach_workspace(
        &self,
        request: Request<v1::DetachWorkspaceRequest>,
    ) -> Result<Response<v1::DetachWorkspaceResponse>, Status> {
        let operator = admitted(&request)?;
        workspaces::detach(self, &operator, request.into_inner()).await.map(Response::new)
    }

    async fn workspace_status(
        &self,
        request: Request<v1::WorkspaceStatusRequest>,
    ) -> Result<Response<Self::WorkspaceStatusStream>, Status> {
        let operator = admitted(&request)?;
        workspaces::status(self, &operator, request.into_inner()).await.map(Response::new)
    }

    async fn list_conflicts(
        &self,
        request: Request<v1::ListConflictsRequest>,
    ) -> Result<Response<v1::ListConflictsResponse>, Status> {
        let operator = admitted(&request)?;
        workspaces::conflicts(self, &operator, request.into_inner()).await.map(Response::new)
    }

    async fn confirm_deletes(
        &self,
        request: Request<v1::ConfirmDeletesRequest>,
    ) -> Result<Response<v1::ConfirmDeletesResponse>, Status> {
        let operator = admitted(&request)?;
        workspaces::confirm_deletes(self, &operator, request.into_inner()).await.map(Response::new)
    }

    async fn resolve_conflict(
        &self,
        request: Request<v1::ResolveConflictRequest>,
    ) -> Result<Response<v1::ResolveConflictResponse>, Status> {
        let operator = admitted(&request)?;
        past::resolve(self, &operator, request.into_inner()).await.map(Response::new)
    }

    async fn workspace_log(
        &self,
        request: Request<v1::WorkspaceLogRequest>,
    ) -> Result<Response<v1::WorkspaceLogResponse>, Status> {
        let operator = admitted(&request)?;
        past::log(self, &operator, request.into_inner()).await.map(Response::new)
    }

    async fn restore_workspace(
        &self,
        request: Request<v1::RestoreWorkspaceRequest>,
    ) -> Result<Response<v1::RestoreWorkspaceResponse>, Status> {
        let operator = admitted(&request)?;
        past::restore(self, &operator, request.into_inner()).await.map(Response::new)
    }

    async fn show_workspace(
        &self,
        request: Request<v1::ShowWorkspaceRequest>,
    ) -> Result<Response<v1::ShowWorkspaceResponse>, Status> {
        let operator = admitted(&request)?;
        past::show(self, &operator, request.into_inner()).await.map(Response::new)
    }

    async fn set_workspace(
        &self,
        request: Request<v1::SetWorkspaceRequest>,
    ) -> Result<Response<v1::WorkspaceSettings>, Status> {
        let operator = admitted(&request)?;
        past::set(self, &operator, request.into_inner()).await.map(Response::new)
    }

    async fn delete_workspace(
        &self,
        request: Request<v1::DeleteWorkspaceRequest>,
    ) -> Result<Response<v1::DeleteWorkspaceResponse>, Status> {
        let operator = admitted(&request)?;
        workspaces::delete(self, &operator, request.into_inner()).await.map(Response::new)
    }

    async fn promote_skill(
        &self,
        request: Request<v1::PromoteSkillRequest>,
    ) -> Result<Response<v1::PromoteSkillResponse>, Status> {
        let operator = admitted(&request)?;
        skills::promote(self, &operator, request.into_inner()).await.map(Response::new)
    }

    async fn list_skills(
        &self,
        request: Request<v1::ListSkillsRequest>,
    ) -> Result<Response<v1::ListSkillsResponse>, Status> {
        let operator = admitted(&request)?;
        skills::list(self, &operator, request.into_inner()).await.map(Response::new)
    }

    async fn show_skill(
        &self,
        request: Request<v1::ShowSkillRequest>,
    ) -> Result<Response<v1::ShowSkillResponse>, Status> {
        let operator = admitted(&request)?;
        skills::show(self, &operator, request.into_inner()).await.map(Response::new)
    }

    async fn remove_skill(
        &self,
        request: Request<v1::RemoveSkillRequest>,
    ) -> Result<Response<v1::RemoveSkillResponse>, Status> {
        let operator = admitted(&request)?;
        skills::remove(self, &operator, request.into_inner()).await.map(Response::new)
    }

    async fn restore_skill(
        &self,
        request: Request<v1::RestoreSkillRequest>,
    ) -> Result<Response<v1::RestoreSkillResponse>, Status> {
        let operator = admitted(&request)?;
        skills::restore(self, &operator, request.into_inner()).await.map(Response::new)
    }

    async fn watch_events(
        &self,
        request: Request<v1::WatchEventsRequest>,
    ) -> Result<Response<Self::WatchEventsStream>, Status> {
        let operator = admitted(&request)?;
        events::watch(self, &operator, request.into_inner()).map(Response::new)
    }

    async fn list_workers(
        &self,
        _: Request<v1::ListWorkersRequest>,
    ) -> Result<Response<v1::ListWorkersResponse>, Status> {
        Ok(Response::new(workers::list(self)))
    }

    async fn run_worker(
        &self,
        request: Request<v1::RunWorkerRequest>,
    ) -> Result<Response<v1::WorkerInfo>, Status> {
        let operator = admitted(&request)?;
        workers::run(self, &operator, request.into_inner()).await.map(Response::new)
    }
}

/// A node as operators see it.
pub(super) fn node_info(view: NodeView, running_tasks: u32) -> v1::NodeInfo {
    let NodeView { node, session, sandbox, address, skew_ms } = view;
    let now = unix_ms();
    let policy = node.policy.in_force(now);
    let policy_until_ms = node.policy.ends_at(now).unwrap_or_default();
    v1::NodeInfo {
        node_id: node.id.as_bytes().to_vec().into(),
        name: node.name,
        labels: node.labels.into_iter().collect(),
        online: session.is_some(),
        joined_at_ms: node.joined_at_ms,
        last_seen_ms: node.last_seen_ms,
        agent_version: node.facts.agent_version,
        hostname: node.facts.hostname,
        os: node.facts.os,
        arch: node.facts.arch,
        effective_mode: convert::wire_mode(policy.and(node.ceiling).mode).into(),
        policy: convert::wire_mode(policy.mode).into(),
        policy_network: convert::wire_network(policy.network).into(),
        ceiling: convert::wire_mode(node.ceiling.mode).into(),
        ceiling_network: convert::wire_network(node.ceiling.network).into(),
        sandbox,
        session_epoch: session.map_or(0, |session| session.epoch),
        running_tasks,
        cordoned: node.cordoned,
        revoked_at_ms: node.revoked_at_ms.unwrap_or_default(),
        policy_until_ms,
        policy_reason: if policy == Bound::LEAST { String::new() } else { node.policy.reason },
        owner: node.owner,
        remote_address: address.map(|address| address.to_string()).unwrap_or_default(),
        machine: Some(convert::wire_machine(&node.machine)),
        certificate_not_after_ms: node.certificate.not_after_ms,
        generation: node.certificate.generation,
        clone: node.clone.map(convert::wire_suspicion),
        clock_skew_ms: skew_ms,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn invites_name_an_address_that_can_be_dialled() {
        let shown = |bound: &str, advertise: Option<&str>| {
            let bound = bound.parse().unwrap();
            HubAddress { bound, advertise: advertise.map(str::to_owned) }.to_string()
        };
        assert_eq!(shown("127.0.0.1:7443", None), "127.0.0.1:7443");
        assert_eq!(shown("0.0.0.0:7443", Some("hub.example.org")), "hub.example.org:7443");
        assert_eq!(shown("0.0.0.0:7443", Some("hub.example.org:9000")), "hub.example.org:9000");
        assert_eq!(shown("[::]:7443", Some("2001:db8::1")), "[2001:db8::1]:7443");
        assert_eq!(shown("[::]:7443", Some("[2001:db8::1]:9000")), "[2001:db8::1]:9000");
        assert!(!shown("0.0.0.0:7443", None).starts_with("0.0.0.0"));
    }
}
