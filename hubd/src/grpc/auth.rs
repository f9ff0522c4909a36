//! Who may call what. One table, checked before any handler sees a request; a method that is not in
//! it is refused.
//!
//! Identity comes from the client certificate, which TLS has checked against the mesh's authority,
//! or, on the administration socket, from the kernel's word on the process at the other end. What that
//! identity may do (whether it was revoked, an operator's role and scope) is the hub's own record, read
//! from memory at each call. A call that goes on when its caller is revoked is ended from here; only a
//! node's session is left to end itself, in order.

mod guard;

use std::net::SocketAddr;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use cortex_proto::CODE_TRAILER;
use cortex_shared::clock::unix_ms;
use cortex_shared::ids::NodeId;
use cortex_shared::peer::{Holder, PeerIdentity};
use cortex_shared::policy::Role;
use futures_util::future::{Either, Ready, ready};
use http::{Request, Response, Uri};
use serde_json::json;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status, body::Body};
use tower::{Layer, Service};

use self::guard::{Ends, Guarded, guard};
use super::status::{from_node, from_operator, refuse, with_hint};
use crate::authority::operators::{OperatorRefusal, Operators};
use crate::authority::refused::RefusalLog;
use crate::authority::sessions::SessionHolder;
use crate::error_id::{InCall, in_call};
use crate::node::registry::{NodeRefusal, Registry};
use crate::store::{Actor, KeyHash, Node, Scope};

/// Who is at the other end of a connection.
#[derive(Clone, Debug)]
pub enum Peer {
    /// Nobody known: TLS without a client certificate.
    Anonymous(SocketAddr),
    /// The holder of a certificate of this mesh.
    Certified {
        /// Where the connection comes from.
        address: SocketAddr,
        /// Who it is.
        identity: PeerIdentity,
        /// SHA-256 of its key.
        key: KeyHash,
        /// End of the certificate's life, milliseconds since the Unix epoch.
        not_after_ms: i64,
        /// Generation of a node's certificate, if it carries one.
        generation: Option<u64>,
        /// The certificate itself.
        certificate: Bytes,
    },
    /// A process of root or of the hub's user on this machine.
    Local {
        /// Its user.
        uid: u32,
    },
    /// A browser or program with a session of the HTTP side.
    Session {
        /// Where the connection comes from.
        address: SocketAddr,
        /// Who opened it.
        holder: SessionHolder,
    },
}

impl Peer {
    /// The address at the other end; none for the administration socket.
    #[must_use]
    pub fn address(&self) -> Option<SocketAddr> {
        match self {
            Self::Anonymous(address)
            | Self::Certified { address, .. }
            | Self::Session { address, .. } => Some(*address),
            Self::Local { .. } => None,
        }
    }

    /// The generation that its certificate carries, if it is a node's.
    #[must_use]
    pub fn generation(&self) -> Option<u64> {
        match self {
            Self::Certified { generation, .. } => *generation,
            Self::Anonymous(_) | Self::Local { .. } | Self::Session { .. } => None,
        }
    }

    /// Whom a session that this caller asks for would speak for; nobody for nodes and strangers, and for
    /// a session itself, which must not outlive its end in another.
    #[must_use]
    pub fn session_holder(&self) -> Option<SessionHolder> {
        match self {
            Self::Certified { identity, key, not_after_ms, .. } => match &identity.holder {
                Holder::Operator { name, .. } => Some(SessionHolder::Operator {
                    name: name.clone(),
                    key: *key,
                    not_after_ms: *not_after_ms,
                }),
                Holder::Node(_) | Holder::Hub => None,
            },
            Self::Local { uid } => Some(SessionHolder::Local { uid: *uid }),
            Self::Anonymous(_) | Self::Session { .. } => None,
        }
    }
}

/// An admitted node, as handlers see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AdmittedNode {
    /// From its certificate.
    pub node_id: NodeId,
}

/// An admitted operator, as handlers see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AdmittedOperator {
    /// Its name; `local` for the administration socket.
    pub name: String,
    /// What it may do.
    pub role: Role,
    /// What it may do it to.
    pub scope: Scope,
    /// The user at the administration socket.
    pub uid: Option<u32>,
    /// End of its certificate's life; none for the administration socket.
    pub certificate_not_after_ms: Option<i64>,
}

impl AdmittedOperator {
    /// How the audit log names it.
    #[must_use]
    pub fn actor(&self) -> Actor {
        Actor { name: self.name.clone(), uid: self.uid }
    }

    /// Whether a node is within its scope.
    #[must_use]
    pub fn sees(&self, node: &Node) -> bool {
        self.scope.covers(&node.labels)
    }
}

