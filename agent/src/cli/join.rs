//! `join`: makes this machine a node of a mesh.

use std::collections::BTreeMap;
use std::path::PathBuf;

use clap::Args;
use cortex_proto::v1;
use cortex_shared::ids::{MeshId, NodeId};
use cortex_shared::labels;
use cortex_shared::peer::CaPin;
use cortex_shared::policy::{Bound, Mode, Network};
use rustls_pki_types::CertificateDer;
use serde::Serialize;
use tonic::Request;
use zeroize::Zeroizing;

use super::error::{CliError, Exit};
use super::token::TokenArgs;
use super::{Global, Output, hub};
use crate::audit::{Audit, AuditEvent};
use crate::client::{HubAddress, Trust, pin_of};
use crate::config::{
    CommandSettings, LibraryPlace, SandboxSettings, Settings, default_workspace_root,
};
use crate::identity::{IdentityKey, MachineFacts, NodeIdentity, authorities_of, holder_of};
use crate::link::{proto_mode, proto_network};

/// Make this machine a node of a mesh
#[derive(Debug, Args)]
#[command(after_help = "\
An admin's `cortex-agent invite create` (or `cortex-hubd invite create` on the hub) prints the whole
line. The hub is believed only if its certificate authority has the given pin; otherwise nothing is
sent. The token is read from a file, from standard input or from CORTEX_TOKEN, never from an
argument. A machine that has joined already keeps its identity: the invite is then not used.

Examples:
  cortex-agent join hub.example.org:7443 --ca sha256:5e88… --token-file invite --label env=prod
  CORTEX_TOKEN=cxi_… cortex-agent join 10.0.0.5:7443 --ca sha256:5e88… --name build-1")]
pub(crate) struct JoinArgs {
    /// Where the hub is reached
    #[arg(value_name = "HUB:PORT")]
    hub: String,
    /// Pin of the mesh's certificate authority; several, separated by commas, while it changes
    #[arg(long, value_name = "sha256:HEX[,…]")]
    ca: String,
    #[command(flatten)]
    token: TokenArgs,
    /// Name of the node; by default made of the host's name
    #[arg(long)]
    name: Option<String>,
    /// A label that the node gives itself, kept as self/KEY; may be repeated. Labels that decide who
    /// may command it come from the invite or from operators
    #[arg(long = "label", value_name = "KEY=VALUE")]
    labels: Vec<String>,
    /// Where workspaces live, in a directory each [default: ~/cortex]
    #[arg(long, value_name = "DIR")]
    workspace_root: Option<PathBuf>,
    /// Where the library of skills is placed: a directory, or `off` for nowhere [default:
    /// WORKSPACE-ROOT/.library]
    #[arg(long, value_name = "DIR", value_parser = parse_library)]
    library: Option<LibraryPlace>,
    /// This machine's own upper bound for what commands may do, whatever the hub allows
    #[arg(long, value_name = "strict|permissive", default_value_t)]
    ceiling: Mode,
    /// Network that a strict command may have at most, whatever the hub allows
    #[arg(long, value_name = "none|full", default_value_t)]
    ceiling_net: Network,
    #[command(flatten)]
    output: Output,
}

#[derive(Serialize)]
struct Joined<'a> {
    node_id: String,
    name: &'a str,
    mesh_id: String,
    hub: String,
    already_joined: bool,
}

pub(crate) async fn join(global: &Global, args: JoinArgs) -> Result<(), CliError> {
    let address = hub::parse_address(&args.hub)?;
    let pins = hub::parse_pins(&args.ca)?;
    let labels = parse_labels(&args.labels)?;
    if let Some(name) = &args.name {
        labels::check_new_name(name).map_err(|error| CliError::usage(error.to_string()))?;
    }
    let workspace_root = match args.workspace_root {
        Some(path) => std::path::absolute(&path)
            .map_err(|error| CliError::usage("--workspace-root is no path").because(error))?,
        None => default_workspace_root()?,
    };
    let state = global.state()?;
    let mut printer = global.printer(args.output);
    if let Some(identity) = NodeIdentity::load(&state)? {
        if !identity.credentials.pins().iter().any(|pin| pins.contains(pin)) {
            return Err(CliError::new(
                Exit::Conflict,
                format!(
                    "this machine is node {} of another mesh, {}",
                    identity.name, identity.mesh
                ),
            )
            .hint("`cortex-agent leave` first, or --state DIR for a second node on this machine"));
        }
        let joined = Joined {
            node_id: identity.node_id.to_string(),
            name: &identity.name,
            mesh_id: identity.mesh.to_string(),
            hub: Settings::load(&state)?.hub.to_string(),
            already_joined: true,
        };
        let sentence = format!(
            "already joined as {} ({}); the invite was not used",
            joined.name, joined.node_id
        );
        return printer.say(&sentence, &joined);
    }

    let token = args.token.read()?;
    state.create()?;
    let key = NodeIdentity::pending_key(&state)?;
    let ceiling = Bound { mode: args.ceiling, network: args.ceiling_net };
    let wish = Wish { token, name: args.name, labels, ceiling };
    let response = ask(&address, Trust::Pins(pins.clone()), &key, &wish).await?;
    let authorities = pinned_authorities(&pins, &response.ca_der, &response.trusted_cas_der)
        .map_err(wrong_answer)?;
    let identity = admitted(&key, authorities, &response)?;
    let settings = Settings {
        hub: address,
        workspace_root,
        ceiling,
        workspace_paths: BTreeMap::new(),
        library: args.library.unwrap_or_default(),
        sandbox: SandboxSettings::default(),
        commands: CommandSettings::default(),
        log: None,
    };
    settings.save(&state)?;
    // Written down first: nobody joins a mesh without a trace.
    Audit::of(&state).append(&AuditEvent::Joined {
        node_id: identity.node_id.to_string(),
        name: identity.name.clone(),
        mesh_id: identity.mesh.to_string(),
        hub: settings.hub.to_string(),
        authorities: identity.credentials.pins().iter().map(ToString::to_string).collect(),
        ceiling: settings.ceiling.to_string(),
    })?;
    identity.store(&state)?;
    let joined = Joined {
        node_id: identity.node_id.to_string(),
        name: &identity.name,
        mesh_id: identity.mesh.to_string(),
        hub: settings.hub.to_string(),
        already_joined: false,
    };
    let sentence = format!("joined as {} ({})", joined.name, joined.node_id);
    printer.say(&sentence, &joined)
}

