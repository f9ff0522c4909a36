//! Certificates that the mesh's own authority would never have signed, though its key did.

use cortex_proto::v1;
use cortex_proto::v1::node_client::NodeClient;
use cortex_shared::ids::MeshId;
use cortex_shared::peer::{Holder, PeerIdentity};
use rcgen::{
    BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, SanType,
};
use rustls_pki_types::CertificateDer;

use super::support::{Login, TestHub, TestNode, word};
use super::*;

const DAY: Duration = Duration::from_secs(24 * 3600);

fn uri(mesh: MeshId, holder: Holder) -> SanType {
    SanType::URI(PeerIdentity { mesh, holder }.to_string().try_into().unwrap())
}

/// What the authority signs for a node, which each case changes in one respect.
fn good(mesh: MeshId, id: NodeId) -> CertificateParams {
    let now = rcgen::date_time_ymd(1970, 1, 1) + Duration::from_millis(unix_ms().unsigned_abs());
    let mut params = CertificateParams::default();
    (params.not_before, params.not_after) = (now - DAY, now + DAY);
    params.is_ca = IsCa::ExplicitNoCa;
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    params.subject_alt_names = vec![uri(mesh, Holder::Node(id))];
    params
}

/// Whether somebody with this certificate gets as far as a method for nodes.
async fn gets_in(hub: &TestHub, login: &Login) -> bool {
    let Ok(channel) = hub.channel(Some(login)).await else { return false };
    let request = v1::RequestAttachRequest { workspace: "w".into() };
    let refused = NodeClient::new(channel).request_attach(request).await.unwrap_err();
    // An authority's holder in the certificate, or the hub's, is admitted to nothing.
    !matches!(word(&refused), "" | "no_certificate")
}

#[tokio::test]
async fn only_a_plain_certificate_for_one_holder_gets_in() {
    let hub = TestHub::start().await;
    let TestNode { id, .. } = hub.join("box", &[]).await;
    let mesh = hub.hub.data.authorities.mesh();
    let pem =
        |name: &str| std::fs::read_to_string(hub.folder.path().join("ca").join(name)).unwrap();
    let ca_key = || KeyPair::from_pem(&pem("ca.key")).unwrap();
    let issuer = Issuer::from_ca_cert_pem(&pem("ca.crt"), ca_key()).unwrap();
    let key = KeyPair::generate().unwrap();
    let login = |certificate: CertificateDer<'static>| Login {
        chain: vec![certificate],
        key: key.serialize_der(),
    };

    let now = good(mesh, id).not_before + DAY;
    let change = |change: &dyn Fn(&mut CertificateParams)| {
        let mut params = good(mesh, id);
        change(&mut params);
        login(params.signed_by(&key, &issuer).unwrap().der().clone())
    };
    assert!(gets_in(&hub, &change(&|_| {})).await, "the others differ from one that does");
    let dns = || SanType::DnsName("hub.cortex.internal".try_into().unwrap());
    let other = uri(mesh, Holder::Node(NodeId::new()));
    type Change<'a> = &'a dyn Fn(&mut CertificateParams);
    let hostile: [(&str, Change<'_>); 12] = [
        ("ended", &|p| p.not_after = now - Duration::from_secs(1)),
        ("not begun", &|p| p.not_before = now + Duration::from_secs(60)),
        ("a name beside it", &|p| p.subject_alt_names.push(dns())),
        ("two holders", &|p| p.subject_alt_names.push(other.clone())),
        ("another kind of name", &|p| p.subject_alt_names = vec![dns()]),
        ("no name", &|p| p.subject_alt_names.clear()),
        ("another mesh", &|p| p.subject_alt_names = vec![uri(MeshId::new(), Holder::Node(id))]),
        ("the hub itself", &|p| p.subject_alt_names = vec![uri(mesh, Holder::Hub)]),
        ("for servers", &|p| p.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth]),
        ("for servers too", &|p| p.extended_key_usages.push(ExtendedKeyUsagePurpose::ServerAuth)),
        ("for anything", &|p| p.extended_key_usages.push(ExtendedKeyUsagePurpose::Any)),
        ("an authority", &|p| p.is_ca = IsCa::Ca(BasicConstraints::Constrained(0))),
    ];
    for (what, hostile) in hostile {
        assert!(!gets_in(&hub, &change(hostile)).await, "{what}");
    }

    // An authority in between, which the mesh's own has signed.
    let between_key = KeyPair::generate().unwrap();
    let mut between = good(mesh, id);
    between.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let between_der = between.signed_by(&between_key, &issuer).unwrap().der().clone();
    let between = Issuer::new(between, between_key);
    let leaf = good(mesh, id).signed_by(&key, &between).unwrap().der().clone();
    let chain = Login { chain: vec![leaf, between_der], key: key.serialize_der() };
    assert!(!gets_in(&hub, &chain).await, "a chain of two levels");

    // Its own, and that of an authority which calls itself the same.
    let own = good(mesh, id).self_signed(&key).unwrap().der().clone();
    assert!(!gets_in(&hub, &login(own)).await, "self-signed");
    let twin = Issuer::from_ca_cert_pem(&pem("ca.crt"), KeyPair::generate().unwrap()).unwrap();
    let twins = good(mesh, id).signed_by(&key, &twin).unwrap().der().clone();
    assert!(!gets_in(&hub, &login(twins)).await, "another authority of this name");
    hub.hub.shutdown().await;
}
