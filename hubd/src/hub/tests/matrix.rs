//! Every method over real connections, by every kind of caller, compared with what is written down.

use cortex_proto::v1;
use cortex_proto::v1::node_client::NodeClient;
use cortex_proto::v1::sync_client::SyncClient;
use cortex_shared::peer::HUB_SERVER_NAME;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tonic::client::Grpc;
use tonic::transport::Channel;
use tonic::{Code, Request, Status};

use super::support::{GREETING, Login, TestHub, script, shake, tls, word};
use super::*;
use crate::grpc::auth::expected::may_call;
use crate::grpc::auth::{Level, TABLE};

/// The words of those who were not let in to a method.
const REFUSALS: [&str; 5] = [
    "no_certificate",
    "wrong_kind_of_caller",
    "role_too_low",
    "scope_too_narrow",
    "unknown_method",
];

/// Calls a method with an empty message, whatever its kind.
async fn call(channel: &Channel, path: &str) -> Result<(), Status> {
    let mut grpc = Grpc::new(channel.clone());
    grpc.ready().await.map_err(|error| Status::unavailable(error.to_string()))?;
    let codec = tonic_prost::ProstCodec::<(), ()>::default();
    let request = Request::new(tokio_stream::once(()));
    grpc.streaming(request, path.parse().unwrap(), codec).await.map(|_| ())
}

#[tokio::test]
async fn every_method_lets_in_over_tls_whom_it_should() {
    let hub = TestHub::start().await;
    let node = hub.join("box", &[]).await;
    let leaving = hub.join("leaving", &[]).await;
    let viewer = hub.login("viewer", "viewer").await;
    let bot = hub.login("bot", "agent-token").await;
    let operator = hub.login("operator", "operator").await;
    let admin = hub.login("admin", "admin").await;
    let scoped = hub.login_scoped("scoped", "admin", &[("env", "dev")]).await;
    let callers: [(&str, Option<&Login>, char); 7] = [
        ("nobody", None, '-'),
        ("node", Some(&node.login), 'n'),
        ("viewer", Some(&viewer), 'v'),
        ("agent-token", Some(&bot), 't'),
        ("operator", Some(&operator), 'o'),
        ("scoped admin", Some(&scoped), 's'),
        ("admin", Some(&admin), 'a'),
    ];
    // Those that anyone may call come last: whoever fails there too often is kept waiting.
    let mut table = TABLE.to_vec();
    table.sort_by_key(|(_, level)| *level == Level::Anyone);
    for (name, login, letter) in callers {
        let channel = hub.channel(login).await.unwrap();
        for (path, _) in &table {
            // A node that leaves is one no longer.
            let leaves = name == "node" && *path == "/cortex.v1.Node/Leave";
            let result = if leaves {
                call(&hub.channel(Some(&leaving.login)).await.unwrap(), path).await
            } else {
                call(&channel, path).await
            };
            let let_in = result.as_ref().err().is_none_or(|s| !REFUSALS.contains(&word(s)));
            let allowed = may_call(path, letter);
            assert_eq!(let_in, allowed, "{path} by {name}: {result:?}");
        }
    }
    hub.hub.shutdown().await;
}

#[tokio::test]
async fn a_certificate_of_another_mesh_does_not_even_get_a_connection() {
    let (ours, other) = (TestHub::start().await, TestHub::start().await);
    let admin = other.login("admin", "admin").await;
    assert!(other.operator(&admin).await.who_am_i(v1::WhoAmIRequest {}).await.is_ok());
    // With TLS 1.3 the client hears of the refusal with its first bytes, not before.
    let outcome = match ours.channel(Some(&admin)).await {
        Err(_) => None,
        Ok(channel) => Some(call(&channel, "/cortex.v1.Enroll/JoinNode").await.unwrap_err()),
    };
    assert!(outcome.as_ref().is_none_or(|status| word(status).is_empty()), "{outcome:?}");
    ours.hub.shutdown().await;
    other.hub.shutdown().await;
}

