//! Who may call what. One table, checked before any handler sees a request; a method that is not in
//! it is refused.
//!
//! Identity comes from the client certificate, which TLS has checked against the mesh's authority,
//! or, on the administration socket, from the kernel's word on the process at the other end.

use std::net::SocketAddr;
use std::task::{Context, Poll};

use cortex_shared::ids::NodeId;
use cortex_shared::peer::{Holder, PeerIdentity};
use cortex_shared::policy::Role;
use futures_util::future::{Either, Ready, ready};
use http::{Request, Response};
use tonic::{Code, Status, body::Body};
use tower::{Layer, Service};

use super::status::{refuse, with_hint};

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
        /// End of the certificate's life, milliseconds since the Unix epoch.
        not_after_ms: i64,
    },
    /// A process of root or of the hub's user on this machine.
    Local {
        /// Its user.
        uid: u32,
    },
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
    /// End of its certificate's life; none for the administration socket.
    pub certificate_not_after_ms: Option<i64>,
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
    /// An administrator.
    Administer,
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
    ("/cortex.v1.Operator/LabelNode", Level::Manage),
    ("/cortex.v1.Operator/RenameNode", Level::Manage),
    ("/cortex.v1.Operator/CordonNode", Level::Manage),
    ("/cortex.v1.Operator/RevokeNode", Level::Administer),
    ("/cortex.v1.Operator/ForgetNode", Level::Administer),
    ("/cortex.v1.Operator/SetNodePolicy", Level::Administer),
    ("/cortex.v1.Operator/ListOperators", Level::Administer),
    ("/cortex.v1.Operator/RevokeOperator", Level::Administer),
    ("/cortex.v1.Operator/ListAudit", Level::Administer),
    ("/cortex.v1.Operator/VerifyAudit", Level::Administer),
    ("/cortex.v1.Operator/CaStatus", Level::Administer),
    ("/cortex.v1.Operator/RotateCa", Level::Administer),
    ("/cortex.v1.Operator/CreateInvite", Level::Administer),
    ("/cortex.v1.Operator/ListInvites", Level::Administer),
    ("/cortex.v1.Operator/RevokeInvite", Level::Administer),
    ("/cortex.v1.Operator/CreateOperator", Level::Administer),
    ("/cortex.v1.Operator/CreateWorkspace", Level::Manage),
    ("/cortex.v1.Operator/ListWorkspaces", Level::Look),
    ("/cortex.v1.Operator/AttachWorkspace", Level::Manage),
    ("/cortex.v1.Operator/DetachWorkspace", Level::Manage),
    ("/cortex.v1.Operator/WorkspaceStatus", Level::Look),
    ("/cortex.v1.Operator/ListConflicts", Level::Look),
];

/// What a caller has proved to be.
enum Caller {
    Nobody,
    Node(AdmittedNode),
    Operator(AdmittedOperator),
}

fn caller(peer: Option<&Peer>) -> Caller {
    match peer {
        Some(Peer::Certified { identity, not_after_ms, .. }) => match &identity.holder {
            Holder::Node(node_id) => Caller::Node(AdmittedNode { node_id: *node_id }),
            Holder::Operator { name, role } => Caller::Operator(AdmittedOperator {
                name: name.clone(),
                role: *role,
                certificate_not_after_ms: Some(*not_after_ms),
            }),
            // The hub's own certificate is for serving; nobody calls with it.
            Holder::Hub => Caller::Nobody,
        },
        Some(Peer::Local { .. }) => Caller::Operator(AdmittedOperator {
            name: "local".into(),
            role: Role::Admin,
            certificate_not_after_ms: None,
        }),
        Some(Peer::Anonymous(_)) | None => Caller::Nobody,
    }
}

fn level_of(path: &str) -> Option<Level> {
    TABLE.iter().find(|(method, _)| *method == path).map(|(_, level)| *level)
}

fn role_allows(role: Role, level: Level) -> bool {
    match level {
        Level::Anyone => true,
        Level::Node => false,
        Level::Look => true,
        Level::Command => matches!(role, Role::AgentToken | Role::Operator | Role::Admin),
        Level::Manage => matches!(role, Role::Operator | Role::Admin),
        Level::Administer => role == Role::Admin,
    }
}