/// What a method asks of its caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// Nothing: the caller is about to prove itself by a token.
    Anyone,
    /// A node's certificate.
    Node,
    /// An operator of any role.
    Look,
    /// An operator that may run commands and manage workspaces, AI tokens among them.
    Command,
    /// An operator that is a person's: everything of daily work but authority.
    Manage,
    /// An administrator, within its scope.
    Administer,
    /// An administrator of the whole mesh, one without a scope: whoever decides about other
    /// operators, or admits nodes anywhere, could otherwise widen its own scope.
    Govern,
}

/// Every method of the protocol that the hub serves.
pub const TABLE: &[(&str, Level)] = &[
    ("/cortex.v1.Enroll/JoinNode", Level::Anyone),
    ("/cortex.v1.Enroll/LoginOperator", Level::Anyone),
    ("/cortex.v1.Enroll/RecoverNode", Level::Anyone),
    ("/cortex.v1.Node/Renew", Level::Node),
    ("/cortex.v1.Node/Leave", Level::Node),
    ("/cortex.v1.Node/Link", Level::Node),
    ("/cortex.v1.Node/TaskIo", Level::Node),
    ("/cortex.v1.Node/FileIo", Level::Node),
    ("/cortex.v1.Node/RequestAttach", Level::Node),
    ("/cortex.v1.Node/RequestDetach", Level::Node),
    ("/cortex.v1.Sync/Head", Level::Node),
    ("/cortex.v1.Sync/Have", Level::Node),
    ("/cortex.v1.Sync/PutPacks", Level::Node),
    ("/cortex.v1.Sync/Commit", Level::Node),
    ("/cortex.v1.Sync/Changes", Level::Node),
    ("/cortex.v1.Sync/GetPacks", Level::Node),
    ("/cortex.v1.Sync/AckApplied", Level::Node),
    ("/cortex.v1.Operator/WhoAmI", Level::Look),
    ("/cortex.v1.Operator/HubStatus", Level::Look),
    ("/cortex.v1.Operator/CreateLoginLink", Level::Look),
    ("/cortex.v1.Operator/DrainHub", Level::Govern),
    ("/cortex.v1.Operator/ListNodes", Level::Look),
    ("/cortex.v1.Operator/WatchNodes", Level::Look),
    ("/cortex.v1.Operator/Exec", Level::Command),
    ("/cortex.v1.Operator/ListTasks", Level::Look),
    ("/cortex.v1.Operator/GetTask", Level::Look),
    ("/cortex.v1.Operator/WaitTask", Level::Look),
    ("/cortex.v1.Operator/ReadTask", Level::Look),
    ("/cortex.v1.Operator/CancelTask", Level::Command),
    ("/cortex.v1.Operator/ReadHistory", Level::Look),
    ("/cortex.v1.Operator/ReadFiles", Level::Look),
    ("/cortex.v1.Operator/ChangeFiles", Level::Command),
    ("/cortex.v1.Operator/LabelNode", Level::Manage),
    ("/cortex.v1.Operator/RenameNode", Level::Manage),
    ("/cortex.v1.Operator/CordonNode", Level::Manage),
    ("/cortex.v1.Operator/RevokeNode", Level::Administer),
    ("/cortex.v1.Operator/ForgetNode", Level::Administer),
    ("/cortex.v1.Operator/SetNodePolicy", Level::Administer),
    ("/cortex.v1.Operator/ListOperators", Level::Govern),
    ("/cortex.v1.Operator/RevokeOperator", Level::Govern),
    ("/cortex.v1.Operator/ListAudit", Level::Govern),
    ("/cortex.v1.Operator/VerifyAudit", Level::Govern),
    ("/cortex.v1.Operator/CaStatus", Level::Govern),
    ("/cortex.v1.Operator/RotateCa", Level::Govern),
    ("/cortex.v1.Operator/CreateInvite", Level::Govern),
    ("/cortex.v1.Operator/ListInvites", Level::Govern),
    ("/cortex.v1.Operator/RevokeInvite", Level::Govern),
    ("/cortex.v1.Operator/CreateOperator", Level::Govern),
    ("/cortex.v1.Operator/CreateWorkspace", Level::Manage),
    ("/cortex.v1.Operator/ListWorkspaces", Level::Look),
    ("/cortex.v1.Operator/AttachWorkspace", Level::Manage),
    ("/cortex.v1.Operator/DetachWorkspace", Level::Manage),
    ("/cortex.v1.Operator/WorkspaceStatus", Level::Look),
    ("/cortex.v1.Operator/ListConflicts", Level::Look),
    ("/cortex.v1.Operator/ConfirmDeletes", Level::Manage),
    ("/cortex.v1.Operator/ResolveConflict", Level::Manage),
    ("/cortex.v1.Operator/WorkspaceLog", Level::Look),
    ("/cortex.v1.Operator/RestoreWorkspace", Level::Manage),
    ("/cortex.v1.Operator/ShowWorkspace", Level::Look),
    ("/cortex.v1.Operator/SetWorkspace", Level::Administer),
    ("/cortex.v1.Operator/DeleteWorkspace", Level::Administer),
    ("/cortex.v1.Operator/PromoteSkill", Level::Manage),
    ("/cortex.v1.Operator/ListSkills", Level::Look),
    ("/cortex.v1.Operator/ShowSkill", Level::Look),
    ("/cortex.v1.Operator/RemoveSkill", Level::Govern),
    ("/cortex.v1.Operator/RestoreSkill", Level::Manage),
    ("/cortex.v1.Operator/WatchEvents", Level::Look),
    ("/cortex.v1.Operator/ListWorkers", Level::Govern),
    ("/cortex.v1.Operator/RunWorker", Level::Govern),
];

