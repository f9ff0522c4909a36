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

use cortex_shared::ids::NodeId;
use cortex_shared::peer::{Holder, PeerIdentity};
use cortex_shared::policy::Role;
use futures_util::future::{Either, Ready, ready};
use http::{Request, Response};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status, body::Body};
use tower::{Layer, Service};

use self::guard::{Guarded, guard};
use super::status::{from_node, from_operator, refuse, with_hint};
use crate::authority::operators::{OperatorRefusal, Operators};
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
    },
    /// A process of root or of the hub's user on this machine.
    Local {
        /// Its user.
        uid: u32,
    },
}

impl Peer {
    /// The address at the other end; none for the administration socket.
    #[must_use]
    pub fn address(&self) -> Option<SocketAddr> {
        match self {
            Self::Anonymous(address) | Self::Certified { address, .. } => Some(*address),
            Self::Local { .. } => None,
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
    ("/cortex.v1.Operator/ListNodes", Level::Look),
    ("/cortex.v1.Operator/WatchNodes", Level::Look),
    ("/cortex.v1.Operator/Exec", Level::Command),
    ("/cortex.v1.Operator/ListTasks", Level::Look),
    ("/cortex.v1.Operator/GetTask", Level::Look),
    ("/cortex.v1.Operator/WaitTask", Level::Look),
    ("/cortex.v1.Operator/ReadTask", Level::Look),
    ("/cortex.v1.Operator/CancelTask", Level::Command),
    ("/cortex.v1.Operator/ReadHistory", Level::Look),
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
];

/// What a caller has proved to be, and what ends its calls.
enum Caller {
    Nobody,
    Node(AdmittedNode, CancellationToken),
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
    refusal: fn() -> Status,
}

/// Checks every call against the table and against what is known of its caller.
#[derive(Clone)]
pub struct AuthLayer {
    /// Nodes that may call.
    pub registry: Arc<Registry>,
    /// Operators that may call.
    pub operators: Arc<Operators>,
}

impl AuthLayer {
    fn caller(&self, peer: Option<&Peer>) -> Result<Caller, Status> {
        Ok(match peer {
            Some(Peer::Certified { identity, key, not_after_ms, .. }) => match &identity.holder {
                Holder::Node(node_id) => {
                    let calls = self.registry.admit(*node_id).map_err(from_node)?;
                    Caller::Node(AdmittedNode { node_id: *node_id }, calls)
                }
                Holder::Operator { name, .. } => {
                    let admission = self.operators.admit(name, key).map_err(from_operator)?;
                    let operator = AdmittedOperator {
                        name: name.clone(),
                        role: admission.role,
                        scope: admission.scope,
                        uid: None,
                        certificate_not_after_ms: Some(*not_after_ms),
                    };
                    Caller::Operator(operator, admission.calls)
                }
                // The hub's own certificate is for serving; nobody calls with it.
                Holder::Hub => Caller::Nobody,
            },
            Some(Peer::Local { uid }) => {
                let operator = AdmittedOperator {
                    name: "local".into(),
                    role: Role::Admin,
                    scope: Scope::default(),
                    uid: Some(*uid),
                    certificate_not_after_ms: None,
                };
                Caller::Operator(operator, CancellationToken::new())
            }
            Some(Peer::Anonymous(_)) | None => Caller::Nobody,
        })
    }

    /// Decides on a call, and puts what the caller has proved to be where its handler finds it.
    /// Returns what ends the call early, if anything does.
    fn admit<B>(&self, request: &mut Request<B>) -> Result<Option<Admitted>, Status> {
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
        match self.caller(request.extensions().get::<Peer>())? {
            Caller::Nobody => Err(with_hint(
                refuse(Code::Unauthenticated, "no_certificate", "a client certificate is needed"),
                "nodes: cortex-agent join; operators: cortex-agent login",
            )),
            Caller::Node(node, until) if level == Level::Node => {
                request.extensions_mut().insert(node);
                let refusal = || from_node(NodeRefusal::Revoked);
                Ok((!session).then_some(Admitted { until, refusal }))
            }
            Caller::Operator(operator, until) if role_allows(&operator, level) => {
                request.extensions_mut().insert(operator);
                let refusal = || from_operator(OperatorRefusal::Revoked);
                Ok(Some(Admitted { until, refusal }))
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
    type Future = Either<Either<S::Future, Guarded<S::Future>>, Refused<S::Error>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        match self.layer.admit(&mut request) {
            Ok(None) => Either::Left(Either::Left(self.inner.call(request))),
            Ok(Some(Admitted { until, refusal })) => {
                Either::Left(Either::Right(guard(self.inner.call(request), until, refusal)))
            }
            Err(status) => Either::Right(ready(Ok(status.into_http()))),
        }
    }
}

#[cfg(test)]
mod tests;
