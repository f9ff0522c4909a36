//! What an emulated node does with a command: nothing but the protocol, since a thousand real shells on
//! one machine would measure the shell.

use bytes::Bytes;
use cortex_proto::v1;
use cortex_proto::v1::node_client::NodeClient;
use cortex_proto::v1::{task_io_down, task_io_up};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::Status;
use tonic::transport::Channel;

/// The command that writes as fast as it may until it is cancelled; any other ends at once.
pub(super) const FLOOD: &str = "flood";
/// Frames on their way to HTTP/2.
const FRAMES: usize = 16;
/// Output in one frame, as the agent cuts it.
const PIECE: Bytes = Bytes::from_static(&[b'y'; 64 * 1024]);

/// Carries a command out, over a stream of its own. Ends with it, or with the session.
pub(super) async fn carry_out(
    mut client: NodeClient<Channel>,
    start: v1::StartTask,
    cancel: CancellationToken,
) -> Result<(), Status> {
    let (up, frames) = mpsc::channel(FRAMES);
    let hello = v1::TaskIoHello { task_id: start.task_id, ..v1::TaskIoHello::default() };
    send(&up, task_io_up::Frame::Hello(hello)).await?;
    let mut down = client.task_io(ReceiverStream::new(frames)).await?.into_inner();
    let started = v1::TaskStarted { mode: v1::Mode::Strict.into(), process_id: 1 };
    send(&up, task_io_up::Frame::Started(started)).await?;
    let floods = start.spec.is_some_and(|spec| spec.argv.first().is_some_and(|a| a == FLOOD));
    let (mut offset, mut credit, mut hasher) = (0, start.initial_credit, blake3::Hasher::new());
    while floods && !cancel.is_cancelled() {
        if credit == 0 {
            tokio::select! {
                () = cancel.cancelled() => {}
                frame = down.message() => match frame?.map(|frame| frame.frame) {
                    Some(Some(task_io_down::Frame::Credit(more))) => credit += more.bytes,
                    Some(_) => {}
                    None => return Ok(()),
                },
            }
            continue;
        }
        let length = usize::try_from(credit).unwrap_or(usize::MAX).min(PIECE.len());
        let data = PIECE.slice(..length);
        hasher.update(&data);
        let output =
            v1::Output { stream: v1::OutputStream::Stdout.into(), offset, data: data.clone() };
        send(&up, task_io_up::Frame::Output(output)).await?;
        (offset, credit) = (offset + data.len() as u64, credit - data.len() as u64);
    }
    let verdict = if floods { v1::TaskVerdict::Cancelled } else { v1::TaskVerdict::Exited };
    let empty = *blake3::hash(b"").as_bytes();
    let exit = v1::TaskExit {
        verdict: verdict.into(),
        exit_code: if floods { 143 } else { 0 },
        stdout_bytes: offset,
        stdout_hash: Bytes::copy_from_slice(hasher.finalize().as_bytes()),
        stderr_hash: Bytes::copy_from_slice(&empty),
        ..v1::TaskExit::default()
    };
    send(&up, task_io_up::Frame::Exit(exit)).await?;
    drop(up);
    while down.message().await?.is_some() {}
    Ok(())
}

async fn send(up: &mpsc::Sender<v1::TaskIoUp>, frame: task_io_up::Frame) -> Result<(), Status> {
    let frame = v1::TaskIoUp { frame: Some(frame) };
    up.send(frame).await.map_err(|_| Status::unavailable("the session ended"))
}
