//! The contract of [`Store`], run on the SQLite engine. Another engine runs the same functions.

mod invites;

use cortex_shared::policy::Role;
use cortex_shared::secret::InviteToken;

use super::super::{Actor, Caller, Facts, InviteKind, Machine, NewCertificate, TaskEndState};
use super::*;

async fn store() -> (tempfile::TempDir, SqliteStore) {
    let folder = tempfile::tempdir().unwrap();
    let store = SqliteStore::open(folder.path().join("hub.db"), &TaskScope::new()).await.unwrap();
    (folder, store)
}

fn invite(token: &InviteToken, kind: InviteKind) -> NewInvite {
    NewInvite {
        id: token.id().clone(),
        secret_hash: token.secret_hash(),
        kind,
        max_uses: 1,
        expires_at_ms: 1_000,
        created_at_ms: 0,
        created_by: "local".into(),
        labels: [("env".to_owned(), "prod".to_owned())].into(),
        name_pattern: String::new(),
        workspaces: BTreeSet::new(),
        sources: BTreeSet::new(),
        owner: String::new(),
        scope: Labels::new(),
    }
}

/// A process of the hub's own machine.
const CALLER: Caller = Caller { address: None };

fn audit(at_ms: i64) -> NewAudit {
    Actor::from("ann").audit(at_ms, "test.done", "it", serde_json::json!({}))
}

fn redemption(token: &InviteToken, key: u8) -> NodeRedemption {
    NodeRedemption {
        invite: token.id().clone(),
        secret_hash: token.secret_hash(),
        key: [key; 32],
        new_id: NodeId::new(),
        wanted_name: String::new(),
        labels: [("env".to_owned(), "dev".to_owned())].into(),
        ceiling: cortex_shared::policy::Mode::Strict,
        facts: Facts { hostname: "Box".into(), ..Facts::default() },
        machine: Machine::default(),
        certificate: NewCertificate { not_after_ms: 100, authority: [9; 32] },
        caller: CALLER,
        now_ms: 10,
    }
}

#[tokio::test]
async fn everything_is_there_after_reopening() {
    let folder = tempfile::tempdir().unwrap();
    let scope = TaskScope::new();
    let store = SqliteStore::open(folder.path().join("hub.db"), &scope).await.unwrap();
    let token = InviteToken::generate();
    let workspace = Workspace {
        id: WorkspaceId::new(),
        name: "code".into(),
        created_at_ms: 1,
        scope: crate::store::Scope([("env".to_owned(), "dev".to_owned())].into()),
        members: BTreeSet::new(),
    };
    store.create_workspace(workspace.clone(), audit(1)).await.unwrap();
    let mut with_workspace = invite(&token, InviteKind::Node);
    with_workspace.workspaces.insert(workspace.id);
    store.create_invite(with_workspace, audit(0)).await.unwrap();
    let node = store.redeem_node(redemption(&token, 1)).await.unwrap().unwrap();
    let mesh = store.mesh().await.unwrap();
    scope.cancel();
    scope.finish().await;
    drop(store);

    let store = SqliteStore::open(folder.path().join("hub.db"), &TaskScope::new()).await.unwrap();
    assert_eq!(store.mesh().await.unwrap(), mesh);
    assert_eq!(store.nodes().await.unwrap()[0].id, node.id);
    let workspaces = store.workspaces().await.unwrap();
    assert_eq!(workspaces[0].members, [node.id].into());
    assert!(matches!(
        store.create_workspace(workspace, audit(2)).await,
        Err(StoreError::Exists { what: "workspace", .. })
    ));
    store.detach(workspaces[0].id, node.id, audit(3)).await.unwrap();
    assert!(store.workspaces().await.unwrap()[0].members.is_empty());
}

#[tokio::test]
async fn the_first_verdict_of_a_task_stands() {
    let (_folder, store) = store().await;
    let id = TaskId::new();
    let task = NewTask {
        id,
        node: NodeId::new(),
        node_name: "box".into(),
        actor: "ann".into(),
        role: Role::Operator,
        command: crate::store::fixtures::command(),
        workspace: String::new(),
        mode: cortex_shared::policy::Mode::Strict,
        accepted_at_ms: 1,
    };
    store.accept_task(task.clone()).await.unwrap();
    store.accept_task(NewTask { id: TaskId::new(), ..task }).await.unwrap();
    let end = TaskEnd {
        state: TaskEndState::Finished,
        verdict: "exited",
        exit_code: Some(7),
        signal: None,
        reason: String::new(),
        stdout_bytes: 1,
        stderr_bytes: 2,
        stdout_hash: Some([3; 32]),
        stderr_hash: None,
        ended_at_ms: 3,
    };
    store.end_task(id, end).await.unwrap();
    assert_eq!(store.end_open_tasks("hub restarted".into(), 9).await.unwrap(), 1);
    let verdict: (String, Option<u32>) = store
        .database
        .read(move |c| {
            Ok::<_, StoreError>(c.query_row(
                "SELECT verdict, exit_code FROM tasks WHERE id = ?",
                [id.as_bytes().as_slice()],
                |row| Ok((row.get(0)?, row.get(1)?)),
            )?)
        })
        .await
        .unwrap();
    assert_eq!(verdict, ("exited".to_owned(), Some(7)));
}

#[tokio::test]
async fn labels_of_a_scope_are_protected_from_the_invite_to_the_revocation() {
    let (_folder, store) = store().await;
    let token = InviteToken::generate();
    store.create_invite(invite(&token, InviteKind::Node), audit(0)).await.unwrap();
    let node = store.redeem_node(redemption(&token, 1)).await.unwrap().unwrap().id;
    let change = |may_change_scopes| LabelChange {
        set: [("team".to_owned(), "x".to_owned())].into(),
        remove: ["env".to_owned()].into(),
        may_change_scopes,
    };
    let operator = InviteToken::generate();
    let mut pending = invite(&operator, InviteKind::Operator(Role::Viewer));
    pending.name_pattern = "ann".into();
    store.create_invite(pending, audit(0)).await.unwrap();
    let scope = "UPDATE invites SET scope = '{\"team\":\"x\"}' WHERE name_pattern = 'ann'";
    store.database.write(move |c| Ok::<_, StoreError>(c.execute(scope, [])?)).await.unwrap();

    let protected = Err(LabelRefusal::Protected { key: "team".into() });
    assert_eq!(store.label_node(node, change(false), audit(20)).await.unwrap(), protected);
    // An invite that is over protects nothing; the operator that it became does.
    assert!(store.label_node(node, change(false), audit(1_000)).await.unwrap().is_ok());
    let redemption = OperatorRedemption {
        invite: operator.id().clone(),
        secret_hash: operator.secret_hash(),
        key: [1; 32],
        caller: CALLER,
        now_ms: 10,
    };
    store.redeem_operator(redemption).await.unwrap().unwrap();
    assert_eq!(store.operators().await.unwrap()[0].scope.0["team"], "x");
    assert_eq!(store.label_node(node, change(false), audit(1_000)).await.unwrap(), protected);
    let labels = store.label_node(node, change(true), audit(1_000)).await.unwrap().unwrap();
    assert_eq!(labels.get("team").map(String::as_str), Some("x"));
    assert!(!labels.contains_key("env"));
    store.revoke_operator("ann".into(), 2_000, audit(2_000)).await.unwrap();
    assert!(store.label_node(node, change(false), audit(2_001)).await.unwrap().is_ok());
}
