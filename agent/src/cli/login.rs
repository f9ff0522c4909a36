//! `login`: makes this user an operator of a mesh.

use clap::Args;
use cortex_proto::v1;
use cortex_shared::ids::MeshId;
use cortex_shared::labels;
use cortex_shared::peer::{Holder, PeerIdentity};
use rustls_pki_types::CertificateDer;
use serde::Serialize;
use tonic::Request;

use super::error::{CliError, Exit};
use super::token::TokenArgs;
use super::{Global, Output, hub, join};
use crate::client::Trust;
use crate::config::contexts::Context;
use crate::identity::holder_of;

/// Become an operator of a mesh on this machine
#[derive(Debug, Args)]
#[command(after_help = "\
`cortex-hubd operator create NAME --role operator` on the hub's machine prints the token and the
pin. The login is stored as a context (`--context NAME`, by default `default`) and becomes the
current one; `cortex-agent context list` shows all.

Example:
  cortex-agent login hub.example.org:7443 --ca sha256:5e88… --token-file token")]
pub(crate) struct LoginArgs {
    /// Where the hub is reached
    #[arg(value_name = "HUB:PORT")]
    hub: String,
    /// Pin of the mesh's certificate authority
    #[arg(long, value_name = "sha256:HEX[,…]")]
    ca: String,
    #[command(flatten)]
    token: TokenArgs,
    #[command(flatten)]
    output: Output,
}

#[derive(Serialize)]
struct LoggedIn<'a> {
    context: &'a str,
    name: &'a str,
    role: String,
    mesh_id: String,
    hub: String,
}

pub(crate) async fn login(global: &Global, args: LoginArgs) -> Result<(), CliError> {
    let address = hub::parse_address(&args.hub)?;
    let pins = hub::parse_pins(&args.ca)?;
    let name = global.context.clone().unwrap_or_else(|| "default".to_owned());
    labels::check_name(&name).map_err(|error| CliError::usage(error.to_string()))?;
    let config = global.config()?;
    if config.load(&name).is_ok() {
        return Err(CliError::new(Exit::Conflict, format!("context {name:?} is in use")).hint(
            format!("choose another with --context, or `cortex-agent context remove {name}`"),
        ));
    }
    let token = args.token.read()?;
    let key = config.pending_key(&name)?;
    let csr_der = key.request_der().map_err(|error| {
        CliError::new(Exit::Failed, "cannot sign the certificate request").because(error)
    })?;
    let response =
        hub::enroll(address.clone(), Trust::Pins(pins.clone()), |mut client, deadline| {
            let mut request = Request::new(v1::LoginOperatorRequest {
                token: token.to_string(),
                csr_der: csr_der.clone().into(),
            });
            request.set_timeout(deadline);
            async move { client.login_operator(request).await }
        })
        .await?
        .into_inner();

    let wrong = |what: &'static str| {
        CliError::new(Exit::Failed, format!("the hub's answer is wrong: {what}"))
    };
    let mesh: MeshId = response.mesh_id.parse().map_err(|_| wrong("mesh id"))?;
    let role = response.role.parse().map_err(|_| wrong("role"))?;
    let certificate = CertificateDer::from(response.certificate_der.to_vec());
    let authorities = join::pinned_authorities(&pins, &response.ca_der, &response.trusted_cas_der)
        .map_err(wrong)?;
    if !key.fits(&certificate) {
        return Err(wrong("the certificate is for another key"));
    }
    let holder = Holder::Operator { name: response.name.clone(), role };
    if holder_of(&certificate) != Some(PeerIdentity { mesh, holder }) {
        return Err(wrong("the certificate is for another operator"));
    }
    let context = Context { name, hub: address, operator: response.name, role, mesh };
    config.store(&context, &key.with(certificate, authorities))?;
    let logged_in = LoggedIn {
        context: &context.name,
        name: &context.operator,
        role: role.to_string(),
        mesh_id: mesh.to_string(),
        hub: context.hub.to_string(),
    };
    let sentence =
        format!("logged in as {} ({role}); context {:?}", context.operator, context.name);
    global.printer(args.output).say(&sentence, &logged_in)
}
