//! `stat`: what a file of a workspace is.

use std::ffi::OsString;

use clap::Args;
use cortex_proto::v1::{self, file_request};

use super::view::{FileView, lines};
use super::{Conversation, Target};
use crate::cli::error::{CliError, Exit};
use crate::cli::{Global, Output};

/// Show what a file of a workspace is, and the hash of its content
#[derive(Debug, Args)]
#[command(after_help = "\
The hash is BLAKE3, as write --if-hash takes it. It is there for files of up to 16 MiB, and for any with
--hash. A symbolic link is shown itself.

Example:
  cortex-agent stat build-1:app/config.toml -o json")]
pub(crate) struct StatArgs {
    /// NODE:WORKSPACE/path
    #[arg(value_name = "NODE:PATH")]
    target: OsString,
    /// The hash, however large the file is
    #[arg(long)]
    hash: bool,
    #[command(flatten)]
    output: Output,
}

pub(crate) async fn stat(global: &Global, args: StatArgs) -> Result<(), CliError> {
    let StatArgs { target, hash, output } = args;
    let target = Target::parse(target)?;
    let action = file_request::Action::Stat(v1::StatFile { hash });
    let done = Conversation::look(global, target, action).await?.end().await?;
    let info = done.info.ok_or_else(|| CliError::new(Exit::Failed, "the node said nothing"))?;
    global.printer(output).show(&FileView::from(&info), &lines(&info))
}
