use cortex_shared::ids::{MeshId, NodeId};
use cortex_shared::tasks::TaskScope;
use prost::Message as _;

use super::*;
use crate::store::OperatorRecord;
use crate::store::history::{HistoryLimits, HistoryStore};
use crate::store::sqlite::SqliteStore;
use crate::task::history::History;
use crate::task::relay::{Deadlines, Relay};
use crate::task::spool::{Spool, SpoolLimits};

/// Services that the hub serves; every method of theirs needs a level.
const HUB: [&str; 4] = ["Enroll", "Node", "Sync", "Operator"];
/// Services of the agent's own socket.
const AGENT: [&str; 1] = ["Control"];

const KEY: KeyHash = [1; 32];

async fn layer(nodes: Vec<Node>, records: Vec<OperatorRecord>) -> (tempfile::TempDir, AuthLayer) {
    let folder = tempfile::tempdir().unwrap();
    let scope = TaskScope::new();
    let store = SqliteStore::open(folder.path().join("hub.db"), &scope).await.unwrap();
    let store: Arc<dyn crate::store::Store> = Arc::new(store);
    let spool = Spool::open(folder.path().join("tasks"), SpoolLimits::default(), &scope).unwrap();
    let second = std::time::Duration::from_secs(1);
    let deadlines = Deadlines { start: second, resume: second };
    let history = HistoryStore::open(folder.path().join("history.db"), &scope).await.unwrap();
    let history = History::start(history, HistoryLimits::default(), &scope);
    let events = crate::events::EventBus::in_memory(Default::default());
    let told = Arc::clone(&events);
    let limits = Default::default();
    let relay = Relay::new(Arc::clone(&store), spool, history, told, scope, deadlines, limits);
    let refusals = RefusalLog::new(Arc::clone(&store), TaskScope::new());
    let registry = Arc::new(Registry::new(nodes));
    let operators = Operators::load(store, relay, Arc::clone(&registry), events).await.unwrap();
    operators.apply(records);
    (folder, AuthLayer { registry, operators, refusals })
}

fn record(name: &str, role: Role, scope: &[(&str, &str)]) -> OperatorRecord {
    let scope = scope.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
    OperatorRecord {
        name: name.into(),
        role,
        scope: Scope(scope),
        key: KEY,
        created_at_ms: 1,
        revoked_at_ms: None,
    }
}

fn node() -> Node {
    Node { key: KEY, ..crate::store::fixtures::node("box") }
}

fn call(layer: &AuthLayer, path: &str, peer: Option<Peer>) -> Result<Request<()>, Status> {
    let mut request = Request::builder().uri(format!("http://hub{path}")).body(()).unwrap();
    if let Some(peer) = peer {
        request.extensions_mut().insert(peer);
    }
    layer.admit(&mut request).map(|_| request)
}

fn certified(holder: Holder, key: KeyHash) -> Option<Peer> {
    let address = "127.0.0.1:1".parse().unwrap();
    let identity = PeerIdentity { mesh: MeshId::new(), holder };
    Some(Peer::Certified {
        address,
        identity,
        key,
        not_after_ms: i64::MAX,
        generation: None,
        certificate: Bytes::new(),
    })
}

/// The certificate says admin throughout: what counts is the hub's record.
fn operator(name: &str) -> Option<Peer> {
    certified(Holder::Operator { name: name.into(), role: Role::Admin }, KEY)
}

#[test]
fn the_table_names_every_method_that_the_hub_serves_and_no_other() {
    let all = cortex_proto::FILE_DESCRIPTOR_SET;
    let all = prost_types::FileDescriptorSet::decode(all).unwrap();
    let mut methods = std::collections::BTreeSet::new();
    for service in all.file.iter().flat_map(|file| &file.service) {
        let name = service.name();
        assert!(HUB.contains(&name) || AGENT.contains(&name), "who serves {name}?");
        if HUB.contains(&name) {
            let paths = service.method.iter().map(|m| format!("/cortex.v1.{name}/{}", m.name()));
            methods.extend(paths);
        }
    }
    assert!(methods.len() > 30, "the description holds the services");
    let table: std::collections::BTreeSet<_> =
        TABLE.iter().map(|(path, _)| (*path).to_owned()).collect();
    assert_eq!(table.len(), TABLE.len(), "a method is named twice");
    assert_eq!(table, methods);
}

