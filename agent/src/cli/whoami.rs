//! `whoami`: the operator that the hub takes us for.

use std::collections::BTreeMap;

use clap::Args;
use cortex_proto::v1;
use serde::Serialize;

use super::error::CliError;
use super::{Global, Output, hub, printer};

/// Show who the hub takes you for, and what you may do
#[derive(Debug, Args)]
pub(crate) struct WhoamiArgs {
    #[command(flatten)]
    output: Output,
}

#[derive(Serialize)]
struct Me {
    name: String,
    role: String,
    mesh_id: String,
    hub_version: String,
    certificate_not_after_ms: i64,
    /// Labels that a node must have for this operator to see or command it.
    scope: BTreeMap<String, String>,
}

pub(crate) async fn whoami(global: &Global, args: WhoamiArgs) -> Result<(), CliError> {
    let mut client = hub::operator(global).await?;
    let answer = client.who_am_i(hub::question(v1::WhoAmIRequest {})).await?.into_inner();
    let me = Me {
        name: answer.name,
        role: answer.role,
        mesh_id: answer.mesh_id,
        hub_version: answer.hub_version,
        certificate_not_after_ms: answer.certificate_not_after_ms,
        scope: answer.scope.into_iter().collect(),
    };
    let scope = match me.scope.is_empty() {
        true => "all nodes".to_owned(),
        false => me.scope.iter().map(|(k, v)| format!("{k}={v}")).collect::<Vec<_>>().join(","),
    };
    let lines = [
        ("name", me.name.clone()),
        ("role", me.role.clone()),
        ("nodes", scope),
        ("mesh", me.mesh_id.clone()),
        ("hub version", me.hub_version.clone()),
        ("certificate until", printer::time(me.certificate_not_after_ms)),
    ];
    global.printer(args.output).show(&me, &lines)
}
