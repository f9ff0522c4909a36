//! The Enroll service.

use std::sync::Arc;

use cortex_proto::v1::enroll_server::Enroll;
use cortex_proto::v1::{
    JoinNodeRequest, JoinNodeResponse, LoginOperatorRequest, LoginOperatorResponse,
};
use tonic::{Request, Response, Status};

use super::{convert, status};
use crate::enroll::ca::CertificateAuthority;
use crate::enroll::validator::Validator;

/// See the module.
pub struct EnrollService {
    /// Where tokens are checked.
    pub validator: Arc<Validator>,
    /// Whose certificate goes along.
    pub authority: Arc<CertificateAuthority>,
}

#[tonic::async_trait]
impl Enroll for EnrollService {
    async fn join_node(
        &self,
        request: Request<JoinNodeRequest>,
    ) -> Result<Response<JoinNodeResponse>, Status> {
        let join = convert::join_request(request.into_inner())?;
        let (node, issued) = self.validator.join_node(join).await.map_err(status::from_enroll)?;
        Ok(Response::new(JoinNodeResponse {
            node_id: node.id.as_bytes().to_vec().into(),
            name: node.name,
            certificate_der: issued.der.to_vec().into(),
            ca_der: self.authority.certificate().to_vec().into(),
            mesh_id: self.authority.mesh().to_string(),
            not_after_ms: issued.not_after_ms,
            generation: 1,
            trusted_cas_der: vec![self.authority.certificate().to_vec().into()],
        }))
    }

    async fn recover_node(
        &self,
        _: Request<cortex_proto::v1::RecoverNodeRequest>,
    ) -> Result<Response<JoinNodeResponse>, Status> {
        Err(Status::unimplemented("placeholder"))
    }

    async fn login_operator(
        &self,
        request: Request<LoginOperatorRequest>,
    ) -> Result<Response<LoginOperatorResponse>, Status> {
        let request = request.into_inner();
        let token = convert::token(&request.token)?;
        let certificate = convert::certificate_request(&request.csr_der)?;
        let (operator, issued) = self
            .validator
            .login_operator(&token, &certificate)
            .await
            .map_err(status::from_enroll)?;
        Ok(Response::new(LoginOperatorResponse {
            name: operator.name,
            role: operator.role.to_string(),
            certificate_der: issued.der.to_vec().into(),
            ca_der: self.authority.certificate().to_vec().into(),
            mesh_id: self.authority.mesh().to_string(),
            not_after_ms: issued.not_after_ms,
            trusted_cas_der: vec![self.authority.certificate().to_vec().into()],
        }))
    }
}
