//! `ceiling show|set`: the node owner's own bound for what commands may do here.

use clap::{Args, Subcommand};
use cortex_proto::v1;
use cortex_shared::policy::{Bound, Mode, Network};
use serde::Serialize;

use super::error::{CliError, printable};
use super::{Global, Output, hub, local, printer};
use crate::audit::{Audit, AuditEvent};
use crate::config::{Ceiling, Settings};

/// This machine's own upper bound for what commands may do
#[derive(Debug, Args)]
#[command(after_help = "\
strict (the default) means that nobody, the hub included, can run a command here outside the
sandbox. permissive leaves it to the hub's policy, which is strict too unless an admin changes it.
--net full leaves it to that policy whether a strict command may have this machine's network, its
loopback and its local network included; without it, none may.
Only root and the agent's own user can change it; each change is in STATE/audit.jsonl before it
counts.")]
pub(crate) struct CeilingArgs {
    #[command(subcommand)]
    verb: CeilingVerb,
}

#[derive(Debug, Subcommand)]
enum CeilingVerb {
    /// Show it
    Show {
        #[command(flatten)]
        output: Output,
    },
    /// Change it. It counts from the next command on
    Set {
        /// strict or permissive
        #[arg(value_name = "strict|permissive")]
        mode: Mode,
        /// Network that a strict command may have
        #[arg(long, value_name = "none|full", default_value_t)]
        net: Network,
    },
}

#[derive(Serialize)]
struct Shown {
    ceiling: Mode,
    network: Network,
}

pub(crate) async fn ceiling(global: &Global, args: CeilingArgs) -> Result<(), CliError> {
    let state = global.state()?;
    match args.verb {
        CeilingVerb::Show { output } => {
            let ceiling = Ceiling::load(&state, state.owner()?)?;
            warn_of_exposure(global, &ceiling);
            let Bound { mode, network } = ceiling.bound;
            let shown = Shown { ceiling: mode, network };
            global.printer(output).say(&ceiling.bound.to_string(), &shown)
        }
        CeilingVerb::Set { mode, net } => {
            let after = Bound { mode, network: net };
            state.check_owner()?;
            let before = Settings::load(&state)?.ceiling;
            let event =
                AuditEvent::Ceiling { before: before.to_string(), after: after.to_string() };
            match Audit::of(&state).append(&event) {
                Ok(()) => {}
                // Nobody becomes more permissive without a trace, and nobody is kept from becoming
                // stricter by a full disk.
                Err(error) if after.and(before) != after => return Err(error.into()),
                Err(error) => printer::complain(&format!("warning: {error}"), global.color),
            }
            Settings::update(&state, |settings| settings.ceiling = after)?;
            if let Ok(ceiling) = state.owner().and_then(|owner| Ceiling::load(&state, owner)) {
                warn_of_exposure(global, &ceiling);
            }
            tell_the_hub(global).await;
            Ok(())
        }
    }
}

/// Says why what is stored does not count.
fn warn_of_exposure(global: &Global, ceiling: &Ceiling) {
    if let Some(problem) = &ceiling.problem {
        let text = format!("warning: {problem}\nhint: {}", problem.hint());
        printer::complain(&text, global.color);
    }
}

/// Has a running agent tell its hub. One that does not run, or is offline, says it when it connects.
/// The ceiling has changed by now, so nothing that goes wrong here is a failure.
async fn tell_the_hub(global: &Global) {
    let Ok(mut agent) = local::agent(global).await else { return };
    let text = match agent.ceiling_local(hub::question(v1::CeilingLocalRequest {})).await {
        Ok(answer) if !answer.get_ref().offline => return,
        Ok(_) => "the hub hears of it when the agent connects next".to_owned(),
        Err(status) => format!(
            "warning: the ceiling has changed, but the agent did not tell the hub ({}), which hears of it when the agent connects next",
            printable(status.message())
        ),
    };
    printer::complain(&text, global.color);
}