/// Decides on a call, and puts what the caller has proved to be where its handler finds it.
fn admit<B>(request: &mut Request<B>) -> Result<(), Status> {
    let path = request.uri().path();
    let Some(level) = level_of(path) else {
        return Err(refuse(Code::Unimplemented, "unknown_method", "the hub has no such method"));
    };
    match caller(request.extensions().get::<Peer>()) {
        _ if level == Level::Anyone => {}
        Caller::Nobody => {
            return Err(with_hint(
                refuse(Code::Unauthenticated, "no_certificate", "a client certificate is needed"),
                "nodes: cortex-agent join; operators: cortex-agent login",
            ));
        }
        Caller::Node(node) if level == Level::Node => {
            request.extensions_mut().insert(node);
        }
        Caller::Operator(operator) if role_allows(operator.role, level) => {
            request.extensions_mut().insert(operator);
        }
        Caller::Operator(operator) if level != Level::Node => {
            let text =
                format!("the role {} of {:?} does not allow this", operator.role, operator.name);
            return Err(refuse(Code::PermissionDenied, "role_too_low", text));
        }
        Caller::Node(_) | Caller::Operator(_) => {
            return Err(refuse(
                Code::PermissionDenied,
                "wrong_kind_of_caller",
                "this call is not for this kind of certificate",
            ));
        }
    }
    Ok(())
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

/// Puts the check in front of all services.
#[derive(Clone, Copy, Debug)]
pub struct AuthLayer;

impl<S> Layer<S> for AuthLayer {
    type Service = AuthService<S>;
    fn layer(&self, inner: S) -> Self::Service {
        AuthService { inner }
    }
}

/// See [`AuthLayer`].
#[derive(Clone, Debug)]
pub struct AuthService<S> {
    inner: S,
}

impl<S> Service<Request<Body>> for AuthService<S>
where
    S: Service<Request<Body>, Response = Response<Body>>,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = Either<S::Future, Ready<Result<Response<Body>, S::Error>>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        match admit(&mut request) {
            Ok(()) => Either::Left(self.inner.call(request)),
            Err(status) => Either::Right(ready(Ok(status.into_http()))),
        }
    }
}

#[cfg(test)]
mod tests {
    use cortex_shared::ids::MeshId;

    use super::*;

    fn call(path: &str, peer: Option<Peer>) -> Result<Request<()>, Status> {
        let mut request = Request::builder().uri(format!("http://hub{path}")).body(()).unwrap();
        if let Some(peer) = peer {
            request.extensions_mut().insert(peer);
        }
        admit(&mut request).map(|()| request)
    }

    fn certified(holder: Holder) -> Option<Peer> {
        let address = "127.0.0.1:1".parse().unwrap();
        let identity = PeerIdentity { mesh: MeshId::new(), holder };
        Some(Peer::Certified { address, identity, not_after_ms: 1 })
    }

    fn operator(role: Role) -> Option<Peer> {
        certified(Holder::Operator { name: "ann".into(), role })
    }

    #[test]
    fn every_kind_of_caller_gets_what_the_table_says() {
        use Level::{Administer, Anyone, Command, Look, Manage, Node};
        let callers: [(Option<Peer>, &[Level]); 8] = [
            (None, &[Anyone]),
            (Some(Peer::Anonymous("127.0.0.1:1".parse().unwrap())), &[Anyone]),
            (certified(Holder::Hub), &[Anyone]),
            (certified(Holder::Node(NodeId::new())), &[Anyone, Node]),
            (operator(Role::Viewer), &[Anyone, Look]),
            (operator(Role::AgentToken), &[Anyone, Look, Command]),
            (operator(Role::Operator), &[Anyone, Look, Command, Manage]),
            (Some(Peer::Local { uid: 0 }), &[Anyone, Look, Command, Manage, Administer]),
        ];
        for (peer, allowed) in callers {
            for (path, level) in TABLE {
                let result = call(path, peer.clone());
                assert_eq!(result.is_ok(), allowed.contains(level), "{path} by {peer:?}");
            }
        }
    }

    #[test]
    fn a_method_outside_the_table_is_refused_to_everyone() {
        let status = call("/cortex.v1.Operator/Nonsense", Some(Peer::Local { uid: 0 }));
        assert_eq!(status.unwrap_err().code(), Code::Unimplemented);
    }

    #[test]
    fn handler_finds_the_node_of_the_certificate() {
        let id = NodeId::new();
        let request = call("/cortex.v1.Node/Link", certified(Holder::Node(id))).unwrap();
        assert_eq!(request.extensions().get(), Some(&AdmittedNode { node_id: id }));
    }
}
