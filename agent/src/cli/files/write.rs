//! `write`: replaces a file of a workspace as a whole.

use std::ffi::OsString;
use std::path::PathBuf;

use bytes::{Bytes, BytesMut};
use clap::Args;
use cortex_proto::v1::{self, file_down, file_request, file_up};
use cortex_proto::{FILE_WINDOW_BYTES, MAX_OUTPUT_FRAME_BYTES};
use cortex_shared::text::hex;
use serde::Serialize;
use tokio::io::{AsyncRead, AsyncReadExt as _};

use super::{Conversation, Target, frame};
use crate::cli::error::{CliError, Exit};
use crate::cli::printer::size;
use crate::cli::{Global, Output};

/// Write a file of a workspace on a node
#[derive(Debug, Args)]
#[command(after_help = "\
What arrives is put together beside the workspace and takes the file's place in one step, once it is
on the node's disk: success means that it is there to stay, and whoever reads the file sees the old content
or the new. A write that is cut off changes nothing. Directories above it must exist.

Git directories and names that editors, shells and agents obey (.git, .vscode, .envrc and others at the
top of a workspace) cannot be written, as a command in strict mode cannot.

Examples:
  echo hello | cortex-agent write build-1:app/greeting
  cortex-agent write build-1:app/run.sh --from run.sh --mode 755
  cortex-agent write build-1:app/config --from new --if-hash $(cortex-agent stat build-1:app/config -o json | jq -r .hash)

Exit codes: 7 if the file is not what --if-hash or --if-absent says.")]
pub(crate) struct WriteArgs {
    /// NODE:WORKSPACE/path
    #[arg(value_name = "NODE:PATH")]
    target: OsString,
    /// The file with the content; - for standard input
    #[arg(long, default_value = "-", value_name = "FILE")]
    from: PathBuf,
    /// Only if the content is the one with this BLAKE3
    #[arg(long, value_name = "HASH", value_parser = parse_hash, conflicts_with = "if_absent")]
    if_hash: Option<Hash>,
    /// Only if there is no such file
    #[arg(long)]
    if_absent: bool,
    /// Permission bits, in octal; otherwise those of the file that is replaced
    #[arg(long, value_name = "MODE", value_parser = parse_mode)]
    mode: Option<u32>,
    #[command(flatten)]
    output: Output,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Hash(Bytes);

fn parse_hash(text: &str) -> Result<Hash, String> {
    let digits = text.as_bytes().chunks(2).map(|pair| {
        let pair = std::str::from_utf8(pair).ok()?;
        // `from_str_radix` takes a sign.
        let plain = pair.len() == 2 && pair.bytes().all(|digit| digit.is_ascii_hexdigit());
        plain.then(|| u8::from_str_radix(pair, 16).ok()).flatten()
    });
    digits
        .collect::<Option<Vec<u8>>>()
        .filter(|bytes| bytes.len() == 32)
        .map(|bytes| Hash(bytes.into()))
        .ok_or_else(|| "a hash is 64 hexadecimal digits".to_owned())
}

fn parse_mode(text: &str) -> Result<u32, String> {
    let plain = !text.is_empty() && text.bytes().all(|digit| digit.is_ascii_digit());
    let mode = plain.then(|| u32::from_str_radix(text, 8).ok()).flatten();
    mode.filter(|mode| *mode <= 0o777)
        .ok_or_else(|| "permission bits are octal, from 0 to 777".to_owned())
}

#[derive(Serialize)]
struct Written {
    target: String,
    bytes: u64,
    hash: String,
}

pub(crate) async fn write(global: &Global, args: WriteArgs) -> Result<(), CliError> {
    let target = Target::parse(args.target)?;
    // Before anything is asked for.
    let source: Box<dyn AsyncRead + Unpin + Send> = if args.from.as_os_str() == "-" {
        Box::new(tokio::io::stdin())
    } else {
        let file = tokio::fs::File::open(&args.from).await;
        Box::new(file.map_err(|error| unreadable(&args.from).because(error))?)
    };
    let wanted = v1::WriteFile {
        expected_hash: args.if_hash.map(|hash| hash.0).unwrap_or_default(),
        must_be_absent: args.if_absent,
        mode: args.mode.unwrap_or_default(),
        has_mode: args.mode.is_some(),
    };
    let action = file_request::Action::Write(wanted);
    let mut conversation = Conversation::change(global, target, action).await?;
    let done = send(&mut conversation, source)
        .await
        .map_err(|error| error.unwrap_or_else(|source| unreadable(&args.from).because(source)))?;
    let (bytes, hash) = (done.bytes, hex(&done.hash));
    let target = conversation.shown;
    let sentence = format!("wrote {} to {target}\nhash {hash}", size(bytes));
    global.printer(args.output).say(&sentence, &Written { target, bytes, hash })
}

fn unreadable(path: &std::path::Path) -> CliError {
    CliError::new(Exit::Failed, format!("cannot read {}; nothing was written", path.display()))
}

/// Sends the content, and waits for the node to have it. The second kind of error is the source's.
async fn send(
    conversation: &mut Conversation,
    mut source: Box<dyn AsyncRead + Unpin + Send>,
) -> Result<v1::FileDone, Result<CliError, std::io::Error>> {
    let (mut hasher, mut total, mut window) = (blake3::Hasher::new(), 0, FILE_WINDOW_BYTES);
    let (mut piece, mut ended) = (BytesMut::new(), false);
    loop {
        let room = MAX_OUTPUT_FRAME_BYTES.min(usize::try_from(window).unwrap_or(usize::MAX));
        piece.reserve(MAX_OUTPUT_FRAME_BYTES);
        let up = conversation.up.clone();
        let mut reading = (&mut source).take(room as u64);
        tokio::select! {
            frame = conversation.next() => match frame.map_err(Ok)? {
                file_down::Frame::Credit(credit) => {
                    window = window.saturating_add(credit.bytes).min(FILE_WINDOW_BYTES);
                }
                file_down::Frame::Done(done) => {
                    if !ended || done.bytes != total || done.hash.as_ref() != hasher.finalize().as_bytes() {
                        let text = "the node has written something else than was sent";
                        return Err(Ok(CliError::new(Exit::Failed, text)));
                    }
                    return Ok(done);
                }
                file_down::Frame::Entries(_) | file_down::Frame::Data(_) => {}
            },
            read = reading.read_buf(&mut piece), if !ended && room > 0 => {
                let data = match read.map_err(Err)? {
                    0 => {
                        ended = true;
                        let hash = hasher.finalize().as_bytes().to_vec().into();
                        v1::FileData { data: Bytes::new(), end: true, total_bytes: total, hash }
                    }
                    length => {
                        let data = piece.split().freeze();
                        hasher.update(&data);
                        total += length as u64;
                        window -= length as u64;
                        v1::FileData { data, ..Default::default() }
                    }
                };
                // A stream that has ended says why when it is read.
                up.send(frame(file_up::Frame::Data(data))).await.ok();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hashes_and_modes_are_what_they_look_like() {
        assert_eq!(parse_hash(&"0a".repeat(32)).unwrap().0, vec![10; 32]);
        for bad in ["", "0a", &"0g".repeat(32), &"+1".repeat(32), &"ä".repeat(32)] {
            assert!(parse_hash(bad).is_err(), "{bad}");
        }
        assert_eq!((parse_mode("755"), parse_mode("0644")), (Ok(0o755), Ok(0o644)));
        for bad in ["", "4755", "8", "u+x", "-1", "+7"] {
            assert!(parse_mode(bad).is_err(), "{bad}");
        }
    }
}