#[tokio::test]
async fn a_node_that_lies_in_the_body_gets_nothing() {
    let hub = TestHub::start().await;
    let (honest, liar) = (hub.join("honest", &[]).await, hub.join("liar", &[]).await);
    let mut admin = hub.local().await;
    let name = || "secret".to_owned();
    let created = admin.create_workspace(v1::CreateWorkspaceRequest { name: name() }).await;
    let workspace_id = created.unwrap().into_inner().workspace_id;
    let attach = v1::AttachWorkspaceRequest { workspace: name(), node: "honest".into() };
    admin.attach_workspace(attach).await.unwrap();
    let mut honest = honest.connect(&hub).await.unwrap();
    let mut session = liar.connect(&hub).await.unwrap();
    let running = hub.exec(&mut admin, "honest", script()).await.unwrap();
    honest.start_task().await;

    // Another node's workspace.
    let mut sync = SyncClient::new(hub.channel(Some(&liar.login)).await.unwrap());
    let head = v1::HeadRequest { workspace_id, known: None };
    let refused = sync.head(head.clone()).await.unwrap_err();
    assert_eq!((refused.code(), word(&refused)), (Code::PermissionDenied, "not_a_member"));
    let request = || v1::RequestAttachRequest { workspace: name() };
    for refused in [
        session.client.request_attach(request()).await.unwrap_err(),
        session.client.request_detach(request()).await.unwrap_err(),
    ] {
        assert_eq!(word(&refused), "not_a_member");
    }

    // Another node's task: neither its stream nor its end.
    let hello =
        v1::TaskIoHello { task_id: running.task_id.clone().into(), ..v1::TaskIoHello::default() };
    let hello = v1::TaskIoUp { frame: Some(v1::task_io_up::Frame::Hello(hello)) };
    let refused = session.client.task_io(tokio_stream::once(hello.clone())).await.unwrap_err();
    assert_eq!(word(&refused), "task_unknown");
    let lie = v1::TaskRefused {
        task_id: running.task_id.clone().into(),
        exit: Some(v1::TaskExit::default()),
    };
    let lie = v1::NodeFrame { frame: Some(v1::node_frame::Frame::TaskRefused(lie)) };
    session.up.send(lie).await.unwrap();
    // Frames of a session are taken in order: once this is answered, the lie has been read.
    let beat = v1::NodeFrame { frame: Some(v1::node_frame::Frame::Heartbeat(v1::Heartbeat {})) };
    session.up.send(beat).await.unwrap();
    let answered = |frame| matches!(frame, hub_frame::Frame::Heartbeat(_)).then_some(());
    session.until(answered).await.unwrap();

    // The task is there for its own node, and ends as that says.
    let exit = v1::TaskExit { verdict: v1::TaskVerdict::Exited.into(), ..Default::default() };
    let exit = v1::TaskIoUp { frame: Some(v1::task_io_up::Frame::Exit(exit)) };
    let mut own = NodeClient::clone(&honest.client);
    own.task_io(tokio_stream::iter([hello, exit])).await.unwrap();
    assert_eq!(running.end().await.unwrap().verdict(), v1::TaskVerdict::Exited);
    hub.hub.shutdown().await;
}

/// The most streams that the hub lets a connection have, as its greeting says.
async fn streams_of(hub: &TestHub, login: Option<&Login>) -> u32 {
    let connector = tls(&[hub.authority()], login, b"h2");
    let mut tls = shake(hub.hub.address(), HUB_SERVER_NAME, connector).await;
    tls.write_all(GREETING).await.unwrap();
    let mut head = [0; 9];
    tls.read_exact(&mut head).await.unwrap();
    assert_eq!(head[3], 4, "settings come first");
    let mut settings = vec![0; usize::from(head[2])];
    tls.read_exact(&mut settings).await.unwrap();
    let streams = settings.chunks(6).find(|setting| setting[..2] == [0, 3]).unwrap();
    u32::from_be_bytes(streams[2..].try_into().unwrap())
}

/// What a stranger begins and never ends is the hub's memory.
#[tokio::test]
async fn a_connection_without_a_certificate_has_room_for_its_one_call() {
    let hub = TestHub::start().await;
    let admin = hub.login("ann", "admin").await;
    assert_eq!(streams_of(&hub, None).await, 2);
    assert_eq!(streams_of(&hub, Some(&admin)).await, 4096);
    hub.hub.shutdown().await;
}