#[tokio::test]
async fn every_kind_of_caller_gets_what_is_written_down_and_nothing_else() {
    let known = node();
    let id = known.id;
    let (_folder, layer) = layer(
        vec![known],
        vec![
            record("viewer", Role::Viewer, &[]),
            record("bot", Role::AgentToken, &[]),
            record("operator", Role::Operator, &[]),
            record("admin", Role::Admin, &[]),
            record("scoped", Role::Admin, &[("env", "dev")]),
        ],
    )
    .await;
    let callers: [(Option<Peer>, char); 11] = [
        (None, '-'),
        (Some(Peer::Anonymous("127.0.0.1:1".parse().unwrap())), '-'),
        (certified(Holder::Hub, KEY), '-'),
        (certified(Holder::Node(id), KEY), 'n'),
        (certified(Holder::Node(NodeId::new()), KEY), '-'),
        (operator("viewer"), 'v'),
        (operator("bot"), 't'),
        (operator("operator"), 'o'),
        (operator("scoped"), 's'),
        (operator("admin"), 'a'),
        (Some(Peer::Local { uid: 0 }), 'a'),
    ];
    assert_eq!(expected::EXPECTED.len(), TABLE.len());
    for (peer, letter) in callers {
        for (path, _) in TABLE {
            let result = call(&layer, path, peer.clone());
            let allowed = expected::may_call(path, letter);
            assert_eq!(result.is_ok(), allowed, "{path} by {peer:?}");
        }
    }
}

#[tokio::test]
async fn a_certificate_counts_only_while_it_is_the_operators_newest_login() {
    let (_folder, layer) = layer(vec![], vec![record("ann", Role::Viewer, &[])]).await;
    let word = |name: &str, key| {
        let peer = certified(Holder::Operator { name: name.into(), role: Role::Viewer }, key);
        match call(&layer, "/cortex.v1.Operator/ListNodes", peer) {
            Ok(_) => "admitted".to_owned(),
            Err(status) => {
                let word = status.metadata().get(cortex_proto::CODE_TRAILER).unwrap();
                word.to_str().unwrap().to_owned()
            }
        }
    };
    assert_eq!(word("ann", KEY), "admitted");
    assert_eq!(word("ann", [2; 32]), "login_replaced");
    assert_eq!(word("bob", KEY), "operator_unknown");
    let revoked = OperatorRecord { revoked_at_ms: Some(2), ..record("ann", Role::Viewer, &[]) };
    layer.operators.apply(vec![revoked]);
    assert_eq!(word("ann", KEY), "operator_revoked");
    // She logs in again, with another key: the revoked certificate stays worthless.
    let again = OperatorRecord { key: [2; 32], ..record("ann", Role::Viewer, &[]) };
    layer.operators.apply(vec![again]);
    assert_eq!(word("ann", KEY), "login_replaced");
    assert_eq!(word("ann", [2; 32]), "admitted");
}

#[tokio::test]
async fn a_method_outside_the_table_is_refused_to_everyone() {
    let (_folder, layer) = layer(vec![], vec![]).await;
    let status = call(&layer, "/cortex.v1.Operator/Nonsense", Some(Peer::Local { uid: 0 }));
    assert_eq!(status.unwrap_err().code(), Code::Unimplemented);
}

#[tokio::test]
async fn handler_finds_the_node_of_the_certificate() {
    let known = node();
    let id = known.id;
    let (_folder, layer) = layer(vec![known], vec![]).await;
    let request = call(&layer, "/cortex.v1.Node/Link", certified(Holder::Node(id), KEY)).unwrap();
    assert_eq!(request.extensions().get(), Some(&AdmittedNode { node_id: id }));
}

#[tokio::test]
async fn a_certificate_that_ended_is_refused_on_a_connection_that_goes_on() {
    let known = node();
    let (id, path) = (known.id, "/cortex.v1.Sync/Head");
    let records = vec![record("ann", Role::Viewer, &[])];
    let (_folder, layer) = layer(vec![known.clone()], records).await;
    let ending = |peer: Option<Peer>, at: i64| match peer {
        Some(Peer::Certified { address, identity, key, generation, certificate, .. }) => {
            let not_after_ms = at;
            Some(Peer::Certified { address, identity, key, not_after_ms, generation, certificate })
        }
        peer => peer,
    };
    let (good, over) = (unix_ms(), unix_ms() - CLOCK_TOLERANCE_MS - 1);
    let look = "/cortex.v1.Operator/WhoAmI";
    for (peer, path) in [(operator("ann"), look), (certified(Holder::Node(id), KEY), path)] {
        assert!(call(&layer, path, ending(peer.clone(), good)).is_ok(), "clocks differ a little");
        let refused = call(&layer, path, ending(peer, over)).unwrap_err();
        let word = refused.metadata().get(CODE_TRAILER).unwrap();
        assert_eq!(word, "certificate_expired");
    }
    // A node that has a newer one by now goes on.
    let mut newer = known;
    newer.certificate.not_after_ms = unix_ms() + 60_000;
    layer.registry.renewed(&newer);
    assert!(call(&layer, path, ending(certified(Holder::Node(id), KEY), over)).is_ok());
}
