//! A real TLS server on loopback shows different certificates; the client must believe only the
//! right one, and must not have sent anything when it does not.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use cortex_shared::ids::{MeshId, NodeId};
use cortex_shared::peer::{CaPin, HUB_SERVER_NAME, Holder, PeerIdentity};
use rcgen::{
    BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tokio::io::AsyncReadExt as _;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

use super::*;

struct Authority {
    mesh: MeshId,
    certificate: CertificateDer<'static>,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let certificate = params.self_signed(&key).unwrap().der().clone();
        Self { mesh: MeshId::new(), certificate, issuer: Issuer::new(params, key) }
    }

    fn pin(&self) -> CaPin {
        pin_of(&self.certificate).unwrap()
    }

    fn trust(&self) -> Trust {
        Trust::Authorities { certificates: vec![self.certificate.clone()], mesh: self.mesh }
    }

    fn issue(&self, change: impl FnOnce(&mut CertificateParams)) -> Shown {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec![HUB_SERVER_NAME.to_owned()]).unwrap();
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        params.subject_alt_names.push(holder(self.mesh, Holder::Hub));
        change(&mut params);
        let leaf = params.signed_by(&key, &self.issuer).unwrap();
        Shown {
            chain: vec![leaf.der().clone(), self.certificate.clone()],
            key: PrivateKeyDer::Pkcs8(key.serialize_der().into()),
        }
    }
}

struct Shown {
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
}

fn holder(mesh: MeshId, holder: Holder) -> SanType {
    SanType::URI(PeerIdentity { mesh, holder }.to_string().try_into().unwrap())
}

/// Serves one connection; the result is the application data that arrived, if TLS stood at all.
async fn serve_once(shown: Shown) -> (HubAddress, JoinHandle<Option<Vec<u8>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string().parse().unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(shown.chain, shown.key)
        .unwrap();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
    let served = tokio::spawn(async move {
        let (tcp, _) = listener.accept().await.unwrap();
        let mut tls = acceptor.accept(tcp).await.ok()?;
        let mut received = Vec::new();
        tls.read_to_end(&mut received).await.ok();
        Some(received)
    });
    (address, served)
}

async fn refusal(shown: Shown, trust: Trust) -> HubRefused {
    let (address, served) = serve_once(shown).await;
    let client = HubClient::new(address, trust, None).unwrap();
    let error = client.connect(Purpose::Control).await.unwrap_err();
    let ConnectError::HubRefused { source, .. } = error else { panic!("{error:?}") };
    assert_eq!(served.await.unwrap(), None, "the handshake must not have completed");
    source
}

#[tokio::test]
async fn right_pin_is_believed() {
    let authority = Authority::new();
    let (address, served) = serve_once(authority.issue(|_| {})).await;
    let other = Authority::new().pin();
    let trust = Trust::Pins(vec![other, authority.pin()]);
    HubClient::new(address, trust, None).unwrap().probe().await.unwrap();
    assert_eq!(served.await.unwrap(), Some(Vec::new()));
}

#[tokio::test]
async fn stored_authority_is_believed_and_http2_follows() {
    let authority = Authority::new();
    let (address, served) = serve_once(authority.issue(|_| {})).await;
    let client = HubClient::new(address, authority.trust(), None).unwrap();
    drop(client.connect(Purpose::Control).await);
    assert!(served.await.unwrap().unwrap().starts_with(b"PRI * HTTP/2.0"));
}

#[tokio::test]
async fn wrong_pin_ends_the_handshake_before_anything_is_sent_and_names_both_pins() {
    let (authority, expected) = (Authority::new(), Authority::new().pin());
    let shown = authority.pin();
    let refused = refusal(authority.issue(|_| {}), Trust::Pins(vec![expected])).await;
    assert_eq!(refused, HubRefused::Pin { expected: vec![expected], shown: Some(shown) });
    let text = refused.to_string();
    assert!(text.contains(&expected.to_string()) && text.contains(&shown.to_string()), "{text}");
}

#[tokio::test]
async fn showing_the_pinned_authority_is_not_enough_without_its_signature() {
    let (authority, impostor) = (Authority::new(), Authority::new());
    let mut shown = impostor.issue(|params| {
        params.subject_alt_names.pop();
        params.subject_alt_names.push(holder(authority.mesh, Holder::Hub));
    });
    shown.chain[1] = authority.certificate.clone();
    let refused = refusal(shown, Trust::Pins(vec![authority.pin()])).await;
    assert_eq!(refused, HubRefused::NotThisMesh);
}

