//! `rm`: removes a file or a tree of a workspace.

use std::ffi::OsString;

use clap::Args;
use cortex_proto::v1::{self, file_request};
use serde::Serialize;

use super::{Conversation, Target};
use crate::cli::error::CliError;
use crate::cli::{Global, Output};

/// Remove a file, or with -r a directory, of a workspace on a node
#[derive(Debug, Args)]
#[command(after_help = "\
The other members of the workspace lose it, too. A symbolic link is removed itself, not what it leads to.
With -r, what is cut off in the middle has removed a part.

Examples:
  cortex-agent rm build-1:app/old.log
  cortex-agent rm -r build-1:app/target")]
pub(crate) struct RmArgs {
    /// NODE:WORKSPACE/path
    #[arg(value_name = "NODE:PATH")]
    target: OsString,
    /// A directory with all that is in it
    #[arg(short = 'r', long)]
    recursive: bool,
    #[command(flatten)]
    output: Output,
}

#[derive(Serialize)]
struct Removed {
    target: String,
    removed: u64,
}

pub(crate) async fn rm(global: &Global, args: RmArgs) -> Result<(), CliError> {
    let RmArgs { target, recursive, output } = args;
    let target = Target::parse(target)?;
    let action = file_request::Action::Remove(v1::RemoveFile { recursive });
    let mut conversation = Conversation::change(global, target, action).await?;
    let removed = conversation.end().await?.count;
    let target = conversation.shown;
    let sentence = match removed {
        1 => format!("removed {target}"),
        count => format!("removed {target}: {count} names"),
    };
    global.printer(output).say(&sentence, &Removed { target, removed })
}