/// What a caller has proved to be, and what ends its calls.
enum Caller {
    Nobody,
    /// With the end of its certificate.
    Node(AdmittedNode, CancellationToken, i64),
    Operator(AdmittedOperator, CancellationToken),
}

fn level_of(path: &str) -> Option<Level> {
    TABLE.iter().find(|(method, _)| *method == path).map(|(_, level)| *level)
}

fn role_allows(operator: &AdmittedOperator, level: Level) -> bool {
    let role = operator.role;
    match level {
        Level::Anyone => true,
        Level::Node => false,
        Level::Look => true,
        Level::Command => matches!(role, Role::AgentToken | Role::Operator | Role::Admin),
        Level::Manage => matches!(role, Role::Operator | Role::Admin),
        Level::Administer => role == Role::Admin,
        Level::Govern => role == Role::Admin && operator.scope.is_everything(),
    }
}

/// A call that may go on until `until` is cancelled, and what its caller is told then.
struct Admitted {
    until: CancellationToken,
    ends: Ends,
}

/// How long a certificate is good after its end: clocks differ.
const CLOCK_TOLERANCE_MS: i64 = 5 * 60 * 1000;
/// Longest wait for the end of a certificate before the clock is looked at again: it may have been set.
const CLOCK_LOOK: Duration = Duration::from_secs(60);

/// What is left of a certificate's life; `None` if it is over.
pub(super) fn life_left(not_after_ms: i64) -> Option<Duration> {
    let left = not_after_ms.saturating_add(CLOCK_TOLERANCE_MS).saturating_sub(unix_ms());
    u64::try_from(left).ok().filter(|left| *left > 0).map(Duration::from_millis)
}

/// TLS looks at a certificate when a connection begins; some last longer than it.
fn expired() -> Status {
    with_hint(
        refuse(Code::Unauthenticated, "certificate_expired", "this certificate has expired"),
        "nodes recover by themselves when they connect anew; operators: cortex-agent login",
    )
}

/// Refusals for want of authority, which stand in the audit log.
const RECORDED: [&str; 8] = [
    "role_too_low",
    "scope_too_narrow",
    "wrong_kind_of_caller",
    "operator_unknown",
    "operator_revoked",
    "login_replaced",
    "node_revoked",
    "certificate_expired",
];

/// An operator who was let in by [`AuthLayer::admit_operator`], for one call.
pub struct Entry {
    /// Who it is.
    pub operator: AdmittedOperator,
    until: CancellationToken,
    ends: Ends,
}

impl Entry {
    /// Waits until the call may go on no longer, and says why. Safe to give up and to begin again.
    pub async fn over(&self) -> Status {
        tokio::select! {
            () = self.until.cancelled() => (self.ends.refusal)(),
            () = guard::certificate_end(self.ends.not_after_ms) => expired(),
        }
    }
}

fn local(uid: u32) -> Caller {
    let operator = AdmittedOperator {
        name: "local".into(),
        role: Role::Admin,
        scope: Scope::default(),
        uid: Some(uid),
        certificate_not_after_ms: None,
    };
    Caller::Operator(operator, CancellationToken::new())
}

/// Checks every call against the table and against what is known of its caller.
#[derive(Clone)]
pub struct AuthLayer {
    /// Nodes that may call.
    pub registry: Arc<Registry>,
    /// Operators that may call.
    pub operators: Arc<Operators>,
    /// Where refusals are recorded.
    pub refusals: Arc<RefusalLog>,
}

