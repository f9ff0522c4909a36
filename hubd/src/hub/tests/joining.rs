//! Attempts to join, and nodes whose commands run by hand.

use bytes::Bytes;
use cortex_proto::v1;
use cortex_proto::v1::enroll_client::EnrollClient;
use cortex_proto::v1::{hub_frame, node_frame, task_io_up};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tonic::Status;
use tonic::transport::Channel;

use super::support::{Running, TestHub, TestSession, request, word};
use super::*;

/// When the hub says to come back.
pub(super) fn retry_after_ms(status: &Status) -> u64 {
    let value = status.metadata().get(cortex_proto::RETRY_AFTER_TRAILER).expect("says when");
    value.to_str().unwrap().parse().unwrap()
}

/// One key that wants to be a node.
pub(super) struct Attempt {
    channel: Channel,
    request: v1::JoinNodeRequest,
    under_way: JoinHandle<Result<v1::JoinNodeResponse, Status>>,
}

impl TestHub {
    /// A token that admits nodes.
    pub(super) async fn invite(&self, invite: v1::CreateInviteRequest) -> String {
        self.local().await.create_invite(invite).await.unwrap().into_inner().token
    }

    /// Begins to join, over a connection of its own.
    pub(super) async fn begin_join(&self, token: &str) -> Attempt {
        let (_, csr_der) = request();
        let request = v1::JoinNodeRequest {
            token: token.into(),
            csr_der: csr_der.into(),
            hostname: "crowd".into(),
            ..Default::default()
        };
        self.join_again(request).await
    }

    /// Repeats a request to join, over another connection.
    pub(super) async fn join_again(&self, request: v1::JoinNodeRequest) -> Attempt {
        let channel = self.channel(None).await.unwrap();
        let under_way = tokio::spawn(join(channel.clone(), request.clone()));
        Attempt { channel, request, under_way }
    }
}

async fn join(
    channel: Channel,
    request: v1::JoinNodeRequest,
) -> Result<v1::JoinNodeResponse, Status> {
    Ok(EnrollClient::new(channel).join_node(request).await?.into_inner())
}

impl Attempt {
    /// What the first call comes to.
    pub(super) async fn first(&mut self) -> Result<v1::JoinNodeResponse, Status> {
        (&mut self.under_way).await.unwrap()
    }

    /// Cuts the connection, whatever the hub is about; returns what was asked.
    pub(super) async fn hang_up(self) -> v1::JoinNodeRequest {
        self.under_way.abort();
        assert!(self.under_way.await.is_err());
        self.request
    }

    /// Repeats the call until it succeeds.
    pub(super) async fn again_until_joined(&self) -> v1::JoinNodeResponse {
        loop {
            match join(self.channel.clone(), self.request.clone()).await {
                Ok(joined) => return joined,
                // Those who hold the places are about to leave them.
                Err(status) if matches!(word(&status), "busy" | "store_slow") => {}
                Err(status) => panic!("{status:?}"),
            }
        }
    }
}

/// The node's side of a command.
pub(super) struct TestTask {
    up: mpsc::Sender<v1::TaskIoUp>,
    /// Its stream ends with it.
    _down: tonic::Streaming<v1::TaskIoDown>,
}

impl TestSession {
    /// Sends a heartbeat and waits for the answer.
    pub(super) async fn heartbeat(&mut self) {
        let heartbeat = node_frame::Frame::Heartbeat(v1::Heartbeat {});
        self.up.send(v1::NodeFrame { frame: Some(heartbeat) }).await.unwrap();
        let answered =
            self.until(|frame| matches!(frame, hub_frame::Frame::Heartbeat(_)).then_some(()));
        answered.await.expect("the session goes on");
    }

    /// Takes the next command and opens its stream.
    pub(super) async fn attach_task(&mut self) -> TestTask {
        let task_id = self.start_task().await.task_id;
        let (up, receiver) = mpsc::channel(8);
        let hello = task_io_up::Frame::Hello(v1::TaskIoHello { task_id, ..Default::default() });
        up.send(v1::TaskIoUp { frame: Some(hello) }).await.unwrap();
        let down = self.client.task_io(ReceiverStream::new(receiver)).await.unwrap().into_inner();
        TestTask { up, _down: down }
    }
}

impl TestTask {
    async fn send(&self, frame: task_io_up::Frame) {
        self.up.send(v1::TaskIoUp { frame: Some(frame) }).await.unwrap();
    }

    /// The command writes.
    pub(super) async fn output(&self, offset: u64, data: &'static [u8]) {
        let data = Bytes::from_static(data);
        let stream = v1::OutputStream::Stdout.into();
        self.send(task_io_up::Frame::Output(v1::Output { stream, offset, data })).await;
    }

    /// The command ends. By the hash of its output it is the node's word.
    pub(super) async fn exit(&self) {
        let (verdict, stdout_hash) = (v1::TaskVerdict::Exited.into(), vec![7; 32].into());
        let exit = v1::TaskExit { verdict, stdout_hash, ..Default::default() };
        self.send(task_io_up::Frame::Exit(exit)).await;
    }
}

impl Running {
    /// The next piece of output is this one.
    pub(super) async fn reads(&mut self, offset: u64, data: &[u8]) {
        let frame = self.output.message().await.unwrap().and_then(|down| down.frame);
        let Some(v1::exec_down::Frame::Output(output)) = frame else { panic!("{frame:?}") };
        assert_eq!((output.offset, &output.data[..]), (offset, data));
    }
}
