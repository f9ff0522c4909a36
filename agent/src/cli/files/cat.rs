//! `cat`: the content of a file of a workspace.

use std::ffi::OsString;

use clap::Args;
use cortex_proto::v1::{self, file_down, file_request};
use tokio::io::AsyncWriteExt as _;

use super::{Conversation, Target};
use crate::cli::Global;
use crate::cli::error::{CliError, Exit};
use crate::cli::units::parse_size;

/// Write the content of a file of a workspace to standard output
#[derive(Debug, Args)]
#[command(after_help = "\
Byte for byte, and checked: what did not arrive as it was read, or changed while it was read, is an error
(code 1).

Examples:
  cortex-agent cat build-1:app/result.json
  cortex-agent cat build-1:app/core.dump > core.dump
  cortex-agent cat build-1:app/log --offset 1000000 --length 64K")]
pub(crate) struct CatArgs {
    /// NODE:WORKSPACE/path
    #[arg(value_name = "NODE:PATH")]
    target: OsString,
    /// Begin at this byte
    #[arg(long, default_value_t = 0, value_name = "BYTE")]
    offset: u64,
    /// At most so much, such as 4096, 64K, 1M
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    length: Option<u64>,
}

pub(crate) async fn cat(global: &Global, args: CatArgs) -> Result<(), CliError> {
    let target = Target::parse(args.target)?;
    let read = v1::ReadFile { offset: args.offset, length: args.length.unwrap_or(0) };
    let action = file_request::Action::Read(read);
    let mut conversation = Conversation::look(global, target, action).await?;
    let mut stdout = tokio::io::stdout();
    let (mut hasher, mut bytes) = (blake3::Hasher::new(), 0);
    let done = loop {
        match conversation.next().await? {
            file_down::Frame::Data(piece) => {
                let length = piece.data.len() as u64;
                stdout.write_all(&piece.data).await?;
                hasher.update(&piece.data);
                bytes += length;
                conversation.taken(length).await;
            }
            file_down::Frame::Done(done) => break done,
            file_down::Frame::Entries(_) | file_down::Frame::Credit(_) => {}
        }
    };
    stdout.flush().await?;
    let name = &conversation.shown;
    if done.bytes != bytes || done.hash.as_ref() != hasher.finalize().as_bytes() {
        let text = format!("the content of {name} did not arrive as the node read it");
        return Err(CliError::new(Exit::Failed, text).hint("repeat the command"));
    }
    if done.changed {
        let text = format!("{name} changed while it was read: this may be no version of it");
        return Err(CliError::new(Exit::Failed, text).hint("repeat the command"));
    }
    Ok(())
}