impl AuthLayer {
    fn caller(&self, path: &str, peer: Option<&Peer>) -> Result<Caller, Status> {
        Ok(match peer {
            Some(Peer::Certified { identity, key, not_after_ms, generation, .. }) => {
                match &identity.holder {
                    Holder::Node(node_id) => {
                        // These two judge the certificate themselves, by the machine as well, and record a
                        // copy that they find.
                        let judges =
                            ["/cortex.v1.Node/Link", "/cortex.v1.Node/Renew"].contains(&path);
                        let generation = if judges { None } else { *generation };
                        let calls =
                            self.registry.admit(*node_id, key, generation).map_err(from_node)?;
                        // Over a connection that is older than its newest certificate it may go on.
                        let newest = self.registry.get(*node_id);
                        let newest = newest.map(|view| view.node.certificate.not_after_ms);
                        let not_after_ms = newest.unwrap_or_default().max(*not_after_ms);
                        life_left(not_after_ms).ok_or_else(expired)?;
                        Caller::Node(AdmittedNode { node_id: *node_id }, calls, not_after_ms)
                    }
                    Holder::Operator { name, .. } => self.operator(name, key, *not_after_ms)?,
                    // The hub's own certificate is for serving; nobody calls with it.
                    Holder::Hub => Caller::Nobody,
                }
            }
            Some(Peer::Local { uid }) => local(*uid),
            Some(Peer::Session { holder, .. }) => match holder {
                SessionHolder::Operator { name, key, not_after_ms } => {
                    self.operator(name, key, *not_after_ms)?
                }
                SessionHolder::Local { uid } => local(*uid),
            },
            Some(Peer::Anonymous(_)) | None => Caller::Nobody,
        })
    }

    /// The operator of this name and key, by the hub's own record of it.
    fn operator(&self, name: &str, key: &KeyHash, not_after_ms: i64) -> Result<Caller, Status> {
        let admission = self.operators.admit(name, key).map_err(from_operator)?;
        life_left(not_after_ms).ok_or_else(expired)?;
        let operator = AdmittedOperator {
            name: name.to_owned(),
            role: admission.role,
            scope: admission.scope,
            uid: None,
            certificate_not_after_ms: Some(not_after_ms),
        };
        Ok(Caller::Operator(operator, admission.calls))
    }

    /// Decides on an operator's call that comes by another door than gRPC, as if this method had been
    /// called there.
    ///
    /// # Errors
    /// As over gRPC; what is refused for want of authority is recorded.
    pub fn admit_operator(&self, method: &'static str, peer: Peer) -> Result<Entry, Status> {
        let mut request = Request::new(());
        *request.uri_mut() = Uri::from_static(method);
        request.extensions_mut().insert(peer);
        let admitted = self.admit(&mut request)?;
        let operator = request.extensions_mut().remove::<AdmittedOperator>();
        let (Some(operator), Some(Admitted { until, ends })) = (operator, admitted) else {
            // Not a method for operators: nobody comes in by it here.
            return Err(refuse(Code::Unauthenticated, "no_certificate", "not admitted"));
        };
        Ok(Entry { operator, until, ends })
    }

    /// Decides on a call, and puts what the caller has proved to be where its handler finds it.
    /// Returns what ends the call early, if anything does.
    fn admit<B>(&self, request: &mut Request<B>) -> Result<Option<Admitted>, Status> {
        self.decide(request).inspect_err(|status| self.record(request, status))
    }

    /// Records a refusal of somebody who is known by a certificate.
    fn record<B>(&self, request: &Request<B>, status: &Status) {
        let word = status.metadata().get(CODE_TRAILER).and_then(|word| word.to_str().ok());
        let Some(word) = word.filter(|word| RECORDED.contains(word)) else { return };
        let (address, actor) = match request.extensions().get::<Peer>() {
            Some(Peer::Session { address, holder }) => (address, Actor::from(holder.name())),
            Some(Peer::Certified { address, identity, .. }) => match &identity.holder {
                Holder::Operator { name, .. } => (address, Actor::from(name.as_str())),
                Holder::Node(id) => {
                    let name = self.registry.get(*id).map(|view| view.node.name);
                    let name = name.unwrap_or_else(|| id.to_string());
                    (address, Actor::from(format!("node:{name}").as_str()))
                }
                Holder::Hub => return,
            },
            Some(Peer::Anonymous(_) | Peer::Local { .. }) | None => return,
        };
        let method = request.uri().path().rsplit('/').next().unwrap_or_default();
        let detail = json!({ "reason": word, "address": address.ip().to_string() });
        self.refusals.record(&actor, "call.refused", method, detail);
    }