#[tokio::test]
async fn hub_of_another_mesh_is_refused() {
    let refused = refusal(Authority::new().issue(|_| {}), Authority::new().trust()).await;
    assert_eq!(refused, HubRefused::NotThisMesh);
}

#[tokio::test]
async fn certificates_that_are_not_a_hubs_are_refused_though_the_authority_signed_them() {
    type Change = fn(MeshId, &mut CertificateParams);
    let cases: [(&str, Change); 6] = [
        ("a node's", |mesh, params| {
            params.subject_alt_names.pop();
            params.subject_alt_names.push(holder(mesh, Holder::Node(NodeId::new())));
        }),
        ("nobody's", |_, params| {
            params.subject_alt_names.pop();
        }),
        ("two holders'", |mesh, params| {
            params.subject_alt_names.push(holder(mesh, Holder::Node(NodeId::new())));
        }),
        ("another name's", |mesh, params| {
            params.subject_alt_names = vec![
                SanType::DnsName("example.org".try_into().unwrap()),
                holder(mesh, Holder::Hub),
            ];
        }),
        ("for clients", |_, params| {
            params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        }),
        ("for anything", |_, params| params.extended_key_usages.clear()),
    ];
    for (what, change) in cases {
        let authority = Authority::new();
        let shown = authority.issue(|params| change(authority.mesh, params));
        let refused = refusal(shown, authority.trust()).await;
        assert!(matches!(refused, HubRefused::NotAHub(_)), "{what}: {refused:?}");
    }
    let authority = Authority::new();
    let shown = authority.issue(|params| {
        params.subject_alt_names.pop();
        params.subject_alt_names.push(holder(MeshId::new(), Holder::Hub));
    });
    assert_eq!(refusal(shown, authority.trust()).await, HubRefused::NotThisMesh);
}

#[tokio::test]
async fn certificate_outside_its_time_tells_this_machines_clock() {
    let authority = Authority::new();
    let expired = authority.issue(|params| {
        params.not_before = rcgen::date_time_ymd(2001, 1, 1);
        params.not_after = rcgen::date_time_ymd(2002, 1, 1);
    });
    let HubRefused::Expired { not_after, .. } = refusal(expired, authority.trust()).await else {
        panic!("it is expired");
    };
    assert_eq!(not_after, "2002-01-01T00:00:00Z");
    let early = authority.issue(|params| {
        params.not_before = rcgen::date_time_ymd(2201, 1, 1);
        params.not_after = rcgen::date_time_ymd(2202, 1, 1);
    });
    let refused = refusal(early, authority.trust()).await;
    assert!(matches!(refused, HubRefused::NotYetValid { .. }));
}

#[tokio::test]
async fn nothing_listening_is_unreachable_and_plain_text_is_not_tls() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address: HubAddress = listener.local_addr().unwrap().to_string().parse().unwrap();
    let client = HubClient::new(address, Authority::new().trust(), None).unwrap();
    let served = tokio::spawn(async move {
        let (mut tcp, _) = listener.accept().await.unwrap();
        tokio::io::AsyncWriteExt::write_all(&mut tcp, b"HTTP/1.1 400 Bad Request\r\n\r\n")
            .await
            .unwrap();
    });
    let error = client.probe().await.unwrap_err();
    assert!(matches!(error, ConnectError::Tls { .. }), "{error:?}");
    served.await.unwrap();
    let error = client.probe().await.unwrap_err();
    assert!(matches!(error, ConnectError::Unreachable { .. }), "{error:?}");
    assert!(!error.is_permanent());
}

#[tokio::test]
async fn whoever_closes_a_connection_that_has_just_come_is_asked_a_few_times_more() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address: HubAddress = listener.local_addr().unwrap().to_string().parse().unwrap();
    let client = HubClient::new(address, Authority::new().trust(), None).unwrap();
    let accepted = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&accepted);
    let closing = tokio::spawn(async move {
        while let Ok((tcp, _)) = listener.accept().await {
            count.fetch_add(1, Ordering::SeqCst);
            drop(tcp);
        }
    });
    let error = client.connect(Purpose::Control).await.unwrap_err();
    assert!(matches!(error, ConnectError::Tls { .. }), "{error:?}");
    assert_eq!(accepted.load(Ordering::SeqCst), 1 + CUT_OFF_PAUSES.len());
    closing.abort();
}
