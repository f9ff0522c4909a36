//! `history`: what the commands of a node wrote last.

use std::collections::HashMap;

use clap::Args;
use cortex_proto::v1;
use tokio::io::AsyncWriteExt as _;

use super::error::CliError;
use super::persist::Persistence;
use super::printer::{ColorWhen, complain};
use super::{Global, hub};

/// Streams whose escape sequences are followed at the same time.
const MAX_STREAMS: usize = 64;

/// What the commands of a node wrote last, also before restarts of node and hub
#[derive(Debug, Args)]
#[command(after_help = "\
The hub keeps the latest output of each node, of all its commands together, in the order it came. What
was not kept is said on standard error.

Example:
  cortex-agent history build-1 --lines 100 -f")]
pub(crate) struct HistoryArgs {
    /// Name of the node, or a unique prefix of its id
    node: String,
    /// Only this many lines from the end; 0 for all
    #[arg(long, default_value_t = 0, value_name = "N")]
    lines: u32,
    /// Go on with what comes
    #[arg(short = 'f', long)]
    follow: bool,
    /// Byte for byte, with the escape sequences of terminals
    #[arg(long)]
    raw: bool,
}

pub(crate) async fn history(global: &Global, args: HistoryArgs) -> Result<(), CliError> {
    let HistoryArgs { node, lines, follow, raw } = args;
    let mut client = hub::operator(global).await?;
    let mut request = v1::ReadHistoryRequest { node, lines, follow, after_seq: 0 };
    let mut persistence = Persistence::default();
    let mut stdout = tokio::io::stdout();
    // A sequence may be cut in two by the end of a piece.
    let mut strips: HashMap<(bytes::Bytes, i32), anstream::adapter::StripBytes> = HashMap::new();
    let mut pieces = None;
    loop {
        let piece = match &mut pieces {
            None => client.read_history(request.clone()).await.map(|answer| {
                pieces = Some(answer.into_inner());
                None
            }),
            Some(open) => match open.message().await {
                Ok(None) => return Ok(()),
                other => other,
            },
        };
        let piece = match piece {
            Ok(Some(piece)) => piece,
            Ok(None) => {
                persistence.arrived();
                continue;
            }
            Err(status) => {
                persistence.pause(status).await?;
                pieces = None;
                continue;
            }
        };
        request.after_seq = piece.seq;
        if piece.skipped_bytes > 0 {
            let text = format!("note: {} bytes were not kept here", piece.skipped_bytes);
            complain(&text, ColorWhen::Auto);
        }
        if raw {
            stdout.write_all(&piece.data).await?;
        } else {
            if strips.len() > MAX_STREAMS {
                strips.clear();
            }
            let strip = strips.entry((piece.task_id.clone(), piece.stream)).or_default();
            for part in strip.strip_next(&piece.data) {
                stdout.write_all(part).await?;
            }
        }
        stdout.flush().await?;
    }
}
