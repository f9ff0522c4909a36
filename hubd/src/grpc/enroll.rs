//! The Enroll service.

use std::sync::Arc;

use cortex_proto::v1::enroll_server::Enroll;
use cortex_proto::v1::{
    JoinNodeRequest, JoinNodeResponse, LoginOperatorRequest, LoginOperatorResponse,
    RecoverNodeRequest,
};
use cortex_shared::secret::InviteToken;
use tokio::time::Instant;
use tonic::{Request, Response, Status};
use zeroize::Zeroizing;

use super::auth::Peer;
use super::{convert, status};
use crate::enroll::authorities::Authorities;
use crate::enroll::limits::JoinLimits;
use crate::enroll::validator::Validator;
use crate::store::Caller;

/// See the module.
pub struct EnrollService {
    /// Where tokens are checked.
    pub validator: Arc<Validator>,
    /// How often anyone may try.
    pub limits: Arc<JoinLimits>,
    /// Whose certificates go along.
    pub authorities: Arc<Authorities>,
}

impl EnrollService {
    /// Who calls, if that address may try now.
    fn caller<T>(&self, request: &Request<T>) -> Result<Caller, Status> {
        let address = request.extensions().get::<Peer>().and_then(Peer::address);
        let address = address.map(|address| address.ip());
        if let Some(address) = address {
            self.limits.check_address(address, Instant::now()).map_err(status::too_often)?;
        }
        Ok(Caller { address })
    }

    /// A token whose invite may be tried now. Its text is wiped.
    fn token(&self, text: String) -> Result<InviteToken, Status> {
        let token = convert::token(&Zeroizing::new(text))?;
        self.limits.check_invite(token.id(), Instant::now()).map_err(status::too_often)?;
        Ok(token)
    }
}

#[tonic::async_trait]
impl Enroll for EnrollService {
    async fn join_node(
        &self,
        request: Request<JoinNodeRequest>,
    ) -> Result<Response<JoinNodeResponse>, Status> {
        let caller = self.caller(&request)?;
        let mut request = request.into_inner();
        let token = self.token(std::mem::take(&mut request.token))?;
        let join = convert::join_request(token, caller, request)?;
        let (node, issued) = self.validator.join_node(join).await.map_err(status::from_enroll)?;
        Ok(Response::new(convert::joined(&self.authorities.ring(), node, &issued)))
    }

    async fn recover_node(
        &self,
        request: Request<RecoverNodeRequest>,
    ) -> Result<Response<JoinNodeResponse>, Status> {
        self.caller(&request)?;
        let address = request.extensions().get::<Peer>().and_then(Peer::address);
        let recovery = convert::recovery(request.into_inner(), address)?;
        let (node, issued) =
            self.validator.recover_node(recovery).await.map_err(status::from_enroll)?;
        Ok(Response::new(convert::joined(&self.authorities.ring(), node, &issued)))
    }

    async fn login_operator(
        &self,
        request: Request<LoginOperatorRequest>,
    ) -> Result<Response<LoginOperatorResponse>, Status> {
        let caller = self.caller(&request)?;
        let mut request = request.into_inner();
        let token = self.token(std::mem::take(&mut request.token))?;
        let certificate = convert::certificate_request(&request.csr_der)?;
        let (operator, issued) = self
            .validator
            .login_operator(&token, &certificate, caller)
            .await
            .map_err(status::from_enroll)?;
        let ring = self.authorities.ring();
        Ok(Response::new(LoginOperatorResponse {
            name: operator.name,
            role: operator.role.to_string(),
            certificate_der: issued.der.to_vec().into(),
            ca_der: ring.serving().certificate().to_vec().into(),
            mesh_id: self.authorities.mesh().to_string(),
            not_after_ms: issued.not_after_ms,
            trusted_cas_der: ring.trusted_der(),
        }))
    }
}
