//! `mkdir`: makes a directory in a workspace.

use std::ffi::OsString;

use clap::Args;
use cortex_proto::v1::{self, file_request};
use serde::Serialize;

use super::{Conversation, Target};
use crate::cli::error::CliError;
use crate::cli::{Global, Output};

/// Make a directory in a workspace on a node
#[derive(Debug, Args)]
#[command(after_help = "\
Example:
  cortex-agent mkdir -p build-1:app/data/2024")]
pub(crate) struct MkdirArgs {
    /// NODE:WORKSPACE/path
    #[arg(value_name = "NODE:PATH")]
    target: OsString,
    /// Also those above it; that it exists is no failure
    #[arg(short = 'p', long)]
    parents: bool,
    #[command(flatten)]
    output: Output,
}

#[derive(Serialize)]
struct Made {
    target: String,
    made: u64,
}

pub(crate) async fn mkdir(global: &Global, args: MkdirArgs) -> Result<(), CliError> {
    let MkdirArgs { target, parents, output } = args;
    let target = Target::parse(target)?;
    let action = file_request::Action::MakeDirectory(v1::MakeDirectory { parents });
    let mut conversation = Conversation::change(global, target, action).await?;
    let made = conversation.end().await?.count;
    let target = conversation.shown;
    let sentence = match made {
        0 => format!("{target} is there already"),
        _ => format!("made {target}"),
    };
    global.printer(output).say(&sentence, &Made { target, made })
}
