//! `identity show|renew|recover|fork`: who this node is, and the certificate that proves it.

use std::fs::File;

use clap::{Args, Subcommand};
use cortex_proto::v1;
use cortex_proto::v1::node_client::NodeClient;
use serde::Serialize;

use super::error::{CliError, Exit};
use super::token::TokenArgs;
use super::{Global, Output, hub, join, local, printer};
use crate::audit::{Audit, AuditEvent};
use crate::client::Purpose;
use crate::config::{Settings, StateDir};
use crate::identity::live::LiveIdentity;
use crate::identity::{MachineFacts, NodeIdentity, authorities_of};
use crate::link::renewal;

/// Who this node is, and the certificate that proves it
#[derive(Debug, Args)]
pub(crate) struct IdentityArgs {
    #[command(subcommand)]
    verb: IdentityVerb,
}

#[derive(Debug, Subcommand)]
enum IdentityVerb {
    /// Show it
    Show {
        #[command(flatten)]
        output: Output,
    },
    /// Get a new certificate now; the agent does it by itself at half of the old one's life
    Renew {
        #[command(flatten)]
        output: Output,
    },
    /// Get a new certificate by the key alone, after the old one has expired
    #[command(after_help = "\
The agent does this by itself when the hub does not accept its certificate any more. Possible for 30
days after the certificate's end; later, `cortex-agent identity fork` with a new invite.")]
    Recover {
        #[command(flatten)]
        output: Output,
    },
    /// Become a node of one's own, where this machine is a copy of another
    #[command(after_help = "\
A machine that was copied with its state (a disk image, a restored backup) shows its original's
identity, and the hub refuses the second one. This makes a new key, joins with a new invite as a node
of its own, and puts the old identity aside (STATE/identity.old-ID); nothing is deleted. Stop the
agent first, and start it afterwards. Settings and the ceiling stay as they are.

Example:
  systemctl stop cortex-agent
  cortex-agent identity fork --token-file invite --name build-2
  systemctl start cortex-agent")]
    Fork(ForkArgs),
}

#[derive(Debug, Args)]
struct ForkArgs {
    #[command(flatten)]
    token: TokenArgs,
    /// Name of the new node; by default made of the host's name
    #[arg(long)]
    name: Option<String>,
    /// A label for the node; may be repeated
    #[arg(long = "label", value_name = "KEY=VALUE")]
    labels: Vec<String>,
    #[command(flatten)]
    output: Output,
}

pub(crate) async fn identity(global: &Global, args: IdentityArgs) -> Result<(), CliError> {
    match args.verb {
        IdentityVerb::Show { output } => show(global, output),
        IdentityVerb::Renew { output } => renew(global, false, output).await,
        IdentityVerb::Recover { output } => renew(global, true, output).await,
        IdentityVerb::Fork(args) => fork(global, args).await,
    }
}

#[derive(Serialize)]
struct Shown {
    node_id: String,
    name: String,
    mesh_id: String,
    hub: String,
    generation: u64,
    not_after_ms: i64,
    /// The newest certificate has not connected yet; the one before it is kept.
    unproven: bool,
    authorities: Vec<String>,
    machine_id: String,
    boot_id: String,
    hostname: String,
    folder: String,
}

fn show(global: &Global, output: Output) -> Result<(), CliError> {
    let state = global.state()?;
    let identity = NodeIdentity::require(&state)?;
    let machine = MachineFacts::of_this_machine();
    let shown = Shown {
        node_id: identity.node_id.to_string(),
        name: identity.name.clone(),
        mesh_id: identity.mesh.to_string(),
        hub: Settings::load(&state)?.hub.to_string(),
        generation: identity.generation,
        not_after_ms: identity.credentials.not_after_ms(),
        unproven: identity.fallback.is_some(),
        authorities: identity.credentials.pins().iter().map(ToString::to_string).collect(),
        machine_id: machine.machine_id,
        boot_id: machine.boot_id,
        hostname: machine.hostname,
        folder: state.identity().display().to_string(),
    };
    let mut certificate =
        format!("until {}, generation {}", printer::time(shown.not_after_ms), shown.generation);
    if shown.unproven {
        certificate.push_str(" (not connected yet; the one before it is kept)");
    }
    let lines = [
        ("node", format!("{} ({})", shown.name, shown.node_id)),
        ("mesh", shown.mesh_id.clone()),
        ("hub", shown.hub.clone()),
        ("certificate", certificate),
        ("trusted authorities", shown.authorities.join(", ")),
        (
            "machine",
            format!(
                "{} (machine id {}, boot id {})",
                shown.hostname, shown.machine_id, shown.boot_id
            ),
        ),
        ("files", shown.folder.clone()),
    ];
    global.printer(output).show(&shown, &lines)
}