fn parse_library(text: &str) -> Result<LibraryPlace, String> {
    LibraryPlace::parse(std::path::Path::new(text))
}

/// What a new node would like to be.
pub(super) struct Wish {
    pub(super) token: Zeroizing<String>,
    pub(super) name: Option<String>,
    pub(super) labels: labels::Labels,
    pub(super) ceiling: Bound,
}

/// Asks to be admitted as a node.
pub(super) async fn ask(
    hub: &HubAddress,
    trust: Trust,
    key: &IdentityKey,
    wish: &Wish,
) -> Result<v1::JoinNodeResponse, CliError> {
    let csr_der = key.request_der().map_err(|error| {
        CliError::new(Exit::Failed, "cannot sign the certificate request").because(error)
    })?;
    let machine = MachineFacts::of_this_machine();
    let response = hub::enroll(hub.clone(), trust, |mut client, deadline| {
        let mut request = Request::new(v1::JoinNodeRequest {
            token: wish.token.to_string(),
            csr_der: csr_der.clone().into(),
            name: wish.name.clone().unwrap_or_default(),
            labels: wish.labels.clone().into_iter().collect(),
            hostname: machine.hostname.clone(),
            os: std::env::consts::OS.to_owned(),
            arch: std::env::consts::ARCH.to_owned(),
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            ceiling: proto_mode(wish.ceiling.mode).into(),
            ceiling_network: proto_network(wish.ceiling.network).into(),
            machine: Some(machine.clone().into()),
        });
        request.set_timeout(deadline);
        async move { client.join_node(request).await }
    })
    .await?;
    Ok(response.into_inner())
}

pub(super) fn wrong_answer(what: &'static str) -> CliError {
    CliError::new(Exit::Failed, format!("the hub's answer is wrong: {what}"))
}

/// The authorities in an answer of a hub that is known by a pin only. The pinned one must be among
/// them: it is the one that the connection was checked against.
pub(super) fn pinned_authorities(
    pins: &[CaPin],
    ca_der: &[u8],
    trusted_cas_der: &[bytes::Bytes],
) -> Result<Vec<CertificateDer<'static>>, &'static str> {
    let ders = std::iter::once(ca_der).chain(trusted_cas_der.iter().map(AsRef::as_ref));
    let authorities = authorities_of(ders)?;
    if authorities.iter().filter_map(pin_of).any(|pin| pins.contains(&pin)) {
        Ok(authorities)
    } else {
        Err("its authority is not the pinned one")
    }
}

/// Checks that what the hub issued is for this key and for the node it says.
pub(super) fn admitted(
    key: &IdentityKey,
    authorities: Vec<CertificateDer<'static>>,
    response: &v1::JoinNodeResponse,
) -> Result<NodeIdentity, CliError> {
    let node_id = NodeId::from_slice(&response.node_id).map_err(|_| wrong_answer("node id"))?;
    let mesh: MeshId = response.mesh_id.parse().map_err(|_| wrong_answer("mesh id"))?;
    labels::check_name(&response.name).map_err(|_| wrong_answer("name"))?;
    let certificate = CertificateDer::from(response.certificate_der.to_vec());
    if !key.fits(&certificate) {
        return Err(wrong_answer("the certificate is for another key"));
    }
    let identity = NodeIdentity {
        node_id,
        name: response.name.clone(),
        mesh,
        credentials: key.with(certificate, authorities),
        generation: response.generation,
        fallback: None,
    };
    if holder_of(&identity.credentials.own.certificate) != Some(identity.peer()) {
        return Err(wrong_answer("the certificate is for another node"));
    }
    Ok(identity)
}

/// Reads `KEY=VALUE` arguments.
pub(super) fn parse_labels(texts: &[String]) -> Result<labels::Labels, CliError> {
    let mut parsed = labels::Labels::new();
    for text in texts {
        let (key, value) = text
            .split_once('=')
            .ok_or_else(|| CliError::usage(format!("--label {text}: expected KEY=VALUE")))?;
        parsed.insert(key.to_owned(), value.to_owned());
    }
    labels::check_labels(&parsed).map_err(|error| CliError::usage(error.to_string()))?;
    Ok(parsed)
}
