//! Who calls.

use cortex_shared::ids::NodeId;
use tonic::{Code, Status};

use super::status::refuse;

/// An admitted node, as handlers see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AdmittedNode {
    /// From its certificate.
    pub node_id: NodeId,
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
