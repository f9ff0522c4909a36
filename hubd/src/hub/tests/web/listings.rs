//! What a listing costs: so many readings of databases, however long the list is.

use cortex_shared::ids::TaskId;

use super::*;
use crate::store::database::readings;
use crate::store::fixtures::task;

const LISTINGS: [&str; 4] = [
    "/api/v1/nodes?limit=1000",
    "/api/v1/tasks?limit=1000",
    "/api/v1/workspaces?limit=1000",
    "/api/v1/workspaces/shared",
];

/// How many readings each listing takes, in their order, and how long the answers are. The workers read now
/// and then: of a few attempts, the one with the fewest counts.
async fn readings(hub: &TestHub, session: &str) -> Vec<(u64, usize)> {
    let mut found = Vec::new();
    for path in LISTINGS {
        let mut least = (u64::MAX, 0);
        for _ in 0..3 {
            let before = readings::below(hub.folder.path());
            let answer = get(hub, path, &[session]).await.ok();
            let took = readings::below(hub.folder.path()) - before;
            least = least.min((took, answer.body.len()));
        }
        found.push(least);
    }
    found
}

#[tokio::test]
async fn a_listing_takes_as_many_readings_for_two_hundred_nodes_as_for_one() {
    let folder = tempfile::tempdir().unwrap();
    let config = HubConfig { join_rate: None, ..config(folder.path()) };
    let hub = TestHub { hub: Hub::start(config).await.unwrap(), folder };
    let session = bearer(&hub, None).await;
    let mut admin = hub.local().await;
    let create = v1::CreateWorkspaceRequest { name: "shared".into() };
    admin.create_workspace(create).await.unwrap();
    let invite = v1::CreateInviteRequest { uses: 200, ..Default::default() };
    let token = hub.invite(invite).await;
    let mut measured = Vec::new();
    for number in 0..200 {
        let name = format!("n{number}");
        let node = hub.join_with(token.clone(), &name, &[]).await.id;
        let attach = v1::AttachWorkspaceRequest { workspace: "shared".into(), node: name };
        admin.attach_workspace(attach).await.unwrap();
        let task = NewTask { id: TaskId::new(), ..task("ann", node) };
        hub.hub.store.accept_task(task).await.unwrap();
        if number == 0 || number == 199 {
            measured.push(readings(&hub, &session).await);
        }
    }
    for (path, (one, all)) in LISTINGS.iter().zip(measured[0].iter().zip(&measured[1])) {
        assert_eq!(one.0, all.0, "{path} reads more for more");
        assert!(all.1 > 100 * one.1 / 2, "{path} has all of them: {one:?}, {all:?}");
    }
    hub.hub.shutdown().await;
}
