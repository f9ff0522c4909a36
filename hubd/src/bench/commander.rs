//! An operator that runs commands and reads what they write.

use std::time::Duration;

use cortex_proto::DEFAULT_OUTPUT_CREDIT;
use cortex_proto::v1;
use cortex_proto::v1::operator_client::OperatorClient;
use cortex_proto::v1::{exec_down, exec_up};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::Code;
use tonic::transport::Channel;

use super::BenchError;

/// Output that was dealt with is granted again in portions of this size.
const GRANT_BYTES: u64 = 256 * 1024;

/// What the caller does with output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reading {
    /// Takes it as it comes.
    All,
    /// Stands still: the first window is never granted anew.
    Nothing,
}

/// What became of a command.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ran {
    /// Bytes of output that came.
    pub(super) bytes: u64,
    /// From the call to the exit.
    pub(super) took: Duration,
}

/// Runs a command on a node to its end, or until `cancel`, which ends it.
pub(super) async fn run(
    mut client: OperatorClient<Channel>,
    node: &str,
    command: &'static str,
    reading: Reading,
    cancel: &CancellationToken,
) -> Result<Ran, BenchError> {
    let begun = Instant::now();
    let (up, frames) = mpsc::channel(8);
    let spec = v1::TaskSpec { argv: vec![command.into()], ..v1::TaskSpec::default() };
    let start = v1::ExecStart {
        node: node.to_owned(),
        spec: Some(spec),
        initial_credit: DEFAULT_OUTPUT_CREDIT,
        ..v1::ExecStart::default()
    };
    say(&up, exec_up::Frame::Start(start)).await;
    let mut down = client.exec(ReceiverStream::new(frames)).await?.into_inner();
    let (mut bytes, mut dealt_with, mut cancelled) = (0, 0, false);
    loop {
        let frame = tokio::select! {
            frame = down.message() => frame?,
            () = cancel.cancelled(), if !cancelled => {
                cancelled = true;
                let cancel = v1::ExecCancel { signal: 15, grace_ms: 1000 };
                say(&up, exec_up::Frame::Cancel(cancel)).await;
                continue;
            }
        };
        match frame.ok_or(BenchError::SessionLost)?.frame {
            Some(exec_down::Frame::Output(output)) => {
                bytes += output.data.len() as u64;
                dealt_with += output.data.len() as u64;
                if reading == Reading::All && dealt_with >= GRANT_BYTES {
                    let credit = v1::Credit { bytes: std::mem::take(&mut dealt_with) };
                    say(&up, exec_up::Frame::Credit(credit)).await;
                }
            }
            Some(exec_down::Frame::Exit(exit)) => {
                let ended = match exit.verdict() {
                    v1::TaskVerdict::Exited => exit.exit_code == 0,
                    v1::TaskVerdict::Cancelled => cancelled,
                    _ => false,
                };
                // Of a command that nobody reads the rest is given up.
                let whole = exit.stdout_bytes == bytes || reading == Reading::Nothing;
                if ended && whole {
                    return Ok(Ran { bytes, took: begun.elapsed() });
                }
                let text = format!("{:?}, {bytes} bytes: {}", exit.verdict(), exit.reason);
                return Err(tonic::Status::new(Code::Internal, text).into());
            }
            _ => {}
        }
    }
}

/// Says something to the hub; if it listens no longer, what it said last is on its way down.
async fn say(up: &mpsc::Sender<v1::ExecUp>, frame: exec_up::Frame) {
    up.send(v1::ExecUp { frame: Some(frame) }).await.ok();
}
