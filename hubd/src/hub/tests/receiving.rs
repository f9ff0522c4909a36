//! Messages that begin and never end, over real connections.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use cortex_proto::v1;
use cortex_proto::v1::sync_client::SyncClient;
use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use http::Request;
use http_body::Frame;
use tokio::time::timeout;
use tonic::body::Body;
use tonic::transport::Channel;
use tonic::{Code, Status};
use tower::ServiceExt as _;

use super::support::{TestHub, word};

/// A hang, which this only ends.
const HANG: Duration = Duration::from_secs(30);
/// Of the largest messages so many are within the bound for one certificate.
const FITS: usize = 51;

/// Says that the largest message comes, and nothing more.
struct Begun(Option<Bytes>);

impl http_body::Body for Begun {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        match self.0.take() {
            Some(prefix) => Poll::Ready(Some(Ok(Frame::data(prefix)))),
            None => Poll::Pending,
        }
    }
}

/// Begins a call; what it is refused with.
async fn begin(channel: Channel, method: &'static str) -> Status {
    let length = u32::try_from(cortex_proto::MAX_MESSAGE_BYTES).unwrap().to_be_bytes();
    let prefix: Vec<u8> = [0].into_iter().chain(length).collect();
    let request = Request::post(format!("http://hub/cortex.v1.Sync/{method}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(Body::new(Begun(Some(prefix.into()))))
        .unwrap();
    let mut answer = channel.oneshot(request).await.unwrap();
    if let Some(refused) = Status::from_header_map(answer.headers()) {
        return refused;
    }
    loop {
        let frame = std::future::poll_fn(|context| {
            http_body::Body::poll_frame(Pin::new(answer.body_mut()), context)
        });
        let frame = frame.await.expect("ends with a status").unwrap();
        if let Some(trailers) = frame.trailers_ref() {
            return Status::from_header_map(trailers).unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_begins_messages_without_end_is_refused_more_and_disturbs_nobody() {
    let hub = TestHub::start().await;
    let (node, other) = (hub.join("box", &[]).await, hub.join("other", &[]).await);
    let channel = hub.channel(Some(&node.login)).await.unwrap();
    let second = hub.channel(Some(&node.login)).await.unwrap();
    let others = hub.channel(Some(&other.login)).await.unwrap();

    let begun = |channel: &Channel, calls: usize| -> FuturesUnordered<_> {
        let methods = ["Commit", "PutPacks", "Have"].into_iter().cycle().take(calls);
        methods.map(|method| begin(channel.clone(), method)).collect()
    };
    let mut calls = begun(&channel, FITS + 9);
    let refused = async |calls: &mut FuturesUnordered<_>| -> Status {
        timeout(HANG, calls.next()).await.unwrap().unwrap()
    };
    for _ in 0..9 {
        let status = refused(&mut calls).await;
        assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
        assert_eq!(word(&status), "too_much_at_once");
    }
    assert_eq!(word(&refused(&mut begun(&second, 1)).await), "too_much_at_once");

    // Small messages go on, and so does everybody else.
    for channel in [channel, others.clone()] {
        let head = v1::HeadRequest { workspace_id: vec![7; 16].into(), known: None };
        let answer = timeout(HANG, SyncClient::new(channel).head(head)).await.unwrap();
        assert_ne!(word(&answer.unwrap_err()), "too_much_at_once");
    }
    let mut of_other = begun(&others, FITS + 1);
    assert_eq!(word(&refused(&mut of_other).await), "too_much_at_once");
    assert!(futures_util::poll!(calls.next()).is_pending(), "what was begun goes on");

    drop((calls, of_other));
    // The hub hears of that when it does.
    let free = async {
        let large =
            v1::HaveRequest { workspace_id: vec![7; 16].into(), chunks: vec![0; 64 * 1024].into() };
        while let Err(status) = SyncClient::new(second.clone()).have(large.clone()).await
            && word(&status) == "too_much_at_once"
        {}
    };
    timeout(HANG, free).await.unwrap();
    hub.hub.shutdown().await;
}
