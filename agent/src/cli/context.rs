//! `context list|use|remove` and `logout`: the logins of this user.

use clap::{Args, Subcommand};
use serde::Serialize;

use super::error::CliError;
use super::printer::Row;
use super::{Global, Output};

/// The logins of this user
#[derive(Debug, Args)]
pub(crate) struct ContextArgs {
    #[command(subcommand)]
    verb: ContextVerb,
}

#[derive(Debug, Subcommand)]
enum ContextVerb {
    /// List all
    List {
        #[command(flatten)]
        output: Output,
    },
    /// Make one the current one
    Use {
        /// Name of the context
        name: String,
    },
    /// Forget one and its key
    Remove {
        /// Name of the context
        name: String,
    },
}

/// Forget the current login (or the one of --context) and its key
#[derive(Debug, Args)]
#[command(after_help = "\
The certificate stays valid until it expires; `cortex-hubd operator revoke NAME` ends it at once.")]
pub(crate) struct LogoutArgs {}

#[derive(Serialize)]
struct ContextRow {
    name: String,
    current: bool,
    hub: String,
    operator: String,
    role: String,
    mesh_id: String,
}

impl Row for ContextRow {
    const COLUMNS: &'static [&'static str] = &["CURRENT", "NAME", "HUB", "OPERATOR", "ROLE"];

    fn cells(&self) -> Vec<String> {
        vec![
            if self.current { "*" } else { "" }.to_owned(),
            self.name.clone(),
            self.hub.clone(),
            self.operator.clone(),
            self.role.clone(),
        ]
    }
}

pub(crate) fn context(global: &Global, args: ContextArgs) -> Result<(), CliError> {
    let config = global.config()?;
    match args.verb {
        ContextVerb::List { output } => {
            let current = config.current()?;
            let rows: Vec<ContextRow> = config
                .list()?
                .into_iter()
                .map(|context| ContextRow {
                    current: current.as_deref() == Some(&context.name),
                    name: context.name,
                    hub: context.hub.to_string(),
                    operator: context.operator,
                    role: context.role.to_string(),
                    mesh_id: context.mesh.to_string(),
                })
                .collect();
            global.printer(output).list(&rows)
        }
        ContextVerb::Use { name } => Ok(config.make_current(&name)?),
        ContextVerb::Remove { name } => Ok(config.remove(&name)?),
    }
}

pub(crate) fn logout(global: &Global, _: LogoutArgs) -> Result<(), CliError> {
    let config = global.config()?;
    let context = config.choose(global.context.as_deref())?;
    Ok(config.remove(&context.name)?)
}
