//! The contract of [`Store`], run on the SQLite engine. Another engine runs the same functions.

mod invites;

use cortex_shared::entry::Digest;
use cortex_shared::policy::Role;
use cortex_shared::secret::InviteToken;
use cortex_shared::wire_path::WirePath;

use super::super::{
    Actor, Caller, Facts, InviteKind, Machine, NewCertificate, SkillOrigin, TaskEndState, Verdict,
};
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
        ceiling: cortex_shared::policy::Bound::LEAST,
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

fn task(actor: &str, node: NodeId) -> NewTask {
    NewTask { spec: Some(vec![1, 2]), ..crate::store::fixtures::task(actor, node) }
}

fn end(verdict: Verdict, code: u32) -> TaskEnd {
    TaskEnd {
        verdict,
        exit_code: Some(code),
        signal: None,
        reason: String::new(),
        hint: "h".into(),
        stdout_bytes: 1,
        stderr_bytes: 2,
        stdout_hash: (verdict == Verdict::Exited).then_some([3; 32]),
        stderr_hash: None,
        duration_ms: 4,
        started_at_ms: Some(2),
        ended_at_ms: 3,
        never_begun: false,
        cancel_wanted: false,
    }
}

#[tokio::test]
async fn the_first_verdict_of_a_task_stands_and_a_late_outcome_is_added_once() {
    let (_folder, store) = store().await;
    let node = NodeId::new();
    let (known, lost, open) = (task("ann", node), task("ann", node), task("ann", node));
    for task in [&known, &lost, &open] {
        store.accept_task(task.clone()).await.unwrap();
    }
    let exited = end(Verdict::Exited, 7);
    store.end_task(known.id, exited.clone()).await.unwrap();
    store.end_task(known.id, end(Verdict::StreamLost, 0)).await.unwrap();
    store.end_task(lost.id, end(Verdict::StreamLost, 0)).await.unwrap();
    assert_eq!(store.open_tasks().await.unwrap().len(), 1);
    let late = end(Verdict::Exited, 5);
    let add = async |id, node| store.add_late_outcome(id, node, late.clone()).await.unwrap();
    for (id, of, wanted, why) in [
        (known.id, node, LateReport::Known, "the node's own verdict needs none"),
        (lost.id, NodeId::new(), LateReport::Known, "another node's task"),
        (open.id, node, LateReport::TooEarly, "no verdict"),
        (lost.id, node, LateReport::Added, "a verdict of the hub"),
        (lost.id, node, LateReport::Known, "a second time"),
        (TaskId::new(), node, LateReport::Known, "no task"),
    ] {
        assert_eq!(add(id, of).await, wanted, "{why}");
    }
    let record = store.task(known.id).await.unwrap().unwrap();
    assert_eq!((record.end, record.late), (Some(exited), None));
    let record = store.task(lost.id).await.unwrap().unwrap();
    assert_eq!((record.end.unwrap().verdict, record.late), (Verdict::StreamLost, Some(late)));
    assert_eq!(store.task_spec(lost.id).await.unwrap(), Some(vec![1, 2]));
}

