//! Replacing the certificate authority, with members who follow and others who do not.

use cortex_proto::v1;
use cortex_proto::v1::node_client::NodeClient;
use rustls_pki_types::CertificateDer;
use tonic::{Code, Status};

use super::authority::audit;
use super::support::{Login, TestHub, TestNode, word};
use super::*;

async fn rotate(hub: &TestHub, stage: &str, force: bool) -> Result<v1::CaStatusResponse, Status> {
    let request = v1::RotateCaRequest { stage: stage.into(), force };
    hub.local().await.rotate_ca(request).await.map(tonic::Response::into_inner)
}

async fn who_am_i(
    hub: &TestHub,
    believing: &[CertificateDer<'static>],
    login: &Login,
) -> Option<v1::WhoAmIResponse> {
    let channel = hub.channel_believing(believing, Some(login)).await.ok()?;
    let mut client = v1::operator_client::OperatorClient::new(channel);
    client.who_am_i(v1::WhoAmIRequest {}).await.ok().map(tonic::Response::into_inner)
}

/// Whether a node that believes these authorities can begin a session.
async fn connects(hub: &TestHub, believing: &[CertificateDer<'static>], node: &TestNode) -> bool {
    match hub.channel_believing(believing, Some(&node.login)).await {
        Err(_) => false,
        Ok(_) => node.connect(hub).await.is_ok(),
    }
}

fn authorities(ders: &[bytes::Bytes]) -> Vec<CertificateDer<'static>> {
    ders.iter().map(|der| CertificateDer::from(der.to_vec())).collect()
}

#[tokio::test]
async fn the_authority_is_replaced_while_one_follows_and_one_is_away() {
    let hub = TestHub::start().await;
    let (node, away) = (hub.join("here", &[]).await, hub.join("away", &[]).await);
    let session = node.connect(&hub).await.unwrap();
    let ann = hub.login("ann", "admin").await;
    let old = vec![hub.authority()];
    assert!(who_am_i(&hub, &old, &ann).await.unwrap().certificate_der.is_empty());
    let early = rotate(&hub, "retire", false).await.unwrap();
    assert_eq!((early.stage.as_str(), early.nodes_moved), ("single", 2), "nothing to retire");
    assert_eq!(word(&rotate(&hub, "issue", false).await.unwrap_err()), "out_of_order");
    assert_eq!(rotate(&hub, "x", false).await.unwrap_err().code(), Code::InvalidArgument);

    let prepared = rotate(&hub, "prepare", false).await.unwrap();
    assert_eq!((prepared.stage.as_str(), prepared.nodes_moved), ("prepared", 2));
    // Heard of over a new session, in a renewal, and by an operator that asks.
    let told = node.connect(&hub).await.unwrap().welcome;
    let both = authorities(&told.trusted_cas_der);
    assert_eq!((both.len(), told.renew_now), (2, false));
    assert_eq!(both[0], old[0]);
    let me = who_am_i(&hub, &old, &ann).await.unwrap();
    assert_eq!(authorities(&me.trusted_cas_der), both);
    assert!(me.certificate_der.is_empty());

    let hub = hub.restart().await;
    let issuing = rotate(&hub, "issue", false).await.unwrap();
    assert_eq!((issuing.stage.as_str(), issuing.nodes_moved), ("issuing", 0));
    assert_eq!(issuing.other_pin, prepared.current_pin);
    assert_eq!(issuing.nodes_not_moved, ["away", "here"]);
    drop(session);
    assert!(node.connect(&hub).await.unwrap().welcome.renew_now);
    let moved = node.renew(&hub).await.unwrap();
    assert!(!moved.connect(&hub).await.unwrap().welcome.renew_now);
    let signed_anew = who_am_i(&hub, &old, &ann).await.unwrap().certificate_der;
    let moved_ann = Login::new(&signed_anew, ann.key.clone());
    let me = who_am_i(&hub, &old, &moved_ann).await.unwrap();
    assert!(me.certificate_der.is_empty(), "it is signed by the new one");
    let until = |me: &v1::WhoAmIResponse| me.certificate_not_after_ms / 1000;
    assert_eq!(until(&me), until(&who_am_i(&hub, &old, &ann).await.unwrap()), "no longer life");

    let refused = rotate(&hub, "trust-only", false).await.unwrap_err();
    assert_eq!((word(&refused), refused.code()), ("nodes_not_moved", Code::FailedPrecondition));
    assert!(refused.message().contains("1 of 2 nodes") && refused.message().contains("away"));
    rotate(&hub, "trust-only", true).await.unwrap();
    let hub = hub.restart().await;
    let next = vec![hub.authority()];
    assert_ne!(next, old);
    // Whoever knows both believes the hub; certificates of the old authority still count.
    assert!(connects(&hub, &both, &moved).await);
    assert!(connects(&hub, &both, &away).await);
    assert!(who_am_i(&hub, &both, &ann).await.is_some());
    assert!(!connects(&hub, &old, &away).await, "it has heard of nothing");

    assert_eq!(word(&rotate(&hub, "retire", false).await.unwrap_err()), "nodes_not_moved");
    let retired = rotate(&hub, "retire", true).await.unwrap();
    assert_eq!((retired.stage.as_str(), retired.other_pin.as_str()), ("single", ""));
    assert_eq!((retired.nodes_moved, retired.nodes_total), (1, 2));
    assert!(connects(&hub, &next, &moved).await);
    assert!(!connects(&hub, &next, &away).await, "the old one's certificates count no more");
    assert!(who_am_i(&hub, &next, &moved_ann).await.is_some());
    assert!(who_am_i(&hub, &next, &ann).await.is_none());
    // Whoever believes the hub still has its key.
    let recovered = away.recover(&hub).await.unwrap();
    assert!(connects(&hub, &next, &recovered).await);
    let status = hub.local().await.ca_status(v1::CaStatusRequest {}).await.unwrap().into_inner();
    assert_eq!((status.nodes_moved, status.nodes_total), (2, 2));
    let steps: Vec<String> = audit(&hub)
        .await
        .1
        .iter()
        .filter(|l| l.action == "ca.rotated")
        .map(|l| {
            let detail: serde_json::Value = serde_json::from_str(&l.detail).unwrap();
            format!("{} {}", detail["step"].as_str().unwrap(), detail["forced"])
        })
        .collect();
    assert_eq!(steps, ["prepare false", "issue false", "trust-only true", "retire true"]);
    hub.hub.shutdown().await;
}

#[tokio::test]
async fn a_revoked_node_holds_up_nothing_and_a_session_outlives_all_steps() {
    let hub = TestHub::start().await;
    let (node, gone) = (hub.join("here", &[]).await, hub.join("gone", &[]).await);
    let mut session = node.connect(&hub).await.unwrap();
    let revoke = v1::RevokeNodeRequest { node: "gone".into(), reason: String::new() };
    hub.local().await.revoke_node(revoke).await.unwrap();
    rotate(&hub, "prepare", false).await.unwrap();
    rotate(&hub, "issue", false).await.unwrap();
    // Over the connection that was made with a certificate of the old one.
    let answer = node.renew(&hub).await.unwrap();
    for stage in ["trust-only", "retire"] {
        let status = rotate(&hub, stage, false).await.unwrap();
        assert_eq!((status.nodes_moved, status.nodes_total), (1, 1));
    }
    let beat = v1::NodeFrame { frame: Some(v1::node_frame::Frame::Heartbeat(v1::Heartbeat {})) };
    session.up.send(beat).await.unwrap();
    let answered = |frame| matches!(frame, hub_frame::Frame::Heartbeat(_)).then_some(());
    session.until(answered).await.expect("the session goes on");
    let channel = hub.channel(Some(&answer.login)).await.unwrap();
    let attach = v1::RequestAttachRequest { workspace: "w".into() };
    let refused = NodeClient::new(channel).request_attach(attach).await.unwrap_err();
    assert_eq!(word(&refused), "not_a_member");
    assert!(!connects(&hub, &[hub.authority()], &gone).await);
    hub.hub.shutdown().await;
}
