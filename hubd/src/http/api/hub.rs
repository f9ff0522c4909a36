//! The hub as a whole.

use cortex_proto::v1;
use cortex_proto::v1::operator_server::Operator as _;

use super::{Api, view};
use crate::http::error::Problem;
use crate::http::routes::{Call, NoQuery};

pub(in crate::http) async fn show(
    api: &Api,
    call: &Call,
    _: NoQuery,
) -> Result<view::Hub, Problem> {
    let status = api.service.hub_status(call.request(v1::HubStatusRequest {})?).await?;
    Ok(view::Hub::of(status.into_inner()))
}