#[tokio::test]
async fn tasks_are_listed_in_pages_by_node_actor_and_state_and_found_by_the_end_of_their_id() {
    let (_folder, store) = store().await;
    let (one, two) = (NodeId::new(), NodeId::new());
    let mut ids = Vec::new();
    for n in 0..6 {
        let task = task(if n % 2 == 0 { "ann" } else { "bob" }, if n < 3 { one } else { two });
        ids.push(task.id);
        store.accept_task(task).await.unwrap();
    }
    store.end_task(ids[0], end(Verdict::Exited, 0)).await.unwrap();
    store.end_task(ids[1], end(Verdict::Cancelled, 0)).await.unwrap();
    let all = TaskQuery { limit: 100, ..TaskQuery::default() };
    let open = Some((true, Vec::new()));
    let finished = Some((false, vec![TaskEndState::Finished]));
    for (query, wanted) in [
        (all.clone(), vec![5, 4, 3, 2, 1, 0]),
        (TaskQuery { limit: 2, ..all.clone() }, vec![5, 4]),
        (TaskQuery { limit: 2, before: Some(ids[4]), ..all.clone() }, vec![3, 2]),
        (TaskQuery { nodes: Some(vec![one]), ..all.clone() }, vec![2, 1, 0]),
        (TaskQuery { nodes: Some(vec![]), ..all.clone() }, vec![]),
        (TaskQuery { actor: Some("bob".into()), ..all.clone() }, vec![5, 3, 1]),
        (TaskQuery { states: open, ..all.clone() }, vec![5, 4, 3, 2]),
        (TaskQuery { states: finished, ..all.clone() }, vec![0]),
    ] {
        let found = store.tasks(query.clone()).await.unwrap();
        let found: Vec<_> = found.iter().map(|task| task.id).collect();
        let wanted: Vec<_> = wanted.iter().map(|n: &usize| ids[*n]).collect();
        assert_eq!(found, wanted, "{query:?}");
    }
    for length in [4, 5, 16] {
        let ending = ids[3].as_bytes()[16 - length..].to_vec();
        let found = store.tasks_ending_in(ending).await.unwrap();
        assert_eq!(found.iter().map(|task| task.id).collect::<Vec<_>>(), [ids[3]]);
    }
    assert!(store.tasks_ending_in(vec![0; 4]).await.unwrap().is_empty());
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

#[tokio::test]
async fn of_each_skill_one_version_is_current_and_one_is_made_at_a_time() {
    let (_folder, store) = store().await;
    let version = |number: u64| SkillVersion {
        id: CommitId::new(),
        skill: "lint".into(),
        version: number,
        origin: SkillOrigin {
            workspace: WorkspaceId::new(),
            path: WirePath::new("tools/lint").unwrap(),
        },
        restored_from: (number == 2).then_some(1),
        digest: Digest::of(b"it"),
        entries: 3,
        content_bytes: 7,
        by: Actor { name: "ann".into(), uid: Some(7) },
        at_ms: 1,
        pending: true,
        ended_at_ms: None,
    };
    let (one, two) = (version(1), version(2));
    store.begin_skill(one.clone()).await.unwrap();
    let other = SkillVersion { id: CommitId::new(), ..one.clone() };
    assert!(matches!(store.begin_skill(other.clone()).await, Err(StoreError::Exists { .. })));
    assert_eq!(store.skills(None).await.unwrap(), std::slice::from_ref(&one));
    store.abandon_skill(one.id).await.unwrap();
    store.begin_skill(other.clone()).await.unwrap();
    store.finish_skill(other.id, 5, audit(5)).await.unwrap();
    // What is not pending is neither finished again nor abandoned.
    store.finish_skill(other.id, 6, audit(6)).await.unwrap();
    store.abandon_skill(other.id).await.unwrap();
    store.begin_skill(two.clone()).await.unwrap();
    store.finish_skill(two.id, 9, audit(9)).await.unwrap();
    let ended = SkillVersion { pending: false, ended_at_ms: Some(9), ..other };
    let current = SkillVersion { pending: false, ..two };
    assert_eq!(store.skills(Some("lint".into())).await.unwrap(), [ended.clone(), current.clone()]);
    assert!(store.skills(Some("other".into())).await.unwrap().is_empty());
    let gone = store.remove_skill(ended.id, 10, audit(10)).await;
    assert!(matches!(gone, Err(StoreError::NotFound { .. })));
    store.remove_skill(current.id, 11, audit(11)).await.unwrap();
    assert!(store.skills(None).await.unwrap().iter().all(|version| !version.is_current()));
    let lines = store.audit_page(None, 100).await.unwrap();
    assert_eq!(lines.iter().map(|line| line.at_ms).collect::<Vec<_>>(), [5, 9, 11]);
}