    fn decide<B>(&self, request: &mut Request<B>) -> Result<Option<Admitted>, Status> {
        let path = request.uri().path();
        let Some(level) = level_of(path) else {
            return Err(refuse(
                Code::Unimplemented,
                "unknown_method",
                "the hub has no such method",
            ));
        };
        if level == Level::Anyone {
            return Ok(None);
        }
        // A session ends by itself, so that what is queued for the node still reaches it.
        let session = path.starts_with("/cortex.v1.Node/");
        match self.caller(path, request.extensions().get::<Peer>())? {
            Caller::Nobody => Err(with_hint(
                refuse(Code::Unauthenticated, "no_certificate", "a client certificate is needed"),
                "nodes: cortex-agent join; operators: cortex-agent login",
            )),
            Caller::Node(node, until, not_after_ms) if level == Level::Node => {
                request.extensions_mut().insert(node);
                let refusal = || from_node(NodeRefusal::Revoked);
                let ends = Ends { refusal, not_after_ms: Some(not_after_ms) };
                Ok((!session).then_some(Admitted { until, ends }))
            }
            Caller::Operator(operator, until) if role_allows(&operator, level) => {
                let not_after_ms = operator.certificate_not_after_ms;
                request.extensions_mut().insert(operator);
                let refusal = || from_operator(OperatorRefusal::Revoked);
                Ok(Some(Admitted { until, ends: Ends { refusal, not_after_ms } }))
            }
            Caller::Operator(operator, _)
                if level == Level::Govern && operator.role == Role::Admin =>
            {
                let text =
                    format!("{:?} administers a part of the mesh, not the whole", operator.name);
                Err(refuse(Code::PermissionDenied, "scope_too_narrow", text))
            }
            Caller::Operator(operator, _) if level != Level::Node => {
                let text = format!(
                    "the role {} of {:?} does not allow this",
                    operator.role, operator.name
                );
                Err(refuse(Code::PermissionDenied, "role_too_low", text))
            }
            Caller::Node(..) | Caller::Operator(..) => Err(refuse(
                Code::PermissionDenied,
                "wrong_kind_of_caller",
                "this call is not for this kind of certificate",
            )),
        }
    }
}

/// Who asks, as the audit log names them but for nodes, which are named by their id, and what.
fn named<B>(request: &Request<B>) -> (String, &'static str) {
    let path = request.uri().path();
    let method = TABLE.iter().find(|(method, _)| *method == path).map_or("", |(method, _)| method);
    let caller = match request.extensions().get::<AdmittedNode>() {
        Some(node) => format!("node:{}", node.node_id),
        None => request
            .extensions()
            .get::<AdmittedOperator>()
            .map(|operator| operator.name.clone())
            .unwrap_or_default(),
    };
    (caller, method)
}

/// What the handler of an admitted request finds; absent only if the layer is not in place.
pub fn admitted<T: Clone + Send + Sync + 'static, B>(
    request: &tonic::Request<B>,
) -> Result<T, Status> {
    request
        .extensions()
        .get::<T>()
        .cloned()
        .ok_or_else(|| refuse(Code::Unauthenticated, "no_certificate", "not admitted"))
}

impl<S> Layer<S> for AuthLayer {
    type Service = AuthService<S>;
    fn layer(&self, inner: S) -> Self::Service {
        AuthService { inner, layer: self.clone() }
    }
}

/// See [`AuthLayer`].
#[derive(Clone)]
pub struct AuthService<S> {
    inner: S,
    layer: AuthLayer,
}

type Refused<E> = Ready<Result<Response<Body>, E>>;

impl<S> Service<Request<Body>> for AuthService<S>
where
    S: Service<Request<Body>, Response = Response<Body>>,
    S::Future: Send + 'static,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = Either<Either<InCall<S::Future>, Guarded<InCall<S::Future>>>, Refused<S::Error>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        let admitted = match self.layer.admit(&mut request) {
            Ok(admitted) => admitted,
            Err(status) => return Either::Right(ready(Ok(status.into_http()))),
        };
        let (caller, method) = named(&request);
        let call = in_call(caller, method, self.inner.call(request));
        Either::Left(match admitted {
            None => Either::Left(call),
            Some(Admitted { until, ends }) => Either::Right(guard(call, until, ends)),
        })
    }
}

#[cfg(test)]
pub(crate) mod expected;
#[cfg(test)]
mod tests;
