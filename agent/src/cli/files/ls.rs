//! `ls`: what is in a directory of a workspace.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt as _;

use clap::Args;
use cortex_proto::v1::{self, file_down, file_request};

use super::view::{FileView, HEADING, row, shown};
use super::{Conversation, Target};
use crate::cli::error::CliError;
use crate::cli::printer::{ColorWhen, Format, complain};
use crate::cli::{Global, Output};

/// List a directory of a workspace on a node
#[derive(Debug, Args)]
#[command(after_help = "\
Sorted by name. Names that are no text, or would play with the terminal, are written out (\\n, \\xff); in
JSON, such a name has its bytes in name_hex.

Examples:
  cortex-agent ls build-1:app
  cortex-agent ls build-1:app/src -o jsonl
  cortex-agent ls build-1:app/data --limit 1000 --after file-1000")]
pub(crate) struct LsArgs {
    /// NODE:WORKSPACE/path
    #[arg(value_name = "NODE:PATH")]
    target: OsString,
    /// At most so many names; 0 for all
    #[arg(long, default_value_t = 0, value_name = "N")]
    limit: u64,
    /// Only names after this one
    #[arg(long, value_name = "NAME")]
    after: Option<OsString>,
    #[command(flatten)]
    output: Output,
}

pub(crate) async fn ls(global: &Global, args: LsArgs) -> Result<(), CliError> {
    let LsArgs { target, limit, after, output } = args;
    let target = Target::parse(target)?;
    let after = after.map(|name| name.into_vec().into()).unwrap_or_default();
    let action = file_request::Action::List(v1::ListFiles { after, limit });
    let mut conversation = Conversation::look(global, target, action).await?;
    let mut printer = global.printer(output);
    let (mut count, mut last) = (0, bytes::Bytes::new());
    let more = loop {
        match conversation.next().await? {
            file_down::Frame::Entries(entries) => {
                if output.format == Format::Table {
                    let heading = if count == 0 { HEADING } else { "" };
                    let rows: String = entries.entries.iter().map(row).collect();
                    printer.raw(format!("{heading}{rows}").as_bytes())?;
                    count += entries.entries.len();
                } else {
                    for entry in &entries.entries {
                        printer.item(count, &FileView::from(entry))?;
                        count += 1;
                    }
                }
                if let Some(entry) = entries.entries.last() {
                    last = entry.name.clone();
                }
                conversation.taken_entries(&entries).await;
            }
            file_down::Frame::Done(done) => break done.more,
            file_down::Frame::Data(_) | file_down::Frame::Credit(_) => {}
        }
    };
    printer.end_items(count)?;
    if more {
        let text = format!("note: there are more; go on with --after '{}'", shown(&last));
        complain(&text, ColorWhen::Auto);
    }
    Ok(())
}
