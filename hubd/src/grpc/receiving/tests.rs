use std::collections::VecDeque;
use std::convert::Infallible;
use std::future::poll_fn;

use cortex_shared::ids::{MeshId, NodeId};
use cortex_shared::peer::{Holder, PeerIdentity};

use super::*;

/// A body that arrives in these pieces.
struct Pieces(VecDeque<Bytes>);

impl HttpBody for Pieces {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        Poll::Ready(self.0.pop_front().map(|piece| Ok(Frame::data(piece))))
    }
}

fn messages(sizes: &[usize]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for size in sizes {
        bytes.push(0);
        bytes.extend(u32::try_from(*size).unwrap().to_be_bytes());
        bytes.resize(bytes.len() + size, 7);
    }
    bytes
}

fn charge(layer: &ReceivingLayer, key: u8) -> Arc<Charge> {
    let (layer, bytes) = (layer.clone(), AtomicUsize::new(0));
    Arc::new(Charge { layer, key: [key; 32], bytes })
}

fn arriving(charge: &Arc<Charge>, bytes: &[u8], piece: usize) -> Measured {
    let pieces = bytes.chunks(piece).map(Bytes::copy_from_slice).collect();
    let (charge, arriving) = (Arc::clone(charge), Arriving::default());
    Measured { body: Body::new(Pieces(pieces)), charge, arriving }
}

async fn next(body: &mut Measured) -> Option<Result<Frame<Bytes>, Status>> {
    poll_fn(|context| Pin::new(&mut *body).poll_frame(context)).await
}

#[tokio::test]
async fn a_call_counts_as_its_largest_message_however_it_arrives() {
    const SIZES: [usize; 7] = [20_000, 3, SMALL_BYTES, 0, 30_000, SMALL_BYTES + 1, 1];
    let bytes = messages(&SIZES);
    for piece in [1, 4, 7, 1_000, 19_999, 20_000, 20_005, 25_000, bytes.len()] {
        let layer = ReceivingLayer::default();
        let charge = charge(&layer, 1);
        let mut body = arriving(&charge, &bytes, piece);
        let mut came = 0;
        while let Some(frame) = next(&mut body).await {
            came += frame.unwrap().into_data().unwrap().len();
            let expected = match came {
                0..5 => 0,
                5..36_412 => 20_000,
                _ => 30_000,
            };
            let held = layer.held().get(&[1; 32]).copied().unwrap_or_default();
            assert_eq!(held, expected, "{came} bytes in pieces of {piece}");
        }
        drop(body);
        assert_eq!(layer.held()[&[1; 32]], 30_000, "its call is not answered");
        drop(charge);
        assert!(layer.held().is_empty(), "nobody is remembered");
    }
}

#[tokio::test]
async fn who_begins_more_than_his_share_is_refused_and_what_he_began_goes_on() {
    let layer = ReceivingLayer { each: 50_000, ..ReceivingLayer::default() };
    let bytes = messages(&[20_000, 20_000]);
    let begin = |key| arriving(&charge(&layer, key), &bytes, 10_000);
    let (mut first, mut second, mut third, mut other) = (begin(1), begin(1), begin(1), begin(2));
    next(&mut first).await.unwrap().unwrap();
    next(&mut second).await.unwrap().unwrap();
    let refused = next(&mut third).await.unwrap().unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted);
    next(&mut other).await.unwrap().unwrap();
    while let Some(frame) = next(&mut first).await {
        frame.unwrap();
    }
    drop((first, second, third, other));
    assert!(layer.held().is_empty());
}

#[tokio::test]
async fn a_call_counts_until_its_answer_begins_and_only_those_of_sync_do() {
    let identity = PeerIdentity { mesh: MeshId::new(), holder: Holder::Node(NodeId::new()) };
    let peer = Peer::Certified {
        address: "127.0.0.1:1".parse().unwrap(),
        identity,
        key: [1; 32],
        not_after_ms: i64::MAX,
        generation: None,
        certificate: Bytes::new(),
    };
    for (method, counted) in [("Sync/Commit", 20_000), ("Node/Link", 0)] {
        let layer = ReceivingLayer::default();
        let (answer, answered) = tokio::sync::oneshot::channel::<()>();
        let mut answered = Some(answered);
        let mut service = layer.layer(tower::service_fn(|request: Request<Body>| {
            let answered = answered.take().unwrap();
            async move {
                let mut body = request.into_body();
                while poll_fn(|context| Pin::new(&mut body).poll_frame(context)).await.is_some() {}
                drop(body);
                answered.await.unwrap();
                Ok::<_, Infallible>(Response::new(Body::empty()))
            }
        }));
        let request = Request::post(format!("http://hub/cortex.v1.{method}"))
            .extension(peer.clone())
            .body(Body::new(Pieces([messages(&[20_000]).into()].into())))
            .unwrap();
        let mut call = service.call(request);
        assert!(futures_util::poll!(&mut call).is_pending());
        assert_eq!(layer.held().get(&[1; 32]).copied().unwrap_or_default(), counted, "{method}");
        answer.send(()).unwrap();
        call.await.unwrap();
        assert!(layer.held().is_empty(), "{method}");
    }
}
