//! `ceiling show|set`: the node owner's own bound for what commands may do here.

use clap::{Args, Subcommand};
use cortex_shared::policy::Mode;
use serde::Serialize;

use super::error::CliError;
use super::{Global, Output, printer};
use crate::config::Settings;

/// This machine's own upper bound for what commands may do
#[derive(Debug, Args)]
#[command(after_help = "\
strict (the default) means that nobody, the hub included, can run a command here outside the
sandbox. permissive leaves it to the hub's policy, which is strict too unless an admin changes it.
Only who may write this node's state (--state) can change it: root, or the agent's own user.")]
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
    /// Change it. Lowering counts at once; raising does after the agent's next connection
    Set {
        /// strict or permissive
        #[arg(value_name = "strict|permissive")]
        mode: Mode,
    },
}

#[derive(Serialize)]
struct Ceiling {
    ceiling: Mode,
}

pub(crate) fn ceiling(global: &Global, args: CeilingArgs) -> Result<(), CliError> {
    let state = global.state()?;
    match args.verb {
        CeilingVerb::Show { output } => {
            let ceiling = Settings::load(&state)?.ceiling;
            global.printer(output).say(&ceiling.to_string(), &Ceiling { ceiling })
        }
        CeilingVerb::Set { mode } => {
            let mut before = mode;
            Settings::update(&state, |settings| {
                before = std::mem::replace(&mut settings.ceiling, mode);
            })?;
            if before < mode {
                printer::complain(
                    "the hub hears of it when the agent connects next; restart it for that",
                    global.color,
                );
            }
            Ok(())
        }
    }
}
