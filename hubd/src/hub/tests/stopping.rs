//! A stop of the hub, whoever is at its door.

use cortex_proto::v1;
use cortex_shared::peer::HUB_SERVER_NAME;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use super::support::{GREETING, TestHub, shake, tls, word};
use super::*;

/// What a test waits for that is to happen; much less than the grace.
const PATIENCE: Duration = Duration::from_secs(20);

#[tokio::test]
async fn a_stop_waits_for_no_stranger_however_far_it_has_come() {
    let folder = tempfile::tempdir().unwrap();
    let grace = Duration::from_secs(3600);
    let config = HubConfig { shutdown_grace: grace, ..config(folder.path()) };
    let hub = Hub::start(config).await.unwrap();
    let authority = hub.authority_certificate();
    let (grpc, http) = (hub.address(), hub.http().unwrap().address());
    let mut strangers = Vec::new();
    for address in [grpc, http] {
        strangers.push(TcpStream::connect(address).await.unwrap());
        let mut half_shaken = TcpStream::connect(address).await.unwrap();
        half_shaken.write_all(&[22]).await.unwrap();
        strangers.push(half_shaken);
    }
    let shake = async |address, name, protocol: &[u8]| {
        shake(address, name, tls(std::slice::from_ref(&authority), None, protocol)).await
    };
    let mut unheard = shake(grpc, HUB_SERVER_NAME, b"h2").await;
    let mut deaf = shake(grpc, HUB_SERVER_NAME, b"h2").await;
    deaf.write_all(GREETING).await.unwrap();
    for taken in [&mut unheard, &mut deaf] {
        // The server's own greeting: it has been taken.
        taken.read_exact(&mut [0; 9]).await.unwrap();
    }
    let _web = [shake(http, "localhost", b"h2").await, shake(http, "localhost", b"http/1.1").await];
    timeout(PATIENCE, hub.shutdown()).await.expect("it stops");
}

#[tokio::test]
async fn whoever_watches_is_told_that_the_hub_stops() {
    let hub = TestHub::start().await;
    let mut admin = hub.local().await;
    let made = v1::CreateWorkspaceRequest { name: "w".into() };
    admin.create_workspace(made).await.unwrap();
    let mut nodes = admin.watch_nodes(v1::ListNodesRequest::default()).await.unwrap().into_inner();
    let watch = v1::WorkspaceStatusRequest { workspace: "w".into(), watch: true };
    let mut workspace = admin.workspace_status(watch).await.unwrap().into_inner();
    nodes.message().await.unwrap().unwrap();
    workspace.message().await.unwrap().unwrap();
    hub.hub.shutdown().await;
    // Not as if that were the end of what was watched.
    let told = (nodes.message().await.unwrap_err(), workspace.message().await.unwrap_err());
    assert_eq!((word(&told.0), word(&told.1)), ("shutting_down", "shutting_down"), "{told:?}");
}