#[derive(Serialize)]
struct Renewed {
    generation: u64,
    not_after_ms: i64,
}

/// A running agent does it itself; otherwise it is done here, while no agent can start.
async fn renew(global: &Global, recover: bool, output: Output) -> Result<(), CliError> {
    let state = global.state()?;
    state.check_owner()?;
    let identity = NodeIdentity::require(&state)?;
    let renewed = match state.try_lock()? {
        None => {
            let mut agent = local::agent(global).await?;
            let question = hub::long_question(v1::RenewLocalRequest { recover });
            let answer = agent.renew_local(question).await?.into_inner();
            Renewed { generation: answer.generation, not_after_ms: answer.not_after_ms }
        }
        Some(lock) => renew_here(&state, identity, recover, &lock).await?,
    };
    let end = printer::time(renewed.not_after_ms);
    let sentence = format!("certificate until {end}, generation {}", renewed.generation);
    global.printer(output).say(&sentence, &renewed)
}

async fn renew_here(
    state: &StateDir,
    identity: NodeIdentity,
    recover: bool,
    _lock: &File,
) -> Result<Renewed, CliError> {
    let hub = Settings::load(state)?.hub;
    let identity = LiveIdentity::new(state.clone(), identity, hub)?;
    if recover {
        renewal::recover(&identity).await?;
    } else {
        let channel = identity.client().connect(Purpose::Control).await?;
        renewal::renew(&identity, NodeClient::new(channel)).await?;
    }
    let identity = identity.snapshot();
    Ok(Renewed {
        generation: identity.generation,
        not_after_ms: identity.credentials.not_after_ms(),
    })
}

#[derive(Serialize)]
struct Forked<'a> {
    node_id: String,
    name: &'a str,
    old_node_id: String,
    old_identity: String,
}

async fn fork(global: &Global, args: ForkArgs) -> Result<(), CliError> {
    let state = global.state()?;
    state.check_owner()?;
    let labels = join::parse_labels(&args.labels)?;
    if let Some(name) = &args.name {
        cortex_shared::labels::check_new_name(name)
            .map_err(|error| CliError::usage(error.to_string()))?;
    }
    let old = NodeIdentity::require(&state)?;
    let settings = Settings::load(&state)?;
    let Some(_lock) = state.try_lock()? else {
        return Err(CliError::new(Exit::Conflict, "the agent runs with this identity").hint(
            "stop it first (systemctl [--user] stop cortex-agent; where it is no service, end the process that `cortex-agent status` names), and start it again afterwards",
        ));
    };
    let wish = join::Wish {
        token: args.token.read()?,
        name: args.name,
        labels,
        ceiling: settings.ceiling,
    };
    let key = NodeIdentity::replacement_key(&state)?;
    let response = join::ask(&settings.hub, old.trust(), &key, &wish).await?;
    let ders = std::iter::once(response.ca_der.as_ref())
        .chain(response.trusted_cas_der.iter().map(AsRef::as_ref));
    let authorities = authorities_of(ders).map_err(join::wrong_answer)?;
    if !authorities.iter().any(|authority| old.credentials.authorities.contains(authority)) {
        return Err(join::wrong_answer("none of its authorities is known here"));
    }
    let new = join::admitted(&key, authorities, &response)?;
    if new.mesh != old.mesh {
        return Err(join::wrong_answer("it is of another mesh"));
    }
    if new.node_id == old.node_id {
        return Err(join::wrong_answer("it is the same node"));
    }
    Audit::of(&state).append(&AuditEvent::Forked {
        old_node_id: old.node_id.to_string(),
        node_id: new.node_id.to_string(),
        name: new.name.clone(),
    })?;
    let kept = new.replace(&state, old.node_id)?;
    let forked = Forked {
        node_id: new.node_id.to_string(),
        name: &new.name,
        old_node_id: old.node_id.to_string(),
        old_identity: kept.display().to_string(),
    };
    let sentence = format!(
        "this machine is now {} ({}); its old identity is kept in {}",
        forked.name, forked.node_id, forked.old_identity
    );
    global.printer(args.output).say(&sentence, &forked)
}
